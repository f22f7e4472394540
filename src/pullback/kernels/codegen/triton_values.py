"""Scalar values -> lines of Triton: each value is a tile, of one column, one row, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pullback.kernels.codegen import triton_special
from pullback.kernels.ir.expr import PARAMETER, ROLE
from pullback.kernels.plan.lower import Value

UNROLL = 8  # terms up to which a sum over d is written out, so that what belongs to a row stays in registers

# How the numbers of an argument lie: with any strides; components next to each other; rows too, without gaps
GAPS, UNIT, DENSE = range(3)

Depth = int | str | None  # the counter of a loop over d: a number, a Triton expression, or outside of such loops


class Values:
    """Writes each value once, where it belongs: before the loop over columns, in it, or in a loop over d.

    Args:
        signature: (dimension, category) of each argument.
        layouts: for each argument GAPS, UNIT or DENSE.
        rows: category of the axis whose rows are kept.
        tile: rows and columns of a tile.
        elem: Triton's name of the type that is computed in.

    Attributes:
        before, inside: lines before the loop over columns, and in it.
    """

    def __init__(
        self, signature: Sequence[tuple[int, int]], layouts: Sequence[int], rows: int, tile: tuple[int, int], elem: str
    ) -> None:
        self.signature, self.layouts, self.rows, self.tile, self.elem = signature, layouts, rows, tile, elem
        self.before: list[str] = []
        self.inside: list[str] = []
        self.loop: list[str] | None = None
        self.names: list[dict[tuple[object, ...], str]] = [{}]
        self.count = 0

    def fresh(self) -> str:
        """A name that is not taken."""
        self.count += 1
        return f"v{self.count}"

    def name(self, v: Value, depth: Depth = None, size: int | None = None) -> str:
        """The name that holds `v`, for a counter of its loop over d; `size` bounds a counter that may exceed it."""
        key = (id(v), depth if v.depth else None)
        found = self._known(key)
        if found is None:
            found = self._write(v, depth, size)
            self.names[-1 if v.depth else 0][key] = found
        return found

    def _known(self, key: tuple[object, ...]) -> str | None:
        return next((scope[key] for scope in reversed(self.names) if key in scope), None)

    def _write(self, v: Value, depth: Depth, size: int | None) -> str:
        if v.op == "Const":
            return self._let(v, f"tl.full((1, 1), {number(v.params[0])}, {self.elem})")
        if v.op == "Load":
            return self._load(v, v.params[0], v.params[1], None)
        if v.op == "Component":
            position, first, _ = v.params
            where = first + depth if isinstance(depth, int) else f"({first} + {depth})"
            return self._load(v, position, where, f"({depth} < {size})" if size is not None else None)
        if v.op == "Index":
            return self._let(v, f"{'rows[:, None]' if v.params[0] == self.rows else 'cols[None, :]'}.to({self.elem})")
        if v.op == "Loop":
            return self._sum(v)
        if v.op == "Exp":
            inner, factor = scaled(v.args[0])
            return self._let(v, triton_special.exponential(self.name(inner, depth, size), self.elem, factor))
        args = [self.name(a, depth, size) for a in v.args]
        text = triton_special.text(v.op)
        assert text is not None, f"{v.op} has no Triton text; please report"
        text = text.format(*args, **{f"p{k}": p for k, p in enumerate(v.params)})
        # where() of two numbers is a float32
        return self._let(v, f"({text}).to({self.elem})" if self.elem == "tl.float64" else text)

    def _lines(self, v: Value) -> list[str]:
        if v.depth and self.loop is not None:
            return self.loop
        return self.inside if v.role & ROLE[1 - self.rows] else self.before

    def _let(self, v: Value, text: str) -> str:
        name = self.fresh()
        self._lines(v).append(f"{name} = {text}")
        return name

    def _load(self, v: Value, position: int, component: int | str, mask: str | None) -> str:
        key = ("load", position, component)
        found = self._known(key)
        if found is not None:
            return found
        category = self.signature[position][1]
        at = f"{component}" if self.layouts[position] else f"{component} * c{position}"
        if category == PARAMETER:
            text = f"tl.load(a{position} + {at}" + (f", mask={mask}, other=0.0" if mask else "")
        else:
            own, ok = ("x", "row_ok") if category == self.rows else ("y", "col_ok")
            mask = f"{ok} & {mask}" if mask else ok
            text = f"tl.load({own}{position} + {at}, mask={mask}, other=0.0"
        name = self._let(v, f"{text}).to({self.elem})")
        self.names[-1 if isinstance(component, str) else 0][key] = name
        return name

    def _sum(self, v: Value) -> str:
        (body,), (size,) = v.args, v.params
        if size <= UNROLL or not body.depth:
            return self._let(v, " + ".join(self.name(body, d) for d in range(size)))
        self._outside(body)
        counter, total = f"d{self.fresh()}", self.fresh()
        outer, self.loop = self.loop, []
        self.names.append({})
        term = self.name(body, counter)
        inner, self.loop = self.loop, outer
        self.names.pop()
        shape = (self.tile[0] if v.role & ROLE[self.rows] else 1, self.tile[1] if v.role & ROLE[1 - self.rows] else 1)
        lines = self._lines(v)
        lines.append(f"{total} = tl.zeros({shape}, {self.elem})")
        lines.append(f"for {counter} in range(0, {size}):")
        lines += [f"    {line}" for line in [*inner, f"{total} = {total} + {term}"]]
        return total

    def _outside(self, body: Value) -> None:
        """Write what does not change in a loop over d before it."""
        stack, seen = [body], set()
        while stack:
            v = stack.pop()
            if id(v) in seen:
                continue
            seen.add(id(v))
            if v.depth:
                stack.extend(v.args)
            else:
                self.name(v)


def scaled(v: Value) -> tuple[Value, float]:
    """`v` as a constant times another value."""
    factor = 1.0
    while v.op == "Minus" or (v.op == "Mult" and v.args[0].op == "Const"):
        factor *= -1.0 if v.op == "Minus" else v.args[0].params[0]
        v = v.args[-1]
    return v, factor


def number(x: float) -> str:
    """A constant as Triton reads it."""
    return repr(x) if math.isfinite(x) else f"float('{x}')"
