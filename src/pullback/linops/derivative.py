"""Finite differences and integration along axes of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axes, as_axis, as_dims, per_axis
from pullback.linops.stencil import Stencil, apply_stencil

_KINDS = ("forward", "backward", "centered")
_FIFTH = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}


def _first(n: int, sampling: float, kind: str, edge: bool, order: int, owner: str) -> Stencil:
    """(x[i+1] - x[i]) / h and its relatives as a stencil."""
    if kind not in _KINDS:
        raise ArgumentError(f"{owner}: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    if order not in (3, 5):
        raise ArgumentError(f"{owner}: order must be 3 or 5; got {order!r}")
    h = _positive(sampling, owner)
    need = order if kind == "centered" else 2
    if n < need:
        raise ArgumentError(f"{owner}: a {kind} difference needs at least {need} samples along the axis; got {n}")
    up, down = {0: -1.0, 1: 1.0}, {-1: -1.0, 0: 1.0}
    if kind == "forward":
        made = Stencil(n, up, 0, n - 1, {n - 1: {}})
    elif kind == "backward":
        made = Stencil(n, down, 1, n, {0: {}})
    else:
        ends: dict[int, dict[int, float]] = {0: {}, n - 1: {}}
        if order == 5:
            ends |= {1: {}, n - 2: {}}
        if edge:
            ends[0], ends[n - 1] = {0: -1.0, 1: 1.0}, {n - 2: -1.0, n - 1: 1.0}
            if order == 5:
                ends[1], ends[n - 2] = {0: -0.5, 2: 0.5}, {n - 3: -0.5, n - 1: 0.5}
        taps = {-1: -0.5, 1: 0.5} if order == 3 else _FIFTH
        half = order // 2
        made = Stencil(n, taps, half, n - half, ends)
    return made.scaled(1 / h)


def _second(n: int, sampling: float, kind: str, edge: bool, owner: str) -> Stencil:
    """(x[i-1] - 2 x[i] + x[i+1]) / h^2 and its relatives as a stencil."""
    if kind not in _KINDS:
        raise ArgumentError(f"{owner}: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    h = _positive(sampling, owner)
    if n < 3:
        raise ArgumentError(f"{owner}: a second difference needs at least 3 samples along the axis; got {n}")
    shift = {"forward": 1, "centered": 0, "backward": -1}[kind]
    taps = {shift - 1: 1.0, shift: -2.0, shift + 1: 1.0}
    start, stop = 1 - shift, n - 1 - shift
    rows: dict[int, dict[int, float]] = {i: {} for i in range(n) if not start <= i < stop}
    if edge and kind == "centered":
        rows = {0: {0: 1.0, 1: -2.0, 2: 1.0}, n - 1: {n - 3: 1.0, n - 2: -2.0, n - 1: 1.0}}
    return Stencil(n, taps, start, stop, rows).scaled(1 / h**2)


def _positive(sampling: Any, owner: str) -> float:
    h = float(sampling)
    if not (h > 0 and math.isfinite(h)):
        raise ArgumentError(f"{owner}: sampling must be a positive number; got {sampling!r}")
    return h


class _Stencils(LinearOperator):
    """A x = sum_k D_k x (one output) or the D_k x stacked along a new first axis; D_k a stencil along axis k."""

    def __init__(self, dims: tuple[int, ...], terms: Sequence[tuple[int, Stencil]], stacked: bool, dtype: Any) -> None:
        super().__init__(dims, (len(terms), *dims) if stacked else dims, dtype=dtype)
        self._terms = tuple((axis, s, s.transposed) for axis, s in terms)
        self._stacked = stacked

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.dims)]
        y = torch.empty((*batch, *self.dimsd), dtype=x.dtype, device=x.device)
        self._forward_into(x, y)
        return y

    def _forward_into(self, x: Tensor, out: Tensor) -> None:
        n = len(self.dims)
        for k, (axis, s, _) in enumerate(self._terms):
            part = out.select(-n - 1, k) if self._stacked else out
            apply_stencil(s, x, axis, part, add=k > 0 and not self._stacked)

    def _adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[: y.ndim - len(self.dimsd)]
        x = torch.empty((*batch, *self.dims), dtype=y.dtype, device=y.device)
        self._pull(y, x, False)
        return x

    def _adjoint_add(self, y: Tensor, out: Tensor) -> None:
        self._pull(y, out, True)

    def _pull(self, y: Tensor, out: Tensor, add: bool) -> None:
        n = len(self.dims)
        for k, (axis, _, s) in enumerate(self._terms):
            apply_stencil(s, y.select(-n - 1, k) if self._stacked else y, axis, out, add=add or k > 0)

    def _norm_bound(self) -> float:
        bounds = [s.norm_bound for _, s, _ in self._terms]
        return math.sqrt(sum(b * b for b in bounds)) if self._stacked else sum(bounds)


class FirstDerivative(_Stencils):
    """y[i] = (x[i+1] - x[i-1]) / (2 h) along one axis (centered), or a one-sided difference.

    Args:
        dims: input shape.
        axis: the axis that is differentiated.
        sampling: distance h between samples [unit of the axis].
        kind: "centered", "forward" (last sample zero) or "backward" (first sample zero).
        edge: one-sided differences at both ends of a centered derivative; otherwise zeros there.
        order: number of points, 3 or 5, of a centered derivative.
        dtype: what `.dtype` reports.

    Raises: ArgumentError. Cost: one pass over the data for the forward and for the adjoint.
    """

    def __init__(
        self,
        dims: Dims,
        axis: int = -1,
        sampling: float = 1.0,
        kind: str = "centered",
        edge: bool = False,
        order: int = 3,
        *,
        dtype: Any = None,
    ) -> None:
        shape = as_dims(dims, "dims", "FirstDerivative")
        a = as_axis(axis, len(shape), "FirstDerivative")
        super().__init__(shape, [(a, _first(shape[a], sampling, kind, edge, order, "FirstDerivative"))], False, dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """All kinds, both axes, both orders, with and without edges."""
        yield cls(7)
        yield cls((5, 6), axis=0, sampling=0.5, kind="forward")
        yield cls((5, 6), axis=-1, kind="backward")
        yield cls((6, 4), axis=0, edge=True)
        yield cls((3, 8), order=5, edge=True, sampling=2.0)


class SecondDerivative(_Stencils):
    """y[i] = (x[i-1] - 2 x[i] + x[i+1]) / h^2 along one axis.

    Args:
        dims: input shape.
        axis: the axis that is differentiated.
        sampling: distance h between samples [unit of the axis].
        kind: "centered", "forward" (the stencil starts at i) or "backward" (it ends at i); samples without a full
            stencil are zero.
        edge: at both ends of a centered derivative use the nearest full stencil.
        dtype: what `.dtype` reports.

    Raises: ArgumentError. Cost: one pass over the data.
    """

    def __init__(
        self,
        dims: Dims,
        axis: int = -1,
        sampling: float = 1.0,
        kind: str = "centered",
        edge: bool = False,
        *,
        dtype: Any = None,
    ) -> None:
        shape = as_dims(dims, "dims", "SecondDerivative")
        a = as_axis(axis, len(shape), "SecondDerivative")
        super().__init__(shape, [(a, _second(shape[a], sampling, kind, edge, "SecondDerivative"))], False, dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """All kinds, both axes, with and without edges."""
        yield cls(6)
        yield cls((5, 4), axis=0, sampling=0.5, kind="forward")
        yield cls((3, 6), kind="backward")
        yield cls((5, 6), axis=0, edge=True)


class Laplacian(_Stencils):
    """y = sum_k w_k d^2 x / d k^2, a weighted sum of second derivatives.

    Args:
        dims: input shape, two axes or more (one if `axes` names one).
        axes: the axes that are differentiated.
        weights: one weight an axis.
        sampling: distance between samples, one value or one an axis.
        edge, kind: as in `SecondDerivative`.
        dtype: what `.dtype` reports.

    Raises: ArgumentError. Cost: one pass an axis.
    """

    def __init__(
        self,
        dims: Dims,
        axes: Sequence[int] | int = (-2, -1),
        weights: Sequence[float] | float = 1.0,
        sampling: Sequence[float] | float = 1.0,
        edge: bool = False,
        kind: str = "centered",
        *,
        dtype: Any = None,
    ) -> None:
        shape = as_dims(dims, "dims", "Laplacian")
        which = as_axes(axes, len(shape), "Laplacian")
        w = per_axis(weights, len(which), "Laplacian", "weights")
        h = per_axis(sampling, len(which), "Laplacian", "sampling")
        terms = [
            (a, _second(shape[a], ha, kind, edge, "Laplacian").scaled(float(wa)))
            for a, wa, ha in zip(which, w, h, strict=True)
            if wa != 0
        ]
        if not terms:
            raise ArgumentError(f"Laplacian: weights must not all be zero; got {weights!r}; use Zero(dims) for that")
        super().__init__(shape, terms, False, dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Two and three axes, weights, sampling, kinds."""
        yield cls((5, 6))
        yield cls((4, 5, 3), axes=(0, 2), weights=(1.0, -2.0), sampling=(0.5, 2.0), edge=True)
        yield cls((5, 4), kind="forward")


