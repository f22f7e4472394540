"""Convolution, smoothing, Fourier transforms, interpolation: the kit, PyLops 2.8, known values, errors."""

import math
import warnings

import numpy as np
import pytest
import torch

import pullback as pb
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.linops.convolve import Convolve1D, Convolve2D, ConvolveND, next_fast_len
from pullback.linops.fourier import FFT, FFT2D, FFTND
from pullback.linops.interp import Bilinear, Interp
from pullback.linops.smoothing import Smoothing1D, Smoothing2D, SmoothingND

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pylops = pytest.importorskip("pylops")
    from pylops import signalprocessing as peer

CLASSES = [
    Convolve1D,
    Convolve2D,
    ConvolveND,
    Smoothing1D,
    Smoothing2D,
    SmoothingND,
    FFT,
    FFT2D,
    FFTND,
    Interp,
    Bilinear,
]


def generator():
    return torch.Generator().manual_seed(7)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator())


def agree(ours, theirs, adjoint=True, tol=1e-12):
    """Forward and adjoint equal PyLops' on random input."""
    x = random(*ours.dims).numpy()
    y = random(
        *ours.dimsd, dtype=torch.complex128 if np.iscomplexobj(theirs.matvec(x.ravel())) else torch.float64
    ).numpy()
    a, b = ours(x).ravel(), theirs.matvec(x.ravel()).ravel()
    assert np.abs(a - b).max() <= tol * max(1, np.abs(b).max())
    if adjoint:
        a, b = ours.H(y).ravel(), theirs.rmatvec(y.ravel()).ravel()
        assert np.abs(a - b).max() <= tol * max(1, np.abs(b).max())


@pytest.mark.parametrize("cls", CLASSES)
def test_norm_bound_holds(cls):
    for op in cls.examples():
        bound = op._norm_bound()
        if bound is not None:
            assert op.norm() <= bound * (1 + 1e-9)


# Convolution ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [1, 2, 5, 6])
@pytest.mark.parametrize("n", [7, 12])
def test_convolve1d_equals_pylops(n, taps):
    h = random(taps).numpy()
    for offset in range(-1, taps):
        for method in (None, "direct", "fft"):
            agree(Convolve1D(n, h, offset, method=method), peer.Convolve1D(n, h, offset))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("method", [None, "direct", "fft"])
def test_convolve1d_axis_equals_pylops(axis, method):
    dims, h = (6, 7, 5), random(4).numpy()
    agree(Convolve1D(dims, h, 2, axis, method), peer.Convolve1D(dims, h, 2, axis))


@pytest.mark.parametrize(("n", "taps"), [(5, 8), (6, 9), (5, 6), (4, 7)])
def test_convolve1d_with_long_kernel_equals_pylops(n, taps):
    h = random(taps).numpy()
    for offset in range(n):
        for method in ("direct", "fft"):
            agree(Convolve1D(n, h, offset, method=method), peer.Convolve1D(n, h, offset))


def test_convolve1d_with_a_kernel_for_each_trace_equals_pylops():
    h = random(4, 3).numpy()
    agree(Convolve1D((4, 7), h, 1), peer.Convolve1D((4, 7), h, 1))
    # Along other axes PyLops flips the kernel along the last axis in its adjoint, so only the forward is compared.
    h = random(3, 7).numpy()
    agree(Convolve1D((5, 7), h, 1, axis=0), peer.Convolve1D((5, 7), h, 1, axis=0), adjoint=False)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (1, 5), (2, 6)])
