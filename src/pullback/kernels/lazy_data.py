"""From what a user gives - tensors, arrays, numbers, lists, open slots - to the leaf of a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.kernels.ir.expr import CATEGORY, PARAMETER
from pullback.kernels.ir.expr import I as ROW
from pullback.kernels.ir.expr import J as COLUMN
from pullback.kernels.lazy_base import LazyBase, Leaf


def to_pairs(t: Tensor) -> Tensor:
    """Complex (..., p) as real (..., 2 p): re, im, re, im ..."""
    return torch.view_as_real(t.resolve_conj()).flatten(-2)


def from_pairs(t: Tensor) -> Tensor:
    """Real (..., 2 p) as complex (..., p)."""
    t = t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())


def is_complex(x: Any) -> bool:
    """Whether a LazyTensor, tensor, array or number is complex."""
    if isinstance(x, LazyBase):
        return x._complex
    if isinstance(x, Tensor):
        return x.is_complex()
    return isinstance(x, (complex, np.complexfloating)) or (isinstance(x, np.ndarray) and x.dtype.kind == "c")


def leaf_of(x: Any, axis: int | None, is_complex: bool) -> Leaf | None:
    """The leaf of what the user gave; None for a whole number, which is a constant."""
    if axis not in (None, 0, 1, 2):
        raise ArgumentError(f"LazyTensor: axis must be 0 (i), 1 (j) or 2 (a parameter); got {axis!r}")
    if isinstance(x, (Tensor, np.ndarray)):
        return _tensor_leaf(x, axis, is_complex)
    if isinstance(x, tuple) and len(x) == 3 and all(isinstance(v, int) for v in x):
        position, dim, category = x
        if position < 0 or dim < 1 or category not in (0, 1, 2):
            raise ArgumentError(f"LazyTensor: expected (position, dim, category) with category 0, 1 or 2; got {x}")
        return Leaf(x, None, 2 * dim if is_complex else dim, category, position)
    if isinstance(x, (bool, int, np.integer, np.bool_)) and axis is None and not is_complex:
        return None
    if isinstance(x, (float, int, np.floating, np.integer)) and not is_complex:
        # every number is a variable of its own, so that formulas with other numbers have the same structure
        return Leaf(float(x) if torch.compiler.is_compiling() else object(), float(x), 1, PARAMETER)
    if isinstance(x, (complex, np.complexfloating, list, tuple, float, int, np.generic)):
        try:
            return _tensor_leaf(np.asarray(x), axis, is_complex, weak=True)
        except TypeError:
            pass
    raise ArgumentError(
        f"LazyTensor expects a tensor, an array, a number, a list of numbers or (position, dim, category); got "
        f"{type(x).__name__}"
    )


def _tensor_leaf(x: Any, axis: int | None, is_complex: bool, weak: bool = False) -> Leaf:
    if isinstance(x, np.ndarray):
        t = torch.from_numpy(x.copy()) if x.dtype.kind in "iub" else interop.share(x, "LazyTensor")
        if weak:
            x = t  # a list is no array: it does not make the result NumPy
    else:
        t = x.resolve_neg()
    shape = tuple(t.shape)
    if is_complex:
        if t.is_complex():
            pairs = to_pairs(t if t.ndim else t.reshape(1))
        else:
            pairs = to_pairs(torch.complex(t, torch.zeros_like(t)))
        t = pairs
    elif t.is_complex():
        raise DtypeError("LazyTensor: complex data makes a ComplexLazyTensor; got is_complex=False with complex data")
    if axis is None:
        if t.ndim == 0:
            return Leaf(x, t.reshape(1), 1, PARAMETER, weak=True)
        if t.ndim == 1:
            return Leaf(x, t, t.shape[0], PARAMETER, weak=weak)
        if t.ndim == 2:
            raise ShapeError(
                f"LazyTensor: a tensor of shape {shape} needs axis=0 (rows are i) or axis=1 (rows are j); or write "
                f"Vi(x), Vj(x), or give it the shape (M, 1, D), (1, N, D)"
            )
        m, n = t.shape[-3:-1]
        if m != 1 and n != 1:
            raise ShapeError(
                f"LazyTensor: one of the axes i and j must have length 1, as in (..., M, 1, D) or (..., 1, N, D); "
                f"got shape {shape}"
            )
        if m == n == 1:
            return Leaf(x, t[..., 0, 0, :], t.shape[-1], PARAMETER, weak=weak)
        return Leaf(x, t.squeeze(-2 if n == 1 else -3), t.shape[-1], ROW if n == 1 else COLUMN, weak=weak)
    if axis == PARAMETER:
        return Leaf(
            x, t.reshape(1) if t.ndim == 0 else t, t.shape[-1] if t.ndim else 1, PARAMETER, weak=weak or not t.ndim
        )
    if t.ndim < 2:
        raise ShapeError(f"{CATEGORY[axis]}(x) expects a tensor of shape (..., {'MN'[axis]}, D); got {shape}")
    return Leaf(x, t, t.shape[-1], axis, weak=weak)
