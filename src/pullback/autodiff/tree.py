"""Trees of tensors as vectors: nested tuples, lists and dicts whose tensors lie one after another.

A tree of one tensor is that tensor, of its own shape. Otherwise the vector is flat. Leaves that are no floating point
or complex tensors (ints, bools, strings, None) are constants and take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pullback.core.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from pullback.core.linearize import cast, private
from pullback.core.shapes import size


def is_variable(leaf: Any) -> bool:
    """Whether a leaf is a tensor that a derivative can be taken in."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


_LEAF = pytree.tree_flatten(None)[1]


class Space:
    """The vectors that stand for trees like a given one.

    Args:
        tree: an example; its floating point and complex tensors make the vector, in the order of `torch.utils._pytree`.
        owner, name: for messages.
        paired: complex tensors are seen as real ones with a last axis of size 2.

    Attributes: `dims`, the shape of the vector: that of the tensor if there is one, else (n,).
    """

    def __init__(self, tree: Any, owner: str, name: str, paired: bool = False) -> None:
        leaves, self.spec = ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)
        self.owner, self.name = owner, name
        self.places = [i for i, leaf in enumerate(leaves) if is_variable(leaf)]
        chosen: list[Tensor] = [leaves[i] for i in self.places]
        if not chosen:
            kinds = ", ".join(sorted({str(getattr(x, "dtype", type(x).__name__)) for x in leaves})) or "nothing"
            raise DtypeError(
                f"{owner}: {name} must hold at least one floating point or complex tensor; got {kinds}; use x.double() "
                f"or torch.tensor(x)"
            )
        if len(chosen) > 1 and len({t.device for t in chosen}) > 1:
            raise DeviceError(
                f"{owner}: the tensors of {name} must lie on one device, because they make one vector; got "
                f"{sorted({str(t.device) for t in chosen})}; move them with .to()"
            )
        self.paired = [paired and t.is_complex() for t in chosen]
        self.shapes = [(*t.shape, 2) if p else tuple(t.shape) for t, p in zip(chosen, self.paired, strict=True)]
        self.complex = [t.is_complex() and not p for t, p in zip(chosen, self.paired, strict=True)]
        self.sizes = [size(s) for s in self.shapes]
        self.n = sum(self.sizes)
        if self.n == 0:
            raise ShapeError(f"{owner}: {name} has no elements; got shapes {[tuple(t.shape) for t in chosen]}")
        self.one = len(chosen) == 1
        self.bare = self.one and self.spec.is_leaf()
        self.dims = (self.shapes[0] or (1,)) if self.one else (self.n,)

    def __getstate__(self) -> dict[str, Any]:
        # A specification warns when it is pickled, a tree does not.
        return {**self.__dict__, "spec": pytree.tree_unflatten([0] * self.spec.num_leaves, self.spec)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.spec = pytree.tree_flatten(state["spec"])[1]

    @property
    def is_real(self) -> bool:
        """Whether all vectors are real."""
        return not any(self.complex)

    def tensors(self, tree: Any) -> list[Tensor]:
        """The tensors of the tree itself, as they enter the vector."""
        leaves = self.leaves(tree)
        chosen = [leaves[i] for i in self.places]
        return [torch.view_as_real(t.resolve_conj()) if p else t for t, p in zip(chosen, self.paired, strict=True)]

    def tree(self, tensors: Sequence[Tensor], constants: Sequence[Any] | None = None) -> Any:
        """A tree of such tensors, (..., *shape) each; None, or the leaf of `constants`, where there are none."""
        if self.bare and not self.paired[0]:
            return tensors[0]
        leaves: list[Any] = [None] * self.spec.num_leaves if constants is None else list(constants)
        for i, t, p in zip(self.places, tensors, self.paired, strict=True):
            leaves[i] = torch.view_as_complex(t.contiguous()) if p else t
        return pytree.tree_unflatten(leaves, self.spec)

    def plain(self, values: Sequence[Any]) -> Any:
        """A tree with any values in the places of the tensors, and None in those of the constants."""
        leaves: list[Any] = [None] * self.spec.num_leaves
        for i, value in zip(self.places, values, strict=True):
            leaves[i] = value
        return pytree.tree_unflatten(leaves, self.spec)

    def split(self, v: Tensor, batch: tuple[int, ...]) -> list[Tensor]:
        """A vector (*batch, *dims) as tensors (*batch, *shape)."""
        if self.one:
            return [v if self.shapes[0] else v.reshape(batch)]
        pieces = v.split(self.sizes, -1)
        return [t.reshape((*batch, *s)) for t, s in zip(pieces, self.shapes, strict=True)]

    def join(self, tensors: Sequence[Tensor], batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Tensors (*batch, *shape) as a vector (*batch, *dims)."""
        if self.one:
            return cast(tensors[0] if self.shapes[0] else tensors[0].reshape((*batch, 1)), dtype)
        return torch.cat([cast(t, dtype).reshape(*batch, -1) for t in tensors], -1)

    def pack(self, tree: Any) -> Tensor:
        """A tree of tangents, with leaves (..., *shape) and anything for the constants, as a vector (..., *dims)."""
        leaves = self.leaves(tree)
        chosen: list[Tensor] = []
        batch: tuple[int, ...] | None = None
        for i, shape, p in zip(self.places, self.shapes, self.paired, strict=True):
            t = leaves[i]
            if not is_variable(t):
                raise DtypeError(
                    f"{self.owner}: leaf {i} of the tree for {self.name} must be a floating point or complex tensor; "
                    f"got {getattr(t, 'dtype', type(t).__name__)}"
                )
            t = torch.view_as_real(t.resolve_conj()) if p and t.is_complex() else t
            lead = tuple(t.shape[: t.ndim - len(shape)])
            if t.ndim < len(shape) or tuple(t.shape[len(lead) :]) != shape or (batch is not None and lead != batch):
                raise ShapeError(
                    f"{self.owner}: leaf {i} of the tree for {self.name} must have shape (..., {_show(shape)}), with "
                    f"the same leading axes as the others; got {tuple(t.shape)}"
                )
            batch = lead
            chosen.append(t)
        assert batch is not None, "a space without tensors; please report"
        dtype = chosen[0].dtype
        for t in chosen[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        return self.join(chosen, batch, dtype)

    def unpack(self, v: Tensor) -> Any:
        """A vector (..., *dims) or (..., n) as a tree; None for the constants.

        Leaves have the dtype of the vector; those that stand for real tensors are real.
        """
        if not isinstance(v, Tensor):
            raise DtypeError(f"{self.owner}: unpack expects a tensor; got {type(v).__name__}")
        if v.shape[-len(self.dims) :] != self.dims:
            if v.ndim == 0 and self.n == 1:
                v = v.reshape(self.dims)
            elif v.ndim and v.shape[-1] == self.n:
                v = v.reshape(*v.shape[:-1], *self.dims)
            else:
                raise ShapeError(
                    f"{self.owner}: a vector for {self.name} has shape (..., {_show(self.dims)}); got {tuple(v.shape)}"
                )
        batch = tuple(v.shape[: v.ndim - len(self.dims)])
        pieces = self.split(v, batch)
        if v.is_complex():
            pieces = [t if c else t.real for t, c in zip(pieces, self.complex, strict=True)]
        return self.tree(pieces)

    def leaves(self, tree: Any) -> list[Any]:
        """The leaves of a tree of this structure; a single tensor may come bare."""
        if isinstance(tree, Tensor) and self.bare:
            return [tree]
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            if self.one and len(leaves) == 1:
                return [leaves[0] if i == self.places[0] else None for i in range(self.spec.num_leaves)]
            raise ArgumentError(
                f"{self.owner}: expected {self.describe()} for {self.name}; got {_kind(tree)}; its structure must be "
                f"that of {self.name}"
            )
        return leaves

    def describe(self) -> str:
        """What a vector may be given as."""
        vector = f"a tensor of shape (..., {_show(self.dims)})"
        if self.bare:
            return vector
        return f"{vector} or a tree like {_kind(self.plain([_Mark(f'({_show(s)})') for s in self.shapes]))}"


class _Mark:
    """A shape inside a tree that is shown to people."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _kind(tree: Any) -> str:
    """A tree with shapes for its tensors, cut short."""
    text = repr(pytree.tree_map(lambda t: _Mark(f"({_show(t.shape)})") if isinstance(t, Tensor) else t, tree))
    return text if len(text) <= 160 else f"{text[:150]} ..."


def _show(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


class TreeFunction:
    """A function of trees as one of the list of tensors in its arguments, with the list of tensors in its value.

    The function itself, which may be a module and be replaced, comes with every call.
    """

    range: Space | None = None  # known after the first evaluation
    leftover: Sequence[Any] = ()  # the leaves of the first value, None in place of tensors

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], owner: str, paired: bool = False) -> None:
        if not callable(f):
            raise ArgumentError(f"{owner}: f must be a function or a module; got {type(f).__name__}")
        if not args:
            raise ArgumentError(f"{owner}: the point is missing; write {owner}(f, x)")
        self.single = len(args) == 1
        tree = args[0] if self.single else args
        self.owner, self.paired, self.domain = owner, paired, Space(tree, owner, "x", paired)
        self.constants = [None if is_variable(leaf) else leaf for leaf in self.domain.leaves(tree)]

    def evaluate(self, f: Callable[..., Any], points: Sequence[Tensor]) -> Any:
        """The value at the point, as f returns it."""
        tree = self.domain.tree([private(p) for p in points], self.constants)
        value = f(tree) if self.single else f(*tree)
        if self.range is None:
            self.range = Space(value, self.owner, "f(x)", self.paired)
            self.leftover = [None if is_variable(leaf) else leaf for leaf in self.range.leaves(value)]
        return value

    def __call__(self, f: Callable[..., Any], points: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the value at the point."""
        value = self.evaluate(f, points)
        assert self.range is not None, "a function without a range; please report"
        return self.range.tensors(value)


def name_of(f: Callable[..., Any]) -> str:
    """What to call a function or a module."""
    text = getattr(f, "__name__", "") or type(f).__name__
    return "f" if text in ("<lambda>", "function", "partial") else text
