"""Plug and play and RED: proxes as denoisers, fixed points, gradients of everything, batches, errors."""

import re

import pytest
import torch

from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.functionals import L1, Huber, SquaredL2
from pullback.linops import Identity, MatrixMult
from pullback.solvers import Status, fista, plug_and_play, red

METHODS = ("pgd", "fista", "admm", "hqs")
EXACT = {"maxiter": 4000, "rtol": 1e-12}


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Net(torch.nn.Module):
    """x -> x - sigma / 4 tanh(conv x) - x / 4: near the identity, so that all methods contract."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.conv.weight.copy_(randn(1, 1, 3, 3, seed=5) / 5)
            self.conv.bias.fill_(0.1)

    def forward(self, x, sigma=1.0):
        return 0.75 * x - 0.25 * sigma * torch.tanh(self.conv(x))


def problem(dtype=torch.float64, batch=(3,)):
    matrix = randn(20, 16, dtype=dtype) / 4
    return matrix, MatrixMult(matrix) @ Identity(16, (1, 4, 4)), randn(*batch, 20, dtype=dtype, seed=2)


def shrink(x):
    return L1().prox(x, 0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("method", ["pgd", "fista", "admm"])
def test_a_prox_gives_the_convex_minimum(method, dtype):
    matrix, A, y = problem(dtype)
    step = 0.5 / float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    s = plug_and_play(A, y, shrink, method=method, step=step, **EXACT)
    assert s.status is Status.CONVERGED
    best = fista(A, y, (0.05 / step) * L1(), maxiter=20000, rtol=1e-11).x
    torch.testing.assert_close(s.x, best, atol=1e-7, rtol=0)
    torch.testing.assert_close(s.history["residual"][-1], (A(s.x) - y).norm(dim=-1))


def test_a_linear_denoiser_gives_a_linear_system():
    matrix, A, y = problem()
    half = lambda x: x / 2  # noqa: E731
    normal = matrix.T @ matrix
    for weight in (0.3, torch.tensor([0.1, 0.4, 2.0], dtype=torch.float64)):
        rows = torch.as_tensor(weight, dtype=torch.float64).expand(3)
        ridge = torch.stack([torch.linalg.solve(normal + w / 2 * torch.eye(16).double(), matrix.T @ v)
                             for w, v in zip(rows, y, strict=True)])  # fmt: skip
        for method in ("gradient", "fixed_point"):
            s = red(A, y, half, weight=weight, method=method, **EXACT)
            torch.testing.assert_close(s.x.flatten(1), ridge, atol=1e-8, rtol=0)
    s = plug_and_play(A, y, half, method="hqs", step=1 / 0.3, **EXACT)
    torch.testing.assert_close(s.x, red(A, y, half, weight=0.3, **EXACT).x, atol=1e-8, rtol=0)
    robust = plug_and_play(A, y, half, data_term=Huber(0.1), **EXACT)
    assert (robust.x - plug_and_play(A, y, half, **EXACT).x).abs().max() > 1e-2
    same = plug_and_play(A, y, half, data_term=SquaredL2(), **EXACT)
    torch.testing.assert_close(same.x, plug_and_play(A, y, half, **EXACT).x)


CASES = [("plug_and_play", m) for m in METHODS] + [("red", "gradient"), ("red", "fixed_point")]
cases = pytest.mark.parametrize(("name", "method"), CASES, ids=[f"{a} {b}" for a, b in CASES])


@cases
def test_gradients_are_those_of_the_unrolled_iteration(name, method):
    _, A, y = problem()
    net, sigma = Net(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    y.requires_grad_()
    inputs = [y, sigma, strength, *net.parameters()]
    function = {"plug_and_play": plug_and_play, "red": red}[name]
    k = {"method": method, "sigma": sigma, ("weight" if name == "red" else "step"): strength / 2} | EXACT
    s = function(A, y, net, **k)
    assert s.status is Status.CONVERGED
    implicit = torch.autograd.grad((s.x * randn(1, 4, 4, seed=7)).sum(), inputs, retain_graph=True)
    k["maxiter"] = s.iterations
    unrolled = torch.autograd.grad((function(A, y, net, unroll=True, **k).x * randn(1, 4, 4, seed=7)).sum(), inputs)
    for a, b in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert s.adjoint[-1].method == "gmres"


class Leaky(torch.nn.Module):
    """A denoiser whose weight was computed, so that it is no leaf."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return 0.8 * torch.tanh(x @ self.weight)


