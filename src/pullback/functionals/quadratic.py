"""Quadratic functionals: half the squared L2 norm, least squares, quadratic forms, and zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims
from pullback.functionals.arithmetic import indicator, inner, member, point_like, squares, total
from pullback.functionals.functional import Functional, Step
from pullback.functionals.linear import as_data, pull, solve_shifted


class SquaredL2(Functional):
    """f(x) = |x - b|^2 / 2; prox: (x + step b) / (1 + step); gradient: x - b; conjugate: |u|^2 / 2 + Re<b, u>.

    Args:
        dims: shape of one member of the batch; see `Functional`.
        b: the centre, a number or a tensor that broadcasts against x; zero if None. It may require grad.

    With an operator, |K x - b|^2 / 2, write `LeastSquares(K, b)`.
    """

    elementwise = True
    is_quadratic = True

    def __init__(self, dims: Dims | None = None, *, b: Any = None) -> None:
        super().__init__(dims)
        self.b: Any = None if b is None else interop.as_tensor(b, "b", "SquaredL2")

    def _centre(self, x: Tensor) -> Tensor | None:
        return None if self.b is None else point_like(self.b, x)

    def _value(self, x: Tensor, n: int) -> Tensor:
        b = self._centre(x)
        return total(squares(x if b is None else x - b), n) / 2

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        b = self._centre(x)
        return x / (1 + step) if b is None else (x + step * b) / (1 + step)

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        # (c f)^*(u) = |u|^2 / (2 c) + Re<b, u>
        b = self._centre(x)
        return (x if b is None else x - step * b) * (scale / (scale + step))

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        b = self._centre(x)
        value = total(squares(x), n) / (2 * member(scale, n))
        return value if b is None else value + inner(b.expand_as(x), x, n)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        b = self._centre(x)
        return x.clone() if b is None else x - b

    def _quadratic(self, x: Tensor, n: int) -> tuple[Any, Any] | None:
        b = self._centre(x)
        return 1.0, 0.0 if b is None else b

    @property
    def lipschitz(self) -> Any:
        """1."""
        return 1.0

    @property
    def strong_convexity(self) -> Any:
        """1."""
        return 1.0


class ZeroFunctional(Functional):
    """f(x) = 0; prox: x; conjugate: 0 at 0, inf elsewhere.

    Args:
        dims: shape of one member of the batch; see `Functional`.
    """

    elementwise = True
    homogeneous = True
    is_quadratic = True

    def _value(self, x: Tensor, n: int) -> Tensor:
        return total(x.abs() * 0, n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return x.clone()

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        return indicator(total((x != 0).double(), n) == 0, x)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return torch.zeros_like(x)

    def _quadratic(self, x: Tensor, n: int) -> tuple[Any, Any] | None:
        return 0.0, 0.0

    def _scale(self, factor: float | Tensor) -> Functional:
        return self

    @property
    def lipschitz(self) -> Any:
        """0."""
        return 0.0


class LeastSquares(Functional):
    """f(x) = |K x - b|^2 / 2; prox: (I + step K^H K)^-1 (x + step K^H b); gradient: K^H (K x - b).

    Args:
        op: K, a LinearOperator.
        b: the data, a number or a tensor that broadcasts against K x; zero if None. It may require grad.
        maxiter, rtol: of the conjugate gradients in the prox, which stop when every member's residual is at most
            rtol |x + step K^H b|.

    The inverse has a closed form where K K^H or K^H K is a multiple of I or K^H K is a `Diagonal`; otherwise it is
    taken by conjugate gradients, with first and second derivatives by further solutions.
    Cost of a prox: one application of K and K^H each with a closed form, else one of K^H K an iteration.
    """

    def __init__(self, op: LinearOperator, b: Any = None, *, maxiter: int = 100, rtol: float = 1e-8) -> None:
        require_operator(op, "LeastSquares")
        super().__init__(op.dims)
        self.op, self.maxiter, self.rtol = op, maxiter, rtol
        self.norm = SquaredL2(op.dimsd, b=None if b is None else as_data(b, op, "LeastSquares"))

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self.norm._value(self.op._run(x), len(self.op.dimsd))

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        b = self.norm.b
        right = x
        if b is not None:
            data = point_like(b, x).expand(*b.shape[: max(0, b.ndim - len(self.op.dimsd))], *self.op.dimsd)
            right = x + step * pull(self.op, data, x)
        return solve_shifted(self.op, step, right, n, self.maxiter, self.rtol)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return pull(self.op, self.norm._grad(self.op._run(x), len(self.op.dimsd)), x)

    @property
    def lipschitz(self) -> Any:
        """An upper bound of |K|^2."""
        return self.op.norm_bound() ** 2

    @property
    def strong_convexity(self) -> Any:
        """The c with K^H K = c I where K's structure tells it, else 0."""
        return self.op._isometry() or 0.0

    @property
    def operator(self) -> LinearOperator | None:
        """K."""
        return self.op

    @property
    def outer(self) -> Functional:
        """`SquaredL2(b=b)`."""
        return self.norm

    def extra_repr(self) -> str:
        """The operator."""
        return type(self.op).__name__


class Quadratic(Functional):
    """f(x) = Re<x, A x> / 2 + Re<b, x> + c; prox: (I + step A)^-1 (x - step b); gradient: A x + b.

    Args:
        op: A, self-adjoint and positive semidefinite (neither is verified).
        b: a number or a tensor that broadcasts against x; zero if None. It may require grad.
        c: a real number or a tensor with one value, or one for each member.
        maxiter, rtol: of the conjugate gradients in the prox, as in `LeastSquares`.
    """

    def __init__(
        self, op: LinearOperator, b: Any = None, c: Any = 0.0, *, maxiter: int = 100, rtol: float = 1e-8
    ) -> None:
        require_operator(op, "Quadratic")
        if op.dims != op.dimsd:
            raise ShapeError(f"Quadratic: op must map a space to itself; got {op.dims} -> {op.dimsd}")
        super().__init__(op.dims)
        self.op, self.maxiter, self.rtol = op, maxiter, rtol
        self.b: Any = None if b is None else as_data(b, op, "Quadratic")
        self.c: Any = c

    def _value(self, x: Tensor, n: int) -> Tensor:
        value = inner(x, self.op._run(x), n) / 2 + self.c
        return value if self.b is None else value + inner(point_like(self.b, x).expand_as(x), x, n)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        right = x if self.b is None else x - step * point_like(self.b, x)
        return solve_shifted(self.op, step, right, n, self.maxiter, self.rtol, gram=False)

    def _grad(self, x: Tensor, n: int) -> Tensor:
        g = self.op._run(x)
        return g if self.b is None else g + point_like(self.b, x)

    @property
    def lipschitz(self) -> Any:
        """An upper bound of |A|."""
        return self.op.norm_bound()

    def extra_repr(self) -> str:
        """The operator."""
        return type(self.op).__name__


def require_operator(op: Any, owner: str) -> None:
    """Raise unless op is a LinearOperator."""
    if not isinstance(op, LinearOperator):
        raise ArgumentError(
            f"{owner}: op must be a pullback.LinearOperator; got {type(op).__name__}; wrap a matrix with MatrixMult"
        )
