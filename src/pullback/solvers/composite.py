"""Composite problems min_x D(A x) + sum_i g_i(K_i x) + h(x): their terms, steps, and what their solutions satisfy.

D(v) is |v - y|^2 / 2 unless another data term is given; h is the term that acts on x itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from pullback.solvers.iterate import Outcome, code
from pullback.solvers.members import GROWTH
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Equation
from pullback.solvers.scalars import Number, larger, ratio, where
from pullback.solvers.status import Status


@dataclass
class Block:
    """One g(K x): g through its conjugate prox, K through its application."""

    op: LinearOperator
    g: Functional
    n: int  # axes of a member of K x
    given: float | None = None  # the bound, if it is known

    def __post_init__(self) -> None:
        adjoint = self.op.H
        # `_run` skips the checks of a call, and the copy that protects the input of operators which may return it.
        self.push: Callable[[Tensor], Tensor] = self.op if self.op._aliases else self.op._run
        self.back: Callable[[Tensor], Tensor] = adjoint if adjoint._aliases else adjoint._run

    @property
    def bound(self) -> float:
        """A number >= |K|. It may cost applications, which equations must not make: they run inside of vmap, too."""
        return self.op.norm_bound() if self.given is None else self.given

    def pull(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """K^H q in the dtype of x; its real part where x is real, which is the adjoint of K on real vectors."""
        v = self.back(q)
        v = v.real if v.is_complex() and not dtype.is_complex else v
        return v if v.dtype == dtype else v.to(dtype)


def as_terms(owner: str, regularizer: Any, name: str = "regularizer") -> list[Functional]:
    """A functional, a sum, a list of functionals or None as the list of its terms."""
    parts = [] if regularizer is None else [regularizer] if isinstance(regularizer, Functional) else regularizer
    if not isinstance(parts, Sequence) or not all(isinstance(f, Functional) for f in parts):
        example = "pullback.Box(0, None)" if name == "constraint" else "0.1 * pullback.TV(dims)"
        raise ArgumentError(
            f"{owner}: {name} must be a functional such as {example}, or a list of them; "
            f"got {type(regularizer).__name__}"
        )
    return [t for f in parts for t in f.terms]


def gather(owner: str, regularizer: Any, constraint: Any, name: str = "regularizer") -> list[Functional]:
    """The terms of a regularizer and of a constraint."""
    return as_terms(owner, regularizer, name) + as_terms(owner, constraint, "constraint")


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
    if parts.get("step") is not None and parts["step"] != "search":
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


def split(problem: Problem, whole: bool = False) -> tuple[Functional | None, list[Block]]:
    """h, the term (or pair of terms) that is taken through its prox on x, and the others as blocks.

    With `whole` all terms act on x itself, through a prox of their own, as that of TV.
    Raises: ArgumentError if one of them has no prox.
    """
    terms = terms_of(problem)
    for f in terms:
        if not (f if whole else f.outer).has_prox:
            raise ArgumentError(
                f"{problem.owner}: {f if whole else f.outer!r} has no prox; "
                + (
                    "use pullback.condat_vu or pullback.pdhg"
                    if whole
                    else "write it as a sum of functionals that have one"
                )
            )
    direct = [t for t in terms if whole or t.operator is None]
    rest = [t for t in terms if not whole and t.operator is not None]
    if len(direct) == 2 and Sum(*direct).has_prox:
        direct = [Sum(*direct)]
    direct.sort(key=lambda t: not t.is_box)  # hard constraints first: then every x is feasible
    h = direct[0] if direct else None
    return h, [
        *(Block(Identity(problem.A.dims), f, problem.n_x) for f in direct[1:]),
        *(as_block(problem, f) for f in rest),
    ]


def as_block(problem: Problem, f: Functional) -> Block:
    """A term as g after K."""
    op = Identity(problem.A.dims) if f.operator is None else f.operator
    return Block(op, f.outer, len(op.dimsd))


class DataTerm:
    """D(v), v = A x: value, gradient, proxes, and where it is smooth its Lipschitz constant."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        data: Any = problem.parts.get("data")
        self.f: Functional | None = None if data is None else data.about(problem.y)
        self.lipschitz: Any = 1.0 if self.f is None else self.f.lipschitz
        self.smooth = is_finite(self.lipschitz)

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

    def prox(self, v: Tensor, step: Any) -> Tensor:
        """argmin_u D(u) + |u - v|^2 / (2 step)."""
        if self.f is None:
            return (v + step * self.problem.y) / (1 + step)
        return self.f._prox(v, step, self.problem.n_y)

    def conjugate_prox(self, v: Tensor, sigma: Any) -> Tensor:
        """argmin_u D*(u) + |u - v|^2 / (2 sigma); v may be overwritten."""
        pb = self.problem
        if self.f is not None:
            return self.f._conjugate_prox(v, sigma, pb.n_y)
        v = add_scaled(v, -sigma, pb.y, pb.own(v))
        return torch.mul(v, 1 / (1 + sigma), out=pb.own(v))

    def conjugate(self, q: Tensor) -> Number:
        """D*(q) of each member. Raises: ArgumentError where it is not known."""
        pb = self.problem
        if self.f is not None:
            return as_number(pb, self.f._conjugate_value(q, pb.n_y))
        size = pb.norm(q, pb.n_y)
        return size * size / 2 + pb.dot(q, pb.y, pb.n_y)

    def require_smooth(self) -> None:
        """Raise unless D has a Lipschitz gradient."""
        if not self.smooth:
            raise ArgumentError(
                f"{self.problem.owner}: the data term {self.f!r} has no Lipschitz gradient; use pullback.pdhg or "
                f"pullback.admm, which take it through its prox"
            )

    def require_quadratic(self) -> None:
        """Raise unless D(v) = |v - y|^2 / 2."""
        if self.f is not None:
            raise ArgumentError(
                f"{self.problem.owner}: data_term must be None, |A x - y|^2 / 2, because the method solves its normal "
                f"equations; got {self.f!r}; use pullback.admm, pullback.pdhg or pullback.solve"
            )


