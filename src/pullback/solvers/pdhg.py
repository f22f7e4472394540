"""The primal-dual hybrid gradient method of Chambolle and Pock."""

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
from pullback.solvers.composite import Block, DataTerm, as_number, composite, gather, optimality, report, split
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, larger, ratio, root, where
from pullback.solvers.status import Solution

_CHANGE, _DECAY, _UNEQUAL = 0.5, 0.95, 1.5  # the values of Goldstein et al.


@dataclass
class _State(State):
    data_dual: Tensor  # A x - y of the data term
    duals: list[Tensor]  # those of the blocks
    kx: list[Tensor]  # A x, then K_i x
    ahead: list[Tensor]  # the same of the extrapolated x
    balance: Number  # ratio of dual to primal step lengths, one a member
    change: Number  # how far the balance may still move in one iteration


class PDHG:
    """The recursion of `pdhg`.

    K_i is applied to x, and K_i of the extrapolated point follows from linearity: residual and objective come free.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        self.h, rest = split(problem)
        self.balance, self.with_gap = problem.parts["balance"], problem.parts["gap"]
        bounds = [problem.A.norm_bound(), *(b.bound for b in rest)]
        self.total = sum(bounds) or 1.0
        self.blocks = [Block(problem.A, None, problem.n_y, bounds[0] or self.total)]  # type: ignore[arg-type]
        self.blocks += [Block(b.op, b.g, b.n, c or self.total) for b, c in zip(rest, bounds[1:], strict=True)]
        self.reach2 = problem.square(problem.y.detach(), problem.n_y)

    def init(self) -> _State:
        """x0, the gradient of the data term as first dual variable, zero for the others."""
        pb = self.problem
        x, r = pb.start()
        kx = [torch.sub(pb.y, r)] + [b.op(x) for b in self.blocks[1:]]
        first = torch.neg(r, out=pb.own(r)) if self.data.f is None else torch.zeros_like(r)
        state = _State(
            x, pb.fill(torch.inf), pb.fill(1.0), self._values(x, kx), data_dual=first,
            duals=[torch.zeros_like(k) for k in kx[1:]], kx=kx, ahead=[k.clone() for k in kx],
            balance=pb.fill(self.balance), change=pb.fill(_CHANGE),
        )  # fmt: skip
        if self.with_gap:
            state.values["gap"] = state.error
        return state

    def step(self, state: _State) -> None:
        """Dual step, primal step, extrapolation."""
        pb = self.problem
        # sigma_i = balance / |K_i| and tau = 1 / (balance sum |K_i|) give tau sum_i sigma_i |K_i|^2 = 1.
        tau = 1 / (state.balance * self.total)
        pulls, new_q, before = [], [], []
        for b, q, k in zip(self.blocks, (state.data_dual, *state.duals), state.ahead, strict=True):
            sigma = lift(state.balance / b.bound, b.n)
            v = add_scaled(q, sigma, k, None)
            v = self.data.conjugate_prox(v, sigma) if b.g is None else b.g._conjugate_prox(v, sigma, b.n)
            with pb.quiet:  # (q - v) / sigma + K x_ahead lies in the subdifferential of the conjugate at v
                d = torch.sub(q, v, out=pb.own(q))
                before.append(add_scaled(k, 1 / sigma, d, pb.own(d)))
            new_q.append(v)
            pulls.append(b.pull(v, pb.x_dtype))
        pull = pb.norm(pulls[0], pb.n_x)
        for g in pulls[1:]:
            pull = larger(pull, pb.norm(g, pb.n_x))
        w, *rest = pulls
        for g in rest:
            w = torch.add(w, g, out=pb.own(w))
        dual = self._dual(new_q, w) if self.with_gap else 0.0
        length = lift(tau, pb.n_x)
        x = add_scaled(state.x, -length, w, pb.own(w))
        if self.h is not None:
            x = self.h._prox_over(x, length, pb.n_x)
        kx = [b.push(x) for b in self.blocks]
        ahead = [torch.lerp(old, new, 2.0, out=pb.own(old)) for old, new in zip(state.kx, kx, strict=True)]
        with pb.quiet:
            move = pb.norm(torch.sub(x, state.x, out=pb.own(state.x)), pb.n_x)
            self._judge(state, move / tau, pull, before, kx, pb.norm(x, pb.n_x))
        state.x, state.kx, state.ahead = x, kx, ahead
        state.data_dual, *state.duals = new_q
        state.values = self._values(x, kx)
        if self.with_gap:
            objective = state.values["objective"]
            state.error = state.values["gap"] = objective - dual
            state.scale = abs(objective)

    def _judge(
        self, state: _State, primal: Number, pull: Number, before: list[Tensor], kx: list[Tensor], size: Number
    ) -> None:
        """The larger of the relative optimality residuals, and a balance that makes the residuals more equal."""
        pb = self.problem
        dual2 = 0.0 * primal
        reach2 = self.reach2
        for b, v, k in zip(self.blocks, before, kx, strict=True):
            gap = pb.norm(torch.sub(v, k, out=pb.own(v)), b.n)
            dual2 = dual2 + gap * gap
            if b.g is not None:
                reach2 = reach2 + b.bound * size * b.bound * size
        dual = root(dual2)
        state.error = larger(ratio(primal, pull), ratio(dual, root(reach2)))
        # Goldstein et al., algorithm 1; the changes are summable, so the method still converges. Divided by |K| the two
        # have the same unit, and the speed hardly depends on the first balance any more.
        primal = primal / self.total
        slower, faster = primal > _UNEQUAL * dual, dual > _UNEQUAL * primal
        exponent = 1.0 * slower - 1.0 * faster
        state.balance = state.balance * (1 - state.change) ** exponent
        state.change = where(slower | faster, _DECAY * state.change, state.change)

    @torch.no_grad()
    def _dual(self, duals: list[Tensor], w: Tensor) -> Number:
        """-D*(q_0) - sum_i g_i*(q_i) - h*(-w), w = A^H q_0 + sum_i K_i^H q_i: a lower bound of the minimum."""
        pb = self.problem
        value = self.data.conjugate(duals[0])
        for b, q in zip(self.blocks[1:], duals[1:], strict=True):
            value = value + as_number(pb, b.g._conjugate_value(q, b.n))
        assert self.h is not None
        return -(value + as_number(pb, self.h._conjugate_value(-w, pb.n_x)))

    def _values(self, x: Tensor, kx: list[Tensor]) -> dict[str, Number]:
        terms = [(b.g, k, b.n) for b, k in zip(self.blocks[1:], kx[1:], strict=True)]
        if self.h is not None:
            terms.append((self.h, x, self.problem.n_x))
        return report(self.problem, self.data, kx[0], terms)


def pdhg(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    balance: float = 1.0,
    gap: bool = False,
    maxiter: int = 500,
    rtol: float = 1e-4,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + sum_i g_i(K_i x) + h(x), by primal and dual steps without inner iterations.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer: a functional, a sum or a list of them: `0.1 * TV(dims) + Box(0, None)`, `0.1 * (L1() @ W)`. Those
            without operator act through their prox, the others through the conjugate prox of their outer part.
        data_term: a functional of A x - y (or what its `about(y)` says) with a prox, smooth or not: `L1()`, `Huber()`,
            `KullbackLeibler()`; D(v) = |v - y|^2 / 2 if None.
        constraint: more terms, such as `Box(0, None)`.
        x0: where to start, of shape (..., *A.dims); zero if None.
        balance: ratio of dual to primal step lengths at the start, > 0. It adapts itself to the residuals.
        gap: put the duality gap into the history and stop when it is at most max(rtol |objective|, atol). It bounds
            objective - minimum, for the conjugates of all terms are computed. It needs a term h that acts on x itself
            and whose conjugate is finite everywhere: a bounded constraint such as `Box(0, 1)` or `L2Ball`, or a
            multiple of `SquaredL2`. Otherwise it is infinite until the duals happen to be feasible.
        maxiter, rtol, atol: without `gap`, stop when both optimality residuals are at most max(rtol, atol) in relative
            terms: |x_new - x| / tau against the largest |K_i^H q_i|, and the distance of (K_i x)_i from the
            subdifferentials of the conjugates against |(y, |K_i| |x|)|. Or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    The steps satisfy tau sum_i sigma_i |K_i|^2 = 1 with the bounds of `norm_bound()`; they count as constants.

    Returns: Solution with history "residual" |A x - y|, "objective" and, if asked for, "gap".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A, A^H and each K_i, K_i^H an iteration.
    Source: Chambolle & Pock 2011, doi 10.1007/s10851-010-0251-1; residuals: Goldstein et al. 2015, arXiv 1305.0546.
    """
    if not (isinstance(balance, (int, float)) and 0 < balance < float("inf")):
        raise ArgumentError(f"pdhg: balance must be a finite number > 0; got {balance!r}")
    terms = gather("pdhg", regularizer, constraint)
    problem = composite("pdhg", A, y, x0, terms, data_term, balance=float(balance), gap=bool(gap))
    h, _ = split(problem)
    if gap and h is None:
        raise ArgumentError(
            "pdhg: gap=True needs a term on x itself whose conjugate is finite, such as constraint=pullback.Box(0, 1); "
            "got none"
        )
    return run(problem, PDHG, optimality(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)
