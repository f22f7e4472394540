"""One front door: the solver that suits the problem, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import Unpack

from pullback.functionals import Functional, SquaredL2
from pullback.functionals.base import Scaled, Sum
from pullback.solvers.composite import as_terms
from pullback.solvers.lsqr import lsqr
from pullback.solvers.pdhg import pdhg
from pullback.solvers.proximal import fista
from pullback.solvers.run import Options
from pullback.solvers.status import Solution


def solve(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    x0: Any = None,
    maxiter: int | None = None,
    rtol: float | None = None,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x |A x - y|^2 / 2 + regularizer(x), by the solver that suits; `Solution.method` says which and why.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer: None, a functional, or a sum or list of them.
        x0: where to start, of shape (..., *A.dims); zero if None.
        maxiter, rtol: as in the chosen solver (for lsqr rtol means atol and btol); its defaults if None.
        options: see `pullback.solvers.run.Options`.

    | regularizer                                   | solver |
    |-----------------------------------------------|--------|
    | None, or c * SquaredL2() without centre       | lsqr, damp = sqrt(c) |
    | one functional (or pair) with a direct prox   | fista |
    | a composition such as TV, or any other sum    | pdhg |

    Returns: Solution. Raises: what the chosen solver raises.
    """
    terms = as_terms("solve", regularizer)
    common: dict[str, Any] = {"x0": x0, **options}
    if maxiter is not None:
        common["maxiter"] = maxiter
    damp = _damping(terms)
    if damp is not None:
        if rtol is not None:
            common |= {"atol": rtol, "btol": rtol}
        why = "a least-squares problem with Tikhonov damping" if terms else "a least-squares problem"
        return _named(lsqr(A, y, damp=damp, **common), f"lsqr: {why}")
    if rtol is not None:
        common["rtol"] = rtol
    g = terms[0] if len(terms) == 1 else Sum(*terms)
    if g.operator is None and g.has_prox:
        return _named(fista(A, y, g, **common), f"fista: {g!r} has a direct prox")
    return _named(pdhg(A, y, terms, **common), f"pdhg: {g!r} is split into functionals of linear operators")


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
