"""The user's functions: graph(...), Graph, make_dot, build_graph."""

import re

import pytest
import torch
from test_graph_drawing import chain, every, nested, texts
from torch import nn

import pullback as pb
from pullback.core.errors import ArgumentError
from pullback.graphs import (
    THEMES,
    Collapse,
    Graph,
    Prune,
    build_graph,
    graph,
    make_dot,
)
from pullback.imaging.xray import XRayTransform

# --- Graph ------------------------------------------------------------------------------------------------------------


def test_apply_leaves_the_graph_alone():
    g = nested().with_theme("dark")
    after = g.apply(Prune("parameter"), lambda data: data)
    assert isinstance(after, Graph)
    assert (len(g.nodes), len(after.nodes), after.theme) == (14, 8, "dark")
    assert g.apply().nodes == g.nodes
    with pytest.raises(ArgumentError, match="takes passes"):
        g.apply("Prune")
    with pytest.raises(ArgumentError, match="returned a NoneType"):
        g.apply(lambda data: None)


def test_notebooks_show_small_graphs_and_the_page_of_large_ones():
    small, large = every()._repr_html_(), chain(100)._repr_html_()
    assert "<svg" in small
    assert "<iframe" not in small
    assert large.startswith('<iframe sandbox="allow-scripts')
    assert not any(hasattr(Graph, name) for name in ("_repr_svg_", "_repr_png_", "_repr_mimebundle_"))


def test_summary():
    text = str(every())
    for line in (
        "parameters: 6 numbers",
        "gradients end at: detach (1), .data (1)",
        "NaN or infinity begins at: f (model.py:3)",
    ):
        assert line in text
    assert "kept for the derivative: 77 B" in text
    assert text.startswith("Graph (forward) of all of it: ")


