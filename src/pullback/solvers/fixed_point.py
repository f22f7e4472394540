"""Fixed points x = T(x), plain and with Anderson acceleration, and modules that are made of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.shapes import as_dims
from pullback.functionals.arithmetic import is_live
from pullback.solvers.descent import start
from pullback.solvers.gmres import gmres
from pullback.solvers.iterate import State, code
from pullback.solvers.nonlinear import Function, expose, is_complex, member_dims, probe, stand_in
from pullback.solvers.problem import Problem, add_scaled, flat
from pullback.solvers.run import Equation, Options, run
from pullback.solvers.scalars import Number, where
from pullback.solvers.status import Solution, Status

_GREW = 100.0  # a residual that much above the last makes a member forget its window (a heuristic)
_PATIENCE = 5  # iterations without progress near rounding


@dataclass
class _State(State):
    f: Tensor  # T(x) - x
    least: Number
    idle: Number
    points: list[Tensor] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)  # T(x) - x of the points
    trust: list[Number] = field(default_factory=list)  # 1, or 0 for members that have forgotten the point


class FixedPoint:
    """The iteration of `fixed_point`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, parts = problem, problem.parts
        self.T, self.relaxation = parts["T"], parts["relaxation"]
        self.memory = parts["memory"] if parts["method"] == "anderson" else 0

    def init(self) -> _State:
        """x0 and T(x0) - x0."""
        pb = self.problem
        x = start(pb)
        f, error, scale = self._residual(x)
        return _State(x, error, scale, {"residual": error}, f=f, least=error, idle=pb.fill(0.0))

    def _residual(self, x: Tensor) -> tuple[Tensor, Number, Number]:
        pb = self.problem
        image = self.T(x)
        f = image - x
        return f, pb.norm(f, pb.n_x), pb.norm(image, pb.n_x)

    def step(self, state: _State) -> None:
        """X <- T(x), or the combination of the last points whose residuals nearly cancel."""
        pb, before = self.problem, state.error
        x = add_scaled(state.x, self.relaxation, state.f, None)
        if self.memory and state.points:
            x = self._mixed(state, x)
        if self.memory:
            state.points.append(state.x)
            state.moves.append(state.f)
            state.trust.append(pb.fill(1.0))
            if len(state.points) > self.memory:
                del state.points[0], state.moves[0], state.trust[0]
        state.x = x
        state.f, state.error, state.scale = self._residual(x)
        state.values = {"residual": state.error}
        if self.memory:
            grew = state.error > _GREW * before
            state.trust = [where(grew, 0.0 * t, t) for t in state.trust]
        better = state.error < 0.9 * state.least
        state.least = where(better, state.error, state.least)
        state.idle = where(better, 0.0 * state.idle, state.idle + 1.0)
        at_end = (state.idle >= _PATIENCE) & (state.error <= 1e3 * pb.eps * state.scale)
        state.verdict = where(at_end | (state.error == 0), code(Status.PRECISION), 0)

    def _mixed(self, state: _State, x: Tensor) -> Tensor:
        """X - sum_j c_j (x_k - x_j + relaxation (f_k - f_j)), c = argmin |f_k - sum_j c_j (f_k - f_j)|."""
        pb, n = self.problem, self.problem.n_x
        changes = [(state.f - f) * pb.x_scalar(t) for f, t in zip(state.moves, state.trust, strict=True)]
        D = torch.stack([flat(d, n) for d in changes], -1)
        with torch.no_grad():  # the scale of a column does not change the combination
            size = torch.linalg.vector_norm(D, dim=-2)
            inverse = torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 0)
        D = D * inverse.unsqueeze(-2)
        ridge = 10 * pb.eps * torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
        c = torch.linalg.solve(D.mT @ D + ridge, D.mT @ flat(state.f, n).unsqueeze(-1)).squeeze(-1) * inverse
        weights = c.tolist() if pb.single else c.unbind(-1)
        for w, point, t, change in zip(weights, state.points, state.trust, changes, strict=True):
            x = x - pb.x_scalar(w) * (pb.x_scalar(t) * (state.x - point) + self.relaxation * change)
        return x


def _residual(p: Problem, x: Tensor) -> Tensor:
    image: Tensor = p.parts["T"](x)
    return x - image


_EQUATION = Equation(_residual, gmres)


