"""States of results whose rows lie along the lanes, and of results without rows: one vector of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

from pullback.kernels.codegen.llvm_arg import fill
from pullback.kernels.codegen.llvm_code import SIZES
from pullback.kernels.codegen.llvm_frame import FILL, OUT, PER_RESULT, RESULTS, Frame, Place
from pullback.kernels.codegen.llvm_sinks import State
from pullback.kernels.plan.schedule import DIRECT


def constant(f: Frame, kind: str, x: float) -> str:
    """The number x in every lane."""
    if kind.startswith("i"):
        return f.code.splat(kind, int(x))
    return f.code.b.like(kind).const(x)


def clear(f: Frame, place: Place, rows: int, r: str) -> None:
    """The lasting state of the vector of rows r becomes the identity; `rows` is the length of packed rows."""
    code, sink = f.code, place.sink
    for k, kind in enumerate(sink.lasting):
        code.store(code.vector(kind), constant(f, kind, sink.identity(k)), f.at(place.lasting[k], r, kind))
    for n, s in enumerate(sink.rolled):
        with code.loop(0, s.size) as d:
            code.store(code.vector(place.last), constant(f, place.last, 0.0), f.cell_rolled(place, n, d, r, rows))


def zero_rolled(f: Frame, place: Place, address: Callable[[int, str], str]) -> None:
    """Running sums of rolled components start at 0."""
    acc = place.acc
    for n, s in enumerate(place.sink.rolled):
        with f.code.loop(0, s.size) as d:
            f.code.store(acc.type, acc.const(0), address(n, d))


def begin(f: Frame, place: Place, block: str, u: int) -> State:
    """The running state of vector u of the block, or of all rows for a result without rows."""
    code, sink, plan = f.code, place.sink, f.plan
    direct = place.where == DIRECT
    row: str | int = code.math("add", block, u * f.lanes) if direct else 0
    cells = [f.at(x, row, kind) for x, kind in zip(place.lasting, sink.lasting, strict=True)]
    if sink.in_place:
        return State(cells.__getitem__, lambda n, d: "", plan.chunk)
    lasting = [code.load(code.vector(kind), c) for c, kind in zip(cells, sink.lasting, strict=True)]
    slots = []
    for x, kind in zip(sink.begin(lasting), sink.running, strict=True):
        slots.append(code.slot(code.vector(kind)))
        code.store(code.vector(kind), x, slots[-1])
    first, run = (u * f.lanes, plan.block) if direct else (0, f.lanes)

    def rolled(n: int, d: str) -> str:
        return f.at(place.running_rolled[n], code.math("add", code.math("mul", d, run), first), place.acc.elem)

    state = State(slots.__getitem__, rolled)
    zero_rolled(f, place, rolled)
    return state


def end(f: Frame, place: Place, state: State, block: str, u: int, t0: str) -> None:
    """Take the running state into the lasting one, after a tile that starts at row b t0."""
    code, sink = f.code, place.sink
    if sink.in_place:
        return
    direct = place.where == DIRECT
    row: str | int = code.math("add", block, u * f.lanes) if direct else 0
    cells = [f.at(x, row, kind) for x, kind in zip(place.lasting, sink.lasting, strict=True)]
    lasting = [code.load(code.vector(kind), c) for c, kind in zip(cells, sink.lasting, strict=True)]
    running = [code.load(code.vector(kind), state.cell(k)) for k, kind in enumerate(sink.running)]
    new = sink.end(lasting, running, t0)
    rows = f.plan.chunk if direct else f.lanes
    for n, s in enumerate(sink.rolled):
        with code.loop(0, s.size) as d:
            cell = f.cell_rolled(place, n, d, row, rows)
            x, y = code.load(code.vector(place.last), cell), code.load(place.acc.type, state.rolled(n, d))
            code.store(code.vector(place.last), sink.end_rolled(lasting, running, x, y), cell)
    for x, c, kind in zip(new, cells, sink.lasting, strict=True):
        code.store(code.vector(kind), x, c)


def finish(f: Frame, place: Place, item_out: str, first: str, n: str) -> None:
    """Lasting states -> results, one row of `out` for each row a."""
    code, sink, chunk, width = f.code, place.sink, f.plan.chunk, place.width
    kind = sink.result
    with code.loop(0, n, f.lanes) as r:
        lasting = [code.load(code.vector(t), f.at(x, r, t)) for x, t in zip(place.lasting, sink.lasting, strict=True)]
        columns = range(width) if kind == "i64" else sink.columns
        for k, x in zip(columns, sink.finish(code.b, lasting), strict=True):
            code.store(code.vector(kind), x, f.at(place.out + k * chunk * SIZES[kind], r, kind))
        for m, s in enumerate(sink.rolled):
            with code.loop(0, s.size) as d:
                x = code.load(code.vector(place.last), f.cell_rolled(place, m, d, r, chunk))
                x = sink.finish_rolled(code.b, lasting, x)
                column = code.math("mul", code.math("add", d, s.start), chunk)
                code.store(code.vector(kind), x, f.at(place.out, code.math("add", column, r), kind))
    start = code.math("add", item_out, f.word(RESULTS + PER_RESULT * place.number))
    start = code.math("add", start, code.math("mul", first, width))
    out = code.at(f.address(OUT), start, kind)
    full: str | int = 0
    if width == 1:
        full = code.math("and", n, -f.lanes)
        with code.loop(0, full, f.lanes) as r:
            x = code.load(code.vector(kind), f.at(place.out, r, kind))
            code.store(code.vector(kind), x, code.at(out, r, kind))
    with code.loop(full, n) as r:
        row = code.at(out, code.math("mul", r, width), kind)
        with code.loop(0, width) as d:
            index = code.math("add", code.math("mul", d, chunk), r)
            code.store(kind, code.load(kind, f.at(place.out, index, kind)), code.at(row, d, kind))
    if kind == "i64":
        with code.when(code.test("sgt", f.word(FILL), 0)), code.loop(0, n) as r:
            fill_row(f, place, code.at(out, code.math("mul", r, width), "i64"))


def fill_row(f: Frame, place: Place, row: str) -> None:
    """Give indices that no term claimed."""
    code, k = f.code, f.plan.program.k
    dim = place.width // k
    with code.loop(0, dim) as d:
        fill(code, code.at(row, d, "i64"), k, dim, f.word(FILL))
