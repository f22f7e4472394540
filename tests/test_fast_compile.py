"""Sums within a tolerance inside torch.compile and under the transforms of torch.func: fast there too, and right."""

import pytest
import torch

import pullback as pb
from pullback.kernels import fast
from pullback.kernels.fast import choose

TOLERANCE = 1e-6
N = 400
GAUSSIAN = ("Exp(-SqDist(x, y) * p) * b", ["x = Vi(2)", "y = Vj(2)", "b = Vj(2)", "p = Pm(1)"])
EXACT = pb.Genred(*GAUSSIAN, axis=1)
FAST = pb.Genred(*GAUSSIAN, axis=1, tolerance=TOLERANCE)


@pytest.fixture(autouse=True)
def _fast_even_if_small(monkeypatch):
    monkeypatch.setattr(choose, "FEW", 0.0)
    torch._dynamo.reset()


def data(*batch):
    generator = torch.Generator().manual_seed(1)
    shapes = ((N, 2), (N + 50, 2), (*batch, N + 50, 2))
    points = [torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [*points, torch.tensor([3.0], dtype=torch.float64)]


def close(got, want):
    assert float((got - want).norm() / want.norm()) < TOLERANCE


def run(function, *args):
    """The result, after a check that no sum in it was exact."""
    with fast.watch() as done:
        y = function(*args)
    assert done and {info.method for info in done} <= {"fourier", "tree"}
    return y


def lazy(x, y, b, p, tolerance):
    return (-pb.Pm(p) * pb.Vi(x).sqdist(pb.Vj(y))).exp().with_tolerance(tolerance) @ b


CALLS = {
    "Genred": lambda t: lambda *a: EXACT(*a, tolerance=t),
    "product": lambda t: lambda x, y, b, p: lazy(x, y, b, p, t),
    "sum": lambda t: (
        lambda x, y, b, p: (-pb.Pm(p) * pb.Vi(x).sqdist(pb.Vj(y))).exp().sum(1, tolerance=t) * b[: len(x), :1]
    ),
    "logsumexp": lambda t: lambda x, y, b, p: (-pb.Pm(p) * pb.Vi(x).sqdist(pb.Vj(y))).logsumexp(1, tolerance=t),
}


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Genred", pytest.param("product", marks=pytest.mark.slow), "logsumexp"])
def test_compiled(name):
    args = data()
    close(run(compiled(CALLS[name](TOLERANCE)), *args), CALLS[name](None)(*args))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_compiled(name):
    """The gradient in every tensor, of a compiled function and compiled as a function of its own."""
    args = [t.requires_grad_() for t in data()]
    weights = torch.linspace(1, 2, N, dtype=torch.float64)[:, None]
    used = args if name != "logsumexp" else [args[0], args[1], args[3]]
    want = torch.autograd.grad((CALLS[name](None)(*args) * weights).sum(), used)
    call = compiled(CALLS[name](TOLERANCE))
    got = run(lambda: torch.autograd.grad((call(*args) * weights).sum(), used))
    for g, w in zip(got, want, strict=True):
        close(g, w)
    loss = lambda *a: (CALLS[name](TOLERANCE)(*a) * weights).sum()  # noqa: E731
    plain = [t.detach() for t in args]
    (g,) = run(compiled(torch.func.grad(loss, argnums=(0,))), *plain)
    close(g, want[0])


def test_vmap_over_right_hand_sides():
    """One plan, many vectors: the points are read once."""
    x, y, b, p = data(5)
    want = torch.stack([EXACT(x, y, v, p) for v in b])
    close(run(torch.func.vmap(lambda v: FAST(x, y, v, p)), b), want)


def test_jvp():
    args = data()
    tangents = [torch.ones_like(args[0]), torch.sin(args[1]), torch.cos(args[2]), args[3] / 2]
    want = torch.func.jvp(EXACT, tuple(args), tuple(tangents))
    got = run(torch.func.jvp, FAST, tuple(args), tuple(tangents))
    for g, w in zip(got, want, strict=True):
        close(g, w)


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [None, TOLERANCE])
def test_transforms_inside_compiled(tolerance):
    """The program of a derivative is made while torch traces, and its constants are folded all the same."""
    x, y, b, p = data(3)
    number = 2 if tolerance else 3  # a formula of which nothing is known yet
    f = pb.Genred(f"Exp(-SqDist(x, y) * p / IntCst({number})) * b", GAUSSIAN[1], axis=1, tolerance=tolerance)

    def tangent(x, y, b, p):
        return torch.func.jvp(lambda x: f(x, y, b, p), (x,), (torch.cos(x),))[1]

    def products(x, y, b, p):
        return torch.func.vmap(lambda v: f(x, y, v, p))(b)

    got = compiled(tangent)(x, y, b[0], p), compiled(products)(x, y, b, p)
    p = p / number
    close(got[0], torch.func.jvp(lambda x: EXACT(x, y, b[0], p), (x,), (torch.cos(x),))[1])
    close(got[1], torch.stack([EXACT(x, y, v, p) for v in b]))


@pytest.mark.slow
def test_operators_and_solvers_inside_compiled():
    x, _, b, _ = data()
    b = b[:N]
    K = (-pb.Vi(x).sqdist(pb.Vj(x))).exp()
    op = K.with_tolerance(TOLERANCE).operator()
    close(run(compiled(lambda v: op(v)), b[:, 0]), K.operator()(b[:, 0]))
    solve = pb.KernelSolve("Exp(-SqDist(x, y)) * v", ["x = Vi(2)", "y = Vj(2)", "v = Vj(2)"], "v", axis=1)
    got = run(compiled(lambda x, b: solve(x, x, b, alpha=5.0, eps=1e-8, tolerance=1e-9)), x, b)
    close(got, solve(x, x, b, alpha=5.0, eps=1e-8))


def test_second_derivatives():
    x, y, b, p = data()
    x.requires_grad_()

    def twice(f):
        (g,) = torch.autograd.grad(f(x, y, b, p).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert float((run(twice, FAST) - twice(EXACT)).norm() / twice(EXACT).norm()) < 20 * TOLERANCE
