"""|A x - y|^2 + alpha^2 |L x|^2 for every alpha at once: by a generalised decomposition, or solve by solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.functionals.arithmetic import lift
from pullback.linops.stack import VStack
from pullback.solvers.lsqr import lsqr
from pullback.solvers.problem import Problem
from pullback.solvers.spectral.decompose import SVD
from pullback.solvers.spectral.filters import cast, project
from pullback.solvers.spectral.lowrank import combine
from pullback.solvers.spectral.numbers import noise_share
from pullback.solvers.spectral.space import Flat
from pullback.solvers.status import Solution, Status


@dataclass(frozen=True)
class Point:
    """What a choice of alpha gives: |A x - y|, |L x|, and n_data - trace(A (A^H A + alpha^2 L^H L)^-1 A^H)."""

    residual: Tensor
    seminorm: Tensor
    free: Tensor


class Family(Protocol):
    """The solutions for all alpha.

    Attributes:
        n_data: the trace of the identity on y. share: the part of the variance of an element of y in one of them.
        low, high: between them alpha matters.
    """

    n_data: int
    share: float
    low: float
    high: float

    def evaluate(self, alpha: Tensor, free: bool) -> Point:
        """The point of each member for alpha that broadcasts against the batch; `free` is not needed otherwise."""


@dataclass(frozen=True, eq=False)
class Modes:
    """x = sum_i c_i / (c_i^2 + alpha^2 s_i^2) <u_i, y> x_i, where A x_i = c_i u_i and L x_i = s_i w_i (w orthonormal).

    Attributes:
        c, s: generalised singular values, shape (r,).
        X: x_i = X[i], shape (r, *dims).
        beta: <u_i, y>, shape (*batch, r).
        distance2: the squared distance of y to the span of the u_i, shape (*batch).
        n_data, share: see `Family`.
    """

    c: Tensor
    s: Tensor
    X: Tensor
    beta: Tensor
    distance2: Tensor
    n_data: int
    share: float

    def solution(self, alpha: Tensor) -> Tensor:
        """The solution x for alpha of shape () or (*batch)."""
        total = self.c**2 + (alpha[..., None] * self.s) ** 2
        gain = torch.where(total > 0, self.c / torch.where(total > 0, total, 1), 0)
        return combine(self.beta * gain, self.X)

    def evaluate(self, alpha: Tensor, free: bool = True) -> Point:
        """See `Family`. 1 - f_i = alpha^2 s_i^2 / (c_i^2 + alpha^2 s_i^2) is formed without cancellation."""
        weighted = (alpha[..., None] * self.s) ** 2
        total = (self.c**2 + weighted).clamp(min=torch.finfo(self.c.dtype).tiny)
        missing, power = weighted / total, self.beta.abs() ** 2
        residual2 = self.distance2 + (missing**2 * power).sum(-1)
        seminorm2 = ((self.s * self.c / total) ** 2 * power).sum(-1)
        return Point(residual2.sqrt(), seminorm2.sqrt(), missing.sum(-1) + (self.n_data - len(self.c)))

    def curvature(self, alpha: Tensor) -> Tensor:
        """That of (log |A x - y|, log |L x|) as alpha grows, positive where the curve turns at its corner.

        From d rho / d alpha = -alpha^2 d eta / d alpha with rho = |A x - y|^2, eta = |L x|^2. (Equation 18 of Hansen
        2000, "The L-curve and its use in the numerical treatment of inverse problems", where alpha^2 eta^2 must be
        alpha^4 eta^2.)
        """
        total = (self.c**2 + (alpha[..., None] * self.s) ** 2).clamp(min=torch.finfo(self.c.dtype).tiny)
        power = self.beta.abs() ** 2
        point = self.evaluate(alpha)
        rho, eta = point.residual**2, point.seminorm**2
        slope = -4 * alpha * (self.s**4 * self.c**2 / total**3 * power).sum(-1)
        shape = alpha**2 * slope * rho + 2 * alpha * eta * rho + alpha**4 * eta * slope
        size = (alpha**4 * eta**2 + rho**2) ** 1.5
        fine = (slope < 0) & (size > 0)
        return torch.where(fine, -2 * eta * rho * shape / torch.where(fine, slope * size, 1), 0)

    @property
    def low(self) -> float:
        """Below a tenth of the smallest c_i / s_i that stands above rounding nothing changes any more."""
        ratios = self._ratios()
        return float(ratios.min()) / 10 if ratios.numel() else 1e-10

    @property
    def high(self) -> float:
        """Above ten times the largest c_i / s_i neither."""
        ratios = self._ratios()
        return float(ratios.max()) * 10 if ratios.numel() else 1.0

    def _ratios(self) -> Tensor:
        floor = 10 * len(self.c) * torch.finfo(self.c.dtype).eps
        used = (self.c > floor * self.c.max()) & (self.s > floor * self.s.max())
        return self.c[used] / self.s[used]


def svd_modes(problem: Problem, svd: SVD) -> Modes:
    """Those of L = identity."""
    beta, distance2 = project(problem, svd)
    S = cast(svd.S, problem.y)
    return Modes(S, torch.ones_like(S), cast(svd.V, problem.y), beta, distance2, svd.n_data, noise_share(svd))


def dense_pair(A: LinearOperator, L: LinearOperator, y: Tensor) -> tuple[Flat, Tensor, Tensor]:
    """A with the matrices of A and L in common terms: both complex, both real, or both over the reals."""
    flats = [Flat(op, None, y.device) for op in (A, L)]
    if flats[0].real or flats[1].real:
        domain = torch.promote_types(flats[0].domain, flats[1].domain)
        flats = [Flat(op, domain, y.device, real=True) for op in (A, L)]
    dtype = torch.promote_types(flats[0].dtype, flats[1].dtype)
    if flats[0].n != flats[1].n:
        raise ArgumentError(
            "tikhonov: A and L must both act on real or both on complex vectors; got one of each; compose one with Real"
        )
    a, ell = (f.matrix().to(dtype) for f in flats)
    return flats[0], a, ell


def general_modes(problem: Problem, A: LinearOperator, L: LinearOperator) -> Modes:
    """By QR of (A; L) = (Q_A; Q_L) R and the SVD Q_A = U C W^H: then x_i = R^-1 w_i and s_i = |Q_L w_i|.

    A generalised SVD (Paige & Saunders 1981, doi 10.1137/0718026) for A and L that share no null space.
    """
    with torch.no_grad():
        flat, a, ell = dense_pair(A, L, problem.y)
        if len(a) + len(ell) < a.shape[1]:
            raise _shared()
        q, r = torch.linalg.qr(torch.cat((a, ell)))
        diagonal = r.diagonal().abs()
        if float(diagonal.min()) <= 100 * torch.finfo(r.dtype).eps * float(diagonal.max()):
            raise _shared()
        u, c, wh = torch.linalg.svd(q[: len(a)], full_matrices=False)
        s = torch.linalg.vector_norm(q[len(a) :] @ wh.mH, dim=0)
        x = torch.linalg.solve_triangular(r, wh.mH, upper=True)
        pair = SVD(
            flat.images(u.mT.contiguous()), c, flat.vectors(x.mT.contiguous()), "", c, Status.CONVERGED, A, flat.real
        )  # fmt: skip
    beta, distance2 = project(problem, pair)
    c, s, X = (cast(t, problem.y) for t in (c, s, pair.V))
    return Modes(c, s, X, beta, distance2, pair.n_data, noise_share(pair))


def _shared() -> ArgumentError:
    return ArgumentError(
        "tikhonov: A and L must not share a null space, since the solution is not unique then; add rows to L, as in "
        "VStack([L, 1e-3 * Identity(n)])"
    )


def check_seminorm(A: LinearOperator, L: LinearOperator) -> None:
    """Raise ShapeError if L does not act where A does."""
    if L.dims != A.dims:
        raise ShapeError(f"tikhonov: L must act on A's input {A.dims}; got an operator on {L.dims}")


class _Weighted(LinearOperator):
    """x -> alpha L x with alpha for each member of a batch."""

    _half = False

    def __init__(self, L: LinearOperator, alpha: Tensor) -> None:
        super().__init__(L.dims, L.dimsd)
        self.L, self.alpha = L, alpha
        self.__dict__["_delegates"] = True
        self._clinear, self._real_domain, self._real_range = L._clinear, L._real_domain, L._real_range

    def _forward(self, x: Tensor) -> Tensor:
        y = self.L._run(x)
        return y * lift(self.alpha, len(self.dimsd)).to(y.dtype.to_real())

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.L._run(y * lift(self.alpha, len(self.dimsd)).to(y.dtype.to_real()), True)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self.L._out_dtype(dtype, adjoint)


class Iterative:
    """Solutions by LSQR, traces by Hutchinson's random signs.

    Args:
        problem: A and y.
        L: a LinearOperator, or None for the identity.
        rtol, maxiter: of LSQR.
        samples, seed: of the trace estimate.
    """

    def __init__(
        self, problem: Problem, L: LinearOperator | None, rtol: float, maxiter: int, samples: int = 8, seed: int = 0
    ) -> None:
        self.problem, self.L, self.rtol, self.maxiter = problem, L, rtol, maxiter
        self.flat = Flat(problem.A, problem.y.dtype.to_real() if problem.A._real_domain else problem.y.dtype)
        self.n_data, self.share = self.flat.m, problem.A.shape[0] / self.flat.m
        self.samples, self.seed = samples, seed
        self._bound: float | None = None
        self.is_limited = False  # whether a solve has ended at maxiter

    def solve(self, alpha: Any, y: Any) -> Solution:
        """The minimiser for y of shape (*batch, *dimsd) and alpha, a number or one for each member."""
        A = self.problem.A
        options: dict[str, Any] = {"maxiter": self.maxiter, "atol": self.rtol, "btol": self.rtol, "conlim": math.inf}
        if self.L is None:
            solution = lsqr(A, y, damp=alpha, **options)
            self.is_limited |= not solution.status.ok
            return solution
        stack = VStack([A, _Weighted(self.L, torch.as_tensor(alpha, device=y.device))])
        data = y.flatten(-len(A.dimsd))
        zeros = data.new_zeros((*data.shape[:-1], self.L.shape[0]))
        solution = lsqr(stack, torch.cat((data, zeros), -1), **options)
        self.is_limited |= not solution.status.ok
        return solution

    def evaluate(self, alpha: Tensor, free: bool = True) -> Point:
        """See `Family`."""
        pb = self.problem
        with torch.no_grad():
            x = self.solve(alpha, pb.y).x
            residual = torch.linalg.vector_norm((pb.A._run(x) - pb.y).flatten(-pb.n_y), dim=-1)
            image = x if self.L is None else self.L._run(x)
            n_image = pb.n_x if self.L is None else len(self.L.dimsd)
            seminorm = torch.linalg.vector_norm(image.flatten(-n_image), dim=-1)
            return Point(residual, seminorm, self._free(alpha) if free else residual)

    def _free(self, alpha: Tensor) -> Tensor:
        pb = self.problem
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.samples, *(1,) * alpha.ndim, self.flat.m)
        signs = (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(pb.y)
        if self.flat.range.is_complex and self.flat.real:
            z = torch.view_as_complex(signs.real.unflatten(-1, (-1, 2)).contiguous())
        else:
            z = signs
        z = z.unflatten(-1, pb.A.dimsd).expand(self.samples, *alpha.shape, *pb.A.dimsd)
        fitted = pb.A._run(self.solve(alpha, z).x)
        product = (z.conj() * fitted).flatten(-pb.n_y).sum(-1)
        return self.n_data - (product.real if product.is_complex() else product).mean(0)

    @property
    def scale(self) -> float:
        """|A| / |L|."""
        if self._bound is None:
            self._bound = self.problem.A.norm(30) / (1.0 if self.L is None else max(self.L.norm(30), 1e-300))
        return self._bound

    @property
    def low(self) -> float:
        """Below it LSQR would hardly converge."""
        return 1e-4 * self.scale

    @property
    def high(self) -> float:
        """Ten times |A| / |L|."""
        return 10 * self.scale
