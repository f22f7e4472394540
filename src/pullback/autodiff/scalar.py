"""Scalar: a number that remembers how it was computed, for teaching and for explaining derivatives.

The tape is the objects themselves: a Scalar holds its arguments, nothing is global, and what is dropped is freed.
Derivatives come from one sweep over the graph, so their cost grows with the number of operations and not with the
number of paths. Nothing recurses: chains of 100,000 operations work.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.autodiff.scalar_functions import FUNCTIONS, Function
from pullback.autodiff.scalar_graph import Recorded, topological
from pullback.core.errors import ArgumentError, NotDifferentiableError

_NUMPY_NAMES = {
    "multiply": "*", "true_divide": "/", "divide": "/", "subtract": "-", "negative": "neg", "power": "**",
    "remainder": "%", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctan2": "atan2", "arcsinh": "asinh",
    "arccosh": "acosh", "arctanh": "atanh", "absolute": "abs", "add": "+", "sub": "-", "mul": "*", "div": "/",
    "pow": "**", "__rpow__": "**", "__rsub__": "-", "__rdiv__": "/",
}  # fmt: skip


def _operators(name: str) -> tuple[Callable[[Any, Any], Scalar], Callable[[Any, Any], Scalar]]:
    """Python's operator for a row of the table, and its reflection."""
    row = FUNCTIONS[name]

    def forward(self: Any, other: Any) -> Any:
        return Scalar._record(row, (self, other)) if _known(other) else NotImplemented

    def backward(self: Any, other: Any) -> Any:
        return Scalar._record(row, (other, self)) if _known(other) else NotImplemented

    return forward, backward


def _methods(*names: str) -> list[Callable[..., Scalar]]:
    return [_method(FUNCTIONS[name]) for name in names]


def _method(row: Function) -> Callable[..., Scalar]:
    def method(self: Any, *others: Any) -> Scalar:
        if len(others) + 1 != len(row.partials):
            raise TypeError(f"Scalar.{row.name} takes {len(row.partials) - 1} arguments; got {len(others)}")
        return Scalar._record(row, (self, *others))

    method.__name__, method.__doc__ = row.name, f"{row.name} of this number."
    return method


