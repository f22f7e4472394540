"""Data terms other than least squares: Huber, Kullback-Leibler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError
from pullback.core.shapes import Dims
from pullback.functionals.arithmetic import point_like, real_like, root, slack, squares, total
from pullback.functionals.constraints import require_real
from pullback.functionals.functional import Functional, Step
from pullback.functionals.norms import real, shrink_factor


class Huber(Functional):
    """f(x) = sum_i |x_i|^2 / 2 where |x_i| <= delta, delta |x_i| - delta^2 / 2 beyond.

    Args:
        delta: > 0, a number or a tensor that broadcasts against x; it may require grad.
        dims: shape of one member of the batch; see `Functional`.

    It is the Moreau envelope of delta L1. Gradient: x_i min(1, delta / |x_i|); prox: x_i (1 - step min(1 / (1 + step),
    delta / |x_i|)); conjugate: |u|^2 / 2 where all |u_i| <= delta, else inf.
    Source: Huber 1964, doi 10.1214/aoms/1177703732.
    """

    elementwise = True

    def __init__(self, delta: Any = 1.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.delta: Any = real(delta, "delta", "Huber")
        if self.delta is None or (not isinstance(self.delta, Tensor) and not self.delta > 0):
            raise ArgumentError(f"Huber: delta must be a number > 0; got {delta!r}")

    def _value(self, x: Tensor, n: int) -> Tensor:
        delta, size = real_like(self.delta, x), x.abs()
        return total(torch.where(size <= delta, squares(x) / 2, delta * (size - delta / 2)), n)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return x * shrink_factor(x.abs(), real_like(self.delta, x))

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        # x - step times the projection of x / (1 + step) on the ball of radius delta
        y = x / (1 + step)
        return x - step * (y * shrink_factor(y.abs(), real_like(self.delta, x)))

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        outside = x.abs() > scale * real_like(self.delta, x) * (1 + slack(x))
        return total((squares(x) / (2 * scale)).masked_fill(outside, torch.inf), n)

    @property
    def lipschitz(self) -> Any:
        """1."""
        return 1.0

    def extra_repr(self) -> str:
        """Delta."""
        return "tensor" if isinstance(self.delta, Tensor) else format(self.delta, "g")


class KullbackLeibler(Functional):
    """f(x) = sum_i b_i log(b_i / w_i) - b_i + w_i, w = x + background; the negative log-likelihood of Poisson counts b.

    Args:
        dims: shape of one member of the batch; see `Functional`.
        b: counts >= 0 (not verified), a tensor that broadcasts against x; `KullbackLeibler().about(b)` sets them later.
        background: expected counts >= 0 that x does not explain, a number or a tensor that broadcasts against x.

    Real x only. f is inf where some w_i < 0, or w_i = 0 < b_i. prox: w is the positive root of
    w^2 - (x + background - step) w - step b = 0. Gradient: 1 - b / w, which is not Lipschitz continuous.
    Conjugate: sum_i -b_i log(1 - u_i) - background_i u_i, for u_i < 1 (u_i <= 1 where b_i = 0).
    Source: Csiszar 1991, doi 10.1214/aos/1176348385.
    """

    elementwise = True

    def __init__(self, dims: Dims | None = None, *, b: Any = None, background: Any = 0.0) -> None:
        super().__init__(dims)
        self.b: Any = None if b is None else _counts(b, "b")
        self.background: Any = _counts(background, "background")

    def about(self, y: Any) -> Functional:
        """The same with counts y."""
        return KullbackLeibler(self.dims, b=y, background=self.background)

    def _data(self, x: Tensor) -> tuple[Tensor, Any]:
        require_real(x, "KullbackLeibler")
        if self.b is None:
            raise ArgumentError("KullbackLeibler: it has no counts b yet; write KullbackLeibler(b=y) or f.about(y)")
        b = point_like(self.b, x) if isinstance(self.b, Tensor) else torch.full((), self.b, dtype=x.dtype)
        return b, real_like(self.background, x)

    def _value(self, x: Tensor, n: int) -> Tensor:
        b, background = self._data(x)
        w = x + background
        some = (w > 0) & (b > 0)
        safe = torch.where(some, b / torch.where(some, w, 1), 1)
        values = torch.where(some, b, 0) * safe.log() - b + w
        return total(values.masked_fill((w < 0) | ((w == 0) & (b > 0)), torch.inf), n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        b, background = self._data(x)
        v = x + background - step
        half = root(v * v + 4 * step * b)
        # For v < 0 the conjugate form does not cancel.
        below = v < 0
        w = torch.where(below, 2 * step * b / torch.where(below & (half > v), half - v, 1), (v + half) / 2)
        return w - background

    def _grad(self, x: Tensor, n: int) -> Tensor:
        b, background = self._data(x)
        return 1 - b / (x + background)

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        b, background = self._data(x)
        rest = 1 - x / scale
        inside = rest > 0
        values = -scale * b * torch.where(inside, rest, 1).log() - background * x
        outside = (rest < -slack(x)) | (~inside & (b > 0))
        return total(values.masked_fill(outside, torch.inf), n)

    def extra_repr(self) -> str:
        """Whether it has counts."""
        return "" if self.b is None else "b"


def _counts(value: Any, name: str) -> Any:
    if isinstance(value, (int, float)):
        return float(value)
    counts = interop.as_tensor(value, name, "KullbackLeibler")
    if counts.is_complex():
        raise ArgumentError(f"KullbackLeibler: {name} must be real; got {counts.dtype}")
    return counts
