"""Block-sparse patterns: which rows meet which columns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError

_NAMES = ("ranges_i", "slices_i", "redranges_j", "ranges_j", "slices_j", "redranges_i")
Spans = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Ranges:
    """For every block of rows the spans of columns that it is reduced over, and the same with the roles exchanged.

    Args:
        ranges_i: (C, 2) int64, rows start .. end of each block.
        slices_i: (C,) int64, where the block's spans end in `redranges_j`.
        redranges_j: (S, 2) int64, columns start .. end of each span.
        ranges_j, slices_j, redranges_i: the same for blocks of columns.

    Rows outside every block get the identity of the reduction. One pattern serves every member of a batch.
    """

    ranges_i: Tensor
    slices_i: Tensor
    redranges_j: Tensor
    ranges_j: Tensor
    slices_j: Tensor
    redranges_i: Tensor
    # what was made for this pattern lives as long as it
    tasks: dict[Any, Any] = field(default_factory=dict, repr=False, init=False)

    def triple(self, by_column: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(blocks, ends of their spans, spans) for blocks of rows, or of columns."""
        if by_column:
            return self.ranges_j, self.slices_j, self.redranges_i
        return self.ranges_i, self.slices_i, self.redranges_j

    def blocks(self, by_column: bool) -> list[tuple[tuple[int, int], Spans]]:
        """Each block with its spans, as numbers."""
        return self._columns if by_column else self._rows

    @cached_property
    def _rows(self) -> list[tuple[tuple[int, int], Spans]]:
        return _listed(self.triple(False))

    @cached_property
    def _columns(self) -> list[tuple[tuple[int, int], Spans]]:
        return _listed(self.triple(True))

    def check(self, m: int, n: int) -> None:
        """Raise ArgumentError unless the pattern fits m rows and n columns."""
        for by_column, rows, columns in ((False, m, n), (True, n, m)):
            names = _NAMES[3:] if by_column else _NAMES[:3]
            blocks, ends, spans = self.triple(by_column)
            for name, t, size in ((names[0], blocks, rows), (names[2], spans, columns)):
                if t.numel() and (int(t.min()) < 0 or int(t.max()) > size or bool((t[:, 0] > t[:, 1]).any())):
                    raise ArgumentError(f"ranges: {name} must hold intervals start <= end within 0 .. {size}")
            if ends.numel() != blocks.shape[0] or (
                ends.numel() and (int(ends[0]) < 0 or bool((ends.diff() < 0).any()) or int(ends[-1]) > spans.shape[0])
            ):
                raise ArgumentError(
                    f"ranges: {names[1]} must hold {blocks.shape[0]} increasing ends within 0 .. {spans.shape[0]}"
                )
            order = blocks[blocks[:, 0].argsort()] if blocks.numel() else blocks
            order = order[order[:, 0] < order[:, 1]]
            if bool((order[1:, 0] < order[:-1, 1]).any()):
                raise ArgumentError(f"ranges: the intervals of {names[0]} overlap; every row may lie in one block only")


def _listed(triple: tuple[Tensor, Tensor, Tensor]) -> list[tuple[tuple[int, int], Spans]]:
    blocks, ends, spans = (t.tolist() for t in triple)
    found, start = [], 0
    for (first, last), end in zip(blocks, ends, strict=True):
        found.append(((first, last), [(a, b) for a, b in spans[start:end] if a < b]))
        start = end
    return found


_recent: OrderedDict[tuple[int, ...], tuple[Any, Any, Ranges]] = OrderedDict()  # patterns of the last calls


def as_ranges(value: Any, m: int, n: int) -> Ranges | None:
    """KeOps' 6-tuple of integer arrays as checked `Ranges`; None and Ranges as they are.

    The same six arrays, unchanged, give the same object: a pattern is checked and prepared once.
    """
    if value is None or isinstance(value, Ranges) or not isinstance(value, Sequence):
        return _as_ranges(value, m, n)
    key = (m, n, *map(id, value))
    versions = [getattr(t, "_version", None) for t in value]
    entry = _recent.get(key)
    if entry is not None and None not in versions and entry[1] == versions:
        return entry[2]
    ranges = _as_ranges(value, m, n)
    assert ranges is not None
    _recent[key] = (value, versions, ranges)
    if len(_recent) > 16:
        _recent.popitem(last=False)
    return ranges


def _as_ranges(value: Any, m: int, n: int) -> Ranges | None:
    if value is None:
        return None
    if isinstance(value, Ranges):
        value.check(m, n)
        return value
    if not isinstance(value, Sequence) or len(value) != 6:
        raise ArgumentError(f"ranges expects a tuple of 6 integer tensors ({', '.join(_NAMES)}); got {type(value)}")
    tensors = []
    for name, t in zip(_NAMES, value, strict=True):
        t = torch.as_tensor(t)
        if t.is_floating_point() or t.ndim != (1 if name.startswith("slices") else 2):
            raise ArgumentError(f"ranges: {name} must be an integer tensor; got {t.dtype} of shape {tuple(t.shape)}")
        tensors.append(t.to("cpu", torch.int64).contiguous())
    ranges = Ranges(*tensors)
    ranges.check(m, n)
    return ranges
