"""Discrete Fourier transforms with exact adjoints, complex or of real signals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axes, as_axis, as_dims, complex_of, per_axis, real_of
from pullback.linops.basic import Identity

_NORMS = {"ortho": ("ortho", "ortho"), "none": ("backward", "forward"), "1/n": ("forward", "backward")}
_ROOT = math.sqrt(2)


class FFTND(LinearOperator):
    """y[k] = c sum_n x[n] exp(-2 pi i sum_a k_a n_a / nfft_a) over several axes.

    With `real=True` the input is real and the last of `axes` keeps the frequencies 0 ... nfft // 2 only. The bins
    1 ... (nfft - 1) // 2 of that axis are multiplied by sqrt(2), since each stands for two, so that the operator has
    the norms and the adjoint of the full transform: <A x, y> = <x, A.H y> in the real inner product.

    Args:
        dims: shape of the input.
        axes: axes that are transformed; with `real=True` the last one is halved.
        nffts: transform length on each axis, None for the length of `dims`. Longer pads zeros at the end, shorter drops
            the samples beyond.
        sampling: sampling step on each axis [unit of the axis], used by `fs` only.
        norm: "ortho" (c = 1 / sqrt(N)), "none" (c = 1) or "1/n" (c = 1 / N), N the product of `nffts`. The adjoint has
            the same c: only "ortho" makes it the inverse.
        real: real input, half of the spectrum.
        ifftshift_before: on each axis, whether the input's origin lies in the middle.
        fftshift_after: on each axis, whether to move frequency zero to the middle of the output.
        dtype: what `.dtype` reports.

    PyLops' `engine` is not an argument: torch's FFT of the tensor's device is used. A complex transform maps C^n to C^m
    whatever `dtype` says; use `real=True` for real signals.

    Raises: ArgumentError, ShapeError, DtypeError (complex input with `real=True`).

    Cost: O(N log N) forward and adjoint; with `real=True` half of that in both.
    """

    _half = False

    def __init__(
        self,
        dims: Dims,
        axes: Any = (-3, -2, -1),
        nffts: Any = None,
        sampling: Any = 1.0,
        norm: str = "ortho",
        real: bool = False,
        ifftshift_before: Any = False,
        fftshift_after: Any = False,
        *,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        axes = as_axes(axes, len(dims), name)
        n = len(axes)
        given = per_axis(nffts, n, name, "nffts")
        lengths = as_dims([dims[a] if m is None else m for a, m in zip(axes, given, strict=True)], "nffts", name)
        steps = tuple(float(s) for s in per_axis(sampling, n, name, "sampling"))
        if not all(s > 0 and math.isfinite(s) for s in steps):
            raise ArgumentError(f"{name}: sampling must be positive; got {sampling!r}")
        if not isinstance(norm, str) or norm.lower() not in _NORMS:
            hint = {"backward": "; 'none' is the transform without a factor", "forward": "; '1/n' has the factor 1/N"}
            raise ArgumentError(f"{name}: norm must be 'ortho', 'none' or '1/n'; got {norm!r}{hint.get(norm, '')}")
        dimsd = list(dims)
        for a, m in zip(axes, lengths, strict=True):
            dimsd[a] = m
        if real:
            dimsd[axes[-1]] = lengths[-1] // 2 + 1
        super().__init__(dims, dimsd, dtype=dtype)
        self.axes, self.nffts, self.sampling, self.norm_kind, self.real = (
            axes,
            lengths,
            steps,
            norm.lower(),
            bool(real),
        )
        self.ifftshift_before = self._flags(ifftshift_before, "ifftshift_before")
        self.fftshift_after = self._flags(fftshift_after, "fftshift_after")
        self._before = tuple(a for a, flag in zip(axes, self.ifftshift_before, strict=True) if flag)
        self._after = tuple(a for a, flag in zip(axes, self.fftshift_after, strict=True) if flag)
        self._real_domain = self.real
        self._clinear = not self.real

    def _flags(self, value: Any, name: str) -> tuple[bool, ...]:
        flags = per_axis(value, len(self.axes), type(self).__name__, name)
        if not all(f in (True, False) for f in flags):
            raise ArgumentError(f"{type(self).__name__}: {name} must be True or False; got {value!r}")
        return tuple(bool(f) for f in flags)

    @property
    def fs(self) -> tuple[Tensor, ...]:
        """The frequencies of the output along each of `axes` [1 / unit of sampling], in its order."""
        result = []
        for k, (n, step, shifted) in enumerate(zip(self.nffts, self.sampling, self.fftshift_after, strict=True)):
            half = self.real and k == len(self.nffts) - 1
            f = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(n, step, dtype=torch.float64)
            result.append(torch.fft.fftshift(f) if shifted else f)
        return tuple(result)

    def _forward(self, x: Tensor) -> Tensor:
        if not x.numel():  # an empty batch, which MKL refuses
            return x.new_zeros(*x.shape[: x.ndim - len(self.dims)], *self.dimsd, dtype=self._out_dtype(x.dtype, False))
        if self._before:
            x = torch.fft.ifftshift(x, dim=self._before)
        norm = _NORMS[self.norm_kind][0]
        if self.real:
            y = torch.fft.rfftn(x, s=self.nffts, dim=self.axes, norm=norm)
            self._scale_bins(y, _ROOT)
        else:
            y = torch.fft.fftn(x, s=self.nffts, dim=self.axes, norm=norm)
        if self._after:
            y = torch.fft.fftshift(y, dim=self._after)
        return y.contiguous()

    def _adjoint(self, y: Tensor) -> Tensor:
        if not y.numel():
            return y.new_zeros(*y.shape[: y.ndim - len(self.dimsd)], *self.dims, dtype=self._out_dtype(y.dtype, True))
        if self._after:
            y = torch.fft.ifftshift(y, dim=self._after)
        norm = _NORMS[self.norm_kind][1]
        if self.real:
            # The factor goes in place between the two stages; torch's irfftn would keep the transposed layout of the
            # first stage and take 1.7 times as long (2048 x 2048, MKL).
            y = y.to(complex_of(y.dtype))
            fresh = torch.fft.ifftn(y, dim=self.axes[:-1], norm=norm) if len(self.axes) > 1 else y
            fresh = y.clone(memory_format=torch.contiguous_format) if fresh is y else fresh.contiguous()
            self._scale_bins(fresh, 1 / _ROOT)
            x = torch.fft.irfft(fresh, n=self.nffts[-1], dim=self.axes[-1], norm=norm)
        else:
            x = torch.fft.ifftn(y, dim=self.axes, norm=norm)
        pad = [0, 0] * len(self.dims)
        for a, n in zip(self.axes, self.nffts, strict=True):
            if n > self.dims[a]:
                x = x.narrow(a, 0, self.dims[a])
            pad[2 * (-a - 1) + 1] = max(0, self.dims[a] - n)
        if any(pad):
            x = functional.pad(x, pad)
        if self._before:
            x = torch.fft.fftshift(x, dim=self._before)
        return x.contiguous()

    def _scale_bins(self, y: Tensor, factor: float) -> None:
        """Multiply the bins that stand for two frequencies, in place."""
        torch.view_as_real(y).narrow(self.axes[-1] - 1, 1, (self.nffts[-1] - 1) // 2).mul_(factor)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return real_of(complex_of(dtype)) if adjoint and self.real else complex_of(dtype)

    def _gram(self) -> LinearOperator:
        isometry = self.norm_kind == "ortho" and all(
            n >= self.dims[a] for a, n in zip(self.axes, self.nffts, strict=True)
        )
        return Identity(self.dims) if isometry else super()._gram()

    def _norm_bound(self) -> float | None:
        root = math.sqrt(math.prod(self.nffts))
        return {"ortho": 1.0, "none": root, "1/n": 1 / root}[self.norm_kind]

    def _coisometry(self) -> float | None:
        return self._constant(all(n <= self.dims[a] for a, n in zip(self.axes, self.nffts, strict=True)))

    def _isometry(self) -> float | None:
        return self._constant(all(n >= self.dims[a] for a, n in zip(self.axes, self.nffts, strict=True)))

    def _constant(self, fits: bool) -> float | None:
        n = math.prod(self.nffts)
        return {"ortho": 1.0, "none": float(n), "1/n": 1 / n}[self.norm_kind] if fits and not self.real else None

    def extra_repr(self) -> str:
        """Shapes, kind, axes and norm."""
        kind = "real" if self.real else "complex"
        return f"{super().extra_repr()}, {kind}, axes {self.axes}, norm {self.norm_kind!r}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls((4, 5, 3))
        yield cls((3, 4, 5), real=True, norm="none")
        yield cls((4, 3, 5), axes=(2, 0), nffts=(4, 6), real=True, fftshift_after=(True, False), ifftshift_before=True)
        yield cls((5, 4), axes=(-1,), nffts=(7,), norm="1/n", fftshift_after=True)


class FFT2D(FFTND):
    """y[k, l] = c sum_mn x[m, n] exp(-2 pi i (k m / nfft_1 + l n / nfft_2)); arguments as `FFTND`, for two axes."""

    def __init__(
        self,
        dims: Dims,
        axes: Any = (-2, -1),
        nffts: Any = None,
        sampling: Any = 1.0,
        norm: str = "ortho",
        real: bool = False,
        ifftshift_before: Any = False,
        fftshift_after: Any = False,
        *,
        dtype: Any = None,
    ) -> None:
        super().__init__(dims, axes, nffts, sampling, norm, real, ifftshift_before, fftshift_after, dtype=dtype)
        if len(self.axes) != 2:
            raise ArgumentError(
                f"{type(self).__name__}: axes must be two axes; got {axes!r}; use FFTND for other numbers"
            )

    @property
    def f1(self) -> Tensor:
        """The frequencies along the first axis [1 / unit of sampling]."""
        return self.fs[0]

    @property
    def f2(self) -> Tensor:
        """The frequencies along the second axis [1 / unit of sampling]."""
        return self.fs[1]

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls((5, 4))
        yield cls((4, 6), real=True)
        yield cls((4, 5), real=True, norm="1/n", nffts=(6, 4))
        yield cls((3, 4, 5), axes=(0, 2), nffts=(4, None), fftshift_after=True, ifftshift_before=(True, False))


class FFT(FFTND):
    """y[k] = c sum_n x[n] exp(-2 pi i k n / nfft) along one axis; arguments as `FFTND`, for one axis.

    Args:
        dims: shape of the input.
        axis: axis that is transformed.
        nfft: transform length, None for the length of `dims`.
        sampling: sampling step [unit of the axis], used by `f` only.
        norm: "ortho", "none" or "1/n".
        real: real input, half of the spectrum, bins 1 ... (nfft - 1) // 2 times sqrt(2).
        ifftshift_before: whether the input's origin lies in the middle.
        fftshift_after: whether to move frequency zero to the middle of the output.
        dtype: what `.dtype` reports.
    """

    def __init__(
        self,
        dims: Dims,
        axis: int = -1,
        nfft: int | None = None,
        sampling: float = 1.0,
        norm: str = "ortho",
        real: bool = False,
        ifftshift_before: bool = False,
        fftshift_after: bool = False,
        *,
        dtype: Any = None,
    ) -> None:
        axis = as_axis(axis, len(as_dims(dims, "dims", type(self).__name__)), type(self).__name__)
        if isinstance(nfft, Sequence):
            raise ArgumentError(f"{type(self).__name__}: nfft must be an int or None; got {nfft!r}")
        super().__init__(dims, (axis,), nfft, sampling, norm, real, ifftshift_before, fftshift_after, dtype=dtype)

    @property
    def f(self) -> Tensor:
        """The frequencies of the output [1 / unit of sampling], in its order."""
        return self.fs[0]

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls(7)
        yield cls(8, real=True)
        yield cls((5, 4), axis=0, nfft=8, real=True, norm="none", ifftshift_before=True)
        yield cls((5, 4), axis=0, nfft=3, norm="1/n", fftshift_after=True)
