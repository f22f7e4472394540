"""LSMR: least squares by Golub-Kahan bidiagonalisation, with a gradient that falls monotonically."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.solvers.equations import least_squares
from pullback.solvers.iterate import State, code
from pullback.solvers.lsqr import _stacked
from pullback.solvers.problem import Problem, add_scaled, length
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, larger, ratio, root, rotation, smaller, where
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    u: Tensor
    v: Tensor
    h: Tensor
    hbar: Tensor
    alpha: Number
    alphabar: Number
    zetabar: Number  # its magnitude is the norm of the gradient
    rho: Number
    rhobar: Number
    cbar: Number
    sbar: Number
    tail: dict[str, Number]  # what the estimate of |r| needs (Fong & Saunders, section 3.4), without derivative
    norm2: Number  # estimate of |(A, damp)|_F^2
    largest: Number  # of the diagonal whose extremes estimate cond(A)
    smallest: Number


class LSMR:
    """The recursion of `lsmr`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.damp = problem.number(problem.parts["damp"], "damp")
        self.conlim = problem.parts["conlim"]
        if problem.x0 is not None and (isinstance(self.damp, Tensor) or self.damp != 0):
            self.problem, self.damp = _stacked(problem, self.damp), 0.0
        self.is_damped = isinstance(self.damp, Tensor) or self.damp != 0

    def _normalise(self, t: Tensor, n: int) -> tuple[Tensor, Number]:
        """Return t / |t| and |t|; zero stays zero."""
        pb = self.problem
        size = pb.norm(t, n) if pb.single else length(t, n, pb.live)
        inverse = ratio(pb.fill(1.0), size, pb.live)
        if isinstance(inverse, Tensor):
            inverse = inverse.reshape(inverse.shape + (1,) * n)
        return torch.mul(t, inverse, out=pb.own(t)), size

    def init(self) -> _State:
        """Set beta u = y - A x0, alpha v = A^H u, h = v."""
        pb = self.problem
        x, r = pb.start()
        u, beta = self._normalise(r, pb.n_y)
        v, alpha = self._normalise(pb.back(u), pb.n_x)
        zero, one, size = pb.fill(0.0), pb.fill(1.0), detach(beta)
        error = detach(alpha) * size
        scale = error if pb.x0 is None else pb.norm(pb.back(pb.y), pb.n_x)
        tail = {"dd": size, "d": zero, "rho": one, "tau": zero, "theta": zero, "zeta": zero, "squares": zero}
        return _State(
            x, error, scale, {"residual": size, "gradient": error}, u=u, v=v, h=v.clone(), hbar=torch.zeros_like(v),
            alpha=alpha, alphabar=alpha, zetabar=alpha * beta, rho=one, rhobar=one, cbar=one, sbar=zero, tail=tail,
            norm2=detach(alpha) * detach(alpha), largest=zero, smallest=pb.fill(math.inf),
        )  # fmt: skip

    def step(self, state: _State) -> None:
        """One application of A and one of A^H."""
        pb = self.problem
        u = pb.forward(state.v)
        u = add_scaled(u, pb.y_scalar(-state.alpha), state.u, pb.own(u))
        state.u, beta = self._normalise(u, pb.n_y)
        v = pb.back(state.u)
        v = add_scaled(v, pb.x_scalar(-beta), state.v, pb.own(v))
        state.v, state.alpha = self._normalise(v, pb.n_x)

        alphahat, turn = state.alphabar, None
        if self.is_damped:  # rotate the damping row away
            *turn, alphahat = rotation(state.alphabar, self.damp, pb.live)
        rho_before, rhobar_before = state.rho, state.rhobar
        c, s, state.rho = rotation(alphahat, beta, pb.live)
        theta, state.alphabar = s * state.alpha, c * state.alpha
        thetabar, slanted = state.sbar * state.rho, state.cbar * state.rho
        state.cbar, state.sbar, state.rhobar = rotation(slanted, theta, pb.live)
        zeta, state.zetabar = state.cbar * state.zetabar, -state.sbar * state.zetabar

        back = ratio(thetabar * state.rho, rho_before * rhobar_before, pb.live)
        state.hbar = add_scaled(state.h, pb.x_scalar(-back), state.hbar, pb.own(state.hbar))
        forth = ratio(zeta, state.rho * state.rhobar, pb.live)
        state.x = add_scaled(state.x, pb.x_scalar(forth), state.hbar, pb.own(state.x))
        state.h = add_scaled(state.v, pb.x_scalar(-ratio(theta, state.rho, pb.live)), state.h, pb.own(state.h))
        numbers = (c, s, state.cbar, thetabar, state.rhobar, zeta, slanted, beta, state.alpha, rhobar_before)
        with pb.quiet:
            self._judge(state, turn and [*map(detach, turn)], *map(detach, numbers))

    def _judge(
        self, state: _State, turn: list[Number] | None, c: Number, s: Number, cbar: Number, thetabar: Number,
        rhobar: Number, zeta: Number, slanted: Number, beta: Number, alpha: Number, rhobar_before: Number,
    ) -> None:  # fmt: skip
        """|r|, |A^H r|, |A|, cond(A) as the recursion estimates them, and what follows."""
        pb, t = self.problem, state.tail
        acute, squares = t["dd"], t["squares"]
        if turn is not None:
            check = -turn[1] * acute
            acute, squares = turn[0] * acute, squares + check * check
        hat, dd = c * acute, -s * acute
        ctilde, stilde, rhotilde = rotation(t["rho"], thetabar, live=False)
        theta_before, theta, rho = t["theta"], stilde * rhobar, ctilde * rhobar
        d = ctilde * hat - stilde * t["d"]
        tau = ratio(t["zeta"] - theta_before * t["tau"], rhotilde)
        gap = d - ratio(zeta - theta * tau, rho)
        size = root(squares + gap * gap + dd * dd)
        state.tail = {"dd": dd, "d": d, "rho": rho, "tau": tau, "theta": theta, "zeta": zeta, "squares": squares}

        norm2 = state.norm2 + beta * beta
        state.norm2 = norm2 + alpha * alpha
        state.error = abs(detach(state.zetabar))
        state.values = {"residual": size, "gradient": state.error}
        verdict: Any = 0
        if self.conlim:
            if state.iteration:
                state.largest = larger(state.largest, rhobar_before)
                state.smallest = smaller(state.smallest, rhobar_before)
            condition = ratio(larger(state.largest, slanted), smaller(state.smallest, slanted))
            verdict = where(condition > self.conlim, code(Status.ILL_CONDITIONED), 0)
        floor = larger(root(norm2) * size, 0.1 * state.scale) * pb.eps
        state.verdict = where(state.error <= floor, code(Status.PRECISION), verdict)


