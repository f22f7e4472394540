"""sum_j K(x_i - y_j) b_j by a Fourier series of K: two non-uniform FFTs, at a cost of M + N and the number of modes.

K is a black box. On the box of all differences it is replaced by its periodic repetition with a period so long that
the copies stay below the tolerance there; the coefficients are an FFT of samples, the modes those that count. Worth it
where K is smooth at the scale of the box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor], Tensor]  # (..., D) -> (..., c)
Channel = Sequence[tuple[int, int]]  # pairs (number of the kernel, number of the weight) that are added

REACH = 8.0  # periods longer than this many extents mean that K does not decay
MODES = {1: 1 << 17, 2: 1 << 21, 3: 1 << 21}  # samples of K at most; a kernel that needs more is not smooth
_GROWTH = 1.3
_BATCH = 1 << 26  # complex numbers of strengths that one call of the NUFFT takes


@dataclass(frozen=True)
class Precision:
    """Relative accuracy of the non-uniform FFTs, and whether they compute in complex128 instead of complex64."""

    accuracy: float
    double: bool

    @property
    def dtype(self) -> torch.dtype:
        """What is transformed."""
        return torch.complex128 if self.double else torch.complex64


@dataclass(frozen=True)
class Series:
    """K(d) = sum_m c_m exp(2 pi i m . d / period) on the box of differences.

    Args:
        period: for each axis, in units of the coordinates.
        coefficients: (c, *modes) complex, modes -n/2 .. n/2 - 1 of each axis, the first one zero.
    """

    period: Tensor
    coefficients: Tensor

    @property
    def modes(self) -> tuple[int, ...]:
        """Modes of each axis."""
        return tuple(self.coefficients.shape[1:])


def extent(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and edges of the box around both sets: differences lie in [-edge, edge]."""
    low = torch.minimum(x.amin(0), y.amin(0))
    high = torch.maximum(x.amax(0), y.amax(0))
    return (low + high) / 2, high - low


def series(kernel: Kernel, edge: Tensor, target: float) -> Series | None:
    """The shortest Fourier series of `kernel` that is right to `target` for |d_k| <= edge_k; None if there is none.

    Args:
        kernel: (..., D) -> (..., c), real.
        edge: (D,) float64.
        target: largest absolute error of each kernel.
    """
    reach = _reach(kernel, edge, target)
    if reach is None:
        return None
    d = edge.numel()
    period = edge + reach
    largest = MODES[d]
    n = [_modes_along(kernel, edge, period, k, target, round(largest ** (1 / d))) for k in range(d)]
    while math.prod(n) <= largest:
        c = _coefficients(kernel, period, reach, n)
        size = c.abs().amax(0)
        slow = [k for k in range(d) if _tail(size, k, 0.75) > target / d]
        if not slow:
            return Series(period, _trimmed(c, size, target))
        for k in slow:
            n[k] = _even(max(n[k] + 4, _GROWTH * n[k]))
    return None


def _modes_along(kernel: Kernel, edge: Tensor, period: Tensor, axis: int, target: float, largest: int) -> int:
    """The modes that an axis needs, from a few lines along it: the start of the search."""
    d = edge.numel()
    generator = torch.Generator().manual_seed(4)
    across = (torch.rand(8, d, generator=generator, dtype=torch.float64) * 2 - 1) * edge / 4
    across[0] = 0.0
    n = 16
    while n <= largest:
        t = float(period[axis]) * (torch.arange(n, dtype=torch.float64) / n - 0.5)
        points = across.expand(n, 8, d).clone()
        points[..., axis] = t[:, None]
        values = kernel(points)
        copy = torch.zeros(d, dtype=torch.float64)
        copy[axis] = period[axis]
        values = values + kernel(points + copy) + kernel(points - copy)
        size = torch.fft.fft(values, dim=0).abs().amax((1, 2)) / n
        m = torch.minimum(torch.arange(n), n - torch.arange(n))
        if float(size[m >= 0.75 * n / 2].sum()) <= target / d:
            return n
        n = _even(_GROWTH * n)
    return n


def _even(n: float) -> int:
    return 2 * math.ceil(n / 2)


