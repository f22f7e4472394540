"""What a graph is: nodes, edges, and nothing about where they come from or how they are drawn.

Tracers make a `GraphData`, passes turn one into another, drawings read it. Edges point as data flows in the forward
computation: from what is used to what is made of it, so leaves have no edge in and results none out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a node can be. Every theme has a row for each.
KINDS = (
    "leaf",  # a tensor that requires grad and that nothing made
    "parameter",  # a leaf that is an nn.Parameter, or what a module holds as one
    "input",  # a tensor from outside that requires no grad
    "constant",  # a number, or a tensor made inside without inputs
    "operation",  # torch
    "function",  # a custom autograd.Function
    "operator",  # an operator or reduction of this library
    "accumulate",  # where the gradient of a leaf is collected
    "saved",  # a tensor kept for the derivative
    "output",  # a result
    "module",  # a group drawn as one node
)
EDGE_KINDS = ("data", "saved", "cut")  # cut: values pass, gradients do not; the edge's `reason` says why
FLAGS = ("nan", "unsafe", "freed", "no_grad")  # nan: first to make a nan or inf; unsafe: `.data`


@dataclass(frozen=True, slots=True)
class Value:
    """One result of a node."""

    shape: tuple[int, ...]
    dtype: str  # "float32"
    device: str  # "cpu"

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" {self.device}"
        return f"{self.dtype}({', '.join(map(str, self.shape))}){where}"


@dataclass(frozen=True, slots=True)
class Node:
    """A node.

    Attributes:
        id: unique in its graph; stable from one trace of the same computation to the next.
        label: what is written on it.
        kind: one of `KINDS`.
        values: its results, in order.
        group: names of the modules around it, outermost first: ("layer4", "1", "relu").
        details: further facts by name, shown on hover: {"stride": (2, 2), "module": "Conv2d"}.
        flags: of `FLAGS`.
        nbytes: memory that it keeps for the derivative, each storage counted once in the graph [bytes].
        source: the user's line that made it, "model.py:12 in forward"; empty if not recorded.
        count: how many equal nodes it stands for (x3 after FoldDuplicates).
    """

    id: str
    label: str
    kind: str = "operation"
    values: tuple[Value, ...] = ()
    group: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    nbytes: int = 0
    source: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge from node `source` to node `target`.

    Attributes:
        output: which result of the source (drawn where the source has several).
        input: which argument of the target.
        kind: one of `EDGE_KINDS`.
        reason: of a cut: "detach", ".data", "no_grad", "integer", "not differentiable".
        label: what is written on it.
        norm: l2 norm of the gradient that flows back along it; None if not asked for.
        rank: 0 for an edge of the largest gradient path, 1 for the second ...; None if on none.
    """

    source: str
    target: str
    output: int = 0
    input: int = 0
    kind: str = "data"
    reason: str = ""
    label: str = ""
    norm: float | None = None
    rank: int | None = None


class GraphData:
    """Nodes and edges.

    Attributes:
        nodes: list of `Node`, in an order in which every edge points forward, except after a pass that folds cycles.
        edges: list of `Edge`.
        kind: "autograd", "forward" or "fx".
        title: what it is the graph of.
        groups: module path -> class of the module, {("layer4", "1"): "BasicBlock"}.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        edges: Iterable[Edge],
        *,
        kind: str = "forward",
        title: str = "",
        groups: dict[tuple[str, ...], str] | None = None,
    ) -> None:
        self.nodes = list(nodes)
        self.edges = list(edges)
        self.kind = kind
        self.title = title
        self.groups = dict(groups or {})

    def replaced(self, nodes: Iterable[Node], edges: Iterable[Edge]) -> GraphData:
        """The same kind of graph of other nodes and edges, which must fit together."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.nodes, new.edges = list(nodes), list(edges)
        return new

    def node(self, name: str) -> Node:
        """The node with this id, or else the only one with this label.

        Raises: KeyError if none or several carry the label.
        """
        found = [n for n in self.nodes if n.id == name] or [n for n in self.nodes if n.label == name]
        if len(found) != 1:
            raise KeyError(f"{name!r} names {len(found)} nodes; nodes have the ids {[n.id for n in found][:8]}")
        return found[0]

    def inputs(self) -> dict[str, list[Edge]]:
        """Node id -> edges that end there, in the order of arguments."""
        return self._by("target", "input")

    def outputs(self) -> dict[str, list[Edge]]:
        """Node id -> edges that begin there."""
        return self._by("source", "output")

    def _by(self, end: str, order: str) -> dict[str, list[Edge]]:
        found: dict[str, list[Edge]] = {n.id: [] for n in self.nodes}
        for edge in self.edges:
            found[getattr(edge, end)].append(edge)
        for edges in found.values():
            edges.sort(key=lambda e: getattr(e, order))
        return found

    @property
    def nbytes(self) -> int:
        """Memory kept for the derivative [bytes]."""
        return sum(n.nbytes for n in self.nodes)

    def __repr__(self) -> str:
        memory = f", {self.nbytes / 1e6:.3g} MB saved" if self.nbytes else ""
        title = f" of {self.title}" if self.title else ""
        return f"<{type(self).__name__} ({self.kind}){title}: {len(self.nodes)} nodes, {len(self.edges)} edges{memory}>"

    def to_json(self) -> dict[str, Any]:
        """Everything, as lists, dicts, strings and numbers."""
        return {
            "kind": self.kind,
            "title": self.title,
            "groups": {"/".join(path): name for path, name in self.groups.items()},
            "nodes": [
                {
                    "id": n.id,
                    "label": n.label,
                    "kind": n.kind,
                    "values": [str(v) for v in n.values],
                    "group": list(n.group),
                    "details": {k: str(v) for k, v in n.details.items()},
                    "flags": sorted(n.flags),
                    "nbytes": n.nbytes,
                    "source": n.source,
                    "count": n.count,
                }
                for n in self.nodes
            ],
            "edges": [
                {
                    "source": e.source,
                    "target": e.target,
                    "output": e.output,
                    "input": e.input,
                    "kind": e.kind,
                    "reason": e.reason,
                    "label": e.label,
                    "norm": e.norm,
                    "rank": e.rank,
                }
                for e in self.edges
            ],
        }


def ordered(nodes: Sequence[Node], edges: Sequence[Edge]) -> list[Node]:
    """The nodes, reordered so that edges point forward as far as there are no cycles."""
    position = {n.id: i for i, n in enumerate(nodes)}
    waiting = dict.fromkeys(position, 0)
    after: dict[str, list[str]] = {n.id: [] for n in nodes}
    for e in edges:
        waiting[e.target] += 1
        after[e.source].append(e.target)
    ready = [i for n, i in position.items() if not waiting[n]]
    heapq.heapify(ready)
    rest = list(range(len(nodes)))
    done: set[int] = set()
    order: list[Node] = []
    cursor = 0
    while len(order) < len(nodes):
        if ready:
            i = heapq.heappop(ready)
        else:  # a cycle: take the first that is left
            while rest[cursor] in done:
                cursor += 1
            i = rest[cursor]
        if i in done:
            continue
        done.add(i)
        order.append(nodes[i])
        for target in after[nodes[i].id]:
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, position[target])
    return order
