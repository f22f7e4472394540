"""K[...]: components, and rows and columns by slices, indices and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.ir.expr import Expr, builders, const, index, substitute, variable, walk
from pullback.kernels.lazy_base import Domain, Leaf, make

_ALL = slice(None)


def item(lazy: Any, key: Any) -> Any:
    """The part of a LazyTensor that `key` names; see `LazyTensor.__getitem__`."""
    if not isinstance(key, tuple):
        if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
            return lazy.elem(int(key))
        if isinstance(key, slice) and lazy.ndim > 1:
            return _components(lazy, key)
        key = (*(_ALL,) * lazy.nbatchdims, key)
    keys = _aligned(lazy, key)
    lazy = _pick(lazy, keys[-3], 0)
    lazy = _pick(lazy, keys[-2], 1)
    last = keys[-1]
    if isinstance(last, slice) and last == _ALL:
        return lazy
    return _components(lazy, last) if isinstance(last, slice) else lazy.elem(int(last))


def _aligned(lazy: Any, key: tuple[Any, ...]) -> list[Any]:
    """One key for each axis of (..., M, N, D)."""
    n = lazy.dim()
    keys = list(key)
    dots = [k for k, value in enumerate(keys) if value is Ellipsis]
    if len(dots) > 1 or any(k is None for k in keys):
        raise ArgumentError("a LazyTensor index may hold one '...' and no None")
    if lazy.ndim == 1 and len(keys) - len(dots) < n:  # the axes of `shape`, which leaves out D = 1
        keys = [*keys, _ALL] if dots or len(keys) == n - 1 else keys
    if dots:
        keys[dots[0] : dots[0] + 1] = [_ALL] * (n - len(keys) + 1)
    keys += [_ALL] * (n - len(keys))
    if len(keys) != n:
        raise ShapeError(f"too many indices, {len(key)}, for a LazyTensor of shape {lazy.shape}")
    if any(not (isinstance(k, slice) and k == _ALL) for k in keys[: n - 3]):
        raise ArgumentError(f"batch axes are indexed by ':' or '...' only; got {key}; index the tensors instead")
    return keys


def _components(lazy: Any, key: slice) -> Any:
    places = tuple(range(lazy.ndim))[key]
    if not places:
        raise ShapeError(f"no components in {key} of a LazyTensor with {lazy.ndim}")
    if lazy._complex:
        places = tuple(2 * k + part for k in places for part in (0, 1))
    return make(builders["Gather"](lazy._expr, places), lazy, is_complex=lazy._complex)


def _pick(lazy: Any, key: Any, category: int) -> Any:
    """Only the rows (category 0) or columns that `key` names, in its order."""
    if isinstance(key, slice) and key == _ALL:
        return lazy
    domain = lazy._domain
    size = (domain.ni, domain.nj)[category]
    name = "ij"[category]
    if size is None:
        raise ArgumentError(
            f"nothing in this LazyTensor of shape {lazy.shape} varies with {name}, so no {name} to index"
        )
    if lazy._ranges is not None:
        raise ArgumentError(
            "a LazyTensor with ranges cannot be indexed by rows: they count all rows; set ranges = None"
        )
    places = _numbers(key, size, name, domain.device)
    leaves: list[Leaf] = []
    for leaf in domain.leaves:
        if leaf.category == category and isinstance(leaf.data, Tensor):
            data = leaf.data[..., key, :] if _is_view(key) else leaf.data.index_select(-2, places)
            new = leaf.with_data(data)
            if isinstance(leaf.source, np.ndarray):
                new = Leaf(data.numpy(), data, leaf.dim, category)
            leaf = new
        leaves.append(leaf)
    expr: Expr = lazy._expr
    if any(n.op == "Index" and n.params[0] == category for n in walk(expr)):
        expr, extra = _renumbered(expr, key, size, places, category, len(leaves))
        leaves += extra
    return make(expr, lazy, Domain(tuple(leaves)), lazy._complex)


def _is_view(key: Any) -> bool:
    return isinstance(key, slice) and (key.step is None or key.step > 0)


def _numbers(key: Any, size: int, name: str, device: Any) -> Tensor:
    if isinstance(key, slice):
        return torch.arange(*key.indices(size), device=device) if not _is_view(key) else torch.empty(0)
    t = torch.as_tensor(key, device=device) if not isinstance(key, (int, np.integer)) else None
    if t is None:
        raise ArgumentError(
            f"{name} is indexed by a slice, a tensor of integers or a mask; for row {key} write a slice"
        )
    if t.ndim != 1 or t.is_floating_point() or t.is_complex():
        raise ArgumentError(
            f"{name} is indexed by a slice, a 1-D tensor of integers or a mask; got {t.dtype} of shape {tuple(t.shape)}"
        )
    if t.dtype == torch.bool:
        if t.shape[0] != size:
            raise ShapeError(f"a mask for {name} must have {size} entries; got {t.shape[0]}")
        return t.nonzero().squeeze(-1)
    t = t.long()
    if t.numel() and (int(t.min()) < -size or int(t.max()) >= size):
        raise ShapeError(f"an index for {name} lies outside 0 .. {size - 1}")
    return torch.where(t < 0, t + size, t)


def _renumbered(
    expr: Expr, key: Any, size: int, places: Tensor, category: int, n_leaves: int
) -> tuple[Expr, tuple[Leaf, ...]]:
    """`expr` with its row numbers replaced by those of the rows that were picked."""
    node = index(category)
    if _is_view(key):
        start, _, step = key.indices(size)
        if start == 0 and step == 1:
            return expr, ()
        number = node if step == 1 else node * step
        return substitute(expr, {node: number + const(start)}), ()
    data = places.unsqueeze(-1)
    return substitute(expr, {node: variable(n_leaves, 1, category)}), (Leaf(data, data, 1, category),)
