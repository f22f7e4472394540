"""What every solver does with its method: iterate it, and make the solution differentiable."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from pullback.core import maps
from pullback.core.errors import ArgumentError
from pullback.solvers.checkpoint import Checkpoint
from pullback.solvers.implicit import Linear, Root, live_tensors, rebound, watch
from pullback.solvers.iterate import Algorithm, Callback, Outcome, Progress, conclude, iterate
from pullback.solvers.problem import Problem
from pullback.solvers.status import AccuracyWarning, AdjointSolve, Solution


class Options(TypedDict, total=False):
    """What every solver takes besides its own arguments.

    Args:
        callback: called as callback(state) before the first and after every iteration; True stops all members, a tensor
            of bools those that it names.
        progress: show a progress bar on stderr, if that is a terminal ("always": even if it is not).
        throw: raise ConvergenceError if a member does not converge.
        unroll: differentiate through the iterations. Default: implicit derivatives, those of the exact solution, by one
            linear solve each, whatever the number of iterations.
        adjoint_rtol: relative tolerance of the linear solves behind implicit derivatives; `rtol` if None.
        adjoint_maxiter: the most iterations there; at least 200 and at least `maxiter` if None.
        checkpoint: a file in which the state is kept; if it exists, the run continues from there, bit for bit.
        checkpoint_every: iterations between two writes.
        schedule: (problem, k) -> the problem with the parts of iteration k, as `Unrolled` uses it.
    """

    callback: Callback | None
    progress: Progress
    throw: bool
    unroll: bool
    adjoint_rtol: float | None
    adjoint_maxiter: int | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    schedule: Callable[[Problem, int], Problem] | None


_KNOWN = tuple(Options.__annotations__)
_RENAMED = {  # what other libraries call it
    "niter": "maxiter", "niter_outer": "maxiter", "iter_lim": "maxiter", "max_iter": "maxiter", "maxit": "maxiter",
    "tol": "rtol", "show": "progress", "verbose": "progress", "callbacks": "callback", "M": "preconditioner",
}  # fmt: skip


def _solution_state(problem: Problem, outcome: Outcome) -> Tensor:
    return outcome.x


def _state_is_x(problem: Problem, s: Tensor) -> Tensor:
    return s


@dataclass(frozen=True)
class Equation:
    """What defines a solution: residual(problem, s) = 0.

    Args:
        residual: F, in differentiable torch, of a state s of shape (*batch, ...).
        linear: solves J v = g as linear(J, g, rtol=..., maxiter=...), such as `cg` or `gmres`.
        symmetric: J = dF/ds is self-adjoint.
        state: (problem, outcome) -> s, numbers only. By default s = x.
        recover: (problem, s) -> x, differentiable.
        n: how many axes a member of s has; those of x if None.
    """

    residual: Callable[[Problem, Tensor], Tensor]
    linear: Callable[..., Solution]
    symmetric: bool = False
    state: Callable[[Problem, Outcome], Tensor] = _solution_state
    recover: Callable[[Problem, Tensor], Tensor] = _state_is_x
    n: int | None = None


def run(
    problem: Problem,
    build: Callable[[Problem], Algorithm],
    equation: Equation | None,
    *,
    maxiter: int,
    rtol: float,
    atol: float = 0.0,
    tolerance: float | None = None,
    **options: Any,
) -> Solution:
    """Solve a problem with the method that `build` makes of it.

    Args:
        problem: the data.
        build: problem -> algorithm. It is called with other values of the same problem, so it reads all from there.
        equation: what the solution satisfies; None where only unrolled derivatives exist.
        maxiter, rtol, atol: see `iterate`.
        tolerance: what `adjoint_rtol` is by default; rtol if None.
        options: see `Options`.

    Returns: Solution. Raises: ArgumentError; ConvergenceError if `throw`.
    """
    owner = problem.owner
    unknown = [name for name in options if name not in _KNOWN]
    if unknown:
        name = unknown[0]
        hint = f"; write {_RENAMED[name]}" if name in _RENAMED else ""
        raise ArgumentError(f"{owner}: unknown argument {name!r}{hint}; besides its own it takes {', '.join(_KNOWN)}")
    throw, unroll = bool(options.get("throw")), bool(options.get("unroll"))
    loop: dict[str, Any] = {"maxiter": maxiter, "rtol": rtol, "atol": atol}
    loop |= {name: options[name] for name in ("callback", "progress") if name in options}  # type: ignore[literal-required]
    path = options.get("checkpoint")
    if path is not None:
        every = options.get("checkpoint_every", 50)
        if not isinstance(every, int) or every < 1:
            raise ArgumentError(f"{owner}: checkpoint_every must be an int >= 1; got {every!r}")
        if not Path(path).resolve().parent.is_dir():
            raise ArgumentError(f"{owner}: checkpoint {path} lies in a folder that does not exist; make it first")
        if problem.live and unroll:
            raise ArgumentError(f"{owner}: a run with unroll=True cannot be saved; leave checkpoint away")
        loop["checkpoint"] = Checkpoint(path, every)
    if options.get("schedule") is not None:
        build = _scheduled(build, options["schedule"], maxiter)
    if torch.is_grad_enabled() and unroll:
        problem.live, problem.single = True, False  # closures may hold tensors, too
    elif torch.is_grad_enabled() and not problem.live:
        watch(problem)
    tensors, whole = live_tensors(problem) if problem.live and not unroll else ([], [])
    if not tensors:
        return conclude(iterate(build(problem), **loop), throw)
    if equation is None:
        raise ArgumentError(
            f"{owner}: its solution satisfies no equation that could be differentiated; use unroll=True for the "
            f"derivative of the iterations, or torch.no_grad()"
        )
    wanted = rtol if tolerance is None else tolerance
    linear = _linear(problem, equation, wanted, maxiter, options)
    return _implicit(problem, build, equation, linear, tensors, whole, loop, throw)


class _Scheduled:
    """A method whose parts change from one iteration to the next."""

    def __init__(self, methods: Sequence[Algorithm]) -> None:
        self.methods, self.problem = methods, methods[0].problem

    def init(self) -> Any:
        return self.methods[0].init()

    def step(self, state: Any) -> None:
        self.methods[state.iteration].step(state)


def _scheduled(
    build: Callable[[Problem], Algorithm], schedule: Callable[[Problem, int], Problem], maxiter: int
) -> Callable[[Problem], Algorithm]:
    return lambda p: _Scheduled([build(schedule(p, k)) for k in range(max(1, maxiter))])


def _linear(problem: Problem, equation: Equation, rtol: float, maxiter: int, options: dict[str, Any]) -> Linear:
    adjoint_rtol, adjoint_maxiter = options.get("adjoint_rtol"), options.get("adjoint_maxiter")
    if adjoint_rtol is None:
        adjoint_rtol = max(rtol, 10 * problem.eps)
    if adjoint_maxiter is None:
        adjoint_maxiter = max(200, maxiter)
    for name, value in (("adjoint_rtol", adjoint_rtol), ("adjoint_maxiter", adjoint_maxiter)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ArgumentError(f"{problem.owner}: {name} must be a number > 0; got {value!r}")
    return Linear(equation.linear, equation.symmetric, float(adjoint_rtol), int(adjoint_maxiter))


def _implicit(
    problem: Problem,
    build: Callable[[Problem], Algorithm],
    equation: Equation,
    linear: Linear,
    tensors: Sequence[Tensor],
    whole: Sequence[bool],
    loop: dict[str, Any],
    throw: bool,
) -> Solution:
    found: list[Outcome] = []
    reports: list[AdjointSolve] = []

    def residual(s: Tensor, *values: Tensor) -> Tensor:
        return equation.residual(rebound(problem, tensors, values), s)

    def solve(values: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            p = rebound(problem, tensors, values)
            outcome = iterate(build(p), **loop)
            found.append(outcome)
            return equation.state(p, outcome)

    n = problem.n_x if equation.n is None else equation.n
    ranks = tuple(t.ndim for t in tensors)
    root = Root(problem.owner, residual, solve, n, ranks, tuple(whole), linear, reports)
    s = maps.call(root, tensors)
    x = equation.recover(problem, s)
    solution = conclude(found[-1], throw)
    if not solution.status.ok:
        warnings.warn(
            f"{problem.owner}: {solution.status}; implicit derivatives are those of the exact solution, not of this "
            f"iterate; use unroll=True for the latter",
            AccuracyWarning,
            stacklevel=4,
        )
    return replace(solution, x=problem.finish(x), adjoint=reports)
