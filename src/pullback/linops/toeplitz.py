"""Toeplitz matrices: constant along their diagonals, multiplied by FFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import complex_of
from pullback.linops.convolve import next_fast_len

_DENSE = 128  # matrices up to this size are multiplied as such


class Toeplitz(LinearOperator):
    """y_i = sum_j T_ij x_j with T_ij = c[i - j] on and below the diagonal and r[j - i] above it.

    Args:
        c: first column, shape (m,).
        r: first row, shape (n,); its first element is not used. If None, conj(c): a Hermitian matrix (for real c[0]).
        dtype: what `.dtype` reports.

    As `scipy.linalg.toeplitz`, but never stored from size 129 on. For a convolution kernel h with its origin at k,
    zero outside the signal, `Convolve1D(n, h, offset=k)` is the same without padding c and r by zeros. Gradients of
    every order reach c and r.

    Raises: ArgumentError.
    Cost: O((m + n) log(m + n)) by the circulant matrix in which T lies; its spectrum is kept until c or r change.
    """

    _native = True
    _half = False

    def __init__(self, c: Any, r: Any = None, *, dtype: Any = None) -> None:
        c = as_tensor(c, "c", "Toeplitz")
        r = c.conj() if r is None else as_tensor(r, "r", "Toeplitz")
        for name, t in (("c", c), ("r", r)):
            if t.ndim != 1 or t.numel() == 0:
                raise ArgumentError(f"Toeplitz: {name} must have one axis and be non-empty; got {tuple(t.shape)}")
        super().__init__(len(r), len(c), dtype=dtype)
        self.c, self.r = c, r.resolve_conj()
        self._length = next_fast_len(len(c) + len(r) - 1)

    def _forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._multiply(y, True)

    def _multiply(self, x: Tensor, adjoint: bool) -> Tensor:
        c, r = self._cast(self.c, x), self._cast(self.r, x)
        result = torch.promote_types(x.dtype, torch.promote_types(c.dtype, r.dtype))
        m, n = self.shape
        if max(m, n) <= _DENSE:
            matrix = self._cached(("matrix", result), (c, r), lambda c, r: _matrix(c, r).to(result))
            matrix = matrix.mH if adjoint else matrix
            # Not matmul on a vector: torch's older vmap, which gradcheck uses, gives its tangent a wrong shape.
            return torch.mv(matrix, x.to(result)) if x.ndim == 1 else torch.matmul(x.to(result), matrix.mT)
        spectrum = self._cached("spectrum", (c, r), self._spectrum)
        if result.is_complex:
            full = torch.fft.fft(x.to(result), self._length) * (spectrum.conj() if adjoint else spectrum)
            return torch.fft.ifft(full, self._length)[..., : n if adjoint else m]
        half = spectrum[: self._length // 2 + 1]
        full = torch.fft.rfft(x, self._length) * (half.conj() if adjoint else half)
        return torch.fft.irfft(full, self._length)[..., : n if adjoint else m]

    def _spectrum(self, c: Tensor, r: Tensor) -> Tensor:
        """The eigenvalues of the circulant matrix whose first column is (c, zeros, r[n - 1], ..., r[1])."""
        pad = c.new_zeros(self._length - len(c) - len(r) + 1)
        column = torch.cat((c, pad, r[1:].flip(0)))
        return torch.fft.fft(column.to(complex_of(column.dtype)))

    def _norm_bound(self) -> float:
        with torch.no_grad():
            wide = [t.detach().to(torch.promote_types(t.dtype, torch.float64)) for t in (self.c, self.r)]
            return float(self._spectrum(*wide).abs().max())

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Square and rectangular, complex, with gradient, by FFT."""
        g = torch.Generator().manual_seed(4)
        rand = lambda n, dtype=torch.float64: torch.randn(n, dtype=dtype, generator=g)  # noqa: E731
        yield cls(rand(5))
        yield cls(rand(4).requires_grad_(), rand(6).requires_grad_())
        yield cls(rand(6, torch.complex128), rand(3))
        yield cls(rand(3), rand(130))


def _matrix(c: Tensor, r: Tensor) -> Tensor:
    """T itself: an index into (r[n - 1], ..., r[1], c[0], ..., c[m - 1])."""
    diagonals = torch.cat((r[1:].flip(0), c))
    i, j = torch.arange(len(c), device=c.device), torch.arange(len(r), device=c.device)
    return diagonals[i[:, None] - j + len(r) - 1]
