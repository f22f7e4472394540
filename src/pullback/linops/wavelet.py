"""Discrete wavelet transforms of every extension mode, with their exact adjoints and inverses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.interop import as_tensor
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_axes, as_axis, as_dims
from pullback.linops._wavelet_apply import merge, split
from pullback.linops._wavelet_bank import MODES, Bank, Taps, analysis, synthesis
from pullback.linops._wavelet_layout import FILTERS, Layout, as_filters, hint
from pullback.linops._wavelet_taps import analyse, analyse_adjoint, synthesise, synthesise_adjoint
from pullback.linops.basic import Identity

_ORTHOGONAL = 1e-9  # taps are tabulated to about 1e-12
_EXACT = 1e-2  # dmey, the worst table of PyWavelets, reconstructs to 4e-3


class _Wavelet(LinearOperator):
    """What the transform and its inverse share: the filters, the layout, and the way through the levels."""

    _half = False

    def __init__(
        self,
        dims: tuple[int, ...],
        dimsd: tuple[int, ...],
        layout: Layout,
        mode: str,
        filters: Sequence[Any],
        wavelet: str,
        dtype: Any,
    ) -> None:
        super().__init__(dims, dimsd, dtype=dtype)
        self.layout, self.mode, self.wavelet = layout, mode, wavelet
        self.axes, self.level = layout.axes, layout.level
        # Named filters are numbers and fit every device; two given as tensors are held, and the others follow.
        for name, taps in zip(FILTERS, (*filters, *(None,) * 4), strict=False):
            setattr(self, name, taps)

    def _pair(self) -> tuple[Any, Any]:
        """The low and the high pass of this operator."""
        raise AssertionError(f"{type(self).__name__} does not choose its filters; please report")

    _analyses: bool

    def _numbers(self) -> tuple[Taps, Taps]:
        held = self._held()
        if not held:
            return self._pair()
        function = lambda *_: tuple(tuple(taps.tolist()) for taps in self._pair())  # noqa: E731
        result: tuple[Taps, Taps] = self._cached("taps", held, function)
        return result

    def _down(self, x: Tensor, adjoint: bool) -> Tensor:
        """From the signal to the packed bands: analysis, or the adjoint of synthesis."""
        layout = self.layout
        if not layout.level:
            return x.clone(memory_format=torch.contiguous_format)
        if self._by_torch(x):
            return self._down_live(x, adjoint)
        return _join(self._down_real(_part(x), adjoint), x)

    def _down_real(self, x: Tensor, adjoint: bool) -> Tensor:
        layout = self.layout
        batch = x.shape[: x.ndim - len(layout.dims)]
        y = (x.new_empty if layout.tight else x.new_zeros)((*batch, *layout.dimsd))
        order, axes = self._order()
        banks = self._cached(("banks", adjoint), self._held(), lambda *_: self._banks(adjoint))
        for j in range(1, layout.level + 1):
            bands = {key: y[place] for key, place in layout.places[j].items()}
            if j < layout.level:
                bands[layout.keys[0]] = x.new_empty((*batch, *layout.shape(j)))
            split(x, banks[j - 1], axes, _sorted(bands, order))
            x = bands[layout.keys[0]]
        return y

    def _up(self, y: Tensor, adjoint: bool) -> Tensor:
        """From the packed bands to the signal: synthesis, or the adjoint of analysis."""
        if not self.layout.level:
            return y.clone(memory_format=torch.contiguous_format)
        if self._by_torch(y):
            return self._up_live(y, adjoint)
        return _join(self._up_real(_part(y), adjoint), y)

    def _up_real(self, y: Tensor, adjoint: bool) -> Tensor:
        layout = self.layout
        batch = y.shape[: y.ndim - len(layout.dims)]
        order, axes = self._order()
        banks = self._cached(("banks", adjoint), self._held(), lambda *_: self._banks(adjoint))
        x, details = layout.split(y)
        for j, parts in zip(range(layout.level - 1, -1, -1), details, strict=True):
            bands = {layout.keys[0]: x, **parts}
            x = y.new_empty((*batch, *layout.shape(j)))
            merge(_sorted(bands, order), banks[j], axes, x)
        return x

    def _banks(self, adjoint: bool) -> list[list[Bank]]:
        """For every level from the finest the banks of the axes, from the outermost."""
        make, taps, order = analysis if self._analyses else synthesis, self._numbers(), self._order()[0]
        return [[make(sizes[i], *taps, self.mode, adjoint) for i in order] for sizes in self.layout.sizes[:-1]]

    def _order(self) -> tuple[list[int], list[int]]:
        """The axes from the outermost inwards: their numbers, and themselves."""
        order = sorted(range(len(self.axes)), key=lambda i: self.axes[i])
        return order, [self.axes[i] for i in order]

    # Where the filters are differentiated, or their numbers lie on a GPU ---------------------------------------------

    def _by_torch(self, x: Tensor) -> bool:
        """Whether the filters must stay tensors; elsewhere than on the CPU the host must not wait for their numbers."""
        return self._is_live() or (x.device.type != "cpu" and bool(self._held()))

    def _filters(self, x: Tensor) -> Tensor:
        """The pair of shape (2, n_taps) in the precision of x."""
        return torch.stack([self._cast(taps, x) for taps in self._pair()])

    def _down_live(self, x: Tensor, adjoint: bool) -> Tensor:
        if x.is_complex():
            return torch.complex(self._down_live(x.real, adjoint), self._down_live(x.imag, adjoint))
        filters, layout = self._filters(x), self.layout
        details = []
        for _ in range(layout.level):
            parts = {"": x}
            for axis in self.axes:
                parts = {
                    key + letter: band.movedim(-1, axis)
                    for key, part in parts.items()
                    for letter, band in zip(
                        "ad", self._step_down(part.movedim(axis, -1), filters, adjoint), strict=True
                    )
                }
            x = parts.pop(layout.keys[0])
            details.append(parts)
        return layout.pack(x, details[::-1])

    def _step_down(self, x: Tensor, filters: Tensor, adjoint: bool) -> Sequence[Tensor]:
        step = synthesise_adjoint if adjoint else analyse
        return step(x, filters, self.mode).unbind(-2)

    def _up_live(self, y: Tensor, adjoint: bool) -> Tensor:
        if y.is_complex():
            return torch.complex(self._up_live(y.real, adjoint), self._up_live(y.imag, adjoint))
        filters, layout = self._filters(y), self.layout
        step = analyse_adjoint if adjoint else synthesise
        x, details = layout.split(y)
        for j, parts in zip(range(layout.level - 1, -1, -1), details, strict=True):
            parts = {layout.keys[0]: x, **parts}
            for i in range(len(self.axes) - 1, -1, -1):
                axis = self.axes[i]
                pair = lambda key, parts=parts, axis=axis: torch.stack(  # noqa: E731
                    [parts[key + letter].movedim(axis, -1) for letter in "ad"], -2
                )
                parts = {
                    key: step(pair(key), filters, self.mode, layout.sizes[j][i]).movedim(-1, axis)
                    for key in {key[:-1]: None for key in parts}
                }
            x = parts[""]
        return x

    def extra_repr(self) -> str:
        """Shapes, wavelet, levels, mode and axes."""
        return f"{super().extra_repr()}, {self.wavelet}, level {self.level}, {self.mode}, axes {self.axes}"


def _sorted(bands: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """The bands with the letters of their names in another order."""
    if all(i == k for k, i in enumerate(order)):
        return dict(bands)
    return {"".join(key[i] for i in order): band for key, band in bands.items()}


def _part(x: Tensor) -> Tensor:
    """The input as a contiguous real tensor; the real and imaginary part of a complex one are a leading axis."""
    if not x.is_complex():
        return x.resolve_neg().contiguous()
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 0).contiguous()


def _join(y: Tensor, x: Tensor) -> Tensor:
    """The reverse for a result y of the input x."""
    return torch.complex(y[0], y[1]) if x.is_complex() else y


class DWTND(_Wavelet):
    """y = W x, the multilevel discrete wavelet transform along several axes.

    One level gives, along each axis, a[k] = sum_j dec_lo[j] x[2 k + o - j] and d[k] likewise with dec_hi, where x is
    continued outside by `mode` and o = 1 (periodization: n_taps / 2); the next level transforms the approximation.

    y holds all bands in the layout of `pywt.coeffs_to_array(pywt.wavedecn(x, ...))`: the coarsest approximation in the
    corner, the details of each level diagonally behind. `split(y)` gives the bands, `pack` puts them together. With
    periodization and sizes divisible by 2^level y is as large as x; else it is larger, and in the other modes some
    entries of y belong to no band: they are zero, and `W.H` does not read them. (PyLops pads x with zeros to a power of
    two instead; here the sizes are those of PyWavelets.)

    `W.H` is the adjoint of W in every mode and for biorthogonal filters; `W.inverse()` reconstructs. The two are equal
    only for orthogonal filters, with periodization and sizes divisible by 2^level.

    Args:
        dims: shape of the input.
        axes: axes that are transformed; None means all. They name the letters of the bands in their order.
        wavelet: a name known to PyWavelets, a `pywt.Wavelet`, or the taps (dec_lo, dec_hi), each of shape (n_taps,)
            with the same even length. Gradients of every order reach taps given as tensors. The filters of the
            reconstruction follow from these two by alias cancellation.
        level: number of levels, from 0 to ceil(log2(n)) for the shortest axis. PyWavelets warns where the filter is
            longer than the approximation; here that is allowed.
        mode: continuation outside, as in PyWavelets: "periodization" (periodic, with the fewest coefficients), "zero",
            "constant", "symmetric", "reflect", "periodic", "smooth", "antisymmetric" or "antireflect".
        dtype: what `.dtype` reports.

    Complex input is transformed in both parts. One wavelet and mode serve all axes.

    Raises: ArgumentError, ShapeError, DeviceError, ImportError (a name without PyWavelets installed).

    Cost: 2 n_taps multiplications a sample and axis on the first level, 2^-d of that on each further one of d axes.
    Where taps require grad the frames of the signal are stored: n_taps / 2 times its memory for each axis.

    Source: Mallat, "A theory for multiresolution signal decomposition", 1989, doi:10.1109/34.192463; Lee et al.,
    "PyWavelets", 2019, doi:10.21105/joss.01237.
    """

    _analyses = True

    def __init__(
        self,
        dims: Dims,
        axes: Any = None,
        wavelet: Any = "haar",
        level: int = 1,
        mode: str = "periodization",
        *,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        dims = as_dims(dims, "dims", name)
        axes = as_axes(range(len(dims)) if axes is None else axes, len(dims), name)
        label, filters = as_filters(wavelet, name)
        if mode not in MODES:
            raise ArgumentError(f"{name}: mode must be one of {', '.join(MODES)}; got {mode!r}{hint(mode, MODES)}")
        limit = math.ceil(math.log2(min(dims[a] for a in axes)))
        if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= limit:
            shortest = min(dims[a] for a in axes)
            raise ArgumentError(
                f"{name}: level must be an int from 0 to {limit}, the maximum for {shortest} samples; got {level!r}"
            )
        layout = Layout.of(dims, axes, level, len(filters[0]), mode)
        super().__init__(dims, layout.dimsd, layout, mode, filters, label, dtype)

    def _pair(self) -> tuple[Any, Any]:
        return self.dec_lo, self.dec_hi

    def _forward(self, x: Tensor) -> Tensor:
        return self._down(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._up(y, True)

    def inverse(self) -> LinearOperator:
        """R with R W x = x: the reconstruction, as `pywt.waverecn`, with its own exact adjoint.

        It is exact to rounding where the filters reconstruct perfectly (all of PyWavelets but dmey: 4e-3).

        Raises: ArgumentError if the filters do not reconstruct.
        """
        error = self._reconstruction_error()
        if not error <= _EXACT:
            raise ArgumentError(
                f"{type(self).__name__}.inverse: the taps do not reconstruct the signal (error {error:.1e}); give "
                f"(dec_lo, dec_hi) of a perfect reconstruction filter bank"
            )
        return _InverseDWT(self)

    def _reconstruction_error(self) -> float:
        """The largest deviation of rec_lo * dec_lo + rec_hi * dec_hi from 2 delta, and of the alias from zero."""
        reconstruction = _InverseDWT(self)._numbers()
        error = 0.0
        for sign, target in ((1.0, 2.0), (-1.0, 0.0)):
            low, high = (
                np.convolve(np.array(d) * sign ** np.arange(len(d)), r)
                for d, r in zip(self._numbers(), reconstruction, strict=True)
            )
            total = low + high
            total[len(total) // 2] -= target
            error = max(error, float(np.abs(total).max()))
        return error

    def split(self, y: Tensor) -> list[Any]:
        """The bands of y, of shape (..., *dimsd), as views: [a_J, {"ad": .., ...} of level J, ..., of level 1].

        As `pywt.wavedecn`. The letters name the axes in the order of `axes`: `a` low pass, `d` high pass.
        """
        self._expect(y, self.dimsd, "y")
        approximation, details = self.layout.split(y)
        return [approximation, *(self._named(bands) for bands in details)]

    def pack(self, coefficients: Sequence[Any]) -> Tensor:
        """The array y of shape (..., *dimsd) with these bands; the reverse of `split`.

        Raises: ShapeError, ArgumentError.
        """
        name, n = type(self).__name__, self.level + 1
        if not isinstance(coefficients, Sequence) or len(coefficients) != n:
            count = len(coefficients) if isinstance(coefficients, Sequence) else type(coefficients).__name__
            raise ArgumentError(
                f"{name}.pack: coefficients must be a list of {n} entries, the approximation and {self.level} levels; "
                f"got {count}"
            )
        approximation = as_tensor(coefficients[0], "coefficients[0]", f"{name}.pack")
        self._expect(approximation, self.layout.shape(self.level), "coefficients[0]")
        details = []
        for j, given in enumerate(coefficients[1:], 1):
            bands = self._unnamed(given, f"coefficients[{j}]")
            for key, band in bands.items():
                self._expect(band, self.layout.shape(self.level + 1 - j), f"coefficients[{j}] {key!r}")
            details.append(bands)
        return self.layout.pack(approximation, details)

    def _named(self, bands: dict[str, Tensor]) -> Any:
        return bands

    def _unnamed(self, given: Any, where: str) -> dict[str, Tensor]:
        keys = self.layout.keys[1:]
        if not isinstance(given, Mapping) or set(given) != set(keys):
            got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ArgumentError(f"{type(self).__name__}.pack: {where} must be a dict with keys {keys}; got {got}")
        return {key: as_tensor(given[key], f"{where}[{key!r}]", f"{type(self).__name__}.pack") for key in keys}

    def _expect(self, x: Tensor, dims: tuple[int, ...], what: str) -> None:
        if tuple(x.shape[-len(dims) :]) != dims:
            shape = ", ".join(map(str, dims))
            raise ShapeError(f"{type(self).__name__}: {what} must have shape (..., {shape}); got {tuple(x.shape)}")

    # Structure -----------------------------------------------------------------------------------------------------

    def _orthonormal(self) -> bool:
        """Whether sum_j h_c[j] h_c'[j + 2 s] = delta_cc' delta_s0."""
        low, high = (np.array(f) for f in self._numbers())
        n = len(low)
        for u, v, target in ((low, low, 1.0), (high, high, 1.0), (low, high, 0.0)):
            products = np.correlate(u, v, "full")
            products[n - 1] -= target
            if np.abs(products[(n - 1) % 2 :: 2]).max() > _ORTHOGONAL:
                return False
        return True

    def _coisometry(self) -> float | None:
        """1.0 where W W^H = I: orthogonal filters, periodization, sizes divisible by 2^level."""
        even = self.mode == "periodization" and all(n % 2**self.level == 0 for n in self.layout.sizes[0])
        return 1.0 if even and self._orthonormal() else None

    def _gram(self) -> LinearOperator:
        # With zeros outside all coefficients that are not zero are kept, and so is the norm (W W^H is a projection).
        isometry = self._coisometry() == 1.0 or (self.mode == "zero" and self._orthonormal())
        return Identity(self.dims) if isometry else super()._gram()

    def _norm_bound(self) -> float | None:
        isometry = self._coisometry() == 1.0 or (self.mode == "zero" and self._orthonormal())
        return 1.0 if isometry else None

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        yield cls((4, 5, 6), (0, -1), "db2", 2)
        yield cls((4, 3, 4))
        yield cls((5, 4, 3), (2, 0), "bior2.2", 1, "symmetric")
        yield cls((3, 70), None, "rbio1.3", 2, "smooth")


class DWT2D(DWTND):
    """y = W x, the multilevel discrete wavelet transform of images; arguments as `DWTND`, for two axes.

    `split(y)` gives [a_J, (h_J, v_J, d_J), ..., (h_1, v_1, d_1)] as `pywt.wavedec2`: horizontal, vertical and diagonal
    details, that is "da", "ad" and "dd" of `DWTND`.
    """

    def __init__(
        self,
        dims: Dims,
        axes: Any = (-2, -1),
        wavelet: Any = "haar",
        level: int = 1,
        mode: str = "periodization",
        *,
        dtype: Any = None,
    ) -> None:
        name = type(self).__name__
        if len(as_axes(axes, len(as_dims(dims, "dims", name)), name)) != 2:
            raise ArgumentError(f"{name}: axes must be two axes; got {axes!r}; use DWTND for other numbers")
        super().__init__(dims, axes, wavelet, level, mode, dtype=dtype)

    def _named(self, bands: dict[str, Tensor]) -> Any:
        return bands["da"], bands["ad"], bands["dd"]

    def _unnamed(self, given: Any, where: str) -> dict[str, Tensor]:
        name = f"{type(self).__name__}.pack"
        if not isinstance(given, (tuple, list)) or len(given) != 3:
            raise ArgumentError(f"{name}: {where} must be a tuple of three bands (h, v, d); got {type(given).__name__}")
        return {key: as_tensor(band, where, name) for key, band in zip(("da", "ad", "dd"), given, strict=True)}

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        g = torch.Generator().manual_seed(4)
        yield cls((8, 12), wavelet="db2", level=2)
        yield cls((7, 6), (1, 0), "bior2.2", 2, "reflect")
        yield cls((3, 5, 4), (0, 2), "haar", 1, "antireflect")
        yield cls((66, 3), wavelet=torch.randn(2, 4, dtype=torch.float64, generator=g).unbind(0), mode="constant")


class DWT(DWTND):
    """y = W x, the multilevel discrete wavelet transform along one axis; arguments as `DWTND`, for one axis.

    y is [a_J, d_J, ..., d_1], one behind the other, and `split(y)` gives them as `pywt.wavedec`.

    Args:
        dims: shape of the input.
        axis: axis that is transformed.
        wavelet: a name known to PyWavelets, a `pywt.Wavelet`, or taps.
        level: number of levels, from 0 to ceil(log2(n)).
        mode: continuation outside.
        dtype: what `.dtype` reports.
    """

    def __init__(
        self,
        dims: Dims,
        axis: int = -1,
        wavelet: Any = "haar",
        level: int = 1,
        mode: str = "periodization",
        *,
        dtype: Any = None,
    ) -> None:
        axis = as_axis(axis, len(as_dims(dims, "dims", type(self).__name__)), type(self).__name__)
        super().__init__(dims, (axis,), wavelet, level, mode, dtype=dtype)

    def _named(self, bands: dict[str, Tensor]) -> Any:
        return bands["d"]

    def _unnamed(self, given: Any, where: str) -> dict[str, Tensor]:
        return {"d": as_tensor(given, where, f"{type(self).__name__}.pack")}

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances for the conformance kit."""
        g = torch.Generator().manual_seed(5)
        yield cls(16, wavelet="db2", level=2)
        yield cls(11, wavelet="bior2.2", level=2)
        yield cls((3, 5), 0, "db4", 1, "antisymmetric")
        yield cls((9, 2), 0, torch.randn(2, 6, dtype=torch.float64, generator=g).unbind(0), 2, "periodic")
        yield cls(70, wavelet="sym4", level=2, mode="symmetric")


class _InverseDWT(_Wavelet):
    """x = R y, the reconstruction of a signal from its packed wavelet bands; R W = I."""

    _analyses = False

    def __init__(self, dwt: DWTND) -> None:
        filters = (dwt.dec_lo, dwt.dec_hi, dwt.rec_lo, dwt.rec_hi)
        super().__init__(dwt.dimsd, dwt.dims, dwt.layout, dwt.mode, filters, dwt.wavelet, dwt._dtype)

    def _pair(self) -> tuple[Any, Any]:
        return (self.rec_lo, self.rec_hi) if self.rec_lo is not None else _reconstruction(self.dec_lo, self.dec_hi)

    def _forward(self, x: Tensor) -> Tensor:
        return self._up(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._down(y, True)


def _reconstruction(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """rec_lo[j] = -(-1)^j dec_hi[j] and rec_hi[j] = (-1)^j dec_lo[j], which cancel the alias."""
    signs = 1 - 2 * (torch.arange(low.shape[0], device=low.device) % 2)
    return -signs * high, signs * low
