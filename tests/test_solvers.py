"""Solvers: dense solutions, PyLops, optimality conditions; batches, stopping, guards, derivatives, errors."""

import sys

import numpy as np
import pylops
import pytest
import torch
from pylops.optimization.basic import cgls as pylops_cgls
from pylops.optimization.basic import lsqr as pylops_lsqr
from pylops.optimization.sparsity import fista as pylops_fista
from pylops.optimization.sparsity import ista as pylops_ista

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.functionals import L1, L2, L21, TV, Box, SquaredL2
from pullback.linops import Gradient, Identity, MatrixMult, Real
from pullback.solvers import ConvergenceError, Status, cg, cgls, fista, ista, landweber, lsqr, pdhg, solve

DTYPES = [torch.float64, torch.complex128]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["real", "complex"])
M, N = 12, 7


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Counting(LinearOperator):
    """(m x n) matrix on vectors of shape (n,) or images, that counts its applications."""

    def __init__(self, matrix, dims=None):
        super().__init__(matrix.shape[1] if dims is None else dims, matrix.shape[0])
        self.matrix = matrix
        self.calls = [0, 0]

    def _forward(self, x):
        self.calls[0] += 1
        return x.flatten(-len(self.dims)) @ self._cast(self.matrix, x).T

    def _adjoint(self, y):
        self.calls[1] += 1
        return (y @ self._cast(self.matrix, y).conj()).unflatten(-1, self.dims)

    def norm_bound(self, maxiter=40):
        return float(torch.linalg.matrix_norm(self.matrix.detach(), 2)) * (1 + 1e-9)


def system(dtype, m=M, n=N, batch=(), seed=0):
    matrix = randn(m, n, dtype=dtype, seed=seed)
    return matrix, MatrixMult(matrix), randn(*batch, m, dtype=dtype, seed=seed + 1)


def tikhonov(matrix, y, damp=0.0):
    normal = matrix.mH @ matrix + damp**2 * torch.eye(matrix.shape[1], dtype=matrix.dtype)
    return (
        torch.linalg.solve(normal, (y @ matrix.conj()).mT).mT
        if y.ndim > 1
        else torch.linalg.solve(normal, matrix.mH @ y)
    )


LEAST_SQUARES = {
    "cgls": lambda A, y, **k: cgls(A, y, **({"rtol": 0.0} | k)),
    "lsqr": lambda A, y, **k: lsqr(A, y, **({"atol": 0.0, "btol": 0.0} | k)),
}
least_squares = pytest.mark.parametrize("name", list(LEAST_SQUARES))


# Least squares -----------------------------------------------------------------------------------------------------


@dtypes
@least_squares
@pytest.mark.parametrize("shape", [(12, 7), (7, 7), (5, 9)])
def test_least_squares_equals_dense(name, dtype, shape):
    matrix, A, y = system(dtype, *shape)
    s = LEAST_SQUARES[name](A, y)
    best = torch.linalg.pinv(matrix) @ y  # from zero both give the solution of least norm
    torch.testing.assert_close(s.x, best, atol=1e-9, rtol=1e-9)
    assert s.status.ok
    assert s.iterations <= 3 * min(shape)


@dtypes
@least_squares
@pytest.mark.parametrize("start", [False, True])
def test_damping_with_and_without_start(name, dtype, start):
    matrix, A, y = system(dtype, batch=(3,))
    k = {"x0": randn(N, dtype=dtype, seed=5)} if start else {}
    torch.testing.assert_close(LEAST_SQUARES[name](A, y, damp=0.7, **k).x, tikhonov(matrix, y, 0.7))
    damp = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    s = LEAST_SQUARES[name](A, y, damp=damp, **k)
    for i in range(3):
        torch.testing.assert_close(s.x[i], tikhonov(matrix, y[i], damp[i].item()))


@dtypes
def test_cg_equals_dense(dtype):
    matrix, _, y = system(dtype, 7, 7, batch=(2,))
    normal = matrix.mH @ matrix
    expected = torch.linalg.solve(normal + 0.3 * torch.eye(7, dtype=dtype), y.mT).mT
    for k in ({}, {"x0": randn(7, dtype=dtype, seed=3)}):
        s = cg(MatrixMult(normal), y, damp=0.3, rtol=1e-12, **k)
        torch.testing.assert_close(s.x, expected)
        assert s.status is Status.CONVERGED
        assert (s.history["residual"][-1] <= 1e-12 * y.norm(dim=-1)).all()


