"""Check that an Expr is well formed: what every pass must leave behind. Tests run it after each."""

from __future__ import annotations

from pullback.core.errors import PullbackError
from pullback.kernels.ir.expr import PARAMETER, ROLE, Expr, I, J, builders, walk
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.ir.structure import STRUCTURES


def verify(*roots: Expr) -> None:
    """Raise AssertionError, with the node, where an operation, a dimension, a role or a parameter is wrong."""
    positions: dict[int, Expr] = {}
    for node in walk(*roots):
        if node.op == "Var":
            position, category = node.params
            good = category in (I, J, PARAMETER) and node.dim >= 1 and positions.setdefault(position, node) is node
            roles = ROLE[category] if good else -1
        elif node.op == "Index":
            good, roles = node.dim == 1 and node.params[0] in (I, J), ROLE[node.params[0]]
        elif node.op == "Const":
            good, roles = len(node.params) == node.dim and all(type(p) is float for p in node.params), 0
        else:
            good, roles = _rebuilds(node), 0
            for a in node.args:
                roles |= a.roles
        assert good and node.roles == roles, f"malformed node {node!r}; please report"


def _rebuilds(node: Expr) -> bool:
    """Whether the table builds the same node of the same operands."""
    if node.op not in PRIMITIVES and node.op not in STRUCTURES:
        return False
    try:
        return builders[node.op](*node.args, *node.params) is node
    except PullbackError:
        return False
