"""The primal-dual hybrid gradient method of Chambolle and Pock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.functionals import Functional
from pullback.functionals.arithmetic import lift
from pullback.functionals.base import Sum
from pullback.linops import Identity
from pullback.solvers.iterate import Callback, Progress, State, iterate
from pullback.solvers.problem import Problem, norm, ratio
from pullback.solvers.status import Solution

_CHANGE, _DECAY, _UNEQUAL = 0.5, 0.95, 1.5  # the values of Goldstein et al.


@dataclass
class _Block:
    """One g(K x): g through its conjugate prox, K through its application. None: the data term |K x - y|^2 / 2."""

    op: LinearOperator
    g: Functional | None
    n: int
    bound: float  # >= |K|


@dataclass
class _State(State):
    q: list[Tensor]  # the dual variables
    kx: list[Tensor]  # K_i x
    ahead: list[Tensor]  # K_i of the extrapolated x
    balance: Tensor  # ratio of dual to primal step lengths, one a member
    change: Tensor  # how far the balance may still move in one iteration


class PDHG:
    """The recursion of `pdhg`.

    K_i is applied to x, and K_i of the extrapolated point follows from linearity: residual and objective come free.
    """

    def __init__(self, problem: Problem, terms: Sequence[Functional], balance: float) -> None:
        self.problem = problem
        self.h, rest = _split(terms)
        parts: list[tuple[LinearOperator, Functional | None]] = [(problem.A, None)]
        for f in rest:
            op = f.operator
            parts.append((Identity(problem.A.dims) if op is None else op, f.outer))
        bounds = [op.norm_bound() for op, _ in parts]
        self.balance, self.total = balance, sum(bounds) or 1.0
        self.blocks = [
            _Block(op, g, len(op.dimsd), b if b > 0 else self.total) for (op, g), b in zip(parts, bounds, strict=True)
        ]

    def init(self) -> _State:
        """x0, the data residual as first dual variable, zero for the others."""
        pb = self.problem
        x, r = pb.start()
        kx = [torch.sub(pb.y, r)] + [b.op(x) for b in self.blocks[1:]]
        q = [torch.neg(r, out=pb.own(r))] + [torch.zeros_like(k) for k in kx[1:]]
        one = torch.ones_like(norm(x, pb.n_x))
        return _State(
            x, torch.inf * one, one, self._values(x, kx), q=q, kx=kx, ahead=[k.clone() for k in kx],
            balance=self.balance * one, change=_CHANGE * one,
        )  # fmt: skip

    def step(self, state: _State) -> None:
        """Dual step, primal step, extrapolation."""
        pb = self.problem
        # sigma_i = balance / |K_i| and tau = 1 / (balance sum |K_i|) give tau sum_i sigma_i |K_i|^2 = 1.
        tau = 1 / (state.balance * self.total)
        pulls, new_q, before = [], [], []
        for b, q, k in zip(self.blocks, state.q, state.ahead, strict=True):
            sigma = lift(state.balance / b.bound, b.n)
            v = torch.addcmul(q, sigma, k)
            if b.g is None:
                v = torch.addcmul(v, -sigma, pb.y, out=pb.own(v))
                v = torch.mul(v, 1 / (1 + sigma), out=pb.own(v))
            else:
                v = b.g._conjugate_prox(v, sigma, b.n)
            with torch.no_grad():  # (q - v) / sigma + K x_ahead lies in the subdifferential of the conjugate at v
                d = torch.sub(q, v, out=pb.own(q))
                before.append(torch.addcmul(k, 1 / sigma, d, out=pb.own(d)))
            new_q.append(v)
            pulls.append(b.op.H(v).to(pb.x_dtype))
        pull = torch.stack([norm(g, pb.n_x) for g in pulls]).amax(0)
        w, *rest = pulls
        for g in rest:
            w = torch.add(w, g, out=pb.own(w))
        length = lift(tau, pb.n_x)
        x = torch.addcmul(state.x, -length, w, out=pb.own(w))
        if self.h is not None:
            x = self.h._prox_over(x, length, pb.n_x)
        kx = [b.op(x) for b in self.blocks]
        ahead = [torch.lerp(old, new, 2.0, out=pb.own(old)) for old, new in zip(state.kx, kx, strict=True)]
        with torch.no_grad():
            move = norm(torch.sub(x, state.x, out=pb.own(state.x)), pb.n_x)
            self._judge(state, move / tau, pull, before, kx, norm(x, pb.n_x))
        state.x, state.q, state.kx, state.ahead = x, new_q, kx, ahead
        state.values = self._values(x, kx)

    def _judge(
        self, state: _State, primal: Tensor, pull: Tensor, before: list[Tensor], kx: list[Tensor], size: Tensor
    ) -> None:
        """The larger of the relative optimality residuals, and a balance that makes the residuals more equal."""
        pb = self.problem
        dual2 = torch.zeros_like(primal)
        reach2 = norm(pb.y, pb.n_y) ** 2
        for b, v, k in zip(self.blocks, before, kx, strict=True):
            dual2 = dual2 + norm(torch.sub(v, k, out=pb.own(v)), b.n) ** 2
            if b.g is not None:
                reach2 = reach2 + (b.bound * size) ** 2
        dual = dual2.sqrt()
        state.error = torch.maximum(ratio(primal, pull), ratio(dual, reach2.sqrt()))
        # Goldstein et al., algorithm 1; the changes are summable, so the method still converges. Divided by |K| the two
        # have the same unit, and the speed hardly depends on the first balance any more.
        primal = primal / self.total
        slower, faster = primal > _UNEQUAL * dual, dual > _UNEQUAL * primal
        exponent = slower.to(primal.dtype) - faster.to(primal.dtype)
        state.balance = state.balance * (1 - state.change) ** exponent
        state.change = torch.where(slower | faster, _DECAY * state.change, state.change)

    @torch.no_grad()
    def _values(self, x: Tensor, kx: list[Tensor]) -> dict[str, Tensor]:
        pb = self.problem
        residual = norm(torch.sub(kx[0], pb.y), pb.n_y)
        objective = residual**2 / 2
        for b, k in zip(self.blocks[1:], kx[1:], strict=True):
            assert b.g is not None
            objective = objective + b.g._value(k, b.n)
        if self.h is not None:
            objective = objective + self.h._value(x, pb.n_x)
        return {"residual": residual, "objective": objective}


def _split(terms: Sequence[Functional]) -> tuple[Functional | None, list[Functional]]:
    """The term (or pair of terms) that is taken through its prox on x, and the others."""
    direct = [t for t in terms if t.operator is None]
    rest = [t for t in terms if t.operator is not None]
    if len(direct) == 2 and Sum(*direct).has_prox:
        return Sum(*direct), rest
    direct.sort(key=lambda t: not t.is_box)  # hard constraints first: then every x is feasible
    return (direct[0] if direct else None), direct[1:] + rest


def pdhg(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    x0: Any = None,
    balance: float = 1.0,
    maxiter: int = 500,
    rtol: float = 1e-4,
    atol: float = 0.0,
    callback: Callback | None = None,
    progress: Progress = False,
    throw: bool = False,
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + sum_i g_i(K_i x) + h(x), by primal and dual steps without inner iterations.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer: a functional, a sum or a list of them: `0.1 * TV(dims) + Box(0, None)`, `0.1 * (L1() @ W)`. Those
            without operator act through their prox, the others through the conjugate prox of their outer part.
        x0: where to start, of shape (..., *A.dims); zero if None.
        balance: ratio of dual to primal step lengths at the start, > 0. It adapts itself to the residuals.
        maxiter, rtol, atol: stop when both optimality residuals are at most max(rtol, atol) in relative terms:
            |x_new - x| / tau against the largest |K_i^H q_i|, and the distance of (K_i x)_i from the subdifferentials
            of the conjugates against |(y, |K_i| |x|)|. Or after maxiter iterations.
        callback, progress, throw: see `pullback.solvers.iterate.iterate`.

    The steps satisfy tau sum_i sigma_i |K_i|^2 = 1 with the bounds of `norm_bound()`; they count as constants.

    Returns: Solution with history "residual" |A x - y| and "objective".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A, A^H and each K_i, K_i^H an iteration.
    Source: Chambolle & Pock 2011, doi 10.1007/s10851-010-0251-1; residuals: Goldstein et al. 2015, arXiv 1305.0546.
    """
    terms = as_terms("pdhg", regularizer)
    problem = Problem("pdhg", A, y, x0, terms)
    for f in terms:
        if f.dims is not None and f.dims != problem.A.dims:
            raise ShapeError(f"pdhg: {f!r} acts on dims {f.dims}, but A's input has dims {problem.A.dims}")
        if not f.outer.has_prox:
            raise ArgumentError(f"pdhg: {f.outer!r} has no prox; write it as a sum of functionals that have one")
    if not (isinstance(balance, (int, float)) and 0 < balance < float("inf")):
        raise ArgumentError(f"pdhg: balance must be a finite number > 0; got {balance!r}")
    return iterate(
        PDHG(problem, terms, float(balance)), maxiter=maxiter, rtol=rtol, atol=atol, callback=callback,
        progress=progress, throw=throw,
    )  # fmt: skip


def as_terms(owner: str, regularizer: Any) -> list[Functional]:
    """A functional, a sum, a list of functionals or None as the list of its terms."""
    parts = [] if regularizer is None else [regularizer] if isinstance(regularizer, Functional) else regularizer
    if not isinstance(parts, Sequence) or not all(isinstance(f, Functional) for f in parts):
        raise ArgumentError(
            f"{owner}: regularizer must be a functional such as 0.1 * pullback.TV(dims), or a list of them; "
            f"got {type(regularizer).__name__}"
        )
    return [t for f in parts for t in f.terms]
