"""Reductions as lines of Triton: how tiles are absorbed, blocks of tiles added up, and the result stored.

Sums run over blocks of `steps` tiles (0: there are no blocks): element by element in the type of the data within a
block, and from block to block in the accumulator's type, for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pullback.kernels.codegen.triton_special import exponential
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
    searches = False
    steps = STEPS
    first = 0  # column of the result that column 0 is

    def live(self, words: int) -> int:
        """Registers for each pair of a tile: those of the sums and of three temporaries, of `words` each."""
        return self.width * (2 if self.inner else words) + 3 * words

    def functions(self) -> list[str]:
        """Functions that the lines call."""
        return []

    def names(self) -> list[str]:
        """Suffixes of what is summed element by element."""
        return list(map(str, range(self.width)))

    def start(self, rows: int, elem: str) -> list[str]:
        """Before everything."""
        return [f"total{k} = tl.zeros(({rows},), {self.total or elem})" for k in self.names()]

    def open(self, rows: int, columns: int, elem: str) -> list[str]:
        """Before a block."""
        return [f"sum{k} = tl.zeros(({rows}, {columns}), {self.inner or elem})" for k in self.names()]

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """A tile: `first` is the formula of shifted reductions, `names` hold the columns."""
        cast = f".to({self.inner})" if self.inner else ""
        return [f"sum{k} += tl.where(col_ok, {v}, 0.0){cast}" for k, v in enumerate(names)]

    def close(self, elem: str) -> list[str]:
        """After a block."""
        return [*(f"part{k} = tl.sum(sum{k}, 1).to({self.total or elem})" for k in self.names()), *self.join(elem)]

    def join(self, elem: str) -> list[str]:
        """Add what a block (or a part of the columns, that another program summed) came to."""
        return [f"total{k} += part{k}" for k in self.names()]

    def state(self) -> list[tuple[str, str, int]]:
        """(name before a join, name of what is joined to it, columns; 0 for a vector) of what a program keeps."""
        return [(f"total{k}", f"part{k}", 0) for k in self.names()]

    def value(self, text: str, wide: bool) -> str:
        """A number of the result, from its sum."""
        return text

    def finish(self, elem: str) -> list[str]:
        """Before numbers of the result are read."""
        return []

    def store(self, places: Sequence[str | None], limit: str, chunk: str, cast: str) -> list[str]:
        """After everything: `places` of the columns (None: it is not stored), `limit` masks those beyond the last.

        `chunk` holds where the result's first column is stored, `cast` converts.
        """
        return [
            f"tl.store(place + ({where}), {self.value(f'total{k}', False)}{cast}, "
            f"mask=(rows < row_end){limit.format(k)})"
            for k, where in enumerate(places)
            if where is not None
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
        return [f"part{k} = tl.reduce(sum{k}, 1, product)" for k in range(self.width)] + self.join(elem)

    def join(self, elem: str) -> list[str]:
        """Multiply."""
        return [f"total{k} = total{k} * part{k}" for k in range(self.width)]


FINITE = "tl.where(({0} == float('inf')) | ({0} == float('-inf')), 0.0, {0})"


class Shifted(Sink):
    """sum exp(F - m) G with the running maximum m of each row: log of it, or, divided by sum exp(F - m), a mean.

    An infinite maximum does not shift. The sums of a block start anew, and are joined to the total with its maximum.
    """

    shifted = True
    mean = False

    def live(self, words: int) -> int:
        """Registers for each pair of a tile; the weights are alive too."""
        return (self.width + self.mean + 4) * words

    def names(self) -> list[str]:
        """Suffixes of what is summed element by element."""
        return [*super().names(), *(["w"] if self.mean else [])]

    def start(self, rows: int, elem: str) -> list[str]:
        """Sums of nothing."""
        return [f"top_all = tl.full(({rows},), float('-inf'), {elem})", *super().start(rows, elem)]

    def open(self, rows: int, columns: int, elem: str) -> list[str]:
        """Sums of nothing."""
        return [f"top = tl.full(({rows}, 1), float('-inf'), {elem})", *super().open(rows, columns, elem)]

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """Raise the maximum, rescale the sums, add."""
        weights = {str(k): f"tl.where(col_ok, w * {v}, 0.0)" for k, v in enumerate(names)} or {"0": "w"}
        if self.mean:
            weights["w"] = "w"
        top = FINITE.format("top")
        return [
            f"f = tl.where(col_ok, {first}, float('-inf'))",
            "new = tl.maximum(top, tl.max(f, 1)[:, None])",
            f"shift = {FINITE.format('new')}",
            f"w = {exponential('(f - shift)', elem)}",
            f"keep = {exponential(f'({top} - shift)', elem)}",
            f"keep = tl.where(top == float('-inf'), 0.0, keep).to({elem})",
            *(f"sum{k} = sum{k} * keep + {v}" for k, v in weights.items()),
            "top = new",
        ]

    def close(self, elem: str) -> list[str]:
        """Join the sums of a block to the total."""
        return ["top_row = tl.sum(top, 1)", *super().close(elem)]

    def join(self, elem: str) -> list[str]:
        """Bring both to the larger maximum."""
        total = self.total or elem
        return [
            "new_row = tl.maximum(top_all, top_row)",
            f"shift_row = {FINITE.format('new_row')}.to({total})",
            f"scale_all = tl.exp({FINITE.format('top_all')}.to({total}) - shift_row)",
            f"scale_row = tl.exp({FINITE.format('top_row')}.to({total}) - shift_row)",
            *(
                f"total{k} = tl.where(top_all == float('-inf'), 0.0, total{k} * scale_all)"
                f" + tl.where(top_row == float('-inf'), 0.0, part{k} * scale_row)"
                for k in self.names()
            ),
            "top_all = new_row",
        ]

    def state(self) -> list[tuple[str, str, int]]:
        """The maximum too."""
        return [("top_all", "top_row", 0), *super().state()]

    def finish(self, elem: str) -> list[str]:
        """The shift."""
        return [f"base = {FINITE.format('top_all')}"]

    def value(self, text: str, wide: bool) -> str:
        """The shift is added to the logarithms of the sums."""
        return f"(base{'[:, None]' if wide else ''} + tl.log({text}))"


class Mean(Shifted):
    """(log sum exp F, mean of G with the weights exp F)."""

    mean = True
    first = 1

    def value(self, text: str, wide: bool) -> str:
        """Divided by the sum of the weights."""
        w = "totalw[:, None]" if wide else "totalw"
        return f"tl.where({w} == 0.0, 0.0, {text} / {w})"

    def store(self, places: Sequence[str | None], limit: str, chunk: str, cast: str) -> list[str]:
        """The logarithm stands before the means."""
        lines = []
        if chunk:
            lines.append(f"tl.store(place, (base + tl.log(totalw)){cast}, mask=(rows < row_end) & ({chunk} == 0))")
        return [*lines, *super().store(places, limit, chunk, cast)]


class Smallest(Sink):
    """Indices of the K smallest; the state lies in registers, unsorted, and is sorted when it is stored.

    A tile is searched only while some row has an entry that is smaller than the largest of its state. Of equal
    entries the one with the smaller index is the smaller.
    """

    sign = ""
    searches = True
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
            *self.search(),
        ]

    def search(self) -> list[str]:
        """Take entries f with the numbers j into the state."""
        return [
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

    def join(self, elem: str) -> list[str]:
        """Of what another program kept, the slots without an entry are left out."""
        return [
            f"entry = (slot < {self.k}) & row_ok & (j < {NONE})",
            "f = tl.where(entry, f, float('inf'))",
            f"j = tl.where(entry, j, {2 * NONE - 1})",
            *self.search(),
        ]

    def state(self) -> list[tuple[str, str, int]]:
        """Values and numbers."""
        return [("best", "f", self.slots), ("where", "j", self.slots)]

    def store(self, places: Sequence[str | None], limit: str, chunk: str, cast: str) -> list[str]:
        """In order, -1 for what is not there; the slots beyond K come first and are stored nowhere."""
        extra = self.slots - self.k
        return [
            f"for s in range({-extra}, {self.k}):",
            "    low = tl.min(best, 1)[:, None]",
            f"    number = tl.min(tl.where(best == low, where, {2 * NONE - 1}), 1)[:, None]",
            f"    value = tl.sum(tl.where(number >= {NONE}, -1, number), 1)",
            f"    tl.store(place + ({places[0]} + s * {self.dim}), value, mask=(rows < row_end) & (s >= 0))",
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
