"""Propagation of uncertainty against its definition, samples, and the cost it promises."""

import sys

import pytest
import torch

import pullback as pb
from pullback.autodiff.propagate import propagate
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError

same = torch.testing.assert_close
T = torch.linspace(0, 10, 1000, dtype=torch.float64)
X = torch.tensor([2.0, 0.3], dtype=torch.float64)
S = torch.tensor([[0.04, 0.003], [0.003, 0.001]], dtype=torch.float64)

module = sys.modules["pullback.autodiff.propagate"]


def decay(p):
    return p[0] * torch.exp(-p[1] * T.to(p.dtype)) * torch.cos(2 * T.to(p.dtype))


def few(z):
    return torch.stack([z.sin().sum(), z.square().prod()])


def many(z):
    return torch.outer(z.sin(), z.flip(0) * z).reshape(5, 5, 1)


def covariance(n=5):
    L = torch.randn(n, n, dtype=torch.float64) / 3
    return L @ L.T


def forms(C):
    """The same covariance in each form."""
    L = torch.linalg.cholesky(C)
    return [{"cov": C}, {"factor": L}, {"cov": pb.MatrixMult(L) @ pb.MatrixMult(L).H}]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("f", [few, many])
@pytest.mark.parametrize("form", [0, 1, 2])
def test_the_definition(f, form, order):
    z, C = torch.randn(5, dtype=torch.float64), covariance()
    J = torch.func.jacrev(f)(z).reshape(-1, 5)
    H = torch.func.hessian(f)(z).reshape(-1, 5, 5)
    cov, mean = J @ C @ J.T, f(z)
    if order == 2:
        cov = cov + torch.einsum("kij,jl,mln,ni->km", H, C, H, C) / 2
        mean = mean + torch.einsum("kij,ij->k", H, C).reshape(mean.shape) / 2
    p = propagate(f, z, order=order, **forms(C)[form])
    assert p.mode == ("reverse" if f is few else "forward")
    same(p.mean, mean)
    same(p.variance, cov.diagonal().reshape(mean.shape))
    same(p.std, cov.diagonal().sqrt().reshape(mean.shape))
    assert p.cov.dims == tuple(mean.shape)
    same(p.cov.todense(), cov)
    same(p.cov(mean), (cov @ mean.reshape(-1)).reshape(mean.shape))


@pytest.mark.parametrize("f", [few, many])
def test_uncorrelated_inputs(f):
    z, v = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    dense = propagate(f, z, torch.diag(v))
    for kwargs in ({"cov": v}, {"std": v.sqrt()}, {"cov": pb.Diagonal(v)}, {"factor": torch.diag(v.sqrt())}):
        same(propagate(f, z, **kwargs).std, dense.std)
    same(propagate(f, z, 0.25).std, propagate(f, z, torch.full((5,), 0.25)).std)
    same(propagate(f, z, std=0.5).std, propagate(f, z, 0.25).std)
    same(propagate(f, z, torch.tensor(0.25)).cov.todense(), propagate(f, z, 0.25).cov.todense())
    same(propagate(f, z, v, order=2).std, propagate(f, z, torch.diag(v), order=2).std)


