"""The table of operations that move or combine components: sums, slices, concatenation, tensor products.

Each row says its dimension, its torch definition on tensors (..., dim), how its components come from those of its
operands (`lower`, for scalar code), and its derivative: a pullback (cotangent of the result -> cotangents of the
operands) and a pushforward (tangents -> tangent).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.ir.expr import Expr, builders, zero
from pullback.kernels.ir.primitives import operand, whole

Scalars = list[Any]  # components of one operand in some renderer


@dataclass(frozen=True)
class Structure:
    """One row.

    Args:
        dim: (operands, params) -> dimension of the result; raises on bad ones.
        torch: (tensors, params) -> tensor of shape (..., dim).
        lower: (arithmetic, components of each operand, params) -> components. `arithmetic(name, *scalars)` makes a
            scalar operation.
        pullback: (node, cotangent of dimension node.dim) -> one Expr or None for each operand.
        pushforward: (node, tangents: Expr or None for each operand) -> Expr.
        example: dimensions of operands, and params, for the tests.
    """

    name: str
    dim: Callable[[tuple[Expr, ...], tuple[Any, ...]], int]
    torch: Callable[[Sequence[Tensor], tuple[Any, ...]], Tensor]
    lower: Callable[[Callable[..., Any], Sequence[Scalars], tuple[Any, ...]], Scalars]
    pullback: Callable[[Expr, Expr], Sequence[Expr | None]]
    pushforward: Callable[[Expr, Sequence[Expr | None]], Expr]
    example: tuple[tuple[int, ...], tuple[Any, ...]]


STRUCTURES: dict[str, Structure] = {}


def _row(name: str, n_operands: int | None, **columns: Any) -> None:
    """Register; `n_operands` None means that every argument is an operand."""
    columns.setdefault("pushforward", lambda node, tangents: builders[name](tangents[0], *node.params))
    row = Structure(name, **columns)
    STRUCTURES[name] = row

    def build(*args: Any) -> Expr:
        count = len(args) if n_operands is None else n_operands
        if len(args) < count or not count:
            raise ArgumentError(f"{name} expects at least {max(count, 1)} operands; got {len(args)}")
        operands = tuple(operand(a) for a in args[:count])
        params = tuple(_numbers(name, p) for p in args[count:])
        return Expr(name, operands, params, row.dim(operands, params))

    builders[name] = build


def _numbers(name: str, p: Any) -> Any:
    """A parameter in its one form: an integer or a tuple of integers, None as the empty one."""
    if p is None:
        return ()
    if isinstance(p, Expr) and p.op == "Const" and p.dim > 1:
        p = p.params
    return tuple(whole(name, v) for v in p) if isinstance(p, (tuple, list)) else whole(name, p)


def _fold(arithmetic: Callable[..., Any], name: str, terms: Scalars) -> Any:
    """A balanced tree: short dependency chains and small rounding errors."""
    while len(terms) > 1:
        pairs = [arithmetic(name, a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) // 2 * 2 :]
    return terms[0]


def _count(name: str, params: tuple[Any, ...], kinds: str) -> None:
    """`kinds`: a letter for each parameter, "n" a positive integer, "l" a list of integers."""
    if len(params) != len(kinds):
        what = " and ".join("a list" if k == "l" else "an integer" for k in kinds) or "nothing"
        raise ArgumentError(f"{name} expects {what} after its operands; got {len(params)} values")
    for p, kind in zip(params, kinds, strict=True):
        if isinstance(p, tuple) != (kind == "l") or (kind == "n" and p < 1):
            raise ArgumentError(f"{name} expects {'a list of integers' if kind == 'l' else 'an integer > 0'}; got {p}")


# Gather and Scatter, the linear maps that move components ---------------------------------------------------------


def _gather_dim(args: tuple[Expr, ...], params: tuple[Any, ...]) -> int:
    _count("Gather", params, "l")
    bad = [k for k in params[0] if not 0 <= k < args[0].dim]
    if bad or not params[0]:
        raise ShapeError(f"component {bad[0] if bad else '(none)'} of a vector of dimension {args[0].dim}")
    return len(params[0])


def _gather(t: Tensor, where: tuple[int, ...]) -> Tensor:
    start, stop = where[0], where[-1] + 1
    return t[..., start:stop] if where == tuple(range(start, stop)) else t[..., list(where)]


def _scatter_dim(args: tuple[Expr, ...], params: tuple[Any, ...]) -> int:
    _count("Scatter", params, "ln")
    where, dim = params
    if len(where) != args[0].dim or any(not 0 <= k < dim for k in where):
        raise ShapeError(f"Scatter to the places {where} of {dim} does not fit a vector of dimension {args[0].dim}")
    return int(dim)


def _scatter(arithmetic: Callable[..., Any], operands: Sequence[Scalars], params: tuple[Any, ...]) -> Scalars:
    where, dim = params
    groups: list[Scalars] = [[] for _ in range(dim)]
    for k, value in zip(where, operands[0], strict=True):
        groups[k].append(value)
    return [_fold(arithmetic, "Add", g) if g else arithmetic("Const", 0.0) for g in groups]


_row(
    "Gather",
    1,
    dim=_gather_dim,
    torch=lambda t, p: _gather(t[0], p[0]),
    lower=lambda arithmetic, a, p: [a[0][k] for k in p[0]],
    pullback=lambda node, e: (builders["Scatter"](e, node.params[0], node.args[0].dim),),
    example=((4,), ((2, 0, 2),)),
)
_row(
    "Scatter",
    1,
    dim=_scatter_dim,
    torch=lambda t, p: (
        t[0].new_zeros((*t[0].shape[:-1], p[1])).index_add(-1, torch.tensor(p[0], device=t[0].device), t[0])
    ),
    lower=_scatter,
    pullback=lambda node, e: (builders["Gather"](e, node.params[0]),),
    example=((3,), ((2, 0, 2), 4)),
)

# Sum and its adjoint ----------------------------------------------------------------------------------------------


def _sum_t_dim(args: tuple[Expr, ...], params: tuple[Any, ...]) -> int:
    _count("SumT", params, "n")
    if args[0].dim != 1:
        raise ShapeError(f"SumT replicates a scalar; got a vector of dimension {args[0].dim}")
    return int(params[0])


def _no_params(name: str) -> Callable[[tuple[Expr, ...], tuple[Any, ...]], int]:
    def dim(args: tuple[Expr, ...], params: tuple[Any, ...]) -> int:
        _count(name, params, "")
        return 1

    return dim


_row(
    "Sum",
    1,
    dim=_no_params("Sum"),
    torch=lambda t, p: t[0].sum(-1, keepdim=True),
    lower=lambda arithmetic, a, p: [_fold(arithmetic, "Add", a[0])],
    pullback=lambda node, e: (builders["SumT"](e, node.args[0].dim),),
    example=((4,), ()),
)
_row(
    "SumT",
    1,
    dim=_sum_t_dim,
    torch=lambda t, p: t[0].expand(*t[0].shape[:-1], p[0]),
    lower=lambda arithmetic, a, p: a[0] * p[0],
    pullback=lambda node, e: (builders["Sum"](e),),
    example=((1,), (3,)),
)

# Concat -----------------------------------------------------------------------------------------------------------


def _concat_torch(tensors: Sequence[Tensor], params: tuple[Any, ...]) -> Tensor:
    batch = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(*batch, t.shape[-1]) for t in tensors], -1)


def _concat_pullback(node: Expr, e: Expr) -> list[Expr | None]:
    stops = list(itertools.accumulate(a.dim for a in node.args))
    return [builders["Gather"](e, tuple(range(stop - a.dim, stop))) for a, stop in zip(node.args, stops, strict=True)]


_row(
    "Concat",
    None,
    dim=lambda args, params: sum(a.dim for a in args),
    torch=_concat_torch,
    lower=lambda arithmetic, a, p: [x for operand in a for x in operand],
    pullback=_concat_pullback,
    pushforward=lambda node, tangents: builders["Concat"](
        *(zero(a.dim) if t is None else t for a, t in zip(node.args, tangents, strict=True))
    ),
    example=((2, 3, 1), ()),
)

# Extrema inside the vector ----------------------------------------------------------------------------------------


def _first_extremum(arithmetic: Callable[..., Any], values: Scalars, flip: bool) -> Any:
    """The position of the first largest (`flip`) or smallest value; of the first nan if there is one, as in torch."""
    best, where = values[0], arithmetic("Const", 0.0)
    for k, value in enumerate(values[1:], 1):
        kept = arithmetic("LessOrEqual", value, best) if flip else arithmetic("LessOrEqual", best, value)
        kept = arithmetic("LogicalOr", kept, arithmetic("NotEqual", best, best))
        best = arithmetic("Where", kept, best, value)
        where = arithmetic("Where", kept, where, arithmetic("Const", float(k)))
    return where


def _one_hot(node: Expr) -> Expr:
    arg = node if node.op.startswith("Arg") else builders["Arg" + node.op](node.args[0])
    return builders["OneHot"](arg, node.args[0].dim)


for _name, _flip in (("Max", True), ("Min", False)):
    _row(
        _name,
        1,
        dim=_no_params(_name),
        torch=lambda t, p, f=(torch.max if _flip else torch.min): f(t[0], -1, keepdim=True).values,
        lower=lambda arithmetic, a, p, op=(_name + "imum"): [_fold(arithmetic, op, a[0])],
        pullback=lambda node, e: (builders["Mult"](e, _one_hot(node)),),
        pushforward=lambda node, tangents: builders["Sum"](builders["Mult"](_one_hot(node), tangents[0])),
        example=((4,), ()),
    )
    _row(
        "Arg" + _name,
        1,
        dim=_no_params("Arg" + _name),
        torch=lambda t, p, f=(torch.argmax if _flip else torch.argmin): f(t[0], -1, keepdim=True).to(t[0].dtype),
        lower=lambda arithmetic, a, p, flip=_flip: [_first_extremum(arithmetic, a[0], flip)],
        pullback=lambda node, e: (None,),
        pushforward=lambda node, tangents: zero(1),
        example=((4,), ()),
    )

# Products of tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """Reading of TensorDot's params: shapes of f and g (row-major), contracted axes, and where each free axis goes."""

    dims_f: tuple[int, ...]
    dims_g: tuple[int, ...]
    cont_f: tuple[int, ...]
    cont_g: tuple[int, ...]
    permute: tuple[int, ...]

    @property
    def keep_f(self) -> list[int]:
        return [k for k in range(len(self.dims_f)) if k not in self.cont_f]

    @property
    def keep_g(self) -> list[int]:
        return [k for k in range(len(self.dims_g)) if k not in self.cont_g]

    @property
    def place(self) -> list[int]:
        """Axis of the result that each free axis (those of f, then those of g) becomes."""
        return list(self.permute) or list(range(len(self.keep_f) + len(self.keep_g)))

    @property
    def order(self) -> list[int]:
        """Free axis that each axis of the result was: the inverse of `place`."""
        return [self.place.index(k) for k in range(len(self.place))]

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the result."""
        sizes = [self.dims_f[k] for k in self.keep_f] + [self.dims_g[k] for k in self.keep_g]
        return tuple(sizes[k] for k in self.order)


def _dot_terms(axes: _Axes) -> list[list[tuple[int, int]]]:
    """For every component of the result the pairs (position in f, position in g) whose products it sums."""
    inner = list(itertools.product(*(range(axes.dims_f[k]) for k in axes.cont_f)))
    terms = []
    for out in itertools.product(*map(range, axes.dims)):
        free = [out[k] for k in axes.place]
        at_f = dict(zip(axes.keep_f, free, strict=False))
        at_g = dict(zip(axes.keep_g, free[len(axes.keep_f) :], strict=True))
        pairs = []
        for c in inner:
            at_f.update(zip(axes.cont_f, c, strict=True))
            at_g.update(zip(axes.cont_g, c, strict=True))
            pairs.append((_flat_index(at_f, axes.dims_f), _flat_index(at_g, axes.dims_g)))
        terms.append(pairs)
    return terms


def _flat_index(at: dict[int, int], dims: Sequence[int]) -> int:
    flat = 0
    for k, n in enumerate(dims):
        flat = flat * n + at[k]
    return flat


def _dot_dim(args: tuple[Expr, ...], params: tuple[Any, ...]) -> int:
    _count("TensorDot", params, "lllll")
    axes = _Axes(*params)
    for name, f, dims in zip("fg", args, (axes.dims_f, axes.dims_g), strict=True):
        if math.prod(dims) != f.dim:
            raise ShapeError(f"TensorDot reads {name}, of dimension {f.dim}, as a tensor of shape {dims}")
    for cont, dims in ((axes.cont_f, axes.dims_f), (axes.cont_g, axes.dims_g)):
        if len(set(cont)) != len(cont) or any(not 0 <= k < len(dims) for k in cont):
            raise ShapeError(f"TensorDot: {cont} are no axes of a tensor of shape {dims}")
    if [axes.dims_f[k] for k in axes.cont_f] != [axes.dims_g[k] for k in axes.cont_g]:
        raise ShapeError(
            f"TensorDot cannot contract axes {axes.cont_f} of shape {axes.dims_f} with axes {axes.cont_g} of shape "
            f"{axes.dims_g}"
        )
    free = len(axes.keep_f) + len(axes.keep_g)
    if sorted(axes.place) != list(range(free)):
        raise ArgumentError(f"TensorDot: permute must order the {free} free axes; got {axes.permute}")
    return math.prod(axes.dims)


def _dot_torch(tensors: Sequence[Tensor], params: tuple[Any, ...]) -> Tensor:
    axes = _Axes(*params)
    names_f = list(range(len(axes.dims_f)))
    names_g = [len(names_f) + k for k in range(len(axes.dims_g))]
    for kf, kg in zip(axes.cont_f, axes.cont_g, strict=True):
        names_g[kg] = kf
    free = [names_f[k] for k in axes.keep_f] + [names_g[k] for k in axes.keep_g]
    f, g = (t.reshape(*t.shape[:-1], *dims) for t, dims in zip(tensors, (axes.dims_f, axes.dims_g), strict=True))
    text = ["..." + "".join(map(chr, (97 + k for k in n))) for n in (names_f, names_g, [free[k] for k in axes.order])]
    y = torch.einsum(f"{text[0]},{text[1]}->{text[2]}", f, g)
    return y.reshape(*y.shape[: y.ndim - len(free)], -1)


def _dot_lower(arithmetic: Callable[..., Any], operands: Sequence[Scalars], params: tuple[Any, ...]) -> Scalars:
    f, g = operands
    terms = _dot_terms(_Axes(*params))
    return [_fold(arithmetic, "Add", [arithmetic("Mult", f[a], g[b]) for a, b in pairs]) for pairs in terms]


def _dot_pullback(node: Expr, e: Expr) -> list[Expr | None]:
    """Each cotangent is again a TensorDot: of e with the other operand over that one's free axes."""
    f, g = node.args
    axes = _Axes(*node.params)
    at_f, at_g = axes.place[: len(axes.keep_f)], axes.place[len(axes.keep_f) :]
    result: list[Expr | None] = []
    for other, dims, keep, keep_other, cont, cont_other, at, at_other in (
        (g, axes.dims_g, axes.keep_f, axes.keep_g, axes.cont_f, axes.cont_g, at_f, at_g),
        (f, axes.dims_f, axes.keep_g, axes.keep_f, axes.cont_g, axes.cont_f, at_g, at_f),
    ):
        # what is left: the free axes of e in their order there, then the contracted axes of `other` in its order
        left = [k for _, k in sorted(zip(at, keep, strict=True))]
        left += [k for _, k in sorted(zip(cont_other, cont, strict=True))]
        params = (axes.dims, dims, tuple(at_other), tuple(keep_other), tuple(left))
        result.append(builders["TensorDot"](e, other, *params))
    return result


def _dot_pushforward(node: Expr, tangents: Sequence[Expr | None]) -> Expr:
    f, g = node.args
    df, dg = tangents
    terms = [builders["TensorDot"](*pair, *node.params) for pair in ((df, g), (f, dg)) if None not in pair]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


_row(
    "TensorDot",
    2,
    dim=_dot_dim,
    torch=_dot_torch,
    lower=_dot_lower,
    pullback=_dot_pullback,
    pushforward=_dot_pushforward,
    example=((12, 8), ((2, 3, 2), (2, 2, 2), (0, 2), (1, 0), (1, 0))),
)

_tensor_dot = builders["TensorDot"]
builders["TensorDot"] = lambda *args: _tensor_dot(*args, *([()] if len(args) == 6 else []))  # permute may be left out
