"""The language of patterns.

A > B         B uses the result of A, and nothing else does
A | B         parallel branches: they begin at one result and end in one operation; `skip` is an empty branch
A & B         one node that is both: Conv* & [stride=2]
A, B          one or the other
( ... )       as one; > and | next to each other need parentheses
Conv          the operation of that name, by any tracer (`names.py`), in any case; or a kind: Constant, Parameter
Conv*  *      names with wildcards; the operation with any name
'A.H @ B'     a label as it is written
[3x3]         the kernel                       [stride=2]  [out=10]  [in=3]   facts among the node's details
[shape=*x64]  one of the results' shapes       [dtype=float32] [kind=operator] [group=layer4*] [flag=nan]
[nbytes>1e6]  numbers compare with = != < <= > >=, several facts are divided by commas: Conv[3x3, stride=2]

Names are compared as `names.common` writes them.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from pullback.core.errors import ArgumentError
from pullback.graphs.model import Node
from pullback.graphs.passes.names import ALIASES, common
from pullback.graphs.passes.pattern import Choice, One, Parallel, Pattern, Serial, Test, View

_common = lru_cache(maxsize=4096)(common)

_TOKEN = re.compile(r"\s*(?:(?P<sign>[>|&,()])|\[(?P<facts>[^\]]*)\]|'(?P<label>[^']*)'|(?P<name>[\w.*?:+\-]+))")
# Fact -> names of module attributes that state it.
_DETAILS = {
    "kernel": ("kernel_size",),
    "out": ("out_features", "out_channels"),
    "in": ("in_features", "in_channels"),
}
_FACT = re.compile(r"\s*([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.+?)\s*")


def parse(text: str) -> Pattern:
    """The pattern that `text` describes (see the grammar above).

    Raises: ArgumentError with the place where the text is not understood.
    """
    if not isinstance(text, str):
        raise ArgumentError(f"pattern must be text such as 'Conv > Relu'; got a {type(text).__name__}")
    reader = _Reader(text)
    found = reader.choice()
    if reader.peek() is not None:
        raise reader.error("expected the end, '>', '|', '&' or ','")
    if found is None:
        raise reader.error("skip is a branch: write (A | skip)")
    return found


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            token = _TOKEN.match(text, at)
            if token is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise ArgumentError(f"pattern {text!r}: cannot read {text[at:][:12]!r} at character {at + 1}")
            kind = str(token.lastgroup)
            self.tokens.append((kind, token.group(kind), token.start(kind)))
            at = token.end()
        self.index = 0

    def peek(self) -> str | None:
        """The next sign, or another token's text in quotes that no sign has; None at the end."""
        if self.index == len(self.tokens):
            return None
        kind, text, _ = self.tokens[self.index]
        return text if kind == "sign" else f"{kind} {text}"

    def take(self, sign: str) -> bool:
        """Whether the next token is this sign; if so it is read."""
        found = self.peek() == sign
        self.index += found
        return found

    def error(self, expected: str) -> ArgumentError:
        if self.index == len(self.tokens):
            return ArgumentError(f"pattern {self.text!r}: {expected} at its end")
        _, got, at = self.tokens[self.index]
        return ArgumentError(f"pattern {self.text!r}: {expected} at character {at + 1}; got {got!r}")

    def choice(self) -> Pattern | None:
        items = [self.row()]
        while self.take(","):
            items.append(self.row())
        if len(items) > 1 and None in items:
            raise self.error("skip stands alone in a branch")
        return Choice(tuple(i for i in items if i is not None)) if len(items) > 1 else items[0]

    def row(self) -> Pattern | None:
        items = [self.both()]
        sign = self.peek()
        if sign not in (">", "|"):
            return items[0]
        while self.take(sign):
            items.append(self.both())
        if self.peek() in (">", "|"):
            raise self.error("> and | need parentheses: (A > B) | C, or A > (B | C); found them side by side")
        patterns = tuple(i for i in items if i is not None)
        if sign == ">":
            if len(patterns) < len(items):
                raise self.error("skip is a branch, not a step: write (A | skip)")
            return Serial(patterns)
        if len(items) - len(patterns) > 1 or not patterns:
            raise self.error("one skip among the branches is enough")
        return Parallel(patterns, len(patterns) < len(items))

    def both(self) -> Pattern | None:
        items = [self.unit()]
        while self.take("&"):
            items.append(self.unit())
        if len(items) == 1:
            return items[0]
        if not all(isinstance(i, One) for i in items):
            raise self.error("& joins what is said of one node: Conv & [3x3]")
        known = [i.operation for i in items if isinstance(i, One) and i.operation]
        if len({_common(name) for name in known}) > 1:
            raise ArgumentError(
                f"pattern {self.text!r}: & joins what is said of one node, and no node is {' and '.join(known)} at "
                f"once; write {' | '.join(known)} for parallel branches, {', '.join(known)} for one or the other"
            )
        return One(tuple(test for i in items if isinstance(i, One) for test in i.tests), known[0] if known else "")

    def unit(self) -> Pattern | None:
        if self.take("("):
            found = self.choice()
            if not self.take(")"):
                raise self.error("expected ')'")
            return found
        if self.index == len(self.tokens) or self.tokens[self.index][0] == "sign":
            raise self.error("expected a name, '(' or '['")
        kind, text, _ = self.tokens[self.index]
        if kind == "name" and text == "skip":
            self.index += 1
            return None
        tests: list[Test] = []
        operation = text if kind == "name" and _common(text) in ALIASES else ""
        if kind != "facts":
            tests.append(_named(text, exact=kind == "label"))
            self.index += 1
        while self.index < len(self.tokens) and self.tokens[self.index][0] == "facts":
            tests += [self.fact(part) for part in self.tokens[self.index][1].split(",")]
            self.index += 1
        return One(tuple(tests), operation)

    def fact(self, text: str) -> Test:
        if re.fullmatch(r"\s*\d+(x\d+)*\s*", text):
            return _compared("kernel", "=", text.strip())
        fact = _FACT.fullmatch(text)
        if fact is None:
            raise self.error(f"conditions are [3x3] or [fact=value]; cannot read [{text.strip()}]")
        key, sign, value = fact.groups()
        if sign not in ("=", "!=") and _number(value) is None:
            raise self.error(f"{sign} compares numbers; {value!r} in [{text.strip()}] is none")
        return _compared(key, sign, value)


