"""Banks on the CPU in numba, compiled at first use: all taps of an output are summed while it lies in the cache.

The torch version (`Bank.apply`) is the definition, and what runs where numba is not installed; it reads and writes
memory once for every tap, and here once for every four.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.linops._wavelet_bank import Bank

# Kernels -------------------------------------------------------------------------------------------------------------
# Two sources f0, f1 and two outputs g0, g1 are whole storages, flat, because slices of those are contiguous for numba
# and views of images are not. `at[i]` holds offset and strides (outer, position, row) of operand i, `n` the numbers of
# outer entries and of rows, and two sizes: `_rows` the length of a row, `_lines` the lengths of both sources. Positions
# `first` to end0 and end1 are written. The regular ones, from `start` to `stop`, take the entries (channel, shift) of
# `taps`; number e of the others takes the entries (channel, position) ends[e] to ends[e + 1] of `edges`.


def _accumulate(out: Any, f0: Any, f1: Any, where: Any, w: Any, k: int) -> None:
    """Out = sum_j w[j] f[where[j, 0]][where[j, 1]:]."""
    n = out.size
    if k == 0:
        out[:] = 0
        return
    j = 0
    if k % 2:
        s = f0[where[0, 1] : where[0, 1] + n] if where[0, 0] == 0 else f1[where[0, 1] : where[0, 1] + n]
        a = w[0]
        for i in range(n):
            out[i] = a * s[i]
        j = 1
    while j < k:
        s = f0[where[j, 1] : where[j, 1] + n] if where[j, 0] == 0 else f1[where[j, 1] : where[j, 1] + n]
        t = (
            f0[where[j + 1, 1] : where[j + 1, 1] + n]
            if where[j + 1, 0] == 0
            else f1[where[j + 1, 1] : where[j + 1, 1] + n]
        )
        a, b = w[j], w[j + 1]
        if k - j < 4:
            if j:
                for i in range(n):
                    out[i] += a * s[i] + b * t[i]
            else:
                for i in range(n):
                    out[i] = a * s[i] + b * t[i]
            j += 2
            continue
        u = (
            f0[where[j + 2, 1] : where[j + 2, 1] + n]
            if where[j + 2, 0] == 0
            else f1[where[j + 2, 1] : where[j + 2, 1] + n]
        )
        v = (
            f0[where[j + 3, 1] : where[j + 3, 1] + n]
            if where[j + 3, 0] == 0
            else f1[where[j + 3, 1] : where[j + 3, 1] + n]
        )
        c, d = w[j + 2], w[j + 3]
        if j:
            for i in range(n):
                out[i] += a * s[i] + b * t[i] + c * u[i] + d * v[i]
        else:
            for i in range(n):
                out[i] = a * s[i] + b * t[i] + c * u[i] + d * v[i]
        j += 4


def _rows(
    f0: Any, f1: Any, g0: Any, g1: Any, at: Any, n: Any, first: Any, end0: Any, end1: Any,
    start: Any, stop: Any, taps: Any, weights: Any, counts: Any, edges: Any, edge_weights: Any, ends: Any,
) -> None:  # fmt: skip
    """The axis is not the last: an output row of n[2] elements is a sum of source rows."""
    where = np.empty((max(taps.shape[1], edges.shape[1]) + 1, 2), np.int64)
    for o in range(n[0]):
        for c in range(2):
            for p in range(first, end0 if c == 0 else end1):
                regular = start <= p < stop
                if regular:
                    entries, w, count = taps[c], weights[c], counts[c]
                else:
                    e = p if p < start else start + p - stop
                    entries, w, count = (
                        edges[c, ends[c, e] :],
                        edge_weights[c, ends[c, e] :],
                        ends[c, e + 1] - ends[c, e],
                    )
                for m in range(n[1]):
                    for j in range(count):
                        channel, row = entries[j, 0], entries[j, 1]
                        if regular:
                            row += p
                        where[j, 0] = channel
                        where[j, 1] = at[channel, 0] + o * at[channel, 1] + row * at[channel, 2] + m * at[channel, 3]
                    i = at[2 + c, 0] + o * at[2 + c, 1] + (p - first) * at[2 + c, 2] + m * at[2 + c, 3]
                    out = g0[i : i + n[2]] if c == 0 else g1[i : i + n[2]]
                    accumulate(out, f0, f1, where, w, count)


def _lines(
    f0: Any, f1: Any, g0: Any, g1: Any, at: Any, n: Any, _first: Any, end0: Any, end1: Any,
    start: Any, stop: Any, taps: Any, weights: Any, counts: Any, edges: Any, edge_weights: Any, ends: Any,
) -> None:  # fmt: skip
    """The axis is the last: samples, a stride of 2, are dealt out to buffers first, or put together last."""
    splits = at[0, 2] == 2
    x0, x1 = np.empty(max(n[2], end0) + 1, f0.dtype), np.empty(max(n[3], end1) + 1, f0.dtype)
    where = np.empty((taps.shape[1] + 1, 2), np.int64)
    for o in range(n[0]):
        for m in range(n[1]):
            i0, i1 = at[0, 0] + o * at[0, 1] + m * at[0, 3], at[1, 0] + o * at[1, 1] + m * at[1, 3]
            if splits:
                line = f0[i0 : i0 + n[2] + n[3]]
                for i in range(n[3]):
                    x0[i] = line[2 * i]
                    x1[i] = line[2 * i + 1]
                if n[2] > n[3]:
                    x0[n[3]] = line[2 * n[3]]
                s0, s1 = x0[: n[2]], x1[: n[3]]
            else:
                s0, s1 = f0[i0 : i0 + n[2]], f1[i1 : i1 + n[3]]
            i0, i1 = at[2, 0] + o * at[2, 1] + m * at[2, 3], at[3, 0] + o * at[3, 1] + m * at[3, 3]
            for c in range(2):
                size = end0 if c == 0 else end1
                if splits:
                    out = g0[i0 : i0 + size] if c == 0 else g1[i1 : i1 + size]
                else:
                    out = x0[:size] if c == 0 else x1[:size]
                for j in range(counts[c]):
                    where[j, 0] = taps[c, j, 0]
                    where[j, 1] = start + taps[c, j, 1]
                if start < stop:
                    accumulate(out[start:stop], s0, s1, where, weights[c], counts[c])
                for e in range(size - (stop - start)):
                    p = e if e < start else stop + e - start
                    total = x0.dtype.type(0)
                    for j in range(ends[c, e], ends[c, e + 1]):
                        value = s0[edges[c, j, 1]] if edges[c, j, 0] == 0 else s1[edges[c, j, 1]]
                        total += edge_weights[c, j] * value
                    out[p] = total
            if not splits:
                line = g0[i0 : i0 + end0 + end1]
                for i in range(end1):
                    line[2 * i] = x0[i]
                    line[2 * i + 1] = x1[i]
                if end0 > end1:
                    line[2 * end1] = x0[end1]


accumulate: Any = _accumulate  # compiled by `kernels`; the other two call it by this name


@functools.cache
def kernels() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """(_rows, _lines) as machine code, kept on disk where numba may write; None without numba."""
    try:
        import numba
    except ImportError:
        return None
    global accumulate
    options: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        make = numba.njit(cache=True, **options)
        accumulate = make(_accumulate)
        return make(_rows), make(_lines)
    except RuntimeError:  # "cannot cache function: no locator available"
        make = numba.njit(**options)
        accumulate = make(_accumulate)
        return make(_rows), make(_lines)


# From tensors to kernels ---------------------------------------------------------------------------------------------


def run(
    bank: Bank, sources: Sequence[Tensor], axis: int, start: int, stop: tuple[int, int], outs: Sequence[Tensor]
) -> None:
    """Write the positions start ... stop[c] - 1 of both outputs; along the last axis these must be all."""
    compiled = kernels()
    assert compiled is not None, "numba is missing; please report"
    last = axis == -1
    views = (*sources, *outs)
    k = outs[0].ndim + axis
    # the axes before, and those between that the kernel walks through; along the last axis the one before it
    first, second = ((0, max(k - 1, 0)), (max(k - 1, 0), k)) if last else ((0, k), (k + 1, -1))
    at = []
    for view in views:
        shape, strides = view.shape, view.stride()
        outer = _stride(shape[slice(*first)], strides[slice(*first)])
        middle = _stride(shape[slice(*second)], strides[slice(*second)])
        if outer is None or middle is None:  # not one axis for the kernel: one after the other
            before = outer is None
            gone = first[0] if before else second[0]
            for j in range(shape[gone]):
                pick = [view.select(gone, j) for view in views]
                run(bank, pick[:2], axis if before else axis + 1, start, stop, pick[2:])
            return
        at.append((view.storage_offset(), outer, strides[k], middle))
    shape = sources[0].shape
    counts = (math.prod(shape[slice(*first)]), math.prod(shape[slice(*second)]))
    n = (*counts, shape[-1], sources[1].shape[-1])
    one, two, three, four = (_storage(view) for view in views)
    kernel = compiled[last]
    kernel(one, two, three, four, np.array(at), n, start, stop[0], stop[1], *_data(bank, sources[0].dtype))


def _stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these axes seen as one; None if there is none."""
    if len(shape) <= 1:
        return strides[0] if shape else 0
    found, n = None, 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if found is None:
            found, n = stride, size
        elif stride != found * n:
            return None
        else:
            n *= size
    return 0 if found is None else found


