"""The loop of all iterative solvers: tolerances, history, callbacks, progress, divergence guard, members that stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch

from pullback.core.errors import ArgumentError
from pullback.solvers.checkpoint import Checkpoint
from pullback.solvers.members import Batch, Single
from pullback.solvers.problem import Problem
from pullback.solvers.scalars import Number, detach
from pullback.solvers.status import CODES, ConvergenceError, Solution, Status

Callback = Callable[[Any], bool | torch.Tensor | None]
Progress = bool | Literal["always"]

_BLIND = 8  # iterations between two looks at the error on devices where looking waits for the device


@dataclass
class State:
    """Where an algorithm stands. What a callback receives; its tensors are overwritten by the next iteration.

    Numbers are floats where there is one member, tensors with one entry a member where there is a batch.

    Attributes:
        x: the iterate, of shape (*batch, *dims).
        error: the quantity that the tolerances bound.
        scale: what `rtol` is relative to.
        values: what goes into the history.
        iteration: how many iterations have been done.
        verdict: codes of members that the algorithm itself declares finished (0: none), or None.
        monotone: the last finite x is as good as any before, so that none needs to be kept.
    """

    monotone: ClassVar[bool] = False
    x: torch.Tensor
    error: Number
    scale: Number
    values: dict[str, Number]
    iteration: int = field(default=0, init=False)
    verdict: Any = field(default=None, init=False)


class Algorithm(Protocol):
    """A method: `init()` gives the state before the first iteration, `step(state)` advances it in place."""

    problem: Problem

    def init(self) -> Any:
        """The state before the first iteration."""

    def step(self, state: Any) -> None:
        """One iteration."""


@dataclass
class Outcome:
    """What the loop reached: the solution as the user gets it, x as the solver has it, and the last state."""

    solution: Solution
    x: torch.Tensor
    state: Any


def code(status: Status) -> int:
    """The integer that stands for a status in `State.verdict`."""
    return CODES.index(status)


def iterate(
    algorithm: Algorithm,
    *,
    maxiter: int,
    rtol: float,
    atol: float,
    callback: Callback | None = None,
    progress: Progress = False,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Run an algorithm until every member of the batch has error <= max(rtol scale, atol), or maxiter.

    A member that stops keeps its x of that iteration, whatever the others still do; one that diverges gets the iterate
    with the smallest error back. On the CPU errors are looked at after each iteration; elsewhere after every 8, so that
    the device is not waited for.

    Raises: ArgumentError.
    """
    problem = algorithm.problem
    _check(problem.owner, maxiter, rtol, atol, callback)
    bar = _bar(problem.owner, maxiter, progress)
    with nullcontext() if problem.live else torch.no_grad():
        try:
            return _loop(algorithm, maxiter, rtol, atol, callback, bar, checkpoint)
        finally:
            if bar is not None:
                bar.close()


def conclude(outcome: Outcome, throw: bool) -> Solution:
    """The solution, or ConvergenceError if `throw` and a member did not converge."""
    s = outcome.solution
    if throw and not s.status.ok:
        raise ConvergenceError(f"{s.method}: {s.status} (after {s.iterations} iterations)", s)
    return s


def _loop(
    algorithm: Algorithm,
    maxiter: int,
    rtol: float,
    atol: float,
    callback: Callback | None,
    bar: Any,
    checkpoint: Checkpoint | None,
) -> Outcome:
    problem = algorithm.problem
    state = algorithm.init()
    members: Any = (Single if problem.single else Batch)(problem, state, rtol, atol)
    records = [_detached(state.values)]
    if checkpoint is not None:
        checkpoint.restore(problem, state, members, records)
        if bar is not None:
            bar.update(state.iteration)
    every = 1 if problem.y.device.type == "cpu" else _BLIND
    k = state.iteration
    while True:
        answer = None if callback is None else callback(state)
        if isinstance(answer, torch.Tensor) and answer.ndim:
            stop = members.stop(state, answer)
        else:
            stop = bool(answer)
        if (k % every == 0 or k >= maxiter or stop) and members.judge(state):
            break
        if stop or k >= maxiter:
            if checkpoint is not None:
                checkpoint.save(problem, state, members, records)
            members.end(state, Status.CALLBACK if stop else Status.MAXITER)
            break
        algorithm.step(state)
        k += 1
        state.iteration = k
        records.append(_detached(state.values))
        if checkpoint is not None and k % checkpoint.every == 0:
            checkpoint.save(problem, state, members, records)
        if bar is not None:
            bar.update()
            if k % every == 0:
                bar.set_postfix_str(f"error {members.worst(state):.2e}", refresh=False)
    x = members.result(state)
    return Outcome(members.solution(problem, problem.finish(x), records), x, state)


def _detached(values: dict[str, Number]) -> dict[str, Number]:
    return {name: detach(v) for name, v in values.items()}


def _check(owner: str, maxiter: Any, rtol: Any, atol: Any, callback: Any) -> None:
    if isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0:
        raise ArgumentError(f"{owner}: maxiter must be an int >= 0; got {maxiter!r}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(tolerance, (int, float)) and tolerance >= 0):
            raise ArgumentError(f"{owner}: {name} must be a number >= 0; got {tolerance!r}")
    if callback is not None and not callable(callback):
        raise ArgumentError(f"{owner}: callback must be callable as callback(state); got {type(callback).__name__}")


def _bar(owner: str, maxiter: int, progress: Progress) -> Any:
    if progress not in (True, False, "always"):
        raise ArgumentError(f"{owner}: progress must be True, False or 'always'; got {progress!r}")
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=maxiter, desc=owner, disable=False if progress == "always" else None, leave=False)
