"""A Program within a tolerance: analysed, planned, summed, checked; exact where that is cheaper or safer.

`sums` returns None where the exact engine must run; `Info` says what was done and why.
"""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.kernels.fast.analyse import Refused, analyse
from pullback.kernels.fast.choose import choose, rate
from pullback.kernels.fast.softmax import SHIFTED, Lost, shifted
from pullback.kernels.fast.sum import Exact, FastSum, Result, error
from pullback.kernels.ir.expr import J
from pullback.kernels.ir.reductions import Program

CHECKED = 0.08  # share of the time that the check may take
_SURE = 0.7  # of the tolerance, that the error on sampled rows may reach


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
    if not batch:
        return _member(program, tensors, m, n, tolerance, exact)
    members = []
    for where in itertools.product(*map(range, batch)):
        own = [_of_member(t, len(batch), where, c) for t, (_, c) in zip(tensors, program.signature, strict=True)]
        y = _member(program, own, m, n, tolerance, exact)
        members.append(exact(program, own) if y is None else y)
    return torch.stack(members).reshape(*batch, *members[0].shape) if members else None


def _of_member(t: Tensor, n_batch: int, where: tuple[int, ...], category: int) -> Tensor:
    """The part of an argument that belongs to a member of the batch; a shared argument as it is."""
    own = t.ndim - (1 if category > J else 2)
    at = tuple(0 if size == 1 else k for size, k in zip(t.shape[:own], where[n_batch - own :], strict=True))
    return t[at] if own else t


def _member(
    program: Program, tensors: Sequence[Tensor], m: int, n: int, tolerance: float, exact: Exact
) -> Tensor | None:
    start = time.perf_counter()
    miss, reason = 0.0, "the fast sum missed its tolerance"
    # sums behind a logarithm may be much smaller than their mean: the second attempt is far more accurate
    inner = (tolerance, max(1e-5 * tolerance, 1e-13)) if program.kind in SHIFTED else (tolerance, tolerance)
    for attempt in range(2):
        try:
            if m == 0 or n == 0:
                raise Refused("there are no pairs")
            if tensors[0].device.type != "cpu":
                raise Refused(f"fast sums run on the CPU; the tensors lie on {tensors[0].device}")
            if program.kind in SHIFTED:
                total, arguments, finish = shifted(program, tensors, m, n, inner[attempt])
            else:
                total, arguments, finish = program, list(tensors), None
            one = FastSum(analyse(total), arguments, m, n, inner[attempt])
            method = choose(one, exact)
            apply = method(attempt)
            if apply is None:
                break
            results = one.run(apply)
            if finish is not None:
                results = [finish(results[0][1])]
        except Lost as lost:
            reason = str(lost)
            continue
        except Refused as refused:
            _tell(Info("exact", tolerance, detail=str(refused)))
            return None
        spent = time.perf_counter() - start
        rows = int(min(64, max(4, CHECKED * spent * rate(program) / max(m, n) / len(program.exprs))))
        miss = error(program, tensors, results, rows, exact)
        if miss <= _SURE * tolerance:
            _tell(Info(method.name, tolerance, miss, rows, apply.detail, time.perf_counter() - start))
            return _assembled(results, tensors[0].dtype)
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
    before = getattr(_watching, "lists", ())
    _watching.lists = (*before, found)
    try:
        yield found
    finally:
        _watching.lists = before


_watching = threading.local()


def _tell(info: Info) -> None:
    for found in getattr(_watching, "lists", ()):
        found.append(info)


def _assembled(results: Sequence[Result], dtype: torch.dtype) -> Tensor:
    pieces = [total.to(dtype) for _, total in results]
    return pieces[0] if len(pieces) == 1 else torch.cat([p.reshape(-1) for p in pieces])
