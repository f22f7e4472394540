"""A Program within a tolerance: analysed, planned, summed, checked; exact where that is cheaper or safer.

`sums` returns None where the exact engine must run; `Info` says what was done and why.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pullback.kernels.fast.choose as choosing
from pullback.kernels.fast.analyse import Refused, analyse, split
from pullback.kernels.fast.choose import choose, rate
from pullback.kernels.fast.softmax import SHIFTED, Lost, shifted
from pullback.kernels.fast.sum import Exact, FastSum, Result, error
from pullback.kernels.ir.expr import J
from pullback.kernels.ir.reductions import Program

CHECKED = 0.08  # share of the time that the check may take
_SURE = 0.7  # of the tolerance, that the error on sampled rows may reach
_SHARPER = 0.3  # part of the tolerance that the second attempt aims at, less after a wide miss
_TINY = 1e-4  # seconds of exact work, below which even the analysis is not worth it, however often it is done
_CANCELLED = 0.5  # of the size of sums with random signs, below which a result was cancelled
_LOST = 1e-5  # the same for sums behind a logarithm, which may be much smaller than their mean


class ToleranceWarning(UserWarning):
    """A fast sum missed its tolerance, and the exact sum was taken."""


@dataclass(frozen=True)
class Info:
    """What a sum within a tolerance did.

    Attributes:
        method: "fourier", "tree" or "exact".
        tolerance: relative l2 error that was asked for.
        error: relative l2 error on the rows that were checked; 0 if exact.
        rows: how many rows were checked.
        detail: modes, order, or the reason why the sum is exact.
        seconds: time of the sum and of the check.
    """

    method: str
    tolerance: float
    error: float = 0.0
    rows: int = 0
    detail: str = ""
    seconds: float = 0.0


def sums(
    program: Program, tensors: Sequence[Tensor], batch: tuple[int, ...], m: int, n: int, tolerance: float, exact: Exact
) -> Tensor | None:
    """The results of a program within `tolerance`, laid out as the exact engine lays them out; None if it must run.

    Args:
        program: what is summed.
        tensors: its arguments, detached.
        batch, m, n: their sizes.
        tolerance: relative l2 error.
        exact: (program, tensors, ranges) -> result of the exact engine.
    """
    if tensors[0].device.type != "cpu":  # before a batch is taken apart
        _tell(Info("exact", tolerance, detail=f"fast sums run on the CPU; the tensors lie on {tensors[0].device}"))
        return None
    size = getattr(_context, "beside", None)
    if not batch:
        return _member(program, tensors, m, n, tolerance, exact, 0.0 if size is None else float(size))
    sizes = torch.zeros(batch) if size is None else size.expand(batch)
    members = []
    for where in itertools.product(*map(range, batch)):
        own = of_member(tensors, program.signature, where)
        y = _member(program, own, m, n, tolerance, exact, float(sizes[where]))
        members.append(exact(program, own) if y is None else y)
    return torch.stack(members).reshape(*batch, *members[0].shape) if members else None


def of_member(tensors: Sequence[Tensor], signature: Sequence[tuple[int, int]], where: tuple[int, ...]) -> list[Tensor]:
    """The parts of arguments that belong to a member of the batch; shared arguments as they are."""
    found = []
    for t, (_, category) in zip(tensors, signature, strict=True):
        own = t.ndim - (1 if category > J else 2)
        sizes = zip(t.shape[:own], where[len(where) - own :], strict=True)
        found.append(t[tuple(0 if size == 1 else k for size, k in sizes)] if own else t)
    return found


def _member(
    program: Program, tensors: Sequence[Tensor], m: int, n: int, tolerance: float, exact: Exact, beside: float
) -> Tensor | None:
    start = time.perf_counter()
    miss, reason = 0.0, "the fast sum missed its tolerance"
    try:
        if m == 0 or n == 0:
            raise Refused("there are no pairs")
        if m * n * len(program.exprs) < min(choosing.FEW, _TINY) * rate(program):
            raise Refused(f"{m} x {n} pairs are few")
        form = split(program)[0] if program.kind in SHIFTED else analyse(program)
        points = FastSum(form, tensors, m, n, tolerance).points
        learned: dict[str, float] = points.made(("learned", program, tolerance), dict)
        sharper = learned.get("sharper", 1.0)  # than the tolerance: what the same points needed before
        tries, cancelled = 2, False
        while tries:
            try:
                inner = max(sharper * tolerance, 1e-14)
                if program.kind in SHIFTED:
                    total, arguments, finish = shifted(program, tensors, m, n, inner)
                else:
                    total, arguments, finish = program, list(tensors), None
                one = FastSum(analyse(total), arguments, m, n, inner, sharper < 1)
                method, apply = choose(one, exact)
                results = one.run(apply, beside)
                if finish is None and not cancelled and 0 < one.uncancelled < min(_CANCELLED, sharper):
                    # errors of terms that cancel do not, and gather in rows that a sample may not see
                    cancelled, sharper = True, 2.0 ** math.floor(math.log2(one.uncancelled))
                    continue
                if finish is not None:
                    results = [finish(results[0][1])]
            except Lost as lost:
                reason = str(lost)
                sharper *= _LOST
                tries -= 1
                continue
            spent = time.perf_counter() - start
            rows = int(min(64, max(4, CHECKED * spent * rate(program) / max(m, n) / len(program.exprs))))
            miss = error(program, tensors, results, rows, exact, beside)
            if miss <= _SURE * tolerance:
                learned["sharper"] = sharper
                _tell(Info(method, tolerance, miss, rows, apply.detail, time.perf_counter() - start))
                return _assembled(results, tensors[0].dtype)
            tries -= 1
            # to powers of two, so that what was prepared serves again
            sharper *= 2.0 ** math.floor(math.log2(_SHARPER * max(1e-9, min(1.0, tolerance / miss))))
    except Refused as refused:
        _tell(Info("exact", tolerance, detail=str(refused)))
        return None
    if miss:
        text = f"a fast sum missed its tolerance of {tolerance:.1e} (rows: {miss:.1e}); the exact sum was taken"
        warnings.warn(ToleranceWarning(text), stacklevel=2)
    _tell(Info("exact", tolerance, detail=reason, seconds=time.perf_counter() - start))
    return None


@contextmanager
def watch() -> Iterator[list[Info]]:
    """What the sums within a tolerance do, as a list of `Info` that grows while the context lasts.

    >>> from pullback.kernels import fast
    >>> with fast.watch() as done:
    ...     pass
    >>> done
    []
    """
    found: list[Info] = []
    with _during("lists", (*(getattr(_context, "lists", None) or ()), found)):
        yield found


def beside(size: Tensor) -> AbstractContextManager[None]:
    """In this context a tolerance is relative to hypot(|result|, size), size of shape (*batch,).

    For a result that is added to something else of l2 norm `size`, such as alpha b in (alpha + K) b, where K is
    positive: the norm of the sum is at least that.
    """
    return _during("beside", size)


_context = threading.local()  # .lists: where `watch` wants to be told; .beside: see there


@contextmanager
def _during(name: str, value: Any) -> Iterator[None]:
    before = getattr(_context, name, None)
    setattr(_context, name, value)
    try:
        yield
    finally:
        setattr(_context, name, before)


def _tell(info: Info) -> None:
    for found in getattr(_context, "lists", None) or ():
        found.append(info)


def _assembled(results: Sequence[Result], dtype: torch.dtype) -> Tensor:
    pieces = [total.to(dtype) for _, total in results]
    return pieces[0] if len(pieces) == 1 else torch.cat([p.reshape(-1) for p in pieces])
