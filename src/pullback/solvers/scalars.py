"""The numbers of a solver, one a member: Python floats where there is one member, tensors where there is a batch.

A float costs a tenth of a 0-d tensor, which is what small problems spend their time on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Number = Any  # float | Tensor


def ratio(a: Number, b: Number, live: bool = False) -> Number:
    """The quotient a / b, and 0 where b is zero (with derivative 0 if live): members that finished stay finite."""
    if isinstance(b, float) and isinstance(a, float):
        return a / b if b else 0.0
    if not live:
        return a * _inverse(b)
    zero = b == 0
    return torch.where(zero, 0, a / torch.where(zero, 1, b))


def _inverse(b: Tensor) -> Tensor:
    """1 / b, and 0 where b is zero: a third of the time of a comparison and `torch.where`."""
    return b.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)


def where(condition: Any, a: Number, b: Number) -> Number:
    """The number a where the condition holds, else b."""
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)


def larger(a: Number, b: Number) -> Number:
    """max(a, b), nan if either is nan."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(b, Tensor):
            return torch.clamp(a, min=b)
        return torch.maximum(a, b) if isinstance(a, Tensor) else torch.clamp(b, min=a)
    return a if a >= b or a != a else b


def smaller(a: Number, b: Number) -> Number:
    """min(a, b), nan if either is nan."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    return -larger(-a, -b)


def root(a: Number) -> Number:
    """sqrt(a); nan where a < 0."""
    if isinstance(a, Tensor):
        return a.sqrt()
    return math.sqrt(a) if a >= 0 else math.nan


def rotation(a: Number, b: Number, live: bool = True) -> tuple[Number, Number, Number]:
    """The rotation c = a / r, s = b / r, r = sqrt(a^2 + b^2), of (a, b) into (r, 0); all 0, with derivative 0, at 0."""
    if isinstance(a, float) and isinstance(b, float):
        r = math.hypot(a, b)
        return (a / r, b / r, r) if r else (0.0, 0.0, 0.0)
    if not live:
        size = torch.hypot(torch.as_tensor(a), torch.as_tensor(b))
        inverse = _inverse(size)
        return a * inverse, b * inverse, size
    squares = a * a + b * b
    zero = squares == 0
    size = torch.where(zero, 1, squares).sqrt()
    return torch.where(zero, 0, a / size), torch.where(zero, 0, b / size), torch.where(zero, 0, size)


def finite(a: Number) -> Any:
    """Whether a number is neither inf nor nan."""
    return torch.isfinite(a) if isinstance(a, Tensor) else math.isfinite(a)


def detach(a: Number) -> Number:
    """The number without its derivatives."""
    return a.detach() if isinstance(a, Tensor) else a
