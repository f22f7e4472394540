"""Composite problems: CVXPY, each other, optimality, batches, resumption, derivatives, certificates, inner solves."""

import math
import re
import warnings

import numpy as np
import pylops
import pytest
import torch

from pullback.core.errors import ArgumentError, ShapeError
from pullback.functionals import L0, L1, L2, L21, TV, Box, Huber, KullbackLeibler, Simplex, SquaredL2
from pullback.linops import (
    FFT2D,
    Convolve2D,
    Diagonal,
    FirstDerivative,
    Gradient,
    Identity,
    MatrixMult,
    Restriction,
    Roll,
)
from pullback.solvers import (
    ConvergenceError,
    Status,
    admm,
    condat_vu,
    davis_yin,
    douglas_rachford,
    fista,
    hqs,
    irls,
    ista,
    omp,
    pdhg,
    solve,
    split_bregman,
)
from pullback.solvers.inner import Inner
from pullback.solvers.problem import Problem
from pullback.solvers.transforms import Cosine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # cvxpy warns about its own dependencies
    import cvxpy as cp

DTYPES = [torch.float64, torch.complex128]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["real", "complex"])
M, N = 14, 9


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def system(dtype=torch.float64, m=M, n=N, batch=(), seed=0):
    """Well conditioned, so that every method is fast."""
    matrix = randn(m, n, dtype=dtype, seed=seed) / 3
    return matrix, MatrixMult(matrix), randn(*batch, m, dtype=dtype, seed=seed + 1)


TIGHT = {"maxiter": 30000, "rtol": 1e-9}
METHODS = {
    "ista": ista,
    "fista": fista,
    "fista, restart by gradient": lambda *a, **k: fista(*a, restart="gradient", **k),
    "fista, restart by function": lambda *a, **k: fista(*a, restart="function", **k),
    "fista, search": lambda *a, **k: fista(*a, step="search", **k),
    "pdhg": pdhg,
    "admm": admm,
    "condat_vu": condat_vu,
    "davis_yin": davis_yin,
    "douglas_rachford": douglas_rachford,
    "solve": solve,
}
SPLIT = ("pdhg", "admm", "condat_vu", "solve")  # those that take compositions


def tables():
    """(name, functional of the dims, methods)."""
    direct = [m for m in METHODS if m != "davis_yin"]
    yield "lasso", lambda: 0.2 * L1(), list(METHODS)
    yield "nonnegative", lambda: Box(0, None), list(METHODS)
    yield "elastic net", lambda: 0.1 * L1() + 0.3 * SquaredL2(), direct
    yield "L1 and box", lambda: 0.1 * L1() + Box(-0.2, 0.3), direct
    yield "two norms", lambda: 0.3 * L2() + 0.1 * L1(), ["fista", "davis_yin", *SPLIT]
    yield "TV", lambda: 0.1 * TV(N), SPLIT
    yield "TV and box", lambda: 0.1 * TV(N) + Box(0, 0.3), SPLIT


CASES = list(tables())


# CVXPY -------------------------------------------------------------------------------------------------------------


def minimum(objective, variable, constraints=()):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cp.Problem(cp.Minimize(objective), list(constraints)).solve(
            solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
        )
    return torch.as_tensor(variable.value)


def close(x, expected):
    torch.testing.assert_close(x, expected.to(x.dtype), atol=1e-5, rtol=0)


@dtypes
def test_cvxpy_lasso(dtype):
    matrix, A, y = system(dtype)
    x = cp.Variable(N, complex=dtype.is_complex)
    best = minimum(0.5 * cp.sum_squares(matrix.numpy() @ x - y.numpy()) + 0.3 * cp.norm1(x), x)
    for method in (fista, admm, pdhg, douglas_rachford, solve):
        close(method(A, y, 0.3 * L1(), **TIGHT).x, best)