def lsmr(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    conlim: float = 1e8,
    maxiter: int = 100,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 + damp^2 |x|^2, by LSMR: as `lsqr`, but the gradient falls in every iteration.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None. The damping draws x to 0 whatever x0 is.
        damp: >= 0, squared; a number or one for each member of the batch.
        conlim: stops with the status ILL_CONDITIONED when the estimate of cond(A) exceeds it; 0 never.
        maxiter, rtol, atol: stop when |A^H (y - A x) - damp^2 x| <= max(rtol |A^H y|, atol), or after maxiter
            iterations. (SciPy's atol is relative to |A| |r|.)
        options: see `pullback.solvers.run.Options`.

    Stopped early it is nearer to the solution than `lsqr` in the gradient, hardly farther in the residual.

    Returns: Solution with history "residual" (damping rows included) and "gradient", as the recursion estimates them.
        Where rounding allows no progress it stops with the status PRECISION.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and one of A^H an iteration; six vectors (with x0 and damp the data are longer by x).
    Source: Fong & Saunders 2011, doi 10.1137/10079687X.
    """
    if not (isinstance(conlim, (int, float)) and conlim >= 0):
        raise ArgumentError(f"lsmr: conlim must be a number >= 0; got {conlim!r}")
    problem = Problem("lsmr", A, y, x0, damp=damp, conlim=float(conlim))
    problem.number(damp, "damp")
    return run(problem, LSMR, least_squares(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)