def _reach(kernel: Kernel, edge: Tensor, target: float) -> Tensor | None:
    """For each axis the distance beyond which all kernels are below `target`, or None if they never are."""
    d = edge.numel()
    generator = torch.Generator().manual_seed(0)
    span = torch.where(edge > 0, edge, edge.amax().clamp(min=1.0))  # points on a plane: any period will do
    r = torch.cat(
        [torch.zeros(1, dtype=torch.float64), torch.logspace(-4, math.log10(REACH), 160, dtype=torch.float64)]
    )
    across = torch.rand(48, d, generator=generator, dtype=torch.float64) * 2 - 1
    across[0] = 0.0
    across[1::3] *= torch.rand(16, 1, generator=generator, dtype=torch.float64) ** 4  # near the axis, too
    found = []
    for k in range(d):
        points = (across * edge).expand(2, r.numel(), 48, d).clone()
        points[0, ..., k], points[1, ..., k] = (r * span[k])[:, None], -(r * span[k])[:, None]
        values = kernel(points)
        if not bool(torch.isfinite(values).all()):
            return None
        above = (values.abs().amax(-1) > target).any(2).any(0).nonzero()
        last = -1 if not above.numel() else int(above[-1])
        if last + 1 >= r.numel():
            return None
        found.append(float(r[last + 1] * span[k]))
    return torch.tensor(found, dtype=torch.float64).clamp(min=1e-3 * float(span.min()))


