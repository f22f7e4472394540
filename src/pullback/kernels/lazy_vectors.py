"""Operations on the vectors of a LazyTensor: norms, components, small matrices, symbolic derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.ir import grad as symbolic
from pullback.kernels.ir.expr import Expr, builders
from pullback.kernels.lazy_base import LazyBase, combine, derive, same_leaves


class LazyVectors(LazyBase):
    """Methods that treat the D components of each pair as a vector, a matrix (row-major) or complex numbers."""

    __slots__ = ()

    # Functions of vectors -------------------------------------------------------------------------------------------

    def sqnorm2(self) -> Any:
        """|x|^2."""
        return self._apply("SqNorm2")

    def norm2(self) -> Any:
        """|x|, with the derivative 0 at 0."""
        return self._apply("Norm2")

    def norm(self, dim: int = -1) -> Any:
        """|x|, as `norm2`; `dim` must be -1 (or 2, the same axis), or the norm's order 2."""
        if dim not in (-1, 2, self.nbatchdims + 2):
            raise ArgumentError(f"norm(dim) takes the Euclidean norm of the last axis, dim = -1; got {dim!r}")
        return self.norm2()

    def normalize(self) -> Any:
        """X / |x|, and 0 at 0."""
        return self._apply("Normalize")

    def sqdist(self, other: Any) -> Any:
        """|x - y|^2."""
        return self._apply("SqDist", other)

    def weightedsqnorm(self, other: Any) -> Any:
        """The weighted norm of x: s |x|^2, sum_k s_k x_k^2 or x^T S x for `other` of 1, D or D^2 components."""
        return combine("WeightedSqNorm", (other, self))

    def weightedsqdist(self, g: Any, s: Any) -> Any:
        """The weighted distance: s |x - g|^2, and so on as in `weightedsqnorm`."""
        return combine("WeightedSqDist", (s, self, g))

    def difference_matrix(self, other: Any) -> Any:
        """The matrix x_a - y_b with the component a * dim(y) + b."""
        return derive(_differences, (self, other))

    def elem(self, i: int) -> Any:
        """x_i."""
        return self._apply("Elem", params=(self._component(i),))

    def extract(self, i: int, d: int) -> Any:
        """x_i, ..., x_(i+d-1)."""
        return self._apply("Extract", params=(int(i), int(d)))

    def _component(self, i: int) -> int:
        if not -self.ndim <= i < self.ndim:
            raise ShapeError(f"component {i} of a LazyTensor with {self.ndim} components")
        return int(i) % self.ndim

    def one_hot(self, D: int) -> Any:
        """The vector of D components with 1 at round(x), else 0; all 0 where round(x) is not in 0 .. D - 1."""
        if self.ndim != 1:
            raise ShapeError(f"one_hot needs a LazyTensor of one component; this one has {self.ndim}")
        return self._apply("OneHot", params=(int(D),))

    def bspline(self, x: Any, k: int = 0) -> Any:
        """The values at x of all B-splines of order k on the knots self."""
        return self._apply("BSpline", x, params=(int(k),))

    def concat(self, other: Any) -> Any:
        """The components of x followed by those of y."""
        return self._apply("Concat", other)

    @staticmethod
    def concatenate(tuple_of_lt: Sequence[Any], axis: int = -1) -> Any:
        """The components of all LazyTensors one after the other."""
        lazies = [x for x in tuple_of_lt if isinstance(x, LazyBase)]
        if not lazies:
            raise ArgumentError("cat needs a tuple of LazyTensors")
        if axis not in (-1, 2, 2 + max(x.nbatchdims for x in lazies)):
            raise ArgumentError(f"LazyTensors are concatenated along their last axis only, axis = -1; got {axis!r}")
        first, *rest = tuple_of_lt
        return first if not rest else combine("Concat", tuple(tuple_of_lt))

    @staticmethod
    def cat(tuple_of_lt: Sequence[Any], dim: int = -1) -> Any:
        """As `concatenate`."""
        return LazyVectors.concatenate(tuple_of_lt, dim)

    # Small matrices and tensors, row-major --------------------------------------------------------------------------

    def matvecmult(self, other: Any) -> Any:
        """A b, for self a matrix of n x dim(b) components."""
        return self._apply("MatVecMult", other)

    def vecmatmult(self, other: Any) -> Any:
        """b^T A, for self the vector b and other a matrix of dim(b) x n components."""
        return self._apply("VecMatMult", other)

    def tensorprod(self, other: Any) -> Any:
        """x_a y_b at component a * dim(y) + b."""
        return self._apply("TensorProd", other)

    def keops_tensordot(self, other: Any, dimfa: Any, dimfb: Any, contfa: Any, contfb: Any, *args: Any) -> Any:
        """Contract axes `contfa` of x, a tensor of shape `dimfa`, with `contfb` of y; then permute by args[0]."""
        permute = tuple(args[0]) if args and args[0] else ()
        return self._apply(
            "TensorDot", other, params=(tuple(dimfa), tuple(dimfb), tuple(contfa), tuple(contfb), permute)
        )

    tensordot = keops_tensordot

    def keops_kron(self, other: Any, dimfself: Any, dimfother: Any) -> Any:
        """The Kronecker product of x and y, read as tensors of shapes `dimfself` and `dimfother`."""
        return self._apply("Kron", other, params=(tuple(dimfself), tuple(dimfother)))

    kron = keops_kron

    def softdtw_sqdist(self, other: Any, gamma: Any) -> Any:
        """The soft dynamic time warping distance of two series of numbers, with smoothing gamma."""
        return self._apply("SoftDTW_SqDist", other, gamma)

    # Complex --------------------------------------------------------------------------------------------------------

    def real2complex(self) -> Any:
        """X + 0i."""
        return same_leaves("Real2Complex", self, is_complex=True)

    def imag2complex(self) -> Any:
        """0 + x i."""
        return same_leaves("Imag2Complex", self, is_complex=True)

    def exp1j(self) -> Any:
        """e^(i x)."""
        return same_leaves("ComplexExp1j", self, is_complex=True)

    # Symbolic derivatives -------------------------------------------------------------------------------------------

    def grad(self, other: Any, gradin: Any) -> Any:
        """(dF/dv)^T e for the variable v = `other` and e = `gradin`."""
        return derive(lambda f, v, e: symbolic.grad(f, _variable(v, "grad"), _as_wide(e, f.dim)), (self, other, gradin))

    def diff(self, other: Any, diffin: Any) -> Any:
        """(dF/dv) u for the variable v = `other` and u = `diffin`."""
        return derive(lambda f, v, u: symbolic.diff(f, _variable(v, "diff"), _as_wide(u, v.dim)), (self, other, diffin))

    def grad_matrix(self, other: Any) -> Any:
        """All dF_a / dv_b, at component a * dim(v) + b."""
        return derive(lambda f, v: symbolic.grad_matrix(f, _variable(v, "grad_matrix")), (self, other))

    def divergence(self, var: Any) -> Any:
        """sum_k dF_k / dv_k."""
        return derive(lambda f, v: symbolic.divergence(f, _variable(v, "divergence")), (self, var))

    def laplacian(self, var: Any) -> Any:
        """sum_k d^2 F / dv_k^2 of F with one component."""
        return derive(lambda f, v: symbolic.laplacian(f, _variable(v, "laplacian")), (self, var))

    def trace_operator(self, var: Any, weight: Any = None) -> Any:
        """The trace of the matrix of F, linear in v = `var`; the weighted trace if a weight is given."""
        rest = () if weight is None else (weight,)
        return derive(lambda f, v, *w: symbolic.trace(f, _variable(v, "trace_operator"), *w), (self, var, *rest))

    def adjoint_operator(self, var: Any, u: Any) -> Any:
        """M^T u for the matrix M of F, linear in v = `var`."""
        return self.grad(var, u)

    def factorize(self, other: Any) -> Any:
        """The same: common subexpressions are always computed once."""
        return self

    def auto_factorize(self) -> Any:
        """The same: common subexpressions are always computed once."""
        return self

    # Generic operations, by name ------------------------------------------------------------------------------------

    def unary(self, operation: str, dimres: int | None = None, opt_arg: Any = None, opt_arg2: Any = None) -> Any:
        """operation(x, opt_arg, opt_arg2) of the formula language; `dimres` is checked if given."""
        params = tuple(p for p in (opt_arg, opt_arg2) if p is not None)
        return _of_dim(combine(_known(operation), (self,), params), operation, dimres)

    def binary(self, other: Any, operation: str, dimres: int | None = None, opt_arg: Any = None, **_: Any) -> Any:
        """operation(x, y, opt_arg) of the formula language; + - * / are names too."""
        params = () if opt_arg is None else (opt_arg,)
        return _of_dim(combine(_known(operation), (self, other), params), operation, dimres)

    def ternary(
        self, other1: Any, other2: Any, operation: str, dimres: int | None = None, opt_arg: Any = None, **_: Any
    ) -> Any:
        """operation(x, y, z, opt_arg) of the formula language."""
        params = () if opt_arg is None else (opt_arg,)
        return _of_dim(combine(_known(operation), (self, other1, other2), params), operation, dimres)


_SIGNS = {"+": "Add", "-": "Subtract", "*": "Mult", "/": "Divide", "|": "Scalprod", "==": "Equal", "<": "LessThan"}


def _known(operation: str) -> str:
    name = _SIGNS.get(operation, operation)
    if name not in builders:
        raise ArgumentError(f"unknown operation {operation!r}; known are {', '.join(sorted(builders))}")
    return name


def _of_dim(result: Any, operation: str, dim: int | None) -> Any:
    if dim is not None and result._expr.dim != dim:
        raise ShapeError(f"{operation} has {result._expr.dim} components; dimres = {dim} was given")
    return result


def _differences(x: Expr, y: Expr) -> Expr:
    rows = tuple(a for a in range(x.dim) for _ in range(y.dim))
    columns = tuple(range(y.dim)) * x.dim
    return builders["Gather"](x, rows) - builders["Gather"](y, columns)


def _as_wide(e: Expr, dim: int) -> Expr:
    return builders["SumT"](e, dim) if e.dim == 1 < dim else e


def _variable(v: Expr, name: str) -> Expr:
    if v.op != "Var":
        raise ArgumentError(f"{name} differentiates by a variable, such as Vi(x); got the expression {v}")
    return v
