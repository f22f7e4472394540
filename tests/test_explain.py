import itertools
import math
import random
import sys

import pytest
import torch

import pullback as pb
from pullback.autodiff.explain import explain
from pullback.autodiff.explanation import size
from pullback.autodiff.paths import Edge, Paths
from pullback.autodiff.scalar import Scalar
from pullback.autodiff.scalar_functions import exp, sin
from pullback.core import nodes
from pullback.core.errors import ArgumentError, NotDifferentiableError

D = torch.float64


def blog(x1, x2):
    return (1 + sin(x2)) / (x2 + exp(x1)) + x1 * x2


def leaf(*values, dtype=D):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype, requires_grad=True)


def check(y, x, grad_output=None, **kwargs):
    """All paths sum to what autograd says; the graph is as before."""
    hooks = {n: len(n._input_metadata) for n in nodes.topological([nodes.root(y)[0]])}
    e = explain(y, x, grad_output=grad_output, **kwargs)
    (expected,) = torch.autograd.grad(y, x, grad_output, retain_graph=True)
    torch.testing.assert_close(e.total, expected, rtol=1e-12, atol=1e-14)
    assert e.complete and e.exact_order and len(e.paths) == e.count == len(list(e))
    torch.testing.assert_close(sum(p.contribution for p in e.paths), expected, rtol=1e-12, atol=1e-13)
    sizes = [size(p.contribution) for p in e.paths]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(p.share for p in e.paths) == pytest.approx(1)
    assert e.cancellation == pytest.approx(sum(sizes) / size(expected))
    assert all(len(p.nodes) == len(p.factors) + 1 for p in e.paths)
    assert hooks and all(max(map(len, line.split("\n"))) <= 110 for line in repr(e).split("\n"))
    return e


# The blog -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalars", "tensors"])
def test_the_paths_of_the_blog(kind):
    x1, x2 = (Scalar(1.5, "x1"), Scalar(0.5, "x2")) if kind == "scalars" else (leaf(1.5), leaf(0.5))
    y = blog(x1, x2)
    e = explain(y, x2, params=None if kind == "scalars" else {"x2": x2})
    assert [float(p.contribution) for p in e.paths] == pytest.approx([1.5, 0.176161649, -0.059612849], abs=1e-9)
    assert float(e.total) == pytest.approx(1.6165488003791766, rel=1e-15)
    assert (e.count, e.complete, e.exact_order) == (3, True, True)
    for p in e:
        assert math.prod(p.factors) == pytest.approx(float(p.contribution))
    labels = [[n.label for n in p.nodes] for p in e.paths]
    if kind == "scalars":
        assert labels == [["+", "*", "x2"], ["+", "/", "+", "sin", "x2"], ["+", "/", "+", "x2"]]
        assert e.paths[0].nodes[0].key is y and e.paths[0].nodes[-1].key is x2
    else:
        assert labels == [["Add", "Mul", "x2"], ["Add", "Div", "Add", "Sin", "x2"], ["Add", "Div", "Add", "x2"]]
        assert e.paths[0].nodes[0].key is y.grad_fn and e.paths[0].nodes[-1].key is nodes.root(x2)[0]
    assert e.cancellation == pytest.approx((1.5 + 0.176161649 + 0.059612849) / 1.6165488)
    other = explain(y, x1)
    assert [float(p.contribution) for p in other] == pytest.approx([0.5, -0.267166253], abs=1e-9)
    assert float(other.total) == pytest.approx(0.2328337, abs=1e-7)


def test_the_printed_table():
    y = blog(Scalar(1.5, "x1"), x2 := Scalar(0.5, "x2"))
    assert repr(explain(y, x2)).splitlines() == [
        "d ((1 + sin(x2)) / (x2 + exp(x1)) + x1 * x2) / d x2 = 1.6165488003791766",
        "3 paths, all shown; sum of |contributions| = 1.074 |total|, so paths cancel",
        "#  path                      factors                   contribution    share",
        "1  + -> * -> x2              1 * 1.5                            1.5   92.8 %",
        "2  + -> / -> + -> sin -> x2  1 * 0.2007 * 1 * 0.8776    0.176161649   10.9 %",
        "3  + -> / -> + -> x2         1 * -0.05961 * 1         -0.0596128487   -3.7 %",
        "   sum of all paths                                       1.6165488  100.0 %",
    ]
    short = explain(y, x2, top=1)
    assert "3 paths, 1 largest listed" in repr(short) and "2 more" in repr(short) and not short.complete
    assert len(list(short)) == 3
    assert explain(y, x2, top=0).paths == ()
    html = explain(y, x2)._repr_html_()
    assert html.count("<tr>") == 5 and "+ -&gt; * -&gt; x2" in html


