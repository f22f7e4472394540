"""The indices of the smallest or largest terms as LLVM.

Ties go to the first index and nan is never better than anything. Terms that are not better than the identity (inf for
minima, nan) are not kept here; `fill` gives the places that are left to the first rows that are not kept yet.
"""

from __future__ import annotations

from typing_extensions import override

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.llvm_code import Code
from pullback.kernels.codegen.llvm_sinks import Sink, State
from pullback.kernels.codegen.llvm_values import At, Pairs


class Arg(Sink):
    """The index of the best term of each component: cells (term, index); the running one counts from the tile."""

    @override
    def set_up(self) -> None:
        self.better, self.worst = ("olt", float("inf")) if self.program.kind == "ArgKMin" else ("ogt", float("-inf"))
        self.running = [self.b.elem, self.b.ielem] * len(self.values)
        self.lasting = [self.b.elem, "i64"] * len(self.values)
        self.result = "i64"

    @override
    def identity(self, k: int) -> float:
        return -1 if k % 2 else self.worst

    @override
    def begin(self, lasting: list[str] | None) -> list[str]:
        b, none = self.b, self.b.iconst(-1)
        return [x for k in range(len(self.values)) for x in (lasting[2 * k] if lasting else b.const(self.worst), none)]

    @override
    def update(self, pairs: Pairs, state: State, ats: list[At], masks: list[str] | None) -> None:
        code, b = self.code, self.b
        for k, v in enumerate(self.values):
            cells = state.cell(2 * k), state.cell(2 * k + 1)
            best, where = code.load(b.type, cells[0]), code.load(b.itype, cells[1])
            for n, (u, g) in enumerate(ats):
                x = pairs.get(v, (u, g))
                better = b.fcmp(self.better, x, best)
                if masks is not None:
                    better = b.mask_and(better, masks[n])
                best, where = b.select(better, x, best), self._pick(better, self._local(pairs, u, g, masks), where)
            code.store(b.type, best, cells[0])
            code.store(b.itype, where, cells[1])

    def _local(self, pairs: Pairs, u: int, g: int, masks: list[str] | None) -> str:
        """The index relative to the tile: of row b in all lanes, or (reducing over the lanes) of the rows a."""
        code, b = self.code, self.b
        first = pairs.local_b if masks is None else pairs.local_a
        short = first if b.double else code.emit(f"trunc i64 {first} to i32")
        if masks is None:
            if g:
                short = code.emit(f"add {b.ielem} {short}, {g}")
            return code.splat(b.ielem, short)
        return b.iadd(b.iadd(code.splat(b.ielem, short), code.iota(b.ielem)), b.iconst(u * b.lanes))

    def _pick(self, m: str, x: str, y: str) -> str:
        b = self.b
        return self.code.emit(f"select {b.mtype} {m}, {b.itype} {x}, {b.itype} {y}")

    @override
    def end(self, lasting: list[str], running: list[str], base: str) -> list[str]:
        code, b = self.code, self.b
        kind, result = code.vector("i64"), []
        for k in range(len(self.values)):
            term, where = running[2 * k : 2 * k + 2]
            wide = where if b.double else code.emit(f"sext {b.itype} {where} to {kind}")
            wide = code.emit(f"add {kind} {wide}, {code.splat('i64', base)}")
            found = b.icmp("sge", where, b.iconst(0))
            result += [term, code.emit(f"select {b.mtype} {found}, {kind} {wide}, {kind} {lasting[2 * k + 1]}")]
        return result

    @override
    def lanes(self, running: list[str], base: str) -> list[str]:
        code, b, result = self.code, self.b, []
        for k in range(len(self.values)):
            term, where = running[2 * k : 2 * k + 2]
            op = "fmin" if self.program.kind == "ArgKMin" else "fmax"
            best = b.call(f"llvm.vector.reduce.{op}.{b.suffix}", b.elem, (b.type, term))
            where = self._pick(b.fcmp("oeq", term, b.splat(best)), where, b.iconst(-1))
            name = f"llvm.vector.reduce.umin.{b.suffix.replace('f', 'i')}"  # no index, -1, is the largest
            first = b.call(name, b.ielem, (b.itype, where))
            wide = first if b.double else code.emit(f"sext {b.ielem} {first} to i64")
            row = code.math("add", wide, base)
            result += [best, code.pick(code.test("slt", wide, 0), -1, row)]
        return result

    @override
    def merge(self, s: Builder, p: list[str], q: list[str]) -> list[str]:
        code, result = self.code, []
        for k in range(len(self.values)):
            (x, i), (y, j) = p[2 * k : 2 * k + 2], q[2 * k : 2 * k + 2]
            earlier = code.emit(f"and i1 {s.fcmp('oeq', y, x)}, {code.test('ult', j, i)}")
            better = code.emit(f"or i1 {s.fcmp(self.better, y, x)}, {earlier}")
            result += [s.select(better, y, x), code.pick(better, j, i)]
        return result

    @override
    def finish(self, b: Builder, lasting: list[str]) -> list[str]:
        return lasting[1::2]


