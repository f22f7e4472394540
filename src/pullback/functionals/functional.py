"""Functional: what a penalty or a constraint is, and how it is called. `base.py` says how functionals combine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_dims, size
from pullback.functionals.arithmetic import lift, real_like

Step = float | Tensor

# How functionals combine; `base.py` fills it. (The results are Functionals themselves, so they cannot live below.)
algebra: dict[str, Callable[..., Functional]] = {}


class Functional(torch.nn.Module):
    """f(x), a number for each member of a batch; with prox, conjugate prox and, where f is smooth, its gradient.

    Args:
        dims: shape of one member, without batch axes. With dims, x has shape (..., *dims) or (..., prod(dims)), leading
            axes are the batch, and f(x) has the shape of the batch. Without dims the whole of x is one member and f(x)
            is one number. Solvers know the dims from the operator, so `0.1 * pb.L1()` is enough there.

    Everything is plain torch: values and proxes are differentiable in x, in `step` and in the tensors that f holds.
    Complex x counts as a vector of twice as many real numbers; values, steps and weights are real.

    A subclass writes `_value(x, n)` and, as far as they exist, `_prox(x, step, n)`, `_conjugate_prox`,
    `_conjugate_value` and `_grad`. The last n axes of x are the member and `step` is a float or a tensor that
    broadcasts against x.
    """

    has_prox: bool = True  # False where the prox has neither a closed form nor a fast algorithm
    convex: bool = True
    elementwise: bool = False  # f(x) = sum_i f_i(x_i) with convex f_i
    homogeneous: bool = False  # f(c x) = c f(x) for c > 0, and f is convex
    radial: bool = False  # f is a sum of Euclidean norms of disjoint parts of x: its prox scales each part
    is_quadratic: bool = False  # `_quadratic` tells how
    is_box: bool = False  # f is zero where lower <= x <= upper and infinite elsewhere

    def __init__(self, dims: Dims | None = None) -> None:
        super().__init__()
        self.dims = None if dims is None else as_dims(dims, "dims", type(self).__name__)

    # What a subclass writes ----------------------------------------------------------------------------------------

    def _value(self, x: Tensor, n: int) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no value; please report")

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        raise ArgumentError(
            f"{self} has no prox in closed form; use pullback.pdhg or pullback.solve, which split sums and compositions"
        )

    def _prox_over(self, x: Tensor, step: Step, n: int) -> Tensor:
        """The prox where x may be overwritten, for solvers."""
        return self._prox(x, step, n)

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        """The prox of step (scale f)^*, by Moreau: x - step prox_{(scale / step) f}(x / step)."""
        return x - step * self._prox(x / step, scale / step, n)

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        """The prox u, what the next call may start from, and f(u) where it costs little; x may be overwritten.

        For solvers whose steps and points change little from one call to the next.
        """
        return self._prox_over(x, step, n), None, None

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        """(scale f)^*(x); `scale` broadcasts against x, as steps do."""
        raise ArgumentError(
            f"conjugate: the conjugate of {self} is not known in closed form; f.conjugate_prox(x, step) needs none"
        )

    def _grad(self, x: Tensor, n: int) -> Tensor:
        raise NotDifferentiableError(f"{self} is not smooth, so it has no gradient; use its prox, as fista does")

    # What a user calls ---------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> Any:
        """f(x), of the shape of the batch."""
        t, n, _, back = self._enter(x, "x")
        return back(self._value(t, n))

    def prox(self, x: Any, step: Any) -> Any:
        """argmin_u f(u) + |u - x|^2 / (2 step), of the shape of x.

        Args:
            x: tensor or array of shape (..., *dims).
            step: a number >= 0, or a tensor with one value for each member of the batch.

        Raises: ArgumentError, ShapeError, DtypeError.
        """
        t, n, flat, back = self._enter(x, "x")
        u = self._prox(t, self._lift(step, t, n), n)
        return back(u.reshape(flat) if flat is not None else u)

    def conjugate_prox(self, x: Any, step: Any) -> Any:
        """argmin_u f^*(u) + |u - x|^2 / (2 step), where f^*(u) = sup_v Re<u, v> - f(v), for step > 0."""
        t, n, flat, back = self._enter(x, "x")
        u = self._conjugate_prox(t, self._lift(step, t, n), n)
        return back(u.reshape(flat) if flat is not None else u)

    def conjugate(self, x: Any) -> Any:
        """f^*(x) = sup_v Re<x, v> - f(v), of the shape of the batch; inf outside the domain of f^*.

        Rounding may put x a hair outside of the domain (the boundary, for norms): up to 100 eps count as inside.

        Raises: ArgumentError where the conjugate is not known.
        """
        t, n, _, back = self._enter(x, "x")
        return back(self._conjugate_value(t, n))

    def grad(self, x: Any) -> Any:
        """The gradient of f at x, of the shape of x.

        Raises: NotDifferentiableError where f is not smooth.
        """
        t, n, flat, back = self._enter(x, "x")
        u = self._grad(t, n)
        return back(u.reshape(flat) if flat is not None else u)

    @property
    def lipschitz(self) -> Any:
        """A Lipschitz constant of the gradient; inf where f is not smooth."""
        return math.inf

    @property
    def strong_convexity(self) -> Any:
        """The largest known m for which f - m |x|^2 / 2 is convex."""
        return 0.0

    # Structure, which solvers read ---------------------------------------------------------------------------------

    @property
    def operator(self) -> LinearOperator | None:
        """K in f(x) = outer(K x); None where K is the identity."""
        return None

    @property
    def outer(self) -> Functional:
        """The g in f(x) = g(operator x)."""
        return self

    @property
    def terms(self) -> tuple[Functional, ...]:
        """The f_i of a sum f = sum_i f_i."""
        return (self,)

    def _quadratic(self, x: Tensor, n: int) -> tuple[Any, Any] | None:
        """(c, p) with f(x) = c |x|^2 / 2 - Re<p, x> + const, both broadcasting against x; None for other f."""
        return None

    # Combination ---------------------------------------------------------------------------------------------------

    def translate(self, shift: Any) -> Functional:
        """The functional x -> f(x - shift), for a tensor that broadcasts against x."""
        return algebra["translate"](self, interop.as_tensor(shift, "shift", f"{type(self).__name__}.translate"))

    def about(self, y: Any) -> Functional:
        """The functional of A x when the data are y: f(A x - y), unless a class measures misfit in another way."""
        return self.translate(y)

    def __mul__(self, factor: Any) -> Functional:
        if not (isinstance(factor, Tensor) or interop.is_scalar(factor)):
            return NotImplemented
        return self._scale(_factor(factor))

    def __rmul__(self, factor: Any) -> Functional:
        return self.__mul__(factor)

    def __truediv__(self, divisor: Any) -> Functional:
        return self * (1 / divisor)

    def _scale(self, factor: float | Tensor) -> Functional:
        return self if not isinstance(factor, Tensor) and factor == 1 else algebra["scale"](self, factor)

    def __add__(self, other: Any) -> Functional:
        return algebra["add"](self, other) if isinstance(other, Functional) else NotImplemented

    def __matmul__(self, op: Any) -> Functional:
        return algebra["compose"](self, op) if isinstance(op, LinearOperator) else NotImplemented

    __array_ufunc__ = None  # NumPy scalars on the left leave the product to us

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TORCH_MULTIPLY and len(args) == 2 and isinstance(args[1], Functional):
            return args[1].__rmul__(args[0])
        return NotImplemented

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and name not in self._buffers:
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """What a repr shows in parentheses."""
        return "" if self.dims is None else f"dims={self.dims}"

    # Arguments -----------------------------------------------------------------------------------------------------

    def _enter(self, x: Any, name: str) -> tuple[Tensor, int, torch.Size | None, Callable[[Tensor], Any]]:
        """Return x as (..., *dims), the number of member axes, the shape to return to if x was flat, the way back."""
        owner = type(self).__name__
        if isinstance(x, np.ndarray):
            t, n, flat, _ = self._enter(interop.share(x, owner), name)
            return t, n, flat, lambda u: u.detach().resolve_conj().numpy()
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{owner}: {name} must be a floating point or complex tensor; got {kind}; use x.float()")
        if self.dims is None:
            return x, x.ndim, None, lambda u: u
        n = len(self.dims)
        if x.shape[-n:] == self.dims:
            return x, n, None, lambda u: u
        if x.ndim and x.shape[-1] == size(self.dims):
            return x.reshape(*x.shape[:-1], *self.dims), n, x.shape, lambda u: u
        raise ShapeError(
            f"{owner}: {name} must have shape (..., {', '.join(map(str, self.dims))})"
            + (f" or (..., {size(self.dims)})" if len(self.dims) > 1 else "")
            + f"; got {tuple(x.shape)}; leading axes are the batch"
        )

    def _lift(self, step: Any, x: Tensor, n: int) -> Step:
        """`step` as a float, or as a tensor that broadcasts against x."""
        owner = type(self).__name__
        if not isinstance(step, Tensor):
            if not interop.is_scalar(step) or isinstance(step, complex) or not float(step) >= 0:
                raise ArgumentError(f"{owner}: step must be a number >= 0 or a tensor of them; got {step!r}")
            return float(step)
        if step.is_complex():
            raise DtypeError(f"{owner}: step must be real; got {step.dtype}; use step.real")
        batch = x.shape[: x.ndim - n]
        if step.ndim > len(batch) or any(s not in (1, b) for s, b in zip(step.shape[::-1], batch[::-1], strict=False)):
            raise ShapeError(
                f"{owner}: step must have one value or one for each member of the batch, shape {tuple(batch)}; "
                f"got {tuple(step.shape)}; give {owner} its dims, which tell it the batch axes of x {tuple(x.shape)}"
            )
        return lift(real_like(step, x), n)


def _factor(value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.is_complex():
            raise DtypeError(f"a functional can be multiplied by real numbers >= 0 only; got {value.dtype}")
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, complex) or not number >= 0:
        raise ArgumentError(f"a functional can be multiplied by real numbers >= 0 only; got {value!r}")
    return float(number)


_TORCH_MULTIPLY = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.multiply, torch.Tensor.multiply}
