"""Singular values and what follows from them: dense results, brute force, Monte Carlo, derivatives, errors."""

import math

import numpy as np
import pytest
import torch

import pullback as pb
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.linops import FFT, Conj, Convolve1D, FirstDerivative, Gradient, Identity, MatrixMult, Real
from pullback.solvers import Status
from pullback.solvers.spectral import (
    LowRank,
    bias_variance,
    choose,
    cond,
    discrepancy,
    filter_factors,
    gcv,
    lcurve,
    noise_amplification,
    picard,
    pinv,
    power_iteration,
    rank,
    spectral_filter,
    sure,
    svd,
    tikhonov,
    tsvd,
)

REAL, COMPLEX = torch.float64, torch.complex128
dtypes = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
shapes = pytest.mark.parametrize("shape", [(40, 30), (30, 40), (35, 35)], ids=str)


def randn(*shape, dtype=REAL, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(m, n, s, dtype=REAL, seed=0):
    """An m x n matrix with the singular values s."""
    u = torch.linalg.qr(randn(m, len(s), dtype=dtype, seed=seed))[0]
    v = torch.linalg.qr(randn(n, len(s), dtype=dtype, seed=seed + 1))[0]
    return (u * s.to(dtype)) @ v.mH


def decay(count, low):
    return torch.logspace(0, low, count, dtype=REAL)


def blur(n=64):
    t = torch.arange(-10.0, 11.0, dtype=REAL)
    h = torch.exp(-(t**2) / 8)
    return Convolve1D(n, h / h.sum(), offset=10)


def step(n=64):
    x = torch.zeros(n, dtype=REAL)
    x[n // 4 : n // 2] = 1
    return x


def assert_triples(d, A, tolerance):
    """A v = s u, A^H u = s v, orthonormal in the inner product that counts."""
    s = d.S.reshape(-1, *(1,) * (d.U.ndim - 1)), d.S.reshape(-1, *(1,) * (d.V.ndim - 1))
    assert (A(d.V) - s[0] * d.U).abs().max() <= tolerance
    assert (A.H(d.U) - s[1] * d.V).abs().max() <= tolerance
    for rows in (d.U.flatten(1), d.V.flatten(1)):
        gram = rows.conj() @ rows.mT
        torch.testing.assert_close(
            gram.real if d.real else gram,
            torch.eye(len(rows), dtype=d.S.dtype if d.real else gram.dtype),
            atol=1e-10,
            rtol=0,
        )


# Decomposition -----------------------------------------------------------------------------------------------------


@dtypes
@shapes
def test_dense_equals_torch(dtype, shape):
    m = randn(*shape, dtype=dtype)
    d = svd(MatrixMult(m))
    torch.testing.assert_close(d.S, torch.linalg.svdvals(m))
    assert_triples(d, d.A, 1e-12)
    assert d.is_complete
    assert d.method == "dense"
    torch.testing.assert_close(d.operator().todense(), m)
    torch.testing.assert_close(d.truncated(3).S, d.S[:3])


@dtypes
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (200, 200)], ids=str)
def test_lanczos_finds_triples_of_decaying_spectra(dtype, shape):
    s = decay(150, -6)
    A = MatrixMult(matrix(*shape, s, dtype))
    d = svd(A, 12, method="lanczos")
    torch.testing.assert_close(d.S, s[:12], atol=1e-12, rtol=0)
    assert_triples(d, A, 1e-10)
    assert (d.residuals < 1e-10).all()
    assert d.status is Status.CONVERGED
    exact = svd(A, 12)
    overlap = (d.V.conj() * exact.V).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), atol=1e-10, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 4, 6, 10, 11, 15])
def test_lanczos_finds_every_copy_of_multiple_values_and_zeros(k):
    s = torch.tensor([5.0, 5, 5, 5, 3, 3, 2, 1, 1, 1, 0.5], dtype=REAL)
    A = MatrixMult(matrix(80, 60, s))
    d = svd(A, k, method="lanczos")
    torch.testing.assert_close(d.S, torch.cat((s, torch.zeros(4, dtype=REAL)))[:k], atol=1e-12, rtol=0)
    assert_triples(d, A, 1e-10)


def test_lanczos_on_identity_and_zero():
    torch.testing.assert_close(svd(Identity(1500), 5).S, torch.ones(5, dtype=REAL))
    d = svd(0 * Identity(30), 2, method="lanczos")
    assert (d.S == 0).all()
    assert d.rank() == 0


def test_lanczos_says_when_it_has_not_converged():
    d = svd(Gradient((30, 40)), 3, method="lanczos", maxiter=1)
    assert d.status is Status.MAXITER
    assert d.residuals.max() > 1e-6
    exact = torch.linalg.svdvals(Gradient((30, 40)).todense())[:3]
    assert ((d.S - exact).abs() <= d.residuals).all()  # what the residual promises


