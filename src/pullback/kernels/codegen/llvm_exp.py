"""Sums of exponentials as LLVM: the logarithm of a sum, and means weighted by exponentials, at any magnitude.

A rescaling of the sums is a rare branch: the reference moves only when a term exceeds it by LAZY, because exp(LAZY) n
is far from overflow. That leaves one exponential for a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.llvm_code import Code
from pullback.kernels.codegen.llvm_sinks import State, Sum
from pullback.kernels.codegen.llvm_values import At, Pairs
from pullback.kernels.codegen.vecmath import FUNCTIONS
from pullback.kernels.ir.reductions import Program
from pullback.kernels.plan.lower import Segment, Value

LAZY = 16.0


class ExpSum(Sum):
    """log sum_j exp(F_ij) G_ij, or (log sum_j exp(F_ij), weighted mean of G): cell 0 is the reference m, then the sums.

    m starts at the lowest finite number and never exceeds the largest, so that F - m is never inf - inf: F = -inf
    gives the term 0, F = inf the term inf, and a row of -inf alone ends in log(0).
    """

    def __init__(self, code: Code, program: Program, formula: Value, segments: Sequence[Segment]) -> None:
        self.formula = formula
        self.factors: dict[str, str] = {}  # m -> what sums relative to it were multiplied by in `lanes` or `merge`
        super().__init__(code, program, segments)

    @override
    def set_up(self) -> None:
        super().set_up()
        self.kahan = False
        self.carry = self.program.scheme == "direct_sum"
        self.acc, elem = self.b.like(self.acc.elem), self.b.elem
        self.top = 1.7976931348623157e308 if self.b.double else 3.4028234663852886e38
        self.last = "double" if self.program.accumulator != "float32" or self.acc.double else "float"
        if self.carry:
            self.last = self.acc.elem
        self.running = [elem] + [self.acc.elem] * len(self.values)
        self.lasting = [elem] + [self.last] * len(self.values)

    @override
    def identity(self, k: int) -> float:
        return 0.0 if k else -self.top

    @override
    def begin(self, lasting: list[str] | None) -> list[str]:
        if lasting is None:
            return [self.b.const(-self.top)] + [self.acc.const(0)] * len(self.values)
        return lasting if self.carry else [lasting[0]] + [self.acc.const(0)] * len(self.values)

    @override
    def update(self, pairs: Pairs, state: State, ats: list[At], masks: list[str] | None) -> None:
        code, b, acc = self.code, self.b, self.acc
        f = [pairs.get(self.formula, at) for at in ats]
        if masks is not None:
            f = [b.select(m, x, b.const(float("-inf"))) for m, x in zip(masks, f, strict=True)]
        high = f[0]
        for x in f[1:]:  # where f[0] is nan the rest may be ignored: the sum is nan
            high = b.select(b.fcmp("ogt", x, high), x, high)
        m = code.load(b.type, state.cell(0))
        with code.when(code.any([b.fcmp("ogt", high, b.fadd(m, b.const(LAZY)))])), pairs.scope():
            higher = b.select(b.fcmp("ogt", high, m), high, m)
            higher = b.select(b.fcmp("olt", higher, b.const(self.top)), higher, b.const(self.top))
            factor = self.exp(b.fsub(m, higher))
            code.store(b.type, higher, state.cell(0))
            wide = factor if acc.elem == b.elem else b.fpext(factor)
            for k in range(len(self.values)):
                cell = state.cell(1 + k)
                code.store(acc.type, acc.fmul(code.load(acc.type, cell), wide), cell)
            for n, segment in enumerate(self.rolled):
                with code.loop(0, segment.size) as d:
                    cell = state.rolled(n, d)
                    code.store(acc.type, acc.fmul(code.load(acc.type, cell), wide), cell)
        m = code.load(b.type, state.cell(0))
        e = [self.exp(b.fsub(x, m)) for x in f]
        for k, v in enumerate(self.values):
            cell = state.cell(1 + k)
            total = code.load(acc.type, cell)
            for n, at in enumerate(ats):
                (new,) = self.add(pairs, [total], v, at, e[n])
                total = new if masks is None else acc.select(masks[n], new, total)
            code.store(acc.type, total, cell)
        self.update_rolled(pairs, state, ats, masks, e)

    def exp(self, x: str, b: Builder | None = None) -> str:
        """The exponential of x."""
        return FUNCTIONS["exp"](b or self.b, x)

    @override
    def end(self, lasting: list[str], running: list[str], base: str) -> list[str]:
        if self.carry:
            return running
        return [
            running[0],
            *(self.end_rolled(lasting, running, x, y) for x, y in zip(lasting[1:], running[1:], strict=True)),
        ]

    @override
    def end_rolled(self, lasting: list[str], running: list[str], x: str, y: str) -> str:
        d = self.acc.like(self.last)
        return d.fadd(d.fmul(x, self.factor(lasting[0], running[0])), self.as_last(y))

    def factor(self, old: str, new: str) -> str:
        """What sums relative to `old` are to be multiplied by, in the lasting type."""
        factor = self.exp(self.b.fsub(old, new))
        return factor if self.last == self.b.elem else self.b.fpext(factor)

    @override
    def lanes_rolled(self, running: list[str], y: str) -> str:
        return super().lanes_rolled(running, self.acc.fmul(y, self.factors[running[0]]))

    @override
    def merge_rolled(self, s: Builder, p: list[str], q: list[str], x: str, y: str) -> str:
        d = s.like(self.last)
        return d.fadd(d.fmul(x, self.factors[p[0]]), d.fmul(y, self.factors[q[0]]))

    @override
    def finish_rolled(self, b: Builder, lasting: list[str], x: str) -> str:
        return b.fadd(lasting[0], FUNCTIONS["log"](b, self.narrow(b, x, self.last)))

    @override
    def lanes(self, running: list[str], base: str) -> list[str]:
        b = self.b
        high = b.call(f"llvm.vector.reduce.fmax.{b.suffix}", b.elem, (b.type, running[0]))
        factor = self.exp(b.fsub(running[0], b.splat(high)))
        factor = factor if self.acc.elem == b.elem else b.fpext(factor)
        self.factors[running[0]] = factor
        sums = super().lanes([self.acc.fmul(x, factor) for x in running[1:]], base)
        return [high, *sums]

    @override
    def merge(self, s: Builder, p: list[str], q: list[str]) -> list[str]:
        high = s.select(s.fcmp("ogt", p[0], q[0]), p[0], q[0])
        d = s.like(self.last)
        fp, fq = (self.exp(s.fsub(x, high), s) for x in (p[0], q[0]))
        if self.last != s.elem:
            fp, fq = s.fpext(fp), s.fpext(fq)
        self.factors |= {p[0]: fp, q[0]: fq}
        return [high, *(d.fadd(d.fmul(x, fp), d.fmul(y, fq)) for x, y in zip(p[1:], q[1:], strict=True))]

    @override
    def finish(self, b: Builder, lasting: list[str]) -> list[str]:
        m, sums = lasting[0], [self.narrow(b, s, self.last) for s in lasting[1:]]
        return [b.fadd(m, FUNCTIONS["log"](b, s)) for s in sums]


class SoftMax(ExpSum):
    """The first sum has the weight 1."""

    @override
    def finish(self, b: Builder, lasting: list[str]) -> list[str]:
        m, *sums = lasting
        d = b.like(self.last)
        (log,) = super().finish(b, [m, sums[0]])
        empty = d.fcmp("oeq", sums[0], d.const(0))
        means = [d.select(empty, d.const(0), d.fdiv(s, sums[0])) for s in sums[1:]]
        return [log, *(self.narrow(b, x, self.last) for x in means)]

    @override
    def finish_rolled(self, b: Builder, lasting: list[str], x: str) -> str:
        d = b.like(self.last)
        mean = d.select(d.fcmp("oeq", lasting[1], d.const(0)), d.const(0), d.fdiv(x, lasting[1]))
        return self.narrow(b, mean, self.last)
