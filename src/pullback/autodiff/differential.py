"""What Jacobians, Hessians and Gauss-Newton matrices share: they act on vectors and on trees of tensors alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.autodiff.tree import Space, TreeFunction
from pullback.core.algebra import Adjoint
from pullback.core.errors import ArgumentError, DtypeError
from pullback.core.interop import device_of
from pullback.core.linearize import Recording, _Differential, frozen, recordable
from pullback.core.operator import LinearOperator

COMPLEX = ("holomorphic", "real", "wirtinger")


class _OnTrees(LinearOperator):
    """A linear operator between spaces of trees.

    A tensor is a vector of shape (..., *dims) and gives a vector; a tree gives a tree, or a tensor where the other side
    is one.
    """

    domain: Space
    range: Space

    def forward(self, x: Any, *more: Any) -> Any:
        """A x for a tensor (..., *dims), or for a tree of tangents; with several arguments for their tuple."""
        return self._call((x, *more) if more else x, False)

    def _call(self, x: Any, adjoint: bool) -> Any:
        space, other = (self.range, self.domain) if adjoint else (self.domain, self.range)
        y = super()._call(self._vector(x, space), adjoint)
        return y if other.bare or isinstance(x, (Tensor, np.ndarray)) else other.unpack(y)

    @staticmethod
    def _vector(x: Any, space: Space) -> Any:
        if not isinstance(x, (Tensor, np.ndarray)):
            return space.pack(x)
        if isinstance(x, Tensor):
            if x.ndim == 0 and space.n == 1:
                return x.reshape(space.dims)
            if x.is_complex() and space.one and space.paired[0]:
                return torch.view_as_real(x.resolve_conj())
        return x

    def pack(self, tree: Any) -> Tensor:
        """A tree of the structure of x as a vector of shape (..., *dims)."""
        return self.domain.pack(tree)

    def unpack(self, vector: Tensor) -> Any:
        """A vector of shape (..., *dims) as a tree of the structure of x; None where x has constants."""
        return self.domain.unpack(vector)

    def pack_range(self, tree: Any) -> Tensor:
        """A tree of the structure of f(x) as a vector of shape (..., *dimsd)."""
        return self.range.pack(tree)

    def unpack_range(self, vector: Tensor) -> Any:
        """A vector of shape (..., *dimsd) as a tree of the structure of f(x)."""
        return self.range.unpack(vector)

    def push(self, tree: Any) -> Any:
        """A v as a tree of the structure of f(x), whatever v is: a tree like x, or a vector."""
        return self.unpack_range(super()._call(self._vector(tree, self.domain), False))

    def pull(self, tree: Any) -> Any:
        """A^H w as a tree of the structure of x, whatever w is: a tree like f(x), or a vector."""
        return self.unpack(super()._call(self._vector(tree, self.range), True))

    def todense(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The matrix, of shape (m, n), by products with `chunk_size` unit vectors at a time.

        Raises: ArgumentError if it cannot fit into memory, or if complex="wirtinger", which has no complex matrix.
        """
        self._require_matrix("complex='real' gives a real one")
        return super().todense(dtype, device, chunk_size=chunk_size)

    def _require_matrix(self, instead: str) -> None:
        """Raise where there is no matrix, or none that this machine can hold: a long loop would end without a word."""
        if not self._clinear and not self._real_domain:
            raise ArgumentError(
                f"todense: with complex='wirtinger' {type(self).__name__} is linear over the reals only and has no "
                f"complex matrix; {instead}"
            )
        if device_of(self).type != "cpu":
            return  # other devices raise by themselves
        m, n = self.shape
        try:
            torch.empty(2 * m * n * self.dtype.itemsize, dtype=torch.uint8, device="cpu")  # chunks and their union
        except RuntimeError:
            raise ArgumentError(
                f"todense: a matrix of shape {self.shape} does not fit into memory; products, trace(method='hutch++'), "
                f"diag(neval=...), eigs(k) and sparse_jacobian or sparse_hessian work without it"
            ) from None

    diag = LinearOperator.diagonal  # torch's name for it

    @property
    def H(self) -> LinearOperator:
        """The adjoint, which also takes trees. `A.H.H is A`."""
        kept = self.__dict__.get("_adjoint_ref")
        op = kept() if kept is not None else None
        if op is None:
            op = _TreeAdjoint(self)
            if not torch.compiler.is_compiling():
                self.__dict__["_adjoint_ref"] = weakref.ref(op)
        return op


