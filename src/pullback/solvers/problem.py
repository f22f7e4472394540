"""The data of a solver: A, y and x0 checked and brought into one form, and the vector arithmetic that solvers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.core.operator import LinearOperator, OperatorLike
from pullback.core.shapes import size
from pullback.functionals.arithmetic import is_live, lift
from pullback.solvers.scalars import Number

_CHUNK = 4096
_NOTHING = nullcontext()
_HALF = (torch.float16, torch.bfloat16)


class Problem:
    """A x = y, y of shape (*batch, *A.dimsd), x of shape (*batch, *A.dims), and what else the solution depends on.

    Args:
        owner: the solver's name, for messages.
        A: a LinearOperator.
        y: tensor or NumPy array of shape (..., *A.dimsd), or flat (..., m); leading axes are the batch.
        x0: where to start, of shape (..., *A.dims) or flat; zero if None. It broadcasts against the batch of y.
        parts: functionals, modules and numbers by name. The method reads them from `parts`, so that another problem
            with other values can be made of this one.

    `live` tells whether a derivative may be asked for; then nothing is overwritten. `own(t)` is t if it may be
    overwritten, else None, so that `torch.add(t, u, out=problem.own(t))` is right in both cases. `single` tells that
    there is one member on the CPU without derivatives: then all numbers are Python floats (see `scalars.py`).
    """

    def __init__(self, owner: str, A: Any, y: Any, x0: Any = None, **parts: Any) -> None:
        A = A.operator() if isinstance(A, OperatorLike) else A
        if not isinstance(A, LinearOperator):
            raise ArgumentError(
                f"{owner}: A must be a pullback.LinearOperator; got {type(A).__name__}; "
                f"wrap a matrix with MatrixMult, a foreign operator with TorchOperator"
            )
        self.owner, self.A, self.adjoint, self.parts = owner, A, A.H, parts
        self.is_numpy = isinstance(y, np.ndarray)
        data, self.is_flat, batch = _enter(y, A.dimsd, owner, "y", "A's output")
        if A._real_range and data.is_complex():
            raise DtypeError(f"{owner}: y must be real, as A's output is; got {data.dtype}; use y.real")
        self.dtype = data.dtype  # of the result, before promotion with A and x0
        data = data.float() if data.dtype in _HALF else data
        x_dtype = A._out_dtype(data.dtype, True)
        start = None
        if x0 is not None:
            start, _, x_batch = _enter(x0, A.dims, owner, "x0", "A's input")
            if A._real_domain and start.is_complex():
                raise DtypeError(f"{owner}: x0 must be real, as A's input is; got {start.dtype}; use x0.real")
            try:
                batch = tuple(torch.broadcast_shapes(batch, x_batch))
            except RuntimeError:
                raise ShapeError(f"{owner}: the batch axes of x0 {x_batch} do not fit those of y {batch}") from None
            x_dtype = torch.promote_types(x_dtype, start.dtype) if not A._real_domain else x_dtype
            start = start.to(device=data.device, dtype=x_dtype).expand(*batch, *A.dims)
        self.batch, self.x_dtype, self.x0 = batch, x_dtype, start
        data = data.to(torch.promote_types(data.dtype, A._out_dtype(x_dtype, False)))
        self.y = data.expand(*batch, *A.dimsd)
        self.n_x, self.n_y = len(A.dims), len(A.dimsd)
        self.eps = torch.finfo(self.y.dtype).eps
        self._look()

    def _look(self) -> None:
        """Find out whether anything is differentiated or traced, and set what follows from that."""
        held: list[Any] = [self.y, self.x0, *self.A.parameters(), *self.A.buffers()]
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                held.extend((*part.parameters(), *part.buffers()))
            else:
                held.append(part)
        self.live = is_live(*held)
        self.single = not self.batch and not self.live and self.y.device.type == "cpu"
        # `_run` skips the checks of a call, and the copy that protects the input of operators which may return it.
        self.forward: Callable[[Tensor], Tensor] = self.A if self.A._aliases else self.A._run
        self.backward: Callable[[Tensor], Tensor] = self.adjoint if self.adjoint._aliases else self.adjoint._run

    @property
    def quiet(self) -> AbstractContextManager[Any]:
        """A context without derivatives; it costs nothing where there are none anyway."""
        return torch.no_grad() if self.live else _NOTHING

    def own(self, t: Tensor) -> Tensor | None:
        """Where to write a result that replaces t: t itself, or nowhere if derivatives may be asked for."""
        return None if self.live else t

    def start(self) -> tuple[Tensor, Tensor]:
        """Return x0 and y - A x0, both free to be overwritten. Costs an application only where x0 was given."""
        if self.x0 is None:
            x = torch.zeros((*self.batch, *self.A.dims), dtype=self.x_dtype, device=self.y.device)
            return x, self.y.clone(memory_format=torch.contiguous_format)
        x = self.x0.clone(memory_format=torch.contiguous_format)
        r = self.A(x)
        return x, torch.sub(self.y, r, out=self.own(r))

    def back(self, r: Tensor) -> Tensor:
        """A^H r, free to be overwritten and of the dtype of x."""
        s = self.backward(r)
        return s if s.dtype == self.x_dtype else s.to(self.x_dtype)

    def x_scalar(self, c: Number) -> Number:
        """One number a member, as something that broadcasts against x."""
        return c if isinstance(c, float) else lift(c, self.n_x)

    def y_scalar(self, c: Number) -> Number:
        """One number a member, as something that broadcasts against y."""
        return c if isinstance(c, float) else lift(c, self.n_y)

    def norm(self, v: Tensor, n: int) -> Number:
        """|v|_2 of each member, over the last n axes, without derivative."""
        return _single_norm(v) if self.single else norm(v, n)

    def square(self, v: Tensor, n: int) -> Number:
        """|v|^2 of each member, over the last n axes; differentiable if live."""
        if self.single:
            size = _single_norm(v)
            return size * size
        return square(v, n, self.live)

    def dot(self, u: Tensor, v: Tensor, n: int) -> Number:
        """Re <u, v> of each member, over the last n axes."""
        if self.single and u.numel() <= 2 * _CHUNK and u.dtype == v.dtype:
            return float(torch.dot(_real_vector(u), _real_vector(v)))
        return float(dot(u, v, n)) if self.single else dot(u, v, n)

    def fill(self, value: float) -> Number:
        """The same number for each member."""
        if self.single:
            return float(value)
        return torch.full(self.batch, value, dtype=self.y.dtype.to_real(), device=self.y.device)

    def number(self, value: Any, name: str, *, positive: bool = False) -> Any:
        """A parameter of the method: a number, or a tensor with one real value, or one for each member of the batch."""
        bound = "> 0" if positive else ">= 0"
        if isinstance(value, Tensor):
            if value.is_complex():
                raise DtypeError(f"{self.owner}: {name} must be real; got {value.dtype}; use {name}.real")
            if value.ndim and (
                value.ndim > len(self.batch)
                or any(s not in (1, b) for s, b in zip(value.shape[::-1], self.batch[::-1], strict=False))
            ):
                raise ShapeError(
                    f"{self.owner}: {name} must be one number or one for each member of the batch, shape {self.batch}; "
                    f"got {tuple(value.shape)}"
                )
            if self.single:
                return float(value)
            return value.to(self.y.dtype.to_real()) if value.ndim else value
        ok = interop.is_scalar(value) and not isinstance(value, complex)
        if not ok or not (float(value) > 0 if positive else float(value) >= 0) or math.isinf(float(value)):
            raise ArgumentError(f"{self.owner}: {name} must be a finite number {bound}; got {value!r}")
        return float(value)

    def finish(self, x: Tensor) -> Any:
        """Give x the form in which y came."""
        if self.dtype in _HALF:
            x = x.to(self.dtype)
        if self.is_flat:
            x = x.reshape(*self.batch, size(self.A.dims))
        return x.detach().resolve_conj().cpu().numpy() if self.is_numpy else x


def _enter(v: Any, dims: tuple[int, ...], owner: str, name: str, what: str) -> tuple[Tensor, bool, tuple[int, ...]]:
    """Return v as a tensor of shape (*batch, *dims), whether it was flat, and its batch."""
    t = interop.share(v, f"{owner}: {name}") if isinstance(v, np.ndarray) else v
    if not isinstance(t, Tensor):
        raise DtypeError(f"{owner}: {name} must be a torch tensor or a NumPy array; got {type(v).__name__}")
    if not (t.is_floating_point() or t.is_complex()):
        raise DtypeError(f"{owner}: {name} must be floating point or complex; got {t.dtype}; use {name}.float()")
    n = len(dims)
    if t.shape[-n:] == dims:
        return t, False, tuple(t.shape[: t.ndim - n])
    if t.ndim and t.shape[-1] == size(dims):
        return t.reshape(*t.shape[:-1], *dims), True, tuple(t.shape[:-1])
    raise ShapeError(
        f"{owner}: {name} must have shape (..., {', '.join(map(str, dims))}), {what}"
        + (f", or (..., {size(dims)})" if n > 1 else "")
        + f"; got {tuple(t.shape)}; leading axes are the batch"
    )


def flat(x: Tensor, n: int) -> Tensor:
    """The members as real vectors: shape (*batch, number of real elements)."""
    if x.is_complex():  # torch's complex reductions are slow (norm of 1024 x 1024: 16 ms against 0.1 ms)
        x, n = torch.view_as_real(x.resolve_conj()), n + 1
    return x.flatten(-n) if n > 1 else x


def square(x: Tensor, n: int, live: bool) -> Tensor:
    """|x|^2 of each member, over the last n axes; differentiable if live."""
    if not live:
        return norm(x, n).square_()
    v = flat(x, n)
    return (v * v).sum(-1)


def norm(x: Tensor, n: int) -> Tensor:
    """|x|_2 of each member, without derivative.

    In chunks, since a float32 norm over 1e7 elements in one go is wrong by 2e-4 in torch.
    """
    v = flat(x.detach(), n)
    length = v.shape[-1]
    if length > 2 * _CHUNK:
        whole = length // _CHUNK * _CHUNK
        rows = torch.linalg.vector_norm(v[..., :whole].unflatten(-1, (-1, _CHUNK)), dim=-1)
        if whole < length:
            rest = torch.linalg.vector_norm(v[..., whole:], dim=-1, keepdim=True)
            rows = torch.cat((rows, rest), -1)
        v = rows
    return torch.linalg.vector_norm(v, dim=-1)


def dot(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Re <x, y> of each member, over the last n axes."""
    return (flat(x, n) * flat(y, n)).sum(-1)


def _real_vector(v: Tensor) -> Tensor:
    if v.is_complex():
        v = torch.view_as_real(v.resolve_conj())
    return v if v.ndim == 1 else v.reshape(-1)


def _single_norm(v: Tensor) -> float:
    if v.numel() > 2 * _CHUNK:
        return norm(v, v.ndim).item()
    return torch.linalg.vector_norm(v if v.ndim == 1 and not v.is_complex() else _real_vector(v)).item()


def length(x: Tensor, n: int, live: bool) -> Tensor:
    """|x|_2 of each member; differentiable if live (with derivative zero at zero)."""
    if not live:
        return norm(x, n)
    squares = square(x, n, live)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def add_scaled(x: Tensor, c: Any, p: Tensor, out: Tensor | None) -> Tensor:
    """The sum x + c p, for a number or a tensor c that broadcasts against them, in one pass."""
    if isinstance(c, float):
        return torch.add(x, p, alpha=c) if out is None else torch.add(x, p, alpha=c, out=out)
    if isinstance(c, Tensor):
        return torch.addcmul(x, c, p, out=out)
    return torch.add(x, p, alpha=c, out=out)
