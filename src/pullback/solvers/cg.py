"""Conjugate gradients for Hermitian positive definite operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ShapeError
from pullback.solvers.iterate import Callback, Progress, State, code, iterate
from pullback.solvers.problem import Problem, add_scaled, dot, norm, ratio, square
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    r: Tensor
    p: Tensor
    rr: Tensor


class CG:
    """The recursion of `cg`."""

    def __init__(self, problem: Problem, damp: Any) -> None:
        self.problem, self.damp = problem, damp

    def init(self) -> _State:
        """x0, r = y - (A + damp) x0, p = r."""
        pb = self.problem
        x, r = pb.start()
        if pb.x0 is not None:
            r = self._damped(r, -1, x)
        rr = square(r, pb.n_x, pb.live)
        error = norm(r, pb.n_x)
        return _State(x, error, norm(pb.y, pb.n_y), {"residual": error}, r=r, p=r.clone(), rr=rr)

    def _damped(self, v: Tensor, sign: int, p: Tensor) -> Tensor:
        """Return v + sign damp p."""
        if isinstance(self.damp, float) and self.damp == 0:
            return v
        return add_scaled(v, sign * self.problem.x_scalar(self.damp), p, self.problem.own(v))

    def step(self, state: _State) -> None:
        """One application of A."""
        pb = self.problem
        q = self._damped(pb.A(state.p), 1, state.p)
        curvature = dot(state.p, q, pb.n_x)
        alpha = ratio(state.rr, curvature, pb.live)
        state.x = add_scaled(state.x, pb.x_scalar(alpha), state.p, pb.own(state.x))
        state.r = add_scaled(state.r, pb.x_scalar(-alpha), q, pb.own(state.r))
        rr = square(state.r, pb.n_x, pb.live)
        beta = ratio(rr, state.rr, pb.live)
        state.p = add_scaled(state.r, pb.x_scalar(beta), state.p, pb.own(state.p))
        state.rr = rr
        state.error = rr.detach().sqrt()
        state.values = {"residual": state.error}
        # The recursive r goes on falling after the true residual has stopped at eps |A| |x| >= eps |y|.
        rounding = torch.where(state.error <= 0.1 * pb.eps * state.scale, code(Status.PRECISION), 0)
        state.verdict = torch.where(curvature.detach() <= 0, code(Status.BREAKDOWN), rounding)


def cg(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    maxiter: int = 100,
    rtol: float = 1e-6,
    atol: float = 0.0,
    callback: Callback | None = None,
    progress: Progress = False,
    throw: bool = False,
) -> Solution:
    """Solve (A + damp I) x = y for A Hermitian positive definite, by conjugate gradients.

    Args:
        A: square LinearOperator with dims == dimsd. Does not verify that it is Hermitian.
        y: right-hand side of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        damp: >= 0, added to the diagonal (not squared, as in PyLops); a number or one for each member of the batch.
        maxiter, rtol, atol: stop when |y - (A + damp) x| <= max(rtol |y|, atol), or after maxiter iterations.
        callback, progress, throw: see `pullback.solvers.iterate.iterate`.

    Returns: Solution with history "residual". A direction with <p, A p> <= 0 gives the status BREAKDOWN.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A an iteration; four vectors.
    Source: Hestenes & Stiefel 1952, doi 10.6028/jres.049.044.
    """
    problem = Problem("cg", A, y, x0, (damp,))
    if problem.A.dims != problem.A.dimsd:
        A = problem.A
        raise ShapeError(f"cg: A must be square; got dims {A.dims} and dimsd {A.dimsd}; use cgls or lsqr")
    algorithm = CG(problem, problem.number(damp, "damp"))
    return iterate(algorithm, maxiter=maxiter, rtol=rtol, atol=atol, callback=callback, progress=progress, throw=throw)
