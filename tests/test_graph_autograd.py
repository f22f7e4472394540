"""The graph of autograd as drawn: every node that is there, and numbers that agree with autograd's own."""

import gc
from collections import Counter
from dataclasses import dataclass

import networks
import pytest
import torch

import pullback as pb
from pullback.core import nodes
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.graphs.trace import autograd_graph, described_graph


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


@dataclass
class Step:
    key: object


@dataclass
class Way:
    nodes: list


@pytest.fixture
def leaves():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]


def kinds(g):
    return Counter(n.kind for n in g.nodes)


def sources(g, name):
    return [e.source for e in g.inputs()[name]]


def is_forward(g):
    place = {n.id: i for i, n in enumerate(g.nodes)}
    return all(place[e.source] < place[e.target] for e in g.edges)


def check(g):
    assert len({n.id for n in g.nodes}) == len(g.nodes)
    assert is_forward(g)


def test_resnet18_has_all_that_torchviz_draws():
    net = networks.ResNet18()
    assert sum(p.numel() for p in net.parameters()) == 11_689_512
    y = net(torch.randn(1, 3, 224, 224))
    g = autograd_graph(y, dict(net.named_parameters()))
    check(g)
    assert kinds(g) == {"parameter": 62, "accumulate": 62, "operation": 70, "output": 1}
    assert (len(g.nodes), len(g.edges)) == (195, 202)
    assert {n.id for n in g.nodes if n.kind == "parameter"} == {name for name, _ in net.named_parameters()}
    assert g.node("conv1.weight").values[0].shape == (64, 3, 7, 7)
    assert g.node("Convolution").values[0].shape == (1, 64, 112, 112)
    assert g.node("Convolution").details["stride"] == (2, 2)
    for params in (net, net.named_parameters(), list(net.named_parameters())):
        assert [n.id for n in autograd_graph(y, params).nodes] == [n.id for n in g.nodes]


def test_every_value_tells_shape_dtype_and_device(leaves):
    a, b = leaves
    g = autograd_graph((a @ b).float().sum(), {"a": a, "b": b})
    assert [str(n.values[0]) for n in g.nodes if n.kind == "operation"] == [
        "float64(3, 3)",
        "float32(3, 3)",
        "float32()",
    ]
    assert g.node("a").values[0].device == "cpu"


def test_nested_outputs_and_those_without_gradient(leaves):
    a, b = leaves
    g = autograd_graph({"loss": (a * b).sum(), "parts": [a.exp(), a.argmax(), a.detach()], "n": 3})
    outputs = {n.id: n for n in g.nodes if n.kind == "output"}
    assert list(outputs) == ["output.loss", "output.parts[0]", "output.parts[1]", "output.parts[2]"]
    alone = outputs["output.parts[1]"]
    assert alone.flags == {"no_grad"} and "int64 has no gradient" in alone.details["reason"]
    assert not g.inputs()["output.parts[2]"] and g.inputs()["output.parts[0]"]
    assert kinds(autograd_graph(t for t in (a, a * b)))["output"] == 2  # a generator; a leaf as output
    check(g)


def test_errors_name_the_reason(leaves):
    a, _ = leaves
    with pytest.raises(ArgumentError, match=r"no output requires grad.*under no_grad"):
        autograd_graph(a.detach())
    with pytest.raises(ArgumentError, match="int64 has no gradient"):
        autograd_graph([a.argmax()])
    with pytest.raises(ArgumentError, match="must hold a tensor; got str"):
        autograd_graph("loss")
    with pytest.raises(ArgumentError, match=r"params=dict\(net.named_parameters"):
        autograd_graph(a * 2, params=[a])
    with pytest.raises(ArgumentError, match="grad_outputs must hold one tensor for each"):
        autograd_graph(a * 2, gradients=True, grad_outputs=torch.ones(2))


def test_multi_output_nodes_keep_the_index(leaves):
    q, r = torch.linalg.qr(leaves[0])
    g = autograd_graph([q.sum(), r.sum()])
    used = {(e.source, e.output) for e in g.edges if e.source.startswith("LinalgQr")}
    assert used == {("LinalgQr", 0), ("LinalgQr", 1)}
    assert len(g.node("LinalgQr").values) == 2


def test_custom_functions_and_our_operators(leaves):
    A = pb.Smoothing2D((3, 3), dims=(3, 3))
    B = A.H @ A + pb.Identity((3, 3))
    g = autograd_graph(B(Twice.apply(leaves[0])).sum())
    assert g.node("Twice").kind == "function"
    made = g.node("Smoothing2D.H @ Smoothing2D + Identity")
    assert B._expression() in made.details["operator"]
    assert made.kind == "operator" and made.details["operator"] == repr(B)
    x = torch.randn(4, 2, requires_grad=True)
    f = pb.Genred("Exp(-SqDist(x,y))", ["x=Vi(2)", "y=Vj(2)"], axis=1)
    reduction = [n for n in autograd_graph(f(x, x)).nodes if n.kind == "operator"]
    assert len(reduction) == 1 and reduction[0].label.startswith("Sum(Exp(")


