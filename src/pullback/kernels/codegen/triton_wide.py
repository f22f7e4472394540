"""Reductions as lines of Triton where columns of the result are products of matrices, by tl.dot.

There are no blocks of tiles: each tile is added to sums of a row in the accumulator's type, and each product to a tile
of (rows, columns of the result). In float32 such a tile has a second one with the rounding errors of the first (Kahan's
scheme), because tensor cores round towards zero where they add up more than one product themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pullback.kernels.codegen.triton_sinks import FINITE, Mean, Shifted, Sink
from pullback.kernels.codegen.triton_special import exponential
from pullback.kernels.ir.reductions import Program


@dataclass(frozen=True)
class Wide(Sink):
    """sum over columns; `tiles` are the columns of each sum of products, `exact` says that rounding is made up for."""

    tiles: tuple[int, ...] = ()
    exact: bool = False

    steps = 0

    def start(self, rows: int, elem: str) -> list[str]:
        """Zeros."""
        names = [f"{name}{a}" for a in range(len(self.tiles)) for name in ("wide", *(["rest"] if self.exact else []))]
        widths = {name: self.tiles[int(name[4:])] for name in names}
        return [*super().start(rows, elem), *(f"{k} = tl.zeros(({rows}, {w}), {elem})" for k, w in widths.items())]

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """What is summed element by element."""
        total = self.total or elem
        return [f"total{k} += tl.sum({self.weight(v, elem)}, 1).to({total})" for k, v in enumerate(names)]

    def weight(self, name: str, elem: str) -> str:
        """The left factor of a product, from what does not depend on d, 0 beyond the last column."""
        return f"tl.where(col_ok & row_ok, {name or f'tl.full((1, 1), 1.0, {elem})'}, 0.0)"

    def multiply(self, a: int, product: str) -> list[str]:
        """Add a product of matrices."""
        if not self.exact:
            return [f"wide{a} = wide{a} + {product}"]
        return [
            f"more = {product} - rest{a}",  # a sum would be left to the tensor cores
            f"next = wide{a} + more",
            f"rest{a} = (next - wide{a}) - more",
            f"wide{a} = next",
        ]

    def finish(self, elem: str) -> list[str]:
        """The rest is taken off."""
        return [f"wide{a} = wide{a} - rest{a}" for a in range(len(self.tiles)) if self.exact] + super().finish(elem)

    def join(self, elem: str) -> list[str]:
        """Add what another program summed."""
        return [*super().join(elem), *(f"wide{a} += much{a}.to({elem})" for a in range(len(self.tiles)))]

    def state(self) -> list[tuple[str, str, int]]:
        """The tiles too."""
        return [*super().state(), *((f"wide{a}", f"much{a}", w) for a, w in enumerate(self.tiles))]


class WideShifted(Wide, Shifted):
    """log sum exp(F - m) G with the running maximum m of each row."""

    def absorb(self, first: str, names: Sequence[str], elem: str) -> list[str]:
        """Raise the maximum, rescale what was summed, add."""
        total = self.total or elem
        sums = {str(k): f"tl.where(col_ok, w * {v}, 0.0)" for k, v in enumerate(names)}
        sums |= {"w": "w"} if self.mean else {}
        tiles = [f"{name}{a}" for a in range(len(self.tiles)) for name in ("wide", *(["rest"] if self.exact else []))]
        top = FINITE.format("top_all")
        return [
            f"f = tl.where(col_ok, {first} + tl.zeros_like(row_ok.to({elem})), float('-inf'))",
            "new = tl.maximum(top_all, tl.max(f, 1))",
            f"shift = {FINITE.format('new')}",
            f"w = {exponential('(f - shift[:, None])', elem)}",
            f"keep = {exponential(f'({top} - shift)', elem)}",
            f"keep = tl.where(top_all == float('-inf'), 0.0, keep).to({elem})",
            *(f"total{k} = total{k} * keep.to({total}) + tl.sum({v}, 1).to({total})" for k, v in sums.items()),
            *(f"{name} = {name} * keep[:, None]" for name in tiles),
            "top_all = new",
        ]

    def weight(self, name: str, elem: str) -> str:
        """Weights are 0 beyond the last column."""
        return f"tl.where(col_ok, w * {name}, 0.0)" if name else "w"

    def join(self, elem: str) -> list[str]:
        """Bring both to the larger maximum."""
        lines = Shifted.join(self, elem)
        more = [
            f"wide{a} = tl.where((top_all == float('-inf'))[:, None], 0.0, wide{a} * scale_all[:, None])"
            f" + tl.where((top_row == float('-inf'))[:, None], 0.0, much{a} * scale_row[:, None])"
            for a in range(len(self.tiles))
        ]
        return [*lines[:-1], *(f"{line.replace(' = ', ' = (', 1)}).to({elem})" for line in more), lines[-1]]


class WideMean(WideShifted, Mean):
    """(log sum exp F, mean of G with the weights exp F)."""

    mean = True


_SINKS: dict[str, type[Wide]] = {"Sum": Wide, "LogSumExp": WideShifted, "SoftMax": WideMean}


def wide_sink(program: Program, width: int, tiles: tuple[int, ...], data: str) -> Wide:
    """The sink of `width` columns that are summed element by element, and of `tiles`."""
    exact = data == "float32" and program.accumulator == "auto"
    total = "tl.float64" if exact or data == "float64" else ""
    return _SINKS[program.kind](width, total, tiles=tiles, exact=exact)
