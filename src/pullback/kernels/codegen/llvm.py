"""A Plan as LLVM text: `worker` takes tasks (some rows a of a batch member) until none is left, `merge` joins parts.

For each chunk of rows a:  pack them
  for each tile of rows b:  pack them
    for each block of rows a:  load what stays in registers
      for each group of rows b:  evaluate the pairs, update the sums
    take the tile's sums into the lasting ones
  finish the results of the chunk
"""

from __future__ import annotations

from dataclasses import dataclass

from pullback.kernels.codegen import llvm_lanes as lanes
from pullback.kernels.codegen import llvm_parts as parts
from pullback.kernels.codegen.llvm_frame import (
    N_B,
    OUT_STEP,
    PART_STEP,
    PARTIAL,
    PARTS,
    RANGES,
    RECORDS,
    STARTS,
    TASKS,
    Frame,
)
from pullback.kernels.codegen.llvm_pack import Source, pack, parameters
from pullback.kernels.codegen.llvm_sinks import State
from pullback.kernels.codegen.llvm_values import At, Pairs
from pullback.kernels.plan.schedule import BOTH, CROSS, DIRECT, Plan


@dataclass(frozen=True)
class Module:
    """LLVM text, and the memory that it needs.

    Args:
        text: the module.
        scratch: bytes of scratch memory of a worker.
        parts: for each result 8-byte cells of a row in a part; 0 where the rows lie along the lanes.
        merges: whether there is a function `merge`.
    """

    text: str
    scratch: int
    parts: tuple[int, ...]
    merges: bool


def generate(plan: Plan) -> Module:
    """The LLVM module of a plan."""
    frame = Frame(plan)
    declarations = frame.code.b.declarations
    texts = [_worker(frame)]
    merge = parts.merge(frame)
    if merge is not None:
        texts.append(merge)
        declarations = declarations | frame.code.b.declarations
    cells = tuple(0 if place.where == DIRECT else place.cells for place in frame.places)
    text = "\n\n".join([*texts, "\n".join(sorted(declarations))])
    return Module(text, frame.scratch, cells, merge is not None)


def _worker(f: Frame) -> str:
    """Takes tasks until none is left."""
    code = f.code
    n_tasks, n_parts = f.word(TASKS), f.word(PARTS)
    after, body, stop = code.label(), code.label(), code.label()
    code.go(after)
    code.start(after)
    number = code.emit("atomicrmw add ptr %args, i64 1 monotonic, align 8")
    code.branch(code.test("slt", number, n_tasks), body, stop)
    code.start(body)
    item, part = (code.emit(f"{op} i64 {number}, {n_parts}") for op in ("udiv", "urem"))
    _Task(f, number, item, part)
    code.go(after)
    code.start(stop)
    return code.function("define void @worker(ptr noalias %args, ptr noalias %scratch) nounwind")


