"""Norms of the gradients that flow along the edges of an autograd graph, and where they stop being finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core import nodes
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.graphs.trace.names import named_tensors


def norm(tensor: Tensor) -> Tensor:
    """The l2 norm over all elements in double precision, on the tensor's device; inf and nan survive."""
    t = _dense(tensor)
    magnitude = t.abs().to(torch.float32 if t.device.type == "mps" else torch.float64)
    if not t.numel():
        return magnitude.sum()
    largest = magnitude.amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return scale * torch.linalg.vector_norm(magnitude / scale)  # so that squares do not overflow


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither inf nor nan."""
    return bool(_dense(tensor).isfinite().all())


def _dense(tensor: Tensor) -> Tensor:
    t = tensor.detach()
    return t if t.layout is torch.strided else t.to_dense()


class Flow:
    """What one backward pass carried.

    Attributes:
        edges: (node, index of its input) -> norm of the gradient that the node sends there.
        leaves: node of a leaf -> norm of what would be added to `.grad`.
        results: one norm a tensor with which the pass began.
        origins: the nodes that got finite gradients and made others.
        sums: key -> norm of the sum of the gradients that were to be added.
    """

    def __init__(self) -> None:
        self.edges: dict[tuple[Any, int], float] = {}
        self.leaves: dict[Any, float] = {}
        self.results: list[float] = []
        self.origins: set[Any] = set()
        self.sums: dict[Any, float] = {}


def gradient_flow(
    order: Sequence[Any],
    outputs: Sequence[Tensor],
    grad_outputs: Any = None,
    sums: Mapping[tuple[Any, int], Any] | None = None,
) -> Flow:
    """One backward pass through `order`, watched by hooks that are gone afterwards; no `.grad` is touched.

    Args:
        order: `core.nodes.topological` of the outputs.
        outputs: tensors that require grad.
        grad_outputs: what the pass begins with, as many tensors as there are outputs; default: ones.
        sums: (node, index of its input) -> key; gradients with the same key are also added up.

    Raises: NotDifferentiableError if the graph has been freed or cannot run backward.
    """
    starts = _starts(outputs, grad_outputs)
    seen: dict[tuple[Any, int], Tensor] = {}
    added: dict[Any, Tensor] = {}
    sums = sums or {}

    def watch(node: Any, grad_inputs: Sequence[Tensor | None], _: Any) -> None:
        for i, g in enumerate(grad_inputs):
            if g is not None:
                seen[node, i] = norm(g)
                if (node, i) in sums:
                    key = sums[node, i]
                    added[key] = added[key] + g if key in added else g

    leaves = {n: v for n in order if (v := nodes.variable(n)) is not None}
    if any(t.is_meta for t in (*outputs, *leaves.values())):
        raise ArgumentError("gradients=True needs numbers; got tensors on the meta device; leave gradients=False")
    handles = []
    found: Sequence[Tensor | None] = ()
    try:
        for node in order:
            if node not in leaves:
                handles.append(node.register_hook(functools.partial(watch, node)))
        if leaves:
            found = torch.autograd.grad(
                outputs, list(leaves.values()), starts, retain_graph=True, create_graph=False, allow_unused=True
            )
    except RuntimeError as error:
        raise NotDifferentiableError(
            f"gradients=True runs one backward pass, which failed: {error}; was the graph freed by an earlier "
            f"backward()? Draw it before, or call backward(retain_graph=True)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    flow = Flow()
    flow.results = [norm(g).item() for g in starts]
    flow.leaves = {n: norm(g).item() for n, g in zip(leaves, found, strict=False) if g is not None}
    flow.edges = {key: n.item() for key, n in seen.items()}
    flow.sums = {key: norm(g).item() for key, g in added.items()}
    bad = {nodes.root(t)[0] for t, n in zip(outputs, flow.results, strict=True) if not math.isfinite(n)}
    for node in order:
        spoiled = False
        for i, (child, _) in enumerate(nodes.inputs(node)):
            if not math.isfinite(flow.edges.get((node, i), 0.0)):
                spoiled = True
                bad.add(child)
        if spoiled and node not in bad:
            flow.origins.add(node)
    return flow


def _starts(outputs: Sequence[Tensor], grad_outputs: Any) -> list[Tensor]:
    if grad_outputs is None:
        return [torch.ones_like(t) for t in outputs]
    given = [t for _, t in named_tensors(grad_outputs, "grad_outputs")]
    if [t.shape for t in given] != [t.shape for t in outputs]:
        raise ArgumentError(
            f"grad_outputs must hold one tensor for each output that requires grad, of shapes "
            f"{[tuple(t.shape) for t in outputs]}; got {[tuple(t.shape) for t in given]}"
        )
    return given


def forward_norms(
    links: Sequence[Any], owner: dict[Any, int], outputs: Sequence[Tensor]
) -> tuple[list[float | None], dict[int, float], set[int]]:
    """(norm for each edge, id of output -> norm of the ones that the pass begins with, ops that spoil gradients).

    Args:
        links: edges with `.target` (an op) and `.key`, the gradient edge of the tensor
            that they carry or that tensor if it is a leaf.
        owner: autograd node -> op. One op may be several autograd nodes, which may use one tensor several times.
        outputs: tensors that require grad.
    """
    norms: list[float | None] = [None] * len(links)
    if not outputs:
        return norms, {}, set()
    order = nodes.topological(nodes.root(t)[0] for t in outputs)
    wanted: dict[tuple[int, Any, int], list[int]] = {}
    for i, link in enumerate(links):
        if link.key is not None and not link.reason:
            key = nodes.root(link.key) if isinstance(link.key, Tensor) else link.key
            wanted.setdefault((link.target, *key), []).append(i)
    uses: dict[tuple[int, Any, int], list[tuple[Any, int]]] = {}
    for node in order:
        for i, edge in enumerate(nodes.inputs(node)):
            if edge[0] is not None and node in owner:
                uses.setdefault((owner[node], *edge), []).append((node, i))
    sums = {use: key for key, places in uses.items() if len(wanted.get(key, places)) != len(places) for use in places}
    flow = gradient_flow(order, outputs, sums=sums)
    for key, indices in wanted.items():
        places = uses.get(key, [])
        for k, i in enumerate(indices):
            norms[i] = flow.sums.get(key) if key in flow.sums else flow.edges.get(places[k]) if places else None
    origins = {owner[node] for node in flow.origins if node in owner}
    return norms, dict(zip(map(id, outputs), flow.results, strict=True)), origins
