"""The second table: one row a reduction that kernels know, with its derivative; and Program, what the engine runs.

A Program reduces one formula (or several that share a pass, for gradients) over the pairs (i, j). Its derivative is
again a Program, so derivatives of every order run on the same engine. What users call Mean, Var, Min ... is composed of
these rows in `kernels/reduce.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from pullback.kernels.ir import grad
from pullback.kernels.ir import macros as macros  # derivatives of Max and Min use them
from pullback.kernels.ir.expr import PARAMETER, Expr, I, J, builders, const, variable, variables, zero
from pullback.kernels.ir.rules import shortened

OVER_I, OVER_J, OVER_BOTH = 0, 1, 2  # axis: what is summed over; the rest numbers the rows of the result
KEPT = (J, I, PARAMETER)  # axis -> category of the result


@dataclass(frozen=True)
class Program:
    """out = reduction over pairs of `exprs`; frozen and hashable, independent of sizes, dtypes and devices.

    Args:
        kind: row of REDUCTIONS.
        exprs: Sum: one expression for each axis in `axes`; the others: the formula and, if any, its weight.
        axes: OVER_I, OVER_J or OVER_BOTH for each result.
        signature: (dimension, category) of each argument, by position.
        k: how many the K-reductions keep.
        accumulator: "auto", "float32" or "float64": dtype of sums. "auto" sums blocks in the dtype of the data (at
            least float32) and adds the blocks in float64.
        scheme: "block_sum", "direct_sum" or "kahan_scheme".
    """

    kind: str
    exprs: tuple[Expr, ...]
    axes: tuple[int, ...]
    signature: tuple[tuple[int, int], ...]
    k: int = 1
    accumulator: str = "auto"
    scheme: str = "block_sum"
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        parts = (self.kind, self.exprs, self.axes, self.signature, self.k, self.accumulator, self.scheme)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Columns of each result."""
        return REDUCTIONS[self.kind].widths(self)

    @cached_property
    def n(self) -> int:
        """Number of arguments."""
        return len(self.signature)

    def __str__(self) -> str:
        formulas = "; ".join(f"{e} over {['i', 'j', 'ij'][a]}" for e, a in zip(self.exprs, self.axes, strict=False))
        return f"{self.kind}({formulas}{f'; K={self.k}' if self.k > 1 else ''})"


@dataclass(frozen=True)
class Reduction:
    """One row.

    Args:
        widths: program -> columns of each result.
        cotangent: (program, e, out, extra variables) -> {expr: cotangent}; None: no derivative.
        tangent: (program, tangents of exprs, out, extra) -> expressions to be summed.
        extras: further programs whose results the derivative reads.
        integer: the result is an index (int64).
    """

    widths: Callable[[Program], tuple[int, ...]]
    cotangent: Callable[[Program, Sequence[Expr], Expr, Sequence[Expr]], dict[Expr, Expr]] | None = None
    tangent: Callable[[Program, Sequence[Expr | None], Expr, Sequence[Expr]], Sequence[Expr | None]] | None = None
    extras: Callable[[Program], tuple[Program, ...]] = lambda program: ()
    integer: bool = False


def _columns(e: Expr, start: int, stop: int) -> Expr:
    return builders["Gather"](e, tuple(range(start, stop)))


def _softmax_weight(f: Expr, lse: Expr) -> Expr:
    """exp(f - lse), where an empty or all -inf row (lse = -inf) counts as lse = 0."""
    safe = builders["Where"](builders["Equal"](lse, float("-inf")), 0.0, lse)
    return builders["Exp"](f - safe)


def _plus(a: Expr | None, b: Expr | None) -> Expr | None:
    return b if a is None else a if b is None else a + b


def _lse_cotangent(p: Program, e: Sequence[Expr], out: Expr, extra: Sequence[Expr]) -> dict[Expr, Expr]:
    w = _softmax_weight(p.exprs[0], out)
    if len(p.exprs) == 1:
        return {p.exprs[0]: e[0] * w}
    g = p.exprs[1]
    return _merged([(p.exprs[0], builders["Sum"](e[0] * g * w)), (g, e[0] * w)])


