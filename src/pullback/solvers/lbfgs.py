"""L-BFGS: smooth objectives, with the curvature of the last steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.functionals import Functional
from pullback.solvers.descent import Descent, DescentState, smooth_problem
from pullback.solvers.nonlinear import minimiser
from pullback.solvers.problem import add_scaled
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, detach, ratio, root, where
from pullback.solvers.status import Solution


@dataclass
class _State(DescentState):
    steps: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)  # of the gradient
    weights: list[Number] = field(default_factory=list)  # 1 / <step, change>; 0: the pair is not used
    inverse: Number = 1.0  # what the inverse Hessian is taken for before the pairs act


class LBFGS(Descent):
    """The recursion of `lbfgs`."""

    state = _State

    def direction(self, state: _State) -> tuple[Tensor, Number]:
        """-H g, by two loops over the pairs."""
        pb, n = self.problem, self.problem.n_x
        q = state.g.clone()
        pairs = list(zip(state.steps, state.changes, state.weights, strict=True))
        first: list[Number] = []
        for s, y, weight in reversed(pairs):
            c = weight * pb.dot(s, q, n)
            q = add_scaled(q, pb.x_scalar(-c), y, pb.own(q))
            first.append(c)
        q = q * pb.x_scalar(-state.inverse)
        for (s, y, weight), c in zip(pairs, reversed(first), strict=True):
            q = add_scaled(q, pb.x_scalar(-c - weight * pb.dot(y, q, n)), s, pb.own(q))
        return q, pb.fill(1.0)

    def learn(self, state: _State, p: Tensor, step: Tensor, g: Tensor, t: Number) -> None:
        """Keep the pair of a member if it has positive curvature; forget all pairs where no step was found."""
        pb, n = self.problem, self.problem.n_x
        change = g - state.g
        curvature, size = pb.dot(step, change, n), pb.square(change, n)
        good = detach(curvature) > pb.eps * pb.norm(step, n) * root(detach(size))
        weight = where(good, ratio(pb.fill(1.0), where(good, curvature, pb.fill(1.0)), pb.live), pb.fill(0.0))
        state.steps.append(step)
        state.changes.append(change)
        state.weights = [where(t == 0, 0.0 * w, w) for w in state.weights] + [weight]
        state.inverse = where(good, ratio(curvature, size, pb.live), state.inverse)
        if len(state.steps) > pb.parts["memory"]:
            del state.steps[0], state.changes[0], state.weights[0]


def lbfgs(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    x0: Any = None,
    memory: int = 10,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A(x)) + sum_i g_i(x), all smooth, by limited-memory BFGS with a strong Wolfe line search.

    D(v) is |v - y|^2 / 2 unless a data term is given. For a bare function see `minimize`.

    Args:
        A: an Operator, linear or not, or a function of x (then all of x and all of y are one member).
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer: a smooth functional, or a sum or list of them: `0.1 * SquaredL2()`, `Huber(0.1) @ Gradient(dims)`.
            Those without gradient, as L1 and Box, need `fista` or `pdhg`; bounds as well.
        data_term: a smooth functional of A(x) - y such as `Huber(0.1)`, or `KullbackLeibler()`.
        x0: where to start, of shape (..., *A.dims); must be given if A is not linear, else zero if None. Complex x
            needs a complex x0.
        memory: pairs of vectors kept.
        maxiter, rtol, atol: stop when |gradient| <= max(rtol |gradient at x0|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`. Implicit derivatives solve with the Hessian at x by `cg`, so it
            must be positive definite there. With unroll=True step lengths count as constants.

    Returns: Solution with history "objective" and "gradient" (its norm). Where rounding allows no progress it stops
        with the status PRECISION; where no step lowers the objective, which is then not smooth, with BREAKDOWN.
    Raises: ShapeError, DtypeError, ArgumentError; NotDifferentiableError where a term has no gradient or A hides a
        tensor that requires grad.
    Cost: about one value and gradient an iteration; 2 memory + 5 vectors.
    Source: Liu & Nocedal 1989, doi 10.1007/BF01589116.
    """
    check_memory("lbfgs", memory)
    unroll = bool(options.get("unroll"))
    problem = smooth_problem("lbfgs", A, y, regularizer, data_term, x0, unroll, memory=memory)
    return run(problem, LBFGS, minimiser, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def check_memory(owner: str, memory: Any) -> None:
    """Raise unless it is an int >= 1."""
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ArgumentError(f"{owner}: memory must be an int >= 1; got {memory!r}")
