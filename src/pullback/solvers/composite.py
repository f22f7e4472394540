"""Composite problems min_x D(A x) + sum_i g_i(K_i x) + h(x): their terms, steps, and what their solutions satisfy.

D(v) is |v - y|^2 / 2 unless another data term is given; h is the term that acts on x itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.functionals import Functional, SquaredL2
from pullback.functionals.base import Sum
from pullback.linops import Identity
from pullback.solvers.gmres import gmres
from pullback.solvers.iterate import Outcome
from pullback.solvers.problem import Problem
from pullback.solvers.run import Equation
from pullback.solvers.scalars import Number


@dataclass
class Block:
    """One g(K x): g through its conjugate prox, K through its application."""

    op: LinearOperator
    g: Functional
    n: int  # axes of a member of K x
    bound: float  # >= |K|


def as_terms(owner: str, regularizer: Any, name: str = "regularizer") -> list[Functional]:
    """A functional, a sum, a list of functionals or None as the list of its terms."""
    parts = [] if regularizer is None else [regularizer] if isinstance(regularizer, Functional) else regularizer
    if not isinstance(parts, Sequence) or not all(isinstance(f, Functional) for f in parts):
        raise ArgumentError(
            f"{owner}: {name} must be a functional such as 0.1 * pullback.TV(dims), or a list of them; "
            f"got {type(regularizer).__name__}"
        )
    return [t for f in parts for t in f.terms]


def composite(
    owner: str, A: Any, y: Any, x0: Any, terms: Sequence[Functional], data_term: Functional | None = None, **parts: Any
) -> Problem:
    """The problem with its terms as parts "term0", "term1" ..., "data" for D, and a "step" if there is one.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    if data_term is not None and not isinstance(data_term, Functional):
        raise ArgumentError(
            f"{owner}: data_term must be a functional of A x - y such as pullback.Huber(0.1), or "
            f"pullback.KullbackLeibler(); got {type(data_term).__name__}"
        )
    if type(data_term) is SquaredL2 and data_term.b is None:
        data_term = None
    named = {f"term{i}": f for i, f in enumerate(terms)}
    problem = Problem(owner, A, y, x0, data=data_term, **named, **parts)
    for f in terms:
        if f.dims is not None and f.dims != problem.A.dims:
            raise ShapeError(f"{owner}: {f!r} acts on dims {f.dims}, but A's input has dims {problem.A.dims}")
    if parts.get("step") is not None:
        problem.number(parts["step"], "step", positive=True)
    return problem


def terms_of(problem: Problem) -> list[Functional]:
    """The g_i o K_i and h."""
    return [part for name, part in problem.parts.items() if name.startswith("term")]


def direct_term(problem: Problem, name: str = "g") -> Functional | None:
    """All terms as one functional whose prox can be computed; None if there is no term.

    Raises: ArgumentError.
    """
    terms = terms_of(problem)
    if not terms:
        return None
    g = terms[0] if len(terms) == 1 else Sum(*terms)
    if not g.has_prox:
        raise ArgumentError(f"{problem.owner}: {name} = {g!r} has no prox; use pullback.pdhg or pullback.solve")
    return g


def split(problem: Problem) -> tuple[Functional | None, list[Block]]:
    """h, the term (or pair of terms) that is taken through its prox on x, and the others as blocks.

    Raises: ArgumentError if one of them has no prox.
    """
    terms = terms_of(problem)
    for f in terms:
        if not f.outer.has_prox:
            raise ArgumentError(
                f"{problem.owner}: {f.outer!r} has no prox; write it as a sum of functionals that have one"
            )
    direct = [t for t in terms if t.operator is None]
    rest = [t for t in terms if t.operator is not None]
    if len(direct) == 2 and Sum(*direct).has_prox:
        direct = [Sum(*direct)]
    direct.sort(key=lambda t: not t.is_box)  # hard constraints first: then every x is feasible
    h = direct[0] if direct else None
    return h, [as_block(problem, f) for f in (*direct[1:], *rest)]


def as_block(problem: Problem, f: Functional) -> Block:
    """A term as g after K."""
    op = Identity(problem.A.dims) if f.operator is None else f.operator
    return Block(op, f.outer, len(op.dimsd), op.norm_bound())


