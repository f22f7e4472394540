"""LazyTensor: a tensor F_ij over pairs that is never stored, built with the operators of NumPy and torch.

`K = (-((Vi(x) - Vj(y)) ** 2).sum(-1)).exp()` is an M x N matrix of which only the formula exists; `K @ b`, `K.sum(1)`,
`K.argmin(1)` compute without it.
"""

from __future__ import annotations

from typing import Any

from pullback.kernels.complex_lazy import ComplexLazyTensor
from pullback.kernels.lazy_tensor import LazyTensor

__all__ = ["ComplexLazyTensor", "LazyTensor", "Pm", "Var", "Vi", "Vj"]


def Var(x_or_ind: Any, dim: int | None = None, cat: int | None = None) -> Any:
    """A variable of category `cat` (0: i, 1: j, 2: parameter), from data or an argument's position and `dim`."""
    if dim is None:
        return LazyTensor(x_or_ind, axis=cat)
    return LazyTensor((x_or_ind, dim, cat))


def Vi(x_or_ind: Any, dim: int | None = None) -> Any:
    """A variable of i: a tensor of shape (..., M, D), or the position and dimension of an argument given later."""
    return Var(x_or_ind, dim, 0)


def Vj(x_or_ind: Any, dim: int | None = None) -> Any:
    """A variable of j: a tensor of shape (..., N, D), or the position and dimension of an argument given later."""
    return Var(x_or_ind, dim, 1)


def Pm(x_or_ind: Any, dim: int | None = None) -> Any:
    """A parameter: a number, a tensor of shape (..., D), or the position and dimension of an argument given later."""
    return Var(x_or_ind, dim, 2)
