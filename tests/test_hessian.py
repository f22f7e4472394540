"""Hessians, Gauss-Newton and Fisher matrices: against torch.func and definitions, in solvers and in algebra."""

import itertools
import math
import pickle

import pytest
import torch

import pullback as pb
from pullback.autodiff.curvature import empirical_fisher, fisher, gauss_newton
from pullback.autodiff.hessian import hessian
from pullback.autodiff.jacobian import jacobian

D, C = torch.float64, torch.complex128


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def valley(x):
    return (torch.sin(x) * x.flip(-1) ** 2).sum() + x.exp().prod() + (x**4).sum()


def bowl(x):
    """Convex, so that its Hessian is positive definite."""
    return torch.logsumexp(x, -1).sum() + (x**2).sum() + 0.1 * (x**4).sum()


# Hessians ------------------------------------------------------------------------------------------------------------


def test_the_hessian_is_that_of_torch():
    x, v = randn(2, 3), randn(4, 2, 3, seed=1)
    H = hessian(valley, x)
    want = torch.func.hessian(valley)(x).reshape(6, 6)
    assert H.dims == H.dimsd == (2, 3)
    close(H.todense(), want)
    close(H.todense(chunk_size=2), want)
    close(H(v), (v.reshape(4, 6) @ want).reshape(4, 2, 3))
    close(H.value, valley(x))
    close(H.gradient, torch.func.grad(valley)(x))
    assert H.H is H
    close((H + 0.1 * pb.Identity((2, 3))).todense(), want + 0.1 * torch.eye(6, dtype=D))
    close((2 * H @ H).todense(), 2 * want @ want)


def test_trees():
    def f(p, x, n):
        return (torch.tanh(p["w"] @ x + p["b"][0]) ** n).sum()

    p, x = {"w": randn(2, 3), "b": [randn(2), None]}, randn(3, seed=1)
    H = hessian(f, p, x, 3)
    assert H.dims == (11,)
    tree = ({"w": randn(2, 3, seed=3), "b": [randn(2, seed=4), None]}, randn(3, seed=5), None)
    plain = lambda w, b, x: torch.func.grad(lambda *a: f({"w": a[0], "b": [a[1]]}, a[2], 3), (0, 1, 2))(w, b, x)  # noqa: E731
    want = torch.func.jvp(plain, (p["w"], p["b"][0], x), (tree[0]["w"], tree[0]["b"][0], tree[1]))[1]
    got = H @ tree
    close(got[0]["w"], want[0])
    close(got[0]["b"][0], want[1])
    close(got[1], want[2])
    assert got[2] is None
    close(H @ H.pack(tree), H.pack(got))
    assert torch.equal(H.todense(), H.H.todense())
    close(H.todense(), H.todense().T)


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(D)
    data, labels = randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])

    def logits(p):
        return torch.func.functional_call(net, p, (data,))

    return logits, dict(net.named_parameters()), labels


def test_a_newton_step_for_a_network():
    logits, parameters, labels = network()

    def loss(p):
        squares = sum((t**2).sum() for t in p.values())
        return torch.nn.functional.cross_entropy(logits(p), labels) + squares

    H = hessian(loss, {k: p.detach() for k, p in parameters.items()})
    step = pb.cg(H, -H.gradient, rtol=1e-13).x
    close(step, torch.linalg.solve(H.todense(), -H.gradient), 1e-9)
    assert {k: v.shape for k, v in H.unpack(step).items()} == {k: p.shape for k, p in parameters.items()}


def test_solvers_and_numbers():
    x, g = randn(8), randn(8, seed=1)
    H, one = hessian(bowl, x), pb.Identity(8)
    A = H.todense()
    for solve in (pb.cg, pb.minres):
        close(solve(H, g, rtol=1e-14).x, torch.linalg.solve(A, g), 1e-9)
        close(solve(H + 0.1 * one, g, rtol=1e-14).x, torch.linalg.solve(A + 0.1 * torch.eye(8), g), 1e-9)
    close(H.trace(), A.trace())
    close(H.diagonal(), A.diagonal())
    close(H.diagonal(chunk_size=3), A.diagonal())
    close(torch.as_tensor(H.eigs(symmetric=True).copy()), torch.linalg.eigvalsh(A).flip(0))
    assert abs(float(H.trace(3000, "hutchinson") - A.trace())) < 0.05 * float(A.trace())
    close(H.trace(24, "hutch++"), A.trace(), 1e-8)
    assert H.norm_bound() >= float(torch.linalg.matrix_norm(A, 2))


