"""Indicators of sets: zero inside, infinite outside. Their prox is the projection, whatever the step; the value allows
rounding on the boundary. Here: boxes, and sets given by linear equations and inequalities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError, DtypeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims
from pullback.functionals.arithmetic import (
    indicator,
    inner,
    is_live,
    member,
    norm,
    point_like,
    real_like,
    slack,
    squares,
    total,
)
from pullback.functionals.functional import Functional, Step
from pullback.functionals.linear import as_data, conjugate_gradients, pull
from pullback.functionals.quadratic import require_operator


class Indicator(Functional):
    """f(x) = 0 if x lies in a set, else inf; prox: the projection on the set, whatever the step."""

    def _project(self, x: Tensor, n: int) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no projection; please report")

    def _inside(self, x: Tensor, n: int) -> Tensor:
        """Whether each member lies in the set."""
        raise AssertionError(f"{type(self).__name__} does not know its members; please report")

    def _support(self, x: Tensor, n: int) -> Tensor:
        """Sup over the set of Re<x, v>, for each member."""
        return super()._conjugate_value(x, n)

    def _value(self, x: Tensor, n: int) -> Tensor:
        return indicator(self._inside(x, n), x)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self._project(x, n)

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        return self._support(x, n)

    def _scale(self, factor: float | Tensor) -> Functional:
        return self if not isinstance(factor, Tensor) and factor > 0 else super()._scale(factor)


class Box(Indicator):
    """f(x) = 0 if lower <= x_i <= upper for all i, else inf; prox: clamp(x, lower, upper), whatever the step.

    Args:
        lower, upper: for real x: numbers, tensors that broadcast against x, or None; they may require grad.
        dims: shape of one member of the batch; see `Functional`.

    Raises: ArgumentError if a number `lower` exceeds a number `upper` (tensors are not verified).
    """

    elementwise = True
    is_box = True

    def __init__(self, lower: Any = None, upper: Any = None, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and not lower <= upper:
            raise ArgumentError(f"Box: lower must not exceed upper; got lower={lower}, upper={upper}")
        self.lower: Any = _bound(lower, "lower")
        self.upper: Any = _bound(upper, "upper")
        self.homogeneous = all(b is None or (not isinstance(b, Tensor) and b == 0) for b in (self.lower, self.upper))

    def _inside(self, x: Tensor, n: int) -> Tensor:
        require_real(x, "Box")
        inside = torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape)
        if self.lower is not None:
            inside = inside & (x >= real_like(self.lower, x))
        if self.upper is not None:
            inside = inside & (x <= real_like(self.upper, x))
        return inside.all(tuple(range(-n, 0))) if n else inside

    def _project(self, x: Tensor, n: int) -> Tensor:
        require_real(x, "Box")
        if self.lower is None and self.upper is None:
            return x.clone()
        lower, upper = real_like(self.lower, x), real_like(self.upper, x)
        if isinstance(lower, Tensor) != isinstance(upper, Tensor) and lower is not None and upper is not None:
            return x.clamp(min=lower).clamp(max=upper)  # torch takes two tensors or two numbers
        return x.clamp(lower, upper)

    def _support(self, x: Tensor, n: int) -> Tensor:
        require_real(x, "Box")
        lower, upper = real_like(self.lower, x), real_like(self.upper, x)
        above = 0 if upper is None else torch.where(x > 0, x, 0) * upper
        below = 0 if lower is None else torch.where(x < 0, x, 0) * lower
        free = ((x > 0) & (upper is None)) | ((x < 0) & (lower is None))
        return total((torch.zeros_like(x) + above + below).masked_fill(free, torch.inf), n)

    def _prox_over(self, x: Tensor, step: Step, n: int) -> Tensor:
        if x.is_complex() or is_live(x, self.lower, self.upper):
            return self._prox(x, step, n)
        for bound, clamp in ((self.lower, x.clamp_min_), (self.upper, x.clamp_max_)):
            if bound is not None:
                clamp(real_like(bound, x))
        return x

    def extra_repr(self) -> str:
        """The bounds."""
        show = lambda b: "tensor" if isinstance(b, Tensor) else b  # noqa: E731
        return f"{show(self.lower)}, {show(self.upper)}"


def _bound(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (int, float)):
        return value
    bound = interop.as_tensor(value, name, "Box")
    if bound.is_complex():
        raise DtypeError(f"Box: {name} must be real; got {bound.dtype}")
    return bound


def require_real(x: Tensor, owner: str) -> None:
    """Raise unless x is real."""
    if x.is_complex():
        raise DtypeError(
            f"{owner}: x must be real (complex numbers have no order); got {x.dtype}; use x.real and x.imag"
        )


class _Plane(Indicator):
    """A set {x : Re<a, x> in an interval}; the projection moves along a."""

    def __init__(self, normal: Any, offset: Any = 0.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        name = type(self).__name__
        self.normal = interop.as_tensor(normal, "normal", name)
        if not bool(self.normal.detach().abs().sum() > 0):
            raise ArgumentError(f"{name}: normal must not be zero")
        self.offset: Any = _real_number(offset, name)

    def _distance(self, x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, |a|^2, and Re<a, x> - offset with n axes of size 1."""
        a = point_like(self.normal, x).expand(*(x.shape[x.ndim - n :] if n else ()))
        over = inner(a, x, n).reshape(x.shape[: x.ndim - n] + (1,) * n) - real_like(self.offset, x)
        return a, total(squares(a), n), over

    def _signed(self, over: Tensor) -> Tensor:
        """How far to move."""
        raise AssertionError(f"{type(self).__name__} is no set; please report")

    def _project(self, x: Tensor, n: int) -> Tensor:
        a, size, over = self._distance(x, n)
        return x - a * (self._signed(over) / size)

    def _inside(self, x: Tensor, n: int) -> Tensor:
        _, size, over = self._distance(x, n)
        far = self._signed(over).abs() > slack(x) * (size.sqrt() * norm(x, n) + abs(real_like(self.offset, x)))
        return ~member(far, n)

    def _support(self, x: Tensor, n: int) -> Tensor:
        # finite on the ray (or line) of a only: x = t a gives t offset
        a, size, _ = self._distance(x, n)
        t = inner(a, x, n) / size
        off = norm(x - a * t.reshape(x.shape[: x.ndim - n] + (1,) * n), n) > slack(x) * norm(x, n)
        return (t * real_like(self.offset, x)).masked_fill(member(off, n), torch.inf)


