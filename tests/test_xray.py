"""The X-ray transform against naive references and closed forms; its derivatives; filtered back-projection."""

import copy
import math
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pullback.core.check import dottest
from pullback.core.errors import ArgumentError, DtypeError, PullbackError, ShapeError
from pullback.imaging import _joseph, _nufft
from pullback.imaging.fbp import _WINDOWS, fbp
from pullback.imaging.xray import XRayTransform

# torch's own forward-mode decompositions still go through torch.jit.script when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

METHODS = ("joseph", "fourier")
F64 = torch.float64


def views(n, first=0.013, span=math.pi):
    return torch.arange(n, dtype=F64) * (span / n) + first


def rand(*shape, dtype=F64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float((a - b).norm() / b.norm())


def dot_error(A, x, y):
    Ax, Ay = A(x), A.H(y)
    return float(abs((y.conj() * Ax).sum() - (Ay.conj() * x).sum()) / (Ax.norm() * y.norm()))


def disc(n, radius, x0, y0, pixel_size, fine=8):
    """A disc of value 1, averaged over each pixel."""
    g = ((torch.arange(n * fine, dtype=F64) + 0.5) / fine - n / 2) * pixel_size
    inside = (g[None] - x0) ** 2 + (g[:, None] - y0) ** 2 < radius**2
    return inside.double().reshape(n, fine, n, fine).mean((1, 3))


def disc_sinogram(A, radius, x0, y0):
    """2 sqrt(r^2 - d^2), d being the distance of the ray from the disc's centre."""
    s = (torch.arange(A.det_count, dtype=F64) - A.center) * A.det_spacing
    d = s - x0 * A.angles.cos()[:, None] - y0 * A.angles.sin()[:, None]
    return 2 * (radius**2 - d**2).clamp(min=0).sqrt()


# Definition ----------------------------------------------------------------------------------------------------------


def joseph_reference(A, x):
    """One ray and one row at a time, straight from the definition."""
    out = torch.zeros(A.dimsd, dtype=F64)
    for r, theta in enumerate(A.angles.tolist()):
        cos, sin = math.cos(theta), math.sin(theta)
        image, p, q = (x, cos, sin) if abs(cos) >= abs(sin) else (x.T, sin, cos)
        n_i, n_j = image.shape
        for k in range(A.det_count):
            s = (k - float(A.center)) * A.det_spacing
            for i in range(n_i):
                u = (s - (i - (n_i - 1) / 2) * A.pixel_size * q) / p / A.pixel_size + (n_j - 1) / 2
                j = math.floor(u)
                for column, weight in ((j, 1 - (u - j)), (j + 1, u - j)):
                    if 0 <= column < n_j:
                        out[r, k] += weight * image[i, column] * A.pixel_size / abs(p)
    return out


def fourier_reference(A, x):
    """Line integrals of the bilinear pixels, by direct sums over frequencies |omega| <= pi/pixel_size."""
    n_y, n_x = A.dims
    band = A._band
    gx = (torch.arange(n_x, dtype=F64) - (n_x - 1) / 2) * A.pixel_size
    gy = (torch.arange(n_y, dtype=F64) - (n_y - 1) / 2) * A.pixel_size
    s = (torch.arange(A.det_count, dtype=F64) - A.center) * A.det_spacing
    d_omega = 2 * math.pi / (band.period * A.det_spacing)
    out = torch.zeros(A.dimsd, dtype=F64)
    for m in range(-band.n_freq + 1, band.n_freq):
        wx, wy = m * d_omega * A.angles.cos(), m * d_omega * A.angles.sin()
        bump = (torch.sinc(wx * A.pixel_size / 2 / math.pi) * torch.sinc(wy * A.pixel_size / 2 / math.pi)) ** 2
        ex, ey = torch.exp(-1j * wx[:, None] * gx), torch.exp(-1j * wy[:, None] * gy)
        spectrum = torch.einsum("ai,aj,ij->a", ey, ex, x.to(torch.complex128)) * A.pixel_size**2 * bump
        out += (spectrum[:, None] * torch.exp(1j * m * d_omega * s)).real * d_omega / (2 * math.pi)
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dims", "det_count", "options"),
    [
        ((9, 8), 15, {}),
        ((6, 11), 12, {"det_spacing": 1.3, "center": 4.2, "pixel_size": 0.7}),
        ((8, 8), 20, {"det_spacing": 0.45, "center": 11.0}),
        ((7, 7), 4, {"det_spacing": 2.6}),
        ((5, 4), 1, {}),
    ],
)
def test_matches_the_naive_definition(method, dims, det_count, options):
    A = XRayTransform(dims, views(7, 0.2, 2 * math.pi), det_count, **options, method=method)
    x = rand(*dims)
    reference = joseph_reference if method == "joseph" else fourier_reference
    assert relative(A(x), reference(A, x)) < 2e-12
    assert relative(A(x.float()).double(), reference(A, x)) < 1e-5