def test_linear_functions_have_hessian_zero():
    H = hessian(lambda x: (randn(3) * x).sum(), randn(3))
    assert torch.equal(H.todense(), torch.zeros(3, 3, dtype=D))
    assert torch.equal(
        hessian(lambda x, y: (x**2).sum() + y.sum(), randn(2), randn(2)).todense().diag(),
        torch.tensor([2.0, 2, 0, 0], dtype=D),
    )


def test_complex_points():
    def f(z):
        return (z.abs() ** 4).sum() + (z**3).imag.sum()

    z, v = randn(3, dtype=C), randn(3, seed=1, dtype=C)
    R = hessian(f, z, complex="real")
    want = torch.func.hessian(lambda x: f(torch.view_as_complex(x)))(torch.view_as_real(z)).reshape(6, 6)
    close(R.todense(), want)
    W = hessian(f, z, complex="wirtinger")
    close(torch.view_as_real(W @ v).flatten(), want @ torch.view_as_real(v).flatten())
    leaf = z.clone().requires_grad_()
    f(leaf).backward()
    close(W.gradient, leaf.grad)


def test_products_are_differentiable_in_everything():
    def product(v, x, theta):
        return hessian(lambda x: torch.sin(theta * x).sum() * x.prod(), x) @ v

    at = [randn(3, seed=k).requires_grad_() for k in range(3)]
    assert torch.autograd.gradcheck(product, at, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(product, at)
    x = randn(3).requires_grad_()
    H = hessian(valley, x)
    torch.testing.assert_close(torch.autograd.grad(H.value, x)[0], H.gradient.detach())
    (third,) = torch.autograd.grad(H @ at[0].detach(), x, torch.ones(3, dtype=D))
    close(third, torch.func.grad(lambda x: (torch.func.hessian(valley)(x) @ at[0].detach()).sum())(x.detach()), 1e-10)
    assert not hessian(valley, randn(3)).gradient.requires_grad


def test_inside_transforms():
    x, v = randn(4, 3), randn(3, seed=1)
    got = torch.func.vmap(lambda x: hessian(valley, x) @ v)(x)
    close(got, torch.stack([hessian(valley, row) @ v for row in x]))
    third = torch.func.jacrev(lambda x: hessian(valley, x) @ v)(x[0])
    close(third, torch.func.jacfwd(lambda x: torch.func.hessian(valley)(x) @ v)(x[0]), 1e-10)
    H = hessian(valley, x[0])
    close(torch.func.vmap(H)(x), H(x))
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: (H(v) * v).sum(), fullgraph=True, backend="aot_eager")
    close(compiled(v), v @ H.todense() @ v)


