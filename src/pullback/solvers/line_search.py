"""Step lengths along descent directions, each member of a batch with its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pullback.solvers.iterate import code
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.scalars import Number, finite, larger, ratio, root, smaller, where
from pullback.solvers.status import Status

_DECREASE = 1e-4  # c1 of the Wolfe conditions
_TRIALS = 30
_NOISE = 10.0  # rounding of an objective, in eps
_FAR_NOISE = 100.0  # a slope above so many times the noise should allow a step


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without derivatives of either mode: `detach` alone keeps tangents."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            return function(*args)

    return wrapped


def every(condition: Any) -> bool:
    """Whether a condition holds for all members."""
    return bool(condition.all()) if isinstance(condition, Tensor) else bool(condition)


def noise(pb: Problem, phi: Number, size: Number) -> Number:
    """Rounding of phi: relative to phi itself, and in |r|^2 / 2, r = F(x) - y, to |r| |y|, for size = |y| (else 0)."""
    return pb.eps * (_NOISE * abs(phi) + 4.0 * size * root(2 * larger(phi, 0.0)))


@dataclass
class Step:
    """Where a line search ended: x + t p with phi and its gradient there; t = 0 if no step lowers phi."""

    t: Number
    x: Tensor
    phi: Number
    g: Tensor
    unbounded: Any  # phi goes on falling as far as was looked


@constant
def wolfe(
    objective: Callable[[Tensor], tuple[Number, Tensor]],
    pb: Problem,
    x: Tensor,
    p: Tensor,
    phi0: Number,
    g0: Tensor,
    t: Number,
    noise: Number,
    curvature: float,
) -> Step:
    """A step with the strong Wolfe conditions phi(t) <= phi(0) + c1 t phi'(0), |phi'(t)| <= curvature |phi'(0)|.

    The bracket (lo, hi) keeps a point with a sufficient decrease and a negative slope on its left, and one without
    sufficient decrease or with a positive slope on its right, so a step that satisfies both lies inside. Where the
    decrease drowns in rounding, it is read off the slopes. phi may be inf or nan beyond a barrier.

    Source: Nocedal & Wright 2006, doi 10.1007/978-0-387-40065-5, section 3.5; Hager & Zhang 2005,
    doi 10.1137/030601880, for the rounding.
    """
    slope0 = pb.dot(g0, p, pb.n_x)
    lo, hi = pb.fill(0.0), pb.fill(math.inf)
    phi_lo, d_lo, phi_hi, d_hi = phi0, slope0, hi, hi
    best = Step(pb.fill(0.0), x, phi0, g0, False)
    running = slope0 < 0
    for k in range(_TRIALS):
        point = add_scaled(x, pb.x_scalar(t), p, None)
        phi, g = objective(point)
        d = pb.dot(g, p, pb.n_x)
        known = finite(phi) & finite(d)
        low = (phi <= phi0 + _DECREASE * t * slope0) | ((phi <= phi0 + noise) & (d <= (2 * _DECREASE - 1) * slope0))
        low = low & known
        found = low & (abs(d) <= -curvature * slope0)
        _keep(pb, best, running & (found | (low & (phi <= best.phi))), t, point, phi, g)
        running = running & (found ^ True)
        left = low & (d < 0)
        secant = t - d * ratio(t - lo, d - d_lo)
        lo, phi_lo, d_lo = where(left, t, lo), where(left, phi, phi_lo), where(left, d, d_lo)
        right = left ^ True
        hi, phi_hi, d_hi = where(right, t, hi), where(right, phi, phi_hi), where(right, d, d_hi)
        running = running & (hi - lo > pb.eps * lo)
        if not every(running ^ True):
            grown = where(secant > 0, smaller(larger(secant, 2 * t), 10 * t), 4 * t)
            inner = _inside(lo, hi, phi_lo, phi_hi, d_lo, d_hi, noise, k % 3 == 2)
            t = where(running, where(finite(hi), inner, grown), t)
        else:
            break
    best.unbounded = running & (finite(hi) ^ True)
    return best


def _keep(pb: Problem, best: Step, better: Any, t: Number, x: Tensor, phi: Number, g: Tensor) -> None:
    best.t, best.phi = where(better, t, best.t), where(better, phi, best.phi)
    if every(better):
        best.x, best.g = x, g
    elif isinstance(better, Tensor):
        mask = pb.x_scalar(better)
        best.x, best.g = torch.where(mask, x, best.x), torch.where(mask, g, best.g)


def _inside(
    lo: Number, hi: Number, phi_lo: Number, phi_hi: Number, d_lo: Number, d_hi: Number, noise: Number, halve: bool
) -> Number:
    """The minimiser of the cubic through both ends, of the parabola through both slopes where the values are noise."""
    width = hi - lo
    middle = lo + width / 2
    if halve:
        return middle
    theta = 3 * ratio(phi_lo - phi_hi, width) + d_lo + d_hi
    gamma = root(larger(theta * theta - d_lo * d_hi, 0.0))
    cubic = hi - width * ratio(d_hi + gamma - theta, d_hi - d_lo + 2 * gamma)
    parabola = lo - d_lo * ratio(width, d_hi - d_lo)
    t = where(abs(phi_hi - phi_lo) > noise, cubic, parabola)
    t = smaller(larger(t, lo + 0.1 * width), hi - 0.1 * width)
    return where(finite(t), t, middle)


@constant
def backtrack(
    value: Callable[[Tensor], Number], pb: Problem, x: Tensor, p: Tensor, phi0: Number, slope: Number, noise: Number
) -> Number:
    """The first t = 1, t_1 ... with phi(x + t p) <= phi(x) + c1 t slope, halving or faster; 0 if there is none.

    Source: Armijo 1966, doi 10.2140/pjm.1966.16.1.
    """
    t = pb.fill(1.0)
    ok: Any = slope > 0  # of no member that has a direction
    for _ in range(_TRIALS):
        phi = value(add_scaled(x, pb.x_scalar(t), p, None))
        ok = (phi <= phi0 + _DECREASE * t * slope + noise) & finite(phi)
        if every(ok):
            return t
        shrink = ratio(-slope * t, 2 * (phi - phi0 - t * slope))
        shrink = where(finite(shrink), smaller(larger(shrink, 0.1), 0.5), 0.1)
        t = where(ok, t, t * shrink)
    return where(ok, t, pb.fill(0.0))


_PATIENCE = 10  # steps that bring nothing before a member is at rounding level


def idle_steps(idle: Number, phi: Number, before: Number, error: Number, error_before: Number, noise: Number) -> Number:
    """How many steps in a row have lowered neither phi nor its gradient."""
    nothing = (before - phi <= 0.5 * noise) & (error >= 0.5 * error_before)
    return where(nothing, idle + 1.0, 0.0 * idle)


def verdict(idle: Number, stuck: Any, slope: Number, noise: Number, unbounded: Any = False) -> Any:
    """PRECISION for members that bring nothing any more, BREAKDOWN for those that should (phi is not smooth there).

    DIVERGED for members whose phi falls without bound.
    """
    rounding = where(abs(slope) <= _FAR_NOISE * noise, code(Status.PRECISION), code(Status.LINE_SEARCH))
    found = where(stuck, rounding, where(idle >= _PATIENCE, code(Status.PRECISION), 0))
    return where(unbounded, code(Status.DIVERGED), found)
