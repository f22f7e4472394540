"""The table of known reasons for NaN and Inf: operation, stage, what its inputs look like, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """Counts and range of the elements of a tensor (of magnitudes, if it is complex)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nans: int
    infs: int
    zeros: int
    low: float
    high: float

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Statistics:
        """Look at one tensor."""
        t = tensor.detach()
        size = t.abs() if t.is_complex() else t
        finite = size[size.isfinite()] if size.numel() else size
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (float("nan"),) * 2
        kind = str(t.dtype).removeprefix("torch.")
        nans, infs, zeros = int(t.isnan().sum()), int(t.isinf().sum()), int((t == 0).sum())
        return cls(name, tuple(t.shape), kind, nans, infs, zeros, low, high)

    @property
    def finite(self) -> bool:
        """Neither NaN nor Inf."""
        return not (self.nans or self.infs)

    def __str__(self) -> str:
        span = f"from {self.low:.4g} to {self.high:.4g}" if self.low == self.low else "nothing finite"
        counts = [f"{n} {what}" for n, what in ((self.nans, "NaN"), (self.infs, "Inf"), (self.zeros, "zero")) if n]
        shape = "x".join(map(str, self.shape)) or "0-d"
        return f"{self.name}: {shape} {self.dtype}, {span}" + (f", {', '.join(counts)}" if counts else "")


Inputs = Sequence[Statistics]
Condition = Callable[[Inputs], bool]


def _any(inputs: Inputs) -> bool:
    return True


def _zero(inputs: Inputs) -> bool:
    return any(s.zeros for s in inputs)


def _negative(inputs: Inputs) -> bool:
    return any(s.low < 0 for s in inputs)


def _infinite(inputs: Inputs) -> bool:
    return any(s.infs for s in inputs)


def _beyond_one(inputs: Inputs) -> bool:
    return any(max(abs(s.low), abs(s.high)) > 1 for s in inputs)


def _last_zero(inputs: Inputs) -> bool:
    return bool(inputs) and inputs[-1].zeros > 0


class Advice(NamedTuple):
    """One row: what is said of `operations` in a stage if the condition holds for their inputs."""

    stage: str
    operations: frozenset[str]
    holds: Condition
    text: str


def _row(stage: str, operations: str, holds: Condition, text: str) -> Advice:
    return Advice(stage, frozenset(operations.split()), holds, text)


_MASKED = (
    "torch.where sends a zero gradient into the branch that it does not take, and zero times infinity is NaN: "
    "replace the bad elements of the argument by a harmless number with another torch.where first"
)

_OUTSIDE = (
    "no operation of torch made it: it came with numbers from NumPy or Python, or was there in memory that was never "
    "written (torch.empty)"
)

TABLE = [
    _row("forward", "outside", _any, _OUTSIDE),
    _row("backward", "outside", _any, _OUTSIDE),
    _row("forward", "sqrt pow rsqrt", _negative,
         "the root of a negative number: clamp(min=0) what rounding made negative"),
    _row("forward", "log log2 log10 log1p", _negative,
         "the logarithm of a negative number: clamp(min=eps) the argument"),
    _row("forward", "log log2 log10", _zero,
         "the logarithm of 0 is -inf: add eps inside, or clamp(min=eps) the argument"),
    _row("forward", "xlogy", _any, "the logarithm of 0 or of a negative number: clamp(min=eps) its argument"),
    _row("forward", "div true_divide reciprocal", _last_zero,
         "a division by 0: add eps to the denominator, or mask it"),
    _row("forward", "rsqrt", _zero, "1 / sqrt(0) is inf: add eps inside of the root"),
    _row("forward", "exp exp2 expm1 sinh cosh", _any,
         "it overflows: subtract the maximum first, or use torch.logsumexp"),
    _row("forward", "acos asin atanh erfinv", _beyond_one,
         "its argument leaves [-1, 1]: clamp what rounding pushed out"),
    _row("forward", "acosh", _any, "its argument must be at least 1: clamp(min=1)"),
    _row("forward", "softmax log_softmax logsumexp scaled_dot_product_attention", _infinite,
         "a row that is -inf everywhere has no softmax: leave an entry of each row unmasked, or mask the result"),
    _row("forward", "sub add", _infinite, "inf - inf is NaN: find where the Inf comes from"),
    _row("forward", "div mul matmul mm bmm addmm", _infinite,
         "inf / inf and 0 * inf are NaN: find where the Inf comes from"),
    _row("forward", "std var std_mean var_mean", _any, "the spread of one element is 0 / 0: use correction=0"),
    _row("forward", "mean", _any, "the mean of no elements is 0 / 0, or the sum overflows"),
    _row("forward", "_to_copy to", _any, "the values do not fit the narrower type: scale them, or use bfloat16"),
    _row("forward", "sum mm matmul bmm addmm conv2d convolution mul square pow", _any,
         "the values overflow the type: scale them, or compute in a wider type"),
    _row("backward", "Sqrt", _zero, f"sqrt has an infinite derivative at 0: add eps inside. {_MASKED}"),
    _row("backward", "Sqrt Log Log2 Log10 Pow Rsqrt Acos Asin", lambda i: any(s.nans for s in i), _MASKED),
    _row("backward", "Sqrt", _any, f"the derivative of sqrt overflows near 0: add eps inside. {_MASKED}"),
    _row("backward", "LinalgVectorNorm Norm Dist CdistBackward", _any,
         "the norm is not differentiable at 0: add eps inside, sqrt(sum of squares + eps), or mask the zero vectors"),
    _row("backward", "Pow", _zero, f"x**p with p < 1 has an infinite derivative at 0: add eps to x. {_MASKED}"),
    _row("backward", "Log Log2 Log10", _zero,
         f"log has an infinite derivative at 0: clamp or add eps inside. {_MASKED}"),
    _row("backward", "Div Reciprocal", _zero, f"the derivative of a / b is infinite at b = 0: add eps to b. {_MASKED}"),
    _row("backward", "Acos Asin", _any, "its derivative is infinite at -1 and 1: clamp the argument inside of them"),
    _row("backward", "Atan2 Angle", _zero, "the angle of 0 has no derivative: add eps to one argument, or mask it"),
    _row("backward", "Std Var", _any, "the standard deviation of equal values is not differentiable: sqrt(var + eps)"),
    _row("backward", "LinalgEigh LinalgEig LinalgSvd", _any,
         "equal or zero eigenvalues or singular values have no derivative of vectors: use values only, or perturb"),
]  # fmt: skip


def advice(stage: str, operations: Sequence[str], inputs: Inputs) -> str:
    """The first row that fits, or nothing."""
    for row in TABLE:
        if row.stage == stage and row.operations.intersection(operations) and row.holds(inputs):
            return row.text
    return ""
