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

from pullback.core.errors import PullbackError
from pullback.kernels.ir.expr import Expr, I, J, builders, const, is_const, variable, walk
from pullback.kernels.ir.reductions import Program
from pullback.kernels.ir.structure import STRUCTURES

DIMENSIONS = 3  # coordinates that differences may have
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
    first = _Reader(program, frozenset())
    for e in program.exprs:
        first.read(e)
    reader = _Reader(program, frozenset(first.coordinates))
    components = tuple(tuple(reader.settled(c) for c in reader.read(e)) for e in program.exprs)
    if not any(t.k is not None for parts in components for terms in parts for t in terms):
        raise Refused("the formula has no function of a difference u_i - v_j")
    if len(reader.coordinates) > DIMENSIONS:
        raise Refused(f"the differences have {len(reader.coordinates)} coordinates; fast sums know {DIMENSIONS}")
    return Form(program, tuple(reader.coordinates), components)


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
    of_pairs = tuple(t for t in sums if t.k is not None)
    of_i = tuple(t for t in sums if t.k is None and t.b is None)
    of_j = tuple(t for t in sums if t.k is None and t.b is not None)
    k, a, b = reader.kernel(of_pairs), reader.left(of_i), reader.right(of_j)
    if not of_pairs or k is None or a is None or b is None or len(reader.coordinates) > DIMENSIONS:
        raise Refused("the exponent is not a function of a difference plus functions of i and of j")
    form = Form(program, tuple(reader.coordinates), (((Term(k=k),),),))
    return form, a if of_i else None, b if of_j else None


Sums = tuple[Term, ...]


class _Reader:
    """Reads expressions as sums of terms.

    A difference inside another function is a coordinate. As a factor it becomes that coordinate if it is one: x b - y b
    would cancel. Other differences are multiplied out. So the graph is read twice, the second time with `known`
    coordinates.
    """

    def __init__(self, program: Program, known: frozenset[tuple[Expr, Expr]]) -> None:
        self.program, self.known = program, known
        self.coordinates: dict[tuple[Expr, Expr], Expr] = {}
        self.done: dict[Expr, list[Sums]] = {}

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
        for t in self._joined(sums):
            of_parameters = t.a is not None and t.a.roles == 0 and t.k is not None
            t = Term(None, _times(t.a, t.k), t.b) if of_parameters else t
            groups.setdefault((t.a, t.b), []).append(t)
        found: list[Term] = []
        for (a, b), terms in groups.items():
            kernels = [t.k for t in terms if t.k is not None]
            found += [t for t in terms if t.k is None]
            found += [Term(a, _added(kernels), b)] if kernels else []
        return tuple(found)

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
        return _added([t.a for t in sums]) if all(t.k is None and t.b is None for t in sums) else None

    @staticmethod
    def right(sums: Sums) -> Expr | None:
        """The sum as one expression of j and parameters, or None."""
        fits = all(t.k is None and (t.a is None or t.a.roles == 0) for t in sums)
        return _added([_times(t.a, t.b) for t in sums]) if fits else None

    def kernel(self, sums: Sums) -> Expr | None:
        """The sum as one expression of differences and parameters, or None."""
        joined = self._joined(sums, new=True)
        if any((t.b is not None and t.b.roles) or (t.a is not None and t.a.roles) for t in joined):
            return None
        return _added([_times(_times(t.a, t.k), t.b) for t in joined])

    def _joined(self, sums: Sums, new: bool = False) -> Sums:
        """Terms of i alone and of j alone, if there are both, made one coordinate; a known one unless `new`."""
        of_i = [t for t in sums if t.k is None and t.b is None and t.a is not None and t.a.roles == _LEFT]
        of_j = [t for t in sums if t.k is None and t.b is not None and (t.a is None or t.a.roles == 0)]
        if not of_i or not of_j:
            return sums
        u, v = self.left(tuple(of_i)), self.right(tuple(of_j))
        assert u is not None and v is not None
        rest = tuple(t for t in sums if t not in of_i and t not in of_j)
        z = self._coordinate(u, _negated(v), new)
        return sums if z is None else (Term(k=z), *rest)

    def _coordinate(self, u: Expr, v: Expr, new: bool) -> Expr | None:
        """The difference u - v, with a common factor of parameters taken out so that x and s x share a coordinate."""
        (p, u0), (q, v0) = _factored(u), _factored(v)
        if p is not q:
            p, u0, v0 = None, u, v
        key = (u0, v0)
        if key not in self.coordinates:
            if not new and key not in self.known:
                return None
            self.coordinates[key] = variable(self.program.n + len(self.coordinates), 1, I)
        z = self.coordinates[key]
        return z if p is None else p * z

    def product(self, x: Sums, y: Sums) -> Sums:
        x, y = self._joined(x), self._joined(y)
        if len(x) * len(y) > TERMS:
            raise Refused(f"the formula has more than {TERMS} terms")
        return _merged([Term(_times(s.a, t.a), _times(s.k, t.k), _times(s.b, t.b)) for s in x for t in y])

    def quotient(self, x: Sums, y: Sums) -> Sums | None:
        for collapse, slot in ((self.left, "a"), (self.right, "b"), (self.kernel, "k")):
            q = collapse(y)
            if q is not None:
                return self.product(x, (Term(**{slot: 1 / q}),))
        return None

    def exponential(self, x: Sums) -> Sums | None:
        """Exp of terms that each are of one kind is a product."""
        if any((t.a is not None and t.a.roles != 0) + (t.k is not None) + (t.b is not None) > 1 for t in x):
            return None
        of_pairs = [t for t in x if t.k is not None]
        if not of_pairs:
            return None
        exp = builders["Exp"]
        of_pairs += [t for t in x if t.k is None and t.b is None and (t.a is None or t.a.roles == 0)]
        of_i = [t for t in x if t.k is None and t.b is None and t not in of_pairs]
        of_j = [t for t in x if t.b is not None]
        a, b = self.left(tuple(of_i)), self.right(tuple(of_j))
        k = self.kernel(tuple(of_pairs))
        assert k is not None
        return (Term(None if not of_i or a is None else exp(a), exp(k), None if not of_j or b is None else exp(b)),)


