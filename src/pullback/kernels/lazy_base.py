"""What a LazyTensor is made of: leaves (the data), a domain (leaves that fit together) and an expression over them.

Expressions number the leaves 0, 1, 2 ... in order of appearance, so equal formulas on other data are the same Expr and
share one compiled program. Joining two LazyTensors renumbers the second one; the results are cached by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from pullback.kernels.ir.expr import CATEGORY, PARAMETER, Expr
from pullback.kernels.lazy_expr import Shape, atom, build, renumber

# False -> LazyTensor, True -> ComplexLazyTensor; `lazy_tensor.py` and `complex_lazy.py` fill it.
classes: dict[bool, Any] = {}


class Leaf:
    """One tensor (or number, or open slot) behind a formula.

    Args:
        source: what the user gave; two leaves of one source, category and shape are one variable.
        data: tensor of shape (*batch, rows, dim), or (*batch, dim) for a parameter; a number; None for an open slot.
        dim, category: as in `Vi(dim)`.
        slot: number of the argument that a symbolic variable waits for.
        weak: its dtype adapts to that of the others (integers, numbers, tensors without axes).
    """

    __slots__ = ("batch", "category", "data", "dim", "key", "rows", "slot", "source", "weak")

    def __init__(
        self, source: Any, data: Tensor | float | None, dim: int, category: int, slot: int = -1, weak: bool = False
    ) -> None:
        self.source, self.data, self.dim, self.category, self.slot = source, data, dim, category, slot
        self.batch: Shape = ()
        self.rows: int | None = None
        shape: Shape = ()
        if isinstance(data, Tensor):
            shape = tuple(data.shape)
            if category == PARAMETER:
                self.batch = shape[:-1]
            else:
                self.batch, self.rows = shape[:-2], shape[-2]
            weak = weak or not data.is_floating_point()
        self.weak = weak or data is None or isinstance(data, float)
        if slot >= 0:
            self.key: tuple[Any, ...] = (slot, category)
        else:
            self.key = (source if isinstance(source, float) else id(source), category, dim, shape)

    def __reduce__(self) -> Any:
        return Leaf, (self.source, self.data, self.dim, self.category, self.slot, self.weak)

    def placed(self, category: int) -> Leaf:
        """The same data in another category."""
        return Leaf(self.source, self.data, self.dim, category, self.slot, self.weak)

    def with_data(self, data: Tensor) -> Leaf:
        """Other data of the same kind."""
        return Leaf(data, data, self.dim, self.category)

    def __str__(self) -> str:
        kind = f"{CATEGORY[self.category]}({self.dim})"
        if isinstance(self.data, Tensor):
            return f"{kind}, {str(self.data.dtype).removeprefix('torch.')} of shape {tuple(self.data.shape)}"
        return f"{kind}, the number {self.data:.6g}" if self.slot < 0 else f"{kind}, argument {self.slot} of the call"


class Domain:
    """Leaves that fit together: one number of rows and of columns, batch axes that broadcast, one dtype and device."""

    __slots__ = ("_args", "batch", "device", "dtype", "leaves", "ni", "nj", "numpy", "signature", "symbolic")

    def __init__(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves = leaves
        self.signature = tuple([(leaf.dim, leaf.category) for leaf in leaves])
        self.batch: Shape = ()
        self.ni: int | None = None
        self.nj: int | None = None
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.numpy = False
        self.symbolic = False
        self._args: tuple[Tensor, ...] | None = None
        tensors = 0
        rows: list[Leaf | None] = [None, None]
        first: Leaf | None = None
        for leaf in leaves:
            data = leaf.data
            if not isinstance(data, Tensor):
                self.symbolic = self.symbolic or data is None
                continue
            tensors += 1
            self.numpy = self.numpy or isinstance(leaf.source, np.ndarray)
            if leaf.rows is not None:
                other = rows[leaf.category]
                if other is None:
                    rows[leaf.category] = leaf
                elif other.rows != leaf.rows:
                    raise ShapeError(
                        f"the numbers of rows {'ij'[leaf.category]} disagree: {other.rows} and {leaf.rows}, in tensors "
                        f"of shapes {_shape(other)} and {_shape(leaf)}"
                    )
            if leaf.batch and leaf.batch != self.batch:
                try:
                    self.batch = tuple(torch.broadcast_shapes(self.batch, leaf.batch)) if self.batch else leaf.batch
                except RuntimeError:
                    raise ShapeError(
                        f"batch axes do not broadcast: {self.batch} and {leaf.batch}, the latter in a tensor of shape "
                        f"{_shape(leaf)}"
                    ) from None
            if not leaf.weak:
                if first is None:
                    first, self.dtype, self.device = leaf, data.dtype, data.device
                elif data.dtype != self.dtype:
                    raise DtypeError(
                        f"tensors of {self.dtype} (shape {_shape(first)}) and {data.dtype} (shape {_shape(leaf)}) "
                        f"cannot be mixed in one formula; convert one with .to({self.dtype})"
                    )
                elif data.device != self.device:
                    raise DeviceError(
                        f"tensors on {self.device} (shape {_shape(first)}) and {data.device} (shape {_shape(leaf)}) "
                        f"cannot be mixed in one formula; move one with .to({str(self.device)!r})"
                    )
            elif self.device is None:
                self.device = data.device
        self.ni, self.nj = (None if r is None else r.rows for r in rows)
        if self.numpy:  # a tensor among arrays makes the result a tensor
            self.numpy = all(isinstance(v.source, np.ndarray) for v in leaves if isinstance(v.data, Tensor))

    def __reduce__(self) -> Any:
        return Domain, (self.leaves,)

    def merge(self, other: Domain) -> tuple[Domain, Shape | None]:
        """The leaves of both, and where the leaves of `other` are among them (None: at the same places)."""
        if other is self or not other.leaves:
            return self, None
        if not self.leaves:
            return other, None
        leaves = list(self.leaves)
        place = {leaf.key: p for p, leaf in enumerate(leaves)}
        where = []
        for leaf in other.leaves:
            p = place.get(leaf.key)
            if p is None:
                p = place[leaf.key] = len(leaves)
                leaves.append(leaf)
            elif leaves[p].dim != leaf.dim:
                raise ShapeError(f"argument {leaf.slot} is declared with dimensions {leaves[p].dim} and {leaf.dim}")
            where.append(p)
        domain = self if len(leaves) == len(self.leaves) else Domain(tuple(leaves))
        return domain, None if where == list(range(len(where))) else tuple(where)

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: that of the tensors, or torch's default where all adapt."""
        return torch.get_default_dtype() if self.dtype is None else self.dtype

    def args(self, given: Sequence[Any] | None = None) -> tuple[Tensor, ...]:
        """The data of all leaves, in one dtype. `given` fills the open slots."""
        if self._args is not None and given is None:
            return self._args
        dtype, plain, found = self.real_dtype, True, []
        if given is not None and self.dtype is None:
            dtype = next((g.dtype for g in given if isinstance(g, Tensor) and g.is_floating_point()), dtype)
        for leaf in self.leaves:
            data = leaf.data
            if data is None:
                if given is None or leaf.slot >= len(given):
                    raise ArgumentError(
                        f"argument {leaf.slot} of the formula is open; call the reduction with its data"
                    )
                data, plain = given[leaf.slot], False
            elif not isinstance(data, Tensor):
                data = torch.full((1,), data, dtype=dtype, device=self.device)  # no copy: the host need not wait
            elif data.dtype != dtype or data.device != (self.device or data.device):
                data, plain = data.to(device=self.device, dtype=dtype), False
            found.append(data)
        if plain:
            self._args = tuple(found)
        return tuple(found)

    def swapped(self) -> Domain:
        """Rows become columns."""
        return Domain(tuple([v if v.category == PARAMETER else v.placed(1 - v.category) for v in self.leaves]))

    @property
    def pairs(self) -> Shape:
        """(*batch, M, N), with 1 for what does not vary."""
        return (*self.batch, 1 if self.ni is None else self.ni, 1 if self.nj is None else self.nj)