@dtypes
def test_landweber_equals_dense(dtype):
    matrix, A, y = system(dtype, batch=(2,))
    s = landweber(A, y, maxiter=5000, rtol=1e-10)
    torch.testing.assert_close(s.x, tikhonov(matrix, y))
    assert s.status is Status.CONVERGED


def test_landweber_with_projection_is_nonnegative_least_squares():
    matrix, A, y = system(torch.float64)
    s = landweber(A, y, projection=Box(0, None), maxiter=5000, rtol=1e-12)
    gradient = matrix.mH @ (matrix @ s.x - y)
    assert s.status is Status.CONVERGED
    assert (s.x >= 0).all()
    assert (gradient >= -1e-9).all()
    assert (gradient * s.x).abs().max() < 1e-9


def test_operators_linear_over_the_reals_only():
    matrix, A, y = system(torch.complex128, 9, 5)
    R = Real(9) @ A  # x -> Re(A x)
    stacked = torch.cat((matrix.real, -matrix.imag), 1)
    best = torch.linalg.pinv(stacked) @ y.real
    for s in (cgls(R, y.real, rtol=1e-12), lsqr(R, y.real, atol=1e-13, btol=1e-13)):
        torch.testing.assert_close(torch.cat((s.x.real, s.x.imag)), best)


# Batches and stopping ----------------------------------------------------------------------------------------------


def solvers():
    g = 0.3 * L1()
    yield "cgls", lambda A, y, **k: cgls(A, y, **k), {"maxiter": 9, "rtol": 1e-3}
    yield "lsqr", lambda A, y, **k: lsqr(A, y, **k), {"maxiter": 9, "atol": 1e-3}
    yield "landweber", lambda A, y, **k: landweber(A, y, **k), {"maxiter": 30, "rtol": 1e-2}
    yield "ista", lambda A, y, **k: ista(A, y, g, **k), {"maxiter": 60, "rtol": 1e-3}
    yield "fista", lambda A, y, **k: fista(A, y, g, **k), {"maxiter": 60, "rtol": 1e-3}
    yield "pdhg", lambda A, y, **k: pdhg(A, y, [g, 0.1 * L2()], **k), {"maxiter": 90, "rtol": 1e-3}


every = pytest.mark.parametrize(("name", "run", "k"), list(solvers()), ids=[s[0] for s in solvers()])


@dtypes
@every
def test_batch_is_loop_and_members_stop_by_themselves(name, run, k, dtype):
    matrix, A, _ = system(dtype)
    easy = matrix @ torch.linalg.svd(matrix).Vh[0].conj()  # one singular vector: one or two iterations
    y = torch.stack([easy, randn(M, dtype=dtype, seed=4), torch.zeros(M, dtype=dtype), 1e-3 * randn(M, dtype=dtype)])
    y = torch.stack([y, y.flip(0)])
    s = run(A, y, **k)
    assert s.x.shape == (2, 4, N)
    assert s.member_iterations.shape == (2, 4)
    assert len(s.statuses) == 8
    for i in range(2):
        for j in range(4):
            one = run(A, y[i, j], **k)
            torch.testing.assert_close(s.x[i, j], one.x, atol=1e-10, rtol=1e-10)
            assert s.statuses[4 * i + j] is one.status
            assert s.member_iterations[i, j] == one.iterations
            for quantity, values in one.history.items():
                assert values.shape == (one.iterations + 1,)
                torch.testing.assert_close(
                    s.history[quantity][: one.iterations + 1, i, j], values, atol=1e-9, rtol=1e-9
                )
    assert len(set(s.member_iterations.flatten().tolist())) > 1
    assert (s.x[0, 2] == 0).all()
    assert s.iterations == s.member_iterations.max()


