"""y[r, k] = sum_i interp(row_i, u[r, i, k]), Joseph's projector as a linear operator whose rays are parameters.

The ray k of view r crosses row i of the image at the column

    u[r, i, k] = (n_j - 1)/2 + slope[r] * (i - (n_i - 1)/2) + offset[r, k]

and takes the row's linear interpolation there; the image is zero outside. Views with `swap` do the same on the
transposed image. The matrix is never stored. The adjoint spreads with the same numbers, computed by the same
operations, so it is the exact transpose. The derivative in slope or offset replaces the interpolation by its slope and
multiplies by i - (n_i - 1)/2 or 1: again an operator of this class, which is how gradients in the geometry arise.

On the CPU the loops run in numba, compiled at first use; on a GPU see `_joseph_triton.py`. Threads share no output: the
forward divides the views, the adjoint the rows. They are ordinary threads that release the GIL, because numba's own
pool aborts when two threads enter it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import pullback.imaging._joseph_triton as gpu
from pullback.core.operator import LinearOperator

_LANES = 32  # images of a batch that one pass treats together; a constant lets LLVM make vector code without a rest
_BLOCK = 8  # rows that stay in the cache while all views pass over them
_PAD = 2  # zero columns on each side of a row: one for the interpolation, one for rounding at the ends
_MIN_WORK = 500_000  # interpolations; below this a thread costs more than it saves


# Kernels -------------------------------------------------------------------------------------------------------------
# All share a signature: the image `rows`, the `rays` (slope, u of ray 0 in row 0, step) of every view, the views
# `chosen`, the `order` of the derivative (0 interpolates, 1 takes the slope), the sinogram, and the range of work. Rows
# have _PAD zero columns on each side. No fast-math: both directions must round alike.


def _project_one(rows: Any, rays: Any, chosen: Any, order: int, out: Any, first: int, last: int) -> None:
    """out[r, k] for the views chosen[first:last] of one image."""
    n_k = out.shape[1]
    n_i = rows.shape[0]
    n_j = rows.shape[1] - 2 * _PAD
    column = np.empty(n_k, np.int32)
    weight = np.empty(n_k, out.dtype)
    keep = out.dtype.type(1 - order)
    for q in range(first, last):
        r = chosen[q]
        slope, start, step = rays[r, 0], rays[r, 1], rays[r, 2]
        line = out[r]
        line[:] = 0
        for i in range(n_i):
            # the rays with _PAD - 1 < u < n_j + _PAD meet the row: k0 <= k < k0 + n
            u0 = start + slope * i
            a = (_PAD - 1 - u0) / step
            b = (n_j + _PAD - u0) / step
            k0 = int(min(max(np.floor(min(a, b)) + 1.0, 0.0), n_k))
            n = int(min(max(np.ceil(max(a, b)), k0), n_k)) - k0
            u0 += step * k0
            # position and weight first: this loop becomes vector code, the next one cannot
            for k in range(n):
                u = u0 + step * np.float64(np.int32(k))
                j = np.int32(u)
                column[k] = j
                weight[k] = (u - j) * (1 - order) + order
            row = rows[i]
            part = line[k0 : k0 + n]
            for k in range(n):
                at = np.uint32(column[k])
                v = row[at]
                part[k] += keep * v + weight[k] * (row[at + np.uint32(1)] - v)


def _spread_one(rows: Any, rays: Any, chosen: Any, order: int, sinogram: Any, first: int, last: int) -> None:
    """rows[i, j] for the rows first..last of one image, from the views `chosen`: the transpose of `_project_one`."""
    n_k = sinogram.shape[1]
    n_j = rows.shape[1] - 2 * _PAD
    column = np.empty(n_k, np.int32)
    left = np.empty(n_k, rows.dtype)
    right = np.empty(n_k, rows.dtype)
    # A ray adds to columns j and j + 1. With one accumulator each addition would wait for the one before (measured: 1.7
    # times slower).
    at = np.empty(rows.shape[1], rows.dtype)
    after = np.empty(rows.shape[1], rows.dtype)
    keep = rows.dtype.type(1 - order)
    for i in range(first, last):
        at[:] = 0
        after[:] = 0
        for q in range(chosen.size):
            r = chosen[q]
            slope, start, step = rays[r, 0], rays[r, 1], rays[r, 2]
            u0 = start + slope * i
            a = (_PAD - 1 - u0) / step
            b = (n_j + _PAD - u0) / step
            k0 = int(min(max(np.floor(min(a, b)) + 1.0, 0.0), n_k))
            n = int(min(max(np.ceil(max(a, b)), k0), n_k)) - k0
            u0 += step * k0
            line = sinogram[r, k0 : k0 + n]
            for k in range(n):
                u = u0 + step * np.float64(np.int32(k))
                j = np.int32(u)
                w = rows.dtype.type((u - j) * (1 - order) + order)
                column[k] = j
                left[k] = line[k] * (keep - w)
                right[k] = line[k] * w
            for k in range(n):
                meets = np.uint32(column[k])
                at[meets] += left[k]
                after[meets] += right[k]
        rows[i, 0] = at[0]
        for m in range(1, rows.shape[1]):
            rows[i, m] = at[m] + after[m - 1]


def _project_many(rows: Any, rays: Any, chosen: Any, order: int, out: Any, first: int, last: int) -> None:
    """`_project_one` for _LANES images at once, numbered by the last axis: a weight is computed once for all."""
    n_k = out.shape[1]
    n_i = rows.shape[0]
    n_j = rows.shape[1] - 2 * _PAD
    keep = out.dtype.type(1 - order)
    for q in range(first, last):
        out[chosen[q]] = 0
    for i0 in range(0, n_i, _BLOCK):
        for q in range(first, last):
            r = chosen[q]
            slope, start, step = rays[r, 0], rays[r, 1], rays[r, 2]
            for i in range(i0, min(i0 + _BLOCK, n_i)):
                u0 = start + slope * i
                a = (_PAD - 1 - u0) / step
                b = (n_j + _PAD - u0) / step
                k0 = int(min(max(np.floor(min(a, b)) + 1.0, 0.0), n_k))
                n = int(min(max(np.ceil(max(a, b)), k0), n_k)) - k0
                u0 += step * k0
                for k in range(n):
                    u = u0 + step * np.float64(np.int32(k))
                    j = np.int32(u)
                    w = out.dtype.type((u - j) * (1 - order) + order)
                    v = keep - w
                    here, right = rows[i, np.uint32(j)], rows[i, np.uint32(j) + np.uint32(1)]
                    target = out[r, k0 + k]
                    for lane in range(_LANES):
                        target[lane] += v * here[lane] + w * right[lane]


def _spread_many(rows: Any, rays: Any, chosen: Any, order: int, sinogram: Any, first: int, last: int) -> None:
    """`_spread_one` for _LANES images at once."""
    n_k = sinogram.shape[1]
    n_j = rows.shape[1] - 2 * _PAD
    keep = rows.dtype.type(1 - order)
    rows[first:last] = 0
    for i0 in range(first, last, _BLOCK):
        for q in range(chosen.size):
            r = chosen[q]
            slope, start, step = rays[r, 0], rays[r, 1], rays[r, 2]
            for i in range(i0, min(i0 + _BLOCK, last)):
                u0 = start + slope * i
                a = (_PAD - 1 - u0) / step
                b = (n_j + _PAD - u0) / step
                k0 = int(min(max(np.floor(min(a, b)) + 1.0, 0.0), n_k))
                n = int(min(max(np.ceil(max(a, b)), k0), n_k)) - k0
                u0 += step * k0
                for k in range(n):
                    u = u0 + step * np.float64(np.int32(k))
                    j = np.int32(u)
                    w = rows.dtype.type((u - j) * (1 - order) + order)
                    v = keep - w
                    here, right = rows[i, np.uint32(j)], rows[i, np.uint32(j) + np.uint32(1)]
                    source = sinogram[r, k0 + k]
                    for lane in range(_LANES):
                        here[lane] += v * source[lane]
                        right[lane] += w * source[lane]


@functools.cache
def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel as machine code, kept on disk where numba finds a directory that it may write to."""
    try:
        import numba
    except ModuleNotFoundError:
        text = "method='joseph' needs numba: pip install 'pullback[imaging]', or use method='fourier'"
        raise ModuleNotFoundError(text, name="numba") from None

    options: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(**options)(kernel)


