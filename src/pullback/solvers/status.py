"""What a solver returns: Status, Solution, and the error that `throw=True` raises."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pullback.core.errors import PullbackError


class Status(enum.Enum):
    """How a solver ended, and what to do about it. Printed, it is the advice."""

    RUNNING = "not finished"
    CONVERGED = "converged: the tolerance is met"
    PRECISION = "stopped at rounding level: more iterations cannot improve x; for a tighter rtol use float64"
    CALLBACK = "stopped by the callback"
    MAXITER = "reached maxiter before the tolerance: increase maxiter, or loosen rtol"
    ILL_CONDITIONED = "stopped because cond(A) seems to exceed conlim: add damp, or increase conlim"
    BREAKDOWN = "broke down: A is singular or not what the method needs (cg: positive definite); use cgls, or add damp"
    LINE_SEARCH = (
        "stopped: no step along the descent direction lowers the objective; is it smooth and its gradient right?"
    )
    NOT_SELF_ADJOINT = "stopped: A is not self-adjoint, as this method needs; use gmres, cgls or lsqr"
    DIVERGED = (
        "diverged: values grew without bound or became inf or nan; x is the last good iterate; use a smaller step"
    )
    NOT_FINITE = "the data hold inf or nan: clean y and x0 before solving"

    def __str__(self) -> str:
        return self.value

    @property
    def ok(self) -> bool:
        """Whether x is as good as was asked for, or as the dtype allows."""
        return self in (Status.CONVERGED, Status.PRECISION)


# The code of a status in integer tensors is its place here; a batch has the status of its worst member.
CODES = tuple(Status)


class AccuracyWarning(UserWarning):
    """A gradient through a solution may be less accurate than was asked for."""


@dataclass(frozen=True)
class AdjointSolve:
    """How the linear system behind an implicit derivative was solved.

    Attributes:
        kind: "cotangent" (reverse mode) or "tangent" (forward mode).
        method: the solver.
        status: how it ended.
        iterations: how many iterations it took.
        residual: |g - J^H v| / |g| as the solver saw it last; of a batch, the worst member.
    """

    kind: str
    method: str
    status: Status
    iterations: int
    residual: float


class ConvergenceError(PullbackError, RuntimeError):
    """A solver was called with `throw=True` and did not converge; `.solution` holds what it reached."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of a solver.

    Attributes:
        x: the solution, of shape (*batch, *A.dims), flat if y was flat, an ndarray if y was one.
        status: how the solver ended; of a batch, the worst member.
        iterations: how many iterations ran; of a batch, those of the last member to stop.
        history: per quantity ("residual", "objective" ...) its values, of shape (iterations + 1, *batch); entry 0
            belongs to the starting point. After a member stopped its last value is repeated.
        method: the solver that ran, and why if it was chosen by `solve`.
        statuses: one Status a member of the batch, in row-major order.
        member_iterations: how many iterations each member took, of the shape of the batch.
        adjoint: reports of the solves behind implicit derivatives; filled when derivatives are computed.
    """

    x: Any
    status: Status
    iterations: int
    history: dict[str, Any]
    method: str
    statuses: tuple[Status, ...]
    member_iterations: Tensor
    adjoint: list[AdjointSolve] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Solution({self.method}: {self.status}; {self.iterations} iterations)"
