"""Linear solvers: dense solutions, batches, preconditioners, breakdown, checkpoints, errors."""

import math

import numpy as np
import pytest
import torch
from linear_cases import CASES, data, dtypes, every, randn, spd

from pullback.core.check import dottest
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.linops import Convolve2D, Diagonal, FunctionOperator, Identity, MatrixMult, Real
from pullback.solvers import (
    CirculantPreconditioner,
    ConvergenceError,
    JacobiPreconditioner,
    NystromPreconditioner,
    Status,
    bicgstab,
    cg,
    chebyshev,
    gmres,
    kaczmarz,
    landweber,
    lsmr,
    lsqr,
    minres,
    sirt,
)

# torch compiles its forward-mode formulas with torch.jit.script at their first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

# Values ------------------------------------------------------------------------------------------------------------


@dtypes
@every
def test_equals_dense_with_true_residual(name, dtype):
    case = CASES[name]
    m, y = case.matrix(dtype), data(case, dtype)
    matrix = case.make(m)
    s = case.solve(m, y)
    assert s.status.ok
    torch.testing.assert_close(s.x, case.dense(matrix, y), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(s.history["residual"][-1], (matrix @ s.x - y).norm(), atol=1e-11, rtol=1e-9)
    early = case.solve(m, y, maxiter=3, **({"atol": 0.0, "btol": 0.0} if case.run is lsqr else {"rtol": 0.0}))
    assert early.iterations == 3
    torch.testing.assert_close(early.history["residual"][-1], (matrix @ early.x - y).norm())


@dtypes
@every
def test_batch_is_loop_and_members_stop_by_themselves(name, dtype):
    case = CASES[name]
    m = case.matrix(dtype)
    matrix = case.make(m)
    easy = torch.linalg.eigh(matrix @ matrix.mH).eigenvectors[:, -1]  # one iteration for most
    y = torch.stack([easy, data(case, dtype, seed=4), 0 * easy, 1e-3 * data(case, dtype, seed=5)])
    loose = {"atol": 1e-8, "btol": 1e-8} if case.run is lsqr else {"rtol": 1e-5, "maxiter": 3000}
    x0 = y.norm(dim=-1, keepdim=True) * randn(case.shape[1], dtype=y.dtype, seed=9)
    for k in ({}, {"x0": x0}):
        s = case.solve(m, y, **loose, **k)
        assert len(set(s.member_iterations.tolist())) > 1
        for i in range(4):
            one = case.solve(m, y[i], **loose, **{name: v[i] for name, v in k.items()})
            torch.testing.assert_close(s.x[i], one.x, atol=1e-9, rtol=1e-7)
            assert s.statuses[i] is one.status
            assert s.member_iterations[i] == one.iterations
            for quantity, values in one.history.items():
                torch.testing.assert_close(s.history[quantity][: one.iterations + 1, i], values, atol=1e-8, rtol=1e-6)
        assert (s.x[2] == 0).all()


@every
def test_damping_of_members_and_start(name):
    case = CASES[name]
    if not case.damped:
        with (
            pytest.raises((TypeError, ArgumentError), match="damp")
            if case.run not in (lsmr,)
            else pytest.raises(ArgumentError, match="damp must be a finite number >= 0; got -1")
        ):
            case.solve(case.matrix(), data(case, torch.float64), damp=-1)
        return
    m, y = case.matrix(), data(case, torch.float64, 3)
    damp = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    x0 = randn(case.shape[1], seed=5)
    for k in ({}, {"x0": x0}):
        s = case.solve(m, y, damp=damp, **k)
        assert s.status.ok
        for i in range(3):
            expected = case.dense(case.make(m), y[i], damp[i])
            torch.testing.assert_close(s.x[i], expected)
            torch.testing.assert_close(case.solve(m, y[i], damp=float(damp[i]), **k).x, expected)


@every
def test_warm_start_forms_and_inputs(name):
    case = CASES[name]
    m, y = case.matrix(), data(case, torch.float64, 2)
    first = case.solve(m, y)
    loose = {"atol": 1e-6, "btol": 1e-6} if case.run is lsqr else {"rtol": 1e-6}
    before = first.x.clone(), y.clone()
    again = case.solve(m, y, x0=first.x, **loose)
    assert again.status.ok
    assert again.iterations <= 1
    assert torch.equal(first.x, before[0])
    assert torch.equal(y, before[1])
    array = case.solve(m, y.numpy())
    np.testing.assert_array_equal(array.x, first.x.numpy())
    assert all(isinstance(v, np.ndarray) for v in array.history.values())
    f32 = {"atol": 1e-5, "btol": 1e-5} if case.run is lsqr else {"rtol": 1e-4}
    single = case.solve(m, y.float(), **f32)
    assert single.x.dtype == torch.float32
    assert single.status.ok
    torch.testing.assert_close(single.x.double(), first.x, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("solver", [cg, minres, gmres, bicgstab])
def test_images_and_flat_data(solver):
    d = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
    A = Diagonal(d)
    y = randn(4, 2, 3)
    torch.testing.assert_close(solver(A, y, rtol=1e-12).x, y / d)
    torch.testing.assert_close(solver(A, y.flatten(1), rtol=1e-12).x, (y / d).flatten(1))
    torch.testing.assert_close(solver(A, y[0], rtol=1e-12, preconditioner=JacobiPreconditioner(A)).x, y[0] / d)


def test_minres_on_singular_systems():
    m = randn(6, 4)
    signs = torch.diag(torch.tensor([1.0, -2.0, 3.0, -0.5], dtype=torch.float64))
    q = torch.linalg.qr(m).Q
    matrix = q @ signs @ q.mT  # rank 4 of 6, indefinite
    y = matrix @ randn(6, seed=3)
    s = minres(MatrixMult(matrix), y, rtol=1e-12)
    assert s.status is Status.CONVERGED
    torch.testing.assert_close(s.x, torch.linalg.pinv(matrix) @ y)
    outside = y + (torch.eye(6, dtype=torch.float64) - q @ q.mT) @ randn(6, seed=4)
    for data_ in (outside, torch.stack([outside, y])):
        s = minres(MatrixMult(matrix), data_, rtol=1e-12)
        x, b = (s.x, outside) if data_.ndim == 1 else (s.x[0], outside)
        assert s.statuses[0] is Status.PRECISION
        assert (matrix @ (b - matrix @ x)).norm() < 1e-6
    assert s.statuses[1] is Status.CONVERGED


def test_gmres_where_the_krylov_space_is_exhausted():
    shift = torch.roll(torch.eye(5, dtype=torch.float64), 1, 0)
    e = torch.eye(5, dtype=torch.float64)[0]
    s = gmres(MatrixMult(shift), e, rtol=1e-12)  # no progress before the last iteration
    assert s.iterations == 5
    torch.testing.assert_close(s.x, shift.T @ e)
    nilpotent = torch.diag(torch.ones(4, dtype=torch.float64), 1)
    for y in (e.flip(0), torch.stack([e.flip(0), e])):
        s = gmres(MatrixMult(nilpotent), y)
        assert s.statuses[0] is Status.BREAKDOWN
        assert "use cgls" in str(s.statuses[0])
        assert torch.isfinite(s.x).all()


def test_ill_conditioned():
    u, v = torch.linalg.qr(randn(20, 20)).Q, torch.linalg.qr(randn(20, 20, seed=1)).Q
    matrix = (u * torch.logspace(0, -6, 20, dtype=torch.float64)) @ v.mT
    x = randn(20, seed=2)
    for s in (
        lsmr(MatrixMult(matrix), matrix @ x, rtol=1e-15, maxiter=2000),
        gmres(MatrixMult(matrix), matrix @ x, rtol=1e-13),
    ):
        assert (s.x - x).norm() < 1e-4 * x.norm()
    s = lsmr(MatrixMult(matrix), matrix @ x, conlim=1e3, rtol=0.0)
    assert s.status is Status.ILL_CONDITIONED
    assert "add damp, or increase conlim" in str(s.status)
    norms = s.history["gradient"]
    assert (norms[1:] <= norms[:-1] * (1 + 1e-9)).all()


def test_kaczmarz_orders_blocks_and_zero_rows():
    matrix = randn(9, 6)
    matrix[4] = 0
    x = randn(6, seed=1)
    counts = {}
    for order in ("cyclic", "symmetric", "random"):
        for block in (1, 3):
            s = kaczmarz(MatrixMult(matrix), matrix @ x, order=order, block=block, maxiter=5000, rtol=1e-10)
            assert s.status is Status.CONVERGED
            torch.testing.assert_close(s.x, x, atol=1e-7, rtol=1e-7)
            counts[order, block] = s.iterations
    assert counts["cyclic", 3] < counts["cyclic", 1]
    start = randn(7, seed=2)
    wide = randn(3, 7)
    near = kaczmarz(MatrixMult(wide), wide @ randn(7, seed=3), x0=start, rtol=1e-13, maxiter=2000).x
    torch.testing.assert_close(near, start + torch.linalg.pinv(wide) @ (wide @ (randn(7, seed=3) - start)))
    A = MatrixMult(matrix)
    once = kaczmarz(A, matrix @ x, order="random", seed=3, maxiter=4, rtol=0.0).x
    assert torch.equal(once, kaczmarz(A, matrix @ x, order="random", seed=3, maxiter=4, rtol=0.0).x)
    assert not torch.equal(once, kaczmarz(A, matrix @ x, order="random", seed=4, maxiter=4, rtol=0.0).x)
    with pytest.raises(ArgumentError, match="complex-linear to have rows"):
        kaczmarz(Real(3), randn(3))


def test_sirt_bounds_sums_and_refusals():
    matrix = randn(9, 5).abs()
    matrix[3], matrix[:, 2] = 0, 0
    y = randn(9, seed=1)
    s = sirt(MatrixMult(matrix), y, lower=0.0, upper=0.5, rtol=1e-12, maxiter=50000)
    assert s.status is Status.CONVERGED
    weights = torch.where(matrix.sum(1) > 0, 1 / matrix.sum(1), 0)
    pull = matrix.T @ (weights * (matrix @ s.x - y))
    assert (s.x >= 0).all() and (s.x <= 0.5).all()
    assert (pull[s.x == 0] >= -1e-9).all()
    assert (pull[s.x == 0.5] <= 1e-9).all()
    assert pull[(s.x > 0) & (s.x < 0.5)].abs().max() < 1e-7
    signed = randn(9, 5, seed=2)
    with pytest.raises(ArgumentError, match=r"got negative sums; give sums=\(rows, columns\) of \|A\|"):
        sirt(MatrixMult(signed), y)
    with pytest.raises(ArgumentError, match="got complex sums"):
        sirt(MatrixMult(signed * 1j), y)
    given = sirt(MatrixMult(signed), y, sums=(signed.abs().sum(1), signed.abs().sum(0)), rtol=1e-12, maxiter=50000)
    half = signed * signed.abs().sum(1, keepdim=True).rsqrt()
    scaled = y * signed.abs().sum(1).rsqrt()
    torch.testing.assert_close(given.x, torch.linalg.lstsq(half, scaled.unsqueeze(-1)).solution.squeeze(-1))
    with pytest.raises(ShapeError, match=r"row sums must be real of shape \(9,\); got \(5,\)"):
        sirt(MatrixMult(signed), y, sums=(torch.ones(5), torch.ones(5)))
    with pytest.raises(ArgumentError, match="lower must be less than upper"):
        sirt(MatrixMult(matrix), y, lower=1.0, upper=0.0)


def test_chebyshev_is_a_fixed_polynomial():
    matrix = spd(randn(5, 5))
    k = {"interval": (1.0, 30.0), "maxiter": 4, "rtol": 0.0}
    a, b = randn(5, seed=1), randn(5, seed=2)
    x = [chebyshev(MatrixMult(matrix), v, **k).x for v in (a, b, a + 2 * b)]
    torch.testing.assert_close(x[2], x[0] + 2 * x[1])
    # With T_k the Chebyshev polynomial: the error polynomial at eigenvalue t is T_4((c - t) / d) / T_4(c / d).
    values, vectors = torch.linalg.eigh(matrix)
    t = lambda z: torch.special.chebyshev_polynomial_t(z, 4)  # noqa: E731
    ratio = t((15.5 - values) / 14.5) / t(torch.tensor(15.5 / 14.5, dtype=torch.float64))
    exact = torch.linalg.solve(matrix, a)
    torch.testing.assert_close(exact - x[0], vectors @ (ratio * (vectors.mT @ exact)))
    with pytest.raises(ArgumentError, match=r"give interval=\(a, b\), or use cg or cgls"):
        chebyshev(MatrixMult(matrix), a)
    with pytest.raises(ArgumentError, match=r"interval must be \(a, b\) with 0 < a <= b; got \(2, 1\)"):
        chebyshev(MatrixMult(matrix), a, interval=(2, 1))
    damped = chebyshev(MatrixMult(matrix), a, damp=0.5, rtol=1e-12, maxiter=500)
    torch.testing.assert_close(damped.x, torch.linalg.solve(matrix + 0.5 * torch.eye(5, dtype=torch.float64), a))
    s = chebyshev(MatrixMult(matrix), a, interval=(0.1, 3.0), maxiter=500)
    assert s.status is Status.DIVERGED
    assert torch.isfinite(s.x).all()


# Preconditioners ---------------------------------------------------------------------------------------------------


def test_preconditioners_save_iterations():
    d = torch.logspace(0, 4, 60, dtype=torch.float64)
    rough = MatrixMult(torch.diag(d) + 0.1 * spd(randn(60, 60)) / 60)
    y = randn(60, seed=1)
    k = {"rtol": 1e-10, "maxiter": 3000}

    i = torch.arange(64)
    toeplitz = MatrixMult(torch.exp(-0.5 * ((i[:, None] - i) / 2.0) ** 2).double())
    low = randn(60, 8, seed=2)
    spiked = MatrixMult(100 * low @ low.mT + 0.01 * spd(randn(60, 60)) / 60)
    cases = [
        (rough, y, 0.0, JacobiPreconditioner(rough), 25, 8.0),
        (toeplitz, randn(64, seed=3), 0.01, CirculantPreconditioner(toeplitz, 0.01), 20, 2.0),
        (spiked, y, 0.1, NystromPreconditioner(spiked, 0.1, rank=12), 12, 2.5),
    ]
    for A, b, damp, P, most, gain in cases:
        assert dottest(P) < 1e-11
        plain = cg(A, b, damp=damp, **k)
        better = cg(A, b, damp=damp, preconditioner=P, **k)
        assert plain.status.ok and better.status is Status.CONVERGED
        assert better.iterations <= most
        assert plain.iterations >= gain * better.iterations, (type(P).__name__, plain.iterations, better.iterations)
        torch.testing.assert_close(plain.x, better.x, atol=1e-6, rtol=1e-6)
        for solver in (minres, gmres, bicgstab):
            s = solver(A, b, damp=damp, preconditioner=P, **k)
            assert s.status.ok
            assert s.iterations <= most
            residual = (A(s.x) + damp * s.x - b).norm() / b.norm()
            assert residual < 2e-9
        assert cg(A, b, damp=damp, preconditioner=P.__call__, **k).iterations == better.iterations


def test_circulant_preconditioner_of_a_blur():
    kernel = torch.outer(torch.hann_window(7, False), torch.hann_window(7, False)).double()
    A = Convolve2D((24, 20), kernel / kernel.sum(), offset=(3, 3))
    normal = A.H @ A
    y = randn(24, 20)
    P = CirculantPreconditioner(normal, 0.01)
    plain, better = cg(normal, y, damp=0.01, rtol=1e-8), cg(normal, y, damp=0.01, rtol=1e-8, preconditioner=P)
    assert better.iterations < plain.iterations / 2
    torch.testing.assert_close(plain.x, better.x, atol=1e-5, rtol=1e-5)


def test_jacobi_diagonals():
    m = randn(5, 5, dtype=torch.complex128)
    A = MatrixMult(m)
    given = JacobiPreconditioner(A, 0.5)
    torch.testing.assert_close(given.todense(), torch.diag(1 / (m.diagonal() + 0.5)))
    torch.testing.assert_close(JacobiPreconditioner(A @ Identity(5), 0.5).todense(), given.todense())
    product = MatrixMult(m.real).H @ MatrixMult(m.real)
    torch.testing.assert_close(JacobiPreconditioner(product).todense().diagonal(), 1 / (m.real.T @ m.real).diagonal())
    torch.testing.assert_close(
        JacobiPreconditioner(Diagonal(torch.tensor([2.0, -4.0, 0.0])), positive=True).todense().diagonal(),
        torch.tensor([0.5, 0.25, 1.0]),
    )
    big = FunctionOperator(lambda x: 3 * x, lambda x: 3 * x, 5000, 5000)
    with pytest.raises(ArgumentError, match=r"would cost 5000 applications; give diagonal=..., or probes=100"):
        JacobiPreconditioner(big)
    estimate = JacobiPreconditioner(big, probes=2)(torch.ones(5000, dtype=torch.float64))
    torch.testing.assert_close(estimate, torch.full((5000,), 1 / 3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=r"A must be square; .* for least squares give A.H @ A"):
        JacobiPreconditioner(MatrixMult(randn(3, 4)))
    with pytest.raises(ShapeError, match=r"diagonal must have shape \(5,\); got \(3,\)"):
        JacobiPreconditioner(A, diagonal=torch.ones(3))
    with pytest.raises(ShapeError, match=r"preconditioner must map \(5,\) to \(5,\)"):
        cg(A, randn(5), preconditioner=Identity(4))
    with pytest.raises(ArgumentError, match="preconditioner must be a LinearOperator close to the inverse"):
        cg(A, randn(5), preconditioner=3)
    with pytest.raises(ShapeError, match="expected a tensor of shape"):
        cg(MatrixMult(spd(m)), randn(5), preconditioner=lambda r: r[:3])


def test_preconditioners_have_the_inverse_that_they_claim():
    low = randn(12, 4, dtype=torch.complex128)
    matrix = low @ low.mH
    P = NystromPreconditioner(MatrixMult(matrix), 0.3, rank=5).todense()
    shifted = matrix + 0.3 * torch.eye(12)
    values = torch.linalg.eigvals(P @ shifted).real
    torch.testing.assert_close(values, torch.full((12,), 0.3, dtype=torch.float64), atol=1e-6, rtol=0)
    wheel = torch.fft.ifft(torch.fft.fft(torch.eye(6, dtype=torch.complex128)).mT * (2 + torch.arange(6.0))).mT
    inverse = CirculantPreconditioner(MatrixMult(wheel), positive=False).todense()
    torch.testing.assert_close(inverse, torch.linalg.inv(wheel))


# Breakdown ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_statuses_say_what_to_do(batched):
    def run(solver, matrix, y, **k):
        s = solver(MatrixMult(matrix), torch.stack([y, y]) if batched else y, **k)
        assert torch.isfinite(s.x).all()
        return s

    y = torch.tensor([0.1, 1, 0.1], dtype=torch.float64)
    signs = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    s = run(cg, signs, y)
    assert s.status is Status.BREAKDOWN
    assert "use cgls" in str(s.status)
    skew = randn(8, 8)
    skew = skew - skew.mT
    for solver, matrix in ((cg, skew + 3 * torch.eye(8, dtype=torch.float64)), (minres, skew)):
        for P in (None, JacobiPreconditioner(MatrixMult(torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))))):
            s = run(solver, matrix, randn(8, seed=1), preconditioner=P)
            assert s.status is Status.NOT_SELF_ADJOINT
            assert "use gmres, cgls or lsqr" in str(s.status)
    for solver in (cg, minres):
        s = run(solver, spd(randn(3, 3)), y, preconditioner=-1 * Identity(3))
        assert s.status is Status.BREAKDOWN
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    s = run(bicgstab, turn, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert s.status is Status.BREAKDOWN
    with pytest.raises(ConvergenceError, match="broke down"):
        run(bicgstab, turn, torch.tensor([1.0, 0.0], dtype=torch.float64), throw=True)


class Failing(LinearOperator):
    """A matrix whose third application gives nan."""

    def __init__(self, matrix):
        super().__init__(matrix.shape[1], matrix.shape[0])
        self.matrix, self.calls = matrix, 0

    def _spoilt(self, y):
        self.calls += 1
        return y * (math.nan if self.calls >= 4 else 1.0)

    def _forward(self, x):
        return self._spoilt(x @ self.matrix.T)

    def _adjoint(self, y):
        return self._spoilt(y @ self.matrix)

    def todense(self, *_, **__):
        return self.matrix


@pytest.mark.parametrize("batch", [(), (2,)])
@every
def test_nan_keeps_the_last_good_iterate(name, batch):
    case = CASES[name]
    m = case.make(case.matrix())
    given = {"sums": (m.sum(1), m.sum(0))} if case.run is sirt else {}
    if case.run is landweber:
        given["step"] = 0.01
    s = case.run(Failing(m), data(case, torch.float64, *batch), **case.options, **given)
    assert s.status is Status.DIVERGED
    assert "x is the last good iterate" in str(s.status)
    assert torch.isfinite(s.x).all()
    y = data(case, torch.float64, *batch)
    y[..., 1] = math.nan
    s = case.solve(case.matrix(), y)
    assert s.status is Status.NOT_FINITE
    assert "clean y and x0" in str(s.status)
    assert torch.isfinite(s.x).all()


# Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,)])
@dtypes
@every
def test_checkpoint_continues_bit_for_bit(name, dtype, batch, tmp_path):
    case = CASES[name]
    m = case.matrix(dtype) + 0.1
    y = data(case, dtype, *batch)
    k = {"atol": 0.0, "btol": 0.0} if case.run is lsqr else {"rtol": 0.0}
    straight = case.solve(m, y, **k, maxiter=10)
    path = tmp_path / "state.pt"
    first = case.solve(m, y, **k, maxiter=5, checkpoint=path, checkpoint_every=2)
    assert first.iterations <= 5
    second = case.solve(m, y, **k, maxiter=10, checkpoint=path)
    assert torch.equal(straight.x, second.x)
    assert straight.statuses == second.statuses
    for quantity, values in straight.history.items():
        assert torch.equal(values, second.history[quantity])


# Errors ------------------------------------------------------------------------------------------------------------


def test_bad_input():
    A, y = MatrixMult(spd(randn(4, 4))), randn(4)
    for solver in (cg, minres, gmres, bicgstab):
        with pytest.raises(ShapeError, match=f"{solver.__name__}: A must be square; .*; use cgls or lsqr"):
            solver(MatrixMult(randn(3, 4)), randn(3))
        with pytest.raises(ArgumentError, match=f"{solver.__name__}: unknown argument 'tol'; write rtol; besides"):
            solver(A, y, tol=1e-3)
    with pytest.raises(ArgumentError, match="gmres: restart must be an int >= 1; got 0"):
        gmres(A, y, restart=0)
    with pytest.raises(ArgumentError, match="lsmr: conlim must be a number >= 0; got -1"):
        lsmr(A, y, conlim=-1)
    with pytest.raises(ArgumentError, match="kaczmarz: order must be 'cyclic', 'symmetric' or 'random'; got 'down'"):
        kaczmarz(A, y, order="down")
    with pytest.raises(ArgumentError, match=r"relax must be a number in \(0, 2\); got 2"):
        kaczmarz(A, y, relax=2)
    with pytest.raises(ArgumentError, match="kaczmarz: block must be an int >= 1; got 0"):
        kaczmarz(A, y, block=0)
    with pytest.raises(ArgumentError, match=r"floor must be a number in \(0, 1\]"):
        CirculantPreconditioner(A, floor=0)
    with pytest.raises(ArgumentError, match="rank must be an int >= 1"):
        NystromPreconditioner(A, 0.1, rank=0)
    with pytest.raises(ArgumentError, match="damp must be one number >= 0; got -1"):
        JacobiPreconditioner(A, -1)
