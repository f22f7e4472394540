"""Graphs of objects that describe themselves: how the scalar tape, or a user's own expression tree, is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from pullback.core.errors import ArgumentError
from pullback.graphs.model import KINDS, Edge, GraphData, Node, ordered
from pullback.graphs.trace.names import Ids, ranked


@runtime_checkable
class Described(Protocol):
    """An object that tells its graph.

    `_graph_nodes()` yields, once for every node and in any order, a tuple `(key, label, kind, parents, details)` or a
    dict with these keys: `key` is hashable and names the node; `kind` is one of `pullback.graphs.model.KINDS`;
    `parents` is a list of `(key of the parent, label of the edge)`, a parent being what the node is made of; `details`
    is a dict of facts to be shown. `details` may be left out.
    """

    def _graph_nodes(self) -> Iterator[Any]: ...


def described_graph(obj: Any, *, paths: Iterable[Any] | None = None, title: str = "") -> GraphData:
    """The graph that an object describes by `_graph_nodes()`, see `Described`.

    Args:
        obj: one such object, or a list, tuple or dict of them; nodes with the same key are one.
        paths: gradient paths, best first, each with `.nodes` whose items have `.key` (the node's key): their edges get
            the ranks 0, 1, 2 ...
        title: what is written above it.

    Raises: ArgumentError if a parent is never described, or a kind is unknown.
    """
    objects = list(obj.values()) if isinstance(obj, Mapping) else list(obj) if isinstance(obj, (list, tuple)) else [obj]
    described: dict[Any, tuple[str, str, list[tuple[Any, str]], dict[str, Any]]] = {}
    for one in objects:
        if not isinstance(one, Described):
            raise ArgumentError(
                f"{type(one).__name__} does not describe a graph; it needs a method _graph_nodes() that yields "
                f"(key, label, kind, parents, details)"
            )
        for entry in one._graph_nodes():
            key, label, kind, parents, details = _entry(entry)
            if kind not in KINDS:
                raise ArgumentError(f"node {label!r} has the kind {kind!r}; expected one of {KINDS}")
            described.setdefault(key, (label, kind, parents, details))
    unique = Ids()
    ids = {key: unique(label) for key, (label, *_) in described.items()}
    edges = []
    for key, (label, _, parents, _) in described.items():
        for i, (parent, text) in enumerate(parents):
            if parent not in ids:
                raise ArgumentError(f"node {label!r} names a parent {parent!r} that was never described; yield it too")
            edges.append(Edge(ids[parent], ids[key], input=i, label=text))
    nodes = [Node(ids[key], label, kind, details=details) for key, (label, kind, _, details) in described.items()]
    return GraphData(ordered(nodes, edges), ranked(edges, paths, ids), kind="autograd", title=title)


def _entry(entry: Any) -> tuple[Any, str, str, list[tuple[Any, str]], dict[str, Any]]:
    if isinstance(entry, Mapping):
        entry = (*(entry[k] for k in ("key", "label", "kind", "parents")), entry.get("details", {}))
    if len(entry) not in (4, 5):
        raise ArgumentError(f"_graph_nodes() must yield (key, label, kind, parents, details); got {len(entry)} items")
    key, label, kind, parents, *rest = entry
    return key, str(label), kind, [(parent, str(text)) for parent, text in parents], dict(*rest)
