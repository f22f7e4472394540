"""THE table of functions of numbers: value, partial derivatives, printed form.

Numbers are Python floats, complex numbers and torch tensors (element by element). Where a function has no finite value
the result is what torch gives: `log(-1)` is nan, `1 / 0` is inf.

A partial derivative is written once, with the operators and functions of this file, so it holds for every kind of
number and for `Scalar`, hence for derivatives of derivatives. `tests/test_scalar.py` compares every row with central
differences and with torch.
"""

from __future__ import annotations

import cmath
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import NotDifferentiableError

Partial = Callable[..., Any]


@dataclass(frozen=True)
class Function:
    """One row.

    Args:
        name: what a user writes.
        real: value for floats; where it raises, torch is asked.
        torch: value for tensors.
        partials: the derivative in each argument, as a function of (*arguments, result).
        complex: value for complex numbers; None if the function has no complex derivative.
        symbol, level: how it is printed: `a symbol b` with the binding strength `level`, or `name(a, b)` without.
        sample: range of arguments that tests draw from.
    """

    name: str
    real: Callable[..., Any]
    torch: Callable[..., Tensor]
    partials: tuple[Partial, ...]
    complex: Callable[..., Any] | None = None
    symbol: str = ""
    level: int = 9
    sample: tuple[float, float] = (-2.0, 2.0)

    def __call__(self, *values: Any) -> Any:
        """The value for plain numbers."""
        if any(isinstance(v, Tensor) for v in values):
            first = next(v for v in values if isinstance(v, Tensor))
            found = self.torch(*(_as_tensor(v, first) for v in values))
            if found.is_complex() and self.complex is None:
                raise self._not_holomorphic()
            return found
        if any(isinstance(v, complex) for v in values):
            if self.complex is None:
                raise self._not_holomorphic()
            evaluate, dtype, numbers = self.complex, torch.complex128, [complex(v) for v in values]
        else:
            evaluate, dtype, numbers = self.real, torch.float64, [float(v) for v in values]
        try:
            found = evaluate(*numbers)
        except (ValueError, OverflowError, ZeroDivisionError):
            return self.torch(*(torch.tensor(v, dtype=dtype) for v in numbers)).item()
        return found

    def _not_holomorphic(self) -> NotDifferentiableError:
        return NotDifferentiableError(
            f"{self.name} has no complex derivative; take real numbers for its argument, or use tensors and autograd"
        )

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _row, (self.name,)


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    """A Python number beside a tensor: 0-d and of its precision, so that the dtype of the tensor stays."""
    if isinstance(value, Tensor):
        return value
    dtype = like.dtype if like.is_floating_point() or like.is_complex() else torch.float64
    return torch.tensor(value, dtype=dtype.to_complex() if isinstance(value, complex) else dtype, device=like.device)


def _row(name: str) -> Function:
    return FUNCTIONS[name]


def apply(name: str, *args: Any) -> Any:
    """The function `name` of Scalars (then a Scalar), numbers, tensors or arrays."""
    for arg in args:
        record = getattr(arg, "_record", None)
        if record is not None:
            return record(FUNCTIONS[name], args)
    row = FUNCTIONS[name]
    if any(type(a).__module__ == "numpy" for a in args):
        found = row(*(torch.as_tensor(a) if hasattr(a, "__array__") else a for a in args))
        return found.numpy() if found.ndim else found.item()
    return row(*args)


# What users call -----------------------------------------------------------------------------------------------------


def _public(name: str, binary: bool = False) -> Callable[..., Any]:
    def two(x: Any, y: Any) -> Any:
        return apply(name, x, y)

    def one(x: Any) -> Any:
        return apply(name, x)

    function = two if binary else one
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{name}({'x, y' if binary else 'x'}) of a Scalar, a number, a tensor or an array."
    return function


sin, cos, tan = _public("sin"), _public("cos"), _public("tan")
asin, acos, atan, atan2 = _public("asin"), _public("acos"), _public("atan"), _public("atan2", True)
sinh, cosh, tanh = _public("sinh"), _public("cosh"), _public("tanh")
asinh, acosh, atanh = _public("asinh"), _public("acosh"), _public("atanh")
exp, exp2, expm1 = _public("exp"), _public("exp2"), _public("expm1")
log, log2, log10, log1p = _public("log"), _public("log2"), _public("log10"), _public("log1p")
sqrt, square, reciprocal, hypot = _public("sqrt"), _public("square"), _public("reciprocal"), _public("hypot", True)
erf, erfc, sigmoid, softplus = _public("erf"), _public("erfc"), _public("sigmoid"), _public("softplus")
relu = _public("relu")
maximum, minimum = _public("maximum", True), _public("minimum", True)