# The engine ---------------------------------------------------------------------------------------------------------


def random_dag(seed, n=9):
    draw = random.Random(seed)
    heads = {k: [draw.choice([None, *range(k + 1, n)]) for _ in range(draw.randrange(4))] for k in range(n - 1)}
    return heads | {n - 1: []}, draw


@pytest.mark.parametrize("seed", range(40))
def test_paths_against_brute_force(seed):
    heads, draw = random_dag(seed)
    paths = Paths(0, 8, heads.__getitem__)

    def walk(v):
        if v == 8:
            return [[]]
        return [[Edge(v, i, h), *rest] for i, h in enumerate(heads[v]) if h is not None for rest in walk(h)]

    expected = walk(0)
    assert paths.count == len(expected)
    assert sorted(paths.every()) == sorted(expected)
    factor = {
        Edge(v, i, h): draw.choice([0.0, 0.5, -1.0, 2.0, 3.0]) for v in heads for i, h in enumerate(heads[v]) if h
    }
    gain = lambda e: math.log(abs(factor[e])) if factor[e] else -math.inf  # noqa: E731
    found = list(paths.largest_first(gain))
    assert sorted(found) == sorted(expected)
    sizes = [abs(math.prod(factor[e] for e in p)) for p in found]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(sizes))


def test_source_is_target_and_unreachable():
    assert list(Paths(0, 0, lambda v: []).every()) == [[]]
    assert list(Paths(0, 0, lambda v: []).largest_first(lambda e: 0.0)) == [[]]
    assert Paths(0, 1, lambda v: []).count == 0 and list(Paths(0, 1, lambda v: []).every()) == []
    x = Scalar(2.0, "x")
    assert explain(x, x).total == 1.0 and explain(x, x).count == 1
    t = leaf(2.0)
    assert explain(t, t).total == 1.0 and "x" in repr(explain(t, t))


