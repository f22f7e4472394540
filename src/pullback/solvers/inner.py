"""The quadratic subproblem of splitting methods, (A^H A + rho B) x = b with B = sum_i w_i K_i^H K_i, by structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pullback.core.operator import LinearOperator
from pullback.core.shapes import size
from pullback.functionals.arithmetic import inner, is_live, lift
from pullback.functionals.linear import pull
from pullback.linops import Identity
from pullback.solvers.problem import Problem, square
from pullback.solvers.run import run
from pullback.solvers.scalars import Number
from pullback.solvers.status import Solution
from pullback.solvers.transforms import TRANSFORMS, Transform

_DENSE = 1024  # unknowns up to which the matrix is factorised
_TRUSTED = 1e-10  # relative error of a diagonalisation on random vectors, in double precision, that counts as rounding
_STEPS = 20  # conjugate gradient steps in one solve at most
_REDUCTION = 0.1  # by which they reduce the residual; the outer iteration starts them where it ended


class Inner:
    """Solves (A^H A + rho B) x = b for every member of a batch; `rho` is one number a member, or one for all.

    Args:
        problem: A; without `with_data`, A^H A is left out.
        blocks: (w_i, K_i); the identity is `Identity(dims)`.

    The first kind that fits is taken, so that `solve` is exact but for "cg":

    | kind | where |
    |---|---|
    | diagonal | A^H A and B are diagonal (identity, masks, Diagonal, isometries) |
    | woodbury | A A^H = c I and B is diagonal with one value: a Restriction of a Fourier or wavelet transform |
    | fft | both are diagonalised by the Fourier transform over all axes: circular convolutions, periodic differences |
    | dct | both are diagonalised by the cosine transform over all axes: identity and differences as in TV |
    | dense | up to 1024 unknowns: Cholesky, once for every value of rho |
    | cg | else: a few conjugate gradient steps, preconditioned by a diagonalisation of the operator in the centre |

    Which transform fits is not read off the classes of operators but tried: the candidate eigenvalues, found from one
    vector, must reproduce the operator on a random vector in double precision, which a wrong diagonalisation does with
    probability zero.

    Cost of the choice: at most eight applications of A^H A and of B.
    Source: woodbury: Combettes & Pesquet 2011, doi 10.1007/978-1-4419-9569-8_10, table 1.
    """

    def __init__(
        self, problem: Problem, blocks: Sequence[tuple[float, LinearOperator]], *, with_data: bool = True
    ) -> None:
        self.problem, self.blocks, self.n = problem, list(blocks), problem.n_x
        self.with_data = with_data
        self.dims = problem.A.dims
        self.transform: Transform | None = None
        self.a: Any = 0.0  # what A^H A and B are once transformed
        self.b: Any = 0.0
        self.steps = 1  # of `descend`
        self.c = 0.0  # A A^H = c I, for "woodbury"
        self._factor: tuple[Any, Any] | None = None  # the last rho, and what was made of it
        self.kind = self._choose()

    def fits(self, problem: Problem, blocks: Sequence[tuple[float, LinearOperator]]) -> bool:
        """Whether it serves another problem, too: the same operators, none of them differentiated."""
        return (
            not problem.live
            and problem.A is self.problem.A
            and len(blocks) == len(self.blocks)
            and all(w == v and a is b for (w, a), (v, b) in zip(blocks, self.blocks, strict=True))
        )

    # Application ---------------------------------------------------------------------------------------------------

    def gram(self, x: Tensor) -> Tensor:
        """A^H A x."""
        pb = self.problem
        return pull(pb.A, pb.A._run(x), x) if self.with_data else torch.zeros_like(x)

    def penalty(self, x: Tensor) -> Tensor:
        """B x."""
        total = None
        for w, op in self.blocks:
            part = w * (x if isinstance(op, Identity) else pull(op, op._run(x), x))
            total = part if total is None else total + part
        return torch.zeros_like(x) if total is None else total

    def solve(self, b: Tensor, rho: Number, guess: Tensor | None = None) -> Tensor:
        """The x; with "cg" one whose residual is a tenth of that of the guess (0 if None)."""
        rho = lift(rho, self.n)
        if self.kind == "woodbury":
            A, s = self.problem.A, rho * self.b
            return (b - pull(A, A._run(b), b) / (self.c + s)) / s
        if self.kind == "dense":
            return self._solve_dense(b, rho)
        assert self.transform is not None, f"a subproblem of kind {self.kind}; please report"
        if self.kind != "cg":
            return self.transform.back(self.transform.to(b) / (self.a + rho * self.b), b)

        def apply(v: Tensor) -> Tensor:
            return self.gram(v) + rho * self.penalty(v)

        r = b if guess is None else b - apply(guess)
        x = conjugate_gradients(apply, r, self.n, self._preconditioner(rho), _STEPS, _REDUCTION)
        return x if guess is None else guess + x

    def descend(self, r: Tensor, rho: Number) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """A few steps of preconditioned conjugate gradients for (A^H A + rho B) d = r: d, A d and the K_i d.

        In the first step no adjoint is applied.
        """
        pb, n = self.problem, self.n
        over = lift(rho, n)
        precondition = self._preconditioner(over)
        d = p = r
        before: Any = None
        moved: list[Tensor] = []
        for k in range(self.steps):
            z = precondition(r)
            rz = inner(r, z, n)
            p = z if before is None else z + _over(rz, before, n) * p
            images = [pb.A(p)] if self.with_data else []
            images += [op(p) for _, op in self.blocks]
            curvature: Any = square(images[0], pb.n_y, pb.live) if self.with_data else 0.0
            for (w, op), v in zip(self.blocks, images[self.with_data :], strict=True):
                curvature = curvature + rho * w * square(v, len(op.dimsd), pb.live)
            alpha = _over(rz, curvature, 0)
            lone = k + 1 == self.steps  # then p is not needed any more
            steps = [
                torch.mul(v, lift(alpha, v.ndim - len(pb.batch)), out=pb.own(v) if lone or i else None)
                for i, v in enumerate((p, *images))
            ]
            if k == 0:
                d, *moved = steps
            else:
                d, *moved = (total + s for total, s in zip((d, *moved), steps, strict=True))
            before = rz
            if k + 1 < self.steps:
                r = r - self.gram_of(steps[1], r) if self.with_data else r
                for (w, op), v in zip(self.blocks, steps[1 + self.with_data :], strict=True):
                    r = r - over * w * pull(op, v, r)
        return d, moved[0] if self.with_data else None, moved[self.with_data :]

    def gram_of(self, image: Tensor, like: Tensor) -> Tensor:
        """A^H of an image."""
        return pull(self.problem.A, image, like)

    # Choice --------------------------------------------------------------------------------------------------------

    def _choose(self) -> str:
        pb = self.problem
        live = pb.live
        complex_x = pb.x_dtype.is_complex
        linear = pb.A._clinear and all(op._clinear for _, op in self.blocks)
        probe = _random(self.dims, complex_x, pb.y.device)
        with torch.no_grad():
            images = self.gram(probe), self.penalty(probe)
        for name in ("diagonal", "woodbury", "fft", "dct") if linear or not complex_x else ("diagonal",):
            if name == "woodbury":
                if self._is_woodbury(probe, images[1]):
                    return name
                continue
            transform = TRANSFORMS[name](self.dims)
            with torch.set_grad_enabled(live and torch.is_grad_enabled()):
                found = self._diagonalise(transform, probe, images)
            if found is not None:
                self.transform = transform
                self.a, self.b = (_as(v, pb.y.dtype) for v in found)
                return name
        if size(self.dims) <= _DENSE and (linear or not complex_x):
            matrices = []
            for apply in (self.gram, self.penalty):
                matrices.append(_matrix(apply, self.dims, pb.x_dtype, pb.y.device))
            self.a, self.b = matrices
            return "dense"
        self._prepare_preconditioner()
        return "cg"

    def _diagonalise(
        self, transform: Transform, probe: Tensor, images: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The eigenvalues of A^H A and B, if the transform diagonalises them."""
        flat = transform.flat(probe)
        found = []
        for apply, image in zip((self.gram, self.penalty), images, strict=True):
            values = transform.to(apply(flat)) / transform.to(flat)
            values = values.real if values.is_complex() else values
            with torch.no_grad():
                error = torch.linalg.vector_norm(transform.back(values * transform.to(probe), probe) - image)
                if not error <= _TRUSTED * torch.linalg.vector_norm(image):
                    return None
            found.append(values.clamp(min=0))
        return found[0], found[1]

    def _is_woodbury(self, probe: Tensor, image: Tensor) -> bool:
        c = self.problem.A._coisometry() if self.with_data else None
        if c is None or self.problem.A._out_dtype(probe.dtype, False) != probe.dtype:
            return False
        b = (image.flatten()[0] / probe.flatten()[0]).real
        if not torch.linalg.vector_norm(image - b * probe) <= _TRUSTED * torch.linalg.vector_norm(image):
            return False
        self.c, self.b = c, float(b)
        return self.b > 0

    # Dense ---------------------------------------------------------------------------------------------------------

    def _solve_dense(self, b: Tensor, rho: Any) -> Tensor:
        rho = rho.reshape(*rho.shape[: rho.ndim - self.n], 1, 1) if isinstance(rho, Tensor) and rho.ndim else rho
        known = self._factor
        if known is None or is_live(rho, known[1]) or not _same(known[0], rho):
            self._factor = known = (rho, torch.linalg.cholesky(self.a + rho * self.b))
        factor = known[1]
        flat = b.flatten(-self.n).unsqueeze(-1)
        return torch.cholesky_solve(flat, factor).squeeze(-1).reshape(b.shape)

    # Preconditioned conjugate gradients ----------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare_preconditioner(self) -> None:
        """Eigenvalues from the responses of A^H A and B to an impulse in the centre."""
        pb = self.problem
        centre = tuple(n // 2 for n in self.dims)
        impulse = torch.zeros(self.dims, dtype=pb.x_dtype, device=pb.y.device)
        impulse[centre] = 1
        transform = TRANSFORMS["fft" if pb.x_dtype.is_complex else "dct"](self.dims)
        found = []
        for apply in (self.gram, self.penalty):
            values = transform.values(apply(impulse), centre)
            found.append(values.clamp(min=1e-4 * float(values.detach().max())))
        self.transform = transform
        self.a, self.b = (v.to(pb.y.dtype.to_real()) for v in found)
        self._calibrate()

    def _calibrate(self) -> None:
        """How many steps `descend` takes: as many as reduce a residual to a tenth on a random x, at a middling rho."""
        pb = self.problem
        probe = _random(self.dims, pb.x_dtype.is_complex, pb.y.device).to(pb.x_dtype)
        rho = (
            0.1 * float(self.a.detach().max()) / float(self.b.detach().max())
            if float(self.a.detach().max()) > 0
            else 1.0
        )

        def apply(v: Tensor) -> Tensor:
            self.steps += 1
            return self.gram(v) + rho * self.penalty(v)

        self.steps = -1
        conjugate_gradients(apply, apply(probe), self.n, self._preconditioner(rho), _STEPS, _REDUCTION)
        self.steps = max(1, self.steps)

    def _preconditioner(self, rho: Any) -> Callable[[Tensor], Tensor]:
        transform = self.transform
        assert transform is not None
        known = self._factor
        if known is None or is_live(rho) or not _same(known[0], rho):
            self._factor = known = (rho, 1 / (self.a + rho * self.b))
        scale = known[1]
        return lambda r: transform.back(transform.to(r) * scale, r)


def explained(problem: Problem, build: Callable[[Problem], Any], equation: Any, **options: Any) -> Solution:
    """As `run`; `Solution.method` tells how the quadratic subproblem of the method was solved."""
    kinds: list[str] = []

    def noting(p: Problem) -> Any:
        algorithm = build(p)
        kinds.append(algorithm.inner.kind)
        return algorithm

    solution = run(problem, noting, equation, **options)
    return replace(solution, method=f"{problem.owner}: quadratic subproblem by {kinds[-1]}")


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    n: int,
    precondition: Callable[[Tensor], Tensor] | None,
    maxiter: int,
    rtol: float,
) -> Tensor:
    """Find x with |b - N x| <= rtol |b|, N positive definite, or after maxiter steps from 0; differentiable torch."""
    shape = b.shape[: b.ndim - n] + (1,) * n
    x, r = torch.zeros_like(b), b
    z = r if precondition is None else precondition(r)
    p = z
    rz = inner(r, z, n).reshape(shape)
    goal = rtol**2 * inner(b, b, n).detach().reshape(shape)
    for _ in range(maxiter):
        busy = inner(r, r, n).detach().reshape(shape) > goal
        if not bool(busy.any()):
            break
        q = apply(p)
        curvature = inner(p, q, n).reshape(shape)
        busy = busy & (curvature.detach() > 0)
        alpha = torch.where(busy, rz / torch.where(busy, curvature, 1), 0)
        x, r = x + alpha * p, r - alpha * q
        z = r if precondition is None else precondition(r)
        new = inner(r, z, n).reshape(shape)
        p = z + torch.where(busy, new / torch.where(busy, rz, 1), 0) * p
        rz = torch.where(busy, new, rz)
    return x


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _over(a: Tensor, b: Tensor, n: int) -> Tensor:
    """The quotient a / b with n axes appended; 0 where b <= 0."""
    good = b > 0
    return lift(torch.where(good, a / torch.where(good, b, 1), 0), n)


def _random(dims: tuple[int, ...], is_complex: bool, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    v = torch.randn(dims, dtype=torch.complex128 if is_complex else torch.float64, generator=generator)
    return v.to(device)


def _as(values: Tensor, dtype: torch.dtype) -> Any:
    """Eigenvalues in the precision of the data; one number where they are all the same."""
    values = values.to(dtype.to_real())
    if not is_live(values) and bool((values == values.flatten()[0]).all()):
        return float(values.detach().flatten()[0])
    return values


def _matrix(
    apply: Callable[[Tensor], Tensor], dims: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    n = math.prod(dims)
    units = torch.eye(n, dtype=dtype, device=device).reshape(n, *dims)
    return apply(units).reshape(n, n).mT