class Hyperplane(_Plane):
    """f(x) = 0 if Re<a, x> = offset, else inf; prox: x - a (Re<a, x> - offset) / |a|^2.

    Args:
        normal: a, not zero, a tensor that broadcasts against a member. It may require grad, as may offset.
        offset: a real number.
        dims: shape of one member of the batch; see `Functional`.
    """

    def _signed(self, over: Tensor) -> Tensor:
        return over


class HalfSpace(_Plane):
    """f(x) = 0 if Re<a, x> <= offset, else inf; prox: x - a (Re<a, x> - offset)_+ / |a|^2.

    Args:
        normal: a, not zero, a tensor that broadcasts against a member. It may require grad, as may offset.
        offset: a real number.
        dims: shape of one member of the batch; see `Functional`.
    """

    def _signed(self, over: Tensor) -> Tensor:
        return over.clamp(min=0)

    def _support(self, x: Tensor, n: int) -> Tensor:
        a, _, _ = self._distance(x, n)
        return super()._support(x, n).masked_fill(inner(a, x, n) < 0, torch.inf)


class AffineSet(Indicator):
    """f(x) = 0 if K x = b, else inf; prox: x - K^H (K K^H)^-1 (K x - b).

    Args:
        op: K, a LinearOperator.
        b: a tensor that broadcasts against K x, in the range of K (not verified; otherwise the projection is on the
            nearest consistent system only approximately).
        maxiter, rtol: of the conjugate gradients on K K^H, unless K K^H is known to be a multiple of I.

    The value counts |K x - b| <= sqrt(eps) (|b| + |K x|) as inside. First and second derivatives are
    exact to rtol.
    """

    def __init__(self, op: LinearOperator, b: Any, *, maxiter: int = 200, rtol: float = 1e-8) -> None:
        require_operator(op, "AffineSet")
        super().__init__(op.dims)
        self.op, self.maxiter, self.rtol = op, maxiter, rtol
        self.b = as_data(b, op, "AffineSet")

    def _rest(self, x: Tensor) -> Tensor:
        y = self.op._run(x)
        return y - point_like(self.b, y)

    def _project(self, x: Tensor, n: int) -> Tensor:
        rest = self._rest(x)
        op = self.op
        c = op._coisometry()
        if c and rest.is_complex() == x.is_complex():
            return x - op._run(rest, True) / c
        w = conjugate_gradients(lambda v: op._run(pull(op, v, x)), rest, len(op.dimsd), self.maxiter, self.rtol)
        return x - pull(op, w, x)

    def _inside(self, x: Tensor, n: int) -> Tensor:
        m = len(self.op.dimsd)
        y = self.op._run(x)
        b = point_like(self.b, y).expand_as(y)
        far = norm(y - b, m) > torch.finfo(x.dtype).eps ** 0.5 * (norm(b, m) + norm(y, m))
        return ~member(far, m)

    def extra_repr(self) -> str:
        """The operator."""
        return type(self.op).__name__


def _real_number(value: Any, owner: str) -> Any:
    if isinstance(value, (int, float)):
        return float(value)
    t = interop.as_tensor(value, "offset", owner)
    if t.is_complex() or t.ndim:
        raise ArgumentError(f"{owner}: offset must be one real number; got {t.dtype} of shape {tuple(t.shape)}")
    return t