@dtypes
def test_randomized_is_as_good_as_it_says(dtype):
    s = decay(150, -12)
    A = MatrixMult(matrix(300, 200, s, dtype))
    d = svd(A, 8, method="randomized", power=2, oversample=10)
    torch.testing.assert_close(d.S, s[:8], atol=1e-8, rtol=0)
    assert ((d.S - s[:8]).abs() <= d.residuals + 1e-14).all()
    worse = svd(A, 8, method="randomized", power=0, oversample=10)
    assert worse.residuals.max() > 10 * d.residuals.max()
    assert (svd(A, 8, method="randomized", seed=1).S != d.S).any()


def test_several_axes_and_layout():
    A = Gradient((5, 6))
    d = svd(A, 4)
    assert d.U.shape == (4, *A.dimsd)
    assert d.V.shape == (4, 5, 6)
    assert_triples(d, A, 1e-12)


@pytest.mark.parametrize(
    "make",
    [lambda: FFT(16, real=True), lambda: Conj(5), lambda: Real(9) @ MatrixMult(randn(9, 5, dtype=COMPLEX))],
    ids=["real FFT", "Conj", "Real A"],
)
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_operators_linear_over_the_reals_only(make, method):
    A = make()
    d = svd(A, 4, method=method)
    assert d.real
    assert_triples(d, A, 1e-10)
    y = A(randn(*A.dims, dtype=d.V.dtype, seed=3))
    full = svd(A)
    torch.testing.assert_close(A(pinv(A)(y)), y)
    torch.testing.assert_close(tikhonov(full, y, 0.0).x, pinv(A)(y))


def test_complex_transform_without_tensors():
    d = svd(FFT(12), 3)
    assert d.V.is_complex()
    assert not d.real
    assert_triples(d, FFT(12), 1e-12)


def test_single_precision_and_seed():
    A = MatrixMult(matrix(1100, 60, decay(60, -3)).float())
    d = svd(A, 5)
    assert d.S.dtype == torch.float32
    assert "lanczos" in d.method
    assert (d.S - decay(60, -3)[:5]).abs().max() < 1e-5
    assert (svd(A, 5).U == d.U).all()


def test_low_rank():
    u, s, v = randn(2, 4), randn(2), randn(2, 3, seed=1)
    A = LowRank(u, s, v)
    torch.testing.assert_close(A.todense(), (u.T * s) @ v)
    with pytest.raises(ShapeError, match=r"U, S, V must have shapes \(k, \*dimsd\), \(k,\), \(k, \*dims\)"):
        LowRank(u, s[:1], v)


# Derivatives -------------------------------------------------------------------------------------------------------


@dtypes
def test_gradcheck_of_dense_values_and_solutions(dtype):
    m = randn(5, 4, dtype=dtype).requires_grad_()
    y = randn(5, dtype=dtype, seed=2).requires_grad_()
    L = FirstDerivative(4)
    functions = [
        lambda m, y: svd(MatrixMult(m)).S,
        lambda m, y: svd(MatrixMult(m), 2).operator()(y[:4]),
        lambda m, y: pinv(MatrixMult(m))(y),
        lambda m, y: pinv(MatrixMult(m), k=2)(y),
        lambda m, y: tsvd(MatrixMult(m), y, 2).x,
        lambda m, y: tikhonov(MatrixMult(m), y, 0.3).x,
        lambda m, y: tikhonov(MatrixMult(m), y, 0.3, L=L).x,
    ]
    for f in functions:
        assert torch.autograd.gradcheck(f, (m, y), fast_mode=True)
    alpha = torch.tensor(0.4, dtype=REAL, requires_grad=True)
    fixed = MatrixMult(m.detach())
    assert torch.autograd.gradcheck(lambda y, a: tikhonov(fixed, y, a).x, (y, alpha), fast_mode=True)
    assert torch.autograd.gradcheck(lambda m, a: tikhonov(MatrixMult(m), y, a, L=L).x, (m, alpha), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda m: svd(MatrixMult(m)).S, (m,), fast_mode=True)


def test_gradient_of_pinv_at_equal_singular_values():
    m = torch.eye(3, dtype=REAL).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: pinv(MatrixMult(m)).todense(), (m,))
    wide = torch.cat((torch.eye(3, dtype=REAL), torch.zeros(3, 2, dtype=REAL)), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: tikhonov(MatrixMult(m), randn(3), 0.3).x, (wide,))