class Scalar(Recorded):
    """y = f(x1, x2, ...): a number with its derivatives.

    `y = sin(x) / x + x**2` computes like a number and remembers the operations. Known are `+ - * / % **`, `abs`,
    comparisons (of values), and the functions of `scalar_functions.FUNCTIONS`, each as a method and as a function:
    `x.sin()`, `sin(x)`; NumPy's and torch's functions work as well (`numpy.sin(x)`). Where a value is not finite it is
    what torch gives (`log(-1)` is nan, `1 / 0` is inf). Functions with a kink (abs, relu, maximum) take torch's
    subgradient.

    Args:
        value: a float, a complex number (derivatives are then the complex ones), a NumPy number, or a tensor. With
            tensors everything acts element by element with broadcasting: `y.grad(x)` holds dy_k / dx_k for every
            element k of y.
        name: what it is called where the computation is printed; without one, its value or its expression.

    Raises: ArgumentError for other values, and for a tensor that requires grad.
    """

    __slots__ = ()

    def __init__(self, value: Any, name: str = "") -> None:
        if isinstance(value, Scalar):
            raise ArgumentError("value must be a number or a tensor; got a Scalar; to rename it set x.name = ...")
        if not isinstance(name, str):
            raise ArgumentError(f"name must be a string; got {type(name).__name__}")
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ArgumentError(
                    "value requires grad, but a Scalar keeps a graph of its own; give value.detach(), or compute with "
                    "the tensors and call explain(y, x) on them"
                )
            if not (value.is_floating_point() or value.is_complex()):
                raise ArgumentError(f"value must be real or complex; got a tensor of {value.dtype}; use value.double()")
            self._value = value.clone()
        else:
            self._value = _number(value)
        self._name, self._function, self._arguments = name, None, ()

    @staticmethod
    def _record(function: Function, args: Sequence[Any]) -> Scalar:
        """The result of `function` as a new Scalar."""
        arguments = tuple(a if isinstance(a, Scalar) else _constant(a) for a in args)
        value = function(*(a._value if isinstance(a, Scalar) else a for a in arguments))
        return Scalar._made(function, arguments, value)

    # What it is -----------------------------------------------------------------------------------------------------

    @property
    def children(self) -> tuple[tuple[Scalar, Any], ...]:
        """(argument, derivative of this number in it) for every argument that is a Scalar."""
        return tuple((self._arguments[i], d) for i, d in self._slopes())

    def _slopes(self, graph: bool = False) -> list[tuple[int, Any]]:
        """(position, derivative) for every argument that is a Scalar; the derivative is a Scalar if `graph`."""
        if self._function is None:
            return []
        given: list[Any] = [a if graph else Scalar._made(None, (), _plain(a)) for a in self._arguments]
        given.append(self if graph else Scalar._made(None, (), self._value))
        found = []
        for i, argument in enumerate(self._arguments):
            if isinstance(argument, Scalar):
                slope = self._function.partials[i](*given)
                found.append((i, slope if graph else _plain(slope)))
        return found

    def _graph_nodes(self) -> Iterator[tuple[Any, str, str, list[tuple[Any, str]], dict[str, Any]]]:
        """What a graph of the computation shows: every number, with local derivatives on the edges."""
        for node in topological(self):
            slopes = {i: _short(d) for i, d in node._slopes()}
            parents = [(node._arguments[i], text) for i, text in slopes.items()]
            kind = "leaf" if node._function is None else "output" if node is self else "operation"
            facts = {"value": _short(node._value), "expression": node.expression}
            constants = [a for a in node._arguments if not isinstance(a, Scalar)]
            if constants:
                facts["constant"] = ", ".join(map(_short, constants))
            yield node, f"{node._name or node.operation or 'constant'} = {_short(node._value)}", kind, parents, facts

    # Derivatives ----------------------------------------------------------------------------------------------------

    def grad(self, *variables: Scalar, create_graph: bool = False, allow_unused: bool = False) -> Any:
        """dy/dx, by one sweep from y to all variables at once.

        Args:
            variables: one or several Scalars that y was computed from, variables or results on the way.
            create_graph: give Scalars, which can be differentiated again.
            allow_unused: 0 for a variable that y does not depend on, instead of an error.

        Returns: a number (a Scalar with `create_graph`), of the shape of y where values are tensors; a tuple if there
        are several variables.

        Raises: ArgumentError if there is no variable, or y does not depend on it.

        Cost: some operations for each operation of y.
        """
        if not variables:
            raise ArgumentError("grad needs at least one variable: y.grad(x) or y.grad(x1, x2)")
        for x in variables:
            if not isinstance(x, Scalar):
                raise ArgumentError(f"variables must be Scalars; got {type(x).__name__}: y.grad(x) or y.grad(x1, x2)")
        order = topological(self)
        known: dict[Scalar, Any] = {self: Scalar(_one_like(self._value)) if create_graph else _one_like(self._value)}
        wanted = set(variables)
        rest = len(wanted)
        found: dict[Scalar, Any] = {}
        for node in order:
            outer = known.pop(node)
            if node in wanted:
                found[node] = outer
                rest -= 1
                if not rest:
                    break
            for i, slope in node._slopes(create_graph):
                part = _product(outer, slope)
                child = node._arguments[i]
                known[child] = known[child] + part if child in known else part
        missing = [x for x in variables if x not in found]
        if missing and not allow_unused:
            raise ArgumentError(
                f"y.grad(x): y = {self.expression} does not depend on x = {missing[0].name}; it was computed from "
                f"{', '.join(v.name for v in self.leaves[:8])}; allow_unused=True gives 0 for such variables"
            )
        for x in missing:
            zero = _one_like(self._value) * 0
            found[x] = Scalar(zero) if create_graph else zero
        if isinstance(self._value, Tensor):
            found = {x: _of_shape(g, self._value) for x, g in found.items()}
        return found[variables[0]] if len(variables) == 1 else tuple(found[x] for x in variables)

    def evaluate(self, values: Mapping[Scalar, Any]) -> Any:
        """The number that y would be if the Scalars in `values` had other values.

        The recorded operations are repeated: choices that Python made (`if x > 0`) stay as they were.

        Raises: ArgumentError if y does not depend on one of them.
        """
        order = topological(self)
        reached = set(order)
        for x in values:
            if x not in reached:
                raise ArgumentError(f"y = {self.expression} does not depend on x = {_label(x)}")
        new: dict[Scalar, Any] = {}
        for node in reversed(order):
            if node in values:
                new[node] = _plain(_constant(values[node]))
            elif node._function is None:
                new[node] = node._value
            else:
                new[node] = node._function(*(new[a] if isinstance(a, Scalar) else a for a in node._arguments))
        return new[self]

    def numeric_grad(self, x: Scalar, step: float | None = None) -> Any:
        """dy/dx by central differences of fourth order, to compare `y.grad(x)` with: about 12 digits.

        Args:
            x: a Scalar that y was computed from.
            step: distance of the points; by default 1e-3 times max(1, |x|).

        Cost: four evaluations.
        """
        if step is None:
            step = 1e-3 * max(1.0, float(torch.as_tensor(x._value).abs().max()) if isinstance(x, Scalar) else 1.0)
        f = [self.evaluate({x: x._value + k * step}) for k in (-2, -1, 1, 2)]
        return (f[0] - f[3] + 8 * (f[2] - f[1])) / (12 * step)

    # Functions --------------------------------------------------------------------------------------------------------

    sin, cos, tan, asin, acos, atan, atan2 = _methods("sin", "cos", "tan", "asin", "acos", "atan", "atan2")
    sinh, cosh, tanh, asinh, acosh, atanh = _methods("sinh", "cosh", "tanh", "asinh", "acosh", "atanh")
    exp, exp2, expm1, log, log2, log10, log1p = _methods("exp", "exp2", "expm1", "log", "log2", "log10", "log1p")
    sqrt, square, reciprocal, hypot = _methods("sqrt", "square", "reciprocal", "hypot")
    erf, erfc, sigmoid, softplus, relu = _methods("erf", "erfc", "sigmoid", "softplus", "relu")
    maximum, minimum = _methods("maximum", "minimum")

    # Python's operators ---------------------------------------------------------------------------------------------

    __add__, __radd__ = _operators("+")
    __sub__, __rsub__ = _operators("-")
    __mul__, __rmul__ = _operators("*")
    __truediv__, __rtruediv__ = _operators("/")
    __mod__, __rmod__ = _operators("%")
    __pow__, __rpow__ = _operators("**")
    __neg__, neg = _methods("neg", "neg")
    __abs__, abs = _methods("abs", "abs")

    def __pos__(self) -> Scalar:
        return self

    def __floordiv__(self, other: Any) -> Any:
        raise NotDifferentiableError(
            "x // y is constant between its jumps, so its derivative says nothing; x.value // y.value is the number"
        )

    __rfloordiv__ = __floordiv__

    def __lt__(self, other: Any) -> Any:
        return self._value < _plain(other)

    def __le__(self, other: Any) -> Any:
        return self._value <= _plain(other)

    def __gt__(self, other: Any) -> Any:
        return self._value > _plain(other)

    def __ge__(self, other: Any) -> Any:
        return self._value >= _plain(other)

    def __eq__(self, other: Any) -> Any:
        return self._value == _plain(other)

    def __ne__(self, other: Any) -> Any:
        return self._value != _plain(other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __float__(self) -> float:
        raise TypeError(
            "a Scalar is not turned into a float, because that would cut its graph; write x.value for the number, and "
            "functions of pullback.autodiff (sin(x), x.sin()) in place of those of math"
        )

    __complex__ = __int__ = __float__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _foreign(func.__name__, args, kwargs, "torch")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _foreign(ufunc.__name__, inputs, kwargs if method == "__call__" else {method: True}, "numpy")

    def __repr__(self) -> str:
        value = repr(self._value)
        if self._name:
            return f"Scalar({value}, name={self._name!r})"
        return f"Scalar({value}, {self.expression!r})" if self._function is not None else f"Scalar({value})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Scalar:
        for node in reversed(topological(self)):
            if id(node) not in memo:
                arguments = tuple(memo[id(a)] if isinstance(a, Scalar) else a for a in node._arguments)
                memo[id(node)] = Scalar._made(node._function, arguments, node._value, node._name)
        return memo[id(self)]


# Numbers ------------------------------------------------------------------------------------------------------------


def _known(value: Any) -> bool:
    return isinstance(value, (Scalar, numbers.Number, Tensor))


def _number(value: Any) -> Any:
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, numbers.Complex):
        return complex(value)
    raise ArgumentError(
        f"value must be a float, a complex number or a torch tensor; got {type(value).__name__}; arrays go through "
        f"torch.as_tensor, texts through float"
    )


