"""GMRES: square systems without symmetry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.core.shapes import size
from pullback.solvers.cg import Shifted, shifted, square_problem
from pullback.solvers.iterate import code
from pullback.solvers.problem import Problem, length, norm
from pullback.solvers.run import Options, run
from pullback.solvers.scalars import Number, ratio
from pullback.solvers.status import Solution, Status

_LOST = 0.7  # a vector that lost more of its length by projection is projected once more (Daniel et al. 1976)


class _State:
    """The Krylov basis of a cycle. x is formed from it where somebody looks."""

    monotone = True  # the residual never grows
    __slots__ = ("__dict__", "algorithm")  # `vars(state)` is what a checkpoint keeps

    def __init__(self, algorithm: GMRES, base: Tensor, error: Number, scale: Number) -> None:
        self.algorithm = algorithm
        self.base, self.error, self.scale, self.iteration = base, error, scale, 0
        self.verdict: Any = None
        self.values = {"residual": error}
        self.count = 0  # columns of the triangular factor
        self.basis: Tensor = base  # (*batch, count + 1 or more, n)
        self.factor: Any = None  # the triangular factor, (*batch, restart, restart)
        self.columns: list[Tensor] = []  # the same where derivatives forbid to write into it
        self.rotations: Any = None  # (cosines, sines), or their product of shape (*batch, count + 1, count + 1)
        self.targets: Any = None  # the rotated right-hand side: numbers, or |r| of the start, shape (*batch, 1)

    @property
    def x(self) -> Tensor:
        """The iterate."""
        return self.algorithm.form(self)


class GMRES:
    """The recursion of `gmres`: Arnoldi's basis, and the least-squares problem in it by Givens rotations."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.restart = problem, problem.parts["restart"]
        self.shifted = Shifted(problem)
        self.precondition = self.shifted.precondition
        self.shape = (*problem.batch, *problem.A.dims)
        self.n, self.is_complex = size(problem.A.dims), problem.x_dtype.is_complex

    def init(self) -> _State:
        """x0 and its residual."""
        pb = self.problem
        x, r = self.shifted.start()
        state = _State(self, x, pb.norm(r, pb.n_x), pb.norm(pb.y, pb.n_y))
        self._begin(state, r)
        return state

    def _begin(self, state: _State, r: Tensor) -> None:
        """A new cycle from the residual of the base."""
        pb, m = self.problem, self.restart
        r = r.reshape(*pb.batch, self.n)
        state.count = 0
        if pb.single:
            beta = pb.norm(r, 1)
            if state.factor is None:
                state.basis, state.factor = r.new_empty(m + 1, self.n), r.new_zeros(m, m)
            torch.mul(r, 1 / beta if beta else 0.0, out=state.basis[0])
            state.rotations, state.targets = ([], []), [beta]
            return
        size_ = length(r, 1, pb.live).unsqueeze(-1)
        zero = size_ == 0
        first = torch.where(zero, 0, r / torch.where(zero, 1, size_)).unsqueeze(-2)
        if pb.live:
            state.basis = first
        else:
            if state.factor is None:
                state.basis, state.factor = r.new_empty(*pb.batch, m + 1, self.n), r.new_zeros(*pb.batch, m, m)
            state.basis[..., :1, :] = first
        state.columns, state.rotations, state.targets = [], torch.ones_like(first[..., :1]), size_

    def step(self, state: _State) -> None:
        """One application of A and of the preconditioner; a new cycle after `restart` of them."""
        pb = self.problem
        if state.count == self.restart:
            state.base = state.x
            r = self.shifted(state.base)
            self._begin(state, torch.sub(pb.y, r, out=pb.own(r)))
        v = (state.basis[state.count] if pb.single else state.basis[..., state.count, :]).view(self.shape)
        w = self.shifted(v if self.precondition is None else self.precondition(v))
        (self._extend_single if pb.single else self._extend)(state, w.reshape(*pb.batch, self.n))
        state.values = {"residual": state.error}

    def _project(self, basis: Tensor, w: Tensor) -> tuple[list[Any], float]:
        """Take the components in the basis off w; return them, and what length is left."""
        c = torch.mv(basis, w.conj().resolve_conj()).conj() if self.is_complex else torch.mv(basis, w)
        w.addmv_(basis.T, c, alpha=-1)
        return c.tolist(), self.problem.norm(w, 1)

    def _extend_single(self, state: _State, w: Tensor) -> None:
        pb, k = self.problem, state.count
        basis = state.basis[: k + 1]
        h, after = self._project(basis, w)
        total = math.hypot(after, *(map(abs, h) if self.is_complex else h))
        if after < _LOST * total:
            more, after = self._project(basis, w)
            h = [a + b for a, b in zip(h, more, strict=True)]
        tiny = 4 * pb.eps * total
        after = 0.0 if after <= tiny else after
        torch.mul(w, 1 / after if after else 0.0, out=state.basis[k + 1])
        cosines, sines = state.rotations
        a = h[0]
        for i, (c, s) in enumerate(zip(cosines, sines, strict=True)):
            b = h[i + 1]
            h[i] = c * a + s * b
            a = c * b - s.conjugate() * a
        diagonal = math.hypot(abs(a), after)
        if diagonal <= tiny:  # nothing new: A is singular and y not in its range, or the solution is reached
            state.verdict = code(Status.BREAKDOWN)
            return
        phase = a / abs(a) if a else 1.0
        c, s = abs(a) / diagonal, phase * (after / diagonal)
        h[k] = phase * diagonal
        state.factor.numpy()[: k + 1, k] = h
        cosines.append(c)
        sines.append(s)
        last_target = state.targets[-1]
        state.targets[-1] = c * last_target
        state.targets.append(-s.conjugate() * last_target)
        state.count = k + 1
        state.error = abs(state.targets[-1])
        state.verdict = code(Status.PRECISION) if state.error <= 0.1 * pb.eps * state.scale else 0

    def _extend(self, state: _State, w: Tensor) -> None:
        pb, k = self.problem, state.count
        basis = state.basis[..., : k + 1, :]
        h: Any = 0.0
        for _ in range(2):  # twice is enough
            # (Rows times matrices: a matrix times a column takes torch four times as long in a batch.)
            c = ((w.conj() if self.is_complex else w).unsqueeze(-2) @ basis.mT).conj()
            w = w - (c @ basis).squeeze(-2)
            h = h + c
        after = length(w, 1, pb.live).unsqueeze(-1)
        with pb.quiet:
            total = torch.hypot(norm(h, 1), after)
            tiny = 4 * pb.eps * total
            ended = after <= tiny
        after = after.masked_fill(ended, 0)
        v = (w * ratio(1.0, after, pb.live)).unsqueeze(-2)
        if pb.live:
            state.basis = torch.cat((state.basis, v), -2)
        else:
            state.basis[..., k + 1 : k + 2, :] = v
        Q = state.rotations
        u = (h @ Q.mT).squeeze(-2)
        a = u[..., -1:]
        squares = (a * a.conj()).real if a.is_complex() else a * a
        with pb.quiet:
            stuck = squares.sqrt().hypot(after) <= tiny
        fresh = (squares == 0) | stuck
        magnitude = squares.masked_fill(fresh, 1).sqrt()
        phase = (a / magnitude).masked_fill(fresh, 1)
        # A column that brings nothing new gets weight 0 and leaves the residual as it is.
        diagonal = (squares + after * after).masked_fill(stuck, 1).sqrt()
        cosine = (magnitude / diagonal).masked_fill(fresh, 0)
        sine = (phase * (after / diagonal)).masked_fill(stuck, 1)
        if pb.live:
            state.columns.append(torch.cat((u[..., :-1], phase * diagonal), -1))
        else:
            state.factor[..., :k, k] = u[..., :-1]
            state.factor[..., k][..., k : k + 1] = phase * diagonal
        q = Q[..., -1:, :]
        c, s = cosine.unsqueeze(-1), sine.unsqueeze(-1)
        above = torch.nn.functional.pad(Q[..., :-1, :], (0, 1))
        rows = (above, torch.cat((c * q, s), -1), torch.cat((-s.conj() * q, c.to(q.dtype)), -1))
        state.rotations = torch.cat(rows, -2)
        state.count = k + 1
        with pb.quiet:
            state.error = state.rotations[..., -1, 0].abs() * state.targets.squeeze(-1)
            verdict = torch.where(state.error <= 0.1 * pb.eps * state.scale, code(Status.PRECISION), 0)
            state.verdict = torch.where(stuck.squeeze(-1), code(Status.BREAKDOWN), verdict)

    def form(self, state: _State) -> Tensor:
        """The iterate x = base + P V R^-1 g."""
        k, basis = state.count, state.basis
        if k == 0:
            return state.base
        if self.problem.single:
            g = torch.tensor(state.targets[:k], dtype=basis.dtype)
            weights = torch.linalg.solve_triangular(state.factor[:k, :k], g.unsqueeze(-1), upper=True).squeeze(-1)
            step = torch.mv(basis[:k].T, weights)
        else:
            if self.problem.live:
                pad = torch.nn.functional.pad
                R = torch.stack([pad(column, (0, k - column.shape[-1])) for column in state.columns], -1)
            else:
                R = state.factor[..., :k, :k]
            g = state.rotations[..., :k, :1] * state.targets.unsqueeze(-1)
            weights = torch.linalg.solve_triangular(R, g, upper=True)
            step = (weights.mT @ basis[..., :k, :]).squeeze(-2)
        step = step.reshape(self.shape)
        return state.base + (step if self.precondition is None else self.precondition(step))


