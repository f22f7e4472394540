"""How functionals combine: multiples, translations, sums, compositions with a linear operator."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pullback.core.errors import ShapeError
from pullback.core.operator import LinearOperator
from pullback.functionals.arithmetic import indicator, inner, lift, member, norm, point_like, real_like, slack
from pullback.functionals.functional import Functional as Functional
from pullback.functionals.functional import Step as Step
from pullback.functionals.functional import algebra
from pullback.functionals.linear import pull


class Scaled(Functional):
    """x -> c f(x) for c >= 0, a number or a tensor (which may require grad) with one value, or one for each member.

    Does not verify that a tensor c is >= 0.
    """

    def __init__(self, f: Functional, factor: float | Tensor) -> None:
        super().__init__(f.dims)
        self.f = f
        self.factor: Any = factor
        self.has_prox, self.convex, self.elementwise, self.is_box = f.has_prox, f.convex, f.elementwise, f.is_box
        self.homogeneous, self.radial, self.is_quadratic = f.homogeneous, f.radial, f.is_quadratic

    def _c(self, x: Tensor, n: int) -> Any:
        return lift(real_like(self.factor, x), n)

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self._c(x, 0) * self.f._value(x, n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self.f._prox(x, step * self._c(x, n), n)

    def _prox_over(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self.f._prox_over(x, step * self._c(x, n), n)

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        u, dual, value = self.f._prox_from(x, step * self._c(x, n), n, dual)
        return u, dual, None if value is None else self._c(x, 0) * value

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        return self.f._conjugate_prox(x, step, n, scale * self._c(x, n))

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        c = scale * self._c(x, n)
        if not isinstance(c, Tensor) and c == 0:  # the conjugate of the zero functional
            return indicator((x == 0).flatten(x.ndim - n).all(-1) if n else x == 0, x)
        return self.f._conjugate_value(x, n, c)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return self._c(x, n) * self.f._grad(x, n)

    @property
    def lipschitz(self) -> Any:
        """That of f, times c."""
        return self.factor * self.f.lipschitz

    @property
    def strong_convexity(self) -> Any:
        """That of f, times c."""
        return self.factor * self.f.strong_convexity

    @property
    def operator(self) -> LinearOperator | None:
        """The K of f."""
        return self.f.operator

    @property
    def outer(self) -> Functional:
        """The outer part of f, times c."""
        return self if self.f.operator is None else self.f.outer._scale(self.factor)

    @property
    def terms(self) -> tuple[Functional, ...]:
        """Those of f, times c."""
        return tuple(t._scale(self.factor) for t in self.f.terms) if len(self.f.terms) > 1 else (self,)

    def _quadratic(self, x: Tensor, n: int) -> tuple[Any, Any] | None:
        known = self.f._quadratic(x, n)
        return None if known is None else (self._c(x, n) * known[0], self._c(x, n) * known[1])

    def about(self, y: Any) -> Functional:
        """That of f, times c."""
        return self.f.about(y)._scale(self.factor)

    def _scale(self, factor: float | Tensor) -> Functional:
        product: float | Tensor = self.factor * factor
        return self.f._scale(product)

    def __repr__(self) -> str:
        c = "c" if isinstance(self.factor, Tensor) else format(self.factor, ".6g")
        return f"{c} * {self.f!r}"


class Translated(Functional):
    """x -> f(x - shift)."""

    def __init__(self, f: Functional, shift: Tensor) -> None:
        super().__init__(f.dims)
        self.f, self.shift = f, shift
        self.has_prox, self.convex, self.elementwise, self.is_box = f.has_prox, f.convex, f.elementwise, f.is_box
        self.is_quadratic = f.is_quadratic

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self.f._value(x - point_like(self.shift, x), n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        shift = point_like(self.shift, x)
        return shift + self.f._prox(x - shift, step, n)

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        # f(. - b)^*(u) = f^*(u) + Re<b, u>
        return self.f._conjugate_prox(x - step * point_like(self.shift, x), step, n, scale)

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        shift = point_like(self.shift, x)
        u, dual, value = self.f._prox_from(x - shift, step, n, dual)
        return shift + u, dual, value

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        return self.f._conjugate_value(x, n, scale) + inner(point_like(self.shift, x).expand_as(x), x, n)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return self.f._grad(x - point_like(self.shift, x), n)

    @property
    def lipschitz(self) -> Any:
        """That of f."""
        return self.f.lipschitz

    @property
    def strong_convexity(self) -> Any:
        """That of f."""
        return self.f.strong_convexity

    @property
    def operator(self) -> LinearOperator | None:
        """The K of f."""
        return self.f.operator

    @property
    def outer(self) -> Functional:
        """g(. - K shift)."""
        op = self.f.operator
        return self if op is None else Translated(self.f.outer, op(self.shift))

    def _quadratic(self, x: Tensor, n: int) -> tuple[Any, Any] | None:
        known = self.f._quadratic(x, n)  # c |x - s|^2 / 2 - Re<p, x - s> = c |x|^2 / 2 - Re<p + c s, x> + const
        return None if known is None else (known[0], known[1] + known[0] * point_like(self.shift, x))

    def __repr__(self) -> str:
        return f"{self.f!r}.translate(...)"


class Sum(Functional):
    """x -> sum_i f_i(x).

    Multiples of SquaredL2 are absorbed into the point and the step of the prox of the rest. The rest has a prox where
    it is nothing, one functional with a prox, or a chain of proxes: one elementwise functional, then boxes (real x),
    then one L2 or L21 if what comes before is elementwise and homogeneous. So these have one: `L1() + SquaredL2()`
    (elastic net), `L1() + Box(0, None)`, `L1() + L21()` (sparse groups). Solvers that split (`pdhg`, `solve`) take any
    sum.

    Source: Yu 2013, "On decomposing the proximal map", for the chain.
    """

    def __init__(self, *parts: Functional) -> None:
        terms = [t for p in parts for t in p.terms]
        known = [t.dims for t in terms if t.dims is not None]
        for d in known[1:]:
            if d != known[0]:
                raise ShapeError(f"cannot add functionals of dims {known[0]} and {d}: dims differ")
        super().__init__(known[0] if known else None)
        for i, t in enumerate(terms):
            self.add_module(str(i), t)
        self.convex = all(t.convex for t in terms)
        self.elementwise = all(t.elementwise for t in terms)
        self.homogeneous = all(t.homogeneous for t in terms)
        self.is_quadratic = all(t.is_quadratic for t in terms)
        rest = self._rest()
        self.has_prox = all(t.has_prox for t in rest) and (len(rest) < 2 or _is_chain(rest))

    @property
    def terms(self) -> tuple[Functional, ...]:
        """The f_i."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def _rest(self) -> list[Functional]:
        """What is not quadratic, in the order of the chain of proxes."""
        return sorted((t for t in self.terms if not t.is_quadratic), key=lambda t: 2 * t.radial + t.is_box)

    def _value(self, x: Tensor, n: int) -> Tensor:
        first, *rest = self.terms
        total = first._value(x, n)
        for t in rest:
            total = total + t._value(x, n)
        return total

    def _absorb(self, x: Tensor, step: Step, n: int) -> tuple[Tensor, Step]:
        """Where and with which step the rest takes its prox."""
        known = self._quadratic(x, n)
        if known is None:
            return x, step
        c, p = known
        return (x + step * p) / (1 + step * c), step / (1 + step * c)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        if not self.has_prox:
            return super()._prox(x, step, n)
        u, step = self._absorb(x, step, n)
        for t in self._rest():
            u = t._prox(u, step, n) if u is x else t._prox_over(u, step, n)
        return u

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        rest = self._rest()
        if len(rest) != 1:
            return super()._prox_from(x, step, n, dual)
        return *rest[0]._prox_from(*self._absorb(x, step, n), n, dual)[:2], None

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        # The supremum is attained where the prox of the rest lies, if there is a quadratic.
        known = self._quadratic(x, n)
        if known is None or not self.has_prox or (not isinstance(known[0], Tensor) and known[0] == 0):
            return super()._conjugate_value(x, n, scale)
        c, p = known
        v = (x + scale * p) / (scale * c)
        for t in self._rest():
            v = t._prox(v, 1 / c, n)
        return inner(x, v, n) - member(scale, n) * self._value(v, n)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        first, *rest = self.terms
        total = first._grad(x, n)
        for t in rest:
            total = total + t._grad(x, n)
        return total

    @property
    def lipschitz(self) -> Any:
        """The sum of the constants."""
        return sum(t.lipschitz for t in self.terms)

    @property
    def strong_convexity(self) -> Any:
        """The sum of the constants."""
        return sum(t.strong_convexity for t in self.terms)

    def _quadratic(self, x: Tensor, n: int) -> tuple[Any, Any] | None:
        """The sum of the quadratic terms."""
        known = [q for q in (t._quadratic(x, n) for t in self.terms) if q is not None]
        return (sum(c for c, _ in known), sum(p for _, p in known)) if known else None

    def about(self, y: Any) -> Functional:
        """The sum of those of the f_i."""
        return Sum(*(t.about(y) for t in self.terms))

    def _scale(self, factor: float | Tensor) -> Functional:
        return Sum(*(t._scale(factor) for t in self.terms))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


