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


def member(c: Any, n: int) -> Any:
    """What `lift` undoes: a number for each batch member, without the n axes of the members."""
    return c.reshape(c.shape[: c.ndim - n]) if isinstance(c, Tensor) and c.ndim else c


def inner(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Re <x, y> over the last n axes, for tensors that broadcast."""
    product = x.conj() * y if x.is_complex() or y.is_complex() else x * y
    return total(product.real if product.is_complex() else product, n)


def squares(x: Tensor) -> Tensor:
    """|x_i|^2."""
    return (x.conj() * x).real if x.is_complex() else x * x


def root(x: Tensor) -> Tensor:
    """sqrt, with all derivatives zero at zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def norm(x: Tensor, n: int) -> Tensor:
    """|x|_2 over the last n axes, which are kept."""
    return root(squares(x).sum(tuple(range(-n, 0)), keepdim=True) if n else squares(x))


def indicator(inside: Tensor, like: Tensor) -> Tensor:
    """Zero where `inside`, inf elsewhere, in the precision of `like`."""
    dtype = like.dtype.to_real() if like.is_complex() else like.dtype
    return torch.zeros(inside.shape, dtype=dtype, device=inside.device).masked_fill(~inside, torch.inf)


def slack(x: Tensor) -> float:
    """What rounding may do to a number that lies on a boundary, in relative terms."""
    return 100 * torch.finfo(x.dtype).eps
