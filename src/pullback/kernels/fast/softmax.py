"""log sum_j exp(F_ij) and softmax means from shifted sums, where no term that matters is lost.

F_ij = a_i + k(u_i - v_j) + b_j. The sum of exp(k - max k) exp(b_j - max b) has an absolute error of about the tolerance
times its mean; its logarithm is right where the sum is well above that. Otherwise the exact engine runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pullback.kernels.fast.analyse import Refused, split
from pullback.kernels.fast.sum import FastSum, Result
from pullback.kernels.ir.expr import PARAMETER, I, J, builders, variable
from pullback.kernels.ir.reductions import OVER_J, Program

SHIFTED = ("LogSumExp", "SoftMax")


class Lost(Refused):
    """Terms that matter are below the error of the sum; a more accurate one may keep them."""


_MARGIN = 100.0  # a sum must be this many tolerances of the mean above zero


def shifted(
    program: Program, tensors: Sequence[Tensor], m: int, n: int, tolerance: float
) -> tuple[Program, list[Tensor], Callable[[Tensor], Result]]:
    """The sum behind a logarithm or a softmax: program, arguments, and what makes the result of it.

    Raises: Refused if F is not of the form above; the last of the three raises Lost.
    """
    form, a, b = split(program)
    (axis,) = program.axes
    probe = FastSum(form, tensors, m, n, tolerance)
    kept, summed = (I, J) if axis == OVER_J else (J, I)
    own, other = (a, b) if axis == OVER_J else (b, a)
    row = torch.zeros(m if kept == I else n, 1, dtype=torch.float64) if own is None else probe.side([own], kept)
    column = (
        torch.zeros(n if kept == I else m, 1, dtype=torch.float64) if other is None else probe.side([other], summed)
    )
    if not bool(torch.isfinite(row).all() and torch.isfinite(column).all()):
        raise Refused("a term of i or of j is not finite")
    top, peak = column.max(), probe.largest_kernel()
    if not bool(torch.isfinite(peak)):
        raise Refused("the exponent is not bounded")
    one = program.n
    f, *weight = program.exprs
    less = variable(one, 1, kept) + variable(one + 1, 1, summed) + variable(one + 2, 1, PARAMETER)
    term = builders["Exp"](f - less)
    exprs = term if not weight else builders["Concat"](term, term * weight[0])
    signature = (*program.signature, (1, kept), (1, summed), (1, PARAMETER))
    arguments = [*tensors, row, torch.full_like(column, float(top)), peak.reshape(1)]
    total = Program("Sum", (exprs,), (axis,), signature, 1, program.accumulator, program.scheme)

    def finish(sums: Tensor) -> Result:
        mass = sums[:, :1]
        if bool((mass <= _MARGIN * tolerance * mass.mean()).any()):
            raise Lost("some sums of exponentials are too small to keep a relative error")
        if program.kind == "SoftMax":
            y = torch.cat([mass.log() + row + top + peak, sums[:, 1:] / mass], -1)
        else:
            y = (sums[:, 1:] if weight else mass).log() + row + top + peak
        return y, y

    return total, arguments, finish
