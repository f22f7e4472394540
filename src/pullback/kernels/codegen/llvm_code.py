"""Functions with loops and branches around the straight-line Builder, and a value cache that knows their scopes.

Variables that change in loops are `slot`s (allocas), which LLVM's SROA pass turns into registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pullback.kernels.codegen.builder import Builder

SIZES = {"float": 4, "double": 8, "i32": 4, "i64": 8}


class Code:
    """The body of one function.

    Args:
        b: builder of vectors of the data's type; its lines are the body.
    """

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.slots: list[str] = []
        self._labels = 0

    def function(self, head: str) -> str:
        """The finished function."""
        return "\n".join([f"{head} {{", "entry:", *self.slots, *self.b.lines, "  ret void", "}"])

    # Integers of 64 bits and pointers ----------------------------------------------------------------------------

    def emit(self, text: str) -> str:
        """Assign to a fresh name."""
        return self.b.emit(text)

    def math(self, op: str, x: str | int, y: str | int) -> str:
        """X `op` y; sums and products of constants are folded."""
        if op == "add" and str(x) == "0":
            return str(y)
        if (op == "add" and str(y) == "0") or (op == "mul" and str(y) == "1"):
            return str(x)
        return self.emit(f"{op} i64 {x}, {y}")

    def min(self, x: str | int, y: str | int) -> str:
        """The smaller of two."""
        return self.b.call("llvm.smin.i64", "i64", ("i64", str(x)), ("i64", str(y)))

    def test(self, pred: str, x: str | int, y: str | int) -> str:
        """The i1 x `pred` y."""
        return self.emit(f"icmp {pred} i64 {x}, {y}")

    def pick(self, c: str, x: str | int, y: str | int) -> str:
        """The integer x if c, else y."""
        return self.emit(f"select i1 {c}, i64 {x}, i64 {y}")

    def at(self, base: str, offset: str | int, elem: str = "i8") -> str:
        """The address base + offset elements."""
        if str(offset) == "0":
            return base
        return self.emit(f"getelementptr {elem}, ptr {base}, i64 {offset}")

    def load(self, kind: str, p: str) -> str:
        """The value at p, aligned as its elements."""
        return self.emit(f"load {kind}, ptr {p}, align {_align(kind)}")

    def store(self, kind: str, x: str | int, p: str) -> None:
        """Write to p."""
        self.b.lines.append(f"  store {kind} {x}, ptr {p}, align {_align(kind)}")

    def slot(self, kind: str, n: int = 1) -> str:
        """A variable (or an array of n) of the function."""
        name = self.b.name()
        size = f", i64 {n}" if n > 1 else ""
        self.slots.append(f"  {name} = alloca {kind}{size}, align 64")
        return name

    # Control flow ----------------------------------------------------------------------------------------------------

    def label(self) -> str:
        """A fresh label."""
        self._labels += 1
        return f"L{self._labels}"

    def start(self, label: str) -> None:
        """Begin the block `label`."""
        self.b.lines.append(f"{label}:")

    def go(self, label: str) -> None:
        """Jump."""
        self.b.lines.append(f"  br label %{label}")

    def branch(self, c: str, yes: str, no: str) -> None:
        """Jump by a condition."""
        self.b.lines.append(f"  br i1 {c}, label %{yes}, label %{no}")

    @contextmanager
    def loop(self, low: str | int, high: str | int, step: str | int = 1) -> Iterator[str]:
        """For i in range(low, high, step)."""
        p = self.slot("i64")
        head, body, end = self.label(), self.label(), self.label()
        self.store("i64", low, p)
        self.go(head)
        self.start(head)
        i = self.load("i64", p)
        self.branch(self.test("slt", i, high), body, end)
        self.start(body)
        yield i
        self.store("i64", self.math("add", i, step), p)
        self.go(head)
        self.start(end)

    @contextmanager
    def when(self, c: str) -> Iterator[None]:
        """If c."""
        body, end = self.label(), self.label()
        self.branch(c, body, end)
        self.start(body)
        yield
        self.go(end)
        self.start(end)

    # Vectors -----------------------------------------------------------------------------------------------------

    def vector(self, elem: str) -> str:
        """The vector type of the builder's lanes."""
        return elem if self.b.lanes == 1 else f"<{self.b.lanes} x {elem}>"

    def iota(self, elem: str) -> str:
        """The constant 0, 1, 2 ..."""
        return f"<{', '.join(f'{elem} {k}' for k in range(self.b.lanes))}>"

    def splat(self, elem: str, x: str | int) -> str:
        """The scalar x in every lane."""
        kind, n = self.vector(elem), self.b.lanes
        if n == 1:
            return str(x)
        if isinstance(x, int):
            return f"splat ({elem} {x})"
        first = self.emit(f"insertelement {kind} poison, {elem} {x}, i64 0")
        return self.emit(f"shufflevector {kind} {first}, {kind} poison, <{n} x i32> zeroinitializer")

    def any(self, masks: Sequence[str]) -> str:
        """The i1 that some lane of some mask is set."""
        b, total = self.b, masks[0]
        for m in masks[1:]:
            total = b.mask_or(total, m)
        n = b.lanes
        if n == 1:
            return total
        return b.call(f"llvm.vector.reduce.or.v{n}i1", "i1", (b.mtype, total))


def _align(kind: str) -> int:
    elem = kind.split()[-1].rstrip(">")
    return SIZES.get(elem, 8)
