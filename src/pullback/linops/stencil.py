"""y[i] = sum_t w_t x[i + t] along one axis, with special rows near the ends: the form of every finite difference.

A `Stencil` is data: taps, the rows where they hold, and the rows that differ. Its transpose is a stencil again, so the
exact adjoint needs no code of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Elements that are worked on at a time, so that the second and third pass over a block find it in cache.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Stencil:
    """A banded n x n matrix: `taps` (offset -> weight) on rows start..stop-1, `rows` (row -> column -> weight)
    elsewhere.
    """

    n: int
    taps: Mapping[int, float]
    start: int
    stop: int
    rows: Mapping[int, Mapping[int, float]]

    @cached_property
    def transposed(self) -> Stencil:
        """The matrix transposed."""
        # Column j is regular if every row j - t that the taps can reach is a regular row and no special row touches it.
        special = {c for columns in self.rows.values() for c in columns}
        start = self.start + max(self.taps)
        stop = self.stop + min(self.taps)
        while start < stop and any(c < (start + stop) // 2 and c >= start for c in special):
            start += 1
        while start < stop and any(c >= (start + stop) // 2 and c < stop for c in special):
            stop -= 1
        stop = max(start, stop)
        rows: dict[int, dict[int, float]] = {}
        edges = [i for i in (*range(min(start, self.n)), *range(max(stop, 0), self.n))]
        for j in edges:
            column = {j - t: w for t, w in self.taps.items() if self.start <= j - t < self.stop and 0 <= j - t < self.n}
            for i, columns in self.rows.items():
                if j in columns:
                    column[i] = column.get(i, 0.0) + columns[j]
            rows[j] = column
        return Stencil(self.n, {-t: w for t, w in self.taps.items()}, start, stop, rows)

    @property
    def row_sum(self) -> float:
        """max_i sum_j |a_ij|."""
        inner = sum(abs(w) for w in self.taps.values()) if self.stop > self.start else 0.0
        return max([inner, *(sum(abs(w) for w in columns.values()) for columns in self.rows.values())])

    @property
    def norm_bound(self) -> float:
        """sqrt(|A|_1 |A|_inf) >= |A|_2."""
        return math.sqrt(self.row_sum * self.transposed.row_sum)

    def scaled(self, factor: float) -> Stencil:
        """Factor times the matrix."""
        rows = {i: {j: factor * w for j, w in columns.items()} for i, columns in self.rows.items()}
        return Stencil(self.n, {t: factor * w for t, w in self.taps.items()}, self.start, self.stop, rows)


def apply_stencil(stencil: Stencil, x: Tensor, axis: int, out: Tensor, add: bool = False) -> None:
    """Out = A x, or out += A x, along `axis` (counted from the end) of tensors of equal shape; `out` may be a slice."""
    axis = x.ndim + axis
    n, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    outer = math.prod(x.shape[:axis])
    if outer == 1 or axis == 0:
        _apply_block(stencil, x, axis, out, add)
        return
    # Leading axes are merged and looped over in blocks that fit the cache; a slice that cannot be merged, one by one.
    try:
        merged = out.view(outer, *out.shape[axis:])
    except RuntimeError:
        for part, result in zip(x.unbind(0), out.unbind(0), strict=True):
            apply_stencil(stencil, part, axis - x.ndim, result, add)
        return
    x = x.reshape(outer, *x.shape[axis:])
    step = max(1, _BLOCK // (n * inner))
    for i in range(0, outer, step):
        _apply_block(stencil, x[i : i + step], 1, merged[i : i + step], add)


def _apply_block(stencil: Stencil, x: Tensor, axis: int, out: Tensor, add: bool) -> None:
    step = max(1, _BLOCK * x.shape[axis] // max(1, x.numel()))
    update = _accumulate if add else _assign
    for a in range(stencil.start, stencil.stop, step):
        b = min(a + step, stencil.stop)
        update(stencil.taps, lambda t, a=a, b=b: x.narrow(axis, a + t, b - a), out.narrow(axis, a, b - a))  # type: ignore[misc]
    for i, columns in stencil.rows.items():
        row = out.narrow(axis, i, 1)
        if columns:
            update(columns, lambda j: x.narrow(axis, j, 1), row)
        elif not add:
            row.zero_()


def _assign(taps: Mapping[int, float], read: Callable[[int], Tensor], out: Tensor) -> None:
    (t0, w0), *rest = taps.items()
    if not rest:
        torch.mul(read(t0), w0, out=out)
        return
    (t1, w1), *rest = rest
    torch.add(read(t0), read(t1), alpha=w1 / w0, out=out)
    for t, w in rest:
        out.add_(read(t), alpha=w / w0)
    if w0 != 1.0:
        out.mul_(w0)


def _accumulate(taps: Mapping[int, float], read: Callable[[int], Tensor], out: Tensor) -> None:
    for t, w in taps.items():
        out.add_(read(t), alpha=w)
