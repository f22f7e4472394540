"""Indicators of balls of norms, of the simplex, and of few non-zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.shapes import Dims, as_axis
from pullback.functionals.arithmetic import indicator, member, norm, real_like, slack, total
from pullback.functionals.constraints import Indicator, require_real
from pullback.functionals.norms import real, shrink_factor
from pullback.functionals.projections import onto_l1_ball, threshold


class _Ball(Indicator):
    """{x : |x| <= radius}; a tensor radius has one value and may require grad."""

    def __init__(self, radius: Any = 1.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.radius: Any = radius_of(radius, type(self).__name__)

    def _norm(self, x: Tensor, n: int) -> Tensor:
        """The norm that bounds the ball, of each member."""
        raise AssertionError(f"{type(self).__name__} has no norm; please report")

    def _dual_norm(self, x: Tensor, n: int) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no dual norm; please report")

    def _inside(self, x: Tensor, n: int) -> Tensor:
        return self._norm(x, n) <= real_like(self.radius, x) * (1 + slack(x))

    def _support(self, x: Tensor, n: int) -> Tensor:
        return real_like(self.radius, x) * self._dual_norm(x, n)

    def extra_repr(self) -> str:
        """The radius."""
        return "tensor" if isinstance(self.radius, Tensor) else format(self.radius, "g")


class L1Ball(_Ball):
    """f(x) = 0 if sum_i |x_i| <= radius, else inf; prox: x_i (1 - theta / |x_i|)_+ with the theta that meets the bound.

    Args:
        radius: > 0, a number or a tensor with one value, which may require grad.
        dims: shape of one member of the batch; see `Functional`.

    Cost of a prox: a sort of the magnitudes. Source: Held, Wolfe & Crowder 1974, doi 10.1007/BF01580223.
    """

    def _project(self, x: Tensor, n: int) -> Tensor:
        return onto_l1_ball(x, real_like(self.radius, x), n)

    def _norm(self, x: Tensor, n: int) -> Tensor:
        return total(x.abs(), n)

    def _dual_norm(self, x: Tensor, n: int) -> Tensor:
        return _largest(x.abs(), n)


class L2Ball(_Ball):
    """f(x) = 0 if |x|_2 <= radius, else inf; prox: x min(1, radius / |x|_2). `.translate(c)` moves the centre.

    Args:
        radius: > 0, a number or a tensor with one value, which may require grad.
        dims: shape of one member of the batch; see `Functional`.
    """

    def _project(self, x: Tensor, n: int) -> Tensor:
        return x * shrink_factor(norm(x, n), real_like(self.radius, x))

    def _norm(self, x: Tensor, n: int) -> Tensor:
        return member(norm(x, n), n)

    def _dual_norm(self, x: Tensor, n: int) -> Tensor:
        return member(norm(x, n), n)


class LinfBall(_Ball):
    """f(x) = 0 if |x_i| <= radius for all i, else inf; prox: x_i min(1, radius / |x_i|), also for complex x.

    Args:
        radius: > 0, a number or a tensor with one value, which may require grad.
        dims: shape of one member of the batch; see `Functional`.
    """

    elementwise = True

    def _project(self, x: Tensor, n: int) -> Tensor:
        return x * shrink_factor(x.abs(), real_like(self.radius, x))

    def _norm(self, x: Tensor, n: int) -> Tensor:
        return _largest(x.abs(), n)

    def _dual_norm(self, x: Tensor, n: int) -> Tensor:
        return total(x.abs(), n)


class Simplex(Indicator):
    """f(x) = 0 if x_i >= 0 and sum_i x_i = radius, else inf; prox: (x_i - theta)_+ with the theta that gives the sum.

    Args:
        radius: > 0, a number or a tensor with one value, which may require grad.
        axis: the axis of a member along which each sum is radius; None for one sum over the whole member. Without dims
            it must be negative.
        dims: shape of one member of the batch; see `Functional`.

    Real x only. Cost of a prox: a sort. Source: Held, Wolfe & Crowder 1974, doi 10.1007/BF01580223.
    """

    def __init__(self, radius: Any = 1.0, axis: int | None = None, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.radius: Any = radius_of(radius, "Simplex")
        self.axis = axis if axis is None or self.dims is None else as_axis(axis, len(self.dims), "Simplex")

    def _vectors(self, x: Tensor, n: int) -> tuple[Tensor, int]:
        """X with the vectors on its last axes, and how many these are."""
        require_real(x, "Simplex")
        return (x, n) if self.axis is None else (x.movedim(as_axis(self.axis, n, "Simplex"), -1), 1)

    def _project(self, x: Tensor, n: int) -> Tensor:
        v, m = self._vectors(x, n)
        u = (v - threshold(v, real_like(self.radius, x), m)).clamp(min=0)
        return u if self.axis is None else u.movedim(-1, self.axis)

    def _inside(self, x: Tensor, n: int) -> Tensor:
        v, m = self._vectors(x, n)
        radius = real_like(self.radius, x)
        close = (total(v, m) - radius).abs() <= slack(x) * radius
        rest = n - m
        good = close.all(tuple(range(-rest, 0))) if rest else close
        return good & (_largest(-x, n) <= slack(x) * radius)

    def _support(self, x: Tensor, n: int) -> Tensor:
        v, m = self._vectors(x, n)
        return real_like(self.radius, x) * total(_largest(v, m), n - m)

    def extra_repr(self) -> str:
        """Radius and axis."""
        radius = "tensor" if isinstance(self.radius, Tensor) else format(self.radius, "g")
        return radius if self.axis is None else f"{radius}, axis={self.axis}"


class L0Ball(Indicator):
    """f(x) = 0 if at most k elements are not zero, else inf; prox: the k elements of largest magnitude, 0 elsewhere.

    Args:
        k: number of non-zeros, >= 1.
        dims: shape of one member of the batch; see `Functional`.

    Not convex: where magnitudes tie, the prox keeps the ones that torch.topk names.
    """

    convex = False

    def __init__(self, k: int, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ArgumentError(f"L0Ball: k must be an int >= 1; got {k!r}")
        self.k = k

    def _project(self, x: Tensor, n: int) -> Tensor:
        flat = x.reshape(*x.shape[: x.ndim - n], -1)
        kept = flat.abs().topk(min(self.k, flat.shape[-1]), -1).indices
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, kept, torch.ones_like(kept, dtype=torch.bool))
        return torch.where(mask, flat, 0).reshape(x.shape)

    def _inside(self, x: Tensor, n: int) -> Tensor:
        return total((x != 0).double(), n) <= self.k

    def _support(self, x: Tensor, n: int) -> Tensor:
        return indicator(total((x != 0).double(), n) == 0, x)

    def extra_repr(self) -> str:
        """K."""
        return str(self.k)


def radius_of(value: Any, owner: str) -> Any:
    """A number > 0, or a real tensor with one value (not verified to be > 0)."""
    radius = real(value, "radius", owner)
    if radius is None or (not isinstance(radius, Tensor) and not radius > 0):
        raise ArgumentError(f"{owner}: radius must be a number > 0; got {value!r}")
    if isinstance(radius, Tensor) and radius.numel() != 1:
        raise ArgumentError(f"{owner}: radius must be one number; got a tensor of shape {tuple(radius.shape)}")
    return radius.reshape(()) if isinstance(radius, Tensor) else radius


def _largest(x: Tensor, n: int) -> Tensor:
    return x.amax(tuple(range(-n, 0))) if n else x
