"""Non-linear solvers: SciPy, batches, stopping, complex numbers, derivatives, resuming, errors."""

import numpy as np
import pytest
import torch
from scipy import optimize
from torch.autograd import gradcheck, gradgradcheck

from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.operator import Operator
from pullback.functionals import L1, Huber, KullbackLeibler, SquaredL2
from pullback.linops import Diagonal, Gradient, MatrixMult
from pullback.solvers import (
    ConvergenceError,
    Status,
    cgls,
    gauss_newton,
    lbfgs,
    levenberg_marquardt,
    minimize,
    nonlinear_cg,
)
from pullback.solvers.nonlinear_cg import VARIANTS

D = torch.float64
TIMES = torch.linspace(0, 3, 12, dtype=D)
TRUTH = torch.tensor([2.0, 0.7], dtype=D)
START = torch.tensor([1.0, 0.3], dtype=D)
SOLVERS = {"gauss_newton": gauss_newton, "levenberg_marquardt": levenberg_marquardt, "lbfgs": lbfgs,
           "nonlinear_cg": nonlinear_cg}  # fmt: skip
every = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
squares = pytest.mark.parametrize("solver", [gauss_newton, levenberg_marquardt])


def randn(*shape, dtype=D, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Decay(Operator):
    """x -> x_0 exp(-x_1 t)."""

    def __init__(self, times):
        super().__init__(2, len(times))
        self.times = times

    def _forward(self, x):
        return x[..., :1] * torch.exp(-x[..., 1:] * self.times.to(x.dtype))


class Intensity(Operator):
    """x -> |A x|^2."""

    def __init__(self, matrix):
        super().__init__(matrix.shape[1], matrix.shape[0])
        self.matrix = matrix

    def _forward(self, x):
        z = x @ self.matrix.T
        return (z.conj() * z).real


class OwnDerivative(Operator):
    """x -> x^2 in NumPy, with its own derivative."""

    def __init__(self, n):
        super().__init__(n, n)

    def _forward(self, x):
        return torch.from_numpy(x.detach().numpy() ** 2)

    def linearize(self, x):
        return Diagonal(2 * x)


def decay_data(*batch, seed=0):
    return Decay(TIMES)(TRUTH) + 0.05 * randn(*batch, len(TIMES), seed=seed)


def rosenbrock(x, a=100.0):
    return (a * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


# Minima ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lbfgs", *VARIANTS])
def test_rosenbrock(method):
    calls = [0]

    def f(x):
        calls[0] += 1
        return rosenbrock(x)

    x0 = torch.full((10,), -1.2, dtype=D)
    if method == "lbfgs":
        s = minimize(f, x0, rtol=1e-9)
    else:
        s = minimize(f, x0, method="nonlinear_cg", variant=method, rtol=1e-9, maxiter=1000)
    assert s.status is Status.CONVERGED
    torch.testing.assert_close(s.x, torch.ones(10, dtype=D), atol=1e-5, rtol=0)
    theirs = optimize.minimize(
        optimize.rosen, x0.numpy(), jac=optimize.rosen_der, method="L-BFGS-B" if method == "lbfgs" else "CG",
        options={"gtol": 1e-7},
    )  # fmt: skip
    assert calls[0] <= 1.3 * theirs.nfev + 20
    assert (s.history["objective"].diff() <= 0).all()
    assert s.history["gradient"].shape == (s.iterations + 1,)


@every
def test_exponential_fit_is_scipys(solver):
    y = decay_data()
    theirs = optimize.least_squares(
        lambda x: (Decay(TIMES)(torch.from_numpy(x)) - y).numpy(), START.numpy(), xtol=1e-15, ftol=1e-15, gtol=1e-13
    )
    for F in (Decay(TIMES), Decay(TIMES)._forward):
        s = solver(F, y, x0=START, rtol=1e-9)
        assert s.status is Status.CONVERGED
        np.testing.assert_allclose(s.x.numpy(), theirs.x, atol=1e-6)
    n = solver(Decay(TIMES), y.numpy(), x0=START.numpy(), rtol=1e-9)
    assert isinstance(n.x, np.ndarray)
    np.testing.assert_array_equal(n.x, solver(Decay(TIMES), y, x0=START, rtol=1e-9).x.numpy())
    assert solver(Decay(TIMES), y.float(), x0=START.float(), rtol=1e-3).x.dtype == torch.float32


@squares
def test_linear_problems_and_damping(solver):
    matrix, y = randn(9, 5), randn(2, 9, seed=1)
    s = solver(MatrixMult(matrix), y, rtol=1e-10)
    torch.testing.assert_close(s.x, (torch.linalg.pinv(matrix) @ y.T).T)
    x0, damp = randn(5, seed=3), torch.tensor([0.3, 2.0], dtype=D)
    s = solver(MatrixMult(matrix), y, x0=x0, damp=damp, rtol=1e-10)
    shifted = cgls(MatrixMult(matrix), y - matrix @ x0, damp=damp, rtol=1e-13).x + x0
    torch.testing.assert_close(s.x, shifted, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("solver", [lbfgs, nonlinear_cg])
def test_composite_objectives(solver):
    matrix, y = randn(9, 5), randn(2, 9, seed=1)
    A = MatrixMult(matrix)
    s = solver(A, y, 0.49 * SquaredL2(), rtol=1e-11)
    torch.testing.assert_close(s.x, cgls(A, y, damp=0.7, rtol=1e-13).x, atol=1e-8, rtol=1e-8)
    f = 0.2 * SquaredL2() + 0.5 * (Huber(0.1) @ Gradient(5))
    s = solver(A, y[0], f, data_term=Huber(0.3), rtol=1e-10)
    x = s.x.clone().requires_grad_()
    value = Huber(0.3)(A(x) - y[0]) + f(x)
    (g,) = torch.autograd.grad(value, x)
    assert g.abs().max() < 1e-8
    torch.testing.assert_close(s.history["objective"][-1], value.detach())
    counts = torch.poisson(20 * torch.ones(9, dtype=D))
    s = solver(MatrixMult(matrix.abs()), counts, data_term=KullbackLeibler(), x0=torch.ones(5, dtype=D), rtol=1e-9)
    pull = matrix.abs().T @ (1 - counts / (matrix.abs() @ s.x))  # beyond the barrier the objective is infinite
    assert pull.abs().max() < 1e-6


@every
def test_phase_retrieval(solver):
    matrix = randn(40, 6, dtype=torch.complex128)
    truth = randn(6, dtype=torch.complex128, seed=1)
    y = Intensity(matrix)(truth)
    s = solver(Intensity(matrix), y, x0=truth + 0.3 * randn(6, dtype=torch.complex128, seed=2), rtol=1e-9)
    assert s.status.ok
    phase = torch.vdot(truth, s.x)
    torch.testing.assert_close(s.x, truth * phase / phase.abs(), atol=1e-6, rtol=0)


@squares
def test_linearize_of_the_operator_is_used(solver):
    y = torch.tensor([[4.0, 9.0], [1.0, 16.0]], dtype=D)
    for rows in (y, y[0]):
        s = solver(OwnDerivative(2), rows, x0=torch.ones(2, dtype=D), rtol=1e-10)
        torch.testing.assert_close(s.x, rows.sqrt())
    inner = OwnDerivative(2) @ MatrixMult(torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=D))
    torch.testing.assert_close(inner(solver(inner, y[0], x0=torch.ones(2, dtype=D), rtol=1e-10).x), y[0])


# Batches and stopping ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("linear", [False, True])
def test_batch_is_loop_and_members_stop_by_themselves(solver, linear):
    y = torch.stack([Decay(TIMES)(START), *decay_data(3), Decay(TIMES)(TRUTH)]).reshape(5, 1, -1)
    F, x0 = Decay(TIMES), START
    if linear:
        F, x0 = MatrixMult(randn(len(TIMES), 2)), torch.zeros(2, dtype=D)
    s = solver(F, y, x0=x0, rtol=1e-7)
    assert s.x.shape == (5, 1, 2)
    for i in range(5):
        one = solver(F, y[i, 0], x0=x0, rtol=1e-7)
        torch.testing.assert_close(s.x[i, 0], one.x, atol=1e-9, rtol=1e-9)
        assert s.statuses[i] is one.status
        assert s.member_iterations[i, 0] == one.iterations
        for name, values in one.history.items():
            torch.testing.assert_close(s.history[name][: one.iterations + 1, i, 0], values, atol=1e-9, rtol=1e-6)
    if not linear:
        assert s.iterations > s.member_iterations.min() == 0


def test_batch_of_functions():
    X = randn(3, 2, 6)
    for method in ("lbfgs", "nonlinear_cg"):
        s = minimize(rosenbrock, X, dims=6, method=method, rtol=1e-8, maxiter=500)
        for i in range(3):
            for j in range(2):
                one = minimize(rosenbrock, X[i, j], method=method, rtol=1e-8, maxiter=500)
                torch.testing.assert_close(s.x[i, j], one.x, atol=1e-6, rtol=0)
        assert s.status is Status.CONVERGED
    assert minimize(Huber(0.1, dims=6), X).x.abs().max() < 1e-6
    np.testing.assert_allclose(minimize(lambda x: (x**2).sum(), np.ones(3)).x, 0)


@every
def test_callback_maxiter_and_warm_start(solver):
    y = decay_data()
    seen = []
    s = solver(Decay(TIMES), y, x0=START, callback=lambda state: seen.append(state.x.clone()) or len(seen) == 3)
    assert s.status is Status.CALLBACK
    assert torch.equal(s.x, seen[-1])
    with pytest.raises(ConvergenceError, match="increase maxiter, or loosen rtol"):
        solver(Decay(TIMES), y, x0=START, maxiter=1, throw=True)
    best = solver(Decay(TIMES), y, x0=START, rtol=1e-11)
    again = solver(Decay(TIMES), y, x0=best.x)
    assert again.status.ok
    assert again.iterations < 25
    torch.testing.assert_close(again.x, best.x, atol=1e-6, rtol=0)
    tight = solver(Decay(TIMES), y, x0=START, rtol=0.0, maxiter=2000)
    assert tight.status is Status.PRECISION
    torch.testing.assert_close(tight.x, best.x, atol=1e-7, rtol=0)


def test_divergence_and_nan():
    s = minimize(lambda x: -x.sum(), torch.ones(2, dtype=D))
    assert s.status is Status.DIVERGED
    assert torch.equal(s.x, torch.ones(2, dtype=D))
    y = decay_data(2)
    y[0, 3] = torch.nan
    for solver in SOLVERS.values():
        s = solver(Decay(TIMES), y, x0=START, rtol=1e-5)
        assert s.statuses == (Status.NOT_FINITE, Status.CONVERGED)
        assert "clean y and x0" in str(s.status)
    s = minimize(lambda x: x.log().sum(-1), torch.tensor([[1.0, -1.0], [1.0, 2.0]], dtype=D), dims=2, maxiter=1)
    assert s.statuses[0] is Status.NOT_FINITE
    s = minimize(lambda x: x.abs().sum(), torch.tensor([1.0, -0.3], dtype=D))  # not smooth at its minimum
    assert not s.status.ok
    assert s.x.abs().max() < 1e-2


@every
def test_resume_is_bit_for_bit(solver, tmp_path):
    y = decay_data(2)
    for name, data in (("batch", y), ("single", y[0])):
        path = tmp_path / f"{name}.pt"
        whole = solver(Decay(TIMES), data, x0=START, rtol=1e-11)
        solver(Decay(TIMES), data, x0=START, rtol=1e-11, maxiter=4, checkpoint=path, checkpoint_every=2)
        resumed = solver(Decay(TIMES), data, x0=START, rtol=1e-11, checkpoint=path)
        assert torch.equal(resumed.x, whole.x)
        assert resumed.iterations == whole.iterations
        for quantity, values in whole.history.items():
            assert torch.equal(resumed.history[quantity], values)


# Derivatives -------------------------------------------------------------------------------------------------------


def check(f, *inputs, twice=True):
    inputs = tuple(v.clone().requires_grad_() for v in inputs)
    assert gradcheck(f, inputs)
    assert gradcheck(f, inputs, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)
    if twice:
        assert gradgradcheck(f, inputs)


@every
@pytest.mark.slow
def test_derivatives_in_data_and_operator(solver):
    times = TIMES[::3]
    y = Decay(times)(TRUTH) + 0.02 * randn(4)
    check(lambda y, t: solver(Decay(t), y, x0=START, rtol=1e-12).x, y, times)
    check(lambda y: solver(Decay(times), y, x0=START, rtol=1e-12).x, torch.stack([y, 1.1 * y]), twice=False)


def test_derivatives_quick():
    y = Decay(TIMES[::3])(TRUTH) + 0.02 * randn(4)
    damp = torch.tensor(0.3, dtype=D)
    check(lambda y, d, x0: gauss_newton(Decay(TIMES[::3]), y, x0=x0, damp=d, rtol=1e-12).x, y, damp, START)


@pytest.mark.slow
def test_derivatives_in_weights_and_matrices():
    def f(y, matrix, weight):
        g = weight * SquaredL2() + 0.1 * (Huber(0.05) @ Gradient(3))
        return lbfgs(MatrixMult(matrix), y, g, data_term=Huber(0.3), rtol=1e-12).x

    check(f, randn(5), randn(5, 3, seed=1), torch.tensor(0.3, dtype=D))
    C = randn(4, 2, dtype=torch.complex128)
    data = C @ (0.3 * randn(2, dtype=torch.complex128, seed=1))
    zero = torch.zeros(2, dtype=torch.complex128)
    check(lambda y: gauss_newton(lambda x: C @ x + 0.1 * (C @ x) ** 2, y, x0=zero, rtol=1e-12).x, data)


@pytest.mark.parametrize("method", ["lbfgs", "nonlinear_cg"])
def test_derivatives_of_minimisers(method):
    def loss(x, w, b):
        return torch.logsumexp(w @ x, -1) + ((x - b) ** 2).sum(-1)

    w, b = randn(4, 3), randn(3, seed=1)
    x0 = torch.zeros(3, dtype=D)
    check(lambda w, b: minimize(loss, x0, parameters=(w, b), method=method, rtol=1e-12).x, w, b)


@every
def test_implicit_is_unrolled(solver):
    y = decay_data(2)[:, ::3]
    times, y = TIMES[::3].clone().requires_grad_(), y.requires_grad_()
    options = {"x0": START, "rtol": 1e-12}
    found = []
    for unroll in (False, True):
        s = solver(Decay(times), y, unroll=unroll, **options)
        assert s.status.ok
        found.append(torch.autograd.grad((s.x * torch.tensor([1.0, -2.0])).sum(), (y, times)))
        assert bool(s.adjoint) is not unroll
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)
    y, v = y.detach(), randn(*y.shape, seed=3)
    found = [torch.func.jvp(lambda y: solver(Decay(TIMES[::3]), y, unroll=u, **options).x, (y,), (v,))[1]  # noqa: B023
             for u in (False, True)]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)
    each = torch.func.vmap(lambda y: solver(Decay(TIMES[::3]), y, **options).x)(y)
    torch.testing.assert_close(each, solver(Decay(TIMES[::3]), y, **options).x)


