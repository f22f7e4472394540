"""Expressions of i, of j and of parameters as polynomials, so that equal ones are equal however they are spelled.

A monomial is a product of powers of atoms, negative powers too; atoms are components of variables and whatever else is
no sum or product. Coefficients are numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pullback.kernels.ir.expr import Expr, builders, const, walk
from pullback.kernels.ir.structure import STRUCTURES

Monomial = frozenset[tuple[Expr, int]]
Polynomial = dict[Monomial, float]

UNIT: Monomial = frozenset()
_MOST = 64  # monomials of a polynomial; what has more is an atom
_ROUNDING = 1e-14  # relative to the largest term of a sum; what is left below it has cancelled


def constant(value: float) -> Polynomial:
    """A number."""
    return {UNIT: value}


def multiple(m: Monomial, n: Monomial) -> Monomial:
    """The product of two monomials."""
    powers = dict(m)
    for atom, power in n:
        powers[atom] = powers.get(atom, 0) + power
    return frozenset((atom, power) for atom, power in powers.items() if power)


def power(m: Monomial, n: int) -> Monomial:
    """A monomial to an integer power."""
    return frozenset((atom, n * k) for atom, k in m) if n else UNIT


def total(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Their sum; terms that cancel are gone."""
    found: dict[Monomial, float] = {}
    largest: dict[Monomial, float] = {}
    for p in polynomials:
        for m, c in p.items():
            found[m] = found.get(m, 0.0) + c
            largest[m] = max(largest.get(m, 0.0), abs(c))
    return {m: c for m, c in found.items() if not abs(c) <= _ROUNDING * largest[m]}


def product(p: Polynomial, q: Polynomial) -> Polynomial:
    """Their product."""
    return total({multiple(m, n): c * d} for m, c in p.items() for n, d in q.items())


def inverse(p: Polynomial) -> Polynomial | None:
    """1 / p if p is a single term."""
    if len(p) != 1:
        return None
    ((m, c),) = p.items()
    return {power(m, -1): 1 / c} if c else None


def of_parameters(m: Monomial) -> tuple[Monomial, Monomial]:
    """(its atoms that are parameters, the others)."""
    own = frozenset(a for a in m if a[0].roles == 0)
    return own, m - own


def content(p: Polynomial, q: Polynomial) -> Polynomial:
    """The first coefficient of `p`, times the lowest power of each parameter in terms of both."""
    powers: list[dict[Expr, int]] = [dict(of_parameters(m)[0]) for m in (*p, *q)]
    lowest = {a: min(own.get(a, 0) for own in powers) for own in powers for a in own}
    return {frozenset((a, k) for a, k in lowest.items() if k): p[min(p, key=_text)] if p else 1.0}


# Expressions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scalar:
    """A number as it was written, and as a polynomial."""

    expr: Expr
    value: Polynomial


@lru_cache(maxsize=2048)
def _read(e: Expr) -> tuple[_Scalar, ...]:
    done: dict[Expr, list[_Scalar]] = {}
    for node in walk(e):
        parts = [done[a] for a in node.args]
        if node.op == "Const":
            done[node] = [_arithmetic("Const", v) for v in node.params]
        elif node.op in STRUCTURES:
            done[node] = STRUCTURES[node.op].lower(_arithmetic, parts, node.params)
        elif not parts:
            whole = [node] if node.dim == 1 else [builders["Gather"](node, (k,)) for k in range(node.dim)]
            done[node] = [_Scalar(part, {frozenset([(part, 1)]): 1.0}) for part in whole]
        else:
            done[node] = [
                _arithmetic(node.op, *(p[0] if len(p) == 1 else p[k] for p in parts), *node.params)
                for k in range(node.dim)
            ]
    return tuple(done[e])


def polynomial(e: Expr) -> Polynomial:
    """A scalar expression as a polynomial; not to be changed."""
    (scalar,) = _read(e)
    return scalar.value


def is_atom(e: Expr) -> bool:
    """Whether a scalar expression is one atom."""
    return polynomial(e) == {frozenset([(e, 1)]): 1.0}


def _arithmetic(op: str, *operands: Any) -> _Scalar:
    if op == "Const":
        return _Scalar(const(operands[0]), constant(float(operands[0])) if operands[0] else {})
    args = [a for a in operands if isinstance(a, _Scalar)]
    params = operands[len(args) :]
    expr = builders[op](*(a.expr for a in args), *params)
    value = _value(op, [a.value for a in args], params)
    if value is None or len(value) > _MOST:
        value = {frozenset([(expr, 1)]): 1.0}
    return _Scalar(expr, value)


def _value(op: str, args: list[Polynomial], params: tuple[Any, ...]) -> Polynomial | None:
    """The polynomial of an operation; None if it is none."""
    if op in ("Add", "Subtract"):
        x, y = args
        return total([x, y if op == "Add" else product(y, constant(-1.0))])
    if op == "Minus":
        return product(args[0], constant(-1.0))
    if op in ("Mult", "Square"):
        x, y = args[0], args[-1]
        return product(x, y) if len(x) * len(y) <= _MOST else None
    if op in ("Divide", "Inv"):
        below = inverse(args[-1])
        return below if below is None or op == "Inv" else product(args[0], below)
    if op == "Pow" and len(args[0]) == 1:
        ((m, c),) = args[0].items()
        return {power(m, params[0]): c ** params[0]} if abs(params[0]) <= 8 and 1e-30 < abs(c) < 1e30 else None
    return None


@lru_cache(maxsize=4096)
def _text(m: Monomial) -> tuple[str, ...]:
    """What monomials are sorted by."""
    return tuple(sorted(f"{atom}^{k}" for atom, k in m))


def expression(p: Polynomial) -> Expr:
    """The polynomial written out."""
    found: Expr | None = None
    for m in sorted(p, key=_text):
        term = _written(m, p[m])
        found = term if found is None else found + term
    return const(0.0) if found is None else found


def _written(m: Monomial, c: float) -> Expr:
    above, below = (
        [_powered(a, k * sign) for a, k in sorted(m, key=lambda f: str(f[0])) if k * sign > 0] for sign in (1, -1)
    )
    e = _multiplied(above)
    if below:
        bottom = _multiplied(below)
        assert bottom is not None
        e = (const(1.0) if e is None else e) / bottom
    return const(c) if e is None else e if c == 1 else -e if c == -1 else const(c) * e


def _powered(atom: Expr, k: int) -> Expr:
    return atom if k == 1 else builders["Square"](atom) if k == 2 else builders["Pow"](atom, k)


def _multiplied(factors: list[Expr]) -> Expr | None:
    found: Expr | None = None
    for f in factors:
        found = f if found is None else found * f
    return found
