"""What watches a computation for `nan_origin`: every operation torch runs, the module and line it comes from, and the
node of a backward pass it belongs to.

For each memory that got NaN or Inf it is known which operation brought them in, so that a NaN which `torch.where` threw
away is not blamed for one that stayed. All that is installed is removed when the block ends.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pullback.autodiff.nan_advice import Statistics
from pullback.core import autograd, maps, nodes

_TORCH = str(Path(torch.__file__).parent)
_PULLBACK = str(Path(__file__).parents[1])
_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "empty_permuted"}
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
_BACKWARD = {"backward", "grad"}


class Source(NamedTuple):
    """A line of the user's program."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f"  {self.code}" if self.code else "")


@dataclass(eq=False)
class Event:
    """An operation that made NaN or Inf of inputs that held none (or NaN of inputs that held Inf)."""

    kind: str  # "NaN" or "Inf"
    stage: str  # "input", "forward" or "backward"
    operation: str
    inputs: tuple[Statistics, ...] = ()
    module: str | None = None
    source: Source | None = None
    function: str | None = None  # the custom Function whose code ran it
    node: Any = None  # the node of the graph, in the backward pass
    detail: str = ""  # the operation inside of that node
    cause: Event | None = None  # what made the Inf, or the saved NaN, that it met
    names: tuple[str, ...] = field(default=())  # for the table of advice