def test_the_solution_of_a_system_is_differentiable_in_the_point():
    def step(x):
        return pb.cg(hessian(bowl, x), torch.ones(3, dtype=D), rtol=1e-14).x

    assert torch.autograd.gradcheck(step, randn(3).requires_grad_(), atol=1e-5)


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def inner_gradient(x):
    """The gradient of a Function without second derivative, which autograd takes for a constant."""
    y = Plain.apply(x).pow(2).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    return (g * x).sum()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: hessian(lambda x: x**2, randn(3)), pb.ShapeError, r"f\(x\) must be one number; got shape \(3,\)"),
        (lambda: hessian(lambda x: (x.sum(), x), randn(3)), pb.ShapeError, r"got shape \(\), \(3,\)"),
        (
            lambda: hessian(lambda x: x.sum() * 1j, randn(3)),
            pb.DtypeError,
            r"must be real; got a complex.*f\(x\)\.real",
        ),
        (lambda: hessian(lambda z: z.sum(), randn(3, dtype=C), complex="real"), pb.DtypeError, "must be real"),
        (lambda: hessian(valley, randn(3, dtype=C)), pb.DtypeError, "x is complex, so it must be said"),
        (lambda: hessian(valley, randn(3), complex="holomorphic"), pb.ArgumentError, "which no real function is"),
        (lambda: hessian(lambda x: Plain.apply(x).sum(), randn(3)), pb.NotDifferentiableError, "Plain is marked once"),
        (lambda: hessian(inner_gradient, randn(3)), pb.NotDifferentiableError, "once_differentiable"),
        (lambda: hessian(lambda x: x.detach().sum(), randn(3)), pb.NotDifferentiableError, "without detach"),
        (lambda: fisher(valley, randn(3), likelihood="beta"), pb.ArgumentError, "one of 'gaussian', 'categorical'"),
        (lambda: fisher(torch.exp, randn(3), likelihood="poisson", sigma=1), pb.ArgumentError, "sigma belongs to"),
        (
            lambda: fisher(torch.exp, randn(3), likelihood="gaussian", sigma=0),
            pb.ArgumentError,
            "sigma must be positive",
        ),
        (lambda: fisher(lambda x: x * 1j, randn(3), likelihood="gaussian"), pb.DtypeError, "f\\(x\\) must be real"),
        (lambda: empirical_fisher(valley, randn(3)), pb.ShapeError, "one loss for each sample"),
        (lambda: gauss_newton(torch.exp, lambda y: y, randn(3)), pb.ShapeError, "must be one number"),
    ],
)
def test_refusals(make, error, match):
    with pytest.raises(error, match=match):
        make()


# Gauss-Newton and Fisher ---------------------------------------------------------------------------------------------


def test_gauss_newton():
    x, target = randn(4), randn(3, seed=1)
    f = lambda x: torch.stack([x[0] * x[1], x.sin().sum(), x[3] ** 3])  # noqa: E731
    loss = lambda y: ((y - target) ** 4).sum() + y.prod()  # noqa: E731
    G = gauss_newton(f, loss, x)
    J, W = torch.func.jacrev(f)(x), torch.func.hessian(loss)(f(x))
    close(G.todense(), J.T @ W @ J)
    assert G.H is G
    close(G.value, f(x))
    linear = lambda x: randn(3, 4, seed=5) @ x  # noqa: E731
    whole = hessian(lambda x: loss(linear(x)), x).todense()
    close(gauss_newton(linear, loss, x).todense(), whole)  # f is linear, so nothing is left out


def test_gauss_newton_of_a_network():
    logits, parameters, labels = network()
    G = gauss_newton(logits, lambda out: torch.nn.functional.cross_entropy(out, labels, reduction="sum"), parameters)
    F = fisher(logits, parameters, likelihood="categorical")
    close(G.todense().detach(), F.todense().detach())  # the same for the logits of a softmax
    tree = {k: randn(*p.shape) for k, p in parameters.items()}
    close(F.pack(F @ tree), F @ F.pack(tree))
    with torch.no_grad():
        step = pb.cg(F + 0.1 * pb.Identity(F.dims), F.pack(tree), rtol=1e-13).x
        A = F.todense()
    close(step, torch.linalg.solve(A + 0.1 * torch.eye(len(A)), F.pack(tree)), 1e-6)


def test_gauss_newton_with_complex_values():
    a = randn(3, 2, dtype=C)
    x, z = randn(2), randn(2, dtype=C)
    loss = lambda y: (y.abs() ** 2).sum()  # noqa: E731
    G = gauss_newton(lambda x: a @ x.to(C), loss, x)
    close(G.todense(), 2 * (a.conj().T @ a).real)
    v = randn(2, seed=3, dtype=C)
    close(gauss_newton(lambda z: a @ z, loss, z, complex="wirtinger") @ v, 2 * a.conj().T @ a @ v)
    real = gauss_newton(lambda z: a @ z, loss, z, complex="real")
    close(real @ torch.view_as_real(v), torch.view_as_real(2 * a.conj().T @ a @ v))


