"""Functional: what a penalty or a constraint is, how it is called, and how it is combined."""

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
from pullback.functionals.arithmetic import lift, point_like, real_like

Step = float | Tensor


class Functional(torch.nn.Module):
    """f(x), a number for each member of a batch; with prox, conjugate prox and, where f is smooth, its gradient.

    Args:
        dims: shape of one member, without batch axes. With dims, x has shape (..., *dims) or (..., prod(dims)), leading
            axes are the batch, and f(x) has the shape of the batch. Without dims the whole of x is one member and f(x)
            is one number. Solvers know the dims from the operator, so `0.1 * pb.L1()` is enough there.

    Everything is plain torch: values and proxes are differentiable in x, in `step` and in the tensors that f holds.
    Complex x counts as a vector of twice as many real numbers; values, steps and weights are real.

    A subclass writes `_value(x, n)` and, as far as they exist, `_prox(x, step, n)`, `_conjugate_prox` and `_grad`. The
    last n axes of x are the member and `step` is a float or a tensor that broadcasts against x.
    """

    has_prox: bool = True  # False where the prox has neither a closed form nor a fast algorithm
    elementwise: bool = False  # f(x) = sum_i f_i(x_i) with convex f_i
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

    # Combination ---------------------------------------------------------------------------------------------------

    def translate(self, shift: Any) -> Functional:
        """The functional x -> f(x - shift), for a tensor that broadcasts against x."""
        return Translated(self, interop.as_tensor(shift, "shift", f"{type(self).__name__}.translate"))

    def __mul__(self, factor: Any) -> Functional:
        if not (isinstance(factor, Tensor) or interop.is_scalar(factor)):
            return NotImplemented
        return self._scale(_factor(factor))

    def __rmul__(self, factor: Any) -> Functional:
        return self.__mul__(factor)

    def __truediv__(self, divisor: Any) -> Functional:
        return self * (1 / divisor)

    def _scale(self, factor: float | Tensor) -> Functional:
        return self if not isinstance(factor, Tensor) and factor == 1 else Scaled(self, factor)

    def __add__(self, other: Any) -> Functional:
        return Sum(self, other) if isinstance(other, Functional) else NotImplemented

    def __matmul__(self, op: Any) -> Functional:
        return Composed(self, op) if isinstance(op, LinearOperator) else NotImplemented

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


