"""Cells of a cube that is halved again and again, and the points that lie in them.

Two point sets in one cube get congruent cells: what depends on the difference of two cells of a level depends on their
distance in cells only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

DEPTH = 26  # levels below the cube; doubles resolve what is this small to 1e-8
_TABLE = 13  # bits that are spread at once


@dataclass
class Level:
    """The cells of one level, in the order of their points.

    Args:
        start, end: (n,) the points of each cell, in the sorted order.
        at: (n, D) integer coordinates, in cells of this level.
        parent: (n,) number of the parent in the level above.
        octant: (n,) which child it is: bit k is set in the upper half of axis k.
        children: (n, 2^D) number of each child in the level below; -1 where there is none.
    """

    start: Tensor
    end: Tensor
    at: Tensor
    parent: Tensor
    octant: Tensor
    children: Tensor

    def __len__(self) -> int:
        return self.start.shape[0]

    @property
    def counts(self) -> Tensor:
        """(n,) points in each cell."""
        return self.end - self.start

    @property
    def whole(self) -> Tensor:
        """(n,) which cells are not split."""
        return (self.children < 0).all(1)


@dataclass
class Tree:
    """The points of a set in the order of their cells; levels are made where `split` asks for them.

    Args:
        points: (N, D) float64 in [0, 1).
    """

    points: Tensor
    order: Tensor = field(init=False)  # (N,) sorted points are points[order]
    levels: list[Level] = field(init=False)

    def __post_init__(self) -> None:
        n, dim = self.points.shape
        whole = (self.points * 2**DEPTH).to(torch.int64).clamp_(0, 2**DEPTH - 1)
        top = min(DEPTH, 60 // dim)
        words = [_interleaved(whole >> (DEPTH - top))]
        order = _argsort(words[0])
        code = words[0][order]
        self._apart = _apart(code, dim, top)
        if top < DEPTH and n and int(_runs(code)) > 16:  # points that only further levels tell apart
            low = _interleaved(whole & ((1 << (DEPTH - top)) - 1))[order]
            order = _refined(order, code, low)
            below = _apart(_interleaved(whole & ((1 << (DEPTH - top)) - 1))[order], dim, DEPTH - top)
            self._apart = torch.where(self._apart > top, below + top, self._apart)
        if n:
            self._apart[0] = 0
        self.order = order
        self.points = self.points[order]
        zero = torch.zeros(min(n, 1), dtype=torch.int64)
        none = torch.full((len(zero), 2**dim), -1)
        self.levels = [Level(zero, zero + n, torch.zeros(len(zero), dim, dtype=torch.int64), zero, zero, none)]

    @property
    def dim(self) -> int:
        """Number of axes."""
        return self.points.shape[1]

    def split(self, cells: Tensor) -> None:
        """Add the children of these cells of the lowest level, where they hold points, as a new level."""
        above, depth, dim = self.levels[-1], len(self.levels), self.dim
        chosen = torch.zeros(len(above), dtype=torch.bool)
        chosen[cells] = True
        start = (self._apart <= depth).nonzero().flatten()
        end = torch.cat([start[1:], start.new_full((1,), self.points.shape[0])])
        parent = torch.searchsorted(above.start, start, right=True) - 1
        mine = (parent >= 0) & chosen[parent] & (start < above.end[parent])  # other cells may end above
        start, end, parent = start[mine], end[mine], parent[mine]
        at = (self.points[start] * 2**depth).to(torch.int64).clamp_(0, 2**depth - 1)
        octant = ((at & 1) << torch.arange(dim)).sum(1)
        above.children[parent, octant] = torch.arange(len(start))
        none = torch.full((len(start), 2**dim), -1)
        self.levels.append(Level(start, end, at, parent, octant, none))


def _argsort(keys: Tensor) -> Tensor:
    """The order of integer keys; NumPy's sort is ten times faster than torch's."""
    return torch.from_numpy(keys.numpy().argsort())


def _refined(order: Tensor, code: Tensor, low: Tensor) -> Tensor:
    """The order by two words, from the order by the first and both words in that order."""
    by_low = torch.from_numpy(low.numpy().argsort(kind="stable"))
    by_code = torch.from_numpy(code[by_low].numpy().argsort(kind="stable"))
    return order[by_low[by_code]]


def _runs(code: Tensor) -> Tensor:
    """The length of the longest run of equal codes."""
    first = torch.cat([torch.tensor([0]), (code.diff() != 0).nonzero().flatten() + 1, torch.tensor([len(code)])])
    return first.diff().max()


def _apart(code: Tensor, dim: int, levels: int) -> Tensor:
    """The level at which each point and its predecessor first lie in different cells; levels + 1 if they never do."""
    x = torch.cat([code[:1], code[1:] ^ code[:-1]])
    x &= ~(x >> 1)  # the highest bit stays, and rounding to a double cannot carry
    length = torch.frexp(x.double())[1]
    return levels - (length + dim - 1) // dim + 1


def _interleaved(at: Tensor) -> Tensor:
    """The bits of D integers of at most 26 bits as one, those of axis 0 lowest: (N, D) -> (N,)."""
    dim = at.shape[1]
    table = torch.zeros(1 << _TABLE, dtype=torch.int64)
    for bit in range(_TABLE):
        table |= (torch.arange(1 << _TABLE) >> bit & 1) << bit * dim
    code = torch.zeros(at.shape[0], dtype=torch.int64)
    for k in range(dim):
        a = at[:, k].contiguous()
        code |= (table[a & ((1 << _TABLE) - 1)] | table[a >> _TABLE] << _TABLE * dim) << k
    return code
