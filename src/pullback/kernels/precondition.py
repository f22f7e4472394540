"""Preconditioners of kernel systems: approximate inverses of K + alpha I from a few columns of K."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]  # (*batch, n, columns) -> the same shape


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
    test = torch.randn(n, rank, generator=generator, dtype=torch.float64).to(like)
    test = torch.linalg.qr(test).Q.expand(*batch, n, rank).contiguous()
    image = apply(test)
    # The shift keeps the small matrix positive definite in spite of rounding; it is taken off at the end.
    shift = torch.finfo(image.dtype).eps * n**0.5 * torch.linalg.matrix_norm(image, keepdim=True)
    image = image + shift * test
    core = test.mT @ image
    factor, failed = torch.linalg.cholesky_ex((core + core.mT) / 2)
    if bool(failed.any()):  # K is not positive semi-definite to rounding: symmetrise its eigenvalues instead
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        root = vectors * values.clamp(min=shift.flatten(-2)).rsqrt().unsqueeze(-2)
        half = image @ root
    else:
        half = torch.linalg.solve_triangular(factor, image.mT, upper=False).mT
    u, s, _ = torch.linalg.svd(half, full_matrices=False)
    values = (s.square().unsqueeze(-2) - shift).clamp(min=0)
    gain = (values[..., -1:] + alpha) / (values + alpha)

    def inverse(r: Tensor) -> Tensor:
        inner = u.mT @ r
        return r + u @ ((gain.mT - 1) * inner)

    return inverse


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
