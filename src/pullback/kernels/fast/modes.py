"""(alpha + K)^-1 in the span of Fourier modes: a preconditioner for kernels that are smooth functions of x - y.

K = Phi Phi^T with columns sqrt(c_0), sqrt(2 c_m) cos(w_m . x), sqrt(2 c_m) sin(w_m . x), c_m the coefficients of the
kernel's Fourier series. So (alpha + K)^-1 = (1 - Phi (alpha + Phi^T Phi)^-1 Phi^T) / alpha, and Phi^T Phi, whose
entries are sums of exponentials over the points, comes from one non-uniform FFT. Source: Greengard, Rachh & Barnett
2025, doi 10.1137/23M1610884, who solve the system of Phi^T Phi itself by iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.kernels.fast.analyse import Refused, analyse
from pullback.kernels.fast.fourier import Precision, Series, series
from pullback.kernels.fast.sum import FastSum
from pullback.kernels.ir.reductions import Program

MODES = 2048  # real modes if nobody says how many: a dense matrix of them is factorised
_PRECISION = Precision(1e-12, True)
_TARGET = 1e-8  # of the series, relative to the mean of the kernel
_SMALLEST = 1e-11  # alpha relative to the largest eigenvalue, below which rounding wins


def fourier(
    program: Program, tensors: Sequence[Tensor], n: int, alpha: Tensor, count: int
) -> Callable[[Tensor], Tensor]:
    """Give r -> (alpha + K_c)^-1 r, where K_c are the `count` largest modes of K.

    Args:
        program: sum over j of K alone.
        tensors: its arguments, without batch axes.
        n: number of points.
        alpha: > 0, one number.
        count: modes at most, cosines and sines counted apart.

    Raises: ArgumentError if K is no function of x - y with a short Fourier series, or not positive.
    Cost: a non-uniform FFT of n points and O(count^3); then two such FFTs and O(count^2) for each r.
    """
    if tensors[0].device.type != "cpu":
        raise _unfit(f"it runs on the CPU; the tensors lie on {tensors[0].device}")
    try:
        one = FastSum(analyse(program), tensors, n, n, _TARGET)
        ((term,),) = one.form.components[0]
        if term.a is not None or term.b is not None or term.k is None or not torch.equal(one.points.x, one.points.y):
            raise Refused("it is no function of x - y of the same points")
    except (Refused, ValueError) as reason:
        raise _unfit(str(reason)) from None
    size = one.sizes_of_kernels()
    s = series(lambda d: one.kernel(d) / size, one.points.fourier.edge, _TARGET)
    if s is None:
        raise _unfit("it has no short Fourier series on the box of the points")
    c = s.coefficients[0].real * size
    c = (c + _mirrored(c)) / 2
    if float(c.min()) < -1e-4 * float(c.max()):
        raise _unfit("it is not positive definite: a Fourier coefficient is negative")
    middle = [m // 2 for m in s.modes]
    flat = torch.arange(c.numel()).view(c.shape)
    half = flat[flat < int(flat[tuple(middle)])].flatten()  # one of each pair m, -m
    half = half[c.flatten()[half] > 1e-6 * float(alpha) / n]
    order = c.flatten()[half].argsort(descending=True)
    half = half[order[: max(0, (count - 1) // 2)]]
    m = torch.stack(torch.unravel_index(half, c.shape), -1) - torch.tensor(middle)
    root = torch.cat([c[tuple(middle)].clamp(min=0).sqrt().view(1), *2 * [(2 * c.flatten()[half]).sqrt()]])
    gram = root[:, None] * _gram(one, s, m) * root
    damp = max(float(alpha), _SMALLEST * float(gram.diagonal().sum()))
    factor = torch.linalg.cholesky(gram + damp * torch.eye(len(gram), dtype=gram.dtype))

    def features(r: Tensor) -> Tensor:
        """Phi^T r: (modes, columns)."""
        found = torch.stack([v.flatten() for v in one.points.fourier.sources(s, r, False, _PRECISION)], -1)
        own = found[half]  # sum of exp(-i w x) r
        zero = found[int(flat[tuple(middle)])][None]
        return root[:, None] * torch.cat([zero.real, own.real, -own.imag])

    def values(w: Tensor) -> Tensor:
        """Phi w: (points, columns)."""
        w = root[:, None] * w
        k = len(half)
        grid = torch.zeros(c.numel(), w.shape[1], dtype=torch.complex128)
        grid[half] = torch.complex(w[1 : 1 + k], -w[1 + k :]) / 2
        grid += _mirrored(grid.T.reshape(-1, *c.shape), 1).flatten(1).T.conj()
        grid[int(flat[tuple(middle)])] = w[0].to(grid.dtype)
        columns = list(grid.T.reshape(-1, *c.shape))
        return one.points.fourier.targets(s, columns, False, _PRECISION)

    def inverse(r: Tensor) -> Tensor:
        z = r.double()
        return ((z - values(torch.cholesky_solve(features(z), factor))) / damp).to(r.dtype)

    return inverse


def _unfit(reason: str) -> ArgumentError:
    return ArgumentError(
        f"solve: preconditioner='fourier' needs a positive kernel that is a smooth function of x - y in at most three "
        f"dimensions: {reason}; use 'nystrom'"
    )


def _mirrored(c: Tensor, first: int = 0) -> Tensor:
    """What c is at -m, for modes -n/2 .. n/2 - 1; the mode -n/2 stays."""
    axes = tuple(range(first, c.ndim))
    return c.flip(axes).roll((1,) * len(axes), axes)


def _gram(one: FastSum, s: Series, m: Tensor) -> Tensor:
    """Inner products over the points of 1, cos(w_m . x) and sin(w_m . x)."""
    double = Series(s.period, torch.empty(1, *(2 * k for k in s.modes)))
    ones = torch.ones(one.n, 1, dtype=torch.float64)
    (e,) = one.points.fourier.sources(double, ones, False, _PRECISION)
    e = e.conj()  # e at k: sum over j of exp(i w_k x_j), modes -n .. n - 1
    centre = torch.tensor(double.modes) // 2

    def at(k: Tensor) -> Tensor:
        return e[tuple((k + centre).unbind(-1))]

    less, more, own = at(m[:, None] - m), at(m[:, None] + m), at(m)
    cc, ss, cs = (less + more).real / 2, (less - more).real / 2, (more - less).imag / 2
    first = torch.cat([torch.tensor([[float(one.n)]], dtype=torch.float64), own.real[None], own.imag[None]], 1)
    rest = torch.cat([torch.cat([cc, cs], 1), torch.cat([cs.T, ss], 1)])
    return torch.cat([first, torch.cat([first[:, 1:].T, rest], 1)])
