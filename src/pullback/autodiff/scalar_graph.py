"""The graph behind a `Scalar`: what a recorded number consists of, its order, and its expression as text."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from pullback.autodiff.scalar_functions import Function
from pullback.core import nodes

_LONGEST = 80  # characters of an expression before it is cut with "..."
_DEEPEST = 40  # levels of it that are looked at


class Recorded:
    """A number, its name, and the function and arguments that it was computed from."""

    __slots__ = ("__weakref__", "_arguments", "_function", "_name", "_value")
    _value: Any
    _name: str
    _function: Function | None
    _arguments: tuple[Any, ...]

    @classmethod
    def _made(cls, function: Function | None, arguments: tuple[Any, ...], value: Any, name: str = "") -> Self:
        new = cls.__new__(cls)
        new._value, new._name, new._function, new._arguments = value, name, function, arguments
        return new

    @property
    def value(self) -> Any:
        """The number: float, complex or tensor."""
        return self._value

    @property
    def name(self) -> str:
        """The given name, or the expression with names for its parts, cut with "..." where it gets long."""
        return self._name or self.expression

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    @property
    def expression(self) -> str:
        """How it was computed: Python with as few parentheses as needed, cut with "..." where it gets long."""
        return _expression(self)

    @property
    def operation(self) -> str:
        """The name of the function that made it: "+", "sin" ...; "" for a variable or a constant."""
        return "" if self._function is None else self._function.name

    @property
    def leaves(self) -> tuple[Self, ...]:
        """The variables that it was computed from, in the order of their first use."""
        seen: set[Any] = {self}
        found: list[Any] = []
        stack: list[Any] = [self]
        while stack:
            node = stack.pop()
            if node._function is None:
                found.append(node)
            for child in reversed(node._arguments):
                if isinstance(child, Recorded) and child not in seen:
                    seen.add(child)
                    stack.append(child)
        return tuple(found)


# The graph ----------------------------------------------------------------------------------------------------------


def topological(root: Any) -> list[Any]:
    """Every Scalar behind `root`, each before its arguments."""
    return nodes.topological([root], lambda node: [a for a in node._arguments if isinstance(a, Recorded)])


# Expressions --------------------------------------------------------------------------------------------------------


def _expression(root: Recorded) -> str:
    """Python text for a Scalar, written from left to right until it is long enough; shared parts are never expanded
    beyond that, so the cost does not depend on how often they are used.
    """
    text: list[str] = []
    length = 0
    stack: list[tuple[Any, int, int]] = [(root, 0, 0)]  # what to write, binding strength around it, depth
    while stack:
        item, around, depth = stack.pop()
        if isinstance(item, str):
            if length + len(item) > _LONGEST:
                text.append("...")
                break
            text.append(item)
            length += len(item)
        else:
            stack += reversed(_pieces(item, around, depth))
    return "".join(text)


def _pieces(item: Any, around: int, depth: int) -> list[tuple[Any, int, int]]:
    """The parts of one expression: texts, and arguments with the binding strength that surrounds them."""
    if not isinstance(item, Recorded) or (item._function is None and not item._name):
        text = _constant_text(item._value if isinstance(item, Recorded) else item)
        negative = text.startswith("-")
        return [(f"({text})" if negative and around > 1 else text, 0, 0)]
    if item._name and depth:
        return [(item._name, 0, 0)]
    row = item._function
    if row is None:
        return [(item._name, 0, 0)]
    if depth > _DEEPEST:
        return [("...", 0, 0)]
    args, level = item._arguments, row.level
    if not row.symbol:
        pieces: list[tuple[Any, int, int]] = [(f"{row.name}(", 0, 0)]
        for k, a in enumerate(args):
            pieces += [(", ", 0, 0)] * bool(k) + [(a, 0, depth + 1)]
        return [*pieces, (")", 0, 0)]
    if len(args) == 1:
        pieces = [(row.symbol, 0, 0), (args[0], level, depth + 1)]
    else:
        left, right = (level + 1, level) if row.name == "**" else (level, level + 1)
        space = "" if row.name == "**" else " "
        pieces = [(args[0], left, depth + 1), (f"{space}{row.symbol}{space}", 0, 0), (args[1], right, depth + 1)]
    return [("(", 0, 0), *pieces, (")", 0, 0)] if level < around else pieces


def _constant_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor({value.item():g})" if value.ndim == 0 else f"tensor{tuple(value.shape)}"
    return repr(value).strip("()") if isinstance(value, (int, float)) else repr(value)
