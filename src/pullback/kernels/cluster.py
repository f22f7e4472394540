"""Clusters of points, and the block-sparse patterns that they give: `ranges` for reductions over near pairs only.

Every function takes tensors or arrays and gives the same kind back, on the device of its input. Label vectors are
int32, as in KeOps; interval bounds are int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.plan.ranges import Ranges


def _numpy_too(function: Callable[..., Any]) -> Callable[..., Any]:
    """Arrays in, arrays out."""

    def enter(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        return type(value)(map(enter, value)) if isinstance(value, (tuple, list)) else value

    def leave(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu().numpy()
        return type(value)(map(leave, value)) if isinstance(value, (tuple, list)) else value

    def has_array(value: Any) -> bool:
        return isinstance(value, np.ndarray) or (isinstance(value, (tuple, list)) and any(map(has_array, value)))

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = any(map(has_array, (*args, *kwargs.values())))
        result = function(*map(enter, args), **{k: enter(v) for k, v in kwargs.items()})
        return leave(result) if arrays else result

    return run


@_numpy_too
def grid_cluster(x: Any, size: Any) -> Any:
    """The label of the grid cell floor(x / size) that each point lies in; labels count the cells that hold points.

    Args:
        x: points (M, D), any D.
        size: edge of the cells: a number, or one for each dimension (D,).

    Returns: (M,) int32 labels in 0 .. C - 1, by increasing cell index (last dimension first).
    """
    x = _points(x, "grid_cluster")
    if isinstance(size, Tensor):
        size = size.to(x)
        positive = bool((size > 0).all())
    else:
        positive = size > 0
    if not positive:
        raise ArgumentError(f"grid_cluster: size must be > 0; got {size}")
    cells = torch.floor(x / size)
    if not bool(torch.isfinite(cells).all()):
        raise ArgumentError("grid_cluster: x holds values that are not finite, which lie in no cell")
    # unique over rows orders by the first column first: the last dimension goes there
    _, labels = torch.unique(cells.flip(-1), dim=0, return_inverse=True)
    return labels.to(torch.int32)


@_numpy_too
def sort_clusters(x: Any, lab: Any) -> Any:
    """The points ordered by label, points of one label in their old order; and the labels in that order.

    Args:
        x: a tensor (M, ...), or a tuple or list of such tensors.
        lab: (M,) integer labels.
    """
    lab = _labels(lab, "sort_clusters")
    labels, order = torch.sort(lab, stable=True)
    if isinstance(x, (tuple, list)):
        return type(x)(_rows(t, lab)[order] for t in x), labels
    return _rows(x, lab)[order], labels


@_numpy_too
def cluster_ranges(lab: Any, Nlab: Any = None) -> Any:
    """Where each cluster starts and ends after `sort_clusters`: (C, 2) int64.

    Args:
        lab: (M,) labels, in any order.
        Nlab: (C,) points of each label; counted if None. Labels without points have empty intervals.
    """
    counts = _counts(lab, Nlab)
    ends = counts.cumsum(0)
    return torch.stack([ends - counts, ends], -1)


@_numpy_too
def cluster_centroids(x: Any, lab: Any, Nlab: Any = None, weights: Any = None, weights_c: Any = None) -> Any:
    """The centres c_k = sum_i w_i x_i / sum_i w_i over the points of label k; 0 for a label without points.

    Args:
        x: points (M, D).
        lab: (M,) labels.
        Nlab: (C,) points of each label; counted if None.
        weights: (M,) weights, 1 if None.
        weights_c: (C,) their sums over each cluster; computed if None.
    """
    x, lab = _points(x, "cluster_centroids"), _labels(lab, "cluster_centroids")
    n = _counts(lab, Nlab).shape[0]
    w = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
    total = x.new_zeros(n, x.shape[1]).index_add(0, lab, w[:, None] * x)
    mass = x.new_zeros(n).index_add(0, lab, w) if weights_c is None else weights_c.to(x)
    return torch.where(mass[:, None] == 0, 0.0, total / torch.where(mass == 0, 1.0, mass)[:, None])


@_numpy_too
def cluster_ranges_centroids(x: Any, lab: Any, weights: Any = None, min_weight: float = 1e-9) -> Any:
    """(intervals, centres, weights of the clusters), as the functions above give them.

    Args:
        x: points (M, D), or a tuple of such tensors; then the centres are a tuple too.
        lab: (M,) labels.
        weights: (M,) weights, 1 if None.
        min_weight: smaller weights count as this.
    """
    lab = _labels(lab, "cluster_ranges_centroids")
    counts = _counts(lab, None)
    ranges = cluster_ranges(lab, counts)
    first = _points(x[0] if isinstance(x, (tuple, list)) else x, "cluster_ranges_centroids")
    w = torch.ones_like(first[:, 0]) if weights is None else weights.to(first).clamp(min=min_weight)
    mass = first.new_zeros(counts.shape[0]).index_add(0, lab, w)
    if isinstance(x, (tuple, list)):
        return ranges, type(x)(cluster_centroids(t, lab, counts, w, mass) for t in x), mass
    return ranges, cluster_centroids(x, lab, counts, w, mass), mass


@_numpy_too
def from_matrix(ranges_i: Any, ranges_j: Any, keep: Any) -> Any:
    """The `ranges` of a reduction in which cluster k of the rows meets cluster l of the columns where keep[k, l].

    Args:
        ranges_i: (C, 2) start and end of each cluster of rows.
        ranges_j: (S, 2) start and end of each cluster of columns.
        keep: (C, S) mask.

    Returns: (ranges_i, slices_i, redranges_j, ranges_j, slices_j, redranges_i), int64.
    """
    ranges_i, ranges_j = (torch.as_tensor(r).to(torch.int64) for r in (ranges_i, ranges_j))
    keep = torch.as_tensor(keep) != 0
    for name, r in (("ranges_i", ranges_i), ("ranges_j", ranges_j)):
        if r.ndim != 2 or r.shape[1] != 2:
            raise ShapeError(f"from_matrix: {name} must have shape (C, 2); got {tuple(r.shape)}")
    if keep.shape != (ranges_i.shape[0], ranges_j.shape[0]):
        raise ShapeError(
            f"from_matrix: keep must have shape {(ranges_i.shape[0], ranges_j.shape[0])}, one entry for each pair of "
            f"clusters; got {tuple(keep.shape)}"
        )
    _, columns = keep.nonzero(as_tuple=True)
    _, rows = keep.T.nonzero(as_tuple=True)
    slices_i, slices_j = keep.sum(1).cumsum(0), keep.sum(0).cumsum(0)
    return ranges_i, slices_i, ranges_j[columns], ranges_j, slices_j, ranges_i[rows]


def swap_axes(ranges: Sequence[Any] | None) -> Any:
    """The pattern with i and j exchanged; None stays None."""
    if ranges is None:
        return None
    if isinstance(ranges, Ranges):
        return Ranges(*(getattr(ranges, n) for n in (*_HALVES[1], *_HALVES[0])))
    if not isinstance(ranges, (tuple, list)) or len(ranges) != 6:
        raise ArgumentError(f"swap_axes expects the six tensors of a block-sparse pattern; got {ranges!r:.80}")
    return (*ranges[3:6], *ranges[0:3])


_HALVES = (("ranges_i", "slices_i", "redranges_j"), ("ranges_j", "slices_j", "redranges_i"))


def _points(x: Any, owner: str) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"{owner}: x must be points of shape (M, D); got {got}")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _labels(lab: Any, owner: str) -> Tensor:
    if not isinstance(lab, Tensor) or lab.ndim != 1 or lab.is_floating_point() or lab.is_complex():
        raise ArgumentError(f"{owner}: lab must be a vector of integer labels")
    if lab.numel() and int(lab.min()) < 0:
        raise ArgumentError(f"{owner}: labels must be >= 0; got {int(lab.min())}")
    return lab


def _rows(t: Any, lab: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or not t.ndim or t.shape[0] != lab.shape[0]:
        got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ShapeError(f"sort_clusters: x must have one row for each of the {lab.shape[0]} labels; got {got}")
    return t


def _counts(lab: Any, known: Any) -> Tensor:
    if known is not None:
        return torch.as_tensor(known).to(torch.int64)
    return torch.bincount(_labels(lab, "cluster_ranges"))
