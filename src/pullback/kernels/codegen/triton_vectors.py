"""Scalar values -> lines of Triton, where loops over d are products of matrices.

What depends on d is a tile of (rows, components) on the side of the kept axis and (columns, components) on the other,
over a `Chunk` of components: numbers of a power of two, as tl.dot takes them, masked where there are fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pullback.kernels.codegen import triton_special
from pullback.kernels.codegen.triton_dot import NEAR, Loop, Term, loop
from pullback.kernels.codegen.triton_values import DENSE, Values
from pullback.kernels.ir.expr import PARAMETER, ROLE
from pullback.kernels.plan.lower import Value

ROWS, COLUMNS, FIRST = 0, 1, 2  # sides: the kept axis, the other, and what is taken off both
RESIDENT = 128  # components up to which rows stay in registers; longer ones are read again for every tile
WIDEST = 64  # components of a chunk
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Chunk:
    """Components `first` .. `first + width` of a loop over d, of which there are `size` if that is not None."""

    first: str
    width: int
    size: int | None = None


def split(size: int, first: str = "") -> list[Chunk]:
    """Chunks of 64, 32 and 16 that hold `size` components, counted from `first`."""
    found, start = [], 0
    while start < size:
        left = -(-(size - start) // 16) * 16
        width = next(w for w in (WIDEST, 32, 16) if w <= left)
        where = f"{first} + {start}" if first else f"{start}"
        found.append(Chunk(where, width, size if start + width > size else None))
        start += width
    return found


class Vectors(Values):
    """Writes values as `Values` does, and loops over d by tl.dot.

    Args:
        signature, layouts, rows, tile, elem: those of `Values`.
        data: type of the tensors, such as "float16".
        precision: "tf32x3", "tf32" or "ieee", of products in float32.

    Attributes:
        after: lines behind the loop over columns.
    """

    def __init__(
        self,
        signature: Sequence[tuple[int, int]],
        layouts: Sequence[int],
        rows: int,
        tile: tuple[int, int],
        elem: str,
        data: str,
        precision: str,
    ) -> None:
        super().__init__(signature, layouts, rows, tile, elem)
        self.half = data in HALF
        self.data = data
        self.precision = precision if elem == "tl.float32" else "ieee"
        self.after: list[str] = []
        self.target: list[str] | None = None  # lines of a loop over chunks
        self.tiles: list[dict[tuple[object, ...], str]] = [{}]
        self.kept: list[object] = []  # ids of what they hold are keys

    # Loops over d ---------------------------------------------------------------------------------------------------

    def _sum(self, v: Value) -> str:
        found = loop(v, self.rows)
        if found is None:
            return super()._sum(v)
        self.kept.append(found)
        return self._square(v, found.terms[0]) if found.square else self._bilinear(v, found)

    def _bilinear(self, v: Value, found: Loop) -> str:
        size = v.params[0]
        parts = []
        for t in found.terms:
            if t.row is not None and t.column is not None:
                part = self._product(t.row, t.column, size)
            elif t.row is not None or t.column is not None:
                part = self._total(t, size)
            else:
                part = f"{float(size)}"
            factor = "" if t.factor is None else f" * {self.name(t.factor)}"
            parts.append(f"{'-' if t.sign < 0 else '+'} {part}{factor}")
        return self._let(v, " ".join(parts).removeprefix("+ "))

    def _square(self, v: Value, t: Term) -> str:
        """The squared distance by products, and by differences in tiles where that loses digits."""
        assert t.row is not None and t.column is not None
        (body,), (size,) = v.args, v.params
        rows = self._total(Term(1, None, t.row, None), size, square=True)
        columns = self._total(Term(1, None, None, t.column), size, square=True)
        dot = self._product(t.row, t.column, size)
        name, far, bad = self.fresh(), self.fresh(), self.fresh()
        self.inside += [
            f"{far} = {rows} + {columns}",
            f"{name} = {far} - 2.0 * {dot}",
            f"{bad} = tl.where({name} >= {NEAR} * {far}, 0, 1)",  # nan too
        ]
        self._outside(body)
        outer, self.inside = self.inside, []
        exact = super()._sum(v)
        lines, self.inside = self.inside, outer
        self.inside.append(f"if tl.max(tl.max({bad}, 1), 0) > 0:")
        self.inside += [f"    {line}" for line in [*lines, f"{name} = {exact}"]]
        return name

    def _product(self, row: Value, column: Value, size: int) -> str:
        """Sum over d of row(d) column(d), a tile of (rows, columns)."""
        row, column = self._plain(row), self._plain(column)
        raw = self.half and row.op == column.op == "Component"
        name, shape = self.fresh(), f"({self.tile[0]}, {self.tile[1]})"
        long = size > RESIDENT
        if long:
            self.inside.append(f"{name} = tl.zeros({shape}, {self.elem})")
        for k, chunk in enumerate(self._chunks(self.inside, size)):
            a, b = self.operand(row, ROWS, chunk, raw), self.operand(column, COLUMNS, chunk, raw)
            text = self.dot(a, f"tl.trans({b})", raw)
            # subtracted, because a sum would be given to the tensor cores, whose accumulators round towards zero
            into = self.inside if self.target is None else self.target
            into.append(f"{name} = {name} - {text}" if long else f"{name} = {f'{name} + ' if k else ''}{text}")
        if long:
            self.inside.append(f"{name} = -{name}")
        return name

    def dot(self, a: str, b: str, raw: bool, precision: str = "") -> str:
        """The call of tl.dot."""
        how = "" if raw else f", input_precision='{precision or self.precision}'"
        return f"tl.dot({a}, {b}{how}, out_dtype={self.elem})"

    def _total(self, t: Term, size: int, square: bool = False) -> str:
        """Sum over d of what belongs to one side (or of its square), as a column or a row of a tile."""
        side, v = (ROWS, t.row) if t.row is not None else (COLUMNS, t.column)
        assert v is not None
        lines = self.before if side == ROWS else self.inside
        total, length = self.fresh(), self.tile[side]
        lines.append(f"{total} = tl.zeros(({length},), {self.elem})")
        for chunk in self._chunks(lines, size):
            a = self.operand(v, side, chunk, False)
            into = lines if self.target is None else self.target
            into.append(f"{total} += tl.sum({f'{a} * {a}' if square else a}, 1)")
        name = self.fresh()
        lines.append(f"{name} = {total}{'[:, None]' if side == ROWS else '[None, :]'}")
        return name

    def _chunks(self, lines: list[str], size: int) -> Iterator[Chunk]:
        """The chunks of a loop over d one after the other, or a loop over them, whose body is written meanwhile."""
        if size <= RESIDENT:
            yield from split(size)
            return
        counter = f"d{self.fresh()}"
        self.target = []
        self.tiles.append({})
        width = 32 if 0 < size % WIDEST <= 32 else WIDEST
        yield Chunk(counter, width, size if size % width else None)
        self.tiles.pop()
        body, self.target = self.target, None
        lines.append(f"for {counter} in range(0, {size}, {width}):")
        lines += [f"    {line}" for line in body]

    # Tiles over d ---------------------------------------------------------------------------------------------------

    def operand(self, v: Value, side: int, chunk: Chunk, raw: bool) -> str:
        """The tile of `v`, zero where there is no component or no column; `raw`: in the type of the data."""
        v = self._plain(v)
        name = self._tile(v, side, chunk, raw)
        own = self.rows if side == ROWS else 1 - self.rows
        if v.op == "Component" and v.role == ROLE[own]:
            return name
        ok = [f"({self._numbers(chunk)} < {chunk.size})[None, :]"] if chunk.size is not None else []
        ok += ["col_okt"] if side == COLUMNS else []
        if ok:
            name = f"tl.where({' & '.join(ok)}, {name}, 0.0)"
        if v.role != ROLE[own]:
            name = f"{name} + tl.zeros(({self.tile[side]}, {chunk.width}), {self.elem})"
        return self._keep((*_key(v), side, chunk, "operand"), side, name)

    def _plain(self, v: Value) -> Value:
        """Tensors of half precision are multiplied exactly, so that nothing need be taken off them."""
        return v.args[0] if self.half and v.op == "Shift" else v

    def _numbers(self, chunk: Chunk) -> str:
        return f"({chunk.first} + tl.arange(0, {chunk.width}))"

    def _keep(self, key: tuple[object, ...], side: int, text: str) -> str:
        for scope in self.tiles:
            if key in scope:
                return scope[key]
        lines = self.target
        if lines is None:
            lines = self.inside if side == COLUMNS else self.before
        name = self.fresh()
        lines.append(f"{name} = {text}")
        self.tiles[-1][key] = name
        return name

    def _tile(self, v: Value, side: int, chunk: Chunk, raw: bool = False) -> str:
        key = (*_key(v), side, chunk, raw)
        for scope in self.tiles:
            if key in scope:
                return scope[key]
        self.kept.append(v)
        if not v.depth:
            name = self.name(v)
            return f"tl.trans({name})" if side == COLUMNS and v.role == ROLE[1 - self.rows] else name
        if v.op == "Component":
            text = self._component(v, side, chunk)
            if not raw and side != FIRST:
                text = f"{self._tile(v, side, chunk, True)}.to({self.elem})"
        elif v.op == "Shift":
            text = f"{self._tile(v.args[0], side, chunk)} - {self._centre(v.args[1], chunk)}"
        else:
            args = [self._tile(a, side, chunk) for a in v.args]
            row = triton_special.text(v.op)
            assert row is not None, f"{v.op} has no Triton text; please report"
            text = row.format(*args, **{f"p{k}": p for k, p in enumerate(v.params)})
            text = f"({text}).to({self.elem})" if self.elem == "tl.float64" else text
        return self._keep(key, side, text)

    def _component(self, v: Value, side: int, chunk: Chunk) -> str:
        position, first, _ = v.params
        where = f"({first} + {self._numbers(chunk)})[None, :]"
        where = where if self.layouts[position] else f"{where} * c{position}"
        bound = f"({self._numbers(chunk)} < {chunk.size})[None, :]" if chunk.size is not None else ""
        if self.signature[position][1] == PARAMETER:
            return f"tl.load(a{position} + {where}{f', mask={bound}, other=0.0' if bound else ''})"
        if side == FIRST:
            step = f"{self.signature[position][0]}" if self.layouts[position] == DENSE else f"r{position}"
            at = f"a{position} + {{}} * {step} + {where}"
            mask = f", mask={bound}, other=0.0" if bound else ""
            a, b, c = (f"tl.load({at.format(row)}{mask}).to({self.elem})" for row in ("row0", "row1", "row2"))
            return f"tl.maximum(tl.minimum({a}, {b}), tl.minimum(tl.maximum({a}, {b}), {c}))"
        own, ok = (f"x{position}", "row_ok") if side == ROWS else (f"z{position}", "col_okt")
        return f"tl.load({own} + {where}, mask={f'{ok} & {bound}' if bound else ok}, other=0.0)"

    def _centre(self, v: Value, chunk: Chunk) -> str:
        """The middle one of three rows of the tile, component by component; 0 where that is not finite."""
        name = self._tile(v, FIRST, chunk)
        return self._keep((id(v), chunk, "centre"), FIRST, f"tl.where(tl.abs({name}) < {_BIG[self.elem]}, {name}, 0.0)")


def _key(v: Value) -> tuple[object, ...]:
    """Differences are made anew wherever they stand."""
    return ("Shift", *map(id, v.args)) if v.op == "Shift" else (id(v),)


_BIG = {"tl.float32": "1e38", "tl.float64": "1e308"}  # beyond lies what is infinite
