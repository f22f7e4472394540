"""Straight-line LLVM IR as text: vectors of `lanes` floats, one method an instruction, values are operand strings.

Text keeps this file free of llvmlite and lets a test compare kernels by diff. There are no fast-math flags: nan, inf
and signed zeros keep their IEEE meaning; nothing is contracted behind the back of an error-free transformation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import count


def _instruction(op: str, kind: str = "type") -> Callable[[Builder, str, str], str]:
    return lambda b, x, y: b.emit(f"{op} {getattr(b, kind)} {x}, {y}")


def _unary(op: str) -> Callable[[Builder, str], str]:
    return lambda b, x: b.intrinsic(op, x)


def _binary(op: str) -> Callable[[Builder, str, str], str]:
    return lambda b, x, y: b.intrinsic(op, x, y)


def _cast(op: str, source: str, target: str) -> Callable[[Builder, str], str]:
    return lambda b, x: b.emit(f"{op} {getattr(b, source)} {x} to {getattr(b, target)}")


class Builder:
    """LLVM text for straight-line code on vectors of `lanes` floats.

    Args:
        elem: "float" or "double".
        lanes: number of elements of a vector; 1 gives plain scalars.
        fma: the target has fused multiply-add and rounding instructions. Without them `llvm.fma` and `llvm.rint` would
            be libm calls (100x): then `fma` is `llvm.fmuladd` (rounded twice) and `rint` adds and subtracts 2^mantissa.
        avx512: the target has AVX-512 F and DQ, see `native`.
    """

    def __init__(self, elem: str, lanes: int, fma: bool = True, avx512: bool = False) -> None:
        if elem not in ("float", "double"):
            raise ValueError(f'Builder: elem must be "float" or "double", got {elem!r}')
        self.elem, self.lanes, self.has_fma, self.avx512 = elem, lanes, fma, avx512
        self.double = elem == "double"
        self.bits, self.mantissa, self.bias = (64, 52, 1023) if self.double else (32, 23, 127)
        self.ielem = f"i{self.bits}"
        self.type, self.itype, self.mtype = (self._vector(t) for t in (elem, self.ielem, "i1"))  # mtype: masks
        self.suffix = f"f{self.bits}" if lanes == 1 else f"v{lanes}f{self.bits}"  # of intrinsics
        self.lines: list[str] = []  # emitted instructions
        self.declarations: set[str] = set()  # "declare <16 x float> @llvm.sqrt.v16f32(<16 x float>)" ...
        self._names = count()

    def _vector(self, scalar: str) -> str:
        return scalar if self.lanes == 1 else f"<{self.lanes} x {scalar}>"

    def like(self, elem: str | None = None, lanes: int | None = None) -> Builder:
        """A sibling of another type that writes into the same lines, names and declarations."""
        other = Builder(elem or self.elem, lanes or self.lanes, self.has_fma, self.avx512)
        other.lines, other.declarations, other._names = self.lines, self.declarations, self._names
        return other

    def name(self) -> str:
        """A fresh local name."""
        return f"%v{next(self._names)}"

    def emit(self, text: str) -> str:
        """Assign the instruction `text` to a fresh name and return the name."""
        name = self.name()
        self.lines.append(f"  {name} = {text}")
        return name

    def call(self, function: str, result: str, *args: tuple[str, str]) -> str:
        """Declare and call `result @function(args)`; an argument is a pair (type, operand)."""
        self.declarations.add(f"declare {result} @{function}({', '.join(t for t, _ in args)})")
        return self.emit(f"call {result} @{function}({', '.join(f'{t} {x}' for t, x in args)})")

    def intrinsic(self, op: str, *args: str) -> str:
        """`llvm.op`, overloaded on the type of the builder."""
        return self.call(f"llvm.{op}.{self.suffix}", self.type, *((self.type, x) for x in args))

    # constants
    def const(self, x: float) -> str:
        """x, rounded to the element type, in every lane."""
        if not self.double and abs(x) < float("inf"):
            x = struct.unpack("f", struct.pack("f", x))[0]
        return self._splat_const(self.elem, f"0x{struct.unpack('Q', struct.pack('d', x))[0]:016X}")

    def iconst(self, n: int) -> str:
        """The integer n, wrapped to the width of the element, in every lane."""
        half = 1 << (self.bits - 1)
        return self._splat_const(self.ielem, str((n + half) % (2 * half) - half))

    def _splat_const(self, scalar: str, literal: str) -> str:
        return literal if self.lanes == 1 else f"splat ({scalar} {literal})"

    # floats
    fadd, fsub, fmul, fdiv = (_instruction(op) for op in ("fadd", "fsub", "fmul", "fdiv"))
    sqrt, abs, copysign = _unary("sqrt"), _unary("fabs"), _binary("copysign")
    minnum, maxnum = _binary("minnum"), _binary("maxnum")  # the other argument where one is nan
    minimum, maximum = _binary("minimum"), _binary("maximum")  # nan where one is nan

    def fneg(self, x: str) -> str:
        """-x, exact for zeros and nan."""
        return self.emit(f"fneg {self.type} {x}")

    def fma(self, x: str, y: str, z: str) -> str:
        """The value x * y + z, rounded once if the target can."""
        return self.intrinsic("fma" if self.has_fma else "fmuladd", x, y, z)

    def rint(self, x: str) -> str:
        """The nearest integer, halves to even."""
        if self.has_fma:
            return self.intrinsic("rint", x)
        big = self.copysign(self.const(2.0**self.mantissa), x)
        rounded = self.copysign(self.fsub(self.fadd(x, big), big), x)
        return self.select(self.fcmp("olt", self.abs(x), self.const(2.0**self.mantissa)), rounded, x)

    def floor(self, x: str) -> str:
        """The largest integer <= x."""
        return self.intrinsic("floor", x) if self.has_fma else self._rounded(x, x, "ogt", -1.0)

    def ceil(self, x: str) -> str:
        """The smallest integer >= x."""
        return self.intrinsic("ceil", x) if self.has_fma else self._rounded(x, x, "olt", 1.0)

    def trunc(self, x: str) -> str:
        """The integer part of x, towards zero."""
        return self.intrinsic("trunc", x) if self.has_fma else self._rounded(x, self.abs(x), "ogt", -1.0)

    def _rounded(self, x: str, y: str, pred: str, step: float) -> str:
        """The nearest integer of y, moved by `step` where it lies on the wrong side of y, with the sign of x."""
        n = self.rint(y)
        return self.copysign(self.select(self.fcmp(pred, n, y), self.fadd(n, self.const(step)), n), x)

    @property
    def wide(self) -> bool:
        """Whether `native` is available: AVX-512 and vectors of 64 bytes."""
        return self.avx512 and self.bits * self.lanes == 512

    def native(self, op: str, *args: str, imm: int | None = None) -> str:
        """One AVX-512 instruction, no lane masked: "scalef" (x * 2^floor(n)), "getexp", "getmant", "range"."""
        name = f"llvm.x86.avx512.mask.{op}.{'pd' if self.double else 'ps'}.512"
        operands = [*((self.type, x) for x in args), *([] if imm is None else [("i32", str(imm))])]
        operands += [(self.type, "zeroinitializer"), (f"i{self.lanes}", "-1"), ("i32", "4")]  # 4: current rounding mode
        return self.call(name, self.type, *operands)

    # masks
    mask_and, mask_or, mask_xor = (_instruction(op, "mtype") for op in ("and", "or", "xor"))

    def mask_not(self, m: str) -> str:
        """Not m."""
        return self.mask_xor(m, self._splat_const("i1", "true"))

    def fcmp(self, pred: str, x: str, y: str) -> str:
        """The mask x `pred` y; pred is LLVM's: oeq, olt, ..., une, uno."""
        return self.emit(f"fcmp {pred} {self.type} {x}, {y}")

    def icmp(self, pred: str, x: str, y: str) -> str:
        """The mask of integers x `pred` y; pred is eq, ne, slt, ult ..."""
        return self.emit(f"icmp {pred} {self.itype} {x}, {y}")

    def select(self, m: str, x: str, y: str) -> str:
        """The float x where m, else y."""
        return self.emit(f"select {self.mtype} {m}, {self.type} {x}, {self.type} {y}")

    # integers
    iadd, isub, imul, iand, ior, ixor = (_instruction(op, "itype") for op in ("add", "sub", "mul", "and", "or", "xor"))
    shl, lshr, ashr = (_instruction(op, "itype") for op in ("shl", "lshr", "ashr"))
    bitcast_int, bitcast_float = _cast("bitcast", "type", "itype"), _cast("bitcast", "itype", "type")
    fptosi, sitofp = _cast("fptosi", "type", "itype"), _cast("sitofp", "itype", "type")  # slow for i64 without AVX-512

    # lanes, widths, memory
    def splat(self, scalar: str) -> str:
        """The scalar operand in every lane."""
        if self.lanes == 1:
            return scalar
        first = self.emit(f"insertelement {self.type} poison, {self.elem} {scalar}, i64 0")
        return self.emit(f"shufflevector {self.type} {first}, {self.type} poison, <{self.lanes} x i32> zeroinitializer")

    def extract(self, x: str, k: int) -> str:
        """Lane k of x as a scalar."""
        return x if self.lanes == 1 else self.emit(f"extractelement {self.type} {x}, i64 {k}")

    def fpext(self, x: str) -> str:
        """The value x of a float builder as doubles."""
        return self.emit(f"fpext {self.type} {x} to {self._vector('double')}")

    def fptrunc(self, x: str) -> str:
        """The value x of a double builder as floats."""
        return self.emit(f"fptrunc {self.type} {x} to {self._vector('float')}")

    def load(self, pointer: str) -> str:
        """The vector at `pointer`, aligned as its element."""
        return self.emit(f"load {self.type}, ptr {pointer}, align {self.bits // 8}")

    def store(self, x: str, pointer: str) -> None:
        """Write the vector x to `pointer`, aligned as its element."""
        self.lines.append(f"  store {self.type} {x}, ptr {pointer}, align {self.bits // 8}")