class Gradient(_Stencils):
    """y[k] = d x / d k, the first derivatives along all axes, stacked along a new first axis.

    Args:
        dims: input shape; the output has shape (len(dims), *dims).
        sampling: distance between samples, one value or one an axis.
        edge, kind: as in `FirstDerivative`.
        dtype: what `.dtype` reports.

    Raises: ArgumentError. Cost: one pass an axis.
    """

    def __init__(
        self,
        dims: Dims,
        sampling: Sequence[float] | float = 1.0,
        edge: bool = False,
        kind: str = "centered",
        *,
        dtype: Any = None,
    ) -> None:
        shape = as_dims(dims, "dims", "Gradient")
        h = per_axis(sampling, len(shape), "Gradient", "sampling")
        terms = [(k - len(shape), _first(shape[k], h[k], kind, edge, 3, "Gradient")) for k in range(len(shape))]
        super().__init__(shape, terms, True, dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """One to three axes, kinds, sampling."""
        yield cls(5)
        yield cls((4, 5), kind="forward")
        yield cls((3, 4, 3), sampling=(1.0, 0.5, 2.0), edge=True)


class CausalIntegration(LinearOperator):
    """y[i] = h sum_{j <= i} x[j] along one axis.

    Args:
        dims: input shape.
        axis: the axis that is integrated.
        sampling: distance h between samples [unit of the axis].
        kind: "full" (the sum above), "half" (the last sample counts half) or "trapezoidal" (also the first counts half,
            except in y[0] = h x[0] / 2).
        removefirst: leave out y[0].
        dtype: what `.dtype` reports.

    Raises: ArgumentError. Cost: a cumulative sum; the adjoint sums from the other end.
    """

    def __init__(
        self,
        dims: Dims,
        axis: int = -1,
        sampling: float = 1.0,
        kind: str = "full",
        removefirst: bool = False,
        *,
        dtype: Any = None,
    ) -> None:
        shape = as_dims(dims, "dims", "CausalIntegration")
        self_axis = as_axis(axis, len(shape), "CausalIntegration")
        if kind not in ("full", "half", "trapezoidal"):
            raise ArgumentError(f"CausalIntegration: kind must be full, half or trapezoidal; got {kind!r}")
        out = list(shape)
        if removefirst:
            if shape[self_axis] < 2:
                raise ArgumentError("CausalIntegration: removefirst needs at least 2 samples along the axis; got 1")
            out[self_axis] -= 1
        super().__init__(shape, out, dtype=dtype)
        self.axis, self.kind, self.removefirst = self_axis, kind, removefirst
        self.sampling = _positive(sampling, "CausalIntegration")

    def _forward(self, x: Tensor) -> Tensor:
        y = torch.cumsum(x, self.axis)
        if self.kind != "full":
            y.sub_(x, alpha=0.5)
        if self.kind == "trapezoidal":
            n = x.shape[self.axis]
            y.narrow(self.axis, 1, n - 1).sub_(x.narrow(self.axis, 0, 1), alpha=0.5)
        y.mul_(self.sampling)
        return y.narrow(self.axis, 1, y.shape[self.axis] - 1).contiguous() if self.removefirst else y

    def _adjoint(self, y: Tensor) -> Tensor:
        if self.removefirst:
            first = torch.zeros_like(y.narrow(self.axis, 0, 1))
            y = torch.cat((first, y), self.axis)
        x = torch.cumsum(y.flip(self.axis), self.axis).flip(self.axis)
        if self.kind == "trapezoidal":
            n = y.shape[self.axis]
            rest = y.narrow(self.axis, 1, n - 1).sum(self.axis, keepdim=True)
            x.narrow(self.axis, 0, 1).sub_(rest, alpha=0.5)
        if self.kind != "full":
            x.sub_(y, alpha=0.5)
        return x.mul_(self.sampling)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """All kinds, both axes, with and without the first sample."""
        yield cls(5)
        yield cls((4, 3), axis=0, kind="half", sampling=0.5)
        yield cls((3, 5), kind="trapezoidal", removefirst=True)
        yield cls(4, kind="trapezoidal")