def _storage(x: Tensor) -> np.ndarray:
    """All of the memory that x lies in."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).numpy()


def _data(bank: Bank, dtype: torch.dtype) -> tuple[Any, ...]:
    """The bank as arrays."""
    found = bank._ready.get(dtype)
    if found is None:
        real = np.float32 if dtype == torch.float32 else np.float64
        width = max(1, *(len(t) for t in bank.taps))
        taps, weights = np.zeros((2, width, 2), np.int64), np.zeros((2, width), real)
        for c, entries in enumerate(bank.taps):
            for j, (channel, shift, weight) in enumerate(entries):
                taps[c, j], weights[c, j] = (channel, shift), weight
        rows = {position: row for edge in bank.edges for position, row in edge.rows().items()}
        lists: list[list[tuple[int, int, float]]] = [[], []]
        ends: list[list[int]] = [[0], [0]]
        for (c, _), row in sorted(rows.items()):
            lists[c] += [(channel, position, weight) for (channel, position), weight in row.items()]
            ends[c].append(len(lists[c]))
        width = max(1, *map(len, lists))
        edges, edge_weights = np.zeros((2, width, 2), np.int64), np.zeros((2, width), real)
        for c, items in enumerate(lists):
            for j, (channel, position, weight) in enumerate(items):
                edges[c, j], edge_weights[c, j] = (channel, position), weight
        n_ends = max(map(len, ends))
        padded = np.array([e + [e[-1]] * (n_ends - len(e)) for e in ends], np.int64)
        counts = np.array([len(t) for t in bank.taps], np.int64)
        start, stop = (bank.start, bank.stop) if bank.start < bank.stop else (max(bank.lengths),) * 2
        found = bank._ready[dtype] = (start, stop, taps, weights, counts, edges, edge_weights, padded)
    return found
