"""A Program within a tolerance: analysed, planned, summed, checked; exact where that is cheaper or safer.

`sums` returns None where the exact engine must run; `Info` says what was done and why.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pullback.kernels.fast.plans as plans
from pullback.kernels.codegen import eager
from pullback.kernels.fast.analyse import Form, Refused, Term, analyse
from pullback.kernels.fast.plans import Plans
from pullback.kernels.ir.expr import Expr, I, J
from pullback.kernels.ir.reductions import OVER_BOTH, OVER_I, OVER_J, Program

Exact = Callable[..., Tensor]  # (program, tensors, ranges) -> result of the exact engine
CHECKED = 0.08  # share of the time that the check may take
_SAMPLES = 4096  # pairs from which the size of kernels is read
_SLACK = 2.0  # largest error of the series, in tolerances times the mean of |K|: errors of many modes average out


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


class _Sum:
    """One program on one member of a batch."""

    def __init__(self, form: Form, tensors: Sequence[Tensor], m: int, n: int, tolerance: float, exact: Exact) -> None:
        self.form, self.tensors, self.m, self.n, self.tolerance, self.exact = form, tensors, m, n, tolerance, exact
        program = form.program
        self.parameters = {
            p: t.double() for p, (t, (_, c)) in enumerate(zip(tensors, program.signature, strict=True)) if c > J
        }
        self.kernels = list(
            dict.fromkeys(t.k for parts in form.components for terms in parts for t in terms if t.k is not None)
        )
        self.points: Plans = plans.of(self._coordinates, form, tensors)

    # Numbers of expressions ------------------------------------------------------------------------------------------

    def side(self, exprs: Sequence[Expr], category: int) -> Tensor:
        """Expressions of one index and parameters, as columns: (rows, number of expressions)."""
        rows = self.m if category == I else self.n
        values = eager.evaluate(exprs, [t.double() for t in self.tensors])
        return torch.cat([v.expand(rows, 1) for v in values], -1)

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        u, v = zip(*self.form.coordinates, strict=True)
        return self.side(u, I), self.side(v, J)

    def kernel(self, d: Tensor) -> Tensor:
        """Every kernel at differences (..., D): (..., c)."""
        n = self.form.program.n
        values: list[Any] = [self.parameters.get(p) for p in range(n)]
        values += [d[..., k : k + 1] for k in range(d.shape[-1])]
        found = eager.evaluate(self.kernels, values)
        return torch.cat([f.expand(*d.shape[:-1], 1) for f in found], -1)

    def sizes_of_kernels(self) -> Tensor:
        """The mean of |K| over sampled pairs, for each kernel; 1 for those that vanish, as differences of equals do."""
        x, y = self.points.x, self.points.y
        generator = torch.Generator().manual_seed(1)
        i, j = (torch.randint(0, t.shape[0], (_SAMPLES,), generator=generator) for t in (x, y))
        d = x[i] - y[j]
        size = self.kernel(d).abs().mean(0)
        close = self.kernel(d * torch.logspace(-6, 0, _SAMPLES, dtype=torch.float64)[:, None]).abs().amax(0)
        return torch.where((size == 0) & (close == 0), 1.0, size)

    # The sums --------------------------------------------------------------------------------------------------------

    def run(self, apply: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each expression of the program its rows, and the result (rows added up where the sum is over both)."""
        return [
            self._one(parts, axis, apply)
            for parts, axis in zip(self.form.components, self.form.program.axes, strict=True)
        ]

    def _one(self, parts: Sequence[Sequence[Term]], axis: int, apply: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        over_i = axis == OVER_I
        near, far = ("b", "a") if over_i else ("a", "b")  # factor of the rows that are kept, of those that are summed
        kept, summed = (J, I) if over_i else (I, J)
        weights: dict[Expr | None, int] = {}
        channels: dict[tuple[int, Expr | None], list[tuple[int, int]]] = {}
        plain: list[tuple[int, Expr | None, int]] = []  # terms without a kernel
        for c, terms in enumerate(parts):
            for t in terms:
                r = weights.setdefault(getattr(t, far), len(weights))
                if t.k is None:
                    plain.append((c, getattr(t, near), r))
                else:
                    channels.setdefault((c, getattr(t, near)), []).append((self.kernels.index(t.k), r))
        rows = self.n if over_i else self.m
        columns = [e for e in weights if e is not None]
        values = self.side(columns, summed) if columns else torch.empty(self.m if over_i else self.n, 0)
        full = torch.ones(values.shape[0], len(weights), dtype=torch.float64)
        full[:, [r for e, r in weights.items() if e is not None]] = values.double()
        factors = list(
            dict.fromkeys(e for e in [*(f for _, f in channels), *(f for _, f, _ in plain)] if e is not None)
        )
        scale = dict(zip(factors, self.side(factors, kept).unbind(-1), strict=True)) if factors else {}
        out = torch.zeros(rows, len(parts), dtype=torch.float64)
        if channels:
            found = apply(full, list(channels.values()), over_i)
            for (c, factor), column in zip(channels, found.unbind(-1), strict=True):
                out[:, c] += column if factor is None else column * scale[factor]
        for c, factor, r in plain:
            total = full[:, r].sum()
            out[:, c] += total if factor is None else total * scale[factor]
        return out, out.sum(0) if axis == OVER_BOTH else out

    # The check -------------------------------------------------------------------------------------------------------

    def error(self, results: Sequence[tuple[Tensor, Tensor]], n_rows: int) -> float:
        """The largest relative l2 error of a result, from sampled rows against the exact engine in float64."""
        worst = 0.0
        program = self.form.program
        generator = torch.Generator().manual_seed(2)
        for e, axis, (rows, total) in zip(program.exprs, program.axes, results, strict=True):
            kept = J if axis == OVER_I else I
            count = rows.shape[0]
            chosen = torch.randint(0, count, (min(n_rows, count),), generator=generator)
            tensors = [
                (t[chosen] if category == kept else t).double()
                for t, (_, category) in zip(self.tensors, program.signature, strict=True)
            ]
            single = replace(program, exprs=(e,), axes=(OVER_I if kept == J else OVER_J,), accumulator="float64")
            true = self.exact(single, tensors)
            miss = (rows[chosen] - true).square().mean(0).sum().sqrt()
            if axis == OVER_BOTH:  # errors of rows add up like those of independent numbers
                size = total.norm() / math.sqrt(count)
            else:
                size = true.square().mean(0).sum().sqrt()
            error = float(miss / size) if float(size) > 0 else (0.0 if float(miss) == 0 else math.inf)
            worst = max(worst, math.inf if math.isnan(error) else error)
        return worst


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
    try:
        form = analyse(program)
        if m == 0 or n == 0:
            raise Refused("there are no pairs")
        one = _Sum(form, tensors, m, n, tolerance, exact)
        method = plans.choose(one)
    except Refused as reason:
        _tell(Info("exact", tolerance, detail=str(reason)))
        return None
    for attempt in range(2):
        apply = method(attempt)
        if apply is None:
            break
        results = one.run(apply)
        spent = time.perf_counter() - start
        rows = int(min(64, max(4, CHECKED * spent * plans.rate(program) / max(m, n) / len(program.exprs))))
        error = one.error(results, rows)
        if error <= tolerance:
            detail = getattr(apply, "detail", "")
            _tell(Info(method.name, tolerance, error, rows, detail, time.perf_counter() - start))
            return _assembled(results, tensors[0].dtype)
    text = f"a fast sum missed its tolerance of {tolerance:.1e}; the exact sum was taken"
    warnings.warn(ToleranceWarning(text), stacklevel=2)
    _tell(Info("exact", tolerance, detail="the fast sum missed its tolerance", seconds=time.perf_counter() - start))
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


def _assembled(results: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    pieces = [total.to(dtype) for _, total in results]
    return pieces[0] if len(pieces) == 1 else torch.cat([p.reshape(-1) for p in pieces])
