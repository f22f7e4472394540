"""Banks along several axes, block by block: the bands of one level from a signal, and a signal from its bands.

Bands are named as in PyWavelets: one letter an axis, outermost first, `a` for approximation and `d` for detail. A block
of rows goes through all axes while it lies in the cache, and only the finished bands are written to memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from pullback.linops._wavelet_bank import Bank, Edge, channels
from pullback.linops._wavelet_numba import kernels, run
from pullback.linops.axes import matrix_along

_BLOCK = 1 << 17  # elements that torch works on at a time, so that every tap finds them in cache
_NATIVE = 1 << 12  # elements from which numba is used,
_NATIVE_BLOCK = 1 << 20  # on so many at a time

Part = tuple[int, tuple[int, int], Edge | None]  # positions start ... stop[c] - 1 of the output channels


@dataclass(frozen=True)
class _Way:
    """How a level is computed: by numba, or by torch with or without the magnitude that all taps share (haar)."""

    native: bool
    unit: bool
    gain: float

    @property
    def block(self) -> int:
        """Elements that are worked on at a time."""
        return _NATIVE_BLOCK if self.native else _BLOCK

    @staticmethod
    def of(x: Tensor, banks: Sequence[Bank]) -> _Way:
        if x.device.type == "cpu" and x.numel() >= _NATIVE and kernels() is not None:
            return _Way(True, False, 1.0)
        units = [bank.unit for bank in banks]
        return _Way(False, True, math.prod(u for u in units if u)) if all(units) else _Way(False, False, 1.0)


def split(x: Tensor, banks: Sequence[Bank], axes: Sequence[int], bands: Mapping[str, Tensor]) -> None:
    """Write the bands of x. `axes` ascend and are counted from the end, one bank each; leading axes are the batch."""
    if all(bank.is_dense for bank in banks):
        for bank, axis in zip(banks, axes, strict=True):
            x = matrix_along(bank.matrix(x), x, axis)
        for key, part in _corners(x, axes).items():
            bands[key].copy_(part)
        return
    way = _Way.of(x, banks)
    for index in _images(x, axes[0], way.block):
        _split(x[index], banks, axes, {key: band[index] for key, band in bands.items()}, way)


def merge(bands: Mapping[str, Tensor], banks: Sequence[Bank], axes: Sequence[int], out: Tensor) -> None:
    """Write the signal of the bands; arguments as `split`."""
    if all(bank.is_dense for bank in banks):
        shape = list(out.shape)
        for bank, axis in zip(banks, axes, strict=True):
            shape[axis] = sum(bank.inputs)
        whole = out.new_empty(shape)
        for key, part in _corners(whole, axes).items():
            part.copy_(bands[key])
        for bank, axis in zip(banks, axes, strict=True):
            whole = matrix_along(bank.matrix(out), whole, axis)
        out.copy_(whole)
        return
    way = _Way.of(out, banks)
    for index in _images(out, axes[0], way.block):
        _merge({key: band[index] for key, band in bands.items()}, banks, axes, out[index], way)


def _corners(x: Tensor, axes: Sequence[int]) -> dict[str, Tensor]:
    """The parts, by their names, of a tensor of all bands of one level."""
    parts = {"": x}
    for axis in axes:
        halves = {key: part.chunk(2, axis) for key, part in parts.items()}
        parts = {key + letter: pair[i] for key, pair in halves.items() for i, letter in enumerate("ad")}
    return parts


def _images(x: Tensor, first: int, block: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of the axes before `first` that leave about a block, or the whole of the axes from `first` on."""
    lead = x.ndim + first
    if not x.numel():
        return
    if x.device.type != "cpu":
        yield ()
        return
    size = math.prod(x.shape[lead:])
    for k in range(lead, 0, -1):
        if size * x.shape[k - 1] > block:
            step = max(1, block // size)
            for outer in product(*(range(n) for n in x.shape[: k - 1])):
                for i in range(0, x.shape[k - 1], step):
                    yield (*outer, slice(i, i + step))
            return
        size *= x.shape[k - 1]
    yield ()


def _parts(bank: Bank, x: Tensor, axis: int, way: _Way) -> Iterator[Part]:
    """The edges, then the regular positions in blocks; numba takes both together. `x` is the side that is split."""
    first, end = (0, max(bank.lengths)) if way.native else (bank.start, bank.stop)
    if not way.native:
        for edge in bank.edges:
            yield edge.start, edge.stop, edge
    elif axis == -1:
        yield 0, bank.lengths, None
        return
    if first < end:
        each = 2 * max(1, x.numel() // x.shape[axis])
        step = max(8, way.block // each) if x.device.type == "cpu" else end
        count = -(-(end - first) // step)
        for i in range(count):
            a, b = (first + (end - first) * k // count for k in (i, i + 1))
            yield a, (min(b, bank.lengths[0]), min(b, bank.lengths[1])), None


def _split(x: Tensor, banks: Sequence[Bank], axes: Sequence[int], bands: Mapping[str, Tensor], way: _Way) -> None:
    bank, axis, last = banks[0], axes[0], len(axes) == 1
    sources = channels(x, axis)
    for start, (stop, _), edge in _parts(bank, x, axis, way):
        inner = {key: band.narrow(axis, start, stop - start) for key, band in bands.items()}
        if last:
            outs = (inner["a"], inner["d"])
        else:
            shape = list(x.shape)
            shape[axis] = stop - start
            outs = (x.new_empty(shape), x.new_empty(shape))
        _run(bank, sources, axis, start, (stop, stop), edge, outs, way, last)
        if not last:
            for letter, out in zip("ad", outs, strict=True):
                rest = {key[1:]: band for key, band in inner.items() if key[0] == letter}
                _split(out, banks[1:], axes[1:], rest, way)


def _merge(bands: Mapping[str, Tensor], banks: Sequence[Bank], axes: Sequence[int], out: Tensor, way: _Way) -> None:
    bank, axis, last = banks[0], axes[0], len(axes) == 1
    for start, stop, edge in _parts(bank, out, axis, way):
        count = sum(stop) - 2 * start
        block = out.narrow(axis, 2 * start, count)
        done: dict[str, Tensor] = {}
        for key in ("".join(k) for k in product("ad", repeat=len(axes) - 1)):
            sources = bands["a" + key], bands["d" + key]
            if last:
                result = block
            else:
                shape = list(sources[0].shape)
                shape[axis] = count
                result = done[key] = out.new_empty(shape)
            _run(bank, sources, axis, start, stop, edge, channels(result, axis), way, last)
        if not last:
            _merge(done, banks[1:], axes[1:], block, way)


def _run(
    bank: Bank,
    sources: Sequence[Tensor],
    axis: int,
    start: int,
    stop: tuple[int, int],
    edge: Edge | None,
    outs: Sequence[Tensor],
    way: _Way,
    last: bool,
) -> None:
    """One bank on one part. Samples that alternate in memory are gathered first or scattered last, with the gain."""
    if way.native:
        run(bank, sources, axis, start, stop, outs)
        return
    if edge is not None:
        edge.apply(sources, axis, outs)
        return
    a, b, unit, gain = start, stop[0], way.unit, way.gain if last else 1.0
    if axis != -1:
        bank.apply(sources, axis, a, b, outs, unit)
        if gain != 1.0:
            for out in outs:
                out.mul_(gain)
    elif bank.splits:
        shifts = [s for taps in bank.taps for _, s, _ in taps]
        low, high = min(shifts), max(shifts)
        first = max(0, a + low)
        read = [s.narrow(-1, first, min(b + high, s.shape[-1]) - first) for s in sources]
        copies = [torch.mul(r, gain) if gain != 1.0 else r.contiguous() for r in read]
        bank.apply(copies, axis, a, b, outs, unit, first)
    else:
        buffers = [torch.empty(out.shape, dtype=out.dtype, device=out.device) for out in outs]
        bank.apply(sources, axis, a, b, buffers, unit)
        for buffer, out in zip(buffers, outs, strict=True):
            if gain != 1.0:
                torch.mul(buffer, gain, out=out)
            else:
                out.copy_(buffer)