@pytest.mark.slow
def test_cvxpy_tv_deblurring():
    dims = (5, 6)
    h = randn(3, 3, seed=4).abs()
    A = Convolve2D(dims, h / h.sum(), (1, 1))
    y = randn(*dims, seed=5)
    x = cp.Variable(30)
    K = Gradient(dims, kind="forward").todense().numpy()
    grad = K @ x
    tv = cp.sum(cp.norm2(cp.vstack([grad[:30], grad[30:]]), axis=0))
    data = 0.5 * cp.sum_squares(A.todense().numpy() @ x - y.flatten().numpy())
    best = minimum(data + 0.2 * tv, x).reshape(dims)
    for method in (admm, pdhg, condat_vu, solve):
        close(method(A, y, 0.2 * TV(dims), **TIGHT).x, best)
    noise = 0.5 * cp.sum_squares(x - y.flatten().numpy())
    best = minimum(noise + 0.2 * tv, x, [x >= 0]).reshape(dims)
    for method in (admm, pdhg, condat_vu, solve):
        close(method(Identity(dims), y, 0.2 * TV(dims), constraint=Box(0, None), **TIGHT).x, best)


def test_cvxpy_nonnegative_group_and_elastic_net():
    matrix, A, y = system(n=8)
    x = cp.Variable(8)
    data = 0.5 * cp.sum_squares(matrix.numpy() @ x - y.numpy())
    best = minimum(data, x, [x >= 0])
    for method in (fista, admm, davis_yin, solve):
        close(method(A, y, Box(0, None), **TIGHT).x, best)
    best = minimum(data + 0.2 * cp.norm1(x) + 0.15 * cp.sum_squares(x), x)
    for method in (fista, admm, douglas_rachford, solve):
        close(method(A, y, 0.2 * L1() + 0.3 * SquaredL2(), **TIGHT).x, best)
    B = A @ Identity(8, (2, 4))  # groups are the columns
    best = minimum(data + 0.4 * cp.sum(cp.norm2(cp.reshape(x, (2, 4), order="C"), axis=0)), x).reshape(2, 4)
    for method in (fista, admm, pdhg, solve):
        close(method(B, y, 0.4 * L21((2, 4), axis=0), **TIGHT).x, best)


@pytest.mark.slow
def test_cvxpy_robust_and_poisson_data():
    matrix, A, y = system(m=20, n=6)
    y[3] += 10
    x = cp.Variable(6)
    robust = cp.norm1(matrix.numpy() @ x - y.numpy())
    best = minimum(robust + 0.5 * cp.norm1(cp.diff(x)) + 0.05 * cp.sum_squares(x), x)
    g = 0.5 * TV(6) + 0.1 * SquaredL2()
    for method in (admm, pdhg, solve):
        close(method(A, y, g, data_term=L1(), **TIGHT).x, best)
    assert solve(A, y, g, data_term=L1()).method == f"pdhg: the data term {L1()!r} is not smooth, and has a prox"
    positive, counts = matrix.abs(), (matrix.abs() @ torch.ones(6, dtype=torch.float64) * 3).round()
    mean = positive.numpy() @ x + 0.5
    likelihood = cp.sum(mean) - counts.numpy() @ cp.log(mean)
    best = minimum(likelihood + 0.3 * cp.norm1(x), x, [x >= 0])
    k = {"data_term": KullbackLeibler(background=0.5), "constraint": Box(0, None)} | TIGHT
    P = MatrixMult(positive)
    close(pdhg(P, counts, 0.3 * L1(), **k).x, best)
    close(admm(P, counts, 0.3 * L1(), **k).x, best)
    close(fista(P, counts, 0.3 * L1(), step="search", restart="function", **k).x, best)


