"""The definition: a formula evaluated by torch on tiles of pairs. Slow, but runs everywhere; all else is held to it.

`evaluate` is plain differentiable torch. `run` walks over tiles of rows and columns, so that M*N is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.kernels.ir.expr import Expr, I, J, walk
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import OVER_BOTH, OVER_I, Program
from pullback.kernels.ir.structure import STRUCTURES
from pullback.kernels.plan.ranges import Ranges

TILE = 1 << 18  # numbers in the widest intermediate of a tile: stays in the cache of a processor
DEVICE_TILE = 1 << 28  # bytes of all intermediates of a tile on a device: many pairs for a launch, little of its memory

State = tuple[Tensor, ...]


def evaluate(
    exprs: Sequence[Expr], tensors: Sequence[Tensor], index: tuple[Tensor | None, Tensor | None] = (None, None)
) -> list[Tensor]:
    """F_ij for tensors that broadcast over pairs: (..., M, 1, dim), (..., 1, N, dim) or (..., 1, 1, dim).

    Args:
        exprs: expressions; they share subexpressions.
        tensors: by position.
        index: row and column numbers, shaped like tensors of dimension 1; needed if a formula uses them.
    """
    done: dict[Expr, Tensor] = {}
    like = next((t for t in tensors if t is not None), torch.empty(0))
    for node in walk(*exprs):
        if node.op == "Var":
            value = tensors[node.params[0]]
        elif node.op == "Const":
            value = _constant(node.params, like)
        elif node.op == "Index":
            numbers = index[node.params[0]]
            assert numbers is not None, "a formula with an index variable needs the numbers of its rows; please report"
            value = numbers.to(like.dtype)
        elif node.op in STRUCTURES:
            value = _structure(node, [done[a] for a in node.args])
        else:
            value = PRIMITIVES[node.op].torch(*(done[a] for a in node.args), *node.params)
        done[node] = value
    return [done[e] for e in exprs]


# A device must not wait for the host ------------------------------------------------------------------------------
# A list of numbers is a copy from the host: it waits for the device, and cannot be captured into a graph.


def _constant(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype) if like.device.type == "cpu" else filled(values, like)


def filled(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor like `like`, without a list of them."""
    if len(set(values)) == 1:
        return like.new_full((len(values),), values[0])
    return torch.cat([like.new_full((1,), v) for v in values])


def _structure(node: Expr, operands: Sequence[Tensor]) -> Tensor:
    listed = node.op in ("Gather", "Scatter") and operands[0].device.type != "cpu"
    return by_columns(node, operands) if listed else STRUCTURES[node.op].torch(operands, node.params)


def by_columns(node: Expr, operands: Sequence[Tensor]) -> Tensor:
    """An operation that moves components, without a list of places."""

    def arithmetic(op: str, *columns: Any) -> Tensor:
        return torch.zeros_like(operands[0][..., :1]) if op == "Const" else sum(columns)

    columns = [list(t.split(1, -1)) for t in operands]
    return torch.cat(STRUCTURES[node.op].lower(arithmetic, columns, node.params), -1)


def on_pairs(t: Tensor, category: int) -> Tensor:
    """An argument (..., rows, dim) or (..., dim) with the axes of pairs put in."""
    if category == I:
        return t.unsqueeze(-2)
    return t.unsqueeze(-3) if category == J else t[..., None, None, :]


def selected(expr: Expr, args: Sequence[Tensor], signature: Any, kept: int, chosen: Tensor) -> Tensor:
    """F at chosen pairs, differentiable: (..., R, K, dim) for `chosen` of shape (..., R, K, dim), -1 meaning none.

    Component d of the result is F_d at the row of `kept` (I or J) and the other index chosen[..., d].
    """
    *batch, rows, k, dim = chosen.shape
    flat = chosen.clamp(min=0).reshape(*batch, rows, k * dim)
    tensors = []
    for t, (_, category) in zip(args, signature, strict=True):
        if category == kept:
            tensors.append(t.unsqueeze(-2))
        elif category in (I, J):
            t = t.expand(*batch, *t.shape[-2:])
            at = flat.reshape(*batch, rows * k * dim, 1).expand(*batch, rows * k * dim, t.shape[-1])
            tensors.append(t.gather(-2, at).reshape(*batch, rows, k * dim, t.shape[-1]))
        else:
            tensors.append(t[..., None, None, :])
    own = torch.arange(rows, device=chosen.device)[:, None, None]
    other = flat.unsqueeze(-1)
    (y,) = evaluate([expr], tensors, (own, other) if kept == I else (other, own))
    y = y.expand(*batch, rows, k * dim, dim).reshape(*batch, rows, k, dim, dim)
    return y.diagonal(dim1=-2, dim2=-1)


