"""Moving averages with zero boundary, separable over axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axes, as_axis, as_dims
from pullback.linops.axes import matrix_along

_BLOCK = 1 << 16  # elements worked on at a time, so that every pass over a block finds it in cache
_MATRIX = 64  # axes up to this length are averaged by a banded matrix product


class SmoothingND(LinearOperator):
    """y[i] = 1 / prod(nsmooth) sum_k x[i + k] over a box of nsmooth samples centred on i, with x = 0 outside.

    The sum is divided by the full window everywhere, so values fall off towards the boundary. Self-adjoint. The output
    keeps `dims` also where the window is longer than the axis (PyLops' Smoothing1D then lengthens it).

    Args:
        nsmooth: window length on each of `axes`; an even length is increased by one, as in PyLops.
        dims: shape of the input and the output.
        axes: axes that are averaged.
        dtype: what `.dtype` reports.

    Raises: ArgumentError.

    Cost: O(n log nsmooth) additions by doubling sums (no running sum, so no drift in float32); small images use
    banded matrix products.
    """

    _half = False

    def __init__(self, nsmooth: Any, dims: Dims, axes: Any = (-2, -1), *, dtype: Any = None) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        super().__init__(dims, dims, dtype=dtype)
        self.axes = as_axes(axes, len(dims), name)
        lengths = as_dims(nsmooth, "nsmooth", name)
        if len(lengths) != len(self.axes):
            raise ArgumentError(
                f"{name}: nsmooth must hold {len(self.axes)} lengths, one for each of axes {self.axes}; got {nsmooth!r}"
            )
        self.nsmooth = tuple(n + 1 - n % 2 for n in lengths)
        self._windows = tuple(sorted((a, w) for a, w in zip(self.axes, self.nsmooth, strict=True) if w > 1))
        self._scale_factor = 1 / math.prod(self.nsmooth)

    def _forward(self, x: Tensor) -> Tensor:
        if not self._windows:
            return x.clone(memory_format=torch.contiguous_format)
        if all(self.dims[a] <= _MATRIX for a, _ in self._windows):
            return self._by_matrix(x)
        return self._by_blocks(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    def _by_matrix(self, x: Tensor) -> Tensor:
        for a, w in self._windows:
            x = matrix_along(_band(self.dims[a], w, x.dtype, x.device), x, a)
        return x

    def _by_blocks(self, x: Tensor) -> Tensor:
        """Copy a block with its margins into a padded buffer, then add along one axis after the other in cache."""
        first, window = self._windows[0]
        dims = self.dims[first:]
        x = x.contiguous()
        shape = x.shape
        x = x.view(-1, *dims)
        out = torch.empty_like(x)
        windows = [(a, w) for a, w in self._windows[1:]]
        n, inner = dims[0], math.prod(dims[1:])
        on_cpu = x.device.type == "cpu"
        rows = min(n, max(1, window, _BLOCK // inner)) if on_cpu else n
        images = max(1, _BLOCK // (n * inner)) if on_cpu and rows == n else (1 if on_cpu else x.shape[0])
        margins = {a: w // 2 for a, w in windows}
        padded = [d + 2 * margins.get(k - len(dims), 0) for k, d in enumerate(dims)]
        padded[0] = rows + window - 1
        buffer = x.new_zeros(min(images, x.shape[0]), *padded)
        inside = buffer
        for a, margin in margins.items():
            inside = inside.narrow(a, margin, self.dims[a])
        half = window // 2
        for i in range(0, x.shape[0], images):
            xi, yi = x[i : i + images], out[i : i + images]
            block = buffer[: xi.shape[0]]
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                low, high = max(0, start - half), min(n, stop + half)
                top, length = low - (start - half), high - low
                target = inside[: xi.shape[0]]
                if top:
                    block[:, :top] = 0
                if top + length < padded[0]:
                    block[:, top + length :] = 0
                torch.mul(xi[:, low:high], self._scale_factor, out=target[:, top : top + length])
                part = block[:, : stop - start + window - 1]
                steps = [(1 - part.ndim, window), *windows]
                for k, (a, w) in enumerate(steps):
                    part = _window_sum(part, a, w, yi[:, start:stop] if k == len(steps) - 1 else None)
        return out.view(shape)

    def _norm_bound(self) -> float | None:
        return 1.0  # rows and columns are non-negative and sum to at most 1

    def extra_repr(self) -> str:
        """Shapes, window and axes."""
        return f"{super().extra_repr()}, nsmooth {self.nsmooth}, axes {self.axes}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls((3, 5), (6, 7))
        yield cls((4, 3, 3), (4, 5, 6), axes=(0, -1, 1))
        yield cls((3, 5), (66, 2), axes=(1, 0))


def _window_sum(x: Tensor, axis: int, window: int, out: Tensor | None) -> Tensor:
    """sum_{k < window} x[i + k] along `axis` by doubling: floor(log2 w) + popcount(w) - 1 additions an element."""
    n = x.shape[axis] - window + 1
    power, total, done, width = x, x.narrow(axis, 0, n), 1, 1  # windows are odd
    while True:
        if window & width and width > 1:
            piece = power.narrow(axis, done, n)
            done += width
            total = torch.add(total, piece, out=out if done == window else None)
        if done == window:
            return total
        length = power.shape[axis] - width
        power = power.narrow(axis, 0, length) + power.narrow(axis, width, length)
        width *= 2


@lru_cache(maxsize=64)
def _band(n: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The symmetric n x n matrix of a moving average."""
    i = torch.arange(n, device=device)
    return ((i[:, None] - i).abs() <= window // 2).to(dtype) / window


class Smoothing2D(SmoothingND):
    """y[i, j] = 1 / (w1 w2) sum x[i + k, j + l] over |k| <= w1 // 2, |l| <= w2 // 2; arguments as `SmoothingND`."""

    def __init__(self, nsmooth: Any, dims: Dims, axes: Any = (-2, -1), *, dtype: Any = None) -> None:
        super().__init__(nsmooth, dims, axes, dtype=dtype)
        if len(self.axes) != 2:
            raise ArgumentError(f"{type(self).__name__}: axes must be two axes; got {axes!r}; use SmoothingND")

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls((5, 5), (8, 9))
        yield cls((3, 4), (5, 4, 6), axes=(0, 2))
        yield cls((7, 3), (2, 66))


class Smoothing1D(SmoothingND):
    """y[i] = 1 / w sum_{|k| <= w // 2} x[i + k] along one axis.

    Args:
        nsmooth: window length w; an even length is increased by one, as in PyLops.
        dims: shape of the input and the output.
        axis: axis that is averaged.
        dtype: what `.dtype` reports.
    """

    def __init__(self, nsmooth: int, dims: Dims, axis: int = -1, *, dtype: Any = None) -> None:
        name = type(self).__name__
        axis = as_axis(axis, len(as_dims(dims, "dims", name)), name)
        super().__init__(nsmooth, dims, (axis,), dtype=dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls(5, 9)
        yield cls(4, (6, 5), axis=0)
        yield cls(11, (1, 70))
        yield cls(7, 4)
