"""Interpolation of regularly sampled signals at arbitrary positions, differentiable in the positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pullback.core import autograd
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axis, as_dims, real_of
from pullback.linops.axes import matrix_along

_KINDS = ("linear", "nearest", "sinc", "cubic_spline")


class _Sampling(LinearOperator):
    """Operators that hold positions `iava`; what they derive from it is kept until it changes."""

    _half = False
    iava: Tensor

    def _derived(self, key: str, x: Tensor, function: Any) -> Tensor:
        """function(iava) in the precision of x."""
        if self.iava.device != x.device:
            self._cast(self.iava, x)  # raises
        dtype = real_of(x.dtype)
        return self._cached((key, dtype), self.iava, lambda t: function(t).to(dtype))

    def _left(self, n: int, row: int | None = None) -> Tensor:
        """The sample to the left of each position, at most n - 2, so that its right neighbour exists."""
        positions = self.iava if row is None else self.iava[row]
        return positions.detach().floor().clamp(0, max(n - 2, 0)).long()

    def _index(self, key: str, function: Any) -> Tensor:
        return self._cached(key, self.iava, function)


class Interp(_Sampling):
    """y[i] = sum_j w(iava[i] - j) x[j] along one axis: the signal at fractional positions.

    Args:
        dims: shape of the input.
        iava: positions of shape (m,) [samples], in [0, n - 1]; they may repeat and need no order. Gradients reach them
            for `linear`, `sinc` and `cubic_spline`. Kept as the attribute `iava`, rounded to integers for `nearest`.
        axis: axis along which to interpolate.
        kind: "linear"; "nearest" (halves go to the even sample); "sinc", w(t) = sin(pi t) / (pi t); "cubic_spline", the
            natural cubic spline through all samples.
        tol: for "sinc", weights below this magnitude are set to zero.
        dtype: what `.dtype` reports.

    PyLops returns the tuple (operator, iava); this is the operator alone. A position on the last sample is that sample
    exactly. At an integer position the derivative of `linear` is that of the interval to the right.

    Raises: ArgumentError for positions outside the signal; NotDifferentiableError for `nearest` with positions that
    require grad.

    Cost: O(m) a trace for linear and nearest; O(m n) for sinc; O(m + n log n) for the spline.
    """

    def __init__(
        self,
        dims: Dims,
        iava: Any,
        axis: int = -1,
        kind: str = "linear",
        tol: float | None = None,
        *,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        self_axis = as_axis(axis, len(dims), name)
        if kind not in _KINDS:
            raise ArgumentError(f"{name}: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
        if tol is not None and kind != "sinc":
            raise ArgumentError(f"{name}: tol applies to kind='sinc' only; got tol={tol} with kind={kind!r}")
        iava = as_tensor(iava, "iava", name)
        n = dims[self_axis]
        if iava.ndim != 1 or iava.numel() == 0 or iava.is_complex():
            raise ArgumentError(f"{name}: iava must be a real vector of positions; got shape {tuple(iava.shape)}")
        if kind == "nearest" and iava.requires_grad:
            raise NotDifferentiableError(
                f"{name}: kind='nearest' has no derivative in iava; use 'linear' or iava.detach()"
            )
        if kind == "nearest":
            iava = iava.round().long()  # integers, so that nobody can ask for a gradient
        _check_positions(iava, n, name, "iava")
        if kind == "cubic_spline" and n < 3:
            raise ArgumentError(f"{name}: kind='cubic_spline' needs at least 3 samples along the axis; got {n}")
        dimsd = list(dims)
        dimsd[self_axis] = iava.shape[0]
        super().__init__(dims, dimsd, dtype=dtype)
        self.axis, self.kind, self.tol, self.iava = self_axis, kind, tol, iava
        self._n = n

    def _forward(self, x: Tensor) -> Tensor:
        a = self.axis
        if self.kind == "nearest":
            return x.index_select(a, self.iava)
        if self.kind == "sinc":
            return matrix_along(self._derived("sinc", x, self._sinc_matrix), x, a)
        left = self._index("left", lambda _: self._left(self._n))
        right = (left + 1).clamp(max=self._n - 1)
        w = self._align(self._derived("weights", x, lambda t: t - left))
        y = torch.lerp(x.index_select(a, left), x.index_select(a, right), w.to(x.dtype))
        if self.kind == "linear":
            return y
        curve = _curvature(x, a)
        v = 1 - w
        return y + (v**3 - v) * curve.index_select(a, left) + (w**3 - w) * curve.index_select(a, right)

    def _adjoint(self, y: Tensor) -> Tensor:
        a = self.axis
        x = y.new_zeros(*y.shape[: y.ndim + a], self._n, *y.shape[y.ndim + a + 1 :])
        if self.kind == "nearest":
            return x.index_add(a, self.iava, y)
        if self.kind == "sinc":
            return matrix_along(self._derived("sinc", y, self._sinc_matrix).mT, y, a)
        left = self._index("left", lambda _: self._left(self._n))
        right = (left + 1).clamp(max=self._n - 1)
        w = self._align(self._derived("weights", y, lambda t: t - left))
        v = 1 - w
        result = x.index_add(a, left, v * y).index_add(a, right, w * y)
        if self.kind == "linear":
            return result
        curve = x.index_add(a, left, (v**3 - v) * y).index_add(a, right, (w**3 - w) * y)
        return result + _curvature(curve, a, adjoint=True)

    def _align(self, w: Tensor) -> Tensor:
        """Weights as a factor along the axis."""
        return w.reshape(-1, *(1,) * (-self.axis - 1))

    def _sinc_matrix(self, iava: Tensor) -> Tensor:
        matrix = _sinc(iava[:, None] - torch.arange(self._n, dtype=iava.dtype, device=iava.device))
        return matrix if self.tol is None else torch.where(matrix.abs() < self.tol, 0, matrix)

    def _norm_bound(self) -> float | None:
        """sqrt(|A|_1 |A|_inf)."""
        if self.kind == "cubic_spline":
            return None
        with torch.no_grad():
            if self.kind == "sinc":
                weights = self._sinc_matrix(self.iava.detach().double()).abs()
                return math.sqrt(float(weights.sum(0).max()) * float(weights.sum(1).max()))
            ones = torch.ones((1,) * (len(self.dims) + self.axis) + (self.iava.shape[0],), dtype=torch.float64)
            ones = ones.reshape(-1, *(1,) * (-self.axis - 1)).to(self.iava.device)
            return math.sqrt(float(self._adjoint(ones).max()))

    def extra_repr(self) -> str:
        """Shapes, kind and axis."""
        return f"{super().extra_repr()}, {self.kind}, axis {self.axis}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        iava = torch.tensor([0.3, 2.5, 2.5, 3.9, 1.2], dtype=torch.float64)
        yield cls(6, iava)
        yield cls((5, 4), iava[:3], axis=0)
        yield cls((3, 7), iava, kind="nearest")
        yield cls((6, 3), iava, axis=0, kind="sinc")
        yield cls((5, 2, 3), iava, axis=0, kind="cubic_spline")


class Bilinear(_Sampling):
    """y[i] = x at the position (iava[0, i], iava[1, i]) between the four nearest samples of the first two axes.

    Args:
        iava: positions of shape (2, n_points) [samples], in [0, dims[0] - 1] and [0, dims[1] - 1]; they may repeat.
            Gradients reach them.
        dims: shape of the input, at least two axes; the output has shape (n_points, *dims[2:]).
        dtype: what `.dtype` reports.

    At an integer position the derivative is that of the cell to the right and below.

    Raises: ArgumentError for positions outside the signal.

    Cost: four gathers of n_points samples; the adjoint adds at four places.
    """

    def __init__(self, iava: Any, dims: Dims, *, dtype: Any = None) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        iava = as_tensor(iava, "iava", name)
        if len(dims) < 2:
            raise ArgumentError(f"{name}: dims must have at least two axes; got {dims}")
        if iava.ndim != 2 or iava.shape[0] != 2 or iava.shape[1] == 0 or iava.is_complex():
            raise ArgumentError(f"{name}: iava must be real with shape (2, n_points); got shape {tuple(iava.shape)}")
        for k in range(2):
            _check_positions(iava[k], dims[k], name, f"iava[{k}]")
        super().__init__(dims, (iava.shape[1], *dims[2:]), dtype=dtype)
        self.iava = iava

    def _corners(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each corner: its index into the two merged axes, and its weight."""
        n0, n1 = self.dims[:2]
        top = self._index("top", lambda _: self._left(n0, 0))
        left = self._index("left", lambda _: self._left(n1, 1))
        shape = (-1, *(1,) * (len(self.dims) - 2))
        w0 = self._derived("weights 0", like, lambda t: t[0] - top).reshape(shape)
        w1 = self._derived("weights 1", like, lambda t: t[1] - left).reshape(shape)
        bottom, right = (top + 1).clamp(max=n0 - 1) * n1, (left + 1).clamp(max=n1 - 1)
        top = top * n1
        yield top + left, (1 - w0) * (1 - w1)
        yield top + right, (1 - w0) * w1
        yield bottom + left, w0 * (1 - w1)
        yield bottom + right, w0 * w1

    def _forward(self, x: Tensor) -> Tensor:
        axis = 1 - len(self.dims)
        x = x.flatten(axis - 1, axis)
        (i, w), *rest = self._corners(x)
        y = x.index_select(axis, i) * w
        for i, w in rest:
            y = y + x.index_select(axis, i) * w
        return y

    def _adjoint(self, y: Tensor) -> Tensor:
        axis = 1 - len(self.dims)
        x = y.new_zeros(*y.shape[: y.ndim + axis], self.dims[0] * self.dims[1], *self.dims[2:])
        for i, w in self._corners(y):
            x = x.index_add(axis, i, w * y)
        return x.unflatten(axis, self.dims[:2])

    def _norm_bound(self) -> float | None:
        with torch.no_grad():  # rows sum to 1, so |A|_2^2 <= the largest column sum
            return math.sqrt(float(self._adjoint(self.iava.detach().new_ones(self.dimsd, dtype=torch.float64)).max()))

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        iava = torch.tensor([[0.3, 2.5, 2.5, 2.9], [1.1, 0.2, 0.2, 3.9]], dtype=torch.float64)
        yield cls(iava, (4, 5))
        yield cls(iava[:, :3], (4, 5, 2))


