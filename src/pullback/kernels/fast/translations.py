"""A kernel between far cells of one level, as small matrices between compressed expansions.

K(x - y), for x in one cell and y in another o cells away, is interpolated at the p^D Chebyshev points of both; the
matrix depends on o alone. Its range lies, for every o, close to that of few vectors: U, found from a sample of the
columns. The points are symmetric, and so are the far cells, so the rows lie close to that of U reversed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.kernels.fast.interpolation import coefficients, nodes

Kernel = Callable[[Tensor], Tensor]
Seen = tuple[Tensor, Tensor, Tensor]
_SPARE = 5.0  # rows are as many as a smaller cut would need: fewer magnify what is left out
_EVALUATED = 1 << 20  # values of a kernel at a time


@dataclass(frozen=True)
class Translation:
    """One kernel between the cells of one level.

    Args:
        up: (p^D, r), moments to compressed ones.
        down: (r, p^D), compressed values to coefficients.
        matrices: (offsets + 1, r, r) in the order of `offsets`, to be multiplied from the left by rows of compressed
            moments; the last one is zero.
    """

    up: Tensor
    down: Tensor
    matrices: Tensor

    def block(self, choice: Tensor) -> Tensor:
        """The matrix between all children of two cells: choice (2^D, 2^D) numbers the offset for each pair."""
        n, r = choice.shape[0], self.up.shape[1]
        return self.matrices[choice].permute(0, 2, 1, 3).reshape(n * r, n * r)


@lru_cache(maxsize=8)
def offsets(dim: int) -> Tensor:
    """(7^D - 3^D, D): where cells can lie that do not touch, but whose parents do."""
    o = torch.cartesian_prod(*[torch.arange(-3, 4)] * dim).reshape(-1, dim)
    return o[o.abs().amax(1) > 1]


@lru_cache(maxsize=8)
def choices(dim: int) -> tuple[Tensor, Tensor]:
    """For each offset of two parents, 3^D in all, and each pair of their children, (source, target), what lies between.

    Returns: (3^D, 2^D, 2^D) numbers of `offsets`, the last + 1 for children that touch; and (3^D, 2^D, 2^D) the
        offsets of children that touch, among 3^D; -1 for others.
    """
    parents = neighbours(dim)
    child = torch.arange(2**dim)[:, None] >> torch.arange(dim) & 1
    o = 2 * parents[:, None, None] + child[:, None] - child[None, :]
    far = o.abs().amax(-1) > 1
    numbers = torch.full((7,) * dim, len(offsets(dim)))
    numbers[tuple((offsets(dim) + 3).T)] = torch.arange(len(offsets(dim)))
    near = ((o + 1) * 3 ** torch.arange(dim - 1, -1, -1)).sum(-1)
    return numbers[tuple((o + 3).movedim(-1, 0))], torch.where(far, -1, near)


@lru_cache(maxsize=8)
def neighbours(dim: int) -> Tensor:
    """(3^D, D) offsets of cells that touch."""
    return torch.cartesian_prod(*[torch.arange(-1, 2)] * dim).reshape(-1, dim)


def translations(
    kernel: Kernel, edge: float, occurring: Tensor, seen: Seen, order: int, cut: Tensor, dtype: torch.dtype
) -> list[Translation]:
    """The translations of each component of a kernel on a level.

    Args:
        kernel: differences (..., D), float64, to values (..., c).
        edge: of the cells.
        occurring: numbers of the offsets that are needed; the matrices of others are zero.
        seen: random far pairs as they occur: targets and sources in their cells, offsets of the sources.
        order: p.
        cut: (c,) what may be left out of the values of each component, root mean square.
        dtype: of the result.
    """
    dim = seen[2].shape[1]
    o = offsets(dim)[occurring].double()
    t = nodes(order)
    grid = torch.cartesian_prod(*[t] * dim).reshape(-1, dim)
    sample = _sample(kernel, edge, o, seen, grid).unbind(-1)
    bases = [_basis(s, float(e)) for s, e in zip(sample, cut, strict=True)]
    convert = reduce(torch.kron, [coefficients(order)] * dim)  # (p^D, p^D): values at the nodes -> coefficients

    # the differences of nodes along an axis repeat, so few of the p^2D values between two cells differ
    gaps, where = torch.unique(((t[:, None] - t) / 2 * 1e13).round() / 1e13, return_inverse=True)
    q = len(gaps)
    index = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(dim):
        index = (index[:, None, :, None] * q + where[None, :, None, :]).reshape(len(index) * order, -1)
    steps = torch.cartesian_prod(*[gaps] * dim).reshape(-1, dim)
    n = max(1, _EVALUATED // max(len(steps), *(len(rows) ** 2 for _, rows, _ in bases)))
    reduced: list[list[Tensor]] = [[] for _ in bases]
    for part in o.split(n):
        values = checked(kernel, (steps[:, None] - part) * edge)
        for c, (_, rows, inverse) in enumerate(bases):
            picked = index[rows[:, None], len(grid) - 1 - rows]
            r, k, m = *inverse.shape, len(part)
            between = values[..., c].index_select(0, picked.flatten()).view(k, k * m)  # (target, source * offset)
            half = (inverse @ between).view(r, k, m).transpose(0, 1).reshape(k, r * m)
            reduced[c].append((inverse @ half).view(r, r, m).movedim(-1, 0))  # (offset, source, target)
    found = []
    for (u, _, _), parts in zip(bases, reduced, strict=True):
        matrices = torch.zeros(len(offsets(dim)) + 1, u.shape[1], u.shape[1], dtype=dtype)
        matrices[occurring] = torch.cat(parts).to(dtype)
        up = (convert @ u.flip(0)).to(dtype)
        found.append(Translation(up, (u.T @ convert.T).to(dtype), matrices))
    return found


def checked(kernel: Kernel, d: Tensor) -> Tensor:
    """Its values. Raises ArgumentError unless they are finite."""
    values = kernel(d)
    if not bool(torch.isfinite(values).all()):
        raise ArgumentError("the kernel has values that are not finite away from x = y; use the exact sum")
    return values


def _sample(kernel: Kernel, edge: float, every: Tensor, seen: Seen, grid: Tensor) -> Tensor:
    """(p^D, columns, c): the nodes of a cell against far points.

    These are nodes of the cells at every offset, sources as they occur, and, for the rows, targets reversed.
    """
    targets, sources, o = seen
    n = max(2 * len(grid), 300)
    some = grid[torch.randint(len(grid), (n,), generator=torch.Generator().manual_seed(0))]
    far = torch.cat([every[torch.arange(n) % len(every)] + some / 2, o + sources / 2, o - targets / 2])
    return checked(kernel, (grid[:, None] / 2 - far) * edge)


def _basis(sample: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """(p^D, r) orthonormal U whose span holds the columns but for a part of which the root mean square is `cut`.

    Returns: U; some rows S, a few more than r; and (r, S), the coefficients of a vector in the span from its values in
        these rows. A matrix whose columns lie in the span need be known in these rows only.
    """
    u, sizes, rest = _directions(sample, (cut / _SPARE) ** 2 * sample.numel())
    r = int((sizes.flip(0).cumsum(0).flip(0) + rest > cut**2 * sample.numel()).sum())
    rows = torch.linalg.lu(u)[0].argmax(0)[: u.shape[1]]
    return u[:, :r], rows, torch.linalg.pinv(u[rows, :r])


def _directions(sample: Tensor, budget: float) -> tuple[Tensor, Tensor, float]:
    """(orthonormal directions, squares of their singular values, falling, sum of the others, at most `budget`).

    Eigenvectors of A A^T see singular values down to 1e-7; a second pass over what is left sees the rest.
    """
    parts, sizes, rest = [sample[:, :0]], [sample[0, :0]], 0.0
    for _ in range(2):
        values, vectors = torch.linalg.eigh(sample @ sample.T)
        values, seen = values.clamp(min=0), 1e-13 * float(values[-1])
        wanted = values.cumsum(0) > budget  # values rise
        keep = wanted & (values > seen)
        rest = float(values[~keep].sum())
        parts.append(vectors[:, keep].flip(1))
        sizes.append(values[keep].flip(0))
        if budget >= seen and torch.equal(keep, wanted):
            break
        sample = sample - parts[-1] @ (parts[-1].T @ sample)
    return torch.linalg.qr(torch.cat(parts, 1))[0], torch.cat(sizes), rest