class _TreeAdjoint(Adjoint):
    """The adjoint of an operator on trees."""

    def forward(self, x: Any, *more: Any) -> Any:
        """A^H y for a tensor (..., *dimsd), or for a tree."""
        return self._sequence()[0]._call((x, *more) if more else x, True)

    def _call(self, x: Any, adjoint: bool) -> Any:
        return self._sequence()[0]._call(x, not adjoint)


class _TreeDifferential(_OnTrees, _Differential):
    """The derivative of a function of trees at a point."""

    function: TreeFunction
    f: Callable[..., Any]

    def _build(self, f: Callable[..., Any], function: TreeFunction, tree: Any, gradient: bool) -> None:
        """Evaluate, record and hold: the whole of __init__ of a subclass."""
        points = tuple(frozen(t) for t in function.domain.tensors(tree))
        recording = None
        if recordable(*points):
            recording = Recording(partial(function, f), points, gradient)
        else:
            function(f, points)  # for the structure of the value
        assert function.range is not None, "a function without a range; please report"
        domain, spanned = function.domain, function.domain if gradient else function.range
        super().__init__(domain.dims, spanned.dims)
        if isinstance(f, torch.nn.Module):
            self.f = f
        else:
            self.__dict__["f"] = f
        real, real_range = domain.is_real, spanned.is_real
        self.__dict__.update(  # past __setattr__ of modules, which is slow
            function=function,
            domain=domain,
            range=spanned,
            _real_domain=real,
            _real_range=real_range,
            _clinear=real and real_range,
        )
        self._set_up(points, recording)

    def _outputs(self, points: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.function(self.f, points)

    @property
    def value(self) -> Any:
        """f(x), as f returned it, connected to x and to what f depends on if that requires grad."""
        if self._open:
            return self.function.evaluate(self.f, self._points())
        live = self._is_live()
        recorded = self._recorded()
        space = self.function.range
        assert space is not None, "a function without a range; please report"
        return space.tree(
            recorded.watched(recorded.values) if live else [v.detach() for v in recorded.values], self.function.leftover
        )

    def _enter(self, x: Tensor, batch: tuple[int, ...], adjoint: bool) -> list[Tensor]:
        return (self.range if adjoint else self.domain).split(x, batch)

    def _leave(self, found: Sequence[Tensor], batch: tuple[int, ...], adjoint: bool, dtype: torch.dtype) -> Tensor:
        return (self.domain if adjoint else self.range).join(found, batch, dtype)

    def _expression(self, level: int = 0) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def whole(args: tuple[Any, ...]) -> Any:
    """What the domain is a space of: the argument, or the tuple of several."""
    return args[0] if len(args) == 1 else args


def tree_function(
    owner: str,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    treat: str | None,
    kind: type[TreeFunction] = TreeFunction,
) -> TreeFunction:
    """The function f of a list of tensors, after looking at how complex numbers are to be treated."""
    if treat is not None and treat not in COMPLEX:
        raise ArgumentError(f"{owner}: complex must be one of {', '.join(map(repr, COMPLEX))} or None; got {treat!r}")
    function = kind(f, args, owner, treat == "real")
    kinds = function.domain.complex
    if any(kinds) and treat is None:
        raise DtypeError(
            f"{owner}: x is complex, so it must be said what the derivative is: complex='holomorphic' (f is complex "
            f"differentiable), complex='real' (x and f(x) as pairs of real numbers) or complex='wirtinger' "
            f"(v -> df/dz v + df/dz* conj(v))"
        )
    if treat in ("holomorphic", "wirtinger") and not all(kinds):
        raise DtypeError(
            f"{owner}: complex={treat!r} needs every tensor of x to be complex; got real ones; use complex='real', or "
            f"pass x.to(torch.complex128)"
        )
    return function