class DataTerm:
    """D(v), v = A x: value, gradient, and where it is smooth its Lipschitz constant."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        data: Any = problem.parts.get("data")
        self.f: Functional | None = None if data is None else data.about(problem.y)

    @property
    def lipschitz(self) -> Any:
        """That of the gradient of D; inf where D is not smooth."""
        return 1.0 if self.f is None else self.f.lipschitz

    def value(self, v: Tensor) -> Number:
        """D(v) of each member."""
        pb = self.problem
        if self.f is not None:
            value = self.f._value(v, pb.n_y)
            return float(value) if pb.single else value
        size = pb.norm(v - pb.y, pb.n_y)
        return size * size / 2

    def grad(self, v: Tensor) -> Tensor:
        """The gradient of D at v."""
        return v - self.problem.y if self.f is None else self.f._grad(v, self.problem.n_y)

    def require_smooth(self) -> None:
        """Raise unless D has a Lipschitz gradient."""
        if not _is_finite(self.lipschitz):
            raise ArgumentError(
                f"{self.problem.owner}: the data term {self.f!r} has no Lipschitz gradient; use pullback.pdhg, which "
                f"takes it through its conjugate prox"
            )


def _is_finite(c: Any) -> bool:
    return bool(torch.isfinite(c).all()) if isinstance(c, Tensor) else c < float("inf")


@torch.no_grad()
def default_step(problem: Problem) -> Any:
    """The step that was given, or 1 / (L norm_bound^2), which is at most the inverse Lipschitz constant of D(A x)."""
    step = problem.parts.get("step")
    if step is not None:
        return problem.number(step, "step", positive=True)
    data = DataTerm(problem)
    data.require_smooth()
    bound = problem.A.norm_bound() ** 2 * data.lipschitz
    return 1 / bound if bound > 0 else 1.0


# The equations of the solution --------------------------------------------------------------------------------------


def optimality(problem: Problem) -> Equation:
    """The fixed point that all methods for composite problems share, whatever their iterations.

        x = prox_{tau h}(x - tau (A^H grad D(A x) + sum_i K_i^H q_i)),    q_i = prox_{sigma g_i*}(q_i + sigma K_i x)

    Blocks exist where the last state of a method has `duals`, in the order of `split`; otherwise all terms act through
    their prox on x. Its derivatives need x to be unique; q need not be.
    """
    steps: dict[str, Any] = {}  # any positive steps give the same fixed point; these are well conditioned

    def pieces(p: Problem) -> tuple[Functional | None, list[Block]]:
        return split(p) if steps["duals"] else (direct_term(p), [])

    def state(p: Problem, outcome: Outcome) -> Tensor:
        duals = getattr(outcome.state, "duals", None)
        steps["duals"] = duals is not None
        data = DataTerm(p)
        blocks = pieces(p)[1]
        inner = p.A.norm_bound() ** 2 * data.lipschitz if data.f is None or _is_finite(data.lipschitz) else 0.0
        total = sum(b.bound**2 for b in blocks)
        bound = max(inner, total**0.5) or 1.0
        steps["tau"], steps["sigma"] = 1 / bound, [(bound / total if total else 1.0) for _ in blocks]
        steps["smooth"] = data.f is None or _is_finite(data.lipschitz)
        return _join([outcome.x, *(duals or [])], [p.n_x, *(b.n for b in blocks)])

    def residual(p: Problem, s: Tensor) -> Tensor:
        h, blocks = pieces(p)
        likes = [(p.x_dtype, p.A.dims), *((b.op._out_dtype(p.x_dtype, False), b.op.dimsd) for b in blocks)]
        x, *duals = _part(s, likes)
        data = DataTerm(p)
        w = p.adjoint(data.grad(p.A(x))).to(p.x_dtype)
        for b, q in zip(blocks, duals, strict=True):
            w = w + b.op.H(q).to(p.x_dtype)
        u = x - steps["tau"] * w
        found = [x - (u if h is None else h._prox(u, steps["tau"], p.n_x))]
        for b, q, sigma in zip(blocks, duals, steps["sigma"], strict=True):
            found.append(q - b.g._conjugate_prox(q + sigma * b.op(x), sigma, b.n))
        return _join(found, [p.n_x, *(b.n for b in blocks)])

    def recover(p: Problem, s: Tensor) -> Tensor:
        return _part(s, [(p.x_dtype, p.A.dims)])[0]

    return Equation(residual, gmres, state=state, recover=recover, n=1)


def _join(parts: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    """Tensors as one real vector a member."""
    flat = []
    for t, n in zip(parts, axes, strict=True):
        t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t.unsqueeze(-1)
        flat.append(t.flatten(-n - 1))
    return torch.cat(flat, -1)


def _part(s: Tensor, likes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """The tensors that `_join` has joined."""
    found, start = [], 0
    for dtype, dims in likes:
        shape = (*dims, 2) if dtype.is_complex else dims
        size = 1
        for d in shape:
            size *= d
        t = s[..., start : start + size].unflatten(-1, shape)
        found.append(torch.view_as_complex(t.contiguous()) if dtype.is_complex else t)
        start += size
    return found
