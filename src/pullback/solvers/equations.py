"""The equations that solutions satisfy, through which they are differentiated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from pullback.solvers.cg import cg
from pullback.solvers.iterate import Outcome
from pullback.solvers.problem import Problem
from pullback.solvers.run import Equation


def least_squares(problem: Problem) -> Equation:
    """The normal equations A^H (A x - y) + damp^2 x = 0.

    Without damping and with fewer rows than columns: A A^H w = y - A x0, x = x0 + A^H w, which is the solution nearest
    to x0 if the rows are independent.
    """
    damp: Any = problem.parts.get("damp", 0.0)
    m, n = problem.A.shape
    if m < n and not isinstance(damp, Tensor) and damp == 0:
        return replace(_WIDE, n=problem.n_y)
    return _TALL


def _normal(p: Problem, x: Tensor) -> Tensor:
    damp: Any = p.parts.get("damp", 0.0)
    v = p.adjoint(p.A(x) - p.y).to(p.x_dtype)
    if isinstance(damp, Tensor) or damp:
        v = v + p.x_scalar(p.number(damp, "damp")) ** 2 * x
    return v


def _rows(p: Problem, w: Tensor) -> Tensor:
    return p.A(_from_rows(p, w)) - p.y


def _from_rows(p: Problem, w: Tensor) -> Tensor:
    x = p.adjoint(w).to(p.x_dtype)
    return x if p.x0 is None else p.x0 + x


def _to_rows(p: Problem, outcome: Outcome) -> Tensor:
    step = outcome.x if p.x0 is None else outcome.x - p.x0
    x: Tensor = cg(p.A @ p.adjoint, p.A(step).to(p.y.dtype), rtol=4 * p.eps, maxiter=max(200, 4 * p.A.shape[0])).x
    return x


_TALL = Equation(_normal, cg, symmetric=True)
_WIDE = Equation(_rows, cg, symmetric=True, state=_to_rows, recover=_from_rows)