def squash(x):
    return torch.tanh(x[:2, None] * x[2:] + x[0])


def expectation(f, x, values, log_likelihood):
    """E[s s^T], s = d/dx log p(y | f(x)), over all y that are possible."""
    total = torch.zeros(len(x), len(x), dtype=D)
    for y in values:
        p = log_likelihood(torch.as_tensor(y), f(x)).exp()
        s = torch.func.grad(lambda x, y=y: log_likelihood(torch.as_tensor(y), f(x)))(x)
        total += p * torch.outer(s, s)
    return total


def test_the_fisher_matrix_is_the_mean_of_outer_products_of_scores():
    x = randn(5)

    def categorical(y, z):
        return z.log_softmax(-1).gather(-1, y[:, None]).sum()

    def bernoulli(y, z):
        return (y.reshape(z.shape) * z - torch.nn.functional.softplus(z)).sum()

    found = fisher(squash, x, likelihood="categorical").todense()
    close(found, expectation(squash, x, list(itertools.product(range(3), repeat=2)), categorical))
    found = fisher(squash, x, likelihood="bernoulli").todense()
    close(found, expectation(squash, x, list(itertools.product(range(2), repeat=6)), bernoulli))

    def one(x):
        return squash(x)[:1, :1]

    def poisson(y, z):
        return (y * z - z.exp() - math.lgamma(float(y) + 1)).sum()

    found = fisher(one, x, likelihood="poisson").todense()
    close(found, expectation(one, x, list(range(60)), poisson), 1e-10)
    J = torch.func.jacrev(squash)(x).reshape(6, 5)
    close(fisher(squash, x, likelihood="gaussian").todense(), J.T @ J)
    close(fisher(squash, x, likelihood="gaussian", sigma=0.5).todense(), 4 * J.T @ J)
    sigma = torch.tensor([1.0, 2, 4], dtype=D)
    want = J.T @ torch.diag((1 / sigma**2).repeat(2)) @ J
    close(fisher(squash, x, likelihood="gaussian", sigma=sigma).todense(), want)


def test_the_fisher_matrix_of_extreme_logits_is_finite():
    x = torch.tensor([-800.0, 0, 800], dtype=D)
    close(fisher(lambda x: x, x, likelihood="bernoulli").todense(), torch.diag(torch.tensor([0, 0.25, 0], dtype=D)))
    assert fisher(lambda x: x, x, likelihood="categorical").todense().isfinite().all()


def test_the_empirical_fisher_matrix():
    logits, parameters, labels = network()
    losses = lambda p: torch.nn.functional.cross_entropy(logits(p), labels, reduction="none")  # noqa: E731
    E = empirical_fisher(losses, parameters)
    g = torch.func.jacrev(losses)(parameters)
    g = torch.cat([t.detach().reshape(6, -1) for t in g.values()], -1)
    close(E.todense().detach(), g.T @ g)


def test_curvatures_are_differentiable_in_the_point():
    def product(x, v):
        return fisher(squash, x, likelihood="categorical") @ v

    assert torch.autograd.gradcheck(product, (randn(5).requires_grad_(), randn(5, seed=1).requires_grad_()))
    got = torch.func.jacrev(product)(randn(5), randn(5, seed=1))
    x = randn(5).requires_grad_()
    want = torch.autograd.functional.jacobian(lambda x: product(x, randn(5, seed=1)), x)
    close(got, want)


@pytest.mark.parametrize("second", [lambda J, v: J @ v, lambda J, v: J.H @ v])
def test_products_after_a_backward_pass(second):
    theta = randn(3, seed=2).requires_grad_()
    J = jacobian(lambda x: torch.sin(torch.tanh(theta * x) * x).cumsum(0), randn(3).requires_grad_())
    want = second(J, randn(3, seed=3)).detach()
    for _ in range(2):
        (J @ randn(3)).sum().backward()
        (J.H @ randn(3)).sum().backward()
        J.value.sum().backward()
    close(second(J, randn(3, seed=3)), want)


