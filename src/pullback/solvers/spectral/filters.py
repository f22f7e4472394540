"""Filtered spectral solutions x = sum_i f_i <u_i, y> / s_i v_i, and what they cost in bias and variance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.interop import is_scalar
from pullback.solvers.problem import Problem
from pullback.solvers.spectral.decompose import SVD, as_svd, safe_inverse
from pullback.solvers.spectral.lowrank import coefficients, combine
from pullback.solvers.spectral.numbers import as_factors, noise_share
from pullback.solvers.status import Solution, Status


def filter_factors(S: Tensor, method: str, parameter: Any) -> Tensor:
    """f_i of a filter: how much of the component i of the solution is kept.

    Args:
        S: singular values s_1 >= s_2 ..., shape (k,).
        method: "tikhonov": s^2 / (s^2 + alpha^2), parameter alpha >= 0;
            "tsvd": 1 for the first `parameter` values, 0 beyond;
            "landweber": 1 - (1 - (s / s_1)^2)^N, parameter N: what N steps of `landweber` with step 1 / s_1^2 do.
        parameter: a number, or a tensor of shape (...) for several at once.

    Returns: tensor of shape (..., k), differentiable in S and alpha. Raises: ArgumentError.
    """
    if method not in ("tikhonov", "tsvd", "landweber"):
        raise ArgumentError(f"filter_factors: method must be 'tikhonov', 'tsvd' or 'landweber'; got {method!r}")
    p = parameter if isinstance(parameter, Tensor) else torch.tensor(parameter, dtype=torch.float64)
    p = p.to(S.device)
    if p.is_complex() or bool((p.detach() < 0).any()):
        raise ArgumentError(f"filter_factors: parameter must be >= 0; got {parameter!r}")
    p = p[..., None]
    if method == "tsvd":
        return (torch.arange(len(S), device=S.device) < p).to(S.dtype)
    if method == "tikhonov":
        squares, total = S**2, S**2 + p.to(S.dtype) ** 2
        return torch.where(total > 0, squares / torch.where(total > 0, total, 1), 0)
    return 1 - (1 - (S / S[0].clamp(min=torch.finfo(S.dtype).tiny)) ** 2) ** p


def spectral_filter(svd: SVD, y: Any, factors: Tensor) -> Solution:
    """A filtered solution, x = sum_i f_i <u_i, y> / s_i v_i.

    Args:
        svd: of the operator.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        factors: f_i, shape (k,), or (*batch, k).

    Returns: Solution with history "residual", |A x - y|, and "norm", |x|, of shape (1, *batch).
    Raises: ShapeError, DtypeError, ArgumentError. Cost: k (m + n).
    """
    problem = Problem("spectral_filter", svd.operator(), y)
    return filtered(problem, svd, as_factors(factors, svd, "spectral_filter"), "spectral_filter")


def filtered(problem: Problem, svd: SVD, factors: Tensor, method: str) -> Solution:
    """The filtered solution of a problem whose data have been checked."""
    beta, distance2 = project(problem, svd)
    c = beta * (factors * safe_inverse(svd.S, 0.0)).to(beta.dtype.to_real())
    x = combine(c, cast(svd.V, problem.y))
    with torch.no_grad():
        residual = (distance2 + ((1 - factors) ** 2 * beta.abs() ** 2).sum(-1)).sqrt()
        size = torch.linalg.vector_norm(c, dim=-1)
    return direct(problem, x, {"residual": residual, "norm": size}, method)


def direct(problem: Problem, x: Tensor, values: dict[str, Tensor], method: str) -> Solution:
    """What a method without iterations returns."""
    bad = ~torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).flatten(len(problem.batch)).all(-1)
    statuses = tuple(Status.DIVERGED if b else Status.CONVERGED for b in bad.flatten().tolist())
    history: dict[str, Any] = {k: v.detach().expand(problem.batch)[None] for k, v in values.items()}
    if problem.is_numpy:
        history = {k: v.cpu().numpy() for k, v in history.items()}
    worst = Status.DIVERGED if Status.DIVERGED in statuses else Status.CONVERGED
    counts = torch.zeros(problem.batch, dtype=torch.int64, device=x.device)
    return Solution(problem.finish(x), worst, 0, history, method, statuses, counts)


def project(problem: Problem, svd: SVD) -> tuple[Tensor, Tensor]:
    """<u_i, y> and the square of the distance of y to the span of the u_i."""
    U, y = cast(svd.U, problem.y), problem.y
    beta = coefficients(U, y, svd.real)
    with torch.no_grad():
        rest = y - combine(beta, U)
        distance = torch.linalg.vector_norm(rest.flatten(-problem.n_y), dim=-1)
    return beta, distance**2


def cast(t: Tensor, y: Tensor) -> Tensor:
    """A tensor of the decomposition in the precision and on the device of y; complex stays complex."""
    dtype = y.dtype.to_complex() if t.is_complex() else y.dtype.to_real()
    return t.to(device=y.device, dtype=dtype)


def named(solution: Solution, method: str, **history: Any) -> Solution:
    """The solution with a text that says what ran, and more history."""
    return replace(solution, method=method, history=solution.history | history)


@dataclass(frozen=True, eq=False)
class BiasVariance:
    """E |x - x_true|^2 = bias2 + variance.

    Attributes:
        bias2: |E x - x_true|^2, of the shape of the batch.
        variance: E |x - E x|^2, of the shape of the batch (of that of the factors, if they have more axes).
    """

    bias2: Tensor
    variance: Tensor

    @property
    def total(self) -> Tensor:
        """The expected squared error."""
        return self.bias2 + self.variance


def bias_variance(svd: Any, x_true: Any, sigma: Any, factors: Tensor) -> BiasVariance:
    """E |x - x_true|^2 = |x_rest|^2 + sum_i (1 - f_i)^2 |<v_i, x_true>|^2  +  sigma^2 sum_i f_i^2 / s_i^2.

    For y = A x_true + e with white noise e of variance sigma^2 and x = sum_i f_i <u_i, y> / s_i v_i; x_rest is the part
    of x_true outside the span of the v_i.

    Args:
        svd: SVD, or a LinearOperator with at most 1024 rows and columns.
        x_true: tensor or array of shape (..., *A.dims).
        sigma: standard deviation of the noise; of complex noise sqrt(E |e|^2).
        factors: f_i, shape (..., k): leading axes broadcast against the batch of x_true, so that (p, k) gives a curve.

    Returns: BiasVariance of tensors. Raises: ShapeError, DtypeError, ArgumentError.
    """
    d = as_svd(svd, "bias_variance")
    f = as_factors(factors, d, "bias_variance")
    if not is_scalar(sigma) or not float(sigma) >= 0 or math.isinf(float(sigma)):
        raise ArgumentError(f"bias_variance: sigma must be a finite number >= 0; got {sigma!r}")
    x = torch.from_numpy(x_true) if isinstance(x_true, np.ndarray) else x_true
    problem = Problem("bias_variance", d.operator().H, x)
    V = cast(d.V, problem.y)
    c = coefficients(V, problem.y, d.real)
    rest = torch.linalg.vector_norm((problem.y - combine(c, V)).flatten(-problem.n_y), dim=-1) ** 2
    kept = f * safe_inverse(d.S, 0.0)
    missing = torch.where(d.S > 0, 1 - f, 1)
    variance = sigma**2 * noise_share(d) * (kept**2).sum(-1)
    return BiasVariance(rest + (missing**2 * c.abs() ** 2).sum(-1), variance)
