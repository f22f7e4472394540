"""The kernel of a Program as Triton text: tiles of rows and columns, summed element by element and reduced once.

A `Kernel` computes some columns of one result. Its text holds no size but the dimensions of the formula: numbers of
rows, columns and batch members, and strides, are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pullback.core.errors import PullbackError
from pullback.kernels.codegen.triton_sinks import sink_of
from pullback.kernels.codegen.triton_values import UNROLL, Values
from pullback.kernels.ir.expr import PARAMETER, I
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import KEPT, OVER_BOTH, Program
from pullback.kernels.plan.lower import Lowered, Value, lower

WIDE = 8  # columns of a result that one kernel sums; more are computed by others, which repeat what they share
PIECES = 32  # kernels for one result above which compiling takes longer than anybody waits
DEEP = 250  # operations in a chain beyond which the recursive writer would come near Python's limit
LARGEST_K = 64  # of the K-reductions, whose state lies in registers


@dataclass(frozen=True)
class Piece:
    """Columns of a result that one kernel computes.

    Args:
        columns: a value for each, and the number d in its loop if it is the body of one; of a long loop, whose programs
            of the grid compute `WIDE` columns each, the body alone.
        start: the first column.
        size: how many.
        width: how many a program of the grid computes.
    """

    columns: tuple[tuple[Value, int | None], ...]
    start: int
    size: int
    width: int

    @property
    def long(self) -> bool:
        """Whether several programs share the columns."""
        return self.width < self.size


@dataclass(frozen=True)
class Kernel:
    """What a text depends on.

    Args:
        program: with one result.
        piece: number of the piece of the result.
        elem: "float32" or "float64", the type that is computed in.
        dense: for each argument, whether its rows lie one after the other without gaps.
        batch: number of batch axes.
        sparse: rows meet only the columns of a block-sparse pattern.
    """

    program: Program
    piece: int
    elem: str
    dense: tuple[bool, ...]
    batch: int
    sparse: bool

    @property
    def rows(self) -> int:
        """Category of the axis whose rows are kept; sums over both are first summed over j."""
        kept = KEPT[self.program.axes[0]]
        return I if kept == PARAMETER else kept

    @property
    def tile(self) -> tuple[int, int, int]:
        """(rows, columns, warps)."""
        return _tile(self.program, self.piece, 2 if self.elem == "float64" else 1)


@lru_cache(maxsize=4096)
def _tile(program: Program, piece: int, words: int) -> tuple[int, int, int]:
    sink = sink_of(program, pieces(program)[piece].width)
    loops = any(v.op == "Loop" and v.params[0] > UNROLL for v in _lowered(program).values())
    return tile_of(sink.live(words) + loops * words)


def tile_of(live: int) -> tuple[int, int, int]:
    """(rows, columns, warps) so that `live` registers for each pair are there, with room for the rows of arguments.

    A heuristic that was checked by counting registers and spills of compiled code, not by measuring time.
    """
    for rows, columns in ((64, 32), (32, 32), (32, 16)):
        if live * rows * columns // 128 <= 64:
            return rows, columns, 4
    return 16, 16, 4


def results(program: Program) -> list[Program]:
    """The programs of its results, one by one."""
    if len(program.axes) == 1:
        return [program]
    return [replace(program, exprs=(e,), axes=(a,)) for e, a in zip(program.exprs, program.axes, strict=True)]


@lru_cache(maxsize=1024)
def _lowered(program: Program) -> Lowered:
    return lower(program, "triton")


@lru_cache(maxsize=1024)
def pieces(program: Program) -> tuple[Piece, ...]:
    """The pieces of a program with one result. Raises TooLarge."""
    groups = _lowered(program).segments
    if program.kind == "LogSumExp" and len(groups) == 1:
        return (Piece((), 0, 1, 1),)
    wide = 1 if program.kind.startswith("Arg") else WIDE
    found: list[Piece] = []
    waiting: list[tuple[Value, int | None]] = []

    def finish(stop: int) -> None:
        for k in range(0, len(waiting), wide):
            part = tuple(waiting[k : k + wide])
            found.append(Piece(part, stop - len(waiting) + k, len(part), len(part)))
        waiting.clear()

    for s in groups[-1]:
        if s.rolled and s.size > wide:
            finish(s.start)
            found.append(Piece(((s.values[0], None),), s.start, s.size, wide))
        else:
            waiting += [(s.values[0], d) for d in range(s.size)] if s.rolled else [(v, None) for v in s.values]
    finish(sum(s.size for s in groups[-1]))
    return tuple(found)


@lru_cache(maxsize=4096)
def why_not(program: Program) -> str:
    """The reason why there is no Triton text for `program`; empty if there is."""
    if program.kind != "Sum" and OVER_BOTH in program.axes:
        return f"{program.kind} over both axes"
    if program.k > LARGEST_K:
        return f"K = {program.k} is more than {LARGEST_K}"
    try:
        for p in results(program):
            if len(pieces(p)) > PIECES:
                return f"a result of {p.widths[0]} columns, each with code of its own"
            depths: dict[int, int] = {}
            for v in _lowered(p).values():
                row = PRIMITIVES.get(v.op)
                if row is not None and row.triton is None:
                    return f"no code for {v.op}"
                depths[id(v)] = 1 + max((depths[id(a)] for a in v.args), default=0)
            if max(depths.values(), default=0) > DEEP:
                return f"a chain of more than {DEEP} operations"
    except PullbackError as error:
        return str(error)
    except RecursionError:
        return "operations nested too deeply"
    return ""


def arguments(kernel: Kernel) -> dict[str, str]:
    """Name -> Triton type of what the kernel takes, in order; pointers are "*" (to what the tensor holds)."""
    n = kernel.program.n
    names = {"out": "*", **{f"p{k}": "*" for k in range(n)}}
    if kernel.sparse:
        names |= {"blocks": "*", "spans": "*"}
    numbers = ["n_rows", "n_cols", "n_blocks", *(f"n{b}" for b in range(kernel.batch)), "out_row"]
    numbers += [f"out_b{b}" for b in range(kernel.batch)]
    for k in range(n):
        numbers += [] if kernel.dense[k] else [f"r{k}", f"c{k}"]
        numbers += [f"s{k}_{b}" for b in range(kernel.batch)]
    return names | dict.fromkeys(numbers, "i64")


@lru_cache(maxsize=1024)
def render(kernel: Kernel) -> str:
    """The text of the kernel, a function named `kernel`."""
    rows, columns, _ = kernel.tile
    piece = pieces(kernel.program)[kernel.piece]
    values = Values(kernel.program.signature, kernel.dense, kernel.rows, (rows, columns), f"tl.{kernel.elem}")
    sink = sink_of(kernel.program, piece.width)
    formula = _lowered(kernel.program).segments[0][0].values[0] if sink.shifted else None
    first = values.name(formula) if formula is not None else ""
    names = _columns(values, piece)
    absorb = sink.absorb(first, names, values.elem)
    head = ", ".join(f'{k}: "{t}"' if t != "*" else k for k, t in arguments(kernel).items())
    body = _head(kernel, rows)
    if piece.long:
        body.append(f"d0 = tl.program_id(1).to(tl.int64) * {piece.width}")
    body += [*_addresses(kernel, True), *values.before, *sink.start(rows, values.elem)]
    inner = [
        f"cols = start + tl.arange(0, {columns})",
        "col_ok = (cols < stop)[None, :]",
        *_addresses(kernel, False),
        *values.inside,
        *absorb,
    ]
    if sink.steps:
        length = sink.steps * columns
        block = [
            *sink.open(rows, columns, values.elem),
            f"for start in range(outer, tl.minimum(outer + {length}, stop), {columns}):",
            *_indent(inner),
            *sink.close(values.elem),
        ]
        loop = [f"for outer in range(first, stop, {length}):", *_indent(block)]
    else:
        loop = [f"for start in range(first, stop, {columns}):", *_indent(inner)]
    if kernel.sparse:
        loop = [
            "for span in range(span0, span1):",
            *_indent(["first = tl.load(spans + 2 * span)", "stop = tl.load(spans + 2 * span + 1)", *loop]),
        ]
    else:
        loop = ["first = tl.full((), 0, tl.int64)", "stop = n_cols", *loop]
    body += loop
    body.append("place = out + rows.to(tl.int64) * out_row")
    limit = f" & (d0 + {{}} < {piece.size})" if piece.long and piece.size % piece.width else ""
    offset = f"{piece.start} + d0" if piece.long else f"{piece.start}"
    # a float64 becomes a bfloat16 by way of float32 only
    cast = ".to(tl.float32)" if kernel.elem == "float32" and OVER_BOTH not in kernel.program.axes else ""
    body += sink.store(offset, limit, piece.start == 0, "d0" if piece.long else None, cast)
    return "\n".join([*sink.functions(), f"def kernel({head}):", *_indent(body), ""])


def _columns(values: Values, piece: Piece) -> list[str]:
    if not piece.long:
        return [values.name(v, d) for v, d in piece.columns]
    ((body, _),) = piece.columns
    bound = piece.size if piece.size % piece.width else None
    return [values.name(body, f"(d0 + {k})", bound) for k in range(piece.width)]


def _head(kernel: Kernel, rows: int) -> list[str]:
    """Which rows of which batch member this program of the grid computes."""
    lines = ["pid = tl.program_id(0).to(tl.int64)", "block = pid % n_blocks"]
    if kernel.batch:
        lines.append("member = pid // n_blocks")
        for b in reversed(range(kernel.batch)):
            lines += [f"q{b} = member % n{b}", f"member = member // n{b}"]
        for k in range(kernel.program.n):
            lines.append(f"a{k} = p{k} + {' + '.join(f'q{b} * s{k}_{b}' for b in range(kernel.batch))}")
        lines.append(f"out += {' + '.join(f'q{b} * out_b{b}' for b in range(kernel.batch))}")
    else:
        lines += [f"a{k} = p{k}" for k in range(kernel.program.n)]
    if kernel.sparse:
        lines += [
            "row0 = tl.load(blocks + 4 * block)",
            "row_end = tl.load(blocks + 4 * block + 1)",
            "span0 = tl.load(blocks + 4 * block + 2)",
            "span1 = tl.load(blocks + 4 * block + 3)",
        ]
    else:
        lines += [f"row0 = block * {rows}", "row_end = n_rows"]
    return [*lines, f"rows = row0 + tl.arange(0, {rows})", "row_ok = (rows < row_end)[:, None]"]


def _addresses(kernel: Kernel, of_rows: bool) -> list[str]:
    """Where the rows of the arguments lie: x (of the kept axis), computed once, and y (of the other), for each tile."""
    lines = []
    rows, columns, _ = kernel.tile
    for k, (dim, category) in enumerate(kernel.program.signature):
        if category == PARAMETER or (category == kernel.rows) != of_rows:
            continue
        step = f"{dim}" if kernel.dense[k] else f"r{k}"
        own, start, shape, n = ("x", "row0", "[:, None]", rows) if of_rows else ("y", "start", "[None, :]", columns)
        lines.append(f"{own}{k} = a{k} + {start} * {step} + tl.arange(0, {n}){shape} * {step}")
    return lines


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
