"""Conjugate gradients for kernel systems: many columns at once, each with its own end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError

Apply = Callable[[Tensor], Tensor]  # (*batch, n, columns) -> the same shape

PRECONDITIONERS = (None, "nystrom", "cholesky", "fourier")


class ConvergenceWarning(UserWarning):
    """A kernel system was not solved to its tolerance."""


@dataclass(frozen=True)
class SolveInfo:
    """What happened in a solve.

    Args:
        iterations: applications of the kernel, those of a preconditioner not counted.
        converged: for each column, whether |b - A x| <= max(eps |b|, atol) by the recursion.
        residual: |b - A x| / |b| of each column, computed anew at the end.
        message: advice in words.
    """

    iterations: int
    converged: Tensor
    residual: Tensor
    message: str


@dataclass(frozen=True)
class Options:
    """How a system is solved; see `KernelSolve.__call__`."""

    eps: float = 1e-6
    atol: float = 0.0
    maxiter: int = 1000
    preconditioner: Any = None
    rank: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not self.eps >= 0 or not self.atol >= 0:
            raise ArgumentError(f"solve: eps and atol must be >= 0; got {self.eps!r} and {self.atol!r}")
        if not isinstance(self.maxiter, int) or self.maxiter < 1:
            raise ArgumentError(f"solve: maxiter must be an int >= 1; got {self.maxiter!r}")
        if self.preconditioner not in PRECONDITIONERS and not callable(self.preconditioner):
            raise ArgumentError(
                f"solve: preconditioner must be None, 'nystrom', 'cholesky', 'fourier' or a function r -> P^-1 r; got "
                f"{self.preconditioner!r}"
            )
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ArgumentError(f"solve: rank must be an int >= 1; got {self.rank!r}")


def _bar(x: Tensor, y: Tensor, unit: int) -> Tensor:
    """<x, y> of each column of `unit` numbers a row, broadcast again to (*batch, 1, columns * unit)."""
    dots = (x * y).sum(-2, keepdim=True)
    return dots if unit == 1 else dots.unflatten(-1, (-1, unit)).sum(-1).repeat_interleave(unit, -1)


def conjugate_gradients(
    product: Apply, b: Tensor, alpha: Tensor, inverse: Apply | None, options: Options, unit: int = 1
) -> tuple[Tensor, SolveInfo]:
    """Solve (alpha I + K) x = b for all columns of b at once; each stops by itself.

    Args:
        product: K, symmetric positive semi-definite (not checked; a direction of negative curvature stops its column).
        b: (*batch, n, columns * unit).
        alpha: broadcastable against b.
        inverse: an approximate inverse of alpha I + K, symmetric positive definite.
        options: tolerances and cap.
        unit: how many neighbouring numbers of each row belong to one column.

    Returns: the best iterate of each column, and what happened. Source: Hestenes & Stiefel 1952.
    """
    size = _bar(b, b, unit).sqrt()
    target = torch.clamp(options.eps * size, min=options.atol)
    x, r = torch.zeros_like(b), b.clone()
    z = r if inverse is None else inverse(r)
    p, rz = z.clone(), _bar(r, z, unit)
    best, best_x = size.clone(), x.clone()
    active, broken = size > target, torch.zeros_like(size, dtype=torch.bool)
    iterations = 0
    while iterations < options.maxiter and bool(active.any()):
        iterations += 1
        q = product(p) + alpha * p
        curvature = _bar(p, q, unit)
        stuck = active & ~(curvature > 0)
        broken, active = broken | stuck, active & ~stuck
        step = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        x = x + step * p
        r = r - step * q
        norm = _bar(r, r, unit).sqrt()
        better = active & (norm < best)
        best, best_x = torch.where(better, norm, best), torch.where(better, x, best_x)
        z = r if inverse is None else inverse(r)
        new = _bar(r, z, unit)
        active = active & (norm > target)
        p = z + torch.where(active, new / torch.where(rz == 0, 1.0, rz), 0.0) * p
        rz = new
    converged = best <= target
    true = _bar(rest := b - product(best_x) - alpha * best_x, rest, unit).sqrt() / torch.where(size == 0, 1.0, size)
    message = "converged"
    if not bool(converged.all()):
        worst = float((best / torch.where(size == 0, 1.0, size)).max())
        if bool(broken.any()):
            message = (
                f"alpha I + K is not positive definite: conjugate gradients met a direction of negative curvature in "
                f"{int(broken.sum()) // unit} of {broken.numel() // unit} columns and returns the best iterates; use a "
                f"larger alpha or a positive kernel"
            )
        else:
            message = (
                f"{int((~converged).sum()) // unit} of {converged.numel() // unit} columns are not solved to the "
                f"relative tolerance {options.eps:.1e} in {iterations} iterations (largest residual {worst:.1e}); the "
                f"best iterates are returned; raise maxiter or alpha, or use preconditioner='nystrom'"
            )
    return best_x, SolveInfo(iterations, converged[..., 0, ::unit], true[..., 0, ::unit], message)
