"""Coupling layers: one half of the channels changes by a function of the other half, which need not be invertible."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pullback.autodiff.invertible.layer import Invertible, axis_size
from pullback.core.errors import ArgumentError, ShapeError


class _Coupling(Invertible):
    def __init__(self, net: Callable[[Tensor], Tensor], *, axis: int = 1, swap: bool = False) -> None:
        super().__init__()
        if not callable(net):
            raise ArgumentError(f"{type(self).__name__}: net must be a module or a function; got {type(net).__name__}")
        self.net = net
        self.axis, self.swap = axis, swap

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The half that is kept and the half that is changed."""
        n = axis_size(self, x, self.axis)
        if n < 2:
            raise ShapeError(
                f"{type(self).__name__} needs at least 2 channels along axis {self.axis}; got shape {tuple(x.shape)}"
            )
        first, second = x.split([n - n // 2, n // 2], self.axis)
        return (second, first) if self.swap else (first, second)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat((changed, kept) if self.swap else (kept, changed), self.axis)

    def _of(self, kept: Tensor, shape: torch.Size, what: str) -> Tensor:
        out = self.net(kept)
        if out.shape != shape:
            raise ShapeError(
                f"{type(self).__name__}: the net maps the kept half {tuple(kept.shape)} to {what} and must return "
                f"shape {tuple(shape)}; got {tuple(out.shape)}"
            )
        return out

    @abstractmethod
    def _change(self, kept: Tensor, changed: Tensor, back: bool) -> Tensor:
        """The changed half, or from it the half before the change."""

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        kept, changed = self._halves(x)
        return self._join(kept, self._change(kept, changed, False))

    def inverse(self, y: Tensor) -> Tensor:
        """The x with f(x) = y."""
        kept, changed = self._halves(y)
        return self._join(kept, self._change(kept, changed, True))

    def extra_repr(self) -> str:
        """Which axis is halved."""
        return f"axis={self.axis}, swap={self.swap}"


class AdditiveCoupling(_Coupling):
    """y = (x1, x2 + net(x1)) for the two halves x1, x2 of the channels.

    Args:
        net: any module or function that maps x1 to the shape of x2 (of an odd number of channels x1 has one more).
        axis: axis of the channels.
        swap: change x1 by net(x2) instead. Alternate it from layer to layer.

    Raises: ArgumentError, ShapeError.
    Source: Dinh, Krueger, Bengio 2014, arXiv 1410.8516; Gomez et al. 2017, arXiv 1707.04585.
    """

    def _change(self, kept: Tensor, changed: Tensor, back: bool) -> Tensor:
        shift = self._of(kept, changed.shape, "a shift")
        return changed - shift if back else changed + shift

    def log_det(self, x: Tensor) -> Tensor:
        """Zero: volume is kept."""
        return (x.real if x.is_complex() else x).new_zeros(x.shape[0])


class AffineCoupling(_Coupling):
    """y = (x1, exp(s) x2 + t) with (a, t) = net(x1), s = bound tanh(a / bound).

    Args:
        net: any module or function that maps x1 to twice the channels of x2: first a, then t.
        axis: axis of the channels.
        swap: change x1 by net(x2) instead.
        bound: limit of |s|, which keeps the inverse accurate.

    Raises: ArgumentError, ShapeError.
    Source: Dinh, Sohl-Dickstein, Bengio 2016, arXiv 1605.08803.
    """

    def __init__(
        self, net: Callable[[Tensor], Tensor], *, axis: int = 1, swap: bool = False, bound: float = 2.0
    ) -> None:
        super().__init__(net, axis=axis, swap=swap)
        if not bound > 0:
            raise ArgumentError(f"AffineCoupling: bound must be positive; got {bound!r}")
        self.bound = float(bound)

    def _scale_and_shift(self, kept: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        shape = list(changed.shape)
        shape[self.axis] *= 2
        a, shift = self._of(kept, torch.Size(shape), "a scale and a shift").chunk(2, self.axis)
        return self.bound * torch.tanh(a / self.bound), shift

    def _change(self, kept: Tensor, changed: Tensor, back: bool) -> Tensor:
        log_scale, shift = self._scale_and_shift(kept, changed)
        return (changed - shift) * torch.exp(-log_scale) if back else changed * torch.exp(log_scale) + shift

    def log_det(self, x: Tensor) -> Tensor:
        """The sum of s over a member."""
        log_scale = self._scale_and_shift(*self._halves(x))[0]
        return (log_scale.real if log_scale.is_complex() else log_scale).flatten(1).sum(1)