@pytest.mark.parametrize("dims", [(8, 9), (7, 6)])
@pytest.mark.parametrize("method", [None, "direct", "fft"])
def test_convolve2d_equals_pylops(dims, shape, method):
    h = random(*shape).numpy()
    for offset in [(0, 0), (shape[0] // 2, shape[1] // 2), (shape[0] - 1, 0)]:
        agree(Convolve2D(dims, h, offset, method=method), peer.Convolve2D(dims, h, offset))


@pytest.mark.parametrize("method", ["direct", "fft"])
def test_convolvend_equals_pylops(method):
    dims = (5, 6, 4)
    h = random(3, 2, 3).numpy()
    agree(ConvolveND(dims, h, (1, 1, 0), None, method), peer.ConvolveND(dims, h, (1, 1, 0), (0, 1, 2)))
    agree(ConvolveND(dims, h, None, (0, 1, 2), method), peer.ConvolveND(dims, h, None, (0, 1, 2)))
    h = random(3, 2).numpy()
    for axes in [(0, 1), (0, 2), (-2, -1)]:
        agree(ConvolveND(dims, h, (1, 0), axes, method), peer.ConvolveND(dims, h, (1, 0), axes))
    # Axes in descending order are the same convolution with the kernel transposed (PyLops scrambles it).
    x = random(*dims)
    a, b = ConvolveND(dims, h, (1, 0), (2, 0), method), ConvolveND(dims, h.T.copy(), (0, 1), (0, 2), method)
    torch.testing.assert_close(a(x), b(x))


def test_kernel_larger_than_the_signal_and_taps_that_never_reach():
    h = random(9, 9).numpy()
    for offset in [(4, 4), (0, 8), (8, 2)]:
        for method in ("direct", "fft"):
            agree(Convolve2D((3, 4), h, offset, method=method), peer.Convolve2D((3, 4), h, offset))


def test_complex_kernel_has_the_conjugate_adjoint():
    h = random(3, 3, dtype=torch.complex128).numpy()
    for method in ("direct", "fft"):
        op, x = Convolve2D((6, 5), h, (1, 1), method=method), random(6, 5, dtype=torch.complex128)
        theirs = peer.Convolve2D((6, 5), h, (1, 1), dtype="complex128")
        np.testing.assert_allclose(op(x).numpy().ravel(), theirs.matvec(x.numpy().ravel()), atol=1e-12)
        np.testing.assert_allclose(op.H(x).numpy().ravel(), theirs.rmatvec(x.numpy().ravel()), atol=1e-12)


def test_tiles_equal_the_whole_transform():
    """Large images go through overlapping tiles: every branch of sizes, offsets outside the kernel included."""
    h = random(9, 6)
    for dims, offset in [((515, 640), (4, 3)), ((640, 520), (0, 5)), ((530, 513), (12, -4))]:
        op = Convolve2D(dims, h, offset, method="fft")
        assert op._tile() is not None
        x = random(2, *dims)
        for adjoint in (False, True):
            fast = op._run(x, adjoint)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Convolve2D, "_tile", lambda self: None)
                torch.testing.assert_close(fast, op._run(x, adjoint), rtol=0, atol=1e-11)


def test_direct_in_blocks_equals_fft():
    h = random(3, 4)
    for dims, axes in [
        ((300, 400), (-2, -1)),
        ((3, 70_000), (-2, -1)),
        ((90, 11, 100), (0, 2)),
        ((2, 500, 300), (1, 2)),
    ]:
        x = random(*dims)
        a, b = (ConvolveND(dims, h, (1, 2), axes, method) for method in ("direct", "fft"))
        torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-11)
        torch.testing.assert_close(a.H(x), b.H(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["direct", "fft"])
def test_kernel_gradients_of_every_order(method):
    x, h = random(2, 4, 5), random(3, 2)
    f = lambda h, x: Convolve2D((4, 5), h, (1, 1), method=method)(x)  # noqa: E731
    a, b = h.clone().requires_grad_(), x.clone().requires_grad_()
    torch.autograd.gradcheck(f, (a, b))
    torch.autograd.gradgradcheck(f, (a, b))
    torch.autograd.gradgradcheck(
        lambda h, y: Convolve1D(4, h, 1, method=method).H(y), (random(3).requires_grad_(), b[0, :, 0])
    )
    jacobian = torch.func.jacrev(f)(h, x)
    torch.testing.assert_close(jacobian, torch.func.jacfwd(f)(h, x))
    torch.testing.assert_close(torch.func.vmap(f, (0, None))(torch.stack([h, 2 * h]), x)[1], 2 * f(h, x))


def test_spectrum_follows_the_kernel():
    h = random(3, 3)
    op, x = Convolve2D((6, 6), h, (1, 1), method="fft"), random(6, 6)
    first = op(x)
    h.mul_(2)
    torch.testing.assert_close(op(x), 2 * first)


def test_method_is_chosen_by_size():
    assert Convolve1D(64, random(5)).method == "toeplitz"
    assert Convolve1D(100_000, random(5)).method == "direct"
    assert Convolve2D((256, 256), random(3, 3)).method == "direct"
    assert Convolve2D((256, 256), random(15, 15)).method == "fft"
    assert Convolve2D((256, 256), random(3, 3), method="fft").method == "fft"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11, 97, 1025, 2055, 4099])