@pytest.mark.parametrize("method", ["lanczos", "randomized"])
def test_iterative_values_have_first_derivatives_and_refuse_others(method):
    m = matrix(30, 20, decay(20, -8)).requires_grad_()
    weights = randn(3)
    (wanted,) = torch.autograd.grad((svd(MatrixMult(m), 3).S * weights).sum(), m)
    d = svd(MatrixMult(m), 3, method=method)
    (got,) = torch.autograd.grad((d.S * weights).sum(), m, retain_graph=True)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=0)
    with pytest.raises(NotDifferentiableError, match="singular vectors have no derivative here; use method='dense'"):
        d.V.sum().backward()
    with pytest.raises(NotDifferentiableError, match="only first derivatives"):
        torch.autograd.grad(d.S.sum(), m, create_graph=True)
    with torch.no_grad():
        assert not svd(MatrixMult(m), 3, method=method).U.requires_grad


def test_power_iteration_derivative():
    m = (randn(6, 6) @ randn(6, 6).T).requires_grad_()
    (wanted,) = torch.autograd.grad(torch.linalg.eigvalsh(m)[-1], m)
    r = power_iteration(MatrixMult(m), rtol=1e-12, maxiter=5000)
    (got,) = torch.autograd.grad(r.value, m, retain_graph=True)
    torch.testing.assert_close((got + got.T) / 2, wanted, atol=1e-8, rtol=1e-8)
    with pytest.raises(NotDifferentiableError, match="vector have no derivative"):
        r.vector.sum().backward()


def test_a_chosen_parameter_refuses_derivatives():
    A, y = blur(), blur()(step()).requires_grad_()
    with pytest.raises(NotDifferentiableError, match=r"alpha = gcv\(\.\.\.\)\.parameter"):
        tikhonov(A, y, "gcv")
    with pytest.raises(NotDifferentiableError, match="choose it first"):
        gcv(A, y)
    with pytest.raises(NotDifferentiableError, match="choose it first"):
        tsvd(A, y, "gcv")
    h = torch.ones(3, dtype=REAL, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="choose it first"):
        tikhonov(Convolve1D(20, h), randn(20), "gcv")
    assert tikhonov(A, y, float(gcv(A, y.detach()).parameter)).x.requires_grad


# Numbers -----------------------------------------------------------------------------------------------------------


def test_power_iteration_stops_by_the_residual():
    m = randn(30, 30)
    m = m @ m.T
    exact = torch.linalg.eigvalsh(m)[-1]
    for rtol in (1e-2, 1e-6):
        r = power_iteration(MatrixMult(m), rtol=rtol)
        assert r.status is Status.CONVERGED
        assert r.residual <= rtol * float(r.value)
        assert abs(r.value - exact) <= r.residual
        assert r.iterations == len(r.history)
        torch.testing.assert_close((m @ r.vector - r.value * r.vector).norm().item(), r.residual, rtol=1e-6, atol=1e-9)
    r = power_iteration(MatrixMult(m), rtol=1e-12, maxiter=3)
    assert r.status is Status.MAXITER
    assert "increase maxiter" in repr(r)


def test_power_iteration_of_other_operators():
    m = randn(20, 12, dtype=COMPLEX)
    s = torch.linalg.svdvals(m)
    r = power_iteration(MatrixMult(m), gram=True, rtol=1e-10, maxiter=5000)
    torch.testing.assert_close(r.value, s[0] ** 2)
    assert not r.value.is_complex()
    negative = power_iteration(-1 * MatrixMult(m @ m.mH), rtol=1e-10, maxiter=5000)
    torch.testing.assert_close(negative.value.real, -(s[0] ** 2))
    q = torch.linalg.qr(randn(9, 9, dtype=COMPLEX))[0]
    values = torch.polar(torch.linspace(1, 2, 9, dtype=REAL), torch.linspace(0, 3, 9, dtype=REAL))
    normal = power_iteration(MatrixMult((q * values) @ q.mH), rtol=1e-10, maxiter=5000)
    torch.testing.assert_close(normal.value, values[-1])
    turn = torch.tensor([[0.0, 1], [-1, 0]], dtype=REAL)
    assert power_iteration(MatrixMult(turn), maxiter=50).status is Status.MAXITER
    assert power_iteration(0 * Identity(4)).value == 0


def test_rank():
    s = decay(7, -2)
    for shape in ((20, 30), (30, 20)):
        for dtype in (REAL, COMPLEX):
            assert rank(MatrixMult(matrix(*shape, s, dtype))) == 7
    A = MatrixMult(matrix(20, 30, s))
    assert rank(A, rtol=0.05) == int((s > 0.05).sum())
    assert rank(svd(A), rtol=0.05) == rank(A, rtol=0.05)
    assert rank(0 * A) == 0
    assert rank(MatrixMult(matrix(1100, 1200, decay(40, -3)))) == 40
    assert rank(MatrixMult(matrix(1100, 20, decay(20, -3)))) == 20
    with pytest.raises(ArgumentError, match="exceeds max_rank = 64"):
        rank(Identity(1100), max_rank=64)


