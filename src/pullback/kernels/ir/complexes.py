"""Functions of the formula language on complex vectors: 2 D real numbers, real and imaginary parts interleaved."""

from __future__ import annotations

from typing import Any

from pullback.core.errors import ShapeError
from pullback.kernels.ir.expr import Expr
from pullback.kernels.ir.primitives import op, whole
from pullback.kernels.ir.registry import check_scalar, function


def _pair(name: str, f: Expr) -> tuple[Expr, Expr]:
    """Real and imaginary parts."""
    if f.dim % 2:
        raise ShapeError(f"{name} expects a complex vector, of even dimension; got {f.dim}")
    return op("Gather", f, tuple(range(0, f.dim, 2))), op("Gather", f, tuple(range(1, f.dim, 2)))


def _interleave(real: Expr, imag: Expr) -> Expr:
    n = max(real.dim, imag.dim)
    real, imag = (op("SumT", p, n) if p.dim < n else p for p in (real, imag))
    return op("Gather", op("Concat", real, imag), tuple(k + part * n for k in range(n) for part in (0, 1)))


@function
def ComplexReal(f: Expr) -> Expr:
    """Re f."""
    return _pair("ComplexReal", f)[0]


@function
def ComplexImag(f: Expr) -> Expr:
    """Im f."""
    return _pair("ComplexImag", f)[1]


@function
def Real2Complex(f: Expr) -> Expr:
    """`f + 0i`."""
    return op("Scatter", f, tuple(range(0, 2 * f.dim, 2)), 2 * f.dim)


@function
def Imag2Complex(f: Expr) -> Expr:
    """0 + f i."""
    return op("Scatter", f, tuple(range(1, 2 * f.dim, 2)), 2 * f.dim)


@function
def Conj(f: Expr) -> Expr:
    """Re f - i Im f."""
    real, imag = _pair("Conj", f)
    return _interleave(real, -imag)


@function
def ComplexSquareAbs(f: Expr) -> Expr:
    """|f|^2."""
    real, imag = _pair("ComplexSquareAbs", f)
    return op("Square", real) + op("Square", imag)


@function
def ComplexAbs(f: Expr) -> Expr:
    """|f|, with the gradient 0 at 0."""
    return op("Sqrt", ComplexSquareAbs(f))


@function
def ComplexAngle(f: Expr) -> Expr:
    """The argument of f in (-pi, pi]."""
    real, imag = _pair("ComplexAngle", f)
    return op("Atan2", imag, real)


@function
def ComplexSum(f: Expr) -> Expr:
    """The sum of the complex components."""
    real, imag = _pair("ComplexSum", f)
    return op("Concat", op("Sum", real), op("Sum", imag))


@function
def ComplexSumT(f: Expr, dim: Any) -> Expr:
    """The complex number f replicated to the real dimension dim."""
    n = whole("ComplexSumT", dim)
    if f.dim != 2 or n < 2 or n % 2:
        raise ShapeError(f"ComplexSumT expects f of dimension 2 and an even dimension; got {f.dim} and {n}")
    return op("Gather", f, (0, 1) * (n // 2))


def _complex_operands(name: str, f: Expr, g: Expr) -> tuple[tuple[Expr, Expr], tuple[Expr, Expr]]:
    if f.dim != g.dim and 2 not in (f.dim, g.dim):
        raise ShapeError(f"{name} expects operands of equal dimension (or 2); got {f.dim} and {g.dim}")
    return _pair(name, f), _pair(name, g)


@function
def ComplexAdd(f: Expr, g: Expr) -> Expr:
    """`f + g`."""
    (a, b), (c, d) = _complex_operands("ComplexAdd", f, g)
    return f + g if f.dim == g.dim else _interleave(a + c, b + d)


@function
def ComplexSubtract(f: Expr, g: Expr) -> Expr:
    """`f - g`."""
    (a, b), (c, d) = _complex_operands("ComplexSubtract", f, g)
    return f - g if f.dim == g.dim else _interleave(a - c, b - d)


@function
def ComplexMult(f: Expr, g: Expr) -> Expr:
    """`f g`; one of them may be a single complex number."""
    (a, b), (c, d) = _complex_operands("ComplexMult", f, g)
    return _interleave(a * c - b * d, a * d + b * c)


@function
def ComplexScal(f: Expr, g: Expr) -> Expr:
    """`f g` for a single complex number f."""
    if f.dim != 2:
        raise ShapeError(f"ComplexScal expects f of dimension 2; got {f.dim}")
    return ComplexMult(f, g)


@function
def ComplexRealScal(f: Expr, g: Expr) -> Expr:
    """`f g` for a real number (the one of dimension 1) and a complex vector."""
    scalar, vector = (f, g) if f.dim == 1 else (g, f)
    check_scalar("ComplexRealScal", "among its operands", scalar)
    _pair("ComplexRealScal", vector)
    return scalar * vector


@function
def ComplexDivide(f: Expr, g: Expr) -> Expr:
    """`f / g` = f conj(g) / |g|^2."""
    (a, b), (c, d) = _complex_operands("ComplexDivide", f, g)
    scale = 1 / (op("Square", c) + op("Square", d))
    return _interleave((a * c + b * d) * scale, (b * c - a * d) * scale)


@function
def ComplexExp(f: Expr) -> Expr:
    """The value exp(f) = e^(Re f) (cos(Im f) + i sin(Im f))."""
    real, imag = _pair("ComplexExp", f)
    size = op("Exp", real)
    return _interleave(size * op("Cos", imag), size * op("Sin", imag))


@function
def ComplexExp1j(f: Expr) -> Expr:
    """The value exp(i f) for a real f."""
    return _interleave(op("Cos", f), op("Sin", f))
