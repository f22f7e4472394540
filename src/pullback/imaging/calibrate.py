"""The geometry of a scan from its own data: rotation centre and angle errors, by gradient through the operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.imaging.xray import XRayTransform

PARAMETERS = ("center", "angles")

_COARSE = 72  # detector pixels on the first level: an offset of a tenth of the detector is a few of them
_FINE = 320  # and at most so many on the last; finer levels no longer move the centre by a hundredth of a pixel
_VIEWS = 0.72  # detector pixels a view when angles move: the image then has (pi/4) n^2 unknowns, half as many as data
_DAMP_COARSE, _DAMP = 2e-2, 1e-4  # damping of the image, relative to A^H W A, which is close to the identity
_PRIOR = 0.3  # an angle error of one pixel at half the radius costs this fraction of the misfit at the start of a level


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        center: position of the rotation axis [detector pixels].
        angles: angles of the views, float64 of shape (n_angles,) [rad].
        center_before, angles_before: the start.
        residual, residual_before: |A u - y| / |y| with u the damped least-squares image, after and before, both on the
            same detector, binned by `binning`.
        binning: detector pixels that were averaged on the finest level.
        evaluations: how often the misfit and its gradient were computed.
        history: one entry an evaluation: stage, binning, center and misfit relative to the stage's start.
    """

    center: float
    angles: Tensor
    center_before: float
    angles_before: Tensor
    residual: float
    residual_before: float
    binning: int
    evaluations: int
    history: list[dict[str, Any]] = field(repr=False)

    @property
    def angle_change(self) -> float:
        """Root mean square of the change of the angles [rad]."""
        return float((self.angles - self.angles_before).square().mean().sqrt())