def test_next_fast_len(n):
    def smooth(m):
        for p in (2, 3, 5, 7):
            while m % p == 0:
                m //= p
        return m == 1

    expected = n if n <= 2 else next(m for m in range(n, 2 * n + 2) if m % 2 == 0 and smooth(m))
    assert next_fast_len(n) == expected


# Smoothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(9,), (40, 7), (6, 5, 8), (3, 150), (130, 4)])
def test_smoothing1d_equals_pylops(dims):
    for axis in range(-len(dims), 0):
        for n in (1, 2, 5, 6):
            if n + 1 - n % 2 <= dims[axis]:
                agree(Smoothing1D(n, dims, axis), pylops.Smoothing1D(n, dims, axis))


@pytest.mark.parametrize("dims", [(9, 8), (70, 5), (5, 300), (400, 500)])
@pytest.mark.parametrize("n", [(5, 5), (3, 4), (1, 7), (11, 2)])
def test_smoothing2d_equals_pylops(dims, n):
    agree(Smoothing2D(n, dims), pylops.Smoothing2D(n, dims))


def test_smoothingnd_equals_pylops():
    for dims in [(5, 6, 7), (5, 90, 80)]:
        agree(SmoothingND((3, 5, 3), dims, (0, 1, 2)), pylops.SmoothingND((3, 5, 3), dims, (0, 1, 2)))
        agree(SmoothingND((5, 3), dims, (0, 2)), pylops.SmoothingND((5, 3), dims, (0, 2)))
    assert SmoothingND((4, 6), (8, 8)).nsmooth == (5, 7)


def test_smoothing_window_longer_than_the_axis():
    x = random(3, 100)
    wide = Smoothing2D((7, 301), (3, 100))(x)
    torch.testing.assert_close(wide, (x.sum() / (7 * 301)).expand(3, 100), rtol=0, atol=1e-14)


def test_smoothing_does_not_drift_in_float32():
    x = random(1, 300_000).float() + 100
    y = Smoothing1D(31, (1, 300_000))(x)
    exact = Smoothing1D(31, (1, 300_000))(x.double())
    assert (y - exact).abs().max() < 1e-4


def test_smoothing_is_linear_in_complex_numbers():
    x = random(70, 80, dtype=torch.complex128)
    op = Smoothing2D((3, 5), (70, 80))
    torch.testing.assert_close(op(x), torch.complex(op(x.real), op(x.imag)))


# Fourier -------------------------------------------------------------------------------------------------------------


