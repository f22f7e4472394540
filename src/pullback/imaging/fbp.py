"""Filtered back-projection: the inversion formula of the plane X-ray transform, discretised."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.imaging.xray import XRayTransform

# name -> window w(f), f being the frequency as a fraction of the detector's Nyquist frequency, 0 <= f <= 1
_WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ramp": torch.ones_like,
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: torch.cos(math.pi / 2 * f),
    "hamming": lambda f: 0.54 + 0.46 * torch.cos(math.pi * f),
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}

_FINER = 4  # the filtered views are interpolated to a detector this many times finer before they are spread


def fbp(A: XRayTransform, y: Tensor, filter: str | None = "ramp") -> Tensor:
    """u(x) = integral_0^pi (h * y_theta)(x cos(theta) + y sin(theta)) dtheta, h the ramp filter with spectrum |f| w(f).

    Args:
        A: the X-ray transform that made the data. Its views should cover 180 degrees, in any order and spacing; each
            counts for half of the angle between its two neighbours (modulo 180 degrees), so these fill a gap.
        y: sinogram [u * length], shape (..., n_angles, det_count), real or complex.
        filter: window w: "ramp" (w = 1), "shepp-logan", "cosine", "hamming", "hann" (ever smoother); None: no filter at
            all, the plain back-projection with the same weights.

    Returns: the image (..., n_y, n_x), differentiable in y and in the angles and center of A.

    Raises: ArgumentError, ShapeError, DtypeError.

    The ramp is the spectrum of its band-limited kernel, 1/4 at 0 and -1/(pi n)^2 at odd n, on a zero-padded detector:
    |f| sampled directly would lose the mean of the image. A projection wider than the detector is not completed.

    Cost: an adjoint of Joseph's method on a detector four times finer, whatever the method of A.

    Source: A. C. Kak, M. Slaney, Principles of Computerized Tomographic Imaging (1988), chapter 3, equation 61.
    """
    if not isinstance(A, XRayTransform):
        raise ArgumentError(
            f"fbp: A must be an XRayTransform; got {type(A).__name__}; build one with the geometry of the data"
        )
    if filter is not None and filter not in _WINDOWS:
        raise ArgumentError(f"fbp: filter must be None or one of {', '.join(map(repr, _WINDOWS))}; got {filter!r}")
    if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
        raise DtypeError(
            f"fbp: y must be a floating point or complex tensor; got {getattr(y, 'dtype', type(y).__name__)}"
        )
    if tuple(y.shape[-2:]) != A.dimsd:
        raise ShapeError(
            f"fbp: y must have shape (..., {A.dimsd[0]}, {A.dimsd[1]}); got {tuple(y.shape)}; views come first"
        )
    if y.is_complex():
        return torch.complex(fbp(A, y.real, filter), fbp(A, y.imag, filter))
    if y.dtype in (torch.float16, torch.bfloat16):
        return fbp(A, y.float(), filter).to(y.dtype)

    fine_count = (A.det_count - 1) * _FINER + 1
    views = _filtered(y, A.det_spacing, filter)[..., :fine_count] * _view_weights(A.angles).to(y.dtype)
    # For a detector much finer than the pixels the adjoint interpolates, up to the factor pixel_size^2 / spacing.
    spread = XRayTransform(
        A.dims, A.angles, fine_count, A.det_spacing / _FINER, A.center * _FINER, A.pixel_size, method="joseph"
    )
    return spread.H(views) * (A.det_spacing / _FINER / A.pixel_size**2)


def _filtered(y: Tensor, spacing: float, filter: str | None) -> Tensor:
    """The views convolved with the windowed ramp, at steps of spacing/_FINER from detector pixel 0 on."""
    n_k = y.shape[-1]
    n = 1 << (2 * n_k - 1).bit_length()
    spectrum = torch.fft.rfft(y, n=n)
    if filter is not None:
        lag = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=y.device)
        odd = lag.abs() % 2 == 1
        kernel = torch.where(odd, -1 / (math.pi * lag) ** 2, 0.0)
        kernel[0] = 0.25
        ramp = torch.fft.rfft(kernel).real / spacing
        fraction = torch.linspace(0, 1, n // 2 + 1, dtype=torch.float64, device=y.device)
        spectrum = spectrum * (ramp * _WINDOWS[filter](fraction)).to(y.dtype)
    # The Nyquist term stands for two frequencies once the transform is longer.
    spectrum = torch.cat((spectrum[..., :-1], spectrum[..., -1:] / 2), -1)
    return torch.fft.irfft(spectrum, n=n * _FINER) * _FINER


def _view_weights(angles: Tensor) -> Tensor:
    """Half of the angle between the two neighbours of each view, modulo pi; they add up to pi. Shape (n_angles, 1)."""
    direction, order = torch.sort(torch.remainder(angles, math.pi))
    after = torch.cat((direction[1:], direction[:1] + math.pi)) - direction
    gaps = (after + after.roll(1)) / 2
    return gaps[torch.argsort(order)][:, None]
