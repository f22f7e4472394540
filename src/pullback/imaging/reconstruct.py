"""A slice from its sinogram: filtered back-projection, CGLS, or total variation, with defaults from the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.functionals import TV
from pullback.imaging.fbp import fbp
from pullback.imaging.noise import noise_level
from pullback.imaging.xray import XRayTransform
from pullback.solvers import Status, cgls, fista, pdhg

METHODS = ("fbp", "cgls", "fista-tv", "pdhg-tv")
FILTERS = ("ramp", "shepp-logan", "cosine", "hamming", "hann")
MAXITER = {"fbp": 0, "cgls": 20, "fista-tv": 100, "pdhg-tv": 150}

_PROX_ITERATIONS = 20  # of the inner loop of the TV prox: its error stays below what one outer iteration changes


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed slice and how it came about.

    Attributes:
        image: shape (..., n_y, n_x) [1 / length].
        residual: |A u - y| / |y|.
        iterations: iterations done; 0 for fbp.
        status: how the solver ended, as advice; empty for fbp.
        weight: weight of the total variation; 0 for methods without.
    """

    image: Tensor
    residual: float
    iterations: int
    status: str
    weight: float


def reconstruct(
    A: XRayTransform,
    y: Tensor,
    method: str = "fista-tv",
    *,
    weight: float | None = None,
    maxiter: int | None = None,
    filter: str = "ramp",
) -> Reconstruction:
    """Find u in y = A u + noise by one of the methods

    - `fbp`: the inversion formula, with a window on its ramp `filter`;
    - `cgls`: argmin |A u - y|^2, regularised by stopping early: after `maxiter` conjugate gradient steps if given, else
      where the residual reaches the noise level of y (the discrepancy principle), after 20 steps at the latest;
    - `fista-tv`, `pdhg-tv`: argmin |A u - y|^2 / 2 + weight TV(u), started from the fbp image under a Hann window.

    Args:
        A: the X-ray transform.
        y: line integrals of one slice, shape (n_angles, n_columns).
        method: one of METHODS.
        weight: of the total variation, with differences between neighbouring pixels; `tv_weight(A, y)` if None.
        maxiter: iterations; at most MAXITER[method] if None.
        filter: of fbp, one of FILTERS.

    Returns: Reconstruction.
    Raises: ArgumentError, ShapeError, DtypeError.
    """
    check_method(method, weight, maxiter, filter)
    steps = MAXITER[method] if maxiter is None else maxiter
    used, iterations, status = 0.0, 0, ""
    if method == "fbp":
        image = fbp(A, y, filter)
    elif method == "cgls":
        noise = float(noise_level(y)) * math.sqrt(y.numel()) if maxiter is None else 0.0
        solution = cgls(A, y, maxiter=steps, rtol=1e-4, callback=lambda state: bool(state.values["residual"] <= noise))
        image, iterations, status = solution.x, solution.iterations, str(solution.status)
        if solution.status is Status.CALLBACK:
            status = "stopped where the residual reached the noise level of the data"
    else:
        used = tv_weight(A, y) if weight is None else weight
        start = fbp(A, y, "hann").contiguous()
        if method == "fista-tv":
            g = used * TV(A.dims, maxiter=_PROX_ITERATIONS, rtol=0)
            solution = fista(A, y, g, x0=start, maxiter=steps, rtol=1e-4)
        else:
            solution = pdhg(A, y, used * TV(A.dims), x0=start, maxiter=steps, rtol=1e-4)
        image, iterations, status = solution.x, solution.iterations, str(solution.status)
    return Reconstruction(image, relative_residual(A, image, y), iterations, status, used)


def check_method(method: str, weight: float | None, maxiter: int | None, filter: str) -> None:
    """Raise ArgumentError unless the arguments of `reconstruct` have values that it accepts."""
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if filter not in FILTERS:
        raise ArgumentError(f"filter must be one of {', '.join(FILTERS)}; got {filter!r}")
    if weight is not None and not (weight >= 0 and math.isfinite(weight)):
        raise ArgumentError(f"weight must be a number >= 0; got {weight}")
    if maxiter is not None and maxiter < 1:
        raise ArgumentError(f"maxiter must be at least 1; got {maxiter}")


def relative_residual(A: XRayTransform, image: Tensor, y: Tensor) -> float:
    """|A u - y| / |y|; 0 where y is zero."""
    with torch.no_grad():
        size = float(y.norm())
        return float((A(image) - y).norm()) / size if size > 0 else 0.0


def tv_weight(A: XRayTransform, y: Tensor, factor: float = 0.3) -> float:
    """The weight factor * rms |p|: p is the smallest field with div p = A^H n, and n noise of the level found in y.

    Zero minimises |A u - n|^2 / 2 + w TV(u) if and only if A^H n = div p for some |p| <= w: so |p| measures the weight
    at which noise disappears. The p of least mean square costs a Poisson equation. The factor is a heuristic between
    noise that shows and edges that blur: 0.3 gave the best PSNR, to 0.5 dB, on a CT slice from 60 views at 5000, 20000
    and 100000 photons a ray.

    Args:
        A: the X-ray transform.
        y: line integrals of one slice, shape (n_angles, n_columns).
        factor: a larger one smooths more.

    Returns: the weight, proportional to the noise, and such that the image does not change with the unit of length.
    Cost: one adjoint and two FFTs. The noise drawn has a fixed seed, so equal data give equal weights.
    """
    sigma = float(noise_level(y))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(A.dimsd, generator=generator, dtype=torch.float64).to(y) * sigma
    with torch.no_grad():
        p = _field(A.H(noise).double())
        return factor * float(p.square().sum(0).mean().sqrt())


def _field(b: Tensor) -> Tensor:
    """The gradient p of Laplace^-1 b without flow over the border, b (n, m) minus its mean. Shape (2, n, m)."""
    n, m = b.shape
    b = b - b.mean()
    mirrored = torch.cat((b, b.flip(0)), 0)
    mirrored = torch.cat((mirrored, mirrored.flip(1)), 1)
    fy = torch.arange(2 * n, dtype=b.dtype, device=b.device)[:, None] * (math.pi / (2 * n))
    fx = torch.arange(m + 1, dtype=b.dtype, device=b.device) * (math.pi / (2 * m))
    laplace = -4 * (fy.sin() ** 2 + fx.sin() ** 2)
    laplace[0, 0] = 1
    spectrum = torch.fft.rfft2(mirrored) / laplace
    spectrum[0, 0] = 0
    phi = torch.fft.irfft2(spectrum, s=mirrored.shape)
    return torch.stack((phi.roll(-1, 0) - phi, phi.roll(-1, 1) - phi))[:, :n, :m]