def _shape(leaf: Leaf) -> Shape:
    return tuple(leaf.source.shape) if hasattr(leaf.source, "shape") else ()


NO_LEAVES = Domain(())


class LazyBase:
    """An expression over a domain. What LazyTensor and its groups of methods share."""

    __slots__ = ("_domain", "_expr", "_ranges", "backend")
    _complex: ClassVar[bool] = False

    _expr: Expr
    _domain: Domain
    _ranges: Any
    backend: str | None

    def _apply(self, name: str, *others: Any, params: tuple[Any, ...] = ()) -> Any:
        """The operation on self and others, as a LazyTensor."""
        return combine(name, (self, *others), params)

    @property
    def ndim(self) -> int:
        """The number of components of the vector at each pair, as in KeOps."""
        return self._expr.dim // 2 if self._complex else self._expr.dim

    @property
    def nbatchdims(self) -> int:
        """The number of batch axes."""
        return len(self._domain.batch)


def make(expr: Expr, like: LazyBase, domain: Domain | None = None, is_complex: bool = False) -> Any:
    """A LazyTensor of `expr` with the settings of `like`."""
    cls = classes[is_complex]
    new = object.__new__(cls)
    new._expr, new._domain = expr, like._domain if domain is None else domain
    new._ranges, new.backend = like._ranges, like.backend
    return new


