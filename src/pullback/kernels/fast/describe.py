"""A sum within a tolerance for people: what the formula is, what each way of summing would cost, what was done."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import pullback.kernels.fast.choose as choosing
from pullback.kernels.fast.analyse import Form, Refused, analyse, split
from pullback.kernels.fast.balance import estimate
from pullback.kernels.fast.run import sums, watch
from pullback.kernels.fast.softmax import SHIFTED, shifted
from pullback.kernels.fast.sum import Exact, FastSum
from pullback.kernels.ir.reductions import Program


def describe(
    program: Program, tensors: Sequence[Tensor] | None, m: int, n: int, tolerance: float, exact: Exact
) -> list[tuple[str, str]]:
    """(label, text) of each step.

    Args:
        program: what is summed.
        tensors: its arguments without batch axes, which are summed to tell method and error; None: m x n evenly spread
            points, of which no Fourier series can be known.
        m, n: numbers of rows and columns.
        tolerance: relative l2 error.
        exact: the exact engine, as for `sums`.

    Cost: that of the fast sum, if it is one.
    """
    lines = [("tolerance", f"{tolerance:g}, relative to the l2 norm of each result")]
    try:
        form = split(program)[0] if program.kind in SHIFTED else analyse(program)
    except Refused as refused:
        return [*lines, ("method", f"exact: {refused}")]
    lines += _form(form, program.kind in SHIFTED)
    if tensors is None:
        costs = _costs(program, form, m, n, tolerance)
        return [*lines, ("estimates", costs), ("method", "depends on the points: give the arguments, or a LazyTensor")]
    try:
        if m and n and tensors[0].device.type == "cpu":
            lines.append(("estimates", _costs_of(program, tensors, m, n, tolerance)))
    except Refused as refused:
        return [*lines, ("method", f"exact: {refused}")]
    with watch() as done:
        sums(program, tensors, (), m, n, tolerance, exact)
    for info in done:
        checked = (
            "" if info.method == "exact" else f"; error {info.error:.1e} on {info.rows} rows; {info.seconds:.2g} s"
        )
        lines.append(("method", f"{info.method}: {info.detail}{checked}"))
    return lines


def _form(form: Form, is_shifted: bool) -> list[tuple[str, str]]:
    terms = [t for parts in form.components for terms in parts for t in terms]
    kernels = list(dict.fromkeys(t.k for t in terms if t.k is not None))
    first = form.program.n  # the variables from here on are the coordinates
    what = "an exponent K + a_i + b_j" if is_shifted else "a sum of a_i K b_j"
    lines = [("form", f"{what}, K a function of {len(form.coordinates)} differences")]
    lines += [("difference", f"Var({first + d},1,0) = {u} - {v}") for d, (u, v) in enumerate(form.coordinates)]
    return [*lines, *(("kernel", f"K = {k}") for k in kernels)]


def _costs_of(program: Program, tensors: Sequence[Tensor], m: int, n: int, tolerance: float) -> str:
    """What each way would cost for these points."""
    total, arguments = program, list(tensors)
    if program.kind in SHIFTED:
        total, arguments, _ = shifted(program, tensors, m, n, tolerance)
    one = FastSum(analyse(total), arguments, m, n, tolerance)
    series = choosing.Fourier(one)
    text = "no Fourier series: K is too sharp for these points"
    if series.fits():
        text = f"Fourier series {series.seconds():.2g} s"
    return f"{_costs(total, one.form, m, n, tolerance, one.n_channels)}, {text}"


def _costs(program: Program, form: Form, m: int, n: int, tolerance: float, width: int = 1) -> str:
    """What the exact sum and a tree would cost."""
    speed = choosing.rate(program)
    _, tree = estimate(m, n, len(form.coordinates), tolerance, speed, max(1, width))
    return f"exact {m * n / speed * len(program.exprs):.2g} s, tree {tree:.2g} s"
