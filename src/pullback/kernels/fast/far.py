"""The sum of a kernel over the far pairs of a plan, at an order and with ranks that the kernel needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.fast.balance import preparation
from pullback.kernels.fast.interpolation import Expansions, coefficients, nodes, polynomials
from pullback.kernels.fast.translations import Kernel, Translation, checked, choices, offsets, translations
from pullback.kernels.fast.tree import TreePlan

Channels = Sequence[Sequence[tuple[int, int]]]
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]  # targets and sources in their cells, offsets, values
ORDERS = {1: range(2, 25), 2: range(3, 21), 3: range(3, 13)}  # that are tried; above them the kernel is not smooth
_SAMPLES = 512  # pairs of a level from which errors are estimated
_AVERAGED = {1: 0.5, 2: 0.7, 3: 0.7}  # errors of single pairs, in tolerances; those of sums are smaller
_ROUNDING = 1e-13
_CUT = 0.15  # what ranks may leave out, in tolerances
_GATHERED = 1 << 21  # numbers of expansions that are gathered at once
_HELD = 1 << 28  # bytes of expansions that are held at once


class TooLong(ArgumentError):
    """Preparing the sum would take `seconds`."""

    def __init__(self, order: int, seconds: float) -> None:
        super().__init__(f"preparing a tree of order {order} would take {seconds:.2g} s")
        self.seconds = seconds


class FarField:
    """sum over the far pairs of kernel c of x_i - y_j times weight r of y_j, or over i.

    Args:
        plan: the points.
        kernel: differences (..., D), float64, to values (..., c); smooth away from 0.
        tolerance: wanted error, relative to the sum of |K| over all pairs.
        order: p, Chebyshev points in each axis; None: the lowest that promises the tolerance.
        limit: seconds that the matrices between cells may take to make, roughly.

    Attributes:
        order: p.
        error: estimate of the error, relative to the sum of |K| over all pairs.
        growth: the factor by which rounding errors of the dtype of the weights grow, at most.

    Raises: ArgumentError if no order promises the tolerance, or if the kernel is not finite away from 0; TooLong.
    """

    def __init__(
        self,
        plan: TreePlan,
        kernel: Kernel,
        tolerance: float,
        order: int | None = None,
        limit: float = math.inf,
    ) -> None:
        self.plan, self.kernel, self.tolerance = plan, kernel, tolerance
        self._levels = [k for k, n in enumerate(plan.far_pairs) if n]
        self._spread = {k: plan.spread(k) for k in self._levels}
        self._inside, self._sums = self._sample()
        total = sum(self._sums, start=self._near())
        self._total = torch.where(total > 0, total, 1.0)
        self.n_kernels = len(total)
        self.order, self.error = (order, self._promise(order)) if order else self._chosen(limit)
        self._known: dict[tuple[bool, torch.dtype], dict[int, list[Translation]]] = {}

    # The order -------------------------------------------------------------------------------------------------------

    def _sample(self) -> tuple[list[Pairs], list[Tensor]]:
        """Random far pairs of each level, and the sums of |K| over each level."""
        found, sums = [], []
        for depth in self._levels:
            t, s, o = self.plan.sample_far(depth, _SAMPLES)
            values = checked(self.kernel, (t / 2 - s / 2 - o) * self._edge(depth))
            found.append((t, s, o, values))
            size = values.abs()
            # without the largest: a rare one would promise a sum that most samples do not have
            sums.append((size.sum(0) - size.amax(0)) / len(size) * self.plan.far_pairs[depth])
        return found, sums

    def _near(self) -> Tensor:
        """The sum of |K| over the near pairs, but for those where it is not finite."""
        values = self.kernel(self.plan.sample_near(8 * _SAMPLES)).abs()
        values = torch.where(torch.isfinite(values), values, 0.0)
        if not len(values):
            return values.sum(0)
        return (values.sum(0) - values.amax(0)) * (self.plan.n_near / len(values))

    def _edge(self, depth: int) -> float:
        return self.plan.edge / 2**depth

    def _promise(self, order: int) -> float:
        """The error of interpolation at both ends of the sampled pairs, for the worst component.

        At the targets K(t - s) is interpolated in t. At the sources K(x - s) is interpolated in s, for a node x that
        stands for all those that t is interpolated from: drawn in proportion to the square of its weight.
        """
        grid = torch.cartesian_prod(*[nodes(order)] * self.plan.dim).reshape(-1, self.plan.dim)
        errors, largest = torch.zeros(2, self.n_kernels, dtype=torch.float64)
        g = torch.Generator().manual_seed(1)
        for depth, (t, s, o, values) in zip(self._levels, self._inside, strict=True):
            edge = self._edge(depth)
            at_targets, at_sources = self._weights(t, order), self._weights(s, order)
            near_t = self.kernel((grid / 2 - (o + s / 2)[:, None]) * edge)
            missed = torch.einsum("sa,sac->sc", at_targets, near_t) - values
            squares = at_targets.square()
            drawn = torch.multinomial(squares, 1, generator=g).flatten()
            near_s = self.kernel(((grid[drawn] / 2 - o)[:, None] - grid / 2) * edge)
            again = torch.einsum("sa,sac->sc", at_sources, near_s) - near_t[torch.arange(len(t)), drawn]
            total = missed.square().mean(0) + (again.square() * squares.sum(1)[:, None]).mean(0)
            errors += total.sqrt() * self._spread[depth]
            largest += torch.maximum(near_t.abs().amax((0, 1)), near_s.abs().amax((0, 1))) * self._spread[depth]
        self.growth = float((largest / self._total).amax())
        return float((errors / self._total).amax()) + _ROUNDING * self.growth

    @staticmethod
    def _weights(t: Tensor, order: int) -> Tensor:
        """The values of the Lagrange polynomials of all nodes: (n, D) -> (n, p^D)."""
        found = torch.ones(len(t), 1, dtype=torch.float64)
        for column in t.unbind(1):
            found = (found[:, :, None] * (polynomials(column, order).T @ coefficients(order))[:, None]).flatten(1)
        return found

    def _chosen(self, limit: float) -> tuple[int, float]:
        for order in ORDERS[self.plan.dim]:
            seconds = preparation(order, self.plan.dim, len(self._levels) * self.n_kernels)
            if seconds > limit:
                raise TooLong(order, seconds)
            error = self._promise(order)
            if error <= _AVERAGED[self.plan.dim] * self.tolerance:
                return order, error
        raise ArgumentError(f"the kernel is too rough for a tolerance of {self.tolerance:.1e}; use the exact sum")

    # The sum ---------------------------------------------------------------------------------------------------------

    def apply(self, weights: Tensor, *, channels: Channels | None = None, over_i: bool = False) -> Tensor:
        """The sums.

        Args:
            weights: (N, w) in the original order, float32 or float64, in which all is computed; (M, w) if `over_i`.
            channels: for each column of the result the pairs (c, r) that are added up; None: every pair by itself.
            over_i: sum over the far i of each j instead, with weights of x_i.

        Returns: (M, channels), or (M, c, w) without channels, in the original order; N instead of M if `over_i`.
        """
        source, target = (self.plan.expansions[side] for side in (not over_i, over_i))
        n, m = len(source.tree.order), len(target.tree.order)
        if weights.ndim != 2 or len(weights) != n:
            raise ShapeError(f"weights must have shape ({n}, w); got {tuple(weights.shape)}")
        w = weights.shape[1]
        wanted = channels
        if wanted is None:
            wanted = [[(c, r)] for c in range(self.n_kernels) for r in range(w)]
        cells = max(1, source.size + target.size) * self.order**self.plan.dim
        step = max(1, _HELD // (weights.element_size() * cells))
        parts = [self._some(source, target, weights, wanted[k : k + step], over_i) for k in range(0, len(wanted), step)]
        out = torch.cat(parts).T if parts else weights.new_zeros(m, 0)
        return out.reshape(m, self.n_kernels, w) if channels is None else out

    def _some(
        self, source: Expansions, target: Expansions, weights: Tensor, channels: Channels, over_i: bool
    ) -> Tensor:
        used = sorted({r for pairs in channels for _, r in pairs})
        moments = source.moments(weights[:, used].T.contiguous(), self.order)
        local = moments.new_zeros(len(channels), target.size, moments.shape[2])
        for depth, kernels in self.translations(over_i, weights.dtype).items():
            here, there = (slice(e.bases[depth], e.bases[depth] + len(e.tree.levels[depth])) for e in (source, target))
            for c, translation in enumerate(kernels):
                mine = [(q, used.index(r)) for q, pairs in enumerate(channels) for k, r in pairs if k == c]
                if mine and translation.up.shape[1]:
                    columns = sorted({r for _, r in mine})
                    moved = self._translate(translation, moments[columns][:, here], source, target, depth, over_i)
                    for q, r in mine:
                        local[q, there] += moved[columns.index(r)] @ translation.down
        return target.values(local, self.order)

    def _translate(
        self, along: Translation, moments: Tensor, source: Expansions, target: Expansions, depth: int, over_i: bool
    ) -> Tensor:
        """The compressed values in the cells of a level: (w, sources, p^D) -> (w, targets, r)."""
        dim = self.plan.dim
        w, rank = len(moments), along.up.shape[1]
        above, level = target.tree.levels[depth - 1], target.tree.levels[depth]
        children = source.tree.levels[depth - 1].children
        compressed = torch.cat([moments @ along.up, moments.new_zeros(w, 1, rank)], 1)  # the last one is -1's
        children = torch.where(children < 0, compressed.shape[1] - 1, children)
        width = 2**dim * rank
        out = moments.new_zeros(w, len(above), width)
        choice = choices(dim)[0]
        for k, pair in enumerate(self.plan.split[depth - 1]):
            if not len(pair[0]) or 2 * k + 1 == 3**dim:
                continue
            at, to = pair[::-1] if over_i else pair
            block = along.block(choice[3**dim - 1 - k if over_i else k])  # from x to y the offset is the opposite
            for a, b in zip(*(t.split(max(1, _GATHERED // (w * width))) for t in (at, to)), strict=True):
                gathered = compressed[:, children[b].flatten()].view(-1, width)
                out.index_add_(1, a, (gathered @ block).view(w, -1, width))
        return out.view(w, len(above), 2**dim, rank)[:, level.parent, level.octant]

    def translations(self, over_i: bool, dtype: torch.dtype) -> dict[int, list[Translation]]:
        """For each level that has far pairs, those of each component; made once."""
        found = self._known.get((over_i, dtype))
        if found is None:
            kernel = self.kernel
            oriented = (lambda d: kernel(-d)) if over_i else kernel
            found = {}
            for depth, (t, s, o, _) in zip(self._levels, self._inside, strict=True):
                cut = _CUT * self.tolerance * self._total / self._spread[depth] / len(self._levels)
                seen, occurring = (t, s, o), self.plan.occurring(depth)
                if over_i:  # the offsets are in lexical order: that of -o is counted from the end
                    seen, occurring = (s, t, -o), len(offsets(self.plan.dim)) - 1 - occurring
                found[depth] = translations(oriented, self._edge(depth), occurring, seen, self.order, cut, dtype)
            self._known[over_i, dtype] = found
        return found
