"""Conjugate gradients for least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from pullback.solvers.equations import least_squares
from pullback.solvers.iterate import State, code
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, larger, ratio, root, where
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    r: Tensor
    p: Tensor
    gamma: Number  # |s|^2, s = A^H r - damp^2 x
    curvature: Number  # beta / alpha of the step before
    norm2: Number  # a lower bound of |A|^2


class CGLS:
    """The recursion of `cgls`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.damp = problem.number(problem.parts["damp"], "damp")
        self.damp2 = problem.x_scalar(self.damp) ** 2
        self.is_damped = isinstance(self.damp, Tensor) or self.damp != 0

    def _gradient(self, r: Tensor, x: Tensor) -> Tensor:
        s = self.problem.back(r)
        return add_scaled(s, -self.damp2, x, self.problem.own(s)) if self.is_damped else s

    def init(self) -> _State:
        """x0, r = y - A x0, p = s = A^H r - damp^2 x0."""
        pb = self.problem
        x, r = pb.start()
        s = self._gradient(r, x)
        gamma, error, size = pb.square(s, pb.n_x), pb.norm(s, pb.n_x), pb.norm(r, pb.n_y)
        scale = error if pb.x0 is None else pb.norm(pb.back(pb.y), pb.n_x)
        values = {"residual": size, "gradient": error}
        slope = ratio(error, size)
        return _State(x, error, scale, values, r=r, p=s, gamma=gamma, curvature=pb.fill(0.0), norm2=slope * slope)

    def step(self, state: _State) -> None:
        """One application of A and one of A^H."""
        pb = self.problem
        q = pb.forward(state.p)
        delta = pb.square(q, pb.n_y)
        if self.is_damped:
            delta = delta + self.damp * self.damp * pb.square(state.p, pb.n_x)
        alpha = ratio(state.gamma, delta, pb.live)
        state.x = add_scaled(state.x, pb.x_scalar(alpha), state.p, pb.own(state.x))
        state.r = add_scaled(state.r, pb.y_scalar(-alpha), q, pb.own(state.r))
        s = self._gradient(state.r, state.x)
        gamma = pb.square(s, pb.n_x)
        beta = ratio(gamma, state.gamma, pb.live)
        state.p = add_scaled(s, pb.x_scalar(beta), state.p, pb.own(state.p))
        size = pb.norm(state.r, pb.n_y)
        state.error = root(detach(gamma))
        state.values = {"residual": size, "gradient": state.error}
        # The diagonal of the Lanczos matrix of A^H A is at most |A|^2. s = A^H r carries rounding of eps |A| |r|: below
        # that the directions are noise and further steps would blow x up (pylops: 3e28 on an 8 x 5 system).
        inverse = ratio(detach(delta), detach(state.gamma))
        state.norm2 = larger(state.norm2, inverse + state.curvature)
        state.curvature = detach(beta) * inverse
        floor = larger(4 * root(state.norm2) * size, 0.1 * state.scale) * pb.eps
        state.verdict = where(state.error <= floor, code(Status.PRECISION), 0)
        state.gamma = gamma


def cgls(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    maxiter: int = 100,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 + damp^2 |x|^2, by conjugate gradients on the normal equations without forming them.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None. The minimum does not depend on it if it is unique.
        damp: >= 0, squared as in PyLops; a number or one for each member of the batch.
        maxiter, rtol, atol: stop when |A^H (y - A x) - damp^2 x| <= max(rtol |A^H y|, atol), or after maxiter
            iterations. (PyLops' `tol` bounds the square of the left-hand side, absolutely.)
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual" |y - A x| and "gradient" |A^H (y - A x) - damp^2 x|. Where rounding allows
        no progress it stops with the status PRECISION instead of blowing up, so rtol=0 is allowed.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and one of A^H an iteration (one more A^H at the start if x0 is given); five vectors.
    Source: Hestenes & Stiefel 1952, doi 10.6028/jres.049.044; Bjorck 1996, doi 10.1137/1.9781611971484, section 7.4.
    """
    problem = Problem("cgls", A, y, x0, damp=damp)
    problem.number(damp, "damp")
    return run(problem, CGLS, least_squares(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)
