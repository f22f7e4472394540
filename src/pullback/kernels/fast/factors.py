"""Sums, products and inverses of scalar expressions, without factors of 1 and with exponentials taken together."""

from __future__ import annotations

from collections.abc import Sequence

from pullback.kernels.fast.polynomials import expression, polynomial, total
from pullback.kernels.ir.expr import Expr, builders, const, is_const


def added(parts: Sequence[Expr | None]) -> Expr:
    """Their sum; None is 1, and no parts are 0."""
    found: Expr | None = None
    for p in parts:
        p = const(1.0) if p is None else p
        found = p if found is None else found + p
    return const(0.0) if found is None else found


def times(a: Expr | None, b: Expr | None) -> Expr | None:
    """The product of two factors, None being 1."""
    if a is None or b is None:
        return b if a is None else a
    if is_const(a, 1.0) or is_const(b, 1.0):
        return b if is_const(a, 1.0) else a
    parts = [*_factors(a), *_factors(b)]
    powers = [f for f in parts if f.op == "Exp"]
    if len(powers) < 2:
        return a * b
    return _together(powers, [f for f in parts if f.op != "Exp"])


def _factors(e: Expr) -> list[Expr]:
    return [f for a in e.args for f in _factors(a)] if e.op == "Mult" else [e]


def _together(powers: Sequence[Expr], others: Sequence[Expr]) -> Expr:
    """A product with exponentials, as one exponential of a sum in which terms may cancel."""
    parts = [f.args[0] for f in powers]
    polys = [polynomial(p) for p in parts]
    exponent = total(polys)
    kept = len(exponent) == sum(map(len, polys))
    found = builders["Exp"](added(parts) if kept else expression(exponent)) if exponent else const(1.0)
    for f in others:
        found = f if is_const(found, 1.0) else f * found
    return found


def inverse(e: Expr) -> Expr:
    """1 / e, without overflow where `e` is an exponential."""
    return builders["Exp"](negated(e.args[0])) if e.op == "Exp" else 1 / e


def negated(e: Expr) -> Expr:
    """-e."""
    return e.args[0] if e.op == "Minus" else -e