# Values that math and torch lack or that overflow where they need not -----------------------------------------------


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _relu(x: float) -> float:
    return x if x > 0 or math.isnan(x) else 0.0


def _remainder(x: float, y: float) -> float:
    if y == 0 or math.isinf(x) or math.isinf(y):
        raise ValueError
    return x % y


def _largest(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


def _smallest(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else min(x, y)


# Piecewise constant factors: numbers, not Scalars -------------------------------------------------------------------


def _value(x: Any) -> Any:
    return getattr(x, "value", x)


def _sign(x: Any) -> Any:
    v = _value(x)
    return v.sign() if isinstance(v, Tensor) else math.nan if math.isnan(v) else float((v > 0) - (v < 0))


def _step(x: Any) -> Any:
    """1 where x > 0, else 0."""
    v = _value(x)
    return (v > 0).to(v.dtype) if isinstance(v, Tensor) else float(v > 0)


def _at_least(x: Any, y: Any) -> Any:
    """1 where x > y, 1/2 where they are equal, else 0; torch shares the gradient of a tie in the same way."""
    v = _value(x) - _value(y)
    return 0.5 * (1 + v.sign()) if isinstance(v, Tensor) else 0.5 * (1 + _sign(v))


def _floor_of_quotient(x: Any, y: Any) -> Any:
    v = FUNCTIONS["/"](_value(x), _value(y))
    return v.floor() if isinstance(v, Tensor) else float(math.floor(v)) if math.isfinite(v) else math.nan


def _log_of_base(x: Any, y: Any, z: Any) -> Any:
    """d(x ** y) / dy = x**y log x, which is 0 where x = 0 and y >= 0, as in torch."""
    a, b = _value(x), _value(y)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if a.is_complex() or b.is_complex():
            return z * log(x)
        zero = (a == 0) & (b >= 0)
        return z * log(x + zero.to(a.dtype))
    return 0.0 if a == 0 and isinstance(b, (int, float)) and b >= 0 else z * log(x)


def _power_partial(x: Any, y: Any, z: Any) -> Any:
    """d(x ** y) / dx = y x**(y-1), which is 0 where y = 0."""
    b = _value(y)
    if isinstance(b, Tensor):
        return y * x ** (y - 1 + (b == 0).to(b.dtype))
    return 0.0 if b == 0 else y * x ** (y - 1)


_LN2, _LN10, _TWO_OVER_ROOT_PI = math.log(2), math.log(10), 2 / math.sqrt(math.pi)

_ROWS = [
    Function("+", operator.add, torch.add, (lambda x, y, z: 1.0, lambda x, y, z: 1.0), operator.add, "+", 1),
    Function("-", operator.sub, torch.sub, (lambda x, y, z: 1.0, lambda x, y, z: -1.0), operator.sub, "-", 1),
    Function("*", operator.mul, torch.mul, (lambda x, y, z: y, lambda x, y, z: x), operator.mul, "*", 2),
    Function(
        "/",
        operator.truediv,
        torch.true_divide,
        (lambda x, y, z: 1 / y, lambda x, y, z: -z / y),
        operator.truediv,
        "/",
        2,
        sample=(0.5, 2.0),
    ),
    Function(
        "%",
        _remainder,
        torch.remainder,
        (lambda x, y, z: 1.0, lambda x, y, z: -_floor_of_quotient(x, y)),
        symbol="%",
        level=2,
        sample=(0.6, 1.1),
    ),
    Function("neg", operator.neg, torch.neg, (lambda x, y: -1.0,), operator.neg, "-", 3),
    Function("**", math.pow, torch.pow, (_power_partial, _log_of_base), operator.pow, "**", 4, sample=(0.5, 2.0)),
    Function("abs", abs, torch.abs, (lambda x, y: _sign(x),)),
    Function("sin", math.sin, torch.sin, (lambda x, y: cos(x),), cmath.sin),
    Function("cos", math.cos, torch.cos, (lambda x, y: -sin(x),), cmath.cos),
    Function("tan", math.tan, torch.tan, (lambda x, y: 1 + y * y,), cmath.tan, sample=(-1.2, 1.2)),
    Function("asin", math.asin, torch.asin, (lambda x, y: 1 / sqrt(1 - x * x),), cmath.asin, sample=(-0.9, 0.9)),
    Function("acos", math.acos, torch.acos, (lambda x, y: -1 / sqrt(1 - x * x),), cmath.acos, sample=(-0.9, 0.9)),
    Function("atan", math.atan, torch.atan, (lambda x, y: 1 / (1 + x * x),), cmath.atan),
    Function("sinh", math.sinh, torch.sinh, (lambda x, y: cosh(x),), cmath.sinh),
    Function("cosh", math.cosh, torch.cosh, (lambda x, y: sinh(x),), cmath.cosh),
    Function("tanh", math.tanh, torch.tanh, (lambda x, y: 1 - y * y,), cmath.tanh),
    Function("asinh", math.asinh, torch.asinh, (lambda x, y: 1 / sqrt(1 + x * x),), cmath.asinh),
    Function(
        "acosh",
        math.acosh,
        torch.acosh,
        (lambda x, y: 1 / (sqrt(x - 1) * sqrt(x + 1)),),
        cmath.acosh,
        sample=(1.2, 3.0),
    ),
    Function("atanh", math.atanh, torch.atanh, (lambda x, y: 1 / (1 - x * x),), cmath.atanh, sample=(-0.9, 0.9)),
    Function("exp", math.exp, torch.exp, (lambda x, y: y,), cmath.exp),
    Function("exp2", lambda x: math.pow(2, x), torch.exp2, (lambda x, y: _LN2 * y,), lambda x: 2**x),
    Function("expm1", math.expm1, torch.expm1, (lambda x, y: y + 1,), lambda x: cmath.exp(x) - 1),
    Function("log", math.log, torch.log, (lambda x, y: 1 / x,), cmath.log, sample=(0.2, 3.0)),
    Function(
        "log2", math.log2, torch.log2, (lambda x, y: 1 / (_LN2 * x),), lambda x: cmath.log(x) / _LN2, sample=(0.2, 3.0)
    ),
    Function("log10", math.log10, torch.log10, (lambda x, y: 1 / (_LN10 * x),), cmath.log10, sample=(0.2, 3.0)),
    Function(
        "log1p", math.log1p, torch.log1p, (lambda x, y: 1 / (1 + x),), lambda x: cmath.log(1 + x), sample=(-0.8, 3.0)
    ),
    Function("sqrt", math.sqrt, torch.sqrt, (lambda x, y: 0.5 / y,), cmath.sqrt, sample=(0.2, 3.0)),
    Function("square", lambda x: x * x, torch.square, (lambda x, y: 2 * x,), lambda x: x * x),
    Function("reciprocal", lambda x: 1 / x, torch.reciprocal, (lambda x, y: -y * y,), lambda x: 1 / x, sample=(0.3, 2)),
    Function("erf", math.erf, torch.erf, (lambda x, y: _TWO_OVER_ROOT_PI * exp(-x * x),)),
    Function("erfc", math.erfc, torch.erfc, (lambda x, y: -_TWO_OVER_ROOT_PI * exp(-x * x),)),
    Function("sigmoid", _sigmoid, torch.sigmoid, (lambda x, y: y * (1 - y),), lambda x: 1 / (1 + cmath.exp(-x))),
    Function("softplus", _softplus, lambda x: torch.logaddexp(x, torch.zeros_like(x)), (lambda x, y: sigmoid(x),)),
    Function("relu", _relu, torch.relu, (lambda x, y: _step(x),)),
    Function(
        "atan2",
        math.atan2,
        torch.atan2,
        (lambda x, y, z: y / (x * x + y * y), lambda x, y, z: -x / (x * x + y * y)),
    ),
    Function("hypot", math.hypot, torch.hypot, (lambda x, y, z: x / z, lambda x, y, z: y / z)),
    Function("maximum", _largest, torch.maximum, (lambda x, y, z: _at_least(x, y), lambda x, y, z: _at_least(y, x))),
    Function("minimum", _smallest, torch.minimum, (lambda x, y, z: _at_least(y, x), lambda x, y, z: _at_least(x, y))),
]
FUNCTIONS = {row.name: row for row in _ROWS}