def test_low_rank_of_many_inputs_costs_few_products():
    n = 3000
    z, L = torch.randn(n, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    calls = []

    def f(z):
        calls.append(1)
        return z.sin().cumsum(0)

    p = propagate(f, z, factor=L)
    same(p.std, (z.cos()[:, None] * L).cumsum(0).norm(dim=1))
    assert p.mode == "forward" and len(calls) == 1
    assert propagate(lambda z: f(z)[-1], z, 1.0).mode == "reverse"
    w = torch.randn(n, dtype=torch.float64)
    J = lambda v: (z.cos() * v).cumsum(0)  # noqa: E731
    same(p.cov(w), J(L @ (L.T @ (z.cos() * w.flip(0).cumsum(0).flip(0)))))


@pytest.mark.parametrize("small", [False, True])
def test_chunks_do_not_matter(small, monkeypatch):
    z, C = torch.randn(5, dtype=torch.float64), covariance()
    expected = [propagate(f, z, C).std for f in (few, many)]
    if small:
        monkeypatch.setattr(module, "_CHUNK", 1)
        monkeypatch.setattr(module, "_DENSE", 1)
    for f, std in zip((few, many), expected, strict=True):
        for kwargs in forms(C):
            same(propagate(f, z, **kwargs).std, std)
    same(propagate(many, z, C, order=2).std, propagate(many, z, factor=torch.linalg.cholesky(C), order=2).std)


def test_the_tutorial():
    p = propagate(decay, X, S)
    J = torch.func.jacfwd(decay)(X)
    same(p.std, (J @ S @ J.T).diagonal().sqrt())
    low, high = p.band(3)
    same(high - low, 6 * p.std)
    p32 = propagate(decay, X.float(), S.float())
    assert p32.std.dtype == torch.float32
    same(p32.std.double(), p.std, rtol=1e-4, atol=1e-6)
    same(propagate(decay, X.float(), S).std, p32.std)  # the covariance follows x
    assert "2 inputs -> 1000, order 1, std by forward mode (2 products)" in repr(p)


def test_samples_agree_where_the_formulas_are_exact():
    z, C = torch.randn(5, dtype=torch.float64), covariance()
    linear = propagate(lambda z: z.cumsum(0), z, C).check(n=4000)
    assert linear.mean_gap.max() < 4 and linear.std_gap.max() < 4
    square = propagate(lambda z: z.square(), z, C, order=2).check(n=4000, seed=3)
    assert square.mean_gap.max() < 4 and square.std_gap.max() < 4
    first = propagate(lambda z: z.square(), z, C).check(n=4000)
    assert first.mean_gap.max() > 10  # the mean of a square is not the square of the mean
    assert "standard errors" in str(first) and "4000 samples" in str(first)
    for kwargs in (*forms(C), {"cov": 0.1}):
        assert propagate(lambda z: 2 * z, z, **kwargs).check(n=2000).std_gap.max() < 5
    constant = propagate(lambda z: z[:2] * torch.tensor([0.0, 1.0]), z, C).check(n=100)
    assert constant.std_gap[0] == 0 == constant.mean_gap[0]


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_derivatives(order):
    z, C = torch.randn(3, dtype=torch.float64), covariance(3)
    w = torch.rand(3, dtype=torch.float64, requires_grad=True)
    functions = [few, lambda z: torch.sin(z.sum() + T[:4] * z[0] * z[1])]
    for f in functions:

        def run(z, C, f=f):
            p = propagate(f, z, (C + C.T) / 2, order=order)
            return p.mean, p.std, p.cov(torch.ones_like(p.mean))

        inputs = z.clone().requires_grad_(), C.clone().requires_grad_()
        assert torch.autograd.gradcheck(run, inputs)
        if order == 1:
            assert torch.autograd.gradgradcheck(lambda z, C, run=run: run(z, C)[1], inputs)
        total = lambda z, f=f: propagate(f, z, C, order=order).std.sum()  # noqa: E731
        g = torch.autograd.grad(total(inputs[0]), inputs[0])[0]
        same(torch.func.grad(total)(z), g)
        same(torch.func.jacfwd(total)(z), g)
        same(torch.func.vmap(torch.func.grad(total))(torch.stack([z, z])), torch.stack([g, g]))
    assert torch.autograd.gradcheck(lambda w: propagate(lambda z: torch.sin(z * w), z, C, order=order).std, w)
    L = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)  # forward mode, although f has fewer outputs
    assert torch.autograd.gradcheck(lambda L: propagate(few, z, factor=L, order=order).std, L)
    s = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: propagate(few, z, std=s, order=order).std, s)


def test_zero_variance_has_no_nan_gradient():
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    p = propagate(lambda z: z.square(), z, 1.0)
    assert p.std.tolist() == [0, 0]
    p.std.sum().backward()
    assert z.grad.tolist() == [0, 0]


def test_no_graph_is_kept_where_none_is_asked_for():
    p = propagate(decay, X, S)
    assert not p.mean.requires_grad and not p.std.requires_grad
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not propagate(decay, x, S).std.requires_grad
    with torch.inference_mode():
        same(propagate(decay, X, S).std.clone(), p.std)
    x = X.clone()
    p = propagate(decay, x, S)
    x.zero_()  # the point was copied
    same(p.std, propagate(decay, X, S).std)


