"""What L-BFGS and non-linear conjugate gradients share: the step along a direction, and the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.functionals import Functional
from pullback.solvers.composite import as_terms, composite, terms_of
from pullback.solvers.iterate import State, code
from pullback.solvers.line_search import idle_steps, noise, verdict, wolfe
from pullback.solvers.nonlinear import Objective, expose, spaces
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.scalars import Number, finite, ratio, smaller, where
from pullback.solvers.status import Status


@dataclass
class DescentState(State):
    """Where a descent method stands."""

    phi: Number
    g: Tensor
    p: Tensor  # the last direction
    slope: Number  # <g, p> at its start
    t: Number  # the last step length; where it is 0 the next direction is -g
    idle: Number  # steps in a row that brought nothing


class Descent:
    """x <- x + t p, with p from the gradients so far and t from a line search; t counts as a constant."""

    curvature = 0.9  # of the Wolfe conditions
    state: type[DescentState] = DescentState

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.objective = Objective(problem)
        plain = "F" in problem.parts and problem.parts["data"] is None
        self.size = problem.norm(problem.y, problem.n_y) if plain else problem.fill(0.0)

    def init(self) -> Any:
        """x0 and the gradient there."""
        pb = self.problem
        x = start(pb)
        phi, g = self.objective(x)
        error, zero = pb.norm(g, pb.n_x), pb.fill(0.0)
        values = {"objective": phi, "gradient": error}
        state = self.state(x, error, error, values, phi=phi, g=g, p=torch.zeros_like(x), slope=zero, t=zero, idle=zero)
        state.verdict = where(finite(phi), 0, code(Status.NOT_FINITE))  # x0 lies where the objective has no value
        return state

    def direction(self, state: Any) -> tuple[Tensor, Number]:
        """A direction and the step length to try first, for members with t > 0."""
        raise NotImplementedError

    def learn(self, state: Any, p: Tensor, step: Tensor, g: Tensor, t: Number) -> None:
        """Take notice of a direction, the step along it and the gradient after it, before the state moves."""

    def step(self, state: Any) -> None:
        """One direction and one line search."""
        pb, n = self.problem, self.problem.n_x
        p, t = self.direction(state)
        slope = pb.dot(state.g.detach(), p.detach(), n)
        fresh = (state.t == 0) | ((slope < 0) ^ True)  # steepest descent, as if nothing had been learnt
        if not isinstance(fresh, Tensor):
            p = -state.g if fresh else p
        elif bool(fresh.any()):
            p = torch.where(pb.x_scalar(fresh), -state.g, p)
        slope = where(fresh, -state.error * state.error, slope)
        t = where(fresh, smaller(ratio(pb.fill(1.0), state.error), 1.0), t)
        rounding = noise(pb, state.phi, self.size)
        found = wolfe(
            self.objective, pb, state.x.detach(), p.detach(), state.phi, state.g.detach(), t, rounding, self.curvature
        )
        phi, g, x = found.phi, found.g, found.x
        if pb.live:
            x = add_scaled(state.x, pb.x_scalar(found.t), p, None)
            g = self.objective.gradient(x)
        self.learn(state, p, x - state.x, g, found.t)
        error = pb.norm(g, n)
        state.idle = idle_steps(state.idle, phi, state.phi, error, state.error, rounding)
        stuck = fresh & (found.t == 0) & (error > 0)
        state.verdict = verdict(state.idle, stuck, slope * t, rounding, found.unbounded)
        state.x, state.phi, state.g, state.p, state.slope, state.t = x, phi, g, p, slope, found.t
        state.error, state.values = error, {"objective": phi, "gradient": error}


def start(pb: Problem) -> Tensor:
    """x0, free to be overwritten."""
    if pb.x0 is None:
        return torch.zeros((*pb.batch, *pb.A.dims), dtype=pb.x_dtype, device=pb.y.device)
    return pb.x0.clone(memory_format=torch.contiguous_format)


def smooth_problem(
    owner: str,
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None,
    data_term: Functional | None,
    x0: Any,
    unroll: bool,
    **parts: Any,
) -> Problem:
    """The problem of minimising D(A x) + sum_i g_i(x), all smooth.

    Raises: ShapeError, DtypeError, ArgumentError; NotDifferentiableError where a term is not smooth.
    """
    space, F, depends = spaces(owner, A, y, x0)
    problem = composite(owner, space, y, x0, as_terms(owner, regularizer), data_term, F=F, **parts)
    expose(problem, depends, unroll)
    with torch.no_grad():
        x = start(problem)
        for term in terms_of(problem):
            term._grad(x, problem.n_x)
        if data_term is not None:
            data_term.about(problem.y)._grad(problem.y, problem.n_y)
    return problem
