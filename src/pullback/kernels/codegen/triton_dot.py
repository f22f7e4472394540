"""Which loops over d are products of matrices: sums of f_ij r_i(d) c_j(d), as `tl.dot` computes them.

A sum over d of r_i(d) c_j(d) is the product of two matrices, and so is a sum over j of f_ij c_j(d) for all d. What
depends on d is expanded into such terms. Where that subtracts what belongs to a row from what belongs to a column, as
in x_i - y_j, the first row of the tile is taken off both before: rounding is then relative to |x_i - c| + |y_j - c|,
c that row, as if the coordinates relative to c had been rounded in the type that is computed in. An inner product and
a sum of f_ij (x_i - y_j) over j bear that. Two cases need more:

- sum_d (x_id - y_jd)^2 = |x_i - c|^2 + |y_j - c|^2 - 2 (x_i - c | y_j - c) loses digits where the two points are close
  to each other and far from c. Tiles where some pair has less than NEAR of |x_i - c|^2 + |y_j - c|^2 left are computed
  again by differences, so that the relative error of every squared distance is below that of a product of the same
  length divided by NEAR: a few units in the last place become at most 16 times as many. Points in 16 and more
  dimensions that are spread out need that next to never, those that lie in tight clusters always, and then cost what
  they did before.
- a product of two such differences would lose the digits of both. It stays a loop over d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from pullback.kernels.ir.expr import ROLE
from pullback.kernels.plan.lower import Value

LEAST = 16  # length of a loop over d, and columns of a result, from which tl.dot computes it
NEAR = 1 / 16  # of the sum of squares, that must be left of it in a squared distance
MOST = 3  # products in the place of one loop


@dataclass(frozen=True, eq=False)
class Term:
    """sign * factor * row(d) * column(d), where None stands for 1.

    Args:
        sign: 1 or -1.
        factor: does not depend on d.
        row: belongs to the kept axis, or to parameters.
        column: belongs to the other axis.
    """

    sign: int
    factor: Value | None
    row: Value | None
    column: Value | None


@dataclass(frozen=True, eq=False)
class Loop:
    """A sum over d as terms.

    Args:
        terms: what is summed; of a squared distance the two sides of the difference as row and column of one.
        square: it is a squared distance.
    """

    terms: tuple[Term, ...]
    square: bool


def terms(body: Value, rows: int) -> tuple[Term, ...] | None:
    """`body`, which depends on d, as terms; None if it is no such sum, or one that loses digits."""
    found = _expand(body, rows)
    return None if found is None or len([t for t in found if t.column is not None]) > MOST else tuple(found)


def loop(v: Value, rows: int) -> Loop | None:
    """A "Loop" value as products of matrices; None where it stays a loop."""
    (body,), (size,) = v.args, v.params
    if size < LEAST or not _mixed(body):
        return None
    if body.op == "Square" and body.args[0].op == "Subtract":
        pair = _sides(body.args[0], rows)
        return None if pair is None else Loop((Term(1, None, *pair),), True)
    found = terms(body, rows)
    return None if found is None else Loop(found, False)


def product(*values: Value | None) -> Value | None:
    """The product of those that are not None."""
    there = [v for v in values if v is not None]
    return reduce(lambda a, b: _value("Mult", a, b), there) if there else None


def without_rows(v: Value, rows: int) -> tuple[Value | None, Value | None]:
    """`v` as a product of what belongs to a row (or to none), which a sum over j can do without, and of the rest."""
    own: list[Value] = []
    rest: list[Value] = []
    stack = [v]
    while stack:
        a = stack.pop()
        if not a.depth and not a.role & ROLE[1 - rows]:
            own.append(a)
        elif a.op == "Mult":
            stack += reversed(a.args)
        elif a.op == "Minus":
            own.append(Value("Const", (), (-1.0,), 0, False))
            stack.append(a.args[0])
        else:
            rest.append(a)
    return product(*own), product(*rest)


def _value(op: str, *args: Value) -> Value:
    role, depth = 0, False
    for a in args:
        role, depth = role | a.role, depth or a.depth
    return Value(op, args, (), role, depth)


def _mixed(v: Value) -> bool:
    return v.depth and v.role == 3


def _sides(v: Value, rows: int) -> tuple[Value, Value] | None:
    """Row and column side of a difference, without the first row of the tile where that is possible."""
    a, b = v.args
    if not (a.depth and b.depth) or {a.role | ROLE[rows], b.role} == {3} or 3 in (a.role, b.role):
        return None
    row, column = (b, a) if a.role & ROLE[1 - rows] else (a, b)
    if row.role != ROLE[rows] or column.role != ROLE[1 - rows]:
        return None
    if _at_one_row(row, rows):
        return _shifted(row, row), _shifted(column, row)
    return row, column


def _shifted(v: Value, centre: Value) -> Value:
    return Value("Shift", (v, centre), (), v.role, True)


def _at_one_row(v: Value, rows: int) -> bool:
    """Whether the value at one row can be computed from the arguments alone."""
    return v.op in ("Component", "Const") or (
        (v.depth or v.role == 0) and v.op not in ("Loop", "Index") and all(_at_one_row(a, rows) for a in v.args)
    )


def _expand(v: Value, rows: int) -> list[Term] | None:
    if not v.depth:
        return [Term(1, v, None, None)]
    if v.role != 3:
        return [Term(1, None, None, v) if v.role & ROLE[1 - rows] else Term(1, None, v, None)]
    if v.op == "Minus":
        return _scaled(_expand(v.args[0], rows), -1)
    if v.op in ("Add", "Subtract"):
        a, b = v.args
        if v.op == "Subtract" and (pair := _sides(v, rows)) is not None:
            sign = -1 if a.role & ROLE[1 - rows] else 1
            return [Term(sign, None, pair[0], None), Term(-sign, None, None, pair[1])]
        first, second = _expand(a, rows), _expand(b, rows)
        return None if first is None or second is None else first + (_scaled(second, -1 if v.op[0] == "S" else 1) or [])
    if v.op == "Divide" and not v.args[1].depth:
        return _times(_expand(v.args[0], rows), [Term(1, _value("Inv", v.args[1]), None, None)])
    if v.op in ("Mult", "Square"):
        return _times(*(_expand(a, rows) for a in (v.args * 2)[:2]))
    return None


def _scaled(found: list[Term] | None, sign: int) -> list[Term] | None:
    return None if found is None else [Term(sign * t.sign, t.factor, t.row, t.column) for t in found]


def _times(a: list[Term] | None, b: list[Term] | None) -> list[Term] | None:
    """The product; None where both are sums, which could lose the digits of both."""
    if a is None or b is None or (len(a) > 1 and len(b) > 1):
        return None
    return [
        Term(s.sign * t.sign, product(s.factor, t.factor), product(s.row, t.row), product(s.column, t.column))
        for s in a
        for t in b
    ]
