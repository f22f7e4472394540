"""MINRES: self-adjoint operators that need not be definite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.solvers.cg import Shifted, shifted, square_problem
from pullback.solvers.iterate import State, code
from pullback.solvers.problem import Problem, add_scaled, length
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, larger, ratio, root, rotation, where
from pullback.solvers.status import Solution, Status

_ASYMMETRY = 0.1  # a Lanczos matrix that is unsymmetric by that share of |A v| is no rounding


@dataclass
class _State(State):
    u: Tensor  # Lanczos vector; v = P u
    u_before: Tensor
    v: Tensor
    w: Tensor  # directions, not normalised
    w_before: Tensor
    r: Tensor | None  # the residual, kept only where a preconditioner makes its norm unknown
    beta: Number
    gamma: Number  # diagonal of the triangular factor
    gamma_before: Number
    c: Number  # the last rotation
    s: Number
    dbar: Number
    epsilon: Number
    phibar: Number  # |r| in the norm of the preconditioner
    reach: Number  # a lower bound of |A|


class MINRES:
    """The recursion of `minres`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.shifted = problem, Shifted(problem)
        self.precondition = self.shifted.precondition
        self.least = max(problem.parts["gradient_rtol"], 10 * problem.eps)

    def _normalise(self, q: Tensor) -> tuple[Tensor, Tensor, Number, Any]:
        """Return u = q / beta, v = P u, beta = sqrt <q, P q>, and where that square is negative."""
        pb = self.problem
        if self.precondition is None:
            beta = pb.norm(q, pb.n_x) if pb.single else length(q, pb.n_x, pb.live)
            q = self._scaled(q, ratio(pb.fill(1.0), beta, pb.live))
            return q, q, beta, False
        v = self.precondition(q)
        square = pb.dot(q, v, pb.n_x)
        positive = square > 0
        beta = where(positive, root(where(positive, square, pb.fill(1.0))), pb.fill(0.0))
        inverse = ratio(pb.fill(1.0), beta, pb.live)
        return self._scaled(q, inverse), self._scaled(v, inverse), beta, detach(square) < 0

    def _scaled(self, t: Tensor, c: Number) -> Tensor:
        return torch.mul(t, self.problem.x_scalar(c), out=self.problem.own(t))

    def init(self) -> _State:
        """x0, and its residual as first Lanczos vector."""
        pb = self.problem
        x, r = self.shifted.start()
        error = pb.norm(r, pb.n_x)
        kept = None if self.precondition is None else r.clone()
        u, v, beta, indefinite = self._normalise(r)
        zero, one = pb.fill(0.0), pb.fill(1.0)
        state = _State(
            x, error, pb.norm(pb.y, pb.n_y), {"residual": error}, u=u, u_before=torch.zeros_like(u), v=v,
            w=torch.zeros_like(x), w_before=torch.zeros_like(x), r=kept, beta=beta, gamma=one, gamma_before=one,
            c=-one, s=zero, dbar=zero, epsilon=zero, phibar=beta, reach=zero,
        )  # fmt: skip
        state.verdict = where(indefinite, code(Status.BREAKDOWN), 0)
        return state

    def step(self, state: _State) -> None:
        """One application of A, and of the preconditioner if there is one."""
        pb, n = self.problem, self.problem.n_x
        v, beta = state.v, state.beta
        q = self.shifted(v)
        verdict: Any = 0
        if state.iteration == 1:  # w is the first v, and <v, A v_next> = <A v, v_next> = beta
            skew = abs(detach(pb.dot(state.w, q, n) - beta))
            verdict = where(skew > _ASYMMETRY * pb.norm(q, n) * pb.norm(state.w, n), code(Status.NOT_SELF_ADJOINT), 0)
        if state.iteration:
            q = add_scaled(q, pb.x_scalar(-beta), state.u_before, pb.own(q))
        alpha = pb.dot(v, q, n)
        q = add_scaled(q, pb.x_scalar(-alpha), state.u, pb.own(q))
        state.u_before = state.u
        state.u, state.v, after, indefinite = self._normalise(q)
        state.beta = after

        delta = state.c * state.dbar + state.s * alpha
        gbar = state.s * state.dbar - state.c * alpha
        epsilon, state.epsilon = state.epsilon, state.s * after
        state.dbar = -state.c * after
        c, s, gamma = rotation(gbar, after, pb.live)
        # |A r| = phibar |(gbar, dbar)|: where that is small, r is that of least squares. Further steps would only
        # add to x from the null space: in singular systems |A r| / (|A| |r|) falls to 1e-8 ... 1e-15, then rises.
        a, b, after_, gbar_, dbar = map(detach, (alpha, beta, after, gbar, state.dbar))
        state.reach = larger(state.reach, root(a * a + b * b + after_ * after_))
        ended = root(gbar_ * gbar_ + dbar * dbar) <= self.least * state.reach
        c, s = where(ended, 0.0, c), where(ended, 1.0, s)
        phi, state.phibar = c * state.phibar, s * state.phibar
        # w_k gamma_k = v - epsilon w_{k-2} - delta w_{k-1}
        ago, last = ratio(epsilon, state.gamma_before, pb.live), ratio(delta, state.gamma, pb.live)
        w = add_scaled(v, pb.x_scalar(-ago), state.w_before, pb.own(state.w_before))
        w = add_scaled(w, pb.x_scalar(-last), state.w, pb.own(w))
        state.w_before, state.w = state.w, w
        state.gamma_before, state.gamma, state.c, state.s = state.gamma, gamma, c, s
        state.x = add_scaled(state.x, pb.x_scalar(ratio(phi, gamma, pb.live)), w, pb.own(state.x))
        if state.r is None:
            state.error = abs(detach(state.phibar))
        else:
            r = torch.mul(state.r, pb.x_scalar(s * s), out=pb.own(state.r))
            state.r = add_scaled(r, pb.x_scalar(-state.phibar * c), state.u, pb.own(r))
            state.error = pb.norm(state.r, n)
        state.values = {"residual": state.error}
        ended = ended | (state.error <= 0.1 * pb.eps * state.scale)
        verdict = where(ended, code(Status.PRECISION), verdict)
        state.verdict = where(indefinite, code(Status.BREAKDOWN), verdict)