# Reductions: how a tile (..., rows, columns, dim) is absorbed ------------------------------------------------------


def _sum_step(state: State, f: Sequence[Tensor], column: int, p: Program) -> State:
    return (state[0] + f[0].sum(-2, dtype=state[0].dtype),)


def _shifted_step(state: State, f: Sequence[Tensor], column: int, p: Program) -> State:
    """(m, s) with s = sum exp(F - m) G; rows whose maximum is infinite are not shifted."""
    m, s = state
    top = torch.maximum(m, f[0].amax(-2)) if f[0].shape[-2] else m
    shift = torch.where(top.isinf(), 0.0, top)
    w = torch.exp(f[0] - shift.unsqueeze(-2))
    terms = w if len(f) == 1 else w * f[1]
    if p.kind == "SoftMax":
        terms = torch.cat([w, terms], -1)
    kept = torch.where(m == -math.inf, 0.0, torch.exp(torch.where(m.isinf(), 0.0, m) - shift) * s)
    return top, kept + terms.sum(-2)


def _prod_step(state: State, f: Sequence[Tensor], column: int, p: Program) -> State:
    return (state[0] * f[0].prod(-2),)


def _arg_step(state: State, f: Sequence[Tensor], column: int, p: Program) -> State:
    largest = p.kind == "ArgKMax"
    worst = -math.inf if largest else math.inf
    values = torch.where(f[0].isnan(), worst, f[0])
    number = torch.arange(column, column + values.shape[-2], device=values.device)
    indices = number[:, None].expand(values.shape)
    values, indices = torch.cat([state[0], values], -2), torch.cat([state[1], indices], -2)
    order = torch.sort(torch.where(indices < 0, worst, values), dim=-2, descending=largest, stable=True).indices
    # entries that are not there (index -1) stand before real ones of equal, infinite value: put them last
    there = torch.sort((indices.gather(-2, order) < 0).to(torch.int8), dim=-2, stable=True).indices
    order = order.gather(-2, there)[..., : p.k, :]
    return values.gather(-2, order), indices.gather(-2, order)


_STEPS: dict[str, Callable[[State, Sequence[Tensor], int, Program], State]] = {
    "Sum": _sum_step,
    "LogSumExp": _shifted_step,
    "SoftMax": _shifted_step,
    "Prod": _prod_step,
    "ArgKMin": _arg_step,
    "ArgKMax": _arg_step,
}


def _start(p: Program, shape: tuple[int, ...], width: int, like: Tensor) -> State:
    """The identity for rows of `shape`."""
    if p.kind == "Sum":
        return (like.new_zeros(*shape, width, dtype=_accumulator(p, like.dtype, like.device)),)
    if p.kind in ("LogSumExp", "SoftMax"):
        return like.new_full((*shape, 1), -math.inf), like.new_zeros(*shape, width)
    if p.kind == "Prod":
        return (like.new_ones(*shape, width),)
    value = -math.inf if p.kind == "ArgKMax" else math.inf
    full = (*shape, 0, p.exprs[0].dim)
    return like.new_full(full, value), torch.zeros(full, dtype=torch.int64, device=like.device)


