"""States of results that are reduced over the lanes: vectors of memory during a tile, then scalars in a task's part.

A part holds, for every row b of such a result (one row for a result without rows), the lasting cells and then the
sums of rolled components, 8 bytes each. `merge` joins the parts of a batch member in order, so that results do not
depend on which thread did what.
"""

from __future__ import annotations

from collections.abc import Callable

from pullback.kernels.codegen.llvm_frame import (
    BATCH,
    FILL,
    N_B,
    OUT,
    OUT_STEP,
    PART_STEP,
    PARTIAL,
    PARTS,
    PER_RESULT,
    RESULTS,
    Frame,
    Place,
    sinks,
)
from pullback.kernels.codegen.llvm_lanes import fill_row, zero_rolled
from pullback.kernels.codegen.llvm_sinks import State, Sum
from pullback.kernels.plan.schedule import CROSS, DIRECT


def crossed(f: Frame, place: Place, j: str) -> State:
    """The running state of row b number j of the tile."""
    code = f.code
    offset = code.math("mul", j, place.step)

    def rolled(n: int, d: str) -> str:
        return code.at(f.at(place.running_rolled[n], offset), code.math("mul", d, f.lanes), place.acc.elem)

    return State(lambda k: f.at(place.running[k], offset), rolled, f.lanes)


def begin_crossed(f: Frame, place: Place, n_b: str) -> None:
    """The running states of a tile start."""
    code, sink = f.code, place.sink
    with code.loop(0, n_b) as j:
        state = crossed(f, place, j)
        for k, (kind, x) in enumerate(zip(sink.running, sink.begin(None), strict=True)):
            code.store(code.vector(kind), x, state.cell(k))
        zero_rolled(f, place, state.rolled)


def part_row(f: Frame, place: Place, partial: str, row: str | int) -> str:
    """Address of a row's cells in the part at `partial`."""
    code = f.code
    base = code.at(partial, f.word(RESULTS + PER_RESULT * place.number + 1))
    return code.at(base, code.math("mul", row, 8 * place.cells))


def clear_part(f: Frame, place: Place, p: str) -> None:
    """The cells of a row become the identity."""
    code, sink = f.code, place.sink
    for k, kind in enumerate(sink.lasting):
        x = str(int(sink.identity(k))) if kind == "i64" else code.b.like(kind, 1).const(sink.identity(k))
        code.store(kind, x, code.at(p, k, "i64"))
    for at, s in place.rolled_cells():
        with code.loop(0, s.size) as d:
            zero = code.b.like(place.last, 1).const(0)
            code.store(place.last, zero, code.at(p, code.math("add", d, at), "i64"))


def crossed_to_part(f: Frame, place: Place, j: str, p: str, base: str) -> None:
    """Reduce the running state of row b number j over the lanes, whose first row is `base`, into the cells at p."""
    code, sink = f.code, place.sink
    state = crossed(f, place, j)
    if sink.in_place:
        sink.absorb(state, p)
        return
    running = [code.load(code.vector(kind), state.cell(k)) for k, kind in enumerate(sink.running)]
    new = sink.lanes(running, base)

    def rolled(n: int, d: str) -> str:
        return sink.lanes_rolled(running, code.load(place.acc.type, state.rolled(n, d)))

    _join(f, place, p, new, rolled)


def _join(f: Frame, place: Place, p: str, new: list[str], rolled: Callable[[int, str], str]) -> None:
    """Merge a state into the cells at p."""
    code, sink, scalar = f.code, place.sink, f.code.b.like(lanes=1)
    old = [code.load(kind, code.at(p, k, "i64")) for k, kind in enumerate(sink.lasting)]
    merged = sink.merge(scalar, old, new)
    for n, (at, s) in enumerate(place.rolled_cells()):
        with code.loop(0, s.size) as d:
            cell = code.at(p, code.math("add", d, at), "i64")
            x = code.load(place.last, cell)
            code.store(place.last, sink.merge_rolled(scalar, old, new, x, rolled(n, d)), cell)
    for k, kind in enumerate(sink.lasting):
        code.store(kind, merged[k], code.at(p, k, "i64"))


def both_to_part(f: Frame, place: Place, p: str) -> None:
    """The sums over all pairs of the task."""
    code, sink = f.code, place.sink
    assert isinstance(sink, Sum)
    last = code.b.like(sink.last)

    def save(x: str, cell: str) -> None:
        total = sink.total(sink.wide(last, code.load(last.type, x)))
        code.store(last.elem, total if last.double else last.like("double", 1).fptrunc(total), cell)

    for k, x in enumerate(place.lasting):
        save(f.at(x), code.at(p, k, "i64"))
    for n, (at, s) in enumerate(place.rolled_cells()):
        with code.loop(0, s.size) as d:
            save(f.cell_rolled(place, n, d, 0, f.lanes), code.at(p, code.math("add", d, at), "i64"))


def merge(f: Frame) -> str | None:
    """The function that joins the parts and finishes their results; None if all rows lie along the lanes."""
    if all(place.where == DIRECT for place in f.places):
        return None
    f.code = code = f.new_code(1)
    scalars = sinks(f.plan, code)
    parts, step = f.word(PARTS), f.word(PART_STEP)
    with code.loop(0, f.word(BATCH)) as item:
        partial = code.at(f.address(PARTIAL), code.math("mul", code.math("mul", item, parts), step))
        for old in f.places:
            if old.where == DIRECT:
                continue
            place = Place(scalars[old.number], old.number, old.where, old.width, [], [], [], [])
            start = code.math("mul", item, f.word(OUT_STEP))
            start = code.math("add", start, f.word(RESULTS + PER_RESULT * place.number))
            with code.loop(0, f.word(N_B) if place.where == CROSS else 1) as row:
                p = part_row(f, place, partial, row)
                with code.loop(1, parts) as part:
                    _join_part(f, place, p, code.at(p, code.math("mul", part, step)))
                at = code.math("add", start, code.math("mul", row, place.width))
                _finish_row(f, place, p, code.at(f.address(OUT), at, place.sink.result))
    return code.function("define void @merge(ptr noalias %args) nounwind")


def _join_part(f: Frame, place: Place, p: str, q: str) -> None:
    """Merge the cells at q into those at p."""
    code, sink = f.code, place.sink
    if sink.in_place:
        sink.join(p, q)
        return
    new = [code.load(kind, code.at(q, k, "i64")) for k, kind in enumerate(sink.lasting)]
    starts = [at for at, _ in place.rolled_cells()]

    def rolled(n: int, d: str) -> str:
        return code.load(place.last, code.at(q, code.math("add", d, starts[n]), "i64"))

    _join(f, place, p, new, rolled)


def _finish_row(f: Frame, place: Place, p: str, out: str) -> None:
    """Cells -> results of one row."""
    code, sink = f.code, place.sink
    lasting = [code.load(kind, code.at(p, k, "i64")) for k, kind in enumerate(sink.lasting)]
    columns = range(place.width) if sink.result == "i64" else sink.columns
    for k, x in zip(columns, sink.finish(code.b, lasting), strict=True):
        code.store(sink.result, x, code.at(out, k, sink.result))
    for at, s in place.rolled_cells():
        with code.loop(0, s.size) as d:
            x = code.load(place.last, code.at(p, code.math("add", d, at), "i64"))
            to = code.at(out, code.math("add", d, s.start), sink.result)
            code.store(sink.result, sink.finish_rolled(code.b, lasting, x), to)
    if sink.result == "i64":
        with code.when(code.test("sgt", f.word(FILL), 0)):
            fill_row(f, place, out)
