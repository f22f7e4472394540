"""The names that a formula may call, and the decorator that adds one written in other operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pullback.core.errors import ArgumentError, ShapeError
from pullback.kernels.ir.expr import Expr, builders
from pullback.kernels.ir.primitives import PRIMITIVES, operand
from pullback.kernels.ir.structure import STRUCTURES

FUNCTIONS: dict[str, Callable[..., Any]] = {name: builders[name] for name in (*PRIMITIVES, *STRUCTURES)}


def function(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function: operands (annotated Expr) are converted, and the number of arguments is checked."""
    name = definition.__name__
    parameters = inspect.signature(definition).parameters.values()
    convert = [p.annotation in ("Expr", "Expr | None") for p in parameters]
    low = sum(p.default is p.empty for p in parameters)

    def build(*args: Any) -> Any:
        if not low <= len(args) <= len(convert):
            count = str(low) if low == len(convert) else f"{low} to {len(convert)}"
            names = ", ".join(p.name for p in parameters)
            raise ArgumentError(f"{name}({names}) expects {count} argument{'s' * (count != '1')}; got {len(args)}")
        return definition(*(operand(a) if c and a is not None else a for a, c in zip(args, convert, strict=False)))

    build.__doc__ = definition.__doc__
    FUNCTIONS[name] = builders[name] = build
    return build


def check_scalar(name: str, argument: str, e: Expr) -> None:
    """Raise ShapeError unless `e` has one component."""
    if e.dim != 1:
        raise ShapeError(f"{name} expects a scalar {argument}; got dimension {e.dim}")


def number(name: str, value: Any) -> float:
    """A parameter that must be a number; constants of the formula language count."""
    if isinstance(value, Expr) and value.op == "Const" and value.dim == 1:
        value = value.params[0]
    if not isinstance(value, (int, float)):
        raise ArgumentError(f"{name} expects numbers; got {type(value).__name__}")
    return float(value)