def gmres(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    damp: Any = 0.0,
    preconditioner: Any = None,
    restart: int = 50,
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Solve (A + damp I) x = y for any square A, by the generalised minimal residual method.

    Args:
        A: square LinearOperator with dims == dimsd. Its adjoint is not needed.
        y: right-hand side of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        damp: >= 0, added to the diagonal; a number or one for each member of the batch.
        preconditioner: LinearOperator (or function) P close to the inverse of A + damp, applied from the right: the
            residual of (A + damp) P u = y, x = x0 + P u, is that of the system. Implicit derivatives do not depend on
            it; their solves use it too.
        restart: vectors kept; after so many iterations the method starts anew from where it is.
        maxiter, rtol, atol: stop when |y - (A + damp) x| <= max(rtol |y|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`. A callback that looks at state.x has x formed, which costs
            O(n restart).

    Returns: Solution with history "residual"; the status BREAKDOWN where A is singular and the Krylov space is
        exhausted before the tolerance is met.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of A and of the preconditioner and 4 n k to 8 n k operations in iteration k of a cycle;
        restart + 2 vectors.
    Source: Saad & Schultz 1986, doi 10.1137/0907058; orthogonalised twice where needed: Daniel, Gragg, Kaufman &
        Stewart 1976, doi 10.1090/S0025-5718-1976-0431641-8.
    """
    if isinstance(restart, bool) or not isinstance(restart, int) or restart < 1:
        raise ArgumentError(f"gmres: restart must be an int >= 1; got {restart!r}")
    problem = square_problem("gmres", A, y, x0, damp=damp, preconditioner=preconditioner)
    problem.parts["restart"] = min(restart, size(problem.A.dims) * (1 if problem.A._clinear else 2))
    equation = shifted(gmres, symmetric=False, preconditioner=problem.parts["preconditioner"])
    return run(problem, GMRES, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)
