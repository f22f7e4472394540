"""Kaczmarz's method: one row, or one block of rows, at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError
from pullback.solvers.equations import least_squares
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem
from pullback.solvers.run import Options, run
from pullback.solvers.status import Solution

_SEED = 1_000_003  # between the seeds of two sweeps


class _State(State):
    """x alone: the order of a sweep follows from its number."""


@dataclass
class _Block:
    rows: Tensor  # A_b, of shape (size, n)
    back: Tensor  # relax A_b^+, of shape (n, size)
    at: slice


class Kaczmarz:
    """The sweeps of `kaczmarz`, on the matrix of A."""

    def __init__(self, problem: Problem) -> None:
        parts = problem.parts
        self.problem = problem
        self.order, self.seed = parts["order"], parts["seed"]
        matrix = problem.A.todense(problem.x_dtype, problem.y.device).to(problem.x_dtype)
        m = matrix.shape[0]
        relax = parts["relax"]
        squares = (matrix * matrix.conj()).real.sum(-1) if matrix.is_complex() else matrix.square().sum(-1)
        size = parts["block"]
        self.blocks = []
        weights = []
        for start in range(0, m, size):
            at = slice(start, min(m, start + size))
            rows = matrix[at]
            if size == 1:
                zero = squares[at] == 0
                back = rows.mH / torch.where(zero, 1, squares[at])
            else:
                back = torch.linalg.pinv(rows)
            self.blocks.append(_Block(rows, relax * back, at))
            weights.append(squares[at].detach().sum())
        self.weights = torch.stack(weights).double().cpu()
        self.many = bool(problem.batch)

    def init(self) -> _State:
        """x0 and the residual."""
        pb = self.problem
        x, r = pb.start()
        error = pb.norm(r, pb.n_y)
        return _State(x, error, pb.norm(pb.y, pb.n_y), {"residual": error})

    def _sweep(self, k: int) -> list[int]:
        """The blocks of sweep k."""
        count = len(self.blocks)
        if self.order == "cyclic":
            return list(range(count))
        if self.order == "symmetric":
            return [*range(count), *range(count - 1, -1, -1)]
        if not bool(self.weights.sum() > 0):
            return []
        generator = torch.Generator().manual_seed(self.seed + _SEED * k)
        drawn: list[int] = torch.multinomial(self.weights, count, True, generator=generator).tolist()
        return drawn

    def step(self, state: _State) -> None:
        """One sweep, and one application of A for the residual."""
        pb = self.problem
        x = state.x.reshape(*pb.batch, -1)
        y = pb.y.reshape(*pb.batch, -1)
        for i in self._sweep(state.iteration):
            b = self.blocks[i]
            if self.many:
                r = y[..., b.at] - x @ b.rows.mT
                x = torch.add(x, r @ b.back.mT, out=pb.own(x))
            else:
                r = y[b.at] - b.rows @ x
                x = torch.addmv(x, b.back, r, out=pb.own(x))
        state.x = x.reshape(*pb.batch, *pb.A.dims)
        r = pb.forward(state.x)
        state.error = pb.norm(torch.sub(pb.y, r, out=pb.own(r)), pb.n_y)
        state.values = {"residual": state.error}


def kaczmarz(
    A: Any,
    y: Any,
    *,
    x0: Any = None,
    relax: float = 1.0,
    order: str = "cyclic",
    block: int = 1,
    seed: int = 0,
    maxiter: int = 100,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """Project on one equation after the other: x <- x + relax (y_i - <a_i, x>) a_i / |a_i|^2. An iteration is a sweep.

    For systems A x = y that have a solution: x is the one nearest to x0. Otherwise the sweeps end in a cycle that is no
    least-squares solution; use `sirt`, `cgls` or `lsqr`. Few sweeps regularise.

    Args:
        A: LinearOperator of any shape. Its matrix is formed, which takes n applications and m n numbers; for operators
            too large for that use `sirt`.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        x0: where to start, of shape (..., *A.dims); zero if None.
        relax: in (0, 2); below 1 it damps noise.
        order: "cyclic"; "symmetric", down and up again in one sweep; or "random", with a chance in proportion to
            |a_i|^2, as many draws as there are blocks.
        block: rows that are projected on together, through their pseudo-inverse.
        seed: of the random order.
        maxiter, rtol, atol: stop when |y - A x| <= max(rtol |y|, atol), or after maxiter sweeps.
        options: see `pullback.solvers.run.Options`. Implicit derivatives exist where A has at most as many rows as
            columns, and hold where its rows are independent: then every y has a solution. Where A has more rows use
            unroll=True.

    Returns: Solution with history "residual".
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: 4 m n operations and one application of A a sweep; the matrix twice.
    Source: Kaczmarz 1937, doi 10.1080/00207179308934446 (translation); random order: Strohmer & Vershynin 2009, doi
        10.1007/s00041-008-9030-4; blocks: Needell & Tropp 2014, doi 10.1016/j.laa.2012.12.022.
    """
    if order not in ("cyclic", "symmetric", "random"):
        raise ArgumentError(f"kaczmarz: order must be 'cyclic', 'symmetric' or 'random'; got {order!r}")
    for name, value, least in (("block", block, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"kaczmarz: {name} must be an int >= {least}; got {value!r}")
    relax = relaxation("kaczmarz", relax)
    problem = Problem("kaczmarz", A, y, x0, relax=relax, order=order, block=block, seed=seed)
    if not problem.A._clinear:
        raise ArgumentError(
            f"kaczmarz: A must be complex-linear to have rows; got {problem.A!r}, linear over the reals only; use cgls"
        )
    m, n = problem.A.shape
    equation = least_squares(problem) if m <= n else None
    return run(problem, Kaczmarz, equation, maxiter=maxiter, rtol=rtol, atol=atol, **options)


def relaxation(owner: str, relax: Any) -> float:
    """A number in (0, 2)."""
    if isinstance(relax, bool) or not isinstance(relax, (int, float)) or not 0 < relax < 2:
        raise ArgumentError(f"{owner}: relax must be a number in (0, 2); got {relax!r}")
    return float(relax)
