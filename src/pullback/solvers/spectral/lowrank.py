"""Sums of few rank-one operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ShapeError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import complex_of


class LowRank(LinearOperator):
    """y = sum_i s_i u_i <v_i, x>.

    Args:
        U: tensor of shape (k, *dimsd).
        S: real tensor of shape (k,).
        V: tensor of shape (k, *dims).
        real: the inner product is Re <v_i, x>, which makes an operator that is linear over the reals only.
        dtype: what `.dtype` reports.

    Gradients reach all three. Raises: ShapeError. Cost: k (n + m).
    """

    _native = True
    _half = False

    def __init__(self, U: Any, S: Any, V: Any, *, real: bool = False, dtype: Any = None) -> None:
        U, S, V = (as_tensor(t, name, "LowRank") for t, name in ((U, "U"), (S, "S"), (V, "V")))
        if S.ndim != 1 or min(U.ndim, V.ndim) < 2 or not len(U) == len(S) == len(V):
            raise ShapeError(
                f"LowRank: U, S, V must have shapes (k, *dimsd), (k,), (k, *dims); got {tuple(U.shape)}, "
                f"{tuple(S.shape)}, {tuple(V.shape)}"
            )
        super().__init__(tuple(V.shape[1:]), tuple(U.shape[1:]), dtype=dtype)
        self.U, self.S, self.V = U, S, V
        self.real = bool(real)
        if self.real:
            self._clinear = False
            self._real_domain, self._real_range = not V.is_complex(), not U.is_complex()

    def _forward(self, x: Tensor) -> Tensor:
        return self._pass(x, self.V, self.U)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._pass(y, self.U, self.V)

    def _pass(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        c = coefficients(self._cast(source, x), x, self.real)
        return combine(c * self._cast(self.S, x), self._cast(target, x))

    def extra_repr(self) -> str:
        """Shapes and rank."""
        return f"{super().extra_repr()}, rank {len(self.S)}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Real with gradient, complex with several axes, linear over the reals only."""
        g = torch.Generator().manual_seed(5)
        rand = lambda *n, dtype=torch.float64: torch.randn(*n, dtype=dtype, generator=g)  # noqa: E731
        yield cls(rand(2, 4).requires_grad_(), rand(2).requires_grad_(), rand(2, 3))
        yield cls(rand(2, 3, dtype=torch.complex128), rand(2), rand(2, 2, 3, dtype=torch.complex128))
        yield cls(rand(2, 3), rand(2), rand(2, 4, dtype=torch.complex128), real=True)


def coefficients(rows: Tensor, x: Tensor, real: bool = False) -> Tensor:
    """<row_i, x> (its real part if `real`) for rows (k, *dims) and x (..., *dims): shape (..., k)."""
    n = rows.ndim - 1
    flat, x = rows.flatten(1), x.flatten(-n)
    if flat.is_complex() or x.is_complex():
        dtype = complex_of(torch.promote_types(flat.dtype, x.dtype))
        c = product(x.to(dtype), flat.to(dtype).mH)
        return c.real if real else c
    return product(x, flat.mT)


def combine(c: Tensor, rows: Tensor) -> Tensor:
    """sum_i c_i row_i for c (..., k) and rows (k, *dims): shape (..., *dims)."""
    dtype = torch.promote_types(c.dtype, rows.dtype)
    return product(c.to(dtype), rows.flatten(1).to(dtype)).unflatten(-1, rows.shape[1:])


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """X @ matrix. (torch's older vmap, which gradcheck uses, gives the tangent of matmul on a vector a wrong shape.)"""
    return torch.mv(matrix.mT, x) if x.ndim == 1 else torch.matmul(x, matrix)
