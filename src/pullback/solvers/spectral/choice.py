"""The regularization parameter from the data: discrepancy principle, GCV, L-curve, SURE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.operator import LinearOperator
from pullback.solvers.problem import Problem
from pullback.solvers.spectral.decompose import SVD, as_svd
from pullback.solvers.spectral.figures import plot_choice, png
from pullback.solvers.spectral.filters import project
from pullback.solvers.spectral.modes import Family, Iterative, Modes, check_seminorm, general_modes, svd_modes
from pullback.solvers.spectral.numbers import noise_share
from pullback.solvers.spectral.space import SMALL, as_linear, has_live

METHODS = ("discrepancy", "gcv", "lcurve", "sure")
_GRID, _COARSE = 200, 25  # parameters at which a curve is computed, from a decomposition or by solves
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Choice:
    """A parameter and the curve that it was read from.

    Attributes:
        parameter: the choice, of the shape of the batch.
        parameters: where the curve was computed, shape (p,).
        values: the curve, shape (p, *batch): |A x - y| (discrepancy), the GCV function, the estimate of
            |A x - A x_true|^2 (sure), the curvature of the L-curve.
        residual, seminorm: |A x - y| and |L x| there, shape (p, *batch).
        name: "alpha" or "k".
        method: which criterion.
        target: what the residual should be (discrepancy), of the shape of the batch, else None.
        note: what there is to say about the choice, or "".
    """

    parameter: Tensor
    parameters: Tensor
    values: Tensor
    residual: Tensor
    seminorm: Tensor
    name: str
    method: str
    target: Tensor | None = None
    note: str = ""

    def __repr__(self) -> str:
        return f"Choice({self.describe()})"

    def describe(self) -> str:
        """The choice in words."""
        values = self.parameter.flatten().tolist()
        text = f"{values[0]:.4g}" if len(values) == 1 else f"{min(values):.4g} ... {max(values):.4g}"
        return f"{self.name} = {text} by {self.method}" + (f" ({self.note})" if self.note else "")

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve of the first member into a matplotlib axis (a new figure if None). Returns: the axis."""
        return plot_choice(self, ax)

    def _repr_png_(self) -> bytes:
        return png(self.plot)


def choose(method: str, A: Any, y: Any, **options: Any) -> Choice:
    """`discrepancy`, `gcv`, `lcurve` or `sure` by name; `noise` is dropped where the method needs none."""
    if method not in METHODS:
        raise ArgumentError(f"choose: method must be one of {', '.join(METHODS)}; got {method!r}")
    needs = method in ("discrepancy", "sure")
    noise = options.pop("noise", None)
    tau = options.pop("tau", 1.0)
    if needs and noise is None:
        raise ArgumentError(f"{method}: noise must be given, the standard deviation of an element of y; gcv needs none")
    if method == "discrepancy":
        return discrepancy(A, y, noise, tau=tau, **options)
    return sure(A, y, noise, **options) if needs else {"gcv": gcv, "lcurve": lcurve}[method](A, y, **options)


