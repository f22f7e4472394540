"""run(program, args, batch, m, n) by Triton: programs on the tensors' GPU, on its current stream, without waiting.

Triton is imported when a program first runs here. It keeps its compiled code on disk itself (`TRITON_CACHE_DIR`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import linecache
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pullback.kernels.codegen import triton as codegen
from pullback.kernels.codegen.triton import Kernel
from pullback.kernels.ir.expr import PARAMETER, I
from pullback.kernels.ir.reductions import OVER_BOTH, REDUCTIONS, Program
from pullback.kernels.plan.ranges import Ranges

ELEMENTS = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float32", torch.bfloat16: "float32"}
POINTERS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}
_GRID = 65535  # programs along the second axis of a grid

_lock = threading.Lock()
_functions: dict[Kernel, Any] = {}


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(program: Program, dtype: torch.dtype) -> str:
    """The reason why `run` does not take the program; empty if it does."""
    if dtype not in ELEMENTS:
        return f"no code for {dtype}"
    return codegen.why_not(program) or ("" if _installed() else "Triton is not installed")


def function(kernel: Kernel) -> Any:
    """The kernel as a Triton function, made once."""
    with _lock:
        made = _functions.get(kernel)
        if made is None:
            made = _functions[kernel] = _function(kernel)
        return made


def _function(kernel: Kernel) -> Any:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    text = codegen.render(kernel)
    name = f"<pullback triton {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)  # Triton reads the source of functions
    space: dict[str, Any] = {"triton": triton, "tl": tl, "libdevice": libdevice, "__name__": __name__}
    exec(compile(text, name, "exec", dont_inherit=True), space)
    numbers = [k for k, t in codegen.arguments(kernel).items() if t != "*"]
    return triton.jit(do_not_specialize=numbers)(space["kernel"])


def compiled(kernel: Kernel, dtype: torch.dtype, target: Any) -> Any:
    """The kernel compiled for a `GPUTarget`, which need not be at hand, for arguments of `dtype`; Triton's object.

    Pointers are taken to be multiples of 16, as torch allocates them.
    """
    import triton
    from triton.compiler import ASTSource

    integer = REDUCTIONS[kernel.program.kind].integer
    out = POINTERS[torch.int64 if integer else dtype]
    types = {"out": f"*{out}", "blocks": "*i64", "spans": "*i64"}
    signature = {
        k: types.get(k, f"*{POINTERS[dtype]}") if t == "*" else t for k, t in codegen.arguments(kernel).items()
    }
    aligned = {(k,): [["tt.divisibility", 16]] for k, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(function(kernel), signature, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": kernel.tile[2]})


def run(
    program: Program, args: Sequence[Tensor], batch: tuple[int, ...], m: int, n: int, ranges: Ranges | None = None
) -> Tensor:
    """The reduction of `program`; the contract is that of `runtime.launch.run`, on the device of the tensors.

    Each result is computed by kernels of its own. A sum over both axes is one over j, then one over i by torch.
    """
    like = args[0]
    dtype = torch.int64 if REDUCTIONS[program.kind].integer else like.dtype
    parts = codegen.results(program)
    if len(parts) == 1 and program.axes[0] != OVER_BOTH:
        out = _empty(program, (*batch, n if program.axes[0] == 0 else m, program.widths[0]), like, dtype, ranges)
        _reduce(program, args, batch, m, n, ranges, out)
        return out
    found = []
    for p, axis, width in zip(parts, program.axes, program.widths, strict=True):
        rows = n if axis == 0 else m
        kept = torch.float64 if axis == OVER_BOTH else dtype
        out = _empty(p, (*batch, rows, width), like, kept, ranges)
        _reduce(p, args, batch, m, n, ranges, out)
        found.append(out.sum(-2).to(dtype) if axis == OVER_BOTH else out.reshape(*batch, rows * width))
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _empty(program: Program, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, ranges: Ranges | None) -> Tensor:
    """Memory for the result; rows that a pattern may not name hold what the reduction of nothing is."""
    out = like.new_empty(shape, dtype=dtype)
    if ranges is not None:
        integer = REDUCTIONS[program.kind].integer
        out.fill_(-1 if integer else {"Prod": 1.0, "LogSumExp": float("-inf")}.get(program.kind, 0.0))
        if program.kind == "SoftMax":
            out[..., 0] = -torch.inf
    return out


def _reduce(
    program: Program,
    args: Sequence[Tensor],
    batch: tuple[int, ...],
    m: int,
    n: int,
    ranges: Ranges | None,
    out: Tensor,
) -> None:
    """Launch the kernels of a program with one result."""
    if not out.numel():
        return
    dense = tuple(_is_dense(t, c) for t, (_, c) in zip(args, program.signature, strict=True))
    members, steps = _axes(batch, [_batch_strides(t, c, batch) for t, c in _events(args, program)] + [_lead(out)])
    device = torch.cuda.device(out.device) if out.device.type == "cuda" else contextlib.nullcontext()
    for k, piece in enumerate(codegen.pieces(program)):
        kernel = Kernel(program, k, ELEMENTS[args[0].dtype], dense, len(members), ranges is not None)
        rows, _, warps = kernel.tile
        n_rows, n_cols = (m, n) if kernel.rows == I else (n, m)
        values: list[Any] = [out, *args]
        n_blocks = -(-n_rows // rows)
        if ranges is not None:
            blocks, spans = _tables(ranges, kernel.rows, rows, out.device)
            values += [blocks, spans]
            n_blocks = blocks.shape[0]
        values += [n_rows, n_cols, n_blocks, *members, out.stride(-2), *steps[-1]]
        for t, full, own in zip(args, dense, steps, strict=False):
            values += [] if full else [t.stride(-2) if t.ndim > 1 else 0, t.stride(-1)]
            values += own
        total = n_blocks
        for size in members:
            total *= size
        if total:
            with device:
                function(kernel)[(total, -(-piece.size // piece.width), 1)](*values, num_warps=warps)


def _events(args: Sequence[Tensor], program: Program) -> list[tuple[Tensor, int]]:
    return [(t, category) for t, (_, category) in zip(args, program.signature, strict=True)]


def _is_dense(t: Tensor, category: int) -> bool:
    inner = 1 if category == PARAMETER else 2
    steps = [s for s, k in zip(t.stride()[-inner:], t.shape[-inner:], strict=True) if k != 1]
    want, total = [], 1
    for k in reversed(t.shape[-inner:]):
        want.append(total)
        total *= k
    return steps == [s for s, k in zip(reversed(want), t.shape[-inner:], strict=True) if k != 1]


def _batch_strides(t: Tensor, category: int, batch: tuple[int, ...]) -> list[int]:
    lead = t.ndim - (1 if category == PARAMETER else 2)
    own = [s if k > 1 else 0 for s, k in zip(t.stride()[:lead], t.shape[:lead], strict=True)]
    return [0] * (len(batch) - lead) + own


def _lead(out: Tensor) -> list[int]:
    return list(out.stride()[:-2])


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
    found = ranges.tasks.get(key)
    if found is None:
        own, ends, spans = ranges.triple(kept != I)
        blocks: list[list[int]] = []
        first = 0
        for (start, stop), last in zip(own.tolist(), ends.tolist(), strict=True):
            blocks += [[r, min(r + rows, stop), first, last] for r in range(start, stop, rows)]
            first = last
        table = torch.tensor(blocks, dtype=torch.int64).reshape(-1, 4)
        found = ranges.tasks[key] = (table.to(device), spans.contiguous().to(device))
    return found
