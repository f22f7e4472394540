"""Which module is running, and which modules a function can see."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from pullback.core.errors import ArgumentError
from pullback.core.operator import Operator
from pullback.graphs.trace.memory import Memory

Path = tuple[str, ...]


def surroundings(f: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of modules and tensors that `f` can see: itself, its closure, globals that it names, its owner."""
    stack: list[tuple[str, Any]] = [("", f)]
    seen: set[int] = set()
    homes: list[str] = []
    while stack:
        name, thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (nn.Module, Tensor)):
            yield name, thing
        elif isinstance(thing, functools.partial):
            stack += [("", thing.func), *((f"argument{i}", a) for i, a in enumerate(thing.args))]
            stack += thing.keywords.items()
        elif isinstance(thing, MethodType):
            owner = thing.__self__
            stack += [("", owner), ("", thing.__func__)]
            if not isinstance(owner, (nn.Module, Tensor, type)):
                stack += getattr(owner, "__dict__", {}).items()
        elif isinstance(thing, FunctionType):
            homes.append(thing.__module__)
            if thing.__module__ == homes[0]:  # helpers in the same file, not whole libraries
                stack += reversed(_visible(thing))
        elif isinstance(thing, (list, tuple)) and len(thing) <= 64:
            stack += [(f"{name}[{i}]", a) for i, a in enumerate(thing)]
        elif isinstance(thing, dict) and len(thing) <= 64:
            stack += [(f"{name}.{k}", a) for k, a in thing.items()]
        elif thing is f and hasattr(thing, "__dict__"):  # an object with __call__, or the owner of a method
            stack += [*vars(thing).items(), ("", vars(type(thing)).get("__call__"))]


def _visible(f: FunctionType) -> list[tuple[str, Any]]:
    """(name, value) of what a function's code names outside of itself."""
    found = []
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not assigned yet
            continue
    return found + [(name, f.__globals__[name]) for name in f.__code__.co_names if name in f.__globals__]


class Stack:
    """The modules whose forward is running in this thread, as paths: ("Net", "layer4", "1", "relu").

    A module that is called again in the same call of its parent gets a path of its own, "relu (2)", because one box
    around both calls would make a cycle. Torch's global module hooks tell when a module begins and ends; they are
    removed on exit, and calls in other threads are passed over.
    """

    def __init__(
        self,
        memory: Memory,
        begin: Callable[[nn.Module, Path], None],
        end: Callable[[nn.Module, Any, Any, Any], None],
        names: Mapping[int, str],
    ) -> None:
        self.path: Path = ()
        self.busy = False  # torch functions that are called meanwhile are not part of the computation
        self.classes: dict[Path, str] = {}
        self.running: list[tuple[nn.Module, Path]] = []
        self._calls: dict[tuple[Path, str], int] = {}
        self._names: dict[int, dict[int, str]] = {}
        self._memory = memory
        self._begin, self._end = begin, end
        self._outer = names
        self._thread = threading.get_ident()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the modules inside."""
        enter = hooks.register_module_forward_pre_hook(self._enter)
        try:
            leave = hooks.register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
            try:
                yield
            finally:
                leave.remove()
                hooks._global_forward_hooks_with_kwargs.pop(leave.id, None)  # remove() forgets this one in torch 2.13
        finally:
            enter.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            self.busy = True
            try:
                self._entered(module)
            finally:
                self.busy = False

    def _entered(self, module: nn.Module) -> None:
        refuse_lazy(module)
        self._memory.keep(module, running=True)
        parts = self._below(module)
        path = self.path
        if isinstance(module, Operator):  # drawn as one node, not as a group
            self.running.append((module, path))
            self._begin(module, (*path, *parts))
            return
        inner = self.running[-1][0] if self.running else module
        for part in parts[:-1]:
            path, inner = (*path, part), inner.get_submodule(part)
            self.classes.setdefault(path, type(inner).__name__)
        count = self._calls[path, parts[-1]] = self._calls.get((path, parts[-1]), 0) + 1
        path = (*path, parts[-1] if count == 1 else f"{parts[-1]} ({count})")
        self.classes[path] = type(module).__name__
        self._begin(module, path)
        self.running.append((module, self.path))
        self.path = path

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> None:
        # After an exception torch calls the hook without kwargs: (result,) instead of (kwargs, result).
        kwargs, output = rest if len(rest) == 2 else ({}, None)
        if threading.get_ident() != self._thread:
            return
        self.busy = True
        try:
            while self.running:
                last, self.path = self.running.pop()
                self._end(last, args, kwargs, output if last is module else None)
                if last is module:
                    break
        finally:
            self.busy = False

    def _below(self, module: nn.Module) -> list[str]:
        """The module's name below the one that is running; at the top the user's name for it, or its class."""
        if self.running:
            parent = self.running[-1][0]
            names = self._names.get(id(parent))
            if names is None:
                names = {}
                for name, m in parent.named_modules(remove_duplicate=True):
                    names[id(m)] = name
                names.update({id(m): name for name, m in parent.named_children()})
                self._names[id(parent)] = names
            if names.get(id(module)):
                return names[id(module)].split(".")
        return [self._outer.get(id(module), type(module).__name__)]


def refuse_lazy(module: nn.Module) -> None:
    """Running a lazy module would create its parameters, which changes the user's model."""
    for p in module._parameters.values():
        if p is not None and nn.parameter.is_lazy(p):
            raise ArgumentError(
                f"{type(module).__name__} has parameters without values yet, and drawing must not create them; call "
                f"the model once, then draw it"
            )


def common_path(paths: Iterable[Path]) -> Path:
    """The longest path that all begin with; () of none."""
    found: Path | None = None
    for path in paths:
        if found is None:
            found = path
        else:
            k = 0
            while k < min(len(found), len(path)) and found[k] == path[k]:
                k += 1
            found = found[:k]
    return found or ()
