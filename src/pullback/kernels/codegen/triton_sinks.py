"""Reductions as lines of Triton: how tiles are absorbed, blocks of tiles added up, and the result stored.

Sums run over blocks of `steps` tiles (0: there are no blocks): element by element in the type of the data within a
block, and from block to block in the accumulator's type, for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pullback.kernels.ir.reductions import Program

STEPS = 32  # tiles in a block
NONE = 1 << 62  # index of an entry that is not there; larger than every index


@dataclass(frozen=True)
class Sink:
    """The lines of a reduction.

    Args:
        width: columns.
        total: Triton's type of what is kept from block to block; "" for that of the data.
        inner: the same for the sums within a block.
        k: how many the K-reductions keep.
        dim: components of the formula of the K-reductions.
    """

    width: int
    total: str = ""
    inner: str = ""
    k: int = 1
    dim: int = 1

    shifted = False
    steps = STEPS

    def live(self, words: int) -> int:
        """Registers for each pair of a tile: those of the sums and of three temporaries, of `words` each."""
        return self.width * (2 if self.inner else words) + 3 * words

    def functions(self) -> list[str]:
        """Functions that the lines call."""
        return []

    def start(self, rows: int, elem: str) -> list[str]:
        """Before everything."""
        return [f"total{k} = tl.zeros(({rows},), {self.total or elem})" for k in range(self.width)]

    def open(self, rows: int, columns: int, elem: str) -> list[str]:
        """Before a block."""
        return [f"sum{k} = tl.zeros(({rows}, {columns}), {self.inner or elem})" for k in range(self.width)]

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """A tile: `first` is the formula of shifted reductions, `names` hold the columns."""
        cast = f".to({self.inner})" if self.inner else ""
        return [f"sum{k} += tl.where(col_ok, {v}, 0.0){cast}" for k, v in enumerate(names)]

    def close(self, elem: str) -> list[str]:
        """After a block."""
        return [f"total{k} += tl.sum(sum{k}, 1).to({self.total or elem})" for k in range(self.width)]

    def store(self, offset: str, limit: str, first: bool, chunk: str | None, cast: str) -> list[str]:
        """After everything; `limit` masks columns beyond the last, `cast` converts."""
        return [
            f"tl.store(place + ({offset} + {k}), total{k}{cast}, mask=(rows < row_end){limit.format(k)})"
            for k in range(self.width)
        ]


class Product(Sink):
    """prod of all terms, column by column."""

    def functions(self) -> list[str]:
        """The product of two."""
        return ["@triton.jit", "def product(a, b):", "    return a * b", ""]

    def start(self, rows: int, elem: str) -> list[str]:
        """Ones."""
        return [f"total{k} = tl.full(({rows},), 1.0, {elem})" for k in range(self.width)]

    def open(self, rows: int, columns: int, elem: str) -> list[str]:
        """Ones."""
        return [f"sum{k} = tl.full(({rows}, {columns}), 1.0, {elem})" for k in range(self.width)]

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """Multiply."""
        return [f"sum{k} = sum{k} * tl.where(col_ok, {v}, 1.0)" for k, v in enumerate(names)]

    def close(self, elem: str) -> list[str]:
        """Multiply over the columns."""
        return [f"total{k} = total{k} * tl.reduce(sum{k}, 1, product)" for k in range(self.width)]


_FINITE = "tl.where(({0} == float('inf')) | ({0} == float('-inf')), 0.0, {0})"


class Shifted(Sink):
    """sum exp(F - m) G with the running maximum m of each row: log of it, or, divided by sum exp(F - m), a mean.

    An infinite maximum does not shift. The sums of a block start anew, and are joined to the total with its maximum.
    """

    shifted = True
    mean = False

    def live(self, words: int) -> int:
        """Registers for each pair of a tile; the weights are alive too."""
        return (self.width + self.mean + 4) * words

    def _all(self) -> list[str]:
        return [*map(str, range(self.width)), *(["w"] if self.mean else [])]

    def start(self, rows: int, elem: str) -> list[str]:
        """Sums of nothing."""
        lines = [f"total{k} = tl.zeros(({rows},), {self.total or elem})" for k in self._all()]
        return [f"top_all = tl.full(({rows},), float('-inf'), {elem})", *lines]

    def open(self, rows: int, columns: int, elem: str) -> list[str]:
        """Sums of nothing."""
        lines = [f"sum{k} = tl.zeros(({rows}, {columns}), {elem})" for k in self._all()]
        return [f"top = tl.full(({rows}, 1), float('-inf'), {elem})", *lines]

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """Raise the maximum, rescale the sums, add."""
        weights = {str(k): f"w * {v}" for k, v in enumerate(names)} or {"0": "w"}
        if self.mean:
            weights["w"] = "w"
        return [
            f"f = tl.where(col_ok, {first}, float('-inf'))",
            "new = tl.maximum(top, tl.max(f, 1)[:, None])",
            f"shift = {_FINITE.format('new')}",
            "w = tl.exp(f - shift)",
            f"keep = tl.exp({_FINITE.format('top')} - shift)",
            *(
                f"sum{k} = tl.where(top == float('-inf'), 0.0, sum{k} * keep) + tl.where(col_ok, {v}, 0.0)"
                for k, v in weights.items()
            ),
            "top = new",
        ]

    def close(self, elem: str) -> list[str]:
        """Join the sums of a block to the total."""
        total = self.total or elem
        return [
            "top_row = tl.sum(top, 1)",
            "new_row = tl.maximum(top_all, top_row)",
            f"shift_row = {_FINITE.format('new_row')}.to({total})",
            f"scale_all = tl.exp({_FINITE.format('top_all')}.to({total}) - shift_row)",
            f"scale_row = tl.exp({_FINITE.format('top_row')}.to({total}) - shift_row)",
            *(
                f"total{k} = tl.where(top_all == float('-inf'), 0.0, total{k} * scale_all)"
                f" + tl.where(top_row == float('-inf'), 0.0, tl.sum(sum{k}, 1).to({total}) * scale_row)"
                for k in self._all()
            ),
            "top_all = new_row",
        ]

    def store(self, offset: str, limit: str, first: bool, chunk: str | None, cast: str) -> list[str]:
        """Add the shift to the logarithms of the sums."""
        return [
            f"base = {_FINITE.format('top_all')}",
            *(
                f"tl.store(place + ({offset} + {k}), (base + tl.log(total{k})){cast}, "
                f"mask=(rows < row_end){limit.format(k)})"
                for k in range(self.width)
            ),
        ]


class Mean(Shifted):
    """(log sum exp F, mean of G with the weights exp F)."""

    mean = True

    def store(self, offset: str, limit: str, first: bool, chunk: str | None, cast: str) -> list[str]:
        """The logarithm stands before the means."""
        lines = []
        if first:
            mask = f" & ({chunk} == 0)" if chunk else ""
            value = f"({_FINITE.format('top_all')} + tl.log(totalw)){cast}"
            lines.append(f"tl.store(place, {value}, mask=(rows < row_end){mask})")
        for k in range(self.width):
            value = f"tl.where(totalw == 0.0, 0.0, total{k} / totalw){cast}"
            lines.append(f"tl.store(place + (1 + {offset} + {k}), {value}, mask=(rows < row_end){limit.format(k)})")
        return lines


class Smallest(Sink):
    """Indices of the K smallest; the state lies in registers, unsorted, and is sorted when it is stored.

    A tile is searched only while some row has an entry that is smaller than the largest of its state. Of equal
    entries the one with the smaller index is the smaller.
    """

    sign = ""
    steps = 0

    def live(self, words: int) -> int:
        """Registers for each pair of a tile; in double precision ptxas spills in tiles of 32 x 16."""
        return 8 if words == 1 else 20

    @property
    def slots(self) -> int:
        """K, rounded up to a power of two."""
        return 1 << (self.k - 1).bit_length()

    def start(self, rows: int, elem: str) -> list[str]:
        """No entries; slots beyond K hold what nothing is smaller than."""
        return [
            f"slot = tl.arange(0, {self.slots})[None, :].to(tl.int64)",
            f"best = tl.zeros(({rows}, {self.slots}), {elem}) + tl.where(slot < {self.k}, float('inf'), float('-inf'))",
            f"where = tl.zeros(({rows}, {self.slots}), tl.int64) + tl.where(slot < {self.k}, {NONE} + slot, -1 - slot)",
        ]

    def open(self, rows: int, columns: int, elem: str) -> list[str]:
        """A block has no state of its own."""
        return []

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """Take the smallest of the tile into the state, as long as it is smaller than the largest there."""
        return [
            f"f = tl.where(col_ok & row_ok, {self.sign}{names[0]}, float('inf'))",
            "f = tl.where(f != f, float('inf'), f)",
            f"j = tl.where(col_ok & row_ok, cols.to(tl.int64)[None, :], {2 * NONE - 1})",
            *self._compare(),
            "while go > 0:",
            "    at = (best == worst) & (where == last) & better",
            "    best = tl.where(at, low, best)",
            "    where = tl.where(at, number, where)",
            "    taken = j == number",
            "    f = tl.where(taken, float('inf'), f)",
            f"    j = tl.where(taken, {2 * NONE - 1}, j)",
            *(f"    {line}" for line in self._compare()),
        ]

    def _compare(self) -> list[str]:
        return [
            "low = tl.min(f, 1)[:, None]",
            f"number = tl.min(tl.where(f == low, j, {2 * NONE - 1}), 1)[:, None]",
            "worst = tl.max(best, 1)[:, None]",
            f"last = tl.max(tl.where(best == worst, where, {-NONE}), 1)[:, None]",
            "better = (low < worst) | ((low == worst) & (number < last))",
            "go = tl.max(tl.max(better.to(tl.int32), 1), 0)",
        ]

    def close(self, elem: str) -> list[str]:
        """A block has no state of its own."""
        return []

    def store(self, offset: str, limit: str, first: bool, chunk: str | None, cast: str) -> list[str]:
        """In order, -1 for what is not there; the slots beyond K come first and are stored nowhere."""
        extra = self.slots - self.k
        return [
            f"for s in range({-extra}, {self.k}):",
            "    low = tl.min(best, 1)[:, None]",
            f"    number = tl.min(tl.where(best == low, where, {2 * NONE - 1}), 1)[:, None]",
            f"    value = tl.sum(tl.where(number >= {NONE}, -1, number), 1)",
            f"    tl.store(place + ({offset} + s * {self.dim}), value, mask=(rows < row_end) & (s >= 0))",
            "    taken = (best == low) & (where == number)",
            "    best = tl.where(taken, float('inf'), best)",
            f"    where = tl.where(taken, {2 * NONE - 1}, where)",
        ]


class Largest(Smallest):
    """Indices of the K largest."""

    sign = "-"


_SINKS: dict[str, Callable[..., Sink]] = {
    "Sum": Sink,
    "Prod": Product,
    "LogSumExp": Shifted,
    "SoftMax": Mean,
    "ArgKMin": Smallest,
    "ArgKMax": Largest,
}


def sink_of(program: Program, width: int) -> Sink:
    """The sink of `width` columns of a program with one result; Kahan's scheme sums in float64."""
    double = "tl.float64" if program.accumulator == "float64" or program.scheme == "kahan_scheme" else ""
    total = "" if program.accumulator == "float32" else "tl.float64"
    if program.kind in ("Prod", "ArgKMin", "ArgKMax"):
        total = double = ""
    return _SINKS[program.kind](width, total, double, program.k, program.exprs[0].dim)