def _added(parts: Sequence[Expr | None]) -> Expr:
    total: Expr | None = None
    for p in parts:
        p = const(1.0) if p is None else p
        total = p if total is None else total + p
    return const(0.0) if total is None else total


def _times(a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None:
        return b if a is None else a
    return b if is_const(a, 1.0) else a if is_const(b, 1.0) else a * b


def _negated(e: Expr) -> Expr:
    return e.args[0] if e.op == "Minus" else -e


def _factored(e: Expr) -> tuple[Expr | None, Expr]:
    """(p, e0) with e = p e0, p of parameters only; p is None if there is none."""
    sign = e.op == "Minus"
    inner = e.args[0] if sign else e
    p: Expr | None = None
    if inner.op == "Gather" and inner.args[0].op in ("Mult", "Divide"):  # component k of p * x
        x, y = inner.args[0].args
        (k,) = inner.params[0]
        pick = lambda t: t if t.dim == 1 else builders["Gather"](t, (k,))  # noqa: E731
        inner = builders[inner.args[0].op](pick(x), pick(y))
    if inner.op in ("Mult", "Divide"):
        x, y = inner.args
        if y.roles == 0:
            p, inner = (y, x) if inner.op == "Mult" else (1 / y, x)
        elif x.roles == 0 and inner.op == "Mult":
            p, inner = x, y
    return p, (-inner if sign else inner)


def _merged(terms: Sequence[Term]) -> Sums:
    """Equal terms counted instead of repeated."""
    counts: dict[Term, int] = {}
    for t in terms:
        counts[t] = counts.get(t, 0) + 1
    return tuple(t if n == 1 else Term(_times(const(float(n)), t.a), t.k, t.b) for t, n in counts.items())


def _scaled(sums: Sums, factor: float) -> Sums:
    return tuple(
        Term(t.a, t.k, _negated(t.b))
        if factor == -1 and t.b is not None
        else Term(_negated(t.a) if factor == -1 and t.a is not None else _times(const(factor), t.a), t.k, t.b)
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
}
assert J == 1  # the second bit of roles
