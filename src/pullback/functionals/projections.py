"""Projections on simplex and balls, which norms and constraints share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.functionals.arithmetic import total


def threshold(t: Tensor, radius: Any, n: int) -> Tensor:
    """Theta with sum_i (t_i - theta)_+ = radius, over the last n axes, which are kept.

    Args:
        t: real tensor of shape (..., *dims).
        radius: a number >= 0, or a tensor of them that broadcasts against t with 1 on the last n axes.

    Which t_i exceed theta is found by sorting; theta is then a mean over those, with derivatives of every order.
    Source: Held, Wolfe & Crowder 1974, doi 10.1007/BF01580223.
    """
    batch = t.shape[: t.ndim - n]
    shape = batch + (1,) * n
    with torch.no_grad():
        flat = t.detach().reshape(*batch, -1)
        down = flat.sort(-1, descending=True).values
        target = radius.detach().expand(shape).reshape(*batch, 1) if isinstance(radius, torch.Tensor) else radius
        surplus = down.double().cumsum(-1) - target
        above = down * torch.arange(1, down.shape[-1] + 1, device=t.device) > surplus
        last = above.sum(-1, keepdim=True).clamp(min=1) - 1
        chosen = (flat >= down.gather(-1, last)).reshape(t.shape).to(t.dtype)
    return (total(t * chosen, n).reshape(shape) - radius) / total(chosen, n).reshape(shape)


def onto_l1_ball(x: Tensor, radius: Any, n: int) -> Tensor:
    """The nearest u with sum |u_i| <= radius."""
    magnitude = x.abs()
    theta = threshold(magnitude, radius, n).clamp(min=0)
    return soft(x, theta, magnitude)


def soft(x: Tensor, theta: Tensor, magnitude: Tensor) -> Tensor:
    """x_i (1 - theta / |x_i|)_+."""
    if not x.is_complex():
        return x.sgn() * (magnitude - theta).clamp(min=0)
    kept = magnitude > theta
    return torch.where(kept, x * (1 - theta / torch.where(kept, magnitude, 1)), 0)
