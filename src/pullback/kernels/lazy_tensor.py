"""LazyTensor itself: construction, attributes, products, parts and dense values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pullback.kernels.lazy_index as lazy_index
from pullback.core import interop
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator, Operator, OperatorLike
from pullback.kernels.cluster import swap_axes
from pullback.kernels.codegen import eager
from pullback.kernels.ir.expr import PARAMETER
from pullback.kernels.ir.expr import I as ROW
from pullback.kernels.ir.expr import J as COLUMN
from pullback.kernels.lazy_arithmetic import LazyArithmetic
from pullback.kernels.lazy_base import NO_LEAVES, Domain, LazyBase, classes, make
from pullback.kernels.lazy_data import is_complex as is_complex_data
from pullback.kernels.lazy_data import leaf_of
from pullback.kernels.lazy_expr import Shape, atom, build, text_of
from pullback.kernels.lazy_reductions import LazyReductions
from pullback.kernels.operator import KernelOperator
from pullback.kernels.solve import solve_lazy
from pullback.kernels.task import within


class LazyTensor(LazyArithmetic, LazyReductions):
    """F_ij, a vector of D components for every pair (i, j), as a formula over tensors.

    Args:
        x: a tensor or array of shape (..., M, 1, D) (varies with i), (..., 1, N, D) (with j), (..., 1, 1, D), (D,) or
            () (a parameter); with `axis` 0 or 1 of shape (..., M, D) or (..., N, D); a number or a list (a parameter:
            a new value compiles nothing; whole numbers are constants of the formula); a triple (position, dim,
            category) for an argument that is given later. Complex data makes a ComplexLazyTensor.
        axis: 0 for i, 1 for j, 2 for a parameter of shape (..., D).
        is_complex: with a triple, an argument of `dim` complex numbers.

    `shape` is (..., M, N, D), without D where it is 1, and with 1 for what does not vary; batch axes broadcast. Integer
    and boolean tensors take the dtype of the others, so indices beyond 2^24 are not exact in float32. NumPy data gives
    NumPy results. Raises: ShapeError, DtypeError, DeviceError as soon as two LazyTensors that do not fit meet.
    """

    __slots__ = ()

    def __new__(cls, x: Any = None, axis: int | None = None, is_complex: bool = False) -> Any:
        """The LazyTensor; a ComplexLazyTensor for complex data."""
        if cls is LazyTensor and (is_complex or is_complex_data(x)):
            return object.__new__(classes[True])
        return object.__new__(cls)

    def __init__(self, x: Any = None, axis: int | None = None, is_complex: bool = False) -> None:
        self._ranges, self.backend = None, None
        if isinstance(x, LazyBase):
            self._expr, self._domain = x._expr, x._domain
            self._ranges, self.backend = x._ranges, x.backend
            return
        leaf = leaf_of(x, axis, self._complex)
        if leaf is None:
            self._expr, self._domain = atom("Const", int(x)), NO_LEAVES
            return
        self._domain = Domain((leaf,))
        self._expr = atom("Var", 0, leaf.dim, leaf.category)

    # Attributes -----------------------------------------------------------------------------------------------------

    @property
    def _shape(self) -> Shape:
        """(..., M, N, D), always with D."""
        return (*self._domain.pairs, self.ndim)

    @property
    def shape(self) -> Shape:
        """(..., M, N, D), without D where it is 1."""
        shape = self._shape
        return shape[:-1] if shape[-1] == 1 else shape

    def dim(self) -> int:
        """The number of axes of (..., M, N, D)."""
        return len(self._domain.batch) + 3

    @property
    def ni(self) -> int | None:
        """M; None if nothing varies with i."""
        return self._domain.ni

    @property
    def nj(self) -> int | None:
        """N; None if nothing varies with j."""
        return self._domain.nj

    @property
    def dtype(self) -> Any:
        """The NumPy dtype, as SciPy wants it; bfloat16 has none and is given as torch's."""
        dtype = self._domain.real_dtype
        if dtype == torch.bfloat16:
            return dtype
        return interop.numpy_dtype(dtype.to_complex() if self._complex else dtype)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self._domain.device or torch.device("cpu")

    @property
    def axis(self) -> int | None:
        """0 or 1 for a variable of i or j alone, 2 for a parameter, else None."""
        return self._domain.leaves[0].category if self._expr.op == "Var" else None

    @property
    def formula(self) -> str:
        """The formula in functional form, as Genred reads it."""
        return str(self._expr)

    @property
    def variables(self) -> tuple[Any, ...]:
        """The data of the formula's variables, in order of their positions; None where an argument is open."""
        return tuple(leaf.data for leaf in self._domain.leaves)

    @property
    def is_complex(self) -> bool:
        """Whether the components are complex numbers."""
        return self._complex

    @property
    def ranges(self) -> Any:
        """The block-sparse pattern that every reduction uses: six integer tensors, as in Genred."""
        return self._ranges

    @ranges.setter
    def ranges(self, value: Any) -> None:
        self._ranges = value

    def with_tolerance(self, tolerance: float | None) -> Any:
        """The same formula, whose sums may have a relative l2 error of `tolerance`; None: exact again.

        `K.with_tolerance(1e-6) @ b`, or as an operator in a solver. See `pullback.kernels.fast`.
        """
        new = make(self._expr, self, self._domain, self._complex)
        new.backend = None if tolerance is None else within(tolerance)
        return new

    @property
    def i(self) -> LazyTensor:
        """The row number i, for masks: `K * (K.i < K.j)`. On a slice it counts the rows of the slice from 0."""
        return self._number(ROW)

    @property
    def j(self) -> LazyTensor:
        """The column number j."""
        return self._number(COLUMN)

    def _number(self, category: int) -> LazyTensor:
        if (self._domain.ni, self._domain.nj)[category] is None and not self._domain.symbolic:
            raise ArgumentError(f"nothing in this LazyTensor of shape {self.shape} varies with {'ij'[category]}")
        return make(atom("Index", category), self)

    # Products and relatives -----------------------------------------------------------------------------------------

    def __matmul__(self, v: Any) -> Any:
        """K @ b = sum_j K_ij b_j for b of shape (N,) or (..., N, p); with an operator, the composition."""
        if isinstance(v, (Operator, OperatorLike)):
            return self.operator() @ v
        return self._times(v, 1)

    def __rmatmul__(self, v: Any) -> Any:
        raise ArgumentError("b @ K is not defined, as leading axes of b are the batch; write K.T @ b")

    def t(self) -> Any:
        """K_ji: i and j exchanged."""
        new = make(build("Swap", (self._expr,), (None,)), self, self._domain.swapped(), self._complex)
        if self._ranges is not None:
            new._ranges = swap_axes(self._ranges)
        return new

    @property
    def T(self) -> Any:
        """K_ji."""
        return self.t()

    def matvec(self, v: Any) -> Any:
        """K v for v of shape (N,) or (N, 1), as SciPy calls it; v takes the dtype of K."""
        return self._times(self._cast(v), 1)

    def rmatvec(self, v: Any) -> Any:
        """K^H v for v of shape (M,) or (M, 1)."""
        K = self.conj() if self._complex else self  # type: ignore[attr-defined]
        return K._times(self._cast(v), 0)

    matmat, rmatmat = matvec, rmatvec

    def _cast(self, v: Any) -> Any:
        dtype = self._domain.real_dtype
        if isinstance(v, Tensor):
            return v.to(dtype.to_complex() if v.is_complex() else dtype)
        v = np.asarray(v)
        kind = interop.numpy_dtype(dtype.to_complex() if v.dtype.kind == "c" else dtype)
        return v.astype(kind, copy=False)

    def operator(self) -> LinearOperator:
        """The matrix K_ij as a LinearOperator, for `pullback`'s solvers and algebra."""
        return KernelOperator(self)

    def solve(self, other: Any, var: Any = None, alpha: Any = 1e-10, **kwargs: Any) -> Any:
        """(alpha I + K)^-1 b by conjugate gradients, for a symmetric positive K; see `KernelSolve.__call__`."""
        return solve_lazy(self, other, var, alpha, **kwargs)

    # Parts and dense values -----------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        """Components, or rows and columns.

        An int, or a slice where D > 1, picks components, as in KeOps: `x[0]`, `x[:2]`. Otherwise the key is about the
        axes of `shape`: `K[rows]`, `K[rows, columns]`, `K[rows, columns, components]`, with `...` and with `:` for
        batch axes; rows and columns are slices, integer tensors or masks, and keep their axis.
        """
        return lazy_index.item(self, key)

    def dense(self) -> Any:
        """All F_ij, of shape `shape`: differentiable torch (NumPy for NumPy data), of M N D numbers."""
        args = [eager.on_pairs(t, c) for t, (_, c) in zip(self._domain.args(), self._domain.signature, strict=True)]
        y = self._evaluate(args)
        y = y.expand(*self._domain.pairs, y.shape[-1])
        y = self._finish(y)
        y = (y.squeeze(-1) if self.ndim == 1 else y).contiguous()
        y = y.clone() if any(y.data_ptr() == a.data_ptr() for a in args) else y
        return y.detach().numpy() if self._domain.numpy else y

    def _evaluate(self, args: Sequence[Tensor]) -> Tensor:
        _, m, n = (1, *self._domain.pairs[-2:])
        rows = torch.arange(m, device=self.device)[:, None, None]
        columns = torch.arange(n, device=self.device)[None, :, None]
        args = args or [torch.empty(1, 1, 0, dtype=self._domain.real_dtype)]
        return eager.evaluate([self._expr], args, (rows, columns))[0]

    def diag(self) -> Any:
        """F_ii for M = N, of shape (..., M, D) or (..., M): M evaluations."""
        m, n = self._domain.pairs[-2:]
        if m != n:
            raise ShapeError(f"diag needs as many rows as columns; this LazyTensor has shape {self.shape}")
        args = [
            t.unsqueeze(-2) if c != PARAMETER else t[..., None, None, :]
            for t, (_, c) in zip(self._domain.args(), self._domain.signature, strict=True)
        ]
        number = torch.arange(m, device=self.device)[:, None, None]
        (y,) = eager.evaluate([self._expr], args, (number, number))
        y = self._finish(y.expand(*self._domain.batch, m, 1, y.shape[-1]).squeeze(-2))
        y = y.squeeze(-1) if self.ndim == 1 else y
        return y.detach().numpy() if self._domain.numpy else y

    def trace(self) -> Any:
        """sum_i F_ii."""
        y = self.diag()
        return y.sum(-1 if self.ndim == 1 else -2)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same formula on converted tensors, as `torch.Tensor.to`."""
        return self._map_tensors(lambda t: t.to(*args, **kwargs))

    def float(self) -> Any:
        """In float32."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """In float64."""
        return self.to(torch.float64)

    def detach(self) -> Any:
        """Without gradients."""
        return self._map_tensors(Tensor.detach)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Any:
        leaves = tuple(v.with_data(function(v.data)) if isinstance(v.data, Tensor) else v for v in self._domain.leaves)
        return make(self._expr, self, Domain(leaves), self._complex)

    def __repr__(self) -> str:
        kind = type(self).__name__
        leaves = [f"  x{p} = {leaf}" for p, leaf in enumerate(self._domain.leaves)]
        extra = ["  with ranges"] if self._ranges is not None else []
        return "\n".join([f"{kind} of shape {self._shape}: {text_of(self._expr)}", *leaves, *extra])


classes[False] = LazyTensor
