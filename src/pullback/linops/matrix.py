"""Matrices as operators, dense and sparse."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core import autograd
from pullback.core.errors import ArgumentError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_dims, size

_ONEDNN_PRODUCTS = 2_000_000


class MatrixMult(LinearOperator):
    """y = A x for a matrix A, dense or sparse.

    Args:
        A: tensor or array of shape (m, n), `scipy.sparse` matrix or torch sparse tensor. If its values require grad,
            they get their gradient.
        otherdims: further axes of x, on which the matrix acts column by column: x has shape (..., n, *otherdims).
        dtype: what `.dtype` reports.

    Raises: ArgumentError. Cost: m n (or the number of non-zeros) for each column; a batch is one matrix product.
    """

    def __init__(self, A: Any, otherdims: Dims | None = None, *, dtype: Any = None) -> None:
        sparse = _sparse_parts(A)
        matrix = as_tensor(A, "A", "MatrixMult") if sparse is None else None
        shape = tuple(matrix.shape) if matrix is not None else tuple(A.shape)
        if len(shape) != 2 or 0 in shape:
            raise ArgumentError(f"MatrixMult: A must be a matrix with at least one row and column; got shape {shape}")
        other = () if otherdims is None else as_dims(otherdims, "otherdims", "MatrixMult")
        m, n = shape
        super().__init__((n, *other), (m, *other), dtype=dtype)
        self.is_sparse = sparse is not None
        self._native = not self.is_sparse  # type: ignore[misc]
        self._half = not self.is_sparse  # type: ignore[misc]
        if matrix is not None:
            self.A = matrix
        else:
            assert sparse is not None
            self.values, self.rows, self.columns = sparse

    def _run(self, x: Tensor, adjoint: bool = False, tensors: Sequence[Tensor] | None = None) -> Tensor:
        # oneDNN's product has no autograd formula: where it serves, the bridge goes around it.
        if tensors is None and not self.is_sparse and len(self.dims) == 1 and _is_onednn(x, self.A):
            tensors = self._held()
        return super()._run(x, adjoint, tensors)

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply_matrix(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply_matrix(y, True)

    def _apply_matrix(self, x: Tensor, adjoint: bool) -> Tensor:
        values = self._cast(self.values if self.is_sparse else self.A, x)
        if x.is_complex() and not values.is_complex():
            parts = torch.view_as_real(x.resolve_conj())  # (..., n, *other, 2): a real matrix acts on both parts
            y = self._multiply(parts, values, adjoint, len(self.dims) + 1)
            return torch.view_as_complex(y.contiguous())
        return self._multiply(x.to(values.dtype), values, adjoint, len(self.dims))

    def _multiply(self, x: Tensor, values: Tensor, adjoint: bool, n_axes: int) -> Tensor:
        """The matrix on the first of the last `n_axes` axes."""
        product = self._multiply_sparse if self.is_sparse else self._multiply_dense
        rows_out = self.dims[0] if adjoint else self.dimsd[0]
        if n_axes == 1:
            if not self.is_sparse:
                return _dense_rows(x, values, adjoint)
            return product(x.reshape(-1, x.shape[-1]).T, values, adjoint).T.reshape(*x.shape[:-1], rows_out)
        other = x.shape[x.ndim - n_axes + 1 :]
        flat = x.reshape(*x.shape[: x.ndim - n_axes], x.shape[x.ndim - n_axes], size(other))
        return product(flat, values, adjoint).reshape(*x.shape[: x.ndim - n_axes], rows_out, *other)

    @staticmethod
    def _multiply_dense(x: Tensor, A: Tensor, adjoint: bool) -> Tensor:
        return torch.matmul(A.mH if adjoint else A, x)

    def _multiply_sparse(self, x: Tensor, values: Tensor, adjoint: bool) -> Tensor:
        """Sparse matrix times x of shape (..., n, k)."""
        rows, columns = (self.columns, self.rows) if adjoint else (self.rows, self.columns)
        m, n = (self.dims[0], self.dimsd[0]) if adjoint else (self.dimsd[0], self.dims[0])
        if self._is_live() or torch.compiler.is_compiling():
            terms = x.index_select(-2, columns) * (values.conj() if adjoint else values).unsqueeze(-1)
            return terms.new_zeros(*x.shape[:-2], m, x.shape[-1]).index_add(-2, rows, terms)
        matrix = self._cached(("csr", adjoint), values, lambda v: _csr(rows, columns, v.conj() if adjoint else v, m, n))
        if x.ndim == 2:
            return matrix @ x
        folded = x.movedim(-2, 0).reshape(n, -1)
        return (matrix @ folded).reshape(m, *x.shape[:-2], x.shape[-1]).movedim(0, -2)

    def inv(self) -> MatrixMult:
        """The operator of the inverse matrix. Raises: ArgumentError if A is sparse or not square."""
        if self.is_sparse or self.shape[0] != self.shape[1]:
            raise ArgumentError(
                f"MatrixMult.inv needs a dense square matrix; got {'sparse' if self.is_sparse else 'dense'} "
                f"{self.shape}; "
                f"solve with pullback.lsqr instead"
            )
        return MatrixMult(torch.linalg.inv(self.A), self.dims[1:] or None)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Dense, complex, with gradient, further axes, sparse."""
        g = torch.Generator().manual_seed(0)
        real = torch.randn(4, 3, dtype=torch.float64, generator=g)
        yield cls(real)
        yield cls(torch.randn(3, 5, dtype=torch.complex128, generator=g))
        yield cls(real.clone().requires_grad_(), otherdims=(2, 2))
        masked = (real * (real > 0)).to_sparse()
        yield cls(masked)
        yield cls((real * (1 + 1j) * (real > 0)).to_sparse(), otherdims=2)
        yield cls(masked.clone().requires_grad_())


