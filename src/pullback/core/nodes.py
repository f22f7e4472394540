"""The graph that autograd built, read without changing it: its nodes, their edges, results and saved tensors.

A node is the object behind `tensor.grad_fn`. It can be called: `node(*gradients of its results)` returns the gradients
of its inputs (do not call the node of a leaf: it would write into `.grad`). Nothing here recurses. Measured on torch
2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError


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
    if expression is None:
        return type(op).__name__.strip("_")
    text = expression()
    return f"({text}).H" if node.adjoint else text


def results(node: Any) -> tuple[Result, ...]:
    """Shape, dtype and device of every result of a node."""
    return tuple(Result(tuple(m.shape), m.dtype, m.device) for m in node._input_metadata)


def saved(node: Any) -> Iterator[tuple[str, Tensor | None]]:
    """(name, tensor) for every tensor that a node saved for its derivative.

    None where the tensor has been freed, or packed away by `torch.autograd.graph.saved_tensors_hooks`.
    """
    for key in dir(node):
        if not key.startswith("_raw_saved_"):
            continue
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


def topological(roots: Iterable[Any]) -> list[Any]:
    """Every node behind `roots`, each before the nodes of its inputs."""
    waiting: dict[Any, int] = {}
    stack = list(dict.fromkeys(roots))
    first = list(stack)
    seen = set(stack)
    while stack:
        for child, _ in inputs(stack.pop()):
            if child is not None:
                waiting[child] = waiting.get(child, 0) + 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    order = []
    ready = [n for n in reversed(first) if not waiting.get(n)]
    while ready:
        node = ready.pop()
        order.append(node)
        for child, _ in inputs(node):
            if child is not None:
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
    return order


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]
