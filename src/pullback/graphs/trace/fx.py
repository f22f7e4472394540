"""Graphs of torch.fx: traced and exported modules."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pullback.core import autograd
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.graphs.model import Edge, GraphData, Node, Value, ordered
from pullback.graphs.trace.memory import Memory, random_state
from pullback.graphs.trace.modules import Path
from pullback.graphs.trace.names import Ids, value, value_of

Place = tuple[str, int]  # id of a node, which of its results


def fx_graph(obj: Any, *args: Any, title: str = "") -> GraphData:
    """The graph of a torch.fx GraphModule, an fx Graph, or an ExportedProgram; of a module, after exporting it.

    Parameters and buffers go by their names, modules are groups where the graph tells them (`nn_module_stack`), regions
    under no_grad that export kept are drawn open, with cut edges in front. Results of several tensors keep their index.

    Args:
        obj: what to draw. Another nn.Module is exported with `args` if there are some, and else traced symbolically.
        args: inputs; a GraphModule is run on them once, without changing it, to learn shapes that it does not record.
        title: what is written above it.

    Returns: GraphData of kind "fx".
    Raises: ArgumentError for objects of another kind; what torch.export or symbolic_trace raise, unchanged.
    """
    names: dict[str, tuple[str, str]] = {}
    if isinstance(obj, nn.Module) and not isinstance(obj, fx.GraphModule):
        title = title or type(obj).__name__
        with untouched(obj):
            obj = torch.export.export(obj, args) if args else fx.symbolic_trace(obj)
        args = ()
    if isinstance(obj, torch.export.ExportedProgram):
        for spec in obj.graph_signature.input_specs:
            held = {"PARAMETER": "parameter", "BUFFER": "input", "CONSTANT_TENSOR": "constant"}.get(spec.kind.name)
            if held is not None and spec.target is not None:
                names[spec.arg.name] = spec.target, held
        title, obj = title or "ExportedProgram", obj.graph_module
    graph: fx.Graph
    owner: fx.GraphModule | None
    if isinstance(obj, fx.GraphModule):
        graph, owner = obj.graph, obj
    elif isinstance(obj, fx.Graph):
        graph, owner = obj, obj.owning_module
    else:
        raise ArgumentError(
            f"fx_graph draws a GraphModule, an fx.Graph, an ExportedProgram or a module; got {type(obj).__name__}"
        )
    reader = Reader(names, cuts=True)
    if args:
        if owner is None:
            raise ArgumentError("inputs were given, but this fx.Graph belongs to no module; pass the GraphModule")
        reader.shapes = _shapes(owner, args)
    reader.read(graph, owner)
    return reader.data(title or (type(owner).__name__ if owner is not None else ""))


class Reader:
    """Reads fx graphs into nodes and edges."""

    def __init__(self, names: dict[str, tuple[str, str]], cuts: bool) -> None:
        self.shapes: dict[fx.Node, Any] = {}
        self.results: list[str] = []  # labels of the outputs, where they are known
        self._names = names
        self._cuts = cuts
        self._unique = Ids()
        self._nodes: list[Node] = []
        self._edges: list[Edge] = []
        self._at: dict[str, int] = {}
        self._groups: dict[Path, str] = {}

    def data(self, title: str) -> GraphData:
        """What has been read."""
        return GraphData(ordered(self._nodes, self._edges), self._edges, kind="fx", title=title, groups=self._groups)

    def read(self, graph: fx.Graph, owner: Any, given: list[Place] | None = None, no_grad: bool = False) -> list[Place]:
        """Add a graph; with `given`, one inside another: its inputs are these places, its outputs are returned."""
        env: dict[fx.Node, Place | list[Place]] = {}
        arguments = iter(given or ())
        for node in graph.nodes:
            if node.op == "placeholder" and given is not None:
                env[node] = next(arguments)
            elif node.op == "output":
                found = _places(node.args, env)
                if given is not None:
                    return found
                self._outputs(node, found)
            elif node.target is operator.getitem and self._is_part(node, env):
                env[node] = self._part(node, env)
            elif getattr(node.target, "__name__", "") == "_set_grad_enabled":
                no_grad = not node.args[0]
            elif str(node.target) == "wrap_with_set_grad_enabled":
                enabled, inner, *rest = node.args
                body = owner.get_submodule(inner.target)
                env[node] = self.read(body.graph, body, _places(rest, env), not enabled)
            elif not (node.op == "get_attr" and isinstance(_attribute(owner, node.target), nn.Module)):
                env[node] = self._node(node, owner, env, no_grad), 0
        return []

    def _is_part(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> bool:
        """Whether a getitem picks one of several results (and is not an indexing of a tensor)."""
        whole, index = node.args[0], node.args[1]
        if not isinstance(whole, fx.Node) or not isinstance(index, int):
            return False
        if isinstance(env.get(whole), list):
            return True
        seen = self._value(whole)
        return isinstance(seen, (list, tuple)) and not hasattr(seen, "dtype")

    def _part(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Place:
        whole, index = env[node.args[0]], node.args[1]  # type: ignore[index]
        assert isinstance(index, int)
        return whole[index] if isinstance(whole, list) else (whole[0], index)

    def _value(self, node: fx.Node) -> Any:
        if node in self.shapes:
            return self.shapes[node]
        return node.meta.get("val", node.meta.get("tensor_meta"))

    def _node(self, node: fx.Node, owner: Any, env: Mapping[fx.Node, Any], no_grad: bool) -> str:
        label, kind, details = self._describe(node, owner)
        group = self._group(node, label)
        used = _places((node.args, node.kwargs), env)
        values = _values(self._value(node))
        if node.op == "get_attr" and not values:
            values = _values(_attribute(owner, node.target))
        if kind == "operation" and not used and node.op != "call_module":
            kind = "constant"
        name = self._unique(label)
        self._at[name] = len(self._nodes)
        flags = frozenset({"no_grad"} if no_grad and used else ())
        self._nodes.append(Node(name, label, kind, values, group, details, flags, source=_source(node)))
        for i, (source, output) in enumerate(used):
            reason = self._cut(self._nodes[self._at[source]], output, self._nodes[-1]) if self._cuts else ""
            self._edges.append(Edge(source, name, output, i, "cut" if reason else "data", reason))
        return name

    def _cut(self, source: Node, output: int, target: Node) -> str:
        if target.label in ("detach", "detach_"):
            return "detach"
        if "no_grad" in target.flags:
            return "" if "no_grad" in source.flags else "no_grad"
        came = source.values[output] if output < len(source.values) else None
        if came is not None and _is_float(came) and target.values and not any(map(_is_float, target.values)):
            return "integer"
        mixed = any(map(_is_float, source.values)) and len(source.values) > 1
        return "integer" if mixed and came is not None and not _is_float(came) else ""

    def _describe(self, node: fx.Node, owner: Any) -> tuple[str, str, dict[str, Any]]:
        """(label, kind, details)."""
        target = node.target
        if node.op == "placeholder":
            label, kind = self._names.get(node.name, (str(target), "input"))
            return label, kind, {}
        if node.op == "get_attr":
            kind = "parameter" if isinstance(_attribute(owner, target), nn.Parameter) else "constant"
            return str(target), kind, {}
        if str(target) == "pullback.apply.default":
            return _operator(node), "operator", {}
        if str(target) == "pullback.map.default":
            return str(node.args[0]).split(":", 2)[-1], "operator", {}
        declared = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
        names = [*declared, *(f"argument {i}" for i in range(len(declared), len(node.args)))]
        details = {k: a for k, a in (*zip(names, node.args, strict=False), *node.kwargs.items()) if _is_plain(a)}
        if node.op == "call_module":
            module = owner.get_submodule(target) if owner is not None else None
            details["module"] = repr(module) if module is not None else str(target)
            return (type(module).__name__ if module is not None else str(target)), "operation", details
        if isinstance(target, torch._ops.OpOverload):
            return target._schema.name.rsplit("::", 1)[-1], "operation", {**details, "overload": str(target)}
        return (str(target) if isinstance(target, str) else target.__name__), "operation", details

    def _group(self, node: fx.Node, label: str) -> Path:
        if node.op == "call_module":
            return self._known(tuple(str(node.target).split("."))[:-1], "")
        path: Path = ()
        for qualified, kind in (node.meta.get("nn_module_stack") or {}).values():
            kind = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__
            path = self._known(tuple(str(qualified).split(".")) if qualified else (), kind)
        return path

    def _known(self, path: Path, kind: str) -> Path:
        for k in range(1, len(path) + 1):
            if kind and k == len(path):
                self._groups[path] = kind
            self._groups.setdefault(path[:k], "")
        return path

    def _outputs(self, node: fx.Node, found: list[Place]) -> None:
        for i, (source, output) in enumerate(found):
            default = "output" if len(found) == 1 else f"output[{i}]"
            label = self.results[i] if len(self.results) == len(found) else default
            name = self._unique(label)
            made = self._nodes[self._at[source]].values
            self._nodes.append(Node(name, label, "output", made[output : output + 1]))
            self._edges.append(Edge(source, name, output))


def _places(tree: Any, env: Mapping[fx.Node, Any]) -> list[Place]:
    """The places of the fx nodes in nested arguments, in order."""
    found: list[Place] = []

    def add(node: fx.Node) -> fx.Node:
        place = env.get(node)
        if place is not None:
            found.extend(place if isinstance(place, list) else [place])
        return node

    fx.node.map_arg(tree, add)
    return found


def _values(seen: Any) -> tuple[Value, ...]:
    if isinstance(seen, Tensor):
        return (value_of(seen),)
    if hasattr(seen, "shape") and hasattr(seen, "dtype"):  # TensorMetadata, which knows no device
        return (value(tuple(seen.shape), seen.dtype, torch.device("cpu")),)
    if isinstance(seen, (list, tuple)):
        return tuple(v for part in seen for v in _values(part))
    return ()


def _is_float(v: Value) -> bool:
    return v.dtype.startswith(("float", "bfloat", "complex"))


def _is_plain(a: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return all(_is_plain(b) for b in a)
    return isinstance(a, (bool, int, float, complex, str, torch.dtype))


def _operator(node: fx.Node) -> str:
    try:
        text = autograd.lookup(int(node.args[1]))._expression()  # type: ignore[arg-type]
    except NotDifferentiableError:  # the operator is gone; its graph can still be drawn
        text = "operator"
    return f"({text}).H" if node.args[2] else text


def _attribute(owner: Any, target: Any) -> Any:
    try:
        return functools.reduce(getattr, str(target).split("."), owner)
    except AttributeError:
        return None


def _source(node: fx.Node) -> str:
    """The user's line: the last one of the recorded stack that lies outside of torch."""
    for line in reversed((node.stack_trace or "").splitlines()):
        if line.strip().startswith('File "') and "/torch/" not in line:
            path, number, where = (line.split('"')[1], *line.split(", ")[1:3])
            return f"{path.rsplit('/', 1)[-1]}:{number.removeprefix('line ')} {where}"
    return ""


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.seen[n] = out
        return out


def _shapes(owner: Any, args: tuple[Any, ...]) -> dict[fx.Node, Any]:
    """What every node computes for these inputs."""
    with random_state(), untouched(owner), torch.no_grad():
        interpreter = _Shapes(owner)
        interpreter.run(*args)
    return interpreter.seen


class untouched:
    """Training flags and buffers of a module as they were."""

    def __init__(self, module: Any) -> None:
        self._memory = Memory()
        for m in module.modules() if isinstance(module, nn.Module) else ():
            self._memory.keep(m)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self._memory.restore()
