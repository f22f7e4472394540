"""Functionals of singular values: the nuclear norm, its ball, and the rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pullback.core.errors import ShapeError
from pullback.core.shapes import Dims
from pullback.functionals.arithmetic import real_like, slack, total
from pullback.functionals.balls import radius_of
from pullback.functionals.constraints import Indicator
from pullback.functionals.functional import Functional, Step
from pullback.functionals.norms import Norm
from pullback.functionals.projections import onto_l1_ball


class Nuclear(Norm):
    """f(x) = sum of the singular values of x over the last two axes of a member; prox: soft threshold of them.

    Args:
        dims: shape of one member, two axes or more; the others are summed over. See `Functional`.

    The first derivative of the prox is exact wherever the prox is differentiable, also where singular values are equal
    or zero (where torch's own derivative of an SVD is not finite); the second needs distinct singular values. The value
    has torch's derivatives.
    Cost: one SVD a matrix. Source: Cai, Candes & Shen 2010, doi 10.1137/080738970; derivative: Sun & Sun 2003.
    """

    def _value(self, x: Tensor, n: int) -> Tensor:
        return total(torch.linalg.svdvals(_matrices(x, n, "Nuclear")), n - 1)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        s = torch.linalg.svdvals(_matrices(x, n, "Nuclear"))
        return _with_singular_values(x, (s - _drop(step)).clamp(min=0))

    def _project(self, x: Tensor, radius: Step, n: int) -> Tensor:
        return x - self._prox(x, radius, n)

    def _in_ball(self, x: Tensor, radius: Step, n: int) -> Tensor:
        inside = torch.linalg.svdvals(_matrices(x, n, "Nuclear")) <= _drop(radius)
        return inside.all(tuple(range(-(n - 1), 0)))


class NuclearBall(Indicator):
    """f(x) = 0 if the singular values of x sum to at most radius, else inf; prox: their projection on the L1 ball.

    Args:
        radius: > 0, a number or a tensor with one value, which may require grad.
        dims: shape of one member, two axes or more; the sum runs over all matrices of a member. See `Functional`.

    Derivatives as in `Nuclear`. Cost: one SVD a matrix.
    """

    def __init__(self, radius: Any = 1.0, *, dims: Dims | None = None) -> None:
        super().__init__(dims)
        self.radius: Any = radius_of(radius, "NuclearBall")

    def _project(self, x: Tensor, n: int) -> Tensor:
        s = torch.linalg.svdvals(_matrices(x, n, "NuclearBall"))
        return _with_singular_values(x, onto_l1_ball(s, real_like(self.radius, x), n - 1))

    def _inside(self, x: Tensor, n: int) -> Tensor:
        values = torch.linalg.svdvals(_matrices(x, n, "NuclearBall"))
        return total(values, n - 1) <= real_like(self.radius, x) * (1 + slack(x))

    def _support(self, x: Tensor, n: int) -> Tensor:
        largest = torch.linalg.matrix_norm(_matrices(x, n, "NuclearBall"), 2)
        return real_like(self.radius, x) * (largest.amax(tuple(range(-(n - 2), 0))) if n > 2 else largest)

    def extra_repr(self) -> str:
        """The radius."""
        return "tensor" if isinstance(self.radius, Tensor) else format(self.radius, "g")


class Rank(Functional):
    """f(x) = rank of x over the last two axes of a member; prox: singular values > sqrt(2 step) stay, others become 0.

    Args:
        dims: shape of one member, two axes or more; the others are summed over. See `Functional`.

    Singular values up to max(rows, columns) eps times the largest count as zero in the value. Derivatives of the prox
    need distinct singular values. Cost: one SVD a matrix.
    """

    convex = False

    def _value(self, x: Tensor, n: int) -> Tensor:
        s = torch.linalg.svdvals(_matrices(x, n, "Rank"))
        tiny = max(x.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
        return total((s > tiny).to(s.dtype), n - 1)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        u, s, vh = torch.linalg.svd(_matrices(x, n, "Rank"), full_matrices=False)
        kept = torch.where(s * s > 2 * _drop(step), s, 0)
        return (u * kept.unsqueeze(-2)) @ vh


def _matrices(x: Tensor, n: int, owner: str) -> Tensor:
    if n < 2:
        raise ShapeError(f"{owner}: a member must have two axes or more, the last two those of a matrix; got {n}")
    return x


def _drop(step: Step) -> Step:
    """A step that broadcasts against x, as it broadcasts against singular values."""
    return step.squeeze(-1) if isinstance(step, Tensor) and step.ndim else step


def _with_singular_values(x: Tensor, values: Tensor) -> Tensor:
    """U diag(values) V^H where x = U diag(s) V^H and values_i = (s_i - theta)_+ for some theta."""
    result: Tensor = _Replace.apply(x, values)
    return result


class _Replace(torch.autograd.Function):
    """(x, f) -> U diag(f) V^H, for f_i that are a soft threshold of the singular values s_i.

    What f contributes is an ordinary derivative. x contributes by turning U and V: with H = U^H dx V, the change is
    U (G . (H + H^H) / 2 + K . (H - H^H) / 2) V^H plus f_i / s_i on what lies outside of U or V, where
    G_ij = (f_i - f_j) / (s_i - s_j) off the diagonal (its limit, 0 or 1, where s_i = s_j) and
    K_ij = (f_i + f_j) / (s_i + s_j). The map is self-adjoint, so one code serves both modes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * values.unsqueeze(-2)) @ vh

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, values = ctx.saved_tensors
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return _turn(g, u, s, vh, values), torch.einsum("...ji,...jk,...ik->...i", u.conj(), g, vh.conj()).real

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dvalues: Tensor | None) -> Tensor:
        x, values = ctx.saved_tensors
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        moved = torch.zeros_like(x) if dx is None else _turn(dx, u, s, vh, values)
        return moved if dvalues is None else moved + (u * dvalues.unsqueeze(-2)) @ vh


def _turn(d: Tensor, u: Tensor, s: Tensor, vh: Tensor, f: Tensor) -> Tensor:
    """The derivative in x at fixed f, in direction d."""
    h = u.mH @ d @ vh.mH
    gap = s.unsqueeze(-1) - s.unsqueeze(-2)
    wide = gap.abs() > 1e3 * torch.finfo(s.dtype).eps * s[..., :1, None]
    limit = ((f.unsqueeze(-1) > 0) & (f.unsqueeze(-2) > 0)).to(s.dtype)
    g = torch.where(wide, (f.unsqueeze(-1) - f.unsqueeze(-2)) / torch.where(wide, gap, 1), limit)
    g = g * (1 - torch.eye(s.shape[-1], dtype=s.dtype, device=s.device))
    both = s.unsqueeze(-1) + s.unsqueeze(-2)
    k = (f.unsqueeze(-1) + f.unsqueeze(-2)) / torch.where(both > 0, both, 1)
    inner = g * (h + h.mH) / 2 + k * (h - h.mH) / 2
    ratio = f / torch.where(s > 0, s, 1)
    rows, columns = d.shape[-2:]
    if rows > columns:
        dv = d @ vh.mH
        return (u @ (inner - h * ratio.unsqueeze(-2)) + dv * ratio.unsqueeze(-2)) @ vh
    ud = u.mH @ d
    return u @ ((inner - h * ratio.unsqueeze(-1)) @ vh + ud * ratio.unsqueeze(-1))
