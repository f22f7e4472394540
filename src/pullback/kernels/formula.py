"""Formula text -> Expr, by a tokenizer and precedence climbing; nothing is evaluated by Python.

Operators bind as in Python, which reads KeOps' formulas: `**`, then unary `-`, `* /`, `+ -`, `|` (scalar product), and
comparisons, which give 0 or 1. `[f, g]` concatenates; lists of integers, also written Ind(2, 3), are parameters.
Functions are those of `ir/macros.py`. `parse` reads back the text of an Expr.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pullback.core.errors import ArgumentError, PullbackError, ShapeError
from pullback.kernels.ir.expr import CATEGORY, Expr, variable, variables
from pullback.kernels.ir.macros import FUNCTIONS, power
from pullback.kernels.ir.primitives import op, operand, whole

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|[<>=!]=|[-+*/|()\[\],<>=]))"
)
_SHOWN = 50  # characters of a long formula on each side of an error

_COMPARISON, _BAR, _SUM, _PRODUCT, _UNARY, _POWER = range(1, 7)
_INFIX: dict[str, tuple[int, str]] = {
    "<": (_COMPARISON, "LessThan"),
    "<=": (_COMPARISON, "LessOrEqual"),
    ">": (_COMPARISON, "LessThan"),
    ">=": (_COMPARISON, "LessOrEqual"),
    "==": (_COMPARISON, "Equal"),
    "!=": (_COMPARISON, "NotEqual"),
    "|": (_BAR, "Scalprod"),
    "+": (_SUM, "Add"),
    "-": (_SUM, "Subtract"),
    "*": (_PRODUCT, "Mult"),
    "/": (_PRODUCT, "Divide"),
    "**": (_POWER, "Power"),
}
_ON_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
_NUMBERS = {"inf": float("inf"), "nan": float("nan")}


@dataclass(frozen=True)
class _Token:
    kind: str  # "number", "name", "sign" or "end"
    text: str
    start: int


class _Text:
    """A piece of source text and the errors that point into it."""

    def __init__(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise ArgumentError(f"{what} must be a string; got {type(text).__name__}")
        self.text, self.what = text, what
        self.tokens: list[_Token] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                self.fail(f"cannot read {text[at]!r}", at)
            kind = str(found.lastgroup)
            self.tokens.append(_Token(kind, found[kind], found.start(kind)))
            at = found.end()
        self.tokens.append(_Token("end", "", end))
        self.at = 0

    def fail(self, message: str, start: int, hint: str = "", kind: type[PullbackError] = ArgumentError) -> NoReturn:
        """Raise `kind` with the text and a caret under position `start`."""
        low, high = max(0, start - _SHOWN), start + _SHOWN
        shown = re.sub(r"\s", " ", self.text[low:high])
        before, after = "... " * (low > 0), " ..." * (high < len(self.text))
        caret = " " * (len(before) + start - low) + "^"
        lines = [f"{message} at position {start} of the {self.what}", f"  {before}{shown}{after}", f"  {caret}"]
        raise kind("\n".join(lines + [hint] * bool(hint))) from None

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self) -> _Token:
        token = self.tokens[self.at]
        self.at += token.kind != "end"
        return token

    def accept(self, text: str) -> bool:
        found = self.next.text == text and self.next.kind == "sign"
        self.at += found
        return found

    def expect(self, text: str, why: str) -> None:
        if not self.accept(text):
            came = repr(self.next.text) if self.next.text else f"the end of the {self.what}"
            self.fail(f"expected {text!r} {why}, found {came}", self.next.start)

    def finish(self) -> None:
        if self.next.kind != "end":
            self.fail(f"unexpected {self.next.text!r}", self.next.start)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


class _Parser(_Text):
    """Values while parsing: Expr, Python numbers, and tuples of either (lists)."""

    def __init__(self, text: str, names: Mapping[str, Expr]) -> None:
        super().__init__(text, "formula")
        self.names = names

    def built(self, token: _Token, make: Callable[..., Any], *args: Any) -> Any:
        """make(*args); its error is given the place."""
        try:
            return make(*args)
        except PullbackError as error:
            self.fail(str(error), token.start, kind=type(error))
        except (ZeroDivisionError, OverflowError) as error:
            self.fail(str(error), token.start)

    def expression(self, above: int = 0) -> Any:
        left = self.prefix()
        while self.next.kind == "sign" and self.next.text in _INFIX:
            binds, name = _INFIX[self.next.text]
            if binds <= above:
                break
            token = self.take()
            # ** is right associative and its exponent may have a sign: 2 ** -x
            right = self.expression(_UNARY - 1 if binds == _POWER else binds)
            left = self.infix(token, name, left, right)
            if binds == _COMPARISON and _INFIX.get(self.next.text, (0, ""))[0] == _COMPARISON:
                self.fail("comparisons cannot be chained", self.next.start, "use LogicalAnd(a < b, b < c)")
        return left

    def infix(self, token: _Token, name: str, left: Any, right: Any) -> Any:
        if _is_number(left) and _is_number(right) and token.text in _ON_NUMBERS:
            return self.built(token, _ON_NUMBERS[token.text], left, right)
        if name == "Power":
            return self.built(token, power, left, right)
        if token.text in (">", ">="):
            left, right = right, left
        return self.built(token, op, name, left, right)

    def prefix(self) -> Any:
        token = self.take()
        if token.kind == "number":
            return int(token.text) if token.text.isdigit() else float(token.text)
        if token.kind == "name":
            return self.call(token) if self.accept("(") else self.name(token)
        if token.text in ("-", "+"):
            value = self.expression(_UNARY - 1)
            if token.text == "+":
                return value
            return -value if _is_number(value) else self.built(token, op, "Minus", value)
        if token.text == "(":
            items = self.items(token, ")")
            if len(items) == 1:
                return items[0]
            if len(items) == 2:  # KeOps 1 wrote the scalar product (f, g)
                return self.built(token, op, "Scalprod", *items)
            self.fail("parentheses hold one expression, or two", token.start, "write [f, g, h] to concatenate")
        if token.text == "[":
            return tuple(self.items(token, "]"))
        came = repr(token.text) if token.text else "the end of the formula"
        self.fail(f"expected an expression, found {came}", token.start)

    def items(self, opening: _Token, closing: str) -> list[Any]:
        """Expressions separated by commas up to `closing`."""
        found: list[Any] = []
        if self.accept(closing):
            return found
        while True:
            found.append(self.expression())
            if not self.accept(","):
                self.expect(closing, f"to close {opening.text!r} of position {opening.start}")
                return found

    def name(self, token: _Token) -> Any:
        if token.text in self.names:
            return self.names[token.text]
        if token.text in _NUMBERS:
            return _NUMBERS[token.text]
        if token.text in FUNCTIONS:
            self.fail(f"{token.text} is a function and needs its arguments in parentheses", token.start)
        known = f"declared are {', '.join(self.names)}" if self.names else "the aliases declare no name"
        self.fail(f"unknown name {token.text}", token.start, similar(token.text, self.names) or known)

    def call(self, token: _Token) -> Any:
        args = self.items(self.tokens[self.at - 1], ")")
        if token.text == "Ind":
            return self.built(token, lambda: tuple(whole("Ind", a) for a in args))
        if token.text not in FUNCTIONS:
            hint = similar(token.text, FUNCTIONS)
            if token.text in self.names:
                hint = f"{token.text} is a variable; write {token.text} * (...) for a product"
            self.fail(f"unknown function {token.text}", token.start, hint)
        return self.built(token, FUNCTIONS[token.text], *args)


def similar(name: str, known: Mapping[str, Any]) -> str:
    """A question that names the known word closest to `name`, or nothing."""
    lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), lower, 1, 0.7)
    return f"did you mean {lower[found[0]]}?" if found else ""


def parse(text: str, aliases: Sequence[str] | Mapping[str, Expr] = ()) -> Expr:
    """The Expr that a formula means.

    Args:
        text: the formula, such as "Exp(-SqDist(x, y) / s) * b".
        aliases: declarations such as "x = Vi(3)" (see `declare`), or names -> Expr.

    Raises: ArgumentError or ShapeError that shows the place in the formula.
    """
    if not isinstance(aliases, Mapping):
        aliases = {name: v for name, v in declare(aliases) if name}
    parser = _Parser(text, aliases)
    try:
        value = parser.expression()
    except RecursionError:
        raise ArgumentError(f"the formula is nested too deeply: {text[:60]} ...") from None
    parser.finish()
    return operand(value) if not isinstance(value, tuple) else parser.built(parser.tokens[0], operand, value)


# Declarations -----------------------------------------------------------------------------------------------------


def declare(aliases: Sequence[str]) -> list[tuple[str, Expr]]:
    """(name or "", variable) of each declaration "x = Vi(3)", "x = Vi(position, 3)", "Vi(3)" or "Var(position, 3, 0)".

    Where the position is left out it is the declaration's place in the list.
    """
    if isinstance(aliases, str):
        raise ArgumentError(f"aliases must be a list of strings such as ['x = Vi(3)']; got the string {aliases!r}")
    found: list[tuple[str, Expr]] = []
    for place, text in enumerate(aliases):
        name, v = _declaration(_Text(text, f"alias {text!r}"), place)
        if name and name in dict(found):
            raise ArgumentError(f"the aliases declare {name} twice")
        found.append((name, v))
    return found


def _declaration(text: _Text, place: int) -> tuple[str, Expr]:
    name, token = "", text.take()
    if text.accept("="):
        name, token = token.text, text.take()
    hint = "write x = Vi(3), x = Vj(3) or x = Pm(3), with the dimension in parentheses"
    if token.text in ("Vx", "Vy"):
        modern = {"Vx": "Vi", "Vy": "Vj"}[token.text]
        text.fail(f"{token.text} is an old spelling", token.start, f"write {modern}")
    if token.text not in (*CATEGORY, "Var"):
        text.fail(f"expected Vi, Vj or Pm, found {token.text!r}", token.start, hint)
    text.expect("(", f"after {token.text}")
    numbers: list[int] = []
    while not numbers or text.accept(","):
        number = text.take()
        if not number.text.isdigit():
            text.fail(f"expected an integer, found {number.text!r}", number.start, hint)
        numbers.append(int(number.text))
    text.expect(")", f"after the arguments of {token.text}")
    text.finish()
    if token.text == "Var":
        if len(numbers) != 3 or numbers[2] > 2:
            text.fail("Var expects a position, a dimension and a category 0, 1 or 2", token.start)
        position, dim, category = numbers
    else:
        if len(numbers) > 2:
            text.fail(f"{token.text} expects a dimension, or a position and a dimension", token.start)
        position, dim, category = ([place] * (2 - len(numbers)) + numbers)[0], numbers[-1], CATEGORY.index(token.text)
    if dim < 1:
        text.fail("the dimension must be at least 1", token.start)
    return name, variable(position, dim, category)


def signature(
    declared: Sequence[tuple[str, Expr]], *exprs: Expr
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """(names, (dimension, category) of each argument by position), of the declarations and the variables in `exprs`."""
    found: dict[int, tuple[str, Expr]] = {}
    for name, v in (*declared, *(("", v) for e in exprs for v in _all_variables(e))):
        position = v.params[0]
        old_name, old = found.get(position, (name, v))
        if old is not v:
            raise ShapeError(
                f"argument {position} is declared as {_declared(old_name, old)} and as {_declared(name, v)}"
            )
        found[position] = (old_name or name, v)
    missing = [p for p in range(len(found)) if p not in found]
    if missing:
        raise ArgumentError(f"nothing declares argument {missing[0]}; declared are the positions {sorted(found)}")
    ordered = [found[p] for p in range(len(found))]
    names = tuple(name or f"argument {p}" for p, (name, _) in enumerate(ordered))
    return names, tuple((v.dim, v.params[1]) for _, v in ordered)


def _all_variables(e: Expr) -> list[Expr]:
    return list(variables(e).values())


def _declared(name: str, v: Expr) -> str:
    return f"{name or 'Var'} of category {CATEGORY[v.params[1]]} and dimension {v.dim}"
