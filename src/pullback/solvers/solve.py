"""One front door: the solver that suits the problem, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import Unpack

from pullback.functionals import Functional, SquaredL2
from pullback.functionals.base import Scaled, Sum
from pullback.solvers.admm import ADMM, minimize, prepared
from pullback.solvers.composite import DataTerm, composite, gather
from pullback.solvers.lsqr import lsqr
from pullback.solvers.pdhg import pdhg
from pullback.solvers.proximal import fista
from pullback.solvers.run import Options
from pullback.solvers.splitting import condat_vu
from pullback.solvers.status import Solution

_FEW = 3  # conjugate gradient steps that the preconditioner of admm's subproblem may need at most


def solve(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    maxiter: int | None = None,
    rtol: float | None = None,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + regularizer(x) + constraint(x), by the solver that suits; `Solution.method` says which and why.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer: None, a functional, or a sum or list of them.
        data_term: a functional of A x - y such as `L1()` or `Huber()`, or of A x and y, `KullbackLeibler()`; half the
            squared norm if None.
        constraint: a functional such as `Box(0, None)`, or a sum or list of them.
        x0: where to start, of shape (..., *A.dims); zero if None.
        maxiter, rtol: as in the chosen solver (for lsqr rtol means atol and btol); its defaults if None.
        options: see `pullback.solvers.run.Options`.

    | D | terms | solver |
    |---|---|---|
    | least squares | none, or c * SquaredL2() without centre | lsqr, damp = sqrt(c) |
    | smooth | their sum has a prox in closed form; or A^H A = c I and one term has a prox | fista |
    | least squares | else, where (A^H A + rho sum K_i^H K_i)^-1 is in closed form or well preconditioned | admm |
    | with a prox | else | pdhg |
    | smooth, without prox | else | condat_vu |

    Returns: Solution. Raises: what the chosen solver raises.
    Cost: that of the solver; before admm or pdhg at most 20 applications of A^H A to look at its structure.
    """
    terms = gather("solve", regularizer, constraint)
    common: dict[str, Any] = {"x0": x0, **options}
    if maxiter is not None:
        common["maxiter"] = maxiter
    problem = composite("solve", A, y, x0, terms, data_term)
    data = DataTerm(problem)
    damp = _damping(terms) if data.f is None else None
    if damp is not None:
        if rtol is not None:
            common |= {"atol": rtol, "btol": rtol}
        why = "a least-squares problem with Tikhonov damping" if terms else "a least-squares problem"
        return _named(lsqr(A, y, damp=damp, **common), f"lsqr: {why}")
    if rtol is not None:
        common["rtol"] = rtol
    g = Sum(*terms) if len(terms) > 1 else terms[0] if terms else None
    if g is not None and g.has_prox and data.smooth:
        if _is_closed(g):
            return _named(fista(A, y, g, data_term=data_term, **common), f"fista: {g!r} has a direct prox")
        if len(terms) == 1 and problem.A._isometry():
            return _named(fista(A, y, g, data_term=data_term, **common), f"fista: A^H A = c I, and {g!r} has a prox")
    if data.f is None and terms:
        problem = prepared("admm", A, y, x0, terms, None)
        inner = ADMM(problem).inner
        if inner.kind != "cg" or inner.steps <= _FEW:
            how = (
                f"is well preconditioned ({inner.steps} steps)" if inner.kind == "cg" else f"is solved by {inner.kind}"
            )
            problem.parts["inner"] = inner
            options = {"maxiter": 500, "rtol": 1e-4} | {k: v for k, v in common.items() if k != "x0"}  # type: ignore
            return _named(minimize(problem, **options), f"admm: {g!r} is split, and its quadratic subproblem {how}")
    if data.f is None or data.f.has_prox:
        what = f"{g!r} is split into functionals of linear operators" if g is not None else "no term has a direct prox"
        what = what if data.smooth else f"the data term {data_term!r} is not smooth, and has a prox"
        return _named(pdhg(A, y, terms, data_term=data_term, **common), f"pdhg: {what}")
    solution = condat_vu(A, y, terms, data_term=data_term, **common)
    return _named(solution, f"condat_vu: the data term {data_term!r} is smooth and has no prox")


def _is_closed(g: Functional) -> bool:
    """Whether the prox is a formula, not an iteration as that of TV."""
    return all(t.operator is None or bool(t.operator._coisometry()) for t in g.terms)


def _damping(terms: Sequence[Functional]) -> Any:
    """The damp where the regularizer is damp^2 |x|^2 / 2 or nothing; None otherwise."""
    if not terms:
        return 0.0
    f = terms[0].f if isinstance(terms[0], Scaled) else terms[0]
    if len(terms) > 1 or not isinstance(f, SquaredL2) or f.b is not None:
        return None
    return (terms[0].factor if isinstance(terms[0], Scaled) else 1.0) ** 0.5


def _named(solution: Solution, method: str) -> Solution:
    return replace(solution, method=method)
