"""Functions of numbers, applied to a LazyTensor component by component."""

from __future__ import annotations

from typing import Any

import numpy as np

from pullback.kernels.lazy_vectors import LazyVectors


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


class LazyMethods(LazyVectors):
    """Methods that make a LazyTensor from LazyTensors. Operands of one component are replicated where others have D."""

    __slots__ = ()

    # Functions of a number ------------------------------------------------------------------------------------------

    def abs(self) -> Any:
        """|x|."""
        return self._apply("Abs")

    def neg(self) -> Any:
        """-x."""
        return self._apply("Minus")

    def square(self) -> Any:
        """x^2."""
        return self._apply("Square")

    def sqrt(self) -> Any:
        """The square root, with the derivative 0 at 0."""
        return self._apply("Sqrt")

    def rsqrt(self) -> Any:
        """1 / sqrt(x), and 0 at 0."""
        return self._apply("Rsqrt")

    def reciprocal(self) -> Any:
        """1 / x."""
        return self._apply("Inv")

    def exp(self) -> Any:
        """e^x."""
        return self._apply("Exp")

    def exp2(self) -> Any:
        """2^x."""
        return self._apply("Exp2")

    def expm1(self) -> Any:
        """e^x - 1, exact for small x."""
        return self._apply("Expm1")

    def log(self) -> Any:
        """The natural logarithm."""
        return self._apply("Log")

    def log2(self) -> Any:
        """The logarithm to base 2."""
        return self._apply("Log2")

    def log1p(self) -> Any:
        """ln(1 + x), exact for small x."""
        return self._apply("Log1p")

    def matern12(self) -> Any:
        """exp(-r), the Matern kernel of order 1/2 at the distance r = self, already divided by the length scale."""
        return self._apply("Matern12")

    def matern32(self) -> Any:
        """(1 + z) exp(-z) with z = sqrt(3) r, of order 3/2."""
        return self._apply("Matern32")

    def matern52(self) -> Any:
        """(1 + z + z^2 / 3) exp(-z) with z = sqrt(5) r, of order 5/2."""
        return self._apply("Matern52")

    def xlogx(self) -> Any:
        """The function x ln(x), and 0 at 0."""
        return self._apply("XLogX")

    def sin(self) -> Any:
        """The sine."""
        return self._apply("Sin")

    def cos(self) -> Any:
        """The cosine."""
        return self._apply("Cos")

    def tan(self) -> Any:
        """The tangent."""
        return self._apply("Tan")

    def asin(self) -> Any:
        """The angle in [-pi/2, pi/2] with sine x."""
        return self._apply("Asin")

    def acos(self) -> Any:
        """The angle in [0, pi] with cosine x."""
        return self._apply("Acos")

    def atan(self) -> Any:
        """The angle in (-pi/2, pi/2) with tangent x."""
        return self._apply("Atan")

    def sinh(self) -> Any:
        """(e^x - e^-x) / 2."""
        return self._apply("Sinh")

    def cosh(self) -> Any:
        """(e^x + e^-x) / 2."""
        return self._apply("Cosh")

    def tanh(self) -> Any:
        """sinh(x) / cosh(x)."""
        return self._apply("Tanh")

    def asinh(self) -> Any:
        """ln(x + sqrt(x^2 + 1))."""
        return self._apply("Asinh")

    def sinxdivx(self) -> Any:
        """sin(x) / x, and 1 at 0."""
        return self._apply("SinXDivX")

    def sinc(self) -> Any:
        """sin(pi x) / (pi x), and 1 at 0, as `torch.sinc`."""
        return self._apply("Mult", np.pi).sinxdivx()

    def erf(self) -> Any:
        """2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x."""
        return self._apply("Erf")

    def erfc(self) -> Any:
        """1 - erf(x), exact for large x."""
        return self._apply("Erfc")

    def sigmoid(self) -> Any:
        """1 / (1 + e^-x)."""
        return self._apply("Sigmoid")

    def softplus(self) -> Any:
        """ln(1 + e^x)."""
        return self._apply("Softplus")

    def lgamma(self) -> Any:
        """The logarithm of |Gamma(x)|."""
        return self._apply("Lgamma")

    def sign(self) -> Any:
        """-1, 0 or 1; derivative 0."""
        return self._apply("Sign")

    def step(self) -> Any:
        """0 where x < 0, else 1; derivative 0."""
        return self._apply("Step")

    def relu(self) -> Any:
        """max(x, 0)."""
        return self._apply("ReLU")

    def floor(self) -> Any:
        """The largest integer <= x; derivative 0."""
        return self._apply("Floor")

    def ceil(self) -> Any:
        """The smallest integer >= x; derivative 0."""
        return self._apply("Ceil")

    def trunc(self) -> Any:
        """The integer part of x; derivative 0."""
        return self._apply("Trunc")

    def round(self, other: int = 0) -> Any:
        """The number x rounded to `other` decimals; derivative 0."""
        return self._apply("Round", params=(int(other),))

    def logical_not(self) -> Any:
        """1 where x is 0, else 0."""
        return self._apply("LogicalNot")

    # Functions of several numbers -----------------------------------------------------------------------------------

    def power(self, other: Any) -> Any:
        """x^p; for p = 2, 1/2 and -1/2 the faster function."""
        if isinstance(other, (float, int, np.number)) and not isinstance(other, bool):
            name = {2.0: "Square", 0.5: "Sqrt", -0.5: "Rsqrt", -1.0: "Inv"}.get(float(other))
            if name is not None:
                return self._apply(name)
            if _whole(other) or float(other).is_integer():
                return self._apply("Pow", params=(int(other),))
        return self._apply("Powf", other)

    pow = power

    def atan2(self, other: Any) -> Any:
        """The angle of the point (other, x) in (-pi, pi]."""
        return self._apply("Atan2", other)

    def maximum(self, other: Any) -> Any:
        """The larger of two, component by component."""
        return self._apply("Maximum", other)

    def minimum(self, other: Any) -> Any:
        """The smaller of two, component by component."""
        return self._apply("Minimum", other)

    def clamp(self, other1: Any, other2: Any) -> Any:
        """min(max(x, other1), other2)."""
        return self._apply("Clamp", other1, other2)

    def ifelse(self, other1: Any, other2: Any) -> Any:
        """The value of other1 where x >= 0, else of other2."""
        return self._apply("IfElse", other1, other2)

    def where(self, other1: Any, other2: Any) -> Any:
        """The value of other1 where x is not 0, else of other2: `(X < Y).where(A, B)`."""
        return self._apply("Where", other1, other2)

    def mod(self, modulus: Any, offset: Any = 0) -> Any:
        """The remainder x - modulus * floor((x - offset) / modulus)."""
        return self._apply("Mod", modulus, offset)

    def logical_and(self, other: Any) -> Any:
        """1 where both are not 0, else 0."""
        return self._apply("LogicalAnd", other)

    def logical_or(self, other: Any) -> Any:
        """1 where one is not 0, else 0."""
        return self._apply("LogicalOr", other)
