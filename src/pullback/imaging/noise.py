"""Noise of measurements: what the detector adds, and how much of it there is."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DtypeError, ShapeError


def noise_transmission(y: Tensor, photons: float, generator: torch.Generator | None = None) -> Tensor:
    """-log(max(n, 1/2) / photons), n ~ Poisson(photons exp(-y)): line integrals seen by a photon-counting detector.

    Args:
        y: line integrals, real, of any shape, not negative by more than rounding.
        photons: photons that enter along each ray; the standard deviation of the result is exp(y / 2) / sqrt(photons).
        generator: where the random numbers come from; torch's default if None.

    Returns: the shape and dtype of y. Rays that no photon survives are given half a photon, so the result is finite.
    Not differentiable: gradients do not pass through the random draw.
    Raises: ArgumentError, DtypeError.
    """
    _require_real("noise_transmission", y)
    if not photons > 0:
        raise ArgumentError(f"noise_transmission: photons must be > 0; got {photons}")
    with torch.no_grad():
        counts = torch.poisson(photons * torch.exp(-y.double()), generator=generator)
        return -torch.log(counts.clamp(min=0.5) / photons).to(y.dtype)


def noise_level(y: Tensor) -> Tensor:
    """The standard deviation of white noise on y: median |d| / (2 * 0.6745), d the mixed second difference of y.

    d[i, j] = y[i, j] - y[i+1, j] - y[i, j+1] + y[i+1, j+1] removes what is smooth along either axis, and the median
    ignores the few places where edges cross. A heuristic: noise that is correlated between neighbours is
    underestimated, texture at pixel size is counted as noise.

    Args:
        y: real, of shape (..., n, m) with n, m >= 2.

    Returns: shape (...).
    Raises: ShapeError, DtypeError.
    Source: the median rule of Donoho & Johnstone 1994, doi 10.1093/biomet/81.3.425.
    """
    _require_real("noise_level", y)
    if y.ndim < 2 or min(y.shape[-2:]) < 2:
        raise ShapeError(f"noise_level expects shape (..., n, m) with n, m >= 2; got {tuple(y.shape)}")
    d = y.diff(dim=-1).diff(dim=-2)
    return d.abs().flatten(-2).median(-1).values / (2 * 0.6745)


def _require_real(owner: str, y: Tensor) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise DtypeError(
            f"{owner}: y must be a real floating point tensor; got {getattr(y, 'dtype', type(y).__name__)}"
        )
