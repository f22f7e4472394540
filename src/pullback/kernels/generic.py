"""generic_sum and its sisters: Genred where the declaration of the result says what is kept."""

from __future__ import annotations

from typing import Any

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.formula import declare
from pullback.kernels.genred import Genred
from pullback.kernels.ir.expr import I, J


def _generic(reduction_op: str, formula: str, output: str, aliases: tuple[str, ...], options: dict[str, Any]) -> Genred:
    ((_, result),) = declare([output])
    category = result.params[1]
    if category not in (I, J):
        raise ArgumentError(f"the result must be Vi (reduce over j) or Vj (reduce over i); got {output!r}")
    if reduction_op == "ArgKMin":
        options["opt_arg"] = result.dim
    genred = Genred(formula, aliases, reduction_op, axis=1 if category == I else 0, **options)
    if reduction_op != "ArgKMin" and result.dim != genred.expr.dim:
        raise ShapeError(f"the formula {formula!r} has dimension {genred.expr.dim}, its result is declared {output!r}")
    return genred


def generic_sum(formula: str, output: str, *aliases: str, **options: Any) -> Genred:
    """Sum over j of F_ij for output "a = Vi(D)", over i for "a = Vj(D)"; D is the dimension of F.

    Args:
        formula: the formula F.
        output: declaration of the result; its name is not used.
        aliases: declarations of the arguments, see Genred.
        options: further arguments of Genred.
    """
    return _generic("Sum", formula, output, aliases, options)


def generic_logsumexp(formula: str, output: str, *aliases: str, **options: Any) -> Genred:
    """Log-sum-exp over j of F_ij for output "a = Vi(1)", over i for "a = Vj(1)"; arguments of `generic_sum`."""
    return _generic("LogSumExp", formula, output, aliases, options)


def generic_argmin(formula: str, output: str, *aliases: str, **options: Any) -> Genred:
    """The index j of the smallest F_ij for output "a = Vi(D)", i for "a = Vj(D)"; arguments of `generic_sum`."""
    return _generic("ArgMin", formula, output, aliases, options)


def generic_argkmin(formula: str, output: str, *aliases: str, **options: Any) -> Genred:
    """The K indices j of the smallest F_ij for output "a = Vi(K)", of i for "a = Vj(K)"; arguments of `generic_sum`."""
    return _generic("ArgKMin", formula, output, aliases, options)
