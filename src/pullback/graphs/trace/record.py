"""The recorder of a forward computation: a torch function mode that writes down every call."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pullback.graphs.trace.calls as calls
import pullback.graphs.trace.frames as frames
from pullback.core import nodes
from pullback.core.operator import Operator
from pullback.graphs.trace.memory import Memory
from pullback.graphs.trace.modules import Path
from pullback.graphs.trace.names import named_tensors, structure, value_of
from pullback.graphs.trace.origins import NOT, Entry, Key, Known, Link, Op, Origins, has_gradient, version_of
from pullback.graphs.trace.saved import storage_of


class Recorder(Origins, TorchFunctionMode):
    """Records every torch function that is called in this thread, the user's code being run once.

    Args:
        known: see `Known`.
        numbers: look for the first nan or inf, and keep what gradients per edge need.
        base: code of the function that calls the user's.
        memory: of the modules' state; it is told before something writes to tensors.
    """

    def __init__(self, known: Known, numbers: bool, base: CodeType, memory: Memory) -> None:
        super().__init__(known, numbers)
        self._state = memory
        self._base = base
        self._grad = torch.is_grad_enabled()
        self._operator = 0  # how many operators of this library are running
        self._region: tuple[FrameType, int] | None = None
        self._transforms: dict[str, list[FrameType]] = {}

    # What torch calls ----------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, then write down what it did."""
        kwargs = kwargs or {}
        if self._operator or (self.stack is not None and self.stack.busy):
            return func(*args, **kwargs)
        before = [(t, has_gradient(t), version_of(t)) for t in calls.tensors_in((*args, *kwargs.values()))]
        keys = [self._key(t) if needs else None for t, needs, _ in before]
        if calls.writes(func, kwargs):
            self._state.writing(t for t, *_ in before)
        elif getattr(func, "__name__", "") == "backward":
            self._state.differentiating()
        grad = torch.is_grad_enabled()
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else [t for _, t in named_tensors(out, "")] if _holds(out) else []
        name = getattr(func, "__name__", "")
        changed = [t for t, _, v in before if version_of(t) != v or (name == "__set__" and t is args[0])]
        if name in calls.SILENT or not (made or changed or (name in calls.NUMBERS and before)):
            return out
        if name == "__set__" and not calls.sets_values(func):
            return out
        same = made and not changed and all(any(m is t for t, *_ in before) for m in made)  # x.contiguous() of x
        if same and getattr(func, "__module__", None) != "torch.nn.functional":
            return out
        self._record(func, args, kwargs, before, keys, made, changed, grad)
        return out

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        before: list[tuple[Tensor, bool, int]],
        keys: list[Key | None],
        made: list[Tensor],
        changed: list[Tensor],
        grad: bool,
    ) -> None:
        place = frames.look(sys._getframe(2), self._base)
        if place.region is not None:
            self._inside(place, before, keys, made + changed)
            return
        self._region = None
        label = calls.label_of(func)
        buffers = [t for t in changed if self._is_buffer(t)]
        results = [*made, *(t for t in changed if all(t is not m for m in made) and all(t is not b for b in buffers))]
        if buffers and all(self._is_buffer(t) for t, *_ in before):
            return  # a module counts its batches
        fresh = calls.is_fresh(label)
        kind = "constant" if fresh or not before else "operation"
        op = Op(label, kind, self._group(place), details=calls.details_of(func, args, kwargs), source=place.source)
        self._describe_module(op)
        if label.startswith(".data"):
            op.flags.add("unsafe")
        if self._grad and not grad and before:
            op.flags.add("no_grad")
        op.values = [value_of(t) for t in results]
        op.live = any(map(has_gradient, results))
        used = [] if fresh else [(needs, self.find(t, v)) for t, needs, v in before]
        index = self._add(op)
        finite = True
        for i, ((needs, entry), key) in enumerate(zip(used, keys, strict=False)):
            reason = entry.reason or self._cut(label, needs, op, results, grad)
            self.links.append(Link(entry.op, self.output_of(entry), index, i, reason, needs, key))
            finite = finite and entry.finite
        sound = self._made(index, results, changed)
        if finite and not sound and used:
            op.flags.add("nan")

    # Regions: many calls, one node ---------------------------------------------------------------------------------

    def _inside(self, place: frames.Place, before: Any, keys: Any, made: list[Tensor]) -> None:
        """A call inside a custom Function or a function of this library: part of that one node.

        A node that is drawn in between ends the region, so that edges never form a cycle.
        """
        frame = place.region
        assert frame is not None
        if self._region is None or self._region[0] is not frame:
            label, name = frames.region_label(frame, place.custom)
            op = Op(label, "function" if place.custom else "operator", self._group(place), source=place.source)
            op.name, op.region = name, True
            used = [(t, has_gradient(t), None) for t in calls.tensors_in(frames.region_arguments(frame, place.custom))]
            entries = [(self.find(t), needs) for t, needs, _ in used]
            self._region = frame, self._add(op)
            if place.custom:
                self._custom.append(self._region[1])
            for entry, needs in entries:
                self._link_region(entry, needs, self._key(entry.tensor) if needs else None)
        index = self._region[1]
        for (t, needs, _), key in zip(before, keys, strict=True):
            entry = self._entries.get(id(t)) or self.find(t)
            if entry.op != index:
                self._link_region(entry, needs, key)
        for t in made:
            entry = self._enter(t, index, -1)
            if entry.version:
                self._written[storage_of(t)[0]] = index

    def _link_region(self, entry: Entry, needs: bool, key: Key | None) -> None:
        assert self._region is not None
        index = self._region[1]
        output = self.output_of(entry)
        inputs = [k for k in self.links if k.target == index]
        if all((k.source, k.output) != (entry.op, output) for k in inputs):
            self.links.append(Link(entry.op, output, index, len(inputs), entry.reason, needs, key))

    def begins(self, module: nn.Module, path: Path) -> None:
        """A module starts. What it holds gets names; an operator of this library is one node, whatever it runs."""
        self._operator += isinstance(module, Operator)
        inner = path[1:] if self.stack and self.stack.classes.get(path[:1]) == path[0] else path
        for table, how in ((module._parameters, "parameter"), (module._buffers, "buffer")):
            for name, t in table.items():
                if t is not None:
                    self.known.setdefault(id(t), (".".join((*inner, name)), how, t))

    def ends(self, op: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has run (its output is None if it failed)."""
        if not isinstance(op, Operator):
            if not self._operator and output is not None and self._unseen(op, output):
                used = [*calls.tensors_in((*args, *kwargs.values())), *op.parameters()]
                self._opaque(type(op).__name__, "operation", used, output, {"module": repr(op)}, self._place())
            return
        self._operator -= 1
        if self._operator or output is None:
            return
        used = list(calls.tensors_in((*args, *kwargs.values())))
        held = [*op.parameters(), *(b for b in op.buffers() if b.requires_grad)]
        used += [p for p in held if all(p is not t for t in used)]
        place = self._place()
        direct = place.region is not None and place.region.f_locals.get("self") is op  # A @ x, which calls A(x)
        if place.region is not None and not direct:
            before = [(t, has_gradient(t), 0) for t in used]
            self._inside(place, before, [self._key(t) for t in used], [t for _, t in named_tensors(output, "")])
        else:
            self._opaque(structure(op._expression()), "operator", used, output, {"operator": repr(op)}, place)

    def _opaque(
        self, label: str, kind: str, used: list[Tensor], output: Any, details: dict[str, Any], place: frames.Place
    ) -> None:
        """A node for something that was run unseen."""
        self._region = None
        op = Op(label, kind, self._group(place), details=details, source=place.source)
        results = [t for _, t in named_tensors(output, "")]
        op.values = [value_of(t) for t in results]
        op.live = any(map(has_gradient, results))
        grad = torch.is_grad_enabled()
        if self._grad and not grad:
            op.flags.add("no_grad")
        entries = [(self.find(t), has_gradient(t), self._key(t)) for t in used]
        index = self._add(op)
        for i, (entry, needs, key) in enumerate(entries):
            reason = entry.reason or self._cut(label, needs, op, results, grad)
            self.links.append(Link(entry.op, self.output_of(entry), index, i, reason, needs, key))
        sound = self._made(index, results, [])
        if not sound and all(entry.finite for entry, *_ in entries):
            op.flags.add("nan")

    def _place(self) -> frames.Place:
        return frames.look(frames.caller(sys._getframe(1)), self._base)

    def _unseen(self, module: nn.Module, output: Any) -> bool:
        """Whether a module did its work outside of torch functions: compiled, or by way of NumPy."""
        results = [t for _, t in named_tensors(output, "")]
        missing = [t for t in results if id(t) not in self._entries and id(t) not in self.known]
        compiled = isinstance(module, torch.jit.ScriptModule)
        return bool(missing) and all(
            nodes.unwrapped(t) is t and (compiled or t.grad_fn is None) and storage_of(t)[0] not in self._memory
            for t in missing
        )

    # Small things --------------------------------------------------------------------------------------------------

    def _cut(self, label: str, needs: bool, op: Op, results: list[Tensor], grad: bool) -> str:
        """Why no gradient flows back along an edge, or ""."""
        if label in ("detach", "detach_"):
            return "detach"
        if label == ".data":
            return ".data"
        if not needs or op.live:
            return ""
        if not grad:
            return "no_grad" if self._grad else ""
        if label == "grad":  # in a transform, the outer level differentiates it
            return "" if op.group != (self.stack.path if self.stack else ()) else "create_graph=False"
        if results and not any(t.is_floating_point() or t.is_complex() for t in results):
            return "integer"
        return NOT

    def _key(self, t: Tensor) -> Key | None:
        """Where the gradient of `t` arrives in autograd's graph; kept only where gradients are asked for."""
        if not self._numbers or not t.requires_grad or nodes.unwrapped(t) is not t:
            return None
        return t if t.grad_fn is None else (t.grad_fn, t.output_nr)

    def _is_buffer(self, t: Tensor) -> bool:
        known = self.known.get(id(t))
        return known is not None and known[2] is t and known[1] == "buffer"

    def _describe_module(self, op: Op) -> None:
        if self.stack and self.stack.running:
            module = self.stack.running[-1][0]
            simple = not module._modules
            op.details["module"] = (
                f"{type(module).__name__}({module.extra_repr()})" if simple else type(module).__name__
            )

    def _group(self, place: frames.Place) -> Path:
        path = self.stack.path if self.stack else ()
        if place.transform is None:
            return path
        label = frames.transform_label(place.transform)
        known = self._transforms.setdefault(label, [])
        if all(f is not place.transform for f in known):
            known.append(place.transform)
        k = next(i for i, f in enumerate(known) if f is place.transform)
        return (*path, label if k == 0 else f"{label} ({k + 1})")

    def forget(self) -> None:
        """Let go of every tensor and frame."""
        for table in (self._entries, self._memory, self._written, self._transforms, self.owner):
            table.clear()
        self._region = None


def _holds(out: Any) -> bool:
    return isinstance(out, (tuple, list, dict))
