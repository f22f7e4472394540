"""The kernel of a Program as Triton text: tiles of rows and columns, summed element by element and reduced once.

A `Kernel` computes some columns of one result. Its text holds no size but the dimensions of the formula: numbers of
rows, columns and batch members, and strides, are arguments. Where rows are few the columns are shared out: kernels of
the phase "part" leave the state of the reduction in memory, one of the phase "merge" joins what they left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from pullback.core.errors import PullbackError
from pullback.kernels.codegen import triton_dot, triton_special
from pullback.kernels.codegen.triton_pieces import ONE, Piece, kept_axis, loops, lowered, pieces, results
from pullback.kernels.codegen.triton_sinks import Sink, sink_of
from pullback.kernels.codegen.triton_tiles import Tile, elementwise, products
from pullback.kernels.codegen.triton_values import DENSE, GAPS, UNIT
from pullback.kernels.codegen.triton_vectors import HALF, ROWS, WIDEST, Vectors
from pullback.kernels.codegen.triton_wide import Wide, wide_sink
from pullback.kernels.ir.expr import PARAMETER
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import OVER_BOTH, Program
from pullback.kernels.plan.lower import Value

PIECES = 32  # kernels for one result above which compiling takes longer than anybody waits
DEEP = 250  # operations in a chain beyond which the recursive writer would come near Python's limit
LARGEST_K = 64  # of the K-reductions, whose state lies in registers
TWICE = 48  # lines for a tile up to which they are written twice, once without masks: 1 instruction of 12 for a pair


@dataclass(frozen=True)
class Kernel:
    """What a text depends on.

    Args:
        program: with one result.
        number: of the piece of the result.
        data: "float64", "float32", "float16" or "bfloat16", the type of the tensors.
        layouts: for each argument GAPS, UNIT or DENSE.
        batch: number of batch axes.
        sparse: rows meet only the columns of a block-sparse pattern.
        precision: "tf32x3", "tf32" or "ieee" of products of matrices in float32.
        phase: "" for a kernel that does everything, "part" or "merge".
        aligned: strides between members and between rows are multiples of 16 bytes; those of rows are given in these.
        family: of the device, one of `triton_tiles.FAMILIES`.
        chosen: the tile, if it is not the one of the table.
    """

    program: Program
    number: int
    data: str
    layouts: tuple[int, ...]
    batch: int = 0
    sparse: bool = False
    precision: str = "tf32x3"
    phase: str = ""
    aligned: bool = False
    family: str = "sm_90"
    chosen: Tile | None = None

    @property
    def rows(self) -> int:
        """Category of the axis whose rows are kept."""
        return kept_axis(self.program)

    @property
    def elem(self) -> str:
        """The type that is computed in."""
        return "float64" if self.data == "float64" else "float32"

    @property
    def vector(self) -> int:
        """Numbers of 16 bytes, which are loaded at once where that is possible."""
        return 16 // getattr(torch, self.data).itemsize

    @property
    def piece(self) -> Piece:
        """The columns of the result that it computes."""
        return pieces(self.program)[self.number]

    @property
    def sink(self) -> Sink:
        """The lines of the reduction."""
        piece = self.piece
        if piece.wides:
            return wide_sink(self.program, piece.sums, piece.tiles, self.data)
        return sink_of(self.program, piece.sums)

    @property
    def multiplies(self) -> bool:
        """Whether it uses tl.dot."""
        return bool(self.piece.tiles) or any(dot for _, dot in loops(self.program))

    @property
    def tile(self) -> Tile:
        """How it is tiled."""
        return self.chosen or _tile(self)


@lru_cache(maxsize=4096)
def _tile(kernel: Kernel) -> Tile:
    if kernel.multiplies:
        wide = sum(kernel.piece.tiles)
        short = all(size <= WIDEST for size, dot in loops(kernel.program) if dot)
        spare = short and not wide and kernel.piece.sums == 1 and not kernel.sink.searches
        return products(kernel.data, wide, spare, kernel.family)
    words = 2 if kernel.elem == "float64" else 1
    return elementwise(kernel.sink.live(words) + bool(loops(kernel.program)) * words)


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
            for v in lowered(p).values():
                if v.op in PRIMITIVES and triton_special.text(v.op) is None:
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
    if kernel.phase:
        names |= {"work": "*"} | ({"numbers": "*"} if kernel.program.kind.startswith("Arg") else {})
    numbers = ["n_rows", "n_cols", "n_blocks", *(f"n{b}" for b in range(kernel.batch)), "out_row"]
    numbers += [f"out_b{b}" for b in range(kernel.batch)]
    for k in range(n):
        numbers += {GAPS: [f"r{k}", f"c{k}"], UNIT: [f"r{k}"], DENSE: []}[kernel.layouts[k]]
        numbers += [f"s{k}_{b}" for b in range(kernel.batch)]
    numbers += ["n_parts", "n_all"] if kernel.phase else []
    return names | dict.fromkeys(numbers, "i64")


def width_of_state(kernel: Kernel) -> int:
    """Numbers for each row that a program of the phase "part" leaves in memory."""
    state = kernel.sink.state()
    return state[0][2] if kernel.program.kind.startswith("Arg") else sum(max(w, 1) for _, _, w in state)


@lru_cache(maxsize=1024)
def render(kernel: Kernel) -> str:
    """The text of the kernel, a function named `kernel`."""
    rows, columns, _, _ = kernel.tile
    piece, sink = kernel.piece, kernel.sink
    write = Vectors(
        kernel.program.signature, kernel.layouts, kernel.rows, (rows, columns), f"tl.{kernel.elem}", kernel.data,
        kernel.precision,
    )  # fmt: skip
    formula = lowered(kernel.program).segments[0][0].values[0] if sink.shifted else None
    first = write.name(formula) if formula is not None else ""
    names = _columns(write, kernel, piece, sink.total or write.elem)
    write.inside += sink.absorb(first, names, write.elem)
    if isinstance(sink, Wide):
        _multiply(write, kernel, piece, sink)
    stores = _stores(write, kernel, piece, sink)
    head = ", ".join(f'{k}: "{t}"' if t != "*" else k for k, t in arguments(kernel).items())
    body = _head(kernel, rows)
    if piece.long:
        body.append(f"d0 = tl.program_id(1).to(tl.int64) * {piece.width}")
    body += [*_addresses(kernel, True), *write.before, *sink.start(rows, write.elem)]
    if kernel.phase == "merge":
        body += ["for part in range(0, n_parts):", *_indent([*_state(kernel, sink, False), *sink.join(write.elem)])]
    else:
        body += _over_columns(kernel, sink, [*_addresses(kernel, False), *write.inside], write.elem)
    if kernel.phase == "part":
        body += sink.finish(write.elem) if isinstance(sink, Wide) else []
        body += ["part = tl.program_id(2).to(tl.int64)", *_state(kernel, sink, True)]
    else:
        body += [*sink.finish(write.elem), "place = out + rows.to(tl.int64) * out_row", *write.after, *stores]
    functions = triton_special.functions([*write.before, *write.inside, *write.after])
    return "\n".join([*functions, *sink.functions(), f"def kernel({head}):", *_indent(body), ""])


def _over_columns(kernel: Kernel, sink: Sink, tile: list[str], elem: str) -> list[str]:
    """The loop over the columns that a program meets."""
    rows, columns, _, _ = kernel.tile
    if sink.steps:
        length = sink.steps * columns
        block = [*sink.open(rows, columns, elem), f"last = tl.minimum(outer + {length}, stop)"]
        block += [*_tiles(kernel, sink, tile, "outer", "last"), *sink.close(elem)]
        loop = [f"for outer in range(first, stop, {length}):", *_indent(block)]
    else:
        loop = _tiles(kernel, sink, tile, "first", "stop")
    if kernel.sparse:
        ends = ["first = tl.load(spans + 2 * span)", "stop = tl.load(spans + 2 * span + 1)"]
        return ["for span in range(span0, span1):", *_indent([*ends, *loop])]
    if kernel.phase == "part":
        share = f"share = ((n_cols + {columns - 1}) // {columns} + n_parts - 1) // n_parts * {columns}"
        ends = ["first = tl.program_id(2).to(tl.int64) * share", "stop = tl.minimum(first + share, n_cols)"]
        return [share, *ends, *loop]
    return ["first = tl.full((), 0, tl.int64)", "stop = n_cols", *loop]


def _tiles(kernel: Kernel, sink: Sink, tile: list[str], first: str, stop: str) -> list[str]:
    """A loop over tiles from column `first` to `stop`; short ones are written twice, once for the last columns."""
    columns = kernel.tile.columns
    inner = [f"cols = start + tl.arange(0, {columns})", *tile]
    number = f"tl.arange(0, {columns})"
    masked = [f"left = tl.minimum({stop} - start, {columns}).to(tl.int32)", f"col_ok = ({number} < left)[None, :]"]
    masked += [f"col_okt = ({number} < left)[:, None]"] if kernel.multiplies else []
    # products in more than one step, as of float32, would spill
    if len(tile) > TWICE or sink.searches or (kernel.multiplies and kernel.data not in HALF):
        return [f"for start in range({first}, {stop}, {columns}):", *_indent([*masked, *inner])]
    whole = [f"col_ok = tl.full((1, {columns}), True, tl.int1)"]
    whole += [f"col_okt = tl.full(({columns}, 1), True, tl.int1)"] if kernel.multiplies else []
    return [
        f"whole = {first} + ({stop} - {first}) // {columns} * {columns}",
        f"for start in range({first}, whole, {columns}):",
        *_indent([*whole, *inner]),
        f"if whole < {stop}:",
        *_indent(["start = whole", *masked, *inner]),
    ]


def _state(kernel: Kernel, sink: Sink, store: bool) -> list[str]:
    """Lines that leave the state in memory, or read what another program left: (part, columns of the state, rows)."""
    k_best = kernel.program.kind.startswith("Arg")
    width = width_of_state(kernel)
    place = f"spot = ((part * tl.num_programs(1) + tl.program_id(1)) * {width}) * n_all + member0 * n_rows + rows"
    lines, done = [place], 0
    for own, other, columns in sink.state():
        memory = "numbers" if own == "where" else "work"
        if columns:
            where = f"{memory} + spot[:, None] + ({done} + tl.arange(0, {columns}))[None, :] * n_all"
            mask = "row_ok"
        else:
            where, mask = f"{memory} + spot + {done} * n_all", "rows < row_end"
        if store:
            lines.append(f"tl.store({where}, {own}, mask={mask})")
        else:
            kind = "tl.int64" if own == "where" else f"tl.{kernel.elem}" if k_best or own == "top_all" else ""
            other_value = "0" if own == "where" else "0.0"
            read = f"tl.load({where}, mask={mask}, other={other_value})"
            lines.append(f"{other} = {read}.to({kind or sink.total or f'tl.{kernel.elem}'})")
        done += 0 if k_best else max(columns, 1)
    return lines


def _columns(write: Vectors, kernel: Kernel, piece: Piece, total: str) -> list[str]:
    """Names of what is summed element by element. What a sum has as a factor in all of a row, it is multiplied by."""
    bound = piece.size if piece.long and piece.size % piece.width else None
    columns: Sequence[tuple[Value, int | str | None]] = piece.columns
    if piece.long and not piece.wides:
        columns = [(piece.columns[0][0], f"(d0 + {k})") for k in range(piece.width)]
    found = []
    for k, (v, d) in enumerate(columns):
        if kernel.program.kind == "Sum":
            own, rest = triton_dot.without_rows(v, kernel.rows)
            v = ONE if rest is None else rest
            write.kept.append(v)
            if own is not None:
                write.kept.append(own)
                rows = kernel.tile.rows
                factor = f"tl.reshape({write.name(own)} + tl.zeros(({rows}, 1), tl.float32), ({rows},))"
                write.after.append(f"total{k} = total{k} * {factor}.to({total})")
        found.append(write.name(v, d, bound))
    return found


def _multiply(write: Vectors, kernel: Kernel, piece: Piece, sink: Wide) -> None:
    """Lines that add the products of matrices of a tile."""
    for a, (t, chunk) in enumerate(piece.products):
        assert t.column is not None
        weight = sink.weight("" if t.factor is None else write.name(t.factor), write.elem)
        raw = write.half and sink.shifted and t.column.op == "Component"  # weights lie between 0 and 1
        tile = write.operand(t.column, 1, chunk, raw)
        if raw:
            weight = f"({weight}).to(tl.{kernel.data})"
        product = write.dot(weight, tile, raw, "tf32" if write.half else "")
        write.inside += sink.multiply(a, product)


def _stores(write: Vectors, kernel: Kernel, piece: Piece, sink: Sink) -> list[str]:
    """Lines that store the result."""
    # a float64 becomes a bfloat16 by way of float32 only
    cast = ".to(tl.float32)" if kernel.elem == "float32" and OVER_BOTH not in kernel.program.axes else ""
    chunk = "" if kernel.number else "tl.program_id(1)"
    if not piece.wides:
        places = [f"{sink.first} + {piece.start}{' + d0' if piece.long else ''} + {k}" for k in range(piece.width)]
        limit = f" & (d0 + {{}} < {piece.size})" if piece.long and piece.size % piece.width else ""
        return sink.store(places, limit, chunk, cast)
    where: list[str | None] = [f"{sink.first + k}" for k in piece.places]
    where += [None] * (len(piece.columns) - len(where))
    lines = sink.store(where, "", chunk, cast)
    done, extra = 0, len(piece.places)
    for wide in piece.wides:
        for c in wide.chunks:
            parts, used = [], 0
            for t in wide.terms:
                if t.column is None:
                    total = f"total{extra + used}[:, None]"
                    used += 1
                else:
                    total, done = f"wide{done}", done + 1
                write.target = write.after
                write.tiles.append({})
                row = "" if t.row is None else f" * {write.operand(t.row, ROWS, c, False)}"
                write.tiles.pop()
                write.target = None
                parts.append(f"{'-' if t.sign < 0 else '+'} {total}{row}")
            numbers = f"({c.first} + tl.arange(0, {c.width}))"
            value = sink.value(f"({' '.join(parts).removeprefix('+ ')})", True)
            mask = f"row_ok & ({numbers} < {c.size})[None, :]" if c.size is not None else "row_ok"
            at = f"place[:, None] + ({sink.first + wide.start} + {numbers})[None, :]"
            value = f"{value}{cast} + tl.zeros(({kernel.tile.rows}, {c.width}), tl.float32)"
            lines.append(f"tl.store({at}, {value}, mask={mask})")
        extra += sum(t.column is None for t in wide.terms)
    return lines


def _head(kernel: Kernel, rows: int) -> list[str]:
    """Which rows of which batch member this program of the grid computes."""
    lines = ["pid = tl.program_id(0).to(tl.int64)", "block = pid % n_blocks", "member0 = pid // n_blocks"]
    if kernel.batch:
        lines.append("member = member0")
        for b in reversed(range(kernel.batch)):
            lines += [f"q{b} = member % n{b}", f"member = member // n{b}"]
        for k in range(kernel.program.n):
            offset = " + ".join(f"q{b} * s{k}_{b}" for b in range(kernel.batch))
            if kernel.aligned:
                offset = f"tl.multiple_of({offset}, {kernel.vector})"
            lines.append(f"a{k} = p{k} + {offset}")
        lines.append(f"out += {' + '.join(f'q{b} * out_b{b}' for b in range(kernel.batch))}")
    else:
        lines += [f"a{k} = p{k}" for k in range(kernel.program.n)]
    if kernel.aligned:  # these come divided
        lines += [f"r{k} = r{k} * {kernel.vector}" for k, layout in enumerate(kernel.layouts) if layout == UNIT]
    if kernel.sparse:
        lines += [
            "row0 = tl.load(blocks + 4 * block)",
            "row_end = tl.load(blocks + 4 * block + 1)",
            "span0 = tl.load(blocks + 4 * block + 2)",
            "span1 = tl.load(blocks + 4 * block + 3)",
        ]
    else:
        lines += [f"row0 = block * {rows}", "row_end = n_rows"]
    if kernel.multiplies:  # two more rows, see `triton_dot`
        lines += [f"row2 = tl.minimum(row0 + {rows}, row_end) - 1", "row1 = (row0 + row2) // 2"]
    return [*lines, f"rows = row0 + tl.arange(0, {rows})", "row_ok = (rows < row_end)[:, None]"]


def _addresses(kernel: Kernel, of_rows: bool) -> list[str]:
    """Where the rows of the arguments lie: x (of the kept axis), computed once, and y (of the other), for each tile.

    z are those of y as a column.
    """
    lines = []
    rows, columns, _, _ = kernel.tile
    for k, (dim, category) in enumerate(kernel.program.signature):
        if category == PARAMETER or (category == kernel.rows) != of_rows:
            continue
        step = f"{dim}" if kernel.layouts[k] == DENSE else f"r{k}"
        start, n = ("row0", rows) if of_rows else ("start", columns)
        shapes = [("x", "[:, None]")] if of_rows else [("y", "[None, :]")]
        shapes += [("z", "[:, None]")] if kernel.multiplies and not of_rows else []
        lines += [f"{own}{k} = a{k} + {start} * {step} + tl.arange(0, {n}){shape} * {step}" for own, shape in shapes]
    return lines


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
