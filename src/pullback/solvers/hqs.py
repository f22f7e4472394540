"""Half-quadratic splitting: copies tied by a quadratic penalty that grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.functionals import Functional
from pullback.functionals.arithmetic import lift
from pullback.linops import Identity
from pullback.solvers.cg import cg
from pullback.solvers.composite import Block, DataTerm, composite, gather, report, split
from pullback.solvers.inner import Inner, explained
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem
from pullback.solvers.run import Equation, Options
from pullback.solvers.scalars import ratio
from pullback.solvers.status import Solution


def _blocks(problem: Problem) -> list[Block]:
    h, blocks = split(problem)
    return blocks if h is None else [*blocks, Block(Identity(problem.A.dims), h, problem.n_x, 1.0)]


@torch.no_grad()
def _weights(problem: Problem) -> list[float]:
    """|A|^2 / |K_i|^2, so that beta has no unit."""
    size = problem.A.norm_bound() ** 2 or 1.0
    return [size / (b.bound**2 or 1.0) for b in _blocks(problem)]


@dataclass
class _State(State):
    image: Tensor  # A x
    ku: list[Tensor]


class HQS:
    """The recursion of `hqs`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        self.blocks = _blocks(problem)
        self.weights = problem.parts["weights"]
        self.inner = Inner(problem, [(w, b.op) for w, b in zip(self.weights, self.blocks, strict=True)])
        self.pulled = problem.back(problem.y)
        parts = problem.parts
        self.beta, self.rate, self.beta_max = parts["beta"], parts["rate"], parts["beta_max"]

    def init(self) -> _State:
        """x0."""
        pb = self.problem
        x, r = pb.start()
        image, ku = pb.y - r, [b.op(x) for b in self.blocks]
        return _State(x, pb.fill(torch.inf), pb.fill(1.0), self._values(x, image, ku), image=image, ku=ku)

    def step(self, state: _State) -> None:
        """z_i = prox_{g_i / beta_i}(K_i x), then x in closed form."""
        pb = self.problem
        beta = self._weight_at(state.iteration)
        total = self.pulled
        for w, b, k in zip(self.weights, self.blocks, state.ku, strict=True):
            weight = beta * w  # a float, or a tensor without axes
            total = total + weight * b.pull(b.g._prox(k, 1 / weight, b.n), pb.x_dtype)
        x = self.inner.solve(total, beta, state.x)
        change = ratio(pb.norm(x - state.x, pb.n_x), pb.norm(x, pb.n_x))
        state.error = change if bool(beta == self.beta_max) else pb.fill(torch.inf)
        state.x, state.image, state.ku = x, pb.A(x), [b.op(x) for b in self.blocks]
        state.values = self._values(x, state.image, state.ku)

    def _weight_at(self, k: int) -> Any:
        if any(isinstance(c, Tensor) for c in (self.beta, self.rate, self.beta_max)):  # learned: few iterations
            return torch.minimum(
                self.beta * self.rate**k, torch.as_tensor(self.beta_max, dtype=self.problem.y.dtype.to_real())
            )
        grown = math.log(self.beta) + k * math.log(self.rate)  # the power itself would overflow
        return math.exp(grown) if grown < math.log(self.beta_max) else self.beta_max

    def _values(self, x: Tensor, image: Tensor, ku: list[Tensor]) -> dict[str, Any]:
        return report(self.problem, self.data, image, [(b.g, k, b.n) for b, k in zip(self.blocks, ku, strict=True)])


def _equation(problem: Problem) -> Equation | None:
    """A^H (A x - y) + beta_max sum_i w_i K_i^H (K_i x - prox(K_i x)) = 0: the envelopes of the g_i are smooth."""
    if not all(b.g.convex for b in _blocks(problem)):
        return None

    def residual(p: Problem, x: Tensor) -> Tensor:
        v = p.adjoint(p.A(x) - p.y).to(p.x_dtype)
        for w, b in zip(p.parts["weights"], _blocks(p), strict=True):
            weight = p.parts["beta_max"] * w
            k = b.op(x)
            v = v + weight * b.pull(k - b.g._prox(k, lift(1 / weight, b.n), b.n), p.x_dtype)
        return v

    return Equation(residual, cg, symmetric=True)


def hqs(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    beta: float = 1e-2,
    rate: float = 1.2,
    beta_max: float = 10.0,
    maxiter: int = 100,
    rtol: float = 1e-5,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + sum_i M_i(K_i x), M_i(u) = min_z g_i(z) + beta_i |u - z|^2 / 2, beta_i growing.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer, constraint: terms as in `admm`, convex or not (`L0`, `Lp`, `MCP` ...).
        x0: where to start, of shape (..., *A.dims); zero if None.
        beta, rate, beta_max: iteration k has beta_i = min(beta rate^k, beta_max) |A|^2 / |K_i|^2. The solution is that
            of the formula for beta_max, which is near that of sum_i g_i(K_i x) where beta_max is large. At a
            large beta x hardly moves any more, so the rate must be small enough; `admm` needs neither.
        maxiter, rtol, atol: stop when |x_new - x| <= max(rtol, atol) |x_new| at beta_max, or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    The subproblem in x is solved as in `admm`. Implicit derivatives are those of the formula for beta_max; none if a
    term is not convex (then use unroll=True).

    Returns: Solution with history "residual" |A x - y| and "objective", with g_i instead of M_i.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one quadratic subproblem, one application of A and each K_i and K_i^H an iteration.
    Source: Geman & Yang 1995, doi 10.1109/83.392335; Wang, Yang, Yin & Zhang 2008, doi 10.1137/080724265.
    """
    for name, value, least in (("beta", beta, 0.0), ("rate", rate, 1.0 - 1e-15), ("beta_max", beta_max, 0.0)):
        if not (isinstance(value, (int, float)) and least < value < float("inf")):
            raise ArgumentError(f"hqs: {name} must be a finite number {'>= 1' if least else '> 0'}; got {value!r}")
    terms = gather("hqs", regularizer, constraint)
    if not terms:
        raise ArgumentError("hqs: regularizer must hold at least one term; got none; use lsqr for least squares")
    parts = {"beta": float(min(beta, beta_max)), "rate": float(rate), "beta_max": float(beta_max)}
    problem = composite("hqs", A, y, x0, terms, None, **parts)
    problem.parts["weights"] = _weights(problem)
    return explained(problem, HQS, _equation(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)