@every
def test_warm_start_stops_at_once(name, run, k):
    _, A, y = system(torch.float64, batch=(2,))
    tight = {"maxiter": 20000} | ({"atol": 1e-11, "btol": 1e-11} if name == "lsqr" else {"rtol": 1e-9})
    first = run(A, y, **tight)
    second = run(A, y, x0=first.x, **(k | {"maxiter": 500}))
    assert first.status.ok
    assert second.status.ok
    assert second.iterations <= (40 if name == "pdhg" else 2)
    torch.testing.assert_close(first.x, second.x, atol=1e-2, rtol=0)
    shared = run(A, y, x0=first.x[0], **k)
    assert shared.x.shape == (2, N)
    wider = run(A, y[0], x0=first.x, **k)
    assert wider.x.shape == (2, N)


@every
def test_inputs_are_left_alone_and_forms_agree(name, run, k):
    matrix, _, y = system(torch.float64, m=M, n=8, batch=(2,))
    A = Counting(matrix, dims=(2, 4))
    y0, x0 = y.clone(), randn(2, 2, 4, seed=6)
    start = x0.clone()
    s = run(A, y, x0=x0, **k)
    assert torch.equal(y, y0)
    assert torch.equal(x0, start)
    assert s.x.shape == (2, 2, 4)
    n = run(A, y.numpy(), x0=x0.numpy(), **k)
    assert isinstance(n.x, np.ndarray)
    np.testing.assert_array_equal(n.x, s.x.numpy())
    assert all(isinstance(v, np.ndarray) for v in n.history.values())
    half = run(A, y.bfloat16(), **k)
    assert half.x.dtype == torch.bfloat16
    single = run(A, y.float(), **k)
    assert single.x.dtype == torch.float32
    B = A @ Identity((2, 4))
    Z = B.H @ B + Identity((2, 4))
    flat = run(Z, randn(3, 8), **k)
    assert flat.x.shape == (3, 8)
    torch.testing.assert_close(flat.x, run(Z, randn(3, 8).unflatten(-1, (2, 4)), **k).x.flatten(-2))


@every
def test_one_application_an_iteration(name, run, k):
    matrix, _, y = system(torch.float64)
    A = Counting(matrix)
    run(A, y, maxiter=5, **({"atol": 0.0, "btol": 0.0} if name == "lsqr" else {"rtol": 0.0}))
    forward, adjoint = A.calls
    assert forward <= 5
    assert adjoint <= 6


@every
def test_nan_is_caught(name, run, k):
    _, A, y = system(torch.float64, batch=(2,))
    y[0, 3] = float("nan")
    s = run(A, y, **k)
    assert s.statuses[0] is Status.NOT_FINITE
    assert s.statuses[1] not in (Status.DIVERGED, Status.NOT_FINITE)
    assert torch.isfinite(s.x).all()
    assert s.status is Status.NOT_FINITE
    assert s.member_iterations[0] == 0
    with pytest.raises(ConvergenceError, match="the data hold inf or nan: clean y and x0"):
        run(A, y, throw=True, **k)
    alone = run(A, y[0], **k)
    assert alone.status is Status.NOT_FINITE
    assert torch.equal(alone.x, torch.zeros(N, dtype=torch.float64))


@every
def test_callback_and_maxiter(name, run, k):
    _, A, y = system(torch.float64, batch=(2,))
    seen = []

    def callback(state):
        seen.append((state.iteration, state.x.clone(), sorted(state.values)))
        return state.iteration == 2

    s = run(A, y, callback=callback, **k)
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert torch.equal(s.x, seen[-1][1])
    assert s.status is Status.CALLBACK
    assert s.iterations == 2
    assert "residual" in seen[0][2]
    assert s.history["residual"].shape == (3, 2)
    none = run(A, y, x0=torch.ones(N, dtype=torch.float64), **(k | {"maxiter": 0}))
    assert torch.equal(none.x, torch.ones(2, N, dtype=torch.float64))
    assert none.status is Status.MAXITER
    assert "increase maxiter" in str(none.status)
    with pytest.raises(ConvergenceError, match="increase maxiter, or loosen rtol") as info:
        run(A, y, throw=True, **(k | {"maxiter": 1}))
    assert info.value.solution.iterations == 1