def _divide(n: int, work: int, task: Callable[[int, int], None]) -> None:
    """task(first, last) over ranges that cover 0..n, on as many threads as torch uses."""
    n_threads = min(torch.get_num_threads(), max(1, work // _MIN_WORK), n)
    if n_threads == 1:
        task(0, n)
        return
    n_parts = min(n, 4 * n_threads)  # more parts than threads: another process may hold a core for a while
    bounds = [n * p // n_parts for p in range(n_parts + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(task, bounds[:-1], bounds[1:]):
            pass


# The operator --------------------------------------------------------------------------------------------------------


class _JosephSampler(LinearOperator):
    """y[r, k] = sum_i (i - i_c)^p d^m/du^m interp(row_i, u[r, i, k]).

    Args:
        slope: columns per row, (n_views, 1).
        offset: column where the ray crosses the middle row, from the middle, (n_views, n_k). It must be affine in k
            (not checked: the first and the last value are used); derivatives in it hold for any direction.
        swap: whether the view runs over the transposed image, bool (n_views, 1).
        dims: (n_y, n_x) of the image.
        least_step: a bound from below of |columns per ray|, which tells a GPU how many rays can meet a pixel.
        order, row_power: m, p above.

    Cost: n_views * n_k * n_rows interpolations; memory: one padded copy of the image.
    """

    _has_range_derivatives: ClassVar[bool] = True
    _bridge_live: ClassVar[bool] = True

    def __init__(
        self,
        slope: Tensor,
        offset: Tensor,
        swap: Tensor,
        *,
        dims: tuple[int, ...],
        least_step: float,
        order: int = 0,
        row_power: int = 0,
    ) -> None:
        super().__init__(dims, tuple(offset.shape))
        self.slope, self.offset, self.swap = slope, offset, swap
        self._least_step, self._order, self._row_power = least_step, order, row_power

    def _range_derivative(self, i: int) -> LinearOperator | None:
        if self._order or i > 1:  # piecewise linear: the second derivative is zero between the kinks
            return None
        return _JosephSampler(
            *self._held(), dims=self.dims, least_step=self._least_step, order=1, row_power=int(i == 0)
        )

    def _expression(self, level: int = 0) -> str:
        return f"XRayTransform({self.extra_repr()})"

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply_real(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply_real(y, True)

    def _apply_real(self, x: Tensor, adjoint: bool) -> Tensor:
        """A x or A^H x by way of a contiguous batch of real images; a complex image counts as two real ones."""
        batch = x.shape[: x.ndim - 2]
        values = x.detach().resolve_conj().resolve_neg()
        if x.is_complex():
            values = torch.view_as_real(values.contiguous()).movedim(-1, 0)
        values = values.reshape(-1, *values.shape[-2:]).contiguous()
        y = self._on_cpu(values, adjoint) if x.device.type == "cpu" else self._on_gpu(values, adjoint)
        dims = y.shape[1:]
        return torch.complex(*y.reshape(2, *batch, *dims)) if x.is_complex() else y.reshape(*batch, *dims)

    def _on_gpu(self, values: Tensor, adjoint: bool) -> Tensor:
        gpu.require(values.device)
        n_k = self.dimsd[1]
        slope, offset, swap = self._held()
        rays = gpu.geometry(slope, offset, swap, self.dims, n_k)
        options = gpu.options(values.dtype, self.dims, n_k, self._least_step, self._order, self._row_power)
        return (gpu.spread if adjoint else gpu.project)(values, rays, options, self.dims, self.dimsd)

    def _on_cpu(self, values: Tensor, adjoint: bool) -> Tensor:
        source = values.numpy()
        out = np.empty((len(source), *(self.dims if adjoint else self.dimsd)), source.dtype)
        rays, swap = self._rays()
        if not np.isfinite(rays).all() or (rays[:, 2] == 0).any():
            out.fill(np.nan)
        else:
            (self._spread if adjoint else self._project)(source, rays, swap, out)
        return torch.from_numpy(out)

    def _rays(self) -> tuple[np.ndarray, np.ndarray]:
        """(slope, u of ray 0 in row 0 in padded columns, step) of every view, and swap."""
        slope, offset, swap = (t.detach() for t in self._held())
        slope, first, last, swap = slope[:, 0].double(), offset[:, 0].double(), offset[:, -1].double(), swap[:, 0]
        n_y, n_x = self.dims
        n_k = self.dimsd[1]
        i_c = torch.where(swap, (n_x - 1) / 2, (n_y - 1) / 2)
        j_c = torch.where(swap, (n_y - 1) / 2, (n_x - 1) / 2)
        step = (last - first) / (n_k - 1) if n_k > 1 else torch.ones_like(first)
        rays = torch.stack((slope, j_c + _PAD + first - slope * i_c, step), 1)
        return rays.numpy(), np.ascontiguousarray(swap.numpy())

    def _project(self, x: np.ndarray, rays: np.ndarray, swap: np.ndarray, out: np.ndarray) -> None:
        n_views, n_k = self.dimsd
        for part, n_lanes in _parts(len(x), x.itemsize):
            lanes = (n_lanes,) if n_lanes > 1 else ()
            kernel = _compiled(_project_many if lanes else _project_one)
            sinogram = np.empty((n_views, n_k, *lanes), x.dtype) if lanes else out[part][0]
            for transpose in (False, True):
                chosen = np.flatnonzero(swap == transpose)
                if not chosen.size:
                    continue
                images = x[part].transpose(0, 2, 1) if transpose else x[part]
                n_i, n_j = images.shape[1:]
                rows = np.zeros((n_i, n_j + 2 * _PAD, *lanes), x.dtype)
                inner = rows[:, _PAD:-_PAD]
                _put(inner, images)
                if self._row_power:
                    inner *= _centred(n_i, inner)
                work = chosen.size * n_k * n_i * n_lanes
                _divide(chosen.size, work, functools.partial(kernel, rows, rays, chosen, self._order, sinogram))
            if lanes:
                out[part] = sinogram.transpose(2, 0, 1)[: len(out[part])]

    def _spread(self, y: np.ndarray, rays: np.ndarray, swap: np.ndarray, out: np.ndarray) -> None:
        n_views, n_k = self.dimsd
        out.fill(0)
        for part, n_lanes in _parts(len(y), y.itemsize):
            lanes = (n_lanes,) if n_lanes > 1 else ()
            kernel = _compiled(_spread_many if lanes else _spread_one)
            sinogram = y[part][0]
            if lanes:
                sinogram = np.zeros((n_views, n_k, *lanes), y.dtype)
                _put(sinogram, y[part])
            for transpose in (False, True):
                chosen = np.flatnonzero(swap == transpose)
                if not chosen.size:
                    continue
                target = out[part].transpose(0, 2, 1) if transpose else out[part]
                n_i, n_j = target.shape[1:]
                rows = np.empty((n_i, n_j + 2 * _PAD, *lanes), y.dtype)
                work = chosen.size * n_k * n_i * n_lanes
                _divide(n_i, work, functools.partial(kernel, rows, rays, chosen, self._order, sinogram))
                inner = rows[:, _PAD:-_PAD]
                if self._row_power:
                    inner *= _centred(n_i, inner)
                target += inner.transpose(2, 0, 1)[: len(target)] if lanes else inner


def _parts(n: int, itemsize: int) -> Iterator[tuple[slice, int]]:
    """Slices of a batch of n images with the number of lanes of each: one image alone, or up to _LANES together.

    _LANES images together, however few of them are used, take as long as 5 single ones in float32 and 7 in float64.
    """
    enough = itemsize + 1
    first = 0
    while first < n:
        last = min(first + _LANES, n) if n - first >= enough else first + 1
        yield slice(first, last), 1 if last - first == 1 else _LANES
        first = last


def _put(target: np.ndarray, images: np.ndarray) -> None:
    """Copy (b, n, m) images to (n, m) or to the first lanes of (n, m, _LANES)."""
    if target.ndim == 2:
        target[...] = images[0]
    else:
        target[..., : len(images)] = images.transpose(1, 2, 0)


def _centred(n: int, like: np.ndarray) -> np.ndarray:
    """0..n-1 minus its mean, along the first axis of `like`."""
    return (np.arange(n) - (n - 1) / 2).astype(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