def _is_chain(terms: list[Functional]) -> bool:
    """Whether the prox of the sum is the chain of the proxes, in this order."""
    if terms[-1].radial:
        return all(t.elementwise and t.homogeneous for t in terms[:-1]) and _is_chain(terms[:-1])
    return all(t.elementwise for t in terms) and sum(not t.is_box for t in terms) < 2


class Composed(Functional):
    """x -> g(K x) for a linear operator K; solvers use `outer` = g and `operator` = K.

    Where K K^H = c I and g has a prox: prox: x + K^H (prox_{c step g}(K x) - K x) / c. Otherwise it has none. For real
    x and complex K x the real part is taken, which is right where g(K conj(x)) = g(K x), as for norms of a Fourier
    transform (not verified).

    Source: Combettes & Pesquet 2007, doi 10.1109/JSTSP.2007.910264.
    """

    def __init__(self, g: Functional, op: LinearOperator) -> None:
        super().__init__(op.dims)
        if g.dims is not None and g.dims != op.dimsd:
            raise ShapeError(f"cannot compose {g!r} with {type(op).__name__}: its dimsd are {op.dimsd}, not {g.dims}")
        if g.operator is not None:
            g, op = g.outer, g.operator @ op
        self.g, self.op = g, op
        self.convex = g.convex
        self._tight = op._coisometry()
        self.has_prox = g.has_prox and bool(self._tight)

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self.g._value(self.op._run(x), len(self.op.dimsd))

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        if not self._tight:
            return super()._prox(x, step, n)
        return self._prox_from(x, step, n)[0]

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        if not self._tight:
            return self._prox(x, step, n), None, None
        m, c = len(self.op.dimsd), self._tight
        inner_step = lift(member(step, n), m) * c
        y = self.op._run(x)
        whole = self.op._isometry() is not None  # then x = K^H K x / c
        prox = self.g._prox_over if whole and not self.op._aliases else self.g._prox  # y is ours to overwrite
        p = prox(y, inner_step, m)
        u = pull(self.op, p if whole else p - y, x)
        u = u if c == 1 else u / c
        return (u if whole else x + u), None, self.g._value(p, m)  # K u = p

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        # inf {g^*(v) : K^H v = x}; v = K x / c is the only candidate.
        if not self._tight:
            return super()._conjugate_value(x, n, scale)
        m = len(self.op.dimsd)
        v = self.op._run(x) / self._tight
        value = self.g._conjugate_value(v, m, lift(member(scale, n), m))
        if self.op.shape[0] == self.op.shape[1]:
            return value
        reached = norm(x - self.op._run(v, True), n) <= slack(x) * norm(x, n)
        return value + indicator(member(reached, n), x)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return pull(self.op, self.g._grad(self.op._run(x), len(self.op.dimsd)), x)

    @property
    def lipschitz(self) -> Any:
        """L |K|^2."""
        inside = self.g.lipschitz
        return inside if inside == math.inf else inside * self.op.norm_bound() ** 2

    @property
    def strong_convexity(self) -> Any:
        """That of g times c, where K is square; 0 otherwise."""
        return self.g.strong_convexity * self._tight if self._tight and self.op.shape[0] == self.op.shape[1] else 0.0

    @property
    def operator(self) -> LinearOperator | None:
        """K."""
        return self.op

    @property
    def outer(self) -> Functional:
        """The functional after K."""
        return self.g

    def __repr__(self) -> str:
        return f"{self.g!r} @ {type(self.op).__name__}"


algebra.update(translate=Translated, scale=Scaled, add=Sum, compose=Composed)
