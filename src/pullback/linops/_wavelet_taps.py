"""One level of a wavelet transform along the last axis in differentiable torch, for taps that require grad.

Also the definition with which the banks are compared: extend the signal, cut it into frames of n_taps samples that
advance by two, and take the inner products with the filters. `filters` has shape (2, n_taps): low pass, high pass.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from pullback.linops._wavelet_bank import extension, n_coefficients


def analyse(x: Tensor, filters: Tensor, mode: str) -> Tensor:
    """b[..., c, k] = sum_j h_c[j] x[..., 2 k + o - j], of shape (..., 2, m)."""
    frames, columns, outside, left = _frames(x.shape[-1], filters.shape[1], mode, x.device)
    pads = x.index_select(-1, columns) @ outside.to(x.dtype).mT
    extended = torch.cat([pads[..., :left], x, pads[..., left:]], -1)
    cut = extended.index_select(-1, frames.flatten()).unflatten(-1, frames.shape)
    return (cut @ filters.mT).mT


def analyse_adjoint(bands: Tensor, filters: Tensor, mode: str, n: int) -> Tensor:
    """The transpose of `analyse`, of shape (..., n)."""
    frames, columns, outside, left = _frames(n, filters.shape[1], mode, bands.device)
    cut = (bands.mT @ filters).flatten(-2)
    extended = cut.new_zeros(*cut.shape[:-1], n + outside.shape[0]).index_add(-1, frames.flatten(), cut)
    pads = torch.cat([extended[..., :left], extended[..., left + n :]], -1)
    return extended[..., left : left + n].index_add(-1, columns, pads @ outside.to(bands.dtype))


def synthesise(bands: Tensor, filters: Tensor, mode: str, n: int) -> Tensor:
    """x[..., t] = sum_(c, k) g_c[t + o - 2 k] b[..., c, k], of shape (..., n)."""
    target, length, first = _targets(bands.shape[-1], filters.shape[1], mode, bands.device)
    cut = (bands.mT @ filters).flatten(-2)
    return cut.new_zeros(*cut.shape[:-1], length).index_add(-1, target, cut).narrow(-1, first, n)


def synthesise_adjoint(x: Tensor, filters: Tensor, mode: str) -> Tensor:
    """The transpose of `synthesise`, of shape (..., 2, m)."""
    n, n_taps = x.shape[-1], filters.shape[1]
    m = n_coefficients(n, n_taps, mode)
    target, length, first = _targets(m, n_taps, mode, x.device)
    cut = functional.pad(x, (first, length - first - n)).index_select(-1, target).unflatten(-1, (m, n_taps))
    return (cut @ filters.mT).mT


@lru_cache(maxsize=32)
def _frames(n: int, n_taps: int, mode: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """The samples 2 k + o - j counted from the first of the extended signal; what lies outside the signal as a matrix
    on some columns of it; and how many samples lie before it.
    """
    m = n_coefficients(n, n_taps, mode)
    offset = n_taps // 2 if mode == "periodization" else 1
    index = 2 * torch.arange(m)[:, None] + offset - torch.arange(n_taps)
    left, right = max(0, -int(index.min())), max(0, int(index.max()) - n + 1)
    rows = [extension(t, n, mode) for t in (*range(-left, 0), *range(n, n + right))]
    columns = sorted({column for row in rows for column in row})
    outside = torch.tensor([[row.get(c, 0.0) for c in columns] for row in rows], dtype=torch.float64)
    outside = outside.reshape(len(rows), len(columns))
    return (index + left).to(device), torch.tensor(columns, dtype=torch.long, device=device), outside.to(device), left


@lru_cache(maxsize=32)
def _targets(m: int, n_taps: int, mode: str, device: torch.device) -> tuple[Tensor, int, int]:
    """Where k, j of the frames are added, the length of the result, and its first sample that is kept."""
    index = 2 * torch.arange(m)[:, None] + torch.arange(n_taps)
    if mode == "periodization":
        return ((index - n_taps // 2 + 1) % (2 * m)).flatten().to(device), 2 * m, 0
    return index.flatten().to(device), 2 * m + n_taps - 2, n_taps - 2