@every
def test_callback_stops_members(name, run, k):
    _, A, y = system(torch.float64, batch=(3,))
    s = run(A, y, callback=lambda s: torch.tensor([s.iteration >= 1, s.iteration >= 3, False]), **(k | {"maxiter": 5}))
    assert s.member_iterations[:2].tolist() == [1, 3]
    assert s.statuses[0] is s.statuses[1] is Status.CALLBACK
    assert torch.equal(s.x[0], run(A, y, **(k | {"maxiter": 1})).x[0])
    with pytest.raises(ArgumentError, match=r"callback must return a bool, or one for each member .* got shape \(2,\)"):
        run(A, y, callback=lambda s: torch.tensor([True, False]), **k)
    assert run(A, y[0], callback=lambda s: torch.tensor([True]), **k).iterations == 0


@every
def test_progress_bar(name, run, k, capfd):
    _, A, y = system(torch.float64)
    run(A, y, **k)
    run(A, y, progress=True, **k)  # stderr is no terminal here
    assert capfd.readouterr() == ("", "")
    run(A, y, progress="always", **k)
    assert name in capfd.readouterr().err
    assert "tqdm" in sys.modules


@every
def test_unrolled_derivatives(name, run, k):
    few = {"maxiter": 3, "unroll": True} | ({"atol": 0.0, "btol": 0.0} if name == "lsqr" else {"rtol": 0.0})
    few |= {"step": 0.05} if name in ("landweber", "ista", "fista") else {}
    matrix, _, y = system(torch.float64, 5, 3, batch=(2,))
    assert torch.autograd.gradcheck(lambda y, x0: run(MatrixMult(matrix), y, x0=x0, **few).x, (
        y.requires_grad_(), randn(2, 3, seed=7).requires_grad_()
    ))  # fmt: skip
    if name == "pdhg":
        return  # its steps depend on |A| and count as constants
    assert torch.autograd.gradcheck(lambda m: run(MatrixMult(m), y.detach(), **few).x, (matrix.requires_grad_(),))
    complex_y = randn(5, dtype=torch.complex128).requires_grad_()
    complex_m = randn(5, 3, dtype=torch.complex128)
    assert torch.autograd.gradcheck(lambda y: run(MatrixMult(complex_m), y, **few).x, (complex_y,))


def test_derivative_of_the_solution():
    matrix, A, y = system(torch.float64, 6, 3)
    damp = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y.requires_grad_()
    for f in (lambda y, d: cgls(A, y, damp=d, rtol=1e-12).x, lambda y, d: lsqr(A, y, damp=d, atol=1e-13, btol=1e-13).x):
        for out, expected in zip(
            torch.autograd.functional.jacobian(f, (y, damp)),
            torch.autograd.functional.jacobian(lambda y, d: tikhonov(matrix, y, d), (y, damp)),
            strict=True,
        ):
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = fista(A, y, weight * L1(), maxiter=3000, rtol=1e-13).x
    (slope,) = torch.autograd.grad(x.abs().sum(), weight)
    active = x.detach() != 0
    a, sign = matrix[:, active], torch.sign(x.detach()[active])
    torch.testing.assert_close(slope, -sign @ torch.linalg.solve(a.T @ a, sign), atol=1e-6, rtol=1e-6)


def test_grad_mode_and_parameters():
    matrix, _, y = system(torch.float64)
    A = MatrixMult(torch.nn.Parameter(matrix))
    assert cgls(A, y).x.requires_grad
    with torch.no_grad():
        assert not cgls(A, y).x.requires_grad


# Rounding, breakdown, divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("seed", range(8))
def test_no_blow_up_past_convergence(dtype, seed):
    matrix, A, y = system(dtype, 8, 5, batch=(3,), seed=seed)
    best = tikhonov(matrix.to(torch.complex128), y.to(torch.complex128))
    for name, run in LEAST_SQUARES.items():
        s = run(A, y, maxiter=400)
        assert s.status in (Status.PRECISION, Status.CONVERGED), name
        assert s.iterations < 40
        assert (s.x - best).abs().max() < 1e4 * torch.finfo(dtype).eps
    s = cg(MatrixMult(matrix.mH @ matrix), y[:, :5], rtol=0.0, maxiter=400)
    assert s.status.ok


