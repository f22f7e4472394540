"""Operators that select, move, weigh or sum elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axes, as_axis, as_dims, complex_of, real_of, size


class Identity(LinearOperator):
    """y = x, or the first N elements of x, or x followed by zeros.

    Args:
        N: output shape (rows).
        M: input shape (columns); as N if None. If the sizes differ, both are flat: N < M truncates, N > M pads.
        dtype: what `.dtype` reports.

    The result never shares memory with the input.
    """

    _native = True
    _aliases = True

    def __init__(self, N: Dims, M: Dims | None = None, *, dtype: Any = None) -> None:
        out = as_dims(N, "N", "Identity")
        given = out if M is None else as_dims(M, "M", "Identity")
        if size(out) != size(given):
            out, given = (size(out),), (size(given),)
        super().__init__(given, out, dtype=dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return _resize(x, self.dims, self.dimsd)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _resize(y, self.dimsd, self.dims)

    def _norm_bound(self) -> float:
        return 1.0

    def _coisometry(self) -> float | None:
        return 1.0 if self.shape[0] <= self.shape[1] else None

    def _isometry(self) -> float | None:
        return 1.0 if self.shape[0] >= self.shape[1] else None

    def _is_square(self) -> bool:
        return self.dims == self.dimsd

    def _compose_left(self, right: LinearOperator) -> LinearOperator | None:
        return right if self._is_square() else None

    def _compose_right(self, left: LinearOperator) -> LinearOperator | None:
        return left if self._is_square() else None

    def _gram(self) -> LinearOperator:
        return self if self._is_square() else super()._gram()

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Square, padding, truncating."""
        yield cls((3, 4))
        yield cls(5, 3)
        yield cls(3, 5)


def _resize(x: Tensor, dims: tuple[int, ...], dimsd: tuple[int, ...]) -> Tensor:
    if dims == dimsd:
        return x
    n, m = size(dims), size(dimsd)
    if n == m:
        return x.reshape(*x.shape[: x.ndim - len(dims)], *dimsd)
    return x[..., :m] if m < n else torch.nn.functional.pad(x, (0, m - n))


