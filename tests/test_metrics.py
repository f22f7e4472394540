"""Metrics against scikit-image, noise against its own distribution, and the weight rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.imaging.metrics import psnr, rmse, ssim
from pullback.imaging.noise import noise_level, noise_transmission
from pullback.imaging.reconstruct import METHODS, reconstruct, tv_weight
from pullback.imaging.xray import XRayTransform


def pair(*batch, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    reference = torch.rand(*batch, 33, 40, generator=g, dtype=dtype)
    return reference + 0.2 * torch.randn(reference.shape, generator=g, dtype=dtype), reference


def test_ssim_is_that_of_scikit_image():
    x, reference = pair()
    expected = structural_similarity(
        x.numpy(),
        reference.numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.5,
    )
    assert float(ssim(x, reference, 1.5)) == pytest.approx(expected, abs=1e-12)


def test_psnr_and_rmse_are_those_of_scikit_image():
    x, reference = pair()
    expected = peak_signal_noise_ratio(reference.numpy(), x.numpy(), data_range=2.0)
    assert float(psnr(x, reference, 2.0)) == pytest.approx(expected, abs=1e-12)
    assert float(rmse(x, reference)) == pytest.approx(float(np.sqrt(((x - reference).numpy() ** 2).mean())))


@pytest.mark.parametrize("metric", [psnr, ssim, rmse])
def test_a_batch_is_the_same_as_its_members(metric):
    x, reference = pair(2, 3)
    values = metric(x, reference)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values[1, 2], metric(x[1, 2], reference[1, 2]))


@pytest.mark.parametrize("metric", [lambda a, b: psnr(a, b, 1.0), lambda a, b: ssim(a, b, 1.0), rmse])
def test_metrics_are_differentiable(metric):
    x, reference = (t[:13, :12].clone() for t in pair())
    assert torch.autograd.gradcheck(lambda a: metric(a, reference), x.requires_grad_())


def test_ideal_values():
    x, _ = pair()
    assert float(ssim(x, x)) == pytest.approx(1)
    assert math.isinf(float(psnr(x, x)))


def test_metrics_refuse():
    x, reference = pair()
    with pytest.raises(ShapeError, match=r"of one size; got \(33, 40\) and \(33, 39\)"):
        psnr(x, reference[:, :39])
    with pytest.raises(ArgumentError, match="data_range must be > 0"):
        ssim(x, reference, 0.0)
    with pytest.raises(ShapeError, match="more than 10 pixels"):
        ssim(x[:10], reference[:10])
    with pytest.raises(ArgumentError, match="sigma must be > 0"):
        ssim(x, reference, sigma=0)


def test_transmission_noise_has_the_variance_of_poisson_counts():
    y = torch.full((400, 500), 1.3)
    noisy = noise_transmission(y, 1e4, torch.Generator().manual_seed(0))
    assert noisy.dtype == torch.float32
    assert float(noisy.std()) == pytest.approx(math.exp(0.65) / 100, rel=0.01)
    assert float(noisy.mean()) == pytest.approx(1.3, abs=1e-3)
    assert torch.equal(noisy, noise_transmission(y, 1e4, torch.Generator().manual_seed(0)))
    assert float(noise_level(noisy)) == pytest.approx(float(noisy.std()), rel=0.01)


def test_rays_without_photons_stay_finite():
    noisy = noise_transmission(torch.full((50,), 30.0), 100.0, torch.Generator().manual_seed(0))
    assert bool((noisy == math.log(200)).all())
    with pytest.raises(ArgumentError, match="photons must be > 0"):
        noise_transmission(noisy, 0)


def test_noise_level_ignores_what_is_smooth():
    g = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 50, 200)[:, None] + torch.linspace(0, 9, 150) ** 2
    assert float(noise_level(ramp + 0.3 * torch.randn(200, 150, generator=g))) == pytest.approx(0.3, rel=0.03)
    with pytest.raises(ShapeError, match="n, m >= 2"):
        noise_level(torch.ones(5))


# Reconstruction by name ----------------------------------------------------------------------------------------------


def scan(units=1.0, scale=1.0):
    """A disk with a hole, 40 views, noise; lengths in `units`, attenuation times `scale`."""
    n = 32
    grid = torch.arange(n) - (n - 1) / 2
    radius = (grid[:, None] ** 2 + grid**2).sqrt()
    image = ((radius < 13) & (radius > 5)).float() * scale
    angles = torch.arange(40, dtype=torch.float64) * math.pi / 40
    A = XRayTransform((n, n), angles, 40, det_spacing=units, pixel_size=units)
    y = A(image)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return A, image, y + 0.3 * units * scale * noise


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_with_the_truth(method):
    A, image, y = scan()
    result = reconstruct(A, y, method)
    assert result.image.shape == image.shape
    expected = float((A(result.image) - y).norm() / y.norm())
    assert result.residual == pytest.approx(expected, rel=1e-5)
    floor = {"omp": 12, "red-tv": 22}.get(method, 28 if method.endswith("-tv") else 17)  # of 1024 wavelets 60; slow
    assert float(psnr(result.image, image)) > floor
    assert result.status or method == "fbp"


def test_tv_may_be_left_away():
    A, _, y = scan()
    assert torch.equal(reconstruct(A, y, "admm", maxiter=3).image, reconstruct(A, y, "admm-tv", maxiter=3).image)


@pytest.mark.slow
def test_tv_beats_the_others_with_its_own_weight():
    A, image, y = scan()
    scores = {m: float(psnr(reconstruct(A, y, m).image, image)) for m in ("fbp", "cgls", "fista-tv", "pdhg-tv")}
    print(scores)
    assert min(scores["fista-tv"], scores["pdhg-tv"]) > max(scores["fbp"], scores["cgls"]) + 3
    for factor in (0.1, 10):
        other = reconstruct(A, y, "fista-tv", weight=factor * tv_weight(A, y))
        assert float(psnr(other.image, image)) < scores["fista-tv"]


def test_the_weight_follows_the_units():
    A, _, y = scan()
    weight = tv_weight(A, y)
    B, _, z = scan(units=0.01, scale=7.0)
    # |A u - y|^2 grows with (0.01 * 7)^2, TV with 7
    assert tv_weight(B, z) == pytest.approx(weight * 0.07**2 / 7, rel=1e-3)


def test_cgls_stops_at_the_noise_unless_told_how_long():
    A, _, y = scan()
    early = reconstruct(A, y, "cgls")
    assert early.iterations < 20 and "noise level" in early.status
    assert reconstruct(A, y, "cgls", maxiter=12).iterations == 12


def test_reconstruct_refuses():
    A, _, y = scan()
    for arguments, message in (
        ({"method": "magic"}, r"method must be one of fbp, cgls, lsqr, .*, red-tv; got 'magic'"),
        ({"filter": "boxcar"}, "filter must be one of ramp"),
        ({"weight": -1.0}, "weight must be a number >= 0; got -1"),
        ({"maxiter": 0}, "maxiter must be at least 1; got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            reconstruct(A, y, **arguments)


def test_wrong_types_are_named():
    x, reference = pair()
    with pytest.raises(DtypeError, match=r"psnr: x must be a real or complex floating point tensor; got float64"):
        psnr(x.numpy(), reference)
    with pytest.raises(DtypeError, match=r"rmse: reference must be .*; got torch.int64"):
        rmse(x, reference.long())
    with pytest.raises(DtypeError, match=r"ssim: x must be a real floating point tensor; got torch.complex128"):
        ssim(x + 0j, reference)
    with pytest.raises(ArgumentError, match="a complex reference has no span; give data_range"):
        psnr(x + 0j, reference + 0j)
    for function in (noise_level, lambda y: noise_transmission(y, 10.0)):
        with pytest.raises(DtypeError, match=r"y must be a real floating point tensor; got torch\.complex128"):
            function(x + 0j)
        with pytest.raises(DtypeError, match="got list"):
            function([1.0])
