"""The alternating direction method of multipliers, and its relatives split Bregman and half-quadratic splitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.functionals import L1, L21, Functional, SquaredL2
from pullback.functionals.arithmetic import lift
from pullback.linops import Identity
from pullback.solvers.composite import Block, DataTerm, composite, gather, optimality, report, split
from pullback.solvers.inner import Inner, explained
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem, add_scaled
from pullback.solvers.run import Options
from pullback.solvers.scalars import Number, larger, ratio, root, where
from pullback.solvers.status import Solution

_FIRST = 1.0  # rho at the start, over |A|^2: best of 0.01, 0.1 and 1 on deblurring and tomography
_UNEQUAL, _CHANGE = 2.0, 2.0  # rho is doubled or halved where one residual is that much larger than the other
_REFRESH = 50  # iterations after which A x and K_i x are computed anew, not updated
_LAST = 1000  # the last iteration that changes rho, so that the method converges


@dataclass
class _State(State):
    inside: Tensor  # the x of the quadratic subproblem; `x` is its copy in the domain of h
    image: Tensor  # A `inside`
    ku: list[Tensor]  # K_i of it
    copies: list[Tensor]  # z_i
    duals: list[Tensor]  # q_i, those of the blocks of `split`
    direct_dual: Tensor | None  # that of h
    data_dual: Tensor | None  # that of a data term of its own
    penalty: Number


class ADMM:
    """The recursion of `admm`: x; z_i = prox_{g_i / rho_i}(K_i x + q_i / rho_i); q_i += rho_i (K_i x - z_i)."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        parts = problem.parts
        self.relaxation, self.adapt = parts["relaxation"], parts["adapt"]
        self.h, blocks = split(problem)
        self.n_split = len(blocks)
        self.blocks = list(blocks)
        if self.h is not None:
            self.blocks.append(Block(Identity(problem.A.dims), self.h, problem.n_x, 1.0))
        if self.data.f is not None:
            self.blocks.append(Block(problem.A, self.data.f, problem.n_y))
        # The weights make all blocks as strong as each other.
        self.weights = [1 / (b.bound**2 or 1.0) for b in self.blocks]
        pairs = [(w, b.op) for w, b in zip(self.weights, self.blocks, strict=True)]
        known = parts.get("inner")
        reuse = known is not None and known.fits(problem, pairs)
        made = known if reuse else Inner(problem, pairs, with_data=self.data.f is None)
        assert made is not None
        self.inner: Inner = made
        self.pulled = problem.back(problem.y) if self.data.f is None and self.inner.kind != "cg" else None

    def init(self) -> _State:
        """x0, K_i x0 as copies, zero as dual variables."""
        pb = self.problem
        x, r = pb.start()
        image = pb.y - r
        ku = [image if b.op is pb.A else b.op(x) for b in self.blocks]
        duals = [torch.zeros_like(k) for k in ku]
        given = pb.parts["penalty"]
        size = pb.A.norm_bound() ** 2 if self.data.f is None else 1.0
        penalty = pb.fill(_FIRST * size if size > 0 else 1.0) if given is None else pb.number(given, "penalty")
        return _State(
            x, pb.fill(torch.inf), pb.fill(1.0), self._values(x, image, ku), inside=x, image=image, ku=ku,
            copies=[k.clone() for k in ku], **self._named(duals), penalty=pb.fill(1.0) * penalty,
        )  # fmt: skip

    def _named(self, duals: list[Tensor]) -> dict[str, Any]:
        k = self.n_split
        direct = duals[k] if self.h is not None else None
        return {"duals": duals[:k], "direct_dual": direct, "data_dual": duals[-1] if self.data.f is not None else None}

    def _all_duals(self, state: _State) -> list[Tensor]:
        return [*state.duals, *(q for q in (state.direct_dual, state.data_dual) if q is not None)]

    def _advance(self, state: _State, duals: list[Tensor], rhos: list[Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Minimise |A x - y|^2 / 2 + sum_i rho_i |K_i x - z_i + q_i / rho_i|^2 / 2: x, A x and the K_i x."""
        pb = self.problem
        is_cg = self.inner.kind == "cg"
        total: Tensor | None = self.pulled
        if is_cg and self.data.f is None:
            total = pb.back(pb.y - state.image)
        for b, k, z, q, rho in zip(self.blocks, state.ku, state.copies, duals, rhos, strict=True):
            force = torch.sub(z, k) if is_cg else z
            force = torch.mul(force, rho, out=pb.own(force) if is_cg else None)
            part = b.pull(torch.sub(force, q, out=pb.own(force)), pb.x_dtype)
            total = part if total is None else total + part
        assert total is not None, "a problem without terms; please report"
        if is_cg:
            d, image, ku = self.inner.descend(total, state.penalty)
            x = torch.add(state.inside, d, out=pb.own(d))
            if (state.iteration + 1) % _REFRESH:
                ku = [torch.add(k, v, out=pb.own(v)) for k, v in zip(state.ku, ku, strict=True)]
                return x, ku[-1] if image is None else torch.add(state.image, image, out=pb.own(image)), ku
        else:
            x = self.inner.solve(total, state.penalty)
        image = pb.A(x)
        return x, image, [image if b.op is pb.A else b.op(x) for b in self.blocks]

    def step(self, state: _State) -> None:
        """One quadratic subproblem and one prox a term."""
        pb = self.problem
        duals = self._all_duals(state)
        rhos = [lift(state.penalty * w, b.n) for w, b in zip(self.weights, self.blocks, strict=True)]
        x, image, ku = self._advance(state, duals, rhos)
        copies = []
        primal2: Any = 0.0
        reach2: Any = 0.0
        dual2: Any = 0.0
        pull2: Any = 0.0
        for i, (b, k, z, q, rho) in enumerate(zip(self.blocks, ku, state.copies, duals, rhos, strict=True)):
            v = k if self.relaxation == 1 else torch.lerp(z, k, self.relaxation)
            v = add_scaled(v, 1 / rho, q, None if v is k else pb.own(v))
            new = b.g._prox(v, 1 / rho, b.n)
            v = torch.sub(v, new, out=pb.own(v))
            duals[i] = torch.mul(v, rho, out=pb.own(v))
            copies.append(new)
            with torch.no_grad():
                w = self.weights[i]
                turn = torch.sub(new, z, out=pb.own(z))
                shift, force = state.penalty * w * pb.norm(turn, b.n), pb.norm(duals[i], b.n)
                gap = pb.norm(torch.sub(k, new, out=pb.own(turn)), b.n)
                size = larger(pb.norm(k, b.n), pb.norm(new, b.n))
                primal2, reach2 = primal2 + w * gap * gap, reach2 + w * size * size
                dual2, pull2 = dual2 + shift * shift / w, pull2 + force * force / w
        state.inside, state.image, state.ku, state.copies = x, image, ku, copies
        named = self._named(duals)
        state.duals, state.direct_dual, state.data_dual = named["duals"], named["direct_dual"], named["data_dual"]
        state.x = x if self.h is None else copies[self.n_split]
        primal, dual = ratio(root(primal2), root(reach2)), ratio(root(dual2), root(pull2))
        state.error = larger(primal, dual)
        if self.h is None:
            state.values = self._values(x, image, ku)
        else:
            state.values = self._values(state.x, pb.A(state.x), None)
        count = state.iteration + 1
        if self.adapt and count <= _LAST and (count & (count - 1) == 0 or count % 10 == 0):
            up, down = primal > _UNEQUAL * dual, dual > _UNEQUAL * primal
            state.penalty = where(up, state.penalty * _CHANGE, where(down, state.penalty / _CHANGE, state.penalty))

    @torch.no_grad()
    def _values(self, x: Tensor, image: Tensor, ku: list[Tensor] | None) -> dict[str, Number]:
        n = self.n_split
        if ku is None:
            ku = [b.op(x) for b in self.blocks[:n]]
        terms = [(b.g, k, b.n) for b, k in zip(self.blocks[:n], ku[:n], strict=True)]
        if self.h is not None:
            terms.append((self.h, x, self.problem.n_x))
        return report(self.problem, self.data, image, terms)


def admm(
    A: Any,
    y: Any,
    regularizer: Functional | Sequence[Functional] | None = None,
    *,
    data_term: Functional | None = None,
    constraint: Functional | Sequence[Functional] | None = None,
    x0: Any = None,
    penalty: Any = None,
    adapt: bool = True,
    relaxation: float = 1.6,
    maxiter: int = 500,
    rtol: float = 1e-4,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x D(A x) + sum_i g_i(K_i x) + h(x), with a copy z_i = K_i x for every term.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        regularizer: a functional, a sum or a list of them, each with a prox of its outer part.
        data_term: a functional of A x - y (or what its `about(y)` says) with a prox; it gets a copy, too. Half the
            squared norm if None, which stays in the quadratic subproblem.
        constraint: more terms, such as `Box(0, None)`. The solution satisfies the first hard constraint exactly.
        x0: where to start, of shape (..., *A.dims); zero if None.
        penalty: rho > 0 at the start, a number or one for each member; |A|^2 if None. Block i has rho / |K_i|^2.
        adapt: double or halve rho of a member whose residuals differ by more than a factor of 2, at iterations 1, 2, 4,
            8 ... and every tenth until 1000.
        relaxation: 1 to 1.8; K_i x is replaced by relaxation K_i x + (1 - relaxation) z_i.
        maxiter, rtol, atol: stop when the primal residual |K x - z| / |z| and the dual residual
            |rho (z_new - z)| / |q| are at most max(rtol, atol), with blocks weighted by 1 / |K_i|. Or after maxiter.
        options: see `pullback.solvers.run.Options`.

    The quadratic subproblem (A^H A + rho sum_i K_i^H K_i) x = b is solved in closed form where the structure allows;
    `Solution.method` says how. See `pullback.solvers.inner.Inner`.

    Returns: Solution with history "residual" |A x - y| and "objective".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A (for the history), of each K_i and K_i^H and one quadratic subproblem an iteration; with
        a term h on x one more application of A and each K_i; with conjugate gradients as many of A and A^H as they take
        steps, and one.
    Source: Boyd et al. 2011, doi 10.1561/2200000016; residuals and their balance: He, Yang & Wang 2000,
        doi 10.1023/A:1004603514434.
    """
    if not (isinstance(relaxation, (int, float)) and 0 < relaxation < 2):
        raise ArgumentError(f"admm: relaxation must be a number between 0 and 2; got {relaxation!r}")
    terms = gather("admm", regularizer, constraint)
    problem = prepared("admm", A, y, x0, terms, data_term, penalty, bool(adapt), float(relaxation))
    return minimize(problem, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def prepared(
    owner: str, A: Any, y: Any, x0: Any, terms: list[Functional], data_term: Any, penalty: Any = None,
    adapt: bool = True, relaxation: float = 1.6,
) -> Problem:  # fmt: skip
    """The problem with all that the recursion reads."""
    if not terms:
        raise ArgumentError(f"{owner}: regularizer must hold at least one term; got none; use lsqr for least squares")
    problem = composite(owner, A, y, x0, terms, data_term, penalty=penalty, adapt=adapt, relaxation=relaxation)
    if penalty is not None:
        problem.number(penalty, "penalty", positive=True)
    split(problem)
    return problem


def minimize(problem: Problem, **options: Any) -> Solution:
    """The solution of a prepared problem."""
    return explained(problem, ADMM, optimality(problem), **options)


def split_bregman(
    A: Any,
    y: Any,
    operators: LinearOperator | Sequence[LinearOperator],
    *,
    eps: float | Sequence[float] = 1.0,
    mu: float = 1.0,
    operators_l2: LinearOperator | Sequence[LinearOperator] = (),
    data_l2: Sequence[Any] | None = None,
    eps_l2: float | Sequence[float] = 1.0,
    isotropic: bool = False,
    coupling: Any = None,
    x0: Any = None,
    maxiter: int = 100,
    rtol: float = 1e-4,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x mu/2 |A x - y|^2 + sum_i eps_i |R_i x|_1 + sum_j eps_l2_j / 2 |S_j x - d_j|^2, by split Bregman.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        operators: the R_i (PyLops: RegsL1).
        eps: the eps_i. In PyLops `epsRL1s` is both the coupling and the threshold, so that it minimises
            mu/2 |A x - y|^2 + sum_i epsRL1_i^2 |R_i x|_1, whatever its docstring says: give eps = epsRL1**2 for the
            same minimum. Here the minimum does not depend on the coupling.
        mu: weight of the data, > 0.
        operators_l2, data_l2, eps_l2: the S_j, d_j (zero if None) and eps_l2_j (PyLops: RegsL2, dataregsL2, epsRL2s).
        isotropic: |R_i x|_1 is the sum of Euclidean norms along the first axis of R_i x, as for TV.
        coupling: lambda > 0 of Goldstein & Osher, weight of |d_i - R_i x - b_i|^2 relative to mu |A x - y|^2; it only
            changes the speed. Adapted to the residuals if None.
        x0: where to start, of shape (..., *A.dims); zero if None.
        maxiter, rtol, atol: of the iterations (PyLops: niter_outer), each of which solves for x once; see `admm`.
        options: see `pullback.solvers.run.Options`.

    It is `admm` without relaxation on the problem divided by mu: Bregman's b_i are the dual variables over lambda.

    Returns: Solution with history "residual" |A x - y| and "objective", that of the formula divided by mu.
    Raises: ShapeError, DtypeError, ArgumentError. Cost: as `admm`.
    Source: Goldstein & Osher 2009, doi 10.1137/080725891.
    """
    for name, value in (("mu", mu),):
        if not (isinstance(value, (int, float)) and value > 0):
            raise ArgumentError(f"split_bregman: {name} must be a number > 0; got {value!r}")
    ones, twos = _operators(operators, "operators"), _operators(operators_l2, "operators_l2")
    if not ones:
        raise ArgumentError("split_bregman: operators must hold at least one LinearOperator; got none")
    targets = list(data_l2) if data_l2 is not None else [None] * len(twos)
    if len(targets) != len(twos):
        raise ArgumentError(
            f"split_bregman: data_l2 must hold one tensor for each of {len(twos)} operators_l2; got {len(targets)}"
        )
    terms: list[Functional] = []
    for R, e in zip(ones, _weights(eps, len(ones), "eps"), strict=True):
        if isotropic:
            terms.append((e / mu) * (L21(R.dimsd, axis=0) @ R))
        else:
            terms.append((e / mu) * (L1(R.dimsd) @ R))
    for S, d, e in zip(twos, targets, _weights(eps_l2, len(twos), "eps_l2"), strict=True):
        terms.append((e / mu) * (SquaredL2(S.dimsd, b=d) @ S))
    problem = prepared("split_bregman", A, y, x0, terms, None, coupling, coupling is None, 1.0)
    return minimize(problem, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def _operators(value: Any, name: str) -> list[LinearOperator]:
    found = [value] if isinstance(value, LinearOperator) else value
    if not isinstance(found, Sequence) or not all(isinstance(op, LinearOperator) for op in found):
        raise ArgumentError(
            f"split_bregman: {name} must be a pullback.LinearOperator or a list of them; got {type(value).__name__}"
        )
    return list(found)


def _weights(value: Any, n: int, name: str) -> list[Any]:
    found = list(value) if isinstance(value, Sequence) else [value] * n
    if len(found) != n:
        raise ArgumentError(f"split_bregman: {name} must be one number or {n} of them; got {len(found)}")
    return found
