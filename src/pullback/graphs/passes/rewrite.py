"""What passes do to a graph: leave nodes out, bridge over them, fold several into one; and the check that it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pullback.graphs.model import EDGE_KINDS, FLAGS, KINDS, Edge, GraphData, Node, Value, ordered

CARRIERS = frozenset({"leaf", "parameter", "input", "constant", "accumulate", "saved", "output"})  # not computed


class Pass:
    """A graph in, another out, the first unchanged: `pass_(graph)`, or hiddenlayer's `pass_.apply(graph)`."""

    def __call__(self, data: GraphData) -> GraphData:
        """The changed graph."""
        raise NotImplementedError

    def apply(self, data: GraphData) -> GraphData:
        """The same as calling the pass."""
        return self(data)


def verify(data: GraphData, acyclic: bool = True) -> None:
    """Check that a graph is one: ids are unique, edges join nodes, kinds and flags exist, edges point forward.

    Args:
        data: the graph.
        acyclic: whether cycles are an error, too.

    Raises: AssertionError with the node or edge that is wrong.
    """
    position = {n.id: i for i, n in enumerate(data.nodes)}
    assert len(position) == len(data.nodes), "two nodes share an id"
    for n in data.nodes:
        assert n.kind in KINDS, f"node {n.id} is of unknown kind {n.kind!r}"
        assert n.flags <= set(FLAGS), f"node {n.id} has unknown flags {set(n.flags)}"
        assert n.count >= 1, f"node {n.id} stands for {n.count} nodes"
        assert n.nbytes >= 0, f"node {n.id} keeps {n.nbytes} bytes"
    for e in data.edges:
        assert e.source in position, f"edge from {e.source!r}, which is not a node"
        assert e.target in position, f"edge to {e.target!r}, which is not a node"
        assert e.kind in EDGE_KINDS, f"edge {e.source} -> {e.target} is of unknown kind {e.kind!r}"
        if acyclic:
            assert position[e.source] < position[e.target], f"edge {e.source} -> {e.target} points backward"


def without(data: GraphData, gone: Iterable[str]) -> GraphData:
    """The graph without these nodes and their edges."""
    removed = set(gone)
    if not removed:
        return data
    return data.replaced(
        [n for n in data.nodes if n.id not in removed],
        [e for e in data.edges if e.source not in removed and e.target not in removed],
    )


def bridged(data: GraphData, gone: Iterable[str]) -> GraphData:
    """The graph without these nodes; what flowed through them flows in one edge. Cost: linear plus the new edges.

    A bridge keeps where it leaves and enters, its reason if it was cut anywhere, and the norm at its end.
    """
    removed = set(gone)
    if not removed:
        return data
    before: dict[str, dict[tuple[str, int], Edge]] = {}  # removed node -> what it is made of
    edges: list[Edge] = []
    incoming = data.inputs()
    for node in ordered(data.nodes, data.edges):
        ends = before.setdefault(node.id, {}) if node.id in removed else None
        seen: set[tuple[str, int, int, str]] = set()
        for e in incoming[node.id]:
            for start in before[e.source].values() if e.source in removed and e.source in before else (e,):
                if start.source in removed:
                    continue
                made = e if start is e else _joined(start, e)
                if ends is not None:
                    ends.setdefault((made.source, made.output), made)
                    continue
                key = (made.source, made.output, made.input, made.kind)
                if key not in seen:
                    seen.add(key)
                    edges.append(made)
    return data.replaced([n for n in data.nodes if n.id not in removed], edges)


def _joined(first: Edge, last: Edge) -> Edge:
    kind = "cut" if "cut" in (first.kind, last.kind) else "saved" if "saved" in (first.kind, last.kind) else "data"
    ranks = [r for r in (first.rank, last.rank) if r is not None]
    return replace(
        last,
        source=first.source,
        output=first.output,
        kind=kind,
        reason=last.reason or first.reason,
        rank=max(ranks) if len(ranks) == 2 else None,
    )


def folded(
    data: GraphData, member: Mapping[str, Any], make: Callable[[Any, list[Node], tuple[Value, ...]], Node]
) -> GraphData:
    """The graph with each set of nodes replaced by one node, without new cycles.

    A set that the flow leaves and enters again is divided where it does, so a module that runs three times becomes
    three nodes. Sets that would still wait for each other stay as they are.

    Args:
        data: the graph.
        member: node id -> its set, for the nodes that are folded; a set is any hashable value.
        make: (set, its nodes in order, the values that leave it) -> the node in their place. Its id is made unique.

    Cost: linear, times the number of sets in a cycle if there are cycles.
    """
    place = _acyclic(data, member)
    parts: dict[Any, list[Node]] = {}
    for n in data.nodes:
        if n.id in place:
            parts.setdefault(place[n.id], []).append(n)
    ports, values = _exits(data, place)
    taken = {n.id for n in data.nodes if n.id not in place}
    new: dict[Any, Node] = {}
    for part, nodes in parts.items():
        leaving = values.get(part) or nodes[-1].values
        node = make(part[0], nodes, leaving)
        if node.id in taken:
            number = 2
            while f"{node.id}#{number}" in taken:
                number += 1
            node = replace(node, id=f"{node.id}#{number}")
        taken.add(node.id)
        new[part] = node
    result: list[Node] = []
    last = {id(nodes[-1]): part for part, nodes in parts.items()}
    for n in data.nodes:
        if n.id not in place:
            result.append(n)
        elif id(n) in last:
            result.append(new[last[id(n)]])
    edges = _rejoined(data.edges, place, new, ports)
    return data.replaced(ordered(result, edges), edges)


