"""Tensor arithmetic that functionals and solvers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import autograd


def lift(c: Any, n: int) -> Any:
    """A number for each batch member, with n axes appended so that it broadcasts against the members."""
    return c.reshape(c.shape + (1,) * n) if isinstance(c, Tensor) and c.ndim else c


def real_like(c: Any, x: Tensor) -> Any:
    """A held real number or tensor in the precision of x; a float where that loses nothing (faster kernels)."""
    if not isinstance(c, Tensor):
        return c
    if c.ndim == 0 and c.device.type == "cpu" and not is_live(c):
        return c.item()
    return c.to(x.dtype.to_real() if x.is_complex() else x.dtype)


def point_like(b: Tensor, x: Tensor) -> Tensor:
    """A held point of the space in the precision of x; complex stays complex."""
    return b.to(torch.promote_types(x.dtype, torch.complex32) if b.is_complex() else x.dtype)


def total(values: Tensor, n: int) -> Tensor:
    """The sum over the last n axes."""
    return values.sum(tuple(range(-n, 0))) if n else values


def is_live(*values: Any) -> bool:
    """Whether a derivative may be asked for, so that nothing may be overwritten."""
    return torch.compiler.is_compiling() or any(
        isinstance(v, Tensor) and (autograd.is_live(v) or not autograd.is_eager(v)) for v in values
    )
