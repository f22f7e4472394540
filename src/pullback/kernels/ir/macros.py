"""Functions of the formula language that are compositions of the tables' rows, so their derivatives come for free.

`FUNCTIONS` holds every name that a formula may call: these, those on complex vectors, and the rows of both tables.
Vectors are row-major where they stand for matrices.
"""

from __future__ import annotations

import math
from typing import Any

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.ir import complexes as complexes
from pullback.kernels.ir import grad
from pullback.kernels.ir.expr import Expr, I, J, const, index, variable, zero
from pullback.kernels.ir.primitives import op, operand, whole
from pullback.kernels.ir.registry import FUNCTIONS as FUNCTIONS
from pullback.kernels.ir.registry import check_scalar, function, number

# Constants and variables ------------------------------------------------------------------------------------------


def Const(*values: Any) -> Expr:
    """A constant vector."""
    if not values:
        raise ArgumentError("Const expects at least one number")
    return const(*(number("Const", v) for v in values))


FUNCTIONS["Const"] = Const


@function
def IntCst(n: Any) -> Expr:
    """The constant n."""
    return const(number("IntCst", n))


@function
def RatCst(p: Any, q: Any) -> Expr:
    """The constant p / q."""
    return const(number("RatCst", p) / number("RatCst", q))


@function
def IntInv(n: Any) -> Expr:
    """The constant 1 / n."""
    return const(1 / number("IntInv", n))


@function
def Zero(n: Any) -> Expr:
    """The zero vector of dimension n."""
    if whole("Zero", n) < 1:
        raise ArgumentError(f"Zero expects a dimension > 0; got {n}")
    return zero(whole("Zero", n))


@function
def Var(position: Any, dim: Any, category: Any) -> Expr:
    """Argument number `position`, of dimension `dim`; category 0: Vi, 1: Vj, 2: Pm."""
    position, dim, category = (whole("Var", p) for p in (position, dim, category))
    if position < 0 or dim < 1 or category not in (0, 1, 2):
        raise ArgumentError(
            f"Var(position, dim, category) expects position >= 0, dim >= 1 and category 0, 1 or 2; got "
            f"Var({position},{dim},{category})"
        )
    return variable(position, dim, category)


@function
def Index(category: Any) -> Expr:
    """The number i (category 0) or j (category 1) of the pair."""
    if whole("Index", category) not in (I, J):
        raise ArgumentError(f"Index expects 0, the number i, or 1, the number j; got {category}")
    return index(whole("Index", category))


@function
def Factorize(f: Expr, g: Expr) -> Expr:
    """`f`: equal parts of a formula are computed once anyway."""
    return f


@function
def AutoFactorize(f: Expr) -> Expr:
    """`f`: equal parts of a formula are computed once anyway."""
    return f


# Norms and distances ----------------------------------------------------------------------------------------------


@function
def Scalprod(f: Expr, g: Expr) -> Expr:
    """sum_k f_k g_k, also written (f | g)."""
    return op("Sum", f * g)


@function
def SqNorm2(f: Expr) -> Expr:
    """sum_k f_k^2."""
    return op("Sum", op("Square", f))


@function
def Norm2(f: Expr) -> Expr:
    """`sqrt(sum_k f_k^2)`, with the gradient 0 at 0."""
    return op("Sqrt", SqNorm2(f))


@function
def Normalize(f: Expr) -> Expr:
    """`f / |f|`, and 0 for f = 0."""
    return op("Rsqrt", SqNorm2(f)) * f


@function
def SqDist(f: Expr, g: Expr) -> Expr:
    """sum_k (f_k - g_k)^2."""
    return SqNorm2(f - g)


@function
def SqNormIso(s: Expr, f: Expr) -> Expr:
    """`s sum_k f_k^2` for a scalar s."""
    check_scalar("SqNormIso", "s", s)
    return s * SqNorm2(f)


@function
def SqNormDiag(s: Expr, f: Expr) -> Expr:
    """sum_k s_k f_k^2."""
    return op("Sum", s * op("Square", f))


