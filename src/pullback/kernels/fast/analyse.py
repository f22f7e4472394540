"""Which sums are fast: F_ij = sum_t A_t(i) K_t(u_i - v_j) B_t(j), read from the expression graph.

The graph is walked once with every number written as a sum of terms; arithmetic on such sums decides what becomes a
factor of i, of j, or of the difference. A difference u_i - v_j enters as one coordinate; up to three may differ. What
mixes i and j in another way is refused with the operation that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pullback.kernels.fast.polynomials as polynomials
import pullback.kernels.fast.squares as squares
from pullback.core.errors import PullbackError
from pullback.kernels.fast.factors import added, inverse, negated, times
from pullback.kernels.fast.polynomials import Monomial, Polynomial
from pullback.kernels.ir.expr import Expr, I, J, builders, const, variable, walk
from pullback.kernels.ir.reductions import Program
from pullback.kernels.ir.structure import STRUCTURES

DIMENSIONS = 3  # coordinates that differences may have
_SEEN = 16  # coordinates after which reading ends
TERMS = 64  # terms of one component; more are slower than they help
_LEFT, _RIGHT = 1, 2


class Refused(PullbackError):
    """The formula is not of this kind; the text says why."""


@dataclass(frozen=True)
class Term:
    """a(i) k(u_i - v_j) b(j); None is 1. Parameters may stand in any factor."""

    a: Expr | None = None
    k: Expr | None = None
    b: Expr | None = None


@dataclass(frozen=True)
class Form:
    """A Program as sums of terms.

    Args:
        coordinates: (u, v) for each coordinate of the difference u_i - v_j: scalar expressions of i and of j.
        components: for each expression of the program, the terms of each of its components. In kernels, variable
            number n + d is coordinate d of the difference, n being the number of arguments.
    """

    program: Program
    coordinates: tuple[tuple[Expr, Expr], ...]
    components: tuple[tuple[tuple[Term, ...], ...], ...]


@lru_cache(maxsize=1024)
def analyse(program: Program) -> Form:
    """The program as sums of products.

    Raises: Refused with the reason.
    """
    if program.kind != "Sum":
        raise Refused(f"{program.kind} is not a sum")
    if any(node.op == "Index" for node in walk(*program.exprs)):
        raise Refused("the formula holds the numbers of rows or columns, which are sorted on the way")
    form, doubtful = _formed(program, False)
    if doubtful:
        other, _ = _formed(program, True)
        form = other if 0 < len(other.coordinates) < len(form.coordinates) else form
    n = len(form.coordinates)
    if not any(t.k is not None for parts in form.components for terms in parts for t in terms):
        raise Refused("the formula has no function of a difference u_i - v_j")
    if n > DIMENSIONS:
        raise Refused(f"the differences have {n} coordinates; fast sums know {DIMENSIONS}")
    return form


def _formed(program: Program, apart: bool) -> tuple[Form, bool]:
    """The program in the form above, and whether `apart` makes a difference."""
    first = _Reader(program, frozenset(), apart)
    for e in program.exprs:
        first.read(e)
    reader = _Reader(program, frozenset(first.coordinates), apart)
    components = tuple(tuple(reader.settled(c) for c in reader.read(e)) for e in program.exprs)
    return Form(program, reader.pairs, components), reader.doubtful


@lru_cache(maxsize=1024)
def split(program: Program) -> tuple[Form, Expr | None, Expr | None]:
    """The first formula of a program as k(u_i - v_j) + a_i + b_j: a Form of k alone, then a and b (None is zero).

    Raises: Refused if it is not such a sum.
    """
    f = program.exprs[0]
    first = _Reader(program, frozenset())
    first.read(f)
    reader = _Reader(program, frozenset(first.coordinates))
    (sums,) = reader.read(f)
    sums = reader.squared(sums, loose=True)
    of_pairs = tuple(t for t in sums if t.k is not None)
    of_i = tuple(t for t in sums if t.k is None and t.b is None)
    of_j = tuple(t for t in sums if t.k is None and t.b is not None)
    k, a, b = reader.kernel(of_pairs), reader.left(of_i), reader.right(of_j)
    if not of_pairs or k is None or a is None or b is None or len(reader.coordinates) > DIMENSIONS:
        raise Refused("the exponent is not a function of a difference plus functions of i and of j")
    form = Form(program, reader.pairs, (((Term(k=k),),),))
    return form, a if of_i else None, b if of_j else None


Sums = tuple[Term, ...]
Key = tuple[frozenset[tuple[Monomial, float]], ...]  # of a coordinate: u and v as polynomials
_ONE = polynomials.constant(1.0)


class _Reader:
    """Reads expressions as sums of terms.

    Args:
        program: what is read.
        known: coordinates found before.
        apart: the exponential of f_i + g_j is a product, not a function of a difference.

    A difference inside another function is a coordinate. As a factor it becomes that coordinate if it is one: x b - y b
    would cancel. Other differences are multiplied out. So the graph is read twice, the second time with `known`
    coordinates.
    """

    def __init__(self, program: Program, known: frozenset[Key], apart: bool = False) -> None:
        self.program, self.known, self.apart = program, known, apart
        self.doubtful = False  # whether there was such an exponential
        self.coordinates: dict[Key, tuple[Expr, Expr, Expr]] = {}  # key -> u, v and the variable
        self.done: dict[Expr, list[Sums]] = {}

    @property
    def pairs(self) -> tuple[tuple[Expr, Expr], ...]:
        """(u, v) of each coordinate."""
        return tuple((u, v) for u, v, _ in self.coordinates.values())

    def read(self, e: Expr) -> list[Sums]:
        for node in walk(e):
            if node not in self.done:
                self.done[node] = self._components(node)
        return self.done[e]

    def _components(self, e: Expr) -> list[Sums]:
        if e.roles != 3:
            parts = [e] if e.dim == 1 else [builders["Gather"](e, (k,)) for k in range(e.dim)]
            return [self._pure(p) for p in parts]
        parts_of = [self.done[a] for a in e.args]
        if e.op in STRUCTURES:
            return STRUCTURES[e.op].lower(self.arithmetic, parts_of, e.params)
        return [
            self.arithmetic(e.op, *(p[0] if len(p) == 1 else p[k] for p in parts_of), *e.params) for k in range(e.dim)
        ]

    @staticmethod
    def _pure(e: Expr) -> Sums:
        return (Term(b=e),) if e.roles == _RIGHT else (Term(a=e),)

    def settled(self, sums: Sums) -> Sums:
        """The terms of a finished component, those that differ in the kernel only made one."""
        groups: dict[tuple[Expr | None, Expr | None], list[Term]] = {}
        for t in self._gathered(self._joined(sums)):
            of_parameters = t.a is not None and t.a.roles == 0 and t.k is not None
            t = Term(None, times(t.a, t.k), t.b) if of_parameters else t
            groups.setdefault((t.a, t.b), []).append(t)
        found: list[Term] = []
        for (a, b), terms in groups.items():
            kernels = [t.k for t in terms if t.k is not None]
            found += [t for t in terms if t.k is None]
            found += [Term(a, added(kernels), b)] if kernels else []
        return tuple(found)

    def _gathered(self, sums: Sequence[Term]) -> Sequence[Term]:
        """The terms with x_i k b_j - k y_j b_j made k (x_i - y_j) b_j where that leaves fewer of them."""
        known = []
        for (p, q), (u, _, z) in self.coordinates.items():
            if len(p) == len(q) == 1 and polynomials.is_atom(u):
                ((m, _),), ((n, f),) = p, q
                known += [(u, w, f, z) for w, k in n if len(n) == 1 and k == 1]
        kernels = dict.fromkeys(t.k for t in sums if t.k is not None)
        found = list(sums)
        for k in kernels:
            terms = [t for t in found if t.k is k]
            if len(terms) < 2:
                continue
            whole = squares.differences(polynomials.total(map(_product, terms)), known)
            groups: dict[tuple[Monomial, Monomial], list[Polynomial]] = {}
            zs = [z for *_, z in known]
            for m, c in whole.items():
                own, of_i, of_j = squares.parts(frozenset(f for f in m if f[0] not in zs))
                factor = polynomials.multiple(own, frozenset(f for f in m if f[0] in zs))
                groups.setdefault((of_i, of_j), []).append({factor: c})
            if len(groups) < len(terms):
                found = [t for t in found if t.k is not k]
                for (of_i, of_j), factors in groups.items():
                    a, b = (polynomials.expression({m: 1.0}) if m else None for m in (of_i, of_j))
                    found.append(Term(a, times(polynomials.expression(polynomials.total(factors)), k), b))
        return found

    # Arithmetic of sums ----------------------------------------------------------------------------------------------

    def arithmetic(self, op: str, *operands: Any) -> Sums:
        if op == "Const":
            return self._pure(const(operands[0]))
        args = [a for a in operands if isinstance(a, tuple) and (not a or isinstance(a[0], Term))]
        params = operands[len(args) :]
        rule = _RULES.get(op)
        found = None if rule is None else rule(self, *args, *params)
        return self._function(op, args, params) if found is None else found

    def _function(self, op: str, args: Sequence[Sums], params: Sequence[Any]) -> Sums:
        """Any operation on numbers that all depend on i only, on j only, or on differences only."""
        for collapse, slot in ((self.left, "a"), (self.right, "b"), (self.kernel, "k")):
            parts = [collapse(a) for a in args]
            if all(p is not None for p in parts):
                return (Term(**{slot: builders[op](*parts, *params)}),)
        raise Refused(f"{op} mixes i and j other than through a difference u_i - v_j")

    @staticmethod
    def left(sums: Sums) -> Expr | None:
        """The sum as one expression of i and parameters, or None."""
        return added([t.a for t in sums]) if all(t.k is None and t.b is None for t in sums) else None

    @staticmethod
    def right(sums: Sums) -> Expr | None:
        """The sum as one expression of j and parameters, or None."""
        fits = all(t.k is None and (t.a is None or t.a.roles == 0) for t in sums)
        return added([times(t.a, t.b) for t in sums]) if fits else None

    def kernel(self, sums: Sums) -> Expr | None:
        """The sum as one expression of differences and parameters, or None."""
        before = dict(self.coordinates)
        joined = self._joined(sums, new=True)
        if any((t.b is not None and t.b.roles) or (t.a is not None and t.a.roles) for t in joined):
            self.coordinates = before
            return None
        return added([times(times(t.a, t.k), t.b) for t in joined])

    def _joined(self, sums: Sums, new: bool = False) -> Sums:
        """Squares completed, and terms of i alone and of j alone made one coordinate; a known one unless `new`."""
        sums = self.squared(sums, new=new)
        of_i = [t for t in sums if t.k is None and t.b is None and t.a is not None and t.a.roles == _LEFT]
        of_j = [t for t in sums if t.k is None and t.b is not None and (t.a is None or t.a.roles == 0)]
        if not of_i or not of_j:
            return sums
        shift = [t for t in sums if t.k is None and t.b is None and t not in of_i]
        rest = tuple(t for t in sums if t not in of_i and t not in of_j and t not in shift)
        v = self.right(tuple(of_j))
        assert v is not None
        for parameters, may in (((), False), (shift, new)):  # x - y + 1 is a coordinate, unless x - y is one
            u = self.left((*of_i, *parameters))
            assert u is not None
            z = self._coordinate(u, negated(v), may)
            if z is not None:
                return (Term(k=z), *rest, *(() if parameters else shift))
        return sums

    def _coordinate(self, u: Expr, v: Expr, new: bool) -> Expr | None:
        """The difference u - v as a coordinate, a factor of parameters taken out so that x and s x share one."""
        p, q = polynomials.polynomial(u), polynomials.polynomial(v)
        shift = {m: -c for m, c in q.items() if not polynomials.of_parameters(m)[1]}
        if shift:  # (x + w) - (y + w) is x - y
            u, v = (e + polynomials.expression(shift) for e in (u, v))
            p, q = (polynomials.total([e, shift]) for e in (p, q))
        factor = polynomials.content(p, q)
        over = polynomials.inverse(factor)
        assert over is not None
        key = tuple(frozenset(polynomials.product(e, over).items()) for e in (p, q))
        if key not in self.coordinates:
            if not new and key not in self.known:
                return None
            if len(self.coordinates) == _SEEN:
                raise Refused(f"the differences have more than {_SEEN} coordinates; fast sums know {DIMENSIONS}")
            z = variable(self.program.n + len(self.coordinates), 1, I)
            self.coordinates[key] = (_simple(u, p, over), _simple(v, q, over), z)
        z = self.coordinates[key][2]
        return z if factor == _ONE else polynomials.expression(factor) * z

    def squared(self, sums: Sums, loose: bool = False, new: bool = True) -> Sums:
        """The terms with squares completed, so that no product of i with j is left; as they are if that cannot be.

        Args:
            sums: terms.
            loose: functions of i and of j may be left over.
            new: coordinates need not be known.
        """
        if not any(t.k is None and _mixes(t) for t in sums) or len(sums) > TERMS:
            return sums
        plain = polynomials.total(_product(t) for t in sums if t.k is None)
        found = squares.complete(plain, loose)
        if found is None:
            return sums
        zs = [self._coordinate(polynomials.expression(u), polynomials.expression(v), new) for u, v in found.pairs]
        if None in zs:
            return sums
        terms: list[Expr] = []
        for a, b, s in found.form:
            z, w, half = zs[a], zs[b], polynomials.product(s, polynomials.constant(-0.5 if a == b else -1.0))
            assert z is not None and w is not None
            terms.append(polynomials.expression(half) * (builders["Square"](z) if z is w else z * w))
        rest = self._pieces(found.rest)
        return (Term(k=added(terms)), *rest, *(t for t in sums if t.k is not None))

    def _pieces(self, p: Polynomial) -> Sums:
        """A polynomial without products of i and j as a term of i and one of j."""
        of_j = {m: c for m, c in p.items() if squares.parts(m)[2]}
        of_i = {m: c for m, c in p.items() if m not in of_j}
        return tuple(self._pure(polynomials.expression(e))[0] for e in (of_i, of_j) if e)

    def product(self, x: Sums, y: Sums) -> Sums:
        x, y = self._joined(x), self._joined(y)
        if len(x) * len(y) > TERMS:
            raise Refused(f"the formula has more than {TERMS} terms")
        return _merged([Term(times(s.a, t.a), times(s.k, t.k), times(s.b, t.b)) for s in x for t in y])

    def quotient(self, x: Sums, y: Sums) -> Sums | None:
        if len(y) == 1:
            return self.product(x, (Term(*(None if e is None else inverse(e) for e in (y[0].a, y[0].k, y[0].b))),))
        for collapse, slot in ((self.left, "a"), (self.right, "b"), (self.kernel, "k")):
            q = collapse(y)
            if q is not None:
                return self.product(x, (Term(**{slot: 1 / q}),))
        return None

    def exponential(self, x: Sums) -> Sums | None:
        """Exp of terms that each are of one kind, once squares are completed, is a product."""
        x = self.squared(x, loose=True)
        if any((t.a is not None and t.a.roles != 0) + (t.k is not None) + (t.b is not None) > 1 for t in x):
            return None
        of_pairs = [t for t in x if t.k is not None]
        if not of_pairs:
            self.doubtful = True
            if not self.apart:
                return None
        exp = builders["Exp"]
        of_pairs += [t for t in x if t.k is None and t.b is None and (t.a is None or t.a.roles == 0)]
        of_i = [t for t in x if t.k is None and t.b is None and t not in of_pairs]
        of_j = [t for t in x if t.b is not None]
        a, b = self.left(tuple(of_i)), self.right(tuple(of_j))
        k = self.kernel(tuple(of_pairs))
        a, k, b = (exp(e) if e is not None and terms else None for e, terms in ((a, of_i), (k, of_pairs), (b, of_j)))
        return (Term(a, k, b),)


def _mixes(t: Term) -> bool:
    """Whether a term is a product of i with j."""
    return t.a is not None and t.a.roles == _LEFT and t.b is not None and t.b.roles == _RIGHT


def _product(t: Term) -> Polynomial:
    """The factors of i and of j of a term as a polynomial."""
    a, b = (_ONE if e is None else polynomials.polynomial(e) for e in (t.a, t.b))
    return polynomials.product(a, b)


def _simple(e: Expr, p: Polynomial, over: Polynomial) -> Expr:
    """The expression `e`, which is the polynomial `p`, times `over`; written out anew if nothing can cancel in that."""
    scaled = polynomials.product(p, over)
    if len(p) == 1 or all(sum(abs(k) for _, k in polynomials.of_parameters(m)[1]) <= 1 for m in scaled):
        return polynomials.expression(scaled)
    return e if over == _ONE else e * polynomials.expression(over)


def _merged(terms: Sequence[Term]) -> Sums:
    """Equal terms counted instead of repeated."""
    counts: dict[Term, int] = {}
    for t in terms:
        counts[t] = counts.get(t, 0) + 1
    return tuple(t if n == 1 else Term(times(const(float(n)), t.a), t.k, t.b) for t, n in counts.items())


def _scaled(sums: Sums, factor: float) -> Sums:
    return tuple(
        Term(t.a, t.k, negated(t.b))
        if factor == -1 and t.b is not None
        else Term(negated(t.a) if factor == -1 and t.a is not None else times(const(factor), t.a), t.k, t.b)
        for t in sums
    )


_RULES: dict[str, Callable[..., Sums | None]] = {
    "Add": lambda self, x, y: x + y,
    "Subtract": lambda self, x, y: x + _scaled(y, -1),
    "Minus": lambda self, x: _scaled(x, -1),
    "Mult": lambda self, x, y: self.product(x, y),
    "Divide": lambda self, x, y: self.quotient(x, y),
    "Square": lambda self, x: None if self.kernel(x) is not None else self.product(x, x),
    "Exp": lambda self, x: self.exponential(x),
    "Inv": lambda self, x: self.quotient(self._pure(const(1.0)), x),
}
assert J == 1  # the second bit of roles
