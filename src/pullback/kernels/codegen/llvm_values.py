"""Scalar values -> LLVM operands: each value once in every scope, products fused into the sums that read them.

a * b + c is contracted to one fused multiply-add where nothing else reads a * b. That is the only rounding that differs
from evaluating the operations one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.llvm_code import Code
from pullback.kernels.codegen.vecmath import FUNCTIONS
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.plan.lower import Value
from pullback.kernels.plan.schedule import Layout

At = tuple[int, ...]


class Evaluator:
    """Operands of values, kept until the end of the block that they were computed in.

    Args:
        leaf: (value, at) -> operand of a packed value, or None if it is to be computed.
        uses: id of a value -> number of readers; products read once are contracted.
    """

    def __init__(self, code: Code, b: Builder, leaf: Callable[[Value, At], str | None], uses: dict[int, int]) -> None:
        self.code, self.b, self.leaf, self.uses = code, b, leaf, uses
        self.scopes: list[dict[Any, str]] = [{}]
        self.rounded: set[int] = set()  # differences that are not contracted
        self.counter: str = "0"  # the loop counter d

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is computed inside is forgotten after it: its block does not dominate what follows."""
        self.scopes.append({})
        yield
        self.scopes.pop()

    @contextmanager
    def each(self, size: int) -> Iterator[str]:
        """A loop over the components d."""
        outer = self.counter
        with self.code.loop(0, size) as d, self.scope():
            self.counter = d
            yield d
        self.counter = outer

    def known(self, key: Any) -> bool:
        """Whether an open scope has the operand of that key."""
        return any(key in scope for scope in self.scopes)

    def cached(self, key: Any, make: Callable[[], str]) -> str:
        """The operand of that key, made if no open scope has it."""
        for scope in self.scopes:
            if key in scope:
                return scope[key]
        x = self.scopes[-1][key] = make()
        return x

    def key(self, v: Value, at: At) -> Any:
        """What distinguishes instances of v."""
        return id(v), at

    def get(self, v: Value, at: At = ()) -> str:
        """The operand of v."""
        if v.op == "Const":
            return self.b.const(v.params[0])
        return self.cached(self.key(v, at), lambda: self.make(v, at))

    def make(self, v: Value, at: At) -> str:
        """Compute v."""
        x = self.leaf(v, at)
        if x is not None:
            return x
        if v.op == "Loop":
            self.loops([v], [at])
            return self.scopes[-1][self.key(v, at)]
        b = self.b
        if v.op in ("Add", "Subtract"):
            return self.sum(v, at)
        return FUNCTIONS[PRIMITIVES[v.op].llvm or ""](b, *(self.get(a, at) for a in v.args), *v.params)

    def product(self, v: Value, at: At) -> tuple[Value, Value, bool] | None:
        """The factors of v, and whether it is minus their product, if it may be contracted: nothing else reads it."""
        inner = v.args[0] if v.op == "Minus" else v
        for x in (v, inner):
            if x.role != 3 or self.uses.get(id(x), 0) != 1 or self.known(self.key(x, at)):
                return None
        return (inner.args[0], inner.args[-1], v is not inner) if inner.op in ("Mult", "Square") else None

    def fused(self, factors: tuple[Value, Value, bool], at: At, total: str, minus: bool = False) -> str:
        """The value total + p q, or minus."""
        p, q = (self.get(x, at) for x in factors[:2])
        return self.b.fma(self.b.fneg(p) if factors[2] != minus else p, q, total)

    def sum(self, v: Value, at: At) -> str:
        """The value a + b or a - b."""
        b, (x, y) = self.b, v.args
        minus = v.op == "Subtract"
        if id(v) in self.rounded:
            return b.fsub(self.get(x, at), self.get(y, at))
        if factors := self.product(y, at):
            return self.fused(factors, at, self.get(x, at), minus)
        if factors := self.product(x, at):
            z = self.get(y, at)
            return self.fused(factors, at, b.fneg(z) if minus else z)
        return (b.fsub if minus else b.fadd)(self.get(x, at), self.get(y, at))

    def accumulate(self, total: str, v: Value, at: At, factor: str | None = None) -> str:
        """The value total + factor * v."""
        b = self.b
        if factor is not None:
            if v.op == "Const" and v.params[0] == 1:
                return b.fadd(total, factor)
            return b.fma(factor, self.get(v, at), total)
        if factors := self.product(v, at):
            return self.fused(factors, at, total)
        return b.fadd(total, self.get(v, at))

    def prepare(self, body: Value, at: At) -> None:
        """Compute what a loop's body reads from outside before the loop."""
        for v in self.outer_operands(body):
            self.get(v, at)

    def is_packed(self, v: Value) -> bool:
        """Whether v is loaded, so that nothing under it is needed."""
        return False

    def outer_operands(self, body: Value) -> list[Value]:
        """The values that a loop's body reads and that do not change in the loop."""
        found: dict[int, Value] = {}
        seen: set[int] = set()
        stack = [body]
        while stack:
            v = stack.pop()
            if id(v) in seen:
                continue
            seen.add(id(v))
            if not v.depth:
                found[id(v)] = v
            elif not self.is_packed(v):
                stack.extend(a for a in v.args if a.op != "Const")
        return list(found.values())

    def loops(self, loops: list[Value], ats: list[At]) -> None:
        """Sums over d of loops of one size, for several places, in one run over d."""
        code, b = self.code, self.b
        sums = {(n, at): code.slot(b.type) for n in range(len(loops)) for at in ats}
        for slot in sums.values():
            code.store(b.type, b.const(0), slot)
        for v in loops:
            for at in ats:
                self.prepare(v.args[0], at)
        with self.each(loops[0].params[0]):
            for (n, at), slot in sums.items():
                code.store(b.type, self.accumulate(code.load(b.type, slot), loops[n].args[0], at), slot)
        for (n, at), slot in sums.items():
            self.scopes[-1][self.key(loops[n], at)] = code.load(b.type, slot)


