"""The rotation centre and the angles are found from the data, by a gradient that is right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pullback.core.errors import ArgumentError, ShapeError
from pullback.imaging.calibrate import _Consistency, _Point, calibrate
from pullback.imaging.xray import XRayTransform

TOOTH = Path(__file__).parents[2] / "shared" / "data" / "tooth.h5"


def phantom(n):
    """A disk that holds ellipses of several sizes and values."""
    grid = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 2)
    y, x = grid[:, None], grid
    image = torch.zeros(n, n, dtype=torch.float64)
    for cx, cy, a, b, angle, value in (
        (0, 0, 0.85, 0.7, 0.3, 1.0),
        (-0.3, 0.2, 0.2, 0.3, 0.5, 0.5),
        (0.35, -0.1, 0.12, 0.35, 1.2, -0.7),
        (0.1, -0.4, 0.25, 0.06, 0.1, 0.8),
        (-0.45, -0.25, 0.05, 0.05, 0, 1.0),
        (0.2, 0.4, 0.06, 0.1, 0.8, -0.6),
    ):
        u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
        image += value * ((u / a) ** 2 + (v / b) ** 2 < 1)
    return image


def scan(n=96, n_columns=108, n_angles=120, center=56.7, jitter=0.0, noise=0.005, n_slices=1):
    """The sinogram (of Joseph's method), the nominal angles and the true ones."""
    g = torch.Generator().manual_seed(3)
    nominal = torch.arange(n_angles, dtype=torch.float64) * math.pi / n_angles
    errors = torch.randn(n_angles, generator=g, dtype=torch.float64) * math.radians(jitter)
    true = nominal + errors - errors.mean()
    image = phantom(n)
    images = torch.stack([image.roll(3 * i, 1) for i in range(n_slices)])
    y = XRayTransform((n, n), true, n_columns, center=center)(images)
    y = y + noise * y.max() * torch.randn(y.shape, generator=g, dtype=torch.float64)
    return y if n_slices > 1 else y[0], nominal, true


def rms(angles):
    return math.degrees(float(angles.square().mean().sqrt()))


@pytest.mark.parametrize("offset", [-9.0, 0.0, 3.2, 11.5])
def test_centre_is_recovered(offset):
    y, nominal, _ = scan(center=53.5 + offset)
    found = calibrate(y, nominal, parameters=("center",))
    print(f"offset {offset}: error {found.center - 53.5 - offset:+.3f} pixels, {found.evaluations} evaluations")
    assert abs(found.center - 53.5 - offset) < 0.2
    assert found.center_before == 53.5
    assert torch.equal(found.angles, nominal) and found.angle_change == 0
    if offset:
        assert found.residual < 0.5 * found.residual_before


def test_centre_and_angles_are_recovered():
    y, nominal, true = scan(jitter=1.0)
    found = calibrate(y, nominal)
    before, after = rms(nominal - true), rms(found.angles - true)
    print(f"centre error {found.center - 56.7:+.3f} pixels, angle error {before:.3f} -> {after:.3f} degrees rms")
    assert abs(found.center - 56.7) < 0.2
    assert after < before / 3
    assert abs(float((found.angles - nominal).mean())) < 1e-12
    assert found.residual < found.residual_before


def test_angles_alone_leave_the_centre():
    y, nominal, true = scan(jitter=1.0)
    found = calibrate(y, nominal, center=56.7, parameters=("angles",))
    assert found.center == 56.7
    assert rms(found.angles - true) < rms(nominal - true) / 3


def test_slices_share_a_geometry():
    y, nominal, _ = scan(n_slices=2)
    found = calibrate(y, nominal, parameters=("center",))
    assert abs(found.center - 56.7) < 0.2


def test_exact_geometry_stays():
    y, nominal, _ = scan()
    found = calibrate(y, nominal, center=56.7, parameters=("center",))
    assert abs(found.center - 56.7) < 0.1


def test_every_evaluation_is_reported():
    y, nominal, _ = scan(n=48, n_columns=54, center=28, n_angles=40)
    seen = []
    found = calibrate(y, nominal, callback=seen.append)
    assert seen == found.history and len(seen) == found.evaluations
    assert {"stage", "binning", "center", "misfit"} <= set(seen[0])


def test_the_gradient_is_that_of_the_minimum():
    """Envelope theorem: autograd at fixed u against finite differences of the whole minimum over u."""
    y, nominal, _ = scan(n=24, n_columns=28, center=14.3, n_angles=30)
    misfit = _Consistency(y, nominal, 1, 1e-2)
    misfit.y, misfit.weight = misfit.y.double(), misfit.weight.double()

    def minimum(center, shift):
        misfit.image = None
        misfit._solve(_Point(center.detach(), shift.detach()), 60)
        return misfit(_Point(center, shift))

    center = torch.tensor(13.1, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(minimum(center, shift), (center, shift))
    with torch.no_grad():
        h = 1e-4
        slope = (minimum(center + h, shift) - minimum(center - h, shift)) / (2 * h)
        assert float(gradient[0]) == pytest.approx(float(slope), rel=1e-3)
        step = torch.zeros_like(shift)
        step[7] = h
        slope = (minimum(center, shift + step) - minimum(center, shift - step)) / (2 * h)
        assert float(gradient[1][7]) == pytest.approx(float(slope), rel=1e-3)


def test_calibrate_refuses():
    y, nominal, _ = scan(n=24, n_columns=28, center=14, n_angles=30)
    for arguments, kind, message in (
        ((y, nominal[1:]), ShapeError, r"got \(30, 28\) and \(29,\)"),
        ((y * math.nan, nominal), ArgumentError, "holds NaN"),
        ((y * 0, nominal), ArgumentError, "zero everywhere"),
        ((y[:2], nominal[:2]), ArgumentError, "at least 3 views"),
    ):
        with pytest.raises(kind, match=message):
            calibrate(*arguments)
    for options, message in (
        ({"parameters": ("tilt",)}, "must be among center, angles; got tilt"),
        ({"parameters": ()}, "got none"),
        ({"center": 1000.0}, "near the detector of 28 pixels; got 1000"),
        ({"maxiter": 0}, "maxiter must be at least 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            calibrate(y, nominal, **options)


@pytest.mark.slow
@pytest.mark.skipif(not TOOTH.exists(), reason="the measured scan ../shared/data/tooth.h5 is not there")
def test_tooth_centre_from_24_pixels_off():
    from pullback.io import open_sinogram

    source = open_sinogram(TOOTH)
    y, angles = torch.from_numpy(source.read(0)), torch.from_numpy(np.deg2rad(source.angles))
    source.close()
    found = calibrate(y, angles, center=320.0, parameters=("center",))
    print(f"tooth: centre 320 -> {found.center:.2f}, misfit {found.residual_before:.4f} -> {found.residual:.4f}")
    assert abs(found.center - 296) < 1.5
    assert found.residual < 0.2 * found.residual_before