# Each other --------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_methods_agree(case, dtype):
    _, make, methods = case
    if dtype.is_complex and any(t.is_box for t in make().terms):
        pytest.skip("boxes are for real x")
    _, A, y = system(dtype, batch=(2,))
    first = pdhg(A, y, make(), **TIGHT)
    assert first.status is Status.CONVERGED
    for name in methods:
        s = METHODS[name](A, y, make(), **TIGHT)
        assert s.status is Status.CONVERGED, name
        torch.testing.assert_close(s.x, first.x, atol=2e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        objective = s.history["objective"][-1]
        if not torch.isinf(objective).any():  # a copy may leave a box
            expected = (A(s.x) - y).abs().square().sum(-1) / 2 + torch.stack([make()(v) for v in s.x])
            torch.testing.assert_close(objective, expected)
        torch.testing.assert_close(s.history["residual"][-1], (A(s.x) - y).norm(dim=-1))


@pytest.mark.slow
def test_smooth_data_terms_agree():
    _, A, y = system(batch=(2,))
    g = 0.1 * TV(N) + 0.3 * SquaredL2()  # strongly convex
    k = {"data_term": Huber(0.3)} | TIGHT
    first = pdhg(A, y, g, **k)
    for method in (admm, condat_vu, solve):
        torch.testing.assert_close(method(A, y, g, **k).x, first.x, atol=2e-6, rtol=0)
    first = pdhg(A, y, 0.1 * L1(), **k)
    for method in (ista, fista, davis_yin, solve, lambda *a, **k: fista(*a, step="search", **k)):
        torch.testing.assert_close(method(A, y, 0.1 * L1(), **k).x, first.x, atol=2e-6, rtol=0)
    assert solve(A, y, 0.1 * L1(), data_term=Huber()).method.startswith("fista")
    weighted = pdhg(A, y, g, **(k | {"data_term": 2.0 * SquaredL2()}))
    torch.testing.assert_close(weighted.x, admm(A, y, g / 2, **TIGHT).x, atol=2e-6, rtol=0)


def test_split_bregman_and_pylops():
    matrix, A, y = system()
    D = FirstDerivative(N, kind="forward")
    s = split_bregman(A, y, D, eps=0.4, mu=2.0, **TIGHT)
    torch.testing.assert_close(s.x, pdhg(A, y, 0.2 * TV(N, isotropic=False), **TIGHT).x, atol=1e-6, rtol=0)
    held = split_bregman(A, y, D, eps=0.4, mu=2.0, coupling=0.3, **TIGHT)
    torch.testing.assert_close(s.x, held.x, atol=1e-6, rtol=0)
    theirs = pylops.optimization.sparsity.splitbregman(
        pylops.MatrixMult(matrix.numpy()), y.numpy(), [pylops.FirstDerivative(N, kind="forward")], niter_outer=400,
        niter_inner=2, mu=2.0, epsRL1s=[0.4**0.5], tol=1e-13, atol=1e-13, btol=1e-13, iter_lim=100,
    )[0]  # fmt: skip
    np.testing.assert_allclose(s.x, theirs, atol=1e-5)
    ridge = split_bregman(
        A, y, D, eps=0.4, operators_l2=[Identity(N)], eps_l2=0.3, data_l2=[torch.ones(N).double()], **TIGHT
    )
    other = pdhg(A, y, 0.4 * TV(N, isotropic=False) + 0.3 * SquaredL2(b=torch.ones(N).double()), **TIGHT)
    torch.testing.assert_close(ridge.x, other.x, atol=1e-6, rtol=0)


@dtypes
def test_hqs_minimises_the_envelope(dtype):
    matrix, A, y = system(dtype)
    s = hqs(A, y, 0.3 * L1(), maxiter=5000, rtol=1e-10, beta_max=3.0)
    assert s.status is Status.CONVERGED
    beta = 3.0 * A.norm_bound() ** 2
    slope = beta * (s.x - L1().prox(s.x, 0.3 / beta))  # that of Huber's function
    assert (matrix.mH @ (matrix @ s.x - y) + slope).abs().max() < 1e-7
    s = hqs(A, y, 0.01 * L0())  # not convex
    assert torch.isfinite(s.x).all()
    assert s.history["objective"][-1] < s.history["objective"][0]


@dtypes
def test_irls(dtype):
    _, A, y = system(dtype)
    s = irls(A, y, kind="model", eps=0.3, smoothing=1e-8, maxiter=500, rtol=1e-9)
    torch.testing.assert_close(s.x, fista(A, y, 0.3 * L1(), **TIGHT).x, atol=1e-5, rtol=0)
    s = irls(A, y, kind="data", p=1.5, smoothing=1e-6, maxiter=500, rtol=1e-10)
    r = A(s.x) - y
    assert A.H(r * r.abs() ** -0.5).abs().max() < 1e-6
    both = irls(A, y, kind="datamodel", p=2.0, eps=0.3, damp=0.5, rtol=1e-12)
    dense = A.todense(dtype=dtype)
    normal = dense.mH @ dense + 0.55 * torch.eye(N, dtype=dtype)
    torch.testing.assert_close(both.x, torch.linalg.solve(normal, dense.mH @ y))
    y[2] += 50  # an outlier
    robust = irls(A, y, maxiter=300, smoothing=1e-3).x
    assert (robust - irls(A, y, p=2.0).x).norm() > 0.5


@dtypes
@pytest.mark.parametrize("normalize", [False, True])
def test_omp_finds_supports(dtype, normalize):
    matrix, A, _ = system(dtype, m=30, n=20)
    x = torch.zeros(3, 20, dtype=dtype)
    x[0, [2, 5, 7]] = torch.tensor([3.0, -2.0, 1.5], dtype=dtype)
    x[1, 4] = 1.0
    s = omp(A, A(x), normalize=normalize)
    torch.testing.assert_close(s.x, x)
    assert s.status is Status.CONVERGED
    assert s.member_iterations.tolist() == [3, 1, 0]
    y = randn(30, dtype=dtype, seed=8)
    s = omp(A, y, 4, normalize=normalize)
    on = s.x != 0
    assert on.sum() == 4
    torch.testing.assert_close(s.x[on], torch.linalg.pinv(matrix[:, on]) @ y)
    full = omp(A, y, rtol=0.0)
    torch.testing.assert_close(full.x, torch.linalg.pinv(matrix) @ y)
    twins = MatrixMult(torch.ones(3, 2, dtype=dtype))
    assert omp(twins, torch.ones(3, dtype=dtype) + randn(3, dtype=dtype)).status is Status.PRECISION


# The quadratic subproblem ------------------------------------------------------------------------------------------


def test_cosine_transform():
    import scipy.fft

    for dims in [(1,), (5,), (6,), (7, 4), (3, 5, 2), (1, 3)]:
        x = randn(2, *dims)
        T = Cosine(dims)
        axes = list(range(1, x.ndim))
        torch.testing.assert_close(T.to(x), torch.as_tensor(scipy.fft.dctn(x.numpy(), axes=axes)) / 2 ** len(dims))
        torch.testing.assert_close(T.back(T.to(x), x), x)


def inner_cases():
    d = (8, 7)
    G = Gradient(d, kind="forward")
    h = randn(3, 3).abs()
    F = FFT2D(d)
    periodic = F.H @ Diagonal(randn(8, 7, dtype=torch.complex128)) @ F
    large = (40, 30)
    yield "diagonal", Identity(d), Identity(d)
    yield "diagonal", Restriction(d, [0, 2, 5]), Diagonal(randn(*d))
    yield "dct", Identity(d), G
    yield "fft", periodic, Roll(d, axis=0) - Identity(d)
    yield "woodbury", Restriction(d, [1, 2, 5]) @ F, Identity(d)
    yield "dense", Convolve2D(d, h, (1, 1)), G
    yield "cg", Convolve2D(large, h / h.sum(), (1, 1)), Gradient(large, kind="forward")


@dtypes
@pytest.mark.parametrize("case", list(inner_cases()), ids=lambda c: c[0])
def test_inner_chooses_and_solves(case, dtype):
    kind, A, K = case
    needs_complex = A._out_dtype(torch.float64, False).is_complex
    dtype = torch.complex128 if needs_complex else dtype
    problem = Problem("test", A, randn(3, *A.dimsd, dtype=dtype))
    inner = Inner(problem, [(0.7, K)])
    assert inner.kind == kind
    rho = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    x = randn(3, *A.dims, dtype=dtype, seed=3)
    b = inner.gram(x) + rho[:, None, None] * inner.penalty(x)
    found = inner.solve(b, rho)
    if kind == "cg":
        for _ in range(12):
            found = inner.solve(b, rho, found)
        d, image, (moved,) = inner.descend(b, rho)
        torch.testing.assert_close(image, A(d))
        torch.testing.assert_close(moved, K(d))
        assert ((x - d).norm() / x.norm()) < 0.5
    torch.testing.assert_close(found, x, atol=1e-7, rtol=1e-7)
    s = admm(A, problem.y, 0.1 * (L1() @ K), maxiter=2)
    assert s.method == f"admm: quadratic subproblem by {kind}"


# Certificates ------------------------------------------------------------------------------------------------------


@dtypes
def test_gap_bounds_the_error(dtype):
    _, A, y = system(dtype, batch=(2,))
    g = 0.2 * L1()
    best = fista(A, y, g, **TIGHT).history["objective"][-1]
    for method in (ista, fista):
        s = method(A, y, g, gap=True, rtol=1e-7, maxiter=20000)
        assert s.status is Status.CONVERGED
        gap, objective = s.history["gap"], s.history["objective"]
        assert (gap >= objective - best - 1e-9).all()
        assert (gap[-1] <= 1e-7 * objective[-1]).all()
    h = 0.1 * TV(N) + 0.5 * SquaredL2()
    s = pdhg(A, y, h, gap=True, rtol=1e-7, maxiter=20000)
    best = admm(A, y, h, **TIGHT).history["objective"][-1]
    assert s.status is Status.CONVERGED
    finite = torch.isfinite(s.history["gap"])
    assert finite[2:].all()
    assert (s.history["gap"] >= s.history["objective"] - best - 1e-9)[finite].all()
    if not dtype.is_complex:
        s = pdhg(A, y, 0.1 * TV(N), constraint=Box(-1, 1), gap=True, rtol=1e-6, maxiter=20000)
        assert s.status is Status.CONVERGED


@pytest.mark.slow
def test_restart_and_search_save_iterations():
    matrix = torch.diag(torch.logspace(0, -2, 30, dtype=torch.float64)) @ torch.linalg.qr(randn(30, 30))[0]
    A, y = MatrixMult(matrix), randn(30)
    k = {"maxiter": 20000, "rtol": 1e-10}
    plain = fista(A, y, 1e-4 * L1(), **k)
    for restart in ("gradient", "function"):
        assert fista(A, y, 1e-4 * L1(), restart=restart, **k).iterations < 0.7 * plain.iterations
    objective = fista(A, y, 1e-4 * L1(), restart="function", **k).history["objective"]
    assert (objective.diff() > 1e-12).sum() < 0.02 * len(objective)


# Batches, resumption, divergence -----------------------------------------------------------------------------------


def every():
    g = 0.3 * L1()
    for name, method in METHODS.items():
        yield name, method, g
    for name in ("pdhg", "admm", "condat_vu"):
        yield f"{name}, TV", METHODS[name], 0.1 * TV(N) + 0.1 * L1()
    yield "hqs", hqs, g
    yield "irls", lambda A, y, g, **k: irls(A, y, kind="model", eps=0.3, **k), g
    yield "omp", lambda A, y, g, maxiter=6, **k: omp(A, y, min(maxiter, 6), **k), g


EVERY = list(every())
all_methods = pytest.mark.parametrize(("name", "method", "g"), EVERY, ids=[e[0] for e in EVERY])


@dtypes
@all_methods
def test_batch_is_loop(name, method, g, dtype):
    matrix, A, _ = system(dtype)
    y = torch.stack([matrix @ randn(N, dtype=dtype), torch.zeros(M, dtype=dtype), 2 * randn(M, dtype=dtype, seed=7)])
    s = method(A, y, g, maxiter=80, rtol=1e-3)
    for i in range(3):
        one = method(A, y[i], g, maxiter=80, rtol=1e-3)
        torch.testing.assert_close(s.x[i], one.x, atol=1e-9, rtol=1e-9)
        assert s.member_iterations[i] == one.iterations
        assert s.statuses[i] is one.status
    assert s.member_iterations[1] <= 2 or name == "hqs"
    flat = method(A, y.numpy(), g, maxiter=80, rtol=1e-3)
    np.testing.assert_array_equal(flat.x, s.x.numpy())


@all_methods
def test_resumes_bit_for_bit(name, method, g, tmp_path):
    _, A, y = system(batch=(2,))
    for data in (y, y[0]):
        whole = method(A, data, g, maxiter=9, rtol=0.0)
        path = tmp_path / f"{name}{data.ndim}"
        if name == "omp":  # k belongs to the method, so the run is cut short by a callback
            method(A, data, g, maxiter=9, rtol=0.0, checkpoint=path, callback=lambda state: state.iteration == 4)
        else:
            method(A, data, g, maxiter=5, rtol=0.0, checkpoint=path)
        resumed = method(A, data, g, maxiter=9, rtol=0.0, checkpoint=path)
        assert torch.equal(resumed.x, whole.x)
        for quantity, values in whole.history.items():
            assert torch.equal(resumed.history[quantity].nan_to_num(), values.nan_to_num())


@all_methods
def test_warm_start(name, method, g):
    if name == "omp":
        pytest.skip("omp starts from nothing")
    _, A, y = system(batch=(2,))
    first = method(A, y, g, maxiter=20000, rtol=1e-9)
    second = method(A, y, g, x0=first.x, maxiter=20000, rtol=1e-4)
    assert second.iterations <= (200 if name == "hqs" else 60)  # hqs goes through all its penalties again
    torch.testing.assert_close(first.x, second.x, atol=2e-2, rtol=0)


@pytest.mark.slow
def test_parameters_one_a_member():
    _, A, y = system(batch=(2,))
    weight = torch.tensor([0.1, 0.4], dtype=torch.float64)
    for name in ("fista, search", "fista, restart by gradient", "pdhg", "admm", "douglas_rachford"):
        method = METHODS[name]
        s = method(A, y, weight * L1(), **TIGHT)
        for i in range(2):
            one = method(A, y[i], float(weight[i]) * L1(), **TIGHT)
            torch.testing.assert_close(s.x[i], one.x, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    step = torch.tensor([0.05, 0.1], dtype=torch.float64)
    for method in (fista, davis_yin, douglas_rachford):
        torch.testing.assert_close(method(A, y, 0.2 * L1(), step=step, **TIGHT).x, solve(A, y, 0.2 * L1(), **TIGHT).x,
                                   atol=1e-5, rtol=0)  # fmt: skip
    held = admm(A, y, 0.2 * L1(), penalty=step, **TIGHT)
    torch.testing.assert_close(held.x, solve(A, y, 0.2 * L1(), **TIGHT).x, atol=1e-5, rtol=0)


def test_too_long_a_step_is_reported():
    _, A, y = system()
    for method in (ista, fista, davis_yin):
        s = method(A, y, 0.1 * L1(), step=10.0, maxiter=1000)
        assert s.status is Status.DIVERGED
        assert torch.isfinite(s.x).all()
        with pytest.raises(ConvergenceError, match="use a smaller step"):
            method(A, y, 0.1 * L1(), step=10.0, maxiter=1000, throw=True)
    assert fista(A, y, 0.1 * L1(), step="search", maxiter=1000).status is Status.CONVERGED


# Derivatives -------------------------------------------------------------------------------------------------------


def convex():
    direct, split = (lambda w: w * L1() + 0.2 * SquaredL2()), (lambda w: w * TV(4) + 0.2 * SquaredL2())
    boxed = lambda w: w * TV(4) + Box(-0.3, 0.3)  # noqa: E731
    for name in ("ista", "fista", "fista, restart by gradient", "fista, search", "douglas_rachford"):
        yield name, METHODS[name], direct
    yield "davis_yin", davis_yin, lambda w: w * L1() + 0.2 * L2()
    for name in ("pdhg", "admm", "condat_vu"):
        yield f"{name}, TV", METHODS[name], split
    yield "admm, box", admm, boxed
    yield "pdhg, Huber", lambda *a, **k: pdhg(*a, data_term=Huber(0.5), **k), split
    yield "admm, Huber", lambda *a, **k: admm(*a, data_term=Huber(0.5), **k), split
    yield "condat_vu, Huber", lambda *a, **k: condat_vu(*a, data_term=Huber(0.5), **k), split
    yield "hqs", lambda *a, **k: hqs(*a, beta_max=1.0, **k), direct
    yield (
        "irls",
        lambda A, y, g, **k: irls(A, y, kind="model", p=1.5, eps=g.terms[0].factor, smoothing=0.1, **k),
        direct,
    )
    yield "omp", lambda A, y, g, maxiter=0, rtol=0, **k: omp(A, y, 2, rtol=0.0, **k), direct


CONVEX = list(convex())
convex_methods = pytest.mark.parametrize(("name", "method", "make"), CONVEX, ids=[c[0] for c in CONVEX])
EXACT = {"maxiter": 3000, "rtol": 1e-12}


def derivative_problem():
    return randn(6, 4) + 2 * torch.eye(6, 4, dtype=torch.float64), 2 * randn(6, seed=3), torch.tensor(0.3).double()


@convex_methods
@pytest.mark.filterwarnings("ignore::pullback.solvers.status.AccuracyWarning")
def test_implicit_is_unrolled(name, method, make):
    values = [v.requires_grad_() for v in derivative_problem()]
    grads = []
    k = dict(EXACT)
    for unroll in (False, True):
        matrix, y, w = values
        s = method(MatrixMult(matrix), y, make(w), unroll=unroll, **k)
        k["maxiter"] = min(s.iterations, 600) if name != "omp" else 0
        grads.append(torch.autograd.grad((s.x * randn(4, seed=9)).sum(), values, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None) or name == "omp"
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@convex_methods
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pullback.solvers.status.AccuracyWarning")
def test_gradcheck(name, method, make):
    matrix, y, w = (v.requires_grad_() for v in derivative_problem())

    def x(matrix, y, w):
        return method(MatrixMult(matrix), y, make(w), **EXACT).x

    inputs = (matrix, y, w)
    assert torch.autograd.gradcheck(x, inputs, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(x, inputs, eps=1e-5, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("method", [admm, pdhg, solve])
def test_forward_mode(method):
    _, A, y = system()
    f = lambda y: method(A, y, 0.1 * TV(N) + 0.2 * SquaredL2(), maxiter=20000, rtol=1e-12).x  # noqa: E731
    v = randn(M, seed=5)
    _, tangent = torch.func.jvp(f, (y,), (v,))
    torch.testing.assert_close(tangent, (f(y + 1e-6 * v) - f(y - 1e-6 * v)) / 2e-6, atol=1e-5, rtol=1e-5)
    J = torch.func.jacrev(f)(y)
    torch.testing.assert_close(J @ v, tangent, atol=1e-6, rtol=1e-6)


def test_no_equation_where_not_convex():
    _, A, y = system()
    y.requires_grad_()
    for method in (fista, admm, hqs):
        with pytest.raises(ArgumentError, match="no equation that could be differentiated; use unroll=True"):
            method(A, y, 0.1 * L0())
        assert method(A, y, 0.1 * L0(), unroll=True, maxiter=5).x.requires_grad


# Choice and errors -------------------------------------------------------------------------------------------------


def test_solve_chooses():
    _, A, y = system()
    d = (20, 60)
    big = Identity(d)
    cases = [
        (A, y, 0.1 * TV(N), {}, "admm: 0.1 * TV((9,)) is split, and its quadratic subproblem is solved by dense"),
        (A, y, 0.1 * L1(), {"constraint": Box(0, None)}, "fista: 0.1 * L1() + Box(0, None) has a direct prox"),
        (big, randn(*d), 0.1 * TV(d), {}, "fista: A^H A = c I, and 0.1 * TV((20, 60)) has a prox"),
        (big, randn(*d), 0.1 * TV(d), {"constraint": Box(0, 1)}, "subproblem is solved by dct"),
        (A, y, 0.1 * L1(), {"data_term": L1()}, "pdhg: the data term L1() is not smooth, and has a prox"),
        (A, y, None, {"data_term": Huber()}, "pdhg"),
        (A, y, None, {}, "lsqr"),
    ]
    for op, data, g, k, text in cases:
        s = solve(op, data, g, **k, maxiter=5000)
        assert s.status.ok, text
        assert text in s.method
    hard = MatrixMult(randn(1100, 1100))  # its centre says nothing about the rest
    assert solve(hard, randn(1100), 0.1 * TV(1100), maxiter=2).method.startswith("pdhg: 0.1 * TV((1100,)) is split")


def test_bad_input():
    _, A, y = system()
    cases = [
        (lambda: fista(A, y, L1(), restart="now"), "fista: restart must be None, 'gradient' or 'function'; got 'now'"),
        (lambda: ista(A, y, L1(), step="armijo"), "ista: step must be a number > 0, 'search' or None; got 'armijo'"),
        (lambda: fista(A, y, L1(), data_term=L1()), "has no Lipschitz gradient; use pullback.pdhg or pullback.admm"),
        (lambda: condat_vu(A, y, L1(), data_term=KullbackLeibler()), "condat_vu: the data term KullbackLeibler"),
        (lambda: pdhg(A, y, L1(), data_term=3), "pdhg: data_term must be a functional of A x - y"),
        (lambda: pdhg(A, y, TV(N), gap=True), "pdhg: gap=True needs a term on x itself whose conjugate is finite"),
        (lambda: admm(A, y, L1(), constraint=3), "admm: constraint must be a functional such as pullback.Box(0, None)"),
        (lambda: admm(A, y), "admm: regularizer must hold at least one term; got none; use lsqr"),
        (lambda: admm(A, y, L1(), relaxation=2), "admm: relaxation must be a number between 0 and 2; got 2"),
        (lambda: admm(A, y, L1(), penalty=-1.0), "admm: penalty must be a finite number > 0; got -1"),
        (lambda: davis_yin(A, y, [TV(N), L1(), L2()]), "davis_yin: regularizer and constraint must be at most two"),
        (lambda: davis_yin(A, y, L1() @ Gradient(N)), "davis_yin: L1() @ Gradient has no prox; use pullback.condat_vu"),
        (lambda: douglas_rachford(A, y, L1() @ Gradient(N)), "has no prox"),
        (lambda: douglas_rachford(A, y), "douglas_rachford: regularizer must be a functional; got None"),
        (lambda: condat_vu(A, y, L1(), balance=0), "condat_vu: balance must be a finite number > 0; got 0"),
        (lambda: hqs(A, y, L1(), rate=0.5), "hqs: rate must be a finite number >= 1; got 0.5"),
        (lambda: irls(A, y, kind="x"), "irls: kind must be 'data', 'model' or 'datamodel'; got 'x'"),
        (lambda: irls(A, y, p=3), "irls: p must be a number in (0, 2]; got 3"),
        (lambda: omp(A, y, 99), f"omp: k must be an int between 0 and min(A.shape) = {N}; got 99"),
        (
            lambda: split_bregman(A, y, 3),
            "split_bregman: operators must be a pullback.LinearOperator or a list of them",
        ),
        (lambda: split_bregman(A, y, [], eps=1.0), "split_bregman: operators must hold at least one"),
        (lambda: split_bregman(A, y, Gradient(N), eps=[1.0, 2.0]), "eps must be one number or 1 of them; got 2"),
        (lambda: split_bregman(A, y, Gradient(N), mu=0), "split_bregman: mu must be a number > 0; got 0"),
        (lambda: solve(A, y, L1(), nothing=3), "unknown argument 'nothing'"),
    ]
    for call, text in cases:
        with pytest.raises(ArgumentError, match=re.escape(text)):
            call()
    with pytest.raises(ShapeError, match=r"acts on dims \(3,\), but A's input has dims"):
        admm(A, y, L1(3))
    assert math.isfinite(float(solve(A, y, L1()).history["objective"][-1]))


@pytest.mark.parametrize("seed", [70, 183, 259, 275])
def test_fista_does_not_take_a_rest_for_the_end(seed):
    matrix, y = randn(8, 6, seed=seed) / 2, randn(8, seed=seed + 50)
    A = MatrixMult(matrix)
    s, other = fista(A, y, Simplex(1.0), rtol=1e-9, maxiter=5000), ista(A, y, Simplex(1.0), rtol=1e-11, maxiter=50000)
    torch.testing.assert_close(s.x, other.x, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_condat_vu_does_not_swing_where_the_norm_is_exact():
    torch.manual_seed(11)
    A = MatrixMult(torch.randn(11, 9, dtype=torch.float64) / 2)
    for seed in range(6):
        y = randn(11, seed=seed)
        s = condat_vu(A, y, 0.1 * L1(), maxiter=5000, rtol=1e-10)
        assert s.status is Status.CONVERGED
        torch.testing.assert_close(s.x, fista(A, y, 0.1 * L1(), maxiter=5000, rtol=1e-12).x, atol=1e-7, rtol=0)


@pytest.mark.slow
def test_davis_yin_takes_the_prox_of_tv():
    matrix, y = randn(12, N, seed=3), randn(12, seed=4).requires_grad_()
    A, tv = MatrixMult(matrix), 0.3 * TV(N, maxiter=3000, rtol=1e-9)
    s = davis_yin(A, y, tv, constraint=Box(0, None), rtol=1e-10, maxiter=5000)
    other = pdhg(A, y, 0.3 * TV(N), constraint=Box(0, None), rtol=1e-10, maxiter=50000)
    torch.testing.assert_close(s.x, other.x, atol=1e-6, rtol=0)
    g, h = (torch.autograd.grad(r.x.square().sum(), y)[0] for r in (s, other))
    torch.testing.assert_close(g, h, atol=1e-4, rtol=0)