def discrepancy(
    A: Any,
    y: Any,
    noise: Any,
    *,
    tau: float = 1.0,
    L: Any = None,
    filter: str = "tikhonov",
    rtol: float = 1e-6,
    maxiter: int = 1000,
) -> Choice:
    """|A x_alpha - y| = tau noise sqrt(m): the solution fits the data as well as the noise allows, not better.

    Args:
        A: LinearOperator, or its SVD.
        y: data of shape (..., *A.dimsd), or flat; every member of the batch gets its own parameter.
        noise: standard deviation of an element of y (complex: sqrt(E |e|^2)), a number or one for each member.
        tau: >= 1 for safety against too small an estimate of the noise.
        L: as in `tikhonov`.
        filter: "tikhonov", or "tsvd": the smallest k with |A x_k - y| <= tau noise sqrt(m).
        rtol, maxiter: of LSQR, where A has more than 1024 rows or columns and no SVD is given.

    Returns: Choice. Where no parameter fits (the residual of least squares is larger, or |y| smaller than the noise)
    the nearest is taken, and `note` says so.
    Raises: ArgumentError, ShapeError, DtypeError, NotDifferentiableError.
    Cost: a decomposition; for large A about twenty LSQR solves (root finding on log alpha, and the curve).
    Source: V. Morozov 1966, Soviet Math. Dokl. 7, 414.
    """
    problem, family = _family("discrepancy", A, y, L, filter, rtol, maxiter)
    sigma = problem.number(noise, "noise", positive=True)
    if not (isinstance(tau, (int, float)) and tau > 0):
        raise ArgumentError(f"discrepancy: tau must be a number > 0; got {tau!r}")
    root_m = math.sqrt(math.prod(problem.A.dimsd))
    target = torch.as_tensor(tau * sigma * root_m, dtype=problem.y.dtype.to_real(), device=problem.y.device)
    target = target.detach().expand(problem.batch)
    if isinstance(family, _Truncations):
        residual = family.residual2.sqrt()
        below = residual <= target
        k = torch.where(below.any(0), below.long().argmax(0), len(family.counts) - 1)
        note = "" if bool(below.any(0).all()) else "no k reaches the noise level: the largest"
        return family.choice(k, residual, "discrepancy", target, note)
    finder = _bisect if isinstance(family, Modes) else _illinois
    alpha, note = finder(family, target)
    grid = _grid(family, alpha)
    residual, seminorm, _ = _curve(family, grid, False, problem)
    return Choice(alpha, grid, residual, residual, seminorm, "alpha", "discrepancy", target, _limited(family, note))


def gcv(
    A: Any,
    y: Any,
    *,
    L: Any = None,
    filter: str = "tikhonov",
    rtol: float = 1e-6,
    maxiter: int = 1000,
    samples: int = 8,
    seed: int = 0,
) -> Choice:
    """argmin_alpha m |A x_alpha - y|^2 / (m - trace H_alpha)^2, where A x_alpha = H_alpha y: no noise level needed.

    Args:
        A, y, L, filter, rtol, maxiter: as in `discrepancy`.
        samples, seed: random vectors for the trace, where A is large (Hutchinson).

    Returns: Choice. White noise is assumed. Raises: as `discrepancy`.
    Cost: a decomposition; for large A 25 LSQR solves for y and `samples` vectors.
    Source: Golub, Heath, Wahba 1979, doi 10.1080/00401706.1979.10489751.
    """
    problem, family = _family("gcv", A, y, L, filter, rtol, maxiter, samples, seed)

    def score(residual: Tensor, free: Tensor) -> Tensor:
        return torch.where(free > 0, family.n_data * residual**2 / torch.where(free > 0, free, 1) ** 2, math.inf)

    return _minimise("gcv", problem, family, score)


def sure(
    A: Any,
    y: Any,
    noise: Any,
    *,
    L: Any = None,
    filter: str = "tikhonov",
    rtol: float = 1e-6,
    maxiter: int = 1000,
    samples: int = 8,
    seed: int = 0,
) -> Choice:
    """argmin_alpha |A x_alpha - y|^2 - m noise^2 + 2 noise^2 trace H_alpha, unbiased for E |A x_alpha - A x_true|^2.

    Args:
        A, y, noise, L, filter, rtol, maxiter: as in `discrepancy`.
        samples, seed: as in `gcv`.

    Returns: Choice. Raises: as `discrepancy`. Cost: as `gcv`.
    Source: C. Stein 1981, doi 10.1214/aos/1176345632; for linear methods C. Mallows 1973,
    doi 10.1080/00401706.1973.10489103.
    """
    problem, family = _family("sure", A, y, L, filter, rtol, maxiter, samples, seed)
    sigma = problem.number(noise, "noise", positive=True)
    variance = family.share * (sigma.detach() if isinstance(sigma, Tensor) else sigma) ** 2

    def score(residual: Tensor, free: Tensor) -> Tensor:
        return residual**2 + variance * (family.n_data - 2 * free)

    return _minimise("sure", problem, family, score)