def test_rank_tells_consistency():
    K = torch.tensor([[1.0, 1], [1, 2], [1, 3]], dtype=REAL)  # rank 2 < 3 rows: that alone decides nothing
    inside, outside = K @ torch.tensor([1.0, -1], dtype=REAL), torch.tensor([1.0, 0, 0], dtype=REAL)
    for y, consistent in ((inside, True), (outside, False)):
        assert (rank(MatrixMult(torch.cat((K, y[:, None]), 1))) == rank(MatrixMult(K))) is consistent


def test_cond():
    A = MatrixMult(matrix(30, 20, decay(20, -3)))
    assert math.isclose(cond(A), 1e3, rel_tol=1e-9)
    assert math.isclose(cond(svd(A)), 1e3, rel_tol=1e-9)
    assert cond(0 * A) == math.inf
    large = MatrixMult(matrix(1100, 150, decay(150, -2)))
    assert math.isclose(cond(large), 100, rel_tol=1e-6)  # 200 steps exhaust 150 columns
    assert 10 < cond(large, steps=40) < 100
    with pytest.raises(ArgumentError, match="the SVD must be complete; got 3 triples"):
        cond(svd(A, 3))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_noise_amplification_is_what_noise_does(dtype):
    A = MatrixMult(matrix(25, 20, decay(20, -1), dtype))
    predicted = noise_amplification(A)
    e = randn(4000, 25, dtype=dtype, seed=7)
    seen = pinv(A)(e).norm(dim=1).square().mean().sqrt()
    assert abs(predicted / seen - 1) < 0.02
    f = filter_factors(svd(A).S, "tikhonov", 0.3)
    seen = tikhonov(A, e, 0.3).x.norm(dim=1).square().mean().sqrt()
    assert abs(noise_amplification(A, f) / seen - 1) < 0.02
    s = decay(20, -1)
    assert math.isclose(predicted, float((s**-2).sum().sqrt()), rel_tol=1e-9)


def test_noise_amplification_of_a_large_operator():
    s = decay(60, -1)
    A = MatrixMult(matrix(1100, 60, s))
    assert abs(noise_amplification(A) / float((s**-2).sum().sqrt()) - 1) < 0.1
    with pytest.raises(ArgumentError, match="factors and rcond need an SVD"):
        noise_amplification(A, rcond=0.1)


# Pseudo-inverse ----------------------------------------------------------------------------------------------------


