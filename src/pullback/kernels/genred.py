"""Genred: a formula as text and a reduction, with the names and arguments that KeOps' users know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pullback.kernels.formula as language
from pullback.core.errors import ArgumentError
from pullback.kernels.ir.expr import CATEGORY
from pullback.kernels.ir.reductions import OVER_J
from pullback.kernels.reduce import KINDS, Reducer
from pullback.kernels.task import within

# KeOps' name, or a spelling of its documentation -> (name here, needs formula2)
_SPELLINGS = {
    "LogSumExpWeight": ("LogSumExp", True),
    "SumSoftMaxWeight": ("SumSoftMax", True),
    "SoftMax": ("SumSoftMax", True),
    "SumSoftMax": ("SumSoftMax", True),
    "MinArgMin": ("Min_ArgMin", False),
    "MaxArgMax": ("Max_ArgMax", False),
    "KMinArgKMin": ("KMin_ArgKMin", False),
    "KMaxArgKMax": ("KMax_ArgKMax", False),
}
_WEIGHTED = ("LogSumExp", "SumSoftMax")
_SUMS = ("Sum", "LogSumExp", "SumSoftMax", "Mean", "Var", "Count", "Any", "All")


class Genred:
    """y_i = reduction over j of F(x_i, y_j, p) (axis=1), or y_j = reduction over i (axis=0); never stores the pairs.

    >>> import torch, pullback as pb
    >>> f = pb.Genred("Exp(-SqDist(x, y)) * b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(1)"], axis=1)
    >>> f(torch.zeros(4, 3), torch.zeros(5, 3), torch.ones(5, 1)).squeeze(-1)
    tensor([5., 5., 5., 5.])

    Args:
        formula: the formula F, see `kernels/formula.py` for the operators and `kernels/ir/macros.py` for the functions.
        aliases: one declaration for each argument: "x = Vi(D)" (rows i), "y = Vj(D)" (columns j), "p = Pm(D)" (the same
            for all pairs); "x = Vi(position, D)" names the argument's place. Var(position, D, category) in the formula
            declares itself.
        reduction_op: Sum, LogSumExp, SumSoftMax, Min, Max, ArgMin, ArgMax, Min_ArgMin, Max_ArgMax, KMin, KMax, ArgKMin,
            ArgKMax, KMin_ArgKMin, KMax_ArgKMax, Prod, Mean, Var, Any, All, Count, and KeOps' LogSumExpWeight,
            SumSoftMaxWeight and SoftMax.
        axis: what is reduced: 1 the columns j, 0 the rows i (the default, as in KeOps).
        opt_arg: the K of the K-reductions; the correction of Var (1 if left out).
        formula2: the weight of LogSumExp and SumSoftMax.
        dtype_acc: "auto", "float32" or "float64": dtype in which sums are accumulated ("float16" means "auto": sums are
            never kept in half precision).
        use_double_acc: the same as dtype_acc="float64".
        sum_scheme: "auto", "direct_sum", "block_sum" or "kahan_scheme".
        dtype, cuda_type, enable_chunks, rec_multVar_highdim, use_fast_math: accepted from KeOps' programs and ignored.
        tolerance: relative l2 error that sums may have. Functions of x - y in up to three dimensions then cost M + N
            instead of M N; see `pullback.kernels.fast`. None: exact.

    Raises: ArgumentError or ShapeError that shows the place in the formula.
    """

    def __init__(
        self,
        formula: str,
        aliases: Sequence[str],
        reduction_op: str = "Sum",
        axis: int = 0,
        dtype: Any = None,
        opt_arg: int | None = None,
        formula2: str | None = None,
        cuda_type: Any = None,
        dtype_acc: str = "auto",
        use_double_acc: bool = False,
        sum_scheme: str = "auto",
        enable_chunks: bool = True,
        rec_multVar_highdim: Any = False,
        use_fast_math: bool = True,
        tolerance: float | None = None,
    ) -> None:
        within(tolerance)  # checks it
        self.tolerance = tolerance
        self.formula, self.formula2, self.aliases = formula, formula2, tuple(aliases)
        self.reduction_op, self.axis = reduction_op, axis
        declared = language.declare(aliases)
        self._arguments: tuple[Any, ...] = (formula, tuple(aliases), reduction_op, axis, None, opt_arg, formula2, None)
        self._arguments += (dtype_acc, use_double_acc, sum_scheme)
        names = {name: v for name, v in declared if name}
        kind, weighted = _SPELLINGS.get(reduction_op, (reduction_op, False))
        if kind not in KINDS:
            hint = language.similar(reduction_op, dict.fromkeys((*KINDS, *_SPELLINGS)))
            raise ArgumentError(f"unknown reduction_op {reduction_op!r}; {hint or 'known are ' + ', '.join(KINDS)}")
        if weighted and formula2 is None:
            raise ArgumentError(f"reduction_op={reduction_op!r} needs a weight; give it as formula2")
        if formula2 is not None and kind not in _WEIGHTED:
            raise ArgumentError(f"formula2 is the weight of {' and '.join(_WEIGHTED)}; {reduction_op} has none")
        if dtype_acc != "auto" and use_double_acc:
            raise ArgumentError(f"give dtype_acc or use_double_acc, not both; got dtype_acc={dtype_acc!r}")
        if kind not in _SUMS and (dtype_acc != "auto" or use_double_acc or sum_scheme not in ("auto", "direct_sum")):
            raise ArgumentError(f"{reduction_op} adds nothing; leave dtype_acc, use_double_acc and sum_scheme out")
        keeps = "K" in kind
        if keeps and opt_arg is None:
            raise ArgumentError(f"reduction_op={reduction_op!r} needs the number K; give it as opt_arg")
        if opt_arg is not None and not keeps and kind != "Var":
            raise ArgumentError(f"opt_arg is K of K-reductions or the correction of Var; {reduction_op} has none")
        expr = language.parse(formula, names)
        weight = None if formula2 is None else language.parse(formula2, names)
        names_, signature = language.signature(declared, expr, *([] if weight is None else [weight]))
        self._reduce = Reducer(
            kind,
            expr,
            signature,
            axis,
            weight=weight,
            k=opt_arg if keeps and opt_arg is not None else 1,
            correction=1 if opt_arg is None or keeps else opt_arg,
            accumulator="float64" if use_double_acc else dtype_acc,
            scheme=sum_scheme,
            names=names_,
            formula=formula,
        )

    def __call__(
        self,
        *args: Any,
        backend: str = "auto",
        device_id: int = -1,
        ranges: Any = None,
        out: Any = None,
        tolerance: float | None = None,
    ) -> Any:
        """The reduction of these arguments: tensors give tensors, NumPy arrays give arrays.

        Args:
            args: (..., M, D) for Vi, (..., N, D) for Vj, (..., D) for Pm, in the order of the aliases; leading axes are
                batch axes and broadcast.
            backend: "auto"; "llvm" (CPU), "triton" (GPU) or "eager" (tiles in torch, anywhere) insist; or KeOps' names
                ("CPU", "GPU", ...).
            device_id: accepted and ignored: the work is done where the tensors lie.
            ranges: block-sparse pattern as in KeOps, see `pullback.kernels.cluster`.
            out: tensor that receives the result.
            tolerance: in place of the one given at construction.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        return self._reduce(args, ranges=ranges, backend=backend, out=out, tolerance=tolerance)

    @property
    def reducer(self) -> Reducer:
        """What runs: the checked inputs and the programs."""
        return self._reduce

    @property
    def expr(self) -> Any:
        """The formula as an Expr."""
        return self._reduce.expr

    def __reduce__(self) -> Any:
        return _rebuild, (self._arguments, {"tolerance": self.tolerance})

    def __repr__(self) -> str:
        over, kept = ("j", "M") if self.axis == OVER_J else ("i", "N")
        weight = f", weight {self.formula2!r}" if self.formula2 is not None else ""
        lines = [f"Genred: {self.reduction_op} over {over} of {self.formula!r}{weight}, of dimension {self.expr.dim}"]
        for name, (dim, category) in zip(self._reduce.names, self._reduce.signature, strict=True):
            shape = ("(..., M, {})", "(..., N, {})", "(..., {})")[category].format(dim)
            lines.append(f"  {name}: {CATEGORY[category]}, {shape}")
        return "\n".join([*lines, f"  one result for each of the {kept} {'ij'[self.axis != OVER_J]}"])


def _rebuild(arguments: tuple[Any, ...], options: dict[str, Any]) -> Genred:
    return Genred(*arguments, **options)
