"""Non-linear conjugate gradients: smooth objectives in four vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.functionals import Functional
from pullback.solvers.descent import Descent, DescentState, smooth_problem
from pullback.solvers.line_search import constant
from pullback.solvers.nonlinear import minimiser
from pullback.solvers.problem import add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, larger, ratio, smaller, where
from pullback.solvers.status import Solution


@dataclass
class Products:
    """The inner products of old and new gradient (g, h), their difference d = h - g and the direction p."""

    gg: Number
    hh: Number
    hd: Number
    pd: Number
    dd: Number
    ph: Number


VARIANTS: dict[str, Callable[[Products], Number]] = {
    "hager-zhang": lambda v: ratio(v.hd - 2 * ratio(v.dd, v.pd) * v.ph, v.pd),
    "polak-ribiere": lambda v: larger(ratio(v.hd, v.gg), 0.0),
    "hestenes-stiefel": lambda v: larger(ratio(v.hd, v.pd), 0.0),
    "dai-yuan": lambda v: ratio(v.hh, v.pd),
    "fletcher-reeves": lambda v: ratio(v.hh, v.gg),
}

_SKEW = 0.2  # |<g, h>| above that share of |h|^2 restarts along -h


@dataclass
class _State(DescentState):
    beta: Number = 0.0


class NonlinearCG(Descent):
    """The recursion of `nonlinear_cg`."""

    curvature = 0.1
    state = _State

    def direction(self, state: _State) -> tuple[Tensor, Number]:
        """-g + beta p, and a step that would change the objective as much as the last."""
        pb = self.problem
        p = add_scaled(-state.g, pb.x_scalar(state.beta), state.p, None)
        slope = pb.dot(state.g.detach(), p.detach(), pb.n_x)
        t = state.t * ratio(state.slope, slope)
        return p, where(t > 0, smaller(t, 10 * state.t), 1.0 + 0.0 * state.t)

    def learn(self, state: _State, p: Tensor, step: Tensor, g: Tensor, t: Number) -> None:
        """The share of the last direction in the next."""
        state.beta = self._share(state, p, state.g, g, t)

    @constant
    def _share(self, state: _State, p: Tensor, g: Tensor, h: Tensor, t: Number) -> Number:
        pb, n = self.problem, self.problem.n_x
        d = h - g
        values = Products(*(pb.dot(u, v, n) for u, v in ((g, g), (h, h), (h, d), (p, d), (d, d), (p, h))))
        beta = VARIANTS[pb.parts["variant"]](values)
        if pb.parts["variant"] == "hager-zhang":  # from below, so that the directions stay bounded
            floor = -ratio(pb.fill(1.0), pb.norm(p, n) * smaller(state.error, 0.01))
            beta = larger(beta, floor)
        # Powell's restart, <h, g> far from 0: on Rosenbrock's function it halves the iterations of all variants.
        reset = (t == 0) | (abs(values.hh - values.hd) >= _SKEW * values.hh)
        return where(reset, 0.0 * beta, beta)


def nonlinear_cg(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    x0: Any = None,
    variant: str = "hager-zhang",
    maxiter: int = 500,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A(x)) + sum_i g_i(x), all smooth, along p <- -g + beta p. What is not named here is as in `lbfgs`.

    Args:
        A, y, regularizer, data_term, x0: see `lbfgs`.
        variant: what beta is: "hager-zhang", "polak-ribiere" (not below 0), "hestenes-stiefel" (not below 0),
            "dai-yuan" or "fletcher-reeves".
        maxiter, rtol, atol, options: see `lbfgs`. With unroll=True step lengths and beta count as constants.

    Returns: Solution with history "objective" and "gradient".
    Raises: as `lbfgs`.
    Cost: one to three values and gradients an iteration; five vectors.
    Source: Hager & Zhang 2006, "A survey of nonlinear conjugate gradient methods", Pacific J. Optim. 2, 35-58; restarts
        where successive gradients are far from orthogonal: Powell 1977, doi 10.1007/BF01593790.
    """
    check_variant("nonlinear_cg", variant)
    unroll = bool(options.get("unroll"))
    problem = smooth_problem("nonlinear_cg", A, y, regularizer, data_term, x0, unroll, variant=variant)
    return run(problem, NonlinearCG, minimiser, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def check_variant(owner: str, variant: Any) -> None:
    """Raise unless it is known."""
    if variant not in VARIANTS:
        raise ArgumentError(f"{owner}: variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