def test_names_of_other_tensors_stand_at_what_made_them(leaves):
    a, b = leaves
    h = a * b
    assert autograd_graph(h.sum(), {"a": a, "h": h}).node("Mul").details["result"] == "h"


def test_double_backward(leaves):
    a, _ = leaves
    (g1,) = torch.autograd.grad((a.sin() * a**3).sum(), a, create_graph=True)
    g = autograd_graph(g1, {"x": a})
    check(g)
    assert kinds(g)["leaf"] == 1 and "Cos" in {n.label for n in g.nodes}
    expected = len(nodes.topological([g1.grad_fn])) + 2  # the leaf and the output
    assert len(g.nodes) == expected


def test_saved_memory_is_counted_once(leaves):
    a, b = leaves
    h = a * b  # keeps a and b, which are leaves: free
    y = (h.exp() * h.view(9).view(3, 3)).sum()  # exp keeps its result, mul keeps it too, and h through a view
    g = autograd_graph(y, {"a": a, "b": b})
    assert g.nbytes == 2 * 9 * 8
    assert g.node("Exp").nbytes == 72 and g.node("Mul").nbytes == 0
    drawn = autograd_graph(y, {"a": a, "b": b}, saved=True)
    check(drawn)
    assert drawn.nbytes == g.nbytes
    assert kinds(drawn)["saved"] == 2
    links = {(e.source, e.target, e.label) for e in drawn.edges if e.kind == "saved"}
    assert {("a", "Mul", "self"), ("b", "Mul", "other")} <= links  # the leaves themselves
    square = autograd_graph((h * h).sum(), saved=True)
    assert kinds(square)["saved"] == 1


def test_buffers_of_a_module_are_not_memory():
    net = torch.nn.BatchNorm1d(4)
    y = net(torch.randn(8, 4, requires_grad=True))
    assert autograd_graph(y, dict(net.named_parameters())).nbytes - autograd_graph(y, net).nbytes == 2 * 4 * 4


def test_freed_graphs_are_drawn(leaves):
    a, b = leaves
    y = Twice.apply(a * b).exp().sum()
    y.backward()
    g = autograd_graph(y, saved=True)
    assert {n.label for n in g.nodes if "freed" in n.flags} == {"Mul", "Twice", "Exp"}
    assert g.nbytes == 0
    with pytest.raises(NotDifferentiableError, match="retain_graph=True"):
        autograd_graph(y, gradients=True)
    h = torch.nn.functional.layer_norm(a, (3,)) * 1  # saves no weight, which is not the same as freed
    assert not any(n.flags for n in autograd_graph(h).nodes)


def test_packed_tensors_are_left_packed(leaves):
    def refuse(_):
        raise AssertionError("unpacked")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: "elsewhere", refuse):
        y = leaves[0].exp().sum()
    g = autograd_graph(y, saved=True)
    assert g.nbytes == 0 and not any(n.flags for n in g.nodes)


def test_gradients_on_edges(leaves):
    a, b = leaves
    h = a.exp()
    y = h @ b
    g = autograd_graph({"y": y}, {"a": a, "b": b}, gradients=True)
    assert all(e.norm is not None for e in g.edges)
    assert a.grad is None and b.grad is None
    exact = torch.autograd.grad(y.sum(), [h, a, b], retain_graph=True)
    norm = {(e.source, e.target): e.norm for e in g.edges}
    assert norm["Exp", "Mm"] == pytest.approx(exact[0].norm().item(), rel=1e-12)
    assert norm["a", "a.grad"] == norm["a.grad", "Exp"] == pytest.approx(exact[1].norm().item(), rel=1e-12)
    assert norm["b", "b.grad"] == pytest.approx(exact[2].norm().item(), rel=1e-12)
    assert norm["Mm", "output.y"] == 3.0
    twice = autograd_graph(y, {"a": a}, gradients=True, grad_outputs=2 * torch.ones_like(y))
    assert twice.inputs()["a.grad"][0].norm == pytest.approx(2 * norm["a", "a.grad"], rel=1e-12)


def test_gradients_leave_no_trace(leaves):
    a, _ = leaves
    calls = []
    a.register_post_accumulate_grad_hook(lambda t: calls.append("accumulated"))
    y = a.exp().sum()
    autograd_graph(y, gradients=True)
    assert calls == [] and a.grad is None
    y.backward()
    assert calls == ["accumulated"] and torch.equal(a.grad, a.exp())


