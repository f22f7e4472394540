"""The forward graph: every operation once, cuts with their reasons, and a model that is as it was before."""

import functools
import random
import threading
from collections import Counter
from itertools import pairwise

import networks
import numpy as np
import pytest
import torch
from torch import nn

import pullback as pb
from pullback.core.errors import ArgumentError
from pullback.graphs.trace import autograd_graph, forward_graph, module_paths


def vector(n=3, **options):
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64).requires_grad_(options.get("grad", True))


def labels(g, kind="operation"):
    return [n.label for n in g.nodes if n.kind == kind]


def edge(g, source, target):
    found = [e for e in g.edges if (e.source, e.target) == (source, target)]
    assert len(found) == 1, (source, target, [(e.source, e.target) for e in g.edges])
    return found[0]


def connected(g):
    """Whether every output can be reached from something that nothing made."""
    before = g.inputs()
    reached = {n.id for n in g.nodes if not before[n.id] and n.kind not in ("operation", "output")}
    for n in g.nodes:
        if before[n.id] and all(e.source in reached for e in before[n.id]):
            reached.add(n.id)
    return all(n.id in reached for n in g.nodes)


def check(g):
    place = {n.id: i for i, n in enumerate(g.nodes)}
    assert len(place) == len(g.nodes)
    assert all(place[e.source] < place[e.target] for e in g.edges)
    assert connected(g)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y + y.exp()

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y, g * (x + y.exp())


class Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        return g


# What is seen --------------------------------------------------------------------------------------------------------


def test_a_plain_function():
    w = vector()

    def f(x, scale, *, shift):
        return {"loss": ((x * w) * scale + shift).sum(), "count": 3}

    x = vector(grad=False)
    g = forward_graph(f, (x, 2.0), {"shift": x + 1})
    check(g)
    assert [(n.id, n.kind) for n in g.nodes if n.kind in ("input", "leaf", "output")] == [
        ("x", "input"),
        ("w", "leaf"),  # named by the closure
        ("shift", "input"),
        ("output.loss", "output"),
    ]
    assert labels(g) == ["mul", "mul", "add", "sum"]
    assert g.node("mul.1").details["value"] == 2.0
    assert str(g.node("mul").values[0]) == "float64(3)"
    assert g.node("mul").source.startswith("test_graph_forward.py:") and g.node("mul").source.endswith(" in f")
    assert g.title == "f" and g.kind == "forward"


def test_bare_parameters_buffers_and_globals_are_there():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(3, 2))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.register_buffer("b", torch.ones(2))

        def forward(self, x):
            return x @ self.p + self.b * self.frozen

    g = forward_graph(Net(), torch.ones(4, 3))
    assert {n.id: (n.kind, n.group) for n in g.nodes if n.kind not in ("operation", "output")} == {
        "x": ("input", ()),
        "p": ("parameter", ("Net",)),
        "b": ("input", ("Net",)),
        "frozen": ("parameter", ("Net",)),
    }
    assert labels(g) == ["matmul", "mul", "add"]
    check(g)


def test_modules_are_groups_and_second_calls_groups_of_their_own():
    net = networks.BasicBlock(2, 2)
    g = forward_graph(net, torch.randn(1, 2, 4, 4))
    check(g)
    groups = [n.group for n in g.nodes if n.label == "relu"]
    assert groups == [("BasicBlock", "relu"), ("BasicBlock", "relu (2)")]
    assert g.groups["BasicBlock", "conv1"] == "Conv2d" and g.groups["BasicBlock",] == "BasicBlock"
    assert g.node("conv1.weight").group == ("BasicBlock", "conv1")
    conv = g.node("conv2d")
    assert conv.details["padding"] == (1, 1) and conv.details["module"].startswith("Conv2d(2, 2, kernel_size=(3, 3)")
    assert Counter(labels(g)) == {"conv2d": 2, "batch_norm": 2, "relu": 2, "add": 1}


def test_containers_that_are_never_called_have_groups_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    g = forward_graph(Net(), torch.ones(2))
    assert [n.group for n in g.nodes if n.label == "linear"] == [("Net", "steps", "0"), ("Net", "steps", "1")]
    assert g.groups["Net", "steps"] == "ModuleList"


def test_depth_draws_modules_as_nodes():
    net = networks.ResNet18(10)
    x = torch.randn(2, 3, 32, 32)
    g = forward_graph(net, x, depth=1)
    check(g)
    names = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc"
    assert labels(g, "module") == names.split() and labels(g) == ["flatten"]
    assert g.node("layer4").details["module"] == "Sequential"
    assert str(g.node("layer4").values[0]) == "float32(2, 512, 1, 1)"
    assert len(forward_graph(net, x, depth=9).nodes) > len(forward_graph(net, x, depth=2).nodes) > len(g.nodes)
    with pytest.raises(ArgumentError, match="depth of at least 1"):
        forward_graph(net, x, depth=0)


