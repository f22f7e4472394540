"""How the columns of a result are shared among kernels, and what each of them keeps in registers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from pullback.kernels.codegen import triton_dot
from pullback.kernels.codegen.triton_dot import Term
from pullback.kernels.codegen.triton_values import UNROLL
from pullback.kernels.codegen.triton_vectors import RESIDENT, Chunk, split
from pullback.kernels.ir.expr import PARAMETER, I
from pullback.kernels.ir.reductions import KEPT, Program
from pullback.kernels.plan.lower import Lowered, Segment, Value, lower

WIDE = 8  # columns of a result that one kernel sums; more are computed by others, which repeat what they share
MOST = 256  # columns of products of matrices that one kernel sums

ONE = Value("Const", (), (1.0,), 0, False)


@dataclass(frozen=True, eq=False)
class Wide:
    """Columns start .. start + size of a result, as sums of products of matrices."""

    start: int
    size: int
    terms: tuple[Term, ...]

    @property
    def chunks(self) -> list[Chunk]:
        """Those that one program computes."""
        if self.size <= RESIDENT:
            return split(self.size)
        bound = self.size if self.size % RESIDENT else None
        return [replace(c, size=bound) for c in split(RESIDENT, "d0")]


@dataclass(frozen=True, eq=False)
class Piece:
    """Columns of a result that one kernel computes.

    Args:
        columns: a value for each, and the number d in its loop if it is the body of one; of a long loop, whose programs
            of the grid compute `width` columns each, the body alone.
        start: the first column.
        size: how many.
        width: how many a program of the grid computes.
        wides: columns that are products of matrices; `columns` are then the others, in the places `places`, and after
            them sums that the products need.
        places: where `columns` stand in the result.
    """

    columns: tuple[tuple[Value, int | None], ...]
    start: int
    size: int
    width: int
    wides: tuple[Wide, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def long(self) -> bool:
        """Whether several programs share the columns."""
        return self.width < self.size

    @property
    def sums(self) -> int:
        """How many are summed element by element."""
        return len(self.columns) if self.wides else self.width

    @property
    def products(self) -> list[tuple[Term, Chunk]]:
        """The sums of products of matrices, one after the other."""
        return [(t, c) for w in self.wides for c in w.chunks for t in w.terms if t.column is not None]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Columns of each of `products`."""
        return tuple(c.width for _, c in self.products)


def kept_axis(program: Program) -> int:
    """Category of the axis whose rows are kept; sums over both are first summed over j."""
    kept = KEPT[program.axes[0]]
    return I if kept == PARAMETER else kept


def results(program: Program) -> list[Program]:
    """The programs of its results, one by one."""
    if len(program.axes) == 1:
        return [program]
    return [replace(program, exprs=(e,), axes=(a,)) for e, a in zip(program.exprs, program.axes, strict=True)]


@lru_cache(maxsize=1024)
def lowered(program: Program) -> Lowered:
    """The scalar code for Triton. Raises TooLarge."""
    return lower(program, "triton")


@lru_cache(maxsize=1024)
def loops(program: Program) -> tuple[tuple[int, bool], ...]:
    """(length, whether tl.dot can compute it) of each sum over d that is not written out."""
    rows = kept_axis(program)
    found = [v for v in lowered(program).values() if v.op == "Loop" and v.params[0] > UNROLL]
    return tuple((v.params[0], triton_dot.loop(v, rows) is not None) for v in found)


@lru_cache(maxsize=1024)
def pieces(program: Program) -> tuple[Piece, ...]:
    """The pieces of a program with one result. Raises TooLarge."""
    groups = lowered(program).segments
    if program.kind == "LogSumExp" and len(groups) == 1:
        return (Piece((), 0, 1, 1),)
    wides: dict[int, Wide] = {}
    double = program.accumulator == "float64" or program.scheme == "kahan_scheme"
    if program.kind in ("Sum", "SoftMax", "LogSumExp") and not double:
        for s in groups[-1]:
            if s.rolled and s.size >= triton_dot.LEAST:
                terms = triton_dot.terms(s.values[0], kept_axis(program))
                if terms is not None:
                    wides[s.start] = Wide(s.start, s.size, terms)
    narrow = [s for s in groups[-1] if s.start not in wides]
    together = _wide(tuple(wides.values()), narrow)
    if (
        wides
        and len(together.columns) <= WIDE
        and sum(together.tiles) <= MOST
        and all(w.size <= RESIDENT for w in wides.values())
        and all(not s.rolled or s.size <= WIDE for s in narrow)
    ):
        return (together,)
    found = _narrow(narrow, 1 if program.kind.startswith("Arg") else WIDE)
    return tuple(sorted(found + [_wide((w,), []) for w in wides.values()], key=lambda p: p.start))


def _wide(wides: tuple[Wide, ...], narrow: list[Segment]) -> Piece:
    own = [(s.start + d, v, d if s.rolled else None) for s in narrow for d, v in enumerate(s.values * _times(s))]
    needed: list[tuple[Value, int | None]] = [
        (t.factor or ONE, None) for w in wides for t in w.terms if t.column is None
    ]
    columns = tuple((v, d) for _, v, d in own) + tuple(needed)
    start = min((w.start for w in wides), default=0)
    if len(wides) == 1 and not own:
        size, width = wides[0].size, min(wides[0].size, RESIDENT)
        return Piece(columns, start, size, width, wides)
    size = sum(w.size for w in wides) + len(own)
    return Piece(columns, min([start, *(k for k, _, _ in own)]), size, size, wides, tuple(k for k, _, _ in own))


def _times(s: Segment) -> int:
    return s.size if s.rolled else 1


def _narrow(segments: list[Segment], wide: int) -> list[Piece]:
    found: list[Piece] = []
    waiting: list[tuple[Value, int | None]] = []

    def finish(stop: int) -> None:
        for k in range(0, len(waiting), wide):
            part = tuple(waiting[k : k + wide])
            found.append(Piece(part, stop - len(waiting) + k, len(part), len(part)))
        waiting.clear()

    stop = 0
    for s in segments:
        if s.start != stop:
            finish(stop)
        stop = s.start + s.size
        if s.rolled and s.size > wide:
            finish(s.start)
            found.append(Piece(((s.values[0], None),), s.start, s.size, wide))
        else:
            waiting += [(s.values[0], d) for d in range(s.size)] if s.rolled else [(v, None) for v in s.values]
    finish(stop)
    return found
