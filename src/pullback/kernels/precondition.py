"""Preconditioners of kernel systems: approximate inverses of K + alpha I from a few columns or modes of K."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import pullback.kernels.fast.modes as modes
from pullback.core.errors import ArgumentError
from pullback.kernels.codegen import eager
from pullback.kernels.conjugate import Apply, Options
from pullback.kernels.fast.run import of_member
from pullback.kernels.ir.expr import PARAMETER
from pullback.kernels.ir.expr import J as COLUMN
from pullback.kernels.ir.reductions import OVER_J, Program
from pullback.kernels.operator import LinearForm
from pullback.kernels.plan.ranges import Ranges

_RANK = 50  # columns that the approximation of K has if nobody says how many
_ROWS = 1 << 16  # that are multiplied at once


def preconditioner(
    form: LinearForm,
    ranges: Ranges | None,
    options: Options,
    product: Apply,
    b: Tensor,
    alpha: Tensor,
    args: Sequence[Tensor],
) -> Apply | None:
    """Give r -> P^-1 r for the system (alpha I + K) x = b of a form, as its options say; None without one.

    Args:
        form, ranges, args: the kernel.
        options: of the solve.
        product: K, for `columns` columns of `form.unit_in` numbers a row.
        b: (*batch, n, columns * unit).
        alpha: (*batch, 1, 1).
    """
    kind, unit = options.preconditioner, form.unit_in
    if kind is None or callable(kind):
        return kind
    *batch, n, _ = b.shape
    rank = options.rank or _RANK
    if kind == "nystrom":

        def flat(v: Tensor) -> Tensor:  # (*batch, n * unit, columns) -> (*batch, n, columns * unit)
            return v.unflatten(-2, (n, unit)).transpose(-1, -2).flatten(-2)

        def back(v: Tensor) -> Tensor:
            return v.unflatten(-1, (-1, unit)).transpose(-1, -2).flatten(-3, -2)

        inverse = nystrom(lambda v: back(product(flat(v))), (*batch, n * unit), alpha, rank, b)
        return lambda r: flat(inverse(back(r)))
    if form.mode != "scalar" or ranges is not None:
        raise ArgumentError(
            f"solve: preconditioner={kind!r} needs a real kernel of one component without ranges; use 'nystrom'"
        )
    if kind == "fourier":
        return _modes(form, args, b, alpha, options.rank or modes.MODES)
    numbers = torch.arange(n, device=b.device)

    def values(j: Tensor) -> Tensor:
        """K_ij for j of shape (*batch, n), one for each i, or (*batch, 1), one for all."""
        tensors = []
        for t, (dim, category) in zip(args, form.signature, strict=True):
            if category == COLUMN:
                t = t.expand(*batch, *t.shape[-2:]).gather(-2, j.unsqueeze(-1).expand(*j.shape, dim))
            elif category == PARAMETER:
                t = t.unsqueeze(-2)
            tensors.append(t)
        (y,) = eager.evaluate([form.expr], tensors, (numbers[:, None], j.unsqueeze(-1)))
        return y.expand(*batch, n, 1).squeeze(-1)

    return pivoted_cholesky(values(numbers.expand(*batch, n)), lambda p: values(p[..., None]), alpha, rank)


def _modes(form: LinearForm, args: Sequence[Tensor], b: Tensor, alpha: Tensor, count: int) -> Apply:
    """The preconditioner of `fast.modes` for each member of the batch."""
    *batch, n, _ = b.shape
    program = Program("Sum", (form.expr,), (OVER_J,), form.signature, 1, form.accumulator, form.scheme)
    alphas = alpha.expand(*batch, 1, 1)
    found = [
        modes.fourier(program, of_member(args, form.signature, where), n, alphas[where].squeeze(), count)
        for where in itertools.product(*map(range, batch))
    ]

    def inverse(r: Tensor) -> Tensor:
        parts = r.expand(*batch, *r.shape[-2:]).reshape(-1, *r.shape[-2:])
        return torch.stack([one(p) for one, p in zip(found, parts, strict=True)]).reshape(r.shape)

    return inverse


def nystrom(apply: Apply, shape: tuple[int, ...], alpha: Tensor, rank: int, like: Tensor, seed: int = 0) -> Apply:
    """P^-1 r = U (l_r + alpha) / (L + alpha) U^T r + (r - U U^T r), where U L U^T is a randomised approximation of K.

    Args:
        apply: K, symmetric positive semi-definite.
        shape: (*batch, n).
        alpha: what is added to K's diagonal, broadcastable against (*batch, 1, 1).
        rank: columns of U.
        like: dtype and device.
        seed: of the random test matrix.

    Cost: one application of K to `rank` columns and O(n rank^2). Source: Frangella, Tropp & Udell 2023, doi
    10.1137/21M1466244, algorithm 2.1 and section 5.
    """
    *batch, n = shape
    rank = max(1, min(rank, n))
    generator = torch.Generator().manual_seed(seed)
    # columns of independent numbers are nearly orthonormal, and the approximation depends on their span only
    test = (torch.randn(n, rank, generator=generator) / n**0.5).to(like).expand(*batch, n, rank)
    image = apply(test.contiguous())
    # The shift keeps the small matrix positive definite in spite of rounding; it is taken off at the end.
    shift = torch.finfo(image.dtype).eps * n**0.5 * torch.linalg.matrix_norm(image, keepdim=True)
    image = image + shift * test
    core = _gram(test, image)
    core = (core + core.mT) / 2
    factor, failed = torch.linalg.cholesky_ex(core)
    if bool(failed.any()):  # K is not positive semi-definite to rounding: symmetrise its eigenvalues instead
        values, vectors = torch.linalg.eigh(core)
        root = vectors * values.clamp(min=shift.flatten(-2)).rsqrt().unsqueeze(-2)
        half = (image @ root.to(image)).mT.contiguous()
    else:
        half = torch.linalg.solve_triangular(factor.to(image), image.mT, upper=False)
    squares, vectors = torch.linalg.eigh(_gram(half.mT, half.mT))  # half^T = U sqrt(squares) V^T
    squares, shift, damp = squares.unsqueeze(-2), shift.to(squares), alpha.to(squares)
    values = (squares - shift).clamp(min=0)
    gain = (values[..., :1] + damp) / (values + damp) - 1
    kept = squares > 1e-14 * squares[..., -1:]  # what is smaller is rounding
    weights = torch.where(kept, gain / squares, 0.0)
    middle = ((vectors * weights) @ vectors.mT).to(image)  # U (gain) U^T = half^T middle half

    def inverse(r: Tensor) -> Tensor:
        return r + half.mT @ (middle @ (half @ r))

    return inverse


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float64, many rows at a time."""
    parts = zip(a.split(_ROWS, -2), b.split(_ROWS, -2), strict=True)
    return torch.stack([p.double().mT @ q.double() for p, q in parts]).sum(0)