def _named(name: str, exact: bool) -> Test:
    if exact:
        return lambda node, view: node.label == name
    lower = name.lower()
    if lower.strip("*") == "":
        return lambda node, view: True
    if any(c in lower for c in "*?"):
        return lambda node, view: any(fnmatchcase(n.lower(), lower) for n in (*_names(node), _common(node.label)))
    shared = _common(name)

    def test(node: Node, view: View) -> bool:
        return node.kind == lower or any(n.lower() == lower or _common(n) == shared for n in _names(node))

    return test


def _names(node: Node) -> list[str]:
    """What a node may be called: its label, what it was folded as, and a module by its class."""
    extra = [node.details.get("op")] + ([node.details.get("module")] if node.kind == "module" else [])
    return [node.label, *(n for n in extra if isinstance(n, str))]


def _compared(key: str, sign: str, value: str) -> Test:
    def test(node: Node, view: View) -> bool:
        found = _facts(node, key, view)
        if sign == "=":
            return any(_equal(f, value) for f in found)
        if sign == "!=":
            return bool(found) and not any(_equal(f, value) for f in found)
        limit = _number(value)
        numbers = [n for n in map(_number, found) if n is not None]
        assert limit is not None
        order = {"<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__}[sign]
        return any(order(n, limit) for n in numbers)

    return test


def _facts(node: Node, key: str, view: View) -> list[Any]:
    """The values of a fact of a node; none if it has none."""
    own: dict[str, Callable[[], list[Any]]] = {
        "shape": lambda: [v.shape for v in node.values],
        "dtype": lambda: [v.dtype for v in node.values],
        "device": lambda: [v.device for v in node.values],
        "kind": lambda: [node.kind],
        "label": lambda: [node.label],
        "id": lambda: [node.id],
        "group": lambda: ["/".join(node.group), ".".join(node.group)],
        "flag": lambda: sorted(node.flags),
        "nbytes": lambda: [node.nbytes],
        "count": lambda: [node.count],
    }
    if key in own:
        return own[key]()
    kinds = {
        "kernel": ("kernel_size", "kernel"),
        "out": ("out_features", "out_channels", "out"),
        "in": ("in_features",),
    }
    for name in (*kinds.get(key, ()), key, *(("in_channels",) if key == "in" else ())):
        if name in node.details:
            return [_literal(node.details[name])]
    weight = view.weight(node)
    if key == "kernel":
        return [weight[2:]] if weight and len(weight) > 2 else []
    is_conv = _common(node.label).startswith("conv")
    if key == "out" and node.values and (is_conv or _common(node.label) == "linear"):
        shape = node.values[0].shape
        return [shape[1 if is_conv else -1]] if len(shape) > is_conv else []
    if key == "in" and weight and is_conv and len(weight) > 1:
        return [weight[1]]
    return []


def _literal(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, (tuple, list)):
        value = math.prod(value) if all(isinstance(v, int) for v in value) else None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _equal(found: Any, value: str) -> bool:
    if isinstance(found, (tuple, list)):
        wanted = value.strip("() ").replace(" ", "").split("x")
        if len(wanted) == 1 and found and all(f == found[0] for f in found):
            return _equal(found[0], wanted[0])
        return fnmatchcase("x".join(map(str, found)), "x".join(wanted))
    number = _number(value)
    if number is not None and isinstance(found, (int, float)):
        return float(found) == number
    return fnmatchcase(str(found).lower(), value.lower())