def test_view_opens_a_file(monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    path = nested().view()
    assert opened == [path.as_uri()]
    assert path.read_text()


# --- graph(...) -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
        self.fc = nn.Linear(2 * 36, 4)

    def forward(self, x, scale=1.0):
        return self.fc(self.body(x).flatten(1)) * scale


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_graph_of_tensors():
    w = torch.ones(3, requires_grad=True)
    g = graph(w.sin() * 2, params={"weight": w})
    assert g.kind == "autograd"
    assert g.node("weight").kind == "leaf"
    assert len(graph([w.sin(), w.cos()]).nodes) == len(graph({"a": w.sin(), "b": w.cos()}).nodes)
    assert any(n.kind == "saved" for n in graph(w.exp() * w, saved=True).nodes)
    assert any(e.norm is not None for e in graph(w.exp(), gradients=True).edges)


def test_graph_of_modules_and_functions():
    net = Net()
    forward = graph(net, X)
    assert (forward.kind, forward.title) == ("forward", "Net")
    backward = graph(net, X, kind="autograd")
    assert backward.kind == "autograd"
    assert any("body" in n.group for n in backward.nodes)
    assert backward.node("fc.weight").kind == "parameter"
    assert graph(torch.sin, X).node("sin")
    assert graph(net, X, scale=3.0).kind == "forward"
    assert graph(lambda: X.sin()).node("sin")
    assert graph(net, X, title="mine").title == "mine"
    assert {n.label for n in graph(net, X, kind="autograd", depth=1).nodes if n.kind == "module"} == {"body", "fc"}
    assert {n.label for n in backward.apply(Collapse("body")).nodes if n.kind == "module"} == {"body"}


def test_graph_of_programs():
    program = torch.fx.symbolic_trace(Net())
    assert graph(program).kind == "fx"
    assert graph(program.graph).kind == "fx"
    assert graph(Net(), kind="fx").kind == "fx"
    assert graph(program, X).kind == "forward"
    assert len(graph(nn.Linear(2, 2), torch.ones(1, 2), kind="joint").nodes) > 5


class Tape:
    def __init__(self, name, *parents):
        self.name, self.parents = name, parents

    def _graph_nodes(self):
        yield (self, self.name, "operation", [(p, "0.5") for p in self.parents], {})
        for p in self.parents:
            yield from p._graph_nodes()


def test_graph_of_objects_that_describe_themselves():
    g = graph(Tape("sin", Tape("x")))
    assert [(e.source, e.target, e.label) for e in g.edges] == [("x", "sin", "0.5")]
    assert len(graph([Tape("a"), Tape("b")]).nodes) == 2


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: graph(Net()), r"give example inputs: pb\.graph\(Net, x\)"),
        (lambda: graph(lambda x: x), r"give example inputs: pb\.graph\(f, x\)"),
        (lambda: graph(torch.sin), "give example inputs"),
        (lambda: graph(Net, X), "is a class; make an instance"),
        (lambda: graph(3), "obj must be a tensor"),
        (lambda: graph("net"), "obj must be a tensor"),
        (lambda: graph(None), "obj must be a tensor"),
        (lambda: graph([]), "must hold tensors only"),
        (lambda: graph([X, 3]), "must hold tensors only"),
        (lambda: graph(X), "require"),
        (lambda: graph(X, X), "a tensor takes no inputs"),
        (lambda: graph(X, kind="forward"), "has an autograd graph only"),
        (lambda: graph(Net(), X, kind="backward"), "kind must be one of autograd"),
        (lambda: graph(Net(), X, saved=True), "saved has no effect.*add kind='autograd'"),
        (lambda: graph(Net(), X, params={}), "params has no effect"),
        (lambda: graph(Tape("x"), gradients=True), "gradients has no effect"),
        (lambda: graph(Net(), X, depth=0), "depth"),
    ],
)
def test_graph_says_what_to_give_instead(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()


# --- peers ------------------------------------------------------------------------------------------------------------


def test_make_dot_like_torchviz(tmp_path):
    net = Net()
    y = net(X).sum()
    dot = make_dot(y, params=dict(net.named_parameters()))
    assert dot.source.startswith("digraph")
    assert "body.0.weight" in dot.source
    assert dot.render(tmp_path / "net", format="svg") == str(tmp_path / "net.svg")
    assert {p.name for p in tmp_path.iterdir()} == {"net", "net.svg"}
    dot.format = "png"
    assert dot.render("clean", directory=tmp_path / "new", cleanup=True) == str(tmp_path / "new" / "clean.png")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clean.png"]
    assert dot.pipe().startswith(b"\x89PNG")
    assert dot.pipe(format="svg", encoding="utf-8").startswith("<?xml")
    assert dot.save(tmp_path / "plain").read_text() == dot.source
    dot.attr(rankdir="LR")
    dot.attr("node", shape="egg")
    dot.graph_attr.update(size="20,20")
    assert all(text in dot.source for text in ('rankdir="LR"', 'shape="egg"', 'size="20,20"'))
    assert 'rankdir="LR"' in dot.with_theme("dark").source
    with pytest.raises(ArgumentError, match="kw must be"):
        dot.attr("nodes", shape="egg")


def test_make_dot_shows_attributes_and_saved_tensors():
    y = Net()(X).sum()
    plain, full = make_dot(y), make_dot(y, show_attrs=True, show_saved=True, max_attr_chars=4)
    assert "stride:" in "".join(texts(full.to_svg()))
    assert "stride:" not in "".join(texts(plain.to_svg()))
    assert any(n.kind == "saved" for n in full.nodes)
    assert not any(n.kind == "saved" for n in plain.nodes)
    y.backward()
    assert make_dot(y, show_saved=True).to_svg()
    with pytest.raises(ArgumentError, match="at least 3"):
        make_dot(y, max_attr_chars=1)


def test_build_graph_like_hiddenlayer(tmp_path):
    g = build_graph(Net(), X)
    names = [n.label for n in g.nodes if n.kind == "operation"]
    assert names == ["ConvBnRelu", "ConvRelu", "Flatten", "Linear", "Mul"]
    g.theme = "blue"
    assert THEMES["blue"].kinds["operation"].fill in g.to_svg()
    assert g.save(tmp_path / "net", format="png").name == "net.png"
    assert g.save(tmp_path / "net").name == "net.pdf"
    assert g.save(tmp_path / "net.svg", format="svg").name == "net.svg"
    assert g.build_dot().source == g.to_dot()
    raw = build_graph(Net(), (X,), input_names=["image"], transforms=[Prune("Relu")], framework_transforms=None)
    assert {"image", "conv2d"} <= {n.label for n in raw.nodes}
    assert "relu" not in {n.label for n in raw.nodes}
    with pytest.raises(ArgumentError, match="give example inputs"):
        build_graph(Net())
    with pytest.raises(ArgumentError, match="list of passes, or 'default'"):
        build_graph(Net(), X, transforms="none")


# --- what users meet --------------------------------------------------------------------------------------------------


def test_parameters_are_blue_and_other_leaves_green_whether_named_or_not():
    w, x = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    for params in (None, {"w": w, "x": x}):
        g = graph((w * x).sum(), params=params)
        assert sorted(n.kind for n in g.nodes if n.kind in ("leaf", "parameter")) == ["leaf", "parameter"]


def test_gradients_that_become_nan_are_red_where_they_begin():
    def f(x):
        return (x * 0).sqrt().sum() + (x**2).sum()

    x = torch.ones(3, requires_grad=True)
    for g, name in ((graph(f, x, gradients=True), "sqrt"), (graph(f(x), gradients=True), "Sqrt")):
        assert [n.label for n in g.nodes if "nan" in n.flags] == [name]
        red = THEMES["basic"].flags["nan"]["border"]
        lines = [line for line in g.to_dot().splitlines() if "->" in line and f'color="{red}"' in line]
        assert {re.search(r'label=" (\w+) "', line).group(1) for line in lines} == {"inf", "nan"}


def test_numbers_that_are_nan_already_are_the_only_origin():
    g = graph(lambda x: (x - 2).log().exp().sum(), torch.ones(3, requires_grad=True), gradients=True)
    assert [n.label for n in g.nodes if "nan" in n.flags] == ["log"]


def test_a_network_with_the_x_ray_transform():
    class Reconstruction(nn.Module):
        def __init__(self):
            super().__init__()
            self.A = XRayTransform((8, 8), torch.linspace(0, 3, 5), 12)
            self.step = nn.Parameter(torch.tensor(0.1))

        def forward(self, y):
            x = self.A.H @ y
            return x - self.step * (self.A.H @ (self.A @ (self.step * x) - y))

    for kind in ("forward", "autograd"):
        g = graph(Reconstruction(), torch.rand(5, 12), kind=kind)
        names = {n.label for n in g.nodes if n.kind == "operator"}
        assert names == {"XRayTransform(8x8 -> 5x12)", "XRayTransform(8x8 -> 5x12).H"}


def test_long_operators_show_their_structure():
    A = pb.Smoothing2D((5, 5), dims=(32, 32))
    B = 2 * A.H @ A + pb.Identity((32, 32))
    x = torch.rand(32, 32, requires_grad=True)
    for g in (graph(B, x), graph(B(x))):
        assert "2 * Smoothing2D.H @ Smoothing2D + Identity" in g.to_dot()
    assert "VStack([Smoothing2D, Identity])" in graph(pb.VStack([A, pb.Identity((32, 32))]), x).to_dot()
    assert "Smoothing2D(32x32, nsmooth" in graph(A, x).node("Smoothing2D").details["operator"]


def test_reductions_show_their_formula():
    k = pb.Genred("Exp(-SqDist(x,y))*b", ["x=Vi(2)", "y=Vj(2)", "b=Vj(1)"], reduction_op="Sum", axis=1)
    x, y, b = torch.rand(5, 2, requires_grad=True), torch.rand(6, 2), torch.rand(6, 1)
    text = graph(k, x, y, b).to_dot()
    assert "<B>Genred</B>" in text and re.search(r"<B>Genred</B>.*>Sum\(Mult\(Exp\(Minus\(.*tooltip", text)


def test_modules_have_the_names_that_the_user_gave_them():
    generator = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    critic = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def losses(z):
        fake = generator(z)
        return critic(fake.detach()).mean(), critic(fake).mean()

    g = graph(losses, torch.rand(3, 2))
    assert {path[0] for path in g.groups} == {"generator", "critic", "critic (2)"}
    assert "<B>critic (2)</B> Sequential" in g.to_dot()
    assert [n.label for n in g.apply(Collapse(1)).nodes if n.kind == "module"] == ["generator", "critic", "critic (2)"]


def test_a_class_that_a_frame_names_is_not_written_twice():
    class Holder:
        net = Net()

    hidden = [Holder()]
    assert "<B>Net</B></FONT>" in graph(lambda x: hidden[0].net(x).sum() * 2, X).to_dot()


def test_data_is_warned_of_once():
    text = graph(lambda x: x.data * 2, torch.ones(2, requires_grad=True)).to_dot()
    node = next(line for line in text.splitlines() if "<B>.data</B>" in line)
    assert "\N{WARNING SIGN}</FONT>" in node


def test_compiled_modules_are_drawn_without_a_warning():
    net = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="aot_eager")
    g = graph(net, torch.ones(2))
    assert [n.label for n in g.nodes if n.kind == "operation"] == ["linear", "relu"]


