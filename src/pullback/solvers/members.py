"""Which members of a batch still run, which have stopped and why, and what each of them keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.solvers.problem import Problem
from pullback.solvers.scalars import Number
from pullback.solvers.status import CODES, Solution, Status

GROWTH = 1e8  # an error this much above its start is divergence
_HALVED = 0.5  # an iterate is worth keeping for the case of divergence where its error has fallen that far

_CONVERGED, _DIVERGED, _NOT_FINITE = map(CODES.index, (Status.CONVERGED, Status.DIVERGED, Status.NOT_FINITE))


class Single:
    """One member whose numbers are Python floats."""

    def __init__(self, problem: Problem, state: Any, rtol: float, atol: float) -> None:
        self.rtol, self.atol, self.code, self.count = rtol, atol, 0, 0
        self.limit = GROWTH * max(state.error, state.scale)
        self.good = _start(problem, state.x)  # the iterate with the smallest error so far, roughly
        self.least = math.inf
        if not math.isfinite(self.limit) and not _is_finite(problem):
            self.code = _NOT_FINITE

    def judge(self, state: Any) -> bool:
        """Whether the member stops now."""
        if self.code:
            return True
        self.count = state.iteration
        error, verdict = state.error, state.verdict
        if self.limit == math.inf and error < math.inf:  # methods that know no error before their first step
            self.limit = GROWTH * max(error, state.scale)
        if error <= max(state.scale * self.rtol, self.atol):
            self.code = _CONVERGED
        elif not error <= self.limit:  # or nan
            self.code = _DIVERGED
        elif verdict:
            self.code = int(verdict)
        else:
            if error < _HALVED * self.least and not state.monotone:
                self.good, self.least = state.x.clone(), error
            return False
        return True

    def stop(self, state: Any, wanted: Tensor) -> bool:
        """Whether the callback, which answered with a tensor, stops the member."""
        return bool(wanted.any())

    def end(self, state: Any, status: Status) -> None:
        """Stop in any case."""
        self.code, self.count = CODES.index(status), state.iteration

    def worst(self, state: Any) -> float:
        """The error."""
        return float(state.error)

    def result(self, state: Any) -> Tensor:
        """x, or a good iterate if it diverged."""
        if self.code == _NOT_FINITE:
            return self.good
        x: Tensor = state.x
        if self.code == _DIVERGED and not (state.monotone and bool(torch.isfinite(x).all())):
            return self.good
        return x

    def solution(self, problem: Problem, x: Any, records: list[dict[str, Number]]) -> Solution:
        """The result as the user gets it."""
        history: dict[str, Any] = {
            name: torch.tensor([r[name] for r in records[: self.count + 1]], dtype=problem.y.dtype.to_real())
            for name in records[0]
        }
        if problem.is_numpy:
            history = {name: values.numpy() for name, values in history.items()}
        status = CODES[self.code]
        return Solution(x, status, self.count, history, problem.owner, (status,), torch.tensor(self.count))


class Batch:
    """Members whose numbers are tensors, one entry a member."""

    def __init__(self, problem: Problem, state: Any, rtol: float, atol: float) -> None:
        self.problem, self.rtol, self.atol = problem, rtol, atol
        error, scale = state.error.detach(), state.scale.detach()
        self.codes = torch.zeros(problem.batch, dtype=torch.int8, device=error.device)
        self.counts = torch.zeros(problem.batch, dtype=torch.int64, device=error.device)
        self.limit = GROWTH * torch.maximum(error, scale)
        self.is_open = bool(torch.isinf(self.limit).any())
        self.kept: Tensor | None = None  # x of the members that have stopped
        self.good = _start(problem, state.x)  # the iterates with the smallest error so far, roughly
        self.least = torch.full_like(error, torch.inf)
        if not bool(torch.isfinite(self.limit).all()):
            bad = ~_finite_members(problem) & ~torch.isfinite(self.limit)
            self.codes[bad] = _NOT_FINITE
            self.kept = torch.where(problem.x_scalar(bad), self.good, state.x)

    def judge(self, state: Any) -> bool:
        """Write the codes of members that stop now; whether all have stopped."""
        error = state.error.detach()
        if self.is_open:  # methods that know no error before their first step
            first = GROWTH * torch.maximum(error, state.scale.detach())
            self.limit = torch.where(torch.isinf(self.limit), first, self.limit)
            self.is_open = bool(torch.isinf(self.limit).any())
        bound = state.scale.detach() * self.rtol
        if self.atol:
            bound = bound.clamp(min=self.atol)
        running = (error > bound) & (error <= self.limit)  # false for nan
        if state.verdict is not None:
            running &= state.verdict == 0
        newly = ~running & (self.codes == 0)
        if bool(newly.any()):
            found = torch.where(error <= bound, _CONVERGED, _DIVERGED)
            if state.verdict is not None:
                known = (state.verdict != 0) & (error > bound) & (error <= self.limit)
                found = torch.where(known, state.verdict, found)
            self._stop(state, newly, found)
        finished = bool((self.codes != 0).all())
        if not finished and not state.monotone:
            better = (error < _HALVED * self.least) & (self.codes == 0)
            if bool(better.any()):
                self.least = torch.where(better, error, self.least)
                self.good = torch.where(self.problem.x_scalar(better), state.x.detach(), self.good)
        return finished

    def _stop(self, state: Any, members: Tensor, found: Any) -> None:
        self.codes.copy_(torch.where(members, found, self.codes))
        self.counts = torch.where(members, state.iteration, self.counts)
        lift = self.problem.x_scalar
        bad = members & (self.codes == _DIVERGED)
        x = state.x
        if bool(bad.any()):
            good = torch.where(torch.isfinite(x), x, self.good) if state.monotone else self.good
            x = torch.where(lift(bad), good, x)
        if self.kept is None:  # x is overwritten while others go on
            self.kept = x.clone() if x is state.x and not bool((self.codes != 0).all()) else x
        else:
            self.kept = torch.where(lift(members), x, self.kept)

    def stop(self, state: Any, wanted: Tensor) -> bool:
        """Stop the members that the callback names; whether none is left."""
        if wanted.shape != self.codes.shape:
            raise ArgumentError(
                f"{self.problem.owner}: callback must return a bool, or one for each member of the batch, shape "
                f"{tuple(self.codes.shape)}; got shape {tuple(wanted.shape)}"
            )
        running = self.codes == 0
        stopped = wanted.to(self.codes.device, torch.bool) & running
        if bool(stopped.any()) and not bool((stopped == running).all()):
            self._stop(state, stopped, CODES.index(Status.CALLBACK))
        return bool((stopped == running).all())

    def end(self, state: Any, status: Status) -> None:
        """Stop the members that still run."""
        self._stop(state, self.codes == 0, CODES.index(status))

    def worst(self, state: Any) -> float:
        """The largest error."""
        return float(state.error.max())

    def result(self, state: Any) -> Tensor:
        """The x of each member when it stopped."""
        return state.x if self.kept is None else self.kept

    def solution(self, problem: Problem, x: Any, records: list[dict[str, Number]]) -> Solution:
        """The result as the user gets it."""
        counts = self.counts
        iterations = int(counts.max()) if counts.numel() else 0
        last = torch.minimum(
            torch.arange(iterations + 1, device=counts.device).reshape(-1, *(1,) * counts.ndim), counts
        )
        history: dict[str, Any] = {}
        for name in records[0]:
            values = torch.stack([r[name] for r in records[: iterations + 1]])
            history[name] = values.gather(0, last.expand(values.shape))
            if problem.is_numpy:
                history[name] = history[name].cpu().numpy()
        found = [CODES[c] for c in self.codes.flatten().tolist()]
        worst = CODES[max(map(CODES.index, found), default=CODES.index(Status.CONVERGED))]
        return Solution(x, worst, iterations, history, problem.owner, tuple(found), counts)


def _start(problem: Problem, x: Tensor) -> Tensor:
    """Where the iteration began, without inf and nan."""
    return torch.zeros_like(x) if problem.x0 is None else torch.nan_to_num(problem.x0.detach())


def _finite_members(problem: Problem) -> Tensor:
    """Whether y and x0 of each member are free of inf and nan."""
    good = torch.isfinite(problem.y).flatten(problem.y.ndim - problem.n_y).all(-1)
    if problem.x0 is not None:
        good = good & torch.isfinite(problem.x0).flatten(problem.x0.ndim - problem.n_x).all(-1)
    return good


def _is_finite(problem: Problem) -> bool:
    return bool(_finite_members(problem).all())
