"""Vector expressions -> scalar values with common subexpressions shared: what the renderers turn into code.

A `Value` is one number for a pair. Short vectors are unrolled into one Value for each component. Long ones (from
`ROLL` components on) stay loops over d: a "Loop" value is a sum over d of a body, a `Segment` of the result may be
one body for all d. Inside a body, "Component" reads component first + d of an argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pullback.core.errors import PullbackError
from pullback.kernels.ir.expr import ROLE, Expr, walk
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import Program
from pullback.kernels.ir.structure import STRUCTURES

ROLL = 4  # components from which a vector is a loop; measured on AVX-512: 1.1x faster at 4, 1.5x at 11
LIMIT = 6000  # values above which compiling takes longer than anybody waits


class TooLarge(PullbackError):
    """The formula unrolls into more scalar code than is sensible; the eager renderer takes it."""


class Value:
    """One scalar: op(*args; *params). Interned by the Lowering that made it, so equal ones are the same object.

    Args:
        op: an elementwise primitive, or "Const" (value), "Load" (argument, component), "Component" (argument, first
            component, size of the loop), "Index" (category), "Loop" (size; its one argument is the body to be summed
            over d).
        role: bit 1 if it depends on i, 2 if on j, 3 for pairs, 0 for parameters and constants.
        depth: it depends on the loop counter d.
    """

    __slots__ = ("args", "depth", "op", "params", "role")

    def __init__(self, op: str, args: tuple[Value, ...], params: tuple[Any, ...], role: int, depth: bool) -> None:
        self.op, self.args, self.params, self.role, self.depth = op, args, params, role, depth

    def __repr__(self) -> str:
        return f"{self.op}({', '.join([*map(repr, self.args), *map(str, self.params)])})"


@dataclass(frozen=True)
class Segment:
    """Columns start .. start + size of a result: one Value each, or one body for all of them (rolled)."""

    start: int
    size: int
    values: tuple[Value, ...]  # of length size, or 1 if rolled
    rolled: bool


@dataclass(frozen=True)
class Lowered:
    """The scalar code of a Program: for each of its expressions the segments of its components."""

    program: Program
    segments: tuple[tuple[Segment, ...], ...]

    def values(self) -> list[Value]:
        """Every value once, arguments first (bodies of loops included)."""
        seen: dict[int, Value] = {}

        def visit(v: Value) -> None:
            stack = [(v, False)]
            while stack:
                node, ready = stack.pop()
                if ready:
                    seen[id(node)] = node
                elif id(node) not in seen:
                    stack.append((node, True))
                    stack.extend((a, False) for a in reversed(node.args) if id(a) not in seen)

        for group in self.segments:
            for segment in group:
                for v in segment.values:
                    visit(v)
        return list(seen.values())


class _Lowering:
    def __init__(self) -> None:
        self.table: dict[Any, Value] = {}
        self.unrolled: dict[Expr, list[Value]] = {}
        self.bodies: dict[tuple[Expr, int, int], Value | None] = {}
        self.marks: dict[Expr, set[int]] = {}

    # Values --------------------------------------------------------------------------------------------------------

    def node(self, op: str, args: tuple[Value, ...] = (), params: tuple[Any, ...] = (), role: int = 0) -> Value:
        key = (op, tuple(map(id, args)), params if op != "Const" else repr(params))
        value = self.table.get(key)
        if value is None:
            for a in args:
                role |= a.role
            depth = op == "Component" or (op != "Loop" and any(a.depth for a in args))
            value = self.table[key] = Value(op, args, params, role, depth)
            if len(self.table) > LIMIT:
                raise TooLarge(f"the formula needs more than {LIMIT} scalar operations")
        return value

    def const(self, x: float) -> Value:
        return self.node("Const", (), (float(x),))

    def arithmetic(self, op: str, *operands: Any) -> Value:
        """A scalar operation, simplified; only products are reordered, which may round differently."""
        if op == "Const":
            return self.const(operands[0])
        if not isinstance(operands[-1], Value):
            n = sum(isinstance(a, Value) for a in operands)
            args, params = operands[:n], operands[n:]
        else:
            args, params = operands, ()
        if all(a.op == "Const" for a in args):
            numbers = [torch.tensor(a.params[0], dtype=torch.float64) for a in args]
            return self.const(PRIMITIVES[op].torch(*numbers, *params).item())
        rule = _IDENTITIES.get(op)
        found = rule(self, *args) if rule else None
        return found if found is not None else self.node(op, args, params)

    # Expressions ---------------------------------------------------------------------------------------------------

    def components(self, e: Expr) -> list[Value]:
        """One Value for each component. Operands of sums that become loops are not unrolled."""
        stack = [e]
        while stack:
            node = stack[-1]
            if node not in self.unrolled:
                rolled = self._loops(node)
                needed = () if rolled else [a for a in node.args if a not in self.unrolled]
                if needed:
                    stack.extend(needed)
                    continue
                self.unrolled[node] = rolled or self._components(node)
            stack.pop()
        return self.unrolled[e]

    def _components(self, e: Expr) -> list[Value]:
        if e.op == "Var":
            position, category = e.params
            return [self.node("Load", (), (position, k), ROLE[category]) for k in range(e.dim)]
        if e.op == "Const":
            return [self.const(v) for v in e.params]
        if e.op == "Index":
            return [self.node("Index", (), e.params, ROLE[e.params[0]])]
        parts = [self.unrolled[a] for a in e.args]
        if e.op in STRUCTURES:
            return STRUCTURES[e.op].lower(self.arithmetic, parts, e.params)
        return [self.arithmetic(e.op, *(p[0] if len(p) == 1 else p[k] for p in parts), *e.params) for k in range(e.dim)]

    def _loops(self, e: Expr) -> list[Value] | None:
        """The sum of a long vector as loops over its uniform pieces; None if it has none, or is no such sum."""
        if e.op != "Sum" or e.args[0].dim < ROLL:
            return None
        (inner,) = e.args
        terms: list[Value] = []
        for start, stop in self._pieces(inner):
            body = self.body(inner, start, stop - start) if stop - start >= ROLL else None
            if body is not None:
                terms.append(self.node("Loop", (body,), (stop - start,)))
            elif stop - start == inner.dim:
                return None
            else:
                terms += self.components(inner)[start:stop]
        return STRUCTURES["Sum"].lower(self.arithmetic, [terms], ())

    def _pieces(self, e: Expr) -> list[tuple[int, int]]:
        """Intervals of components, cut where operands were joined."""
        marks = sorted(self._marks(e))
        return list(itertools.pairwise(marks))

    def _marks(self, e: Expr) -> set[int]:
        found = self.marks.get(e)
        if found is None:
            found = {0, e.dim}
            if e.op == "Concat":
                stops = itertools.accumulate(a.dim for a in e.args)
                for a, stop in zip(e.args, stops, strict=True):
                    found |= {stop - a.dim + k for k in self._marks(a)}
            elif e.op in ("Gather", "Scatter") and (first := _run(e.params[0])) is not None:
                shift = -first if e.op == "Gather" else first
                found |= {k + shift for k in self._marks(e.args[0]) if 0 <= k + shift <= e.dim}
            elif e.op in PRIMITIVES:
                found = found.union(*(self._marks(a) for a in e.args if a.dim == e.dim))
            self.marks[e] = found
        return found

    def body(self, e: Expr, start: int, size: int) -> Value | None:
        """Component start + d of a long vector as one Value for d < size, or None if these differ in kind."""
        key = (e, start, size)
        if key not in self.bodies:
            self.bodies[key] = self._body(e, start, size)
        return self.bodies[key]

    def _body(self, e: Expr, start: int, size: int) -> Value | None:
        if e.dim == 1:
            return self.components(e)[0]
        if e.op == "Var":
            return self.node("Component", (), (e.params[0], start, size), ROLE[e.params[1]])
        if e.op == "Const":
            same = len(set(e.params[start : start + size])) == 1
            return self.const(e.params[start]) if same else None
        if e.op == "SumT":
            return self.components(e.args[0])[0]
        if e.op == "Concat":
            for a in e.args:
                if start + size <= a.dim:
                    return self.body(a, start, size)
                if start < a.dim:
                    return None
                start -= a.dim
        if e.op == "Gather" and (first := _run(e.params[0])) is not None:
            return self.body(e.args[0], first + start, size)
        if e.op == "Scatter" and (first := _run(e.params[0])) is not None:
            if start + size <= first or start >= first + e.args[0].dim:
                return self.const(0.0)
            inside = first <= start and start + size <= first + e.args[0].dim
            return self.body(e.args[0], start - first, size) if inside else None
        if e.op not in PRIMITIVES:
            return None
        parts = [self.body(a, start, size) for a in e.args]
        if any(p is None for p in parts):
            return None
        return self.arithmetic(e.op, *parts, *e.params)

    def segments(self, e: Expr, roll: bool) -> list[tuple[int, tuple[Value, ...], bool]]:
        """(size, Values, rolled) of the pieces of a result, which are left unrolled if `roll` is false."""
        if not roll:
            return [(e.dim, tuple(self.components(e)), False)]
        found: list[tuple[int, tuple[Value, ...], bool]] = []
        for start, stop in self._pieces(e):
            body = self.body(e, start, stop - start) if stop - start >= ROLL else None
            if body is not None:
                found.append((stop - start, (body,), True))
            else:
                found.append((stop - start, tuple(self.components(e)[start:stop]), False))
        return found


def _run(where: tuple[int, ...]) -> int | None:
    """The first of consecutive numbers; None if they are not consecutive."""
    return where[0] if where == tuple(range(where[0], where[0] + len(where))) else None


def _is(v: Value, x: float) -> bool:
    return v.op == "Const" and bool(v.params[0] == x)


def _add(low: _Lowering, a: Value, b: Value) -> Value | None:
    return b if _is(a, 0) else a if _is(b, 0) else low.arithmetic("Subtract", a, b.args[0]) if b.op == "Minus" else None


def _subtract(low: _Lowering, a: Value, b: Value) -> Value | None:
    return low.arithmetic("Minus", b) if _is(a, 0) else a if _is(b, 0) else None


def _mult(low: _Lowering, a: Value, b: Value) -> Value | None:
    if _is(a, 0) or _is(b, 0):
        return low.const(0.0)
    for one, other in ((a, b), (b, a)):
        if _is(one, 1):
            return other
        if _is(one, -1):
            return low.arithmetic("Minus", other)
        if other.depth and not one.depth:  # what does not change in a loop to the front, where it is computed before it
            if other.op == "Minus":
                return low.arithmetic("Mult", low.arithmetic("Minus", one), other.args[0])
            if other.op == "Mult" and not other.args[0].depth:
                return low.arithmetic("Mult", low.arithmetic("Mult", one, other.args[0]), other.args[1])
            return low.node("Mult", (one, other))
        if one.op == "Const" and other.op == "Mult" and other.args[0].op == "Const":
            return low.arithmetic("Mult", low.arithmetic("Mult", one, other.args[0]), other.args[1])
    return low.node("Mult", (b, a)) if b.op == "Const" else None


def _minus(low: _Lowering, a: Value) -> Value | None:
    if a.op == "Minus":
        return a.args[0]
    if a.op == "Mult" and a.depth and not a.args[0].depth:
        return low.arithmetic("Mult", low.arithmetic("Minus", a.args[0]), a.args[1])
    return None


_IDENTITIES: dict[str, Callable[..., Value | None]] = {
    "Add": _add,
    "Subtract": _subtract,
    "Mult": _mult,
    "Divide": lambda low, a, b: a if _is(b, 1) else low.const(0.0) if _is(a, 0) else None,
    "Minus": _minus,
    "Square": lambda low, a: low.arithmetic("Square", a.args[0]) if a.op == "Minus" else None,
    "Where": lambda low, c, a, b: (a if c.params[0] != 0 else b) if c.op == "Const" else a if a is b else None,
}


def expand(e: Expr, column: str) -> Expr:
    """`e` with every operation that a renderer lacks (its column is None) written in those that it has."""
    done: dict[Expr, Expr] = {}
    for node in walk(e):
        args = tuple(done[a] for a in node.args)
        row = PRIMITIVES.get(node.op)
        if row is not None and getattr(row, column) is None and row.expand is not None:
            done[node] = expand(row.expand(*args, *node.params), column)
        else:
            done[node] = node if args == node.args else Expr(node.op, args, node.params, node.dim)
    return done[e]


def lower(program: Program, column: str = "llvm") -> Lowered:
    """The scalar code of `program` for the renderer of that column. Raises TooLarge.

    Only sums (weighted ones too) may have rolled results: others keep a state for each component.
    """
    low = _Lowering()
    groups = []
    for k, e in enumerate(program.exprs):
        start, group = 0, []
        for size, values, rolled in low.segments(expand(e, column), program.kind == "Sum" or k > 0):
            group.append(Segment(start, size, values, rolled))
            start += size
        groups.append(tuple(group))
    return Lowered(program, tuple(groups))