def pivoted_cholesky(diagonal: Tensor, column: Callable[[Tensor], Tensor], alpha: Tensor, rank: int) -> Apply:
    """P^-1 r = (L L^T + alpha I)^-1 r with the columns of L chosen greedily at the largest remaining diagonal of K.

    Args:
        diagonal: K_ii, (*batch, n).
        column: indices (*batch,) -> those columns of K, (*batch, n).
        alpha: what is added to K's diagonal, broadcastable against (*batch, 1, 1).
        rank: columns of L.

    Cost: `rank` columns of K and O(n rank^2). Source: Harbrecht, Peters & Schneider 2012, doi
    10.1016/j.apnum.2011.10.001. An alpha below the rounding of K's trace counts as that.
    """
    *batch, n = diagonal.shape
    left = diagonal.clone()
    eps = torch.finfo(diagonal.dtype).eps
    floor = eps * diagonal.abs().sum(-1)
    factor = diagonal.new_zeros(*batch, n, max(1, min(rank, n)))
    for k in range(factor.shape[-1]):
        top, pivot = left.max(-1)
        good = top > floor
        row = factor.gather(-2, pivot[..., None, None].expand(*batch, 1, factor.shape[-1]))  # L[pivot]
        new = column(pivot) - (factor @ row.mT).squeeze(-1)
        new = torch.where(good[..., None], new / top.clamp(min=0).where(good, 1.0).sqrt()[..., None], 0.0)
        factor[..., k] = new
        left = (left - new.square()).clamp(min=0).scatter(-1, pivot[..., None], 0.0)
        if not bool(good.any()):
            break
    damp = torch.maximum(alpha, floor[..., None, None])
    small = factor.mT @ factor + damp * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    chol = torch.linalg.cholesky(small)

    def inverse(r: Tensor) -> Tensor:
        return (r - factor @ torch.cholesky_solve(factor.mT @ r, chol)) / damp

    return inverse
