"""Convolution with a compact kernel along one or several axes, zero outside the signal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.core.errors import ArgumentError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axes, as_axis, as_dims, complex_of, real_of, size
from pullback.linops.axes import matrix_along

_BLOCK = 1 << 16  # elements that shift-add works on at a time, so that every tap finds them in cache
_TOEPLITZ = 128  # a single axis up to this length is convolved by one matrix product
_IMAGE = 1 << 18  # elements from which transforms of tiles beat the transform of the whole
_TILE_MAX = 512
_TILES = 1 << 18  # elements of the tiles that are transformed at a time


def next_fast_len(n: int) -> int:
    """The smallest even 2^a 3^b 5^c 7^d >= n (n itself for n <= 2): lengths that FFT libraries transform fast."""
    if n <= 2:
        return n
    best = 1 << (n - 1).bit_length()
    seven = 1
    while seven < best:
        five = seven
        while five < best:
            three = five
            while three < best:
                candidate = three * 2 ** max(1, (-(-n // three) - 1).bit_length())
                best = min(best, candidate)
                three *= 3
            five *= 5
        seven *= 7
    return best


class _Convolution(LinearOperator):
    """y[i] = sum_k h[k] x[i + offset - k] along `axes`: what the public classes share.

    `kernel_axes` are the axes of h that are convolved, in the order of `axes`; where h has as many axes as `dims`, its
    other axes broadcast.
    """

    _half = False

    def __init__(
        self,
        dims: tuple[int, ...],
        dimsd: tuple[int, ...],
        h: Tensor,
        offset: Sequence[int],
        axes: tuple[int, ...],
        method: str | None,
        dtype: Any,
    ) -> None:
        super().__init__(dims, dimsd, dtype=dtype)
        self.h = h
        self.axes, self.offset = axes, tuple(offset)
        n = len(self.dims)
        self._full = h.ndim == n and len(axes) < n
        order = sorted(range(len(axes)), key=lambda k: axes[k])
        self._order = tuple(order)
        self._axes = tuple(axes[k] for k in order)
        # Only taps that reach from some input sample to some output sample count; the others are cut off.
        crops: list[tuple[int, int, int]] = []  # first tap, number of taps, offset counted from the first tap
        for k in order:
            a, o = axes[k], self.offset[k]
            taps = h.shape[a] if self._full else h.shape[k]
            first, last = max(0, o - self.dims[a] + 1), min(taps - 1, o + self.dimsd[a] - 1)
            if first > last:
                raise ArgumentError(
                    f"{type(self).__name__}: offset {o} on axis {a} leaves no tap of the kernel ({taps} taps) over the "
                    f"signal ({self.dims[a]} samples); choose it in [0, {taps - 1}]"
                )
            crops.append((first, last - first + 1, o - first))
        self._crops = tuple(crops)
        # Circular convolution of this length equals the linear one on the samples that are kept.
        self._sizes = tuple(
            next_fast_len(max(self.dims[a] + m - 1 - o, self.dimsd[a] + o, self.dims[a], self.dimsd[a], m))
            for a, (_, m, o) in zip(self._axes, self._crops, strict=True)
        )
        self.method = self._choose(method)

    def _choose(self, method: str | None) -> str:
        """`toeplitz`, `direct` or `fft`, by times measured on one CPU thread (float32).

        A tap of shift-add costs 1.5 us + 0.16 ns a sample, the FFT 40 us + 4 ns a sample.
        """
        taps = math.prod(m for _, m, _ in self._crops)
        n = max(size(self.dims), size(self.dimsd))
        if method == "direct" and self._full:
            name = type(self).__name__
            raise ArgumentError(f"{name}: method 'direct' needs a kernel without broadcast axes; use 'fft'")
        if method == "fft" or self._full:
            return "fft"
        axis = self._axes[0]
        if len(self._axes) == 1 and max(self.dims[axis], self.dimsd[axis]) <= _TOEPLITZ:
            return "toeplitz"
        return "direct" if method == "direct" or taps * (1500 + 0.16 * n) < 40_000 + 4 * n else "fft"

    # Kernel --------------------------------------------------------------------------------------------------------

    def _compact(self, h: Tensor) -> Tensor:
        """The taps that count, with the axes of `dims`."""
        if not self._full:
            h = h.permute(self._order)
            shape = [1] * len(self.dims)
            for a, taps in zip(self._axes, h.shape, strict=True):
                shape[a] = taps
            h = h.reshape(shape)
        for a, (first, taps, _) in zip(self._axes, self._crops, strict=True):
            h = h.narrow(a, first, taps)
        return h

    def _spectrum_of(self, h: Tensor) -> Tensor:
        """The transform of the kernel, rolled so that the output starts at sample 0."""
        h = self._compact(h)
        pad = [0, 0] * len(self.dims)
        for a, length in zip(self._axes, self._sizes, strict=True):
            pad[2 * (-a - 1) + 1] = length - h.shape[a]
        h = functional.pad(h, pad).roll([-o for _, _, o in self._crops], self._axes)
        return torch.fft.fftn(h, dim=self._axes) if h.is_complex() else torch.fft.rfftn(h, dim=self._axes)

    def _derived(self, key: str, x: Tensor, function: Any) -> Tensor:
        """function(h in the precision of x), kept until h changes."""
        if self.h.device != x.device:
            self._cast(self.h, x)  # raises
        dtype = complex_of(x.dtype) if self.h.is_complex() else real_of(x.dtype)
        return self._cached((key, dtype), self.h, lambda h: function(h.to(dtype)))

    def _norm_bound(self) -> float | None:
        # A is a compression of the circulant matrix of the padded kernel, whose norm is the largest spectral value.
        with torch.no_grad():
            return float(
                self._spectrum_of(self.h.detach().to(torch.promote_types(self.h.dtype, torch.float64))).abs().max()
            )

    # Application ---------------------------------------------------------------------------------------------------

    def _forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._convolve(y, True)

    def _convolve(self, x: Tensor, adjoint: bool) -> Tensor:
        if self.method == "toeplitz":
            return self._by_matrix(x, adjoint)
        if not x.numel():  # an empty batch, which MKL refuses
            dims, dims_out = (self.dimsd, self.dims) if adjoint else (self.dims, self.dimsd)
            return x.new_zeros(*x.shape[: x.ndim - len(dims)], *dims_out, dtype=self._out_dtype(x.dtype, adjoint))
        if self.h.is_complex():
            return self._by_complex_fft(x, adjoint)
        if x.is_complex():
            return torch.complex(self._convolve(x.real, adjoint), self._convolve(x.imag, adjoint))
        live = self._is_live()
        if self.method == "direct" and not live:
            return self._by_taps(x, adjoint)
        tile = self._tile() if x.device.type == "cpu" and not live else None
        if tile is not None:
            return self._by_tiles(x, adjoint, tile)
        key = "adjoint spectrum" if adjoint else "spectrum"
        spectrum = self._derived(key, x, lambda h: _conj(self._spectrum_of(h), adjoint))
        product = torch.fft.rfftn(x, s=self._sizes, dim=self._axes) * spectrum
        return self._crop(torch.fft.irfftn(product, s=self._sizes, dim=self._axes), adjoint)

    def _by_complex_fft(self, x: Tensor, adjoint: bool) -> Tensor:
        key = "adjoint spectrum" if adjoint else "spectrum"
        spectrum = self._derived(key, x, lambda h: _conj(self._spectrum_of(h), adjoint))
        product = torch.fft.fftn(x, s=self._sizes, dim=self._axes) * spectrum
        return self._crop(torch.fft.ifftn(product, dim=self._axes), adjoint)

    def _crop(self, y: Tensor, adjoint: bool) -> Tensor:
        for a in self._axes:
            y = y.narrow(a, 0, (self.dims if adjoint else self.dimsd)[a])
        return y.contiguous()

    def _by_matrix(self, x: Tensor, adjoint: bool) -> Tensor:
        """One axis: the Toeplitz matrix T[i, j] = h[i + offset - j] times the signal."""
        (axis,) = self._axes
        matrix = self._derived("toeplitz", x, self._toeplitz)
        return matrix_along(matrix.mH if adjoint else matrix, x, axis)

    def _toeplitz(self, h: Tensor) -> Tensor:
        (axis,), ((_, taps, offset),) = self._axes, self._crops
        rows = torch.arange(self.dimsd[axis], device=h.device)
        columns = torch.arange(self.dims[axis], device=h.device)
        index = rows[:, None] + offset - columns
        inside = (index >= 0) & (index < taps)
        return torch.where(inside, self._compact(h).flatten()[index.clamp(0, taps - 1)], 0)

    def _by_taps(self, x: Tensor, adjoint: bool) -> Tensor:
        """Sum h[k] times the signal shifted by k over all taps, a block at a time."""
        dims = self.dimsd if adjoint else self.dims
        dims_out = self.dims if adjoint else self.dimsd
        first = self._axes[0]
        lead = x.shape[: x.ndim + first]  # batch, and the axes before the first that is convolved
        x = x.reshape(-1, *dims[first:])
        y = torch.zeros((x.shape[0], *dims_out[first:]), dtype=x.dtype, device=x.device)
        blocked = x.device.type == "cpu"
        taps = self._derived("taps", x, lambda h: self._compact(h).flatten())
        weights = taps.tolist() if blocked else taps.unbind()  # elsewhere the host must not wait for the numbers
        sign = -1 if adjoint else 1
        grids = [[sign * (o - k) for k in range(m)] for _, m, o in self._crops]  # y[i] += h[k] x[i + shift]
        others = [(a - first, dims[a], dims_out[a]) for a in self._axes[1:]]
        plan = []
        for flat, weight in enumerate(weights):
            rest, shifts = flat, []
            for grid in reversed(grids):
                shifts.append(grid[rest % len(grid)])
                rest //= len(grid)
            source, target = [slice(None)] * (x.ndim - 1), [slice(None)] * (x.ndim - 1)
            for (position, n_in, n_out), shift in zip(others, reversed(shifts[:-1]), strict=True):
                start, stop = max(0, -shift), min(n_out, n_in - shift)
                source[position], target[position] = slice(start + shift, stop + shift), slice(start, stop)
                if start >= stop:
                    break
            else:
                plan.append((shifts[-1], weight, source, target))
        n_in, n_out = x.shape[1], y.shape[1]
        inner = max(1, y[0, 0].numel()) if y.numel() else 1
        rows = min(n_out, max(1, _BLOCK // inner)) if blocked else n_out
        images = max(1, _BLOCK // (n_out * inner)) if blocked else x.shape[0]
        for i in range(0, x.shape[0], images):
            xi, yi = x[i : i + images], y[i : i + images]
            for a in range(0, n_out, rows):
                b = min(a + rows, n_out)
                for shift, weight, source, target in plan:
                    start, stop = max(a, -shift), min(b, n_in - shift)
                    if start < stop:
                        source[0], target[0] = slice(start + shift, stop + shift), slice(start, stop)
                        into, read = yi[(slice(None), *target)], xi[(slice(None), *source)]
                        into.add_(read, alpha=weight) if blocked else into.addcmul_(read, weight)
        return y.reshape(*lead, *dims_out[first:])

    def _by_tiles(self, x: Tensor, adjoint: bool, tile: tuple[int, int]) -> Tensor:
        """Large images, small kernel: overlapping tiles, transformed one by one, so that everything stays in cache.

        Of each tile the first taps - 1 rows and columns are wrong by wrapping and dropped (overlap-save). Columns come
        out of torch's FFT transposed, which is why the spectrum is kept transposed.
        """
        taps = [m for _, m, _ in self._crops]
        offsets = [m - 1 - o if adjoint else o for _, m, o in self._crops]

        def transform(h: Tensor) -> Tensor:
            h = self._compact(h).reshape(taps)
            return torch.fft.rfft2(h.flip(0, 1) if adjoint else h, s=tile).mT.contiguous()

        spectrum = self._derived(f"tiles {adjoint}", x, transform)
        (n0, n1), (skip0, skip1) = x.shape[-2:], (m - 1 for m in taps)
        step0, step1 = tile[0] - skip0, tile[1] - skip1
        n_tiles = -(-n1 // step1)
        count = -(-n_tiles // -(-n_tiles * tile[0] * tile[1] // _TILES))  # tiles at a time, in groups of equal size
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        band = x.new_empty(tile[0], (count - 1) * step1 + tile[1])
        tiles = band.unfold(1, tile[1], step1).transpose(0, 1)
        for image, result in zip(x.reshape(-1, n0, n1), out.view(-1, n0, n1), strict=True):
            for i in range(0, n0, step0):
                for j in range(0, n1, count * step1):
                    _cut(image, i + offsets[0] - skip0, j + offsets[1] - skip1, band)
                    product = torch.fft.fft(torch.fft.rfft(tiles), dim=1).mT.mul_(spectrum)
                    product = torch.fft.ifft(product, dim=2).mT[:, skip0:]
                    done = torch.fft.irfft(product, n=tile[1])[:, :, skip1:].transpose(0, 1)
                    rows, columns = min(step0, n0 - i), min(count * step1, n1 - j)
                    whole = columns // step1  # tiles that fit; the last one may not
                    into = result[i : i + rows, j : j + columns]
                    into[:, : whole * step1].unflatten(1, (whole, step1)).copy_(done[:rows, :whole])
                    if columns > whole * step1:
                        into[:, whole * step1 :] = done[:rows, whole, : columns - whole * step1]
        return out

    def _tile(self) -> tuple[int, int] | None:
        """The tile for `_by_tiles`: about eight times the kernel; None where whole transforms are faster (measured)."""
        if self._axes != (-2, -1) or self._full or size(self.dims[-2:]) < _IMAGE:
            return None
        tile = [min(max(64, 1 << (8 * m - 1).bit_length()), _TILE_MAX) for _, m, _ in self._crops]
        if any(4 * m > t or 2 * t > n for t, n, (_, m, _) in zip(tile, self.dims[-2:], self._crops, strict=True)):
            return None
        return tile[0], tile[1]

    def extra_repr(self) -> str:
        """Shapes, kernel size, offset, axes and method."""
        kernel = "x".join(map(str, self.h.shape))
        return (
            f"{super().extra_repr()}, h {kernel}, offset {_show(self.offset)}, axes {_show(self.axes)}, {self.method}"
        )


def _cut(image: Tensor, top: int, left: int, out: Tensor) -> None:
    """Copy image[top:, left:] to `out` as far as it goes, zero outside the image."""
    ranges = []
    for start, n, length in zip((top, left), image.shape, out.shape, strict=True):
        low = min(max(-start, 0), length)
        ranges.append((start, low, max(low, min(length, n - start))))
    (row, r0, r1), (column, c0, c1) = ranges
    if r1 - r0 < out.shape[0] or c1 - c0 < out.shape[1]:
        out.zero_()
    out[r0:r1, c0:c1] = image[row + r0 : row + r1, column + c0 : column + c1]


def _conj(spectrum: Tensor, adjoint: bool) -> Tensor:
    return spectrum.conj().resolve_conj() if adjoint else spectrum


def _show(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else str(values)


def _as_offset(offset: Any, n: int, owner: str) -> tuple[int, ...]:
    values = offset if isinstance(offset, (list, tuple)) or getattr(offset, "ndim", 0) == 1 else (offset,) * n
    try:
        result = tuple(int(o) for o in values)
        whole = all(float(o) == int(o) for o in values)
    except (TypeError, ValueError):
        whole, result = False, ()
    if not whole or len(result) != n:
        raise ArgumentError(f"{owner}: offset must be {n} int{'s' if n > 1 else ''}, one an axis; got {offset!r}")
    return result


def _as_method(method: Any, allowed: tuple[str, ...], owner: str) -> str | None:
    if method is None or method in allowed:
        return method
    raise ArgumentError(f"{owner}: method must be None or one of {', '.join(allowed)}; got {method!r}")


class Convolve1D(_Convolution):
    """y[i] = sum_k h[k] x[i + offset - k] along one axis, for i = 0 ... max(n, n_taps) - 1; x is zero outside.

    With `offset` the index of the kernel's origin, a kernel [.., h[offset] = 1, ..] gives y = x. A kernel longer than
    the signal gives an output as long as the kernel. The adjoint correlates with conj(h).

    Args:
        dims: shape of the input.
        h: kernel of shape (n_taps,); or with as many axes as `dims`, convolved along `axis` and with size 1 or dims on
            the others: one kernel for each trace. Gradients of every order reach it.
        offset: index of the kernel's origin, at most n_taps - 1 (n - 1 for a kernel longer than the signal).
        axis: axis of the convolution.
        method: None or "auto" (chosen by size), "direct" (sum over taps or a small matrix product) or "fft". They agree
            to rounding. PyLops' "overlapadd" is refused: the same result comes from "fft".
        dtype: what `.dtype` reports.

    Raises: ArgumentError, ShapeError, DeviceError.

    Cost: direct O(n n_taps), fft O(n log n) with the kernel's spectrum cached until h changes. Where h requires grad
    the FFT (or matrix product) is used, through autograd.
    """

    def __init__(
        self, dims: Dims, h: Any, offset: int = 0, axis: int = -1, method: str | None = None, *, dtype: Any = None
    ) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        axis = as_axis(axis, len(dims), name)
        h = as_tensor(h, "h", name)
        if h.ndim != 1 and (
            h.ndim != len(dims)
            or any(m not in (1, n) for a, (m, n) in enumerate(zip(h.shape, dims, strict=True)) if a != axis + len(dims))
        ):
            raise ArgumentError(
                f"{name}: h must have shape (n_taps,), or as many axes as dims {dims} with size 1 or dims except on "
                f"axis {axis}; got shape {tuple(h.shape)}"
            )
        if h.numel() == 0:
            raise ArgumentError(f"{name}: h must hold at least one tap; got shape {tuple(h.shape)}")
        if method == "overlapadd":
            raise ArgumentError(f"{name}: method 'overlapadd' is not offered; use 'fft', which gives the same result")
        method = _as_method(method, ("auto", "direct", "fft"), name)
        taps = h.shape[0] if h.ndim == 1 else h.shape[axis]
        (o,) = _as_offset(offset, 1, name)
        limit = min(taps, dims[axis]) if taps > dims[axis] else taps
        if o > limit - 1:
            raise ArgumentError(
                f"{name}: offset must be at most {limit - 1} for {taps} taps on {dims[axis]} samples; got {o}"
            )
        dimsd = list(dims)
        dimsd[axis] = max(taps, dims[axis])
        super().__init__(dims, tuple(dimsd), h, (o,), (axis,), method, dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        g = torch.Generator().manual_seed(1)
        rand = lambda *n, dtype=torch.float64: torch.randn(*n, dtype=dtype, generator=g)  # noqa: E731
        yield cls(9, rand(4), offset=1)
        yield cls((5, 6), rand(3), offset=0, axis=0, method="fft")
        yield cls((5, 6), rand(5, 3), offset=2, axis=1)
        yield cls(4, rand(7), offset=3, method="direct")
        yield cls((7, 4), rand(3, dtype=torch.complex128), offset=1, axis=0, method="fft")


class ConvolveND(_Convolution):
    """y[i] = sum_k h[k] x[i + offset - k] over several axes, as long as x; x is zero outside.

    Args:
        dims: shape of the input and the output.
        h: kernel with one axis for each of `axes`, in that order. Gradients of every order reach it.
        offset: index of the kernel's origin on each axis; None means its first sample.
        axes: axes of the convolution; None means all of `dims`.
        method: None or "auto" (chosen by size), "direct" (sum over taps) or "fft". They agree to rounding.
        dtype: what `.dtype` reports.

    Unlike PyLops, `method` is chosen by size unless it is given, and axes that are not in ascending order are honoured.

    Raises: ArgumentError, ShapeError, DeviceError.

    Cost: direct O(n n_taps), fft O(n log n) with the kernel's spectrum cached until h changes. Where h requires grad
    the FFT is used, through autograd.
    """

    def __init__(
        self,
        dims: Dims,
        h: Any,
        offset: Any = None,
        axes: Any = (-2, -1),
        method: str | None = None,
        *,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        axes = as_axes(range(len(dims)) if axes is None else axes, len(dims), name)
        h = as_tensor(h, "h", name)
        if h.ndim != len(axes) or h.numel() == 0:
            raise ArgumentError(
                f"{name}: h must be a non-empty kernel with {len(axes)} axes, one for each of axes {axes}; "
                f"got shape {tuple(h.shape)}"
            )
        o = _as_offset(0 if offset is None else offset, len(axes), name)
        super().__init__(dims, dims, h, o, axes, _as_method(method, ("auto", "direct", "fft"), name), dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        g = torch.Generator().manual_seed(2)
        h = torch.randn(2, 2, 3, dtype=torch.float64, generator=g)
        yield cls((3, 4, 3), h, (1, 0, 1), axes=None, method="direct")
        yield cls((4, 3, 5), torch.randn(3, 2, dtype=torch.float64, generator=g), (1, 1), axes=(-1, 0), method="fft")
        yield cls((6,), torch.randn(4, dtype=torch.complex128, generator=g), axes=0)


class Convolve2D(ConvolveND):
    """y[i, j] = sum_kl h[k, l] x[i + offset[0] - k, j + offset[1] - l] over two axes; x is zero outside.

    Args:
        dims: shape of the input and the output, at least two axes.
        h: kernel of shape (n_taps_1, n_taps_2). Gradients of every order reach it.
        offset: index of the kernel's origin on each axis.
        axes: the two axes.
        method: None or "auto" (chosen by size), "direct" (sum over taps) or "fft". They agree to rounding.
        dtype: what `.dtype` reports.

    Raises: ArgumentError, ShapeError, DeviceError.

    Cost: as `ConvolveND`. Never a single-channel conv2d, which is 3 to 27 times slower on a CPU (measured).
    """

    def __init__(
        self,
        dims: Dims,
        h: Any,
        offset: Any = (0, 0),
        axes: Any = (-2, -1),
        method: str | None = None,
        *,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        if len(as_axes(axes, len(as_dims(dims, "dims", name)), name)) != 2:
            raise ArgumentError(f"{name}: axes must be two axes; got {axes!r}; use ConvolveND for other numbers")
        super().__init__(dims, h, offset, axes, method, dtype=dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        g = torch.Generator().manual_seed(3)
        yield cls((6, 7), torch.randn(3, 4, dtype=torch.float64, generator=g), (1, 2), method="fft")
        yield cls((3, 2, 5), torch.randn(3, 3, dtype=torch.float64, generator=g), (1, 1), axes=(0, 2), method="direct")
        yield cls((4, 6), torch.randn(2, 3, dtype=torch.complex128, generator=g), method="fft")
