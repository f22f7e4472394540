"""The graph of a forward computation: every torch function that a function or module calls, run once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core import nodes
from pullback.core.errors import ArgumentError
from pullback.graphs.model import Edge, GraphData, Node, ordered
from pullback.graphs.passes.fold import Collapse
from pullback.graphs.trace.memory import Memory, random_state
from pullback.graphs.trace.modules import Path, Stack, surroundings
from pullback.graphs.trace.names import Ids, arguments, materialized, named_tensors, value_of
from pullback.graphs.trace.numbers import forward_norms
from pullback.graphs.trace.origins import Known, group_leaves
from pullback.graphs.trace.record import Recorder


def forward_graph(
    f: Callable[..., Any],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    depth: int | None = None,
    gradients: bool = False,
    title: str = "",
) -> GraphData:
    """The graph of f(*args, **kwargs): inputs, parameters, buffers, operations and results.

    The function is run once, as it is. Afterwards training flags, buffers and parameters of the modules that ran, their
    `.grad` and all random states are as before, also if it raises. What it does to other objects stays done, such as
    to the state of an optimizer.
    An operator of this library, a custom Function and a function of this library are one node each. Where values pass
    and gradients do not (`detach`, `.data`, no_grad, integers), the edge is "cut" and says why. Modules are groups; a
    module that is called again by the same parent is a group of its own, "relu (2)".

    Args:
        f: any function, module or operator.
        args: its positional arguments; a single one need not be in a tuple if it is a tensor.
        kwargs: its keyword arguments.
        depth: the depth at which modules become nodes, 1 for the children of the model (`passes.Collapse`). None: all
            are drawn open.
        gradients: also run one backward pass from ones, put the norms of gradients on the edges, and flag "nan" where
            numbers that are not finite begin. No `.grad` changes.
        title: what is written above it.

    Returns: GraphData of kind "forward".
    Raises: ArgumentError for lazy modules that have not run yet; whatever `f` raises, unchanged.
    Cost: one forward pass and about 30 us an operation. All intermediate results live until the end.

    Not seen: work in other threads, and what leaves torch for NumPy outside of a module or custom Function.
    """
    recorder, stack, outputs = _trace(f, args, kwargs, gradients)
    ops, links = recorder.ops, recorder.links
    results = [(label, t, recorder.find(t)) for label, t in named_tensors(outputs, "output")]
    found = [(label, t, e, recorder.output_of(e)) for label, t, e in results]
    group_leaves(ops, links)
    unique = Ids()
    ids = [unique(op.label) for op in ops]
    norms: list[float | None] = [None] * len(links)
    starts: dict[int, float] = {}
    if gradients:
        live = [t for _, t, *_ in found if t.requires_grad]
        norms, starts, origins = forward_norms(links, recorder.owner, live)
        if not any("nan" in op.flags for op in ops):  # else the gradients follow from the numbers
            for index in origins:
                ops[index].flags.add("nan")
                ops[index].details["not finite"] = "the gradient that it passes on"
    drawn = [
        Node(i, op.label, op.kind, tuple(op.values), op.group, op.details, frozenset(op.flags), source=op.source)
        for i, op in zip(ids, ops, strict=True)
    ]
    edges = [
        Edge(ids[k.source], ids[k.target], k.output, k.input, "cut" if k.reason else "data", k.reason, norm=norms[i])
        for i, k in enumerate(links)
    ]
    for label, t, entry, output in found:
        name = unique(label)
        drawn.append(Node(name, label, "output", (value_of(t),)))
        kind = "cut" if entry.reason else "data"
        edges.append(Edge(ids[entry.op], name, output, 0, kind, entry.reason, norm=starts.get(id(t))))
    recorder.forget()
    empty = {i for i, op in zip(ids, ops, strict=True) if op.region and not op.values}
    drawn = [n for n in drawn if n.id not in empty]
    edges = [e for e in edges if e.source not in empty and e.target not in empty]
    used = {n.group[:k] for n in drawn for k in range(1, len(n.group) + 1)}
    groups = {path: stack.classes.get(path, "") for path in sorted(used)}
    data = GraphData(ordered(drawn, edges), edges, kind="forward", title=title or _title(f), groups=groups)
    return data if depth is None else Collapse(depth)(data)


class ModulePaths(dict[Any, Path]):
    """Autograd node -> path of the module that made it.

    `classes`: path -> class of the module; `operators`: autograd node -> the operator of this library that was called;
    `leaves`: (name, tensor) of arguments, parameters and buffers that were met.
    """

    classes: dict[Path, str]
    leaves: list[tuple[str, Tensor]]
    operators: dict[Any, str]


def module_paths(
    f: Callable[..., Any], args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, ModulePaths]:
    """(f(*args, **kwargs), autograd node -> ("Net", "layer4", "1", "relu")): where each backward operation comes from.

    `autograd_graph(outputs, modules=paths)` then draws the backward graph in boxes, one for each module. The function
    is run as by `forward_graph`, and the result is an ordinary one that can be differentiated.
    """
    recorder, stack, outputs = _trace(f, args, kwargs, False)
    paths = ModulePaths()
    paths.classes, paths.operators = {}, {}
    held = recorder.known.values()
    paths.leaves = [(name, t) for name, how, t in held if name and (how in ("parameter", "buffer") or t.requires_grad)]
    for _, t in named_tensors(outputs, "output"):
        recorder.find(t)
    for node, index in recorder.owner.items():
        op = recorder.ops[index]
        group = op.group
        if "operator" in op.details and nodes.operator(node) is not None and not op.region:
            paths.operators[node] = op.label
        if nodes.variable(node) is None and group:
            paths[node] = group
            for k in range(1, len(group) + 1):
                paths.classes[group[:k]] = stack.classes.get(group[:k], "")
    recorder.forget()
    return outputs, paths


def _run(f: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return materialized(f(*args, **kwargs))


def _trace(
    f: Callable[..., Any], args: Any, kwargs: Mapping[str, Any] | None, numbers: bool
) -> tuple[Recorder, Stack, Any]:
    if not callable(f):
        raise ArgumentError(
            f"f must be a function or a module; got {type(f).__name__}; for a tensor draw autograd_graph"
        )
    args = tuple(args) if isinstance(args, (list, tuple)) else (args,)
    kwargs = dict(kwargs or {})
    memory = Memory()
    names: dict[int, str] = {}
    recorder = Recorder(_known(f, args, kwargs, memory, names), numbers, _run.__code__, memory)
    recorder.stack = stack = Stack(memory, recorder.begins, recorder.ends, names)
    with ExitStack() as context:
        context.callback(memory.restore)
        context.enter_context(random_state())
        if "torch._dynamo" in sys.modules:
            # Compiled modules run by their Python code, so that there is something to see; they warn about our hooks.
            context.enter_context(torch.compiler.set_stance("force_eager"))
            context.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        context.enter_context(stack.watching())
        context.enter_context(recorder)
        outputs = _run(f, args, kwargs)
    return recorder, stack, outputs


def _known(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any], memory: Memory, names: dict[int, str]) -> Known:
    """What is known about tensors before the run.

    Modules that are found are remembered by `memory`, and what the user calls them is written into `names`.
    """
    known: Known = {}
    for label, t in named_tensors(arguments(f, args, kwargs), ""):
        known.setdefault(id(t), (label.removeprefix("."), "argument", t))
    for name, thing in [*surroundings(f), *((k, a) for k, a in kwargs.items() if isinstance(a, nn.Module))]:
        if isinstance(thing, Tensor):
            known.setdefault(id(thing), (name, "outside", thing))
            continue
        prefix = f"{name}." if name else ""
        if name:
            names.setdefault(id(thing), name)
        for module in thing.modules():
            memory.keep(module)
        for label, p in thing.named_parameters():
            known.setdefault(id(p), (prefix + label, "parameter", p))
        for label, b in thing.named_buffers():
            known.setdefault(id(b), (prefix + label, "buffer", b))
    return known


def _title(f: Any) -> str:
    if isinstance(f, nn.Module):
        return type(f).__name__
    name = getattr(f, "__name__", type(f).__name__)
    return "" if name == "<lambda>" else name
