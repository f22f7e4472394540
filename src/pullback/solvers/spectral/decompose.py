"""Singular value decomposition of operators: dense, by Lanczos, by random sketches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import size
from pullback.solvers.spectral.krylov import lanczos, randomized
from pullback.solvers.spectral.lowrank import LowRank, coefficients, combine
from pullback.solvers.spectral.space import SMALL, Flat, as_linear, first_order, has_live, refusal
from pullback.solvers.status import Status

_METHODS = ("auto", "dense", "lanczos", "randomized")


@dataclass(frozen=True, eq=False)
class SVD:
    """A = sum_i s_i u_i <v_i, .>, or its first k terms: A v_i = s_i u_i and A^H u_i = s_i v_i.

    Attributes:
        U: u_i = U[i], shape (k, *A.dimsd). (Leading axes are the batch everywhere, so A(V) = S[:, None] * U; the matrix
            whose columns are the u_i is U.T.)
        S: s_1 >= s_2 >= ... >= 0, shape (k,).
        V: v_i = V[i], shape (k, *A.dims), not conjugated.
        method: what ran.
        residuals: sqrt(|A v_i - s_i u_i|^2 + |A^H u_i - s_i v_i|^2) as measured, shape (k,). Some singular value lies
            within it of s_i.
        status: CONVERGED, or MAXITER if the residuals exceed what was asked for.
        A: the operator.
        real: the inner products are real parts, as A is linear over the reals only or has a real space.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    method: str
    residuals: Tensor
    status: Status
    A: LinearOperator
    real: bool

    def operator(self) -> LowRank:
        """sum_i s_i u_i <v_i, .> as a LinearOperator."""
        return LowRank(self.U, self.S, self.V, real=self.real)

    def truncated(self, k: int) -> SVD:
        """The first k triples. Raises: ArgumentError."""
        if not 1 <= k <= len(self.S):
            raise ArgumentError(f"SVD.truncated: k must lie in [1, {len(self.S)}]; got {k}")
        return SVD(
            self.U[:k], self.S[:k], self.V[:k], self.method, self.residuals[:k], self.status, self.A, self.real
        )  # fmt: skip

    def coefficients(self, y: Tensor) -> Tensor:
        """<u_i, y> for y of shape (..., *A.dimsd): shape (..., k)."""
        return coefficients(self.U, y, self.real)

    def combine(self, c: Tensor) -> Tensor:
        """sum_i c_i v_i for c of shape (..., k): shape (..., *A.dims)."""
        return combine(c, self.V)

    def rank(self, rtol: float | None = None) -> int:
        """How many s_i exceed rtol s_1; rtol is max(m, n) eps if None."""
        s = self.S.detach()
        return int((s > self.cutoff(rtol) * s[0]).sum()) if float(s[0]) > 0 else 0

    def cutoff(self, rtol: float | None = None) -> float:
        """The relative size below which a singular value counts as zero."""
        return max(self.A.shape) * torch.finfo(self.S.dtype).eps if rtol is None else float(rtol)

    @property
    def n_data(self) -> int:
        """How many numbers y holds, a complex one counting as two where `real`."""
        return size(self.A.dimsd) * (2 if self.real and self.U.is_complex() else 1)

    @property
    def is_complete(self) -> bool:
        """Whether no singular triple is missing."""
        n_x = size(self.A.dims) * (2 if self.real and self.V.is_complex() else 1)
        return len(self.S) == min(self.n_data, n_x)

    def __repr__(self) -> str:
        m, n = self.A.shape
        first, last = float(self.S[0].detach()), float(self.S[-1].detach())
        worst = float(self.residuals.max())
        return (
            f"SVD({len(self.S)} of {m}x{n}, s {first:.4g} ... {last:.4g}, residuals <= {worst:.1e}, {self.method}, "
            f"{self.status.name})"
        )