def join(operands: Sequence[Any]) -> tuple[list[Expr], list[Shape | None], LazyBase, Domain]:
    """Operands with their leaves merged: expressions, places, the first LazyTensor, the domain.

    Whole numbers stay constants; everything else that is not a LazyTensor becomes one.
    """
    exprs: list[Expr] = []
    places: list[Shape | None] = []
    lead: LazyBase | None = None
    domain = NO_LEAVES
    for o in operands:
        if not isinstance(o, LazyBase):
            if isinstance(o, (int, np.integer, np.bool_)):
                exprs.append(atom("Const", int(o)))
                places.append(None)
                continue
            o = classes[False](o)
        domain, place = domain.merge(o._domain)
        if lead is None:
            lead = o
        elif (o._ranges is not None and o._ranges is not lead._ranges) or (o.backend and o.backend != lead.backend):
            lead = _settled(lead, o)
        exprs.append(o._expr)
        places.append(place)
    assert lead is not None, "an operation without a LazyTensor; please report"
    return exprs, places, lead, domain


def _settled(a: LazyBase, b: LazyBase) -> LazyBase:
    """Settings of both operands."""
    if a._ranges is not None and b._ranges is not None and a._ranges is not b._ranges:
        raise ArgumentError("operands have different ranges; set .ranges on the result or on one operand only")
    lead = make(a._expr, a, is_complex=a._complex)
    lead._ranges = a._ranges if b._ranges is None else b._ranges
    lead.backend = a.backend or b.backend
    return lead


def combine(name: str, operands: Sequence[Any], params: tuple[Any, ...] = ()) -> Any:
    """name(*operands; *params) as a LazyTensor."""
    exprs, places, lead, domain = join(operands)
    for o in operands:
        if isinstance(o, LazyBase) and o._complex:
            raise DtypeError(f"{name} is not defined for complex numbers here; apply it to .real, .imag or .abs()")
    try:
        expr = build(name, tuple(exprs), tuple(places), params)
    except ShapeError as error:
        shapes = ", ".join(str(o._shape) for o in operands if isinstance(o, classes[False]))
        raise ShapeError(f"{error}; the LazyTensors have shapes {shapes}") from None
    return make(expr, lead, domain)


def same_leaves(name: str, x: LazyBase, *params: Any, is_complex: bool = False) -> Any:
    """name(x; *params), as a complex LazyTensor if asked for."""
    return make(build(name, (x._expr,), (None,), params), x, is_complex=is_complex)


def derive(function: Callable[..., Expr], operands: Sequence[Any]) -> Any:
    """function(*expressions) as a LazyTensor, for what is written in Expr and not by name."""
    exprs, places, lead, domain = join(operands)
    return make(
        function(*(e if p is None else renumber(e, p) for e, p in zip(exprs, places, strict=True))), lead, domain
    )