def _constant(value: Any) -> Any:
    """A number beside Scalars; integers stay, because they print better."""
    if isinstance(value, Tensor):
        return Scalar(value)._value
    return int(value) if isinstance(value, numbers.Integral) else _number(value)


def _plain(value: Any) -> Any:
    return value._value if isinstance(value, Scalar) else value


def _product(outer: Any, slope: Any) -> Any:
    """The product outer * slope; factors that are the number 1 leave no trace in a graph."""
    if isinstance(outer, Scalar) and not isinstance(slope, Tensor):
        if not isinstance(slope, Scalar) and slope == 1:
            return outer
        if not outer._arguments and not outer._name and not isinstance(outer._value, Tensor) and outer._value == 1:
            return slope if isinstance(slope, Scalar) else Scalar(slope)
    product: Any = outer * slope
    return product


def _one_like(value: Any) -> Any:
    return torch.ones_like(value) if isinstance(value, Tensor) else type(value)(1)


def _of_shape(gradient: Any, value: Tensor) -> Any:
    if isinstance(gradient, Scalar):
        return gradient if tuple(gradient._value.shape) == tuple(value.shape) else gradient * torch.ones_like(value)
    return gradient.expand(value.shape).clone()


def _foreign(name: str, args: Sequence[Any], kwargs: Any, package: str) -> Any:
    """A function of torch or NumPy, called with a Scalar."""
    row = FUNCTIONS.get(_NUMPY_NAMES.get(name, name))
    if row is None or kwargs or len(args) != len(row.partials):
        raise NotDifferentiableError(
            f"{package}'s {name} does not know Scalars in this form; known are {', '.join(FUNCTIONS)}; for anything "
            f"else compute with tensors and call explain(y, x) on them"
        )
    if name in ("__rpow__", "__rsub__", "__rdiv__"):
        args = tuple(reversed(args))
    return Scalar._record(row, args)


def _label(x: Any) -> str:
    return x.name if isinstance(x, Scalar) else repr(x)


def _short(value: Any) -> str:
    """A number with five digits, or the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"{value.item():.5g}" if value.ndim == 0 else f"tensor{tuple(value.shape)}"
    return f"{value:.5g}"