def test_detach_data_and_no_grad_are_cut_edges():
    def f(x):
        a = x.detach() * 2
        b = x.data * 2
        with torch.no_grad():
            c = (x * 3).exp()
        with torch.inference_mode():
            d = x * 4
        return x + a + b + c + d.clone()

    g = forward_graph(f, vector())
    check(g)
    assert {(e.target, e.reason) for e in g.edges if e.kind == "cut"} == {
        ("detach", "detach"),
        (".data", ".data"),
        ("mul.2", "no_grad"),
        ("mul.3", "no_grad"),
    }
    assert g.node(".data").flags == {"unsafe"}
    assert {n.id for n in g.nodes if "no_grad" in n.flags} == {"mul.2", "exp", "mul.3"}
    assert edge(g, "mul.2", "exp").kind == "data"


def test_integers_and_numbers_are_cuts():
    def f(x):
        values, indices = x.max(0)
        mask = x > 1
        chosen = x[x.argsort()]
        return values * float(chosen.sum().detach()), indices, mask, torch.where(mask, x, 0), torch.bernoulli(x * 0)

    g = forward_graph(f, vector())
    check(g)
    cuts = {(e.source, e.target): e.reason for e in g.edges if e.kind == "cut"}
    assert cuts["x", "gt"] == cuts["x", "argsort"] == cuts["max", "output[1]"] == "integer"
    assert ("max", "mul") not in cuts and ("gt", "where") not in cuts
    assert edge(g, "max", "mul").output == 0 and edge(g, "max", "output[1]").output == 1
    assert [n.label for n in g.nodes if not n.values] == ["float"]


def test_user_in_no_grad_sees_no_cuts():
    with torch.no_grad():
        g = forward_graph(lambda x: (x * 2).exp(), vector())
    assert all(e.kind == "data" for e in g.edges) and not any(n.flags for n in g.nodes)


def test_in_place_operations_and_views():
    def f(x):
        h = x * 1
        row = h.view(3, 1)
        h[0] = 5.0
        h += 1
        row.mul_(2)
        return h.sum() + row.relu_().sum()

    g = forward_graph(f, vector())
    check(g)
    assert labels(g) == ["mul", "view", "setitem", "add_", "mul_", "sum", "relu_", "sum", "add"]
    assert [e.source for e in g.inputs()["sum"]] == ["mul_"]  # h was written to through its view
    chain = ["mul", "setitem", "add_", "mul_", "relu_"]
    assert all(edge(g, a, b) for a, b in pairwise(chain))


def test_no_ops_are_not_drawn_and_factories_are_constants():
    def f(x):
        noise = torch.randn_like(x) + torch.zeros(3, dtype=x.dtype)
        return x.contiguous().to(x.dtype) + nn.functional.dropout(x, 0.5, training=False) + noise

    g = forward_graph(f, vector())
    assert labels(g, "constant") == ["randn_like", "zeros"]
    assert labels(g) == ["add", "dropout", "add", "add"]
    check(g)


def test_custom_functions_are_one_node():
    def f(x, y):
        return Outside.apply(Doubled.apply(x * 2, y))

    g = forward_graph(f, (vector(), vector()))
    check(g)
    assert labels(g) == ["mul"] and labels(g, "function") == ["Doubled", "Outside"]
    assert [e.source for e in g.inputs()["Doubled"]] == ["mul", "y"]
    assert edge(g, "Doubled", "Outside") and edge(g, "Outside", "output")
    assert g.node("Doubled").source.endswith(" in f")
    plain = forward_graph(f, (vector(grad=False), vector(grad=False)))
    assert "Doubled" in labels(plain, "function")


def test_transforms_do_not_cut_the_graph():
    w = vector()

    def f(x):
        rows = torch.func.vmap(lambda r: r.sin() * w)(x.reshape(1, 3))
        slope = torch.func.grad(lambda t: (t * t).sum())(x)
        _, pull = torch.func.vjp(torch.exp, x)
        inner = torch.func.vmap(torch.func.grad(lambda t: t.cos()))(x)
        (outer,) = torch.autograd.grad((x * x).sum(), x, create_graph=True)
        return rows, slope, pull(x)[0], inner, outer

    for grad in (True, False):
        x = vector(grad=grad)
        g = forward_graph(f if grad else lambda x: f(x.requires_grad_())[:4], x)
        check(g)
        assert not [n for n in g.nodes if n.label == "tensor"]
        assert all(g.inputs()[n.id] for n in g.nodes if n.kind == "output")
        assert ("vmap",) in g.groups and ("grad",) in g.groups and ("vjp",) in g.groups
    before = vector(grad=False)
    g = forward_graph(lambda t: torch.func.grad(lambda s: (s * s).sum())(t), before)
    assert labels(g, "input") == ["t"] and not [n for n in g.nodes if n.label == "tensor"]


