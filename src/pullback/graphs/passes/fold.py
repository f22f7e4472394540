"""Passes that draw several nodes as one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pullback.core.errors import ArgumentError
from pullback.graphs.model import GraphData, Node, Value, ordered
from pullback.graphs.passes.language import parse
from pullback.graphs.passes.pattern import View, matches
from pullback.graphs.passes.rewrite import CARRIERS, Pass, folded, total

FIRST = "__first__"
_PRIVATE = frozenset({"leaf", "parameter", "constant", "accumulate", "saved"})  # goes where its only user goes


class Fold(Pass):
    """Draw every match of a pattern as one node: `Fold("Conv > BatchNorm > Relu", "ConvBnRelu")`.

    Matches are found in one sweep from the inputs and never overlap; a fold does not match what it has just made. Nodes
    inside of a match have no user outside, so no cycle can arise.

    Args:
        pattern: what to fold, in the language of `passes.language`: "A > B" one after the other, "A | B" parallel
            branches from one result to one operation, "A, B" either, "Conv & [3x3]" several facts of one node.
        op: the label of the new node, by which later patterns find it; "__first__" keeps the first node's.
        name: what to write on it instead of `op`.
    """

    def __init__(self, pattern: str, op: str, name: str | None = None) -> None:
        self.pattern, self.op, self.name = pattern, op, name
        self._parsed = parse(pattern)

    def __call__(self, data: GraphData) -> GraphData:
        """The folded graph."""
        found = matches(self._parsed, data)
        member = {n.id: match[0].id for match in found for n in match}
        firsts = {match[0].id: match[0] for match in found}

        def make(key: Any, nodes: list[Node], values: tuple[Value, ...]) -> Node:
            first = firsts[key]
            if self.op == FIRST:
                return total(nodes, id=key, label=first.label, kind=first.kind, values=values, group=_shared(nodes))
            details = _facts(nodes) | {"op": self.op}
            label = self.name or self.op
            return total(
                nodes,
                id=key,
                label=label,
                kind=_kind(nodes),
                values=values,
                group=_shared(nodes),
                details=details,
                count=1,
            )

        return folded(data, member, make)

    def __repr__(self) -> str:
        return f"Fold({self.pattern!r}, {self.op!r})"


class FoldId(Pass):
    """Draw the nodes whose id a regular expression matches as one node for each text of its first group.

    Args:
        id_regex: matched at the beginning of the id, or of the path through the modules: "layer4/1/conv1".
        op: the label of the new nodes.
        name: what to write on them instead.

    Raises: ArgumentError for an expression without a group.
    """

    def __init__(self, id_regex: str, op: str, name: str | None = None) -> None:
        try:
            self._expression = re.compile(id_regex)
        except re.error as error:
            raise ArgumentError(f"FoldId: {id_regex!r} is no regular expression: {error}") from None
        if not self._expression.groups:
            raise ArgumentError(f"FoldId: {id_regex!r} needs a group that tells what belongs together: r'(layer\\d+)/'")
        self.op, self.name = op, name

    def __call__(self, data: GraphData) -> GraphData:
        """The folded graph."""
        member = {}
        for n in data.nodes:
            found = self._expression.match(n.id) or self._expression.match("/".join((*n.group, n.label)))
            if found and found.group(1) is not None:
                member[n.id] = found.group(1)

        def make(key: Any, nodes: list[Node], values: tuple[Value, ...]) -> Node:
            return total(
                nodes,
                id=key,
                label=self.name or self.op,
                kind=_kind(nodes),
                values=values,
                group=_shared(nodes),
                details=_facts(nodes) | {"op": self.op},
                count=1,
            )

        return folded(data, member, make)

    def __repr__(self) -> str:
        return f"FoldId({self._expression.pattern!r}, {self.op!r})"


class FoldDuplicates(Pass):
    """Draw equal operations in a row as one, marked with their number: Relu > Relu > Relu becomes Relu x3.

    Equal are nodes of one label and kind; nothing else uses what is inside of the row.
    """

    def __call__(self, data: GraphData) -> GraphData:
        """The folded graph."""
        view = View(data)
        member: dict[str, str] = {}  # node -> the last of its row
        for n in reversed(ordered(data.nodes, data.edges)):
            ends = {member.get(user, user) for user in view.users[n.id]}
            if n.kind not in CARRIERS and len(ends) == 1:
                end = view.nodes[ends.pop()]
                if (end.label, end.kind) == (n.label, n.kind):
                    member[n.id] = member[end.id] = end.id

        def make(key: Any, nodes: list[Node], values: tuple[Value, ...]) -> Node:
            return total(nodes, id=nodes[0].id, values=values, group=_shared(nodes), count=sum(n.count for n in nodes))

        return folded(data, member, make)

    def __repr__(self) -> str:
        return "FoldDuplicates()"


class Collapse(Pass):
    """Draw modules as single nodes, each call of a module as one.

    A module's node also takes the parameters and other tensors that nothing else uses; its details tell the class and
    the number of parameters, its bytes are theirs together.

    Args:
        which: the depth at which modules become nodes, 1 for the children of the model; or the path of modules, with
            wildcards: `Collapse("layer4")`, `Collapse("layer?.*")`.

    Raises: ArgumentError for a depth below 1.
    """

    def __init__(self, which: int | str = 1) -> None:
        if not isinstance(which, (int, str)) or isinstance(which, bool) or (isinstance(which, int) and which < 1):
            raise ArgumentError(f"Collapse: give a depth of at least 1, or the path of a module; got {which!r}")
        self.which = which

    def __call__(self, data: GraphData) -> GraphData:
        """The collapsed graph."""
        module: dict[tuple[str, ...], tuple[str, ...] | None] = {}
        member: dict[str, tuple[str, ...]] = {}
        for n in data.nodes:
            if n.group not in module:
                module[n.group] = self._module(n.group, data.groups)
            path = module[n.group]
            if path is not None:
                member[n.id] = path
        users = data.outputs()
        for n in reversed(data.nodes):
            if n.kind in _PRIVATE and n.id not in member:
                paths = {member.get(e.target) for e in users[n.id]}
                path = paths.pop() if len(paths) == 1 else None
                if path is not None:
                    member[n.id] = path
        sources = data.inputs()
        for n in data.nodes:  # saved tensors hang behind the node that saved them
            if n.kind == "saved" and n.id not in member and sources[n.id] and not users[n.id]:
                paths = {member.get(e.source) for e in sources[n.id]}
                path = paths.pop() if len(paths) == 1 else None
                if path is not None:
                    member[n.id] = path

        def make(key: Any, nodes: list[Node], values: tuple[Value, ...]) -> Node:
            details = _facts(nodes)
            if key in data.groups:
                details = {"module": data.groups[key]} | details
            label = ".".join(key[_rooted(key, data.groups) :])
            return total(
                nodes, id=label, label=label, kind="module", values=values, group=key[:-1], details=details, count=1
            )

        return folded(data, member, make)

    def _module(self, group: tuple[str, ...], classes: Mapping[tuple[str, ...], str]) -> tuple[str, ...] | None:
        """The module that a node in these modules goes into, or None."""
        root = _rooted(group, classes)
        if isinstance(self.which, int):
            return group[: self.which + root] if len(group) > root else None
        pattern = self.which.replace("/", ".")
        depth = pattern.count(".") + 1
        for first in (root, 0):
            path = group[: first + depth]
            if len(path) == first + depth and fnmatchcase(".".join(path[first:]), pattern):
                return path
        return None

    def __repr__(self) -> str:
        return f"Collapse({self.which!r})"


def _rooted(group: tuple[str, ...], classes: Mapping[tuple[str, ...], str]) -> int:
    """1 if a path begins with the model itself, under the name of its class: ("ResNet", "layer4"); else 0."""
    return int(bool(group) and classes.get(group[:1]) == group[0])


def _shared(nodes: Sequence[Node]) -> tuple[str, ...]:
    """The modules around all of them."""
    groups = {n.group for n in nodes}
    low, high = min(groups), max(groups)
    size = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:size]


def _kind(nodes: Sequence[Node]) -> str:
    return next((n.kind for n in reversed(nodes) if n.kind not in CARRIERS), nodes[-1].kind)


def _facts(nodes: Sequence[Node]) -> dict[str, Any]:
    """What is inside: the operations in order, and the number of parameters."""
    inside = [f"{n.label} x{n.count}" if n.count > 1 else n.label for n in nodes if n.kind not in CARRIERS]
    shown = " > ".join(inside[:8]) + (f" > ... ({len(inside)} in all)" if len(inside) > 8 else "")
    facts: dict[str, Any] = {"contains": shown} if inside else {}
    numbers = [n.details.get("parameters") for n in nodes]
    held = sum(math.prod(n.values[0].shape) for n in nodes if n.kind == "parameter" and n.values)
    held += sum(n for n in numbers if isinstance(n, int))
    return facts | ({"parameters": held} if held else {})
