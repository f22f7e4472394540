"""How LazyTensors build expressions: cached by structure, and in numbers while torch.compile traces.

A traced function sees no expression: formulas are built outside of what it sees, and their numbers are constants there.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from pullback.core.autograd import constant_in_graphs
from pullback.kernels.ir.expr import PARAMETER, Expr, _interned, builders, const, index, substitute, variable, walk

Shape = tuple[int, ...]


class Traced:
    """An Expr inside a traced function: its number, and what Python code asks about it."""

    __slots__ = ("dim", "number", "op")

    def __init__(self, number: int) -> None:
        self.number = number
        self.dim, self.op = _dim_of(number), _op_of(number)


_kept: dict[int, Expr] = {}  # expressions that traced functions name, by id


def number_of(e: Any) -> int:
    """The number that names an expression in a traced function."""
    return e.number if isinstance(e, Traced) else id(e)


def numbered(number: int) -> Expr:
    """The expression of that number."""
    if number not in _kept:
        _kept[number] = next(e for e in list(_interned.values()) if id(e) == number)
    return _kept[number]


def _keep(e: Expr) -> int:
    _kept[id(e)] = e
    return id(e)


# What traced functions call lies in a module, whose attributes torch.compile reads when it needs them.
shelf = types.ModuleType("shelf")


def shelve(value: Any) -> str:
    """The name under which `value` now lies on the shelf."""
    name = f"x{id(value)}"
    setattr(shelf, name, value)
    return name


@constant_in_graphs
def _dim_of(number: int) -> int:
    return numbered(number).dim


@constant_in_graphs
def _op_of(number: int) -> str:
    return numbered(number).op


@constant_in_graphs
def _traced_build(name: str, operands: Shape, places: tuple[Shape | None, ...], params: tuple[Any, ...]) -> int:
    return _keep(_build(name, tuple(map(numbered, operands)), places, params))


_ATOMS: dict[str, Callable[..., Expr]] = {"Var": variable, "Const": const, "Index": index}


@constant_in_graphs
def _traced_atom(name: str, numbers: tuple[int, ...]) -> int:
    return _keep(_ATOMS[name](*numbers))


def atom(name: str, *numbers: int) -> Any:
    """A variable (position, dim, category), a whole constant or an index (category)."""
    if torch.compiler.is_compiling():
        return Traced(_traced_atom(name, numbers))
    return _ATOMS[name](*numbers)


def build(name: str, operands: tuple[Any, ...], places: tuple[Shape | None, ...], params: tuple[Any, ...] = ()) -> Any:
    """name(*operands; *params), each operand's leaves renumbered by its entry of `places`.

    "Same" is the operand itself, "Swap" the operand with i and j exchanged.
    """
    if torch.compiler.is_compiling():
        return Traced(_traced_build(name, tuple([number_of(e) for e in operands]), places, params))
    return _build(name, operands, places, params)


@lru_cache(maxsize=8192)
def _build(name: str, operands: tuple[Expr, ...], places: tuple[Shape | None, ...], params: tuple[Any, ...]) -> Expr:
    args = [e if p is None else renumber(e, p) for e, p in zip(operands, places, strict=True)]
    if name in ("Same", "Swap"):
        return args[0] if name == "Same" else swap_roles(args[0])
    return builders[name](*args, *params)


@lru_cache(maxsize=8192)
def renumber(expr: Expr, places: Shape) -> Expr:
    """Leaf p becomes leaf places[p]."""
    table = {n: variable(places[n.params[0]], n.dim, n.params[1]) for n in walk(expr) if n.op == "Var"}
    return substitute(expr, table)


@lru_cache(maxsize=1024)
def swap_roles(expr: Expr) -> Expr:
    """F_ji as an expression: i and j exchanged."""
    table = {}
    for n in walk(expr):
        if n.op == "Var" and n.params[1] != PARAMETER:
            table[n] = variable(n.params[0], n.dim, 1 - n.params[1])
        elif n.op == "Index":
            table[n] = index(1 - n.params[0])
    return substitute(expr, table)


def text_of(expr: Expr, limit: int = 400) -> str:
    """The formula with its variables named x0, x1 ..., cut where it is long."""
    done: dict[Expr, str] = {}
    for n in walk(expr):
        if n.op == "Var":
            text = f"x{n.params[0]}"
        elif n.op == "Index":
            text = "ij"[n.params[0]]
        elif n.op == "Const":
            text = ", ".join(f"{p:.6g}" for p in n.params)
            text = text if len(n.params) == 1 else f"[{text}]"
        else:
            text = f"{n.op}({', '.join([*(done[a] for a in n.args), *map(str, n.params)])})"
        done[n] = text if len(text) <= limit else text[: limit - 3] + "..."
    return done[expr]
