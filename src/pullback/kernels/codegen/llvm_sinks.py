"""Reductions as LLVM: how each kind keeps, updates, merges and finishes its sums.

A sink has two states. The running one lives in registers (rows along the lanes) or in vectors of memory (rows b)
while a tile is passed; the lasting one takes it in at the end of the tile. For float data the lasting sums are
doubles, which makes every tile a block of block summation. Components of long results (`rolled`) stay in memory in
both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from typing_extensions import override

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.llvm_code import Code
from pullback.kernels.codegen.llvm_values import At, Pairs
from pullback.kernels.ir.reductions import Program
from pullback.kernels.plan.lower import Segment, Value


@dataclass(frozen=True)
class State:
    """Addresses of the running state: cell k, and component d (an operand) of rolled segment n.

    `spacing` is the distance of cells of one type, in elements.
    """

    cell: Callable[[int], str]
    rolled: Callable[[int, str], str]
    spacing: int = 0


class Sink:
    """One result. Subclasses say what they keep.

    Args:
        code: where to write; its builder has the lanes of the data.
        program: the reduction.
        segments: components of the result's formula (of the weight, for the exponential sums).
    """

    def __init__(self, code: Code, program: Program, segments: Sequence[Segment]) -> None:
        self.code, self.b, self.program = code, code.b, program
        self.values = [v for s in segments if not s.rolled for v in s.values]
        self.columns = [s.start + k for s in segments if not s.rolled for k in range(s.size)]
        self.rolled = [s for s in segments if s.rolled]
        self.running: list[str] = []  # element types of the running cells
        self.lasting: list[str] = []  # of the lasting cells
        self.carry = False  # the running state goes on over tiles and is stored as it is
        self.in_place = False  # `update` works on the lasting cells
        self.result = self.b.elem  # type of the results
        self.set_up()

    # What a kind defines -------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Fill in running, lasting, carry."""

    def identity(self, k: int) -> float:
        """Of lasting cell k."""
        return 0.0

    def begin(self, lasting: list[str] | None) -> list[str]:
        """The running cells at the start of a tile; of rows b if lasting is None."""
        raise NotImplementedError

    def update(self, pairs: Pairs, state: State, ats: list[At], masks: list[str] | None) -> None:
        """Take in the pairs `ats`; masks, if given, says which lanes of each count."""
        raise NotImplementedError

    def end(self, lasting: list[str], running: list[str], base: str) -> list[str]:
        """The lasting cells after a tile that starts at row `base`."""
        raise NotImplementedError

    def lanes(self, running: list[str], base: str) -> list[str]:
        """Lasting cells of one row, from running cells of many lanes that started at row `base`."""
        raise NotImplementedError

    def merge(self, s: Builder, p: list[str], q: list[str]) -> list[str]:
        """Two lasting states in one; s is a builder of scalars."""
        raise NotImplementedError

    def finish(self, b: Builder, lasting: list[str]) -> list[str]:
        """Results from lasting cells, those of unrolled components in order."""
        raise NotImplementedError

    def end_rolled(self, lasting: list[str], running: list[str], x: str, y: str) -> str:
        """The lasting sum of a rolled component: x and the running y, given the cells before `end`."""
        raise NotImplementedError

    def lanes_rolled(self, running: list[str], y: str) -> str:
        """The lasting sum of a rolled component of one row, from many lanes."""
        raise NotImplementedError

    def merge_rolled(self, s: Builder, p: list[str], q: list[str], x: str, y: str) -> str:
        """The sum of a rolled component of two states, given their cells."""
        raise NotImplementedError

    def finish_rolled(self, b: Builder, lasting: list[str], x: str) -> str:
        """The result of a rolled component."""
        raise NotImplementedError

    def absorb(self, state: State, p: str) -> None:
        """The same for sinks that work in place: the running state of many lanes into the cells at p."""
        raise NotImplementedError

    def join(self, p: str, q: str) -> None:
        """The same for sinks that work in place: the cells at q into those at p."""
        raise NotImplementedError

    # Help ----------------------------------------------------------------------------------------------------------

    def wide(self, b: Builder, x: str) -> str:
        """As a double."""
        return x if b.double else b.fpext(x)

    def narrow(self, b: Builder, x: str, kind: str = "double") -> str:
        """A number of type `kind` in the data's type."""
        return x if b.double or kind == "float" else b.like("double").fptrunc(x)

    def total(self, x: str) -> str:
        """The sum over lanes of doubles."""
        n = self.b.lanes
        self.b.declarations.add(f"declare double @llvm.vector.reduce.fadd.v{n}f64(double, <{n} x double>)")
        return self.code.emit(f"call reassoc double @llvm.vector.reduce.fadd.v{n}f64(double -0.0, <{n} x double> {x})")


