"""Invertible layers that mix or scale the channels, the same at every place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.autodiff.invertible.layer import Invertible, along, axis_size, constant, per_channel
from pullback.core.errors import ArgumentError, ShapeError


def _count(layer: Invertible, channels: int) -> int:
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ArgumentError(f"{type(layer).__name__}: channels must be an int >= 1; got {channels!r}")
    return channels


def _mix(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    return (x.movedim(axis, -1) @ matrix.mT.to(x.dtype)).movedim(-1, axis)


class Orthogonal(Invertible):
    """y = Q x along the channels, Q = exp(W - W^T) orthogonal for every W; the inverse is Q^T, without a solve.

    Args:
        channels: the number of channels n.
        axis: axis of the channels.

    The parameter `weight` is W. Orthogonal transforms with a fast algorithm are operators: see `OperatorLayer`.

    Raises: ArgumentError, ShapeError.
    Cost: a matrix exponential, O(n^3), at every call.
    """

    def __init__(self, channels: int, *, axis: int = 1) -> None:
        super().__init__()
        self.channels, self.axis = _count(self, channels), axis
        self.weight = torch.nn.Parameter(torch.randn(channels, channels) / channels**0.5)

    def matrix(self) -> Tensor:
        """Q, of shape (n, n)."""
        return torch.linalg.matrix_exp(self.weight - self.weight.mT)

    def forward(self, x: Tensor) -> Tensor:
        """Q x."""
        axis_size(self, x, self.axis, self.channels)
        return _mix(self.matrix(), x, self.axis)

    def inverse(self, y: Tensor) -> Tensor:
        """Q^T y."""
        axis_size(self, y, self.axis, self.channels)
        return _mix(self.matrix().mT, y, self.axis)

    def log_det(self, x: Tensor) -> Tensor:
        """Zero: volume is kept."""
        return constant(x, 0.0)

    def extra_repr(self) -> str:
        """The channels and their axis."""
        return f"{self.channels}, axis={self.axis}"


class InvertibleConv1x1(Invertible):
    """y = W x along the channels, W = P L (U + diag(sign exp(log_scale))): invertible for all values of the parameters.

    P is a fixed permutation, L unit lower and U strictly upper triangular. W starts as a random rotation.

    Args:
        channels: the number of channels n.
        axis: axis of the channels.

    Raises: ArgumentError, ShapeError.
    Cost: O(n^2) a place, both ways; the inverse solves two triangular systems. The determinant costs O(n).
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, axis: int = 1) -> None:
        super().__init__()
        self.channels, self.axis = _count(self, channels), axis
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("order", permutation.argmax(1))  # row i of P L is row order[i] of L
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower = torch.nn.Parameter(lower.tril(-1))
        self.upper = torch.nn.Parameter(upper.triu(1))
        self.log_scale = torch.nn.Parameter(upper.diagonal().abs().log())

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.channels, dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + torch.diag(self.sign * torch.exp(self.log_scale))

    def matrix(self) -> Tensor:
        """W, of shape (n, n)."""
        lower, upper = self._factors()
        return (lower @ upper)[self.order]

    def forward(self, x: Tensor) -> Tensor:
        """W x."""
        axis_size(self, x, self.axis, self.channels)
        return _mix(self.matrix(), x, self.axis)

    def inverse(self, y: Tensor) -> Tensor:
        """W^-1 y."""
        axis_size(self, y, self.axis, self.channels)
        lower, upper = (t.to(y.dtype) for t in self._factors())
        columns = y.movedim(self.axis, 0)
        flat = columns.reshape(self.channels, -1)[self.order.argsort()]
        flat = torch.linalg.solve_triangular(lower, flat, upper=False, unitriangular=True)
        flat = torch.linalg.solve_triangular(upper, flat, upper=True)
        return flat.reshape(columns.shape).movedim(0, self.axis)

    def log_det(self, x: Tensor) -> Tensor:
        """The sum of log_scale, times the number of places."""
        return constant(x, self.log_scale.sum() * per_channel(x, self.axis))

    def extra_repr(self) -> str:
        """The channels and their axis."""
        return f"{self.channels}, axis={self.axis}"


