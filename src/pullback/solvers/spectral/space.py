"""An operator seen as a matrix on rows of numbers, and the derivatives that eigenvalues have without their vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.core import spectrum
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.interop import device_of, numpy_dtype, torch_dtype
from pullback.core.operator import LinearOperator, OperatorLike
from pullback.core.shapes import complex_of, real_of, size
from pullback.functionals.arithmetic import is_live

SMALL = 1024  # operators with at most this many rows and columns are decomposed densely
_CHUNK = 1 << 24  # elements of a dense matrix that are computed at a time


def as_linear(A: Any, owner: str, name: str = "A") -> LinearOperator:
    """A as a LinearOperator. Raises: ArgumentError."""
    A = A.operator() if isinstance(A, OperatorLike) else A
    if not isinstance(A, LinearOperator):
        raise ArgumentError(
            f"{owner}: {name} must be a pullback.LinearOperator; got {type(A).__name__}; wrap a matrix "
            f"with MatrixMult, a foreign operator with TorchOperator"
        )
    return A


def has_live(A: LinearOperator) -> bool:
    """Whether a derivative in a tensor that A holds may be asked for."""
    return is_live(*A.parameters(), *A.buffers())


class Flat:
    """A as an m x n matrix on rows of shape (b, n).

    Where A is linear over the reals only, or a space of it is real, a complex vector counts as two real ones (`real`).
    """

    def __init__(self, A: LinearOperator, dtype: Any = None, device: Any = None, *, real: bool = False) -> None:
        given = None if dtype is None else torch_dtype(numpy_dtype(dtype))
        domain = spectrum.probe_dtype(A, given)
        self.A, self.device = A, torch.device(device_of(A) if device is None else device)
        self.real = real or not A._clinear or A._real_domain or A._real_range
        if not self.real:
            domain = torch.promote_types(domain, A._out_dtype(domain, False))
        elif not A._real_domain and not A._clinear:
            domain = complex_of(domain)
        self.domain, self.range = domain, A._out_dtype(domain, False)
        self.dtype = real_of(domain) if self.real else domain
        self.n = size(A.dims) * (2 if self.real and self.domain.is_complex else 1)
        self.m = size(A.dimsd) * (2 if self.real and self.range.is_complex else 1)

    def forward(self, rows: Tensor) -> Tensor:
        """A for every row."""
        return self._down(self.A._run(self.vectors(rows)), self.range)

    def adjoint(self, rows: Tensor) -> Tensor:
        """A^H for every row."""
        return self._down(self.A._run(self.images(rows), True), self.domain)

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows as members of the domain, shape (b, *dims)."""
        return self._up(rows, self.domain, self.A.dims)

    def images(self, rows: Tensor) -> Tensor:
        """Rows as members of the range, shape (b, *dimsd)."""
        return self._up(rows, self.range, self.A.dimsd)

    def _up(self, rows: Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> Tensor:
        if self.real and dtype.is_complex:
            rows = torch.view_as_complex(rows.reshape(len(rows), -1, 2).contiguous())
        return rows.reshape(len(rows), *dims)

    def _down(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype).reshape(len(x), -1)
        return torch.view_as_real(x.resolve_conj()).flatten(1) if self.real and dtype.is_complex else x

    def matrix(self) -> Tensor:
        """The matrix, of shape (m, n), differentiable in what A holds. Cost: n applications, batched."""
        step = max(1, _CHUNK // max(self.m, self.n))
        parts = []
        for start in range(0, self.n, step):
            units = torch.zeros(min(step, self.n - start), self.n, dtype=self.dtype, device=self.device)
            units.diagonal(start).fill_(1)
            parts.append(self.forward(units))
        return torch.cat(parts).mT

    def random(self, count: int, n: int, generator: torch.Generator) -> Tensor:
        """Rows of unit normal numbers, the same on every device."""
        return torch.randn(count, n, dtype=self.dtype, generator=generator).to(self.device)


class _FirstOrder(torch.autograd.Function):
    """value, with the first derivative of `estimate`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, estimate: Tensor, text: str) -> Tensor:
        ctx.text = text
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph: the estimate lacks what the vectors contribute to second order
            raise NotDifferentiableError(f"{ctx.text}: only first derivatives exist here; use method='dense'")
        return None, g, None


class _Refusal(torch.autograd.Function):
    """value, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, text: str) -> Tensor:
        ctx.text = text
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        raise NotDifferentiableError(f"{ctx.text} have no derivative here; use method='dense', or detach them")


def first_order(value: Tensor, estimate: Tensor, text: str) -> Tensor:
    """The value with the gradient of `estimate`, an expression whose first derivative is right but not its second."""
    return _FirstOrder.apply(value, estimate, text) if estimate.requires_grad else value


def refusal(value: Tensor, anchor: Tensor, text: str) -> Tensor:
    """The value; a derivative asked of it raises NotDifferentiableError if `anchor` requires grad."""
    return _Refusal.apply(value, anchor, text) if anchor.requires_grad else value
