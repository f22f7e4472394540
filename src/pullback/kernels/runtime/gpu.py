"""run(program, args, batch, m, n) by Triton: programs on the tensors' GPU, on its current stream, without waiting.

What depends on the program, shapes, strides and types alone is worked out once and kept as a `Call`, so that later
calls look it up, allocate the result and launch. Nothing waits for the device and nothing is copied to it, with two
exceptions at the first call: tables of a block-sparse pattern are copied once, and tiles are measured if that is asked
for (`tuning`). So a call that was made before can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pullback.kernels.codegen import triton as codegen
from pullback.kernels.codegen.triton import Kernel
from pullback.kernels.codegen.triton_pieces import pieces, results
from pullback.kernels.codegen.triton_tiles import Tile, smaller
from pullback.kernels.codegen.triton_values import DENSE, GAPS, UNIT
from pullback.kernels.ir.expr import PARAMETER, I
from pullback.kernels.ir.reductions import OVER_BOTH, REDUCTIONS, Program
from pullback.kernels.plan.ranges import Ranges
from pullback.kernels.runtime import gpu_code, tuning

DATA = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
KEPT_CALLS = 4096
PARTS = 128  # that the columns are shared out to at most
TILES = 4  # columns of a part, at least

_calls: OrderedDict[Any, Call] = OrderedDict()
_shrunk: dict[Kernel, Tile] = {}  # tiles of kernels whose own needs more shared memory than the device has


def _installed() -> bool:
    return gpu_code.installed()


def why_not(program: Program, dtype: torch.dtype) -> str:
    """The reason why `run` does not take the program; empty if it does."""
    if dtype not in DATA:
        return f"no code for {dtype}"
    return codegen.why_not(program) or ("" if _installed() else "Triton is not installed")


@dataclass
class Launch:
    """A kernel with its grid and the numbers that follow its tensors.

    Args:
        kernel: what is launched.
        grid: its programs.
        numbers: the last arguments.
        tables: tensors of a block-sparse pattern.
        made: Triton's object for this device, once it is compiled for aligned pointers.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    tables: tuple[Tensor, ...] = ()
    made: Any = None

    def __call__(self, out: Tensor, args: Sequence[Tensor], work: Sequence[Tensor]) -> None:
        """Launch on the current stream of the current device.

        Triton's own dispatch looks at every argument. All that can change between calls of one shape is whether
        pointers are multiples of 16: as long as they are, the compiled kernel is launched without asking.
        """
        tensors = [out, *args, *self.tables, *work]
        aligned = not any([t.data_ptr() % 16 for t in tensors])
        if aligned and self.made is not None:
            self.made[self.grid](*tensors, *self.numbers)
            return
        tile = self.kernel.tile
        launch = gpu_code.function(self.kernel)[self.grid]
        made = launch(*tensors, *self.numbers, num_warps=tile.warps, num_stages=tile.stages)
        if aligned and out.device.type == "cuda":
            self.made = made


