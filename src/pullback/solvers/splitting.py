"""Forward-backward and backward-backward splittings: Condat-Vu, Davis-Yin, Douglas-Rachford."""

from __future__ import annotations

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
from pullback.solvers.composite import (
    DataTerm,
    above,
    ceiling,
    composite,
    default_step,
    direct_term,
    gather,
    optimality,
    report,
    smoothness,
    split,
)
from pullback.solvers.inner import Inner, explained
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, larger, ratio
from pullback.solvers.status import Solution

_MARGIN = 1.1


@dataclass
class _State(State):
    image: Tensor  # A x
    ku: list[Tensor]  # K_i x
    duals: list[Tensor]


class CondatVu:
    """The recursion of `condat_vu`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        self.h, self.blocks = split(problem)
        half = smoothness(problem) / 2 * _MARGIN
        norm = sum(b.bound**2 for b in self.blocks) ** 0.5
        floor = norm if not isinstance(half, Tensor) and half == 0 else half
        # 1 / tau - sigma sum |K_i|^2 > L / 2: with equality the iterates may go back and forth for ever
        self.sigma = problem.parts["balance"] * floor / norm**2 if norm > 0 else 0.0 * floor
        self.tau = 1 / (half + self.sigma * norm**2) if norm > 0 or not _is_zero(half) else 1.0 + 0.0 * half

    def init(self) -> _State:
        """x0, zero as dual variables."""
        pb = self.problem
        x, r = pb.start()
        image, ku = pb.y - r, [b.op(x) for b in self.blocks]
        duals = [torch.zeros_like(k) for k in ku]
        values = self._values(x, image, ku)
        return _State(x, pb.fill(torch.inf), pb.fill(1.0), values, image=image, ku=ku, duals=duals)

    def step(self, state: _State) -> None:
        """Primal step, extrapolation, dual step."""
        pb = self.problem
        tau = pb.x_scalar(self.tau)
        w = pb.back(self.data.grad(state.image))
        for b, q in zip(self.blocks, state.duals, strict=True):
            w = w + b.pull(q, pb.x_dtype)
        x = state.x - tau * w
        if self.h is not None:
            x = self.h._prox_over(x, tau, pb.n_x)
        image, ku = pb.A(x), [b.op(x) for b in self.blocks]
        error = ratio(pb.norm(x - state.x, pb.n_x), pb.norm(x, pb.n_x))
        for i, (b, q, k, old) in enumerate(zip(self.blocks, state.duals, ku, state.ku, strict=True)):
            sigma = lift(self.sigma, b.n)
            new = b.g._conjugate_prox(q + sigma * (2 * k - old), sigma, b.n)
            error = larger(error, ratio(pb.norm(new - q, b.n), pb.norm(new, b.n)))
            state.duals[i] = new
        state.duals = list(state.duals)
        state.x, state.image, state.ku, state.error = x, image, ku, error
        state.values = self._values(x, image, ku)

    def _values(self, x: Tensor, image: Tensor, ku: list[Tensor]) -> dict[str, Any]:
        terms = [(b.g, k, b.n) for b, k in zip(self.blocks, ku, strict=True)]
        if self.h is not None:
            terms.append((self.h, x, self.problem.n_x))
        return report(self.problem, self.data, image, terms)


@dataclass
class _Governed(State):
    s: Tensor  # what the iteration moves; x is its prox
    image: Tensor  # A x
    duals: list[Tensor]
    ceiling: Number


class DavisYin:
    """The recursion of `davis_yin`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        self.h, self.blocks = split(problem, whole=True)
        self.relaxation = problem.parts["relaxation"]
        self.tau = default_step(problem)

    def init(self) -> _Governed:
        """Start from s = x0."""
        pb = self.problem
        s, r = pb.start()
        x = self._project(s)
        image = pb.y - r if x is s else pb.A(x)
        duals = [torch.zeros_like(x) for _ in self.blocks]
        values = self._values(x, image)
        return _Governed(
            x, pb.fill(torch.inf), pb.fill(1.0), values, s=s, image=image, duals=duals,
            ceiling=ceiling(pb, values["residual"]),
        )  # fmt: skip

    def _project(self, s: Tensor) -> Tensor:
        pb = self.problem
        return s if self.h is None else self.h._prox(s, pb.x_scalar(self.tau), pb.n_x)

    def step(self, state: _Governed) -> None:
        """Set z = prox_g(2 x - s - tau grad), s += z - x, x = prox_h(s)."""
        pb = self.problem
        tau = pb.x_scalar(self.tau)
        v = 2 * state.x - state.s - tau * pb.back(self.data.grad(state.image))
        z = v
        for b in self.blocks:
            z = b.g._prox(v, tau, b.n)
            state.duals = [(v - z) / tau]
        s = state.s + self.relaxation * (z - state.x)
        x = self._project(s)
        state.error = larger(
            ratio(pb.norm(x - state.x, pb.n_x), pb.norm(x, pb.n_x)),
            ratio(pb.norm(s - state.s, pb.n_x), pb.norm(s, pb.n_x)),
        )
        state.s, state.x, state.image = s, x, pb.A(x)
        state.values = self._values(x, state.image)
        state.verdict = above(state.values["residual"], state.ceiling)

    def _values(self, x: Tensor, image: Tensor) -> dict[str, Any]:
        pb = self.problem
        terms = [(b.g, x, b.n) for b in self.blocks]
        if self.h is not None:
            terms.append((self.h, x, pb.n_x))
        return report(pb, self.data, image, terms)


