"""ISTA and FISTA: proximal gradient steps, plain and accelerated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.functionals import L1, Functional
from pullback.solvers.composite import as_terms, composite, default_step, direct_term, optimality
from pullback.solvers.iterate import State, code
from pullback.solvers.members import GROWTH
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, larger, where
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    r: Tensor  # A x - y
    z: Tensor  # the extrapolated point, and A z - y
    rz: Tensor
    t: float
    ceiling: Number  # a residual above it is divergence


class ProximalGradient:
    """The recursions of `ista` and `fista`.

    A is applied to x, and A z follows from linearity: so the residual and the objective at x cost no application.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.accelerate = problem, problem.parts["accelerate"]
        g = direct_term(problem)
        assert g is not None
        self.g: Functional = g
        self.length = problem.x_scalar(default_step(problem))

    def init(self) -> _State:
        """Start from x0 and A x0 - y."""
        pb = self.problem
        x, r = pb.start()
        r = torch.neg(r, out=pb.own(r))
        inf = pb.fill(math.inf)
        return _State(x, inf, pb.norm(x, pb.n_x), self._values(x, r), r=r, z=x, rz=r, t=1.0, ceiling=inf)

    def step(self, state: _State) -> None:
        """x_new = prox(z - step A^H (A z - y)); z = x_new + m (x_new - x)."""
        pb = self.problem
        u = pb.back(state.rz)
        u = add_scaled(state.z, -self.length, u, pb.own(u))
        x = self.g._prox_over(u, self.length, pb.n_x)
        r = pb.forward(x)
        r = torch.sub(r, pb.y, out=pb.own(r))
        d = torch.sub(x, state.x, out=pb.own(state.x))
        state.error = pb.norm(d, pb.n_x)
        state.scale = pb.norm(x, pb.n_x)
        if self.accelerate:
            t = (1 + (1 + 4 * state.t**2) ** 0.5) / 2
            momentum = (state.t - 1) / t
            state.t = t
            state.z = torch.add(x, d, alpha=momentum, out=pb.own(d))
            state.rz = torch.lerp(state.r, r, 1 + momentum, out=pb.own(state.r))
        else:
            state.z, state.rz = x, r
        state.x, state.r = x, r
        state.values = self._values(x, r)
        size = state.values["residual"]
        if state.iteration == 0:
            first = GROWTH * larger(size, pb.norm(pb.y, pb.n_y))
            state.ceiling = where(first > 0, first, math.inf)
        state.verdict = where(size > state.ceiling, code(Status.DIVERGED), 0)

    @torch.no_grad()
    def _values(self, x: Tensor, r: Tensor) -> dict[str, Number]:
        pb = self.problem
        size = pb.norm(r, pb.n_y)
        value = self.g._value(x, pb.n_x)
        return {"residual": size, "objective": size * size / 2 + (float(value) if pb.single else value)}


def _run(
    owner: str, A: Any, y: Any, g: Any, eps: Any, x0: Any, step: Any, accelerate: bool, **options: Any
) -> Solution:
    if (g is None) == (eps is None):
        came = "neither" if g is None else "both"
        raise ArgumentError(f"{owner}: give either g, a functional such as 0.1 * pullback.L1(), or eps; got {came}")
    if g is None:
        problem = Problem(owner, A, y, x0, eps=eps)
        g = L1(problem.A.dims) * (0.5 * problem.number(eps, "eps"))
    problem = composite(owner, A, y, x0, as_terms(owner, g, "g"), step=step, accelerate=accelerate)
    direct_term(problem)
    return run(problem, ProximalGradient, optimality(problem), **options)


def ista(
    A: Any,
    y: Any,
    g: Functional | None = None,
    *,
    eps: Any = None,
    x0: Any = None,
    step: Any = None,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + g(x), by x <- prox_{step g}(x - step A^H (A x - y)).

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        g: a functional with a prox, such as `0.1 * L1()`, `Box(0, None)` or `0.1 * TV(dims)`.
        eps: instead of g, PyLops' convention: minimise |A x - y|^2 + eps |x|_1, that is g = eps / 2 L1().
        x0: where to start, of shape (..., *A.dims); zero if None.
        step: at most 1 / |A|^2, a number or one for each member of the batch; 1 / A.norm_bound()^2 if None. The default
            counts as a constant: no gradient flows through it.
        maxiter, rtol, atol: stop when |x_new - x| <= max(rtol |x_new|, atol), or after maxiter iterations. A heuristic:
            a slow iteration meets it before it is near the minimum.
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual" |A x - y| and "objective".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A, one of A^H and one prox an iteration.
    Source: Daubechies, Defrise & De Mol 2004, doi 10.1002/cpa.20042.
    """
    return _run("ista", A, y, g, eps, x0, step, False, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def fista(
    A: Any,
    y: Any,
    g: Functional | None = None,
    *,
    eps: Any = None,
    x0: Any = None,
    step: Any = None,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + g(x), by ISTA's step from an extrapolated point. Arguments and costs as in `ista`.

    Source: Beck & Teboulle 2009, doi 10.1137/080716542.
    """
    return _run("fista", A, y, g, eps, x0, step, True, maxiter=maxiter, rtol=rtol, atol=atol, **options)