class Watch:
    """Watches all operations of a block, on this thread.

    Attributes:
        events: what was found, in the order of execution.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.leaves: dict[Tensor, None] = {}
        self._made: dict[int, tuple[Event, Any]] = {}  # storage -> who brought in its NaN or Inf; the storage is kept
        self._paused = False
        self._modules: list[tuple[torch.nn.Module, str, int]] = []
        self._names: dict[torch.nn.Module, str] = {}
        self._spans: list[tuple[int, int, str]] = []  # sequence numbers of nodes made in a call of a module
        self._nodes: list[tuple[Any, Sequence[Tensor | None]]] = []
        self._call = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The block that is watched."""
        with ExitStack() as stack:
            enter = torch_module.register_module_forward_pre_hook(self._enter)
            stack.callback(enter.remove)
            leave = torch_module.register_module_forward_hook(self._leave, always_call=True)
            stack.callback(leave.remove)
            stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
            stack.enter_context(_Calls(self))
            stack.enter_context(_Operations(self))
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations of our own are not watched."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def mark(self, tensor: Tensor, name: str) -> None:
        """An input that may hold NaN or Inf before anything has run."""
        bad = self._bad(tensor)
        if bad:
            event = Event(bad, "input", name, (self._statistics(name, tensor),))
            self.events.append(event)
            self._remember(tensor, event)

    def origin(self, tensor: Tensor) -> Event | None:
        """Who brought in the NaN or Inf that a tensor holds, None if it holds none."""
        bad = self._bad(tensor)
        return self._known(tensor, bad) if bad else None

    # Operations -----------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation, with its inputs and results looked at."""
        if self._paused:
            return func(*args, **kwargs)
        name = func._schema.name.rsplit("::", 1)[-1]
        given = [t for t in tree_leaves((args, {k: v for k, v in kwargs.items() if k != "out"})) if _readable(t)]
        if name in _OVERWRITING:
            given = given[1:]
        before = None
        if func._schema.is_mutable or "batch_norm" in name:  # afterwards the inputs are gone
            with self.paused():
                before = self._look(given)
        out = func(*args, **kwargs)
        if name in _UNINITIALISED or (self._nodes and name == "detach"):  # detach: how a node unpacks what it saved
            return out
        with self.paused():
            written = tree_leaves(out) + (given if before is not None else [])
            bad = [(t, kind) for t in written if (kind := self._bad(t))]
            if bad:
                self._blame(name, func, args, given, before or self._look(given), bad)
        return out

    def _look(self, tensors: Sequence[Tensor]) -> list[tuple[str, Event | None, Statistics]]:
        found = []
        for i, t in enumerate(tensors):
            bad = self._bad(t)
            statistics = self._statistics(f"input {i}", t)
            found.append((bad, self._known(t, bad) if bad else None, statistics))
        return found

    def _blame(self, name: str, func: Any, args: Any, given: Any, inputs: Any, bad: list[tuple[Tensor, str]]) -> None:
        kind = "NaN" if any(k == "NaN" for _, k in bad) else "Inf"
        nans = [event for k, event, _ in inputs if k == "NaN"]
        infs = [event for k, event, _ in inputs if k == "Inf"]
        passed = nans or (infs if kind == "Inf" else [])
        if self._nodes:  # a gradient passes its NaN on; a saved tensor brings it into the backward pass
            passed = [e for e in passed if e.stage == "backward"]
        if passed:
            event = passed[0]
        else:
            event = self._event(kind, _operation(name, func, args), tuple(s for *_, s in inputs))
            event.cause = (nans or infs or [None])[0]
            event.names = (name.rstrip("_").removeprefix("_"), name, self._call, *event.names)
        for tensor, _ in bad:
            self._remember(tensor, event)

    def _event(self, kind: str, operation: str, inputs: tuple[Statistics, ...]) -> Event:
        source, function, engine = _stack()
        event = Event(kind, "forward", operation, inputs, source=source, function=function)
        if self._nodes:
            self._place(event)
        elif engine:
            event.stage = "backward"
        elif self._modules:
            event.module = self._modules[-1][1]
        self.events.append(event)
        return event

    def _place(self, event: Event) -> None:
        """The node of the backward pass that runs now: its name, what it saved, where it was made."""
        node, gradients = self._nodes[-1]
        event.stage, event.node, event.detail = "backward", node, event.operation
        event.operation, event.names = nodes.name(node), (nodes.name(node),)
        event.detail = "" if event.detail == event.operation else event.detail
        looked = [self._statistics(n, t) for n, t in nodes.saved(node) if t is not None and _readable(t)]
        looked += [self._statistics("gradient", g) for g in gradients if g is not None and _readable(g)]
        event.inputs = tuple(looked)
        event.source = _made_at(node) or event.source
        number = node._sequence_nr()
        spans = [(end - start, path) for start, end, path in self._spans if start <= number < end]
        event.module = min(spans)[1] if spans else None

    def _known(self, tensor: Tensor, kind: str) -> Event:
        found = self._made.get(_storage(tensor))
        if found is not None:
            return found[0]
        node = tensor.grad_fn if not tensor.is_leaf else None
        event = self._event(kind, "code outside of torch" if node is None else nodes.name(node), ())
        if event.stage == "forward":
            if event.function is not None and node is None:
                event.operation, event.function = event.function, None
            event.source = (_made_at(node) if node is not None else None) or event.source
        event.names = ("outside",)
        self._remember(tensor, event)
        return event

    def _remember(self, tensor: Tensor, event: Event) -> None:
        self._made[_storage(tensor)] = (event, tensor.untyped_storage())

    def _bad(self, tensor: Any) -> str:
        """What a tensor holds: "NaN", "Inf" or ""."""
        if not _readable(tensor):
            return ""
        with self.paused(), torch.no_grad():
            if bool(tensor.isfinite().all()):
                return ""
            return "NaN" if bool(tensor.isnan().any()) else "Inf"

    def _statistics(self, name: str, tensor: Tensor) -> Statistics:
        with self.paused(), torch.no_grad():
            return Statistics.of(name, tensor)

    # Backward passes ------------------------------------------------------------------------------------------------

    @contextmanager
    def backward(self, roots: Sequence[Any]) -> Iterator[None]:
        """A backward pass from these tensors runs in this block."""
        starts = [t.grad_fn for t in roots if isinstance(t, Tensor) and t.grad_fn is not None]
        handles = []
        with self.paused():
            for node in nodes.topological(starts):
                leaf = nodes.variable(node)
                if leaf is not None:
                    self.leaves[leaf] = None
                    continue
                handles.append(node.register_prehook(self._before(node)))
                handles.append(node.register_hook(self._after))
        try:
            yield
        finally:
            self._nodes.clear()
            for handle in handles:
                handle.remove()

    def _before(self, node: Any) -> Any:
        def hook(gradients: Sequence[Tensor | None]) -> None:
            self._nodes.append((node, gradients))

        return hook

    def _after(self, found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        for gradient in found:
            bad = self._bad(gradient)
            if bad and gradient is not None:
                self._known(gradient, bad)  # code outside of torch is blamed on this node
        if self._nodes:
            self._nodes.pop()

    # Modules --------------------------------------------------------------------------------------------------------

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if not self._modules:
            root = type(module).__name__
            self._names = {m: f"{root}.{n}" if n else root for n, m in module.named_modules()}
        path = self._names.get(module) or f"{self._modules[-1][1]}.{type(module).__name__}"
        self._modules.append((module, path, self._sequence()))

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        while self._modules:
            found, path, start = self._modules.pop()
            self._spans.append((start, self._sequence(), path))
            if found is module:
                break

    def _sequence(self) -> int:
        """The number that the next node of autograd's graph gets on this thread."""
        with self.paused(), torch.inference_mode(False), torch.enable_grad():
            node = torch.zeros((), requires_grad=True).clone().grad_fn
        return node._sequence_nr() if node is not None else 0


class _Operations(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.watch.run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Sees what the user calls: its name, and backward passes before they start."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.watch._paused:
            return func(*args, **kwargs)
        if name in _BACKWARD and not autograd.transforms_active():
            with self.watch.backward(tree_leaves(args[:1] or kwargs.get("outputs"))):
                return func(*args, **kwargs)
        before, self.watch._call = self.watch._call, name
        try:
            return func(*args, **kwargs)
        finally:
            self.watch._call = before


def _readable(value: Any) -> bool:
    """A tensor whose numbers can be looked at."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and (value.is_complex() or (value.is_floating_point() and value.dtype.itemsize > 1))
        and not isinstance(value, torch._subclasses.FakeTensor)
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _operation(name: str, func: Any, args: Any) -> str:
    """What to call an operation: its name, or the operator of this library that it applies."""
    if func.namespace != "pullback":
        return name.removeprefix("_")
    made = autograd.lookup(args[1]) if name == "apply" else maps.lookup(args[0]) if name == "map" else None
    expression = getattr(made, "_expression", None)
    return expression() if expression is not None else type(made).__name__.strip("_") if made is not None else name


def _stack() -> tuple[Source | None, str | None, bool]:
    """The user's line, the custom Function around it, and whether autograd's engine runs it."""
    source, function, engine = None, None, False
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        inside = file.startswith((_TORCH, _PULLBACK, "<frozen"))
        if file.startswith(_PULLBACK) and code.co_name == "_run_user":
            break
        if source is None and not inside:
            source = Source(file, frame.f_lineno, linecache.getline(file, frame.f_lineno).strip())
        if file.startswith(_TORCH):
            if function is None and code.co_name == "apply" and isinstance(frame.f_locals.get("cls"), type):
                function = frame.f_locals["cls"].__name__
            engine = engine or code.co_name == "_engine_run_backward"
        frame = frame.f_back
    return source, function, engine


_LINE = re.compile(r'\s*File "(.+)", line (\d+), in [^\n]*\n?\s*([^\n]*)')


def _made_at(node: Any) -> Source | None:
    """The line of the forward pass that made a node, as anomaly mode recorded it."""
    for entry in reversed(node.metadata.get("traceback_", ())):
        match = _LINE.match(entry)
        if match and not match[1].startswith((_TORCH, _PULLBACK, "<frozen")):
            return Source(match[1], int(match[2]), match[3].strip())
        if match and match[1].startswith(_PULLBACK) and ", in _run_user" in entry:
            return None
    return None