@pytest.mark.parametrize("factor", [1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("kind", ["scalars", "tensors", "vectors"])
def test_exponentially_many_paths(kind, factor):
    x = {"scalars": Scalar(1.0, "x"), "tensors": leaf(1.0), "vectors": leaf(1.0, 2.0)}[kind]
    y = x
    for _ in range(40):
        y = factor * y + y * factor
    y = y.sum() if kind == "vectors" else y
    e = explain(y, x, top=3)  # not 2^40 steps
    text = repr(e)
    assert e.count == 2**40 and len(e.paths) == 3 and not e.complete
    assert float(torch.as_tensor(e.total).max()) == pytest.approx((2 * factor) ** 40)
    for p in itertools.islice(e, 50):
        assert float(torch.as_tensor(p.contribution).max()) == pytest.approx(factor**40)
    assert e.exact_order == (kind != "vectors") and ("heuristic order" in text) == (kind == "vectors")
    if kind != "vectors":
        assert e.cancellation == pytest.approx(1)


@pytest.mark.slow
def test_long_chains():
    x = t = leaf(0.5)
    for _ in range(3000):
        t = t + 0.1 * t.sin()
    e = explain(t, x, top=2)
    assert e.count == 2**3000 and len(e.paths[0].nodes) == 3001
    torch.testing.assert_close(e.total, torch.autograd.grad(t, x)[0], rtol=1e-10, atol=0)
    assert max(map(len, repr(e).splitlines())) <= 110
    s = y = Scalar(0.5, "s")
    for _ in range(5000):
        y = sin(y)
    assert len(explain(y, s).paths[0].nodes) == 5001


def test_heuristic_order_finds_large_paths(monkeypatch):
    gen = torch.Generator().manual_seed(1)
    w = [torch.randn(6, 6, dtype=D, generator=gen) / 3 for _ in range(8)]
    x = torch.randn(6, dtype=D, generator=gen).requires_grad_()
    h = x
    for m in w:
        h = h + torch.tanh(h @ m)
    y = h.square().sum()
    exact = explain(y, x, top=5)
    assert exact.exact_order and exact.count == 256
    monkeypatch.setattr(sys.modules["pullback.autodiff.explain"], "_WORK", 0)
    guess = explain(y, x, top=5)
    assert not guess.exact_order and guess.count == 256
    assert torch.equal(guess.total, exact.total)
    assert size(guess.paths[0].contribution) >= 0.5 * size(exact.paths[0].contribution)
    torch.testing.assert_close(sum(p.contribution for p in guess), guess.total, rtol=1e-12, atol=1e-13)


# Tensors ------------------------------------------------------------------------------------------------------------


def test_graphs_of_tensors():
    a, b = torch.randn(3, 4, dtype=D, requires_grad=True), torch.randn(4, dtype=D, requires_grad=True)
    c = leaf(1.3)
    h = torch.tanh(a * b + c) + c
    y = (h.square() @ b).sum() + h.mean()
    for x in (a, b, c, h):
        check(y, x)
    e = check(torch.sub(h, h, alpha=3).sum(), a)  # two edges between the same nodes, of different derivatives
    assert torch.allclose(e.paths[0].contribution, -3 * e.paths[1].contribution)
    check(h, b, grad_output=torch.randn_like(h))
    check(y, b, params={"weight": b, "hidden": h})
    assert all(any(n.label == "hidden" for n in p.nodes) for p in explain(y, c, params={"hidden": h}))
    e = explain(y, {"a": a, "c": c}, top=1)
    assert [one.x for one in e] == ["a", "c"] and repr(e).count("sum of all paths") == 2
    assert [one.x for one in explain(y, [a, c], params=[("alpha", a)])] == ["alpha", "x[1]"]
    assert "<table>" in e._repr_html_()


def test_nodes_with_several_results():
    a = torch.randn(4, 3, dtype=D, requires_grad=True)
    q, r = torch.linalg.qr(a)
    e = check((q.sin().sum() + r.exp().sum()), a)
    assert {n.label for p in e.paths for n in p.nodes} >= {"LinalgQr[0]", "LinalgQr[1]"}
    check(sum((k + 1) * row.square().sum() for k, row in enumerate(a.unbind())), a)
    check(sum((part**k).sum() for k, part in enumerate(a.split(2), 1)), a)
    check(q[0, 0] * r[0, 0], r)


def test_views_and_writing_in_place():
    a = torch.randn(5, dtype=D, requires_grad=True)
    b = a * 2
    b[1:3] *= a[2:4]
    b.sin_()
    check(b.sum(), a)
    check((a.view(5, 1).expand(5, 3).T.reshape(-1)[::2]).square().sum(), a)


def test_complex_tensors():
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    r = leaf(0.5)
    y = (z * r + z.exp()).abs().sum() + (z.real * r).sum()
    check(y, z)
    check(y, r)
    w = torch.view_as_complex(torch.stack([r, r * r]))
    check((w * w).abs() + w.imag, r)
    check(z * 2, z, grad_output=torch.randn_like(z))


class Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, x, text, y, constant):
        ctx.scale = scale
        ctx.save_for_backward(x, y)
        return scale * x * y, x - y

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return None, ctx.scale * g * y + h, None, ctx.scale * g * x - h, None


class Lazy(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 2, x * 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, h):
        return (0 if g is None else 2 * g) + (0 if h is None else 3 * h)


def test_custom_functions():
    x, y = torch.randn(3, dtype=D, requires_grad=True), torch.randn(3, dtype=D, requires_grad=True)
    u, v = Affine.apply(3.0, x, "text", y, torch.ones(3))
    e = check((u * v).sum(), y)
    assert {n.label for p in e.paths for n in p.nodes} >= {"Affine[0]", "Affine[1]"}
    check((u * v).sum(), x)
    u, v = Lazy.apply(x)
    check(v.sum() * 2, x)
    check((u * v).sum(), x)


def test_our_operators_and_solvers():
    A = pb.Smoothing2D((3, 3), dims=(6, 6))
    x = torch.randn(6, 6, dtype=D, requires_grad=True)
    e = check((A(x) * x).sum() + A.H(x).square().sum(), x)
    assert any("Smoothing2D" in n.label for p in e.paths for n in p.nodes)
    d = torch.rand(4, dtype=D).add(1).requires_grad_()
    b = torch.randn(4, dtype=D, requires_grad=True)
    check(pb.cg(pb.Diagonal(d), b * 2, rtol=1e-13).x.square().sum(), b)
    points = torch.randn(5, 2, dtype=D, requires_grad=True)
    K = (-((pb.Vi(points) - pb.Vj(points)) ** 2).sum(-1)).exp()
    check((K @ points).square().sum(), points)


def test_broadcasting_dtypes_and_sparse_gradients():
    a, b = leaf(1.0, 2.0), leaf(3.0, dtype=torch.float32)
    check((a * b).sum() + (a.float() * b).sum().double(), b)
    check((a * b).sum() + (a.float() * b).sum().double(), a)
    table = torch.randn(5, 2, dtype=D, requires_grad=True)
    y = torch.nn.functional.embedding(torch.tensor([1, 1, 3]), table, sparse=True).square().sum()
    e = explain(y, table)
    assert torch.equal(e.total, torch.autograd.grad(y, table)[0].to_dense())


def test_empty_tensors_and_zero_gradients():
    a = torch.zeros(0, dtype=D, requires_grad=True)
    assert explain(a.sin().sum(), a).total.shape == (0,)
    x = leaf(0.0)
    e = explain(x * x, x)
    assert e.total == 0 and e.count == 2 and math.isinf(e.cancellation) and "2 paths" in repr(e)
    n = leaf(-1.0)
    assert "nan" in repr(explain(n.log() * n.sqrt(), n))


def test_infinite_factors_come_first():
    x = Scalar(0.0, "x")
    e = explain(x * 5 + x**0.5, x)
    assert e.paths[0].contribution == math.inf and e.paths[1].contribution == 5


def test_tensor_valued_scalars():
    a, b = Scalar(torch.randn(4, dtype=D), "a"), Scalar(0.7, "b")
    y = sin(a * b) * a + exp(b)
    for x in (a, b):
        e = explain(y, x)
        assert e.complete and e.exact_order
        torch.testing.assert_close(sum(p.contribution for p in e), y.grad(x) + torch.zeros(4, dtype=D))
    z = Scalar(1 + 2j, "z")
    e = explain(z * z + sin(z), z)
    assert sum(p.contribution for p in e) == pytest.approx(e.total) and "z" in repr(e)


def test_the_graph_and_grad_are_not_touched():
    w = torch.randn(3, dtype=D, requires_grad=True)
    calls = []
    h = (w * w).sin()
    h.register_hook(lambda g: calls.append(g))
    y = h.sum()
    explain(y, w)
    assert w.grad is None and not calls
    y.backward()
    assert len(calls) == 1
    torch.testing.assert_close(w.grad, 2 * w.detach() * (w * w).cos().detach())


def test_checkpoints():
    x = torch.randn(3, dtype=D, requires_grad=True)
    f = lambda t: t.sin() * t  # noqa: E731
    check(torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).sum(), x)
    y = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=True).sum()
    with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
        explain(y, x)
    assert x.grad is None


