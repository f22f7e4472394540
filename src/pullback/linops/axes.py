"""What the families share about axes."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_along(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """y[..., i, ...] = sum_j matrix[i, j] x[..., j, ...] along `axis` (counted from the end), contiguous."""
    if matrix.dtype != x.dtype:
        dtype = torch.promote_types(matrix.dtype, x.dtype)
        matrix, x = matrix.to(dtype), x.to(dtype)
    if axis == -1:
        return x @ matrix.mT
    if axis == -2:
        return matrix @ x
    return (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis).contiguous()