class Sum(Sink):
    """sum_j F_ij, in blocks, directly or compensated (Kahan), or every term in double."""

    @override
    def set_up(self) -> None:
        p, elem = self.program, self.b.elem
        self.kahan = p.scheme == "kahan_scheme"
        acc = "double" if p.accumulator == "float64" or elem == "double" else "float"
        self.carry = self.kahan or p.scheme == "direct_sum"
        self.acc = self.b.like(acc)
        self.last = acc if self.carry or p.accumulator == "float32" else "double"
        per = 2 if self.kahan else 1
        self.running = [acc] * (per * len(self.values))
        self.lasting = [self.last] * (per * len(self.values))

    @override
    def begin(self, lasting: list[str] | None) -> list[str]:
        if self.carry and lasting is not None:
            return lasting
        return [self.acc.const(0)] * len(self.running)

    @override
    def update(self, pairs: Pairs, state: State, ats: list[At], masks: list[str] | None) -> None:
        code, acc = self.code, self.acc
        per = 2 if self.kahan else 1
        for k, v in enumerate(self.values):
            cells = [state.cell(per * k + n) for n in range(per)]
            total = [code.load(acc.type, c) for c in cells]
            for n, at in enumerate(ats):
                new = self.add(pairs, total, v, at)
                if masks is not None:
                    new = [acc.select(masks[n], x, old) for x, old in zip(new, total, strict=True)]
                total = new
            for x, c in zip(total, cells, strict=True):
                code.store(acc.type, x, c)
        self.update_rolled(pairs, state, ats, masks, [None] * len(ats))

    def update_rolled(
        self, pairs: Pairs, state: State, ats: list[At], masks: list[str] | None, factors: Sequence[str | None]
    ) -> None:
        """All pairs for one load and store of a component's sum."""
        code, acc = self.code, self.acc
        for n, segment in enumerate(self.rolled):
            (body,) = segment.values
            for at in ats:
                pairs.prepare(body, at)
            with pairs.each(segment.size) as d:
                cell = state.rolled(n, d)
                total = code.load(acc.type, cell)
                for k, at in enumerate(ats):
                    (new,) = self.add(pairs, [total], body, at, factors[k])
                    total = new if masks is None else acc.select(masks[k], new, total)
                code.store(acc.type, total, cell)

    def add(self, pairs: Pairs, total: list[str], v: Value, at: At, factor: str | None = None) -> list[str]:
        """The sum (and its compensation) with one more term."""
        acc = self.acc
        if len(total) == 1 and acc.elem == self.b.elem:
            return [pairs.accumulate(total[0], v, at, factor)]
        x = pairs.get(v, at)
        if factor is not None:
            x = self.b.fmul(factor, x)
        if acc.elem != self.b.elem:
            x = self.b.fpext(x)
        if len(total) == 1:
            return [acc.fadd(total[0], x)]
        s, c = total  # true sum s - c
        y = acc.fsub(x, c)
        t = acc.fadd(s, y)
        return [t, acc.fsub(acc.fsub(t, s), y)]

    @override
    def end(self, lasting: list[str], running: list[str], base: str) -> list[str]:
        if self.carry:
            return running
        d = self.acc.like(self.last)
        return [d.fadd(x, self.as_last(r)) for x, r in zip(lasting, running, strict=True)]

    @override
    def lanes(self, running: list[str], base: str) -> list[str]:
        sums = [self.total(self.wide(self.acc, x)) for x in running]
        s = self.b.like("double", 1)
        return sums if self.last == "double" else [s.fptrunc(x) for x in sums]

    @override
    def merge(self, s: Builder, p: list[str], q: list[str]) -> list[str]:
        d = s.like(self.last)
        return [d.fadd(x, y) for x, y in zip(p, q, strict=True)]

    @override
    def finish(self, b: Builder, lasting: list[str]) -> list[str]:
        d = b.like(self.last)
        if self.kahan:
            lasting = [d.fsub(s, c) for s, c in zip(lasting[::2], lasting[1::2], strict=True)]
        return [self.narrow(b, x, self.last) for x in lasting]

    @override
    def end_rolled(self, lasting: list[str], running: list[str], x: str, y: str) -> str:
        return self.acc.like(self.last).fadd(x, self.as_last(y))

    def as_last(self, x: str) -> str:
        """A running sum in the type of the lasting one."""
        return self.acc.fpext(x) if self.last != self.acc.elem else x

    @override
    def lanes_rolled(self, running: list[str], y: str) -> str:
        x = self.total(self.wide(self.acc, y))
        return x if self.last == "double" else self.b.like("double", 1).fptrunc(x)

    @override
    def merge_rolled(self, s: Builder, p: list[str], q: list[str], x: str, y: str) -> str:
        return s.like(self.last).fadd(x, y)

    @override
    def finish_rolled(self, b: Builder, lasting: list[str], x: str) -> str:
        return self.narrow(b, x, self.last)


class Prod(Sum):
    """prod_j F_ij."""

    @override
    def identity(self, k: int) -> float:
        return 1.0

    @override
    def set_up(self) -> None:
        super().set_up()
        self.kahan, self.carry = False, False
        self.last = "double"
        self.running = [self.acc.elem] * len(self.values)
        self.lasting = ["double"] * len(self.values)

    @override
    def begin(self, lasting: list[str] | None) -> list[str]:
        return [self.acc.const(1)] * len(self.running)

    @override
    def add(self, pairs: Pairs, total: list[str], v: Value, at: At, factor: str | None = None) -> list[str]:
        x = pairs.get(v, at)
        return [self.acc.fmul(total[0], x if self.acc.elem == self.b.elem else self.b.fpext(x))]

    @override
    def end(self, lasting: list[str], running: list[str], base: str) -> list[str]:
        d = self.acc.like("double")
        return [d.fmul(x, self.wide(self.acc, r)) for x, r in zip(lasting, running, strict=True)]

    @override
    def lanes(self, running: list[str], base: str) -> list[str]:
        n, result = self.b.lanes, []
        self.b.declarations.add(f"declare double @llvm.vector.reduce.fmul.v{n}f64(double, <{n} x double>)")
        for r in running:
            x = self.wide(self.acc, r)
            result.append(
                self.code.emit(f"call reassoc double @llvm.vector.reduce.fmul.v{n}f64(double 1.0, <{n} x double> {x})")
            )
        return result

    @override
    def merge(self, s: Builder, p: list[str], q: list[str]) -> list[str]:
        d = s.like("double")
        return [d.fmul(x, y) for x, y in zip(p, q, strict=True)]