@dataclass
class _Reflected(State):
    s: Tensor
    inside: Tensor  # the prox of the quadratic at s


class DouglasRachford:
    """The recursion of `douglas_rachford`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        g = direct_term(problem, "regularizer")
        assert g is not None
        self.g: Functional = g
        self.relaxation = problem.parts["relaxation"]
        step = problem.parts["step"]
        bound = problem.A.norm_bound() ** 2
        self.rho = 0.1 * bound or 1.0 if step is None else 1 / problem.number(step, "step", positive=True)
        self.inner = Inner(problem, [(1.0, Identity(problem.A.dims))])
        self.pulled = problem.back(problem.y)

    def init(self) -> _Reflected:
        """Start from s = x0."""
        pb = self.problem
        s, _ = pb.start()
        return _Reflected(s, pb.fill(torch.inf), pb.fill(1.0), self._values(s), s=s, inside=s)

    def step(self, state: _Reflected) -> None:
        """Set u = prox_f(s), x = prox_g(2 u - s), s += relaxation (x - u)."""
        pb = self.problem
        rho = pb.x_scalar(self.rho)
        u = self.inner.solve(self.pulled + rho * state.s, self.rho, state.inside)
        x = self.g._prox(2 * u - state.s, 1 / rho, pb.n_x)
        move = self.relaxation * (x - u)
        state.error = ratio(pb.norm(move, pb.n_x), pb.norm(x, pb.n_x))
        state.s, state.inside, state.x = state.s + move, u, x
        state.values = self._values(x)

    @torch.no_grad()
    def _values(self, x: Tensor) -> dict[str, Any]:
        pb = self.problem
        return report(pb, self.data, pb.A(x), [(self.g, x, pb.n_x)])


def condat_vu(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    balance: float = 1.0,
    maxiter: int = 1000,
    rtol: float = 1e-5,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + sum_i g_i(K_i x) + h(x): gradient of D, prox of h, conjugate proxes of the g_i.

    Args:
        A, y, regularizer, constraint, x0: as in `pdhg`.
        data_term: a smooth functional of A x - y (or what its `about(y)` says), such as `Huber()`; half the squared
            norm if None.
        balance: sigma = 0.55 balance L / |K|^2 and 1 / tau = 0.55 L + sigma |K|^2, L = |A|^2 times the Lipschitz
            constant of grad D and |K|^2 = sum_i |K_i|^2.
        maxiter, rtol, atol: stop when the relative changes of x and of every dual variable are at most max(rtol, atol),
            or after maxiter iterations. A heuristic.
        options: see `pullback.solvers.run.Options`.

    Without blocks it is `ista` with a step of 1.8 / L. With D = 0 it is Chambolle and Pock's method.

    Returns: Solution with history "residual" |A x - y| and "objective".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A, A^H and each K_i, K_i^H an iteration.
    Source: Condat 2013, doi 10.1007/s10957-012-0245-9; Vu 2013, doi 10.1007/s10444-011-9254-8.
    """
    if not (isinstance(balance, (int, float)) and 0 < balance < float("inf")):
        raise ArgumentError(f"condat_vu: balance must be a finite number > 0; got {balance!r}")
    terms = gather("condat_vu", regularizer, constraint)
    problem = composite("condat_vu", A, y, x0, terms, data_term, balance=float(balance))
    split(problem)
    DataTerm(problem).require_smooth()
    return run(problem, CondatVu, optimality(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)


def davis_yin(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    step: Any = None,
    relaxation: float = 1.0,
    maxiter: int = 1000,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + g(x) + h(x): gradient of D, proxes of g and h, which act on x itself.

    Args:
        A, y, x0: as in `pdhg`.
        regularizer, constraint: together at most two functionals that have a prox, as `TV` and `Box` (or pairs whose
            sum has one). x is always in the domain of the constraint.
        data_term: a smooth functional of A x - y, as in `condat_vu`.
        step: < 2 / (L |A|^2), a number or one for each member; 1 / (L A.norm_bound()^2) if None.
        relaxation: in (0, 1] for the default step.
        maxiter, rtol, atol: stop when the relative changes of x and of the governing sequence are at most
            max(rtol, atol), or after maxiter iterations. A heuristic.
        options: see `pullback.solvers.run.Options`.

    Returns: Solution with history "residual" |A x - y| and "objective" (which may be infinite where g is a constraint).
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and A^H and two proxes an iteration.
    Source: Davis & Yin 2017, doi 10.1007/s11228-017-0421-z.
    """
    _check_relaxation("davis_yin", relaxation)
    terms = gather("davis_yin", regularizer, constraint)
    problem = composite("davis_yin", A, y, x0, terms, data_term, step=step, relaxation=float(relaxation))
    if len(split(problem, whole=True)[1]) > 1:
        raise ArgumentError(
            f"davis_yin: regularizer and constraint must be at most two functionals with a prox; got "
            f"{' + '.join(map(repr, terms))}; use pullback.pdhg or pullback.condat_vu"
        )
    DataTerm(problem).require_smooth()
    return run(problem, DavisYin, optimality(problem, whole=True), maxiter=maxiter, rtol=rtol, atol=atol, **options)


def douglas_rachford(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    step: Any = None,
    relaxation: float = 1.0,
    maxiter: int = 500,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + g(x), by the proxes of both: s += relaxation (prox_g(2 u - s) - u), u = prox_f(s).

    Args:
        A, y, x0: as in `pdhg`.
        regularizer, constraint: terms whose sum has a prox.
        step: tau of both proxes, > 0; 10 / |A|^2 if None.
        relaxation: in (0, 2).
        maxiter, rtol, atol: stop when |s_new - s| <= max(rtol, atol) |x|, or after maxiter iterations. A heuristic.
        options: see `pullback.solvers.run.Options`.

    The prox of the data term, (A^H A + I / tau)^-1 (A^H y + s / tau), is in closed form where the structure allows;
    `Solution.method` says how. See `pullback.solvers.inner.Inner`.

    Returns: Solution with history "residual" |A x - y| and "objective".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one quadratic subproblem, one prox and one application of A an iteration.
    Source: Lions & Mercier 1979, doi 10.1137/0716071; Combettes & Pesquet 2007, doi 10.1109/JSTSP.2007.910264.
    """
    _check_relaxation("douglas_rachford", relaxation)
    terms = gather("douglas_rachford", regularizer, constraint)
    parts = {"step": step, "relaxation": float(relaxation)}
    problem = composite("douglas_rachford", A, y, x0, terms, None, **parts)
    if direct_term(problem, "regularizer") is None:
        raise ArgumentError("douglas_rachford: regularizer must be a functional; got None; use lsqr for least squares")
    return explained(problem, DouglasRachford, optimality(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)


def _check_relaxation(owner: str, relaxation: Any) -> None:
    if not (isinstance(relaxation, (int, float)) and 0 < relaxation < 2):
        raise ArgumentError(f"{owner}: relaxation must be a number between 0 and 2; got {relaxation!r}")


def _is_zero(c: Any) -> bool:
    return not isinstance(c, Tensor) and c == 0