def test_several_inputs():
    a, b = torch.randn((), dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    f = lambda d: torch.sin(d["a"] * d["b"]).sum(1)  # noqa: E731
    x, C = {"a": a, "b": b}, covariance(4)
    blocks = torch.block_diag(torch.tensor([[0.1]], dtype=torch.float64), C)
    flat = lambda v: f({"a": v[0], "b": v[1:].reshape(2, 2)})  # noqa: E731
    expected = propagate(flat, torch.cat((a[None], b.reshape(-1))), blocks)
    same(propagate(f, x, {"a": 0.1, "b": C}).std, expected.std)
    same(propagate(f, x, blocks).cov.todense(), expected.cov.todense())
    same(propagate(f, x, std={"a": 0.3, "b": torch.ones(2, 2)}).std, propagate(f, x, {"a": 0.09, "b": 1.0}).std)
    same(
        propagate(f, x, {"a": 0.1, "b": C.reshape(2, 2, 2, 2)}, order=2).mean,
        propagate(flat, expected._x, blocks, order=2).mean,
    )


def test_numbers_in_and_out():
    p = propagate(torch.sin, torch.tensor(1.0, dtype=torch.float64), std=0.1)
    assert p.mean.shape == p.std.shape == ()
    same(p.std, 0.1 * torch.cos(torch.tensor(1.0, dtype=torch.float64)))
    assert p.cov.todense().shape == (1, 1)
    x = torch.randn(4, 6, dtype=torch.float64).T  # not contiguous
    same(propagate(lambda x: 2 * x, x, std=x.abs()).std, 2 * x.abs())


def test_plot(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    p = propagate(decay, X.clone().requires_grad_(), S)
    assert p.plot(T, k=3, ax=ax) is ax
    band = ax.collections[0].get_paths()[0].vertices
    same(torch.tensor(band[:, 1].max()), p.band(3)[1].max().detach())
    plt.close(fig)
    with pytest.raises(ShapeError, match="one axis"):
        propagate(torch.sin, torch.ones(2, 2), 1.0).plot()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: propagate(decay, X), ArgumentError, "give one of cov .* got none"),
        (lambda: propagate(decay, X, S, std=1.0), ArgumentError, "got cov and std"),
        (lambda: propagate(decay, X, -1), ArgumentError, "cov is a variance and must be finite and >= 0; got -1"),
        (lambda: propagate(decay, X, std=float("nan")), ArgumentError, "std is a standard deviation"),
        (lambda: propagate(decay, X, torch.tensor([1.0, -1.0])), ArgumentError, "cov holds variances"),
        (lambda: propagate(decay, X, torch.tensor([1.0, torch.nan])), ArgumentError, "not NaN"),
        (lambda: propagate(decay, X, torch.tensor([[1.0, 2], [0, 1]])), ArgumentError, "must be symmetric"),
        (lambda: propagate(decay, X, torch.tensor([[1.0, 2], [2, 1]])), ArgumentError, "positive semidefinite: var"),
        (lambda: propagate(decay, X, torch.ones(3)), ShapeError, r"of shape \(2,\) \(variances\) or \(2, 2\); got .*3"),
        (lambda: propagate(decay, X, std=S), ShapeError, "for correlated inputs use cov or factor"),
        (lambda: propagate(decay, X, factor=torch.ones(2)), ShapeError, r"factor must have shape \(2, r\)"),
        (lambda: propagate(decay, X, factor=torch.full((2, 1), torch.inf)), ArgumentError, "factor must be finite"),
        (lambda: propagate(decay, X, pb.Identity(3)), ShapeError, "operator on the 2 inputs"),
        (lambda: propagate(decay, X, True), DtypeError, "cov must be real; got torch.bool"),
        (lambda: propagate(decay, X, "big"), ArgumentError, "got str"),
        (lambda: propagate(decay, X, S.to(torch.complex128)), DtypeError, "cov must be real"),
        (lambda: propagate(decay, X.to(torch.complex128), S), DtypeError, "torch.view_as_real"),
        (lambda: propagate(decay, torch.tensor([1, 2]), S), DtypeError, "got torch.int64"),
        (lambda: propagate(decay, 2.0, S), DtypeError, "got float"),
        (lambda: propagate(decay, torch.ones(0), 1.0), ShapeError, "at least one number"),
        (lambda: propagate(decay, (X, X.float()), 1.0), DtypeError, "one dtype"),
        (lambda: propagate(lambda p: p[0], (X, X), (1.0,)), ArgumentError, "structure of x"),
        (lambda: propagate(X, X, S), ArgumentError, "f must be a function"),
        (lambda: propagate(lambda p: (p, p), X, S), ArgumentError, "return one tensor; got tuple"),
        (lambda: propagate(torch.fft.fft, X, S), DtypeError, "return torch.view_as_real"),
        (lambda: propagate(lambda p: p[:0], X, S), ShapeError, "no elements"),
        (lambda: propagate(lambda p: p.detach(), X, S), NotDifferentiableError, "no way from"),
        (lambda: propagate(decay, X, S, order=3), ArgumentError, "order must be 1 or 2; got 3"),
        (lambda: propagate(torch.sin, torch.ones(5000), 1.0, order=2), ArgumentError, "order=2 needs 5000 x 5000"),
        (lambda: propagate(decay, X, S).check(n=1), ArgumentError, "n must be an int >= 2"),
        (lambda: propagate(torch.sin, torch.ones(5000), pb.Identity(5000)).check(), ArgumentError, "give factor"),
        (lambda: propagate(torch.sum, torch.ones(3), INDEFINITE).std, ArgumentError, "not positive semidefinite"),
        (lambda: propagate(torch.sin, torch.ones(3), INDEFINITE).check(), ArgumentError, "smallest eigenvalue"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


# Every pair of inputs is plausible, all three together are not.
INDEFINITE = torch.tensor([[1.0, -0.9, -0.9], [-0.9, 1.0, -0.9], [-0.9, -0.9, 1.0]])
