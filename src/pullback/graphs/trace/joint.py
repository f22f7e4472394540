"""The joint graph of a computation and its derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import NotDifferentiableError
from pullback.graphs.model import Edge, GraphData
from pullback.graphs.trace.fx import Reader, untouched
from pullback.graphs.trace.memory import random_state
from pullback.graphs.trace.names import arguments, named_tensors


def joint_graph(
    f: Callable[..., Any], args: Any = (), kwargs: Mapping[str, Any] | None = None, *, title: str = ""
) -> GraphData:
    """The graph of y = f(*args) and of its derivative J^H t in one: the groups "forward" and "backward".

    "forward" holds what the results need, "backward" everything else: the chain from the tangents (drawn as inputs,
    shaped like the results) to one gradient for each parameter that requires grad, and each argument that does (of a
    function without parameters: every floating point argument, if none requires grad).

    Args:
        f: function or module; it is run once on copies of its parameters and buffers.
        args: positional arguments. kwargs: keyword arguments.
        title: what is written above it.

    Returns: GraphData of kind "fx", in ATen operations.
    Raises: NotDifferentiableError if no result depends on something that requires grad.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    args = tuple(args) if isinstance(args, (list, tuple)) else (args,)
    flat, spec = torch.utils._pytree.tree_flatten((args, dict(kwargs or {})))
    places = [i for i, a in enumerate(flat) if isinstance(a, Tensor)]
    held = [*f.named_parameters(), *f.named_buffers()] if isinstance(f, nn.Module) else []
    given = [(label.removeprefix("."), t) for label, t in named_tensors(arguments(f, args, kwargs or {}), "")]
    if len(given) != len(places):
        given = [(f"input{i}", flat[i]) for i in places]
    everything = [*held, *given]
    wants = [t.requires_grad for _, t in everything]
    if not any(wants):
        wants = [t.is_floating_point() or t.is_complex() for _, t in everything]
    inputs = [t.detach().clone().requires_grad_(w) for (_, t), w in zip(everything, wants, strict=True)]
    tangents: list[Tensor] = []

    def forward(*tensors: Tensor) -> list[Tensor]:
        state = {label: t for (label, _), t in zip(held, tensors, strict=False)}
        leaves = list(flat)
        for i, t in zip(places, tensors[len(held) :], strict=True):
            leaves[i] = t
        new_args, new_kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
        if isinstance(f, nn.Module):
            out = torch.func.functional_call(f, state, new_args, new_kwargs)
        else:
            out = f(*new_args, **new_kwargs)
        return [t for _, t in named_tensors(out, "output")]

    with random_state(), untouched(f):
        probe = forward(*(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs))
    live = [i for i, t in enumerate(probe) if t.requires_grad]
    if not live:
        raise NotDifferentiableError("no result of f depends on a tensor that requires grad, so there is no backward")
    tangents = [torch.ones_like(probe[i]) for i in live]
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    reached: list[int] = []  # those that some result depends on

    def joint(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        outs = forward(*tensors[: len(inputs)])
        starts = list(tensors[len(inputs) :])
        leaves = [tensors[i] for i in wanted]
        grads = torch.autograd.grad([outs[i] for i in live], leaves, starts, allow_unused=True)
        reached.extend(i for i, g in zip(wanted, grads, strict=True) if g is not None)
        return outs, [g for g in grads if g is not None]

    with random_state(), untouched(f):
        traced = make_fx(joint)(*inputs, *tangents)
    names = {}
    found = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for node, (label, t) in zip(found, everything, strict=False):
        names[node.name] = label, "parameter" if isinstance(t, nn.Parameter) else "input"
    for k, node in enumerate(found[len(everything) :]):
        names[node.name] = (f"tangent of output[{live[k]}]" if len(probe) > 1 else "tangent of output"), "input"
    reader = Reader(names, cuts=False)
    reader.results = [f"output[{i}]" if len(probe) > 1 else "output" for i in range(len(probe))]
    reader.results += [f"gradient of {everything[i][0]}" for i in reached]
    reader.read(traced.graph, traced)
    data = reader.data(title or getattr(f, "__name__", type(f).__name__))
    return _in_two(data, len(probe))


def _in_two(data: GraphData, n: int) -> GraphData:
    """Put what the first `n` outputs need into the group "forward", the rest into "backward".

    What leads to no result (counters of batches) is left out, and so is every `detach` of the rest, by which autograd
    hides a saved tensor from itself.
    """
    outputs = [node.id for node in data.nodes if node.kind == "output"]
    forward = _behind(data.edges, outputs[:n])
    hidden = {m.id for m in data.nodes if m.label == "detach" and m.id not in forward}
    through = {e.target: e for e in data.edges if e.target in hidden}
    edges = []
    for e in data.edges:
        if e.target not in hidden:
            while e.source in hidden:
                before = through[e.source]
                e = replace(e, source=before.source, output=before.output)
            edges.append(e)
    used = _behind(edges, outputs)
    kept = [m for m in data.nodes if m.id in used]
    drawn = [replace(m, group=("forward" if m.id in forward else "backward", *m.group)) for m in kept]
    new = data.replaced(drawn, [e for e in edges if e.target in used])
    new.groups = {("forward",): "", ("backward",): ""}
    return new


def _behind(edges: list[Edge], targets: list[str]) -> set[str]:
    """The nodes from which a way leads to one of `targets`, and these."""
    sources: dict[str, list[str]] = {}
    for e in edges:
        sources.setdefault(e.target, []).append(e.source)
    found, stack = set(targets), list(targets)
    while stack:
        for source in sources.get(stack.pop(), ()):
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
