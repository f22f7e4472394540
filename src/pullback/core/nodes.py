"""The graph that autograd built, read without changing it: its nodes, their edges, results and saved tensors.

A node is the object behind `tensor.grad_fn`. It can be called: `node(*gradients of its results)` returns the gradients
of its inputs (do not call the node of a leaf: it would write into `.grad`). Nothing here recurses. Measured on torch
2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, NotDifferentiableError


class Result(NamedTuple):
    """What is known about one result of a node; no tensor is kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def root(tensor: Tensor, name: str = "y") -> tuple[Any, int]:
    """The node that made `tensor`, and which of its results the tensor is; for a leaf, the node that collects `.grad`.

    Raises: ArgumentError if the tensor does not require grad.
    """
    if not tensor.requires_grad:
        raise ArgumentError(
            f"{name} must require grad; got a tensor of shape {tuple(tensor.shape)} without a graph behind it; was it "
            f"computed under torch.no_grad(), detached, or from tensors that do not require grad?"
        )
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def inputs(node: Any) -> tuple[tuple[Any, int], ...]:
    """(node, index of its result) for every input; the node is None where no gradient flows."""
    return node.next_functions


def variable(node: Any) -> Tensor | None:
    """The leaf tensor that a node stands for, or None if it is an operation."""
    return getattr(node, "variable", None) if node.name() == "torch::autograd::AccumulateGrad" else None


def operator(node: Any) -> Any:
    """The operator of this library (or the Map of a reduction or of a solver) that a node applies, or None."""
    if node.name() != "_BridgeBackward":
        return None
    return getattr(node, "op", None) or getattr(node, "map", None)


def name(node: Any) -> str:
    """What to call a node: the operation without "Backward0", the Function's name, or the operator as a formula."""
    op = operator(node)
    if op is None:
        base = node.name().rsplit("::", 1)[-1]
        head = base.rstrip("0123456789")
        return head.removesuffix("Backward") or base
    expression = getattr(op, "_expression", None)
    if expression is None:  # a Map; its key is "kernel:number:program", "solve:number:method"
        return op.key.split(":", 2)[-1] if op.key.count(":") > 1 else type(op).__name__.strip("_")
    text = re.sub(r"\b_(?=[A-Z])", "", expression())  # a private operator does the work of a public one
    if not node.adjoint:
        return text
    return f"{text}.H" if re.fullmatch(r"\w+(\([^()]*\))?", text) else f"({text}).H"