def _check_positions(iava: Tensor, n: int, owner: str, name: str) -> None:
    if torch.compiler.is_compiling() or not autograd.is_eager(iava):
        return  # no values to look at; positions outside are then extrapolated from the nearest interval
    low, high = float(iava.detach().min()), float(iava.detach().max())
    if not (low >= 0 and high <= n - 1):
        raise ArgumentError(
            f"{owner}: {name} must lie in [0, {n - 1}], the positions of the {n} samples; got values from {low:g} to "
            f"{high:g}; clamp them or enlarge dims"
        )


def _sinc(t: Tensor) -> Tensor:
    """sin(pi t) / (pi t) with right derivatives of every order at 0, where torch.sinc's second derivative is nan."""
    u = math.pi * t
    near = u.abs() < 0.5
    s = torch.where(near, u, 0) ** 2
    series = torch.zeros_like(s)
    for k in range(9, -1, -1):
        series = series * s + (-1) ** k / math.factorial(2 * k + 1)
    far = torch.where(near, 1, u)
    return torch.where(near, series, far.sin() / far)


def _curvature(x: Tensor, axis: int, adjoint: bool = False) -> Tensor:
    """1/6 of the natural cubic spline's second derivative at the knots, zero at both ends; or the adjoint of that map.

    (1, 4, 1) c = second difference of x. The matrix has the eigenvectors sin(pi j k / (N + 1)) and the eigenvalues
    4 + 2 cos(pi k / (N + 1)), so an FFT of the odd extension solves it; it is symmetric.
    """
    if x.is_complex():
        return torch.complex(_curvature(x.real, axis, adjoint), _curvature(x.imag, axis, adjoint))
    x = x.movedim(axis, -1)
    n = x.shape[-1] - 2
    if not x.numel():  # an empty batch, which MKL refuses
        return x.movedim(-1, axis).clone()
    rhs = x[..., 1:-1] if adjoint else x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]
    zero = torch.zeros_like(rhs[..., :1])
    odd = torch.cat([zero, rhs, zero, -rhs.flip(-1)], -1)
    k = torch.arange(n + 2, device=x.device, dtype=x.dtype)
    spectrum = torch.fft.rfft(odd) / (4 + 2 * torch.cos(math.pi * k / (n + 1)))
    c = torch.fft.irfft(spectrum, n=2 * (n + 1))[..., 1 : n + 1]
    if adjoint:
        pad = torch.nn.functional.pad
        c = pad(c, (2, 0)) - 2 * pad(c, (1, 1)) + pad(c, (0, 2))
    else:
        c = torch.nn.functional.pad(c, (1, 1))
    return c.movedim(-1, axis).contiguous()
