"""TV and TGV: value and prox against smoothed minimisation, accuracy, derivatives, structure, the compiled loops."""

import pytest
import torch
from test_functionals import randn

from pullback.core.check import check
from pullback.core.errors import ArgumentError
from pullback.functionals import TGV, TV, SquaredL2, variation
from pullback.functionals.tgv import _SymmetrizedGradient


def test_tv_prox_gradcheck():
    f, x = TV((3, 3), maxiter=15, rtol=0), randn(2, 3, 3).requires_grad_()
    step = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f.prox, (x, step))
    flat = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)  # gradient zero everywhere: no nan
    TV((4, 4)).prox(flat, step[0]).sum().backward()
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("dims", [(12,), *(pytest.param(d, marks=pytest.mark.slow) for d in ((6, 7), (3, 4, 5)))])
def test_tv_value_and_prox_against_smoothed_minimisation(dims, isotropic):
    x, step = randn(*dims), 0.4
    f = TV(dims, isotropic, maxiter=20000, rtol=1e-6)
    steps = [torch.diff(x, dim=k, append=x.narrow(k, -1, 1)) for k in range(len(dims))]
    magnitude = torch.stack(steps).norm(dim=0) if isotropic else torch.stack(steps).abs().sum(0)
    torch.testing.assert_close(f(x), magnitude.sum())
    u = x.clone().requires_grad_()
    eps = 1e-5
    optimizer = torch.optim.LBFGS(
        [u], max_iter=1500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        g = f.operator(u)
        size = (g.square().sum(0) + eps**2).sqrt() if isotropic else (g.square() + eps**2).sqrt()
        loss = step * size.sum() + (u - x).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    # The smoothed minimum is at most step * eps * (number of terms) higher, so within sqrt(2 * that) of the exact one.
    assert (f.prox(x, step) - u.detach()).norm() < 1e-6 * x.norm() + (2 * step * eps * x.numel() * len(dims)) ** 0.5


@pytest.mark.slow
def test_tv_prox_error_is_below_rtol():
    x = randn(3, 8, 9)
    exact = TV((8, 9), maxiter=5000, rtol=1e-9).prox(x, 0.5)
    for rtol in (1e-1, 1e-2, 1e-3):
        u = TV((8, 9), maxiter=20000, rtol=rtol).prox(x, 0.5)
        assert ((u - exact).norm(dim=(1, 2)) <= rtol * x.norm(dim=(1, 2))).all()


def test_tv_structure():
    f = 0.3 * TV((4, 5))
    x = randn(2, 4, 5)
    assert f.operator.dimsd == (2, 4, 5)
    torch.testing.assert_close(f.outer(f.operator(x)), f(x))
    torch.testing.assert_close(TV((4, 5), sampling=2.0)(x), TV((4, 5))(x) / 2)
    shifted = TV((4, 5)).translate(x[0])
    torch.testing.assert_close(shifted.outer(shifted.operator(x)), shifted(x))


def without_loops(monkeypatch):
    monkeypatch.setattr(variation, "_has_numba", lambda: False)


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threads", [1, 3])
def test_loops_are_the_definition(isotropic, dtype, threads, monkeypatch):
    pytest.importorskip("numba")
    x = randn(2, 130, 131, dtype=dtype)
    steps = torch.tensor([0.1, 2.0])
    f = TV((130, 131), isotropic, sampling=(1.0, 0.5), maxiter=47, rtol=0)
    g = TV((130, 131), isotropic, maxiter=300, rtol=1e-2)
    torch.set_num_threads(threads)
    monkeypatch.setattr("pullback.functionals._fgp._MIN_WORK", 1)
    fast, stopped = f.prox(x, steps), g.prox(x, steps)
    torch.set_num_threads(1)
    without_loops(monkeypatch)
    # the order of additions differs; 47 iterations amplify that little
    torch.testing.assert_close(fast, f.prox(x, steps), atol=300 * torch.finfo(dtype).eps, rtol=0)
    torch.testing.assert_close(stopped, g.prox(x, steps), atol=300 * torch.finfo(dtype).eps, rtol=0)
    assert fast.dtype == dtype


@pytest.mark.parametrize("n", [256, 1000])
def test_tv_of_a_signal_is_exact(n):
    pytest.importorskip("numba")
    x = randn(4, n).cumsum(-1)
    x[3] = x[3].round()  # ties
    steps = torch.tensor([0.0, 0.3, 5.0, 1.0], dtype=torch.float64)
    f = TV(n, sampling=0.5, rtol=0)
    u = f.prox(x, steps)
    # optimality: the dual q with D^T q = x - u lies in [-1, 1] step / h, and equals the bound where u jumps
    q = -(x - u).cumsum(-1)
    bound = (2 * steps).unsqueeze(-1)
    torch.testing.assert_close(q[:, -1], torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (q.abs() <= bound + 1e-9).all()
    jump = u.diff()
    torch.testing.assert_close((q[:, :-1] * jump).sum(-1), (bound * jump.abs()).sum(-1), atol=1e-8, rtol=1e-12)
    assert f.prox(x.float(), steps).dtype == torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_a_dual_start_saves_iterations(fast, monkeypatch):
    if not fast:
        without_loops(monkeypatch)
    x = randn(2, 128, 130)
    step = torch.tensor([0.5, 1.0], dtype=torch.float64).reshape(2, 1, 1)
    exact = TV((128, 130), maxiter=1500, rtol=0)._prox(x, step, 2)
    f = 1.0 * TV((128, 130), maxiter=20, rtol=0).translate(torch.zeros(128, 130))
    u, dual, _ = f._prox_from(x, step, 2)
    for _ in range(10):
        before = dual.clone()
        v, new, _ = f._prox_from(x, step, 2, dual)
        assert torch.equal(dual, before)
        dual = new
    assert (v - exact).norm() < 0.25 * (u - exact).norm()
    pair = TV((128, 130), maxiter=20, rtol=0) + SquaredL2()
    torch.testing.assert_close(pair._prox_from(x, step, 2)[0], pair._prox(x, step, 2))


def test_large_images_are_differentiable_and_may_be_empty():
    f = TV((128, 130), maxiter=5, rtol=0)
    x = randn(128, 130).requires_grad_()
    f.prox(x, 0.1).square().sum().backward()
    h = 1e-6 * randn(128, 130, seed=1)
    change = f.prox((x + h).detach(), 0.1).square().sum() - f.prox((x - h).detach(), 0.1).square().sum()
    torch.testing.assert_close(change / 2, (x.grad * h).sum(), rtol=1e-5, atol=0)
    assert f.prox(torch.zeros(0, 128, 130), 0.1).shape == (0, 128, 130)
    assert torch.isnan(f.prox(torch.full((128, 130), torch.nan), 0.1)).all()


# Second order ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(5,), *(pytest.param(d, marks=pytest.mark.slow) for d in ((4, 5), (3, 4, 5)))])
def test_symmetrized_gradient(dims):
    assert check(_SymmetrizedGradient(dims, (1.0, 0.5, 2.0)[: len(dims)])).ok


@pytest.mark.parametrize("dims", [(12,), *(pytest.param(d, marks=pytest.mark.slow) for d in ((6, 7), (3, 4, 5)))])
def test_tgv_is_zero_for_ramps_and_at_most_tv(dims):
    f = TGV(dims, maxiter=2000, rtol=1e-4)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in dims), indexing="ij")
    ramp = sum((k + 2) * a for k, a in enumerate(axes))
    assert f(ramp) < 0.01
    assert f(torch.ones(dims)) == 0
    x = randn(2, *dims)
    assert (f(x) <= TV(dims)(x) * (1 + 1e-6)).all()
    torch.testing.assert_close(f(x + ramp), f(x), rtol=1e-2, atol=0)
    assert f.convex