def _coefficients(kernel: Kernel, period: Tensor, reach: Tensor, n: Sequence[int]) -> Tensor:
    """FFT of the repeated kernel on a grid, ordered -n/2 .. n/2 - 1, for each kernel."""
    axes = [p * (torch.arange(m, dtype=torch.float64) / m - 0.5) for p, m in zip(period.tolist(), n, strict=True)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    total = kernel(grid)
    for copy in itertools.product((-1, 0, 1), repeat=len(n)):
        # the copy at distance `copy` periods matters on a slab only
        near = [
            _slab(a, shift * p, r) for a, shift, p, r in zip(axes, copy, period.tolist(), reach.tolist(), strict=True)
        ]
        if any(copy) and all(lo < hi for lo, hi in near):
            part = tuple(slice(lo, hi) for lo, hi in near)
            total[part] += kernel(grid[part] + torch.tensor(copy, dtype=torch.float64) * period)
    dims = tuple(range(1, len(n) + 1))
    values = torch.fft.ifftshift(total.movedim(-1, 0), dim=dims)
    c = torch.fft.fftshift(torch.fft.fftn(values, dim=dims), dim=dims) / math.prod(n)
    for k in dims:  # the mode -n/2 has no partner, and the sum would not be real
        c.narrow(k, 0, 1).zero_()
    return c


def _slab(axis: Tensor, shift: float, reach: float) -> tuple[int, int]:
    """The grid points that lie within `reach` after a shift."""
    inside = ((axis + shift).abs() <= reach).nonzero()
    return (int(inside[0]), int(inside[-1]) + 1) if inside.numel() else (0, 0)


def _along(size: Tensor, axis: int) -> Tensor:
    """The sum over all other axes."""
    others = [k for k in range(size.ndim) if k != axis]
    return size.sum(others) if others else size


def _tail(size: Tensor, axis: int, share: float) -> float:
    """The sum of the coefficients with |m| above `share` of the largest along an axis."""
    n = size.shape[axis]
    rest = _along(size, axis)
    m = (torch.arange(n) - n // 2).abs()
    return float(rest[m >= share * n / 2].sum())


def _trimmed(c: Tensor, size: Tensor, target: float) -> Tensor:
    """Without the outer modes that together stay below the target."""
    d = size.ndim
    for axis in range(d):
        n = size.shape[axis]
        rest = _along(size, axis)
        m = (torch.arange(n) - n // 2).abs()
        outer = torch.zeros(n // 2 + 1, dtype=rest.dtype).index_add_(0, m, rest).flip(0).cumsum(0).flip(0)
        keep = int((outer > target / (2 * d)).sum())  # modes |m| < keep
        half = min(n // 2, max(1, keep) + 1)
        c = c.narrow(axis + 1, n // 2 - half, 2 * half)
        size = size.narrow(axis, n // 2 - half, 2 * half)
    c = c.clone()
    for axis in range(d):
        c.narrow(axis + 1, 0, 1).zero_()
    return c


class FourierPlan:
    """The NUFFTs of two point sets, prepared once for each number of modes.

    Args:
        x: (M, D) points i.
        y: (N, D) points j.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.points = (x, y)
        self.centre, self.edge = extent(x, y)
        self._plans: dict[Any, Any] = {}

    def apply(self, s: Series, weights: Tensor, channels: Sequence[Channel], over_i: bool, how: Precision) -> Tensor:
        """sum_j of kernel k at x_i - y_j times weight r, added over the pairs (k, r) of each channel.

        Args:
            s: the series of the kernels.
            weights: (N, r), real; (M, r) if `over_i`.
            channels: what is added up in each column of the result.
            over_i: sum over i instead, a row for each j.
            how: the precision of the transforms.

        Returns: (M or N, number of channels), of the dtype of `weights`.
        """
        spectra = self.sources(s, weights, over_i, how)
        c = s.coefficients.to(how.dtype)
        c = c.conj() if over_i else c  # K is real: its mirror image has the conjugate series
        columns = []
        for channel in channels:
            columns.append(torch.stack([c[k] * spectra[r] for k, r in channel]).sum(0))
        return self.targets(s, columns, over_i, how).to(weights.dtype)

    def sources(self, s: Series, weights: Tensor, over_i: bool, how: Precision) -> list[Tensor]:
        """Type 1: the spectrum of each weight on the modes of `s`. Two real weights share a complex transform."""
        n = weights.shape[1]
        real = weights.to(torch.float64 if how.double else torch.float32)
        packed = torch.zeros((n + 1) // 2, weights.shape[0], dtype=how.dtype)
        view = torch.view_as_real(packed)
        for r in range(n):
            view[r // 2, :, r % 2] = real[:, r]
        spectra = []
        for z in self._run(1, s, packed, over_i, how):
            reverse = z.flip(tuple(range(z.ndim))).roll((1,) * z.ndim, tuple(range(z.ndim))).conj()
            spectra += [(z + reverse) / 2, (z - reverse) / 2j]
        return spectra[:n]

    def targets(self, s: Series, columns: Sequence[Tensor], over_i: bool, how: Precision) -> Tensor:
        """Type 2: the values of each spectrum. Two real results share a complex transform."""
        zero = torch.zeros_like(columns[0])
        pairs = [
            columns[q] + 1j * (columns[q + 1] if q + 1 < len(columns) else zero) for q in range(0, len(columns), 2)
        ]
        z = self._run(2, s, torch.stack(pairs), over_i, how)
        out = torch.view_as_real(z).permute(1, 0, 2).reshape(z.shape[1], -1)
        return out[:, : len(columns)]

    def _run(self, kind: int, s: Series, data: Tensor, over_i: bool, how: Precision) -> Tensor:
        """The transforms of all rows of `data`, a few at a time."""
        side = int((kind == 1) != over_i)
        n = self.points[side].shape[0]
        step = max(1, min(8, _BATCH // max(1, n)))
        parts = [self._plan(kind, side, s, p.shape[0], how).execute(p.numpy()) for p in data.split(step)]
        shape = s.modes if kind == 1 else (n,)
        return torch.cat([torch.from_numpy(p).reshape(-1, *shape) for p in parts])

    def _plan(self, kind: int, side: int, s: Series, n_trans: int, how: Precision) -> Any:
        key = (kind, side, s.modes, tuple(s.period.tolist()), n_trans, how)
        if key not in self._plans:
            import finufft

            plan = finufft.Plan(
                kind,
                s.modes,
                n_trans,
                eps=how.accuracy,
                isign=-1 if kind == 1 else 1,
                dtype="complex128" if how.double else "complex64",
                nthreads=torch.get_num_threads(),
            )
            t = (2 * math.pi) * (self.points[side] - self.centre) / s.period
            t = t.to(torch.float64 if how.double else torch.float32)
            plan.setpts(*(t[:, k].contiguous().numpy() for k in range(t.shape[1])))
            if len(self._plans) > 8:
                self._plans.clear()
            self._plans[key] = plan
        return self._plans[key]