def test_the_graph_of_a_gradient():
    x = leaf(0.7)
    (g,) = torch.autograd.grad(x.sin() * x**3, x, create_graph=True)
    check(g, x)


def test_errors():
    x, w, q = leaf(1.0, 2.0), leaf(3.0), leaf(1.0)
    y = (x.sin() * w).sum()
    with pytest.raises(ArgumentError, match="y does not depend on q"):
        explain(y, q, params={"q": q})
    with pytest.raises(
        ArgumentError, match=r"grad_output of its shape; got a tensor of shape \(2,\).*explain\(y.sum\(\), x\)"
    ):
        explain(x * w, x)
    with pytest.raises(ArgumentError, match=r"shape of y, \(2,\); got \(3,\)"):
        explain(x * w, x, grad_output=torch.ones(3))
    with pytest.raises(ArgumentError, match="y must require grad"):
        explain(y.detach(), x)
    with pytest.raises(ArgumentError, match="x must require grad"):
        explain(y, x.detach())
    with pytest.raises(ArgumentError, match=r"dict\(net.named_parameters\(\)\)"):
        explain(y, torch.nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match="y must be a Scalar or a tensor with a graph; got float"):
        explain(1.0, x)
    with pytest.raises(ArgumentError, match="x must be a Scalar like y; got Tensor"):
        explain(Scalar(1.0), x)
    with pytest.raises(ArgumentError, match="y does not depend on q"):
        explain(Scalar(1.0), Scalar(2.0, "q"))
    with pytest.raises(ArgumentError, match="grad_output is for tensors"):
        explain(Scalar(1.0), Scalar(2.0, "q"), grad_output=torch.ones(1))
    with pytest.raises(ArgumentError, match="top must be a number of paths"):
        explain(y, x, top=-1)
    with pytest.raises(ArgumentError, match="params must be a dict of names"):
        explain(y, x, params=3)
    y.backward()
    with pytest.raises(NotDifferentiableError, match=r"ask before backward\(\), or call backward\(retain_graph=True\)"):
        explain(y, x)