def test_tgv_value_against_a_linear_program():
    linprog = pytest.importorskip("scipy.optimize").linprog
    n = 12
    x = randn(n)
    # min sum s + 2 sum t with |D x - w| <= s on n - 1 differences and |w[i] - w[i-1]| <= t
    m = n - 1
    eye, diff = torch.eye(m).double(), torch.diff(torch.eye(m).double(), dim=0)
    zero = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
    rows = torch.cat([
        torch.cat([-eye, -eye, zero(m, m - 1)], 1), torch.cat([eye, -eye, zero(m, m - 1)], 1),
        torch.cat([diff, zero(m - 1, m), -torch.eye(m - 1).double()], 1),
        torch.cat([-diff, zero(m - 1, m), -torch.eye(m - 1).double()], 1),
    ])  # fmt: skip
    right = torch.cat([-x.diff(), x.diff(), zero(2 * (m - 1))])
    cost = torch.cat([zero(m), zero(m) + 1, zero(m - 1) + 2])
    best = linprog(cost.numpy(), rows.numpy(), right.numpy(), bounds=[(None, None)] * m + [(0, None)] * (2 * m - 1)).fun
    value = TGV(n, maxiter=5000, rtol=1e-5)(x).item()
    assert best <= value <= best * (1 + 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(12,), pytest.param((6, 7), marks=pytest.mark.slow)])
def test_tgv_prox_is_the_minimum(dims):
    f, x = TGV(dims, maxiter=1500, rtol=1e-5), randn(2, *dims)
    steps = torch.tensor([0.2, 0.7], dtype=torch.float64)
    axes = tuple(range(1, len(dims) + 1))
    objective = lambda u: f(u) + (u - x).square().sum(axes) / (2 * steps)  # noqa: E731
    u = f.prox(x, steps)
    best = objective(u)
    for seed in range(2):
        for size in (0.1, 0.5):
            d = size * randn(2, *dims, seed=seed)
            assert (objective(u + d) - best >= d.square().sum(axes) / (2 * steps) - 1e-3).all()
    torch.testing.assert_close(f.prox(x[0], 0.2), u[0], atol=1e-4, rtol=0)


def test_tgv_gradcheck_and_errors():
    f, x = TGV((3, 4), maxiter=12, rtol=0), randn(2, 3, 4).requires_grad_()
    step = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f.prox, (x, step), fast_mode=True)
    assert f.prox(x.float(), 0.1).dtype == torch.float32
    with pytest.raises(ArgumentError, match=r"at least 3 samples on each axis; got \(2, 5\)"):
        TGV((2, 5))
    with pytest.raises(ArgumentError, match="alpha must be two numbers > 0"):
        TGV((4, 5), (1.0, 0.0))
    with pytest.raises(ArgumentError, match="maxiter must be at least 1"):
        TGV((4, 5), maxiter=0)
    with pytest.raises(ArgumentError, match="rtol must be >= 0"):
        TGV((4, 5), rtol=-1)