def reference(name, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(peer, name)(*args, **kwargs)


@pytest.mark.parametrize("norm", ["ortho", "none", "1/n"])
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("nfft", [None, 5, 6, 10, 11])
def test_fft_equals_pylops(norm, real, nfft):
    for n in (7, 8):
        for before in (False, True):
            for after in (False, True):
                options = {
                    "nfft": nfft,
                    "norm": norm,
                    "real": real,
                    "ifftshift_before": before,
                    "fftshift_after": after,
                }
                theirs = reference("FFT", n, sampling=0.1, **options)
                agree(FFT(n, sampling=0.1, **options), theirs)
                np.testing.assert_allclose(FFT(n, sampling=0.1, **options).f.numpy(), theirs.f)
    agree(
        FFT((4, 6, 5), axis=1, norm=norm, real=real, nfft=nfft),
        reference("FFT", (4, 6, 5), 1, nfft, norm=norm, real=real),
    )


@pytest.mark.parametrize("norm", ["ortho", "none", "1/n"])
@pytest.mark.parametrize("real", [False, True])
def test_fft2d_equals_pylops(norm, real):
    for dims in [(6, 5), (5, 8)]:
        for nffts in [(None, None), (8, 9), (4, 10)]:
            for shift in [False, (True, False)]:
                options = {
                    "nffts": nffts,
                    "norm": norm,
                    "real": real,
                    "ifftshift_before": shift,
                    "fftshift_after": shift,
                }
                ours, theirs = (
                    FFT2D(dims, sampling=(0.5, 2.0), **options),
                    reference("FFT2D", dims, sampling=(0.5, 2.0), **options),
                )
                agree(ours, theirs)
                np.testing.assert_allclose(ours.f1.numpy(), theirs.f1)
                np.testing.assert_allclose(ours.f2.numpy(), theirs.f2)
    agree(FFT2D((4, 5, 6), (0, 1), norm=norm, real=real), reference("FFT2D", (4, 5, 6), (0, 1), norm=norm, real=real))


@pytest.mark.parametrize("real", [False, True])
def test_fftnd_equals_pylops(real):
    dims = (4, 5, 6)
    for axes, nffts in [((0, 1, 2), None), ((0, 2, 1), (5, 6, 7)), ((2, 0), None), ((1,), (9,))]:
        options = {"axes": axes, "nffts": nffts, "real": real, "norm": "none"}
        ours, theirs = FFTND(dims, **options), reference("FFTND", dims, **options)
        agree(ours, theirs)
        for a, b in zip(ours.fs, theirs.fs, strict=True):
            np.testing.assert_allclose(a.numpy(), b)


@pytest.mark.parametrize("n", [7, 8])
def test_real_fft_keeps_the_norm(n):
    x = random(3, n)
    y = FFT(n, real=True)(x)
    torch.testing.assert_close(torch.linalg.vector_norm(y), torch.linalg.vector_norm(x))
    torch.testing.assert_close(FFT(n, real=True).H(y), x)


def test_real_fft_refuses_complex_input():
    with pytest.raises(DtypeError, match=r"acts on real tensors.*x\.real and x\.imag"):
        FFT(8, real=True)(random(8, dtype=torch.complex128))


# Interpolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "nearest", "sinc", "cubic_spline"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_interp_equals_pylops(kind, axis):
    dims = (9, 8, 10)
    iava = np.array([6.9, 0.0, 3.2, 5.6, 2.0])
    theirs, _ = peer.Interp(dims, iava, axis % 3, kind)
    agree(Interp(dims, iava, axis, kind), theirs)


@pytest.mark.parametrize("n", [3, 4, 5, 40])
def test_cubic_spline_equals_scipy(n):
    interpolate = pytest.importorskip("scipy.interpolate")
    x, t = random(n), torch.rand(17, dtype=torch.float64, generator=generator()) * (n - 1)
    expected = interpolate.CubicSpline(np.arange(n), x.numpy(), bc_type="natural")(t.numpy())
    np.testing.assert_allclose(Interp(n, t, kind="cubic_spline")(x).numpy(), expected, atol=1e-12)


def test_interp_with_tolerance_equals_pylops():
    iava = np.array([0.4, 3.3, 5.0])
    theirs, _ = peer.Interp(8, iava, kind="sinc", tol=0.2)
    agree(Interp(8, iava, kind="sinc", tol=0.2), theirs)


def test_interp_at_the_last_sample_and_with_repeats():
    iava = torch.tensor([4.0, 4.0, 0.5], dtype=torch.float64)
    for kind in ("linear", "nearest", "sinc", "cubic_spline"):
        op, x = Interp(5, iava, kind=kind), random(5)
        torch.testing.assert_close(op(x)[:2], x[4].expand(2))
        torch.testing.assert_close(op.H(torch.ones(3, dtype=torch.float64)), op.todense().sum(0))


@pytest.mark.parametrize("kind", ["linear", "sinc", "cubic_spline"])
def test_gradients_in_the_positions(kind):
    iava = torch.tensor([0.3, 2.6, 2.6, 3.7], dtype=torch.float64, requires_grad=True)
    x = random(2, 5, 3).requires_grad_()
    f = lambda iava, x: Interp((5, 3), iava, axis=0, kind=kind)(x)  # noqa: E731
    g = lambda iava, y: Interp((5, 3), iava, axis=0, kind=kind).H(y)  # noqa: E731
    torch.autograd.gradcheck(f, (iava, x))
    torch.autograd.gradgradcheck(f, (iava, x))
    torch.autograd.gradgradcheck(g, (iava, random(4, 3).requires_grad_()))
    torch.testing.assert_close(torch.func.jacfwd(f)(iava, x), torch.func.jacrev(f)(iava, x))


def test_second_derivative_of_sinc_at_a_sample():
    x = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    f = lambda t: Interp(4, t, kind="sinc")(x).sum()  # noqa: E731
    hessian = torch.func.hessian(f)(torch.tensor([2.0], dtype=torch.float64))
    assert hessian.item() == pytest.approx(-(math.pi**2) / 3, rel=1e-9)


def test_bilinear_equals_pylops():
    iava = np.array([[0.3, 2.5, 1.0, 3.9], [1.1, 0.2, 3.0, 2.2]])
    for dims in [(5, 6), (5, 6, 3)]:
        agree(Bilinear(iava, dims), peer.Bilinear(iava, dims))


def test_bilinear_gradients_in_the_positions():
    iava = torch.tensor([[0.3, 2.5, 2.5], [1.1, 0.2, 0.2]], dtype=torch.float64, requires_grad=True)
    x = random(4, 5, 2).requires_grad_()
    f = lambda iava, x: Bilinear(iava, (4, 5, 2))(x)  # noqa: E731
    torch.autograd.gradcheck(f, (iava, x))
    torch.autograd.gradgradcheck(f, (iava, x))


# Precision and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_float32_in_float32_out(cls):
    for op in cls.examples():
        x = random(2, *op.dims).float()
        y, exact = op(x), op(x.double())
        assert y.dtype == (torch.complex64 if exact.is_complex() else torch.float32)
        torch.testing.assert_close(y.to(exact.dtype), exact, rtol=1e-4, atol=1e-4)
        back = op.H(y)
        assert back.dtype == (torch.complex64 if back.is_complex() else torch.float32)
        assert op(x.bfloat16()).dtype == op._out_dtype(torch.bfloat16, False)


H2 = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolve1D(5, torch.ones(3), 3), r"offset must be at most 2 for 3 taps on 5 samples; got 3"),
        (lambda: Convolve1D(5, torch.ones(8), 5), r"offset must be at most 4 for 8 taps"),
        (lambda: Convolve1D((4, 5), torch.ones(3, 3)), r"h must have shape \(n_taps,\)"),
        (lambda: Convolve1D(5, torch.ones(3), 0.5), r"offset must be 1 int"),
        (lambda: Convolve1D(5, torch.ones(3), method="overlapadd"), r"'overlapadd' is not offered; use 'fft'"),
        (lambda: Convolve1D((4, 5), torch.ones(4, 3), method="direct"), r"needs a kernel without broadcast axes"),
        (lambda: Convolve2D((5, 5), torch.ones(3)), r"h must be a non-empty kernel with 2 axes.*got shape \(3,\)"),
        (lambda: Convolve2D((5, 5), H2, (1,)), r"offset must be 2 ints, one an axis"),
        (
            lambda: Convolve2D((5, 5), H2, method="winograd"),
            r"method must be None or one of auto, direct, fft; got 'winograd'",
        ),
        (lambda: Convolve2D((5, 5), H2, (20, 0)), r"leaves no tap of the kernel.*choose it in \[0, 2\]"),
        (lambda: Convolve2D((5, 5, 5), H2, axes=(0, 1, 2)), r"axes must be two axes.*use ConvolveND"),
        (lambda: ConvolveND((5, 5), H2, axes=(0, 0)), r"axes must be distinct"),
        (lambda: Smoothing2D((3,), (5, 5)), r"nsmooth must hold 2 lengths"),
        (lambda: Smoothing1D(0, 5), r"nsmooth must hold at least one size and only sizes >= 1"),
        (lambda: FFT(8, norm="backward"), r"norm must be 'ortho', 'none' or '1/n'; got 'backward'; 'none' is"),
        (lambda: FFT(8, sampling=0), r"sampling must be positive"),
        (lambda: FFT2D((8, 8), nffts=(3,)), r"nffts must be one value or 2 values"),
        (lambda: FFT2D((8, 8), axes=(0,)), r"axes must be two axes"),
        (lambda: FFTND((8, 8)), r"axes must lie in"),
        (lambda: FFT(8, real=True, fftshift_after="yes"), r"fftshift_after must be True or False"),
        (lambda: Interp(5, [0.5, 4.2]), r"iava must lie in \[0, 4\].*got values from 0.5 to 4.2; clamp them"),
        (lambda: Interp(5, [-0.1, 2.0]), r"got values from -0.1 to 2"),
        (lambda: Interp(5, [float("nan")]), r"iava must lie in"),
        (lambda: Interp(5, [1.0], kind="quintic"), r"kind must be one of linear, nearest, sinc, cubic_spline"),
        (lambda: Interp(5, [1.0], tol=0.1), r"tol applies to kind='sinc' only"),
        (lambda: Interp(2, [1.0], kind="cubic_spline"), r"needs at least 3 samples"),
        (
            lambda: Bilinear(np.zeros((3, 2)), (4, 4)),
            r"iava must be real with shape \(2, n_points\); got shape \(3, 2\)",
        ),
        (lambda: Bilinear(np.full((2, 1), 5.0), (9, 4)), r"iava\[1\] must lie in \[0, 3\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_nearest_with_positions_that_require_grad_is_refused():
    with pytest.raises(NotDifferentiableError, match=r"no derivative in iava; use 'linear'"):
        Interp(5, torch.tensor([1.2], requires_grad=True), kind="nearest")


def test_wrong_shape_names_the_operator():
    with pytest.raises(ShapeError, match=r"Smoothing2D expects shape \(\.\.\., 5, 6\)"):
        Smoothing2D((3, 3), (5, 6))(torch.zeros(6, 5))


@pytest.mark.parametrize("cls", CLASSES)
def test_empty_batch(cls):
    for op in cls.examples():
        y = op(torch.zeros(0, *op.dims, dtype=torch.float64))
        assert y.shape == (0, *op.dimsd)
        assert op.H(y).shape == (0, *op.dims)


@pytest.mark.parametrize("real", [False, True])
def test_the_gram_of_an_orthonormal_transform_is_the_identity(real):
    whole = pb.FFT2D((6, 5), nffts=(8, 5), real=real)
    assert isinstance(whole.gram, pb.Identity)
    x = torch.randn(6, 5, dtype=torch.float64)
    assert torch.allclose(whole.H(whole(x)).real, x)
    for op in (pb.FFT2D((6, 5), norm="none", real=real), pb.FFT2D((6, 5), nffts=(4, 5), real=real)):
        assert not isinstance(op.gram, pb.Identity)
        assert torch.allclose(op.gram(x), op.H(op(x)))
