"""Passes that leave nodes out or give them other names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from pullback.core.errors import ArgumentError
from pullback.graphs.model import GraphData, Node
from pullback.graphs.passes.language import parse
from pullback.graphs.passes.names import TITLES, common
from pullback.graphs.passes.pattern import One, Parallel, matches
from pullback.graphs.passes.rewrite import CARRIERS, Pass, bridged, without

Which = str | Callable[[Node], bool]


class _Selecting(Pass):
    """A pass about the nodes that a pattern finds, or for which a function is true."""

    def __init__(self, pattern: Which) -> None:
        self.pattern = pattern
        self._parsed = None if callable(pattern) else parse(pattern)
        if isinstance(self._parsed, Parallel) and all(isinstance(i, One) for i in self._parsed.items):
            raise ArgumentError(
                f"{type(self).__name__}: | means parallel branches; for one or the other write "
                f"{str(pattern).replace(' |', ',')!r}, and for nodes of branches 'A > (B | C)'"
            )

    def found(self, data: GraphData) -> set[str]:
        """Ids of the nodes that the pass is about."""
        if callable(self.pattern):
            return {n.id for n in data.nodes if self.pattern(n)}
        assert self._parsed is not None
        return {n.id for match in matches(self._parsed, data) for n in match}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.pattern!r})"


class Prune(_Selecting):
    """Leave nodes out, with their edges.

    Args:
        pattern: which, `Prune("Constant")`, `Prune("Dropout")`, `Prune("Shape > Gather")`; or a function of a `Node`.
    """

    def __call__(self, data: GraphData) -> GraphData:
        """The graph without the nodes."""
        return without(data, self.found(data))


class PruneBranch(_Selecting):
    """Leave nodes out, and everything that only they used.

    Args:
        pattern: which, as in `Prune`.
    """

    def __call__(self, data: GraphData) -> GraphData:
        """The graph without the branches."""
        gone = self.found(data)
        incoming, outgoing = data.inputs(), data.outputs()
        left = {name: len(edges) for name, edges in outgoing.items()}
        work = list(gone)
        while work:
            for e in incoming[work.pop()]:
                left[e.source] -= 1
                if not left[e.source] and e.source not in gone:
                    gone.add(e.source)
                    work.append(e.source)
        return without(data, gone)


class Hide(_Selecting):
    """Leave nodes out and join their inputs to their users: `Hide("accumulate")`, `Hide("Dropout")`.

    Args:
        pattern: which, as in `Prune`.

    Cost: linear, plus the edges that arise: a hidden node with m inputs and n users leaves m n of them.
    """

    def __call__(self, data: GraphData) -> GraphData:
        """The graph without the nodes."""
        return bridged(data, self.found(data))


class Filter(_Selecting):
    """Keep these nodes only, joined where a way leads from one to the next: `Filter("Conv, Linear, output")`.

    Args:
        pattern: which, as in `Prune`.
    """

    def __call__(self, data: GraphData) -> GraphData:
        """The graph of these nodes."""
        kept = self.found(data)
        return bridged(data, [n.id for n in data.nodes if n.id not in kept])


class Rename(Pass):
    r"""Give nodes other labels: `Rename(r"conv(.*)", r"Convolution\1")`.

    Args:
        op: regular expression for labels of operations, modules and operators; what it finds is replaced.
        to: the new text; may refer to groups of the expression.
        name: regular expression for labels of tensors: leaves, parameters, inputs, constants, outputs.

    Raises: ArgumentError unless `to` and one of `op` and `name` are given and correct.
    """

    def __init__(self, op: str | None = None, to: str | None = None, name: str | None = None) -> None:
        if to is None or (op is None) == (name is None):
            raise ArgumentError("Rename needs what to replace and by what: Rename(op=r'conv.*', to='Conv'), or name=")
        text = op if op is not None else str(name)
        try:
            self._expression = re.compile(text)
            self._expression.sub(to, "")
        except re.error as error:
            raise ArgumentError(f"Rename: {text!r} is no regular expression, or {to!r} does not fit: {error}") from None
        self._text, self._tensors, self._to = text, op is None, to

    def __call__(self, data: GraphData) -> GraphData:
        """The graph with other labels."""
        nodes = []
        for n in data.nodes:
            label = self._expression.sub(self._to, n.label) if (n.kind in CARRIERS) == self._tensors else n.label
            nodes.append(n if label == n.label else replace(n, label=label))
        return data.replaced(nodes, data.edges)

    def __repr__(self) -> str:
        return f"Rename({'name' if self._tensors else 'op'}={self._text!r}, to={self._to!r})"


class CommonNames(Pass):
    """One name for an operation whatever tracer wrote it: "conv2d" and "ConvolutionBackward0" become "Conv"."""

    def __call__(self, data: GraphData) -> GraphData:
        """The graph with common names."""
        nodes = []
        for n in data.nodes:
            name = common(n.label)
            title = TITLES.get(name, name[:1].upper() + name[1:])
            nodes.append(replace(n, label=title) if n.kind == "operation" and title else n)
        return data.replaced(nodes, data.edges)

    def __repr__(self) -> str:
        return "CommonNames()"
