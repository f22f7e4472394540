"""The Moore-Penrose inverse as an operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.operator import LinearOperator
from pullback.solvers.lsqr import lsqr
from pullback.solvers.spectral.decompose import SVD, safe_inverse, svd
from pullback.solvers.spectral.lowrank import LowRank, product
from pullback.solvers.spectral.space import SMALL, Flat, as_linear, has_live


class _Dense(LinearOperator):
    """y = P x for a matrix P between spaces of any shape."""

    _native = True
    _half = False

    def __init__(self, matrix: Tensor, dims: tuple[int, ...], dimsd: tuple[int, ...]) -> None:
        super().__init__(dims, dimsd)
        self.matrix = matrix

    def _forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.dims, self.dimsd, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._multiply(y, self.dimsd, self.dims, True)

    def _multiply(self, x: Tensor, dims: tuple[int, ...], dimsd: tuple[int, ...], adjoint: bool) -> Tensor:
        dtype = self._out_dtype(x.dtype, adjoint)
        matrix = self._cast(self.matrix, x).to(dtype)
        return product(x.flatten(-len(dims)).to(dtype), matrix.conj() if adjoint else matrix.mT).unflatten(-1, dimsd)


class _LSQRInverse(LinearOperator):
    """y -> argmin |x| over the minimisers of |A x - y|, to rounding, by LSQR at every application."""

    _half = False

    def __init__(self, A: LinearOperator, maxiter: int) -> None:
        super().__init__(A.dimsd, A.dims)
        self.A, self.maxiter = A, maxiter
        self._clinear, self._real_domain, self._real_range = A._clinear, A._real_range, A._real_domain
        self.__dict__["_delegates"] = False  # the derivative in y is this operator, not that of the iteration

    def _run(self, x: Tensor, adjoint: bool = False, tensors: Sequence[Tensor] | None = None) -> Tensor:
        if has_live(self.A):
            raise NotDifferentiableError(
                "pinv by lsqr has no derivative in the tensors that A holds; use method='svd', or detach them"
            )
        return super()._run(x, adjoint, tensors)

    def _forward(self, x: Tensor) -> Tensor:
        return self._solve(self.A, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._solve(self.A.H, y)

    @torch.no_grad()
    def _solve(self, A: LinearOperator, y: Tensor) -> Tensor:
        return lsqr(A, y, maxiter=self.maxiter, atol=0.0, btol=0.0, conlim=math.inf, throw=True).x

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self.A._out_dtype(dtype, not adjoint)


def pinv(
    A: Any, *, method: str = "auto", rcond: float | None = None, k: int | None = None, maxiter: int | None = None
) -> LinearOperator:
    """A^+ = sum_i v_i <u_i, .> / s_i over s_i > rcond s_1: the least-squares solution of least norm, as an operator.

    Args:
        A: LinearOperator of any shape, or its SVD.
        method: "svd", "lsqr" (solve at every application), or "auto": svd if A has at most 1024 rows and columns or k
            is given.
        rcond: singular values of this size relative to the largest count as zero; max(m, n) eps if None. (svd)
        k: use the k largest singular triples only. (svd)
        maxiter: the most iterations an application; 4 min(m, n) + 100 if None. (lsqr)

    Returns: LinearOperator A.dimsd -> A.dims with exact adjoint (to rounding times cond(A) with lsqr). With svd it is
    computed here: it does not follow later changes of the tensors that A holds, but carries gradients to those that
    require grad.
    Raises: ArgumentError. The lsqr operator raises ConvergenceError where it does not converge, and
    NotDifferentiableError if a derivative in A's tensors may be asked for.
    Cost: svd: a decomposition here, k (m + n) an application; lsqr: an application of A and A^H an iteration.
    Source: R. Penrose 1955, doi 10.1017/S0305004100030401.
    """
    if method not in ("auto", "svd", "lsqr"):
        raise ArgumentError(f"pinv: method must be 'auto', 'svd' or 'lsqr'; got {method!r}")
    if rcond is not None and not 0 <= rcond < 1:
        raise ArgumentError(f"pinv: rcond must lie in [0, 1); got {rcond!r}")
    if isinstance(A, SVD):
        return _of(A if k is None else A.truncated(k), rcond)
    A = as_linear(A, "pinv")
    if method == "lsqr" or (method == "auto" and k is None and max(A.shape) > SMALL):
        if k is not None or rcond is not None:
            raise ArgumentError("pinv: k and rcond belong to method='svd'; got one of them with 'lsqr'")
        return _LSQRInverse(A, 4 * min(A.shape) + 100 if maxiter is None else maxiter)
    if k is None and has_live(A):
        flat = Flat(A)
        if flat.real:
            raise NotDifferentiableError(
                "pinv: an operator that is linear over the reals only has no derivative in the tensors it holds; "
                "detach them"
            )
        relative = max(A.shape) * torch.finfo(flat.dtype).eps if rcond is None else rcond
        return _Dense(torch.linalg.pinv(flat.matrix(), rtol=relative), A.dimsd, A.dims)
    return _of(svd(A, k, method="auto" if k is not None else "dense"), rcond)


def _of(decomposition: SVD, rcond: float | None) -> LinearOperator:
    used = int(max(1, decomposition.rank(rcond)))
    d = decomposition.truncated(used)
    return LowRank(d.V, safe_inverse(d.S, 0.0), d.U, real=d.real)