def test_views_along_the_axes_sum_rows_and_columns():
    x = rand(6, 6)
    y = XRayTransform((6, 6), [0.0, math.pi / 2, math.pi], 6)(x)
    torch.testing.assert_close(y[0], x.sum(0))
    torch.testing.assert_close(y[1], x.sum(1))
    torch.testing.assert_close(y[2], x.sum(0).flip(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"det_spacing": 0.5, "center": 150.3}, {"det_spacing": 1.3, "center": 58.0}])
def test_disc_has_its_closed_form_sinogram(method, options):
    n, pixel_size = 128, 0.9
    A = XRayTransform(
        (n, n), views(30), 300 if "det_spacing" in options else 150, pixel_size=pixel_size, method=method, **options
    )
    y = A(disc(n, 35.0, 6.0, -9.0, pixel_size))
    assert relative(y, disc_sinogram(A, 35.0, 6.0, -9.0)) < 1e-2
    torch.testing.assert_close(
        y.sum(-1) * A.det_spacing, torch.full((30,), math.pi * 35.0**2, dtype=F64), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_center_counts_detector_pixels_and_lengths_scale(method):
    x = rand(2, 16, 16)
    A = XRayTransform((16, 16), views(5), 30, center=14.0, method=method)
    moved = XRayTransform((16, 16), views(5), 30, center=15.0, method=method)
    torch.testing.assert_close(moved(x)[..., 1:], A(x)[..., :-1])
    scaled = XRayTransform((16, 16), views(5), 30, center=14.0, det_spacing=3.0, pixel_size=3.0, method=method)
    torch.testing.assert_close(scaled(x), 3 * A(x))


def test_the_two_methods_agree_on_a_smooth_image():
    g = torch.arange(64, dtype=F64) - 31.5
    x = torch.exp(-((g - 5) ** 2 + (g[:, None] + 8) ** 2) / 60)
    joseph, fourier = (XRayTransform((64, 64), views(20), 92, method=m) for m in METHODS)
    assert relative(fourier(x), joseph(x)) < 2e-3


# Adjoint, batches, dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(), (2,), (3, 13)])
def test_adjoint_is_exact(method, batch):
    A = XRayTransform((31, 40), views(23, 0.0, 2 * math.pi), 55, det_spacing=1.2, center=25.4, method=method)
    x, y = rand(*batch, 31, 40), rand(*batch, 23, 55, seed=1)
    assert dot_error(A, x, y) < 1e-14
    assert dot_error(A, torch.complex(x, x.flip(-1)), torch.complex(y.flip(-1), y)) < 1e-14
    assert dot_error(A, torch.ones_like(x), torch.ones_like(y)) < 1e-14
    assert dot_error(A, x.float(), y.float()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_equals_loop(method, dtype):
    A = XRayTransform((12, 14), views(9), 20, method=method)
    x, y = rand(37, 12, 14, dtype=dtype), rand(37, 9, 20, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(A(x), torch.stack([A(v) for v in x]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(A.H(y), torch.stack([A.H(v) for v in y]), rtol=tolerance, atol=tolerance)
    assert A(x[:0]).shape == (0, 9, 20)
    assert A.H(y[:0]).shape == (0, 12, 14)


@pytest.mark.parametrize("method", METHODS)
def test_strided_expanded_complex_and_half_input(method):
    A = XRayTransform((8, 6), views(5), 11, method=method)
    x = rand(6, 8)
    torch.testing.assert_close(A(x.T), A(x.T.contiguous()))
    torch.testing.assert_close(A.H(torch.ones((), dtype=F64).expand(5, 11)), A.H(torch.ones(5, 11, dtype=F64)))
    z = torch.complex(rand(3, 8, 6), rand(3, 8, 6, seed=1))
    torch.testing.assert_close(A(z), torch.complex(A(z.real), A(z.imag)))
    torch.testing.assert_close(A(z.conj()), A(z).conj())
    half = A(x.T.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), A(x.T), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_threads(method):
    A = XRayTransform((96, 96), views(90), 140, method=method)
    x, y = rand(96, 96), rand(90, 140)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = A(x), A.H(y)
        torch.set_num_threads(3)
        three = A(x), A.H(y)
        with ThreadPoolExecutor(4) as pool:  # several threads of the user's at once
            many = list(pool.map(lambda _: (A(x), A.H(y)), range(8)))
    finally:
        torch.set_num_threads(before)
    for forward, adjoint in (three, *many):
        torch.testing.assert_close(forward, one[0], rtol=1e-13, atol=1e-11)
        torch.testing.assert_close(adjoint, one[1], rtol=1e-13, atol=1e-11)


# Derivatives ---------------------------------------------------------------------------------------------------------


def as_function(A):
    return lambda x, angles, center: XRayTransform(
        A.dims, angles, A.det_count, A.det_spacing, center, A.pixel_size, method=A.method
    )(x)


CASES = [(0, False), (1, True), (2, False), (3, True)]


@pytest.mark.parametrize(("example", "adjoint"), CASES)
def test_gradients_in_image_angles_and_center(example, adjoint):
    A = list(XRayTransform.examples())[example]
    angles, center = A.angles[:3].clone().requires_grad_(), A.center.clone().requires_grad_()

    def apply(v, angles, center):
        op = XRayTransform(A.dims, angles, A.det_count, A.det_spacing, center, A.pixel_size, method=A.method)
        return op.H(v) if adjoint else op(v)

    v = (rand(3, A.det_count) if adjoint else rand(*A.dims)).requires_grad_()
    assert torch.autograd.gradcheck(apply, (v, angles, center), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(apply, (v, angles, center))


@pytest.mark.parametrize("method", METHODS)
def test_angle_hessian_mixed_with_the_image_by_torch_func(method):
    def loss(x, angles, center):
        return (XRayTransform((5, 6), angles, 9, center=center, method=method)(x) ** 3).sum()

    args = rand(5, 6), torch.tensor([0.3, 1.9], dtype=F64), torch.tensor(4.1, dtype=F64)
    by_reverse = torch.func.jacrev(torch.func.jacrev(loss, argnums=1), argnums=(0, 1, 2))(*args)
    by_forward = torch.func.jacfwd(torch.func.jacrev(loss, argnums=1), argnums=(0, 1, 2))(*args)
    eps = 1e-6
    for n, (a, b) in enumerate(zip(by_reverse, by_forward, strict=True)):
        torch.testing.assert_close(a, b)
        direction = rand(*args[n].shape, seed=n)
        moved = [[*args[:n], args[n] + sign * eps * direction, *args[n + 1 :]] for sign in (1, -1)]
        plus, minus = (torch.func.grad(loss, argnums=1)(*m) for m in moved)
        torch.testing.assert_close(
            (a * direction).reshape(2, -1).sum(1), (plus - minus) / (2 * eps), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
def test_geometry_is_recovered_by_gradient_descent_on_a_disc(method):
    x = disc(32, 9.0, 3.0, -2.0, 1.0).float()
    y = XRayTransform((32, 32), views(12), 46, center=23.4, method=method)(x)
    center = torch.tensor(22.5, requires_grad=True)
    optimizer = torch.optim.LBFGS([center], max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (XRayTransform((32, 32), views(12), 46, center=center, method=method)(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert abs(center.item() - 23.4) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_held_parameters_receive_gradients_and_buffers_do_not(method):
    x = rand(5, 6)
    angles = torch.nn.Parameter(views(3))
    A = XRayTransform((5, 6), angles, 9, method=method)
    A(x).square().sum().backward()
    assert angles.grad is not None and float(angles.grad.norm()) > 0
    y = XRayTransform((5, 6), views(3), 9, method=method)(x)
    assert not y.requires_grad


# What is kept between calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_changed_angles_are_noticed(method):
    angles = views(4)
    A = XRayTransform((6, 6), angles, 9, method=method)
    x = rand(6, 6)
    A(x)
    with torch.no_grad():
        angles += 0.3
    torch.testing.assert_close(A(x), XRayTransform((6, 6), views(4) + 0.3, 9, method=method)(x))
    A.load_state_dict({"angles": views(4) - 0.2, "center": torch.tensor(4.5, dtype=F64)})
    torch.testing.assert_close(A(x), XRayTransform((6, 6), views(4) - 0.2, 9, center=4.5, method=method)(x))


@pytest.mark.parametrize("method", METHODS)
def test_copies_compute_the_same(method):
    A = XRayTransform((6, 7), views(4), 9, method=method)
    x = rand(6, 7)
    y = A(x)
    assert sorted(A.state_dict()) == ["angles", "center"]
    for other in (copy.copy(A), copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        torch.testing.assert_close(other(x), y)
    torch.testing.assert_close(A.to(torch.float32)(x), y, rtol=1e-4, atol=1e-4)


def test_plans_are_reused_and_leave_with_the_operator():
    before = len(_nufft._plans)
    A = XRayTransform((6, 7), views(4), 9, method="fourier")
    x = rand(6, 7)
    A(x)
    plans = next(p for key, p in _nufft._plans.items() if key is A._geometry()[0][1])
    plan = next(iter(plans.values()))
    A(x)
    assert next(iter(plans.values())) is plan and len(plans) == 1
    del A, plans, plan
    assert len(_nufft._plans) == before


@pytest.mark.parametrize("method", METHODS)
def test_broken_geometry_gives_nan_not_a_crash(method):
    A = XRayTransform((6, 6), views(4), 9, method=method)
    A.angles[1] = math.nan
    y = A(rand(6, 6))
    assert y[1].isnan().all()
    A.angles[1] = 0.5
    A.center.fill_(1e9)
    if method == "joseph":  # every ray misses
        assert (A(rand(6, 6)) == 0).all()
        assert (A.H(rand(4, 9)) == 0).all()


def test_joseph_stores_no_matrix():
    A = XRayTransform((256, 256), views(90), 363)
    x, y = rand(256, 256, dtype=torch.float32), rand(90, 363, dtype=torch.float32)
    A(x), A.H(y)
    tracemalloc.start()  # sees NumPy's buffers, which is all that the kernels use
    try:
        A(x), A.H(y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4 * (256 * 260 + 90 * 363)


def test_kernels_compile_without_a_cache_directory():
    namespace = {}
    exec("def kernel(a):\n    a[0] += 1", namespace)  # numba finds no file to put a cache beside
    array = np.zeros(1)
    _joseph._compiled.__wrapped__(namespace["kernel"])(array)
    assert array[0] == 1


# Bounds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dims", "det_count", "options"), [((12, 12), 18, {}), ((9, 14), 9, {"det_spacing": 1.7, "center": 2.0})]
)
def test_norm_bound_holds_and_is_of_use(method, dims, det_count, options):
    A = XRayTransform(dims, views(20), det_count, **options, method=method)
    norm = float(torch.linalg.matrix_norm(A.todense(F64), 2))
    assert norm <= A._norm_bound() < (2.0 if method == "joseph" else 3.0) * norm


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dims": (4, 4, 4)}, r"dims must be \(n_y, n_x\) of the image; got \(4, 4, 4\)"),
        ({"dims": 5}, r"dims must be \(n_y, n_x\)"),
        ({"dims": (4, 0)}, "dims must hold"),
        ({"angles": []}, r"angles must have shape \(n_angles,\) with n_angles >= 1; got \(0,\)"),
        ({"angles": [[0.1]]}, r"angles must have shape \(n_angles,\).*got \(1, 1\); flatten"),
        ({"angles": 0.1}, r"angles must have shape .*write \[theta\]"),
        ({"angles": [0.1, math.nan]}, "angles must be finite; got nan or inf"),
        ({"angles": "north"}, "angles must be numbers"),
        ({"angles": torch.tensor([1j])}, "angles must be real numbers"),
        ({"det_count": 0}, "det_count must be an int >= 1; got 0"),
        ({"det_count": 2.5}, "det_count must be an int >= 1; got 2.5"),
        ({"det_spacing": -1.0}, "det_spacing must be > 0 and finite; got -1.0"),
        ({"det_spacing": "wide"}, "det_spacing must be a number > 0; got 'wide'"),
        ({"pixel_size": 0}, "pixel_size must be > 0 and finite; got 0"),
        ({"center": [1.0, 2.0]}, "center must be a number"),
        ({"center": torch.zeros(2)}, r"center must be one real number .*got shape \(2,\)"),
        ({"center": math.inf}, "center must be finite; got inf"),
        ({"geometry": "fan"}, "geometry must be 'parallel'; got 'fan'; rebin"),
        ({"method": "siddon"}, "method must be one of 'joseph', 'fourier'; got 'siddon'"),
    ],
)
def test_bad_arguments_are_named(change, text):
    arguments = {"dims": (4, 4), "angles": [0.1, 0.2], "det_count": 5} | change
    with pytest.raises(ArgumentError, match=text):
        XRayTransform(**arguments)


def test_bad_input_is_named():
    A = XRayTransform((4, 4), [0.1, 0.2], 5)
    with pytest.raises(ShapeError, match=r"XRayTransform expects shape \(..., 4, 4\)"):
        A(torch.zeros(3, 3))
    with pytest.raises(PullbackError):
        A(torch.zeros(4, 4, dtype=torch.int64))


# Filtered back-projection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("filter", sorted(_WINDOWS))
def test_fbp_returns_the_disc(method, filter):
    n, pixel_size = 64, 0.7
    A = XRayTransform((n, n), views(120), 130, 0.6, center=60.2, pixel_size=pixel_size, method=method)
    u = fbp(A, A(disc(n, 15.0, 3.0, -4.0, pixel_size)), filter)
    inside = disc(n, 12.5, 3.0, -4.0, pixel_size) == 1
    outside = (disc(n, 17.5, 3.0, -4.0, pixel_size) == 0) & (disc(n, 21.0, 0.0, 0.0, pixel_size) == 1)
    assert abs(float(u[inside].mean()) - 1) < 2e-3
    assert abs(float(u[outside].mean())) < 5e-3
    assert float(u[inside].std()) < 2e-2


def test_fbp_of_the_closed_form_sinogram_is_right_at_any_spacing():
    for spacing in (0.4, 1.0, 1.5):
        A = XRayTransform((64, 64), views(150), int(100 / spacing), spacing)
        u = fbp(A, disc_sinogram(A, 20.0, 4.0, 2.0))
        assert abs(float(u[disc(64, 17.0, 4.0, 2.0, 1.0) == 1].mean()) - 1) < 3e-3


def test_fbp_takes_views_in_any_order_spacing_and_over_the_full_circle():
    x = disc(48, 12.0, 3.0, -4.0, 1.0)
    angles = views(60)
    A = XRayTransform((48, 48), angles, 72)
    expected = fbp(A, A(x))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = XRayTransform((48, 48), angles[order], 72)
    torch.testing.assert_close(fbp(shuffled, shuffled(x)), expected)
    circle = XRayTransform((48, 48), torch.cat((angles, angles + math.pi)), 72)
    torch.testing.assert_close(fbp(circle, circle(x)), expected)
    uneven = XRayTransform((48, 48), torch.cat((views(60, 0.0, 1.0), views(60, 1.0, math.pi - 1.0))), 72)
    assert abs(float(fbp(uneven, uneven(x))[disc(48, 9.0, 3.0, -4.0, 1.0) == 1].mean()) - 1) < 5e-3


def test_fbp_without_a_filter_is_the_plain_back_projection():
    A = XRayTransform((16, 16), views(10), 24, det_spacing=0.5)
    y = rand(10, 24)
    plain = A.H(y) * (math.pi / 10 * 0.5)
    assert relative(fbp(A, y, None), plain) < 0.2


def test_fbp_is_batched_complex_and_differentiable():
    A = XRayTransform((6, 5), views(4, 0.1), 9, det_spacing=0.8)
    y = rand(2, 4, 9)
    torch.testing.assert_close(fbp(A, y), torch.stack([fbp(A, v) for v in y]))
    z = torch.complex(y[0], y[1])
    torch.testing.assert_close(fbp(A, z), torch.complex(fbp(A, y[0]), fbp(A, y[1])))
    assert fbp(A, y.float()).dtype == torch.float32
    center = A.center.clone().requires_grad_()
    angles = A.angles.clone().requires_grad_()

    def apply(y, angles, center):
        return fbp(XRayTransform((6, 5), angles, 9, 0.8, center), y, "hann")

    assert torch.autograd.gradcheck(apply, (y[0].clone().requires_grad_(), angles, center), check_forward_ad=True)


def test_fbp_names_what_is_wrong():
    A = XRayTransform((6, 5), views(4), 9)
    with pytest.raises(ArgumentError, match=r"filter must be None or one of 'ramp'.*got 'ramlak'"):
        fbp(A, torch.zeros(4, 9), "ramlak")
    with pytest.raises(ShapeError, match=r"y must have shape \(..., 4, 9\); got \(9, 4\)"):
        fbp(A, torch.zeros(9, 4))
    with pytest.raises(DtypeError, match="y must be a floating point"):
        fbp(A, torch.zeros(4, 9, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="A must be an XRayTransform"):
        fbp(torch.eye(3), torch.zeros(4, 9))


def test_detector_much_wider_than_the_image():
    angles = torch.tensor([0.3, 1.4, 2.2], dtype=torch.float64)
    wide = XRayTransform((6, 6), angles, 61, method="fourier")
    assert dottest(wide) < 1e-13
    y = wide(torch.rand(6, 6, dtype=torch.float64))
    assert y[:, :20].abs().max() < 0.05 * y.abs().max()  # rays that miss the image


def test_pickles_after_a_compiled_gradient():
    # The derivative operators are made while torch traces with tensors that hold no numbers; they must not travel.
    A = XRayTransform((6, 6), torch.tensor([0.3, 1.4], dtype=torch.float64), 9)
    x = torch.rand(6, 6, dtype=torch.float64)

    def loss(center):
        return torch.func.functional_call(A, {"center": center}, (x,)).square().sum()

    center = torch.tensor(4.2, dtype=torch.float64)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(center), torch.func.grad(loss)(center))
    assert torch.equal(pickle.loads(pickle.dumps(A))(x), A(x))
