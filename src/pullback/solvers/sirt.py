"""SIRT: simultaneous iterative reconstruction, weighted by row and column sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core import autograd
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.interop import as_tensor, is_scalar
from pullback.linops import Diagonal
from pullback.solvers.cg import cg
from pullback.solvers.gmres import gmres
from pullback.solvers.iterate import Outcome, State
from pullback.solvers.kaczmarz import relaxation
from pullback.solvers.problem import Problem
from pullback.solvers.run import Equation, Options, run
from pullback.solvers.status import Solution


@dataclass
class _State(State):
    r: Tensor


class SIRT:
    """The recursion of `sirt`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows, columns = _weights(problem)
        self.relax = problem.parts["relax"]
        self.columns = self.relax * columns
        self.is_bounded = _is_bounded(problem)

    def init(self) -> _State:
        """x0 and its residual."""
        pb = self.problem
        x, r = pb.start()
        size = pb.norm(r, pb.n_y)
        step = self._step(pb.y)
        scale = pb.norm(step, pb.n_x)
        error = pb.norm(step if pb.x0 is None else self._step(r), pb.n_x)
        return _State(x, error, scale, {"residual": size}, r=r)

    def _step(self, r: Tensor) -> Tensor:
        """C A^H R r."""
        pb = self.problem
        s = pb.back(r * self.rows)
        return torch.mul(s, self.columns, out=pb.own(s))

    def step(self, state: _State) -> None:
        """One application of A and one of A^H."""
        pb = self.problem
        d = self._step(state.r)
        if self.is_bounded:
            before, x = state.x, torch.add(state.x, d).clamp(pb.parts["lower"], pb.parts["upper"])
            with pb.quiet:
                state.error = pb.norm(torch.sub(x, before, out=pb.own(before)), pb.n_x)
            state.x = x
        else:
            state.error = pb.norm(d, pb.n_x)
            state.x = torch.add(state.x, d, out=pb.own(state.x))
        r = pb.forward(state.x)
        state.r = torch.sub(pb.y, r, out=pb.own(r))
        state.values = {"residual": pb.norm(state.r, pb.n_y)}


def _weights(p: Problem) -> tuple[Tensor, Tensor]:
    """R and C: the inverse row and column sums, 0 where a sum is 0; differentiable in A."""
    ones: dict[str, Any] = {"dtype": p.y.dtype.to_real(), "device": p.y.device}
    given = p.parts["sums"]
    if given is not None:
        return _inverse(given[0].to(**ones)), _inverse(given[1].to(**ones))
    rows, columns = p.A(torch.ones(p.A.dims, **ones)), p.adjoint(torch.ones(p.A.dimsd, **ones))
    for sums in (rows, columns):
        if sums.is_complex() or (autograd.is_eager(sums) and bool((sums < 0).any())):
            raise ArgumentError(
                f"{p.owner}: the entries of A must be >= 0, so that A(1) holds its row sums; got "
                f"{'complex' if sums.is_complex() else 'negative'} sums; give sums=(rows, columns) of |A|, or use cgls"
            )
    return _inverse(rows), _inverse(columns)


def _inverse(sums: Tensor) -> Tensor:
    zero = sums == 0
    return torch.where(zero, 0, 1 / torch.where(zero, 1, sums))


def _is_bounded(p: Problem) -> bool:
    return p.parts["lower"] is not None or p.parts["upper"] is not None


# The equations of the solution --------------------------------------------------------------------------------------


def _pull(p: Problem, x: Tensor) -> Tensor:
    """A^H R (A x - y)."""
    return p.adjoint((p.A(x) - p.y) * _weights(p)[0]).to(p.x_dtype)


def _bounded(p: Problem, x: Tensor) -> Tensor:
    return x - (x - _weights(p)[1] * _pull(p, x)).clamp(p.parts["lower"], p.parts["upper"])


def _rows(p: Problem, w: Tensor) -> Tensor:
    return p.A(_from_rows(p, w)) - p.y


