"""`graph`: one function for the graphs of tensors, functions, modules, operators and programs."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import ArgumentError
from pullback.graphs.graph import Graph, Look
from pullback.graphs.model import GraphData
from pullback.graphs.passes import Collapse
from pullback.graphs.themes import theme_of
from pullback.graphs.trace import autograd_graph, described_graph, forward_graph, fx_graph, joint_graph, module_paths

KIND_NAMES = ("autograd", "forward", "fx", "joint")


def graph(
    obj: Any,
    *args: Any,
    params: Any = None,
    kind: str | None = None,
    saved: bool = False,
    gradients: bool = False,
    paths: Any = None,
    depth: int | None = None,
    theme: Look = "basic",
    title: str | None = None,
    **kwargs: Any,
) -> Graph:
    """The graph of a computation: of what made a tensor, or of what a function does with example inputs.

        pb.graph(loss, params=dict(net.named_parameters())).save("backward.svg")
        pb.graph(net, x).save("forward.html")

    Args:
        obj: a tensor, or a list, tuple or dict of tensors: the graph that autograd built behind them. A function,
            module or operator with example inputs: what it computes with them. An `fx.GraphModule`, `fx.Graph` or
            `ExportedProgram`: its program. A `Scalar`, or any object with `_graph_nodes()`: the graph that it tells.
        *args: example inputs.
        params: names of leaves, {"w": w} or a module; only for autograd graphs.
        kind: for functions: "forward" (default), "autograd" (run it, and draw the backward graph by module), "joint"
            (the forward and backward program of torch's compiler), "fx" (the program of `torch.fx.symbolic_trace`).
        saved: draw the tensors that are kept for the derivative; only for autograd graphs.
        gradients: run a backward pass and put norms of gradients on the edges, where they become nan in red; for
            autograd and forward graphs.
        paths: the gradient paths to highlight, as `explain` returns them; for autograd and described graphs.
        depth: draw modules at this depth as single nodes.
        theme: "basic", "blue", "dark", "print", or a dict of changes.
        title: what is written above; the name of the function or module by default.
        **kwargs: example inputs by name. If a name is one of the above: `graph(functools.partial(f, title=t), x)`.

    Returns: a `Graph`, to be saved, simplified by `.apply(...)` or shown in a notebook.
    Raises: ArgumentError with what to give instead.
    """
    theme_of(theme)
    if kind is not None and kind not in KIND_NAMES:
        raise ArgumentError(f"graph: kind must be one of {', '.join(KIND_NAMES)}; got {kind!r}")
    given = {"params": params is not None, "saved": saved, "gradients": gradients, "paths": paths is not None}
    if hasattr(paths, "paths"):
        paths = paths.paths
    name = _name(obj) if title is None else title
    source = _source(obj, args, kwargs, kind)
    allowed = {
        "tensors": ("params", "saved", "gradients", "paths"),
        "autograd": ("params", "saved", "gradients", "paths"),
        "described": ("paths",),
        "forward": ("gradients",),
    }.get(source, ())
    for option, present in given.items():
        if present and option not in allowed:
            hint = "; add kind='autograd'" if source in ("forward", "fx", "joint") else ""
            raise ArgumentError(f"graph: {option} has no effect on the {source} graph of a {_type(obj)}{hint}")

    data: GraphData
    if source == "tensors":
        options: dict[str, Any] = {"saved": saved, "gradients": gradients, "paths": paths}
        data = autograd_graph(obj, params, title=title or "", **options)
    elif source == "described":
        data = described_graph(obj, paths=paths, title=title or "")
    elif source == "autograd":
        outputs, modules = module_paths(obj, args, kwargs)
        named = modules.leaves if params is None else params
        options = {"saved": saved, "gradients": gradients, "paths": paths, "modules": modules}
        data = autograd_graph(outputs, named, title=name, **options)
    elif source == "forward":
        data = forward_graph(obj, args, kwargs, depth=depth, gradients=gradients, title=name)
    elif source == "joint":
        data = joint_graph(obj, args, kwargs)
    else:
        data = fx_graph(_program(obj))
    if not data.title and source != "tensors":
        data.title = name
    if depth is not None and source != "forward":
        data = Collapse(depth)(data)
    return Graph.of(data, theme)


def _source(obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str | None) -> str:
    """Which tracer reads `obj`."""
    has_inputs = bool(args or kwargs)
    if isinstance(obj, Tensor) or (isinstance(obj, (list, tuple, dict)) and _all(obj, Tensor)):
        if has_inputs:
            raise ArgumentError("graph: a tensor takes no inputs; give a function or module, or the tensor alone")
        if kind not in (None, "autograd"):
            raise ArgumentError(f"graph: a tensor has an autograd graph only; kind={kind!r} needs a function")
        return "tensors"
    if not isinstance(obj, type) and (hasattr(obj, "_graph_nodes") or _all_described(obj)) and not has_inputs:
        return "described"
    if isinstance(obj, (torch.fx.Graph, torch.export.ExportedProgram)):
        if has_inputs or kind not in (None, "fx"):
            raise ArgumentError(f"graph: a {_type(obj)} is drawn as it is: graph(program), without inputs or kind")
        return "fx"
    if isinstance(obj, (list, tuple, dict)):
        raise ArgumentError(f"graph: a {_type(obj)} must hold tensors only; got {[_type(o) for o in _items(obj)][:5]}")
    if not callable(obj):
        raise ArgumentError(
            f"graph: obj must be a tensor, tensors in a list or dict, a function, a module, an fx program; got a "
            f"{_type(obj)}"
        )
    if isinstance(obj, type):
        raise ArgumentError(f"graph: {obj.__name__} is a class; make an instance first: graph({obj.__name__}(...), x)")
    if kind == "fx" or (kind is None and isinstance(obj, torch.fx.GraphModule) and not has_inputs):
        return "fx"
    if not has_inputs and _needs_inputs(obj):
        raise ArgumentError(f"graph: give example inputs: pb.graph({_name(obj) or 'f'}, x){_example(obj)}")
    return kind or "forward"


def _needs_inputs(obj: Any) -> bool:
    try:
        parameters = inspect.signature(obj.forward if isinstance(obj, nn.Module) else obj).parameters.values()
    except (TypeError, ValueError):  # a function written in C
        return True
    return any(p.kind == p.VAR_POSITIONAL or (p.default is p.empty and p.kind != p.VAR_KEYWORD) for p in parameters)


def _example(obj: Any) -> str:
    dims = getattr(obj, "dims", None)
    return f", for instance with x = torch.zeros({tuple(dims)})" if isinstance(dims, tuple) else ""


def _program(obj: Any) -> Any:
    if isinstance(obj, (torch.fx.GraphModule, torch.fx.Graph, torch.export.ExportedProgram)):
        return obj
    try:
        return torch.fx.symbolic_trace(obj)
    except Exception as error:
        raise ArgumentError(
            f"graph: torch.fx cannot trace {_name(obj) or 'the function'}: {error}; use kind='forward' with inputs"
        ) from None


def _name(obj: Any) -> str:
    """What a function or module is called, for titles."""
    while isinstance(obj, functools.partial):
        obj = obj.func
    if isinstance(obj, (Tensor, list, tuple, dict)):
        return ""
    name = getattr(obj, "name" if hasattr(obj, "_graph_nodes") else "__name__", None)
    if isinstance(name, str):
        return "" if name == "<lambda>" else name
    return "" if isinstance(obj, (torch.fx.Graph, torch.export.ExportedProgram)) else type(obj).__name__


def _type(obj: Any) -> str:
    return type(obj).__name__


def _items(obj: Any) -> list[Any]:
    return list(obj.values()) if isinstance(obj, dict) else list(obj)


def _all(obj: Any, kind: type) -> bool:
    leaves = torch.utils._pytree.tree_leaves(obj)
    return bool(leaves) and all(isinstance(leaf, kind) for leaf in leaves)


def _all_described(obj: Any) -> bool:
    if not isinstance(obj, (list, tuple, dict)):
        return False
    items = _items(obj)
    return bool(items) and all(hasattr(item, "_graph_nodes") for item in items)
