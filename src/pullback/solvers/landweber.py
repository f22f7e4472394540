"""Landweber's iteration: gradient descent on the squared residual, with a projection on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.functionals import Functional
from pullback.solvers.composite import composite, default_step, direct_term, optimality
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.status import Solution


@dataclass
class _State(State):
    r: Tensor


class Landweber:
    """The recursion of `landweber`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.projection = problem, direct_term(problem, "projection")
        self.member_length = default_step(problem)
        self.length = problem.x_scalar(self.member_length)

    def init(self) -> _State:
        """Start from x0 and y - A x0."""
        pb = self.problem
        x, r = pb.start()
        size = pb.norm(r, pb.n_y)
        scale = pb.norm(pb.back(pb.y), pb.n_x)
        # Not yet known; anything finite above the tolerance, and zero where y = 0.
        error = scale if pb.x0 is None else scale + pb.norm(x, pb.n_x)
        return _State(x, error, scale, {"residual": size}, r=r)

    def step(self, state: _State) -> None:
        """One gradient step, projected."""
        pb = self.problem
        g = pb.back(state.r)
        if self.projection is None:
            state.error = pb.norm(g, pb.n_x)
            state.x = add_scaled(state.x, self.length, g, pb.own(state.x))
        else:
            u = add_scaled(state.x, self.length, g, pb.own(g))
            x = self.projection._prox_over(u, self.length, pb.n_x)
            with pb.quiet:
                d = torch.sub(x, state.x, out=pb.own(state.x))
                state.error = pb.norm(d, pb.n_x) / self.member_length
            state.x = x
        r = pb.forward(state.x)
        state.r = torch.sub(pb.y, r, out=pb.own(r))
        state.values = {"residual": pb.norm(state.r, pb.n_y)}


def landweber(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    step: Any = None,
    projection: Functional | None = None,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Iterate x <- P(x + step A^H (y - A x)): argmin_x |A x - y|^2 / 2 over the set on which P projects.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        step: in (0, 2 / |A|^2), a number or one for each member of the batch; 1 / A.norm_bound()^2 if None.
        projection: a functional whose prox is the projection, such as `Box(0, None)`.
        maxiter, rtol, atol: stop when |x_new - x| / step (without projection: |A^H (y - A x)|) is at most
            max(rtol |A^H y|, atol), or after maxiter iterations. Few iterations regularise.
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and one of A^H an iteration.
    Source: Landweber 1951, doi 10.2307/2372313.
    """
    terms = [] if projection is None else [projection]
    problem = composite("landweber", A, y, x0, terms, step=step)
    return run(problem, Landweber, optimality(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)