def test_pickle():
    for op in (hessian(valley, randn(3)), next(pb.autodiff.curvature.Curvature.examples())):
        close(pickle.loads(pickle.dumps(op)).todense(), op.todense())


# Diagonal and density of any operator --------------------------------------------------------------------------------


def test_the_diagonal_of_any_operator():
    M = randn(6, 6, dtype=C)
    A = pb.MatrixMult(M)
    close(A.diagonal(), M.diagonal())
    estimate = A.diagonal(20000, "hutchinson", seed=1)
    assert float((estimate - M.diagonal()).abs().max()) < 0.1
    assert not torch.equal(estimate, A.diagonal(20000, "hutchinson", seed=2))
    assert pb.SecondDerivative((3, 4)).diagonal().shape == (3, 4)
    w = torch.tensor(2.0, dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad((w * pb.Identity(3)).diagonal().sum(), w)
    assert grad == 3
    for call, match in (
        (lambda: pb.MatrixMult(randn(3, 2)).diagonal(), "must be square"),
        (lambda: A.diagonal(method="x"), "'explicit' or 'hutchinson'"),
        (lambda: A.diagonal(0, "hutchinson"), "neval must be at least 1"),
        (lambda: pb.Conj(3).diagonal(), "linear over the reals only"),
    ):
        with pytest.raises(pb.ArgumentError, match=match):
            call()


def test_the_density_of_the_eigenvalues():
    values = torch.cat((torch.linspace(-1, 0, 300, dtype=D), torch.linspace(2, 3, 100, dtype=D)))
    Q = torch.linalg.qr(randn(400, 400))[0]
    A = pb.MatrixMult(Q @ torch.diag(values) @ Q.T)
    density = A.density(steps=40, neval=20)
    assert density.nodes.shape == density.weights.shape == (20, 40)
    close(density.weights.sum(), torch.tensor(1.0, dtype=D), 1e-10)
    assert float(density.nodes.min()) > -1 - 1e-9
    for function in (torch.exp, lambda t: t**2):
        assert abs(float(density.mean(function) / function(values).mean()) - 1) < 0.05
    t, rho = density.curve(1000, 0.05)
    dt = float(t[1] - t[0])
    assert abs(float(rho.sum()) * dt - 1) < 1e-3
    assert abs(float(rho[t < 1].sum()) * dt - 0.75) < 0.03
    assert float(density(torch.tensor(1.0, dtype=D), 0.05)) < 1e-6
    few = A.density(5, 1, seed=1)  # five nodes integrate polynomials of degree nine exactly
    more = A.density(10, 1, seed=1)
    close((few.weights * few.nodes**9).sum(), (more.weights * more.nodes**9).sum(), 1e-9)


def test_density_of_small_and_odd_operators():
    close(pb.Identity(5).density(10, 2).mean(lambda t: t), torch.tensor(1.0, dtype=D))
    M = randn(5, 5, dtype=C)
    S = M + M.conj().T
    full = pb.MatrixMult(S).density(5, 4000)
    assert abs(float(full.mean(lambda t: t**2) / (torch.linalg.eigvalsh(S) ** 2).mean()) - 1) < 0.05
    z = randn(3, dtype=C)
    W = hessian(lambda z: (z.abs() ** 4).sum(), z, complex="wirtinger")
    R = hessian(lambda z: (z.abs() ** 4).sum(), z, complex="real")
    want = torch.linalg.eigvalsh(R.todense())
    ritz = W.density(6, 1).nodes.flatten()
    close(ritz, want, 1e-8)
    for call, match in (
        (lambda: pb.MatrixMult(randn(3, 3)).density(), "is not self-adjoint"),
        (lambda: pb.MatrixMult(randn(3, 2)).density(), "must be square"),
        (lambda: pb.Identity(3).density(0), "steps must be an int >= 1"),
        (lambda: pb.Identity(3).density().curve(width=-1), "width must be a positive number"),
        (lambda: pb.MatrixMult(torch.full((3, 3), math.nan)).density(), "or not finite"),
    ):
        with pytest.raises(pb.ArgumentError, match=match):
            call()
