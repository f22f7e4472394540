"""Chebyshev's semi-iteration: a fixed polynomial of A, without inner products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.solvers.cg import Shifted, cg, shifted, square_problem
from pullback.solvers.equations import least_squares
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.status import Solution


@dataclass
class _State(State):
    r: Tensor  # y - A x, or y - (A + damp) x
    d: Tensor  # the next change of x
    rho: Any


class Chebyshev:
    """The recursion of `chebyshev`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.normal = problem, problem.parts["normal"]
        damp = problem.number(problem.parts["damp"], "damp")
        self.damp2 = problem.x_scalar(damp) ** 2
        self.is_damped = isinstance(damp, Tensor) or damp != 0
        self.shifted = None if self.normal else Shifted(problem)
        low, high = problem.parts["interval"]
        shift = damp * damp if self.normal else damp
        low, high = low + shift, high + shift
        self.centre, self.sigma = (high + low) / 2, (high + low) / (high - low)
        self.inverse, self.double = problem.x_scalar(1 / self.centre), problem.x_scalar(4 / (high - low))

    def _gradient(self, r: Tensor, x: Tensor) -> Tensor:
        """The residual of the equation that is solved: r itself, or A^H r - damp^2 x."""
        if not self.normal:
            return r
        s = self.problem.back(r)
        return add_scaled(s, -self.damp2, x, self.problem.own(s)) if self.is_damped else s

    def init(self) -> _State:
        """x0 and the first change, a Richardson step."""
        pb = self.problem
        if self.shifted is None:
            x, r = pb.start()
            g = self._gradient(r, x)
            scale = pb.norm(g if pb.x0 is None else pb.back(pb.y), pb.n_x)
        else:
            x, r = self.shifted.start()
            g, scale = r, pb.norm(pb.y, pb.n_y)
        error = pb.norm(g, pb.n_x)
        return _State(x, error, scale, self._values(r, error), r=r, d=g * self.inverse, rho=1 / self.sigma)

    def _values(self, r: Tensor, error: Any) -> dict[str, Any]:
        return (
            {"residual": self.problem.norm(r, self.problem.n_y), "gradient": error}
            if self.normal
            else {"residual": error}
        )

    def step(self, state: _State) -> None:
        """One application of A, and one of A^H for least squares."""
        pb = self.problem
        state.x = torch.add(state.x, state.d, out=pb.own(state.x))
        q = pb.forward(state.d) if self.shifted is None else self.shifted(state.d)
        state.r = torch.sub(state.r, q, out=pb.own(state.r))
        g = self._gradient(state.r, state.x)
        state.error = pb.norm(g, pb.n_x)
        state.values = self._values(state.r, state.error)
        rho = 1 / (2 * self.sigma - state.rho)
        d = torch.mul(state.d, pb.x_scalar(rho * state.rho), out=pb.own(state.d))
        state.d = add_scaled(d, pb.x_scalar(rho) * self.double, g, pb.own(d))
        state.rho = rho


def chebyshev(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    interval: tuple[float, float] | None = None,
    normal: bool = False,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Solve (A + damp I) x = y for A Hermitian positive definite, by the polynomial that is best for its spectrum.

    With normal=True: argmin_x |A x - y|^2 + damp^2 |x|^2 for A of any shape, through A^H A.

    Useful where inner products are what costs (many devices), where x must depend linearly on y whatever y is (few
    iterations are a known filter of the spectrum, its derivative the same filter), and inside other methods. Otherwise
    `cg` and `cgls` are faster and need no interval.

    Args:
        A: LinearOperator, Hermitian positive definite unless normal=True (not verified).
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        damp: >= 0; a number or one for each member of the batch.
        interval: (a, b) that holds all eigenvalues of A (normal=True: of A^H A) without damp; eigenvalues above b make
            it diverge, those below a converge slowly. None: from 0 to the bound by `A.norm_bound()`, which needs
            damp > 0.
        normal: solve the least-squares problem.
        maxiter, rtol, atol: stop when |y - (A + damp) x| <= max(rtol |y|, atol) (normal=True: when |A^H (y - A x) -
            damp^2 x| <= max(rtol |A^H y|, atol)), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    Converges as 2 ((sqrt(k) - 1) / (sqrt(k) + 1))^n, k = b / a with damp in both.

    Returns: Solution with history "residual" (and "gradient" if normal).
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A (normal=True: and one of A^H) an iteration; three vectors.
    Source: Golub & Varga 1961, doi 10.1007/BF01386013; Saad 2003, doi 10.1137/1.9780898718003, algorithm 12.1.
    """
    parts: dict[str, Any] = {"damp": damp, "normal": bool(normal)}
    problem = Problem("chebyshev", A, y, x0, **parts) if normal else square_problem("chebyshev", A, y, x0, **parts)
    positive = isinstance(damp, Tensor) or problem.number(damp, "damp") > 0
    problem.number(damp, "damp")
    if interval is None:
        if not positive:
            raise ArgumentError(
                "chebyshev: the smallest eigenvalue is not known; got interval=None with damp=0; give interval=(a, b), "
                "or use cg or cgls, which need none"
            )
        bound = problem.A.norm_bound()
        interval = (0.0, bound**2 if normal else bound)
    low, high = _interval(interval, positive)
    problem.parts["interval"] = (low, high)
    equation = least_squares(problem) if normal else shifted(cg, symmetric=True)
    return run(problem, Chebyshev, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def _interval(interval: Any, damped: bool) -> tuple[float, float]:
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low = high = math.nan
    least = "0 <= a" if damped else "0 < a"
    if not (math.isfinite(high) and (low > 0 or (damped and low == 0)) and low <= high and high > 0):
        raise ArgumentError(f"chebyshev: interval must be (a, b) with {least} <= b; got {interval!r}")
    return low, max(high, low * (1 + 1e-6))  # one point alone would be no interval
