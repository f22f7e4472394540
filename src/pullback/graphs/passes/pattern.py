"""Patterns of operations, and how they are found in a graph. `language.parse` makes them from text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pullback.graphs.model import Edge, GraphData, Node


class View:
    """A graph as patterns see it: who uses whose result. Saved tensors are not uses."""

    def __init__(self, data: GraphData) -> None:
        self.nodes = {n.id: n for n in data.nodes}
        after: dict[str, dict[str, None]] = {n.id: {} for n in data.nodes}
        for e in data.edges:
            if e.kind != "saved" and self.nodes[e.target].kind != "saved":
                after[e.source][e.target] = None
        self.users = {name: tuple(found) for name, found in after.items()}
        self._data = data

    @cached_property
    def inputs(self) -> dict[str, list[Edge]]:
        """Node id -> its edges in."""
        return self._data.inputs()

    def weight(self, node: Node) -> tuple[int, ...] | None:
        """The shape of the second argument, which is the weight of convolutions and linear maps."""
        for e in self.inputs[node.id]:
            if e.input == 1 and e.kind == "data":
                values = self.nodes[e.source].values
                return values[e.output].shape if e.output < len(values) else None
        return None


class Match(NamedTuple):
    """Ids of the nodes found, in the order of the pattern, and of those that follow."""

    nodes: tuple[str, ...]
    after: tuple[str, ...]


Test = Callable[[Node, View], bool]


@dataclass(frozen=True)
class One:
    """A single node; `operation` is the name that it must have, if that is one of torch."""

    tests: tuple[Test, ...]
    operation: str = ""

    def at(self, view: View, place: tuple[str, ...]) -> Match | None:
        """A match that begins at `place`: the nodes that follow what came before."""
        if len(place) != 1 or not self.accepts(view.nodes[place[0]], view):
            return None
        return Match(place, view.users[place[0]])

    def accepts(self, node: Node, view: View) -> bool:
        """Whether the node passes every test."""
        return all(test(node, view) for test in self.tests)


@dataclass(frozen=True)
class Serial:
    """One after the other."""

    items: tuple[Pattern, ...]

    def at(self, view: View, place: tuple[str, ...]) -> Match | None:
        """A match that begins at `place`."""
        nodes: tuple[str, ...] = ()
        for item in self.items:
            found = item.at(view, place)
            if found is None:
                return None
            nodes, place = nodes + found.nodes, found.after
        return Match(nodes, place) if len(set(nodes)) == len(nodes) else None


@dataclass(frozen=True)
class Parallel:
    """Branches from one result to one operation."""

    items: tuple[Pattern, ...]
    skip: bool = False

    def at(self, view: View, place: tuple[str, ...]) -> Match | None:
        """A match that begins at `place`, which holds the first node of every branch (of `skip`, the one after it)."""
        if len(place) != len(self.items) + self.skip:
            return None
        for end in place if self.skip else (None,):
            heads = [n for n in place if n != end]
            ways = [[item.at(view, (head,)) for head in heads] for item in self.items]
            pairing = _paired([[m is not None for m in row] for row in ways])
            if pairing is None:
                continue
            found = [m for m in (ways[i][j] for i, j in enumerate(pairing)) if m is not None]
            ends = {frozenset(m.after) for m in found}
            nodes = tuple(n for m in found for n in m.nodes)
            if len(ends) != 1 or len(set(nodes)) != len(nodes) or (end is not None and ends != {frozenset((end,))}):
                continue
            return Match(nodes, found[0].after)
        return None


@dataclass(frozen=True)
class Choice:
    """One of several."""

    items: tuple[Pattern, ...]

    def at(self, view: View, place: tuple[str, ...]) -> Match | None:
        """The first that matches at `place`."""
        return next((m for m in (item.at(view, place) for item in self.items) if m is not None), None)


Pattern = One | Serial | Parallel | Choice


def _paired(fits: Sequence[Sequence[bool]]) -> list[int] | None:
    """A different column for every row where it is True (augmenting paths), or None."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    if not all(place(row, set()) for row in range(len(fits))):
        return None
    return [column for _, column in sorted((row, column) for column, row in owner.items())]


def matches(pattern: Pattern, data: GraphData) -> list[tuple[Node, ...]]:
    """Matches without common nodes, in one sweep from the inputs. Cost: linear in nodes and edges."""
    view = View(data)
    used: set[str] = set()
    found = []
    for place in _places(pattern, view, data):
        match = pattern.at(view, place)
        if match is not None and used.isdisjoint(match.nodes):
            used.update(match.nodes)
            found.append(tuple(view.nodes[n] for n in match.nodes))
    return found


def _places(pattern: Pattern, view: View, data: GraphData) -> list[tuple[str, ...]]:
    if not _forks(pattern):
        return [(n.id,) for n in data.nodes]
    forks = [view.users[n.id] for n in data.nodes]
    roots = tuple(n.id for n in data.nodes if not view.inputs[n.id])
    alone = [] if isinstance(pattern, Parallel) else [(n.id,) for n in data.nodes]
    return [place for place in (roots, *forks) if len(place) > 1] + alone


def _forks(pattern: Pattern) -> bool:
    """Whether a match may begin with several nodes."""
    while isinstance(pattern, Serial):
        pattern = pattern.items[0]
    return isinstance(pattern, Parallel) or (isinstance(pattern, Choice) and any(map(_forks, pattern.items)))
