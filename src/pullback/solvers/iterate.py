"""The loop of all iterative solvers: tolerances, history, callbacks, progress, divergence guard, members that stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.solvers.problem import Problem
from pullback.solvers.status import CODES, ConvergenceError, Solution, Status

Callback = Callable[[Any], bool | None]
Progress = bool | Literal["always"]

GROWTH = 1e8  # an error this much above its start is divergence
_BLIND = 8  # iterations between two looks at the error on devices where looking waits for the device


@dataclass
class State:
    """Where an algorithm stands. What a callback receives; its tensors are overwritten by the next iteration.

    Attributes:
        x: the iterate, of shape (*batch, *dims).
        error: the quantity that the tolerances bound, one a member.
        scale: what `rtol` is relative to, one a member.
        values: what goes into the history, one a member.
        iteration: how many iterations have been done.
        verdict: codes of members that the algorithm itself declares finished (0: none), or None.
    """

    x: Tensor
    error: Tensor
    scale: Tensor
    values: dict[str, Tensor]
    iteration: int = field(default=0, init=False)
    verdict: Tensor | None = field(default=None, init=False)


class Algorithm(Protocol):
    """A method: `init()` gives the state before the first iteration, `step(state)` advances it in place."""

    problem: Problem

    def init(self) -> Any:
        """The state before the first iteration."""

    def step(self, state: Any) -> None:
        """One iteration."""


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
    throw: bool = False,
) -> Solution:
    """Run an algorithm until every member of the batch has error <= max(rtol scale, atol), or maxiter.

    Args:
        algorithm: what to run.
        maxiter: the most iterations.
        rtol, atol: relative and absolute tolerance. What they bound is stated by each solver.
        callback: called as callback(state) before the first and after every iteration; True stops all members.
        progress: show a progress bar on stderr, if that is a terminal ("always": even if it is not).
        throw: raise ConvergenceError if a member does not converge.

    Returns: Solution. A member that stops keeps its x of that iteration, whatever the others still do.
    Raises: ArgumentError; ConvergenceError if `throw`.

    On the CPU errors are looked at after each iteration; elsewhere after every 8, so that the device is not waited for.
    """
    problem = algorithm.problem
    owner = problem.owner
    if isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0:
        raise ArgumentError(f"{owner}: maxiter must be an int >= 0; got {maxiter!r}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(tolerance, (int, float)) and tolerance >= 0):
            raise ArgumentError(f"{owner}: {name} must be a number >= 0; got {tolerance!r}")
    if callback is not None and not callable(callback):
        raise ArgumentError(f"{owner}: callback must be callable as callback(state); got {type(callback).__name__}")
    bar = _bar(owner, maxiter, progress)
    with nullcontext() if problem.live else torch.no_grad():
        try:
            x, codes, counts, records = _loop(algorithm, maxiter, rtol, atol, callback, bar)
        finally:
            if bar is not None:
                bar.close()
        solution = _solution(problem, x, codes, counts, records)
    if throw and not solution.status.ok:
        raise ConvergenceError(f"{owner}: {solution.status} (after {solution.iterations} iterations)", solution)
    return solution


def _loop(
    algorithm: Algorithm, maxiter: int, rtol: float, atol: float, callback: Callback | None, bar: Any
) -> tuple[Tensor, Tensor, Tensor, list[dict[str, Tensor]]]:
    problem = algorithm.problem
    state = algorithm.init()
    device = state.error.device
    codes = torch.zeros(problem.batch, dtype=torch.int8, device=device)
    counts = torch.zeros(problem.batch, dtype=torch.int64, device=device)
    limit = GROWTH * torch.maximum(state.error.detach(), state.scale.detach())
    records = [_detached(state.values)]
    result: Tensor | None = None  # x of the members that have stopped
    every = 1 if device.type == "cpu" else _BLIND
    k = 0
    while True:
        stop = callback is not None and bool(callback(state))
        if k % every == 0 or k == maxiter or stop:
            newly = _judge(state, codes, rtol, atol, limit)
            if newly is not None:
                counts = torch.where(newly, k, counts)
                finished = bool((codes != 0).all())
                if result is None:
                    result = state.x if finished else state.x.clone()
                else:
                    result = torch.where(problem.x_scalar(newly), state.x, result)
                if finished:
                    break
        if stop or k == maxiter:
            running = codes == 0
            counts = torch.where(running, k, counts)
            codes = torch.where(running, code(Status.CALLBACK if stop else Status.MAXITER), codes)
            result = state.x if result is None else torch.where(problem.x_scalar(running), state.x, result)
            break
        algorithm.step(state)
        k += 1
        state.iteration = k
        records.append(_detached(state.values))
        if bar is not None:
            bar.update()
            if k % every == 0:
                bar.set_postfix_str(f"error {float(state.error.max()):.2e}", refresh=False)
    return result, codes, counts, records


def _judge(state: State, codes: Tensor, rtol: float, atol: float, limit: Tensor) -> Tensor | None:
    """Write the codes of members that stop now, and tell which; None if none does."""
    error = state.error.detach()
    bound = state.scale.detach() * rtol
    if atol:
        bound = bound.clamp(min=atol)
    running = (error > bound) & (error <= limit)  # false for nan
    if state.verdict is not None:
        running &= state.verdict == 0
    if bool(running.all()):
        return None
    newly = ~running & (codes == 0)
    if not bool(newly.any()):
        return None
    found = torch.where(error <= bound, code(Status.CONVERGED), code(Status.DIVERGED))
    if state.verdict is not None:
        found = torch.where((state.verdict != 0) & (error > bound), state.verdict, found)
    codes.copy_(torch.where(newly, found, codes))
    return newly


def _solution(problem: Problem, x: Tensor, codes: Tensor, counts: Tensor, records: list[dict[str, Tensor]]) -> Solution:
    iterations = int(counts.max())
    last = torch.minimum(torch.arange(iterations + 1, device=counts.device).reshape(-1, *(1,) * counts.ndim), counts)
    history: dict[str, Any] = {}
    for name in records[0]:
        values = torch.stack([r[name] for r in records[: iterations + 1]])
        history[name] = values.gather(0, last.expand(values.shape))
        if problem.is_numpy:
            history[name] = history[name].cpu().numpy()
    found = [CODES[c] for c in codes.flatten().tolist()]
    worst = CODES[max(map(CODES.index, found))]
    return Solution(problem.finish(x), worst, iterations, history, problem.owner, tuple(found), counts)


def _detached(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.detach() for name, v in values.items()}


def _bar(owner: str, maxiter: int, progress: Progress) -> Any:
    if progress not in (True, False, "always"):
        raise ArgumentError(f"{owner}: progress must be True, False or 'always'; got {progress!r}")
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=maxiter, desc=owner, disable=False if progress == "always" else None, leave=False)