def test_what_hidden_modules_hold_has_names():
    class Trainer:
        def __init__(self):
            self.net = Net()

        def loss(self, x):
            return self.net(x).square().mean()

    trainer = Trainer()
    hidden = [trainer]
    own, found = graph(trainer.loss, X), graph(lambda x: hidden[0].net(x), X)
    for g, prefix in ((own, "net."), (found, "")):
        names = {n.label for n in g.nodes if n.kind in ("parameter", "input")} - {"x"}
        held = {*dict(trainer.net.named_parameters()), "body.1.running_mean", "body.1.running_var"}
        assert names == {prefix + name for name in held}
    assert ("net", "body") in own.groups and ("Net", "body") in found.groups


def test_mistakes_are_told_at_once():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ArgumentError, match="theme must be one of basic"):
        graph(x * 2, theme="pink")
    with pytest.raises(ArgumentError, match="got the item 'x': int"):
        graph(x * 2, params={"x": 3})


def test_backward_graphs_of_functions_name_what_they_met():
    net = nn.Linear(2, 2)
    g = graph(lambda x: net(x).sum(), torch.ones(2, requires_grad=True), kind="autograd")
    assert {n.label: n.kind for n in g.nodes if n.kind in ("leaf", "parameter")} == {
        "x": "leaf",
        "net.weight": "parameter",
        "net.bias": "parameter",
    }