def test_zero_data_and_zero_operator():
    _, A, _ = system(torch.float64)
    for _, run, k in solvers():
        s = run(A, torch.zeros(M, dtype=torch.float64), **k)
        assert (s.x == 0).all()
        assert s.status.ok
        s = run(MatrixMult(torch.zeros(M, N, dtype=torch.float64)), randn(M), **k)
        assert torch.isfinite(s.x).all()
        assert s.status.ok


def test_cg_breaks_down_on_an_indefinite_operator():
    s = cg(
        MatrixMult(torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))),
        torch.tensor([0.1, 1, 0.1]).double(),
    )
    assert s.status is Status.BREAKDOWN
    assert "use cgls" in str(s.status)
    assert torch.isfinite(s.x).all()


def test_lsqr_reports_ill_conditioning():
    A = MatrixMult(torch.diag(torch.logspace(0, -10, 8, dtype=torch.float64)))
    s = lsqr(A, torch.ones(8, dtype=torch.float64), conlim=1e4, atol=0.0, btol=0.0)
    assert s.status is Status.ILL_CONDITIONED
    assert "add damp, or increase conlim" in str(s.status)


def test_too_long_a_step_is_reported():
    _, A, y = system(torch.float64)
    for run in (lambda: landweber(A, y, step=1.0, maxiter=500), lambda: fista(A, y, L1(), step=1.0, maxiter=500)):
        s = run()
        assert s.status is Status.DIVERGED
        assert "smaller step" in str(s.status)
        assert s.iterations < 100


# Proximal solvers --------------------------------------------------------------------------------------------------


def check_lasso(matrix, y, x, weight):
    """0 lies in A^H (A x - y) + weight d|x|_1."""
    pull = matrix.mH @ (y - matrix @ x)
    on = x != 0
    assert (pull[on] - weight * torch.sgn(x[on])).abs().max() < 1e-7
    assert (pull[~on].abs() <= weight + 1e-7).all()


@dtypes
@pytest.mark.parametrize("solver", [ista, fista])
def test_lasso_optimality(solver, dtype):
    matrix, A, y = system(dtype)
    for weight in (0.5, 3.0):
        s = solver(A, y, weight * L1(), maxiter=5000, rtol=1e-12)
        assert s.status is Status.CONVERGED
        check_lasso(matrix, y, s.x, weight)
        objective = (matrix @ s.x - y).norm() ** 2 / 2 + weight * s.x.abs().sum()
        torch.testing.assert_close(s.history["objective"][-1], objective)
        torch.testing.assert_close(s.history["residual"][-1], (matrix @ s.x - y).norm())
    assert (solver(A, y, 1e3 * L1()).x == 0).all()


def test_fista_with_other_functionals():
    matrix, A, y = system(torch.float64)
    s = fista(A, y, Box(0, 0.2), maxiter=3000, rtol=1e-12)
    gradient = matrix.T @ (matrix @ s.x - y)
    assert (gradient[s.x == 0] >= -1e-9).all()
    assert (gradient[s.x == 0.2] <= 1e-9).all()
    assert gradient[(s.x > 0) & (s.x < 0.2)].abs().max() < 1e-7
    s = fista(A, y, 0.49 * SquaredL2(), maxiter=3000, rtol=1e-12)
    torch.testing.assert_close(s.x, tikhonov(matrix, y, 0.7))
    b = randn(N, seed=8)
    s = fista(A, torch.zeros(M, dtype=torch.float64), 1e6 * SquaredL2(b=b), maxiter=3000, rtol=1e-12)
    torch.testing.assert_close(s.x, b, atol=1e-3, rtol=0)  # x0 = 0 and y = 0 must not end the iteration


