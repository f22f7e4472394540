"""Iterations of the fast gradient projection for total variation of real images, as loops that numba compiles.

`variation.py` defines the iteration in torch; this is the same where no derivative is asked for. Several iterations
pass over the rows together: iteration k treats row i as soon as iteration k - 1 has treated row i + 1, so that a row
stays in the cache for all of them. Threads take bands of rows with a margin as wide as the number of iterations, and so
share nothing. They are ordinary threads that release the GIL, because numba's own pool aborts when two threads enter
it.

Only `variation.py` imports this file, when it first needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pullback.functionals._compile import compiled

_MIN_WORK = 400_000  # pixels times iterations; below this a thread costs more than it saves


# One row each, in functions of their own: in one body LLVM makes no vector code of most of these loops (3.3 ms an
# iteration at 1024 x 1024, against 0.6).


@compiled
def _primal(data: Any, g1: Any, g2: Any, c1: Any, c2: Any, out: Any) -> None:
    """Out = data - K^H (g1, g2), but for what the row above contributes."""
    out[0] = data[0] + c1 * g1[0] + c2 * g2[0]
    for j in range(1, out.size):
        out[j] = data[j] + c1 * g1[j] + c2 * (g2[j] - g2[j - 1])


@compiled
def _above(out: Any, over: Any, c1: Any) -> None:
    """Out -= c1 over."""
    for j in range(out.size):
        out[j] -= c1 * over[j]


@compiled
def _ascend(r1: Any, r2: Any, u: Any, below: Any, f1: Any, f2: Any, a: Any, b: Any) -> None:
    """(a, b) = r + rate K u, for the row u and the one below it; b is zero in the last column."""
    for j in range(a.size):
        a[j] = r1[j] + f1 * (below[j] - u[j])
    for j in range(a.size - 1):
        b[j] = r2[j] + f2 * (u[j + 1] - u[j])


@compiled
def _project(a: Any, b: Any, radius: Any, shrink: Any) -> None:
    """(a, b) on the disc of the radius, in place."""
    for j in range(a.size):
        shrink[j] = radius / max(radius, np.sqrt(a[j] * a[j] + b[j] * b[j]))
    for j in range(a.size):
        a[j] *= shrink[j]
        b[j] *= shrink[j]


@compiled
def _clip(a: Any, b: Any, radius: Any) -> None:
    """(a, b) on the square, in place."""
    for j in range(a.size):
        a[j] = min(max(a[j], -radius), radius)
        b[j] = min(max(b[j], -radius), radius)


@compiled
def _extrapolate(p: Any, r: Any, q: Any, momentum: Any) -> None:
    """R = p + momentum (p - q); q = p."""
    for j in range(p.size):
        r[j] = p[j] + momentum * (p[j] - q[j])
        q[j] = p[j]


@compiled
def _row_gap(
    here: Any, below: Any, q1: Any, q2: Any, radius: Any, c1: Any, c2: Any, isotropic: bool, terms: Any
) -> Any:
    """sum_j radius |(K u)_j| - <q_j, (K u)_j> over one row; every term is >= 0."""
    m = here.size
    if isotropic:
        for j in range(m - 1):
            a, b = c1 * (below[j] - here[j]), c2 * (here[j + 1] - here[j])
            terms[j] = radius * np.sqrt(a * a + b * b) - q1[j] * a - q2[j] * b
    else:
        for j in range(m - 1):
            a, b = c1 * (below[j] - here[j]), c2 * (here[j + 1] - here[j])
            terms[j] = radius * (abs(a) + abs(b)) - q1[j] * a - q2[j] * b
    a = c1 * (below[m - 1] - here[m - 1])
    terms[m - 1] = radius * abs(a) - q1[m - 1] * a
    return terms.sum()


@compiled
def _iterate(x: Any, r: Any, q: Any, momenta: Any, radius: Any, rate: Any, c1: Any, c2: Any, isotropic: bool) -> None:
    """One iteration for every momentum m, in place: u = x - K^H r; p = proj(r + rate K u); r = p + m (p - q); q = p.

    x is (n, m); r and q are (2, n, m); K u = (c1 (u[i+1] - u[i]), c2 (u[:, j+1] - u[:, j])), zero in the last row and
    column, where r and q are zero, too.
    """
    n, m = x.shape
    steps = momenta.size
    rows = np.empty((steps, m), x.dtype)  # u of the row that each iteration treats next
    below, a, shrink = np.empty(m, x.dtype), np.empty(m, x.dtype), np.empty(m, x.dtype)
    b = np.zeros(m, x.dtype)
    for s in range(-1, n + steps - 1):
        for k in range(max(0, s - n + 1), min(steps, s + 2)):
            i = s - k  # -1 prepares row 0
            u = rows[k]
            if i + 1 < n:
                _primal(x[i + 1], r[0, i + 1], r[1, i + 1], c1, c2, below)
                if i >= 0:
                    _above(below, r[0, i], c1)
            else:
                below[:] = u
            if i >= 0:
                _ascend(r[0, i], r[1, i], u, below, rate * c1, rate * c2, a, b)
                if isotropic:
                    _project(a, b, radius, shrink)
                else:
                    _clip(a, b, radius)
                _extrapolate(a, r[0, i], q[0, i], momenta[k])
                _extrapolate(b, r[1, i], q[1, i], momenta[k])
            u[:] = below


@compiled
def _finish(x: Any, q: Any, radius: Any, c1: Any, c2: Any, isotropic: bool, first: int, last: int, out: Any) -> float:
    """Out = x - K^H q in the rows first..last; returns their part of the duality gap radius |K out| - <q, K out>."""
    n, m = x.shape
    terms = np.empty(m, x.dtype)
    gap = 0.0
    for i in range(first, last + 1):
        if i < n:
            _primal(x[i], q[0, i], q[1, i], c1, c2, out[i])
        if 0 < i < n:
            _above(out[i], q[0, i - 1], c1)
        if i > first:
            gap += _row_gap(out[i - 1], out[min(i, n - 1)], q[0, i - 1], q[1, i - 1], radius, c1, c2, isotropic, terms)
    return gap


class _Band:
    """The rows first..last of an image, with a margin that other bands treat, too."""

    def __init__(self, x: Any, q: Any, out: Any, first: int, last: int, margin: int) -> None:
        low, high = max(0, first - margin), min(len(x), last + margin)
        whole = high - low == len(x)
        self.x = x[low:high]
        self.q = q if whole else q[:, low:high].copy()
        self.r = self.q.copy()
        self.u = out if whole else np.empty_like(self.x)
        self.rows = slice(first, last)
        self.first, self.last, self.low = first - low, last - low, low

    def fetch(self, other: _Band) -> None:
        """Take over the rows of the margin that `other` owns."""
        a, b = max(self.low, other.rows.start), min(self.low + len(self.x), other.rows.stop)
        if a < b:
            for mine, its in ((self.r, other.r), (self.q, other.q)):
                mine[:, a - self.low : b - self.low] = its[:, a - other.low : b - other.low]


def proximal(
    x: torch.Tensor, radii: torch.Tensor, dual: torch.Tensor, rate: float, scales: tuple[float, ...], isotropic: bool,
    maxiter: int, rtol: float, block: int,
) -> torch.Tensor:  # fmt: skip
    """The prox of total variation for each image of a batch.

    Args:
        x: (b, n, m), contiguous, float32 or float64, on the CPU.
        radii: (b,), the step of each image.
        dual: (b, 2, n, m), where to start; it is overwritten by where the iteration ended.
        rate: 1 / |K|^2.
        scales: 1 / sampling of both axes.
        isotropic, maxiter, rtol: as in `TV`.
        block: iterations between two computations of the gap.
    """
    out = torch.empty_like(x)
    n_rows = x.shape[1]
    n_bands = min(torch.get_num_threads(), x[0].numel() * block // _MIN_WORK, n_rows // (4 * block))
    bounds = [n_rows * k // max(1, n_bands) for k in range(max(1, n_bands) + 1)]
    with ThreadPoolExecutor(max(1, n_bands)) as pool:
        for image, radius, q, u in zip(x.numpy(), radii.tolist(), dual.numpy(), out.numpy(), strict=True):
            bands = [_Band(image, q, u, a, b, block) for a, b in itertools.pairwise(bounds)]
            numbers = [image.dtype.type(v) for v in (radius, rate, *scales)]
            _solve(pool, bands, numbers, isotropic, maxiter, rtol**2 / 2 * float(np.vdot(image, image)), block)
            for band in bands if len(bands) > 1 else ():
                q[:, band.rows] = band.q[:, band.first : band.last]
                u[band.rows] = band.u[band.first : band.last]
    return out


def _solve(
    pool: ThreadPoolExecutor,
    bands: list[_Band],
    numbers: list[Any],
    isotropic: bool,
    maxiter: int,
    goal: float,
    block: int,
) -> None:
    """Iterate until the gap is at most `goal`, where that is not zero."""
    radius, _, c1, c2 = numbers
    over: Callable[..., Iterator[Any]] = map if len(bands) == 1 else pool.map
    t, done = 1.0, 0
    while done < maxiter:
        momenta = np.empty(min(block, maxiter - done), radius.dtype)
        for k in range(momenta.size):
            grown = (1 + (1 + 4 * t * t) ** 0.5) / 2
            momenta[k], t = (t - 1) / grown, grown
        done += momenta.size
        for _ in over(lambda b: _iterate(b.x, b.r, b.q, momenta, *numbers, isotropic), bands):  # noqa: B023
            pass
        for left, right in itertools.pairwise(bands):
            left.fetch(right)
            right.fetch(left)
        if done == maxiter or (goal and momenta.size == block):
            gaps = over(lambda b: _finish(b.x, b.q, radius, c1, c2, isotropic, b.first, b.last, b.u), bands)
            if sum(gaps) <= goal and goal:
                return
