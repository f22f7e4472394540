"""Indicators of convex sets: zero inside, infinite outside. Their prox is the projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError, DtypeError
from pullback.core.shapes import Dims
from pullback.functionals.arithmetic import is_live, real_like
from pullback.functionals.base import Functional, Step


class Box(Functional):
    """f(x) = 0 if lower <= x_i <= upper for all i, else inf; prox: clamp(x, lower, upper), whatever the step.

    Args:
        lower, upper: for real x: numbers, tensors that broadcast against x, or None; they may require grad.
        dims: shape of one member of the batch; see `Functional`.

    Raises: ArgumentError if a number `lower` exceeds a number `upper` (tensors are not verified).
    """

    elementwise = True
    is_box = True

    def __init__(self, lower: Any = None, upper: Any = None, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and not lower <= upper:
            raise ArgumentError(f"Box: lower must not exceed upper; got lower={lower}, upper={upper}")
        self.lower: Any = _bound(lower, "lower")
        self.upper: Any = _bound(upper, "upper")

    def _value(self, x: Tensor, n: int) -> Tensor:
        _require_real(x)
        outside = torch.zeros((), dtype=torch.bool, device=x.device).expand(x.shape)
        if self.lower is not None:
            outside = outside | (x < real_like(self.lower, x))
        if self.upper is not None:
            outside = outside | (x > real_like(self.upper, x))
        far = outside.any(tuple(range(-n, 0))) if n else outside
        return torch.zeros(far.shape, dtype=x.dtype, device=x.device).masked_fill(far, torch.inf)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        _require_real(x)
        if self.lower is None and self.upper is None:
            return x.clone()
        lower, upper = real_like(self.lower, x), real_like(self.upper, x)
        if isinstance(lower, Tensor) != isinstance(upper, Tensor) and lower is not None and upper is not None:
            return x.clamp(min=lower).clamp(max=upper)  # torch takes two tensors or two numbers
        return x.clamp(lower, upper)

    def _prox_over(self, x: Tensor, step: Step, n: int) -> Tensor:
        if x.is_complex() or is_live(x, self.lower, self.upper):
            return self._prox(x, step, n)
        for bound, clamp in ((self.lower, x.clamp_min_), (self.upper, x.clamp_max_)):
            if bound is not None:
                clamp(real_like(bound, x))
        return x

    def _scale(self, factor: float | Tensor) -> Functional:
        return self if not isinstance(factor, Tensor) and factor > 0 else super()._scale(factor)

    def extra_repr(self) -> str:
        """The bounds."""
        show = lambda b: "tensor" if isinstance(b, Tensor) else b  # noqa: E731
        return f"{show(self.lower)}, {show(self.upper)}"


def _bound(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (int, float)):
        return value
    bound = interop.as_tensor(value, name, "Box")
    if bound.is_complex():
        raise DtypeError(f"Box: {name} must be real; got {bound.dtype}")
    return bound


def _require_real(x: Tensor) -> None:
    if x.is_complex():
        raise DtypeError(f"Box: x must be real (complex numbers have no order); got {x.dtype}; use x.real and x.imag")
