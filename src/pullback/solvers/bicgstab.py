"""BiCGSTAB: square systems without symmetry, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.solvers.cg import Shifted, shifted, square_problem
from pullback.solvers.gmres import gmres
from pullback.solvers.iterate import State, code
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, ratio, where
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    r: Tensor
    shadow: Tensor  # what the residuals are made orthogonal to
    p: Tensor
    rho: Any  # <shadow, r>, complex where x is


class BiCGSTAB:
    """The recursion of `bicgstab`, preconditioned from the right, so that its residual is that of the system."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.shifted = problem, Shifted(problem)
        self.precondition = self.shifted.precondition
        self.is_complex = problem.x_dtype.is_complex

    def _inner(self, u: Tensor, v: Tensor) -> Any:
        """<u, v>, complex where x is."""
        pb = self.problem
        if not self.is_complex:
            return pb.dot(u, v, pb.n_x)
        if pb.single:
            return complex(torch.vdot(u.reshape(-1), v.reshape(-1)))
        return (u.conj() * v).flatten(u.ndim - pb.n_x).sum(-1)

    def _scalar(self, c: Any) -> Any:
        return c if isinstance(c, complex) else self.problem.x_scalar(c)

    def init(self) -> _State:
        """x0, and its residual as shadow."""
        pb = self.problem
        x, r = self.shifted.start()
        error = pb.norm(r, pb.n_x)
        rho = self._inner(r, r)
        return _State(x, error, pb.norm(pb.y, pb.n_y), {"residual": error}, r=r, shadow=r.clone(), p=r.clone(), rho=rho)

    def step(self, state: _State) -> None:
        """Two applications of A, and of the preconditioner if there is one."""
        pb = self.problem
        p = state.p if self.precondition is None else self.precondition(state.p)
        v = self.shifted(p)
        pivot = self._inner(state.shadow, v)
        alpha = _quotient(state.rho, pivot, pb.live)
        s = add_scaled(state.r, self._scalar(-alpha), v, pb.own(state.r))
        z = s if self.precondition is None else self.precondition(s)
        t = self.shifted(z)
        size = pb.square(t, pb.n_x)
        omega = _quotient(self._inner(t, s), size, pb.live)
        x = add_scaled(state.x, self._scalar(alpha), p, pb.own(state.x))
        state.x = add_scaled(x, self._scalar(omega), z, pb.own(x))
        state.r = add_scaled(s, self._scalar(-omega), t, pb.own(s))
        state.error = pb.norm(state.r, pb.n_x)
        state.values = {"residual": state.error}
        rho = self._inner(state.shadow, state.r)
        beta = _quotient(rho, state.rho, pb.live) * _quotient(alpha, omega, pb.live)
        p = add_scaled(state.p, self._scalar(-omega), v, pb.own(state.p))
        state.p = add_scaled(state.r, self._scalar(beta), p, pb.own(p))
        state.rho = rho
        # Without <shadow, A p> no step exists, without omega no next direction.
        stuck = (abs(detach(pivot)) == 0) | (abs(detach(omega)) == 0)
        verdict = where(state.error <= 0.1 * pb.eps * state.scale, code(Status.PRECISION), 0)
        state.verdict = where(stuck, code(Status.BREAKDOWN), verdict)
        lost = abs(detach(rho)) <= pb.eps * pb.norm(state.shadow, pb.n_x) * state.error
        self._renew(state, lost)

    def _renew(self, state: _State, lost: Any) -> None:
        """Start anew from r where it has become orthogonal to the shadow."""
        pb = self.problem
        if isinstance(lost, Tensor):
            if bool(lost.any()):
                lifted = pb.x_scalar(lost)
                state.shadow = torch.where(lifted, state.r, state.shadow)
                state.p = torch.where(lifted, state.r, state.p)
                state.rho = torch.where(lost, self._inner(state.r, state.r), state.rho)
        elif lost:
            state.shadow, state.p, state.rho = state.r.clone(), state.r.clone(), self._inner(state.r, state.r)


def _quotient(a: Any, b: Any, live: bool) -> Number:
    """The quotient a / b, and 0 where b is zero."""
    if isinstance(a, complex) or isinstance(b, complex):
        return a / b if b else 0.0
    return ratio(a, b, live)


def bicgstab(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    preconditioner: Any = None,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Solve (A + damp I) x = y for any square A in constant memory, by stabilised bi-conjugate gradients.

    Args:
        A: square LinearOperator with dims == dimsd. Its adjoint is not needed.
        y: right-hand side of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        damp: >= 0, added to the diagonal; a number or one for each member of the batch.
        preconditioner: LinearOperator (or function) P close to the inverse of A + damp, applied from the right:
            x = P u. Implicit derivatives do not depend on it; their solves use it too, if it has an adjoint.
        maxiter, rtol, atol: stop when |y - (A + damp) x| <= max(rtol |y|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    The residual may rise on the way. Where A is nearly skew the method stalls; `gmres` does not.

    Returns: Solution with history "residual"; the status BREAKDOWN where no step exists.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: two applications of A and of the preconditioner an iteration; seven vectors.
    Source: van der Vorst 1992, doi 10.1137/0913035.
    """
    problem = square_problem("bicgstab", A, y, x0, damp=damp, preconditioner=preconditioner)
    # In real numbers, as derivatives are computed, a complex system may become nearly skew.
    linear = gmres if problem.x_dtype.is_complex else bicgstab
    equation = shifted(linear, symmetric=False, preconditioner=problem.parts["preconditioner"])
    return run(problem, BiCGSTAB, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)
