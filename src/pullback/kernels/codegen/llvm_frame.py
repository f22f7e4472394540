"""What the pieces of a kernel share: the words of its arguments, the map of its scratch memory, its sinks.

Both functions of a kernel read one array of 64-bit words; a worker has scratch memory of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.llvm_arg import Arg, ArgK
from pullback.kernels.codegen.llvm_code import SIZES, Code
from pullback.kernels.codegen.llvm_exp import ExpSum, SoftMax
from pullback.kernels.codegen.llvm_pack import Source
from pullback.kernels.codegen.llvm_sinks import Prod, Sink, Sum
from pullback.kernels.ir.expr import I
from pullback.kernels.plan.lower import Segment, Value
from pullback.kernels.plan.schedule import CROSS, DIRECT, Plan

# Words of the arguments. A record is (first row a, end, first range of b, end); a range is (first row b, end). The
# counter has a cache line of its own.
COUNTER, TASKS, PARTS, N_B, BATCH, STARTS, RECORDS, RANGES, OUT, PARTIAL, OUT_STEP, PART_STEP, FILL = 0, *range(8, 20)
RESULTS = 20  # for each result: where it starts in `out` (elements), where in a part (bytes)
PER_RESULT = 2
PER_ARG = (
    6  # address, step of the batch, of rows, of columns (elements), address of offsets by batch member, mask of it
)


@dataclass
class Place:
    """A sink, where its rows lie, and the offsets in scratch memory of its cells and rolled components.

    Args:
        sink: the reduction.
        number: of the result.
        where: DIRECT, CROSS or BOTH.
        width: columns of the result.
        running, lasting: offsets of the cells of the two states.
        running_rolled, lasting_rolled: offsets of rolled components.
        step: bytes of the running state of one row b.
        out: offset of finished results, one packed row for each column.
    """

    sink: Sink
    number: int
    where: str
    width: int
    running: list[int]
    lasting: list[int]
    running_rolled: list[int]
    lasting_rolled: list[int]
    step: int = 0
    out: int = 0

    @property
    def cells(self) -> int:
        """Cells of a row in a part: 8 bytes each."""
        return len(self.sink.lasting) + sum(s.size for s in self.sink.rolled)

    def rolled_cells(self) -> list[tuple[int, Segment]]:
        """(first cell in a part, segment) of the rolled components."""
        found, at = [], len(self.sink.lasting)
        for s in self.sink.rolled:
            found.append((at, s))
            at += s.size
        return found

    @property
    def last(self) -> str:
        """The type of the lasting sums of rolled components."""
        return self.sink.last if isinstance(self.sink, Sum) else self.sink.b.elem

    @property
    def acc(self) -> Builder:
        """The builder of the running sums of rolled components."""
        return self.sink.acc if isinstance(self.sink, Sum) else self.sink.b


def sinks(plan: Plan, code: Code) -> list[Sink]:
    """The sink of each result."""
    p, groups = plan.program, plan.layout.lowered.segments
    if p.kind == "Sum":
        return [Sum(code, p, group) for group in groups]
    if p.kind == "Prod":
        return [Prod(code, p, groups[0])]
    if p.kind in ("ArgKMin", "ArgKMax"):
        return [(Arg if p.k == 1 else ArgK)(code, p, groups[0])]
    one = Segment(0, 1, (Value("Const", (), (1.0,), 0, False),), False)
    formula = groups[0][0].values[0]
    if p.kind == "LogSumExp":
        return [ExpSum(code, p, formula, groups[1] if len(groups) > 1 else [one])]
    weights = [Segment(1 + s.start, s.size, s.values, s.rolled) for s in groups[1]]
    return [SoftMax(code, p, formula, [one, *weights])]


class Frame:
    """The plan, the code that is being written, and where everything lies."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.layout = plan, plan.layout
        self.elem, self.lanes = plan.elem, plan.lanes
        self.lane_role = 1 if plan.lane == I else 2
        self.scratch = 64
        self.code = self.new_code(plan.lanes)
        size = SIZES[plan.elem]
        side_a, side_b = self.layout.sides[self.lane_role], self.layout.sides[3 - self.lane_role]
        # a vector more than a tile: rows at distances of a power of two would share the sets of the cache
        self.pitch_a, self.pitch_b = plan.chunk + plan.lanes, -(-plan.tile // plan.lanes) * plan.lanes + plan.lanes
        self.pack_a = self.reserve(side_a.rows * self.pitch_a * size)
        self.pack_b = self.reserve(side_b.rows * self.pitch_b * size)
        self.pack_p = self.reserve(self.layout.sides[0].rows * size)
        self.places = [self.place(n, s) for n, s in enumerate(sinks(plan, self.code))]

    def new_code(self, lanes: int) -> Code:
        """An empty function."""
        t = self.plan.target
        return Code(Builder(self.elem, lanes, t.fma, t.avx512))

    def reserve(self, n: int) -> int:
        """Offset of n bytes of scratch memory."""
        start = self.scratch
        self.scratch += -(-n // 64) * 64 + 64
        return start

    def place(self, number: int, sink: Sink) -> Place:
        """Reserve memory for a sink."""
        plan, where = self.plan, self.plan.place(self.plan.program.axes[number])
        place = Place(sink, number, where, plan.program.widths[number], [], [], [], [])
        acc = SIZES[place.acc.elem]
        if where == CROSS:
            for kind in sink.running:
                place.running.append(place.step)
                place.step += self.lanes * SIZES[kind]
            for s in sink.rolled:
                place.running_rolled.append(place.step)
                place.step += s.size * self.lanes * acc
            base = self.reserve(place.step * plan.tile)
            place.running = [base + x for x in place.running]
            place.running_rolled = [base + x for x in place.running_rolled]
            return place
        rows = plan.chunk if where == DIRECT else self.lanes
        base = self.reserve(sum(rows * SIZES[kind] for kind in sink.lasting))
        for kind in sink.lasting:  # cells of one type at equal distances
            place.lasting.append(base)
            base += rows * SIZES[kind]
        run = plan.block if where == DIRECT else self.lanes
        for s in sink.rolled:
            place.running_rolled.append(self.reserve(s.size * run * acc))
            place.lasting_rolled.append(self.reserve(s.size * rows * SIZES[place.last]))
        if where == DIRECT:
            place.out = self.reserve(place.width * rows * SIZES[sink.result])
        return place

    # Words and memory ----------------------------------------------------------------------------------------------

    def word(self, k: int) -> str:
        """An integer argument."""
        return self.code.load("i64", self.code.at("%args", k, "i64"))

    def address(self, k: int) -> str:
        """A pointer argument."""
        return self.code.emit(f"load ptr, ptr {self.code.at('%args', k, 'i64')}, align 8")

    def at(self, offset: int, index: str | int = 0, elem: str = "i8") -> str:
        """Scratch memory at offset + index elements."""
        return self.code.at(self.code.at("%scratch", offset), index, elem)

    @property
    def first_arg(self) -> int:
        """The word where the arguments' descriptions start."""
        return RESULTS + PER_RESULT * len(self.plan.program.axes)

    def source(self, position: int, item: str) -> Source:
        """Argument `position` of batch member `item`."""
        code, first = self.code, self.first_arg + PER_ARG * position
        p, step, row, column = self.address(first), self.word(first + 1), self.word(first + 2), self.word(first + 3)
        table, mask = self.address(first + 4), self.word(first + 5)
        offset = code.load("i64", code.at(table, code.math("and", item, mask), "i64"))
        offset = code.math("add", offset, code.math("mul", item, step))
        return Source(code.at(p, offset, self.elem), row, column)

    def cell_rolled(self, place: Place, n: int, d: str, r: str | int, rows: int) -> str:
        """Address of the lasting sum of component d of rolled segment n, of the vector of rows r."""
        index = self.code.math("add", self.code.math("mul", d, rows), r)
        return self.at(place.lasting_rolled[n], index, place.last)
