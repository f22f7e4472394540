"""Packing: strided rows of the arguments -> long rows of one component each, and what is computed from one axis alone.

Component k of the rows first ... first + n - 1 of an argument becomes consecutive numbers. Rows that are contiguous in
memory are read whole and parted by shuffles. The last vector is filled by repeating the last row, so that nobody reads
beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pullback.kernels.codegen.llvm_code import Code
from pullback.kernels.codegen.llvm_values import Rows
from pullback.kernels.plan.lower import Value
from pullback.kernels.plan.schedule import Layout

SHUFFLED = 6  # components up to which contiguous rows are parted by shuffles; measured: more takes long to compile


@dataclass(frozen=True)
class Source:
    """An argument in memory: address of its first row in this batch member, and its strides in elements."""

    base: str
    row: str
    column: str


def pack(
    code: Code,
    layout: Layout,
    role: int,
    sources: dict[int, Source],
    to: str,
    pitch: int,
    first: str,
    n: str,
    padded: str,
    p: str,
) -> None:
    """Pack rows first ... first + n - 1 of one axis to `to`, and repeat the last up to `padded`; n >= 1."""
    b, side = code.b, layout.sides[role]
    last = code.math("sub", n, 1)
    for position, components in side.raw.items():
        source, dim = sources[position], layout.signature[position][0]
        base = code.at(source.base, code.math("mul", first, source.row), b.elem)
        out = code.at(to, side.first[position] * pitch, b.elem)
        full: str | int = 0
        if components == list(range(dim)) and dim <= SHUFFLED:
            dense = code.test("eq", source.row, dim)
            if dim > 1:
                dense = code.emit(f"and i1 {dense}, {code.test('eq', source.column, 1)}")
            full = code.pick(dense, code.math("and", n, -b.lanes), 0)
            with code.loop(0, full, b.lanes) as r:
                _part(code, code.at(base, code.math("mul", r, dim), b.elem), code.at(out, r, b.elem), dim, pitch)
        with code.loop(full, padded) as r:
            row = code.at(base, code.math("mul", code.min(r, last), source.row), b.elem)
            target = code.at(out, r, b.elem)
            if len(components) > SHUFFLED and components == list(range(dim)):
                with code.loop(0, dim) as d:
                    x = code.load(b.elem, code.at(row, code.math("mul", d, source.column), b.elem))
                    code.store(b.elem, x, code.at(target, code.math("mul", d, pitch), b.elem))
            else:
                for number, k in enumerate(components):
                    x = code.load(b.elem, code.at(row, code.math("mul", source.column, k), b.elem))
                    code.store(b.elem, x, code.at(target, number * pitch, b.elem))
    if side.index is not None:
        _number(code, code.at(to, side.index * pitch, b.elem), first, padded)
    if side.derived:
        with code.loop(0, padded, b.lanes) as r:
            derive(code, Rows(code, b, layout, role, pitch, code.at(to, r, b.elem), p), role)


def parameters(code: Code, layout: Layout, sources: dict[int, Source], to: str) -> None:
    """Copy the parameters to `to` and compute what depends on them alone."""
    side = layout.sides[0]
    s = code.b.like(lanes=1)
    for position, components in side.raw.items():
        source = sources[position]
        out = code.at(to, side.first[position], s.elem)
        if len(components) > SHUFFLED and components == list(range(len(components))):
            with code.loop(0, len(components)) as d:
                x = code.load(s.elem, code.at(source.base, code.math("mul", d, source.column), s.elem))
                code.store(s.elem, x, code.at(out, d, s.elem))
        else:
            for row, k in enumerate(components):
                x = code.load(s.elem, code.at(source.base, code.math("mul", source.column, k), s.elem))
                code.store(s.elem, x, code.at(out, row, s.elem))
    if side.derived:
        derive(code, Rows(code, s, layout, 0, 1, to, to), 0)


def derive(code: Code, rows: Rows, role: int) -> None:
    """Compute and store the derived values, in an order in which operands come first."""
    b = rows.b
    pitch = rows.pitch

    def save(v: Value, first: int) -> None:
        base = code.at(rows.row, code.math("mul", rows.counter, pitch), b.elem) if v.depth else rows.row
        code.store(b.type, rows.get(v), code.at(base, first * pitch, b.elem))

    for v, first, size in rows.layout.sides[role].derived:
        if size:
            rows.prepare(v, ())
            with rows.each(size):
                save(v, first)
        else:
            save(v, first)
        rows.ready.add(id(v))


def _part(code: Code, source: str, to: str, dim: int, pitch: int) -> None:
    """`lanes` contiguous rows of `dim` numbers -> one vector for each component."""
    b = code.b
    n = b.lanes
    wide = f"<{n * dim} x {b.elem}>"
    x = code.load(wide if dim > 1 else b.type, source)
    for k in range(dim):
        y = x
        if dim > 1:
            mask = ", ".join(f"i32 {lane * dim + k}" for lane in range(n))
            y = code.emit(f"shufflevector {wide} {x}, {wide} poison, <{n} x i32> <{mask}>")
        code.store(b.type, y, code.at(to, k * pitch, b.elem))


def _number(code: Code, to: str, first: str, padded: str) -> None:
    """first, first + 1 ... as real numbers."""
    b = code.b
    with code.loop(0, padded, b.lanes) as r:
        start = code.splat("i64", code.math("add", first, r))
        kind = code.vector("i64")
        number = code.emit(f"add {kind} {start}, {code.iota('i64')}")
        code.store(b.type, code.emit(f"sitofp {kind} {number} to {b.type}"), code.at(to, r, b.elem))
