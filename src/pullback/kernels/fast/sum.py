"""One sum, from the numbers of its factors to the check of its result on sampled rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pullback.kernels.fast.plans as plans
from pullback.kernels.codegen import eager
from pullback.kernels.fast.analyse import Form, Refused, Term
from pullback.kernels.fast.plans import Plans
from pullback.kernels.ir.expr import Expr, I, J, builders, const, substitute, variable, variables, walk
from pullback.kernels.ir.reductions import OVER_BOTH, OVER_I, OVER_J, Program

Exact = Callable[..., Tensor]  # (program, tensors, ranges) -> result of the exact engine
Result = tuple[Tensor, Tensor]  # the rows that are kept, and the result (their sum, where the sum is over both)
ONE = const(1.0)  # the kernel of terms that have none, where a sum over some pairs only needs it
_SAMPLES = 4096  # pairs from which the size of kernels is read


@dataclass(frozen=True)
class Apply:
    """A method, ready to sum.

    Args:
        sums: (weights, channels, over_i) -> columns; a channel is a list of (number of a kernel, number of a weight).
        detail: what to tell about it.
        near: (expression, axis) -> rows of the pairs that `sums` leaves out; None if it takes all.
    """

    sums: Callable[..., Tensor]
    detail: str
    near: Callable[[Expr, int], Tensor] | None = None


class FastSum:
    """A form with its numbers, without batch axes.

    Args:
        form: the analysed program.
        tensors: its arguments.
        m, n: numbers of rows i and j.
        tolerance: relative l2 error of each result.
        careful: compute in double precision whatever the tolerance.
    """

    def __init__(
        self, form: Form, tensors: Sequence[Tensor], m: int, n: int, tolerance: float, careful: bool = False
    ) -> None:
        self.form, self.tensors, self.m, self.n, self.tolerance = form, tensors, m, n, tolerance
        self.careful = careful
        program = form.program
        self.parameters = {
            p: t.double() for p, (t, (_, c)) in enumerate(zip(tensors, program.signature, strict=True)) if c > J
        }
        terms = [t for parts in form.components for terms in parts for t in terms]
        self.kernels = list(dict.fromkeys(t.k for t in terms if t.k is not None))
        self.has_plain = any(t.k is None for t in terms)
        self.points: Plans = plans.of(self._coordinates, form, tensors)

    # Numbers of expressions ------------------------------------------------------------------------------------------

    def side(self, exprs: Sequence[Expr], category: int) -> Tensor:
        """Expressions of one index and parameters, as columns: (rows, number of expressions)."""
        rows = self.m if category == I else self.n
        used = variables(*exprs)
        values = eager.evaluate(exprs, [t.double() if p in used else t for p, t in enumerate(self.tensors)])
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

    def kernel_by(self, exact: Exact, d: Tensor) -> Tensor:
        """The same by the engine: compiled, in one pass over the differences."""
        first, dim = self.form.program.n, d.shape[-1]
        place = variable(0, dim, I)
        used = [v for v in walk(*self.kernels) if v.op == "Var" and v.params[1] > J]
        table = {v: variable(1 + k, v.dim, v.params[1]) for k, v in enumerate(used)}
        table |= {variable(first + k, 1, I): builders["Gather"](place, (k,)) for k in range(dim)}
        exprs = [substitute(k, table) for k in self.kernels]
        signature = ((dim, I), *((v.dim, v.params[1]) for v in used))
        whole = exprs[0] if len(exprs) == 1 else builders["Concat"](*exprs)
        single = Program("Sum", (whole,), (OVER_J,), signature, 1, "float64", "auto")
        y = exact(single, [d.reshape(-1, dim), *(self.parameters[v.params[0]] for v in used)])
        return y.view(*d.shape[:-1], len(exprs))

    def identity(self) -> tuple[Any, ...]:
        """What the kernels are: their expressions and the values of parameters."""
        return (*self.kernels, *((p, *t.reshape(-1).tolist()) for p, t in self.parameters.items()))

    def sizes_of_kernels(self) -> Tensor:
        """The mean of |K| over sampled pairs, for each kernel; 1 for those that vanish, as differences of equals do."""
        return self.points.made(("sizes", *self.identity()), self._sizes_of_kernels)

    def _sizes_of_kernels(self) -> Tensor:
        x, y = self.points.x, self.points.y
        generator = torch.Generator().manual_seed(1)
        i, j = (torch.randint(0, t.shape[0], (_SAMPLES,), generator=generator) for t in (x, y))
        d = x[i] - y[j]
        size = self.kernel(d).abs().mean(0)
        close = self.kernel(d * torch.logspace(-6, 0, _SAMPLES, dtype=torch.float64)[:, None]).abs().amax(0)
        return torch.where((size == 0) & (close == 0), 1.0, size)

    def largest_kernel(self) -> Tensor:
        """The largest value of the kernels over sampled differences, small ones among them."""
        x, y = self.points.x, self.points.y
        generator = torch.Generator().manual_seed(3)
        i, j = (torch.randint(0, t.shape[0], (_SAMPLES,), generator=generator) for t in (x, y))
        d = (x[i] - y[j]) * torch.logspace(-9, 0, _SAMPLES, dtype=torch.float64)[:, None]
        return self.kernel(torch.cat([d, x[i] - y[j]])).max()

    # The sums --------------------------------------------------------------------------------------------------------

    def run(self, apply: Apply, beside: float = 0.0) -> list[Result]:
        """For each expression of the program its rows, and the result (rows added up where the sum is over both).

        Afterwards `uncancelled` is the least size of a result, or of `beside` that it is added to, relative to that of
        a sum whose terms have random signs.
        """
        results, self.uncancelled = [], math.inf
        for e, parts, axis in zip(self.form.program.exprs, self.form.components, self.form.program.axes, strict=True):
            rows, size = self._far(parts, axis, apply)
            if apply.near is not None:
                rows = rows + apply.near(e, OVER_J if axis == OVER_BOTH else axis)
            total = rows.sum(0) if axis == OVER_BOTH else rows
            results.append((rows, total))
            if size > 0:
                self.uncancelled = min(self.uncancelled, math.hypot(float(total.norm()), beside) / size)
        return results

    @property
    def n_channels(self) -> int:
        """Columns that the sums over kernels have, over all expressions."""
        return sum(len({t.a for t in terms}) for parts in self.form.components for terms in parts)

    def _far(self, parts: Sequence[Sequence[Term]], axis: int, apply: Apply) -> tuple[Tensor, float]:
        """The rows, and the l2 norm that they would have if the signs of all terms were random."""
        over_i = axis == OVER_I
        near, far = ("b", "a") if over_i else ("a", "b")  # factor of the rows that are kept, of those that are summed
        kept, summed = (J, I) if over_i else (I, J)
        weights: dict[Expr | None, int] = {}
        channels: dict[tuple[int, Expr | None], list[tuple[int, int]]] = {}
        plain: list[tuple[int, Expr | None, int]] = []  # terms without a kernel
        for c, terms in enumerate(parts):
            for t in terms:
                r = weights.setdefault(getattr(t, far), len(weights))
                if t.k is None and apply.near is None:
                    plain.append((c, getattr(t, near), r))
                else:
                    channels.setdefault((c, getattr(t, near)), []).append((self.kernels.index(t.k or ONE), r))
        rows = self.n if over_i else self.m
        columns = [e for e in weights if e is not None]
        values = self.side(columns, summed) if columns else torch.empty(self.m if over_i else self.n, 0)
        full = torch.ones(values.shape[0], len(weights), dtype=torch.float64)
        full[:, [r for e, r in weights.items() if e is not None]] = values.double()
        factors = list(
            dict.fromkeys(e for e in [*(f for _, f in channels), *(f for _, f, _ in plain)] if e is not None)
        )
        scale = dict(zip(factors, self.side(factors, kept).unbind(-1), strict=True)) if factors else {}
        if not bool(torch.isfinite(full).all()) or not all(bool(torch.isfinite(f).all()) for f in scale.values()):
            raise Refused("a factor of i or of j is not finite")
        out = torch.zeros(rows, len(parts), dtype=torch.float64)
        lengths, sizes, square = full.norm(dim=0).tolist(), self.sizes_of_kernels().tolist(), 0.0
        for (_, factor), pairs in channels.items():
            length = rows**0.5 if factor is None else float(scale[factor].norm())
            square += (length * sum(sizes[k] * lengths[r] for k, r in pairs)) ** 2
        if channels:
            found = apply.sums(full, list(channels.values()), over_i)
            for (c, factor), column in zip(channels, found.unbind(-1), strict=True):
                out[:, c] += column if factor is None else column * scale[factor]
        for c, factor, r in plain:
            total = full[:, r].sum()
            out[:, c] += total if factor is None else total * scale[factor]
        return out, square**0.5


def error(
    program: Program,
    tensors: Sequence[Tensor],
    results: Sequence[Result],
    n_rows: int,
    exact: Exact,
    beside: float = 0.0,
) -> float:
    """The largest l2 error of a result relative to hypot(|result|, beside).

    From sampled rows against the exact engine in float64.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(2)
    for e, axis, (rows, total) in zip(program.exprs, program.axes, results, strict=False):
        kept = J if axis == OVER_I else I
        top, others = _strata(rows, n_rows, generator)
        chosen = torch.cat([top, others])
        part = [
            (t[chosen] if category == kept else t).double()
            for t, (_, category) in zip(tensors, program.signature, strict=True)
        ]
        exprs = (e,) if program.kind == "Sum" else program.exprs
        single = replace(program, exprs=exprs, axes=(OVER_I if kept == J else OVER_J,), accumulator="float64")
        miss = (rows[chosen] - exact(single, part)).square().sum(-1)
        count = rows.shape[0] - len(top)
        # the largest rows are all checked, the rest by a sample; errors of rows that are added up are independent
        square = miss[: len(top)].sum() + (miss[len(top) :].mean() * count if count else 0.0)
        size = math.hypot(float(total.norm()), beside)
        relative = float(square.sqrt()) / size if size > 0 else (0.0 if float(square) == 0 else math.inf)
        worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def _strata(rows: Tensor, n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The numbers of the largest rows, and a sample of the others; all of them if they are few."""
    size = rows.abs().amax(-1)
    if len(size) <= n_rows:
        return torch.arange(len(size)), torch.arange(0)
    top = size.topk(n_rows // 4).indices
    rest = torch.ones(len(size), dtype=torch.bool)
    rest[top] = False
    others = rest.nonzero().squeeze(-1)
    return top, others[torch.randint(0, len(others), (n_rows - len(top),), generator=generator)]
