"""LSQR: least squares by Golub-Kahan bidiagonalisation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.solvers.equations import least_squares
from pullback.solvers.iterate import State, code
from pullback.solvers.problem import Problem, add_scaled, length
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, ratio, root, where
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    u: Tensor
    v: Tensor
    w: Tensor
    alpha: Number
    rhobar: Number
    phibar: Number
    norm2: Number  # estimate of |(A, damp)|_F^2
    inverse2: Number  # estimate of |(A, damp)^+|_F^2
    damped2: Number  # the part of |r|^2 that the damping rows hold


class LSQR:
    """The recursion of `lsqr`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        parts = problem.parts
        self.damp = problem.number(parts["damp"], "damp")
        self.atol, self.btol, self.conlim = parts["atol"], parts["btol"], parts["conlim"]
        if problem.x0 is not None and (isinstance(self.damp, Tensor) or self.damp != 0):
            self.problem, self.damp = _stacked(problem, self.damp), 0.0

    def _normalise(self, t: Tensor, n: int) -> tuple[Tensor, Number]:
        """Return t / |t| and |t|; zero stays zero."""
        pb = self.problem
        size = pb.norm(t, n) if pb.single else length(t, n, pb.live)
        inverse = ratio(pb.fill(1.0), size, pb.live)
        if isinstance(inverse, Tensor):
            inverse = inverse.reshape(inverse.shape + (1,) * n)
            return torch.mul(t, inverse, out=pb.own(t)), size
        return t.mul_(inverse), size

    def init(self) -> _State:
        """Set beta u = y - A x0, alpha v = A^H u, w = v."""
        pb = self.problem
        x, r = pb.start()
        u, beta = self._normalise(r, pb.n_y)
        v, alpha = self._normalise(pb.back(u), pb.n_x)
        error, zero = detach(alpha * beta), pb.fill(0.0)
        values = {"residual": beta, "gradient": error}
        state = _State(
            x, error, pb.norm(pb.y, pb.n_y), values, u=u, v=v, w=v.clone(), alpha=alpha, rhobar=alpha, phibar=beta,
            norm2=zero, inverse2=zero, damped2=zero,
        )  # fmt: skip
        state.verdict = where(detach(beta) <= self.btol * state.scale, code(Status.CONVERGED), 0)
        return state

    def step(self, state: _State) -> None:
        """One application of A and one of A^H."""
        pb = self.problem
        alpha_before = state.alpha
        u = pb.forward(state.v)
        u = add_scaled(u, pb.y_scalar(-state.alpha), state.u, pb.own(u))
        state.u, beta = self._normalise(u, pb.n_y)
        v = pb.back(state.u)
        v = add_scaled(v, pb.x_scalar(-beta), state.v, pb.own(v))
        state.v, alpha = self._normalise(v, pb.n_x)
        state.alpha = alpha

        rhobar, phibar = state.rhobar, state.phibar
        if isinstance(self.damp, Tensor) or self.damp != 0:  # rotate the damping row away
            rhobar = root(state.rhobar * state.rhobar + self.damp * self.damp)
            phibar = ratio(state.rhobar, rhobar, pb.live) * state.phibar
            state.damped2 = state.damped2 + detach(state.phibar * state.phibar - phibar * phibar)
        rho = root(rhobar * rhobar + beta * beta)
        c, s = ratio(rhobar, rho, pb.live), ratio(beta, rho, pb.live)
        theta, state.rhobar = s * alpha, -c * alpha
        phi, state.phibar = c * phibar, s * phibar
        state.x = add_scaled(state.x, pb.x_scalar(ratio(phi, rho, pb.live)), state.w, pb.own(state.x))
        with pb.quiet:
            spread = ratio(pb.norm(state.w, pb.n_x), detach(rho))
            state.inverse2 = state.inverse2 + spread * spread
        state.w = add_scaled(state.v, pb.x_scalar(-ratio(theta, rho, pb.live)), state.w, pb.own(state.w))
        self._judge(state, *map(detach, (alpha_before, alpha, beta, abs(s * phi))))

    def _judge(self, state: _State, alpha_before: Number, alpha: Number, beta: Number, tau: Number) -> None:
        """The stopping rules of Paige & Saunders, section 6."""
        pb = self.problem
        damp, phibar = detach(self.damp), detach(state.phibar)
        state.norm2 = state.norm2 + alpha_before * alpha_before + beta * beta + damp * damp
        size = root(phibar * phibar + state.damped2)
        state.error = alpha * tau
        state.values = {"residual": size, "gradient": state.error}
        anorm = root(state.norm2)
        test1 = ratio(size, state.scale)
        test2 = ratio(state.error, anorm * size)
        loose1 = self.btol + self.atol * anorm * ratio(pb.norm(state.x, pb.n_x), state.scale)
        condition = anorm * root(state.inverse2)
        verdict = where(condition >= self.conlim, code(Status.ILL_CONDITIONED), 0)
        verdict = where((test1 <= pb.eps) | (test2 <= pb.eps), code(Status.PRECISION), verdict)
        state.verdict = where((test1 <= loose1) | (test2 <= self.atol), code(Status.CONVERGED), verdict)