def results(node: Any) -> tuple[Result, ...]:
    """Shape, dtype and device of every result of a node."""
    return tuple(Result(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata)


def vjp(node: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """J^H g: the gradients of a node's inputs, in the order of `inputs(node)`, for gradients of its results.

    Nothing else is run: no hooks, no `.grad`. What the engine does between two nodes is done here, too: gradients are
    summed to the shape of the input that was broadcast and converted to its dtype.

    Args:
        node: an operation; never the node of a leaf, which would write into `.grad`.
        gradients: one tensor for every result; None is zero.

    Returns: a tensor for every input; None where no gradient flows.

    Raises: NotDifferentiableError if the saved tensors have been freed, or if running the node would run a backward
    pass of its own (checkpoints with use_reentrant=True).
    """
    if variable(node) is not None:
        raise AssertionError("vjp was asked to run the node of a leaf; please report")
    if node.name() == "CheckpointFunctionBackward":
        raise NotDifferentiableError(
            "a checkpoint with use_reentrant=True runs a backward pass of its own, which writes into .grad, so it "
            "cannot be run by itself; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    edges = inputs(node)
    try:
        with torch.no_grad():
            found: Sequence[Tensor | None]
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                found = _vjp_of_function(node, gradients, edges)
            else:
                found = node(*gradients)
                found = found if isinstance(found, tuple) else (found,)
            return tuple(
                None if g is None or child is None else _fitted(g, results(child)[k])
                for g, (child, k) in zip(found, edges, strict=True)
            )
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise NotDifferentiableError(
            f"the tensors that {name(node)} saved have been freed by a backward pass; ask before backward(), or call "
            f"backward(retain_graph=True)"
        ) from None


def _vjp_of_function(
    node: Any, gradients: Sequence[Tensor | None], edges: Sequence[tuple[Any, int]]
) -> list[Tensor | None]:
    """A custom Function returns a gradient for every argument; its edges are only those that are tensors."""
    given = [
        torch.zeros(r.shape, dtype=r.dtype, device=r.device) if g is None else g
        for g, r in zip(gradients, results(node), strict=True)
    ]
    found = node.apply(*given)
    found = found if isinstance(found, tuple) else (found,)
    wanted = iter([g for g, needed in zip(found, node.needs_input_grad, strict=False) if needed])
    return [None if child is None else next(wanted) for child, _ in edges]


def _fitted(gradient: Tensor, result: Result) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.is_complex() and not result.dtype.is_complex:
        gradient = gradient.real
    if tuple(gradient.shape) != result.shape:
        gradient = gradient.sum_to_size(result.shape)
    return gradient.to(device=result.device, dtype=result.dtype)


def saved(node: Any) -> Iterator[tuple[str, Tensor | None]]:
    """(name, tensor) for every tensor that a node saved for its derivative.

    None where the tensor has been freed, or packed away by `torch.autograd.graph.saved_tensors_hooks`.
    """
    for key in _names(node)[0]:
        label = key.removeprefix("_raw_saved_")
        try:
            handles = getattr(node, key)
        except RuntimeError:  # a custom Function after backward
            yield label, None
            continue
        several = isinstance(handles, (tuple, list))
        for i, handle in enumerate(handles if several else (handles,)):
            if handle is not None:
                value = handle.data
                yield f"{label}[{i}]" if several else label, value if isinstance(value, Tensor) else None


# type of a node -> names of its saved tensors, names of its other saved attributes
_attributes: WeakKeyDictionary[type, tuple[tuple[str, ...], tuple[str, ...]]] = WeakKeyDictionary()


def _names(node: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kind = type(node)
    found = _attributes.get(kind)
    if found is None:
        names = sorted(dir(kind))
        raw = tuple(n for n in names if n.startswith("_raw_saved_"))
        rest = tuple(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in raw)
        found = _attributes[kind] = raw, rest
    return found


def freed(node: Any) -> bool:
    """Whether a backward pass has released what the node saved, so that it cannot run again."""
    for key in _names(node)[0]:
        try:
            handle = getattr(node, key)
            if isinstance(handle, tuple) or handle.data is not None:
                continue
            getattr(node, key.removeprefix("_raw"))  # None here: never saved; an error: released
        except RuntimeError:
            return True
    return False


def settings(node: Any) -> dict[str, Any]:
    """The numbers that a torch node keeps: {"stride": (2, 2), "dim": 1}. Sizes of its arguments are left out."""
    found = {}
    for key in _names(node)[1]:
        label = key.removeprefix("_saved_")
        if label.endswith(("_sizes", "_sizes_opt", "_numel")):
            continue
        try:
            value = getattr(node, key)
        except RuntimeError:  # released with the saved tensors
            continue
        if isinstance(value, int) and value >= 1 << 63:  # torch shows a negative axis as an unsigned number
            value -= 1 << 64
        if value is not None and value != ():
            found[label] = value
    return found


def topological(roots: Iterable[Any], following: Callable[[Any], Iterable[Any]] | None = None) -> list[Any]:
    """Everything that can be reached from `roots`, each before what follows it.

    Args:
        roots: nodes of autograd, or hashable vertices of another graph without cycles.
        following: vertex -> what follows it, repetitions included; called once for each. None: the nodes of its inputs.
    """
    following = _behind if following is None else following
    stack = list(dict.fromkeys(roots))
    waiting = dict.fromkeys(stack, 0)
    first = list(stack)
    heads: dict[Any, list[Any]] = {}
    while stack:
        vertex = stack.pop()
        heads[vertex] = list(following(vertex))
        for head in heads[vertex]:
            if head not in waiting:
                waiting[head] = 0
                stack.append(head)
            waiting[head] += 1
    order = []
    ready = [vertex for vertex in reversed(first) if not waiting[vertex]]
    while ready:
        vertex = ready.pop()
        order.append(vertex)
        for head in heads[vertex]:
            waiting[head] -= 1
            if not waiting[head]:
                ready.append(head)
    return order


def _behind(node: Any) -> list[Any]:
    return [child for child, _ in inputs(node) if child is not None]


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrapper that one torch.func transform put around it; itself if there is none."""
    return torch.func.debug_unwrap(tensor)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]