def test_our_operators_appear_by_their_formula():
    A = pb.Smoothing2D((3, 3), dims=(4, 4))
    B = 2 * A.H @ A + pb.Identity((4, 4))
    w = torch.linspace(1, 2, 16, dtype=torch.float64).reshape(4, 4).requires_grad_()
    D = pb.Diagonal(w)

    def f(x):
        return A.H(B @ D(x))

    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    g = forward_graph(f, x, gradients=True)
    check(g)
    found = [n for n in g.nodes if n.kind == "operator"]
    assert [n.label for n in found] == [D._expression(), "2 * Smoothing2D.H @ Smoothing2D + Identity", "Smoothing2D.H"]
    assert not labels(g)
    assert found[1].details["operator"] == repr(B)
    assert any(n.values[0].shape == (4, 4) and n.kind in ("leaf", "parameter") and n.id != "x" for n in g.nodes)
    direct = forward_graph(A, x)
    assert [n.kind for n in direct.nodes] == ["leaf", "operator", "output"]


def test_solvers_and_reductions_are_one_node():
    A = pb.Identity((3,)) * 2.0
    reduction = pb.Genred("Exp(-SqDist(x,y))", ["x=Vi(1)", "y=Vj(1)"], axis=1)

    def f(y):
        x = pb.cg(A, y).x
        return reduction(x[:, None], y[:, None]).sum()

    g = forward_graph(f, vector(), gradients=True)
    check(g)
    assert labels(g, "operator") == ["cg", "Genred"]
    assert g.node("Genred").details["operator"].startswith("Sum(Exp(")


def test_modules_that_leave_torch_are_one_node():
    class Leaves(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.cumsum(x.numpy().copy()))

    g = forward_graph(nn.Sequential(Leaves(), nn.ReLU()), vector(grad=False))
    assert edge(g, "x" if "x" in {n.id for n in g.nodes} else "input", "Leaves")
    assert edge(g, "Leaves", "relu")


def test_shared_weights_are_one_node():
    layer = nn.Linear(3, 3).double()
    g = forward_graph(lambda x: layer(layer(x)) @ layer.weight, vector())
    assert len(g.outputs()["layer.weight"]) == 3 and g.node("layer.weight").group == ()
    assert ("layer",) in g.groups and ("layer (2)",) in g.groups


# What may be passed --------------------------------------------------------------------------------------------------


def test_things_that_can_be_drawn():
    net = networks.mlp(3, 4, 2)
    x = vector()
    for f in (
        net,
        net.forward,
        functools.partial(net),
        lambda x: net(x),
        type("Call", (), {"__call__": lambda s, x: net(x)})(),
    ):
        g = forward_graph(f, [x])
        check(g)
        assert labels(g) == ["linear", "tanh", "linear"]
        assert any(n.id.endswith("0.weight") for n in g.nodes if n.kind == "parameter")
    rows = forward_graph(lambda a: (r + 1 for r in a * 2), x)  # a generator
    check(rows)
    assert Counter(labels(rows)) == {"mul": 1, "unbind": 1, "add": 3} and len(labels(rows, "output")) == 3
    assert labels(forward_graph(lambda a: a.sum().item() * 2, x)) == ["sum", "item"]
    assert labels(forward_graph(lambda: torch.ones(2) * 2)) == ["mul"]
    with pytest.raises(ArgumentError, match="f must be a function or a module; got Tensor"):
        forward_graph(x)
    with pytest.raises(ArgumentError, match="call the model once"):
        forward_graph(nn.LazyLinear(2), x)


def test_odd_tensors():
    z = torch.randn(2, 2, dtype=torch.complex128, requires_grad=True)
    g = forward_graph(lambda z: torch.linalg.solve(z, z.H).real.abs().sum(), z, gradients=True)
    check(g)
    assert ".H" in labels(g) and ".real" in labels(g)
    sparse = torch.eye(3).to_sparse()
    check(forward_graph(lambda s: torch.sparse.mm(s, torch.ones(3, 3)) + s, sparse))
    assert forward_graph(lambda m: m @ m, torch.ones(2, 2, device="meta")).node("matmul").values[0].device == "meta"
    check(forward_graph(lambda x: x * 2, torch.zeros(0)))
    q, r = "output.Q", "output.R"
    g = forward_graph(torch.linalg.qr, torch.eye(2))
    assert {e.output for e in g.edges if e.target in (q, r)} == {0, 1}


class Tagged(torch.Tensor):
    pass


def test_tensor_subclasses_and_compiled_functions():
    g = forward_graph(lambda x: (x * 2).exp(), torch.ones(3).as_subclass(Tagged))
    assert labels(g) == ["mul", "exp"]
    check(g)
    compiled = torch.compile(lambda x: (x * 2).exp(), backend="aot_eager")
    assert labels(forward_graph(lambda x: compiled(x) + 1, torch.ones(3))) == ["mul", "exp", "add"]