def _stacked(problem: Problem, damp: Any) -> Problem:
    """The same least-squares problem with the damping in the operator."""
    stacked = copy.copy(problem)
    stacked.A, stacked.n_y = _Damped(problem.A, damp), 1
    stacked.adjoint = stacked.A.H
    zeros = problem.y.new_zeros((*problem.batch, problem.A.shape[1]))
    stacked.y = torch.cat((problem.y.flatten(-problem.n_y), zeros), -1)
    stacked._look()
    return stacked


class _Damped(LinearOperator):
    """x -> (A x, damp x), flat."""

    def __init__(self, A: LinearOperator, damp: Any) -> None:
        super().__init__(A.dims, A.shape[0] + A.shape[1])
        self.A, self.damp = A, damp
        self.__dict__["_delegates"] = True
        self._clinear, self._real_domain = A._clinear, A._real_domain

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        m = self.A.shape[0]
        return y[..., :m].unflatten(-1, self.A.dimsd), y[..., m:].unflatten(-1, self.dims)

    def _scaled(self, x: Tensor) -> Tensor:
        n = len(self.dims)
        return x * (self.damp.reshape(self.damp.shape + (1,) * n) if isinstance(self.damp, Tensor) else self.damp)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self.A._out_dtype(dtype, adjoint)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.A._run(x).flatten(-len(self.A.dimsd))
        return torch.cat((y, self._scaled(x).flatten(-len(self.dims)).to(y.dtype)), -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        first, second = self._split(y)
        x = self.A._run(first.real if self.A._real_range and first.is_complex() else first, True)
        second = self._scaled(second)
        return x + (second.real if second.is_complex() and not x.is_complex() else second)


def lsqr(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    maxiter: int = 100,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 + damp^2 |x|^2, by LSQR: as `cgls`, more reliable where A is ill-conditioned.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None. The damping draws x to 0 whatever x0 is, as in `cgls`
            (in SciPy and PyLops it draws x to x0).
        damp: >= 0, squared; a number or one for each member of the batch.
        maxiter: the most iterations.
        atol, btol: relative errors of A and y. Stops when |r| <= btol |y| + atol |A|_F |x|, where r = y - A x, or when
            |A^H r| <= atol |A|_F |r| (with the damping rows in A and r).
        conlim: stops with the status ILL_CONDITIONED when the estimate of cond(A) exceeds it.
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual" (damping rows included) and "gradient", as the recursion estimates them.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and one of A^H an iteration; five vectors (with x0 and damp the data are longer by x).
    Source: Paige & Saunders 1982, doi 10.1145/355984.355989.
    """
    for name, value in (("atol", atol), ("btol", btol), ("conlim", conlim)):
        if not (isinstance(value, (int, float)) and value >= 0):
            raise ArgumentError(f"lsqr: {name} must be a number >= 0; got {value!r}")
    problem = Problem("lsqr", A, y, x0, damp=damp, atol=float(atol), btol=float(btol), conlim=float(conlim))
    problem.number(damp, "damp")
    equation = least_squares(problem)
    return run(problem, LSQR, equation, maxiter=maxiter, rtol=0.0, tolerance=float(min(atol, btol)), **options)
