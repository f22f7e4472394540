"""Rewriting: pairs (pattern, replacement), run bottom-up until nothing changes. Each keeps every finite value.

Values may differ by rounding, and a reassociated product may over- or underflow where the original did not, as in any
compiler that is allowed to factor. Otherwise no rule makes an infinity or nan of finite operands vanish or appear,
except that 0 * x is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from pullback.kernels.ir.expr import Expr, const, is_const, rebuild, walk
from pullback.kernels.ir.primitives import PRIMITIVES, op
from pullback.kernels.ir.structure import STRUCTURES

WIDE = 5  # dimension that stands for "a vector" in patterns


class _Any(int):
    """An integer parameter in a pattern that matches every parameter."""


_N = _Any(WIDE)


def _wild(name: str, dim: int) -> Expr:
    """Matches any expression (dim 1 in patterns), one scalar ("s", "t", "r") or one vector ("v", "w")."""
    return Expr("Wild", (), (name,), dim)


_x, _y, _z = (_wild(n, 1) for n in "xyz")  # anything
_r, _s, _t = (_wild(n, 1) for n in "rst")  # scalars
_v, _w = (_wild(n, WIDE) for n in "vw")  # vectors of more than one component
_c, _d = (_wild(n, 1) for n in "cd")  # constants of moderate size, whose product can be taken beforehand
_o = _wild("o", 1)  # no constant
_f = _wild("f", 1)  # a scalar that is no constant

RULES: list[tuple[Expr, Expr]] = [
    # neutral and absorbing elements
    (_x + 0, _x),
    (0 + _x, _x),
    (_x - 0, _x),
    (0 - _x, -_x),
    (_x * 1, _x),
    (1 * _x, _x),
    (-1 * _x, -_x),
    (_x * 0, const(0)),
    (0 * _x, const(0)),
    (_x / 1, _x),
    (1 / _x, op("Inv", _x)),
    # signs move outwards and vanish
    (op("Minus", -_x), _x),
    (_x + (-_y), _x - _y),
    ((-_x) + _y, _y - _x),
    (_x - (-_y), _x + _y),
    ((-_x) - _y, -(_x + _y)),
    (-(_x - _y), _y - _x),
    ((-_x) * _y, -(_x * _y)),
    (_x * (-_y), -(_x * _y)),
    ((-_x) / _y, -(_x / _y)),
    (_x / (-_y), -(_x / _y)),
    (op("Inv", -_x), -op("Inv", _x)),
    (op("Square", -_x), op("Square", _x)),
    (op("Abs", -_x), op("Abs", _x)),
    (op("Abs", op("Abs", _x)), op("Abs", _x)),
    (op("Cos", -_x), op("Cos", _x)),
    (op("Sum", -_x), -op("Sum", _x)),
    (-(_c * _x), (-_c) * _x),
    # powers
    (_x * _x, op("Square", _x)),
    (op("Pow", _x, 0), const(1)),
    (op("Pow", _x, 1), _x),
    (op("Pow", _x, 2), op("Square", _x)),
    (op("Pow", _x, -1), op("Inv", _x)),
    (op("Square", op("Abs", _x)), op("Square", _x)),
    (op("Square", op("Sqrt", op("Sum", op("Square", _x)))), op("Sum", op("Square", _x))),
    # constants first, then scalars, then vectors
    (_o * _c, _c * _o),
    (_c * (_d * _x), (_c * _d) * _x),
    (_f * (_c * _s), _c * (_f * _s)),
    ((_c * _s) * _t, _c * (_s * _t)),
    (_v * (_c * _w), _c * (_v * _w)),
    ((_c * _v) * _w, _c * (_v * _w)),
    (_s * (_t * _v), (_s * _t) * _v),
    (_s * (_v * _t), (_s * _t) * _v),
    ((_t * _v) * _s, (_s * _t) * _v),
    ((_v * _t) * _s, (_s * _t) * _v),
    # scalars leave sums over components
    (op("Sum", _s), _s),
    (op("Sum", _s * _v), _s * op("Sum", _v)),
    (op("Sum", _v * _s), _s * op("Sum", _v)),
    (op("Sum", _v / _s), op("Sum", _v) / _s),
    (op("Sum", (_s * _v) * _w), _s * op("Sum", _v * _w)),
    (op("Sum", (_v * _s) * _w), _s * op("Sum", _v * _w)),
    (op("Sum", _v * (_s * _w)), _s * op("Sum", _v * _w)),
    (op("Sum", _v * (_w * _s)), _s * op("Sum", _v * _w)),
    (op("Sum", op("Square", _c * _v)), op("Square", _c) * op("Sum", op("Square", _v))),
    # choices
    (op("Where", _x, _y, _y), _y),
    (op("IfElse", _x, _y, _y), _y),
    (op("Maximum", _x, _x), _x),
    (op("Minimum", _x, _x), _x),
]


def _by_operation(rules: list[tuple[Expr, Expr]]) -> dict[str, list[tuple[Expr, Expr]]]:
    table: dict[str, list[tuple[Expr, Expr]]] = {}
    for pattern, replacement in rules:
        table.setdefault(pattern.op, []).append((pattern, replacement))
    return table


def _matches(name: str, e: Expr) -> bool:
    """Whether the wildcard `name` accepts `e`."""
    if name in "cd":
        return e.op == "Const" and e.dim == 1 and (e.params[0] == 0 or 1e-15 < abs(e.params[0]) < 1e15)
    if name in "of" and e.op == "Const":
        return False
    return e.dim == 1 if name in "rstf" else e.dim > 1 if name in "vw" else True


def _match(pattern: Expr, e: Expr, bound: dict[Expr, Expr]) -> bool:
    if pattern.op == "Wild":
        return bound.setdefault(pattern, e) is e and _matches(pattern.params[0], e)
    if pattern.op == "Const":
        return is_const(e, pattern.params[0])
    return (
        pattern.op == e.op
        and (pattern.params == e.params or _N in pattern.params)
        and len(pattern.args) == len(e.args)
        and all(_match(p, a, bound) for p, a in zip(pattern.args, e.args, strict=True))
    )


def _instance(replacement: Expr, bound: dict[Expr, Expr]) -> Expr:
    if replacement.op == "Wild":
        return bound[replacement]
    return rebuild(replacement, tuple(_instance(a, bound) for a in replacement.args))


# Rules that compute: (operation or "" for all, function of the node -> Expr or None) ------------------------------


def _fold(node: Expr) -> Expr | None:
    """An operation on constants is a constant."""
    if not node.args or any(a.op != "Const" for a in node.args):
        return None
    values = [torch.tensor(a.params, dtype=torch.float64) for a in node.args]
    if node.op in PRIMITIVES:
        y = PRIMITIVES[node.op].torch(*values, *node.params)
    else:
        y = STRUCTURES[node.op].torch(values, node.params)
    return None if y.isnan().any() else const(*y.expand(node.dim).tolist())


def _unreplicate(node: Expr) -> Expr | None:
    """f(SumT(s), v) = f(s, v), f(SumT(s)) = SumT(f(s)); the same for a constant vector of equal components."""
    if node.op not in PRIMITIVES or node.dim == 1:
        return None
    args = tuple(map(_narrow, node.args))
    return None if args == node.args else rebuild(node, args)


def _narrow(a: Expr) -> Expr:
    if a.op == "SumT":
        return a.args[0]
    return const(a.params[0]) if a.op == "Const" and a.dim > 1 and is_const(a, a.params[0]) else a


def _power_of_two(node: Expr) -> Expr | None:
    """Dividing by a power of two is multiplying by its inverse, exactly."""
    a, b = node.args
    if b.op == "Const" and b.dim == 1 and math.frexp(abs(b.params[0]))[0] == 0.5 and 2**-60 < abs(b.params[0]) < 2**60:
        return const(1 / b.params[0]) * a
    return None


def _gather(node: Expr) -> Expr | None:
    (a,), (where,) = node.args, node.params
    if where == tuple(range(a.dim)):
        return a
    if a.op == "Gather":
        return op("Gather", a.args[0], tuple(a.params[0][k] for k in where))
    if a.op == "SumT":
        return op("SumT", a.args[0], len(where))
    if a.op == "Concat":
        start = 0
        for part in a.args:
            stop = start + part.dim
            if all(start <= k < stop for k in where):
                return op("Gather", part, tuple(k - start for k in where))
            start = stop
    if a.op in PRIMITIVES and len(where) == 1:  # one component needs one component of the operands
        return rebuild(a, tuple(op("Gather", b, where) if b.dim > 1 else b for b in a.args))
    if a.op == "Scatter":  # if every place holds exactly one component, or none
        places, _ = a.params
        if all(places.count(k) == 1 for k in where):
            return op("Gather", a.args[0], tuple(places.index(k) for k in where))
        if not any(k in places for k in where):
            return const(*([0.0] * len(where)))
    return None


def _sum(node: Expr) -> Expr | None:
    (a,) = node.args
    if a.op == "SumT":
        return a.dim * a.args[0]
    if a.op == "Mult":  # with a multiple of a unit vector
        for c, other in (a.args, a.args[::-1]):
            places = [k for k, value in enumerate(c.params) if value] if c.op == "Const" and c.dim > 1 else ()
            if len(places) == 1:
                k = places[0]
                return c.params[k] * (op("Gather", other, (k,)) if other.dim > 1 else other)
    return op("Sum", a.args[0]) if a.op == "Scatter" else None


COMPUTED: list[tuple[str, Callable[[Expr], Expr | None]]] = [
    ("", _fold),
    ("", _unreplicate),
    ("Divide", _power_of_two),
    ("Gather", _gather),
    ("Scatter", lambda node: node.args[0] if node.params[0] == tuple(range(node.dim)) else None),
    ("SumT", lambda node: node.args[0] if node.dim == 1 else None),
    ("Sum", _sum),
    ("Concat", lambda node: node.args[0] if len(node.args) == 1 else None),
    ("Where", lambda node: node.args[1 + (node.args[0].params[0] == 0)] if _scalar_const(node.args[0]) else None),
]


def _scalar_const(e: Expr) -> bool:
    return e.op == "Const" and e.dim == 1


_TABLE = _by_operation(RULES)


def _candidates(node: Expr) -> Iterator[Expr | None]:
    for name, function in COMPUTED:
        if name in ("", node.op):
            yield function(node)
    for pattern, replacement in _TABLE.get(node.op, ()):
        bound: dict[Expr, Expr] = {}
        if _match(pattern, node, bound):
            yield _instance(replacement, bound)


def step(node: Expr) -> Expr | None:
    """The first rewriting of the node itself that applies, brought to its dimension; None if there is none."""
    for found in _candidates(node):
        if found is not None and found is not node:
            return found if found.dim == node.dim else op("SumT", found, node.dim)
    return None


LARGEST = 200  # nodes up to which rewriting is worth its 50 us a node


def shortened(root: Expr) -> Expr:
    """`simplify(root)` where that is quick; large graphs as they are (the scalar code is simplified in any case)."""
    return simplify(root) if sum(1 for _ in walk(root)) <= LARGEST else root


@lru_cache(maxsize=1024)
def simplify(root: Expr) -> Expr:
    """`root` rewritten, operands first, until no rule applies."""
    done: dict[Expr, Expr] = {}
    rewritten: dict[Expr, Expr] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node in rewritten and rewritten[node] in done:
            done[node] = done[rewritten[node]]
        waiting = [a for a in node.args if a not in done] if node not in done else []
        if waiting:
            stack.extend(waiting)
        elif node in done:
            stack.pop()
        else:
            current = rebuild(node, tuple(done[a] for a in node.args))
            found = current if current is not node else step(node)
            if found is None:
                done[node] = node
            else:
                rewritten[node] = found
                stack.append(found)
    return done[root]
