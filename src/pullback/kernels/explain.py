"""explain(f): what the engine makes of a reduction, from the formula to the assembly of its inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.kernels.fast.describe import describe
from pullback.kernels.genred import Genred
from pullback.kernels.ir.expr import CATEGORY
from pullback.kernels.ir.reductions import Program
from pullback.kernels.lazy_reductions import LazyReduction
from pullback.kernels.lazy_tensor import LazyTensor
from pullback.kernels.reduce import TOLERANT, Reducer
from pullback.kernels.runtime import gpu, launch
from pullback.kernels.task import event_rank, exactly, sizes, task, tolerance_of, within

CPU = torch.device("cpu")


def explain(
    f: Any,
    *args: Tensor,
    dtype: torch.dtype | None = None,
    m: int | None = None,
    n: int | None = None,
    tolerance: float | None = None,
    text: bool = True,
) -> str:
    """The steps from the formula to machine code, as text.

    Args:
        f: a `Genred`, a `LazyReduction` (from `call=False` or open arguments), or a `LazyTensor`, whose sum over j is
            explained.
        args: what `f` would be called with; a LazyTensor brings its own data. With a tolerance the sum is done, so that
            the method, its error and its time are told.
        dtype: element type that the plan is made for; that of the data, or float32.
        m, n: numbers of rows and columns that the plan is made for; those of the data, or 1000.
        tolerance: in place of that of `f`.
        text: print it as well.

    Returns: the formula, the expression after rewriting, within a tolerance the method and what each would cost, the
    plan, the count of floating point operations a pair, the LLVM text and the assembly of the inner loop (or why there
    is none), and the back end on a GPU.

    Raises: ArgumentError if `f` is not a reduction; what `f` itself raises for arguments that do not fit.
    """
    if isinstance(f, LazyTensor):
        f = f.sum(f.nbatchdims + 1, call=False)
    reducer = f.reducer if isinstance(f, (Genred, LazyReduction)) else f
    if not isinstance(reducer, Reducer):
        raise ArgumentError(f"explain expects a Genred, a LazyTensor or a LazyReduction; got {type(f).__name__}")
    tolerance = tolerance_of(within(tolerance)) if tolerance is not None else _tolerance(f)
    data = _data(f, args)
    if data is not None:
        data = reducer.checked(data)
        _, m, n = sizes(reducer.signature, data)
        dtype = data[0].dtype
    m, n, dtype = 1000 if m is None else m, 1000 if n is None else n, dtype or torch.float32

    lines = [_line("formula", reducer.formula), _line("reduction", f"{reducer.kind} over {'ij'[reducer.axis]}")]
    for p, (name, (dim, category)) in enumerate(zip(reducer.names, reducer.signature, strict=True)):
        lines.append(_line(f"argument {p}", f"{name} = {CATEGORY[category]}({dim})"))
    lines.append(_line("expression", str(reducer.expr)))
    for number, program in enumerate(reducer.programs):
        lines.append(_line("rewritten", f"program {number}: {program}"))
        if tolerance is not None and reducer.kind in TOLERANT:
            lines += _within(program, data, m, n, tolerance)
        if task(program).uses_llvm(CPU, dtype):
            lines.append(launch.describe(program, dtype, m, n))
        else:
            lines.append(_line("back end", f"eager torch, tile by tile: {launch.why_not(program, dtype)}"))
        reason = gpu.why_not(program, dtype)
        lines.append(_line("on a GPU", f"eager torch, tile by tile: {reason}" if reason else "Triton"))
    report = "\n".join(lines)
    if text:
        print(report)
    return report


def _line(label: str, text: str) -> str:
    return f"{label:<11} {text}"


def _tolerance(f: Any) -> float | None:
    if isinstance(f, LazyReduction) and f.tolerance is None:
        return tolerance_of(f._lazy.backend or "auto")
    return f.tolerance if isinstance(f, (Genred, LazyReduction)) else None


def _data(f: Any, args: Sequence[Tensor]) -> list[Tensor] | None:
    """The arguments as a reduction gets them; None if they are not all there."""
    if isinstance(f, LazyReduction):
        return list(f._domain.args(args)) if args or not f._domain.symbolic else None
    return list(args) or None


def _within(program: Program, data: list[Tensor] | None, m: int, n: int, tolerance: float) -> list[str]:
    lines = []
    tensors = data if data is not None and len(data) == program.n else None  # later passes take results of earlier ones
    if tensors is not None:
        own = [t.ndim - event_rank(category) for t, (_, category) in zip(tensors, program.signature, strict=True)]
        if any(own):
            lines.append(_line("batch", "the first member is told of"))
        tensors = [t.detach()[(0,) * k] for t, k in zip(tensors, own, strict=True)]
    return [*lines, *(_line(*pair) for pair in describe(program, tensors, m, n, tolerance, exactly))]