# What stays as it was ------------------------------------------------------------------------------------------------


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def everything(net):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    module = torch.nn.modules.module
    return hooks, len(module._global_forward_hooks), len(module._global_forward_pre_hooks), torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(fails):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[1].eval()
    net[1].train()
    net[3].eval()

    def f(x):
        y = net(x)
        net.eval()
        random.random()
        np.random.rand()
        if fails:
            raise KeyError("as it is")
        return y

    before, around = state(net), everything(net)
    random_before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x = torch.randn(5, 3)
    random_before = torch.get_rng_state(), *random_before[1:]
    if fails:
        with pytest.raises(KeyError, match="as it is"):
            forward_graph(f, x)
    else:
        forward_graph(f, x, gradients=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert everything(net) == around
    assert torch.equal(torch.get_rng_state(), random_before[0])
    assert random.getstate() == random_before[1] and np.random.get_state()[1].tolist() == random_before[2]
    assert all(p.grad is None for p in net.parameters())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_the_code_runs_once():
    calls = []

    def f(x):
        calls.append(1)
        return x * 2

    forward_graph(f, vector(), gradients=True)
    assert calls == [1]


def test_other_threads_are_passed_over():
    other = nn.Linear(2, 2)
    mine = nn.Linear(3, 2)

    def f(x):
        thread = threading.Thread(target=lambda: other(torch.ones(2)))
        thread.start()
        thread.join()
        return mine(x)

    g = forward_graph(f, torch.ones(3))
    assert labels(g) == ["linear"] and list(g.groups) == [("mine",)]


# Numbers -------------------------------------------------------------------------------------------------------------


def test_gradients_on_edges():
    x, y = vector(), vector()

    def f(x, y):
        h = x * y
        return h * h + nn.functional.layer_norm(h, (3,)), h.detach()

    g = forward_graph(f, (x, y), gradients=True)
    h = x * y
    first = 2 * h
    total = torch.autograd.grad((h * h + nn.functional.layer_norm(h, (3,))).sum(), [x, y])
    norms = {(e.source, e.target, e.input): e.norm for e in g.edges}
    assert norms["x", "mul", 0] == pytest.approx(total[0].norm().item(), rel=1e-12)
    assert norms["y", "mul", 1] == pytest.approx(total[1].norm().item(), rel=1e-12)
    assert norms["mul", "mul.1", 0] == norms["mul", "mul.1", 1] == pytest.approx(first.norm().item() / 2, rel=1e-12)
    assert norms["add", "output[0]", 0] == pytest.approx(3**0.5)
    assert norms["mul", "detach", 0] is None


def test_gradient_of_an_operation_that_uses_a_tensor_several_times():
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    g = forward_graph(lambda x: torch.nn.functional.hinge_embedding_loss(x, x.detach().sign()), x, gradients=True)
    y = torch.nn.functional.hinge_embedding_loss(x, x.detach().sign())
    (exact,) = torch.autograd.grad(y, x)
    assert edge(g, "x", "hinge_embedding_loss").norm == pytest.approx(exact.norm().item(), rel=1e-12)
    check(forward_graph(attention, (x, x, x), gradients=True))


def test_the_first_nan_is_flagged():
    def f(x):
        bad = (x - 2).log()
        return (bad * 2).sum() + (x * 1e308 * 10).exp().sum()

    g = forward_graph(f, vector(), gradients=True)
    assert [n.id for n in g.nodes if "nan" in n.flags] == ["log", "mul.2"]
    assert not any(n.flags for n in forward_graph(f, vector()).nodes)  # not asked for, not looked at


# The backward graph by modules ---------------------------------------------------------------------------------------


def test_module_paths_group_the_backward_graph():
    net = networks.ResNet18(10)
    before = state(net)
    y, paths = module_paths(net, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    g = autograd_graph(y, net, modules=paths)
    operations = [n for n in g.nodes if n.kind == "operation"]
    assert len(operations) == 70 and all(n.group[0] == "ResNet18" for n in operations)
    assert ("ResNet18", "layer4", "1", "relu (2)") in {n.group for n in operations if n.label == "Relu"}
    assert g.node("layer4.1.conv1.weight").group == ("ResNet18", "layer4", "1", "conv1")
    assert g.groups["ResNet18", "layer4", "1"] == "BasicBlock"
    y.sum().backward()  # the restored buffers do not disturb it
    assert all(p.grad is not None for p in net.parameters())


def test_ten_thousand_operations():
    def f(x):
        for _ in range(10_000):
            x = x + 1
        return x

    g = forward_graph(f, torch.ones(2))
    assert len(g.nodes) == 10_002 and len(g.edges) == 10_001
