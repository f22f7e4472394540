"""Separable penalties of magnitudes that are not convex: L0, Lp, Log, Geman, ETP, SCAD, MCP.

f(x) = sum_i phi(|x_i|). A penalty is phi and the places where the minimum of phi(u) + (u - t)^2 / (2 step) may lie; the
prox compares the objective there and at zero, and so finds the global minimum for every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.shapes import Dims
from pullback.functionals.arithmetic import real_like, root, total
from pullback.functionals.functional import Functional, Step
from pullback.functionals.norms import real

_NEWTON = 12  # steps without derivatives; each of the _LAST makes one more order of derivatives exact
_LAST = 3


class _Penalty(Functional):
    """f(x) = sum_i phi(|x_i|)."""

    convex = False

    def _phi(self, u: Tensor) -> Tensor:
        """The penalty of magnitudes."""
        raise AssertionError(f"{type(self).__name__} has no value; please report")

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        """Magnitudes >= 0, one of which (or zero) minimises phi(u) + (u - t)^2 / (2 step) for step > 0."""
        raise AssertionError(f"{type(self).__name__} has no prox; please report")

    def _p(self, name: str, x: Tensor) -> Any:
        """A parameter in the precision of x."""
        return real_like(getattr(self, name), x)

    def _value(self, x: Tensor, n: int) -> Tensor:
        return total(self._phi(x.abs()), n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        t = x.abs()
        best = torch.zeros_like(t)
        least = t * t / 2 + step * self._phi(best)
        for u in self._candidates(t, step):
            value = (u - t) ** 2 / 2 + step * self._phi(u)
            better = value < least
            best, least = torch.where(better, u, best), torch.where(better, value, least)
        # With step = 0 (or an underflow in a candidate) the prox is x.
        best = torch.where(torch.as_tensor(step == 0, device=x.device), t, best)
        return x.sgn() * best if not x.is_complex() else x * (best / torch.where(t > 0, t, 1))

    def extra_repr(self) -> str:
        """The parameters."""
        return ", ".join("tensor" if isinstance(v, Tensor) else f"{v:g}" for v in self._shown())

    def _shown(self) -> Sequence[Any]:
        return ()


class L0(_Penalty):
    """f(x) = number of x_i that are not zero; prox: x_i where |x_i| > sqrt(2 step), else 0 (hard threshold).

    Args:
        dims: shape of one member of the batch; see `Functional`.
    """

    def _phi(self, u: Tensor) -> Tensor:
        return (u > 0).to(u.dtype)

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        return (t,)


class Lp(_Penalty):
    """f(x) = sum_i |x_i|^p, 0 < p < 1; prox: the largest root u of u + step p u^(p-1) = |x_i|, or 0.

    Args:
        p: the exponent, a number in (0, 1).
        dims: shape of one member of the batch; see `Functional`.

    `Lhalf()` is `Lp(0.5)`. Cost of a prox: about 15 Newton steps.
    """

    def __init__(self, p: float = 0.5, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        if not 0 < p < 1:
            raise ArgumentError(f"{type(self).__name__}: p must lie in (0, 1); got {p!r}; use L1 for 1, L0 for 0")
        self.p = float(p)

    def _phi(self, u: Tensor) -> Tensor:
        return torch.where(u > 0, torch.where(u > 0, u, 1) ** self.p, 0)

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        p = self.p
        return (_largest_root(t, step, lambda u: p * u ** (p - 1), lambda u: p * (p - 1) * u ** (p - 2)),)

    def _shown(self) -> Sequence[Any]:
        return (self.p,)


class Lhalf(Lp):
    """f(x) = sum_i |x_i|^(1/2), which is `Lp(0.5)`.

    Args:
        dims: shape of one member of the batch; see `Functional`.

    Source of the threshold: Xu et al. 2012, doi 10.1109/TNNLS.2012.2197412.
    """

    def __init__(self, dims: Dims | None = None) -> None:
        super().__init__(0.5, dims=dims)

    def _shown(self) -> Sequence[Any]:
        return ()


class Log(_Penalty):
    """f(x) = sum_i log(1 + |x_i| / scale); prox: the larger root of (u - t) (u + scale) + step = 0, or 0.

    Args:
        scale: > 0, a number or a tensor that broadcasts against x, which may require grad; smaller is nearer to L0.
        dims: shape of one member of the batch; see `Functional`.

    Source: Candes, Wakin & Boyd 2008, doi 10.1007/s00041-008-9045-x.
    """

    def __init__(self, scale: Any = 1.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.scale: Any = _positive(scale, "scale", "Log")

    def _phi(self, u: Tensor) -> Tensor:
        return torch.log1p(u / self._p("scale", u))

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        e = self._p("scale", t)
        return (((t - e + root((t + e) ** 2 - 4 * step)) / 2).clamp(min=0),)

    def _shown(self) -> Sequence[Any]:
        return (self.scale,)


class Geman(_Penalty):
    """f(x) = sum_i |x_i| / (|x_i| + scale); prox: the largest root of (u - t) (u + scale)^2 + step scale = 0, or 0.

    Args:
        scale: > 0, a number or a tensor that broadcasts against x, which may require grad; smaller is nearer to L0.
        dims: shape of one member of the batch; see `Functional`.

    Source: Geman & Yang 1995, doi 10.1109/83.392335.
    """

    def __init__(self, scale: Any = 1.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.scale: Any = _positive(scale, "scale", "Geman")

    def _phi(self, u: Tensor) -> Tensor:
        return u / (u + self._p("scale", u))

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        # w = u + scale solves w^3 - a w^2 + step scale = 0; its largest root by Viete.
        e = self._p("scale", t)
        a = t + e
        cosine = 1 - 13.5 * step * e / a**3
        real_roots = cosine.abs() < 1
        angle = torch.where(real_roots, cosine, 0).arccos() / 3
        return (torch.where(real_roots, a / 3 * (1 + 2 * angle.cos()) - e, 0).clamp(min=0),)

    def _shown(self) -> Sequence[Any]:
        return (self.scale,)


class ETP(_Penalty):
    """f(x) = sum_i (1 - exp(-rate |x_i|)) / (1 - exp(-rate)); prox: the largest root of u + step phi'(u) = |x_i|, or 0.

    Args:
        rate: > 0, a number or a tensor that broadcasts against x, which may require grad; larger is nearer to L0.
        dims: shape of one member of the batch; see `Functional`.

    Source: Gao et al. 2011, "A feasible nonconvex relaxation approach to feature selection" (AAAI).
    """

    def __init__(self, rate: Any = 1.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.rate: Any = _positive(rate, "rate", "ETP")

    def _top(self, x: Tensor) -> tuple[Any, Any]:
        rate = self._p("rate", x)
        return rate, -torch.expm1(-rate) if isinstance(rate, Tensor) else -math.expm1(-rate)

    def _phi(self, u: Tensor) -> Tensor:
        rate, top = self._top(u)
        return -torch.expm1(-rate * u) / top

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        rate, top = self._top(t)
        slope = lambda u: rate / top * torch.exp(-rate * u)  # noqa: E731
        return (_largest_root(t, step, slope, lambda u: -rate * slope(u)),)

    def _shown(self) -> Sequence[Any]:
        return (self.rate,)


class SCAD(_Penalty):
    """f(x) = sum_i phi(|x_i|), phi' = 1 up to the knee, then falling to 0 at a * knee, all times knee.

    phi(u) = k u for u <= k; (2 a k u - u^2 - k^2) / (2 (a - 1)) for k < u <= a k; k^2 (a + 1) / 2 beyond.

    Args:
        knee: k > 0, a number or a tensor that broadcasts against x; it may require grad, as may a.
        a: > 1.
        dims: shape of one member of the batch; see `Functional`.

    Source: Fan & Li 2001, doi 10.1198/016214501753382273.
    """

    def __init__(self, knee: Any = 1.0, a: Any = 3.7, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.knee: Any = _positive(knee, "knee", "SCAD")
        self.a: Any = _positive(a, "a", "SCAD", 1.0)

    def _phi(self, u: Tensor) -> Tensor:
        k, a = self._p("knee", u), self._p("a", u)
        middle = (2 * a * k * u - u * u - k * k) / (2 * (a - 1))
        return torch.where(u <= k, k * u, torch.where(u <= a * k, middle, k * k * (a + 1) / 2))

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        k, a = self._p("knee", t), self._p("a", t)
        bend = torch.as_tensor(a - 1 - step, dtype=t.dtype, device=t.device)  # > 0 where the middle piece is convex
        middle = ((a - 1) * t - step * a * k) / torch.where(bend > 0, bend, 1)
        middle = torch.where(bend > 0, torch.minimum(torch.maximum(middle, t * 0 + k), t * 0 + a * k), 0)
        return torch.minimum((t - step * k).clamp(min=0), t * 0 + k), middle, torch.maximum(t, t * 0 + a * k)

    def _shown(self) -> Sequence[Any]:
        return self.knee, self.a


class MCP(_Penalty):
    """f(x) = sum_i phi(|x_i|), phi(u) = k u - u^2 / (2 a) for u <= a k, and a k^2 / 2 beyond.

    Args:
        knee: k > 0, a number or a tensor that broadcasts against x; it may require grad, as may a.
        a: > 0.
        dims: shape of one member of the batch; see `Functional`.

    Source: Zhang 2010, doi 10.1214/09-AOS729.
    """

    def __init__(self, knee: Any = 1.0, a: Any = 3.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.knee: Any = _positive(knee, "knee", "MCP")
        self.a: Any = _positive(a, "a", "MCP")

    def _phi(self, u: Tensor) -> Tensor:
        k, a = self._p("knee", u), self._p("a", u)
        return torch.where(u <= a * k, k * u - u * u / (2 * a), a * k * k / 2)

    def _candidates(self, t: Tensor, step: Any) -> Sequence[Tensor]:
        k, a = self._p("knee", t), self._p("a", t)
        bend = torch.as_tensor(1 - step / a, dtype=t.dtype, device=t.device)  # > 0 where the first piece is convex
        first = (t - step * k).clamp(min=0) / torch.where(bend > 0, bend, 1)
        first = torch.where(bend > 0, torch.minimum(first, t * 0 + a * k), 0)
        return first, torch.maximum(t, t * 0 + a * k)

    def _shown(self) -> Sequence[Any]:
        return self.knee, self.a


def _largest_root(
    t: Tensor, step: Any, slope: Callable[[Tensor], Tensor], curvature: Callable[[Tensor], Tensor]
) -> Tensor:
    """The largest root of h(u) = u - t + step slope(u) on u > 0, or 0 where Newton finds none.

    h is convex and >= 0 at u = t, so that Newton's steps from there fall monotonically on the largest root, and out of
    the region h' > 0 if there is none. The last steps are taken with derivatives.
    """

    def advance(u: Tensor) -> Tensor:
        rate = 1 + step * curvature(u)
        good = (rate > 0) & (u > 0)
        moved = u - (u - t + step * slope(u)) / torch.where(good, rate, 1)
        return torch.where(good & (moved > 0), moved, 0)

    floor = torch.finfo(t.dtype).tiny ** 0.25
    with torch.no_grad():
        u = t.detach()
        for _ in range(_NEWTON):
            u = torch.where(u > floor, advance(u.clamp(min=floor)), 0)
    found = u > floor
    safe = torch.where(found, u, 1)
    for _ in range(_LAST):
        # where nothing was found, any point serves: its value and its derivative are dropped
        safe = torch.where(found, advance(safe), 1)
        found = found & (safe > floor)
        safe = torch.where(found, safe, 1)
    return torch.where(found, safe, 0)


def _positive(value: Any, name: str, owner: str, bound: float = 0.0) -> Any:
    """A number > bound, or a real tensor (not verified)."""
    number = real(value, name, owner)
    if number is None or (not isinstance(number, Tensor) and not number > bound):
        raise ArgumentError(f"{owner}: {name} must be a number > {bound:g}; got {value!r}")
    return number
