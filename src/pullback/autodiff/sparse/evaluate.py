"""Sparse Jacobians and Hessians: as many products as there are colours, whatever n is.

Columns (or rows) of the pattern that share no row (column) are multiplied together, and every entry is read from the
products. See `colouring.py` for the groups, `trace.py` and `probe.py` for the pattern.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pullback.autodiff.sparse.pattern import check_input, check_output, gradient_of, sparsity_pattern
from pullback.autodiff.sparse.plan import SparsePlan
from pullback.core.errors import ArgumentError, NotDifferentiableError, ShapeError
from pullback.core.linearize import Unchanged, forward_mode, uses_others

Function = Callable[[Tensor], Tensor]
_BATCH = 1 << 24  # numbers in the tangents of one batched product
_LOOP = 3  # up to so many products one by one are not slower than a batch of them


def sparse_jacobian(
    f: Function, x: Tensor, pattern: Any = None, *, mode: str | None = None, check: bool = True
) -> Tensor:
    """J[i, j] = df_i / dx_j as a sparse CSR tensor, from one product for each colour of its pattern.

    Args:
        f: maps a real tensor of any shape (n numbers) to one tensor (m numbers); or a LinearOperator.
        x: where; J does not depend on its shape, only on the order of its numbers.
        pattern: None: found by running f once (see `sparsity_pattern`, which says when that can fail); or a Boolean
            (m, n) matrix, a sparse tensor, a SciPy sparse matrix, a LinearOperator (its own pattern), a
            SparsityPattern; or a `SparsePlan`, which costs nothing more.
        mode: "forward" (JVPs), "reverse" (VJPs), or None: whichever takes fewer products, and reverse if an operation
            of f has no forward derivative. A SparsePlan has its mode.
        check: compare one random product with the true one, of the other mode where there is one, and raise if they
            differ.

    Returns: a CSR tensor (m, n). If x, or a tensor that f uses, requires grad, its values carry the graph.

    Raises: NotDifferentiableError if the pattern misses entries, or if f(x) is cut off from x. ShapeError, DtypeError,
        ArgumentError for input that does not fit.

    Cost: without a plan one traced run of f and the colouring; then n_colours products, and one more if `check`. For
        many x keep the plan: plan = SparsePlan.jacobian(sparsity_pattern(f, x)); sparse_jacobian(f, x2, plan).

    Source: Curtis, Powell, Reid 1974, doi:10.1093/imamat/13.1.117.
    """
    check_input(f, x, "sparse_jacobian")
    x = x if x.requires_grad else x.detach().clone()
    with Unchanged("sparse_jacobian", (x,)):
        return _jacobian(f, x, pattern, mode, check)


def _jacobian(f: Function, x: Tensor, pattern: Any, mode: str | None, check: bool) -> Tensor:
    if isinstance(pattern, SparsePlan):
        if pattern.mode == "symmetric":
            raise ArgumentError("sparse_jacobian: the plan is for a Hessian; make one with SparsePlan.jacobian")
        if mode not in (None, pattern.mode):
            raise ArgumentError(f'sparse_jacobian: the plan has mode "{pattern.mode}"; got mode={mode!r}')
        plan = pattern
    else:
        plan = SparsePlan.jacobian(sparsity_pattern(f, x) if pattern is None else pattern, mode)
    if plan.shape[1] != x.numel():
        raise ShapeError(f"pattern: expected {x.numel()} columns, one for each number of x; got shape {plan.shape}")
    if plan.mode == "forward":
        try:
            return _by_columns(plan, f, x, check)
        except NotImplementedError:
            if mode == "forward":
                raise
            plan = SparsePlan.jacobian(plan.pattern, "reverse")
    return _by_rows(plan, f, x, check)


def sparse_hessian(f: Function, x: Tensor, pattern: Any = None, *, check: bool = True) -> Tensor:
    """H[i, j] = d^2 f / dx_i dx_j as a sparse CSR tensor, from one Hessian product for each colour.

    Entries are read from either triangle (star colouring): an arrow takes two products, where columns would take n.

    Args:
        f: maps a real tensor of any shape (n numbers) to one number.
        x: where.
        pattern: as in `sparse_jacobian`, (n, n); the other triangle is added.
        check: compare one random product with the true one, and raise if they differ.

    Returns: a CSR tensor (n, n); its values carry the graph if x, or a tensor that f uses, requires grad.

    Raises: as `sparse_jacobian`.

    Cost: n_colours products with the Hessian (a gradient of the gradient), and one more if `check`.

    Source: Coleman and More 1984, doi:10.1007/BF02612334; Gebremedhin et al. 2005, doi:10.1137/S0036144504444711.
    """
    check_input(f, x, "sparse_hessian")
    x = x if x.requires_grad else x.detach().clone()
    with Unchanged("sparse_hessian", (x,)):
        return _hessian(f, x, pattern, check)


def _hessian(f: Function, x: Tensor, pattern: Any, check: bool) -> Tensor:
    if isinstance(pattern, SparsePlan):
        if pattern.mode != "symmetric":
            raise ArgumentError("sparse_hessian: the plan is for a Jacobian; make one with SparsePlan.hessian")
        plan = pattern
    else:
        plan = SparsePlan.hessian(sparsity_pattern(f, x, hessian=True) if pattern is None else pattern)
    if plan.shape[1] != x.numel():
        raise ShapeError(f"pattern: expected {x.numel()} columns, one for each number of x; got shape {plan.shape}")
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        g = gradient_of(f, leaf, True)
    return _from_rows(plan, g, x, leaf, check, lambda: _natural(f, x, 2))


def _by_columns(plan: SparsePlan, f: Function, x: Tensor, check: bool) -> Tensor:
    m = plan.shape[0]
    jacobian = plan.read(_push(f, x, plan.seeds(x), m))
    if check:
        _check_columns(plan, f, x.detach(), jacobian)
    return jacobian


def _check_columns(plan: SparsePlan, f: Function, x: Tensor, jacobian: Tensor) -> None:
    """Compare with a product of the other mode, which also finds operations with a wrong forward derivative."""
    with torch.enable_grad():
        leaf = x.requires_grad_()
        y = f(leaf)
    other = y.requires_grad and not y.is_complex()
    if other:
        w = torch.randn_like(y)
        true = _pull(y, leaf, w[None], False)[0]
        gap = _gap(plan, jacobian, w, true, True, lambda: _natural(f, x, 1))
        if gap is None:
            return
    v = torch.randn_like(x)
    with torch.no_grad():
        true = _push(f, x.detach(), v[None], plan.shape[0])[0]
    _raise(plan, _gap(plan, jacobian, v, true, False, lambda: _natural(f, x, 1)))
    if other:
        raise NotDifferentiableError(
            "sparse_jacobian: the forward and the reverse derivative of f disagree, so an operation of f has a wrong "
            'one (some of torch have a silent zero forward derivative): use mode="reverse", and find it with '
            "check_gradient(f, x)"
        )


def _push(f: Function, x: Tensor, seeds: Tensor, m: int) -> Tensor:
    """(k, m): J times every seed, by dual numbers."""

    def one(seed: Tensor) -> Tensor:
        with forward_mode(), forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, seed))
            check_output(y, m)
            value, tangent = forward_ad.unpack_dual(y)
        return (torch.zeros_like(value) if tangent is None else tangent).reshape(-1)

    def batched(seed: Tensor) -> Tensor:
        y, tangent = torch.func.jvp(f, (x,), (seed,))[:2]
        check_output(y, m)
        return tangent.reshape(-1)

    if not len(seeds):
        return x.new_zeros(0, m)
    if len(seeds) > _LOOP:
        chunk = max(1, _BATCH // max(m, x.numel(), 1))
        with contextlib.suppress(RuntimeError), forward_mode():  # what cannot be batched can be done one by one
            return torch.cat([torch.func.vmap(batched)(part) for part in seeds.split(chunk)])
    return torch.stack([one(s) for s in seeds])


def _by_rows(plan: SparsePlan, f: Function, x: Tensor, check: bool) -> Tensor:
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        y = f(leaf)
    check_output(y, plan.shape[0])
    if y.is_complex():
        raise NotDifferentiableError(
            'sparse_jacobian: a complex f(x) has no rows over real x; use mode="forward", or return torch.view_as_real'
        )
    if not y.requires_grad and plan.pattern.nnz:
        raise NotDifferentiableError(
            "f(x) does not require grad although x does: was it computed under no_grad, detached, or without x?"
        )
    return _from_rows(plan, y, x, leaf, check, lambda: _natural(f, x, 1))


def _from_rows(
    plan: SparsePlan, y: Tensor, x: Tensor, leaf: Tensor, check: bool, natural: Callable[[], float]
) -> Tensor:
    # A graph for further derivatives is built only where somebody can ask for them.
    keep = torch.is_grad_enabled() and (x.requires_grad or uses_others(y, leaf))
    matrix = plan.read(_pull(y, leaf, plan.seeds(y), keep))
    if check:
        v = torch.randn_like(y)
        _raise(plan, _gap(plan, matrix, v, _pull(y, leaf, v[None], False)[0], True, natural))
    return matrix if keep else matrix.detach()


def _pull(y: Tensor, x: Tensor, seeds: Tensor, keep: bool) -> Tensor:
    """(k, n): every seed times dy/dx."""
    if not len(seeds) or not y.requires_grad:
        return x.new_zeros(len(seeds), x.numel())

    def back(seed: Tensor, batched: bool) -> Tensor:
        return torch.autograd.grad(
            y, x, seed, retain_graph=True, create_graph=keep, materialize_grads=True, is_grads_batched=batched
        )[0]

    chunk = max(1, _BATCH // max(y.numel(), x.numel(), 1))
    if len(seeds) > _LOOP:
        with contextlib.suppress(RuntimeError):  # an operation that cannot be batched
            return torch.cat([back(part, True) for part in seeds.split(chunk)]).reshape(len(seeds), -1)
    return torch.stack([back(s, False) for s in seeds]).reshape(len(seeds), -1)


def _natural(f: Function, x: Tensor, order: int) -> float:
    """The size that derivatives of f at x have if nothing cancels: |f| / |x|^order."""
    with torch.no_grad():
        y = f(x.detach()).abs().nan_to_num(0.0, 0.0, 0.0)
    size = float(x.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax()) if x.numel() else 0.0
    return (float(y.amax()) if y.numel() else 0.0) / (size or 1.0) ** order


def _gap(
    plan: SparsePlan, matrix: Tensor, v: Tensor, true: Tensor, by_rows: bool, natural: Callable[[], float]
) -> str | None:
    """Where the product of the entries found with v (A v, or v A) differs from the true one, in words."""
    rows, columns = torch.from_numpy(plan.pattern.sets.rows), torch.from_numpy(plan.pattern.sets.columns)
    if by_rows:
        rows, columns = columns, rows
    rows, columns = rows.to(v.device), columns.to(v.device)
    terms = matrix.detach().values() * v.reshape(-1)[columns]
    got = torch.zeros_like(true).index_add_(0, rows, terms.to(true.dtype))
    scale = torch.zeros_like(true.abs()).index_add_(0, rows, terms.abs().to(true.abs().dtype))
    scale = scale + true.abs()
    # Rounding of f itself is relative to the largest numbers that it handles.
    eps = torch.finfo(true.dtype).eps
    slack = eps**0.5 * scale + 64 * eps * scale.nan_to_num(0.0, 0.0, 0.0).sum()
    wrong = ~((got - true).abs() <= slack) & ~(got.isnan() & true.isnan()) & (got != true)
    if wrong.any():  # or all of it is rounding, as in the derivative of a constant
        wrong &= ~((got - true).abs() <= 256 * eps * natural())
    if not wrong.any():
        return None
    i = int(wrong.nonzero()[0])
    kind = "column" if by_rows else "row"
    return f"{kind} {i} times a random vector is {true[i].item():.6g}, but {got[i].item():.6g} by the entries found"


def _raise(plan: SparsePlan, gap: str | None) -> None:
    if gap is None:
        return
    branches = ", ".join(plan.pattern.branches)
    again = f"f reads numbers computed from x ({branches}): find the pattern at this x, or " if branches else ""
    raise NotDifferentiableError(
        f"the sparsity pattern {plan.pattern!r} lacks entries: {gap}; {again}give a wider pattern=; "
        f"torch.ones(m, n) is always wide enough"
    )