def _lse_tangent(p: Program, t: Sequence[Expr | None], out: Expr, extra: Sequence[Expr]) -> list[Expr | None]:
    w = _softmax_weight(p.exprs[0], out)
    df = None if t[0] is None else (w * t[0] if len(p.exprs) == 1 else w * (p.exprs[1] * t[0]))
    return [_plus(df, None if len(t) == 1 or t[1] is None else w * t[1])]


def _softmax_cotangent(p: Program, e: Sequence[Expr], out: Expr, extra: Sequence[Expr]) -> dict[Expr, Expr]:
    f, g = p.exprs
    e_lse, e_mean = _columns(e[0], 0, 1), _columns(e[0], 1, 1 + g.dim)
    w = _softmax_weight(f, _columns(out, 0, 1))
    return _merged([(f, w * (e_lse + builders["Sum"](e_mean * (g - _columns(out, 1, 1 + g.dim))))), (g, e_mean * w)])


def _softmax_tangent(p: Program, t: Sequence[Expr | None], out: Expr, extra: Sequence[Expr]) -> list[Expr | None]:
    f, g = p.exprs
    w = _softmax_weight(f, _columns(out, 0, 1))
    df, dg = t
    lse = zero(1) if df is None else w * df
    mean = _plus(None if df is None else w * (df * (g - _columns(out, 1, 1 + g.dim))), None if dg is None else w * dg)
    return [builders["Concat"](lse, zero(g.dim) if mean is None else mean)]


def _merged(pairs: Sequence[tuple[Expr, Expr]]) -> dict[Expr, Expr]:
    """Formula and weight may be the same expression: their cotangents add."""
    total: dict[Expr, Expr] = {}
    for root, e in pairs:
        total[root] = total[root] + e if root in total else e
    return total


def _others(p: Program, out: Expr, extra: Sequence[Expr]) -> Expr:
    """The product of all factors but F_ij, also where one vanishes: extra = (number of zeros, product of the rest).

    Its own derivative is right with at most one zero in a row; with more it is infinite or nan, so that nobody mistakes
    it for a number.
    """
    f, (zeros, rest) = p.exprs[0], extra
    is_zero = builders["Equal"](f, 0.0)
    many = builders["LogicalAnd"](is_zero, builders["LessThan"](1.0, zeros))
    lost = builders["XLogX"](builders["Where"](many, f, 1.0))  # 0, with an infinite slope where there are many zeros
    return builders["Where"](
        is_zero,
        builders["Where"](builders["Equal"](zeros, 1.0), rest, lost),
        out / builders["Where"](is_zero, 1.0, f),
    )


def _prod_extras(p: Program) -> tuple[Program, ...]:
    is_zero = builders["Equal"](p.exprs[0], 0.0)
    rest = builders["Where"](is_zero, 1.0, p.exprs[0])
    return replace(p, kind="Sum", exprs=(is_zero,)), replace(p, exprs=(rest,))


REDUCTIONS: dict[str, Reduction] = {
    # sum_j F_ij
    "Sum": Reduction(
        lambda p: tuple(e.dim for e in p.exprs),
        lambda p, e, out, extra: _merged(list(zip(p.exprs, e, strict=True))),
        lambda p, t, out, extra: t,
    ),
    # log sum_j exp(F_ij) G_ij, F a scalar, G = 1 if left out; computed as m + log sum_j exp(F_ij - m) G_ij
    "LogSumExp": Reduction(lambda p: (p.exprs[-1].dim if len(p.exprs) > 1 else 1,), _lse_cotangent, _lse_tangent),
    # (l, sum_j exp(F_ij - l) G_ij) with l = log sum_j exp(F_ij)
    "SoftMax": Reduction(lambda p: (1 + p.exprs[1].dim,), _softmax_cotangent, _softmax_tangent),
    # prod_j F_ij, component by component
    "Prod": Reduction(
        lambda p: (p.exprs[0].dim,),
        lambda p, e, out, extra: {p.exprs[0]: e[0] * _others(p, out, extra)},
        lambda p, t, out, extra: [None if t[0] is None else _others(p, out, extra) * t[0]],
        _prod_extras,
    ),
    # the indices of the K smallest (largest) F_ij, by increasing (decreasing) F, the first index first in ties;
    # -1 where there are fewer than K. Columns: K x dim, the K-th index of component d at k * dim + d.
    "ArgKMin": Reduction(lambda p: (p.k * p.exprs[0].dim,), integer=True),
    "ArgKMax": Reduction(lambda p: (p.k * p.exprs[0].dim,), integer=True),
}