class ArgK(Arg):
    """The indices of the K best terms of each component, in order: K terms, then K indices, kept in memory.

    A group of pairs costs one comparison with the K-th best; only if some lane improves, its terms are inserted.
    """

    @override
    def set_up(self) -> None:
        super().set_up()
        self.in_place, self.k, n = True, self.program.k, len(self.values)
        self.n_cells = n * self.k
        self.running = self.lasting = [self.b.elem] * self.n_cells + ["i64"] * self.n_cells

    @override
    def identity(self, k: int) -> float:
        return self.worst if k < self.n_cells else -1

    @override
    def begin(self, lasting: list[str] | None) -> list[str]:
        return [self.b.const(self.worst)] * self.n_cells + [self.code.splat("i64", -1)] * self.n_cells

    @override
    def update(self, pairs: Pairs, state: State, ats: list[At], masks: list[str] | None) -> None:
        code, b = self.code, self.b
        for c, v in enumerate(self.values):
            terms, where = state.cell(c * self.k), state.cell(self.n_cells + c * self.k)
            worst = code.at(terms, (self.k - 1) * state.spacing, b.elem)
            x = [pairs.get(v, at) for at in ats]
            if masks is not None:
                x = [b.select(m, y, b.const(self.worst)) for m, y in zip(masks, x, strict=True)]
            threshold = code.load(b.type, worst)
            with code.when(code.any([b.fcmp(self.better, y, threshold) for y in x])):
                saved = code.slot(b.type, len(ats))
                for n, y in enumerate(x):
                    code.store(b.type, y, code.at(saved, n * b.lanes, b.elem))
                with code.loop(0, len(ats)) as n_at:
                    y = code.load(b.type, code.at(saved, code.math("mul", n_at, b.lanes), b.elem))
                    with code.when(code.any([b.fcmp(self.better, y, code.load(b.type, worst))])):
                        self._insert(y, self._row(pairs, n_at, masks), terms, where, state.spacing)

    def _row(self, pairs: Pairs, n: str, masks: list[str] | None) -> str:
        """The index of the n-th pair: row b in all lanes, or (reducing over the lanes) the rows a."""
        code, kind = self.code, self.code.vector("i64")
        if masks is None:
            return code.splat("i64", code.math("add", pairs.row_b, n))
        first = code.math("add", pairs.row_a, code.math("mul", n, self.b.lanes))
        return code.emit(f"add {kind} {code.splat('i64', first)}, {code.iota('i64')}")

    def _insert(self, term: str, index: str, terms: str, where: str, spacing: int) -> None:
        """Move (term, index) down each lane's list to its place; what it displaces moves on, ties included."""
        code, b, kind = self.code, self.b, self.code.vector("i64")
        moving, placed = (code.slot(b.type), code.slot(kind)), code.slot(b.mtype)
        code.store(b.mtype, "zeroinitializer", placed)
        code.store(b.type, term, moving[0])
        code.store(kind, index, moving[1])
        with code.loop(0, self.k) as k:
            offset = code.math("mul", k, spacing)
            at = code.at(terms, offset, b.elem), code.at(where, offset, "i64")
            new = code.load(b.type, moving[0]), code.load(kind, moving[1])
            old = code.load(b.type, at[0]), code.load(kind, at[1])
            better = b.mask_or(b.fcmp(self.better, new[0], old[0]), code.load(b.mtype, placed))
            code.store(b.mtype, better, placed)
            for t, n, o, here, there in zip((b.type, kind), new, old, at, moving, strict=True):
                code.store(t, code.emit(f"select {b.mtype} {better}, {t} {n}, {t} {o}"), here)
                code.store(t, code.emit(f"select {b.mtype} {better}, {t} {o}, {t} {n}"), there)

    @override
    def absorb(self, state: State, p: str) -> None:
        code, b = self.code, self.b
        for c in range(len(self.values)):
            terms, where = state.cell(c * self.k), state.cell(self.n_cells + c * self.k)
            with code.loop(0, b.lanes) as lane, code.loop(0, self.k) as k:
                offset = code.math("add", code.math("mul", k, state.spacing), lane)
                self._merge_one(
                    code.load(b.elem, code.at(terms, offset, b.elem)),
                    code.load("i64", code.at(where, offset, "i64")),
                    code.at(p, c * self.k, "i64"),
                )

    @override
    def join(self, p: str, q: str) -> None:
        code, b = self.code, self.b
        for c in range(len(self.values)):
            with code.loop(0, self.k) as k:
                cell = code.at(q, code.math("add", k, c * self.k), "i64")
                index = code.load("i64", code.at(cell, self.n_cells, "i64"))
                self._merge_one(code.load(b.elem, cell), index, code.at(p, c * self.k, "i64"))

    def _merge_one(self, term: str, index: str, cells: str) -> None:
        """Insert a scalar by (term, index); places without index, -1, are the last as unsigned numbers."""
        code, s = self.code, self.b.like(lanes=1)
        with code.when(self._before(s, term, index, code.at(cells, self.k - 1, "i64"))):
            moving = code.slot(s.elem), code.slot("i64")
            code.store(s.elem, term, moving[0])
            code.store("i64", index, moving[1])
            with code.loop(0, self.k) as k:
                cell = code.at(cells, k, "i64")
                at = cell, code.at(cell, self.n_cells, "i64")
                new = code.load(s.elem, moving[0]), code.load("i64", moving[1])
                before = self._before(s, *new, cell)
                for kind, n, here, there in zip((s.elem, "i64"), new, at, moving, strict=True):
                    old = code.load(kind, here)
                    code.store(kind, code.emit(f"select i1 {before}, {kind} {n}, {kind} {old}"), here)
                    code.store(kind, code.emit(f"select i1 {before}, {kind} {old}, {kind} {n}"), there)

    def _before(self, s: Builder, term: str, index: str, cell: str) -> str:
        """Whether (term, index) comes before what the cell holds."""
        code = self.code
        old, at = code.load(s.elem, cell), code.load("i64", code.at(cell, self.n_cells, "i64"))
        tie = code.emit(f"and i1 {s.fcmp('oeq', term, old)}, {code.test('ult', index, at)}")
        return code.emit(f"or i1 {s.fcmp(self.better, term, old)}, {tie}")

    @override
    def finish(self, b: Builder, lasting: list[str]) -> list[str]:
        where = lasting[self.n_cells :]
        return [where[d * self.k + k] for k in range(self.k) for d in range(len(self.values))]


