"""Truncated SVD and Tikhonov regularization, with the parameter given or chosen from the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, NotDifferentiableError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.solvers.problem import Problem
from pullback.solvers.spectral.choice import METHODS, Choice, choose
from pullback.solvers.spectral.decompose import SVD, as_svd, svd
from pullback.solvers.spectral.filters import direct, filter_factors, filtered, named
from pullback.solvers.spectral.modes import Iterative, check_seminorm, dense_pair, general_modes, svd_modes
from pullback.solvers.spectral.space import SMALL, Flat, as_linear, has_live
from pullback.solvers.status import Solution


def tsvd(A: Any, y: Any, k: int | str, *, noise: Any = None, tau: float = 1.0) -> Solution:
    """Truncated SVD, x = sum_(i <= k) <u_i, y> / s_i v_i: the solution within the first k singular triples.

    Args:
        A: its SVD, or a LinearOperator with at most 1024 rows and columns.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        k: a number, or "discrepancy", "gcv" or "sure": chosen for every member of the batch.
        noise, tau: for those; see `discrepancy`.

    Returns: Solution; `method` says how k was chosen, history has "residual" |A x - y|, "norm" |x| and "k".
    Raises: ArgumentError (k above the numerical rank among others), ShapeError, DtypeError; NotDifferentiableError if k
    is to be chosen from something that requires grad.
    Derivatives: in y; in what A holds through the dense decomposition, where s_k > s_(k+1).
    Cost: a decomposition, k (m + n).
    """
    if k == "lcurve" or (isinstance(k, str) and k not in METHODS):
        raise ArgumentError(f"tsvd: k must be an int, 'discrepancy', 'gcv' or 'sure'; got {k!r}")
    chosen: Choice | None = None
    if not isinstance(k, str) and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
        raise ArgumentError(f"tsvd: k must be an int >= 0, 'discrepancy', 'gcv' or 'sure'; got {k!r}")
    d = as_svd(A, "tsvd")
    if isinstance(k, str):
        chosen = choose(k, _keep(A, d), y, noise=noise, tau=tau, filter="tsvd")
    elif k > d.rank():
        raise ArgumentError(
            f"tsvd: k must be at most the {'numerical rank' if d.rank() < len(d.S) else 'number of triples'} "
            f"{d.rank()}; got {k}; the singular values beyond are rounding errors or missing"
        )
    problem = Problem("tsvd", d.operator(), y)
    count = chosen.parameter if chosen is not None else torch.tensor(k, device=d.S.device)
    text = f"tsvd: {chosen.describe() if chosen is not None else f'k = {k}'}"
    solution = filtered(problem, d, filter_factors(d.S, "tsvd", count), text)
    return named(solution, text, k=_entry(problem, count))


def tikhonov(
    A: Any,
    y: Any,
    alpha: Any,
    *,
    L: Any = None,
    x_ref: Any = None,
    noise: Any = None,
    tau: float = 1.0,
    method: str = "auto",
    rtol: float = 1e-8,
    maxiter: int = 1000,
) -> Solution:
    """argmin_x |A x - y|^2 + alpha^2 |L (x - x_ref)|^2.

    Args:
        A: LinearOperator, or its SVD (whose triples are then all that is used, if L is None).
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        alpha: >= 0, squared; a number, one for each member of the batch, or "discrepancy", "gcv", "lcurve" or "sure":
            chosen for every member of the batch.
        L: LinearOperator on A's input, as `FirstDerivative`, of any order and shape; the identity if None.
        x_ref: where the penalty is zero, shape (..., *A.dims); zero if None.
        noise, tau: for "discrepancy" and "sure"; see there.
        method: "direct" (by a generalised SVD of the dense matrices), "lsqr" (on A stacked on alpha L), or "auto":
            direct if an SVD is given (without L) or no side of A and L exceeds 1024.
        rtol, maxiter: of lsqr.

    Returns: Solution; `method` says what ran and which alpha was chosen how; history has "alpha" beside "residual" and
    "seminorm" |L (x - x_ref)| (direct), or what lsqr returns.
    Raises: ArgumentError, ShapeError, DtypeError; NotDifferentiableError if alpha is to be chosen from something that
    requires grad.
    Derivatives: in y, x_ref, alpha and what A and L hold (direct with A or L differentiated: through QR of the stacked
    matrices, which needs alpha > 0).
    Cost: direct: a decomposition, O((m + p) n^2); lsqr: an application of A and L and of their adjoints an iteration.
    Source: A. Tikhonov 1963, Soviet Math. Dokl. 4, 1035; D. Phillips 1962, doi 10.1145/321105.321114.
    """
    if method not in ("auto", "direct", "lsqr"):
        raise ArgumentError(f"tikhonov: method must be 'auto', 'direct' or 'lsqr'; got {method!r}")
    if isinstance(alpha, str) and alpha not in METHODS:
        raise ArgumentError(f"tikhonov: alpha must be a number or one of {', '.join(METHODS)}; got {alpha!r}")
    given = A if isinstance(A, SVD) else None
    op = A.operator() if given and L is None else given.A if given else as_linear(A, "tikhonov")
    seminorm = None if L is None else as_linear(L, "tikhonov", "L")
    if seminorm is not None:
        check_seminorm(op, seminorm)
    problem = Problem("tikhonov", op, y)
    base = None if x_ref is None else _reference(problem, x_ref)
    if base is not None:
        problem = Problem("tikhonov", op, problem.y - op(base))
    largest = max(*op.shape, *(seminorm.shape if seminorm is not None else ()))
    small = largest <= SMALL or (given is not None and L is None)
    if method == "direct" and not small and largest > 8 * SMALL:
        raise ArgumentError(
            f"tikhonov: method 'direct' needs matrices of at most {8 * SMALL} rows and columns; got {largest}; "
            f"use 'lsqr'"
        )
    is_direct = method == "direct" or (method == "auto" and small)
    if method == "lsqr" and given is not None:
        raise ArgumentError("tikhonov: method 'lsqr' needs the operator; got an SVD; pass svd.A")
    chosen: Choice | None = None
    if isinstance(alpha, str):
        _refuse_live(alpha, y, x_ref, op, seminorm)
        options = {} if is_direct else {"rtol": max(rtol, 1e-6), "maxiter": maxiter}
        chosen = choose(alpha, given or op, problem.y, noise=noise, tau=tau, L=L, **options)
        weight: Any = chosen.parameter
    else:
        weight = problem.number(alpha, "alpha")
    how = "direct" if is_direct else "lsqr"
    text = f"tikhonov ({how}): {chosen.describe() if chosen is not None else _text(weight)}"
    weight = torch.as_tensor(weight, dtype=problem.y.dtype.to_real(), device=problem.y.device)
    if not is_direct:
        solution = Iterative(problem, seminorm, rtol, maxiter).solve(weight, problem.y)
        x = solution.x if base is None else solution.x + base
        return _as_came(named(solution, text, alpha=weight.detach().expand(problem.batch)[None]), x, y, op)
    if has_live(op) or (seminorm is not None and has_live(seminorm)):
        x, values = _stacked(problem, seminorm, weight)
    else:
        if seminorm is None:
            modes = svd_modes(problem, given or svd(op, method="dense"))
        else:
            modes = general_modes(problem, op, seminorm)
        x = modes.solution(weight)
        with torch.no_grad():
            point = modes.evaluate(weight)
        values = {"residual": point.residual, "seminorm": point.seminorm}
    x = x if base is None else x + base
    solution = direct(problem, x, values | {"alpha": weight}, text)
    return _as_came(solution, x, y, op)


def _text(weight: Any) -> str:
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    if isinstance(weight, Tensor) and weight.numel() > 1:
        return f"alpha = {float(weight.min()):.4g} ... {float(weight.max()):.4g}"
    return f"alpha = {float(weight):.4g}"


def _keep(A: Any, d: SVD) -> Any:
    return A if has_live(d.A) and not isinstance(A, SVD) else d


def _entry(problem: Problem, value: Tensor) -> Any:
    entry = value.detach().expand(problem.batch)[None]
    return entry.cpu().numpy() if problem.is_numpy else entry


def _as_came(solution: Solution, x: Tensor, y: Any, op: LinearOperator) -> Solution:
    """The solution in the form in which y came: the problem may have been solved for other data."""
    came = Problem("tikhonov", op, y)
    entries = solution.history
    if came.is_numpy:
        entries = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in entries.items()}
    return replace(solution, x=came.finish(x), history=entries)


def _reference(problem: Problem, x_ref: Any) -> Tensor:
    dims = problem.A.dims
    base = torch.from_numpy(x_ref) if isinstance(x_ref, np.ndarray) else x_ref
    if not isinstance(base, Tensor) or tuple(base.shape[base.ndim - len(dims) :]) != dims:
        got = tuple(base.shape) if isinstance(base, Tensor) else type(x_ref).__name__
        raise ShapeError(f"tikhonov: x_ref must have shape (..., {', '.join(map(str, dims))}), A's input; got {got}")
    batch = tuple(base.shape[: base.ndim - len(dims)])
    if tuple(torch.broadcast_shapes(batch, problem.batch)) != problem.batch:
        raise ShapeError(f"tikhonov: the batch axes of x_ref {batch} must fit in those of y {problem.batch}")
    return base.to(problem.y.device)


def _refuse_live(alpha: str, y: Any, x_ref: Any, op: LinearOperator, L: LinearOperator | None) -> None:
    tensors = [t for t in (y, x_ref) if isinstance(t, Tensor)]
    live = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if live or has_live(op) or (L is not None and has_live(L)):
        raise NotDifferentiableError(
            f"tikhonov: the derivative of alpha chosen by {alpha!r} is not computed; choose it first under "
            f"torch.no_grad(), as in alpha = {alpha}(...).parameter, then pass the number"
        )


def _stacked(problem: Problem, L: LinearOperator | None, alpha: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The solution x = R^-1 Q^H (y; 0) for (A; alpha L) = Q R, differentiable in A and L."""
    if not bool((alpha.detach() > 0).all()):
        raise ArgumentError("tikhonov: alpha must be > 0 where A is differentiated; for alpha = 0 use pinv(A)(y)")
    y = problem.y
    if L is None:
        flat = Flat(problem.A, None, y.device)
        a = flat.matrix()
        ell = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    else:
        flat, a, ell = dense_pair(problem.A, L, y)
    dtype = a.dtype if flat.real else torch.promote_types(a.dtype, y.dtype)
    a, ell = a.to(dtype), ell.to(dtype)
    data = torch.view_as_real(y.resolve_conj()).flatten(-2) if flat.real and y.is_complex() else y
    data = data.reshape(*problem.batch, flat.m).to(dtype)
    weight = alpha.to(dtype.to_real())[..., None, None]
    stack = torch.cat((a.expand(*alpha.shape, *a.shape), weight * ell), -2)
    q, r = torch.linalg.qr(stack)
    rhs = q[..., : flat.m, :].mH @ data[..., None]
    x = torch.linalg.solve_triangular(r, rhs, upper=True)[..., 0]
    with torch.no_grad():
        residual = torch.linalg.vector_norm(x @ a.mT - data, dim=-1)
        seminorm = torch.linalg.vector_norm(x @ ell.mT, dim=-1)
    members = flat.vectors(x.reshape(-1, flat.n)) if flat.real else x
    return members.reshape(*problem.batch, *problem.A.dims), {"residual": residual, "seminorm": seminorm}
