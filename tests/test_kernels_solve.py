"""Kernel systems against torch.linalg.solve: values, derivatives of both orders, preconditioners, failure."""

import warnings

import numpy as np
import pytest
import torch

import pullback as pb
from pullback.kernels import cluster
from pullback.kernels.conjugate import ConvergenceWarning, Options, conjugate_gradients
from pullback.kernels.lazy import Pm, Vi, Vj
from pullback.kernels.solve import KernelSolve

N, D = 7, 2
TIGHT = {"eps": 1e-14, "atol": 1e-14}


def rand(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


x, b, s = rand(N, D), rand(N, 3, seed=1), torch.tensor([0.8], dtype=torch.float64)
alpha = torch.tensor(0.3, dtype=torch.float64)
GAUSS = "Exp(-s*SqDist(x,y))*b"
ALIASES = ["x = Vi(2)", "y = Vj(2)", "b = Vj(3)", "s = Pm(1)"]


def gauss(x, s=s):
    return (-(Vi(x) - Vj(x)).sqnorm2() * Pm(s)).exp()


def dense(x, s=s):
    return torch.exp(-(x[..., :, None, :] - x[..., None, :, :]).square().sum(-1) * s[..., None])


def exact(b, alpha, x, s=s):
    K = dense(x, s)
    return torch.linalg.solve(K + alpha * torch.eye(K.shape[-1], dtype=K.dtype), b)


def test_lazy_solve():
    expected = exact(b, alpha, x)
    K = gauss(x)
    torch.testing.assert_close(K.solve(b, alpha=0.3, eps=1e-12), expected)
    torch.testing.assert_close(K.solve(b[:, 0], alpha=alpha, rtol=1e-12), expected[:, 0])
    torch.testing.assert_close(K.solve(Vi(b), alpha=0.3, eps=1e-12), expected)  # as in KeOps
    unknown = Vj(9, 3)
    torch.testing.assert_close((K * unknown).solve(Vi(b), var=unknown, alpha=0.3, eps=1e-12), expected)
    got = gauss(x.numpy(), s.numpy()).solve(b.numpy(), alpha=0.3, eps=1e-12)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_genred_style(axis):
    aliases = ALIASES if axis else ["x = Vi(2)", "y = Vj(2)", "b = Vi(3)", "s = Pm(1)"]
    f = KernelSolve(GAUSS, aliases, "b", axis=axis)
    torch.testing.assert_close(f(x, x, b, s, alpha=0.3, eps=1e-12), exact(b, alpha, x))
    got = f(*(t.numpy() for t in (x, x, b, s)), alpha=0.3, eps=1e-12, backend="CPU", device_id=0)
    np.testing.assert_allclose(got, exact(b, alpha, x))


def test_vector_valued_kernel():
    # the curl-free kernel (I - d d^T) exp(-|d|^2 / 2) is symmetric positive, and couples the components
    f = KernelSolve("Exp(-SqDist(x,y)/2)*(b - (x-y)*((x-y)|b))", ["x=Vi(2)", "y=Vj(2)", "b=Vj(2)"], "b", axis=1)
    d = x[:, None] - x
    K = torch.exp(-d.square().sum(-1) / 2)[..., None, None] * (torch.eye(2) - d[..., :, None] * d[..., None, :])
    K = K.movedim(1, 2).reshape(2 * N, 2 * N)
    expected = torch.linalg.solve(K + 0.1 * torch.eye(2 * N, dtype=K.dtype), b[:, :2].flatten()).view(N, 2)
    for preconditioner in (None, "nystrom"):
        got = f(x, x, b[:, :2], alpha=0.1, eps=1e-13, preconditioner=preconditioner, rank=5)
        torch.testing.assert_close(got, expected)


def test_batches_and_tolerance_of_each_column():
    xs, alphas = rand(4, 1, N, D, seed=3), torch.tensor([0.1, 10.0], dtype=torch.float64)
    got = gauss(xs).solve(b, alpha=alphas, eps=1e-12)
    assert got.shape == (4, 2, N, 3)
    expected = torch.stack([exact(b, a, xs[:, 0]) for a in alphas], 1)
    torch.testing.assert_close(got, expected)
    mixed = torch.stack([b[:, 0], 1e-9 * b[:, 1], torch.zeros(N).double()], 1)
    torch.testing.assert_close(gauss(x).solve(mixed, alpha=0.3, eps=1e-12), exact(mixed, alpha, x), rtol=1e-9, atol=0)


def test_complex_kernel_and_data():
    z = torch.complex(b, b.flip(0))
    K = gauss(x) * (1j * (Vi(x)[0] - Vj(x)[0])).exp()  # Hermitian
    got = K.solve(z, alpha=0.3, eps=1e-13)
    expected = torch.linalg.solve(K.dense() + 0.3 * torch.eye(N), z)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gauss(x).solve(z, alpha=0.3, eps=1e-13), exact(z, alpha, x.to(z.dtype)).to(z.dtype))