@dataclass
class Part:
    """The launches of a program with one result.

    Args:
        shape, dtype: of the memory that they fill.
        fill: number that it holds before, if any.
        axis: of the program.
        steps: (launches, numbers of workspace, its type, whether it holds indices too).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None
    axis: int
    steps: list[tuple[list[Launch], int, torch.dtype, bool]] = field(default_factory=list)


@dataclass
class Call:
    """All that is done for a program and tensors of one shape."""

    program: Program
    parts: list[Part]
    joined: bool

    def __call__(self, args: Sequence[Tensor]) -> Tensor:
        """Allocate and launch; `joined`: results stand one after the other in a row."""
        like, found = args[0], []
        for part in self.parts:
            out = like.new_empty(part.shape, dtype=part.dtype)
            if part.fill is not None:
                out.fill_(part.fill)
                if self.program.kind == "SoftMax":
                    out[..., 0] = -torch.inf
            for launches, size, dtype, indices in part.steps:
                work = [like.new_empty(size, dtype=dtype)] if size else []
                work += [like.new_empty(size, dtype=torch.int64)] if indices else []
                for launch in launches:
                    launch(out, args, work)
            if part.axis == OVER_BOTH:
                out = out.sum(-2).to(like.dtype)
            elif self.joined:
                out = out.reshape(*part.shape[:-2], part.shape[-2] * part.shape[-1])
            found.append(out)
        return found[0] if len(found) == 1 else torch.cat(found, -1)


def run(
    program: Program, args: Sequence[Tensor], batch: tuple[int, ...], m: int, n: int, ranges: Ranges | None = None
) -> Tensor:
    """The reduction of `program`; the contract is that of `runtime.launch.run`, on the device of the tensors.

    Each result is computed by kernels of its own. A sum over both axes is one over j, then one over i by torch.
    """
    like = args[0]
    device = like.device
    data = DATA[like.dtype]
    precision = gpu_code.precision(data)
    key = (program, tuple([(t.shape, t.stride()) for t in args]), batch, m, n, data, device, precision)
    kept: Any = _calls if ranges is None else ranges.tasks
    call = kept.get(key)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _do(call, kept, key, args, ranges)
    return _do(call, kept, key, args, ranges)


def _do(call: Call | None, kept: Any, key: tuple[Any, ...], args: Sequence[Tensor], ranges: Ranges | None) -> Tensor:
    """Make the call if there is none; again with smaller tiles if the device says that they need too much memory."""
    while True:
        if call is None or tuning.within():
            call = kept[key] = _call(key, args, ranges)
            if len(_calls) > KEPT_CALLS:
                _calls.popitem(last=False)
        try:
            return call(args)
        except Exception as error:
            if not _shrink(error, call):
                raise
            call = None


def _shrink(error: Exception, call: Call) -> bool:
    """Take smaller tiles where the device has too little shared memory; false if that is not the error, or no help."""
    from triton.runtime.errors import OutOfResources

    found = False
    if isinstance(error, OutOfResources):
        for part in call.parts:
            for launches, *_ in part.steps:
                kernel = launches[0].kernel
                tile = smaller(kernel.tile)
                if tile is not None and kernel.multiplies:
                    _shrunk[replace(kernel, phase="", chosen=None)] = tile
                    found = True
    return found


def _call(key: tuple[Any, ...], args: Sequence[Tensor], ranges: Ranges | None) -> Call:
    program, _, batch, m, n, data, device, precision = key
    dtype = torch.int64 if REDUCTIONS[program.kind].integer else args[0].dtype
    found = []
    for p, axis, width in zip(results(program), program.axes, program.widths, strict=True):
        rows = n if axis == 0 else m
        fill = None
        if ranges is not None:  # rows that a pattern may not name hold what the reduction of nothing is
            fill = -1.0 if dtype == torch.int64 else {"Prod": 1.0, "LogSumExp": -math.inf}.get(program.kind, 0.0)
        part = Part((*batch, rows, width), torch.float64 if axis == OVER_BOTH else dtype, fill, axis)
        if math.prod(part.shape):
            for k in range(len(pieces(p))):
                sparse, family = ranges is not None, gpu_code.family(device)
                kernel = Kernel(p, k, data, (), 0, sparse, precision, family=family)
                part.steps.append(_step(kernel, args, batch, m, n, ranges, part))
        found.append(part)
    return Call(program, found, len(program.axes) > 1)


def _step(
    kernel: Kernel, args: Sequence[Tensor], batch: tuple[int, ...], m: int, n: int, ranges: Ranges | None, part: Part
) -> tuple[list[Launch], int, torch.dtype, bool]:
    """The launches of one piece, with the tile that was measured, or is measured now, or that of the table."""
    signature, device = kernel.program.signature, args[0].device
    layouts = tuple(_layout(t, c) for t, (_, c) in zip(args, signature, strict=True))
    strides = [_batch_strides(t, c, batch) for t, (_, c) in zip(args, signature, strict=True)]
    steps = _strides_of(part.shape)
    members, own = _axes(batch, [*strides, steps[:-2]])
    kernel = replace(kernel, layouts=layouts, batch=len(members))
    rows = [t.stride(-2) if t.ndim > 1 else 0 for t in args]
    jumps = [row for row, layout in zip(rows, layouts, strict=True) if layout == UNIT]
    jumps += [step for lead in own[:-1] for step in lead]
    if jumps and kernel.multiplies:
        kernel = replace(kernel, aligned=not any(jump % kernel.vector for jump in jumps))
    numbers = [*members, steps[-2], *own[-1]]
    for t, row, layout, lead in zip(args, rows, layouts, own, strict=False):
        given = row // kernel.vector if kernel.aligned else row
        numbers += [*{GAPS: [row, t.stride(-1)], UNIT: [given], DENSE: []}[layout], *lead]
    sizes = (m, n) if kernel.rows == I else (n, m)

    def made(tile: Tile | None) -> tuple[list[Launch], int, torch.dtype, bool]:
        return _launches(replace(kernel, chosen=tile), sizes, math.prod(members), tuple(numbers), ranges, device)

    name = gpu_code.architecture(device)
    tile = tuning.choice(kernel, name)
    if tile is None and tuning.active():

        def trial(tile: Tile) -> None:
            Call(kernel.program, [replace(part, steps=[made(tile)], axis=0)], False)(args)

        tile = tuning.measure(kernel, name, trial, device)
    return made(_shrunk.get(kernel, tile))


def _launches(
    kernel: Kernel,
    sizes: tuple[int, int],
    members: int,
    numbers: tuple[int, ...],
    ranges: Ranges | None,
    device: torch.device,
) -> tuple[list[Launch], int, torch.dtype, bool]:
    """One launch, or, where there are too few rows for the device, one of parts and one that joins them."""
    n_rows, n_cols = sizes
    rows, columns = kernel.tile[:2]
    tables: tuple[Tensor, ...] = ()
    n_blocks = -(-n_rows // rows)
    if ranges is not None:
        tables = _tables(ranges, kernel.rows, rows, device)
        n_blocks = tables[0].shape[0]
    across = -(-kernel.piece.size // kernel.piece.width)
    kind = gpu_code.work_type(kernel)
    total = n_blocks * members
    if not total:
        return [], 0, kind, False
    first = (n_rows, n_cols, n_blocks)
    parts = 1
    if ranges is None and total * across < 2 * gpu_code.processors(device):
        parts = min(-(-4 * gpu_code.processors(device) // (total * across)), n_cols // (TILES * columns), PARTS)
    if parts < 2:
        return [Launch(kernel, (total, across, 1), (*first, *numbers), tables)], 0, kind, False
    all_rows = members * n_rows
    more = (*first, *numbers, parts, all_rows)
    launches = [
        Launch(replace(kernel, phase="part"), (total, across, parts), more),
        Launch(replace(kernel, phase="merge"), (total, across, 1), more),
    ]
    size = parts * across * codegen.width_of_state(kernel) * all_rows
    return launches, size, kind, kernel.program.kind.startswith("Arg")


def _strides_of(shape: Sequence[int]) -> list[int]:
    """Strides of new memory of that shape."""
    found, total = [], 1
    for size in reversed(shape):
        found.append(total)
        total *= max(size, 1)
    return found[::-1]


def _layout(t: Tensor, category: int) -> int:
    inner = 1 if category == PARAMETER else 2
    sizes, strides = t.shape[-inner:], t.stride()[-inner:]
    if all(size == 1 or own == step for size, own, step in zip(sizes, strides, _strides_of(sizes), strict=True)):
        return DENSE
    return UNIT if strides[-1] == 1 or sizes[-1] == 1 else GAPS


def _batch_strides(t: Tensor, category: int, batch: tuple[int, ...]) -> list[int]:
    lead = t.ndim - (1 if category == PARAMETER else 2)
    own = [s if k > 1 else 0 for s, k in zip(t.stride()[:lead], t.shape[:lead], strict=True)]
    return [0] * (len(batch) - lead) + own


def _axes(batch: tuple[int, ...], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Batch axes joined where every tensor steps through them as through one: (sizes, strides of each tensor)."""
    members: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in range(len(batch)):
        size = batch[axis]
        if size == 1:
            continue
        own = [s[axis] for s in strides]
        if members and all(done[-1] == s * size for done, s in zip(steps, own, strict=True)):
            members[-1] *= size
            for done, s in zip(steps, own, strict=True):
                done[-1] = s
        else:
            members.append(size)
            for done, s in zip(steps, own, strict=True):
                done.append(s)
    return members, steps


def _tables(ranges: Ranges, kept: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(first row, last row, first span, last span) of each program of the grid, and the spans; kept on the device."""
    key = ("triton", kept, rows, device)
    found: tuple[Tensor, Tensor] | None = ranges.tasks.get(key)
    if found is None:
        own, ends, spans = ranges.triple(kept != I)
        blocks: list[list[int]] = []
        first = 0
        for (start, stop), last in zip(own.tolist(), ends.tolist(), strict=True):
            blocks += [[r, min(r + rows, stop), first, last] for r in range(start, stop, rows)]
            first = last
        table = torch.tensor(blocks, dtype=torch.int64).reshape(-1, 4)
        found = ranges.tasks[key] = (_on(table, device), _on(spans.contiguous(), device))
    return found


def _on(t: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, by way of pinned memory, which need not be waited for."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
