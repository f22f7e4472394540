"""Which way of summing is the cheapest: exact, a Fourier series, or a tree; and the two latter, ready to sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

import pullback.kernels.fast.fourier as fourier
from pullback.core.errors import ArgumentError
from pullback.kernels.fast.analyse import Refused
from pullback.kernels.fast.balance import estimate, leaf_for
from pullback.kernels.fast.far import FarField, TooLong
from pullback.kernels.fast.sum import ONE, Apply, Exact, FastSum
from pullback.kernels.fast.tree import TreePlan
from pullback.kernels.ir.expr import Expr, I, J, walk
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import OVER_I, Program

FEW = 3e-3  # seconds of exact work below which no other way is looked for
_CHEAP = {"Add", "Subtract", "Mult", "Minus", "Square", "Gather", "Concat", "Sum", "Var", "Const", "Scalprod", "SqDist"}
_MANY = 1 << 14  # differences that are worth compiled code
_SPREAD = {1: 4e-8, 2: 9e-8, 3: 2.5e-7}  # seconds for a point in a complex NUFFT, on one thread
_MODE = 6e-8  # for a mode


@lru_cache(maxsize=1024)
def rate(program: Program) -> float:
    """Pairs that the exact engine does in a second, roughly (measured: 4e9 for a Gaussian in 3-D in double)."""
    cost = 0.0
    for e in walk(*program.exprs):
        if e.roles == 3:
            cost += e.dim * (1.0 if e.op in _CHEAP or e.op not in PRIMITIVES else 8.0)
    return 4e9 * 14.0 / max(cost, 4.0) * torch.get_num_threads() / 2


class Method(Protocol):
    """A way to sum."""

    name: str

    def __call__(self) -> Apply:
        """The sums. Raises: Refused if it cannot."""


class Patience:
    """How long preparing another way may take: as long as exact sums over the same points took, this one included.

    So one sum is not delayed by a plan that only many would pay for, and many cost at most twice what they must (the
    rule of whoever rents skis until a pair would have been cheaper).
    """

    def __init__(self, one: FastSum, seconds: float) -> None:
        self.known: dict[str, float] = one.points.made(("patience", one.form.program), dict)
        self.exact = seconds
        self.seconds = self.known.get("spent", 0.0) + seconds

    @property
    def asked(self) -> float:
        """Seconds of preparation that were found to be more than the patience before."""
        return self.known.get("asked", 0.0)

    def over(self, reason: str, asked: float = 0.0) -> Refused:
        """What to raise where the exact sum is taken."""
        self.known["spent"] = self.seconds
        self.known["asked"] = max(self.asked, asked)
        return Refused(reason)


class Fourier:
    """Two non-uniform FFTs."""

    name = "fourier"

    def __init__(self, one: FastSum) -> None:
        self.one, self.sizes = one, one.sizes_of_kernels()

    def fits(self) -> bool:
        """Whether there is a series for these points."""
        return bool(torch.isfinite(self.sizes).all() and (self.sizes > 0).all()) and self.series() is not None

    def seconds(self) -> float:
        """Roughly the time of a sum with a plan."""
        s, one = self.series(), self.one
        assert s is not None
        transforms = one.n_channels + len(one.form.components)
        work = (one.m + one.n) / 2 * _SPREAD[len(s.modes)] + math.prod(s.modes) * 2 ** len(s.modes) * _MODE
        return transforms / 2 * work / torch.get_num_threads()

    def series(self) -> fourier.Series | None:
        """The series of the kernels, each relative to its size; None if it is too long."""
        one = self.one
        target = 4.0 * one.tolerance
        make = lambda: fourier.series(lambda d: one.kernel(d) / self.sizes, one.points.fourier.edge, target)  # noqa: E731
        return one.points.made(("series", *one.identity(), target), make)

    def __call__(self) -> Apply:
        """The sums."""
        s = self.series()
        if s is None:
            raise Refused("there is no short Fourier series")
        accuracy = 2.0 * self.one.tolerance
        how = fourier.Precision(accuracy, accuracy < 1e-5 or self.one.careful)
        scaled = fourier.Series(s.period, s.coefficients * self.sizes.view(-1, *(1,) * len(s.modes)))

        def sums(weights: Tensor, channels: Any, over_i: bool) -> Tensor:
            return self.one.points.fourier.apply(scaled, weights, channels, over_i, how)

        return Apply(sums, f"{' x '.join(map(str, s.modes))} modes")


class _Tree:
    name = "tree"

    def __init__(self, one: FastSum, exact: Exact, patience: Patience) -> None:
        self.one, self.exact, self.patience = one, exact, patience
        if one.has_plain and ONE not in one.kernels:
            one.kernels.append(ONE)

    def kernel(self, d: Tensor) -> Tensor:
        """The kernels at differences, by the engine where they are many."""
        return self.one.kernel(d) if d.numel() < _MANY else self.one.kernel_by(self.exact, d)

    def __call__(self) -> Apply:
        one, patience = self.one, self.patience
        leaf = leaf_for(one.tolerance, one.points.x.shape[1])
        plan: TreePlan = one.points.made(("tree", leaf), lambda: TreePlan(one.points.x, one.points.y, leaf))
        tolerance = 0.4 * one.tolerance
        limit = patience.seconds if FEW > 0 else math.inf
        try:
            far: FarField = one.points.made(
                ("far", leaf, *one.identity(), tolerance), lambda: FarField(plan, self.kernel, tolerance, limit=limit)
            )
        except TooLong as reason:
            raise patience.over(str(reason), reason.seconds) from None
        except ArgumentError as reason:
            raise Refused(str(reason)) from None

        def sums(weights: Tensor, channels: Any, over_i: bool) -> Tensor:
            return far.apply(weights, channels=channels, over_i=over_i)

        def near(e: Expr, axis: int) -> Tensor:
            program = one.form.program
            order = {I: plan.rows, J: plan.columns}
            args = [t[order[c]] if c in order else t for t, (_, c) in zip(one.tensors, program.signature, strict=True)]
            single = Program("Sum", (e,), (axis,), program.signature, 1, program.accumulator, program.scheme)
            found = self.exact(single, args, plan.near).double()
            rows = torch.empty_like(found)
            rows[order[J if axis == OVER_I else I]] = found
            return rows

        share = plan.n_near / (one.m * one.n)
        return Apply(sums, f"order {far.order}, {100 * share:.2g} % of the pairs near", near)


def choose(one: FastSum, exact: Exact) -> tuple[str, Apply]:
    """Name and sums of the cheapest method that fits.

    Raises: Refused if that is the exact sum.
    """
    program = one.form.program
    speed = rate(program)
    seconds = one.m * one.n / speed * len(program.exprs)
    patience = Patience(one, seconds)
    if patience.seconds < FEW:
        raise patience.over(f"{one.m} x {one.n} pairs are few")
    candidates: list[tuple[float, Callable[[], Method]]] = []
    series = Fourier(one)
    if series.fits():
        candidates.append((series.seconds(), lambda: series))
    dim = one.points.x.shape[1]
    first, again = estimate(one.m, one.n, dim, one.tolerance, speed, max(1, one.n_channels))
    prepared = max(first - again, patience.asked) <= patience.seconds
    if prepared or FEW <= 0:
        candidates.append((again, lambda: _Tree(one, exact, patience)))
    cost, method = min(candidates, key=lambda c: c[0], default=(math.inf, None))
    if method is None or (cost > 0.7 * seconds and FEW > 0):
        beside = f"{cost:.2g} s" if method else f"{max(first - again, patience.asked):.2g} s to prepare a tree"
        raise patience.over(f"the exact sum is as cheap: {seconds:.2g} s beside {beside}")
    found = method()
    return found.name, found()
