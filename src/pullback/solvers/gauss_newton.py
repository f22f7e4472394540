"""Gauss-Newton and Levenberg-Marquardt: non-linear least squares through the Jacobian, which is never formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.solvers.cgls import cgls
from pullback.solvers.descent import start
from pullback.solvers.iterate import State
from pullback.solvers.line_search import backtrack, idle_steps, noise, verdict
from pullback.solvers.nonlinear import evaluate, expose, linearization, spaces, stationarity
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, finite, larger, ratio, root, smaller, where
from pullback.solvers.status import Solution

_FORCING = 0.1  # the inner systems are solved that accurately, and better as the gradient falls
_LEAST_FORCING = 1e-10
_FIRST_MU = 1e-3  # of |J|^2


@dataclass
class _State(State):
    r: Tensor  # F(x) - y
    g: Tensor  # J^H r + damp^2 (x - x0)
    phi: Number
    idle: Number
    mu: Number
    nu: Number


class GaussNewton:
    """The iteration of `gauss_newton`."""

    damped = False

    def __init__(self, problem: Problem) -> None:
        self.problem, parts = problem, problem.parts
        self.F, self.inner = parts["F"], parts["inner_maxiter"]
        self.damp = problem.number(parts["damp"], "damp")
        self.damp2 = self.damp * self.damp
        self.is_damped = isinstance(self.damp, Tensor) or self.damp != 0
        self.center = start(problem)
        self.size = problem.norm(problem.y, problem.n_y)
        self._known: tuple[Tensor, LinearOperator] | None = None

    def init(self) -> _State:
        """x0, the residual and the gradient."""
        pb = self.problem
        x = start(pb)
        r, g = self._linearize(x)
        error, zero = pb.norm(g, pb.n_x), pb.fill(0.0)
        phi = self._phi(r, x)
        mu = zero
        if self.damped:
            with torch.no_grad():
                slope = ratio(pb.norm(self._jacobian(x)._run(g.detach()), pb.n_y), error)
                mu = _FIRST_MU * slope * slope
        return _State(x, error, error, self._values(r, phi, error), r=r, g=g, phi=phi, idle=zero, mu=mu, nu=zero + 2.0)

    def _values(self, r: Tensor, phi: Number, error: Number) -> dict[str, Number]:
        return {"residual": self.problem.norm(r, self.problem.n_y), "objective": phi, "gradient": error}

    def _linearize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pb = self.problem
        v, J = linearization(self.F, x, pb.n_x, pb.live)
        self._known = x, J
        r = v - pb.y
        g = J._run(r, True).to(pb.x_dtype)
        return r, g + pb.x_scalar(self.damp2) * (x - self.center) if self.is_damped else g

    def _jacobian(self, x: Tensor) -> LinearOperator:
        if self._known is None or self._known[0] is not x:
            self._linearize(x)
        assert self._known is not None
        return self._known[1]

    def _phi(self, r: Tensor, x: Tensor) -> Number:
        pb = self.problem
        size = pb.norm(r, pb.n_y)
        phi = size * size
        if self.is_damped:
            away = pb.norm(x - self.center, pb.n_x)
            phi = phi + detach(self.damp2) * away * away
        return phi / 2

    def _value(self, x: Tensor) -> Number:
        return self._phi(evaluate(self.F, x) - self.problem.y, x)

    def _noise(self, state: _State) -> Number:
        return noise(self.problem, state.phi, self.size)

    def _direction(self, state: _State, mu: Number) -> Tensor:
        """argmin_p |J p + r|^2 + damp^2 |p + x - x0|^2 + mu |p|^2, roughly.

        With q = p + c (x - x0), c = damp^2 / (damp^2 + mu), this is damped least squares for q. Scaling r makes the one
        tolerance of `cgls` another for each member.
        """
        pb = self.problem
        J = self._jacobian(state.x)
        forcing = smaller(_FORCING, larger(ratio(state.error, state.scale), _LEAST_FORCING))
        factor = ratio(pb.fill(1.0), forcing * state.error)
        b, away, damp = -state.r, None, self.damp
        if self.is_damped:
            total = self.damp2 + mu
            away = pb.x_scalar(ratio(self.damp2, total, pb.live)) * (state.x - self.center)
            b = J._run(away) + b
            damp = root(total) if self.damped else damp
        elif self.damped:
            damp = root(mu)
        x0 = None if away is None else away * pb.x_scalar(factor)
        found = cgls(J, b * pb.y_scalar(factor), x0=x0, damp=damp, maxiter=self.inner, rtol=0.0, atol=1.0, unroll=True)
        q: Tensor = found.x * pb.x_scalar(ratio(pb.fill(1.0), factor))
        return (q if away is None else q - away).to(pb.x_dtype)

    def step(self, state: _State) -> None:
        """One linear least-squares problem and a line search."""
        pb = self.problem
        p = self._direction(state, 0.0)
        slope = pb.dot(state.g.detach(), p.detach(), pb.n_x)
        ascent = ((slope < 0) & finite(slope)) ^ True
        if not isinstance(ascent, Tensor):
            p = -state.g if ascent else p
        elif bool(ascent.any()):
            p = torch.where(pb.x_scalar(ascent), -state.g, p)
        slope = where(ascent, -state.error * state.error, slope)
        t = backtrack(self._value, pb, state.x.detach(), p.detach(), state.phi, slope, self._noise(state))
        x = add_scaled(state.x, pb.x_scalar(t), p, None)
        r, g = self._linearize(x)
        self._move(state, x, r, g, self._phi(r, x), stuck=(t == 0) & (state.error > 0), slope=slope)

    def _move(self, state: _State, x: Tensor, r: Tensor, g: Tensor, phi: Number, stuck: Any, slope: Number) -> None:
        pb = self.problem
        error = pb.norm(g, pb.n_x)
        rounding = self._noise(state)
        state.idle = idle_steps(state.idle, phi, state.phi, error, state.error, rounding)
        state.verdict = verdict(state.idle, stuck, slope, rounding)
        state.x, state.r, state.g, state.phi, state.error = x, r, g, phi, error
        state.values = self._values(r, phi, error)


class LevenbergMarquardt(GaussNewton):
    """The iteration of `levenberg_marquardt`."""

    damped = True

    def step(self, state: _State) -> None:
        """One damped linear problem; each member takes its step if the objective falls, and adapts its mu."""
        pb, n = self.problem, self.problem.n_x
        p = self._direction(state, state.mu)
        with torch.no_grad():
            slope = pb.dot(state.g, p, n)
            bend = pb.norm(self._jacobian(state.x)._run(p.detach()), pb.n_y)
            size = pb.norm(p, n)
            expected = -slope - (bend * bend + detach(self.damp2) * size * size) / 2
            x = add_scaled(state.x, 1.0, p, None)
            phi = self._value(x)
            rounding = self._noise(state)
            gain = ratio(state.phi - phi + rounding, expected + rounding)  # where both are rounding, a step is good
            taken = (gain > 0) & finite(phi) & (expected > 0)
            quality = smaller(larger(gain, 0.0), 1.0)
            shrunk = state.mu * larger(1 - (2 * quality - 1) ** 3, 1 / 3)
            state.mu, state.nu = (
                where(taken, shrunk, state.mu * state.nu),
                where(taken, 0.0 * state.nu + 2.0, 2 * state.nu),
            )
            stuck = (taken ^ True) & (state.error > 0) & ((expected <= rounding) | (state.nu > 2.0**20))
        if not isinstance(taken, Tensor):
            x = x if taken else state.x
        else:
            x = torch.where(pb.x_scalar(taken), state.x + p if pb.live else x, state.x)
        if not isinstance(taken, Tensor) and not taken:
            r, g, phi = state.r, state.g, state.phi
        else:
            r, g = self._linearize(x)
            phi = self._phi(r, x)
        self._move(state, x, r, g, phi, stuck=stuck, slope=slope)
        state.idle = where(taken, state.idle, 0.0 * state.idle)


def _residual(p: Problem, x: Tensor) -> Tensor:
    """The gradient J^H (F(x) - y) + damp^2 (x - x0)."""
    v, J = linearization(p.parts["F"], x, p.n_x, True)
    g = J._run(v - p.y, True).to(p.x_dtype)
    damp: Any = p.parts["damp"]
    if isinstance(damp, Tensor) or damp:
        away = x if p.x0 is None else x - p.x0
        g = g + p.x_scalar(p.number(damp, "damp")) ** 2 * away
    return g


_EQUATION = stationarity(_residual)


def _solve(owner: str, method: Any, F: Any, y: Any, x0: Any, damp: Any, inner_maxiter: Any, **options: Any) -> Solution:
    if isinstance(inner_maxiter, bool) or not isinstance(inner_maxiter, int) or inner_maxiter < 1:
        raise ArgumentError(f"{owner}: inner_maxiter must be an int >= 1; got {inner_maxiter!r}")
    A, F, depends = spaces(owner, F, y, x0)
    problem = Problem(owner, A, y, x0, F=F, damp=damp, inner_maxiter=inner_maxiter)
    problem.number(damp, "damp")
    expose(problem, depends, bool(options.get("unroll")))
    return run(problem, method, _EQUATION, **options)


def gauss_newton(
    F: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    inner_maxiter: int = 100,
    maxiter: int = 50,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |F(x) - y|^2 / 2 + damp^2 |x - x0|^2 / 2, by linearising F at each x, with a line search.

    p = argmin_p |F'(x) p + F(x) - y|^2 + damp^2 |p + x - x0|^2 comes from `cgls`, the more accurately the smaller the
    gradient is; then x <- x + t p with t = 1 unless the objective falls too little (Armijo).

    Args:
        F: an Operator, linear or not (its derivative is `F.linearize(x)`), or a function of x (then all of x and all of
            y are one member). It acts on the members of a batch one like another.
        y: data of shape (..., *F.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *F.dims); must be given if F is not linear. Complex x needs a complex x0.
        damp: >= 0, squared; draws x to x0 (in `cgls`: to 0); a number or one for each member of the batch.
        inner_maxiter: the most iterations of a linear problem; few regularise.
        maxiter, rtol, atol: stop when |gradient| <= max(rtol |gradient at x0|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`. Implicit derivatives solve with the full Hessian at x by `cg`, so
            it must be positive definite there. With unroll=True step lengths count as constants.

    Returns: Solution with history "residual" |F(x) - y|, "objective" and "gradient".
    Raises: ShapeError, DtypeError, ArgumentError; NotDifferentiableError where F hides a tensor that requires grad.
    Cost: an iteration evaluates F once or twice and applies F'(x) and its adjoint once per inner iteration.
    Source: Dembo, Eisenstat & Steihaug 1982, doi 10.1137/0719025, for the accuracy of the inner problems.
    """
    options_: dict[str, Any] = {"maxiter": maxiter, "rtol": rtol, "atol": atol, **options}
    return _solve("gauss_newton", GaussNewton, F, y, x0, damp, inner_maxiter, **options_)


def levenberg_marquardt(
    F: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    inner_maxiter: int = 100,
    maxiter: int = 100,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |F(x) - y|^2 / 2 + damp^2 |x - x0|^2 / 2, by linearising F at each x, with steps kept short by mu |p|^2.

    As `gauss_newton`, for functions that are far from linear or whose Jacobian loses rank: mu grows until the objective
    falls, and shrinks as far as the linear model predicts what happens. Each member has its own mu and takes or refuses
    its own steps.

    Args:
        F, y, x0, damp, inner_maxiter, maxiter, rtol, atol, options: see `gauss_newton`.

    Returns: Solution with history "residual" |F(x) - y|, "objective" and "gradient".
    Raises: as `gauss_newton`.
    Cost: as `gauss_newton`; a refused step costs an iteration without a new linearisation.
    Source: Marquardt 1963, doi 10.1137/0111030; Nielsen 1999, IMM-REP-1999-05, DTU, for mu.
    """
    options_: dict[str, Any] = {"maxiter": maxiter, "rtol": rtol, "atol": atol, **options}
    return _solve("levenberg_marquardt", LevenbergMarquardt, F, y, x0, damp, inner_maxiter, **options_)
