"""What describes a wavelet transform: where its bands lie in one array, and its filters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.core.errors import ArgumentError
from pullback.core.interop import as_tensor
from pullback.linops._wavelet_bank import n_coefficients

FILTERS = ("dec_lo", "dec_hi", "rec_lo", "rec_hi")


@dataclass(frozen=True)
class Layout:
    """Where the bands of a multilevel transform lie in one array: as `pywt.coeffs_to_array` puts them.

    `sizes[j][i]` is the length of the approximation of level j (0: the signal) along axes[i].
    """

    dims: tuple[int, ...]
    axes: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(dims: tuple[int, ...], axes: tuple[int, ...], level: int, n_taps: int, mode: str) -> Layout:
        """For signals of shape `dims`."""
        sizes = [tuple(dims[a] for a in axes)]
        for _ in range(level):
            sizes.append(tuple(n_coefficients(n, n_taps, mode) for n in sizes[-1]))
        return Layout(dims, axes, tuple(sizes))

    @property
    def level(self) -> int:
        """The number of levels."""
        return len(self.sizes) - 1

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """starts[j][i]: where the details of level j begin along axes[i], behind everything that is coarser."""
        return tuple(
            tuple(self.sizes[-1][i] + sum(s[i] for s in self.sizes[j + 1 :]) for i in range(len(self.axes)))
            for j in range(self.level + 1)
        )

    @property
    def dimsd(self) -> tuple[int, ...]:
        """The shape of the packed array."""
        result = list(self.dims)
        for a, n in zip(self.axes, self.starts[0], strict=True):
            result[a] = n
        return tuple(result)

    @property
    def tight(self) -> bool:
        """Whether every entry of the packed array belongs to a band."""
        return self.starts[1:] == self.sizes[1:]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The names of the bands of one level, a letter for each of `axes`, the approximation first."""
        return tuple("".join(k) for k in product("ad", repeat=len(self.axes)))

    @cached_property
    def places(self) -> tuple[dict[str, tuple[Any, ...]], ...]:
        """places[j][key]: the index of a band of level j in the packed array."""
        found: list[dict[str, tuple[Any, ...]]] = []
        for sizes, starts in zip(self.sizes, self.starts, strict=True):
            found.append({})
            for key in self.keys:
                index = [slice(None)] * len(self.dims)
                for a, letter, n, start in zip(self.axes, key, sizes, starts, strict=True):
                    index[a] = slice(start, start + n) if letter == "d" else slice(0, n)
                found[-1][key] = (..., *index)
        return tuple(found)

    def shape(self, level: int) -> tuple[int, ...]:
        """The shape of every band of a level; level 0 is the signal."""
        result = list(self.dims)
        for a, n in zip(self.axes, self.sizes[level], strict=True):
            result[a] = n
        return tuple(result)

    def split(self, y: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The approximation and the details from coarse to fine, as views."""
        if not self.level:
            return y, []
        details = [{key: y[self.places[j][key]] for key in self.keys[1:]} for j in range(self.level, 0, -1)]
        return y[self.places[-1][self.keys[0]]], details

    def pack(self, approximation: Tensor, details: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """One array of all bands; zero where there is none."""
        whole = approximation
        for j, bands in zip(range(self.level, 0, -1), details, strict=True):
            whole = self._join({self.keys[0]: whole, **bands}, "", j)
        return whole

    def _join(self, bands: Mapping[str, Tensor], key: str, level: int) -> Tensor:
        if len(key) < len(self.axes):
            axis = self.axes[len(key)]
            return torch.cat([self._join(bands, key + letter, level) for letter in "ad"], axis)
        pad = [0, 0] * len(self.dims)  # up to where the details begin
        for axis, letter, start in zip(self.axes, key, self.starts[level], strict=True):
            if letter == "a":
                pad[-2 * axis - 1] = start - bands[key].shape[axis]
        return functional.pad(bands[key], pad) if any(pad) else bands[key]


def hint(word: Any, known: Sequence[str]) -> str:
    """Names that look like `word`, as the end of an error message."""
    close = difflib.get_close_matches(str(word).lower(), known, 3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def as_filters(wavelet: Any, owner: str) -> tuple[str, tuple[Any, ...]]:
    """What to call the wavelet, and all four filters as tuples of numbers, or (dec_lo, dec_hi) as tensors."""
    if isinstance(wavelet, str):
        wavelet = _named_wavelet(wavelet, owner)
    if hasattr(wavelet, "filter_bank"):  # pywt.Wavelet
        return repr(wavelet.name), tuple(tuple(map(float, taps)) for taps in wavelet.filter_bank)
    if isinstance(wavelet, (Tensor, Mapping)) or not isinstance(wavelet, Sequence) or len(wavelet) != 2:
        raise ArgumentError(
            f"{owner}: wavelet must be a name, a pywt.Wavelet, or two filters (dec_lo, dec_hi); got "
            f"{type(wavelet).__name__}"
        )
    filters = tuple(as_tensor(taps, name, owner) for name, taps in zip(FILTERS, wavelet, strict=False))
    n = filters[0].numel()
    for name, taps in zip(FILTERS, filters, strict=False):
        if taps.ndim != 1 or taps.numel() != n or n < 2 or n % 2 or taps.is_complex():
            raise ArgumentError(
                f"{owner}: {name} must be real taps of shape (n_taps,), n_taps even and the same for all filters (fill "
                f"up with zeros); got {taps.dtype} of shape {tuple(taps.shape)} beside {n} taps"
            )
    return f"{n} taps", filters


def _named_wavelet(name: str, owner: str) -> Any:
    try:
        import pywt
    except ImportError:
        text = f"{owner}: a wavelet by name needs PyWavelets: pip install PyWavelets, or give the taps themselves"
        raise ImportError(text) from None
    known = pywt.wavelist(kind="discrete")
    if name.lower() not in known:
        continuous = "; it is a continuous wavelet" if name.lower() in pywt.wavelist(kind="continuous") else ""
        raise ArgumentError(
            f"{owner}: wavelet must be one of pywt.wavelist(kind='discrete'); got {name!r}{continuous}"
            f"{hint(name, known)}"
        )
    return pywt.Wavelet(name)
