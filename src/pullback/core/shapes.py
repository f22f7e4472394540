"""Shapes: what a user writes as `dims`, and how a tensor's axes divide into batch and domain."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pullback.core.errors import ArgumentError

Dims = int | Sequence[int]


def as_dims(dims: Any, name: str = "dims", owner: str = "operator") -> tuple[int, ...]:
    """`dims` as a tuple of positive ints; an int means one axis."""
    try:
        values = (operator.index(dims),) if not isinstance(dims, Iterable) else tuple(operator.index(d) for d in dims)
    except TypeError:
        raise ArgumentError(f"{owner}: {name} must be an int or a sequence of ints; got {dims!r}") from None
    if not values or any(d < 1 for d in values):
        raise ArgumentError(f"{owner}: {name} must hold at least one size and only sizes >= 1; got {dims!r}")
    return values


def as_axis(axis: Any, n_axes: int, owner: str, name: str = "axis") -> int:
    """`axis` counted from the end, in -n_axes..-1, so that leading batch axes do not shift it."""
    try:
        value = operator.index(axis)
    except TypeError:
        raise ArgumentError(f"{owner}: {name} must be an int; got {axis!r}") from None
    if not -n_axes <= value < n_axes:
        raise ArgumentError(
            f"{owner}: {name} must lie in [{-n_axes}, {n_axes - 1}] for dims of {n_axes} axes; got {axis}"
        )
    return value - n_axes if value >= 0 else value


def as_axes(axes: Any, n_axes: int, owner: str, name: str = "axes") -> tuple[int, ...]:
    """Several distinct axes, each counted from the end."""
    if not isinstance(axes, Iterable):
        axes = (axes,)
    values = tuple(as_axis(a, n_axes, owner, name) for a in axes)
    if not values or len(set(values)) != len(values):
        raise ArgumentError(f"{owner}: {name} must be distinct and at least one; got {tuple(axes)}")
    return values


def per_axis(value: Any, n: int, owner: str, name: str) -> tuple[Any, ...]:
    """One value for each of `n` axes: a scalar is repeated, a sequence must have n entries."""
    if not isinstance(value, (list, tuple)):
        return (value,) * n
    if len(value) != n:
        raise ArgumentError(f"{owner}: {name} must be one value or {n} values, one an axis; got {value!r}")
    return tuple(value)


def size(dims: Sequence[int]) -> int:
    """The number of elements of a tensor of shape `dims`."""
    return math.prod(dims)


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype of a real one's precision; half precision becomes complex64. Complex dtypes stay."""
    if dtype.is_complex:
        return dtype
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def real_of(dtype: torch.dtype) -> torch.dtype:
    """The real dtype of a complex one's precision. Real dtypes stay."""
    if not dtype.is_complex:
        return dtype
    return torch.float64 if dtype == torch.complex128 else torch.float32