def _is_onednn(x: Tensor, A: Tensor) -> bool:
    """Whether oneDNN multiplies x of shape (..., n) with A: from 4 rows and 2 million products on, in float32 on a CPU.

    torch's own float32 product (MKL) takes 2 to 3 times as long there on an AMD CPU with AVX-512 (measured for 256^2 to
    4000^2 and 4 to 256 rows); below it the call itself, 10 us, costs more.
    """
    return (
        x.dtype == A.dtype == torch.float32
        and x.numel() >= 4 * x.shape[-1]
        and x.numel() * A.numel() >= _ONEDNN_PRODUCTS * x.shape[-1]
        and A.device.type == x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not autograd.is_live(A)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _dense_rows(x: Tensor, A: Tensor, adjoint: bool) -> Tensor:
    if _is_onednn(x, A) and not autograd.is_live(x):
        product = torch.ops.mkldnn._linear_pointwise
        rows = x.reshape(-1, x.shape[-1])
        if adjoint:
            return product(x.contiguous(), A.T, None, "none", [], "")
        if 12 <= len(rows) <= 64:  # here (A x^T)^T is faster by up to a third
            return product(A, rows.contiguous(), None, "none", [], "").T.reshape(*x.shape[:-1], len(A)).contiguous()
        return product(x.contiguous(), A, None, "none", [], "")
    if x.ndim == 1:  # not `linear`: torch's older vmap, which gradcheck uses, gives its batched tangent a wrong shape
        return torch.mv(A.mH if adjoint else A, x)
    return torch.matmul(x, A.conj()) if adjoint else torch.nn.functional.linear(x, A)


def _csr(rows: Tensor, columns: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    # Not by way of a COO tensor: its coalesce() would make the host wait for a GPU. No index occurs twice.
    order = torch.argsort(rows * n + columns)
    starts = torch.searchsorted(rows[order], torch.arange(m + 1, device=rows.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR layout beta
        return torch.sparse_csr_tensor(
            starts, columns[order], values.resolve_conj()[order], (m, n), check_invariants=False
        )


def _sparse_parts(A: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """(values, rows, columns) of a sparse matrix of torch or SciPy; None for anything else."""
    if isinstance(A, Tensor):
        if A.layout == torch.strided:
            return None
        coo = (A if A.layout == torch.sparse_coo else A.to_sparse_coo()).coalesce()
        rows, columns = coo.indices().clone()
        return coo.values().clone(), rows.clone(), columns.clone()  # copies: a view of a sparse tensor cannot be traced
    if hasattr(A, "tocoo"):
        c = A.tocoo(copy=True)
        c.sum_duplicates()
        return as_tensor(c.data, "A", "MatrixMult"), torch.from_numpy(c.row).long(), torch.from_numpy(c.col).long()
    return None
