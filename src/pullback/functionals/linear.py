"""The linear systems that proxes of quadratics and projections on affine sets lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pullback.core import interop
from pullback.core.errors import ShapeError
from pullback.core.operator import LinearOperator
from pullback.functionals.arithmetic import inner, is_live, lift, member, real_like
from pullback.linops import Diagonal, Identity


def as_data(b: Any, op: LinearOperator, owner: str) -> Tensor:
    """A tensor b that broadcasts against K x; ShapeError if it does not."""
    t = interop.as_tensor(b, "b", owner)
    n = len(op.dimsd)
    own = t.shape[-n:] if n else ()
    if any(s not in (1, d) for s, d in zip(own[::-1], op.dimsd[::-1], strict=False)):
        raise ShapeError(f"{owner}: b must broadcast against K x of shape {op.dimsd}; got {tuple(t.shape)}")
    return t


def pull(op: LinearOperator, y: Tensor, like: Tensor) -> Tensor:
    """K^H y; its real part where x is real, which is the adjoint of K on real vectors."""
    x = op._run(y, True)
    return x.real if x.is_complex() and not like.is_complex() else x


def solve_shifted(
    op: LinearOperator, step: Any, right: Tensor, n: int, maxiter: int, rtol: float, *, gram: bool = True
) -> Tensor:
    """(I + step B)^-1 right, where B is K^H K (or, with gram=False, the operator itself).

    `step` broadcasts against `right`, whose last n axes are the member.
    """
    square = op.gram if gram else op
    if isinstance(square, Identity):
        return right / (1 + step)
    if isinstance(square, Diagonal):
        return right / (1 + step * real_like(square.diag.real, right))
    c = op._coisometry() if gram else None
    if c is not None and op._out_dtype(right.dtype, False) == right.dtype:
        # K K^H = c I, so K^H K is c times a projection
        y = op._run(right)
        rate = member(step, n) / (1 + member(step, n) * c)
        return right - pull(op, y * lift(rate, len(op.dimsd)), right)

    def apply(u: Tensor) -> Tensor:
        v = square._run(u)
        return u + step * (v.real if v.is_complex() and not u.is_complex() else v)

    return conjugate_gradients(apply, right, n, maxiter, rtol)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, n: int, maxiter: int, rtol: float) -> Tensor:
    """B^-1 right for a self-adjoint positive definite B, for each member of the batch.

    It stops when every member's residual is at most rtol |right|. First and second derivatives in `right` and in what B
    is made of are as exact as that; they cost two more solutions in the forward, and one each in the backward.
    (Derivatives of the recursion itself would be wrong where it ends early, as for a right side that lies in a small
    invariant subspace of B.)
    """

    def solve(r: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            return _iterate(apply, r, n, maxiter, rtol)

    u = solve(right.detach())
    for _ in range(2):  # each makes one more order of derivatives exact
        rest = right - apply(u)
        if not is_live(rest):
            break
        u = u + _Inverse.apply(rest, solve)  # type: ignore[operator]
    return u


class _Inverse(torch.autograd.Function):
    """r -> B^-1 r for a B that counts as constant; it is self-adjoint, and so its own derivative in both modes."""

    @staticmethod
    def forward(r: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        return solve(r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Callable[[Tensor], Tensor]], output: Tensor) -> None:
        ctx.solve = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Inverse.apply(g, ctx.solve), None  # type: ignore[return-value]

    @staticmethod
    def jvp(ctx: Any, dr: Tensor, _: None) -> Tensor:
        return _Inverse.apply(dr, ctx.solve)  # type: ignore[return-value]


def _iterate(apply: Callable[[Tensor], Tensor], right: Tensor, n: int, maxiter: int, rtol: float) -> Tensor:
    shape = right.shape[: right.ndim - n] + (1,) * n
    u = torch.zeros_like(right)
    r = p = right
    energy = inner(r, r, n).reshape(shape)
    goal = rtol**2 * energy
    for _ in range(maxiter):
        if bool((energy <= goal).all()):
            break
        u, r, new = _advance(u, r, p, apply(p), energy, goal, n)
        p = r + p * (new / torch.where(energy > goal, energy, 1))
        energy = new
    return u


def _advance(
    u: Tensor, r: Tensor, p: Tensor, q: Tensor, energy: Tensor, goal: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step along p; members that have arrived stay where they are."""
    busy = energy > goal
    curvature = inner(p, q, n).reshape(energy.shape)
    length = torch.where(busy, energy / torch.where(busy, curvature, 1), 0)
    u, r = u + length * p, r - length * q
    return u, r, inner(r, r, n).reshape(energy.shape)