def solve(b, alpha, x, s):
    return gauss(x, s).solve(b, alpha=alpha, **TIGHT)


def test_derivatives_of_both_orders():
    inputs = tuple(t.clone().requires_grad_() for t in (b[:, :2], alpha, x, s))
    got, expected = solve(*inputs), exact(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    w = rand(*got.shape, seed=4)
    first = [torch.autograd.grad((t * w).sum(), inputs, create_graph=True) for t in (got, expected)]
    torch.testing.assert_close(first[0], first[1], rtol=1e-9, atol=1e-9)
    second = [torch.autograd.grad(sum((g**2).sum() for g in f), inputs) for f in first]
    torch.testing.assert_close(second[0], second[1], rtol=1e-8, atol=1e-8)


def test_gradcheck():
    inputs = tuple(t.clone().requires_grad_() for t in (b[:4, :1], alpha, x[:4], s))
    torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True, atol=1e-6)
    torch.autograd.gradgradcheck(solve, inputs, atol=1e-6)


def test_function_transforms():
    from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

    args = b[:, :2], alpha, x, s
    for k in range(4):
        f = [lambda t, k=k, g=g: g(*args[:k], t, *args[k + 1 :]) for g in (solve, exact)]
        torch.testing.assert_close(jacrev(f[0])(args[k]), jacrev(f[1])(args[k]), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(jacfwd(f[0])(args[k]), jacfwd(f[1])(args[k]), rtol=1e-8, atol=1e-8)
        tangent = rand(*args[k].shape, seed=5)
        torch.testing.assert_close(jvp(f[0], (args[k],), (tangent,)), jvp(f[1], (args[k],), (tangent,)))
        stack = torch.stack([args[k], 1.3 * args[k]])
        torch.testing.assert_close(vmap(f[0])(stack), vmap(f[1])(stack), rtol=1e-8, atol=1e-8)
    h = [hessian(lambda t, g=g: g(*args[:3], t).sin().sum())(s) for g in (solve, exact)]
    torch.testing.assert_close(*h, rtol=1e-7, atol=1e-7)
    per_sample = vmap(grad(lambda c: solve(c, *args[1:]).square().sum()))(torch.stack([args[0], 2 * args[0]]))
    torch.testing.assert_close(per_sample[1], 2 * per_sample[0])


def test_torch_compile():
    f = KernelSolve(GAUSS, ALIASES, "b", axis=1)
    for g in (lambda x: gauss(x).solve(b, alpha=0.3, **TIGHT), lambda x: f(x, x, b, s, alpha=0.3, **TIGHT)):
        torch._dynamo.reset()
        a = x.clone().requires_grad_()
        compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
        got, expected = (torch.autograd.grad(h(a).sin().sum(), a) for h in (compiled, g))
        torch.testing.assert_close(got, expected)


def test_kernel_solve_gradient_reaches_both_points():
    f = KernelSolve(GAUSS, ALIASES, "b", axis=1)
    inputs = tuple(t.clone().requires_grad_() for t in (x, b, s))
    got = torch.autograd.grad(f(inputs[0], inputs[0], inputs[1], inputs[2], alpha=0.3, **TIGHT).sin().sum(), inputs)
    expected = torch.autograd.grad(exact(inputs[1], alpha, inputs[0], inputs[2]).sin().sum(), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["nystrom", "cholesky"])
def test_preconditioners_save_iterations(kind):
    points = torch.rand(2, 300, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    K = (-(Vi(points) - Vj(points)).sqnorm2() * 8).exp()
    right = rand(2, 300, 2, seed=6)
    plain, info = K.solve(right, alpha=1e-3, eps=1e-8, info=True)
    fast, fast_info = K.solve(right, alpha=1e-3, eps=1e-8, preconditioner=kind, rank=25, info=True)
    assert fast_info.iterations < info.iterations / 3, (fast_info.iterations, info.iterations)
    assert bool(fast_info.converged.all()) and fast_info.residual.shape == (2, 2)
    assert float(fast_info.residual.max()) < 1e-7
    expected = torch.linalg.solve(K.dense() + 1e-3 * torch.eye(300), right)
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nystrom", "cholesky"])
def test_preconditioner_of_full_rank_is_the_inverse(kind):
    got, info = gauss(x).solve(b, alpha=0.3, eps=1e-10, preconditioner=kind, rank=N, info=True)
    assert info.iterations <= 2
    torch.testing.assert_close(got, exact(b, alpha, x))


@pytest.mark.parametrize("d", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_fourier_modes_are_the_inverse(d):
    points = torch.rand(2, 400, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 7
    K = (-(Vi(points) - Vj(points)).sqnorm2() * 4).exp()
    right = rand(2, 400, 3, seed=6)
    damp = torch.tensor([1e-2, 1e-1], dtype=torch.float64)
    got, info = K.solve(right, alpha=damp, eps=1e-9, preconditioner="fourier", info=True)
    assert info.iterations <= 3
    expected = torch.linalg.solve(K.dense() + damp[:, None, None] * torch.eye(400), right)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    _, plain = K.solve(right, alpha=damp, eps=1e-9, info=True)
    got, few = K.solve(right, alpha=damp, eps=1e-9, preconditioner="fourier", rank=15, info=True)
    assert info.iterations < few.iterations < plain.iterations
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    assert K.solve(right.float().double(), alpha=damp, preconditioner="fourier").dtype == torch.float64


def test_fourier_modes_in_single_precision_and_derivatives():
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(2))
    K = (-(Vi(points) - Vj(points)).sqnorm2() * 4).exp()
    got, info = K.solve(torch.ones(300), alpha=0.1, eps=1e-4, preconditioner="fourier", info=True)
    assert got.dtype == torch.float32 and info.iterations <= 3 and float(info.residual) < 1e-3

    def loss(points, kind):
        K = (-(Vi(points) - Vj(points)).sqnorm2() * 4).exp()
        return K.solve(torch.ones(300, dtype=torch.float64), alpha=0.1, eps=1e-12, preconditioner=kind).square().sum()

    found = []
    for kind in (None, "fourier"):
        leaf = points.double().requires_grad_()
        found += torch.autograd.grad(loss(leaf, kind), leaf)
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-7)


def test_own_preconditioner_and_ranges():
    K = gauss(x)
    got = K.solve(b, alpha=0.3, eps=1e-12, preconditioner=lambda r: r / 1.3)
    torch.testing.assert_close(got, exact(b, alpha, x))
    blocks = torch.tensor([[0, 3], [3, N]])
    pattern = cluster.from_matrix(blocks, blocks, torch.eye(2, dtype=torch.bool))
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(N - 3, N - 3)).double()
    expected = torch.linalg.solve(dense(x) * mask + 0.3 * torch.eye(N), b)
    torch.testing.assert_close(K.solve(b, alpha=0.3, eps=1e-12, ranges=pattern), expected)
    K.ranges = pattern
    torch.testing.assert_close(K.solve(b, alpha=0.3, eps=1e-12, preconditioner="nystrom"), expected)
    f = KernelSolve(GAUSS, ["x = Vi(2)", "y = Vj(2)", "b = Vi(3)", "s = Pm(1)"], "b", axis=0)
    torch.testing.assert_close(f(x, x, b, s, alpha=0.3, eps=1e-12, ranges=pattern), expected)


def test_cap_warns_and_returns_the_best():
    with pytest.warns(ConvergenceWarning, match=r"in 2 iterations.*raise maxiter or alpha"):
        got = gauss(x).solve(b, alpha=1e-6, maxiter=2)
    assert bool(torch.isfinite(got).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = gauss(x).solve(b, alpha=1e-6, maxiter=2, info=True)
    assert info.iterations == 2 and not bool(info.converged.any())
    rest = b - (dense(x) + 1e-6 * torch.eye(N)) @ got
    torch.testing.assert_close(info.residual, rest.norm(dim=0) / b.norm(dim=0))


def test_the_best_iterate_is_kept():
    matrix = torch.diag(torch.tensor([1.0, 1e4], dtype=torch.float64))
    right = torch.tensor([[1.0], [0.01]], dtype=torch.float64)  # the first step makes the residual 50 times larger
    got, info = conjugate_gradients(lambda v: matrix @ v, right, torch.tensor(0.0), None, Options(maxiter=1))
    assert torch.equal(got, torch.zeros_like(right)) and float(info.residual) == 1


def test_indefinite_kernel_is_noticed():
    with pytest.warns(ConvergenceWarning, match="not positive definite.*3 of 3 columns"):
        (-gauss(x)).solve(b, alpha=0.1)


def test_float32():
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(2))
    right = torch.rand(200, 1, generator=torch.Generator().manual_seed(3))
    K = (-(Vi(points) - Vj(points)).sqnorm2()).exp()
    got, info = K.solve(right, alpha=0.1, info=True)
    assert got.dtype == torch.float32 and float(info.residual.max()) < 1e-4


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: gauss(x).solve(b[:3]), pb.ShapeError, r"\(7,\) or \(..., 7, p\); got \(3, 3\)"),
        (lambda: gauss(x).solve(b.float()), pb.DtypeError, "b is torch.float32, the kernel torch.float64"),
        (lambda: (Vi(x) - Vj(x[:3])).sqnorm2().solve(b), pb.ShapeError, "must be square"),
        (lambda: gauss(x).solve(b, maxiter=0), pb.ArgumentError, "maxiter must be an int >= 1; got 0"),
        (lambda: gauss(x).solve(b, preconditioner="ilu"), pb.ArgumentError, "None, 'nystrom', 'cholesky'"),
        (lambda: gauss(x).solve(b, rank=0), pb.ArgumentError, "rank must be an int >= 1; got 0"),
        (lambda: (Vi(x) | Vj(x)).solve(b, preconditioner="fourier"), pb.ArgumentError, "function of x - y.*'nystrom'"),
        (
            lambda: (-(Vi(x) - Vj(x)).norm2()).exp().solve(b, preconditioner="fourier"),
            pb.ArgumentError,
            "no short Fourier series",
        ),
        (lambda: (-gauss(x)).solve(b, preconditioner="fourier"), pb.ArgumentError, "a Fourier coefficient is negative"),
        (
            lambda: gauss(x).solve(
                b,
                preconditioner="fourier",
                ranges=cluster.from_matrix(torch.tensor([[0, N]]), torch.tensor([[0, N]]), torch.ones(1, 1).bool()),
            ),
            pb.ArgumentError,
            "'fourier' needs a real kernel of one component",
        ),
        (lambda: gauss(x).solve(b, foo=1), pb.ArgumentError, "unknown argument 'foo'"),
        (lambda: KernelSolve(GAUSS, ALIASES, "c"), pb.ArgumentError, "'c' is not among the aliases"),
        (lambda: KernelSolve(GAUSS, ALIASES, "b", axis=0), pb.ArgumentError, "'b' is another kind"),
        (lambda: KernelSolve("Exp(-SqDist(x,y))*b*b", ALIASES, "b", axis=1), pb.ArgumentError, "linear in"),
        (lambda: KernelSolve(GAUSS, ALIASES, "b", axis=1)(x, x[:3], b[:3], s), pb.ShapeError, "7 rows i and 3 rows j"),
        (lambda: KernelSolve(GAUSS, ALIASES, "b", axis=1)(x, x, b[:, :2], s), pb.ShapeError, "b is Vj"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_alpha_is_a_number():
    x = torch.rand(4, 1)
    for bad in ("1", None, [1.0]):
        with pytest.raises(pb.DtypeError, match="alpha must be a number or a tensor; got"):
            (-Vi(x).sqdist(Vj(x))).exp().solve(x, alpha=bad)