def calibrate(
    y: Tensor,
    angles: Tensor | np.ndarray | Sequence[float],
    *,
    center: float | None = None,
    parameters: Sequence[str] = PARAMETERS,
    maxiter: int = 15,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Calibration:
    """The minimiser over (c, theta) of min_u |A(c, theta) u - y|_W^2 + damp |u|^2: where the data agree best.

    The inner minimum is an image, found by conjugate gradients; W is the ramp filter under a Hann window, which makes
    A^H W A nearly the identity, so a few iterations do. By the envelope theorem the gradient in c and theta is that of
    the misfit at fixed u: it comes from autograd through XRayTransform. L-BFGS goes along it, on coarsely binned data
    first (centre only, where the misfit is convex over tens of pixels) and ever finer then. No start but `center` is
    used: neither the centre of mass nor the correlation of opposite views.

    An image turned by a constant angle fits data whose angles are all changed by it. So the mean angle error cannot be
    found, and is fixed at zero. Angle errors are only refined as finely as the views determine an image (0.72 n_angles
    binned pixels or fewer), and damped by a prior; what remains is some tenths of a binned pixel at half the radius.

    Args:
        y: line integrals of shape (..., n_angles, n_columns); leading axes are slices that share the geometry.
        angles: the nominal angles [rad], shape (n_angles,).
        center: where to start [detector pixels]; (n_columns - 1)/2 if None.
        parameters: "center", "angles" or both; the others stay as they are.
        maxiter: L-BFGS iterations on each level.
        callback: called with every entry of the history.

    Returns: Calibration.
    Raises: ArgumentError, ShapeError.
    Not supported: an object that leaves the detector on some views only, which makes data inconsistent by itself; views
    that cover much less than 180 degrees, which hardly tell a shift of the axis from one of the object (over 120
    degrees the centre of a 108-pixel scan came out 4 pixels off).
    Cost: some 60 evaluations, each about 15 applications of the binned operator and of its adjoint.
    Source: variable projection, Golub & Pereyra 2003, doi 10.1088/0266-5611/19/2/201.
    """
    theta = torch.as_tensor(angles).detach().to(torch.float64)
    _check(y, theta, parameters, maxiter)
    n_columns = y.shape[-1]
    start = (n_columns - 1) / 2 if center is None else float(center)
    if not -0.5 * n_columns <= start <= 1.5 * n_columns:
        raise ArgumentError(f"calibrate: center must lie near the detector of {n_columns} pixels; got {start}")
    y = y.detach().to(torch.float32)

    point = _Point(torch.tensor(start, dtype=torch.float64), torch.zeros_like(theta))
    history: list[dict[str, Any]] = []
    stages = _stages(n_columns, len(theta), parameters)
    for i, stage in enumerate(stages):
        point = _descend(_Consistency(y, theta, stage.binning, stage.damp), stage, point, maxiter, history, callback, i)

    finest = min(stage.binning for stage in stages)
    after = _Consistency(y, theta, finest, _DAMP).residual(point)
    before_point = _Point(torch.tensor(start, dtype=torch.float64), torch.zeros_like(theta))
    before = _Consistency(y, theta, finest, _DAMP).residual(before_point)
    return Calibration(
        center=float(point.center),
        angles=theta + point.shift,
        center_before=start,
        angles_before=theta,
        residual=after,
        residual_before=before,
        binning=finest,
        evaluations=len(history),
        history=history,
    )


@dataclass(frozen=True)
class _Stage:
    """One minimisation: which parameters move, and how coarse the data are."""

    parameters: tuple[str, ...]
    binning: int
    damp: float


@dataclass(frozen=True)
class _Point:
    """A geometry: centre [detector pixels] and angle errors [rad], both float64."""

    center: Tensor
    shift: Tensor


def _stages(n_columns: int, n_angles: int, parameters: Sequence[str]) -> list[_Stage]:
    """From coarse to fine: the centre alone, then the angles (and the centre) with it, and the centre alone again."""
    coarse = max(1, round(n_columns / _COARSE))
    fine = max(1, math.ceil(n_columns / _FINE))
    stages = []
    if "center" in parameters:
        stages.append(_Stage(("center",), coarse, _DAMP_COARSE))
    if "angles" in parameters:
        both = tuple(p for p in PARAMETERS if p in parameters)
        finest = max(1, math.ceil(n_columns / min(_FINE, _VIEWS * n_angles)))
        stages.extend(_Stage(both, k, _DAMP) for k in _halving(coarse, finest))
    if "center" in parameters:
        stages.extend(_Stage(("center",), k, _DAMP) for k in (_halving(coarse, fine)[-1:]))
    return stages


def _halving(coarse: int, fine: int) -> list[int]:
    levels = [fine]
    while 2 * levels[0] <= coarse:
        levels.insert(0, 2 * levels[0])
    return levels


class _Consistency:
    """min_u |A(c, theta) u - y|_W^2 + damp |u|^2 as a differentiable function of the geometry, on binned data."""

    def __init__(self, y: Tensor, theta: Tensor, binning: int, damp: float) -> None:
        n = y.shape[-1] // binning
        self.y = y[..., : n * binning].unflatten(-1, (n, binning)).mean(-1)
        self.theta, self.binning, self.damp = theta, binning, damp
        self.n = n
        self.radius = n / 4  # half that of the field of view [binned pixels]: where an angle error becomes a length
        length = 2 * n
        frequency = torch.fft.rfftfreq(length, dtype=torch.float32, device=y.device)
        hann = 0.5 + 0.5 * torch.cos(2 * math.pi * frequency)
        # the ramp's zero frequency is not zero: the mean of the image must be determined too
        self.weight = (frequency + 0.25 / length) * hann * (math.pi / len(theta))
        self.image: Tensor | None = None

    def operator(self, point: _Point) -> XRayTransform:
        center = (point.center + 0.5) / self.binning - 0.5
        return XRayTransform((self.n, self.n), self.theta + point.shift, self.n, center=center, method="fourier")

    def __call__(self, point: _Point) -> Tensor:
        """The misfit. Its gradient is right because u is a minimiser: du contributes nothing to first order."""
        u = self._solve(_Point(point.center.detach(), point.shift.detach()))
        r = self.operator(point)(u) - self.y
        return (r * self._filter(r)).sum().double() + self.damp * u.square().sum().double()

    def residual(self, point: _Point) -> float:
        with torch.no_grad():
            u = self._solve(point, 30)
            return float((self.operator(point)(u) - self.y).norm() / self.y.norm())

    def _filter(self, y: Tensor) -> Tensor:
        length = 2 * self.n
        return torch.fft.irfft(torch.fft.rfft(y, n=length) * self.weight, n=length)[..., : self.n]

    @torch.no_grad()
    def _solve(self, point: _Point, maxiter: int = 15) -> Tensor:
        """Conjugate gradients on (A^H W A + damp) u = A^H W y from the last image; the first time twice as many."""
        A = self.operator(point)

        def normal(u: Tensor) -> Tensor:
            return A.H(self._filter(A(u))) + self.damp * u

        b = A.H(self._filter(self.y))
        u = torch.zeros_like(b) if self.image is None else self.image
        r = b - normal(u)
        p, size = r, r.square().sum()
        floor = 1e-10 * b.square().sum()
        for _ in range(maxiter if self.image is not None else 2 * maxiter):
            if size <= floor:
                break
            q = normal(p)
            step = size / (p * q).sum()
            u = u + step * p
            r = r - step * q
            new = r.square().sum()
            p = r + (new / size) * p
            size = new
        self.image = u
        return u


def _descend(
    misfit: _Consistency,
    stage: _Stage,
    start: _Point,
    maxiter: int,
    history: list[dict[str, Any]],
    callback: Callable[[dict[str, Any]], None] | None,
    index: int,
) -> _Point:
    """L-BFGS over the parameters of a stage, in binned pixels, so that all have the same curvature roughly.

    The centre moves all views together, an angle one: hence the root of their number.
    """
    n = len(misfit.theta)
    moves_center, moves_angles = "center" in stage.parameters, "angles" in stage.parameters
    unit = 1 / math.sqrt(n) if moves_angles else 1.0
    free = torch.zeros(int(moves_center) + n * int(moves_angles), dtype=torch.float64, requires_grad=True)

    def point() -> _Point:
        center, shift = start.center, start.shift
        if moves_center:
            center = center + stage.binning * unit * free[0]
        if moves_angles:
            arc = free[int(moves_center) :]
            shift = shift + (arc - arc.mean()) / misfit.radius
        return _Point(center, shift)

    first: list[float] = []
    best: list[tuple[float, _Point]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        here = point()
        value = misfit(here)
        if not first:
            first.append(max(value.item(), torch.finfo(torch.float64).tiny))
        value = value / first[0]
        if moves_angles:
            value = value + _PRIOR * (here.shift * misfit.radius).square().mean()
        value.backward()
        entry: dict[str, Any] = {
            "stage": index,
            "parameters": list(stage.parameters),
            "binning": stage.binning,
            "center": here.center.item(),
            "misfit": value.item(),
        }
        history.append(entry)
        if callback is not None:
            callback(entry)
        if math.isfinite(entry["misfit"]) and (not best or entry["misfit"] <= best[0][0]):
            best[:] = [(entry["misfit"], _Point(here.center.detach(), here.shift.detach()))]
        return value

    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=maxiter if moves_angles else min(maxiter, 6),  # one parameter: a few secant steps
        max_eval=4 * maxiter,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-8,
        tolerance_change=1e-5 if moves_angles else 1e-3,
    )
    optimizer.step(closure)
    return best[0][1] if best else start


def _check(y: Tensor, theta: Tensor, parameters: Sequence[str], maxiter: int) -> None:
    if theta.ndim != 1 or y.ndim < 2 or y.shape[-2] != len(theta):
        raise ShapeError(
            f"calibrate expects y of shape (..., n_angles, n_columns) and n_angles angles; "
            f"got {tuple(y.shape)} and {tuple(theta.shape)}"
        )
    if not parameters or any(p not in PARAMETERS for p in parameters):
        raise ArgumentError(
            f"calibrate: parameters must be among {', '.join(PARAMETERS)}; got {', '.join(parameters) or 'none'}"
        )
    if len(theta) < 3 or y.shape[-1] < 8:
        raise ArgumentError(f"calibrate needs at least 3 views of 8 columns; got {len(theta)} of {y.shape[-1]}")
    if maxiter < 1:
        raise ArgumentError(f"calibrate: maxiter must be at least 1; got {maxiter}")
    if not bool(torch.isfinite(y).all()):
        raise ArgumentError("calibrate: y holds NaN or infinite values; replace or drop them")
    if not bool((y != 0).any()):
        raise ArgumentError("calibrate: y is zero everywhere, so it says nothing about the geometry")
