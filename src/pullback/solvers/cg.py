"""Conjugate gradients for Hermitian positive definite operators, and what all methods for square systems share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ShapeError
from pullback.solvers.iterate import State, code
from pullback.solvers.precondition import Apply, applied, as_preconditioner, for_derivatives
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Equation, Options, run
from pullback.solvers.scalars import Number, detach, ratio, root, where
from pullback.solvers.status import Solution, Status

_ASYMMETRY = 0.1  # |<A p, r> - <p, A r>| above that share of |A p| |r| is no rounding


class Shifted:
    """v -> (A + damp) v, and the preconditioner ready to be applied."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        damp = problem.number(problem.parts["damp"], "damp")
        self.is_plain = isinstance(damp, float) and damp == 0
        self.damp = problem.x_scalar(damp)
        self.precondition: Apply | None = applied(problem.parts.get("preconditioner"))

    def __call__(self, v: Tensor) -> Tensor:
        """Free to be overwritten."""
        q = self.problem.forward(v)
        return q if self.is_plain else add_scaled(q, self.damp, v, self.problem.own(q))

    def start(self) -> tuple[Tensor, Tensor]:
        """x0 and y - (A + damp) x0, both free to be overwritten."""
        pb = self.problem
        x, r = pb.start()
        if pb.x0 is not None and not self.is_plain:
            r = add_scaled(r, -self.damp, x, pb.own(r))
        return x, r


@dataclass
class _State(State):
    r: Tensor
    p: Tensor
    rz: Number  # <r, P r>


class CG:
    """The recursion of `cg`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.shifted = problem, Shifted(problem)
        self.precondition = self.shifted.precondition

    def init(self) -> _State:
        """x0, r = y - (A + damp) x0, p = P r."""
        pb = self.problem
        x, r = self.shifted.start()
        error = pb.norm(r, pb.n_x)
        if self.precondition is None:
            p, rz = r.clone(), pb.square(r, pb.n_x)
        else:
            p = self.precondition(r)
            rz = pb.dot(r, p, pb.n_x)
        return _State(x, error, pb.norm(pb.y, pb.n_y), {"residual": error}, r=r, p=p, rz=rz)

    def step(self, state: _State) -> None:
        """One application of A, and of the preconditioner if there is one."""
        pb, n = self.problem, self.problem.n_x
        q = self.shifted(state.p)
        curvature = pb.dot(state.p, q, n)
        alpha = ratio(state.rz, curvature, pb.live)
        verdict = self._asymmetric(state, q, curvature) if state.iteration == 1 else 0
        if not pb.live:  # x stays the last good iterate where the method breaks down
            alpha = where(curvature <= 0, 0.0, alpha)
        state.x = add_scaled(state.x, pb.x_scalar(alpha), state.p, pb.own(state.x))
        state.r = add_scaled(state.r, pb.x_scalar(-alpha), q, pb.own(state.r))
        if self.precondition is None:
            z, rz = state.r, pb.square(state.r, n)
            state.error = root(detach(rz))
        else:
            z = self.precondition(state.r)
            rz = pb.dot(state.r, z, n)
            state.error = pb.norm(state.r, n)
        beta = ratio(rz, state.rz, pb.live)
        state.p = add_scaled(z, pb.x_scalar(beta), state.p, pb.own(state.p))
        state.rz = rz
        state.values = {"residual": state.error}
        # The recursive r goes on falling after the true residual has stopped at eps |A| |x| >= eps |y|.
        verdict = where(state.error <= 0.1 * pb.eps * state.scale, code(Status.PRECISION), verdict)
        state.verdict = where((detach(curvature) <= 0) | (detach(rz) < 0), code(Status.BREAKDOWN), verdict)

    def _asymmetric(self, state: _State, q: Tensor, curvature: Number) -> Any:
        """The verdict on <A p, z> = <A p, p>, which holds in the second step if A and P are self-adjoint."""
        pb, n = self.problem, self.problem.n_x
        z = state.r if self.precondition is None else self.precondition(state.r)
        skew = abs(detach(pb.dot(q, z, n) - curvature))
        return where(skew > _ASYMMETRY * pb.norm(q, n) * pb.norm(z, n), code(Status.NOT_SELF_ADJOINT), 0)


def cg(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    preconditioner: Any = None,
    maxiter: int = 100,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Solve (A + damp I) x = y for A Hermitian positive definite, by conjugate gradients.

    Args:
        A: square LinearOperator with dims == dimsd. That it is Hermitian is looked at in one step only.
        y: right-hand side of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        damp: >= 0, added to the diagonal (not squared, as in PyLops); a number or one for each member of the batch.
        preconditioner: Hermitian positive definite LinearOperator (or function) close to the inverse of A + damp, such
            as `JacobiPreconditioner(A, damp)`. Implicit derivatives do not depend on it; their solves use it too.
        maxiter, rtol, atol: stop when |y - (A + damp) x| <= max(rtol |y|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual". A direction with <p, A p> <= 0 gives the status BREAKDOWN, an operator
        that is visibly not self-adjoint NOT_SELF_ADJOINT.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and of the preconditioner an iteration; four vectors.
    Source: Hestenes & Stiefel 1952, doi 10.6028/jres.049.044.
    """
    problem = square_problem("cg", A, y, x0, damp=damp, preconditioner=preconditioner)
    equation = shifted(cg, symmetric=True, preconditioner=problem.parts["preconditioner"])
    return run(problem, CG, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def square_problem(owner: str, A: Any, y: Any, x0: Any, **parts: Any) -> Problem:
    """The problem of a solver for square operators; its preconditioner looked at."""
    problem = Problem(owner, A, y, x0, **parts)
    A = problem.A
    if A.dims != A.dimsd:
        raise ShapeError(f"{owner}: A must be square; got dims {A.dims} and dimsd {A.dimsd}; use cgls or lsqr")
    if "damp" in parts:
        problem.number(parts["damp"], "damp")
    problem.parts["preconditioner"] = as_preconditioner(owner, parts.get("preconditioner"), A.dims)
    return problem


def shifted(solver: Any, *, symmetric: bool, preconditioner: Any = None) -> Equation:
    """The equation (A + damp) x = y, whose derivatives are found by the same solver with the same preconditioner."""

    def residual(p: Problem, x: Tensor) -> Tensor:
        damp = p.parts.get("damp", 0.0)
        v = p.A(x) - p.y
        if isinstance(damp, Tensor) or damp:
            v = v + p.x_scalar(p.number(damp, "damp")) * x
        return v

    return Equation(residual, for_derivatives(solver, preconditioner), symmetric=symmetric)
