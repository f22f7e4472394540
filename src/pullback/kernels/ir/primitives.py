"""THE table of elementwise operations: one row an operation, one column a thing to know about it.

Operands are numbers for every pair; a vector operand acts component by component and a scalar one is broadcast.
Columns: the torch definition, the partial derivatives as Expr, the name of the function in `codegen/vecmath.py`, the
Triton text, the range that tests sample, and, for what a renderer need not know, the expansion in other rows.

Conventions at edges, the same in every renderer: 1/sqrt(0) counts as 0, so that a norm has the gradient 0 where it
vanishes (and so have Asin and Acos at +-1, where it is infinite); 0 log 0 = 0; the first operand wins in ties of
Maximum and Minimum; steps have derivative 0; a comparison with nan is false. No derivative divides by what may vanish
in a branch that is not taken: 0 * inf in the next derivative would be nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.kernels.ir.expr import Expr, as_expr, broadcast, builders, const

Range = tuple[float, float]
_REAL: Range = (-3.0, 3.0)
_POSITIVE: Range = (0.1, 4.0)
_UNIT: Range = (-0.95, 0.95)


@dataclass(frozen=True)
class Primitive:
    """One row: out_k = f(a_k, b_k, ...; params).

    Args:
        torch: the definition, on tensors and params.
        partials: (*operands, *params, out) -> one Expr (or None for zero) for each operand.
        llvm: name in `vecmath.FUNCTIONS`; None where `expand` serves.
        triton: text with {0}, {1} ... for operands, {p0} ... for params; None where `expand` serves.
        sample: range of each operand that tests draw from.
        expand: the same in other rows; called with the operands and params.
        n_params: how many constants follow the operands.
        params: integers for the tests.
    """

    name: str
    arity: int
    torch: Callable[..., Tensor]
    partials: Callable[..., tuple[Expr | None, ...]]
    llvm: str | None
    triton: str | None
    sample: tuple[Range, ...]
    expand: Callable[..., Expr] | None = None
    n_params: int = 0
    params: tuple[Any, ...] = ()


PRIMITIVES: dict[str, Primitive] = {}


def op(name: str, *operands: Any) -> Expr:
    """The node `name(*operands)`."""
    return builders[name](*operands)


def operand(value: Any) -> Expr:
    """An Expr as it is, a number as a constant, a list as a vector: constant if of numbers, else concatenated."""
    if isinstance(value, (tuple, list)):
        if value and all(isinstance(v, (int, float)) for v in value):
            return const(*value)
        return op("Concat", *value)
    return as_expr(value)


def whole(name: str, value: Any) -> int:
    """A parameter that must be an integer; constants of the formula language count as numbers."""
    if isinstance(value, Expr) and value.op == "Const" and value.dim == 1:
        value = value.params[0]
    if isinstance(value, Expr):
        raise ArgumentError(f"{name} expects a number here, not a formula")
    if not isinstance(value, (int, float)) or value != int(value):
        raise ArgumentError(f"{name} expects an integer; got {value}")
    return int(value)


def _row(
    name: str,
    definition: Callable[..., Tensor],
    partials: Callable[..., Any],
    llvm: str | None,
    triton: str | None,
    *sample: Range,
    expand: Callable[..., Expr] | None = None,
    params: tuple[Any, ...] = (),
) -> None:
    def pack(*args: Any) -> tuple[Expr | None, ...]:
        result = partials(*args)
        return result if isinstance(result, tuple) else (result,)

    row = Primitive(name, len(sample), definition, pack, llvm, triton, sample, expand, len(params), params)
    PRIMITIVES[name] = row
    builders[name] = lambda *args: _build(row, args)


def _build(row: Primitive, args: tuple[Any, ...]) -> Expr:
    if len(args) != row.arity + row.n_params:
        what = f"{row.arity} operand{'s' * (row.arity > 1)}" + (" and an integer" if row.n_params else "")
        raise ArgumentError(f"{row.name} expects {what}; got {len(args)} argument{'s' * (len(args) != 1)}")
    operands = tuple(operand(a) for a in args[: row.arity])
    params = tuple(whole(row.name, p) for p in args[row.arity :])
    return Expr(row.name, operands, params, broadcast(row.name, operands))


# Arithmetic -------------------------------------------------------------------------------------------------------

_row("Add", torch.add, lambda a, b, y: (const(1), const(1)), "fadd", "({0} + {1})", _REAL, _REAL)
_row("Subtract", torch.sub, lambda a, b, y: (const(1), const(-1)), "fsub", "({0} - {1})", _REAL, _REAL)
_row("Mult", torch.mul, lambda a, b, y: (b, a), "fmul", "({0} * {1})", _REAL, _REAL)
_row("Divide", torch.div, lambda a, b, y: (1 / b, -y / b), "fdiv", "({0} / {1})", _REAL, _POSITIVE)
_row("Minus", torch.neg, lambda a, y: const(-1), "fneg", "(-{0})", _REAL)
_row("Inv", torch.reciprocal, lambda a, y: -op("Square", y), "inv", "(1.0 / {0})", _POSITIVE)
_row("Square", torch.square, lambda a, y: 2 * a, "square", "({0} * {0})", _REAL)
_row(
    "Pow",
    lambda a, n: torch.pow(a, n),
    lambda a, n, y: const(0) if n == 0 else n * op("Pow", a, n - 1),
    "powi",
    "libdevice.pow({0}, {p0})",
    _POSITIVE,
    params=(3,),
)
_row(
    "Powf",
    torch.pow,
    lambda a, b, y: (
        b * op("Powf", a, op("Where", op("LogicalAnd", op("Equal", a, 0), op("Equal", b, 0)), 0, b - 1)),
        y * op("Log", op("Where", op("LogicalAnd", op("Equal", a, 0), op("LessOrEqual", 0, b)), 1, a)),
    ),
    "pow",
    "libdevice.pow({0}, {1})",
    _POSITIVE,
    _REAL,
)
_row("Abs", torch.abs, lambda a, y: op("Sign", a), "abs", "tl.abs({0})", _REAL)
_row("Sqrt", torch.sqrt, lambda a, y: 0.5 * op("Rsqrt", a), "sqrt", "tl.sqrt({0})", _POSITIVE)
_row(
    "Rsqrt",
    lambda a: torch.where(a == 0, 0, torch.rsqrt(a)),
    lambda a, y: -0.5 * op("Pow", y, 3),
    "rsqrt",
    "tl.where({0} == 0, 0.0, tl.rsqrt({0}))",
    _POSITIVE,
)

# Exponentials and logarithms --------------------------------------------------------------------------------------

_row("Exp", torch.exp, lambda a, y: y, "exp", "tl.exp({0})", _REAL)
_row("Exp2", torch.exp2, lambda a, y: math.log(2) * y, "exp2", "tl.exp2({0})", _REAL)
_row("Expm1", torch.expm1, lambda a, y: op("Exp", a), "expm1", "libdevice.expm1({0})", _REAL)
_row("Log", torch.log, lambda a, y: 1 / a, "log", "tl.log({0})", _POSITIVE)
_row("Log2", torch.log2, lambda a, y: (1 / math.log(2)) / a, "log2", "tl.log2({0})", _POSITIVE)
_row("Log1p", torch.log1p, lambda a, y: 1 / (1 + a), "log1p", "libdevice.log1p({0})", (-0.9, 4.0))
_row(
    "XLogX",
    lambda a: torch.special.xlogy(a, a),
    lambda a, y: op("Log", a) + 1,
    "xlogx",
    "tl.where({0} == 0, 0.0, {0} * tl.log({0}))",
    _POSITIVE,
)
_row("Sigmoid", torch.sigmoid, lambda a, y: y * op("Sigmoid", -a), "sigmoid", "tl.sigmoid({0})", _REAL)
_row(
    "Softplus",
    lambda a: torch.logaddexp(a, torch.zeros((), dtype=a.dtype, device=a.device)),
    lambda a, y: op("Sigmoid", a),
    "softplus",
    "(tl.maximum({0}, 0.0) + libdevice.log1p(tl.exp(-tl.abs({0}))))",
    _REAL,
)

_row(
    "LogAddExp",
    torch.logaddexp,
    lambda a, b, y: (op("Sigmoid", a - b), op("Sigmoid", b - a)),
    None,
    None,
    _REAL,
    _REAL,
    expand=lambda a, b: op(
        "Where",
        op("Equal", a, b),  # both may be infinite
        a + math.log(2),
        op("Maximum", a, b) + op("Softplus", -op("Abs", a - b)),
    ),
)

# Trigonometric and hyperbolic -------------------------------------------------------------------------------------


def _inverse_square(a: Expr, b: Expr) -> Expr:
    return op("Square", op("Rsqrt", op("Square", a) + op("Square", b)))


_row("Sin", torch.sin, lambda a, y: op("Cos", a), "sin", "tl.sin({0})", _REAL)
_row("Cos", torch.cos, lambda a, y: -op("Sin", a), "cos", "tl.cos({0})", _REAL)
_row("Tan", torch.tan, lambda a, y: 1 + op("Square", y), "tan", "libdevice.tan({0})", (-1.4, 1.4))
_row("Asin", torch.asin, lambda a, y: op("Rsqrt", (1 - a) * (1 + a)), "asin", "libdevice.asin({0})", _UNIT)
_row("Acos", torch.acos, lambda a, y: -op("Rsqrt", (1 - a) * (1 + a)), "acos", "libdevice.acos({0})", _UNIT)
_row("Atan", torch.atan, lambda a, y: 1 / (1 + op("Square", a)), "atan", "libdevice.atan({0})", _REAL)
_row(  # the angle of the origin has the gradient 0
    "Atan2",
    torch.atan2,
    lambda a, b, y: (b * _inverse_square(a, b), -a * _inverse_square(a, b)),
    "atan2",
    "libdevice.atan2({0}, {1})",
    _REAL,
    _POSITIVE,
)
_row("Sinh", torch.sinh, lambda a, y: op("Cosh", a), "sinh", "libdevice.sinh({0})", _REAL)
_row("Cosh", torch.cosh, lambda a, y: op("Sinh", a), "cosh", "libdevice.cosh({0})", _REAL)
_row("Tanh", torch.tanh, lambda a, y: 1 - op("Square", y), "tanh", "libdevice.tanh({0})", _REAL)
_row("Asinh", torch.asinh, lambda a, y: op("Rsqrt", 1 + op("Square", a)), "asinh", "libdevice.asinh({0})", _REAL)

# Special functions ------------------------------------------------------------------------------------------------


def _gauss(a: Expr, factor: float) -> Expr:
    return factor * op("Exp", -op("Square", a))


_row("Erf", torch.erf, lambda a, y: _gauss(a, 2 / math.sqrt(math.pi)), "erf", "tl.erf({0})", _REAL)
_row("Erfc", torch.erfc, lambda a, y: _gauss(a, -2 / math.sqrt(math.pi)), "erfc", "libdevice.erfc({0})", _REAL)
_row("Lgamma", torch.lgamma, lambda a, y: op("Digamma", a), "lgamma", "libdevice.lgamma({0})", _POSITIVE)
_row("Digamma", torch.digamma, lambda a, y: op("Trigamma", a), "digamma", None, _POSITIVE)
_row("Trigamma", lambda a: torch.polygamma(1, a), lambda a, y: op("PolyGamma", a, 2), "trigamma", None, _POSITIVE)
_row(  # d^(n+1)/da^(n+1) log Gamma(a)
    "PolyGamma",
    lambda a, n: torch.polygamma(n, a),
    lambda a, n, y: op("PolyGamma", a, n + 1),
    None,
    None,
    _POSITIVE,
    params=(2,),
)


def _sinc_series(x: Any, n: int) -> Any:
    """The n-th derivative of sin(x)/x for |x| <= 1 + n/4, by sum_k (-1)^k x^(2k-n) / ((2k-n)! (2k+1)).

    The first term left out is below 2^-53 / (n + 1). `x` is a tensor or an Expr.
    """
    terms: list[float] = []
    k = (n + 1) // 2
    while (1 + n / 4) ** (2 * k - n) / math.factorial(2 * k - n) > 2.0**-54 or len(terms) < 2:
        terms.append((-1) ** k / (math.factorial(2 * k - n) * (2 * k + 1)))
        k += 1
    total = terms[-1]
    for c in reversed(terms[:-1]):
        total = total * (x * x) + c
    return total * x if n % 2 else total


def _sinc_torch(x: Tensor, n: int) -> Tensor:
    """Away from 0 by x s_n + n s_(n-1) = sin(x + n pi/2), which loses no digits for |x| > 1 + n/4."""
    near = x.abs() <= 1 + n / 4
    far = torch.where(near, torch.ones_like(x), x)
    s = torch.sin(far) / far
    for k in range(1, n + 1):
        s = ((torch.cos, torch.sin)[k % 2 == 0](far) * (1, 1, -1, -1)[k % 4] - k * s) / far
    return torch.where(near, _sinc_series(torch.where(near, x, torch.zeros_like(x)), n), s)


def _sinc_expand(x: Expr, n: int) -> Expr:
    s = op("SinXDivX", x)
    for k in range(1, n + 1):
        s = (op(("Sin", "Cos")[k % 2], x) * (1, 1, -1, -1)[k % 4] - k * s) / x
    return op("Where", op("LessOrEqual", op("Abs", x), 1 + n / 4), _sinc_series(x, n), s)


_row(
    "SinXDivX",
    lambda a: torch.where(a == 0, 1, torch.sin(a) / a),
    lambda a, y: op("SincDerivative", a, 1),
    "sinc",
    "tl.where({0} == 0, 1.0, tl.sin({0}) / {0})",
    _REAL,
)
_row(  # d^n/da^n (sin(a) / a), also at 0
    "SincDerivative",
    _sinc_torch,
    lambda a, n, y: op("SincDerivative", a, n + 1),
    None,
    None,
    (-6.0, 6.0),
    expand=_sinc_expand,
    params=(2,),
)


def _matern_torch(q: Tensor, p: int) -> Tensor:
    z = torch.sqrt(q)
    return torch.exp(-z) * _matern_polynomial(z, p)


def _matern_polynomial(z: Any, p: int) -> Any:
    return (1.0, 1 + z, 1 + z + (z * z) * (1 / 3))[p]


_row(  # exp(-z) times a polynomial in z = sqrt(a): the Matern kernels as smooth functions of the squared distance
    "Matern",
    _matern_torch,
    lambda a, p, y: (-0.5, -0.5, -1 / 6)[p] * (y * op("Rsqrt", a) if p == 0 else op("Matern", a, p - 1)),
    None,
    None,
    _POSITIVE,
    expand=lambda a, p: op("Exp", -op("Sqrt", a)) * _matern_polynomial(op("Sqrt", a), p),
    params=(2,),
)

# Steps, signs, comparisons: values 0 or 1, derivative 0 -----------------------------------------------------------


def _flat(*args: Any) -> tuple[None, ...]:
    return (None,) * sum(isinstance(a, Expr) for a in args[:-1])


_RELU = "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)"


def _truth(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: function(a, b).to(torch.result_type(a, b))


_row("Sign", torch.sign, _flat, "sign", "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))", _REAL)
_row("Step", lambda a: torch.where(a < 0, 0.0, 1.0).to(a.dtype), _flat, "step", "tl.where({0} < 0, 0.0, 1.0)", _REAL)
_row("ReLU", torch.relu, lambda a, y: op("LessThan", 0, a), "relu", _RELU, _REAL)
_row("Floor", torch.floor, _flat, "floor", "tl.floor({0})", _REAL)
_row("Ceil", torch.ceil, _flat, "ceil", "tl.ceil({0})", _REAL)
_row("Trunc", torch.trunc, _flat, "trunc", "libdevice.trunc({0})", _REAL)
_row(
    "Round",
    lambda a, d: torch.round(a, decimals=d) if d else torch.round(a),
    _flat,
    "round",
    "(libdevice.rint({0} * 10.0**{p0}) / 10.0**{p0})",
    _REAL,
    params=(1,),
)
for _name, _function, _llvm, _sign in (
    ("Equal", torch.eq, "eq", "=="),
    ("NotEqual", torch.ne, "ne", "!="),
    ("LessThan", torch.lt, "lt", "<"),
    ("LessOrEqual", torch.le, "le", "<="),
):
    _row(_name, _truth(_function), _flat, _llvm, f"tl.where({{0}} {_sign} {{1}}, 1.0, 0.0)", _REAL, _REAL)
_row(
    "LogicalAnd",
    _truth(torch.logical_and),
    _flat,
    "logical_and",
    "tl.where(({0} != 0) & ({1} != 0), 1.0, 0.0)",
    _REAL,
    _REAL,
)
_row(
    "LogicalOr",
    _truth(torch.logical_or),
    _flat,
    "logical_or",
    "tl.where(({0} != 0) | ({1} != 0), 1.0, 0.0)",
    _REAL,
    _REAL,
)
_row(
    "LogicalNot",
    lambda a: torch.logical_not(a).to(a.dtype),
    _flat,
    "logical_not",
    "tl.where({0} == 0, 1.0, 0.0)",
    _REAL,
)

# Choices ----------------------------------------------------------------------------------------------------------

_row(
    "Where",
    lambda c, a, b: torch.where(c != 0, a, b),
    lambda c, a, b, y: (None, op("NotEqual", c, 0), op("Equal", c, 0)),
    "where",
    "tl.where({0} != 0, {1}, {2})",
    _REAL,
    _REAL,
    _REAL,
)
_row(
    "IfElse",
    lambda c, a, b: torch.where(c >= 0, a, b),
    lambda c, a, b, y: (None, op("LessOrEqual", 0, c), op("LessThan", c, 0)),
    None,
    None,
    _REAL,
    _REAL,
    _REAL,
    expand=lambda c, a, b: op("Where", op("LessOrEqual", 0, c), a, b),
)
_row(
    "Maximum",
    torch.maximum,
    lambda a, b, y: (op("LessOrEqual", b, a), op("LessThan", a, b)),
    "maximum",
    "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    _REAL,
    _REAL,
)
_row(
    "Minimum",
    torch.minimum,
    lambda a, b, y: (op("LessOrEqual", a, b), op("LessThan", b, a)),
    "minimum",
    "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    _REAL,
    _REAL,
)
_row(
    "Clamp",
    lambda a, lo, hi: torch.minimum(torch.maximum(a, lo), hi),
    lambda a, lo, hi, y: (
        op("LogicalAnd", op("LessOrEqual", lo, a), op("LessOrEqual", a, hi)),
        op("LogicalAnd", op("LessThan", a, lo), op("LessOrEqual", lo, hi)),
        op("LessThan", hi, op("Maximum", a, lo)),
    ),
    None,
    None,
    _REAL,
    (-2.0, -1.0),
    (1.0, 2.0),
    expand=lambda a, lo, hi: op("Minimum", op("Maximum", a, lo), hi),
)
_row(
    "Mod",
    lambda x, n, d: x - n * torch.floor((x - d) / n),
    lambda x, n, d, y: (const(1), -op("Floor", (x - d) / n), None),
    None,
    None,
    _REAL,
    _POSITIVE,
    _REAL,
    expand=lambda x, n, d: x - n * op("Floor", (x - d) / n),
)


# Builders that choose a simpler row ------------------------------------------------------------------------------


def _pow(*args: Any) -> Expr:
    """Pow(a, m), or Powf where m is no integer."""
    if len(args) == 2 and isinstance(args[1], float) and args[1] != int(args[1]):
        return op("Powf", *args)
    return _build(PRIMITIVES["Pow"], args)


def _order(name: str, args: tuple[Any, ...], limit: float = math.inf) -> int:
    """The second argument, an integer between 0 and `limit`; -1 where there is none."""
    if len(args) != 2:
        return -1
    n = whole(name, args[1])
    if not 0 <= n <= limit:
        raise ArgumentError(f"{name} expects {'an order >= 0' if limit > 2 else 'the order 0, 1 or 2'}; got {n}")
    return n


def _polygamma(*args: Any) -> Expr:
    n = _order("PolyGamma", args)
    return op(("Digamma", "Trigamma")[n], args[0]) if n in (0, 1) else _build(PRIMITIVES["PolyGamma"], args)


def _sinc_derivative(*args: Any) -> Expr:
    n = _order("SincDerivative", args)
    return op("SinXDivX", args[0]) if n == 0 else _build(PRIMITIVES["SincDerivative"], args)


def _matern(*args: Any) -> Expr:
    _order("Matern", args, 2)
    return _build(PRIMITIVES["Matern"], args)


builders.update(Pow=_pow, PolyGamma=_polygamma, SincDerivative=_sinc_derivative, Matern=_matern)