class Zero(LinearOperator):
    """y = 0.

    Args:
        N: output shape (rows).
        M: input shape (columns); as N if None.
        dtype: what `.dtype` reports.
    """

    _native = True

    def __init__(self, N: Dims, M: Dims | None = None, *, dtype: Any = None) -> None:
        super().__init__(N if M is None else M, N, dtype=dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return _zeros(x, self.dims, self.dimsd)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _zeros(y, self.dimsd, self.dims)

    def _norm_bound(self) -> float:
        return 0.0

    def _compose_left(self, right: LinearOperator) -> LinearOperator:
        return Zero(self.dimsd, right.dims)

    def _compose_right(self, left: LinearOperator) -> LinearOperator:
        return Zero(left.dimsd, self.dims)

    def _add_left(self, right: LinearOperator) -> LinearOperator:
        return right

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Square and rectangular."""
        yield cls((2, 3))
        yield cls(4, (2, 3))


def _zeros(x: Tensor, dims: tuple[int, ...], dimsd: tuple[int, ...]) -> Tensor:
    # Made from x, so that autograd returns a zero gradient and vmap a batch. (x * 0 would carry nan.)
    batch = x.shape[: x.ndim - len(dims)]
    empty = x.reshape(*batch, size(dims))[..., :0].sum(-1)
    return empty.reshape(*batch, *(1,) * len(dimsd)).expand(*batch, *dimsd).clone()


class Diagonal(LinearOperator):
    """y = d x, element by element.

    Args:
        diag: the diagonal d, with gradient if it requires grad: shape dims, or one axis that is broadcast along the
            others.
        dims: input shape; as diag if None.
        axis: which axis of dims a one-dimensional `diag` belongs to.
        dtype: what `.dtype` reports.

    Raises: ArgumentError.
    """

    _native = True

    def __init__(self, diag: Any, dims: Dims | None = None, axis: int = -1, *, dtype: Any = None) -> None:
        d = as_tensor(diag, "diag", "Diagonal")
        shape = as_dims(tuple(d.shape) if dims is None else dims, "dims", "Diagonal")
        super().__init__(shape, dtype=dtype)
        a = as_axis(axis, len(shape), "Diagonal")
        if tuple(d.shape) != shape:
            if d.ndim == 1 and d.shape[0] == shape[a]:
                d = d.reshape(-1, *(1,) * (-a - 1))
            elif d.numel() == size(shape):
                d = d.reshape(shape)
            elif d.ndim > len(shape) or any(s not in (1, n) for s, n in zip(d.shape[::-1], shape[::-1], strict=False)):
                raise ArgumentError(
                    f"Diagonal: diag must have shape {shape}, or ({shape[a]},) for axis {axis}; got {tuple(d.shape)}"
                )
        self.diag = d

    def _forward(self, x: Tensor) -> Tensor:
        return x * self._cast(self.diag, x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return y * self._cast(self.diag, y).conj()

    def _norm_bound(self) -> float:
        return float(self.diag.detach().abs().max())

    def _gram(self) -> LinearOperator:
        return Diagonal((self.diag.conj() * self.diag).real if self.diag.is_complex() else self.diag**2, self.dims)

    def _compose_left(self, right: LinearOperator) -> LinearOperator | None:
        return Diagonal(self.diag * right.diag, self.dims) if isinstance(right, Diagonal) else None

    def _add_left(self, right: LinearOperator) -> LinearOperator | None:
        if isinstance(right, Diagonal):
            return Diagonal(self.diag + right.diag, self.dims)
        return Diagonal(self.diag + 1, self.dims) if isinstance(right, Identity) else None

    def _scale(self, factor: Any) -> LinearOperator:
        return Diagonal(factor * self.diag, self.dims)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Full, broadcast, complex, with gradient."""
        g = torch.Generator().manual_seed(0)
        yield cls(torch.randn(5, dtype=torch.float64, generator=g))
        yield cls(torch.randn(3, dtype=torch.float64, generator=g), dims=(3, 4), axis=0)
        yield cls(torch.randn(3, 4, dtype=torch.complex128, generator=g))
        yield cls(torch.randn(4, dtype=torch.float64, generator=g).requires_grad_())


class Restriction(LinearOperator):
    """y[k] = x[iava[k]] along one axis; the adjoint adds repeated entries up.

    Args:
        dims: input shape.
        iava: indices along the axis, in any order, negative ones from the end, repeats allowed.
        axis: the axis that is sampled.
        dtype: what `.dtype` reports.

    Raises: ArgumentError.
    """

    _native = True

    def __init__(self, dims: Dims, iava: Any, axis: int = -1, *, dtype: Any = None) -> None:
        shape = as_dims(dims, "dims", "Restriction")
        a = as_axis(axis, len(shape), "Restriction")
        index = torch.as_tensor(iava).clone()
        if index.dtype == torch.bool and index.shape == (shape[a],):
            index = index.nonzero().flatten()
        if index.ndim != 1 or index.numel() == 0 or index.is_floating_point() or index.is_complex():
            raise ArgumentError(
                f"Restriction: iava must be a non-empty list of integer indices, or a mask of the axis; got "
                f"{index.dtype} of shape {tuple(index.shape)}"
                + (
                    "; for a mask of the whole array write Restriction(mask.numel(), mask.flatten()) @ "
                    "Identity(mask.shape), or Diagonal(mask.float())"
                    if index.dtype == torch.bool and index.ndim > 1
                    else ""
                )
            )
        n = shape[a]
        if int(index.min()) < -n or int(index.max()) >= n:
            raise ArgumentError(
                f"Restriction: iava must lie in [{-n}, {n - 1}]; got values from {int(index.min())} to "
                f"{int(index.max())}"
            )
        out = list(shape)
        out[a] = index.numel()
        super().__init__(shape, out, dtype=dtype)
        self.axis = a
        self.iava = torch.where(index < 0, index + n, index).long()
        self._repeats = int(torch.bincount(self.iava).max())

    def _forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.iava)

    def _adjoint(self, y: Tensor) -> Tensor:
        shape = list(y.shape)
        shape[self.axis] = self.dims[self.axis]
        return y.new_zeros(shape).index_add(self.axis, self.iava, y)

    def mask(self, x: Tensor) -> Tensor:
        """X where it is sampled, zero elsewhere; shape (..., *dims)."""
        seen = torch.zeros(self.dims[self.axis], dtype=torch.bool, device=self.iava.device)
        seen[self.iava] = True
        return x * seen.reshape(-1, *(1,) * (-self.axis - 1))

    def _norm_bound(self) -> float:
        return float(self._repeats**0.5)

    def _coisometry(self) -> float | None:
        return 1.0 if self._repeats == 1 else None

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Ordered, repeated, along the first axis."""
        yield cls(6, [0, 2, 5])
        yield cls((4, 3), [3, 1, 1, -1], axis=0)


class Pad(LinearOperator):
    """y = x surrounded by zeros; the adjoint crops.

    Args:
        dims: input shape.
        pad: (before, after) for one axis, or one such pair for each axis.
        dtype: what `.dtype` reports.

    Raises: ArgumentError.
    """

    _native = True

    def __init__(self, dims: Dims, pad: Sequence[int] | Sequence[Sequence[int]], *, dtype: Any = None) -> None:
        shape = as_dims(dims, "dims", "Pad")
        pairs: Any = [pad] if all(isinstance(p, int) for p in pad) else list(pad)
        if len(pairs) != len(shape) or any(len(p) != 2 or min(p) < 0 for p in pairs):
            raise ArgumentError(
                f"Pad: pad must be one (before, after) pair of sizes >= 0 for each of {len(shape)} axes; got {pad}"
            )
        super().__init__(shape, [n + int(a) + int(b) for n, (a, b) in zip(shape, pairs, strict=True)], dtype=dtype)
        self.pad = tuple((int(a), int(b)) for a, b in pairs)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, [v for pair in reversed(self.pad) for v in pair])

    def _adjoint(self, y: Tensor) -> Tensor:
        for k, (before, _) in enumerate(self.pad):
            y = y.narrow(k - len(self.dims), before, self.dims[k])
        return y.clone(memory_format=torch.contiguous_format)

    def _norm_bound(self) -> float:
        return 1.0

    def _isometry(self) -> float:
        return 1.0

    def _coisometry(self) -> float | None:
        return 1.0 if self.dims == self.dimsd else None

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """One and two axes."""
        yield cls(4, (2, 1))
        yield cls((3, 2), ((0, 1), (2, 0)))


class Flip(LinearOperator):
    """y[i] = x[n-1-i] along one axis, or along several.

    Args:
        dims: input shape.
        axis: the axis (or axes) that is reversed.
        dtype: what `.dtype` reports.
    """

    _native = True

    def __init__(self, dims: Dims, axis: int | Sequence[int] = -1, *, dtype: Any = None) -> None:
        super().__init__(dims, dtype=dtype)
        self.axes = as_axes(axis, len(self.dims), "Flip", "axis")

    def _forward(self, x: Tensor) -> Tensor:
        return x.flip(self.axes)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    def _norm_bound(self) -> float:
        return 1.0

    def _coisometry(self) -> float:
        return 1.0

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """One axis, two axes."""
        yield cls((3, 4))
        yield cls((3, 4), axis=(0, 1))


class Roll(LinearOperator):
    """y[i] = x[(i - shift) mod n] along one axis.

    Args:
        dims: input shape.
        axis: the axis that is shifted.
        shift: by how many samples.
        dtype: what `.dtype` reports.
    """

    _native = True

    def __init__(self, dims: Dims, axis: int = -1, shift: int = 1, *, dtype: Any = None) -> None:
        super().__init__(dims, dtype=dtype)
        self.axis = as_axis(axis, len(self.dims), "Roll")
        self.shift = int(shift)

    def _forward(self, x: Tensor) -> Tensor:
        return x.roll(self.shift, self.axis)

    def _adjoint(self, y: Tensor) -> Tensor:
        return y.roll(-self.shift, self.axis)

    def _norm_bound(self) -> float:
        return 1.0

    def _coisometry(self) -> float:
        return 1.0

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Forward and backward."""
        yield cls(5, shift=2)
        yield cls((4, 3), axis=0, shift=-1)