class ActNorm(Invertible):
    """y = exp(log_scale) x + bias, one number a channel.

    Args:
        channels: the number of channels.
        axis: axis of the channels.

    It starts as the identity; `initialize(x)` makes the channels of f(x) have mean 0 and variance 1.

    Raises: ArgumentError, ShapeError.
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039.
    """

    def __init__(self, channels: int, *, axis: int = 1) -> None:
        super().__init__()
        self.channels, self.axis = _count(self, channels), axis
        self.log_scale = torch.nn.Parameter(torch.zeros(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the parameters from the statistics of x.

        Raises: ArgumentError if a channel of x is constant or not finite.
        """
        axis_size(self, x, self.axis, self.channels)
        rows = x.movedim(self.axis, 0).flatten(1)
        deviation = rows.std(1, correction=0)
        if not bool(((deviation > 0) & deviation.isfinite()).all()):
            raise ArgumentError("ActNorm.initialize: every channel of x must vary and be finite")
        self.log_scale.copy_(-deviation.log())
        self.bias.copy_(-rows.mean(1) / deviation)

    def forward(self, x: Tensor) -> Tensor:
        """exp(log_scale) x + bias."""
        axis_size(self, x, self.axis, self.channels)
        shape = along(self.axis, x)
        return x * torch.exp(self.log_scale).reshape(shape) + self.bias.reshape(shape)

    def inverse(self, y: Tensor) -> Tensor:
        """(y - bias) exp(-log_scale)."""
        axis_size(self, y, self.axis, self.channels)
        shape = along(self.axis, y)
        return (y - self.bias.reshape(shape)) * torch.exp(-self.log_scale).reshape(shape)

    def log_det(self, x: Tensor) -> Tensor:
        """The sum of log_scale, times the number of places."""
        return constant(x, self.log_scale.sum() * per_channel(x, self.axis))

    def extra_repr(self) -> str:
        """The channels and their axis."""
        return f"{self.channels}, axis={self.axis}"


class Permutation(Invertible):
    """y[k] = x[order[k]] along the channels.

    Args:
        order: the channels in their new order; a number n stands for the reverse order of n channels.
        axis: axis of the channels.

    Raises: ArgumentError, ShapeError.
    """

    order: Tensor

    def __init__(self, order: Sequence[int] | int, *, axis: int = 1) -> None:
        super().__init__()
        indices = list(range(_count(self, order)))[::-1] if isinstance(order, int) else [int(k) for k in order]
        if sorted(indices) != list(range(len(indices))) or not indices:
            raise ArgumentError(f"Permutation: order must hold 0 ... n - 1, each once; got {indices}")
        self.register_buffer("order", torch.tensor(indices))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """The channels of x in their new order."""
        axis_size(self, x, self.axis, len(self.order))
        return x.index_select(self.axis, self.order)

    def inverse(self, y: Tensor) -> Tensor:
        """The channels in their old order."""
        axis_size(self, y, self.axis, len(self.order))
        return y.index_select(self.axis, self.order.argsort())

    def log_det(self, x: Tensor) -> Tensor:
        """Zero: volume is kept."""
        return constant(x, 0.0)

    def extra_repr(self) -> str:
        """The order."""
        return f"{self.order.tolist()}, axis={self.axis}"


class Squeeze(Invertible):
    """y of shape (n, f^2 c, h / f, w / f) from x of shape (n, c, h, w): every block of f x f pixels becomes channels.

    Args:
        factor: f.

    Raises: ArgumentError, ShapeError.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ArgumentError(f"Squeeze: factor must be an int >= 1; got {factor!r}")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Blocks to channels."""
        f = self.factor
        if x.ndim != 4 or x.shape[2] % f or x.shape[3] % f:
            raise ShapeError(f"Squeeze expects shape (n, c, h, w), h and w multiples of {f}; got {tuple(x.shape)}")
        return torch.nn.functional.pixel_unshuffle(x, f)

    def inverse(self, y: Tensor) -> Tensor:
        """Channels to blocks."""
        f = self.factor
        if y.ndim != 4 or y.shape[1] % f**2:
            raise ShapeError(f"Squeeze.inverse expects shape (n, {f**2} c, h, w); got {tuple(y.shape)}")
        return torch.nn.functional.pixel_shuffle(y, f)

    def log_det(self, x: Tensor) -> Tensor:
        """Zero: volume is kept."""
        return constant(x, 0.0)

    def extra_repr(self) -> str:
        """The factor."""
        return str(self.factor)
