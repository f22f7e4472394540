"""Chebyshev expansions in cells: moments of sources, their way up and down a tree, values at targets.

A function of a cell is its coefficients in products of Chebyshev polynomials T_k of degree below p in each of the
coordinates -1 <= t <= 1 of the cell; a set of weights acts through its moments sum_j w_j T_k(t_j). Both are vectors of
p^D numbers, and what moves them to another cell is exact; only the kernel between far cells is interpolated.

Source: Fong and Darve (2009), doi 10.1016/j.jcp.2009.08.031.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pullback.kernels.fast.cells import Tree

BLOCK = 16  # points of one cell that are treated together
_CHUNK = 1 << 19  # numbers of a factor that are made at once; they should stay in the cache


@lru_cache(maxsize=64)
def nodes(order: int) -> Tensor:
    """The zeros of T_p, falling."""
    return torch.cos(math.pi * (torch.arange(order, dtype=torch.float64) + 0.5) / order)


def polynomials(t: Tensor, order: int) -> Tensor:
    """T_0 .. T_{p-1} at t, along a new first axis."""
    out = t.new_empty(order, *t.shape)
    out[0] = 1
    if order > 1:
        out[1] = t
    twice = 2 * t
    for k in range(2, order):
        torch.addcmul(-out[k - 2], twice, out[k - 1], out=out[k])
    return out


@lru_cache(maxsize=64)
def coefficients(order: int) -> Tensor:
    """(p, p): the coefficients of the interpolant from its values at the nodes."""
    t = polynomials(nodes(order), order) * (2 / order)
    t[0] /= 2
    return t


@lru_cache(maxsize=64)
def halves(order: int) -> Tensor:
    """(2, p, p): S with T_k((t + s) / 2) = sum_j S[k, j] T_j(t), for s = -1 and 1."""
    t = nodes(order)
    values = torch.stack([polynomials((t + s) / 2, order) for s in (-1, 1)])
    return values @ coefficients(order).T


def along(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a (p, p) matrix along each axis: (n, p^D) -> (n, p^D)."""
    n, size = values.shape
    for m in matrices:
        p = m.shape[0]
        values = values.reshape(n, p, size // p).transpose(1, 2) @ m.T  # axis 0 becomes the last one
    return values.reshape(n, size)


class Expansions:
    """The points of a tree in the coordinates of the cells at its leaves, in blocks of equal size.

    Args:
        tree: the tree; its levels are final.

    Attributes:
        bases: number of the first cell of each level from level 2 on, where far fields begin.
        size: number of cells.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.bases, self.size = [0, 0], 0
        n, dim = tree.points.shape
        start, count, cell, corner, depth = [], [], [], [], []
        for k, level in enumerate(tree.levels[2:], 2):
            whole = level.whole.nonzero().flatten()
            start.append(level.start[whole])
            count.append(level.counts[whole])
            cell.append(whole + self.size)
            corner.append(level.at[whole])
            depth.append(torch.full_like(whole, k))
            self.bases.append(self.size)
            self.size += len(level)
        self.cell = torch.empty(0, dtype=torch.int64)
        self.index = torch.empty(0, BLOCK, dtype=torch.int64)
        self.t = torch.empty(dim, 0, BLOCK, dtype=torch.float64)
        self.place = torch.zeros(n, dtype=torch.int64)  # where each point stands in the blocks, from 1 on; or 0
        if not start:
            return
        starts, counts = torch.cat(start), torch.cat(count)
        blocks = (counts + BLOCK - 1) // BLOCK
        leaf = torch.repeat_interleave(blocks)
        skipped = BLOCK * (torch.arange(len(leaf)) - (blocks.cumsum(0) - blocks)[leaf])
        inside = skipped[:, None] + torch.arange(BLOCK)
        valid = inside < counts[leaf][:, None]
        at = torch.where(valid, starts[leaf][:, None] + inside, 0)
        self.cell = torch.cat(cell)[leaf]
        self.index = torch.where(valid, tree.order[at], n)
        scale = (2.0 ** torch.cat(depth))[leaf][:, None]
        corners = torch.cat(corner)[leaf].double()
        self.t = torch.stack([(tree.points[:, k][at] * scale - corners[:, k, None]) * 2 - 1 for k in range(dim)])
        self.t.masked_fill_(~valid, 0.0)
        self.place[self.index[valid]] = valid.flatten().nonzero().flatten() + 1

    def _chunks(self, p: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks with the polynomials of axis 0, (b, BLOCK, p), and those of the others, (b, BLOCK, p^(D-1))."""
        dim = self.t.shape[0]
        step = max(1, _CHUNK // (BLOCK * p ** max(dim - 1, 1)))
        for first in range(0, self.t.shape[1], step):
            part = slice(first, first + step)
            factors = polynomials(self.t[:, part].to(dtype), p).permute(1, 2, 3, 0)
            rest = factors.new_ones(*factors.shape[1:3], 1)
            for f in factors[1:]:
                rest = (rest[..., :, None] * f[..., None, :]).flatten(2)
            yield part, factors[0], rest

    def moments(self, weights: Tensor, order: int) -> Tensor:
        """The moments in all cells of level 2 and below: (w, N) -> (w, cells, p^D)."""
        w = weights.shape[0]
        out = weights.new_zeros(w, self.size, order**self.tree.dim)
        padded = torch.cat([weights, weights.new_zeros(w, 1)], 1)
        for part, head, rest in self._chunks(order, weights.dtype):
            cell = self.cell[part]
            values = padded[:, self.index[part]]
            for column, into in zip(values, out, strict=True):
                m = torch.bmm((head * column[..., None]).transpose(1, 2), rest)
                into.index_add_(0, cell, m.flatten(1))
        for k in range(len(self.tree.levels) - 1, 2, -1):
            level = self.tree.levels[k]
            here, above = out[:, self.bases[k] :][:, : len(level)], out[:, self.bases[k - 1] : self.bases[k]]
            for octant in range(2**self.tree.dim):
                chosen = (level.octant == octant).nonzero().flatten()
                if len(chosen):
                    moved = along(here[:, chosen].flatten(0, 1), self._halves(order, octant, out.dtype))
                    above.index_add_(1, level.parent[chosen], moved.view(w, len(chosen), -1))
        return out

    def values(self, local: Tensor, order: int) -> Tensor:
        """The values at the points of the functions given in the cells, which add up: (w, cells, p^D) -> (w, N).

        Overwrites `local`.
        """
        w = local.shape[0]
        for k in range(3, len(self.tree.levels)):
            level = self.tree.levels[k]
            here, above = local[:, self.bases[k] :][:, : len(level)], local[:, self.bases[k - 1] : self.bases[k]]
            for octant in range(2**self.tree.dim):
                chosen = (level.octant == octant).nonzero().flatten()
                if len(chosen):
                    matrices = [m.T for m in self._halves(order, octant, local.dtype)]
                    moved = along(above[:, level.parent[chosen]].flatten(0, 1), matrices)
                    here.index_add_(1, chosen, moved.view(w, len(chosen), -1))
        out = local.new_zeros(w, self.index.numel() + 1)
        view = out[:, 1:].view(w, *self.index.shape)
        for part, head, rest in self._chunks(order, local.dtype):
            for own, into in zip(local, view, strict=True):
                f = own[self.cell[part]].view(-1, order, rest.shape[-1]).transpose(1, 2)
                torch.sum(torch.bmm(rest, f) * head, -1, out=into[part])
        return out[:, self.place]

    def _halves(self, order: int, octant: int, dtype: torch.dtype) -> list[Tensor]:
        s = halves(order).to(dtype)
        return [s[octant >> k & 1] for k in range(self.tree.dim)]
