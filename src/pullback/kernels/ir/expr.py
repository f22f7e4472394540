"""Expr: one node of a formula over pairs (i, j), interned, so that equal formulas are the same object.

An Expr is a vector of `dim` real numbers for every pair. It holds no data and no dtype. `roles` says what it depends
on: bit 1 the row i, bit 2 the column j; 0 means parameters and constants only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

from pullback.core.errors import ShapeError

I, J, PARAMETER = 0, 1, 2  # categories of a variable, as in KeOps: Vi, Vj, Pm  # noqa: E741
_LONGEST = 20_000  # characters of a formula's text
ROLE = (1, 2, 0)  # category -> bit of Expr.roles
CATEGORY = ("Vi", "Vj", "Pm")

_interned: WeakValueDictionary[Any, Expr] = WeakValueDictionary()
_creating = threading.Lock()

# How a node of each operation is made from its arguments; `ir/primitives.py` fills it.
builders: dict[str, Callable[..., Expr]] = {}


class Expr:
    """op(*args; *params), a vector of `dim` numbers for every pair (i, j).

    Args:
        op: name of a row of the table of primitives, or "Var", "Index", "Const".
        args: the operands.
        params: hashable constants of the operation, such as a component's number.
        dim: number of components.
    """

    __slots__ = ("__weakref__", "args", "dim", "op", "params", "roles")

    op: str
    args: tuple[Expr, ...]
    params: tuple[Any, ...]
    dim: int
    roles: int

    def __new__(cls, op: str, args: tuple[Expr, ...], params: tuple[Any, ...], dim: int, roles: int = 0) -> Expr:
        """The node; an existing one if there is an equal one."""
        key = (op, args, params if op != "Const" else str(params), dim)  # -0.0 is not 0.0
        node = _interned.get(key)
        if node is not None:
            return node
        for a in args:
            roles |= a.roles
        with _creating:  # two threads must not make two nodes: they are compared by identity
            node = _interned.get(key)
            if node is None:
                node = object.__new__(cls)
                node.op, node.args, node.params, node.dim, node.roles = op, args, params, dim, roles
                _interned[key] = node
        return node

    def __reduce__(self) -> Any:
        return Expr, (self.op, self.args, self.params, self.dim, self.roles)

    # Arithmetic, for rules and derivatives written in Expr -------------------------------------------------------

    def __add__(self, other: Any) -> Expr:
        return builders["Add"](self, as_expr(other))

    def __radd__(self, other: Any) -> Expr:
        return builders["Add"](as_expr(other), self)

    def __sub__(self, other: Any) -> Expr:
        return builders["Subtract"](self, as_expr(other))

    def __rsub__(self, other: Any) -> Expr:
        return builders["Subtract"](as_expr(other), self)

    def __mul__(self, other: Any) -> Expr:
        return builders["Mult"](self, as_expr(other))

    def __rmul__(self, other: Any) -> Expr:
        return builders["Mult"](as_expr(other), self)

    def __truediv__(self, other: Any) -> Expr:
        return builders["Divide"](self, as_expr(other))

    def __rtruediv__(self, other: Any) -> Expr:
        return builders["Divide"](as_expr(other), self)

    def __neg__(self) -> Expr:
        return builders["Minus"](self)

    # Text ----------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """The formula in functional form; `formula.parse` reads it back unless it is so long that it is cut (...).

        A graph with shared parts can be exponentially longer as text.
        """
        done: dict[Expr, str] = {}
        for node in walk(self):
            if node.op == "Var":
                text = f"Var({node.params[0]},{node.dim},{node.params[1]})"
            elif node.op == "Const":
                text = f"Const({','.join(map(_number, node.params))})"
            else:
                text = f"{node.op}({','.join([done[a] for a in node.args] + [_number(p) for p in node.params])})"
            done[node] = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
        return done[self]

    def __repr__(self) -> str:
        return f"<Expr {self} of dimension {self.dim}>"


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_number, value))}]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return repr(value)


def variable(position: int, dim: int, category: int) -> Expr:
    """Component vector number `position` of the arguments, of category I, J or PARAMETER."""
    return Expr("Var", (), (position, category), dim, ROLE[category])


def index(category: int) -> Expr:
    """The number i of the row (category I) or j of the column (category J), as a real number."""
    return Expr("Index", (), (category,), 1, ROLE[category])


def const(*values: float) -> Expr:
    """A constant vector."""
    return Expr("Const", (), tuple(float(v) for v in values), len(values))


def zero(dim: int = 1) -> Expr:
    """The zero vector."""
    return const(*([0.0] * dim))


def as_expr(value: Any) -> Expr:
    """A number as a constant; an Expr as it is."""
    return value if isinstance(value, Expr) else const(float(value))


def is_const(e: Expr, value: float | None = None) -> bool:
    """Whether `e` is a constant (all of whose components equal `value`)."""
    if e.op != "Const":
        return False
    return value is None or all(p == value and math.copysign(1, p) == math.copysign(1, value) for p in e.params)


def broadcast(name: str, args: Sequence[Expr]) -> int:
    """The common dimension of operands of dimension 1 or D."""
    dim = 1
    for a in args:
        if a.dim != 1 and dim not in (1, a.dim):
            raise ShapeError(
                f"{name} expects operands of equal dimension (or 1); got {', '.join(str(a.dim) for a in args)} in "
                f"{name}({', '.join(map(str, args))})"
            )
        dim = max(dim, a.dim)
    return dim


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every node under `roots` once, operands before what uses them."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))


def variables(*roots: Expr) -> dict[int, Expr]:
    """Position -> variable, in order of position."""
    found = {n.params[0]: n for n in walk(*roots) if n.op == "Var"}
    return dict(sorted(found.items()))


def rebuild(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """The same operation on other operands."""
    if all(a is b for a, b in zip(args, node.args, strict=True)):
        return node
    return builders[node.op](*args, *node.params)


def substitute(root: Expr, table: dict[Expr, Expr]) -> Expr:
    """`root` with nodes replaced."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        done[node] = table[node] if node in table else rebuild(node, tuple(done[a] for a in node.args))
    return done[root]