class _Task:
    """Writes one task: a part of the rows a of one batch member."""

    def __init__(self, f: Frame, number: str, item: str, part: str) -> None:
        self.f, code = f, f.code
        used = sorted({p for side in f.layout.sides.values() for p in side.raw})
        self.sources: dict[int, Source] = {p: f.source(p, item) for p in used}
        self.partial = code.at(f.address(PARTIAL), code.math("mul", number, f.word(PART_STEP)))
        self.out = code.math("mul", item, f.word(OUT_STEP))
        self.p = f.at(f.pack_p)
        parameters(code, f.layout, self.sources, self.p)
        for place in f.places:
            if place.where == CROSS:
                with code.loop(0, f.word(N_B)) as j:
                    parts.clear_part(f, place, parts.part_row(f, place, self.partial, j))
            elif place.where == BOTH:
                lanes.clear(f, place, f.lanes, "0")
        starts = f.address(STARTS)
        low = code.load("i64", code.at(starts, part, "i64"))
        high = code.load("i64", code.at(starts, code.math("add", part, 1), "i64"))
        with code.loop(low, high) as record:
            p = code.at(f.address(RECORDS), code.math("mul", record, 4), "i64")
            a0, a1, r0, r1 = (code.load("i64", code.at(p, k, "i64")) for k in range(4))
            with code.loop(a0, a1, f.plan.chunk) as first:
                self.chunk(first, code.min(code.math("sub", a1, first), f.plan.chunk), r0, r1)
        for place in f.places:
            if place.where == BOTH:
                parts.both_to_part(f, place, parts.part_row(f, place, self.partial, 0))

    def chunk(self, first: str, n: str, r0: str, r1: str) -> None:
        """Rows a first ... first + n - 1 with the rows b of the ranges r0 ... r1 - 1."""
        f, code, plan = self.f, self.f.code, self.f.plan
        blocks = code.emit(f"udiv i64 {code.math('add', n, plan.block - 1)}, {plan.block}")
        padded = code.math("mul", blocks, plan.block)
        to = f.at(f.pack_a)
        pack(code, f.layout, f.lane_role, self.sources, to, f.pitch_a, first, n, padded, self.p)
        for place in f.places:
            if place.where == DIRECT:
                with code.loop(0, padded, f.lanes) as r:
                    lanes.clear(f, place, plan.chunk, r)
        with code.loop(r0, r1) as r:
            p = code.at(f.address(RANGES), code.math("mul", r, 2), "i64")
            b0, b1 = (code.load("i64", code.at(p, k, "i64")) for k in range(2))
            with code.loop(b0, b1, plan.tile) as t0:
                self.tile(first, n, padded, t0, code.min(code.math("sub", b1, t0), plan.tile))
        for place in f.places:
            if place.where == DIRECT:
                lanes.finish(f, place, self.out, first, n)

    def tile(self, first: str, n: str, padded: str, t0: str, n_b: str) -> None:
        """All blocks of the chunk with rows b t0 ... t0 + n_b - 1."""
        f, code = self.f, self.f.code
        padded_b = code.math("and", code.math("add", n_b, f.lanes - 1), -f.lanes)
        to = f.at(f.pack_b)
        pack(code, f.layout, 3 - f.lane_role, self.sources, to, f.pitch_b, t0, n_b, padded_b, self.p)
        crossed = [place for place in f.places if place.where == CROSS]
        for place in crossed:
            parts.begin_crossed(f, place, n_b)
        with code.loop(0, padded, f.plan.block) as block:
            self.block(first, n, block, t0, n_b)
        for place in crossed:
            with code.loop(0, n_b) as j:
                p = parts.part_row(f, place, self.partial, code.math("add", t0, j))
                parts.crossed_to_part(f, place, j, p, first)

    def block(self, first: str, n: str, block: str, t0: str, n_b: str) -> None:
        """One block of rows a with all rows b of the tile."""
        f, code, plan = self.f, self.f.code, self.f.plan
        a = f.at(f.pack_a, block, f.elem)
        pairs = Pairs(code, f.layout, f.lane_role, (f.pitch_a, f.pitch_b), a, self.p)
        pairs.row_a, pairs.local_a = code.math("add", first, block), block
        masks = self.masks(code.math("sub", n, block)) if any(p.where != DIRECT for p in f.places) else None
        states: dict[tuple[int, int], State] = {}
        for place in f.places:
            for u in range({DIRECT: plan.u, BOTH: 1, CROSS: 0}[place.where]):
                states[place.number, u] = lanes.begin(f, place, block, u)
        full: str | int = 0
        if plan.g > 1:
            full = code.math("sub", n_b, code.emit(f"urem i64 {n_b}, {plan.g}"))
            with code.loop(0, full, plan.g) as j, pairs.scope():
                self.group(pairs, states, masks, j, t0, plan.g)
        with code.loop(full, n_b) as j, pairs.scope():
            self.group(pairs, states, masks, j, t0, 1)
        for place in f.places:
            for u in range({DIRECT: plan.u, BOTH: 1, CROSS: 0}[place.where]):
                lanes.end(f, place, states[place.number, u], block, u, t0)

    def masks(self, left: str) -> list[str]:
        """For each vector of the block the lanes whose rows exist, `left` rows being left."""
        f, code, b = self.f, self.f.code, self.f.code.b
        count = code.splat(b.ielem, left if b.double else code.emit(f"trunc i64 {left} to i32"))
        return [b.icmp("sgt", count, b.iadd(code.iota(b.ielem), b.iconst(u * f.lanes))) for u in range(f.plan.u)]

    def group(
        self, pairs: Pairs, states: dict[tuple[int, int], State], masks: list[str] | None, j: str, t0: str, g: int
    ) -> None:
        """The pairs of a block and g rows b."""
        f, code, u_range = self.f, self.f.code, range(self.f.plan.u)
        pairs.group = f.at(f.pack_b, j, f.elem)
        pairs.local_b, pairs.row_b = j, code.math("add", t0, j)
        ats: list[At] = [(u, k) for k in range(g) for u in u_range]
        for loops in f.layout.loops:
            pairs.loops(loops, ats)
        for v in f.layout.nested:
            for at in ats:
                pairs.get(v, at)
        for place in f.places:
            if place.where == DIRECT:
                for u in u_range:
                    place.sink.update(pairs, states[place.number, u], [(u, k) for k in range(g)], None)
            elif place.where == BOTH:
                place.sink.update(pairs, states[place.number, 0], ats, [masks[u] for u, _ in ats] if masks else None)
            else:
                for k in range(g):
                    state = parts.crossed(f, place, code.math("add", j, k))
                    place.sink.update(pairs, state, [(u, k) for u in u_range], masks)
