"""Norms: L1, L2, L21 and the largest magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError
from pullback.core.shapes import Dims, as_axis
from pullback.functionals.arithmetic import indicator, is_live, norm, real_like, root, slack, squares, total
from pullback.functionals.functional import Functional, Step
from pullback.functionals.projections import onto_l1_ball

_CHUNK = 4096


class Norm(Functional):
    """f(c x) = |c| f(x). Then f^* is the indicator of the ball of the dual norm, and both proxes project on it."""

    homogeneous = True

    def _project(self, x: Tensor, radius: Step, n: int) -> Tensor:
        """The point nearest to x in the ball {u : sup_{f(v) <= 1} Re<u, v> <= radius}."""
        raise AssertionError(f"{type(self).__name__} has no projection; please report")

    def _in_ball(self, x: Tensor, radius: Step, n: int) -> Tensor:
        """Whether each member lies in that ball."""
        raise AssertionError(f"{type(self).__name__} has no dual norm; please report")

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        return indicator(self._in_ball(x, scale * (1 + slack(x)), n), x)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        u = self._project(x, step, n)
        return torch.sub(x, u, out=None if is_live(x, u) else u)

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        return self._project(x, scale, n)


class L1(Norm):
    """f(x) = sum_i w_i |x_i|; prox: x_i (1 - step w_i / |x_i|)_+ (soft threshold of the magnitude, also for complex x).

    Args:
        dims: shape of one member of the batch; see `Functional`.
        weight: w >= 0 (not verified), a number or a tensor that broadcasts against x; it may require grad.

    Cost: one pass over x for the prox.
    """

    elementwise = True

    def __init__(self, dims: Dims | None = None, *, weight: Any = None) -> None:
        super().__init__(dims)
        self.weight: Any = real(weight, "weight", "L1")

    def _w(self, x: Tensor) -> Any:
        return 1.0 if self.weight is None else real_like(self.weight, x)

    def _value(self, x: Tensor, n: int) -> Tensor:
        if self.weight is None and not x.is_complex() and not is_live(x):
            return _sum_of_magnitudes(x, n)
        magnitude = x.abs()
        return total(magnitude if self.weight is None else magnitude * self._w(x), n)

    def _project(self, x: Tensor, radius: Step, n: int) -> Tensor:
        radius = radius * self._w(x)
        if x.is_complex():
            return x * shrink_factor(x.abs(), radius)
        return x.clamp(-radius, radius)  # type: ignore[arg-type]

    def _in_ball(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return _all(x.abs() <= radius * self._w(x), n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        threshold = step * self._w(x)
        if isinstance(threshold, float) and not x.is_complex():
            return torch.nn.functional.softshrink(x, threshold)
        return super()._prox(x, step, n)

    def _prox_over(self, x: Tensor, step: Step, n: int) -> Tensor:
        threshold = step * self._w(x)
        if isinstance(threshold, float) and not x.is_complex() and not is_live(x):
            return torch.ops.aten.softshrink.out(x, threshold, out=x)
        return self._prox(x, step, n)


class L2(Norm):
    """f(x) = |x|_2, not squared; prox: x (1 - step / |x|)_+.

    Args:
        dims: shape of one member of the batch; see `Functional`.
    """

    radial = True

    def _value(self, x: Tensor, n: int) -> Tensor:
        return norm(x, n).reshape(x.shape[: x.ndim - n])

    def _project(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return x * shrink_factor(norm(x, n), radius)

    def _in_ball(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return _all(norm(x, n) <= radius, n)


class Linf(Norm):
    """f(x) = max_i |x_i|; prox: x minus its projection on the L1 ball of radius step, which clips the magnitudes.

    Args:
        dims: shape of one member of the batch; see `Functional`.

    Cost of a prox: a sort of the magnitudes.
    """

    def _value(self, x: Tensor, n: int) -> Tensor:
        return x.abs().amax(tuple(range(-n, 0))) if n else x.abs()

    def _project(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return onto_l1_ball(x, radius, n)

    def _in_ball(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return _all(total(x.abs(), n).reshape(x.shape[: x.ndim - n] + (1,) * n) <= radius, n)


class L21(Norm):
    """f(x) = sum_i |x_i|_2, where x_i are the vectors along one axis; prox: x_i (1 - step / |x_i|)_+.

    Args:
        dims: shape of one member of the batch; see `Functional`.
        axis: the axis of a member along which the vectors lie; without dims it must be negative.

    With `pb.Gradient` (components on the first axis) this is the isotropic total variation, and `L1() + L21()` is the
    penalty of sparse groups.
    """

    radial = True

    def __init__(self, dims: Dims | None = None, *, axis: int = 0) -> None:
        super().__init__(dims)
        if self.dims is not None:
            axis = as_axis(axis, len(self.dims), "L21")
        self.axis = axis

    def _at(self, n: int) -> int:
        return as_axis(self.axis, n, "L21")

    def _value(self, x: Tensor, n: int) -> Tensor:
        return total(_magnitude(x, self._at(n)), n)

    def _project(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return x * shrink_factor(_magnitude(x, self._at(n)), radius)

    def _in_ball(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return _all(_magnitude(x, self._at(n)) <= radius, n)


def real(value: Any, name: str, owner: str) -> Any:
    """None, a float, or a real tensor."""
    if value is None or isinstance(value, (int, float)):
        return None if value is None else float(value)
    t = interop.as_tensor(value, name, owner)
    if t.is_complex():
        raise ArgumentError(f"{owner}: {name} must be real; got {t.dtype}; use {name}.real")
    return t


def shrink_factor(norm: Tensor, radius: Step) -> Tensor:
    """min(1, radius / norm), also where norm or radius is zero; differentiable wherever norm != radius."""
    tiny = torch.finfo(norm.dtype).tiny
    if isinstance(radius, Tensor):
        return radius / torch.maximum(norm, radius.clamp(min=tiny))
    fresh = norm.clamp(min=max(radius, tiny))
    return torch.div(radius, fresh, out=None) if is_live(fresh) else fresh.reciprocal_().mul_(radius)


def _magnitude(x: Tensor, axis: int) -> Tensor:
    """|x|_2 along one axis, which is kept."""
    if is_live(x) or x.shape[axis] > 16:
        return root(squares(x).sum(axis, keepdim=True))
    # Slice after slice: torch reduces slowly over a short outer axis (77 ms, this 0.5 ms, for 2 x 1024 x 1024).
    parts = torch.view_as_real(x.resolve_conj()).unbind(-1) if x.is_complex() else (x,)
    slices = [s for p in parts for s in p.split(1, axis)]
    sums = slices[0] * slices[0]
    for s in slices[1:]:
        sums.addcmul_(s, s)
    return sums.sqrt_()


def _all(flags: Tensor, n: int) -> Tensor:
    """Whether all hold, over the last n axes."""
    return flags.all(tuple(range(-n, 0))) if n else flags


def _sum_of_magnitudes(x: Tensor, n: int) -> Tensor:
    """Sum |x_i| over the last n axes of real x, without derivative and without memory for |x|.

    In chunks, as float32 sums of 1e7 elements in one go lose digits.
    """
    v = x.detach().flatten(x.ndim - n) if n else x.detach().unsqueeze(-1)
    whole = v.shape[-1] // _CHUNK * _CHUNK
    if v.shape[-1] <= 2 * _CHUNK:
        return torch.linalg.vector_norm(v, 1, dim=-1)
    value = torch.linalg.vector_norm(v[..., :whole].unflatten(-1, (-1, _CHUNK)), 1, dim=-1).sum(-1)
    return value + torch.linalg.vector_norm(v[..., whole:], 1, dim=-1)
