"""Transforms that diagonalise operators: none, the Fourier transform, the cosine transform, over all axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Transform:
    """An invertible linear T; `to` and `back` act on tensors of shape (..., *dims)."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims
        self.axes = tuple(range(-len(dims), 0))

    def to(self, x: Tensor) -> Tensor:
        """T x."""
        return x

    def back(self, s: Tensor, like: Tensor) -> Tensor:
        """T^-1 s, real if `like` is."""
        return s

    def flat(self, like: Tensor) -> Tensor:
        """A vector whose transform has no small entry."""
        return torch.ones(self.dims, dtype=like.dtype, device=like.device)

    def values(self, response: Tensor, centre: tuple[int, ...]) -> Tensor:
        """The eigenvalues of the operator that answers an impulse anywhere as it does in the centre."""
        return torch.full(self.dims, float(response[centre].real), device=response.device)


class Fourier(Transform):
    """T = F; real vectors have half of the spectrum."""

    def to(self, x: Tensor) -> Tensor:
        """F x."""
        return torch.fft.fftn(x, dim=self.axes) if x.is_complex() else torch.fft.rfftn(x, dim=self.axes)

    def back(self, s: Tensor, like: Tensor) -> Tensor:
        """F^-1 s."""
        if like.is_complex():
            return torch.fft.ifftn(s, dim=self.axes)
        return torch.fft.irfftn(s, s=self.dims, dim=self.axes)

    def flat(self, like: Tensor) -> Tensor:
        """A unit impulse."""
        v = torch.zeros(self.dims, dtype=like.dtype, device=like.device)
        v[(0,) * len(self.dims)] = 1
        return v

    def values(self, response: Tensor, centre: tuple[int, ...]) -> Tensor:
        """The transform of the response about the centre."""
        return self.to(response.roll([-c for c in centre], list(range(len(centre))))).real


class Cosine(Transform):
    """T = DCT-II along every axis (not normalised), T^-1 its inverse: x_i = x_{-1-i} at both ends.

    One Fourier transform V of the samples in the order 0, 2, 4 ... 5, 3, 1 along every axis. With
    t_k = exp(-i pi k / 2n) it gives, axis by axis, R_k = (t_k V_k + conj(t_k) V_{n-k}) / 2. Back,
    V_k = conj(t_k) (R_k - i R_{n-k}) with R_n = 0.
    Source: Makhoul 1980, doi 10.1109/TASSP.1980.1163351.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__(dims)
        self._tables: dict[Any, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def _axes(self, like: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For every axis the order of samples, its inverse, k -> n - k, and t."""
        key = (like.dtype, like.device)
        if key not in self._tables:
            made = []
            for axis, n in zip(self.axes, self.dims, strict=True):
                i = torch.arange(n)
                order = torch.cat((i[::2], i[1::2].flip(0)))
                angle = i.double() * (-math.pi / (2 * n))
                t = torch.polar(torch.ones_like(angle), angle)
                t = t.to(torch.complex128 if like.dtype == torch.float64 else torch.complex64)
                t = t.reshape(-1, *(1,) * (-axis - 1))
                made.append(tuple(v.to(like.device) for v in (order, order.argsort(), -i % n, t)))
            self._tables[key] = made  # type: ignore[assignment]
        return self._tables[key]

    def to(self, x: Tensor) -> Tensor:
        """DCT-II."""
        if x.is_complex():
            return torch.complex(self.to(x.real), self.to(x.imag))
        tables = self._axes(x)
        for axis, (order, *_) in zip(self.axes, tables, strict=True):
            x = x.index_select(axis, order)
        v = torch.fft.rfftn(x, dim=self.axes)
        for axis, (*_, mirror, t) in zip(self.axes[:-1], tables[:-1], strict=True):
            half = t / 2
            v = torch.addcmul(half * v, half.conj(), v.index_select(axis, mirror))
        n = self.dims[-1]
        v = v * tables[-1][-1][: n // 2 + 1]
        return torch.cat((v.real, -v.imag[..., 1 : (n + 1) // 2].flip(-1)), -1)

    def back(self, s: Tensor, like: Tensor) -> Tensor:
        """The inverse."""
        if s.is_complex():
            return torch.complex(self.back(s.real, s.real), self.back(s.imag, s.imag))
        tables = self._axes(s)
        n = self.dims[-1]
        mirrored = functional.pad(s[..., n - n // 2 :].flip(-1), (1, 0))
        v = torch.complex(s[..., : n // 2 + 1], -mirrored) * tables[-1][-1][: n // 2 + 1].conj()
        for axis, (*_, mirror, t) in zip(self.axes[:-1], tables[:-1], strict=True):
            turn = t.conj() * -1j
            turn[0] = 0  # R_n = 0
            v = torch.addcmul(t.conj() * v, turn, v.index_select(axis, mirror))
        x = torch.fft.irfftn(v, s=self.dims, dim=self.axes)
        for axis, (_, back, *_) in zip(self.axes, tables, strict=True):
            x = x.index_select(axis, back)
        return x

    def flat(self, like: Tensor) -> Tensor:
        """The inverse of ones."""
        dtype = like.real.dtype if like.is_complex() else like.dtype
        ones = torch.ones(self.dims, dtype=dtype, device=like.device)
        return self.back(ones, ones).to(like.dtype)

    def values(self, response: Tensor, centre: tuple[int, ...]) -> Tensor:
        """sum_d r(d) prod_a cos(pi k_a d_a / n_a): the mean of the spectrum over the signs of the frequencies."""
        n = len(self.dims)
        rolled = functional.pad(response, [v for d in reversed(self.dims) for v in (0, d)])
        rolled = rolled.roll([-c for c in centre], list(range(n)))
        s = torch.fft.fftn(rolled).real
        for axis, d in enumerate(self.dims):
            up = s.narrow(axis, 0, d)
            down = torch.cat((s.narrow(axis, 0, 1), s.narrow(axis, d + 1, d - 1).flip(axis)), axis)
            s = (up + down) / 2
        return s


TRANSFORMS: dict[str, type[Transform]] = {"diagonal": Transform, "fft": Fourier, "dct": Cosine}
