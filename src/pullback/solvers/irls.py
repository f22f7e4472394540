"""Iteratively reweighted least squares for p-norms of the residual, of the model, or of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.functionals.arithmetic import squares, total
from pullback.functionals.linear import pull
from pullback.solvers.cg import cg
from pullback.solvers.composite import as_number
from pullback.solvers.inner import conjugate_gradients
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem
from pullback.solvers.run import Equation, Options, run
from pullback.solvers.scalars import Number
from pullback.solvers.status import Solution

Kind = Literal["data", "model", "datamodel"]


def _weights(v: Tensor, p: float, smoothing: float) -> Tensor:
    """(|v|^2 + smoothing^2)^((p - 2) / 2)."""
    return (squares(v) + smoothing * smoothing) ** ((p - 2) / 2)


@dataclass
class _State(State):
    r: Tensor  # y - A x


class IRLS:
    """The recursion of `irls`: one weighted least-squares problem an iteration."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        parts = problem.parts
        self.kind, self.p, self.smoothing = parts["kind"], parts["p"], parts["smoothing"]
        self.eps = problem.number(parts["eps"], "eps")
        self.damp = problem.number(parts["damp"], "damp")
        self.bound = 0.5 * problem.A.norm_bound() ** 2

    def init(self) -> _State:
        """x0."""
        pb = self.problem
        x, r = pb.start()
        return _State(x, pb.fill(torch.inf), pb.fill(1.0), self._values(x, r), r=r)

    def step(self, state: _State) -> None:
        """(A^H W A + eps U + damp^2) dx = A^H W r - eps U x - damp^2 x, from dx = 0."""
        pb, parts = self.problem, self.problem.parts
        W, ridge = weights(pb, state.x, state.r, self.eps, self.damp)
        right = pull(pb.A, state.r if W is None else W * state.r, state.x) - ridge * state.x

        def apply(v: Tensor) -> Tensor:
            image = pb.A(v)
            return pull(pb.A, image if W is None else W * image, v) + ridge * v

        scale = 1 / (ridge + self.bound) if W is None else None
        d = conjugate_gradients(
            apply, right, pb.n_x, None if scale is None else lambda r: scale * r, parts["inner_maxiter"],
            parts["inner_rtol"],
        )  # fmt: skip
        state.x = state.x + d
        state.r = pb.y - pb.A(state.x)
        state.error, state.scale = pb.norm(d, pb.n_x), pb.norm(state.x, pb.n_x)
        state.values = self._values(state.x, state.r)

    @torch.no_grad()
    def _values(self, x: Tensor, r: Tensor) -> dict[str, Number]:
        pb, p = self.problem, self.p
        residual = pb.norm(r, pb.n_y)
        if self.kind == "model":
            objective = residual * residual / 2
        else:
            objective = as_number(pb, total(squares(r) ** (p / 2), pb.n_y) / p)
        if self.kind != "data":
            objective = objective + self.eps * as_number(pb, total(squares(x) ** (p / 2), pb.n_x) / p)
        size = self.damp * pb.norm(x, pb.n_x)
        return {"residual": residual, "objective": objective + size * size / 2}


def weights(problem: Problem, x: Tensor, r: Tensor, eps: Any, damp: Any) -> tuple[Tensor | None, Any]:
    """Those of the residual (None: 1) and of the model, with the damping."""
    parts = problem.parts
    kind, p, smoothing = parts["kind"], parts["p"], parts["smoothing"]
    ridge: Any = problem.x_scalar(damp) ** 2
    if kind != "data":
        ridge = ridge + problem.x_scalar(eps) * _weights(x, p, smoothing)
    return None if kind == "model" else _weights(r, p, smoothing), ridge


def _gradient(problem: Problem, x: Tensor) -> Tensor:
    r = problem.y - problem.A(x)
    eps, damp = (problem.number(problem.parts[name], name) for name in ("eps", "damp"))
    W, ridge = weights(problem, x, r, eps, damp)
    return ridge * x - pull(problem.A, r if W is None else W * r, x)


def irls(
    A: Any,
    y: Any,
    *,
    kind: Kind = "data",
    p: float = 1.0,
    eps: Any = 1.0,
    damp: Any = 0.0,
    smoothing: float = 1e-4,
    x0: Any = None,
    inner_maxiter: int = 100,
    inner_rtol: float = 1e-3,
    maxiter: int = 100,
    rtol: float = 1e-5,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x - y) + eps R(x) + damp^2 |x|^2 / 2, by weighted least squares with |v|^(p-2) as weights.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        kind: "data": D(r) = sum_i |r_i|^p / p, R = 0 (robust to outliers). "model": D(r) = |r|^2 / 2 and
            R(x) = sum_i |x_i|^p / p (sparse x). "datamodel": both p-norms.
        p: in (0, 2]; below 1 the problem is not convex and the result depends on x0.
        eps: weight of R, >= 0, a number or one for each member of the batch.
        damp: >= 0, squared; a number or one for each member.
        smoothing: |v|^p stands for (|v|^2 + smoothing^2)^(p / 2); in the unit of the residual (and of the model).
        x0: where to start, of shape (..., *A.dims); zero if None.
        inner_maxiter, inner_rtol: of the conjugate gradients for each update.
        maxiter, rtol, atol: stop when |x_new - x| <= max(rtol |x_new|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    PyLops' `irls` has p = 1 for kind "data" and p = 0 for "model".

    Returns: Solution with history "residual" |A x - y| and "objective" (without the smoothing).
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: an iteration has as many applications of A and A^H as the conjugate gradients take steps, and one.
    Source: Scales & Gersztenkorn 1988, doi 10.1088/0266-5611/4/4/010; Daubechies et al. 2010, doi 10.1002/cpa.20303.
    """
    if kind not in ("data", "model", "datamodel"):
        raise ArgumentError(f"irls: kind must be 'data', 'model' or 'datamodel'; got {kind!r}")
    if not (isinstance(p, (int, float)) and 0 < p <= 2):
        raise ArgumentError(f"irls: p must be a number in (0, 2]; got {p!r}")
    if not (isinstance(smoothing, (int, float)) and smoothing > 0):
        raise ArgumentError(f"irls: smoothing must be a number > 0; got {smoothing!r}")
    parts = {"kind": kind, "p": float(p), "smoothing": float(smoothing), "inner_maxiter": inner_maxiter}
    problem = Problem("irls", A, y, x0, eps=eps, damp=damp, inner_rtol=inner_rtol, **parts)
    problem.number(eps, "eps")
    problem.number(damp, "damp")
    equation = Equation(_gradient, cg, symmetric=True)
    return run(problem, IRLS, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)
