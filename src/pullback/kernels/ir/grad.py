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
    """d out / d operand for each operand of an elementwise node."""
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
    """sum over roots of (d root / d v)^T e for each v of `wanted`, None where it is zero.

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


def grad(f: Expr, v: Expr, e: Expr) -> Expr:
    """Grad(f, v, e) = (df/dv)^T e, of the dimension of v."""
    (g,) = pullback({f: e}, [v])
    return zero(v.dim) if g is None else g


def diff(f: Expr, v: Expr, u: Expr) -> Expr:
    """Diff(f, v, u) = (df/dv) u, of the dimension of f."""
    (t,) = pushforward([f], {v: u})
    return zero(f.dim) if t is None else t


def unit(dim: int, k: int) -> Expr:
    """The unit vector e_k."""
    return const(*(float(n == k) for n in range(dim)))


def grad_matrix(f: Expr, v: Expr) -> Expr:
    """GradMatrix(f, v): the transposed Jacobian, d f_a / d v_b at position a * v.dim + b, of dimension f.dim * v.dim."""
    return builders["Concat"](*(grad(f, v, unit(f.dim, k)) for k in range(f.dim)))


def trace(f: Expr, v: Expr, w: Expr | None = None) -> Expr:
    """TraceOperator(f, v, w): tr(diag(w) M) for the matrix M of the map v -> f, linear in v; of 1 M if f is a scalar.

    `w` is a scalar or a vector of dimension v.dim, 1 if left out.
    """
    if f.dim not in (1, v.dim) or (w is not None and w.dim not in (1, v.dim)):
        raise ShapeError(
            f"TraceOperator(f, v, w) expects f and w of dimension 1 or {v.dim}, that of v; got {f.dim}"
            + (f" and {w.dim}" if w is not None else "")
        )
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
        raise ShapeError(f"Laplacian(f, v) expects a scalar formula; {f} has dimension {f.dim}")
    return divergence(grad(f, v, const(1)), v)
