"""FX graphs as drawn: names, shapes, modules, no_grad regions, and the joint graph of forward and backward."""

from collections import Counter

import networks
import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pullback as pb
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.graphs.trace import fx_graph, joint_graph


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = self.norm(self.first(x)).relu() * self.scale
        with torch.no_grad():
            k = h.sum() * 2
        values, indices = h.max(1)
        return {"y": h * k + h.detach(), "values": values, "indices": indices}


def labels(g, kind="operation"):
    return [n.label for n in g.nodes if n.kind == kind]


def check(g):
    place = {n.id: i for i, n in enumerate(g.nodes)}
    assert len(place) == len(g.nodes)
    assert all(place[e.source] < place[e.target] for e in g.edges)
    assert g.kind == "fx"


@pytest.fixture
def x():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_exported_program(x):
    net = Net()
    program = torch.export.export(net, (x,))
    g = fx_graph(program)
    check(g)
    names = [*dict(net.named_parameters()), *dict(net.named_buffers()), "x"]
    assert sorted(n.id for n in g.nodes if n.kind in ("parameter", "input")) == sorted(names)
    assert g.node("linear").group == ("first",) and g.groups["first",] == "Linear"
    assert str(g.node("linear").values[0]) == "float32(5, 4)"
    assert g.node("batch_norm").details["momentum"] == 0.1
    assert g.node("linear").source.startswith("test_graph_fx.py:")
    cuts = {(e.source, e.target): e.reason for e in g.edges if e.kind == "cut"}
    assert cuts == {("mul", "sum"): "no_grad", ("mul", "detach"): "detach"}
    assert {n.id for n in g.nodes if "no_grad" in n.flags} == {"sum", "mul.1"}
    assert {e.output for e in g.edges if e.source == "max"} == {0, 1}
    assert "getitem" not in labels(g) and len(labels(g, "output")) == 3


def test_symbolic_trace_learns_shapes_from_inputs(x):
    traced = fx.symbolic_trace(Net())
    before = {k: v.clone() for k, v in traced.state_dict().items()}
    metas = [dict(n.meta) for n in traced.graph.nodes]
    assert not fx_graph(traced).node("relu").values
    g = fx_graph(traced, x)
    check(g)
    assert str(g.node("relu").values[0]) == "float32(5, 4)" and g.node("scale").kind == "parameter"
    assert labels(g)[:2] == ["Linear", "BatchNorm1d"]
    assert [len(n.values) for n in g.nodes if n.label == "max"] == [2]
    assert all(torch.equal(v, before[k]) for k, v in traced.state_dict().items())
    assert [dict(n.meta) for n in traced.graph.nodes] == metas
    assert [n.id for n in fx_graph(traced.graph, x).nodes] == [n.id for n in g.nodes]


def test_modules_are_traced_or_exported(x):
    net = networks.mlp(3, 4, 2)
    assert labels(fx_graph(net)) == ["Linear", "Tanh", "Linear"]
    g = fx_graph(net, x.double())
    assert labels(g) == ["linear", "tanh", "linear"] and g.title == "Sequential"
    assert g.node("linear.1").group == ("2",)


def test_integers_cut():
    traced = make_fx(lambda a: (a * 2).argmax() + 1)(torch.ones(3))
    assert [(e.target, e.reason) for e in fx_graph(traced).edges if e.kind == "cut"] == [("argmax", "integer")]


def test_our_operators_keep_their_names():
    A = pb.Smoothing2D((3, 3), dims=(4, 4))
    x = torch.randn(4, 4)
    g = fx_graph(make_fx(lambda x: A.H(A(x)))(x))
    check(g)
    assert len(labels(g, "operator")) == 2 and labels(g, "operator")[0] == A._expression()
    g = joint_graph(lambda x: A(x).sin(), x)
    assert labels(g, "operator") == [A._expression(), f"({A._expression()}).H"]
    f = pb.Genred("Exp(-SqDist(x,y))", ["x=Vi(1)", "y=Vj(1)"], axis=1)
    g = fx_graph(make_fx(lambda x: f(x, x))(torch.ones(3, 1)))
    assert labels(g, "operator")[0].startswith("Sum(Exp(")


def test_joint_graph(x):
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    g = joint_graph(net, (x,))
    check(g)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert list(g.groups) == [("forward",), ("backward",)]
    group = {n.id: n.group[0] for n in g.nodes}
    assert group["addmm"] == "forward" and group["native_batch_norm_backward"] == "backward"
    gradients = [n.label for n in g.nodes if n.label.startswith("gradient of")]
    assert gradients == [f"gradient of {name}" for name, _ in net.named_parameters()]
    assert all(group[name] == "backward" for name in gradients)
    assert {n.label for n in g.nodes if n.label.startswith("tangent")} == {
        "tangent of output[0]",
        "tangent of output[1]",
    }
    assert not any(
        e.source in group and group[e.source] == "backward" and group[e.target] == "forward" for e in g.edges
    )
    used = {e.source for e in g.edges}
    assert all(n.id in used for n in g.nodes if n.kind != "output")


def test_joint_graph_of_functions():
    a, b = torch.ones(3), torch.ones(3)
    g = joint_graph(lambda a, b: a.sin() * b, (a, b))  # nothing requires grad: both
    assert labels(g, "output") == ["output", "gradient of a", "gradient of b"]
    a.requires_grad_()
    g = joint_graph(lambda a, *, b: a.sin() * b, a, {"b": b})
    assert labels(g, "output") == ["output", "gradient of a"]
    unused = joint_graph(lambda a, b: a.exp(), (a, b.requires_grad_()))
    assert labels(unused, "output") == ["output", "gradient of a"]
    assert Counter(n.group[0] for n in g.nodes if n.label in ("sin", "cos")) == {"forward": 1, "backward": 1}
    with pytest.raises(NotDifferentiableError, match="no result of f depends"):
        joint_graph(lambda a: a.detach(), a)


def test_errors():
    with pytest.raises(ArgumentError, match="fx_graph draws a GraphModule"):
        fx_graph(3)
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    assert len(fx_graph(graph).nodes) == 2
    with pytest.raises(ArgumentError, match="pass the GraphModule"):
        fx_graph(graph, torch.ones(2))
