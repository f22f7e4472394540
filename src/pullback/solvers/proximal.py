"""ISTA and FISTA: proximal gradient steps, plain and accelerated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.functionals import L1, Functional
from pullback.solvers.composite import (
    DataTerm,
    above,
    as_number,
    ceiling,
    composite,
    default_step,
    direct_term,
    gather,
    optimality,
    report,
)
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, larger, ratio, smaller, where
from pullback.solvers.status import Solution

_TRIES = 60  # halvings of the step in one iteration
_EVERY = 10  # iterations between two dual values where the dual point must be scaled
_BISECTIONS = 12
_ALMOST = 1 + 1e-12

Restart = Literal["gradient", "function"]


@dataclass
class _State(State):
    r: Tensor  # A x - y, or A x for a data term of its own
    z: Tensor  # the extrapolated point, and the same of A z
    rz: Tensor
    t: Number
    ceiling: Number  # a residual above it is divergence
    length: Any = None  # the step, where it is searched for
    dual: Any = None  # the largest dual value so far, where it is asked for
    warm: Any = None  # what the next prox starts from


class ProximalGradient:
    """The recursions of `ista` and `fista`.

    A is applied to x, and A z follows from linearity: so the residual and the objective at x cost no application.
    """

    def __init__(self, problem: Problem) -> None:
        parts = problem.parts
        self.problem, self.data = problem, DataTerm(problem)
        self.accelerate, self.restart, self.with_gap = parts["accelerate"], parts["restart"], parts["gap"]
        self.search = isinstance(parts["step"], str)
        g = direct_term(problem)
        assert g is not None
        self.g: Functional = g
        self.length = None if self.search else problem.x_scalar(default_step(problem))

    def init(self) -> _State:
        """Start from x0 and A x0 - y."""
        pb = self.problem
        x, r = pb.start()
        r = torch.neg(r, out=pb.own(r)) if self.data.f is None else pb.y - r
        inf = pb.fill(math.inf)
        t = 1.0 if self.restart is None else pb.fill(1.0)
        state = _State(x, inf, pb.norm(x, pb.n_x), self._values(x, r), r=r, z=x, rz=r, t=t, ceiling=inf)
        if self.search:
            state.length = self._first_length(r)
        if self.with_gap:
            state.dual = pb.fill(-math.inf)
            state.values["gap"] = inf
        return state

    def _prox(self, state: _State, u: Tensor) -> tuple[Tensor, Any]:
        """The prox of g at u, and g there if that comes free; from where the last one ended, unless differentiated."""
        if self.problem.live:
            return self.g._prox_over(u, self.length, self.problem.n_x), None  # type: ignore[arg-type]
        x, state.warm, value = self.g._prox_from(u, self.length, self.problem.n_x, state.warm)  # type: ignore[arg-type]
        return x, value

    def _pull(self, r: Tensor) -> Tensor:
        """A^H grad D."""
        return self.problem.back(r if self.data.f is None else self.data.grad(r))

    def _image(self, x: Tensor) -> Tensor:
        """A x - y, or A x."""
        pb = self.problem
        r = pb.forward(x)
        if self.data.f is not None:
            return r.clone() if pb.A._aliases else r
        return torch.sub(r, pb.y, out=pb.own(r))

    def step(self, state: _State) -> None:
        """x_new = prox(z - step A^H grad D(A z)); z = x_new + m (x_new - x)."""
        pb = self.problem
        w = self._pull(state.rz)
        if self.with_gap:
            self._lift_dual(state, w)
        if self.search:
            (x, r), value = self._backtrack(state, w), None
        else:
            u = add_scaled(state.z, -self.length, w, pb.own(w))  # type: ignore[operator]
            x, value = self._prox(state, u)
            r = self._image(x)
        # <z - x_new, x_new - x> > 0: the momentum points uphill.
        ahead = pb.dot(state.z - x, x - state.x, pb.n_x) if self.restart == "gradient" else 0.0
        # x itself may rest for a moment, on a face of a constraint, while the extrapolated point moves on.
        plain = state.z is state.x
        leap = None if plain else pb.norm(torch.sub(x, state.z, out=pb.own(state.z)), pb.n_x)
        d = torch.sub(x, state.x, out=pb.own(state.x))
        move = pb.norm(d, pb.n_x)
        state.error = move if leap is None else larger(move, leap)
        state.scale = pb.norm(x, pb.n_x)
        before = state.values["objective"]
        values = self._values(x, r, value)
        if self.accelerate:
            t: Any = (1 + (1 + 4 * state.t * state.t) ** 0.5) / 2
            momentum = (state.t - 1) / t
            if self.restart is not None:
                uphill = detach(ahead) > 0 if self.restart == "gradient" else values["objective"] > before
                momentum, t = where(uphill, 0.0, momentum), where(uphill, 1.0, t)
            state.t = t
            state.z = add_scaled(x, pb.x_scalar(momentum), d, pb.own(d))
            if isinstance(momentum, float):
                state.rz = torch.lerp(state.r, r, 1 + momentum, out=pb.own(state.r))
            else:
                turn = torch.sub(r, state.r, out=pb.own(state.r))
                state.rz = add_scaled(r, pb.y_scalar(momentum), turn, pb.own(turn))
        else:
            state.z, state.rz = x, r
        state.x, state.r, state.values = x, r, values
        if self.with_gap:
            state.scale = abs(values["objective"])
            state.error = values["gap"] = values["objective"] - state.dual
        size = values["residual"]
        if state.iteration == 0:
            state.ceiling = ceiling(pb, size)
        state.verdict = above(size, state.ceiling)

    # The search for the step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _first_length(self, r: Tensor) -> Number:
        """|s|^2 / (L |A s|^2) for the gradient s: at least 1 / (L |A|^2). One application of A and of A^H."""
        pb = self.problem
        s = self._pull(r)
        image, size = pb.norm(pb.forward(s), pb.n_y), pb.norm(s, pb.n_x)
        bound = image * image * (1.0 if not self.data.smooth else self.data.lipschitz)
        return where(bound > 0, ratio(size * size, bound), 1.0)

    def _backtrack(self, state: _State, w: Tensor) -> tuple[Tensor, Tensor]:
        """The first step of s, s / 2, ... below which D(A .) is bounded by its quadratic model."""
        pb = self.problem
        for _ in range(_TRIES):
            length = pb.x_scalar(state.length)
            x = self.g._prox_over(add_scaled(state.z, -length, w, None), length, pb.n_x)
            r = self._image(x)
            with torch.no_grad():
                move, turn = pb.norm(x - state.z, pb.n_x), r - state.rz
                # <grad D(A x) - grad D(A z), A (x - z)> is twice D's excess over its tangent if D is quadratic, and at
                # least the excess if D is convex; no difference of large numbers is taken.
                if self.data.f is None:
                    size = pb.norm(turn, pb.n_y)
                    excess = size * size
                else:
                    excess = 2 * pb.dot(self.data.grad(r) - self.data.grad(state.rz), turn, pb.n_y)
                too_long = excess * state.length > _ALMOST * move * move
            if not (bool(too_long.any()) if isinstance(too_long, Tensor) else too_long):
                break
            state.length = where(too_long, state.length / 2, state.length)
        return x, r

    # The certificate -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _lift_dual(self, state: _State, w: Tensor) -> None:
        """-D*(s q) - g*(-s A^H q) for q = grad D(A z) and an s in [0, 1] that makes it finite: a lower bound."""
        pb = self.problem
        q = state.rz if self.data.f is None else self.data.grad(state.rz)
        outer = as_number(pb, self.g._conjugate_value(-w, pb.n_x))
        s = pb.fill(1.0)
        if bool(torch.isinf(torch.as_tensor(outer)).any()):
            if state.iteration % _EVERY:
                return
            low, high = pb.fill(0.0), s
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                value = as_number(pb, self.g._conjugate_value(-pb.x_scalar(middle) * w, pb.n_x))
                low, high = where(value < math.inf, middle, low), where(value < math.inf, high, middle)
            s = where(outer < math.inf, s, low)
            outer = as_number(pb, self.g._conjugate_value(-pb.x_scalar(s) * w, pb.n_x))
            q = pb.y_scalar(s) * q
        state.dual = -smaller(-state.dual, 0 + self.data.conjugate(q) + outer)

    def _values(self, x: Tensor, r: Tensor, value: Any = None) -> dict[str, Number]:
        pb = self.problem
        if self.data.f is not None:
            return report(pb, self.data, r, [(self.g, x, pb.n_x)])
        with pb.quiet:
            size = pb.norm(r, pb.n_y)
            value = self.g._value(x, pb.n_x) if value is None else value
            return {"residual": size, "objective": size * size / 2 + as_number(pb, value)}


def _run(
    owner: str, A: Any, y: Any, g: Any, eps: Any, data_term: Any, constraint: Any, x0: Any, restart: Any,
    parts: dict[str, Any], **options: Any,
) -> Solution:  # fmt: skip
    if (g is None) == (eps is None):
        came = "neither" if g is None else "both"
        raise ArgumentError(f"{owner}: give either g, a functional such as 0.1 * pullback.L1(), or eps; got {came}")
    if restart not in (None, "gradient", "function"):
        raise ArgumentError(f"{owner}: restart must be None, 'gradient' or 'function'; got {restart!r}")
    step = parts["step"]
    if isinstance(step, str) and step != "search":
        raise ArgumentError(f"{owner}: step must be a number > 0, 'search' or None; got {step!r}")
    if g is None:
        problem = Problem(owner, A, y, x0, eps=eps)
        g = L1(problem.A.dims) * (0.5 * problem.number(eps, "eps"))
    parts = parts | {"restart": restart, "gap": bool(parts["gap"])}
    problem = composite(owner, A, y, x0, gather(owner, g, constraint, "g"), data_term, **parts)
    direct_term(problem)
    if step != "search":
        DataTerm(problem).require_smooth()
    return run(problem, ProximalGradient, optimality(problem), **options)


def ista(
    A: Any,
    y: Any,
    g: Functional | Sequence[Functional] | None = None,
    *,
    eps: Any = None,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    step: Any = None,
    gap: bool = False,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + g(x), by x <- prox_{step g}(x - step A^H grad D(A x)); D(v) = |v - y|^2 / 2.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        g: a functional with a prox, such as `0.1 * L1()`, `Box(0, None)` or `0.1 * TV(dims)`.
        eps: instead of g, PyLops' convention: minimise |A x - y|^2 + eps |x|_1, that is g = eps / 2 L1().
        data_term: a smooth functional of A x - y (or what its `about(y)` says), such as `Huber()`, instead of half the
            squared norm.
        constraint: another functional, such as `Box(0, None)`, where its sum with g has a prox.
        x0: where to start, of shape (..., *A.dims); zero if None.
        step: at most 1 / (L |A|^2), L a Lipschitz constant of grad D; a number or one for each member of the batch.
            1 / (L A.norm_bound()^2) if None, which is proven to converge and counts as a constant: no gradient flows
            through it. "search": halved whenever the quadratic model fails, from a first guess that costs one
            application of A and of A^H; it needs no bound of |A|, and suits a D whose gradient is Lipschitz only where
            the iterates are, such as `KullbackLeibler()` with a background.
        gap: put the duality gap into the history and stop when it is at most max(rtol |objective|, atol): a bound of
            objective - minimum. It needs the conjugates of D and g. Where g* is infinite (g a norm) the dual point is
            scaled until it is feasible, every ten iterations, which costs about 13 passes over x.
        maxiter, rtol, atol: without `gap`, stop when |x_new - x| <= max(rtol |x_new|, atol), or after maxiter
            iterations. A heuristic: a slow iteration meets it before it is near the minimum.
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual" |A x - y|, "objective" and, if asked for, "gap".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A, one of A^H and one prox an iteration; with a search another application of A and
        another prox where the step is halved.
    Source: Daubechies, Defrise & De Mol 2004, doi 10.1002/cpa.20042; search: Beck & Teboulle 2009,
        doi 10.1137/080716542.
    """
    parts = {"step": step, "accelerate": False, "gap": gap}
    return _run(
        "ista", A, y, g, eps, data_term, constraint, x0, None, parts, maxiter=maxiter, rtol=rtol, atol=atol, **options
    )


def fista(
    A: Any,
    y: Any,
    g: Functional | Sequence[Functional] | None = None,
    *,
    eps: Any = None,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    step: Any = None,
    restart: Restart | None = None,
    gap: bool = False,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + g(x), by ISTA's step from an extrapolated point. Arguments and costs as in `ista`, and:

    Args:
        restart: forget the momentum of a member when it points uphill ("gradient": <z - x_new, x_new - x> > 0) or its
            objective has grown ("function"): linear convergence where the problem is strongly convex, known or not.
        rtol, atol: bound |x_new - z| as well, z the extrapolated point: x may rest on a constraint while z moves on.

    Source: Beck & Teboulle 2009, doi 10.1137/080716542; restart: O'Donoghue & Candes 2015,
        doi 10.1007/s10208-013-9150-3.
    """
    parts = {"step": step, "accelerate": True, "gap": gap}
    return _run(
        "fista", A, y, g, eps, data_term, constraint, x0, restart, parts, maxiter=maxiter, rtol=rtol, atol=atol,
        **options,
    )  # fmt: skip
