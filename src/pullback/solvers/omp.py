"""Orthogonal matching pursuit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.core.shapes import size
from pullback.solvers.cg import cg
from pullback.solvers.iterate import State, code
from pullback.solvers.problem import Problem, norm
from pullback.solvers.run import Equation, Options, run
from pullback.solvers.status import Solution, Status

_DEPENDENT = 1e-10  # a column that lost all but this share of its length (for float64) adds nothing


@dataclass
class _State(State):
    r: Tensor  # (*batch, m)
    chosen: Tensor  # the support so far, (*batch, k)
    basis: Tensor  # orthonormal columns, (*batch, m, k)
    factor: Tensor  # the triangular factor, (*batch, k, k)


class OMP:
    """The recursion of `omp`: the columns chosen so far as Q R."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.scales: Tensor | None = problem.parts["scales"]
        self.m, self.n = problem.A.shape

    def init(self) -> _State:
        """Nothing is chosen."""
        pb = self.problem
        batch, y = pb.batch, pb.y
        x = torch.zeros((*batch, *pb.A.dims), dtype=pb.x_dtype, device=y.device)
        r = y.reshape(*batch, self.m)
        length = pb.norm(y, pb.n_y)
        return _State(
            x, length, length, {"residual": length}, r=r, basis=r.new_zeros(*batch, self.m, 0),
            chosen=torch.zeros((*batch, 0), dtype=torch.int64, device=y.device), factor=r.new_zeros(*batch, 0, 0),
        )  # fmt: skip

    def step(self, state: _State) -> None:
        """Choose the column that correlates most with the residual, and solve for all coefficients."""
        pb, batch = self.problem, self.problem.batch
        with torch.no_grad():
            scores = pb.back(state.r.reshape(*batch, *pb.A.dimsd)).reshape(*batch, self.n).abs()
            scores = scores if self.scales is None else scores * self.scales
            best = scores.scatter(-1, state.chosen, -1.0).argmax(-1, keepdim=True)
        unit = torch.zeros((*batch, self.n), dtype=pb.x_dtype, device=pb.y.device).scatter(-1, best, 1.0)
        column = pb.A(unit.reshape(*batch, *pb.A.dims)).reshape(*batch, self.m, 1)
        column = column.to(state.r.dtype)
        Q = state.basis
        rest, parts = column, torch.zeros((*batch, Q.shape[-1], 1), dtype=Q.dtype, device=Q.device)
        for _ in range(2):
            c = Q.mH @ rest
            rest, parts = rest - Q @ c, parts + c
        length = norm(rest, 2) if not pb.live else torch.linalg.vector_norm(rest, dim=(-2, -1))
        stuck = length.detach() <= _DEPENDENT * (pb.eps / 2.2e-16) ** 0.5 * norm(column, 2)
        safe = torch.where(stuck, 1, length).reshape(*batch, 1, 1)
        q = torch.where(stuck.reshape(*batch, 1, 1), 0, rest / safe)
        corner = safe.to(Q.dtype)
        state.basis = torch.cat((Q, q), -1)
        low = torch.zeros((*batch, 1, Q.shape[-1]), dtype=Q.dtype, device=Q.device)
        state.factor = torch.cat((torch.cat((state.factor, parts), -1), torch.cat((low, corner), -1)), -2)
        state.chosen = torch.cat((state.chosen, best), -1)
        flat = pb.y.reshape(*batch, self.m, 1)
        target = state.basis.mH @ flat
        coefficients = torch.linalg.solve_triangular(state.factor, target, upper=True).squeeze(-1)
        x = torch.zeros((*batch, self.n), dtype=pb.x_dtype, device=flat.device)
        state.x = x.scatter_add(-1, state.chosen, coefficients.to(pb.x_dtype)).reshape(*batch, *pb.A.dims)
        state.r = (flat - state.basis @ target).squeeze(-1)
        state.error = pb.norm(state.r, 1)
        state.values = {"residual": state.error}
        verdict = torch.where(stuck, code(Status.PRECISION), 0)
        state.verdict = int(verdict) if pb.single else verdict


def _on_support(p: Problem, x: Tensor) -> Tensor:
    """P A^H (A P x - y) + (1 - P) x, P the projection on the coordinates where x is not zero."""
    chosen = (x != 0).detach()
    inside = torch.where(chosen, x, 0)
    return torch.where(chosen, p.adjoint(p.A(inside) - p.y).to(p.x_dtype), x)


def omp(
    A: Any,
    y: Any,
    k: int | None = None,
    *,
    normalize: bool = False,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """A sparse x with |A x - y| small: column by column, each time the one that correlates most with the residual.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch, whose members have their own supports.
        k: the most nonzero coefficients; min(A.shape) if None.
        normalize: divide correlations by the lengths of the columns, which costs n applications (in a batch) at the
            start; right where the columns differ in length.
        rtol, atol: stop when |y - A x| <= max(rtol |y|, atol). A member whose best column depends on those that it has
            stops with the status PRECISION.
        options: see `pullback.solvers.run.Options`.

    After each choice all coefficients are those of least squares on the support. Implicit derivatives are those of
    these coefficients with the support held, which is what the derivative is wherever it exists.

    Returns: Solution with history "residual" |A x - y|; `iterations` is the number of columns that were chosen.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: iteration j has one application of A and A^H and O(m j) operations.
    Source: Pati, Rezaiifar & Krishnaprasad 1993, doi 10.1109/ACSSC.1993.342465.
    """
    problem = Problem("omp", A, y, None)
    most = min(problem.A.shape)
    k = most if k is None else k
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= most:
        raise ArgumentError(f"omp: k must be an int between 0 and min(A.shape) = {most}; got {k!r}")
    if not problem.A._clinear and problem.x_dtype.is_complex:
        raise ArgumentError("omp: A must be linear over the complex numbers where x is complex; got one that is not")
    problem.parts["scales"] = _column_scales(problem) if normalize else None
    return run(problem, OMP, Equation(_on_support, cg, symmetric=True), maxiter=k, rtol=rtol, atol=atol, **options)


@torch.no_grad()
def _column_scales(problem: Problem) -> Tensor:
    """1 / |A e_j| for every j; 0 where that column is zero."""
    A, n = problem.A, size(problem.A.dims)
    found = []
    step = max(1, (1 << 22) // max(A.shape))
    for start in range(0, n, step):
        rows = torch.arange(start, min(n, start + step), device=problem.y.device)
        units = torch.zeros(len(rows), n, dtype=problem.x_dtype, device=problem.y.device)
        units[rows - start, rows] = 1
        found.append(norm(A(units.reshape(-1, *A.dims)), problem.n_y))
    lengths = torch.cat(found)
    return torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1), 0)