@lru_cache(maxsize=4096)
def pullback(p: Program, wanted: tuple[int, ...]) -> tuple[Program | None, tuple[tuple[int, ...], ...]]:
    """The program of all gradients in the arguments numbered `wanted`, in one pass over the pairs.

    Its arguments are those of `p`, then the cotangent of each result, then `p`'s result, then the extras. Returns it
    and, for each of its results, the arguments whose gradients stand side by side in its columns.
    """
    e, out, extra, signature = _appended(p, [(w, KEPT[a]) for w, a in zip(p.widths, p.axes, strict=True)])
    row = REDUCTIONS[p.kind]
    assert row.cotangent is not None, f"{p.kind} has no derivative; please report"
    args = variables(*p.exprs)
    present = [i for i in wanted if i in args]
    grads = dict(zip(present, grad.pullback(row.cotangent(p, e, out, extra), [args[i] for i in present]), strict=True))
    exprs, axes, layout = [], [], []
    for axis, category in ((OVER_J, I), (OVER_I, J), (OVER_BOTH, PARAMETER)):
        members = [i for i in present if p.signature[i][1] == category and grads[i] is not None]
        if members:
            parts = [g for i in members if (g := grads[i]) is not None]
            exprs.append(parts[0] if len(parts) == 1 else builders["Concat"](*parts))
            axes.append(axis)
            layout.append(tuple(members))
    if not exprs:
        return None, ()
    return _sums(p, exprs, axes, signature), tuple(layout)


@lru_cache(maxsize=4096)
def pushforward(p: Program, moving: tuple[int, ...]) -> Program | None:
    """The program of the tangent when the arguments numbered `moving` move.

    Its arguments are those of `p`, then a tangent for each moving one, then `p`'s result, then the extras.
    """
    t, out, extra, signature = _appended(p, [p.signature[i] for i in moving])
    row = REDUCTIONS[p.kind]
    assert row.tangent is not None, f"{p.kind} has no derivative; please report"
    args = variables(*p.exprs)
    tangents = grad.pushforward(p.exprs, {args[i]: u for i, u in zip(moving, t, strict=True) if i in args})
    if all(u is None for u in tangents):
        return None
    sums = row.tangent(p, tangents, out, extra)
    return _sums(p, [zero(w) if s is None else s for s, w in zip(sums, p.widths, strict=True)], list(p.axes), signature)


def _appended(p: Program, new: list[tuple[int, int]]) -> tuple[list[Expr], Expr, list[Expr], tuple[Any, ...]]:
    """Variables after the arguments of `p`: the new ones, the result, the extras; and the longer signature."""
    category = KEPT[p.axes[0]]
    out = [] if p.kind == "Sum" else [(p.widths[0], category)]
    extra = [(q.widths[0], category) for q in REDUCTIONS[p.kind].extras(p)]
    signature = (*p.signature, *new, *out, *extra)
    made = [variable(p.n + k, dim, cat) for k, (dim, cat) in enumerate((*new, *out, *extra))]
    result = made[len(new)] if out else const(0.0)  # sums are linear: their derivative does not read them
    return made[: len(new)], result, made[len(new) + len(out) :], signature


def _sums(p: Program, exprs: Sequence[Expr], axes: Sequence[int], signature: tuple[Any, ...]) -> Program:
    return Program("Sum", tuple(map(shortened, exprs)), tuple(axes), signature, 1, p.accumulator, p.scheme)
