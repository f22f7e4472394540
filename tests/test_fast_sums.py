"""Sums within a tolerance: never over it, with every derivative, whatever the points."""

import pickle
import sys
import warnings

import pytest
import torch

import pullback as pb
from pullback.core.errors import ArgumentError
from pullback.kernels import fast
from pullback.kernels.fast import sum as fast_sum
from pullback.kernels.fast.analyse import Refused, analyse
from pullback.kernels.fast.run import beside
from pullback.kernels.task import exactly

N = 6000


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fast sums also where the exact ones are cheaper."""
    torch.manual_seed(0)
    fast.clear()
    monkeypatch.setattr(sys.modules["pullback.kernels.fast.choose"], "FEW", 0.0)


def points(n=N, d=3):
    return torch.rand(n, d, dtype=torch.float64)


def gaussian(x, y, s):
    return (-((pb.Vi(x) - pb.Vj(y)) ** 2).sum(-1) * pb.Pm(s)).exp()


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def method(done):
    return [d.method for d in done]


# What is a fast sum ----------------------------------------------------------------------------

SPELLINGS = [
    ("Exp(-SqDist(x,y)*s)*b", 3),
    ("b*Exp(-SqNorm2((x-y)*s))", 3),
    ("Exp(-SqNorm2(x*s-y*s))*b", 3),
    ("Exp(-Sqrt(SqDist(y,x))/s)*b", 3),
    ("(s+Norm2(x-y))*Exp(-Norm2(x-y))*b", 3),
    ("Exp(-SqDist(x,y)*s)*(x|y)*b", 3),
    ("Exp(-SqDist(x,y)+Elem(x,0)+Elem(y,1))*b", 3),
    ("Exp(-SqNorm2(Extract(x,0,2)-Extract(y,0,2)))*Elem(b,0)*Elem(x,2)", 2),
]


@pytest.mark.parametrize(("formula", "d"), SPELLINGS)
def test_the_formula_is_read(formula, d):
    f = pb.Genred(formula, ["x = Vi(3)", "y = Vj(3)", "b = Vj(2)", "s = Pm(1)"], axis=1)
    form = analyse(f.reducer.programs[0])
    assert len(form.coordinates) == d


@pytest.mark.parametrize(
    ("formula", "why"),
    [
        ("Cos((x|y))*b", "Cos mixes i and j"),
        ("(x|y)*b", "no function of a difference"),
        ("Exp(-SqNorm2(Concat(x,x)-Concat(y,b)))", "6 coordinates|5 coordinates"),
    ],
)
def test_what_is_no_fast_sum_says_why(formula, why):
    f = pb.Genred(formula, ["x = Vi(3)", "y = Vj(3)", "b = Vj(3)"], axis=1)
    with pytest.raises(Refused, match=why):
        analyse(f.reducer.programs[0])


# Values and derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_gaussian_sums_keep_their_tolerance(d, tolerance):
    x, y, b = points(d=d), points(N + 7, d), torch.randn(N + 7, 3, dtype=torch.float64)
    K = gaussian(x, y, torch.tensor([30.0], dtype=torch.float64))
    with fast.watch() as done:
        found = K.with_tolerance(tolerance) @ b
        other = K.T.with_tolerance(tolerance) @ torch.ones(N, dtype=torch.float64)
    assert "exact" not in method(done)
    assert relative(found, K @ b) < tolerance
    assert relative(other, K.T @ torch.ones(N, dtype=torch.float64)) < tolerance
    assert all(info.error <= tolerance and info.rows >= 4 for info in done)


def test_derivatives_of_both_orders_are_fast_and_right():
    x, y = points().requires_grad_(), points().requires_grad_()
    b = torch.randn(N, 2, dtype=torch.float64, requires_grad=True)
    s = torch.tensor([50.0], dtype=torch.float64, requires_grad=True)
    K = gaussian(x, y, s)

    def derivatives(K):
        first = torch.autograd.grad((K @ b).square().sum(), (x, y, b, s), create_graph=True)
        return first, torch.autograd.grad(first[0].square().sum() + first[3].sum(), (x, b, s))

    with fast.watch() as done:
        first, second = derivatives(K.with_tolerance(1e-7))
    assert done and "exact" not in method(done)
    true = derivatives(K)
    for a, c in zip((*first, *second), (*true[0], *true[1]), strict=True):
        assert relative(a, c) < 1e-6


def test_forward_mode_and_vmap_are_fast():
    x, y, s = points(), points(), torch.tensor([40.0], dtype=torch.float64)
    b, u = torch.randn(N, 1, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    f = pb.Genred("Exp(-SqDist(x,y)*s)*b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(1)", "s = Pm(1)"], axis=1)
    with fast.watch() as done:
        tangent = torch.func.jvp(lambda x: f(x, y, b, s, tolerance=1e-6), (x,), (u,))[1]
        many = torch.func.vmap(lambda b: f(x, y, b, s, tolerance=1e-6))(torch.stack([b, 2 * b]))
    assert done and "exact" not in method(done)
    assert relative(tangent, torch.func.jvp(lambda x: f(x, y, b, s), (x,), (u,))[1]) < 1e-5
    assert relative(many, torch.stack([f(x, y, b, s), 2 * f(x, y, b, s)])) < 1e-6


def test_none_is_the_exact_engine_bit_for_bit():
    x, y, b = points(), points(), torch.randn(N, 1, dtype=torch.float64)
    args = (x, y, b, torch.tensor([30.0], dtype=torch.float64))
    f = pb.Genred("Exp(-SqDist(x,y)*s)*b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(1)", "s = Pm(1)"], axis=1)
    with fast.watch() as done:
        assert torch.equal(f(*args), f(*args, tolerance=None))
    assert done == []


def test_a_changed_tensor_has_a_new_plan():
    x, b, s = points(), torch.randn(N, dtype=torch.float64), torch.tensor([30.0], dtype=torch.float64)
    K = gaussian(x, x, s).with_tolerance(1e-6)
    before = K @ b
    x.mul_(0.5)
    assert relative(K @ b, gaussian(x, x, s) @ b) < 1e-6
    assert relative(K @ b, before) > 1e-2


# Where it lives ----------------------------------------------------------------------------


def test_genred_keeps_its_tolerance_through_pickle():
    f = pb.Genred("Exp(-SqDist(x,y))", ["x = Vi(3)", "y = Vj(3)"], axis=1, tolerance=1e-5)
    g = pickle.loads(pickle.dumps(f))
    with fast.watch() as done:
        g(points(), points())
    assert g.tolerance == 1e-5 and method(done) != ["exact"] and done[0].tolerance == 1e-5


def test_operators_and_solvers_take_it():
    x, b = points(), torch.randn(N, dtype=torch.float64)
    K = gaussian(x, x, torch.tensor([60.0], dtype=torch.float64))
    with fast.watch() as done:
        found = K.solve(b, alpha=1.0, eps=1e-5, tolerance=1e-7)
        A = K.with_tolerance(1e-7).operator() + pb.Identity(N)
        sol = pb.cg(A, b, rtol=1e-5)
    assert done and "exact" not in method(done)
    assert relative(found + K @ found, b) < 2e-5
    assert relative(sol.x, found) < 1e-4


def test_weights_that_cancel_are_summed_more_accurately():
    """Two clouds of dipoles: errors of a plain attempt gather in few rows, where a sample does not see them."""
    g = torch.Generator().manual_seed(3)
    x = torch.rand(3000, 1, dtype=torch.float64, generator=g)
    b = torch.randn(1500, 1, dtype=torch.float64, generator=g)
    y, b = torch.cat([x[:1500], x[:1500] + 1e-6]), torch.cat([b, -b])
    K = (-(pb.Vi(x) - pb.Vj(y)).norm2()).exp() * (3 * (pb.Vi(x) - pb.Vj(y)).norm2()).cos()
    with fast.watch() as done:
        found = K.with_tolerance(1e-4) @ b
    assert relative(found, K @ b) < 2e-5 and method(done) == ["tree"], done


def test_a_plan_that_one_sum_does_not_pay_for_is_made_when_many_do(monkeypatch):
    monkeypatch.setattr(sys.modules["pullback.kernels.fast.choose"], "FEW", 1e-6)
    x = torch.rand(5000, 3, dtype=torch.float64)
    K = (-10 * (pb.Vi(x) - pb.Vj(x)).norm2()).exp().with_tolerance(1e-5)
    b = torch.rand(5000, dtype=torch.float64)
    balance = sys.modules["pullback.kernels.fast.balance"]
    choose = sys.modules["pullback.kernels.fast.choose"]
    monkeypatch.setattr(choose, "estimate", lambda *_: (0.1, 1e-4))  # a plan costs 0.1 s, a sum with it 1e-4 s
    monkeypatch.setattr(choose, "rate", lambda _: 5000**2 / 0.03)  # the exact sum 0.03 s
    monkeypatch.setattr(balance, "ENTRY", 1e-12)
    with fast.watch() as done:
        for _ in range(5):
            K @ b
    assert method(done) == ["exact"] * 3 + ["tree"] * 2, done


def test_the_engine_evaluates_kernels():
    f = pb.Genred(
        "Exp(-Norm2(x-y)*s)*b + SqDist(x*p,y*p)*b", ["x = Vi(2)", "b = Vj(1)", "s = Pm(1)", "y = Vj(2)", "p = Pm(2)"]
    )
    x, b = torch.rand(30, 2, dtype=torch.float64), torch.rand(30, 1, dtype=torch.float64)
    args = [x, b, torch.tensor([3.0]).double(), x + 0.1, torch.tensor([0.5, 2.0]).double()]
    (program,) = f.reducer.programs
    one = fast_sum.FastSum(analyse(program), args, 30, 30, 1e-6)
    d = torch.rand(4, 50, 2, dtype=torch.float64)
    torch.testing.assert_close(one.kernel_by(exactly, d), one.kernel(d), rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_the_old_vmap_of_torch():
    x = torch.rand(2000, 2, dtype=torch.float64)
    K = gaussian(x, x, torch.tensor([4.0], dtype=torch.float64))
    b = torch.randn(2000, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(
        lambda t: K.with_tolerance(1e-8) @ (b * t), torch.ones(()).double(), vectorize=True
    )
    assert relative(J, K @ b) < 1e-7


def test_a_tolerance_may_count_what_is_added():
    x = torch.rand(3000, 2, dtype=torch.float64)
    K = gaussian(x, x, torch.tensor([4.0], dtype=torch.float64)).with_tolerance(1e-6)
    b = torch.randn(3000, dtype=torch.float64)
    b -= b.mean()
    with fast.watch() as done:
        y = K @ b
        with beside(1e5 * y.norm()):
            K @ b
        K @ b
    alone, added, after = done
    assert 0 < 1e3 * added.error < min(alone.error, after.error)


def test_what_a_solver_needed_is_remembered(monkeypatch):
    """The second product with weights that nearly cancel aims lower at once."""
    x = torch.rand(4000, 2, dtype=torch.float64)
    K = gaussian(x, x, torch.tensor([1.0], dtype=torch.float64)).with_tolerance(1e-4)
    u, _, _ = torch.linalg.svd(torch.exp(-torch.cdist(x, x).square())[:, ::10], full_matrices=False)
    b = u[:, 12].clone()  # K b is a ten-thousandth of what weights of this size give
    runs = []
    run = fast_sum.FastSum.run
    monkeypatch.setattr(fast_sum.FastSum, "run", lambda *a: runs.append(a[0].tolerance) or run(*a))
    with fast.watch() as done:
        K @ b
        K @ b
    assert len(runs) == 3 and runs[0] == 1e-4 > 100 * runs[1] == 100 * runs[2], runs
    assert [info.method for info in done] == ["fourier", "fourier"]


def test_bad_tolerances_are_refused():
    x = points(10)
    K = gaussian(x, x, torch.tensor([30.0], dtype=torch.float64))
    for bad in (0, 1, -1e-3, "1e-3", True):
        with pytest.raises(ArgumentError, match="tolerance must be a number between 0 and 1"):
            K.with_tolerance(bad)
    for call in (lambda: K.argmin(1, tolerance=1e-3), lambda: K.argKmin(3, 1, tolerance=1e-3)):
        with pytest.raises(ArgumentError, match=r"tolerance is for Sum, Mean.*leave it out"):
            call()
    with pytest.raises(ArgumentError, match=r"tolerance is for Sum.*ArgKMin is exact"):
        f = pb.Genred("SqDist(x,y)", ["x = Vi(3)", "y = Vj(3)"], "ArgKMin", 1, opt_arg=2, tolerance=1e-3)
        f(x, x)
    with pytest.raises(ArgumentError, match="backend='eager' sums exactly"):
        K.sum(1, backend="eager", tolerance=1e-3)


def test_small_and_unsuitable_sums_are_exact_and_say_why(monkeypatch):
    monkeypatch.undo()
    x = points(50)
    K = gaussian(x, x, torch.tensor([30.0], dtype=torch.float64))
    with fast.watch() as done, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(K.sum(1, tolerance=1e-3), K.sum(1))
    assert method(done) == ["exact"] and "pairs are few" in done[0].detail


# Logarithms and softmax ----------------------------------------------------------------------------


def exponents(size=0.02):
    x, y = points(d=2).requires_grad_(), points(d=2)
    f, g = (size * torch.randn(N, 1, dtype=torch.float64) for _ in range(2))
    return (pb.Vi(f) + pb.Vj(g) - ((pb.Vi(x) - pb.Vj(y)) ** 2).sum(-1) / 2) / 0.02, x


def test_logsumexp_and_softmax_are_fast():
    F, x = exponents()
    v = pb.Vj(torch.randn(N, 2, dtype=torch.float64))
    with fast.watch() as done:
        found = F.logsumexp(1, tolerance=1e-6)
        grad = torch.autograd.grad(found.square().sum(), x)[0]
        other = F.logsumexp(0, tolerance=1e-6)
        mean = F.sumsoftmaxweight(v, axis=1, tolerance=1e-6)
    assert done and "exact" not in method(done)
    true = F.logsumexp(1)
    assert relative(found, true) < 1e-6 and relative(other, F.logsumexp(0)) < 1e-6
    assert relative(grad, torch.autograd.grad(true.square().sum(), x)[0]) < 1e-5
    assert relative(mean, F.sumsoftmaxweight(v, axis=1)) < 1e-5


def test_logarithms_of_lost_terms_are_exact():
    F, _ = exponents(size=2.0)
    with fast.watch() as done:
        found = F.logsumexp(0, tolerance=1e-6)
    assert torch.equal(found, F.logsumexp(0))
    assert "too small to keep a relative error" in done[0].detail