def test_modules_and_unrolled_closures():
    b = randn(3).requires_grad_()
    x0 = torch.zeros(3, dtype=D)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.center = torch.nn.Parameter(b.detach().clone())

        def forward(self, x):
            return ((x - self.center) ** 4 + x**2).sum()

    module = Loss()
    (expected,) = torch.autograd.grad(minimize(module, x0, rtol=1e-12).x.sum(), module.center)
    hidden = lambda x: ((x - b) ** 4 + x**2).sum()  # noqa: E731
    (unrolled,) = torch.autograd.grad(minimize(hidden, x0, rtol=1e-12, unroll=True).x.sum(), b)
    torch.testing.assert_close(expected, unrolled, atol=1e-6, rtol=1e-6)
    with pytest.raises(NotDifferentiableError, match=r"pass the tensor with parameters=\(...\)"):
        minimize(hidden, x0)
    with torch.no_grad():
        assert minimize(hidden, x0).status.ok
    times = TIMES.clone().requires_grad_()
    for solver in SOLVERS.values():
        with pytest.raises(NotDifferentiableError, match="assign it as an attribute of the operator"):
            solver(lambda x: x[0] * torch.exp(-x[1] * times), decay_data(), x0=START)
    with pytest.raises(NotDifferentiableError, match="would be lost"):
        minimize(lambda x, c: hidden(x) + (c * x).sum(), x0, parameters=(torch.ones(3, dtype=D).requires_grad_(),))