def fixed_point(
    T: Any,
    x0: Any,
    *,
    parameters: Any = (),
    dims: Any = None,
    method: str = "anderson",
    memory: int = 5,
    relaxation: float = 1.0,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Solve x = T(x), by x <- T(x) or with Anderson acceleration.

    Args:
        T: a function or nn.Module: T(x, *parameters) has the shape and dtype of x. It must be deterministic.
        x0: where to start, of shape (..., *dims); a tensor, or an array, which gives an array.
        parameters: tensors passed to T after x (data, weights), in which the solution shall be differentiable. Those
            that a module T holds need not be named.
        dims: the shape of one member, on which T acts one like another; leading axes of x0 are the batch. Each member
            stops and is accelerated by itself. All of x0 is one member if None.
        method: "anderson", or "picard" for x <- T(x).
        memory: points that Anderson acceleration combines.
        relaxation: > 0, the share of T(x) - x that a step takes.
        maxiter, rtol, atol: stop when |T(x) - x| <= max(rtol |T(x)|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`. Implicit derivatives solve with I - T'(x) by `gmres`, so x must be
            the only fixed point nearby.

    Returns: Solution with history "residual" |T(x) - x|. If T is no contraction near x, "picard" diverges; then take
        "anderson" or a smaller relaxation.
    Raises: ArgumentError, ShapeError, DtypeError; NotDifferentiableError where T depends on a tensor that requires grad
        and is neither held nor among the parameters.
    Cost: one T an iteration; 2 memory + 3 vectors.
    Source: Anderson 1965, doi 10.1145/321296.321305; Walker & Ni 2011, doi 10.1137/10078356X.
    """
    if method not in ("anderson", "picard"):
        raise ArgumentError(f"fixed_point: method must be 'anderson' or 'picard'; got {method!r}")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ArgumentError(f"fixed_point: memory must be an int >= 1; got {memory!r}")
    if not isinstance(relaxation, (int, float)) or not 0 < relaxation < float("inf"):
        raise ArgumentError(f"fixed_point: relaxation must be a finite number > 0; got {relaxation!r}")
    if not callable(T):
        raise ArgumentError(f"fixed_point: T must be a function of x or an nn.Module; got {type(T).__name__}")
    T = Function("fixed_point", T, parameters)
    dims = member_dims("fixed_point", x0, dims)
    value = probe("fixed_point", T, x0, dims, whole=True)
    if value.shape != x0.shape:
        raise ShapeError(f"fixed_point: T(x) must have the shape of x, {tuple(x0.shape)}; got {tuple(value.shape)}")
    is_real = not is_complex(x0)
    if is_real and value.is_complex():
        raise ArgumentError("fixed_point: T(x) is complex, so x0 must be complex; got a real x0; use x0 + 0j")
    problem = Problem(
        "fixed_point", stand_in(dims, dims, is_real, is_real), x0, x0,
        T=T, method=method, memory=memory, relaxation=float(relaxation),
    )  # fmt: skip
    expose(problem, is_live(value), bool(options.get("unroll")))
    return run(problem, FixedPoint, _EQUATION, maxiter=maxiter, rtol=rtol, atol=atol, **options)


class DeepEquilibrium(torch.nn.Module):
    """x(u) with x = module(x, u): a layer of unlimited depth, in the memory of one.

    Args:
        module: module(x, u) for x of shape (b, *dims) and u of shape (b, ...), a contraction in x.
        dims: shape of x without the batch axis; that of u if None.
        options: of `fixed_point`: method, memory, maxiter, rtol, unroll ...

    Gradients are implicit: none is kept of the iterations. Source: Bai, Kolter & Koltun 2019, arXiv 1909.01377.
    """

    def __init__(self, module: torch.nn.Module, dims: Any = None, **options: Any) -> None:
        super().__init__()
        if not isinstance(module, torch.nn.Module):
            raise ArgumentError(f"DeepEquilibrium: module must be an nn.Module; got {type(module).__name__}")
        self.module, self.options = module, options
        self.dims = None if dims is None else as_dims(dims, "dims", "DeepEquilibrium")

    def solve(self, u: Tensor, x0: Tensor | None = None) -> Solution:
        """The fixed point for each row of u, with its history, from x0 (zero if None)."""
        dims = tuple(u.shape[1:]) if self.dims is None else self.dims
        if x0 is None:
            x0 = torch.zeros((u.shape[0], *dims), dtype=u.dtype, device=u.device)
        return fixed_point(self.module, x0, parameters=(u,), dims=dims, **self.options)

    def forward(self, u: Tensor, x0: Tensor | None = None) -> Tensor:
        """X of shape (b, *dims)."""
        x: Tensor = self.solve(u, x0).x
        return x

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
