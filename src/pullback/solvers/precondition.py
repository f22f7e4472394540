"""Preconditioners: operators close to the inverse of A, as `cg`, `minres`, `gmres` and `bicgstab` take them.

Their tensors are constants of the derivative: implicit derivatives are those of the solution, which does not depend on
the preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core import autograd
from pullback.core.algebra import Adjoint
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.interop import as_tensor, device_of, is_scalar
from pullback.core.operator import LinearOperator, OperatorLike
from pullback.core.spectrum import probe_dtype
from pullback.linops import Diagonal, MatrixMult

Apply = Callable[[Tensor], Tensor]

_PROBED = 4096  # a diagonal of up to this size is found by unit vectors
_CHUNK = 1 << 22  # elements of unit vectors at a time


# What solvers do with them ------------------------------------------------------------------------------------------


def as_preconditioner(owner: str, value: Any, dims: tuple[int, ...]) -> Any:
    """None, a LinearOperator on `dims`, or a function on tensors of shape (..., *dims)."""
    value = value.operator() if isinstance(value, OperatorLike) else value
    if isinstance(value, LinearOperator) and (value.dims != dims or value.dimsd != dims):
        raise ShapeError(
            f"{owner}: preconditioner must map {dims} to {dims}, as A does; got {value.dims} -> {value.dimsd}"
        )
    if value is not None and not callable(value):
        raise ArgumentError(
            f"{owner}: preconditioner must be a LinearOperator close to the inverse of A; got {type(value).__name__}"
        )
    return value


def applied(preconditioner: Any) -> Apply | None:
    """The function r -> P r, whose result never lies in the memory of r."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, LinearOperator):
        return preconditioner if preconditioner._aliases else preconditioner._run

    def function(r: Tensor) -> Tensor:
        z: Tensor = preconditioner(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            came = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ShapeError(f"preconditioner: expected a tensor of shape {tuple(r.shape)}, as its input; got {came}")
        return z.clone() if r is z or (autograd.is_eager(z) and _shares(z, r)) else z

    return function


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def for_derivatives(solver: Any, preconditioner: Any) -> Any:
    """The solver of the linear systems behind implicit derivatives: with P for J, P^H for J^H.

    Without P where it is a function, or made inside torch.func: its numbers belong to the caller's transform.
    """
    if not isinstance(preconditioner, LinearOperator) or any(
        autograd.is_live(t.detach()) or not autograd.is_eager(t.detach())
        for t in (*preconditioner.parameters(), *preconditioner.buffers())
    ):
        return solver

    def linear(J: LinearOperator, g: Tensor, **options: Any) -> Any:
        P = preconditioner.H if isinstance(J, Adjoint) else preconditioner
        return solver(J, g, preconditioner=P if J.dims == P.dims else _paired(P), **options)

    return linear


def _paired(P: LinearOperator) -> Apply:
    """P on complex numbers that are given as pairs of real ones."""
    return lambda v: torch.view_as_real(P(torch.view_as_complex(v.contiguous())).resolve_conj())


# The operators ------------------------------------------------------------------------------------------------------


class JacobiPreconditioner(LinearOperator):
    """P r = r / (diag A + damp).

    Args:
        A: square LinearOperator.
        damp: what the solver adds to the diagonal.
        diagonal: diag A of shape A.dims, if it is known. Else it is read off a `Diagonal` or a `MatrixMult`; otherwise
            found by unit vectors, for up to 4096 unknowns.
        probes: estimate the diagonal from so many applications to random signs, for more unknowns.
        positive: take |diag A + damp|, as `minres` needs for an indefinite A.
        seed: of the signs.

    Entries below eps times the largest one count as 1. No gradient flows into A.

    Raises: ArgumentError, ShapeError. Cost: one product an element; n (or `probes`) applications of A at the start.
    Source: estimate: Bekas, Kokiopoulou & Saad 2007, doi 10.1016/j.apnum.2007.01.003.
    """

    _native = True

    def __init__(
        self,
        A: Any,
        damp: Any = 0.0,
        *,
        diagonal: Any = None,
        probes: int | None = None,
        positive: bool = False,
        seed: int = 0,
    ) -> None:
        A = _square("JacobiPreconditioner", A)
        super().__init__(A.dims)
        shift = _shift("JacobiPreconditioner", damp)
        if probes is not None and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
            raise ArgumentError(f"JacobiPreconditioner: probes must be an int >= 1; got {probes!r}")
        with torch.no_grad():
            if diagonal is None:
                d = _diagonal(A, probes, seed)
            else:
                d = as_tensor(diagonal, "diagonal", "JacobiPreconditioner").detach()
                if tuple(d.shape) != A.dims:
                    raise ShapeError(f"JacobiPreconditioner: diagonal must have shape {A.dims}; got {tuple(d.shape)}")
            d = d + shift
            magnitude = d.abs()
            d = magnitude if positive else d
            tiny = magnitude <= torch.finfo(d.dtype).eps * magnitude.max()
            self.inverse = 1 / torch.where(tiny, 1, d)

    def _forward(self, x: Tensor) -> Tensor:
        return x * self._cast(self.inverse, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return y * self._cast(self.inverse, y).conj()

    def _norm_bound(self) -> float:
        return float(self.inverse.detach().abs().max())

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """From a matrix, complex and shifted, given, estimated."""
        m = torch.randn(4, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
        yield cls(MatrixMult(m.real))
        yield cls(MatrixMult(m), 0.3)
        yield cls(MatrixMult(m), diagonal=m.diagonal().real.abs())
        yield cls(MatrixMult(m.mH @ m).H @ MatrixMult(m), probes=3, positive=True)


class CirculantPreconditioner(LinearOperator):
    """P r = F^-1 (F r / (s + damp)), the inverse of the circulant operator that acts as A does in the centre.

    s is the discrete Fourier transform, along all axes, of A's response to a unit impulse in the centre: one
    application. Good where A is nearly translation-invariant: deblurring, Toeplitz, tomographic A^H A.

    Args:
        A: square LinearOperator.
        damp: what the solver adds to the diagonal.
        floor: parts of s + damp that are smaller than floor times the largest one are raised to that.
        positive: A is Hermitian positive semi-definite (not verified): s is taken as real and >= 0, so that P is
            Hermitian positive definite as `cg` needs. False: the complex s, for `gmres` and `bicgstab`.

    No gradient flows into A.

    Raises: ArgumentError. Cost: two Fourier transforms. Source: Strang 1986, doi 10.1002/sapm1986742171.
    """

    _native = True
    _half = False

    def __init__(self, A: Any, damp: Any = 0.0, *, floor: float = 1e-3, positive: bool = True) -> None:
        A = _square("CirculantPreconditioner", A)
        super().__init__(A.dims)
        shift = _shift("CirculantPreconditioner", damp)
        if not (is_scalar(floor) and 0 < floor <= 1):
            raise ArgumentError(f"CirculantPreconditioner: floor must be a number in (0, 1]; got {floor!r}")
        with torch.no_grad():
            centre = tuple(n // 2 for n in self.dims)
            impulse = torch.zeros(self.dims, dtype=probe_dtype(A), device=device_of(A))
            impulse[centre] = 1
            response = A(impulse).roll([-c for c in centre], list(range(len(centre))))
            s = torch.fft.fftn(response)
            s = s.real.clamp(min=0) + shift if positive else s + shift
            magnitude = s.abs()
            least = floor * magnitude.max()
            if positive:
                s = s.clamp(min=least)
            else:
                s = torch.where(magnitude < least, torch.where(magnitude > 0, s / magnitude, 1) * least, s)
            # Held as an impulse response, which is real where A is.
            kernel = torch.fft.ifftn(1 / s)
            self.kernel = kernel if response.is_complex() else kernel.real.clone()

    def _filter(self, x: Tensor, adjoint: bool) -> Tensor:
        axes = tuple(range(-len(self.dims), 0))
        kernel = self._cast(self.kernel, x)
        spectrum = self._cached("spectrum", kernel, torch.fft.fftn)
        y = torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * (spectrum.conj() if adjoint else spectrum), dim=axes)
        return y if x.is_complex() or kernel.is_complex() else y.real.contiguous()

    def _forward(self, x: Tensor) -> Tensor:
        return self._filter(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, True)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Toeplitz, complex and not Hermitian, an image."""
        i = torch.arange(6)
        decay = 0.5 ** (i[:, None] - i).abs().double()
        yield cls(MatrixMult(decay), 0.1)
        yield cls(MatrixMult(decay.triu() * (1 + 0.5j)), positive=False)
        yield cls(Diagonal(torch.ones(3, 4, dtype=torch.float64)), 0.5)


class NystromPreconditioner(LinearOperator):
    """P r = U (l + damp) / (L + damp) U^H r + (r - U U^H r), where U L U^H is a randomised approximation of A.

    Good where the eigenvalues of A fall fast: with a rank of twice the effective dimension tr A (A + damp)^-1 the
    condition number of the preconditioned system is at most 28 in expectation.

    Args:
        A: square LinearOperator, Hermitian positive semi-definite (not verified).
        damp: what the solver adds to the diagonal.
        rank: columns of U.
        seed: of the random test matrix.

    l is the smallest entry of L. No gradient flows into A.

    Raises: ArgumentError. Cost: `rank` applications of A and O(n rank^2) at the start; then 4 n rank operations.
    Source: Frangella, Tropp & Udell 2023, doi 10.1137/21M1466244, algorithm 2.1 and section 5.
    """

    _native = True

    def __init__(self, A: Any, damp: Any, rank: int = 50, seed: int = 0) -> None:
        A = _square("NystromPreconditioner", A)
        super().__init__(A.dims)
        shift = _shift("NystromPreconditioner", damp)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ArgumentError(f"NystromPreconditioner: rank must be an int >= 1; got {rank!r}")
        with torch.no_grad():
            values, self.U = _nystrom(A, min(rank, A.shape[0]), seed)
            bottom = values + shift
            bottom = bottom.clamp(min=torch.finfo(values.dtype).eps * bottom.max())
            self.change = bottom[-1] / bottom - 1

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.dims)]
        U = self._cast(self.U, x)
        dtype = torch.promote_types(x.dtype, U.dtype)
        flat, U = x.reshape(*batch, 1, -1).to(dtype), U.to(dtype)
        inner = flat @ U.conj()
        y = flat + (inner * self._cast(self.change, x)) @ U.mT
        return y.reshape(*batch, *self.dims)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Real, complex, of full rank, an image."""
        m = torch.randn(6, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
        yield cls(MatrixMult(m.real.mT @ m.real), 0.1, rank=3)
        yield cls(MatrixMult(m.mH @ m), 0.1, rank=6)
        yield cls(Diagonal(torch.arange(6, dtype=torch.float64).reshape(2, 3)), 0.5, rank=2)


def _nystrom(A: LinearOperator, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues, falling, of shape (rank,), and eigenvectors, (n, rank)."""
    n, dtype = A.shape[0], probe_dtype(A)
    test = torch.linalg.qr(_normal((n, rank), seed, dtype, device_of(A))).Q
    image = A(test.mT.reshape(rank, *A.dims)).reshape(rank, n).mT
    # The shift keeps the small matrix positive definite in spite of rounding; it is taken off at the end.
    shift = torch.finfo(image.dtype).eps * n**0.5 * torch.linalg.matrix_norm(image)
    image = image + shift * test
    core = test.mH @ image
    values, vectors = torch.linalg.eigh((core + core.mH) / 2)
    half = image @ (vectors * values.clamp(min=shift).rsqrt())
    U, s, _ = torch.linalg.svd(half, full_matrices=False)
    return (s.square() - shift).clamp(min=0), U


def _normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, not drawn by torch, whose generators refuse to work within vmap."""
    draw = np.random.default_rng(seed).standard_normal((*shape, 2) if dtype.is_complex else shape)
    t = torch.from_numpy(draw)
    return (torch.view_as_complex(t) if dtype.is_complex else t).to(device=device, dtype=dtype)


def _square(owner: str, A: Any) -> LinearOperator:
    A = A.operator() if isinstance(A, OperatorLike) else A
    if not isinstance(A, LinearOperator):
        raise ArgumentError(f"{owner}: A must be a pullback.LinearOperator; got {type(A).__name__}")
    if A.dims != A.dimsd:
        raise ArgumentError(
            f"{owner}: A must be square; got dims {A.dims} and dimsd {A.dimsd}; for least squares give A.H @ A"
        )
    return A


def _shift(owner: str, damp: Any) -> Any:
    if isinstance(damp, Tensor) and damp.ndim == 0 and not damp.is_complex():
        return damp.detach()
    if not (is_scalar(damp) and not isinstance(damp, complex) and float(damp) >= 0):
        raise ArgumentError(f"{owner}: damp must be one number >= 0; got {damp!r}")
    return float(damp)


def _diagonal(A: LinearOperator, probes: int | None, seed: int) -> Tensor:
    """The diagonal of A, of shape A.dims."""
    if isinstance(A, Diagonal):
        return A.diag.detach().expand(A.dims)
    if isinstance(A, MatrixMult) and not A.is_sparse:
        d = A.A.detach().diagonal()
        return d.reshape(-1, *(1,) * (len(A.dims) - 1)).expand(A.dims)
    n, dtype, device = A.shape[0], probe_dtype(A), device_of(A)
    if probes is not None:
        z = _normal((probes, *A.dims), seed, torch.float64, device).sign().to(dtype)
        return (z * A(z)).mean(0)
    if n > _PROBED:
        raise ArgumentError(
            f"JacobiPreconditioner: the diagonal of {type(A).__name__} with {n} > {_PROBED} unknowns would cost {n} "
            f"applications; give diagonal=..., or probes=100 for an estimate"
        )
    step = max(1, _CHUNK // n)
    found = []
    for start in range(0, n, step):
        rows = torch.arange(start, min(n, start + step), device=device)
        units = torch.zeros(len(rows), n, dtype=dtype, device=device)
        units[rows - start, rows] = 1
        found.append(A(units.reshape(-1, *A.dims)).reshape(-1, n)[rows - start, rows])
    return torch.cat(found).reshape(A.dims)
