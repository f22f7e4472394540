"""Paths from one vertex of a directed acyclic graph to another: counted, listed, and listed from the largest on.

Vertices are any hashable objects. Nothing here knows what a path is worth beyond a number for each edge, the logarithm
of its gain. Nothing recurses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from pullback.core import nodes

Vertex = Any


class Edge(NamedTuple):
    """The edge that leaves `tail` as its input number `slot`; two vertices may have several edges."""

    tail: Vertex
    slot: int
    head: Vertex


class Paths:
    """Every path from `source` to `target`; vertices from which the target is out of reach are left out.

    Args:
        source, target: vertices; if they are one and the same there is one path, without edges.
        heads: the vertices that the edges of a vertex lead to, in order; None for an edge that leads nowhere.

    Attributes:
        order: the vertices on paths, each before those that its edges lead to.
        edges: their edges, as far as they lie on paths.
        count: the number of paths, exact. 0 if the target is out of reach.

    Cost: one visit of every edge behind the source.
    """

    def __init__(self, source: Hashable, target: Hashable, heads: Callable[[Any], Sequence[Any]]) -> None:
        self.source = source
        self._ends = {target}  # a set compares by hash first: Scalars are equal when their values are
        everything = nodes.topological(
            [source], lambda v: [] if v in self._ends else [h for h in heads(v) if h is not None]
        )
        ways: dict[Any, int] = {}
        self.edges: dict[Any, list[Edge]] = {}
        for vertex in reversed(everything):
            edges = (
                [] if vertex in self._ends else [Edge(vertex, i, h) for i, h in enumerate(heads(vertex)) if h in ways]
            )
            number = 1 if vertex in self._ends else sum(ways[e.head] for e in edges)
            if number:
                ways[vertex], self.edges[vertex] = number, edges
        self.order = [v for v in everything if v in ways]
        self.count = ways.get(source, 0)

    def every(self) -> Iterator[list[Edge]]:
        """All paths, neighbours sharing as many first edges as possible."""
        if not self.count:
            return
        path: list[Edge] = []
        stack = [iter(self.edges[self.source])]
        if self.source in self._ends:
            yield []
        while stack:
            edge = next(stack[-1], None)
            if edge is None:
                stack.pop()
                if path:
                    path.pop()
                continue
            path.append(edge)
            if edge.head in self._ends:
                yield list(path)
                path.pop()
            else:
                stack.append(iter(self.edges[edge.head]))

    def largest_first(self, gain: Callable[[Edge], float]) -> Iterator[list[Edge]]:
        """Paths by decreasing sum of `gain` over their edges, lazily.

        A search that always extends the beginning of a path whose best completion is best. That completion is known
        exactly, by dynamic programming from the target, and what an edge loses against the best one is counted, so the
        best continuation of a beginning has exactly its priority and ties do not fan out.

        Args:
            gain: the logarithm of the absolute factor of an edge; -inf for zero; nan counts as inf.

        Cost: for each path its number of edges, times log of the number of beginnings that wait.
        """
        if not self.count:
            return
        best: dict[Any, float] = dict.fromkeys(self._ends, 0.0)
        loss: dict[Edge, float] = {}
        for vertex in reversed(self.order):
            if vertex in self._ends:
                continue
            through = [_sum(gain(e), best[e.head]) for e in self.edges[vertex]]
            top = max(through)
            best[vertex] = top
            for edge, value in zip(self.edges[vertex], through, strict=True):
                loss[edge] = 0.0 if value == top else top - value
        # (loss so far, -length, number, vertex, last link); longer beginnings first, so that a path gets finished.
        waiting: list[tuple[float, int, int, Any, Any]] = [(0.0, 0, 0, self.source, None)]
        number = 0
        while waiting:
            so_far, length, _, vertex, link = heapq.heappop(waiting)
            while vertex not in self._ends:  # go on along the best edge, leave the others for later
                length -= 1
                chosen = None
                for edge in self.edges[vertex]:
                    if chosen is None and loss[edge] == 0.0:
                        chosen = edge
                        continue
                    number += 1
                    heapq.heappush(waiting, (so_far + loss[edge], length, number, edge.head, (edge, link)))
                assert chosen is not None, "a vertex without a best edge; please report"
                vertex, link = chosen.head, (chosen, link)
            path = []
            while link is not None:
                path.append(link[0])
                link = link[1]
            path.reverse()
            yield path


def log_gain(size: float) -> float:
    """The logarithm of |size|, as `largest_first` wants it."""
    return -math.inf if size == 0 else math.inf if not math.isfinite(size) else math.log(size)


def _sum(a: float, b: float) -> float:
    total = a + b
    return math.inf if math.isnan(total) else total
