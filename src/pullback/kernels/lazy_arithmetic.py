"""The signs of a LazyTensor: + - * / ** | & ~ and comparisons, with numbers, tensors and arrays on either side."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from pullback.core.errors import ArgumentError
from pullback.core.operator import Operator, OperatorLike
from pullback.kernels.lazy_base import LazyBase, classes, combine
from pullback.kernels.lazy_data import is_complex
from pullback.kernels.lazy_methods import LazyMethods


class LazyArithmetic(LazyMethods, OperatorLike):
    """Python's operators. Comparisons give LazyTensors of 0 and 1."""

    __slots__ = ()
    __hash__ = object.__hash__
    __array_ufunc__ = None  # arrays on the left leave the operation to us

    def _operate(self, name: str, a: Any, b: Any) -> Any:
        if isinstance(a, Operator) or isinstance(b, Operator):
            return NotImplemented
        if self._complex or is_complex(a) or is_complex(b):
            return classes[True].arithmetic(name, a, b)
        if isinstance(a, str) or isinstance(b, str) or a is None or b is None:
            return NotImplemented
        return combine(name, (a, b))

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            return self.operator() + other
        return self._operate("Add", self, other)

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            return other + self.operator()
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        return self._operate("Add", other, self)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            return self.operator() - other
        return self._operate("Subtract", self, other)

    def __rsub__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            return other - self.operator()
        return self._operate("Subtract", other, self)

    def __mul__(self, other: Any) -> Any:
        return self._operate("Mult", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._operate("Mult", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._operate("Divide", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 1:
            return self.reciprocal()
        return self._operate("Divide", other, self)

    def __pow__(self, other: Any) -> Any:
        return self.power(other)

    def __rpow__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 2:
            return self.exp2()
        return combine("Powf", (other, self))

    def __mod__(self, other: Any) -> Any:
        return self.mod(other)

    def __neg__(self) -> Any:
        return self.neg()

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self.abs()

    def __or__(self, other: Any) -> Any:
        """The scalar product (x | y), as in KeOps; for masks see `logical_or`."""
        return combine("Scalprod", (self, other))

    def __ror__(self, other: Any) -> Any:
        return combine("Scalprod", (other, self))

    def __and__(self, other: Any) -> Any:
        return combine("LogicalAnd", (self, other))

    def __rand__(self, other: Any) -> Any:
        return combine("LogicalAnd", (other, self))

    def __invert__(self) -> Any:
        return self.logical_not()

    def __eq__(self, other: Any) -> Any:
        return self._operate("Equal", self, other)

    def __ne__(self, other: Any) -> Any:
        return self._operate("NotEqual", self, other)

    def __lt__(self, other: Any) -> Any:
        return self._operate("LessThan", self, other)

    def __le__(self, other: Any) -> Any:
        return self._operate("LessOrEqual", self, other)

    def __gt__(self, other: Any) -> Any:
        return self._operate("LessThan", other, self)

    def __ge__(self, other: Any) -> Any:
        return self._operate("LessOrEqual", other, self)

    addop, subop, mulop, divop = __add__, __sub__, __mul__, __truediv__  # KeOps' names

    def __bool__(self) -> bool:
        raise ArgumentError(
            "a LazyTensor has no truth value: it stands for many numbers; combine masks with & and ~, or reduce with "
            ".any(dim) or .all(dim)"
        )

    def __len__(self) -> int:
        return self.shape[0]  # type: ignore[attr-defined,no-any-return]

    def __iter__(self) -> Any:
        raise ArgumentError("a LazyTensor cannot be iterated over; take parts as K[i0:i1]")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.exp(K) and the like call the method; an operator with a tensor on the left calls the reflected one."""
        for function, method_name in _SWAPPED:  # how torch.compile writes K - t
            if func is function and len(args) == 2:
                return getattr(args[1], method_name)(args[0])
        name = _FUNCTIONS.get(func)
        if name is None or not args:
            return NotImplemented
        if isinstance(args[0], LazyBase):
            method = getattr(args[0], f"__{name}__", None) or getattr(args[0], name, None)
            return method(*args[1:], **(kwargs or {})) if callable(method) else NotImplemented
        reflected = _REFLECTED.get(name)
        if reflected is None or len(args) != 2 or kwargs:
            return NotImplemented
        return reflected(args[0], args[1])


_REFLECTED: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: b.__radd__(a),
    "sub": lambda a, b: b.__rsub__(a),
    "mul": lambda a, b: b.__rmul__(a),
    "truediv": lambda a, b: b.__rtruediv__(a),
    "pow": lambda a, b: b.__rpow__(a),
    # torch.compile does not tell K @ b from b @ K, which is an error outside of it
    "matmul": lambda a, b: b.__matmul__(a) if torch.compiler.is_compiling() else b.__rmatmul__(a),
    "eq": lambda a, b: operator.eq(b, a),
    "ne": lambda a, b: operator.ne(b, a),
    "lt": lambda a, b: operator.gt(b, a),
    "le": lambda a, b: operator.ge(b, a),
    "gt": lambda a, b: operator.lt(b, a),
    "ge": lambda a, b: operator.le(b, a),
    "maximum": lambda a, b: b.maximum(a),
    "minimum": lambda a, b: b.minimum(a),
}

_ALIASES = {"div": "truediv", "true_divide": "truediv", "divide": "truediv", "multiply": "mul", "subtract": "sub"}
_REDUCTIONS = {"sum", "mean", "var", "prod", "logsumexp", "any", "all", "min", "max", "argmin", "argmax"}
_METHODS = {n for n in dir(LazyMethods) if not n.startswith("_")} | _REDUCTIONS
# torch function -> its name here. (A table by function, since torch.compile cannot read the name of a function.)
_FUNCTIONS: dict[Any, str] = {
    getattr(place, text): _ALIASES.get(name, name)
    for name in sorted({*_METHODS, *_REFLECTED, *_ALIASES, "rsub"})
    for text in (name, f"__{name}__")
    for place in (torch, torch.Tensor)
    if callable(getattr(place, text, None))
}
_SWAPPED = (
    (torch.Tensor.__rsub__, "__sub__"),
    (torch.Tensor.__rdiv__, "__truediv__"),
    (torch.Tensor.__rtruediv__, "__truediv__"),
    (torch.Tensor.__rpow__, "__pow__"),
    (torch.Tensor.__rmod__, "__mod__"),
)