class Scaled(Functional):
    """x -> c f(x) for c >= 0, a number or a tensor (which may require grad) with one value, or one for each member.

    Does not verify that a tensor c is >= 0.
    """

    def __init__(self, f: Functional, factor: float | Tensor) -> None:
        super().__init__(f.dims)
        self.f = f
        self.factor: Any = factor
        self.has_prox, self.elementwise, self.is_box = f.has_prox, f.elementwise, f.is_box

    def _c(self, x: Tensor, n: int) -> Any:
        return lift(real_like(self.factor, x), n)

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self._c(x, 0) * self.f._value(x, n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self.f._prox(x, step * self._c(x, n), n)

    def _prox_over(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self.f._prox_over(x, step * self._c(x, n), n)

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        return self.f._conjugate_prox(x, step, n, scale * self._c(x, n))

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return self._c(x, n) * self.f._grad(x, n)

    @property
    def lipschitz(self) -> Any:
        """That of f, times c."""
        return self.factor * self.f.lipschitz

    @property
    def operator(self) -> LinearOperator | None:
        """The K of f."""
        return self.f.operator

    @property
    def outer(self) -> Functional:
        """The outer part of f, times c."""
        return self if self.f.operator is None else self.f.outer._scale(self.factor)

    @property
    def terms(self) -> tuple[Functional, ...]:
        """Those of f, times c."""
        return tuple(t._scale(self.factor) for t in self.f.terms) if len(self.f.terms) > 1 else (self,)

    def _scale(self, factor: float | Tensor) -> Functional:
        product: float | Tensor = self.factor * factor
        return self.f._scale(product)

    def __repr__(self) -> str:
        c = "c" if isinstance(self.factor, Tensor) else format(self.factor, ".6g")
        return f"{c} * {self.f!r}"


class Translated(Functional):
    """x -> f(x - shift)."""

    def __init__(self, f: Functional, shift: Tensor) -> None:
        super().__init__(f.dims)
        self.f, self.shift = f, shift
        self.has_prox, self.elementwise, self.is_box = f.has_prox, f.elementwise, f.is_box

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self.f._value(x - point_like(self.shift, x), n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        shift = point_like(self.shift, x)
        return shift + self.f._prox(x - shift, step, n)

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        # f(. - b)^*(u) = f^*(u) + Re<b, u>
        return self.f._conjugate_prox(x - step * point_like(self.shift, x), step, n, scale)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return self.f._grad(x - point_like(self.shift, x), n)

    @property
    def lipschitz(self) -> Any:
        """That of f."""
        return self.f.lipschitz

    @property
    def operator(self) -> LinearOperator | None:
        """The K of f."""
        return self.f.operator

    @property
    def outer(self) -> Functional:
        """g(. - K shift)."""
        op = self.f.operator
        return self if op is None else Translated(self.f.outer, op(self.shift))

    def __repr__(self) -> str:
        return f"{self.f!r}.translate(...)"


class Sum(Functional):
    """x -> sum_i f_i(x).

    Its prox exists for one elementwise functional plus one Box (real x): the projection of its prox. Solvers that split
    (`pdhg`, `solve`) take any sum.
    """

    def __init__(self, *parts: Functional) -> None:
        terms = [t for p in parts for t in p.terms]
        known = [t.dims for t in terms if t.dims is not None]
        for d in known[1:]:
            if d != known[0]:
                raise ShapeError(f"cannot add functionals of dims {known[0]} and {d}: dims differ")
        super().__init__(known[0] if known else None)
        for i, t in enumerate(terms):
            self.add_module(str(i), t)
        self.elementwise = all(t.elementwise for t in terms)
        self.has_prox = len(terms) == 2 and self.elementwise and any(t.is_box for t in terms)

    @property
    def terms(self) -> tuple[Functional, ...]:
        """The f_i."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def _value(self, x: Tensor, n: int) -> Tensor:
        first, *rest = self.terms
        total = first._value(x, n)
        for t in rest:
            total = total + t._value(x, n)
        return total

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        if not self.has_prox:
            return super()._prox(x, step, n)
        first, second = sorted(self.terms, key=lambda t: t.is_box)
        return second._prox_over(first._prox(x, step, n), step, n)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        first, *rest = self.terms
        total = first._grad(x, n)
        for t in rest:
            total = total + t._grad(x, n)
        return total

    @property
    def lipschitz(self) -> Any:
        """The sum of the constants."""
        return sum(t.lipschitz for t in self.terms)

    def _scale(self, factor: float | Tensor) -> Functional:
        return Sum(*(t._scale(factor) for t in self.terms))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


class Composed(Functional):
    """x -> g(K x) for a linear operator K. It has no prox; solvers use `outer` = g and `operator` = K."""

    has_prox = False

    def __init__(self, g: Functional, op: LinearOperator) -> None:
        super().__init__(op.dims)
        if g.dims is not None and g.dims != op.dimsd:
            raise ShapeError(f"cannot compose {g!r} with {type(op).__name__}: its dimsd are {op.dimsd}, not {g.dims}")
        if g.operator is not None:
            g, op = g.outer, g.operator @ op
        self.g, self.op = g, op

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self.g._value(self.op._run(x), len(self.op.dimsd))

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return self.op._run(self.g._grad(self.op._run(x), len(self.op.dimsd)), True)

    @property
    def lipschitz(self) -> Any:
        """L |K|^2."""
        inner = self.g.lipschitz
        return inner if inner == math.inf else inner * self.op.norm_bound() ** 2

    @property
    def operator(self) -> LinearOperator | None:
        """K."""
        return self.op

    @property
    def outer(self) -> Functional:
        """The functional after K."""
        return self.g

    def __repr__(self) -> str:
        return f"{self.g!r} @ {type(self.op).__name__}"


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