@dtypes
@shapes
@pytest.mark.parametrize("method", ["svd", "lsqr"])
def test_pinv_equals_torch(dtype, shape, method):
    m = matrix(*shape, decay(25, -2), dtype)  # rank 25
    P = pinv(MatrixMult(m), method=method)
    exact = torch.linalg.pinv(m, rtol=1e-10)
    torch.testing.assert_close(P.todense(), exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(P.H.todense(), exact.mH, atol=1e-9, rtol=0)
    y = randn(3, shape[0], dtype=dtype).requires_grad_()
    (g,) = torch.autograd.grad(P(y).abs().square().sum(), y)
    torch.testing.assert_close(g, 2 * (y.detach() @ exact.mT) @ exact.conj(), atol=1e-6, rtol=1e-6)


def test_pinv_options():
    A = MatrixMult(matrix(30, 20, decay(20, -3)))
    assert rank(pinv(A, rcond=0.05)) == int((decay(20, -3) > 0.05).sum())
    torch.testing.assert_close(pinv(A, k=4).todense(), pinv(svd(A), k=4).todense())
    assert (pinv(0 * A).todense() == 0).all()
    G = Gradient((5, 6))
    torch.testing.assert_close(pinv(G).todense(), torch.linalg.pinv(G.todense()))
    weight = torch.ones(4, dtype=REAL, requires_grad=True)
    P = pinv(pb.Diagonal(weight), method="lsqr")
    with pytest.raises(NotDifferentiableError, match="no derivative in the tensors that A holds; use method='svd'"):
        P(randn(4))
    with torch.no_grad():
        torch.testing.assert_close(P(randn(4)), randn(4))


# Filters -----------------------------------------------------------------------------------------------------------


def normal_equations(m, y, alpha, ell=None, x_ref=None):
    ell = torch.eye(m.shape[1], dtype=m.dtype) if ell is None else ell.to(m.dtype)
    left = m.mH @ m + alpha**2 * ell.mH @ ell
    ref = torch.zeros(m.shape[1], dtype=m.dtype) if x_ref is None else x_ref
    return ref + torch.linalg.solve(left, m.mH @ (y - m @ ref))


@dtypes
@shapes
@pytest.mark.parametrize("method", ["direct", "lsqr"])
@pytest.mark.parametrize("order", [None, 1, 2])
def test_tikhonov_equals_normal_equations(dtype, shape, method, order):
    m, y = randn(*shape, dtype=dtype), randn(2, shape[0], dtype=dtype, seed=3)
    n = shape[1]
    L = {None: None, 1: FirstDerivative(n), 2: pb.SecondDerivative(n)}[order]
    ell = None if L is None else L.todense()
    x_ref = randn(n, dtype=dtype, seed=4)
    alpha = torch.tensor([0.3, 2.0], dtype=REAL)
    s = tikhonov(MatrixMult(m), y, alpha, L=L, x_ref=x_ref, method=method, rtol=1e-13)
    for i in range(2):
        expected = normal_equations(m, y[i], alpha[i].item(), ell, x_ref)
        torch.testing.assert_close(s.x[i], expected, atol=1e-7, rtol=1e-7)
        if method == "direct":
            torch.testing.assert_close(s.history["residual"][0, i], (m @ expected - y[i]).norm())
    assert s.status.ok
    assert s.method.startswith(f"tikhonov ({method}): alpha = 0.3 ... 2")


@dtypes
def test_tikhonov_with_small_operators_over_the_reals(dtype):
    A = Real(8) @ MatrixMult(randn(8, 6, dtype=COMPLEX))
    y = randn(8)
    stacked = svd(A).A
    direct, iterative = tikhonov(stacked, y, 0.2), tikhonov(A, y, 0.2, method="lsqr", rtol=1e-13)
    torch.testing.assert_close(direct.x, iterative.x, atol=1e-7, rtol=1e-7)
    both = tikhonov(A, y, 0.2, L=FirstDerivative(6, kind="forward"))
    one = tikhonov(A, y, 0.2, L=FirstDerivative(6, kind="forward"), method="lsqr", rtol=1e-13)
    torch.testing.assert_close(both.x, one.x, atol=1e-6, rtol=1e-6)


def test_factors_of_landweber_are_those_of_landweber():
    A = MatrixMult(matrix(20, 15, decay(15, -1)))
    d, y = svd(A), randn(20)
    x = spectral_filter(d, y, filter_factors(d.S, "landweber", 7)).x
    z = torch.zeros(15, dtype=REAL)
    for _ in range(7):
        z = z + A.H(y - A(z)) / d.S[0] ** 2
    torch.testing.assert_close(x, z)


def test_filters_agree_and_keep_the_form_of_the_data():
    A = blur()
    d, y = svd(A), randn(3, 64)
    torch.testing.assert_close(tsvd(d, y, 10).x, spectral_filter(d, y, filter_factors(d.S, "tsvd", 10)).x)
    torch.testing.assert_close(tsvd(A, y, 10).x, pinv(A, k=10)(y))
    torch.testing.assert_close(
        tikhonov(d, y, 0.1).x, spectral_filter(d, y, filter_factors(d.S, "tikhonov", 0.1)).x, atol=1e-10, rtol=1e-8
    )
    s = tsvd(A, y.numpy(), 10)
    assert isinstance(s.x, np.ndarray)
    assert isinstance(s.history["k"], np.ndarray)
    assert s.method == "tsvd: k = 10"
    s = tikhonov(A, y.numpy(), 0.1, x_ref=np.ones(64))
    assert isinstance(s.x, np.ndarray)
    assert all(isinstance(v, np.ndarray) for v in s.history.values())
    G = Gradient((4, 5))
    assert tikhonov(G, randn(2, 40), 0.1, x_ref=torch.ones(4, 5, dtype=REAL)).x.shape == (2, 20)
    assert tikhonov(A, y.float(), 0.1).x.dtype == torch.float32
    assert (tsvd(A, y, 0).x == 0).all()
    large = tikhonov(Identity(1500), torch.ones(1500, dtype=REAL), 1.0)
    assert large.method == "tikhonov (lsqr): alpha = 1"
    torch.testing.assert_close(large.x, torch.full((1500,), 0.5, dtype=REAL))


@dtypes
def test_bias_and_variance_equal_monte_carlo(dtype):
    A = MatrixMult(matrix(30, 20, decay(12, -1.5), dtype))  # rank 12: part of the bias lies in the null space
    d, x_true, sigma = svd(A), randn(20, dtype=dtype), 0.05
    for f in (filter_factors(d.S, "tikhonov", 0.1), filter_factors(d.S, "tsvd", 6)):
        split = bias_variance(d, x_true, sigma, f)
        x = spectral_filter(d, A(x_true) + sigma * randn(20000, 30, dtype=dtype, seed=9), f).x
        mean = x.mean(0)
        torch.testing.assert_close((mean - x_true).norm() ** 2, split.bias2, rtol=0.01, atol=0)
        torch.testing.assert_close((x - mean).norm(dim=1).square().mean(), split.variance, rtol=0.02, atol=0)
        torch.testing.assert_close(split.total, split.bias2 + split.variance)
    curve = bias_variance(d, x_true, sigma, filter_factors(d.S, "tsvd", torch.arange(13)))
    assert curve.bias2.shape == curve.variance.shape == (13,)
    assert (curve.bias2.diff() <= 1e-12).all()
    assert (curve.variance.diff() > 0).all()


# Choice of the parameter -------------------------------------------------------------------------------------------


def noisy(sigma=0.02, batch=(), seed=5):
    A, x = blur(), step()
    return A, x, A(x) + sigma * randn(*batch, 64, seed=seed)


L_CASES = {"identity": None, "derivative": FirstDerivative(64)}
penalties = pytest.mark.parametrize("L", L_CASES.values(), ids=L_CASES)


def brute(A, y, L, alphas):
    """(residual, trace of the influence matrix) at each alpha, by dense algebra."""
    m = A.todense()
    ell = torch.eye(64, dtype=REAL) if L is None else L.todense()
    for a in alphas:
        H = m @ torch.linalg.solve(m.T @ m + a**2 * ell.T @ ell, m.T)
        yield (H @ y - y).norm(), H.diagonal().sum()


@penalties
def test_discrepancy_meets_the_noise(L):
    A, _, y = noisy()
    c = discrepancy(A, y, 0.02, L=L, tau=1.05)
    s = tikhonov(A, y, c.parameter, L=L)
    torch.testing.assert_close((A(s.x) - y).norm().item(), 1.05 * 0.02 * 8)
    assert c.note == ""
    same = tikhonov(A, y, "discrepancy", noise=0.02, tau=1.05, L=L)
    torch.testing.assert_close(same.x, s.x)
    assert "by discrepancy" in same.method


@penalties
@pytest.mark.parametrize("method", ["gcv", "sure"])
def test_minimisers_equal_brute_force(method, L):
    A, _, y = noisy()
    c = gcv(A, y, L=L) if method == "gcv" else sure(A, y, 0.02, L=L)
    a = float(c.parameter)
    grid = [a * f for f in (0.9, 0.99, 1.0, 1.01, 1.1)] + torch.logspace(-3, 1, 40).tolist()
    score = []
    for residual, trace in brute(A, y, L, grid):
        score.append(
            64 * residual**2 / (64 - trace) ** 2 if method == "gcv" else residual**2 + 0.02**2 * (2 * trace - 64)
        )
    assert min(score) == score[2] or min(score) > score[2] - 1e-9 * abs(score[2])
    at = (c.parameters - a).abs().argmin()
    residual, trace = next(brute(A, y, L, [float(c.parameters[at])]))
    expected = 64 * residual**2 / (64 - trace) ** 2 if method == "gcv" else residual**2 + 0.02**2 * (2 * trace - 64)
    torch.testing.assert_close(c.values[at], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(c.residual[at], residual, rtol=1e-6, atol=1e-9)


def test_sure_estimates_the_predictive_error():
    A, x, y = noisy(batch=(3000,))
    d = svd(A)
    x_alpha = tikhonov(d, y, 0.1).x
    truth = (A(x_alpha) - A(x)).square().sum(-1).mean()
    f = filter_factors(d.S, "tikhonov", 0.1)
    residual = (A(x_alpha) - y).square().sum(-1)
    estimate = (residual - 64 * 0.02**2 + 2 * 0.02**2 * f.sum()).mean()
    assert abs(estimate / truth - 1) < 0.1
    c = sure(d, y[0], 0.02)
    assert c.values.shape == c.parameters.shape


@penalties
def test_lcurve_is_where_the_curve_bends(L):
    A, _, y = noisy()
    c = lcurve(A, y, L=L)
    t = torch.linspace(-0.02, 0.02, 5, dtype=REAL)

    def curvature(center):
        rho, eta = [], []
        for a in (t + math.log(center)).exp().tolist():
            x = tikhonov(A, y, a, L=L).x
            rho.append((A(x) - y).norm().log())
            eta.append((x if L is None else L(x)).norm().log())
        u, v, h = torch.stack(rho), torch.stack(eta), 0.01
        du, dv = (u[3] - u[1]) / (2 * h), (v[3] - v[1]) / (2 * h)
        ddu, ddv = (u[3] - 2 * u[2] + u[1]) / h**2, (v[3] - 2 * v[2] + v[1]) / h**2
        return float((du * ddv - ddu * dv) / (du**2 + dv**2) ** 1.5)

    i = int((c.parameters > 0.03).long().argmax())
    assert math.isclose(curvature(float(c.parameters[i])), float(c.values[i]), rel_tol=0.02, abs_tol=0.01)
    best = curvature(float(c.parameter))
    assert best >= max(curvature(float(c.parameter) * f) for f in (0.7, 1.4)) - 1e-3


def test_choices_are_good_and_one_for_each_member():
    A, x, y = noisy(batch=(20,))
    d = svd(A)
    grid = torch.logspace(-3, 0, 200, dtype=REAL)
    errors = torch.stack([(tikhonov(d, y, float(a)).x - x).norm(dim=-1) for a in grid])
    best = errors.amin(0)
    for method in ("discrepancy", "gcv", "sure", "lcurve"):
        s = tikhonov(d, y, method, noise=0.02)
        assert s.history["alpha"].shape == (1, 20)
        assert ((s.x - x).norm(dim=-1) / best).median() < (1.5 if method == "lcurve" else 1.25), method
        one = tikhonov(d, y[3], method, noise=0.02)
        torch.testing.assert_close(one.x, s.x[3], rtol=1e-5, atol=1e-5)
    for method in ("discrepancy", "gcv", "sure"):
        s = tsvd(d, y, method, noise=0.02)
        assert s.history["k"].shape == (1, 20)
        assert 4 < s.history["k"].double().mean() < 40
        i = 7
        torch.testing.assert_close(s.x[i], tsvd(d, y[i], int(s.history["k"][0, i])).x)


def test_truncation_equals_brute_force():
    A, _, y = noisy()
    d = svd(A)
    residual = torch.tensor([(A(tsvd(d, y, k).x) - y).norm() for k in range(d.rank() + 1)], dtype=REAL)
    k = torch.arange(len(residual))
    assert int(discrepancy(d, y, 0.02, filter="tsvd").parameter) == int((residual <= 0.02 * 8).long().argmax())
    score = torch.where(k < 64, 64 * residual**2 / (64.0 - k).clamp(min=1) ** 2, torch.inf)
    assert int(gcv(d, y, filter="tsvd").parameter) == int(score.argmin())
    assert int(sure(d, y, 0.02, filter="tsvd").parameter) == int((residual**2 + 2 * 0.02**2 * k).argmin())
    torch.testing.assert_close(gcv(d, y, filter="tsvd").residual, residual, atol=1e-9, rtol=1e-6)


@pytest.mark.slow
def test_large_operators_choose_without_a_decomposition():
    n = 1050
    t = torch.arange(-20.0, 21.0, dtype=REAL)
    h = torch.exp(-(t**2) / 32)
    A = Convolve1D(n, h / h.sum(), offset=20)
    x = torch.cat([step(350)] * 3)
    y = A(x) + 0.02 * randn(2, n)
    d = svd(A, method="dense")
    for L in (None, FirstDerivative(n)):
        c = discrepancy(A, y, 0.02, L=L, rtol=1e-5, maxiter=400)
        s = tikhonov(A, y, c.parameter, L=L, rtol=1e-6)
        torch.testing.assert_close(
            (A(s.x) - y).norm(dim=-1), torch.full((2,), 0.02 * n**0.5, dtype=REAL), rtol=3e-3, atol=0
        )
        assert "lsqr" in s.method
    for method in ("gcv", "sure"):
        large = choose(method, A, y, noise=0.02, rtol=1e-4, maxiter=300).parameter
        exact = choose(method, d, y, noise=0.02).parameter
        error = lambda a: (tikhonov(d, y, a).x - x).norm(dim=-1)  # noqa: E731
        assert ((large / exact).log().abs() < 0.5).all(), (method, large, exact)
        assert (error(large) < 1.15 * error(exact)).all()
    assert (lcurve(A, y, rtol=1e-4).parameter > 0).all()


def test_notes_where_no_parameter_fits():
    m = matrix(30, 10, decay(10, -1))
    y = randn(30)
    assert "least squares exceeds the noise" in discrepancy(MatrixMult(m), y, 1e-3).note
    assert "below the noise level" in discrepancy(MatrixMult(m), y, 1e3).note
    assert "least squares exceeds" in tikhonov(MatrixMult(m), y, "discrepancy", noise=1e-3).method
    assert "the largest" in discrepancy(MatrixMult(m), y, 1e-3, filter="tsvd").note


def test_picard():
    A, _, y = noisy(1e-3)
    p = picard(A, y, 1e-3)
    d = svd(A)
    torch.testing.assert_close(p.coefficients, d.coefficients(y).abs())
    torch.testing.assert_close(p.ratios, p.coefficients / d.S)
    assert 10 < p.index < 50
    clean = A(step())
    assert (d.coefficients(clean)[: p.index - 5].abs() > 1e-3).float().mean() > 0.6
    assert abs(p.index - picard(d, y).index) <= 5
    assert picard(A, noisy(1e-1)[2], 1e-1).index < p.index
    assert f"{p.index} of 64" in repr(p)


@pytest.mark.slow
def test_pictures():
    pytest.importorskip("matplotlib")
    A, _, y = noisy()
    pictures = [
        picard(A, y),
        gcv(A, y),
        lcurve(A, y),
        discrepancy(A, y, 0.02),
        gcv(A, y, filter="tsvd"),
        sure(A, y, 0.02),
    ]
    for p in pictures:
        assert p._repr_png_().startswith(b"\x89PNG")
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert pictures[0].plot(ax) is ax


# Errors ------------------------------------------------------------------------------------------------------------

A9 = Identity(9)
ERRORS = [
    (lambda: svd(torch.eye(3)), ArgumentError, "svd: A must be a pullback.LinearOperator; got Tensor; wrap a matrix"),
    (lambda: svd(A9, 10), ArgumentError, r"k must be an int in \[1, 9\]; got 10"),
    (lambda: svd(Identity(2000)), ArgumentError, r"k must be given for an operator of shape \(2000, 2000\)"),
    (lambda: svd(A9, method="lanczos"), ArgumentError, "k must be given for 'lanczos'"),
    (
        lambda: svd(A9, 2, method="arpack"),
        ArgumentError,
        "of auto, dense, lanczos, randomized; got 'arpack'",
    ),
    (lambda: svd(A9, 2, rtol=2), ArgumentError, r"rtol must lie in \(0, 1\); got 2"),
    (lambda: svd(A9).truncated(10), ArgumentError, r"k must lie in \[1, 9\]; got 10"),
    (lambda: power_iteration(Identity(3, 4)), ArgumentError, r"must map a space to itself; got \(4,\) -> \(3,\)"),
    (lambda: power_iteration(A9, x0=torch.zeros(9)), ArgumentError, "x0 must not be zero"),
    (lambda: power_iteration(A9, x0=torch.ones(8)), ShapeError, r"x0 must be a tensor of shape \(9,\); got \(8,\)"),
    (lambda: rank(A9, rtol=-1), ArgumentError, r"rtol must lie in \[0, 1\); got -1"),
    (lambda: pinv(A9, method="qr"), ArgumentError, "method must be 'auto', 'svd' or 'lsqr'; got 'qr'"),
    (lambda: pinv(A9, method="lsqr", k=3), ArgumentError, "k and rcond belong to method='svd'"),
    (lambda: tsvd(A9, torch.ones(9), 10), ArgumentError, "k must be at most the number of triples 9; got 10"),
    (lambda: tsvd(0 * A9, torch.ones(9), 1), ArgumentError, "numerical rank 0; got 1"),
    (lambda: tsvd(A9, torch.ones(9), "lcurve"), ArgumentError, "k must be an int, 'discrepancy', 'gcv' or 'sure'"),
    (lambda: tsvd(Identity(2000), torch.ones(2000), 3), ArgumentError, r"too large .* pass svd\(A, k=...\)"),
    (lambda: tsvd(A9, torch.ones(8), 3), ShapeError, r"tsvd: y must have shape \(..., 9\)"),
    (lambda: tikhonov(A9, torch.ones(9), -1), ArgumentError, "alpha must be a finite number >= 0; got -1"),
    (lambda: tikhonov(A9, torch.ones(9), "best"), ArgumentError, "number or one of discrepancy, gcv, lcurve, sure"),
    (lambda: tikhonov(A9, torch.ones(9), "sure"), ArgumentError, "sure: noise must be given, the standard deviation"),
    (lambda: tikhonov(A9, torch.ones(9), 1, L=Identity(8)), ShapeError, r"L must act on A's input \(9,\)"),
    (lambda: tikhonov(A9, torch.ones(9), 1, x_ref=torch.ones(8)), ShapeError, "x_ref must have shape"),
    (lambda: tikhonov(A9, torch.ones(9, dtype=torch.int64), 1), DtypeError, "must be floating point or complex"),
    (lambda: tikhonov(svd(A9), torch.ones(9), 1, method="lsqr"), ArgumentError, "got an SVD; pass svd.A"),
    (
        lambda: tikhonov(0 * A9, torch.ones(9), 1, L=FirstDerivative(9)),
        ArgumentError,
        "must not share a null space",
    ),
    (lambda: discrepancy(A9, torch.ones(9), 0), ArgumentError, "noise must be a finite number > 0; got 0"),
    (lambda: gcv(A9, torch.ones(9), filter="cg"), ArgumentError, "filter must be 'tikhonov' or 'tsvd'; got 'cg'"),
    (lambda: choose("upre", A9, torch.ones(9)), ArgumentError, "must be one of discrepancy, gcv, lcurve, sure"),
    (lambda: filter_factors(torch.ones(3), "cg", 1), ArgumentError, "'tikhonov', 'tsvd' or 'landweber'; got 'cg'"),
    (lambda: filter_factors(torch.ones(3), "tsvd", -1), ArgumentError, "parameter must be >= 0; got -1"),
    (lambda: spectral_filter(svd(A9), torch.ones(9), torch.ones(3)), ShapeError, r"factors must be .* \(..., 9\)"),
    (lambda: bias_variance(svd(A9), torch.ones(9), -1, torch.ones(9)), ArgumentError, "sigma must be a finite number"),
    (lambda: picard(A9, torch.ones(2, 9)), ShapeError, r"must be one member, shape \(9,\); got the batch \(2,\)"),
    (lambda: picard(A9, torch.ones(9), window=0), ArgumentError, "window must be an int >= 1; got 0"),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