def svd(
    A: Any,
    k: int | None = None,
    *,
    method: str = "auto",
    rtol: float | None = None,
    maxiter: int = 300,
    oversample: int = 10,
    power: int = 2,
    seed: int = 0,
    dtype: Any = None,
    device: Any = None,
) -> SVD:
    """A v_i = s_i u_i, A^H u_i = s_i v_i: the k largest singular triples of an operator.

    Args:
        A: LinearOperator of any shape.
        k: how many; all if None (dense only).
        method: "dense" (torch, through A's matrix), "lanczos", "randomized", or "auto": dense if A has at most 1024
            rows and columns, else lanczos.
        rtol: lanczos stops when every |A^H u_i - s_i v_i| <= rtol s_1; eps^(3/4) if None.
        maxiter: lanczos: the most cycles of about k + 20 steps.
        oversample, power: randomized: further random vectors, and power iterations with A A^H, each of which multiplies
            the exponent of unwanted singular values by about two. Its accuracy is what `residuals` say.
        seed: of the random starting vectors.
        dtype: of the vectors; that of A if None.
        device: where to compute; that of A's tensors if None.

    Returns: SVD. Operators that are linear over the reals only are decomposed over the reals, with up to twice as many
    triples.
    Raises: ArgumentError.
    Derivatives in what A holds: dense, those of torch.linalg.svd (none for U and V at equal singular values). Otherwise
    S has first derivatives, ds_i = Re <u_i, dA v_i>; asking for those of U and V raises NotDifferentiableError.
    Cost: dense n applications and O(m n min(m, n)); lanczos 2 k + 20 vectors of each kind and at most as many
    applications a cycle, with full reorthogonalisation; randomized (2 power + 2) (k + oversample) applications.
    Source: Baglama & Reichel 2005, doi 10.1137/04060593X; Halko, Martinsson, Tropp 2011, doi 10.1137/090771806.
    """
    A = as_linear(A, "svd")
    if method not in _METHODS:
        raise ArgumentError(f"svd: method must be one of {', '.join(_METHODS)}; got {method!r}")
    flat = Flat(A, dtype, device)
    most = min(flat.m, flat.n)
    small = max(A.shape) <= SMALL
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most):
        raise ArgumentError(f"svd: k must be an int in [1, {most}]; got {k!r}")
    if k is None and (method in ("lanczos", "randomized") or (method == "auto" and not small)):
        raise ArgumentError(
            f"svd: k must be given for {f'an operator of shape {A.shape}' if method == 'auto' else repr(method)}; ask "
            f"for the k largest triples, or for all with method='dense'"
        )
    if rtol is not None and not 0 < rtol < 1:
        raise ArgumentError(f"svd: rtol must lie in (0, 1); got {rtol!r}")
    if min(maxiter, oversample + 1, power + 1) < 1:
        raise ArgumentError(
            f"svd: maxiter must be >= 1, oversample and power >= 0; got {maxiter}, {oversample}, {power}"
        )
    if method == "auto":
        method = "dense" if small else "lanczos"
    count = most if k is None else k
    if method == "dense":
        left, S, right = torch.linalg.svd(flat.matrix(), full_matrices=False)
        U, S, V = left.mT[:count], S[:count], right.conj().resolve_conj()[:count]
        return _result(flat, U, S, V, method, Status.CONVERGED)
    status = Status.CONVERGED
    with torch.no_grad():
        if method == "lanczos":
            tolerance = torch.finfo(flat.dtype).eps ** 0.75 if rtol is None else rtol
            (U, S, V), cycles, converged = lanczos(flat, count, tolerance, maxiter, seed)
            status = Status.CONVERGED if converged else Status.MAXITER
            method = f"lanczos, {cycles} cycles"
        else:
            U, S, V = randomized(flat, count, oversample, power, seed)
            method = f"randomized, {power} power iterations"
    return _result(flat, U, S, V, method, status, live=has_live(A))


def _result(flat: Flat, U: Tensor, S: Tensor, V: Tensor, method: str, status: Status, live: bool = False) -> SVD:
    with torch.no_grad():
        forward = flat.forward(V) - S[:, None] * U
        adjoint = flat.adjoint(U) - S[:, None] * V
        residuals = torch.hypot(torch.linalg.vector_norm(forward, dim=1), torch.linalg.vector_norm(adjoint, dim=1))
    if live:
        estimate = (U.conj() * flat.forward(V)).sum(1)
        S = first_order(S, estimate.real if estimate.is_complex() else estimate, f"svd by {method}")
        U, V = (refusal(t, S, f"svd by {method}: singular vectors") for t in (U, V))
    return SVD(flat.images(U), S, flat.vectors(V), method, residuals, status, flat.A, flat.real)


def as_svd(A: Any, owner: str) -> SVD:
    """A decomposition as it is, a small operator decomposed. Raises: ArgumentError for a large one."""
    if isinstance(A, SVD):
        return A
    A = as_linear(A, owner)
    if max(A.shape) > SMALL:
        raise ArgumentError(
            f"{owner}: A of shape {A.shape} is too large for a dense decomposition (over {SMALL}); pass "
            f"svd(A, k=...) with as many triples as you need"
        )
    return svd(A)


def safe_inverse(s: Tensor, rtol: float) -> Tensor:
    """1 / s_i, and 0 where s_i <= rtol s_1."""
    used = s > rtol * s.detach().max() if s.numel() else s > math.inf
    return torch.where(used, 1 / torch.where(used, s, 1), 0)