def minres(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    preconditioner: Any = None,
    gradient_rtol: float = 1e-8,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Solve (A + damp I) x = y for A self-adjoint, definite or not, with the least residual in each Krylov space.

    Args:
        A: square LinearOperator with dims == dimsd. That it is self-adjoint is looked at in one step only.
        y: right-hand side of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        damp: >= 0, added to the diagonal; a number or one for each member of the batch.
        preconditioner: Hermitian positive definite LinearOperator (or function), close to the inverse of |A + damp|.
            The residual is then least in the norm <r, P r>. Implicit derivatives do not depend on it; their solves use
            it too.
        gradient_rtol: stop, with the status PRECISION, when |A r| <= gradient_rtol |A| |r|, which means that y does not
            lie in the range of A and x is a least-squares solution (or that cond(A) is above 1 / gradient_rtol).
        maxiter, rtol, atol: stop when |y - (A + damp) x| <= max(rtol |y|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    A singular A is allowed. If y lies in its range, x is the solution nearest to x0. Otherwise x minimises the
    residual, to about the square root of the precision; among the minimisers x is not the shortest.

    Returns: Solution with history "residual". A preconditioner with <r, P r> < 0 gives the status BREAKDOWN, an
        operator that is visibly not self-adjoint NOT_SELF_ADJOINT.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and of the preconditioner an iteration; six vectors.
    Source: Paige & Saunders 1975, doi 10.1137/0712047.
    """
    if not (isinstance(gradient_rtol, (int, float)) and gradient_rtol >= 0):
        raise ArgumentError(f"minres: gradient_rtol must be a number >= 0; got {gradient_rtol!r}")
    problem = square_problem(
        "minres", A, y, x0, damp=damp, preconditioner=preconditioner, gradient_rtol=float(gradient_rtol)
    )
    equation = shifted(minres, symmetric=True, preconditioner=problem.parts["preconditioner"])
    return run(problem, MINRES, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)