@pytest.mark.parametrize(
    "terms", ["L1", pytest.param("L1 of gradient", marks=pytest.mark.slow), "TV and box", "L21 and L2"]
)
def test_pdhg_against_fista_or_optimality(terms):
    dims = (4, 5)
    matrix = randn(24, 20) / 4
    A = Counting(matrix, dims=dims)
    y = matrix @ torch.ones(20, dtype=torch.float64) + 0.5 * randn(24, seed=3)
    if terms == "L1":
        s = pdhg(A, y, L1(), maxiter=20000, rtol=1e-8)
        check_lasso(matrix, y, s.x.flatten(), 1.0)
    elif terms == "L1 of gradient":
        G = Gradient(dims, kind="forward")
        s = pdhg(A, y, 0.3 * (L1() @ G), maxiter=20000, rtol=1e-8)
        other = fista(A, y, 0.3 * TV(dims, isotropic=False, maxiter=300, rtol=1e-7), maxiter=200, rtol=1e-8)
        torch.testing.assert_close(s.x, other.x, atol=1e-5, rtol=0)
    elif terms == "TV and box":
        f = 0.3 * TV(dims) + Box(0.5, None)
        s = pdhg(A, y, f, maxiter=20000, rtol=1e-8)
        assert (s.x >= 0.5).all()

        def objective(x):
            return (A(x) - y).square().sum() / 2 + f(x)

        for seed in range(30):
            assert objective(s.x) <= objective((s.x + 0.01 * randn(*dims, seed=seed)).clamp(min=0.5)) + 1e-9
        torch.testing.assert_close(s.history["objective"][-1], objective(s.x))
    else:
        s = pdhg(A, y, [0.3 * L21(axis=0), 0.2 * L2()], maxiter=20000, rtol=1e-8)
        x = s.x
        pull = A.H(y - A(x)) - 0.2 * x / x.norm() - 0.3 * x / x.norm(dim=0)
        assert pull.abs().max() < 1e-6
    assert s.status is Status.CONVERGED


def test_pdhg_complex_and_balance():
    matrix, A, y = system(torch.complex128)
    for balance in (0.01, 1.0, 100.0):
        s = pdhg(A, y, 0.5 * L1(), balance=balance, maxiter=20000, rtol=1e-8)
        assert s.status is Status.CONVERGED
        check_lasso(matrix, y, s.x, 0.5)


def test_solve_says_what_it_chose():
    matrix, A, y = system(torch.float64)
    cases = [
        (None, "lsqr: a least-squares problem"),
        (0.49 * SquaredL2(), "Tikhonov"),
        (0.3 * L1(), "fista: 0.3 \\* L1"),
        ([0.3 * L1(), Box(0, None)], "fista"),
        (0.3 * TV(N), "admm: 0.3 \\* TV"),
        (0.1 * TV(N) + Box(0, 1), "admm"),
    ]
    for regularizer, text in cases:
        s = solve(A, y, regularizer, maxiter=3000, rtol=1e-6)
        assert s.status is Status.CONVERGED
        assert s.method.startswith(text.split(":")[0]) or "Tikhonov" in s.method
        assert text.replace("\\", "") in s.method
    torch.testing.assert_close(solve(A, y, 0.49 * SquaredL2(), rtol=1e-12).x, tikhonov(matrix, y, 0.7))
    assert "lsqr" in repr(solve(A, y))


# PyLops ------------------------------------------------------------------------------------------------------------


def test_pylops_agreement():
    matrix, A, y = system(torch.float64)
    P = pylops.MatrixMult(matrix.numpy())
    x0 = randn(N, seed=2)
    for niter in (1, 3, 6):
        k = {"niter": niter, "damp": 0.4}
        theirs = pylops_cgls(P, y.numpy(), x0=np.zeros(N), tol=0, **k)[0]
        np.testing.assert_allclose(cgls(A, y.numpy(), damp=0.4, maxiter=niter, rtol=0).x, theirs, atol=1e-12)
        theirs = pylops_cgls(P, y.numpy(), x0=x0.numpy(), tol=0, niter=niter)[0]
        np.testing.assert_allclose(cgls(A, y, x0=x0, maxiter=niter, rtol=0).x, theirs, atol=1e-12)
        theirs = pylops_lsqr(P, y.numpy(), x0=np.zeros(N), atol=0, btol=0, conlim=1e12, **k)[0]
        np.testing.assert_allclose(lsqr(A, y, damp=0.4, maxiter=niter, atol=0, btol=0).x, theirs, atol=1e-12)
        for ours, pylops_version in ((ista, pylops_ista), (fista, pylops_fista)):
            theirs = pylops_version(P, y.numpy(), niter=5 * niter, eps=0.8, alpha=0.03, tol=0)[0]
            s = ours(A, y, eps=0.8, step=0.03, maxiter=5 * niter, rtol=0)
            np.testing.assert_allclose(s.x, theirs, atol=1e-12)