def _accumulator(p: Program, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if p.accumulator != "auto":
        return torch.promote_types(dtype, getattr(torch, p.accumulator))
    return dtype if device.type == "mps" else torch.float64


def _finish(p: Program, state: State, width: int) -> Tensor:
    if p.kind == "LogSumExp":
        m, s = state
        return torch.where(m.isinf(), 0.0, m) + torch.log(s)
    if p.kind == "SoftMax":
        m, s = state
        total, sums = s[..., :1], s[..., 1:]
        mean = torch.where(total == 0, 0.0, sums / total)  # of nothing: 0
        return torch.cat([torch.where(m.isinf(), 0.0, m) + torch.log(total), mean], -1)
    if p.kind.startswith("Arg"):
        indices = state[1]
        missing = p.k - indices.shape[-2]
        indices = torch.nn.functional.pad(indices, (0, 0, 0, missing), value=-1)
        return indices.reshape(*indices.shape[:-2], width)
    return state[0]


def run(
    p: Program, args: Sequence[Tensor], batch: tuple[int, ...], m: int, n: int, ranges: Ranges | None = None
) -> Tensor:
    """The result of program `p`; the contract is that of `runtime.launch.run`, on any device."""
    like = args[0] if args else torch.empty(0)
    dtype = like.dtype
    if dtype in (torch.float16, torch.bfloat16):
        args = [a.float() for a in args]
        like = args[0]
    results = []
    for expr, axis, width in zip(p.exprs if p.kind == "Sum" else p.exprs[:1], p.axes, p.widths, strict=True):
        members = (expr,) if p.kind == "Sum" else p.exprs
        y = _reduce(p, members, axis, width, args, batch, m, n, ranges, like)
        results.append(y if y.dtype == torch.int64 else y.to(dtype))
    if len(results) == 1:
        return results[0]
    return torch.cat([r.reshape(*batch, -1) for r in results], -1)


def _tile(members: Sequence[Expr], batch: tuple[int, ...], n_columns: int, like: Tensor) -> tuple[int, int]:
    """(columns, rows) of a tile."""
    dims = [e.dim for e in walk(*members)]
    members_of_batch = max(1, math.prod(batch))
    if like.device.type == "cpu":
        pairs = TILE // (max(dims, default=1) * members_of_batch)
    else:
        pairs = DEVICE_TILE // (sum(dims) * like.element_size() * members_of_batch)
    columns = max(1, min(n_columns, 4096, pairs))
    return columns, max(1, pairs // columns)


def _reduce(
    p: Program,
    members: Sequence[Expr],
    axis: int,
    width: int,
    args: Sequence[Tensor],
    batch: tuple[int, ...],
    m: int,
    n: int,
    ranges: Ranges | None,
    like: Tensor,
) -> Tensor:
    by_column = axis == OVER_I
    n_rows, n_columns = (n, m) if by_column else (m, n)
    row_category = J if by_column else I
    columns_per_tile, rows_per_tile = _tile(members, batch, n_columns, like)
    step = _STEPS[p.kind]

    def part(rows: slice, columns: slice | Tensor) -> list[Tensor]:
        tensors = []
        for t, (_, category) in zip(args, p.signature, strict=True):
            if category in (I, J):
                t = t[..., rows if category == row_category else columns, :]
            # rows of the tile go to axis -3 and columns to axis -2, whatever i and j are
            tensors.append(on_pairs(t, category if not by_column or category not in (I, J) else 1 - category))
        i = torch.arange(rows.start, rows.stop, device=like.device)[:, None, None]
        j = (
            columns[None, :, None]
            if isinstance(columns, Tensor)
            else torch.arange(columns.start, columns.stop, device=like.device)[None, :, None]
        )
        shape = (*batch, i.shape[0], j.shape[1])
        return [f.expand(*shape, f.shape[-1]) for f in evaluate(members, tensors, (j, i) if by_column else (i, j))]

    def over(rows: slice, spans: Sequence[tuple[int, int]]) -> State:
        state = _start(p, (*batch, rows.stop - rows.start), width, like)
        for start, stop in spans:
            for c in range(start, stop, columns_per_tile):
                state = step(state, part(rows, slice(c, min(c + columns_per_tile, stop))), c, p)
        return state

    blocks = [((0, n_rows), [(0, n_columns)])] if ranges is None else ranges.blocks(by_column)
    out = None
    for (first, last), spans in blocks:
        for r in range(first, last, rows_per_tile):
            rows = slice(r, min(r + rows_per_tile, last))
            y = _finish(p, over(rows, spans), width)
            if out is None:
                empty = _finish(p, _start(p, (*batch, n_rows), width, like), width)
                out = empty.to(y.dtype)
            out[..., rows, :] = y
    if out is None:
        out = _finish(p, _start(p, (*batch, n_rows), width, like), width)
    return out.sum(-2) if axis == OVER_BOTH else out
