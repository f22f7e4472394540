"""What an invertible layer is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError


class Invertible(torch.nn.Module, ABC):
    """y = f(x) with an inverse: a differentiable map whose input can be computed from its output.

    A subclass writes `forward` and `inverse`, and `log_det` where it is cheap. The first axis of a tensor is the batch.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """The x with f(x) = y."""

    def log_det(self, x: Tensor) -> Tensor:
        """Log |det f'(x)| for every member of the batch, of shape (x.shape[0],).

        Raises: ArgumentError where the layer does not know it.
        """
        raise ArgumentError(f"{type(self).__name__} does not know the determinant of its derivative")


def constant(x: Tensor, value: Tensor | float) -> Tensor:
    """`value` for every member of the batch x."""
    real = x.real if x.is_complex() else x
    return real.new_ones(x.shape[0]) * value


def axis_size(layer: torch.nn.Module, x: Tensor, axis: int, expected: int | None = None) -> int:
    """The size of an axis of x, checked.

    Raises: ShapeError.
    """
    name = type(layer).__name__
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"{name} acts along axis {axis}; got shape {tuple(x.shape)}")
    size = x.shape[axis]
    if expected is not None and size != expected:
        raise ShapeError(f"{name} expects {expected} channels along axis {axis}; got shape {tuple(x.shape)}")
    return size


def along(axis: int, x: Tensor) -> tuple[int, ...]:
    """The shape that makes a vector broadcast along `axis` of x."""
    return tuple(-1 if k == axis % x.ndim else 1 for k in range(x.ndim))


def per_channel(x: Tensor, axis: int) -> int:
    """How many numbers a member of the batch has in every channel."""
    return x[0].numel() // x.shape[axis] if x.shape[0] else 0