# Errors ------------------------------------------------------------------------------------------------------------


def test_bad_input():
    matrix, A, y = system(torch.float64)
    with pytest.raises(ArgumentError, match=r"cgls: A must be a pullback.LinearOperator; got Tensor; wrap"):
        cgls(matrix, y)
    with pytest.raises(ShapeError, match=r"lsqr: y must have shape \(..., 12\), A's output; got \(7,\)"):
        lsqr(A, y[:7])
    with pytest.raises(ShapeError, match="cgls: x0 must have shape"):
        cgls(A, y, x0=y)
    with pytest.raises(ShapeError, match=r"the batch axes of x0 \(3,\) do not fit those of y \(2,\)"):
        cgls(A, torch.stack([y, y]), x0=randn(3, N))
    with pytest.raises(DtypeError, match=r"use y.float\(\)"):
        cgls(A, torch.ones(M, dtype=torch.int64))
    with pytest.raises(DtypeError, match="y must be a torch tensor or a NumPy array; got list"):
        cgls(A, [1.0] * M)
    with pytest.raises(DtypeError, match="y must be real, as A's output is"):
        cgls(Real(3), randn(3, dtype=torch.complex128))
    with pytest.raises(ShapeError, match="cg: A must be square"):
        cg(A, y)
    with pytest.raises(ArgumentError, match=r"maxiter must be an int >= 0; got 2.5"):
        cgls(A, y, maxiter=2.5)
    with pytest.raises(ArgumentError, match="rtol must be a number >= 0; got -1"):
        cgls(A, y, rtol=-1)
    with pytest.raises(ArgumentError, match="damp must be a finite number >= 0; got -2"):
        cgls(A, y, damp=-2)
    with pytest.raises(ShapeError, match="damp must be one number or one for each member"):
        cgls(A, y, damp=torch.ones(3))
    with pytest.raises(ArgumentError, match="callback must be callable"):
        cgls(A, y, callback=3)
    with pytest.raises(ArgumentError, match="progress must be True, False or 'always'"):
        cgls(A, y, progress="yes")
    with pytest.raises(ArgumentError, match=r"fista: give either g.* or eps; got neither"):
        fista(A, y)
    with pytest.raises(ArgumentError, match=r"g must be a functional such as"):
        fista(A, y, 0.1)
    with pytest.raises(ShapeError, match=r"L1\(dims=\(3,\)\) acts on dims \(3,\), but A's input has dims \(7,\)"):
        fista(A, y, L1(3))
    with pytest.raises(ArgumentError, match=r"has no prox; use pullback.pdhg"):
        fista(A, y, L1() @ Gradient(N))
    with pytest.raises(ArgumentError, match="step must be a finite number > 0; got 0"):
        ista(A, y, L1(), step=0)
    with pytest.raises(ArgumentError, match=r"regularizer must be a functional such as"):
        solve(A, y, 0.1)
    with pytest.raises(ArgumentError, match="balance must be a finite number > 0"):
        pdhg(A, y, L1(), balance=0)


def test_checkpoints_that_cannot_serve_are_refused(tmp_path):
    _, A, y = system(torch.float64)
    path = tmp_path / "state.pt"
    with pytest.raises(ArgumentError, match="lies in a folder that does not exist; make it first"):
        cgls(A, y, checkpoint=tmp_path / "missing" / "state.pt")
    with pytest.raises(ArgumentError, match="checkpoint_every must be an int >= 1; got 0"):
        cgls(A, y, checkpoint=path, checkpoint_every=0)
    with pytest.raises(ArgumentError, match="a run with unroll=True cannot be saved"):
        cgls(A, y.clone().requires_grad_(), checkpoint=path, unroll=True)
    cgls(A, y, maxiter=2, rtol=0.0, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    for other in (lambda: cgls(A, 2 * y, checkpoint=path), lambda: cgls(2 * A, y, checkpoint=path)):
        with pytest.raises(ArgumentError, match="was saved for another problem"):
            other()
    with pytest.raises(ArgumentError, match="was saved for another problem"):
        cgls(A, y, damp=0.1, checkpoint=path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ArgumentError, match="is not a state that a solver saved"):
        cgls(A, y, checkpoint=path)
