"""A kernel operator with a tolerance is a linear operator: by the conformance kit, and beside exact operators."""

import sys

import pytest
import torch

import pullback as pb
from pullback.core.check import CheckError
from pullback.kernels import fast
from pullback.kernels.operator import KernelOperator

TOLERANCE = 1e-6
choose = sys.modules["pullback.kernels.fast.choose"]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fast sums also where the exact ones are cheaper."""
    torch.manual_seed(0)
    fast.clear()
    monkeypatch.setattr(choose, "FEW", 0.0)


def distance(x, y):
    return ((pb.Vi(x) - pb.Vj(y)) ** 2).sum(-1)


KERNELS = {
    "gaussian": lambda x, y, s: (-distance(x, y) * pb.Pm(s)).exp(),
    "laplacian": lambda x, y, s: (-distance(x, y).sqrt() * pb.Pm(s)).exp(),
    "matern": lambda x, y, s: (distance(x, y).sqrt() * pb.Pm(s)).matern52(),
    "squares multiplied out": lambda x, y, s: (
        -(pb.Vi(x).sqnorm2() + pb.Vj(y).sqnorm2() - 2 * (pb.Vi(x) | pb.Vj(y))) * pb.Pm(s)
    ).exp(),
}
METHODS = {"gaussian": "fourier", "laplacian": "tree", "matern": "tree", "squares multiplied out": "fourier"}


def only(monkeypatch, method):
    """Make one method the cheapest; trees have far cells also for few points."""
    seconds = 0.0 if method == "tree" else 1e9
    monkeypatch.setattr(choose, "estimate", lambda *_: (seconds, seconds))
    monkeypatch.setattr(choose, "leaf_for", lambda *_: 17)


def kernel(name, m, n, d, scale, dtype=torch.float64):
    x, y = (torch.rand(k, d, dtype=dtype) for k in (m, n))
    s = torch.tensor([scale], dtype=dtype, requires_grad=True)
    return KERNELS[name](x, y, s)


# The kit -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "m", "n", "d"), [("gaussian", 16, 14, 2), ("matern", 20, 18, 1)])
def test_the_kit_passes_within_the_tolerance(name, m, n, d, monkeypatch):
    only(monkeypatch, METHODS[name])
    if METHODS[name] == "tree":  # a tree for each of a thousand moved points; derivatives in points are tested below
        monkeypatch.delitem(sys.modules["pullback.core.check"]._TESTS, "gradients of held tensors")
    A = kernel(name, m, n, d, 2.0).with_tolerance(TOLERANCE).operator()
    with fast.watch() as done:
        report = pb.check(A, rtol=10 * TOLERANCE)
    assert report.ok, str(report)
    assert sum(info.method == METHODS[name] for info in done) > len(done) / 2
    assert max(info.error for info in done if info.method != "exact") > 1e-9  # so there was something to tolerate


class WrongAdjoint(KernelOperator):
    def _adjoint(self, y):
        return super()._adjoint(y) * (1 + 50 * TOLERANCE)


class WrongGradient(KernelOperator):
    def _forward(self, x):
        return super()._forward(x) * (1 + 0.3 * (self.x2 - self.x2.detach()).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "guards"),
    [(WrongAdjoint, {"dot test", "backward equals adjoint"}), (WrongGradient, {"gradients of held tensors"})],
)
def test_the_kit_still_sees_what_is_wrong(mutant, guards, monkeypatch):
    only(monkeypatch, "fourier")
    A = mutant(kernel("gaussian", 14, 12, 2, 2.0).with_tolerance(TOLERANCE))
    assert guards <= set(pb.check(A, rtol=10 * TOLERANCE, compile=False).failures)


def test_an_exact_check_of_a_tolerance_fails(monkeypatch):
    only(monkeypatch, "fourier")
    A = kernel("gaussian", 60, 50, 2, 2.0).with_tolerance(1e-3).operator()
    assert pb.dottest(A, rtol=1e-2) < 1e-3
    with pytest.raises(CheckError, match="dot test of KernelOperator"):
        pb.dottest(A)


def test_the_tolerance_stands_in_the_text():
    K = kernel("gaussian", 5, 4, 2, 1.0)
    assert "tolerance=1e-06" in repr(K.with_tolerance(1e-6).operator())
    assert "tolerance" not in repr(K.operator())


# Large operators beside exact ones -----------------------------------------------------------------------------------

M, N = 3000, 2500


def operators(name, d=2, scale=20.0, dtype=torch.float64, tolerance=TOLERANCE):
    K = kernel(name, M, N, d, scale, dtype)
    return K.with_tolerance(tolerance).operator(), K.operator()


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("name", ["gaussian", "laplacian", "squares multiplied out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_products_keep_the_tolerance(name, dtype, monkeypatch):
    A, exact = operators(name)
    x, y = torch.randn(3, N, dtype=dtype), torch.randn(2, 1, M, dtype=dtype)
    with fast.watch() as done:
        ax, aty = A(x), A.H(y)
    assert [info.method for info in done] == [METHODS[name]] * 2
    assert ax.dtype == dtype and ax.shape == (3, M) and aty.shape == (2, 1, N)
    assert relative(ax, exact(x)) < TOLERANCE
    assert relative(aty, exact.H(y)) < TOLERANCE


@pytest.mark.parametrize("name", ["gaussian", "laplacian"])
def test_the_adjoint_is_consistent(name):
    A, _ = operators(name)
    assert pb.dottest(A, rtol=2 * TOLERANCE, n_pairs=1) > 0
    x, y = torch.randn(N, dtype=torch.float64), torch.randn(M, dtype=torch.float64)
    with torch.no_grad():
        ax, aty = A(x), A.H(y)
    assert abs(float(ax @ y - x @ aty)) <= TOLERANCE * float(ax.norm() * y.norm() + x.norm() * aty.norm())


@pytest.mark.parametrize("name", ["gaussian", "laplacian"])
def test_small_members_of_a_batch_keep_it_too(name):
    A, exact = operators(name, tolerance=1e-3)
    x = torch.randn(4, N, dtype=torch.float64) * torch.tensor([1e8, 1.0, 1e-9, 0.0], dtype=torch.float64)[:, None]
    found, true = A(x), exact(x)
    assert all(relative(found[k], true[k]) < 1e-3 for k in range(3))
    assert float(found[3].detach().norm()) < 1e-12


def test_vmap_and_forward_mode():
    A, exact = operators("gaussian")
    x, t = torch.randn(2, 3, N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    with fast.watch() as done:
        nested = torch.func.vmap(torch.func.vmap(A))(x)
        y, tangent = torch.func.jvp(A, (x[0, 0],), (t,))
    assert all(info.method == "fourier" for info in done)
    assert relative(nested, exact(x)) < TOLERANCE
    assert relative(y, exact(x[0, 0])) < TOLERANCE and relative(tangent, exact(t)) < TOLERANCE


@pytest.mark.parametrize("name", ["gaussian", pytest.param("matern", marks=pytest.mark.slow)])
def test_second_derivatives_in_points_and_parameters(name):
    A, exact = operators(name, scale=6.0)
    x = torch.randn(N, dtype=torch.float64)

    def derivatives(op):
        held = {
            key: value.detach().clone().requires_grad_() for key, value in (*op.named_parameters(), *op.named_buffers())
        }
        loss = torch.func.functional_call(op, held, (x,)).square().sum()
        first = torch.autograd.grad(loss, list(held.values()), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), list(held.values()))]

    with fast.watch() as done:
        found = derivatives(A)
    assert len(done) >= 4 and "exact" not in [info.method for info in done]
    for a, b in zip(found, derivatives(exact), strict=True):
        assert relative(a, b) < 20 * TOLERANCE


def test_single_precision():
    A, exact = operators("gaussian", dtype=torch.float32)
    x = torch.randn(N, dtype=torch.complex64)
    assert A(x).dtype == torch.complex64
    assert relative(A(x), exact.to(torch.float64)(x.to(torch.complex128)).to(torch.complex64)) < 2e-6


def test_vector_valued_operators():
    x, y = (torch.rand(n, 2, dtype=torch.float64) for n in (M, N))
    difference, b = pb.Vi(x) - pb.Vj(y), pb.Vj(0, 2)
    F = (-(difference**2).sum(-1) * 10).exp() * difference * (difference * b).sum(-1)
    A, exact = KernelOperator(F.with_tolerance(TOLERANCE), b), KernelOperator(F, b)
    v, w = torch.randn(3, N, 2, dtype=torch.float64), torch.randn(M, 2, dtype=torch.complex128)
    with fast.watch() as done:
        found, back = A(v), A.H(w)
    assert [info.method for info in done] == ["fourier"] * 2
    assert relative(found, exact(v)) < TOLERANCE and relative(back, exact.H(w)) < TOLERANCE


def test_complex_kernels():
    x, y = (torch.rand(n, 2, dtype=torch.float64) for n in (M, N))
    K = (-((pb.Vi(x) - pb.Vj(y)) ** 2).sum(-1) * (3 + 5j)).exp()
    A, exact = K.with_tolerance(TOLERANCE).operator(), K.operator()
    v, w = torch.randn(2, N, dtype=torch.complex128), torch.randn(M, dtype=torch.complex128)
    with fast.watch() as done:
        found, back = A(v), A.H(w)
    assert [info.method for info in done] == ["fourier"] * 2
    assert relative(found, exact(v)) < TOLERANCE and relative(back, exact.H(w)) < TOLERANCE


def test_solvers_take_it():
    x = torch.rand(N, 2, dtype=torch.float64)
    K = KERNELS["laplacian"](x, x, torch.tensor([8.0], dtype=torch.float64))
    b = torch.randn(3, N, dtype=torch.float64)
    A = K.with_tolerance(1e-7).operator() + pb.Identity(N)
    found = pb.cg(A, b, rtol=1e-5).x
    residual = found + K.operator()(found) - b
    assert bool((residual.norm(dim=-1) < 3e-5 * b.norm(dim=-1)).all())