def lcurve(A: Any, y: Any, *, L: Any = None, rtol: float = 1e-6, maxiter: int = 1000) -> Choice:
    """The alpha where the curve (log |A x_alpha - y|, log |L x_alpha|) bends most. A heuristic: no noise level needed.

    Args:
        A, y, L, rtol, maxiter: as in `discrepancy`.

    Returns: Choice. Raises: as `discrepancy`. Cost: a decomposition; for large A 25 LSQR solves.
    Source: P. C. Hansen 1992, doi 10.1137/1034115; fails for very smooth x: M. Hanke 1996, doi 10.1007/BF01955871.
    """
    problem, family = _family("lcurve", A, y, L, "tikhonov", rtol, maxiter)
    assert not isinstance(family, _Truncations), "lcurve of truncations; please report"
    grid = _grid(family)
    residual, seminorm, _ = _curve(family, grid, False, problem)
    if isinstance(family, Modes):
        values = torch.stack([family.curvature(a) for a in grid])
        alpha = _golden(lambda t: -family.curvature(t.exp()), grid.log(), -values)
    else:
        values = _bend(residual.log(), seminorm.log())
        alpha = grid[values.argmax(0)]
    return Choice(
        alpha, grid, values, residual, seminorm, "alpha", "lcurve", None, _limited(family, _edge(grid, -values))
    )


# What the criteria share --------------------------------------------------------------------------------------------


class _Truncations:
    """The family of truncated solutions: k = 0, 1, ... up to the numerical rank."""

    def __init__(self, problem: Problem, svd: SVD) -> None:
        beta, distance2 = project(problem, svd)
        rank = svd.rank()
        power = (beta.abs() ** 2).movedim(-1, 0)
        after = power.flip(0).cumsum(0).flip(0)
        rest = torch.cat((after, torch.zeros_like(after[:1])))[: rank + 1]
        self.residual2 = distance2 + rest
        inverse = (1 / svd.S[:rank]).to(power)
        norm2 = (power[:rank] * inverse.reshape(-1, *(1,) * (power.ndim - 1)) ** 2).cumsum(0)
        self.norm2 = torch.cat((torch.zeros_like(self.residual2[:1]), norm2))
        self.counts = torch.arange(rank + 1, device=beta.device)
        self.n_data, self.share = svd.n_data, noise_share(svd)

    def choice(self, k: Tensor, values: Tensor, method: str, target: Tensor | None = None, note: str = "") -> Choice:
        """What a criterion returns."""
        return Choice(
            k, self.counts, values, self.residual2.sqrt(), self.norm2.sqrt(), "k", method, target, note
        )  # fmt: skip


def _family(
    owner: str,
    A: Any,
    y: Any,
    L: Any,
    filter: str,
    rtol: float,
    maxiter: int,
    samples: int = 8,
    seed: int = 0,
) -> tuple[Problem, Any]:
    """The data checked, and all solutions: Modes, Iterative or _Truncations."""
    if filter not in ("tikhonov", "tsvd"):
        raise ArgumentError(f"{owner}: filter must be 'tikhonov' or 'tsvd'; got {filter!r}")
    op = A.operator() if isinstance(A, SVD) and L is None else A.A if isinstance(A, SVD) else as_linear(A, owner)
    problem = Problem(owner, op, y)
    if torch.is_grad_enabled() and (problem.y.requires_grad or has_live(op)):
        raise NotDifferentiableError(
            f"{owner}: the derivative of a chosen parameter is not computed; choose it first from y.detach() under "
            f"torch.no_grad(), then pass the number"
        )
    if filter == "tsvd":
        if L is not None:
            raise ArgumentError(f"{owner}: filter 'tsvd' knows no L; leave it out, or use 'tikhonov'")
        return problem, _Truncations(problem, as_svd(A, owner))
    return problem, family(problem, A, L, rtol, maxiter, samples, seed)


