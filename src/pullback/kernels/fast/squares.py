"""Completing squares: u^T S v = -(u - v)^T S (u - v) / 2 + u^T S u / 2 + v^T S v / 2 for a symmetric S.

So |x|^2 + |y|^2 - 2 x.y is |x - y|^2, in whatever way it is spelled, and the exponential of x.y is a Gaussian of x - y
times functions of x and of y.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pullback.kernels.fast.polynomials import (
    UNIT,
    Monomial,
    Polynomial,
    constant,
    inverse,
    multiple,
    of_parameters,
    power,
    product,
    total,
)
from pullback.kernels.ir.expr import Expr, J

_LARGEST = 3  # size of a form that is not diagonal


@dataclass(frozen=True)
class Squares:
    """A polynomial as -sum_ab s_ab (u_a - v_a) (u_b - v_b) / 2 + rest.

    Args:
        pairs: (u_a, v_a), of i and of j.
        form: (a, b, s_ab) with a <= b, polynomials of parameters; those with a < b stand for two equal ones.
        rest: no product of i with j is left in it.
    """

    pairs: tuple[tuple[Polynomial, Polynomial], ...]
    form: tuple[tuple[int, int, Polynomial], ...]
    rest: Polynomial


_SIGNS = (constant(1.0), constant(-1.0))
Table = dict[tuple[int, int], Polynomial]


def parts(m: Monomial) -> tuple[Monomial, Monomial, Monomial]:
    """The factors of a monomial that are of parameters, of i, and of j."""
    own, others = of_parameters(m)
    of_j = frozenset(a for a in others if a[0].roles == 1 + J)
    return own, others - of_j, of_j


def complete(p: Polynomial, loose: bool) -> Squares | None:
    """The polynomial with squares completed; None if that cannot be done.

    Args:
        p: a polynomial of i, j and parameters.
        loose: u^T S u and v^T S v may be left over; otherwise terms of `p` must cancel them.
    """
    crossed: dict[tuple[Monomial, Monomial], Polynomial] = {}
    pure: Polynomial = {}
    for m, c in p.items():
        own, u, v = parts(m)
        if u and v:
            crossed.setdefault((u, v), {})[own] = c
        else:
            pure[m] = c
    us, vs = (list(dict.fromkeys(key[side] for key in crossed)) for side in (0, 1))
    if not us or len(us) != len(vs):
        return None
    blocks: list[tuple[list[Monomial], list[Monomial]]]
    blocks = [([u], [v]) for u, v in crossed] if len(crossed) == len(us) else []
    for division in [blocks, [(us, vs)]] if len(us) > 1 else [[(us, vs)]]:
        found = _completed(division, crossed, pure, loose) if division else None
        if found is not None:
            return found
    return None


def _completed(
    blocks: Sequence[tuple[list[Monomial], list[Monomial]]],
    crossed: dict[tuple[Monomial, Monomial], Polynomial],
    pure: Polynomial,
    loose: bool,
) -> Squares | None:
    pairs: list[tuple[Polynomial, Polynomial]] = []
    form: list[tuple[int, int, Polynomial]] = []
    for us, vs in blocks:
        best: tuple[int, Squares] | None = None
        for order, factors in _choices(us, vs, crossed, pure):
            found = _block(us, order, factors, crossed, pure)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
            if best is not None and best[0] == 0:
                break
        if best is None or (best[0] and not loose):
            return None
        form += [(a + len(pairs), b + len(pairs), s) for a, b, s in best[1].form]
        pairs += best[1].pairs
        pure = best[1].rest
    return Squares(tuple(pairs), tuple(form), pure)


def _choices(
    us: list[Monomial],
    vs: list[Monomial],
    crossed: dict[tuple[Monomial, Monomial], Polynomial],
    pure: Polynomial,
) -> Iterator[tuple[list[Monomial], list[Polynomial]]]:
    """Which v belongs to which u, and the factors of v: those that let u^2 cancel, and signs."""
    if len(us) > _LARGEST:
        return
    for order in itertools.permutations(vs):
        candidates = []
        for u, v in zip(us, order, strict=True):
            square = {own: c for own, c in _coefficient(pure, power(u, 2)).items()}
            c, over = crossed.get((u, v), {}), inverse(square)
            fits = [] if over is None or len(c) != 1 else [product(product(c, over), constant(-0.5))]
            sign = -1.0 if c and max(c.values(), key=abs) < 0 else 1.0  # a Gaussian, if parameters are positive
            candidates.append([*fits, *(f for f in (constant(sign), constant(-sign)) if f not in fits)])  # likely first
        for factors in itertools.product(*candidates):
            yield list(order), list(factors)


def _coefficient(p: Polynomial, m: Monomial) -> Polynomial:
    """The polynomial of parameters that stands before a monomial."""
    return {own: c for n, c in p.items() for own, others in [of_parameters(n)] if others == m}


def _block(
    us: list[Monomial],
    vs: list[Monomial],
    factors: list[Polynomial],
    crossed: dict[tuple[Monomial, Monomial], Polynomial],
    pure: Polynomial,
) -> tuple[int, Squares] | None:
    """(a measure of the squares that are left over, the result) if the form is symmetric."""
    n = len(us)
    s: Table = {}
    for a, b in itertools.product(range(n), repeat=2):
        over = inverse(factors[b])
        assert over is not None
        s[a, b] = product(crossed.get((us[a], vs[b]), {}), over)
    if any(total([s[a, b], product(s[b, a], constant(-1.0))]) for a in range(n) for b in range(a)):
        return None
    pairs = [({u: 1.0}, product(f, {v: 1.0})) for u, v, f in zip(us, vs, factors, strict=True)]
    added = [
        product(product(s[a, b], constant(0.5)), product(pairs[a][side], pairs[b][side]))
        for a, b in s
        for side in (0, 1)
    ]
    rest = total([pure, *added])
    squares = {multiple(m[a], m[b]) for m in (us, vs) for a, b in s} - {UNIT}
    left = len(squares & {of_parameters(m)[1] for m in rest})
    if left and any(f not in _SIGNS for f in factors):  # where something is left over, u - v is as good as u - f v
        left += len(squares)
    form = tuple((a, b, s[a, b]) for a, b in s if a <= b and s[a, b])
    return left, Squares(tuple(pairs), form, rest)


def differences(p: Polynomial, coordinates: Sequence[tuple[Expr, Expr, float, Expr]]) -> Polynomial:
    """The polynomial with m u - m f v written as m z, as often as that can be.

    Args:
        p: a polynomial of i, j and parameters.
        coordinates: (u, v, f, z) where z stands for u - f v.
    """
    found = dict(p)
    for u, v, f, z in coordinates:
        waiting = list(found)
        while waiting:
            m = waiting.pop()
            if m not in found or dict(m).get(u, 0) < 1:
                continue
            without = multiple(m, frozenset([(u, -1)]))
            n, new = (multiple(without, frozenset([(atom, 1)])) for atom in (v, z))
            c = found[m]
            if c * f * found.get(n, 0.0) < 0:
                found = total([found, {m: -c}, {n: f * c}, {new: c}])
                waiting += found
    return found
