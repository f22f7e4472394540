"""Numbers about an operator that tell how it can be inverted: eigenvalues, rank, condition, amplification of noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.solvers.spectral.decompose import SVD, safe_inverse, svd
from pullback.solvers.spectral.inverse import pinv
from pullback.solvers.spectral.krylov import bidiagonalise
from pullback.solvers.spectral.space import SMALL, Flat, as_linear, first_order, has_live, refusal
from pullback.solvers.status import Status


@dataclass(frozen=True, eq=False)
class PowerResult:
    """An eigenpair, as `power_iteration` found it.

    Attributes:
        value: the eigenvalue, a tensor without axes.
        vector: the eigenvector of norm 1, shape A.dims.
        residual: |A v - value v|. For a Hermitian or normal operator an eigenvalue lies within it of `value`.
        iterations: how many applications of A (of A^H A with gram=True).
        status: CONVERGED, or MAXITER.
        history: the residual of every iteration.
    """

    value: Tensor
    vector: Tensor
    residual: float
    iterations: int
    status: Status
    history: tuple[float, ...]

    def __repr__(self) -> str:
        return (
            f"PowerResult(value {self.value.item():.8g}, residual {self.residual:.1e}, {self.iterations} iterations, "
            f"{self.status})"
        )


def power_iteration(
    A: Any,
    *,
    gram: bool = False,
    maxiter: int = 1000,
    rtol: float = 1e-6,
    x0: Tensor | None = None,
    seed: int = 0,
    dtype: Any = None,
    device: Any = None,
) -> PowerResult:
    """The eigenvalue t of largest magnitude: v <- A v / |A v| until |A v - t v| <= rtol |t|, t = <v, A v>.

    Args:
        A: square LinearOperator, Hermitian or normal (not verified: otherwise the residual bounds no error).
        gram: of A^H A instead, for A of any shape: the square of the largest singular value.
        maxiter: the most iterations.
        rtol: relative residual at which to stop, at least 10 eps. The error of the value of a Hermitian operator is of
            the order of its square.
        x0: starting vector of shape A.dims; random if None.
        seed: of the random start.
        dtype, device: of the vector; those of A if None. A real matrix with complex eigenvalues needs a complex dtype.

    Returns: PowerResult. It does not converge where two eigenvalues share the largest magnitude without being equal
    (+-t): `svd` does.
    Raises: ArgumentError, ShapeError.
    Derivatives: the value has its first one, Re <v, dA v>; the vector has none (NotDifferentiableError).
    Cost: one application (two with gram) an iteration, two vectors.
    Source: R. von Mises, H. Pollaczek-Geiringer 1929, doi 10.1002/zamm.19290090206.
    """
    A = as_linear(A, "power_iteration")
    if not gram and A.dims != A.dimsd:
        raise ArgumentError(
            f"power_iteration: A must map a space to itself; got {A.dims} -> {A.dimsd}; for the largest singular value "
            f"pass gram=True"
        )
    if isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 1:
        raise ArgumentError(f"power_iteration: maxiter must be an int >= 1; got {maxiter!r}")
    if not 0 <= rtol < 1:
        raise ArgumentError(f"power_iteration: rtol must lie in [0, 1); got {rtol!r}")
    flat = Flat(A, dtype, device)
    tolerance = max(rtol, 10 * torch.finfo(flat.dtype).eps)

    def apply(rows: Tensor) -> Tensor:
        y = flat.forward(rows)
        return flat.adjoint(y) if gram else y

    with torch.no_grad():
        v = flat.random(1, flat.n, torch.Generator().manual_seed(seed)) if x0 is None else _start(flat, x0)
        v = v / torch.linalg.vector_norm(v)
        history: list[float] = []
        status = Status.MAXITER
        while True:
            w = apply(v)
            value = torch.linalg.vecdot(v[0], w[0])
            history.append(float(torch.linalg.vector_norm(w - value * v)))
            if history[-1] <= tolerance * float(value.abs()):
                status = Status.CONVERGED
                break
            if len(history) == maxiter:
                break
            v = w / torch.linalg.vector_norm(w)
    if gram and value.is_complex():
        value = value.real
    if has_live(A):
        estimate = torch.linalg.vecdot(v[0], apply(v)[0])
        value = first_order(value, estimate if value.is_complex() else estimate.real, "power_iteration")
        v = refusal(v, value, "power_iteration: the components of the vector")
    return PowerResult(value, flat.vectors(v)[0], history[-1], len(history), status, tuple(history))


def _start(flat: Flat, x0: Any) -> Tensor:
    if not isinstance(x0, Tensor) or tuple(x0.shape) != flat.A.dims:
        got = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
        raise ShapeError(f"power_iteration: x0 must be a tensor of shape {flat.A.dims}; got {got}")
    if not float(torch.linalg.vector_norm(x0)) > 0:
        raise ArgumentError("power_iteration: x0 must not be zero; leave it out for a random start")
    return flat._down(x0.detach().to(flat.device)[None], flat.domain)


def rank(A: Any, rtol: float | None = None, *, max_rank: int = 1024, seed: int = 0) -> int:
    """How many singular values exceed rtol s_1.

    Args:
        A: LinearOperator, or its SVD.
        rtol: max(m, n) eps if None.
        max_rank: for operators with more than 1024 rows or columns: the largest rank that is looked for.
        seed: of the random vectors for these.

    K f = y has a solution if and only if rank of K equals that of K with the column y beside it.

    Raises: ArgumentError if the rank of a large operator exceeds max_rank.
    Cost: a dense decomposition, or for a large operator of rank r at most 4 r applications: the rank of A applied to a
    block of random vectors is that of A with probability one, once the block is larger.
    """
    if isinstance(A, SVD):
        return A.rank(rtol)
    A = as_linear(A, "rank")
    if rtol is not None and not 0 <= rtol < 1:
        raise ArgumentError(f"rank: rtol must lie in [0, 1); got {rtol!r}")
    with torch.no_grad():
        if max(A.shape) <= SMALL:
            return svd(A).rank(rtol)
        flat = Flat(A)
        relative = max(A.shape) * torch.finfo(flat.dtype).eps if rtol is None else rtol
        generator = torch.Generator().manual_seed(seed)
        sketch = flat.forward(flat.random(16, flat.n, generator))
        while True:
            basis = torch.linalg.qr(sketch.mT)[0].mT
            s = torch.linalg.svdvals(flat.adjoint(basis))  # of Q^H A, not of A Omega: sketching would blur the cut
            found = int((s > relative * s[0]).sum()) if float(s[0]) > 0 else 0
            if found < len(sketch) or len(sketch) >= min(flat.m, flat.n):
                return found
            if len(sketch) > max_rank:
                raise ArgumentError(
                    f"rank: the rank of A exceeds max_rank = {max_rank}; increase max_rank (up to {min(A.shape)})"
                )
            more = min(len(sketch), min(flat.m, flat.n) - len(sketch))
            sketch = torch.cat((basis, flat.forward(flat.random(more, flat.n, generator))))


def cond(A: Any, steps: int = 200, seed: int = 0) -> float:
    """s_max / s_min: exact for at most 1024 rows and columns; for larger operators a lower bound.

    Args:
        A: LinearOperator, or its complete SVD.
        steps: Lanczos steps for large operators; the bound, the ratio of the extreme singular values of the
            bidiagonal matrix, rises with them.
        seed: of the random start.

    Returns: inf where the smallest singular value is zero. Of a rectangular A the min(m, n) singular values count.
    Raises: ArgumentError. Cost: a dense decomposition, or `steps` applications of A and A^H and vectors of each.
    Source: Golub & Kahan 1965, doi 10.1137/0702016.
    """
    if isinstance(A, SVD):
        if not A.is_complete:
            raise ArgumentError(f"cond: the SVD must be complete; got {len(A.S)} triples; pass the operator instead")
        s = A.S
    else:
        A = as_linear(A, "cond")
        with torch.no_grad():
            if max(A.shape) <= SMALL:
                s = svd(A).S
            else:
                if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                    raise ArgumentError(f"cond: steps must be an int >= 1; got {steps!r}")
                s = bidiagonalise(Flat(A), steps, seed).ritz()[0][1]
    return float(s[0] / s[-1]) if float(s[-1]) > 0 else math.inf


def noise_amplification(
    A: Any, factors: Tensor | None = None, *, rcond: float | None = None, samples: int = 32, seed: int = 0
) -> float:
    """sqrt(sum_i (f_i / s_i)^2): the root mean square of |x_e| when white noise e of unit variance is inverted.

    Args:
        A: LinearOperator, or its SVD.
        factors: filter factors f_i as from `filter_factors`, shape (k,); if None, one for s_i > rcond s_1
            and zero below.
        rcond: see there; max(m, n) eps if None.
        samples: operators with more than 1024 rows or columns: how many noise vectors are inverted by LSQR. The
            relative error of the result is about 1 / sqrt(2 samples) at most.
        seed: of these.

    Divided by sqrt(n) it is the noise of a sample of x for unit noise on every sample of y. Complex noise:
    E |e|^2 = 1. Raises: ArgumentError, ShapeError.
    """
    with torch.no_grad():
        if not isinstance(A, SVD):
            A = as_linear(A, "noise_amplification")
            if max(A.shape) > SMALL:
                if factors is not None or rcond is not None:
                    raise ArgumentError(
                        f"noise_amplification: factors and rcond need an SVD where A is larger than {SMALL}; pass "
                        f"svd(A, k=...)"
                    )
                inverse, flat = pinv(A, method="lsqr"), Flat(A)
                noise = flat.images(flat.random(samples, flat.m, torch.Generator().manual_seed(seed)))
                squares = torch.linalg.vector_norm(inverse(noise).flatten(1), dim=1) ** 2
                return math.sqrt(float(squares.mean()) * (A.shape[0] / flat.m))
            A = svd(A)
        f = as_factors(factors, A, "noise_amplification") if factors is not None else 1.0
        gains = safe_inverse(A.S, A.cutoff(rcond) if factors is None else 0.0) * f
        return math.sqrt(float((gains**2).sum()) * noise_share(A))


def noise_share(decomposition: SVD) -> float:
    """The part of the variance of an element of y that falls on one coefficient <u_i, y>."""
    return decomposition.A.shape[0] / decomposition.n_data


def as_factors(factors: Any, decomposition: SVD, owner: str) -> Tensor:
    """Filter factors of shape (..., k), checked."""
    k = len(decomposition.S)
    if not isinstance(factors, Tensor) or not factors.ndim or factors.shape[-1] != k or factors.is_complex():
        got = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ShapeError(f"{owner}: factors must be a real tensor of shape (..., {k}), one a singular value; got {got}")
    return factors.to(decomposition.S)
