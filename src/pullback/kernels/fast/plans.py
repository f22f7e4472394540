"""What is kept between sums over the same points, and which method is the cheapest.

Points are the same if the tensors that the coordinates are made of lie in the same memory and have not been written to
since. The last few sets of points are kept; `clear` drops them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

import pullback.kernels.fast.fourier as fourier
from pullback.kernels.fast.analyse import Form, Refused
from pullback.kernels.ir.expr import Expr, variables, walk
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import Program

_KEPT = 4  # sets of points
FEW = 3e-3  # seconds of exact work below which no other way is looked for
_CHEAP = {"Add", "Subtract", "Mult", "Minus", "Square", "Gather", "Concat", "Sum", "Var", "Const", "Scalprod", "SqDist"}


class Plans:
    """The points of a program, and what was prepared for them.

    Attributes:
        x: (M, D) coordinates of i, float64, around a common centre.
        y: (N, D) coordinates of j.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise Refused("points are not finite")
        self.x, self.y = x, y
        self.fourier = fourier.FourierPlan(x, y)
        self._made: OrderedDict[Any, Any] = OrderedDict()

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """The thing with this key, made once while it is among the last sixteen."""
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > 16:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]


_recent: OrderedDict[Any, tuple[list[Tensor], Plans]] = OrderedDict()


def of(coordinates: Callable[[], tuple[Tensor, Tensor]], form: Form, tensors: Sequence[Tensor]) -> Plans:
    """The plans of these points."""
    exprs = [e for pair in form.coordinates for e in pair]
    used = [tensors[p] for p in variables(*exprs)]
    key = (form.coordinates, *map(_identity, used))
    found = _recent.get(key)
    if found is None:
        found = _recent[key] = (used, Plans(*coordinates()))  # holding the tensors keeps their memory from being reused
        while len(_recent) > _KEPT:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    return found[1]


def clear() -> None:
    """Forget all points."""
    _recent.clear()


def _identity(t: Tensor) -> tuple[Any, ...]:
    version = 0 if t.is_inference() else t._version
    return (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, version)


# Cost ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def rate(program: Program) -> float:
    """Pairs that the exact engine does in a second, roughly (measured: 4e9 for a Gaussian in 3-D in double)."""
    cost = 0.0
    for e in walk(*program.exprs):
        if e.roles == 3:
            cost += e.dim * (1.0 if e.op in _CHEAP or e.op not in PRIMITIVES else 8.0)
    return 4e9 * 14.0 / max(cost, 4.0) * torch.get_num_threads() / 2


class Method(Protocol):
    """A way to sum: called with the number of the attempt, gives what `_Sum.run` applies, or None."""

    name: str

    def __call__(self, attempt: int) -> Callable[..., Tensor] | None:
        """The sum, more accurate at the second attempt."""


class _Fourier:
    name = "fourier"

    def __init__(self, one: Any, sizes: Tensor) -> None:
        self.one, self.sizes = one, sizes

    def series(self, attempt: int) -> fourier.Series | None:
        one = self.one
        kernels: tuple[Expr, ...] = tuple(one.kernels)
        numbers = tuple((p, *t.reshape(-1).tolist()) for p, t in one.parameters.items())
        target = (4.0 if attempt == 0 else 0.05) * one.tolerance
        make = lambda: fourier.series(lambda d: one.kernel(d) / self.sizes, one.points.fourier.edge, target)  # noqa: E731
        return one.points.made(("series", kernels, numbers, target), make)

    def __call__(self, attempt: int) -> Callable[..., Tensor] | None:
        s = self.series(attempt)
        if s is None:
            return None
        accuracy = max(self.one.tolerance * (2.0 if attempt == 0 else 0.05), 1e-14)
        double = accuracy < 1e-5 or attempt > 0

        def apply(weights: Tensor, channels: Any, over_i: bool) -> Tensor:
            scaled = fourier.Series(s.period, s.coefficients * self.sizes.view(-1, *(1,) * len(s.modes)))
            return self.one.points.fourier.apply(scaled, weights, channels, over_i, accuracy, double)

        apply.detail = f"{' x '.join(map(str, s.modes))} modes"  # type: ignore[attr-defined]
        return apply


def choose(one: Any) -> Method:
    """The cheapest method that fits.

    Raises: Refused if that is the exact sum.
    """
    program = one.form.program
    seconds = one.m * one.n / rate(program) * len(program.exprs)
    if seconds < FEW:
        raise Refused(f"{one.m} x {one.n} pairs are few")
    sizes = one.sizes_of_kernels()
    if bool(torch.isfinite(sizes).all()) and bool((sizes > 0).all()):
        method = _Fourier(one, sizes)
        if method.series(0) is not None:
            return method
    raise Refused("the kernel is not smooth at the scale of the points")