class Pairs(Evaluator):
    """Values of the pairs of a block of u vectors of rows a and a group of rows b; `at` is (vector, row b).

    Args:
        layout: what is packed where.
        lane: role of axis a, 1 or 2.
        pitch: distance of packed rows of a and of b.
        a, p: addresses of the first row a of the block and of the parameters; `group` is that of the rows b.
    """

    def __init__(self, code: Code, layout: Layout, lane: int, pitch: tuple[int, int], a: str, p: str) -> None:
        super().__init__(code, code.b, self.packed, layout.uses)
        self.rounded = layout.rounded
        self.layout, self.lane, self.pitch = layout, lane, pitch
        self.a, self.p, self.group = a, p, ""
        self.local_b, self.row_a, self.row_b = "0", "0", "0"  # numbers of the first rows at hand
        self.local_a = "0"

    def key(self, v: Value, at: At) -> Any:
        """Values of one axis are shared along the other."""
        if v.role == 3:
            return id(v), at
        return id(v), (at[0] if v.role == self.lane else at[1] if v.role else 0)

    @override
    def is_packed(self, v: Value) -> bool:
        return v.role != 3

    def packed(self, v: Value, at: At) -> str | None:
        """Load a packed value: consecutive rows a, or one row b in every lane."""
        if v.role == 3:
            return None
        code, b = self.code, self.b
        row = self.layout.sides[v.role].row[id(v)]
        if v.role == 0:
            base = code.at(self.p, self.counter, b.elem) if v.depth else self.p
            return b.splat(code.load(b.elem, code.at(base, row, b.elem)))
        if v.role == self.lane:
            return b.load(self._address(v, self.a, row * self.pitch[0] + at[0] * b.lanes, self.pitch[0]))
        return b.splat(code.load(b.elem, self._address(v, self.group, row * self.pitch[1] + at[1], self.pitch[1])))

    def _address(self, v: Value, base: str, offset: int, pitch: int) -> str:
        if v.depth:
            d = self.counter
            base = self.cached(
                ("row", base, d), lambda: self.code.at(base, self.code.math("mul", d, pitch), self.b.elem)
            )
        return self.code.at(base, offset, self.b.elem)


class Rows(Evaluator):
    """Values of one axis (or of parameters), computed from packed ones where the rows are packed.

    Args:
        side: what is packed of this axis.
        pitch: distance of packed rows; 1 for parameters.
        row: address of the first of the rows at hand.
        p: address of the packed parameters.
    """

    def __init__(self, code: Code, b: Builder, layout: Layout, role: int, pitch: int, row: str, p: str) -> None:
        super().__init__(code, b, self.packed, {})
        self.layout, self.role, self.pitch, self.row, self.p = layout, role, pitch, row, p
        self.ready: set[int] = set()

    @override
    def is_packed(self, v: Value) -> bool:
        copied = v.op in ("Load", "Component", "Index") or v.role != self.role or id(v) in self.ready
        return copied and id(v) in self.layout.sides[v.role].row

    def packed(self, v: Value, at: At) -> str | None:
        """Load what is there already."""
        if not self.is_packed(v):
            return None
        code, b = self.code, self.b
        where = self.layout.sides[v.role].row[id(v)]
        if v.role == 0:
            base = code.at(self.p, self.counter, b.elem) if v.depth else self.p
            return b.splat(code.load(b.elem, code.at(base, where, b.elem)))
        base = code.at(self.row, code.math("mul", self.counter, self.pitch), b.elem) if v.depth else self.row
        return b.load(code.at(base, where * self.pitch, b.elem))