def total(nodes: Sequence[Node], **fields: Any) -> Node:
    """One node for several: bytes added, flags joined, the rest from the last node or from `fields`."""
    return replace(
        nodes[-1],
        nbytes=sum(n.nbytes for n in nodes),
        flags=frozenset().union(*(n.flags for n in nodes)),
        source=next((n.source for n in nodes if n.source), ""),
        **fields,
    )


def _exits(data: GraphData, place: Mapping[str, Any]) -> tuple[dict[Any, int], dict[Any, tuple[Value, ...]]]:
    """The results that leave each set, numbered: (node, result) -> index, and what they are, where all are known."""
    nodes = {n.id: n for n in data.nodes if n.id in place}
    ports: dict[Any, int] = {}
    values: dict[Any, list[Value | None]] = {}
    for e in data.edges:
        part = place.get(e.source)
        if part is None or place.get(e.target) == part or (e.source, e.output) in ports:
            continue
        found = values.setdefault(part, [])
        made = nodes[e.source].values
        ports[(e.source, e.output)] = len(found)
        found.append(made[e.output] if e.output < len(made) else None)
    known = {part: tuple(v for v in found if v is not None) for part, found in values.items()}
    return ports, {part: found for part, found in known.items() if len(found) == len(values[part])}


def _rejoined(
    edges: Iterable[Edge], place: Mapping[str, Any], new: Mapping[Any, Node], ports: Mapping[Any, int]
) -> list[Edge]:
    merged: dict[Any, Edge] = {}
    arguments: dict[Any, dict[tuple[str, int], int]] = {}
    for e in edges:
        a, b = place.get(e.source), place.get(e.target)
        if a is not None and a == b:
            continue
        source, output = (new[a].id, ports[(e.source, e.output)]) if a is not None else (e.source, e.output)
        target, argument = e.target, e.input
        if b is not None:
            target = new[b].id
            numbers = arguments.setdefault(target, {})
            argument = numbers.setdefault((source, output), len(numbers))
        if a is None and b is None:
            merged[id(e)] = e
            continue
        made = replace(e, source=source, target=target, output=output, input=argument)
        key = (source, output, target, argument, e.kind, e.reason)
        merged[key] = _added(merged[key], made) if key in merged else made
    return list(merged.values())


def _added(a: Edge, b: Edge) -> Edge:
    """Two edges side by side as one. Their gradients belong to one tensor only approximately: norms add in squares."""
    norms = [e.norm for e in (a, b) if e.norm is not None]
    ranks = [e.rank for e in (a, b) if e.rank is not None]
    return replace(
        a,
        norm=math.hypot(*norms) if norms else None,
        rank=min(ranks, default=None),
        label=a.label if a.label == b.label else "",
    )


def _acyclic(data: GraphData, member: Mapping[str, Any]) -> dict[str, tuple[Any, int]]:
    """Node id -> (set, part of it), such that the folded graph has no cycles that `data` has not."""
    place: dict[str, tuple[Any, int]] = {n.id: (member[n.id], 0) for n in data.nodes if n.id in member}
    cycles = _cycles(data, place)
    if not cycles:
        return place
    order = ordered(data.nodes, data.edges)
    incoming, outgoing = data.inputs(), data.outputs()
    for cycle in cycles:
        inside = [n.id for n in order if place.get(n.id, (n.id, -1)) in cycle]
        for key in [key for key, number in cycle if number >= 0]:
            place.update(_divided(key, inside, member, incoming, outgoing))
    for cycle in _cycles(data, place):
        for name in [n for n, part in place.items() if part in cycle]:
            del place[name]
    return place


def _divided(
    key: Any,
    inside: Sequence[str],
    member: Mapping[str, Any],
    incoming: Mapping[str, list[Edge]],
    outgoing: Mapping[str, list[Edge]],
) -> dict[str, tuple[Any, int]]:
    """The nodes of one set, numbered by how often the flow has left the set before it reaches them."""
    times: dict[str, int] = {}
    for name in inside:
        own = name in member and member[name] == key
        times[name] = max(
            (
                times[e.source] + (not own and e.source in member and member[e.source] == key)
                for e in incoming[name]
                if e.source in times
            ),
            default=0,
        )
    for name in reversed(inside):  # what nothing flows into goes where it is first used
        if name in member and member[name] == key and not incoming[name]:
            users = [e.target for e in outgoing[name] if member.get(e.target) == key and e.target in times]
            times[name] = min((times[u] for u in users), default=times[name])
    return {name: (key, times[name]) for name in inside if name in member and member[name] == key}


def _cycles(data: GraphData, place: Mapping[str, Any]) -> list[set[Any]]:
    """The sets of nodes of the folded graph that lie on cycles together (Tarjan's components, without recursion)."""
    after: dict[Any, dict[Any, None]] = {}
    for n in data.nodes:
        after.setdefault(place.get(n.id, (n.id, -1)), {})
    for e in data.edges:
        a, b = place.get(e.source, (e.source, -1)), place.get(e.target, (e.target, -1))
        if a != b:
            after[a][b] = None
    index: dict[Any, int] = {}
    low: dict[Any, int] = {}
    stack: list[Any] = []
    open_: set[Any] = set()
    found = []
    for first in after:
        if first in index:
            continue
        work = [(first, iter(after[first]))]
        index[first] = low[first] = len(index)
        stack.append(first)
        open_.add(first)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    open_.add(child)
                    work.append((child, iter(after[child])))
                    break
                if child in open_:
                    low[node] = min(low[node], index[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = set()
                    while True:
                        child = stack.pop()
                        open_.discard(child)
                        component.add(child)
                        if child == node:
                            break
                    if len(component) > 1:
                        found.append(component)
    return found