def test_a_saddle_has_no_derivative():
    b = torch.ones(2, dtype=D, requires_grad=True)
    with pytest.raises(ConvergenceError, match="Hessian of the objective at x is not positive definite"):
        minimize(
            lambda x, b: x[0] ** 2 - x[1] ** 2 + (b * x * x).sum() * 0.1, torch.zeros(2, dtype=D), parameters=(b,)
        ).x.sum().backward()


# Errors ------------------------------------------------------------------------------------------------------------


def test_bad_input():
    F, y = Decay(TIMES), decay_data()
    for solver in SOLVERS.values():
        with pytest.raises(ArgumentError, match="x0 must be given where A is not linear"):
            solver(F, y)
        with pytest.raises(ShapeError, match=r"y must have shape \(..., 12\)"):
            solver(F, y[:5], x0=START)
        with pytest.raises(ShapeError, match="x0 must have shape"):
            solver(F, y, x0=y)
        with pytest.raises(ArgumentError, match=r"A must be a pullback\.Operator, or a function of x; got Tensor"):
            solver(torch.ones(3, 3), y, x0=START)
        with pytest.raises(ShapeError, match=r"A\(x\) must have shape \(12,\), that of y; got \(2,\)"):
            solver(lambda x: x, y, x0=START)
        with pytest.raises(DtypeError, match="y must be real, as A's output is"):
            solver(F, y + 0j, x0=START)
        with pytest.raises(ArgumentError, match="unknown argument 'steps'"):
            solver(F, y, x0=START, steps=3)
    with pytest.raises(ArgumentError, match="inner_maxiter must be an int >= 1; got 0"):
        gauss_newton(F, y, x0=START, inner_maxiter=0)
    with pytest.raises(ArgumentError, match="damp must be a finite number >= 0; got -1"):
        levenberg_marquardt(F, y, x0=START, damp=-1)
    with pytest.raises(ArgumentError, match="memory must be an int >= 1; got 0"):
        lbfgs(F, y, x0=START, memory=0)
    with pytest.raises(ArgumentError, match="variant must be one of hager-zhang, polak-ribiere"):
        nonlinear_cg(F, y, x0=START, variant="newton")
    with pytest.raises(NotDifferentiableError, match="not smooth, so it has no gradient; use its prox, as fista does"):
        lbfgs(MatrixMult(randn(3, 2)), randn(3), L1())
    with pytest.raises(NotDifferentiableError, match="not smooth"):
        minimize(L1(), START)
    with pytest.raises(ArgumentError, match="regularizer must be a functional such as"):
        lbfgs(F, y, 0.1, x0=START)
    with pytest.raises(ArgumentError, match="method must be one of lbfgs, nonlinear_cg; got 'newton'"):
        minimize(rosenbrock, START, method="newton")
    with pytest.raises(ShapeError, match=r"one number for each member of x, shape \(\); got \(2,\)"):
        minimize(lambda x: x, START)
    with pytest.raises(DtypeError, match="must be real"):
        minimize(lambda x: (x + 1j).sum(), START)
    with pytest.raises(ShapeError, match="at least one axis"):
        minimize(lambda x: x, torch.tensor(1.0))
    with pytest.raises(ArgumentError, match="parameters must be a sequence of tensors"):
        minimize(lambda x, c: c * x.sum(), START, parameters=(2.0,))
