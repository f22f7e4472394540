"""explain(f): what the engine makes of a reduction, from the formula to the assembly of its inner loop."""

from __future__ import annotations

from typing import Any

import torch

from pullback.core.errors import ArgumentError
from pullback.kernels.genred import Genred
from pullback.kernels.ir.expr import CATEGORY
from pullback.kernels.lazy_reductions import LazyReduction
from pullback.kernels.lazy_tensor import LazyTensor
from pullback.kernels.reduce import Reducer
from pullback.kernels.runtime import launch
from pullback.kernels.task import task


def explain(f: Any, *, dtype: torch.dtype = torch.float32, m: int = 1000, n: int = 1000, text: bool = True) -> str:
    """The steps from the formula to machine code, as text.

    Args:
        f: a `Genred`, a `LazyReduction` (from `call=False` or open arguments), or a `LazyTensor`, whose sum over j is
            explained.
        dtype: element type that the plan is made for.
        m, n: numbers of rows and columns that the plan is made for.
        text: print it as well.

    Returns: the formula, the expression after rewriting, the plan, the count of floating point operations a pair, the
    LLVM text and the assembly of the inner loop (or why there is none).

    Raises: ArgumentError if `f` is not a reduction.
    """
    if isinstance(f, LazyTensor):
        f = f.sum(f.nbatchdims + 1, call=False)
    reducer = f.reducer if isinstance(f, (Genred, LazyReduction)) else f
    if not isinstance(reducer, Reducer):
        raise ArgumentError(f"explain expects a Genred, a LazyTensor or a LazyReduction; got {type(f).__name__}")
    lines = [f"formula     {reducer.formula}", f"reduction   {reducer.kind} over {'ij'[reducer.axis]}"]
    for p, (name, (dim, category)) in enumerate(zip(reducer.names, reducer.signature, strict=True)):
        lines.append(f"argument {p}  {name} = {CATEGORY[category]}({dim})")
    lines.append(f"expression  {reducer.expr}")
    for number, program in enumerate(reducer.programs):
        lines.append(f"rewritten   program {number}: {program}")
        found = task(program)
        if found.uses_llvm(torch.device("cpu"), dtype):
            lines.append(launch.describe(program, dtype, m, n))
        else:
            lines.append(f"back end    eager torch, tile by tile: {launch.why_not(program, dtype)}")
    report = "\n".join(lines)
    if text:
        print(report)
    return report
