"""What is kept between sums over the same points.

Points are the same if the tensors that the coordinates are made of lie in the same memory and have not been written to
since. The last few sets of points are kept; `clear` drops them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pullback.kernels.fast.fourier as fourier
from pullback.kernels.fast.analyse import Form, Refused
from pullback.kernels.ir.expr import variables

_KEPT = 4  # sets of points


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
