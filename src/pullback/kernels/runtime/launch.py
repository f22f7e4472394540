"""run(program, args, batch, m, n): a Program on CPU tensors by compiled code.

A call that repeats the shapes and strides of an earlier one finds a prepared `_Call`: it fills in addresses, runs the
worker and, where results are indexed by the axis that is not along the lanes, merges the parts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import PullbackError
from pullback.kernels.codegen import llvm_frame as words
from pullback.kernels.codegen.vecmath import FUNCTIONS
from pullback.kernels.ir.expr import I
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.reductions import OVER_BOTH, OVER_J, REDUCTIONS, Program
from pullback.kernels.plan.ranges import Ranges
from pullback.kernels.plan.schedule import CROSS, Plan, choose_lane, layout_of, make_plan
from pullback.kernels.runtime import compile, pool
from pullback.kernels.runtime.explain import explain

ELEMENTS = {torch.float32: "float", torch.float64: "double", torch.float16: "float", torch.bfloat16: "float"}
SERIAL = 60e-6  # seconds of work below which waking a thread costs more than it brings
PARTS = (
    48 << 20
)  # bytes of parts from which results that share a pass are computed one by one if the results are smaller
WIDE = 32  # components of a formula whose products or indices are wanted; the state of each has code of its own
DEEP = 250  # operations in a chain beyond which the recursive evaluation would come near Python's limit

_calls: dict[Any, Any] = {}


@lru_cache(maxsize=4096)
def why_not(program: Program, dtype: torch.dtype) -> str:
    """The reason why there is no compiled code for `program`; empty if there is."""
    if dtype not in ELEMENTS:
        return f"no code for {dtype}"
    try:
        layout = layout_of(program)
    except PullbackError as error:
        return str(error)
    except RecursionError:
        return "operations nested too deeply"
    for v in layout.lowered.values():
        row = PRIMITIVES.get(v.op)
        if row is not None and row.llvm not in FUNCTIONS:
            return f"no code for {v.op}"
    if max(layout.depths.values(), default=0) > DEEP:
        return f"a chain of more than {DEEP} operations"
    if program.kind != "Sum":
        if OVER_BOTH in program.axes:
            return f"{program.kind} over both axes"
        if program.exprs[0].dim > WIDE:
            return f"{program.kind} of a formula of more than {WIDE} components"
    return ""


def supports(program: Program, dtype: torch.dtype) -> bool:
    """Whether `run` takes the program; if not, the eager renderer does."""
    return not why_not(program, dtype)


class _Call:
    """What depends only on the program and on the shapes and strides of its arguments."""

    def __init__(
        self,
        program: Program,
        args: Sequence[Tensor],
        batch: tuple[int, ...],
        m: int,
        n: int,
        ranges: Ranges | None,
        threads: int,
    ) -> None:
        elem = ELEMENTS[args[0].dtype if args else torch.float32]
        target = compile.current()
        n_batch = 1
        for k in batch:
            n_batch *= k
        lane = choose_lane(program, m, n, n_batch, threads, ranges is not None, target.lanes(elem))
        self.plan = plan = make_plan(program, elem, target, lane)
        self.kernel = compile.kernel(plan)
        self.worker, self.merge = self.kernel.worker, self.kernel.merge
        self.scratch = self.kernel.module.scratch
        self.integer = REDUCTIONS[program.kind].integer
        self.dtype = torch.int64 if self.integer else torch.float64 if elem == "double" else torch.float32
        size_a, size_b = (m, n) if lane == I else (n, m)
        self.single: list[_Call] = []
        self.shape, self.out_step, starts = _result(program, batch, m, n)
        self.prefill, self.softmax = ranges is not None, program.kind == "SoftMax"
        self.identity = -1 if self.integer else {"Prod": 1.0, "LogSumExp": float("-inf")}.get(program.kind, 0.0)

        pairs = m * n * n_batch
        seconds = pairs * _cost(plan) * 1e-9
        self.threads = threads if seconds > SERIAL else 1
        parts, records, spans = _dense(plan, size_a, size_b, n_batch, self.threads)
        if ranges is not None:
            parts, records, spans = _sparse(plan, ranges, self.threads)
        self.tables = [_table(t) for t in (parts, records, spans)]
        n_parts = len(parts) - 1
        self.tasks = n_batch * n_parts
        cells = self.kernel.module.parts
        offsets, step = [], 0
        for n_cells, axis in zip(cells, program.axes, strict=True):
            offsets.append(step)
            step += n_cells * 8 * (size_b if plan.place(axis) == CROSS else 1)
        self.partial = step * self.tasks
        size = 8 if elem == "double" else 4
        if len(program.axes) > 1 and self.partial > max(PARTS, 3 * size * n_batch * self.out_step):
            # one pass for each result, with its rows along the lanes
            self.single = [
                _Call(_only(program, k), args, batch, m, n, ranges, threads) for k in range(len(program.axes))
            ]
        values = [0] * words.RESULTS
        values[words.TASKS], values[words.PARTS] = self.tasks, n_parts
        values[words.N_B], values[words.BATCH] = size_b, n_batch
        values[words.STARTS], values[words.RECORDS], values[words.RANGES] = (t[1] for t in self.tables)
        values[words.OUT_STEP], values[words.PART_STEP] = self.out_step, step
        values[words.FILL] = 0 if ranges is not None else (n if program.axes[0] == OVER_J else m)
        for start, offset in zip(starts, offsets, strict=True):
            values += [start, offset]
        self.first_arg = len(values)
        self.keep: list[Any] = []
        for t, (_, category) in zip(args, program.signature, strict=True):
            values += self._argument(t, category, batch)
        self.words = (ctypes.c_int64 * len(values))(*values)

    def _argument(self, t: Tensor, category: int, batch: tuple[int, ...]) -> list[int]:
        """The description of an argument; its address is filled in at every call."""
        inner = 1 if category == 2 else 2
        strides = t.stride()
        lead = t.ndim - inner
        steps = [0] * (len(batch) - lead) + [
            s if k > 1 else 0 for s, k in zip(strides[:lead], t.shape[:lead], strict=True)
        ]
        row = strides[-2] if inner == 2 else 0
        step, total, single = 0, 1, True
        for s, k in zip(reversed(steps), reversed(batch), strict=True):
            if k == 1:
                continue
            if total == 1:
                step = s
            single = single and s == step * total
            total *= k
        if single:
            table = _table([0])
            self.keep.append(table)
            return [0, step, row, strides[-1], table[1], 0]
        offsets = torch.zeros((), dtype=torch.int64)
        for s, k in zip(steps, batch, strict=True):
            offsets = offsets.unsqueeze(-1) + s * torch.arange(k)
        table = _table(offsets.reshape(-1))
        self.keep.append(table)
        return [0, 0, row, strides[-1], table[1], -1]

    def __call__(self, args: Sequence[Tensor]) -> Tensor:
        if self.single:
            return torch.cat([call(args).reshape(*self.shape[:-1], -1) for call in self.single], -1)
        out = torch.empty(self.shape, dtype=self.dtype)
        if self.prefill:  # rows that no range names
            out.fill_(self.identity)
            if self.softmax:
                out[..., 0] = -torch.inf
        if not self.tasks or not out.numel():
            return out
        values = type(self.words).from_buffer_copy(self.words)
        values[words.OUT] = out.data_ptr()
        at = self.first_arg
        for t in args:
            values[at] = t.data_ptr()
            at += words.PER_ARG
        if self.partial:
            partial = torch.empty(self.partial, dtype=torch.uint8)
            values[words.PARTIAL] = partial.data_ptr()
        address = ctypes.addressof(values)
        pool.run(min(self.threads, self.tasks), self.worker, address, self.scratch)
        if self.merge is not None:
            self.merge(address)
        return out


def run(
    program: Program, args: Sequence[Tensor], batch: tuple[int, ...], m: int, n: int, ranges: Ranges | None = None
) -> Tensor:
    """The reduction of `program`: (*batch, rows, columns), or, for several results, (*batch, all of them flat).

    Args:
        program: what `supports` accepts.
        args: CPU tensors of one floating dtype in the order of the signature, (*b, rows, dim) or (*b, dim) for
            parameters, where b broadcasts to `batch`; any strides. Not checked here.
        batch, m, n: sizes; each may be 0.
        ranges: block-sparse pattern, the same for every batch member.
    """
    dtype = args[0].dtype if args else torch.float32
    if dtype in (torch.float16, torch.bfloat16):
        out = run(program, [t.float() for t in args], batch, m, n, ranges)
        return out if out.dtype == torch.int64 else out.to(dtype)
    if any(t.is_neg() for t in args):  # imaginary parts of conjugates: memory holds the opposite sign
        args = [t.resolve_neg() for t in args]
    threads = torch.get_num_threads()
    key = (program, dtype, batch, m, n, threads, *[(t.shape, t.stride()) for t in args], *compile.override)
    calls = _calls if ranges is None else ranges.tasks  # what is made for a pattern lives as long
    call = calls.get(key)
    if call is None:
        if ranges is None and len(calls) > 4096:
            calls.clear()
        call = calls[key] = _Call(program, args, batch, m, n, ranges, threads)
    return call(args)


def _only(program: Program, k: int) -> Program:
    """Result k of a sum alone."""
    return replace(program, exprs=program.exprs[k : k + 1], axes=program.axes[k : k + 1])


def _result(program: Program, batch: tuple[int, ...], m: int, n: int) -> tuple[tuple[int, ...], int, list[int]]:
    """(shape, elements of a batch member, where each result starts)."""
    rows = {0: n, 1: m}
    starts, total = [], 0
    for width, axis in zip(program.widths, program.axes, strict=True):
        starts.append(total)
        total += width * rows.get(axis, 1)
    if len(starts) > 1:
        return (*batch, total), total, starts
    (width,), (axis,) = program.widths, program.axes
    return ((*batch, width) if axis == OVER_BOTH else (*batch, rows[axis], width)), total, starts


def _cost(plan: Plan) -> float:
    """Nanoseconds for a pair, roughly: enough to tell small work from large."""
    n = sum(8 if v.op in ("Exp", "Log", "Sin", "Cos", "Powf", "Tanh") else 1 for v in plan.layout.pairs)
    n += sum(2 * v.params[0] for group in plan.layout.loops for v in group)
    n += sum(s.size for group in plan.layout.lowered.segments for s in group)
    return n / plan.lanes / 4


def _dense(plan: Plan, size_a: int, size_b: int, n_batch: int, threads: int) -> tuple[list[int], list[int], list[int]]:
    """(first record of each part, records, ranges): equal parts of the rows a."""
    crossed = any(plan.place(axis) == CROSS for axis in plan.program.axes)
    blocks = -(-size_a // plan.block)
    wanted = 1
    if threads > 1:
        wanted = -(-(2 if crossed else 8) * threads // max(n_batch, 1))
        if crossed and n_batch >= 2 * threads:
            wanted = 1
    per = max(-(-blocks // wanted), 1) * plan.block
    if not crossed:
        per = min(per, plan.chunk)
    firsts = list(range(0, size_a, per)) or [0]
    records = [x for a in firsts for x in (a, min(a + per, size_a), 0, 1)]
    return list(range(len(firsts) + 1)), records, [0, size_b]


def _sparse(plan: Plan, ranges: Ranges, threads: int) -> tuple[list[int], list[int], list[int]]:
    """The same for block-sparse pairs: a record for each cluster of rows, cut into chunks."""
    if plan.lane == I:
        own, slices, other = ranges.ranges_i, ranges.slices_i, ranges.redranges_j
    else:
        own, slices, other = ranges.ranges_j, ranges.slices_j, ranges.redranges_i
    spans = other.reshape(-1).tolist()
    records: list[int] = []
    start = 0
    for (a0, a1), stop in zip(own.tolist(), slices.tolist(), strict=True):
        for a in range(a0, a1, plan.chunk):
            records += [a, min(a + plan.chunk, a1), start, stop]
        start = stop
    n = len(records) // 4
    parts = max(min(n, 16 * threads), 1)
    if any(plan.place(axis) == CROSS for axis in plan.program.axes):
        parts = max(min(n, 2 * threads), 1)
    return [n * k // parts for k in range(parts + 1)], records, spans


def _table(values: Any) -> tuple[Any, int]:
    """int64 numbers in memory, and their address."""
    t = torch.as_tensor(values, dtype=torch.int64).contiguous()
    if not t.numel():
        t = torch.zeros(1, dtype=torch.int64)
    return t, t.data_ptr()


def describe(program: Program, dtype: torch.dtype, m: int, n: int) -> str:
    """Plan, operations for a pair, LLVM text and assembly of the inner loop, for people."""
    return explain(plan_for(program, dtype, m, n))


def plan_for(program: Program, dtype: torch.dtype, m: int, n: int) -> Plan:
    """The plan of a call without batch."""
    elem, target = ELEMENTS[dtype], compile.current()
    return make_plan(
        program, elem, target, choose_lane(program, m, n, 1, torch.get_num_threads(), False, target.lanes(elem))
    )
