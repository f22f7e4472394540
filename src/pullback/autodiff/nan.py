"""nan_origin(f, ...): which operation, module and line of a program made its first NaN or Inf."""

from __future__ import annotations

import html
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from pullback.autodiff.nan_advice import Statistics, advice
from pullback.autodiff.nan_watch import Event, Source, Watch
from pullback.core.errors import ArgumentError


class NanOrigin:
    """Where NaN or Inf comes from; printed for reading.

    Attributes:
        found: whether the result, or a gradient, holds NaN or Inf. False is printed as "no NaN or Inf".
        kind: "NaN" or "Inf".
        stage: "input", "forward" or "backward".
        operation: the operation that made it (torch's name, the custom Function, the operator of this library, the node
            of the graph in the backward pass), or the name of the input that held it.
        function: the custom Function inside of which the operation ran, or None.
        module: path of the module that was running, as `Net.layer2.norm`, or None.
        source: the user's line: `file`, `line`, `code`; in the backward pass the line of the forward pass that made the
            node. None if no line of the user is on the stack.
        inputs: statistics of what went in (in the backward pass: of what was saved, and of the incoming gradient).
        advice: what is known about this case, or "".
        cause: the origin of the Inf that the operation met, if it made NaN of Inf in the forward pass; or of the NaN of
            the forward pass that the backward pass met, although the result did not show it.
        node: the node of autograd's graph in the backward pass; None in the forward pass.
        notes: what else is worth knowing: inputs that hold NaN, NaN that was thrown away, no backward pass.
    """

    def __init__(self, event: Event | None, notes: list[str]) -> None:
        self.found = event is not None
        self.notes = tuple(notes)
        self.kind: str | None = event.kind if event else None
        self.stage: str | None = event.stage if event else None
        self.operation: str | None = event.operation if event else None
        self.function: str | None = event.function if event else None
        self.module: str | None = event.module if event else None
        self.source: Source | None = event.source if event else None
        self.inputs: tuple[Statistics, ...] = event.inputs if event else ()
        self.node: Any = event.node if event else None
        self.advice = advice(event.stage, event.names, event.inputs) if event else ""
        self.cause: NanOrigin | None = NanOrigin(event.cause, []) if event and event.cause else None
        self._detail = event.detail if event else ""

    def __bool__(self) -> bool:
        return self.found

    def __repr__(self) -> str:
        return "\n".join([*(self._lines() if self.found else ["no NaN or Inf"]), *(f"note: {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _lines(self) -> list[str]:
        if self.stage == "input":
            return [f"{self.kind} was there before the first operation: {'; '.join(map(str, self.inputs))}"]
        text = f"{self.kind} made in the {self.stage} pass by {self.operation}"
        text += f" ({self._detail})" if self._detail else ""
        text += f" inside of {self.function}" if self.function else ""
        text += f", in {self.module}" if self.module else ""
        lines = [text]
        if self.source is not None:
            lines.append(f"  at {self.source}")
        lines += [f"  {s}" for s in self.inputs]
        lines += textwrap.wrap(self.advice, 108, initial_indent="  ", subsequent_indent="  ")
        if self.cause is not None:
            lines += [f"  the {self.cause.kind} that it met:", *(f"    {line}" for line in self.cause._lines())]
        return lines


def nan_origin(
    f: Callable[..., Any],
    *args: Any,
    backward: bool = True,
    inf: bool = False,
    grad_output: Any = None,
    **kwargs: Any,
) -> NanOrigin:
    """The first operation that made the NaN or Inf which the result, or a gradient, of f(*args, **kwargs) holds.

    f runs once, with every operation watched, also those of a backward pass that f runs itself (a training step). If
    the result is finite and has a graph, its sum is differentiated in all leaves, without touching `.grad`. What did
    not reach the result is not reported: -inf that a softmax turned into 0, NaN that `torch.where` threw away.

    Args:
        f: a function or a module, not compiled.
        args, kwargs: what it is called with.
        backward: also differentiate.
        inf: blame what made the first Inf, if the NaN was made of Inf; otherwise that is the `cause`.
        grad_output: the gradient of the result, or a list with one for each tensor of it; by default ones.

    Returns: a `NanOrigin`; false where all is finite.

    Raises: what f raises, unless NaN or Inf were there by then: that is reported, with the error as a note.

    Cost: several times f, and a look at every tensor it makes. Operations of other threads are not seen.
    """
    if not callable(f):
        raise ArgumentError(
            f"f must be a function or a module; got {type(f).__name__}; write nan_origin(lambda: ..., )"
        )
    watch, notes = Watch(), []
    for name, tensor in _inputs(f, args, kwargs):
        watch.mark(tensor, name)
    for event in watch.events:
        s = event.inputs[0]
        held = ", ".join(f"{n} {what}" for n, what in ((s.nans, "NaN"), (s.infs, "Inf")) if n)
        notes.append(f"{event.operation} holds {held}")
    with watch.watching():
        try:
            result = _run_user(f, args, kwargs)
        except Exception as error:
            culprit = _worst([e for e in watch.events if e.kind == "NaN"])
            if culprit is None:
                raise
            notes.append(
                f"f raised {type(error).__name__.strip('_')}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            return _report(culprit, watch, notes, inf)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        found = _worst([e for t in outputs if (e := watch.origin(t))])
        found = found or _worst([e for t in watch.leaves if t.grad is not None and (e := watch.origin(t.grad))])
        if found is None and backward:
            found = _backward(watch, outputs, grad_output, notes)
    return _report(found, watch, notes, inf)


def _run_user(f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Frames below this one are the user's."""
    return f(*args, **kwargs)


def _backward(watch: Watch, outputs: list[Tensor], grad_output: Any, notes: list[str]) -> Event | None:
    """The origin of NaN or Inf in the gradients of the leaves."""
    roots = [t for t in outputs if t.requires_grad]
    if not roots:
        notes.append("the result does not require grad, so there was no backward pass to look at")
        return None
    if grad_output is None:
        gradients = [torch.ones_like(t) for t in roots]
    else:
        gradients = [t for t in tree_leaves(grad_output) if isinstance(t, Tensor)]
        if [g.shape for g in gradients] != [t.shape for t in roots]:
            raise ArgumentError(
                f"grad_output must match the {len(roots)} results that require grad, of shapes "
                f"{[tuple(t.shape) for t in roots]}; got {[tuple(g.shape) for g in gradients]}"
            )
    with watch.backward(roots), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error detected in")  # anomaly mode, before an error
        leaves = list(watch.leaves) or [t for t in roots if t.is_leaf]
        try:
            found = torch.autograd.grad(roots, leaves, gradients, retain_graph=True, allow_unused=True)
        except Exception as error:
            culprit = _worst([e for e in watch.events if e.stage == "backward"])
            if culprit is None:
                raise
            notes.append(f"the backward pass raised {_first_line(error)}")
            return culprit
    return _worst([e for g in found if g is not None and (e := watch.origin(g))])


def _report(event: Event | None, watch: Watch, notes: list[str], inf: bool) -> NanOrigin:
    while event is not None and event.cause is not None and (inf or event.cause.stage == event.stage == "backward"):
        if event.kind == "NaN" and event.cause.kind == "Inf":
            notes.append(f"{event.operation} made NaN of it")
        event = event.cause
    hidden = next((e for e in watch.events if e.kind == "NaN" and e.stage == "forward"), None)
    if hidden is not None and (event is None or (event.stage == "backward" and event.cause is not hidden)):
        where = f" at {hidden.source}" if hidden.source else ""
        notes.append(f"{hidden.operation} made NaN{where}, which did not reach the result")
    return NanOrigin(event, notes)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__.strip('_')}: {str(error).partition(chr(10))[0]}"


def _worst(events: list[Event]) -> Event | None:
    """NaN before Inf, the earlier first."""
    return next((e for e in events if e.kind == "NaN"), events[0] if events else None)


def _inputs(f: Any, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """The tensors that f gets, by name: arguments, and the parameters and buffers of modules."""
    found, modules = [], [("", f), ("", getattr(f, "__self__", None))]
    for path, leaf in tree_flatten_with_path((args, kwargs))[0]:
        where, *rest = path[1:]
        name = f"input {getattr(where, 'idx', getattr(where, 'key', where))}{keystr(tuple(rest))}"
        if isinstance(leaf, Tensor):
            found.append((name, leaf))
        modules.append((f"{name}.", leaf))
    for prefix, module in modules:
        if isinstance(module, torch.nn.Module):
            found += [(f"parameter {prefix}{n}", p) for n, p in module.named_parameters()]
            found += [(f"buffer {prefix}{n}", b) for n, b in module.named_buffers()]
    return found
