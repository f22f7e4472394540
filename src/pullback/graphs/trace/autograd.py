"""The graph that autograd built behind tensors: leaf -> AccumulateGrad -> operations -> output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import Parameter

from pullback.core import nodes
from pullback.core.errors import ArgumentError
from pullback.graphs.model import Edge, GraphData, Node, Value
from pullback.graphs.trace.names import (
    Ids,
    materialized,
    named_parameters,
    named_tensors,
    ranked,
    structure,
    value,
    value_of,
)
from pullback.graphs.trace.numbers import Flow, gradient_flow
from pullback.graphs.trace.saved import Ledger, storage_of


def autograd_graph(
    outputs: Any,
    params: Any = None,
    *,
    saved: bool = False,
    gradients: bool = False,
    grad_outputs: Any = None,
    paths: Iterable[Any] | None = None,
    modules: Mapping[Any, tuple[str, ...]] | None = None,
    title: str = "",
) -> GraphData:
    """The graph behind `outputs` as autograd stores it, read without changing it.

    Every leaf, every AccumulateGrad node, every operation and every output is a node. Operations carry shape, dtype and
    device of their results, and `nbytes`: the memory that they keep for the derivative, each storage counted once, at
    the first operation that keeps it. The memory of leaves and of `params` is there anyway and is not counted.

    Args:
        outputs: a tensor, or nested lists, tuples, dicts of tensors. Those that do not require grad are drawn alone.
        params: names of leaves: a dict name -> tensor, a module, `named_parameters()` or pairs. Names of other tensors
            on the way appear at the operation that made them ("result").
        saved: also draw the saved tensors; a saved leaf is linked, not drawn again.
        gradients: run one backward pass, put the norm of the gradient on every edge, and flag "nan" where gradients
            that are not finite begin. Hooks of tensors run as in any backward pass; no `.grad` changes.
        grad_outputs: what that pass begins with; default: ones.
        paths: gradient paths, best first, as `explain` returns them; their edges get the ranks 0, 1, 2 ...
        modules: autograd node -> path of the module that made it, from `module_paths`.
        title: what is written above it.

    Returns: GraphData of kind "autograd".
    Raises: ArgumentError if no output requires grad; NotDifferentiableError if gradients cannot be computed.
    Cost: linear in the nodes; 10,000 in a chain are fine.
    """
    results = list(named_tensors(materialized(outputs), "output"))
    live = [(label, t) for label, t in results if t.requires_grad]
    if not live:
        raise ArgumentError(_why_nothing(results, outputs))
    order = nodes.topological(nodes.root(t)[0] for _, t in live)
    flow = gradient_flow(order, [t for _, t in live], grad_outputs) if gradients else None
    tracer = _Tracer(named_parameters(params), modules or {}, flow, saved)
    tracer.charge([v for n in order if (v := nodes.variable(n)) is not None])
    for node in reversed(order):
        leaf = nodes.variable(node)
        if leaf is None:
            tracer.operation(node)
        else:
            tracer.leaf(node, leaf)
    norms = iter(flow.results if flow else ())
    for label, t in results:
        tracer.output(label, t, next(norms, None) if t.requires_grad else None)
    tracer.group_leaves()
    edges = ranked(tracer.edges, paths, tracer.ids)
    groups = {path: name for path, name in getattr(modules, "classes", {}).items()}
    return GraphData(tracer.nodes, edges, kind="autograd", title=title, groups=groups)


def _why_nothing(results: list[tuple[str, Tensor]], outputs: Any) -> str:
    if not results:
        return f"outputs must hold a tensor; got {type(outputs).__name__}; pass what your function returned"
    label, t = results[0]
    return (
        f"no output requires grad, so autograd built no graph; {label} is {value_of(t)} ({_why_no_grad(t)}); compute "
        f"it with inputs or parameters that require grad, or draw the forward computation: graph(function, *args)"
    )


def _why_no_grad(t: Tensor) -> str:
    if not (t.is_floating_point() or t.is_complex()):
        return f"{value_of(t).dtype} has no gradient"
    return "detached, computed under no_grad, or from tensors that do not require grad"


class _Tracer:
    """The nodes and edges made so far."""

    def __init__(
        self, params: list[tuple[str, Tensor]], modules: Mapping[Any, tuple[str, ...]], flow: Flow | None, saved: bool
    ) -> None:
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self.ids: dict[Any, str] = {}  # autograd node -> id
        self._unique = Ids()
        self._modules = modules
        self._flow = flow
        self._draw_saved = saved
        self._params = params
        self._names: dict[int, str] = {}
        self._made: dict[tuple[Any, int], str] = {}  # (autograd node, result) -> name in `params`
        for label, t in params:
            self._names.setdefault(id(t), label)
            if t.grad_fn is not None:
                self._made.setdefault(nodes.root(t), label)
        self._stored: dict[Any, str] = {}  # storage -> id of the node that stands for it
        self._owners = {storage_of(t)[0]: label for label, t in reversed(params)}

    def charge(self, leaves: list[Tensor]) -> None:
        """Open the ledger: what leaves and parameters hold costs nothing."""
        self._ledger = Ledger([*leaves, *(t for _, t in self._params)])

    def leaf(self, node: Any, leaf: Tensor) -> None:
        """A leaf, and the node that collects its gradient."""
        named = self._names.get(id(leaf))
        kind = "parameter" if isinstance(leaf, Parameter) else "leaf"
        label = named or kind
        name, collects = self._unique(label), self._unique(f"{label}.grad")
        self.ids[node] = collects
        self._stored[storage_of(leaf)[0]] = name
        group = self._modules.get(node, ())
        self.nodes.append(Node(name, label, kind, (value_of(leaf),), group))
        self.nodes.append(Node(collects, "AccumulateGrad", "accumulate", _values(node), group))
        self.edges.append(Edge(name, collects, norm=self._flow.leaves.get(node) if self._flow else None))

    def operation(self, node: Any) -> None:
        """An operation, its edges from what it used, and what it keeps."""
        op = nodes.operator(node)
        label = nodes.name(node)
        if op is not None:
            label = structure(getattr(self._modules, "operators", {}).get(node, label))
        name = self.ids[node] = self._unique(label)
        custom = isinstance(node, BackwardCFunction)
        kind = "operator" if op is not None else "function" if custom else "operation"
        details = {} if custom else nodes.settings(node)
        if op is not None:
            details["operator"] = repr(op)
        values = _values(node)
        for i in range(len(values)):
            if (node, i) in self._made:
                details["result" if len(values) == 1 else f"result {i}"] = self._made[node, i]
        nbytes, missing = self._keeps(node, name)
        flags = set()
        if missing and nodes.freed(node):
            flags.add("freed")
        if self._flow and node in self._flow.origins:
            flags.add("nan")
        group = self._modules.get(node, ())
        self.nodes.append(
            Node(name, label, kind, values, group, details, frozenset(flags), nbytes, _source(node.metadata))
        )
        for i, (child, output) in enumerate(nodes.inputs(node)):
            if child is not None:
                flows = self._flow.edges.get((node, i)) if self._flow else None
                self.edges.append(Edge(self.ids[child], name, output, i, norm=flows))

    def _keeps(self, node: Any, name: str) -> tuple[int, bool]:
        """(bytes that the node adds to what is kept, whether some tensor is missing); draws them on request."""
        nbytes, missing = 0, False
        for label, t in nodes.saved(node):
            if t is None:
                missing = True
                continue
            new = self._ledger.charge(t)
            nbytes += new
            if self._draw_saved:
                key = storage_of(t)[0]
                if key not in self._stored:
                    self._stored[key] = self._unique(f"{name}.{label}")
                    details = {"bytes": new} if new else {}
                    owner = self._owners.get(key, label)
                    group = self._modules.get(node, ())
                    self.nodes.append(Node(self._stored[key], owner, "saved", (value_of(t),), group, details))
                self.edges.append(Edge(self._stored[key], name, kind="saved", label=label))
        return nbytes, missing

    def output(self, label: str, t: Tensor, norm: float | None) -> None:
        """A result: joined to what made it, or alone with the reason."""
        name = self._unique(label)
        details: dict[str, Any] = {}
        if t._is_view() and t._base is not None:
            details["view of"] = str(value_of(t._base))
        flags: frozenset[str] = frozenset()
        if t.requires_grad:
            node, i = nodes.root(t)
            self.edges.append(Edge(self.ids[node], name, i, norm=norm))
        else:
            details["reason"] = _why_no_grad(t)
            flags = frozenset({"no_grad"})
        self.nodes.append(Node(name, label, "output", (value_of(t),), details=details, flags=flags))

    def group_leaves(self) -> None:
        """Put a leaf that only one module uses into that module's group."""
        if not self._modules:
            return
        around: dict[str, tuple[str, ...]] = {n.id: n.group for n in self.nodes if n.kind not in ("leaf", "parameter")}
        for wanted in (("accumulate",), ("leaf", "parameter")):
            kinds = {n.id for n in self.nodes if n.kind in wanted}
            common: dict[str, tuple[str, ...]] = {}
            for e in self.edges:
                if e.source in kinds and e.kind == "data":
                    used = around[e.target]
                    common[e.source] = _shared(common[e.source], used) if e.source in common else used
            around.update(common)
        self.nodes = [_regrouped(n, around.get(n.id, ())) if not n.group else n for n in self.nodes]


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    k = 0
    while k < min(len(a), len(b)) and a[k] == b[k]:
        k += 1
    return a[:k]


def _regrouped(n: Node, group: tuple[str, ...]) -> Node:
    return Node(n.id, n.label, n.kind, n.values, group, n.details, n.flags, n.nbytes, n.source, n.count)


def _values(node: Any) -> tuple[Value, ...]:
    return tuple(value(*r) for r in nodes.results(node))


def _source(metadata: dict[str, Any]) -> str:
    """The user's line, known if the graph was built under torch.autograd.detect_anomaly()."""
    for entry in reversed(metadata.get("traceback_", ())):
        head = entry.strip().split("\n")[0]  # File "model.py", line 12, in forward
        path, _, rest = head.removeprefix('File "').partition('", line ')
        if "/torch/" not in path and "/pullback/" not in path:
            number, _, where = rest.partition(", in ")
            return f"{path.rsplit('/', 1)[-1]}:{number} in {where}"
    return ""
