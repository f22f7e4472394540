"""Distances between images: differentiable, one number for each member of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DtypeError, ShapeError


def rmse(x: Tensor, reference: Tensor) -> Tensor:
    """sqrt(mean (x - reference)^2) over the last two axes.

    Args:
        x: images of shape (..., n, m).
        reference: images that broadcast against x.

    Returns: shape (...).
    Raises: ShapeError, DtypeError.
    """
    _check("rmse", x, reference)
    return (x - reference).abs().square().mean((-2, -1)).sqrt()


def psnr(x: Tensor, reference: Tensor, data_range: float | Tensor | None = None) -> Tensor:
    """20 log10(data_range / rmse(x, reference)) [dB]; infinite for equal images.

    Args:
        x: images of shape (..., n, m).
        reference: images that broadcast against x.
        data_range: span of the values, a number or one a member; the reference's maximum minus minimum if None.

    Returns: shape (...).
    Raises: ShapeError, DtypeError, ArgumentError.
    """
    _check("psnr", x, reference)
    return 20 * torch.log10(_span("psnr", reference, data_range) / rmse(x, reference))


def ssim(
    x: Tensor,
    reference: Tensor,
    data_range: float | Tensor | None = None,
    *,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Mean of (2 m_x m_r + c1)(2 s_xr + c2) / ((m_x^2 + m_r^2 + c1)(s_x^2 + s_r^2 + c2)), c_i = (k_i data_range)^2.

    m, s^2 and s_xr are local means, variances and the covariance under a Gaussian window, taken where the window lies
    inside the image.

    Args:
        x: real images of shape (..., n, m).
        reference: images that broadcast against x.
        data_range: span of the values, a number or one a member; the reference's maximum minus minimum if None.
        sigma: of the window [pixels]; it is cut at 3.5 sigma, hence 11 x 11 by default.
        k1, k2: the constants of the source.

    Returns: shape (...), at most 1, and 1 for equal images.
    Raises: ShapeError, DtypeError, ArgumentError.
    Source: Wang, Bovik, Sheikh & Simoncelli 2004, doi 10.1109/TIP.2003.819861.
    """
    _check("ssim", x, reference, real=True)
    if not sigma > 0:
        raise ArgumentError(f"ssim: sigma must be > 0; got {sigma}")
    radius = int(3.5 * sigma + 0.5)
    if min(x.shape[-2:]) <= 2 * radius:
        raise ShapeError(
            f"ssim: images need more than {2 * radius} pixels an axis for sigma {sigma}; got {tuple(x.shape[-2:])}"
        )
    grid = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (grid / sigma) ** 2)
    window = window / window.sum()
    span = _span("ssim", reference, data_range)
    span = span[..., None, None] if isinstance(span, Tensor) and span.ndim else span
    c1, c2 = (k1 * span) ** 2, (k2 * span) ** 2
    x, reference = torch.broadcast_tensors(x, reference)
    mean_x, mean_r = _smooth(x, window), _smooth(reference, window)
    var_x = _smooth(x * x, window) - mean_x**2
    var_r = _smooth(reference * reference, window) - mean_r**2
    cov = _smooth(x * reference, window) - mean_x * mean_r
    score = (2 * mean_x * mean_r + c1) * (2 * cov + c2) / ((mean_x**2 + mean_r**2 + c1) * (var_x + var_r + c2))
    return score.mean((-2, -1))


def _smooth(x: Tensor, window: Tensor) -> Tensor:
    """The separable window on both axes, where it lies inside the image."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    y = torch.nn.functional.conv2d(flat, window.reshape(1, 1, -1, 1))
    y = torch.nn.functional.conv2d(y, window.reshape(1, 1, 1, -1))
    return y.reshape(*x.shape[:-2], *y.shape[-2:])


def _span(owner: str, reference: Tensor, data_range: float | Tensor | None) -> float | Tensor:
    if data_range is None:
        if reference.is_complex():
            raise ArgumentError(f"{owner}: a complex reference has no span; give data_range")
        return reference.amax((-2, -1)) - reference.amin((-2, -1))
    if bool(torch.as_tensor(data_range <= 0).any()):
        raise ArgumentError(f"{owner}: data_range must be > 0; got {data_range}")
    return data_range


def _check(owner: str, x: Tensor, reference: Tensor, *, real: bool = False) -> None:
    for name, value in (("x", x), ("reference", reference)):
        if not isinstance(value, Tensor) or not (value.is_floating_point() or (value.is_complex() and not real)):
            raise DtypeError(
                f"{owner}: {name} must be a {'real' if real else 'real or complex'} floating point tensor; "
                f"got {getattr(value, 'dtype', type(value).__name__)}; use torch.as_tensor({name}).float()"
            )
    if x.ndim < 2 or reference.ndim < 2 or x.shape[-2:] != reference.shape[-2:]:
        raise ShapeError(
            f"{owner} expects images (..., n, m) of one size; got {tuple(x.shape)} and {tuple(reference.shape)}"
        )
