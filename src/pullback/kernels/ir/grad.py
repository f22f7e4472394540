"""Derivatives of expressions are expressions: the pullback e -> (dF/dv)^T e and the pushforward u -> (dF/dv) u.

Both walk the graph once and read one column of the tables; a cotangent or tangent that is zero is not built at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pullback.core.errors import NotDifferentiableError, ShapeError
from pullback.kernels.ir.expr import Expr, builders, const, is_const, walk, zero
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.structure import STRUCTURES


def partials(node: Expr) -> tuple[Expr | None, ...]:
    """`d out / d operand` for each operand of an elementwise node."""
    found = PRIMITIVES[node.op].partials(*node.args, *node.params, node)
    return tuple(None if p is None or is_const(p, 0.0) else p for p in found)


def _times(e: Expr, factor: Expr) -> Expr:
    if is_const(factor, 1.0):
        return e
    return -e if is_const(factor, -1.0) else e * factor


def _fit(e: Expr, dim: int, node_dim: int) -> Expr:
    """A cotangent brought to the dimension of its operand: replicated, or summed if the operand was broadcast."""
    if e.dim < node_dim:
        e = builders["SumT"](e, node_dim)
    return builders["Sum"](e) if dim < node_dim else e


def depends(root: Expr, wanted: Sequence[Expr]) -> set[Expr]:
    """The nodes of `root` that depend on one of `wanted`."""
    found: set[Expr] = set()
    for node in walk(root):
        if node in wanted or any(a in found for a in node.args):
            found.add(node)
    return found


def pullback(cotangents: Mapping[Expr, Expr], wanted: Sequence[Expr]) -> list[Expr | None]:
    """Sum over roots of (d root / d v)^T e for each v of `wanted`, None where it is zero.

    Args:
        cotangents: root -> cotangent of the same dimension. Many roots share one walk.
        wanted: variables (or any nodes) to differentiate by.
    """
    live = set().union(*(depends(root, wanted) for root in cotangents))
    total: dict[Expr, Expr] = {}

    def give(node: Expr, e: Expr) -> None:
        total[node] = total[node] + e if node in total else e

    for root, e in cotangents.items():
        give(root, _fit(e, root.dim, root.dim))
    for node in reversed(list(walk(*cotangents))):
        if node not in total or node not in live or node in wanted:
            continue
        e = total[node]
        if node.op in PRIMITIVES:
            for arg, factor in zip(node.args, partials(node), strict=True):
                if factor is not None and arg in live:
                    give(arg, _fit(_times(e, factor), arg.dim, node.dim))
        elif node.op in STRUCTURES:
            for arg, ea in zip(node.args, STRUCTURES[node.op].pullback(node, e), strict=True):
                if ea is not None and arg in live:
                    give(arg, ea)
        else:
            raise NotDifferentiableError(f"{node.op} has no derivative; please report")
    return [total.get(v) for v in wanted]


def pushforward(roots: Sequence[Expr], tangents: Mapping[Expr, Expr]) -> list[Expr | None]:
    """(d root / d v) u summed over the variables v with tangent u, for each root; None where it is zero."""
    found: dict[Expr, Expr] = dict(tangents)
    for node in walk(*roots):
        if node in found or not any(a in found for a in node.args):
            continue
        if node.op in PRIMITIVES:
            terms = [
                _times(found[a], factor)
                for a, factor in zip(node.args, partials(node), strict=True)
                if factor is not None and a in found
            ]
            if terms:
                t = terms[0]
                for term in terms[1:]:
                    t = t + term
                found[node] = t if t.dim == node.dim else builders["SumT"](t, node.dim)
        else:
            found[node] = STRUCTURES[node.op].pushforward(node, [found.get(a) for a in node.args])
    return [found.get(r) for r in roots]


# Symbolic operators of the formula language -----------------------------------------------------------------------


def _check_dim(name: str, argument: str, e: Expr, dim: int) -> None:
    if e.dim not in (1, dim):
        raise ShapeError(f"{name} expects {argument} of dimension {dim} (or 1); got {e.dim}")


def grad(f: Expr, v: Expr, e: Expr) -> Expr:
    """Grad(f, v, e) = (df/dv)^T e, of the dimension of v."""
    _check_dim("Grad(f, v, e)", "e", e, f.dim)
    (g,) = pullback({f: e}, [v])
    return zero(v.dim) if g is None else g


def diff(f: Expr, v: Expr, u: Expr) -> Expr:
    """Diff(f, v, u) = (df/dv) u, of the dimension of f."""
    _check_dim("Diff(f, v, u)", "u", u, v.dim)
    (t,) = pushforward([f], {v: _fit(u, v.dim, v.dim)})
    return zero(f.dim) if t is None else t


def unit(dim: int, k: int) -> Expr:
    """The unit vector e_k."""
    return const(*(float(n == k) for n in range(dim)))


def grad_matrix(f: Expr, v: Expr) -> Expr:
    """GradMatrix(f, v): d f_a / d v_b at position a * v.dim + b, of dimension f.dim * v.dim."""
    return builders["Concat"](*(grad(f, v, unit(f.dim, k)) for k in range(f.dim)))


def trace(f: Expr, v: Expr, w: Expr | None = None) -> Expr:
    """sum_k w_k M_kk for the Jacobian M of the map v -> f; sum_k w_k M_0k if f is a scalar. `w` is 1 if left out."""
    _check_dim("TraceOperator(f, v, w)", "f", f, v.dim)
    if w is not None:
        _check_dim("TraceOperator(f, v, w)", "w", w, v.dim)
    total: Expr | None = None
    for k in range(v.dim):
        (column,) = pushforward([f], {v: unit(v.dim, k)})
        if column is None:
            continue
        term = column if f.dim == 1 else builders["Gather"](column, (k,))
        if w is not None:
            term = term * (w if w.dim == 1 else builders["Gather"](w, (k,)))
        total = term if total is None else total + term
    return zero(1) if total is None else total


def divergence(f: Expr, v: Expr) -> Expr:
    """Divergence(f, v) = sum_k d f_k / d v_k."""
    if f.dim != v.dim:
        raise ShapeError(f"Divergence(f, v) expects f and v of the same dimension; got {f.dim} and {v.dim}")
    return trace(f, v)


def laplacian(f: Expr, v: Expr) -> Expr:
    """Laplacian(f, v) = sum_k d^2 f / d v_k^2 of a scalar f."""
    if f.dim != 1:
        raise ShapeError(f"Laplacian(f, v) expects a scalar formula; got dimension {f.dim}")
    return divergence(grad(f, v, const(1)), v)


_LINEAR = {"Minus", "Gather", "Scatter", "Sum", "SumT"}  # in their operand
_JOINTLY = {"Add", "Subtract", "Concat"}  # in all operands together
_EACH = {"Mult", "TensorDot"}  # in each operand


def is_linear(f: Expr, v: Expr) -> bool:
    """Whether f is linear in v by its form: f(0) = 0 counts, v^2 / v does not."""
    found: dict[Expr, bool] = {}
    moving = depends(f, [v])
    for node in walk(f):
        linear = [found[a] for a in node.args]
        fixed = [a not in moving for a in node.args]
        if node is v or is_const(node, 0.0):
            found[node] = True
        elif node.op in _LINEAR or node.op in _JOINTLY:
            found[node] = all(linear)
        elif node.op in _EACH:
            found[node] = any(x and y for x, y in zip(linear, reversed(fixed), strict=True))
        elif node.op == "Divide":
            found[node] = linear[0] and fixed[1]
        elif node.op in ("Where", "IfElse"):
            found[node] = fixed[0] and linear[1] and linear[2]
        else:
            found[node] = False
    return found[f]