@function
def SymSqNorm(s: Expr, f: Expr) -> Expr:
    """sum_kl s_kl f_k f_l for a matrix s; not checked to be symmetric."""
    if s.dim != f.dim**2:
        raise ShapeError(f"SymSqNorm expects a matrix of {f.dim} x {f.dim} = {f.dim**2} numbers; got {s.dim}")
    return Scalprod(f, MatVecMult(s, f))


@function
def WeightedSqNorm(s: Expr, f: Expr) -> Expr:
    """SqNormIso, SqNormDiag or SymSqNorm, as s has dimension 1, D or D^2."""
    if s.dim not in (1, f.dim, f.dim**2):
        raise ShapeError(f"WeightedSqNorm expects s of dimension 1, {f.dim} or {f.dim**2}; got {s.dim}")
    return SqNormIso(s, f) if s.dim == 1 else SqNormDiag(s, f) if s.dim == f.dim else SymSqNorm(s, f)


@function
def WeightedSqDist(s: Expr, f: Expr, g: Expr) -> Expr:
    """WeightedSqNorm(s, f - g)."""
    return WeightedSqNorm(s, f - g)


# Matern kernels: functions of a distance r already divided by the length scale, or of points ----------------------


def _matern(name: str, nu2: int, x: Expr, y: Expr | None, scale: Expr | None) -> Expr:
    if y is not None:
        difference = x - y
        squared = SqNorm2(difference if scale is None else difference / scale)
    else:
        check_scalar(name, "distance (or two points)", x)
        squared = x.args[0] if x.op == "Sqrt" else op("Square", x)
    return op("Matern", nu2 * squared, (nu2 - 1) // 2)


@function
def Matern12(x: Expr, y: Expr | None = None, scale: Expr | None = None) -> Expr:
    """`exp(-r)`, r = x, or |(x - y) / scale| for points; scale is a number or one for each component."""
    return _matern("Matern12", 1, x, y, scale)


@function
def Matern32(x: Expr, y: Expr | None = None, scale: Expr | None = None) -> Expr:
    """(1 + z) exp(-z), z = sqrt(3) r, r as in Matern12; exact first and second derivatives also at r = 0."""
    return _matern("Matern32", 3, x, y, scale)


@function
def Matern52(x: Expr, y: Expr | None = None, scale: Expr | None = None) -> Expr:
    """(1 + z + z^2 / 3) exp(-z), z = sqrt(5) r, r as in Matern12; exact derivatives up to order 4 at r = 0."""
    return _matern("Matern52", 5, x, y, scale)


# Components -------------------------------------------------------------------------------------------------------


@function
def Elem(f: Expr, m: Any) -> Expr:
    """Component m of f."""
    return op("Gather", f, (whole("Elem", m),))


@function
def ElemT(f: Expr, n: Any, m: Any) -> Expr:
    """The vector of dimension n with the scalar f at place m and 0 elsewhere."""
    return op("Scatter", f, (whole("ElemT", m),), n)


@function
def Extract(f: Expr, start: Any, dim: Any) -> Expr:
    """Components start .. start + dim - 1 of f."""
    start, dim = whole("Extract", start), whole("Extract", dim)
    return op("Gather", f, tuple(range(start, start + dim)))


@function
def ExtractT(f: Expr, start: Any, dim: Any) -> Expr:
    """The vector of dimension dim with f from place start on and 0 elsewhere."""
    start = whole("ExtractT", start)
    return op("Scatter", f, tuple(range(start, start + f.dim)), dim)


@function
def OneHot(f: Expr, dim: Any) -> Expr:
    """`1` at the place round(f), else 0; all zeros where round(f) is not in 0 .. dim - 1."""
    check_scalar("OneHot", "f", f)
    if whole("OneHot", dim) < 1:
        raise ArgumentError(f"OneHot expects a dimension > 0; got {dim}")
    return op("Equal", op("Floor", f + 0.5), const(*range(whole("OneHot", dim))))


@function
def ClampInt(f: Expr, a: Any, b: Any) -> Expr:
    """Clamp(f, a, b) for numbers a and b."""
    return op("Clamp", f, number("ClampInt", a), number("ClampInt", b))


@function
def DiffClampInt(f: Expr, a: Any, b: Any) -> Expr:
    """`1` where a <= f <= b, else 0."""
    low, high = number("DiffClampInt", a), number("DiffClampInt", b)
    return op("LogicalAnd", op("LessOrEqual", low, f), op("LessOrEqual", f, high))


def power(f: Any, m: Any) -> Expr:
    """`f ** m`, by the cheapest row: 1/sqrt(0) counts as 0, as everywhere."""
    if isinstance(m, Expr) and m.op == "Const" and m.dim == 1:
        m = m.params[0]
    if isinstance(m, (int, float)):
        if m in (0.5, -0.5, 2):
            return op({0.5: "Sqrt", -0.5: "Rsqrt", 2: "Square"}[m], f)
        if m == int(m):
            return op("Pow", f, int(m))
    return op("Powf", f, m)


# Splines and alignment --------------------------------------------------------------------------------------------


def _ratio(a: Expr, b: Expr) -> Expr:
    """`a / b`, and 0 where b = 0."""
    empty = op("Equal", b, 0)
    return op("Where", empty, 0, a / op("Where", empty, 1, b))


@function
def BSpline(knots: Expr, x: Expr, order: Any) -> Expr:
    """The B-splines of that order at x, one for each of the knots.dim - order - 1 basis functions (Cox-de Boor).

    B_(i,0) = 1 for t_i <= x < t_(i+1), else 0;
    B_(i,k) = (x - t_i) / (t_(i+k) - t_i) B_(i,k-1) + (t_(i+k+1) - x) / (t_(i+k+1) - t_(i+1)) B_(i+1,k-1), 0 / 0 = 0.
    Differentiable in x and in the knots, which must not decrease (not checked).
    """
    check_scalar("BSpline", "x", x)
    order, n = whole("BSpline", order), knots.dim
    if order < 0 or n < order + 2:
        raise ShapeError(f"BSpline expects an order >= 0 and at least order + 2 knots; got order {order}, {n} knots")

    def part(v: Expr, start: int, stop: int) -> Expr:
        return op("Gather", v, tuple(range(start, stop)))

    basis = op("LogicalAnd", op("LessOrEqual", part(knots, 0, n - 1), x), op("LessThan", x, part(knots, 1, n)))
    for k in range(1, order + 1):
        rise = _ratio(x - part(knots, 0, n - k), part(knots, k, n) - part(knots, 0, n - k))  # on [t_i, t_(i+k)]
        left = part(rise, 0, n - k - 1) * part(basis, 0, n - k - 1)
        basis = left + (1 - part(rise, 1, n - k)) * part(basis, 1, n - k)
    return basis


@function
def SoftDTW_SqDist(x: Expr, y: Expr, gamma: Expr) -> Expr:
    """Soft dynamic time warping of the sequences x and y: the soft minimum over alignments of sum (x_i - y_j)^2.

    r_ij = (x_i - y_j)^2 - gamma log(sum of exp(-r / gamma) over (i-1, j), (i, j-1) and (i-1, j-1)); the last r is it.
    Source: M. Cuturi, M. Blondel, Soft-DTW (2017). Differentiable in x, y and gamma.
    """
    check_scalar("SoftDTW_SqDist", "gamma", gamma)
    rate = -1 / gamma
    above: list[Expr] = []  # -r / gamma of the row i - 1
    for i in range(x.dim):
        row: list[Expr] = []
        for j in range(y.dim):
            before = [*row[-1:], *above[j : j + 1], *(above[j - 1 : j] if j else [])]
            cost = rate * op("Square", Elem(x, i) - Elem(y, j))
            total = before[0] if before else None
            for r in before[1:]:
                total = op("LogAddExp", total, r)
            row.append(cost if total is None else cost + total)
        above = row
    return -gamma * above[-1]


# Matrices and tensors ---------------------------------------------------------------------------------------------


@function
def MatVecMult(a: Expr, b: Expr) -> Expr:
    """The product A b of a matrix of n rows and b.dim columns with a vector."""
    if a.dim % b.dim:
        raise ShapeError(f"MatVecMult cannot read {a.dim} numbers as a matrix with {b.dim} columns")
    return op("TensorDot", a, b, (a.dim // b.dim, b.dim), (b.dim,), (1,), (0,))


@function
def VecMatMult(b: Expr, a: Expr) -> Expr:
    """The product b A of a vector with a matrix of b.dim rows."""
    if a.dim % b.dim:
        raise ShapeError(f"VecMatMult cannot read {a.dim} numbers as a matrix with {b.dim} rows")
    return op("TensorDot", b, a, (b.dim,), (b.dim, a.dim // b.dim), (0,), (0,))


@function
def TensorProd(a: Expr, b: Expr) -> Expr:
    """The products a_k b_l at place k * b.dim + l."""
    return op("TensorDot", a, b, (a.dim,), (b.dim,), (), ())


@function
def Kron(a: Expr, b: Expr, dims_a: Any, dims_b: Any) -> Expr:
    """The Kronecker product of tensors of the same number of axes, as numpy.kron."""
    if not isinstance(dims_a, (tuple, list)) or not isinstance(dims_b, (tuple, list)) or len(dims_a) != len(dims_b):
        raise ArgumentError(f"Kron expects two shapes of the same length; got {dims_a} and {dims_b}")
    n = len(dims_a)
    return op("TensorDot", a, b, dims_a, dims_b, (), (), (*range(0, 2 * n, 2), *range(1, 2 * n, 2)))


# Derivatives ------------------------------------------------------------------------------------------------------


@function
def Grad(f: Expr, v: Expr, e: Expr | None = None) -> Expr:
    """(df/dv)^T e, of the dimension of v; e may be left out if f is a scalar."""
    if e is None:
        check_scalar("Grad(f, v), without e,", "f", f)
    return grad.grad(f, v, const(1) if e is None else e)


@function
def Diff(f: Expr, v: Expr, u: Expr) -> Expr:
    """(df/dv) u, of the dimension of f."""
    return grad.diff(f, v, u)


@function
def GradMatrix(f: Expr, v: Expr) -> Expr:
    """`d f_a / d v_b` at place a * v.dim + b."""
    return grad.grad_matrix(f, v)


@function
def Divergence(f: Expr, v: Expr) -> Expr:
    """sum_k d f_k / d v_k."""
    return grad.divergence(f, v)


@function
def Laplacian(f: Expr, v: Expr) -> Expr:
    """sum_k d^2 f / d v_k^2 of a scalar f."""
    return grad.laplacian(f, v)


def _check_linear(name: str, f: Expr, v: Expr) -> None:
    if not grad.is_linear(f, v):
        raise ArgumentError(f"{name}(f, v, ...) expects a formula f that is linear in v")


@function
def TraceOperator(f: Expr, v: Expr, w: Expr | None = None) -> Expr:
    """sum_k w_k M_kk for the matrix M of the linear map v -> f; sum_k w_k M_0k if f is a scalar."""
    _check_linear("TraceOperator", f, v)
    return grad.trace(f, v, w)


@function
def AdjointOperator(f: Expr, v: Expr, u: Expr) -> Expr:
    """M^T u for the matrix M of the linear map v -> f."""
    _check_linear("AdjointOperator", f, v)
    return grad.grad(f, v, u)


@function
def SumLinOperator(f: Expr, v: Expr, left: Expr | None = None, right: Expr | None = None) -> Expr:
    """sum_kl left_k M_kl right_l for the matrix M of the linear map v -> f; 1 where a weight is left out."""
    _check_linear("SumLinOperator", f, v)
    image = grad.diff(f, v, const(1) if right is None else right)
    return op("Sum", image if left is None else left * image)


FUNCTIONS["Sinc"] = lambda *args: op("SinXDivX", *(math.pi * operand(a) for a in args))
