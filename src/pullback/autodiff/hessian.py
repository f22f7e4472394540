"""The Hessian of a scalar function at a point, as a self-adjoint linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.autodiff.differential import _TreeDifferential, tree_function, whole
from pullback.autodiff.tree import TreeFunction, name_of
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.core.linearize import Recording
from pullback.core.operator import LinearOperator


def hessian(f: Callable[..., Any], *args: Any, complex: str | None = None) -> Hessian:
    """H v = d/dt grad f(x + t v) at t = 0, without the matrix; H.H is H.

    Vectors are as in `jacobian`: tensors of the shape of x if x is one tensor, else flat vectors or trees. `H.value` is
    f(x), and `H.gradient` the gradient as a vector of shape H.dims, so that `cg(H, -H.gradient)` gives Newton's step.

    Args:
        f: function or module of the arguments, deterministic, in twice differentiable torch; one real number.
        args: the point x: tensors or trees.
        complex: for complex x, "real": x is seen as pairs of real numbers, (..., 2). "wirtinger": x stays complex and H
            is linear over the reals only; the gradient is that of torch, df/dRe x + i df/dIm x.

    Returns: a Hessian, differentiable in v, in x and in what f holds or closes over, where those require grad.

    Memory: the graphs of f at x and of its gradient are kept as long as the operator; x is copied. See `jacobian`.

    Raises: ShapeError if f(x) is not one number, DtypeError, ArgumentError, NotDifferentiableError.

    Cost: f and its gradient once, with their graphs; then one backward pass for each product, because H is symmetric.
    """
    return Hessian(f, args, complex)


class _Scalar(TreeFunction):
    """A function whose value is one real number."""

    def evaluate(self, f: Callable[..., Any], points: Sequence[Tensor]) -> Any:
        """The value at the point."""
        value = super().evaluate(f, points)
        space = self.range
        assert space is not None, "a function without a range; please report"
        if any(space.complex) or any(space.paired):
            raise DtypeError(f"{self.owner}: f(x) must be real; got a complex value; use f(x).real or abs(f(x)) ** 2")
        if space.n != 1:
            shapes = ", ".join(map(str, space.shapes))
            raise ShapeError(f"{self.owner}: f(x) must be one number; got shape {shapes}; use f(x).sum() or jacobian")
        return value


class Hessian(_TreeDifferential):
    """grad grad f(x): what `hessian` returns."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], complex: str | None = None) -> None:
        refuse_holomorphic("hessian", complex)
        self._build(f, tree_function("hessian", f, args, complex, _Scalar), whole(args), True)

    @property
    def H(self) -> LinearOperator:
        """The operator itself."""
        return self

    @property
    def gradient(self) -> Tensor:
        """The gradient of f at x, a vector of shape dims; connected to x if x requires grad."""
        if self._open:
            found: Sequence[Tensor] = self._derived(self._points())
        else:
            live = self._is_live()
            recorded = self._recorded()
            found = recorded.watched(recorded.outs) if live else [g.detach() for g in recorded.outs]
        dtype = found[0].dtype
        for g in found[1:]:
            dtype = torch.promote_types(dtype, g.dtype)
        return self.domain.join(found, (), dtype).clone()

    def _record(self) -> Recording:
        return Recording(self._outputs, self._points(), True)

    def _derived(self, points: Sequence[Tensor]) -> Sequence[Tensor]:
        value, pull, *_ = torch.func.vjp(lambda *p: self._outputs(p)[0], *points)
        return pull(torch.ones_like(value))  # type: ignore[no-any-return]

    def _product(self, x: Tensor, adjoint: bool, live: bool) -> Tensor:
        return super()._product(x, True, live)

    def extra_repr(self) -> str:
        """The name of f."""
        return name_of(self.f)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """A function of a tensor, of a tree, and of a complex tensor."""
        x = torch.linspace(0.3, 1.1, 6, dtype=torch.float64)
        yield cls(_valley, (x.reshape(2, 3),))
        yield cls(_fit, ({"w": x.reshape(2, 3), "b": x[:2], "power": 3}, x[:3]))
        yield cls(_modulus, (torch.complex(x[:3], x[3:]),), "wirtinger")


def refuse_holomorphic(owner: str, complex: str | None) -> None:
    """Raise for complex="holomorphic": a real function is holomorphic only if it is constant."""
    if complex == "holomorphic":
        raise ArgumentError(
            f"{owner}: complex must be 'real' or 'wirtinger' or None; got 'holomorphic', which no real function is"
        )


def _valley(x: Tensor) -> Tensor:
    return (torch.sin(x) * x.flip(-1) ** 2).sum() + x.exp().prod()


def _fit(parameters: dict[str, Any], x: Tensor) -> Tensor:
    return (torch.tanh(parameters["w"] @ x + parameters["b"]) ** parameters["power"]).sum()


def _modulus(z: Tensor) -> Tensor:
    return ((z * z.conj()).real ** 2).sum() + (z**3).imag.sum()