class Transpose(LinearOperator):
    """y = x with its axes in another order.

    Args:
        dims: input shape.
        axes: output axis k is input axis axes[k]; all axes must occur.
        dtype: what `.dtype` reports.

    Raises: ArgumentError.
    """

    _native = True
    _aliases = True

    def __init__(self, dims: Dims, axes: Sequence[int], *, dtype: Any = None) -> None:
        shape = as_dims(dims, "dims", "Transpose")
        order = as_axes(axes, len(shape), "Transpose")
        if len(order) != len(shape):
            raise ArgumentError(f"Transpose: axes must name all {len(shape)} axes; got {tuple(axes)}")
        super().__init__(shape, [shape[a] for a in order], dtype=dtype)
        self.axes = order
        back = [0] * len(order)
        for k, a in enumerate(order):
            back[a] = k - len(order)
        self._back = tuple(back)

    def _permute(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        batch = x.ndim - len(axes)
        return x.permute(*range(batch), *(a + x.ndim for a in axes))

    def _forward(self, x: Tensor) -> Tensor:
        return self._permute(x, self.axes)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._permute(y, self._back)

    def _norm_bound(self) -> float:
        return 1.0

    def _coisometry(self) -> float:
        return 1.0

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Two and three axes."""
        yield cls((3, 4), (1, 0))
        yield cls((2, 3, 4), (2, 0, 1))


class Sum(LinearOperator):
    """y = sum of x over one axis.

    Args:
        dims: input shape; the output lacks the axis (it is (1,) if there was only one).
        axis: the axis that is summed.
        dtype: what `.dtype` reports.
    """

    _native = True

    def __init__(self, dims: Dims, axis: int = -1, *, dtype: Any = None) -> None:
        shape = as_dims(dims, "dims", "Sum")
        self_axis = as_axis(axis, len(shape), "Sum")
        out = list(shape)
        del out[self_axis]
        super().__init__(shape, out or (1,), dtype=dtype)
        self.axis = self_axis

    def _forward(self, x: Tensor) -> Tensor:
        return x.sum(self.axis, keepdim=len(self.dims) == 1)

    def _adjoint(self, y: Tensor) -> Tensor:
        if len(self.dims) > 1:
            y = y.unsqueeze(self.axis)
        return y.expand(*y.shape[: y.ndim - len(self.dims)], *self.dims).clone(memory_format=torch.contiguous_format)

    def _norm_bound(self) -> float:
        return float(self.dims[self.axis] ** 0.5)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """One, two and three axes."""
        yield cls(4)
        yield cls((3, 4), axis=0)
        yield cls((2, 3, 4), axis=1)


class Symmetrize(LinearOperator):
    """y = (x[n-1], ..., x[1], x[0], x[1], ..., x[n-1]) along one axis.

    Args:
        dims: input shape; the axis grows from n to 2 n - 1.
        axis: the axis that is mirrored.
        dtype: what `.dtype` reports.
    """

    _native = True

    def __init__(self, dims: Dims, axis: int = -1, *, dtype: Any = None) -> None:
        shape = as_dims(dims, "dims", "Symmetrize")
        self_axis = as_axis(axis, len(shape), "Symmetrize")
        out = list(shape)
        out[self_axis] = 2 * shape[self_axis] - 1
        super().__init__(shape, out, dtype=dtype)
        self.axis = self_axis

    def _forward(self, x: Tensor) -> Tensor:
        n = self.dims[self.axis]
        return torch.cat((x.narrow(self.axis, 1, n - 1).flip(self.axis), x), self.axis)

    def _adjoint(self, y: Tensor) -> Tensor:
        n = self.dims[self.axis]
        left = y.narrow(self.axis, 0, n - 1).flip(self.axis)
        right = y.narrow(self.axis, n - 1, n)
        return torch.cat((right.narrow(self.axis, 0, 1), right.narrow(self.axis, 1, n - 1) + left), self.axis)

    def _norm_bound(self) -> float:
        return 2.0**0.5

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Both axes, and a single sample."""
        yield cls(3)
        yield cls((3, 2), axis=0)
        yield cls((2, 1))


class _RealLinear(LinearOperator):
    """Linear over the reals only."""

    _native = True
    _aliases = True
    _clinear = False

    def __init__(self, dims: Dims, *, dtype: Any = None) -> None:
        super().__init__(dims, dtype="complex128" if dtype is None else dtype)

    def _norm_bound(self) -> float:
        return 1.0

    def _coisometry(self) -> float:
        return 1.0

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """One and two axes."""
        if cls is not _RealLinear:
            yield cls(4)
            yield cls((2, 3))


def _as_complex(real: Tensor | None, imag: Tensor | None) -> Tensor:
    given = real if real is not None else imag
    assert given is not None, "one part must be given; please report"
    dtype = real_of(complex_of(given.dtype))
    zero = torch.zeros_like(given, dtype=dtype)
    return torch.complex(zero if real is None else real.to(dtype), zero if imag is None else imag.to(dtype))


class Real(_RealLinear):
    """y = Re x, from C^n to R^n; the adjoint is y -> y + 0i.

    Linear over the reals: Re<A x, y> = Re<x, A.H y>.
    """

    _real_range = True

    def _forward(self, x: Tensor) -> Tensor:
        return x.real if x.is_complex() else x

    def _adjoint(self, y: Tensor) -> Tensor:
        return _as_complex(y, None)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return _flip_dtype(dtype, adjoint)


class Imag(_RealLinear):
    """y = Im x, from C^n to R^n; the adjoint is y -> 0 + i y.

    Linear over the reals: Re<A x, y> = Re<x, A.H y>.
    """

    _real_range = True

    def _forward(self, x: Tensor) -> Tensor:
        return (x if x.is_complex() else x.to(complex_of(x.dtype))).imag.to(self._out_dtype(x.dtype, False))

    def _adjoint(self, y: Tensor) -> Tensor:
        return _as_complex(None, y)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return _flip_dtype(dtype, adjoint)


class Conj(_RealLinear):
    """y = conj(x); it is its own adjoint.

    Linear over the reals: Re<A x, y> = Re<x, A.H y>.
    """

    def _forward(self, x: Tensor) -> Tensor:
        return torch.conj_physical(x) if x.is_complex() else x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)


def _flip_dtype(dtype: torch.dtype, adjoint: bool) -> torch.dtype:
    return complex_of(dtype) if adjoint else real_of(dtype)
