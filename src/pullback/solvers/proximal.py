"""ISTA and FISTA: proximal gradient steps, plain and accelerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.functionals import L1, Functional
from pullback.solvers.iterate import GROWTH, Callback, Progress, State, code, iterate
from pullback.solvers.problem import Problem, add_scaled, norm
from pullback.solvers.status import Solution, Status


@dataclass
class _State(State):
    r: Tensor  # A x - y
    z: Tensor  # the extrapolated point, and A z - y
    rz: Tensor
    t: float
    ceiling: Tensor  # a residual above it is divergence


class ProximalGradient:
    """The recursions of `ista` and `fista`.

    A is applied to x, and A z follows from linearity: so the residual and the objective at x cost no application.
    """

    def __init__(self, problem: Problem, g: Functional, step: Any, accelerate: bool) -> None:
        self.problem, self.g, self.accelerate = problem, g, accelerate
        self.length = problem.x_scalar(step)

    def init(self) -> _State:
        """Start from x0 and A x0 - y."""
        pb = self.problem
        x, r = pb.start()
        r = torch.neg(r, out=pb.own(r))
        scale = norm(x, pb.n_x)
        inf = torch.full_like(scale, torch.inf)
        return _State(x, inf, scale, self._values(x, r), r=r, z=x, rz=r, t=1.0, ceiling=inf)

    def step(self, state: _State) -> None:
        """x_new = prox(z - step A^H (A z - y)); z = x_new + m (x_new - x)."""
        pb = self.problem
        u = pb.back(state.rz)
        u = add_scaled(state.z, -self.length, u, pb.own(u))
        x = self.g._prox_over(u, self.length, pb.n_x)
        r = pb.A(x)
        r = torch.sub(r, pb.y, out=pb.own(r))
        d = torch.sub(x, state.x, out=pb.own(state.x))
        state.error = norm(d, pb.n_x)
        state.scale = norm(x, pb.n_x)
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
            first = GROWTH * torch.maximum(size, norm(pb.y, pb.n_y))
            state.ceiling = torch.where(first > 0, first, torch.inf)
        state.verdict = torch.where(size > state.ceiling, code(Status.DIVERGED), 0)

    @torch.no_grad()
    def _values(self, x: Tensor, r: Tensor) -> dict[str, Tensor]:
        pb = self.problem
        size = norm(r, pb.n_y)
        return {"residual": size, "objective": size**2 / 2 + self.g._value(x, pb.n_x)}


def default_step(problem: Problem, step: Any) -> Any:
    """The step that was given, or 1 / norm_bound^2, which is at most 1 / |A|^2."""
    if step is not None:
        return problem.number(step, "step", positive=True)
    bound = problem.A.norm_bound()
    return 1 / bound**2 if bound > 0 else 1.0


def require_prox(problem: Problem, g: Any, name: str) -> None:
    """Raise unless g is a functional on A's input whose prox can be computed."""
    owner, dims = problem.owner, problem.A.dims
    if not isinstance(g, Functional):
        raise ArgumentError(f"{owner}: {name} must be a functional such as 0.1 * pullback.L1(); got {type(g).__name__}")
    if g.dims is not None and g.dims != dims:
        raise ShapeError(f"{owner}: {name} acts on dims {g.dims}, but A's input has dims {dims}")
    if not g.has_prox:
        raise ArgumentError(f"{owner}: {name} = {g!r} has no prox; use pullback.pdhg or pullback.solve")


def _run(
    owner: str, A: Any, y: Any, g: Any, eps: Any, x0: Any, step: Any, accelerate: bool, **options: Any
) -> Solution:
    problem = Problem(owner, A, y, x0, (g, eps, step))
    if (g is None) == (eps is None):
        came = "neither" if g is None else "both"
        raise ArgumentError(f"{owner}: give either g, a functional such as 0.1 * pullback.L1(), or eps; got {came}")
    if g is None:
        g = L1(problem.A.dims) * (0.5 * problem.number(eps, "eps"))
    require_prox(problem, g, "g")
    return iterate(ProximalGradient(problem, g, default_step(problem, step), accelerate), **options)


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
    callback: Callback | None = None,
    progress: Progress = False,
    throw: bool = False,
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
        callback, progress, throw: see `pullback.solvers.iterate.iterate`.

    Returns: Solution with history "residual" |A x - y| and "objective".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A, one of A^H and one prox an iteration.
    Source: Daubechies, Defrise & De Mol 2004, doi 10.1002/cpa.20042.
    """
    return _run(
        "ista", A, y, g, eps, x0, step, False,
        maxiter=maxiter, rtol=rtol, atol=atol, callback=callback, progress=progress, throw=throw,
    )  # fmt: skip


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
    callback: Callback | None = None,
    progress: Progress = False,
    throw: bool = False,
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + g(x), by ISTA's step from an extrapolated point. Arguments and costs as in `ista`.

    Source: Beck & Teboulle 2009, doi 10.1137/080716542.
    """
    return _run(
        "fista", A, y, g, eps, x0, step, True,
        maxiter=maxiter, rtol=rtol, atol=atol, callback=callback, progress=progress, throw=throw,
    )  # fmt: skip
