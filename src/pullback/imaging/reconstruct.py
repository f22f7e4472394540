"""A slice from its sinogram by any solver, with defaults from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pullback.solvers as solvers
from pullback.core.errors import ArgumentError
from pullback.functionals import TV
from pullback.imaging.fbp import fbp
from pullback.imaging.noise import noise_level
from pullback.imaging.xray import XRayTransform
from pullback.linops import DWT2D
from pullback.solvers import Solution, Status

FILTERS = ("ramp", "shepp-logan", "cosine", "hamming", "hann")

_PROX_ITERATIONS = 20  # of the inner loop of the TV prox: its error stays below what one outer iteration changes


@dataclass(frozen=True)
class Method:
    """How a slice is found.

    Args:
        solve: (A, y, start, weight, **options) -> Solution.
        maxiter: iterations by default.
        is_tv: it has the weight of a total variation, and starts from the fbp image under a Hann window.
    """

    solve: Callable[..., Solution]
    maxiter: int
    is_tv: bool = True


def _early(solver: Callable[..., Solution]) -> Callable[..., Solution]:
    """A least-squares solver that is regularised by stopping early."""
    return lambda A, y, start, weight, **options: solver(A, y, **options)


def _direct(solver: Callable[..., Solution]) -> Callable[..., Solution]:
    """A solver that takes the prox of TV."""
    return lambda A, y, start, weight, **options: solver(A, y, _prox(A, weight), x0=start, rtol=1e-4, **options)


def _split(solver: Callable[..., Solution]) -> Callable[..., Solution]:
    """A solver that splits TV into a norm and the gradient."""
    return lambda A, y, start, weight, **options: solver(A, y, weight * TV(A.dims), x0=start, rtol=1e-4, **options)


def _prox(A: XRayTransform, weight: float) -> Any:
    return weight * TV(A.dims, maxiter=_PROX_ITERATIONS, rtol=0)


def _bregman(A: XRayTransform, y: Tensor, start: Tensor, weight: float, **options: Any) -> Solution:
    gradient = TV(A.dims).operator
    return solvers.split_bregman(A, y, [gradient], eps=[weight], isotropic=True, x0=start, rtol=1e-4, **options)


def _denoised(solver: Callable[..., Solution]) -> Callable[..., Solution]:
    """A solver that takes a denoiser, here the prox of TV for the step of the solver."""

    def solve(A: XRayTransform, y: Tensor, start: Tensor, weight: float, **options: Any) -> Solution:
        step = 1 / A.norm_bound() ** 2
        g = _prox(A, weight)
        if solver is solvers.red:
            options["weight"] = 1 / step
        return solver(A, y, lambda x: g.prox(x, step), x0=start, rtol=1e-4, **options)

    return solve


def _robust(A: XRayTransform, y: Tensor, start: Tensor, weight: float, **options: Any) -> Solution:
    smoothing = max(float(noise_level(y)), 1e-6 * float(y.abs().max()))
    return solvers.irls(A, y, kind="data", p=1, smoothing=smoothing, inner_maxiter=10, rtol=1e-3, **options)


def _sparse(A: XRayTransform, y: Tensor, start: Tensor, weight: float, **options: Any) -> Solution:
    """Haar wavelets, one an iteration, those that explain most of what is left."""
    wavelets = DWT2D(A.dims, wavelet="haar", level=3, mode="zero").inverse()
    solution = solvers.omp(A @ wavelets, y, options.pop("maxiter"), **options)
    return replace(solution, x=wavelets(solution.x))


METHODS: dict[str, Method] = {
    "fbp": Method(_early(solvers.cgls), 0, False),  # a formula, not a solver
    "cgls": Method(_early(solvers.cgls), 20, False),
    "lsqr": Method(_early(solvers.lsqr), 20, False),
    "lsmr": Method(_early(solvers.lsmr), 20, False),
    "landweber": Method(_early(solvers.landweber), 100, False),
    "sirt": Method(_early(solvers.sirt), 60, False),
    "irls": Method(_robust, 4, False),
    "omp": Method(_sparse, 60, False),
    "ista-tv": Method(_direct(solvers.ista), 200),
    "fista-tv": Method(_direct(solvers.fista), 100),
    "pdhg-tv": Method(_split(solvers.pdhg), 150),
    "admm-tv": Method(_split(solvers.admm), 60),
    "condat-vu-tv": Method(_split(solvers.condat_vu), 200),
    "douglas-rachford-tv": Method(_direct(solvers.douglas_rachford), 60),
    "davis-yin-tv": Method(_direct(solvers.davis_yin), 200),
    "split-bregman-tv": Method(_bregman, 60),
    "hqs-tv": Method(_split(solvers.hqs), 60),
    "plug-and-play-tv": Method(_denoised(solvers.plug_and_play), 200),
    "red-tv": Method(_denoised(solvers.red), 200),
}
MAXITER = {name: m.maxiter for name, m in METHODS.items()}


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
    progress: Any = False,
) -> Reconstruction:
    """Find u in y = A u + noise by one of the methods

    - `fbp`: the inversion formula, with a window on its ramp `filter`;
    - `cgls`, `lsqr`, `lsmr`, `landweber`, `sirt`: argmin |A u - y|^2, regularised by stopping early: after `maxiter`
      steps if given, else where the residual reaches the noise level of y (the discrepancy principle);
    - `irls`: argmin |A u - y|_1, for data with outliers, stopped early;
    - `omp`: the sum of `maxiter` Haar wavelets that explain y best;
    - all others, whose names end in -tv: argmin |A u - y|^2 / 2 + weight TV(u), started from the fbp image under a Hann
      window. (`hqs-tv` smooths the TV a little; `plug-and-play-tv` and `red-tv` take its prox as their denoiser.)

    Args:
        A: the X-ray transform.
        y: line integrals of one slice, shape (n_angles, n_columns).
        method: one of METHODS; "-tv" may be left away.
        weight: of the total variation, with differences between neighbouring pixels; `tv_weight(A, y)` if None.
        maxiter: iterations; at most MAXITER[method] if None.
        filter: of fbp, one of FILTERS.
        progress: show a bar with the iterations.

    Returns: Reconstruction.
    Raises: ArgumentError, ShapeError, DtypeError.
    """
    method = check_method(method, weight, maxiter, filter)
    if method == "fbp":
        image = fbp(A, y, filter)
        return Reconstruction(image, relative_residual(A, image, y), 0, "", 0.0)
    chosen = METHODS[method]
    used, start, options = 0.0, None, {"maxiter": chosen.maxiter if maxiter is None else maxiter, "progress": progress}
    if chosen.is_tv:
        used = tv_weight(A, y) if weight is None else weight
        start = fbp(A, y, "hann").contiguous()
    elif maxiter is None:
        noise = float(noise_level(y)) * math.sqrt(y.numel())
        options["callback"] = lambda state: bool(state.values["residual"] <= noise)
    solution = chosen.solve(A, y, start, used, **options)
    status = str(solution.status)
    if solution.status is Status.CALLBACK:
        status = "stopped where the residual reached the noise level of the data"
    return Reconstruction(solution.x, relative_residual(A, solution.x, y), solution.iterations, status, used)


def check_method(method: str, weight: float | None, maxiter: int | None, filter: str) -> str:
    """The full name of a method; ArgumentError unless the arguments of `reconstruct` have values that it accepts."""
    method = f"{method}-tv" if f"{method}-tv" in METHODS else method
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if filter not in FILTERS:
        raise ArgumentError(f"filter must be one of {', '.join(FILTERS)}; got {filter!r}")
    if weight is not None and not (weight >= 0 and math.isfinite(weight)):
        raise ArgumentError(f"weight must be a number >= 0; got {weight}")
    if maxiter is not None and maxiter < 1:
        raise ArgumentError(f"maxiter must be at least 1; got {maxiter}")
    return method


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