def family(problem: Problem, A: Any, L: Any, rtol: float, maxiter: int, samples: int = 8, seed: int = 0) -> Any:
    """All Tikhonov solutions: by a decomposition where one is given or A is small, else by solves."""
    seminorm: LinearOperator | None = None
    if L is not None:
        seminorm = as_linear(L, problem.owner, "L")
        check_seminorm(problem.A, seminorm)
    largest = max(*problem.A.shape, *(seminorm.shape if seminorm is not None else ()))
    if seminorm is None and (isinstance(A, SVD) or largest <= SMALL):
        return svd_modes(problem, as_svd(A, problem.owner))
    if seminorm is not None and largest <= SMALL:
        return general_modes(problem, problem.A, seminorm)
    return Iterative(problem, seminorm, rtol, maxiter, samples, seed)


def _grid(family: Family, alpha: Tensor | None = None) -> Tensor:
    low, high = family.low, family.high
    if alpha is not None and bool((alpha > 0).all()):
        low, high = min(low, float(alpha.min()) / 3), max(high, float(alpha.max()) * 3)
    count = _GRID if isinstance(family, Modes) else _COARSE
    if alpha is not None and isinstance(family, Iterative):
        low, high, count = float(alpha.min()) / 10, float(alpha.max()) * 10, 7  # each costs a solve
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _curve(family: Any, grid: Tensor, free: bool, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """|A x - y|, |L x| and m - trace H at each alpha of the grid, shape (p, *batch)."""
    points = [family.evaluate(a.to(problem.y.device), free) for a in grid]
    residual, seminorm, frees = (
        torch.stack([getattr(p, name).expand(problem.batch) for p in points]) for name in _FIELDS
    )
    return residual, seminorm, frees


_FIELDS = ("residual", "seminorm", "free")


def _minimise(method: str, problem: Problem, family: Any, score: Callable[[Tensor, Tensor], Tensor]) -> Choice:
    if isinstance(family, _Truncations):
        free = (family.n_data - family.counts).to(family.residual2)
        values = score(family.residual2.sqrt(), free.reshape(-1, *(1,) * len(problem.batch)))
        values = values.expand(family.residual2.shape)
        return family.choice(values.argmin(0), values, method)
    grid = _grid(family)
    residual, seminorm, free = _curve(family, grid, True, problem)
    values = score(residual, free)

    def at(t: Tensor) -> Tensor:
        point = family.evaluate(t.exp(), True)
        return score(point.residual, point.free)

    alpha = _golden(at, grid.log(), values) if isinstance(family, Modes) else _parabola(grid.log(), values)
    return Choice(alpha, grid, values, residual, seminorm, "alpha", method, None, _limited(family, _edge(grid, values)))


def _edge(grid: Tensor, values: Tensor) -> str:
    best = values.argmin(0)
    return "at the end of the range searched" if bool(((best == 0) | (best == len(grid) - 1)).any()) else ""


def _limited(family: Any, note: str) -> str:
    limited = isinstance(family, Iterative) and family.is_limited
    return "; ".join(t for t in (note, "some LSQR solves ended at maxiter" if limited else "") if t)


def _neighbours(t: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = values.argmin(0).clamp(1, len(t) - 2).to(t.device)
    return t[best - 1], t[best], t[best + 1]


def _golden(function: Callable[[Tensor], Tensor], t: Tensor, values: Tensor) -> Tensor:
    """The minimiser (exp t) between the neighbours of the best grid point, by golden section, for each member."""
    a, _, b = (v.to(values.device) for v in _neighbours(t, values))
    for _ in range(45):
        c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        left = function(c) < function(d)
        a, b = torch.where(left, a, c), torch.where(left, d, b)
    return ((a + b) / 2).exp()


def _parabola(t: Tensor, values: Tensor) -> Tensor:
    """The minimiser (exp t) of the parabola through the best grid point and its neighbours."""
    best = values.argmin(0).clamp(1, len(t) - 2)
    low, middle, high = (values.gather(0, (best + o)[None])[0] for o in (-1, 0, 1))
    bend = low - 2 * middle + high
    shift = torch.where(bend > 0, (low - high) / (2 * torch.where(bend > 0, bend, 1)), 0).clamp(-1, 1)
    return (t.to(values.device)[best] + shift * (t[1] - t[0]).to(values.device)).exp()


def _bisect(family: Modes, target: Tensor) -> tuple[Tensor, str]:
    """The alpha with |A x - y| = target, which grows with alpha: to rounding, for each member."""
    a = torch.full_like(target, math.log(family.low) - 12)
    b = torch.full_like(target, math.log(family.high) + 12)
    notes = _bounds(family.evaluate(a.exp()).residual, family.evaluate(b.exp()).residual, target)
    for _ in range(70):
        middle = (a + b) / 2
        less = family.evaluate(middle.exp()).residual < target
        a, b = torch.where(less, middle, a), torch.where(less, b, middle)
    return ((a + b) / 2).exp(), notes


def _bounds(low: Tensor, high: Tensor, target: Tensor) -> str:
    if bool((low > target).any()):
        return "the residual of least squares exceeds the noise: the smallest"
    return "the data lie below the noise level: the largest" if bool((high < target).any()) else ""


def _illinois(family: Iterative, target: Tensor) -> tuple[Tensor, str]:
    """As `_bisect`, with few solves: a bracket, then regula falsi (Illinois) on log alpha, to 0.1 % of the residual."""

    def gap(t: Tensor) -> Tensor:
        residual = family.evaluate(t.exp(), False).residual
        return (residual / target).clamp(min=1e-300).log()

    a = torch.full_like(target, math.log(1e-2 * family.scale))
    b, step = a.clone(), math.log(10)
    fa = gap(a)
    fb = fa
    for _ in range(6):
        up, down = fb < 0, fa > 0
        if not bool((up | down).any()):
            break
        fresh = gap(torch.where(up, b + step, a - step))
        a, fa = torch.where(down, a - step, torch.where(up, b, a)), torch.where(down, fresh, torch.where(up, fb, fa))
        b, fb = torch.where(up, b + step, b), torch.where(up, fresh, fb)
    note = _bounds(fa.exp() * target, fb.exp() * target, target)
    best, error = torch.where(fa.abs() < fb.abs(), a, b), torch.minimum(fa.abs(), fb.abs())
    for _ in range(20):
        open_ = (error > 1e-3) & (fa <= 0) & (fb >= 0)
        if not bool(open_.any()):
            break
        c = torch.where(fb > fa, b - fb * (b - a) / torch.where(fb > fa, fb - fa, 1), a)
        fc = gap(c)
        better = open_ & (fc.abs() < error)
        best, error = torch.where(better, c, best), torch.where(better, fc.abs(), error)
        left = fc < 0
        fa, fb = torch.where(left, fc, fa / 2), torch.where(left, fb / 2, fc)
        a, b = torch.where(left, c, a), torch.where(left, b, c)
    return best.exp(), note


def _bend(u: Tensor, v: Tensor) -> Tensor:
    """The curvature of the curve (u, v) by central differences, positive at the corner of an L."""
    du, dv = torch.gradient(u, dim=0)[0], torch.gradient(v, dim=0)[0]
    ddu, ddv = torch.gradient(du, dim=0)[0], torch.gradient(dv, dim=0)[0]
    bend = (du * ddv - ddu * dv) / (du**2 + dv**2).clamp(min=1e-300) ** 1.5
    bend[[0, 1, -2, -1]] = -math.inf
    return bend