@cases
def test_computed_parameters_and_second_derivatives(name, method):
    _, A, y = problem(batch=(2,))
    function = {"plug_and_play": plug_and_play, "red": red}[name]

    def x(theta, y):
        return function(A, y, Leaky((theta * randn(4, 4, seed=3) / 8).cos() / 6), method=method, **EXACT).x

    inputs = (torch.tensor(0.7, dtype=torch.float64, requires_grad=True), y.requires_grad_())
    assert torch.autograd.gradcheck(x, inputs, fast_mode=True)
    if method in ("pgd", "fixed_point"):
        assert torch.autograd.gradgradcheck(x, inputs, fast_mode=True)
        theta = inputs[0].detach()
        _, tangent = torch.func.jvp(lambda t: x(t, y.detach()), (theta,), (torch.ones_like(theta),))
        slope = (x(theta + 1e-6, y.detach()) - x(theta - 1e-6, y.detach())) / 2e-6
        torch.testing.assert_close(tangent, slope, atol=1e-6, rtol=1e-5)


def test_jacobian_through_a_network_that_wants_four_axes():
    _, A, y = problem(batch=(2,))
    net = Net().requires_grad_(False)
    J = torch.func.jacrev(lambda y: plug_and_play(A, y, net, **EXACT).x)(y)
    v = randn(2, 20, seed=6)
    slope = (plug_and_play(A, y + 1e-6 * v, net, **EXACT).x - plug_and_play(A, y - 1e-6 * v, net, **EXACT).x) / 2e-6
    torch.testing.assert_close(torch.einsum("bcijmn,mn->bcij", J, v), slope, atol=1e-5, rtol=1e-5)


@cases
def test_batch_is_loop_and_resumes(name, method, tmp_path):
    _, A, y = problem()
    y[1] *= 10
    function = {"plug_and_play": plug_and_play, "red": red}[name]
    net = Net().requires_grad_(False)
    s = function(A, y, net, method=method, maxiter=200, rtol=1e-3)
    for i in range(3):
        one = function(A, y[i], net, method=method, maxiter=200, rtol=1e-3)
        torch.testing.assert_close(s.x[i], one.x, atol=1e-10, rtol=1e-10)
        assert s.member_iterations[i] == one.iterations
    path = tmp_path / "state"
    whole = function(A, y, net, method=method, maxiter=9, rtol=0.0)
    function(A, y, net, method=method, maxiter=4, rtol=0.0, checkpoint=path)
    assert torch.equal(function(A, y, net, method=method, maxiter=9, rtol=0.0, checkpoint=path).x, whole.x)
    warm = function(A, y, net, method=method, x0=function(A, y, net, method=method, **EXACT).x, rtol=1e-6)
    assert warm.iterations <= 2


def test_divergence_keeps_a_good_iterate():
    _, A, y = problem()
    s = plug_and_play(A, y, lambda x: x, step=30.0, maxiter=2000)
    assert s.status is Status.DIVERGED
    assert torch.isfinite(s.x).all()
    assert red(A, y, lambda x: -100 * x, step=1.0, maxiter=2000).status is Status.DIVERGED


def test_bad_input():
    _, A, y = problem()
    loose = torch.ones((), dtype=torch.float64, requires_grad=True)
    wanting = y.clone().requires_grad_()
    errors = [
        (ArgumentError, lambda: plug_and_play(A, y, 3), "denoiser must be a torch.nn.Module or a function that maps x"),
        (ArgumentError, lambda: plug_and_play(A, y, L1()), "got L1; use pullback.fista for a functional"),
        (ArgumentError, lambda: plug_and_play(A, y, shrink, method="x"), "must be 'pgd', 'fista', 'admm' or 'hqs'"),
        (ArgumentError, lambda: red(A, y, shrink, method="x"), "red: method must be 'gradient' or 'fixed_point'"),
        (ArgumentError, lambda: red(A, y, shrink, weight=0), "red: weight must be a finite number > 0; got 0"),
        (ArgumentError, lambda: plug_and_play(A, y, shrink, method="admm", data_term=Huber()), "solves its normal"),
        (ArgumentError, lambda: plug_and_play(A, y, shrink, step=-1), "step must be a finite number > 0; got -1"),
        (ArgumentError, lambda: plug_and_play(A, y, shrink, data_term=L1()), "no Lipschitz gradient"),
        (ShapeError, lambda: plug_and_play(A, y, lambda x: x[..., :2]), "give A dims with the channel axis"),
        (NotDifferentiableError, lambda: plug_and_play(A, wanting, lambda x: loose * x / 2), "would be lost"),
    ]  # fmt: skip
    for kind, call, text in errors:
        with pytest.raises(kind, match=re.escape(text)):
            call()
    with pytest.raises(DtypeError, match="y must be floating point"):
        plug_and_play(A, y.long(), shrink)