def _from_rows(p: Problem, w: Tensor) -> Tensor:
    x = _weights(p)[1] * p.adjoint(w).to(p.x_dtype)
    return x if p.x0 is None else p.x0 + x


def _to_rows(p: Problem, outcome: Outcome) -> Tensor:
    """The w with x = x0 + C A^H w."""
    step = outcome.x if p.x0 is None else outcome.x - p.x0
    gram = p.A @ Diagonal(_weights(p)[1]) @ p.adjoint
    w: Tensor = cg(gram, p.A(step).to(p.y.dtype), rtol=4 * p.eps, maxiter=max(200, 4 * p.A.shape[0])).x
    return w


def _equation(problem: Problem) -> Equation:
    """The normal equations with the weights R; with fewer rows than columns x = x0 + C A^H w, A x = y."""
    if _is_bounded(problem):
        return Equation(_bounded, gmres)
    m, n = problem.A.shape
    if m < n:
        return Equation(_rows, cg, symmetric=True, state=_to_rows, recover=_from_rows, n=problem.n_y)
    return Equation(_pull, cg, symmetric=True)


def sirt(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    relax: float = 1.0,
    lower: float | None = None,
    upper: float | None = None,
    sums: tuple[Any, Any] | None = None,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Iterate x <- P(x + relax C A^H R (y - A x)), R and C the inverse row and column sums of |A|, P onto the bounds.

    It tends to argmin <A x - y, R (A x - y)> over the bounds, which is weighted least squares.

    Args:
        A: LinearOperator with entries >= 0, such as a projector, unless `sums` are given.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        relax: in (0, 2).
        lower, upper: bounds of every element of x (of a real x); None: no bound.
        sums: (row sums of |A|, of shape A.dimsd; column sums, of shape A.dims), constants. None: A(1) and A^H(1).
        maxiter, rtol, atol: stop when the change of x is at most max(rtol |relax C A^H R y|, atol), or after maxiter
            iterations. Few iterations regularise.
        options: see `pullback.solvers.run.Options`.

    Implicit derivatives need x to be unique (with fewer rows than columns and without bounds: the rows independent).

    Returns: Solution with history "residual" |y - A x|.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and one of A^H an iteration; one more of each for the sums.
    Source: Gilbert 1972, doi 10.1016/0022-5193(72)90180-4; weights and convergence: Censor & Elfving 2002, doi
        10.1137/S089547980138705X; Gregor & Benson 2008, doi 10.1109/TMI.2008.923696.
    """
    relax = relaxation("sirt", relax)
    bounds = []
    for name, value in (("lower", lower), ("upper", upper)):
        if value is not None and (not is_scalar(value) or isinstance(value, complex)):
            raise ArgumentError(f"sirt: {name} must be a number or None; got {value!r}")
        bounds.append(None if value is None else float(value))
    if None not in bounds and not bounds[0] < bounds[1]:  # type: ignore[operator]
        raise ArgumentError(f"sirt: lower must be less than upper; got {lower!r} and {upper!r}")
    problem = Problem("sirt", A, y, x0, relax=relax, lower=bounds[0], upper=bounds[1], sums=None)
    if bounds != [None, None] and problem.x_dtype.is_complex:
        raise ArgumentError("sirt: bounds need a real x; got complex data; leave lower and upper away")
    if sums is not None:
        problem.parts["sums"] = _given(sums, problem)
    return run(problem, SIRT, _equation(problem), maxiter=maxiter, rtol=rtol, atol=atol, **options)


def _given(sums: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    if not isinstance(sums, (tuple, list)) or len(sums) != 2:
        raise ArgumentError(f"sirt: sums must be (row sums, column sums); got {type(sums).__name__}")
    found = []
    for what, value, dims in (("row", sums[0], problem.A.dimsd), ("column", sums[1], problem.A.dims)):
        t = as_tensor(value, "sums", "sirt").detach()
        if tuple(t.shape) != dims or t.is_complex():
            raise ShapeError(f"sirt: the {what} sums must be real of shape {dims}; got {tuple(t.shape)} {t.dtype}")
        found.append(t)
    return found[0], found[1]