def test_gradients_of_broadcast_complex_and_reused(leaves):
    a, _ = leaves
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    y = (a * z * z).sum()
    g = autograd_graph([y, a.sum()], {"a": a, "z": z}, gradients=True)
    exact = torch.autograd.grad([y, a.sum()], [a, z], [torch.ones_like(y), torch.ones((), dtype=torch.float64)])
    assert g.inputs()["a.grad"][0].norm == pytest.approx(exact[0].norm().item(), rel=1e-12)
    assert g.inputs()["z.grad"][0].norm == pytest.approx(exact[1].norm().item(), rel=1e-12)


def test_nan_origin(leaves):
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    y = ((x * 2).sqrt() * 0).sum()  # the gradient of sqrt at 0 is inf, times 0 is nan
    g = autograd_graph(y, gradients=True)
    assert [n.label for n in g.nodes if "nan" in n.flags] == ["Sqrt"]


def test_paths_get_ranks(leaves):
    a, b = leaves
    h = a * a
    y = (h * b).sum()
    sum_, mul, square = y.grad_fn, y.grad_fn.next_functions[0][0], h.grad_fn
    collect = square.next_functions[0][0]
    ways = [Way([Step(n) for n in (sum_, mul, square, collect)]) for _ in range(2)]
    ways.append(Way([Step(nodes.root(b)[0]), Step(mul), Step(sum_), Step("unknown")]))
    g = autograd_graph(y, {"a": a, "b": b}, paths=ways)
    ranks = {(e.source, e.target, e.input): e.rank for e in g.edges}
    assert ranks["a.grad", "Mul", 0] == 0 and ranks["a.grad", "Mul", 1] == 1  # both factors of a * a
    assert ranks["Mul", "Mul.1", 0] == 0 and ranks["b.grad", "Mul.1", 1] == 2
    assert ranks["a", "a.grad", 0] == 0 and ranks["Sum", "output", 0] == 0 and ranks["b", "b.grad", 0] == 2


def test_views_and_in_place(leaves):
    h = leaves[0] * 1
    h.view(9)[2:].mul_(3)
    g = autograd_graph(h[0])
    check(g)
    assert "CopySlices" in {n.label for n in g.nodes}
    assert g.node("output").details["view of"] == "float64(3, 3)"


def test_source_lines_under_anomaly_mode(leaves):
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=False):
        y = leaves[0].exp()
    assert autograd_graph(y).node("Exp").source.startswith("test_graph_autograd.py:")


def test_odd_tensors():
    m = torch.randn(2, 2, device="meta", requires_grad=True)
    assert autograd_graph((m @ m).sum()).node("Mm").values[0].device == "meta"
    with pytest.raises(ArgumentError, match="meta device"):
        autograd_graph(m.sum(), gradients=True)
    sparse = torch.eye(3, dtype=torch.float64).to_sparse().requires_grad_()
    g = autograd_graph(torch.sparse.mm(sparse, torch.ones(3, 2, dtype=torch.float64)), saved=True, gradients=True)
    assert g.inputs()["leaf.grad"][0].norm == pytest.approx(12**0.5)
    empty = torch.zeros(0, requires_grad=True)
    assert autograd_graph(empty * 2, gradients=True).edges[-1].norm == 0.0
    scalar = torch.tensor(2.0, requires_grad=True)
    assert len(autograd_graph(scalar).nodes) == 3  # leaf, accumulate, output


@pytest.mark.slow
def test_ten_thousand_nodes_without_recursion():
    x = torch.ones(2, requires_grad=True)
    y = x
    for _ in range(10_000):
        y = y + 1
    g = autograd_graph(y, gradients=True)
    assert len(g.nodes) == 10_003 and g.edges[0].norm == pytest.approx(2**0.5)


def test_the_graph_keeps_nothing_alive(leaves):
    y = leaves[0].exp()
    g = autograd_graph(y.sum(), saved=True, gradients=True)
    storage = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
    del y
    gc.collect()
    assert storage.expired() and g.nodes


class Tape:
    def __init__(self, entries):
        self._entries = entries

    def _graph_nodes(self):
        yield from self._entries


def test_objects_that_describe_themselves():
    entries = [
        ("z", "x * y", "output", [("x", "3"), ("y", "2")], {"value": 6}),
        {"key": "x", "label": "x", "kind": "leaf", "parents": []},
        ("y", "y", "leaf", []),
    ]
    g = described_graph(Tape(entries), paths=[Way([Step("z"), Step("y")])])
    check(g)
    assert [(e.source, e.label, e.rank) for e in g.edges] == [("x", "3", None), ("y", "2", 0)]
    assert g.node("x * y").details == {"value": 6}
    assert len(described_graph([Tape(entries), Tape(entries)]).nodes) == 3
    with pytest.raises(ArgumentError, match="never described"):
        described_graph(Tape(entries[:1]))
    with pytest.raises(ArgumentError, match="has the kind 'red'"):
        described_graph(Tape([("a", "a", "red", [])]))
    with pytest.raises(ArgumentError, match="needs a method _graph_nodes"):
        described_graph(3)
    with pytest.raises(ArgumentError, match="got 2 items"):
        described_graph(Tape([("a", "b")]))
