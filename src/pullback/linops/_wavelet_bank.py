"""One level of a wavelet transform along one axis, y_c[k] = sum_(c', s) w[c, c', s] x_c'[k + s], as data.

A signal x has two channels, its even and odd samples; a pair of bands (approximation, detail) has two as well. So
analysis, synthesis and both their transposes are the same thing: a `Bank` of taps from two channels to two, with dense
rows near the ends, where the extension of the signal decides. The transpose of a bank is a bank, so exact adjoints need
no code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.linops.axes import matrix_along

MODES = (
    "zero",
    "constant",
    "symmetric",
    "reflect",
    "periodic",
    "smooth",
    "antisymmetric",
    "antireflect",
    "periodization",
)
_DENSE = 64  # a signal up to this length is transformed by one matrix product

Taps = tuple[float, ...]
Row = dict[tuple[int, int], float]  # (channel, position) -> weight


def n_coefficients(n: int, n_taps: int, mode: str) -> int:
    """The length of each band of a signal of n samples, as `pywt.dwt_coeff_len`."""
    return (n + 1) // 2 if mode == "periodization" else (n + n_taps - 1) // 2


def extension(t: int, n: int, mode: str) -> dict[int, float]:
    """Sample t, inside or outside, as a combination (index -> weight) of the samples 0 ... n - 1."""
    if 0 <= t < n:
        return {t: 1.0}
    if mode == "zero":
        return {}
    if mode == "constant" or (n == 1 and mode in ("reflect", "smooth", "antireflect")):
        return {0 if t < 0 else n - 1: 1.0}
    if mode == "periodic":
        return {t % n: 1.0}
    if mode == "periodization":  # the last sample of an odd length is repeated
        return {min(t % (n + n % 2), n - 1): 1.0}
    if mode in ("symmetric", "antisymmetric"):
        r = t % (2 * n)
        return {r: 1.0} if r < n else {2 * n - 1 - r: 1.0 if mode == "symmetric" else -1.0}
    if mode == "reflect":
        r = t % (2 * n - 2)
        return {r if r < n else 2 * n - 2 - r: 1.0}
    if mode == "smooth":
        end, inner, distance = (0, 1, -t) if t < 0 else (n - 1, n - 2, t - n + 1)
        return {end: 1.0 + distance, inner: -float(distance)}
    row: dict[int, float] = {}  # antireflect: x[end - d] = 2 x[end] - x[end + d], again and again
    sign = 1.0
    while not 0 <= t < n:
        end = 0 if t < 0 else n - 1
        row[end] = row.get(end, 0.0) + 2 * sign
        t, sign = 2 * end - t, -sign
    row[t] = row.get(t, 0.0) + sign
    return row


@dataclass(frozen=True)
class Edge:
    """The positions start ... stop[c] - 1 of both outputs as a dense matrix on few positions of both inputs."""

    start: int
    stop: tuple[int, int]
    columns: tuple[tuple[int, ...], tuple[int, ...]]
    matrix: Tensor
    _ready: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(start: int, stop: tuple[int, int], rows: Sequence[Row]) -> Edge:
        """From the rows of channel 0, then of channel 1."""
        used = sorted({column for row in rows for column in row})
        place = {column: i for i, column in enumerate(used)}
        matrix = np.zeros((len(rows), len(used)))
        for i, row in enumerate(rows):
            for column, weight in row.items():
                matrix[i, place[column]] = weight
        columns = tuple(tuple(p for c, p in used if c == channel) for channel in (0, 1))
        return Edge(start, stop, columns, torch.from_numpy(matrix))  # type: ignore[arg-type]

    def rows(self) -> dict[tuple[int, int], Row]:
        """Its rows by (channel, position)."""
        used = [(c, p) for c in (0, 1) for p in self.columns[c]]
        outputs = [(c, k) for c in (0, 1) for k in range(self.start, self.stop[c])]
        return {
            o: {u: w for u, w in zip(used, row, strict=True) if w}
            for o, row in zip(outputs, self.matrix.tolist(), strict=True)
        }

    def apply(self, sources: Sequence[Tensor], axis: int, outs: Sequence[Tensor]) -> None:
        """Write the positions of both outputs."""
        x = sources[0]
        key = (x.dtype, x.device)
        if key not in self._ready:
            index = [torch.tensor(c, dtype=torch.long, device=x.device) for c in self.columns]
            self._ready[key] = (self.matrix.to(x.device, x.dtype), *index)
        matrix, *index = self._ready[key]
        read = torch.cat([s.index_select(axis, i) for s, i in zip(sources, index, strict=True)], axis)
        values = matrix_along(matrix, read, axis)
        n = self.stop[0] - self.start
        outs[0].copy_(values.narrow(axis, 0, n))
        outs[1].copy_(values.narrow(axis, n, values.shape[axis] - n))


@dataclass(frozen=True)
class Bank:
    """Two channels to two channels: taps (channel, shift, weight) of each output on the positions start ... stop - 1,
    which are common to both, and edges before and after. `splits`: samples to bands, else bands to samples.
    """

    splits: bool
    lengths: tuple[int, int]  # of the outputs
    taps: tuple[tuple[tuple[int, int, float], ...], ...]
    start: int
    stop: int
    edges: tuple[Edge, ...]
    inputs: tuple[int, int]  # lengths of the inputs
    _ready: dict[Any, Any] = field(default_factory=dict, compare=False)  # forms of it that back ends keep

    @property
    def is_dense(self) -> bool:
        """Whether no position is regular, as for every short signal."""
        return self.start >= self.stop

    def matrix(self, x: Tensor) -> Tensor:
        """The whole of a dense bank as a matrix in the precision of x: samples in order, bands one behind the other."""
        key = ("matrix", x.dtype, x.device)
        if key not in self._ready:
            (edge,) = self.edges
            flat = lambda c, p, lengths, samples: 2 * p + c if samples else c * lengths[0] + p  # noqa: E731
            rows = [flat(c, k, self.lengths, not self.splits) for c in (0, 1) for k in range(self.lengths[c])]
            columns = [flat(c, p, self.inputs, self.splits) for c in (0, 1) for p in edge.columns[c]]
            matrix = np.zeros((sum(self.lengths), sum(self.inputs)))
            matrix[np.ix_(rows, columns)] = edge.matrix.numpy()
            self._ready[key] = torch.from_numpy(matrix).to(x.device, x.dtype)
        result: Tensor = self._ready[key]
        return result

    @property
    def unit(self) -> float | None:
        """The magnitude that all taps share (haar), if there are no edges."""
        weights = {abs(w) for taps in self.taps for _, _, w in taps}
        return weights.pop() if len(weights) == 1 and not self.edges and all(len(t) == 2 for t in self.taps) else None

    def transposed(self) -> Bank:
        """The transpose."""
        lengths = self.inputs
        taps: tuple[list[tuple[int, int, float]], ...] = ([], [])
        for c, entries in enumerate(self.taps):
            for source, shift, weight in entries:
                taps[source].append((c, -shift, weight))
        columns: dict[tuple[int, int], Row] = {}
        for edge in self.edges:
            for output, weights in edge.rows().items():
                for place, weight in weights.items():
                    columns.setdefault(place, {})[output] = weight
        # A position is regular if every row that the taps can reach from it is, and no edge touches it.
        shifts = [shift for entries in self.taps for _, shift, _ in entries] or [0]
        start, stop = max(self.start + max(shifts), 0), min(self.stop + min(shifts), *lengths)
        touched = sorted({p for _, p in columns})
        while start < stop and any(start <= p < (start + stop + 1) // 2 for p in touched):
            start += 1
        while start < stop and any((start + stop) // 2 <= p < stop for p in touched):
            stop -= 1

        def row(c: int, p: int) -> Row:
            found = {(source, p + s): w for source, s, w in taps[c] if self.start <= p + s < self.stop}
            for output, weight in columns.get((c, p), {}).items():
                found[output] = found.get(output, 0.0) + weight
            return found

        return _assemble(not self.splits, self.lengths, lengths, (tuple(taps[0]), tuple(taps[1])), start, stop, row)

    def apply(
        self,
        sources: Sequence[Tensor],
        axis: int,
        a: int,
        b: int,
        outs: Sequence[Tensor],
        unit: bool = False,
        first: int = 0,
    ) -> None:
        """Write the positions a ... b - 1, all regular, of both outputs.

        `unit` leaves the common magnitude away; `first` is the position at which the sources begin.
        """
        read = lambda c, s: sources[c].narrow(axis, a + s - first, b - a)  # noqa: E731
        for out, taps in zip(outs, self.taps, strict=True):
            if unit:
                (c0, s0, w0), (c1, s1, w1) = sorted(taps, key=lambda tap: -tap[2])
                torch.add(read(c0, s0), read(c1, s1), alpha=w1 / w0, out=out)
                continue
            if not taps:
                out.zero_()
                continue
            (c, s, w), *rest = taps
            torch.mul(read(c, s), w, out=out)
            for c, s, w in rest:
                out.add_(read(c, s), alpha=w)


def _assemble(
    splits: bool,
    inputs: tuple[int, int],
    lengths: tuple[int, int],
    taps: Any,
    start: int,
    stop: int,
    row: Callable[[int, int], Row],
) -> Bank:
    """A bank whose irregular positions are given by row(channel, position)."""
    if start >= stop:
        start = stop = max(lengths)
    parts = [(0, (start, start))] if start else []
    if start and start == stop:
        parts = [(0, lengths)]
    elif stop < max(lengths):
        parts.append((stop, lengths))
    edges = tuple(
        Edge.of(first, ends, [row(c, k) for c in (0, 1) for k in range(first, ends[c])]) for first, ends in parts
    )
    return Bank(splits, lengths, taps, start, stop, edges, inputs)


@lru_cache(maxsize=256)
def analysis(n: int, low: Taps, high: Taps, mode: str, adjoint: bool = False) -> Bank:
    """b_c[k] = sum_j h_c[j] x[2 k + o - j] for n samples, o = 1, or n_taps / 2 for periodization; or its transpose."""
    length = len(low)
    offset = length // 2 if mode == "periodization" else 1
    m = n_coefficients(n, length, mode)
    samples = ((n + 1) // 2, n // 2)
    filters = (low, high)
    if adjoint:
        return analysis(n, low, high, mode).transposed()

    def row(c: int, k: int) -> Row:
        found: Row = {}
        for j, h in enumerate(filters[c]):
            for t, w in extension(2 * k + offset - j, n, mode).items():
                found[t % 2, t // 2] = found.get((t % 2, t // 2), 0.0) + w * h
        return found

    taps = tuple(tuple(((offset - j) % 2, (offset - j) // 2, h) for j, h in enumerate(f) if h) for f in filters)
    start, stop = max(0, -((offset - length + 1) // 2)), min(m, (n - 1 - offset) // 2 + 1)
    if n <= _DENSE:
        start = stop
    return _assemble(True, samples, (m, m), taps, start, stop, row)


@lru_cache(maxsize=256)
def synthesis(n: int, low: Taps, high: Taps, mode: str, adjoint: bool = False) -> Bank:
    """x[t] = sum_c sum_k g_c[t + o - 2 k] b_c[k] for n samples, o = n_taps - 2, or n_taps / 2 - 1 for periodization."""
    length = len(low)
    periodic = mode == "periodization"
    offset = length // 2 - 1 if periodic else length - 2
    m = n_coefficients(n, length, mode)
    samples = ((n + 1) // 2, n // 2)
    if adjoint:
        return synthesis(n, low, high, mode).transposed()
    taps = tuple(
        tuple(
            (band, (p + offset - j) // 2, g)
            for band, f in enumerate((low, high))
            for j, g in enumerate(f)
            if g and (p + offset - j) % 2 == 0
        )
        for p in (0, 1)
    )

    def row(p: int, q: int) -> Row:
        found: Row = {}
        for band, shift, g in taps[p]:
            k = (q + shift) % m if periodic else q + shift
            if 0 <= k < m:
                found[band, k] = found.get((band, k), 0.0) + g
        return found

    shifts = [s for entries in taps for _, s, _ in entries] or [0]
    start, stop = max(0, -min(shifts)), min(n // 2, m - max(shifts))
    if n <= _DENSE:
        start = stop
    return _assemble(False, (m, m), samples, taps, start, stop, row)


def channels(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The even and odd samples along `axis` (counted from the end), as views."""
    even: Any = (..., slice(0, None, 2), *(slice(None),) * (-axis - 1))
    odd: Any = (..., slice(1, None, 2), *(slice(None),) * (-axis - 1))
    return x[even], x[odd]
