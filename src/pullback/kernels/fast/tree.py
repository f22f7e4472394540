"""Far and near pairs of two point sets, and the sum over the far ones at linear cost."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.kernels.fast.cells import DEPTH, Tree
from pullback.kernels.fast.interpolation import Expansions
from pullback.kernels.fast.translations import choices, offsets
from pullback.kernels.plan.ranges import Ranges

_LANES = 16  # rows that the exact engine treats at least


class TreePlan:
    """Far and near pairs of two point sets, for kernels of x - y.

    Both sets are sorted into the cells of one cube. Cells that touch are split as long as the pairs of their points are
    many; the children that no longer touch are far, and their pairs are summed through Chebyshev expansions. Pairs of
    cells that touch and are not split are near, and left to the exact engine. So every pair is counted once, only cells
    of one level meet, and a kernel between them depends on one of 7^D - 3^D offsets.

    Args:
        x: (M, D) targets, D = 1, 2 or 3, float32 or float64, on the CPU, finite.
        y: (N, D) sources.
        leaf: cells that touch are split if they have more than leaf^2 pairs; `balance.leaf_for` balances near and far.

    Attributes:
        rows: (M,) sorted targets are x[rows].
        columns: (N,) sorted sources are y[columns].
        near: block-sparse pattern of the near pairs of sorted points.
        n_near: number of near pairs.
        n_far: number of pairs of cells whose children interact through expansions.
        n_cells: number of cells, of both sets.
        trees: of x and of y.
        split: for each level and each of the 3^D offsets, the cells of x and of y that touch and are split.
        far_pairs: number of far pairs of points in each level.

    Cost: O(M + N) time and memory for points that are not all in one place.
    """

    def __init__(self, x: Tensor, y: Tensor, leaf: int) -> None:
        for name, t in (("x", x), ("y", y)):
            if t.ndim != 2 or t.shape[1] not in (1, 2, 3) or t.shape[1] != x.shape[1]:
                raise ShapeError(f"TreePlan: {name} must have shape (points, D), D = 1, 2 or 3; got {tuple(t.shape)}")
            if t.dtype not in (torch.float32, torch.float64):
                raise DtypeError(f"TreePlan: {name} must be float32 or float64; got {t.dtype}")
            if not bool(torch.isfinite(t).all()):
                raise ArgumentError(f"TreePlan: {name} holds values that are not finite")
        if leaf < 1:
            raise ArgumentError(f"TreePlan: leaf must be >= 1; got {leaf}")
        self.leaf, self.dim = leaf, x.shape[1]
        x, y = x.detach().double(), y.detach().double()
        both = [t.aminmax(dim=0) for t in (x, y) if len(t)]
        low = torch.stack([b.min for b in both]).amin(0) if both else x.new_zeros(self.dim)
        high = torch.stack([b.max for b in both]).amax(0) if both else x.new_zeros(self.dim)
        self.edge = float((high - low).max()) * (1 + 1e-12)
        if not 0 < self.edge < float("inf"):  # all points in one place, or beyond the range of numbers: one cell
            x, y, low, self.edge = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(low), 1.0
        self.trees = Tree((x - low) / self.edge), Tree((y - low) / self.edge)
        self.rows, self.columns = (t.order for t in self.trees)
        self.split: list[list[tuple[Tensor, Tensor]]] = []  # level -> offset -> cells of x, cells of y
        near = self._traverse()
        self.n_near = int(((near[1] - near[0]) * (near[3] - near[2])).sum())
        self.near = Ranges(*_spans(self.trees[0], *near), *_spans(self.trees[1], *near[2:], *near[:2]))
        self.n_far = sum(len(a) for level in self.split for k, (a, _) in enumerate(level) if 2 * k + 1 != 3**self.dim)
        self.n_cells = sum(len(level) for tree in self.trees for level in tree.levels)

    def _traverse(self) -> list[Tensor]:
        """Split the trees; the near pairs: (first x, end x, first y, end y) of sorted points."""
        x, y = self.trees
        n = min(len(x.levels[0]), len(y.levels[0]))
        a, b = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        o = torch.full((n,), 3**self.dim // 2)
        touching = choices(self.dim)[1]
        near: list[tuple[Tensor, ...]] = []
        self.far_pairs = [0]
        inside = 0  # pairs of points in the pairs of cells that were split
        for depth in range(DEPTH + 1):
            above, below = x.levels[depth], y.levels[depth]
            many = above.counts[a].clamp(min=_LANES) * below.counts[b].clamp(min=_LANES) > self.leaf**2
            if depth == DEPTH:
                many = torch.zeros_like(many)
            pairs = above.counts[a] * below.counts[b]
            if depth:
                self.far_pairs.append(inside - int(pairs.sum()))
            at, to = a[~many], b[~many]
            near.append((above.start[at], above.end[at], below.start[to], below.end[to]))
            if not bool(many.any()):
                break
            inside = int(pairs[many].sum())
            a, b, o = a[many], b[many], o[many]
            x.split(a)
            y.split(b)
            groups = [(o == k).nonzero().flatten() for k in range(3**self.dim)]
            self.split.append([(a[g], b[g]) for g in groups])
            found = []
            for k, (at, to) in enumerate(self.split[-1]):
                source, target = (touching[k] >= 0).nonzero(as_tuple=True)
                ca, cb = above.children[at][:, target], below.children[to][:, source]
                both = (ca >= 0) & (cb >= 0)
                found.append((ca[both], cb[both], touching[k][source, target].expand_as(both)[both]))
            a, b, o = (torch.cat(t) for t in zip(*found, strict=True))
        return [torch.cat(t) for t in zip(*near, strict=True)]

    @cached_property
    def expansions(self) -> tuple[Expansions, Expansions]:
        """The points in the cells at the leaves of both trees."""
        return Expansions(self.trees[0]), Expansions(self.trees[1])

    def spread(self, depth: int) -> float:
        """sqrt(M) |c| for the far pairs c_i of each x in a level, or that of y if larger; their number if all agree.

        Errors of pairs weigh that much in the l2 norm of sums: those that few points share weigh more.
        """
        n = self.far_pairs[depth]
        groups = [pair for k, pair in enumerate(self.split[depth - 1]) if 2 * k + 1 != 3**self.dim]
        cells = [torch.cat(c) for c in zip(*groups, strict=True)]
        counts = [tree.levels[depth - 1].counts.double() for tree in self.trees]
        found = []
        for side in (0, 1):
            own, size = counts[side], len(self.trees[side].points)
            c = torch.zeros_like(own).index_add_(0, cells[side], counts[1 - side][cells[1 - side]])
            share = n / float((own * c).sum())  # of these pairs some lie in children that touch
            found += [share * math.sqrt(size * float((own * c * c).sum())), math.sqrt(size * n)]
        return max(found)

    def occurring(self, depth: int) -> Tensor:
        """Which of the offsets of far cells occur in a level, from x to y: numbers of `offsets`, sorted."""
        touching = len(offsets(self.dim))
        found = torch.zeros(touching + 1, dtype=torch.bool)
        children = [tree.levels[depth - 1].children >= 0 for tree in self.trees]
        for k, (a, b) in enumerate(self.split[depth - 1]):
            both = children[1][b].double().T @ children[0][a].double() > 0  # (source, target)
            found[choices(self.dim)[0][k][both]] = True
        return found[:touching].nonzero().flatten()

    def sample_near(self, n: int) -> Tensor:
        """Differences of random near pairs: (n, D); (0, D) if there are none."""
        blocks, ends, spans = self.near.triple(False)
        owner = torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
        rows = blocks[owner]
        pairs = ((rows[:, 1] - rows[:, 0]) * (spans[:, 1] - spans[:, 0])).cumsum(0)
        if not len(pairs):
            return torch.empty(0, self.dim, dtype=torch.float64)
        u = torch.rand(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        k = torch.searchsorted(pairs, (u[0] * pairs[-1]).long(), right=True).clamp(max=len(pairs) - 1)
        i, j = (s[k, 0] + (v * (s[k, 1] - s[k, 0])).long() for s, v in zip((rows, spans), u[1:], strict=True))
        return (self.trees[0].points[i] - self.trees[1].points[j]) * self.edge

    def sample_far(self, depth: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random far pairs of a level: x and y in the coordinates -1 .. 1 of their cells, and offsets, (n, D) each."""
        g = torch.Generator().manual_seed(0)
        groups = [pair for k, pair in enumerate(self.split[depth - 1]) if 2 * k + 1 != 3**self.dim]
        cells = [torch.cat(c) for c in zip(*groups, strict=True)]
        above = [tree.levels[depth - 1] for tree in self.trees]
        pairs = (above[0].counts[cells[0]] * above[1].counts[cells[1]]).cumsum(0)
        found: list[tuple[Tensor, ...]] = []
        for _ in range(16):  # most of the pairs may lie in children that touch
            u = torch.rand(3, n, generator=g, dtype=torch.float64)
            k = torch.searchsorted(pairs, (u[0] * pairs[-1]).long(), right=True).clamp(max=len(pairs) - 1)
            scaled = []
            for tree, level, cell, v in zip(self.trees, above, cells, u[1:], strict=True):
                own = cell[k]
                scaled.append(tree.points[level.start[own] + (v * level.counts[own]).long()] * 2**depth)
            at = [p.floor() for p in scaled]
            o = at[1] - at[0]
            far = o.abs().amax(1) > 1
            found.append(tuple(t[far] for t in (*((p - a) * 2 - 1 for p, a in zip(scaled, at, strict=True)), o)))
            if sum(len(t) for t, *_ in found) >= n:
                break
        else:  # then any pairs will do
            t, s = 2 * torch.rand(2, n, self.dim, generator=g, dtype=torch.float64) - 1
            every = offsets(self.dim)
            found.append((t, s, every[torch.randint(len(every), (n,), generator=g)].double()))
        t, s, o = (torch.cat(c)[:n] for c in zip(*found, strict=True))
        return t, s, o


def _spans(tree: Tree, first: Tensor, end: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks, ends of their spans, spans): the cells that are not split, and the columns near each of them."""
    blocks = torch.cat([torch.stack([v.start[v.whole], v.end[v.whole]], 1) for v in tree.levels])
    blocks = blocks[blocks[:, 0].contiguous().numpy().argsort()]
    low = torch.searchsorted(blocks[:, 0].contiguous(), first)
    high = torch.searchsorted(blocks[:, 0].contiguous(), end)
    owner = torch.repeat_interleave(high - low)
    block = low[owner] + torch.arange(len(owner)) - ((high - low).cumsum(0) - (high - low))[owner]
    start, stop = start[owner], stop[owner]
    by = torch.from_numpy((block * (int(stop.max()) + 1 if len(stop) else 1) + start).numpy().argsort())
    block, start, stop = block[by], start[by], stop[by]
    opens = torch.ones(len(block), dtype=torch.bool)
    opens[1:] = (block[1:] != block[:-1]) | (start[1:] != stop[:-1])
    closes = torch.cat([opens[1:], opens[:1]])
    counts = torch.bincount(block[opens], minlength=len(blocks))
    return blocks, counts.cumsum(0), torch.stack([start[opens], stop[closes]], 1)
