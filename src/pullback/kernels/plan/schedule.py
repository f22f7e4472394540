"""How a Program is run on one kind of CPU: which axis lies along the vector lanes, what is packed, sizes of blocks.

The two axes of the pairs are the lane axis a (one vector register holds consecutive rows a) and the broadcast axis b.
A result indexed by a is "direct": its sums stay in registers while b runs. One indexed by b is "cross": its sums are
vectors in memory, reduced over the lanes when a chunk of rows a is done. Values that depend on one axis only are
computed once for each row when the row is packed; those that depend on both once for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from pullback.kernels.ir.expr import I, J
from pullback.kernels.ir.reductions import KEPT, OVER_BOTH, Program
from pullback.kernels.plan.lower import Lowered, Value, lower

# Operations of one or two instructions
_CHEAP = frozenset(("Add", "Subtract", "Mult", "Minus", "Square", "Abs", "Maximum", "Minimum", "Where", "ReLU", "Step"))
_CHEAP |= {"Equal", "NotEqual", "LessThan", "LessOrEqual"}
DIRECT, CROSS, BOTH = "direct", "cross", "both"  # where the rows of a result lie


@dataclass(frozen=True)
class Target:
    """A CPU as LLVM names it, and what the generator must know of it.

    Args:
        cpu: LLVM's name, such as "x86-64", "haswell", "znver5".
        features: LLVM's feature string.
        width: bytes of a vector register.
        registers: number of vector registers.
        fma: fused multiply-add and rounding instructions.
        avx512: AVX-512 F and DQ.
    """

    cpu: str
    features: str
    width: int
    registers: int
    fma: bool
    avx512: bool

    def lanes(self, elem: str) -> int:
        """Elements of a vector register."""
        return self.width // (8 if elem == "double" else 4)


@dataclass
class Side:
    """What is packed of one axis: rows of numbers, each as long as a tile (or one number, for parameters).

    Args:
        raw: argument -> its components that are copied, in ascending order.
        first: argument -> packed row of its first component.
        index: packed row of the row numbers, if the formula reads them.
        derived: (value, first row, number of rows; 0 for a scalar) computed from the raw ones.
        row: id of a value -> its packed row.
    """

    raw: dict[int, list[int]] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)
    index: int | None = None
    derived: list[tuple[Value, int, int]] = field(default_factory=list)
    row: dict[int, int] = field(default_factory=dict)
    rows: int = 0

    def take(self, n: int) -> int:
        """Reserve `n` rows."""
        self.rows += n
        return self.rows - n


class Layout:
    """Splits the values of a lowered program by what they depend on, and numbers those that are packed.

    Attributes:
        sides: role (0 parameters, 1 rows i, 2 columns j) -> Side.
        uses: id of a value -> how many values of pairs, and results, read it.
        pairs: the values that are computed for every pair, operands first.
        loops: those of them that are sums over d, by level: loops of a level need those of lower ones only.
    """

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.signature = lowered.program.signature
        self.sides = {role: Side() for role in range(3)}
        self.uses: dict[int, int] = {}
        self.pairs: list[Value] = []
        self.depths: dict[int, int] = {}  # id -> length of the longest chain of operations under it
        frontier: dict[int, Value] = {}
        self._all = lowered.values()
        for v in self._all:
            self.depths[id(v)] = 1 + max((self.depths[id(a)] for a in v.args), default=0)
        live: set[int] = set()
        roots = [v for group in lowered.segments for s in group for v in s.values]
        stack = list(roots)
        for v in roots:
            self.uses[id(v)] = self.uses.get(id(v), 0) + 1
        while stack:
            v = stack.pop()
            if id(v) in live or id(v) in frontier:
                continue
            if v.role != 3:
                if v.op != "Const":
                    frontier[id(v)] = v
                continue
            live.add(id(v))
            for a in v.args:
                self.uses[id(a)] = self.uses.get(id(a), 0) + 1
                stack.append(a)
        self.pairs = [v for v in self._all if id(v) in live]
        self.frontier = [v for v in self._all if id(v) in frontier]
        self._pack()
        self.loops = self._levels()
        self.nested = self._nested()
        # exp(f - c) must see f rounded as the reduction that made c = log sum exp f saw it: with |f| = 1000 the
        # rounding of f alone is 6e-5 in float32, and cancels only if it is the same
        self.rounded = {
            id(v.args[0])
            for v in self.pairs
            if v.op == "Exp" and v.args[0].op == "Subtract" and v.args[0].args[1].role != 3
        }

    def size(self, v: Value) -> int:
        """The length of the loop that a value with a loop counter belongs to."""
        if v.op == "Component":
            return int(v.params[2])
        return next(self.size(a) for a in v.args if a.depth)

    def _pack(self) -> None:
        needed: dict[int, Value] = {id(v): v for v in self.frontier}
        loads: dict[tuple[int, int], set[int]] = {}
        whole: set[tuple[int, int]] = set()
        # operands of derived values; those of another role are packed on that role's side
        inner: dict[int, Value] = {}
        stack = list(self.frontier)
        while stack:
            v = stack.pop()
            if id(v) in inner:
                continue
            inner[id(v)] = v
            if v.op == "Load":
                loads.setdefault((v.role, v.params[0]), set()).add(v.params[1])
            elif v.op == "Component":
                whole.add((v.role, v.params[0]))
            elif v.op == "Index":
                side = self.sides[v.role]
                if side.index is None:
                    side.index = side.take(1)
                side.row[id(v)] = side.index
            for a in v.args:
                if a.op != "Const" and a.role != v.role:
                    needed[id(a)] = a
                stack.append(a)
        for role, position in sorted(set(loads) | whole):
            dim = self.signature[position][0]
            side = self.sides[role]
            side.raw[position] = list(range(dim)) if (role, position) in whole else sorted(loads[role, position])
            side.first[position] = side.take(len(side.raw[position]))
        for v in self._all:
            if id(v) not in inner:
                continue
            side = self.sides[v.role]
            if v.op == "Load":
                position, k = v.params
                side.row[id(v)] = side.first[position] + side.raw[position].index(k)
            elif v.op == "Component":
                side.row[id(v)] = side.first[v.params[0]] + v.params[1]
            elif v.op not in ("Index", "Const") and id(v) in needed:
                n = self.size(v) if v.depth else 0
                side.row[id(v)] = side.take(max(n, 1))
                side.derived.append((v, side.row[id(v)], n))

    def _nested(self) -> list[Value]:
        """Functions of functions, such as exp(exp(x) - m), and what they are functions of, operands first.

        Computed step by step for all pairs of a group: one pair after the other, the long chain of operations would
        keep the processor waiting (measured 1.5 times slower).
        """
        level: dict[int, int] = {}
        found: list[Value] = []
        for v in self.pairs:
            here = max((level.get(id(a), 0) for a in v.args), default=0)
            if v.op not in _CHEAP and not v.depth and v.op != "Loop":
                here += 1
                found.append(v)
            level[id(v)] = here
        return found if max(level.values(), default=0) > 1 and len(found) <= 4 else []

    def _levels(self) -> list[list[Value]]:
        level: dict[int, int] = {}
        found: dict[tuple[int, int], list[Value]] = {}
        for v in self.pairs:
            here = max((level.get(id(a), 0) for a in v.args), default=0)
            if v.op == "Loop":
                found.setdefault((here, v.params[0]), []).append(v)
                here += 1
            level[id(v)] = here
        return [found[k] for k in sorted(found)]


@dataclass(frozen=True)
class Plan:
    """What the generator needs: frozen, hashable, independent of the sizes of the tensors.

    Args:
        program: what to compute.
        elem: "float" or "double", the type of the data.
        target: for which CPU.
        lane: I or J, the axis along the lanes.
        u: vector registers of rows a in a block.
        g: rows b in a group.
        tile: rows b that are packed, and summed in registers, at once.
        chunk: rows a that are packed at once.
    """

    program: Program
    elem: str
    target: Target
    lane: int
    u: int
    g: int
    tile: int
    chunk: int

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return self.target.lanes(self.elem)

    @property
    def block(self) -> int:
        """Rows a of a block."""
        return self.u * self.lanes

    def place(self, axis: int) -> str:
        """Where the rows of a result of that axis lie."""
        return BOTH if axis == OVER_BOTH else DIRECT if KEPT[axis] == self.lane else CROSS

    @cached_property
    def layout(self) -> Layout:
        """The values that are packed and those of pairs."""
        return layout_of(self.program)


@lru_cache(maxsize=1024)
def layout_of(program: Program) -> Layout:
    """The Layout of the scalar code for LLVM. Raises TooLarge."""
    return Layout(lower(program))


def make_plan(program: Program, elem: str, target: Target, lane: int) -> Plan:
    """A Plan from a count of the registers that the formula needs: heuristics, measured on AVX-512."""
    layout = layout_of(program)
    lanes, size = target.lanes(elem), 8 if elem == "double" else 4
    a, b = (layout.sides[role] for role in ((1, 2) if lane == I else (2, 1)))
    states = sum(s.size for group in layout.lowered.segments for s in group if not s.rolled)
    rolled = sum(s.size for group in layout.lowered.segments for s in group if s.rolled)
    if layout.loops:
        n_loops = max(map(len, layout.loops))
        u, g = _loop_tile(target.registers, n_loops)
        while u * g > 1 and u * g * len(layout.pairs) > 800:
            u, g = (u, g // 2) if g > 1 else (u - 1, g)
    else:
        per_vector = min(a.rows, 8) + states
        u = 2 if 2 * per_vector <= target.registers - 10 else 1
        g = 4
        while g > 1 and u * g * len(layout.pairs) > 400:
            g //= 2
        if rolled:
            g = 8 if len(layout.pairs) < 60 else 4
    cross = sum(w for w, axis in zip(program.widths, program.axes, strict=True) if KEPT[axis] != lane)
    tile = 256
    while tile > 32 and (tile * b.rows * size > 1 << 18 or tile * cross * target.width > 1 << 18):
        tile //= 2
    tile = max(tile // g * g, g)
    block = u * lanes
    chunk = 2048
    row = a.rows * size + 8 * sum(program.widths) + (12 * rolled if rolled else 0)
    while chunk > 4 * block and chunk * row > 1 << 19:
        chunk //= 2
    return Plan(program, elem, target, lane, u, g, tile, -(-chunk // block) * block)


def _loop_tile(registers: int, n_loops: int) -> tuple[int, int]:
    """(u, g) whose u * g sums for each loop fit into the registers with u rows and a broadcast beside them."""
    if registers >= 32:
        return {1: (3, 8), 2: (2, 6), 3: (2, 4)}.get(n_loops, (1, 4))
    return {1: (2, 5), 2: (2, 2)}.get(n_loops, (1, 2))


def choose_lane(program: Program, m: int, n: int, batch: int, threads: int, sparse: bool, width: int) -> int:
    """The axis that lies along the lanes: the kept one, or the reduced one where there are few kept rows."""
    kept = {KEPT[axis] for axis in program.axes if axis != OVER_BOTH}
    if sparse:
        return J if kept == {J} else I
    if len(kept) != 1:
        return I if m >= n else J
    (lane,) = kept
    rows, columns = (m, n) if lane == I else (n, m)
    blocks = batch * -(-rows // (2 * width))
    if (rows < width and columns > rows) or (blocks < 2 * threads and columns > 4 * rows):
        return J if lane == I else I
    return lane