def is_finite(c: Any) -> bool:
    """Whether a number, or all of a tensor, is finite."""
    return bool(torch.isfinite(c).all()) if isinstance(c, Tensor) else c < float("inf")


def as_number(problem: Problem, value: Tensor) -> Number:
    """A value of each member, as a float if there is one."""
    return float(value) if problem.single else value


def report(
    problem: Problem, data: DataTerm, v: Tensor, terms: Sequence[tuple[Functional, Tensor, int]]
) -> dict[str, Number]:
    """What goes into the history at x: |v - y| and D(v) + sum_i g_i(u_i), for v = A x and (g_i, u_i, axes) in terms."""
    with problem.quiet:
        residual = problem.norm(v - problem.y, problem.n_y)
        objective = residual * residual / 2 if data.f is None else data.value(v)
        for g, u, n in terms:
            objective = objective + as_number(problem, g._value(u, n))
    return {"residual": residual, "objective": objective}


def ceiling(problem: Problem, residual: Number) -> Number:
    """A residual above it is divergence."""
    first = GROWTH * larger(residual, problem.norm(problem.y, problem.n_y))
    return where(first > 0, first, math.inf)


def above(residual: Number, bound: Number) -> Any:
    """The verdict on a residual and its ceiling."""
    return where(residual > bound, code(Status.DIVERGED), 0)


def default_step(problem: Problem) -> Any:
    """The step that was given, or 1 / (L norm_bound^2), which is at most the inverse Lipschitz constant of D(A x)."""
    step = problem.parts.get("step")
    if step is not None:
        return problem.number(step, "step", positive=True)
    bound = smoothness(problem)
    return where(bound > 0, ratio(1.0, bound), 1.0) if isinstance(bound, Tensor) else (1 / bound if bound > 0 else 1.0)


@torch.no_grad()
def smoothness(problem: Problem) -> Any:
    """A Lipschitz constant of the gradient of D(A x): L norm_bound^2. Raises ArgumentError where D is not smooth."""
    data = DataTerm(problem)
    data.require_smooth()
    bound = problem.A.norm_bound() ** 2 * data.lipschitz
    return float(bound) if problem.single else bound


# The equations of the solution --------------------------------------------------------------------------------------


def optimality(problem: Problem, whole: bool = False) -> Equation | None:
    """The fixed point that all methods for composite problems share, whatever their iterations; None if not convex.

        x = prox_{tau h}(x - tau (A^H grad D(A x) + sum_i K_i^H q_i)),    q_i = prox_{sigma g_i*}(q_i + sigma K_i x)

    Blocks exist where the last state of a method has `duals`, in the order of `split`; otherwise all terms act through
    their prox on x. A data term that is not smooth is one more block, K = A, whose dual the state holds as `data_dual`.
    The derivatives need x to be unique; q need not be.
    """
    data: Any = problem.parts.get("data")
    if not all(f.convex for f in (*terms_of(problem), *(() if data is None else (data,)))):
        return None
    steps: dict[str, Any] = {}  # any positive steps give the same fixed point; these are well conditioned

    def pieces(p: Problem) -> tuple[DataTerm, Functional | None, list[Block]]:
        data = DataTerm(p)
        h, blocks = split(p, whole) if steps["duals"] else (direct_term(p), [])
        if not data.smooth:
            assert data.f is not None
            blocks.insert(0, Block(p.A, data.f, p.n_y))
        return data, h, blocks

    def state(p: Problem, outcome: Outcome) -> Tensor:
        duals = getattr(outcome.state, "duals", None)
        steps["duals"] = duals is not None
        data, _, blocks = pieces(p)
        inner = p.A.norm_bound() ** 2 * data.lipschitz if data.smooth else 0.0
        inner = float(inner.max()) if isinstance(inner, Tensor) else inner
        total = sum(b.bound**2 for b in blocks)
        bound = max(inner, total**0.5) or 1.0
        steps["tau"], steps["sigma"] = 1 / bound, [(bound / total if total else 1.0) for _ in blocks]
        known = [] if data.smooth else [outcome.state.data_dual]
        return _join([outcome.x, *known, *(duals or [])], [p.n_x, *(b.n for b in blocks)])

    def residual(p: Problem, s: Tensor) -> Tensor:
        data, h, blocks = pieces(p)
        likes = [(p.x_dtype, p.A.dims), *((b.op._out_dtype(p.x_dtype, False), b.op.dimsd) for b in blocks)]
        x, *duals = _part(s, likes)
        pulls = [b.pull(q, p.x_dtype) for b, q in zip(blocks, duals, strict=True)]
        if data.smooth:
            pulls.append(p.adjoint(data.grad(p.A(x))).to(p.x_dtype))
        u = x - steps["tau"] * sum(pulls[1:], pulls[0])
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