def fill(code: Code, row: str, k: int, dim: str | int, columns: str) -> None:
    """Give each -1 of a row of k indices, `dim` apart, the smallest index below `columns` that the row lacks."""
    last = code.load("i64", code.at(row, code.math("mul", dim, k - 1), "i64"))
    with code.when(code.test("slt", last, 0)):
        taken, candidate = code.slot("i64"), code.slot("i64")
        code.store("i64", 0, candidate)
        with code.loop(0, k) as n:
            here = code.at(row, code.math("mul", n, dim), "i64")
            with code.when(code.test("slt", code.load("i64", here), 0)):
                _next_free(code, row, n, dim, candidate, taken)
                c = code.load("i64", candidate)
                code.store("i64", code.pick(code.test("slt", c, columns), c, -1), here)
                code.store("i64", code.math("add", c, 1), candidate)


def _next_free(code: Code, row: str, n: str, dim: str | int, candidate: str, taken: str) -> None:
    """Raise the candidate until none of the first n indices equals it: at most n + 1 rounds."""
    with code.loop(0, code.math("add", n, 1)):
        code.store("i64", 0, taken)
        with code.loop(0, n) as m:
            same = code.test(
                "eq", code.load("i64", code.at(row, code.math("mul", m, dim), "i64")), code.load("i64", candidate)
            )
            hit = code.emit(f"zext i1 {same} to i64")
            code.store("i64", code.emit(f"or i64 {code.load('i64', taken)}, {hit}"), taken)
        code.store("i64", code.math("add", code.load("i64", candidate), code.load("i64", taken)), candidate)
