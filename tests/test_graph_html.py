"""The interactive page as text: complete, closed to the outside, and safe against any label."""

import json
import re
from itertools import pairwise

import pytest

from pullback.core.errors import ArgumentError
from pullback.graphs import html
from pullback.graphs.html import to_html
from pullback.graphs.model import Edge, GraphData, Node, Value
from pullback.graphs.themes import THEMES


class Builder:
    """Makes graphs such as tracers make."""

    def __init__(self):
        self.nodes, self.edges, self.groups = [], [], {}

    def add(self, label, group=(), *sources, shape=(1, 64), **attributes):
        node = Node(
            f"n{len(self.nodes)}", label, group=tuple(group), values=(Value(shape, "float32", "cpu"),), **attributes
        )
        self.nodes.append(node)
        self.edges += [Edge(source, node.id, input=i) for i, source in enumerate(sources)]
        return node.id

    def layer(self, label, group, x, type_, shape, parameters=("weight",), **attributes):
        self.groups[tuple(group)] = type_
        held = [self.add(".".join((*group, name)), group, kind="parameter", shape=shape) for name in parameters]
        return self.add(label, group, x, *held, shape=shape, **attributes)

    def data(self, title, kind="forward"):
        return GraphData(self.nodes, self.edges, kind=kind, title=title, groups=self.groups)


def resnet_like():
    b = Builder()
    norm = ("weight", "bias")
    x = b.add("x", shape=(1, 3, 224, 224), kind="input")
    x = b.layer("conv2d", ("conv1",), x, "Conv2d", (1, 64, 112, 112), nbytes=602112, details={"stride": (2, 2)})
    x = b.layer("batch_norm", ("bn1",), x, "BatchNorm2d", (1, 64, 112, 112), norm, nbytes=3211776)
    x = b.add("relu", ("relu",), x, shape=(1, 64, 112, 112))
    x = b.add("max_pool2d", ("maxpool",), x, shape=(1, 64, 56, 56))
    for i in range(1, 5):
        b.groups[(f"layer{i}",)] = "Sequential"
        for j in range(2):
            g, shape = (f"layer{i}", str(j)), (1, 32 * 2**i, 112 // 2**i, 112 // 2**i)
            b.groups[g] = "BasicBlock"
            skip = x
            for k in (1, 2):
                x = b.layer("conv2d", (*g, f"conv{k}"), x, "Conv2d", shape, nbytes=802816)
                x = b.layer("batch_norm", (*g, f"bn{k}"), x, "BatchNorm2d", shape, norm, nbytes=802816)
                if k == 1:
                    x = b.add("relu", (*g, "relu"), x, shape=shape)
            if i > 1 and j == 0:
                b.groups[(*g, "downsample")] = "Sequential"
                skip = b.layer("conv2d", (*g, "downsample", "0"), skip, "Conv2d", shape)
                skip = b.layer("batch_norm", (*g, "downsample", "1"), skip, "BatchNorm2d", shape, norm)
            x = b.add("add", g, x, skip, shape=shape)
            x = b.add("relu", (*g, "relu"), x, shape=shape)
    x = b.add("adaptive_avg_pool2d", ("avgpool",), x, shape=(1, 512, 1, 1))
    x = b.add("flatten", (), x, shape=(1, 512))
    x = b.layer("linear", ("fc",), x, "Linear", (1, 1000), ("weight", "bias"))
    b.add("logits", (), x, kind="output", shape=(1, 1000))
    return b.data("ResNet18")


def transformer_like(layers=24):
    b = Builder()
    shape = (1, 128, 512)
    x = b.layer("embedding", ("embed",), b.add("tokens", kind="input", shape=(1, 128)), "Embedding", shape)
    mask = b.add("mask", kind="constant", shape=(128, 128))
    for i in range(layers):
        g = ("layers", str(i))
        b.groups[g[:1]], b.groups[g] = "ModuleList", "Block"
        y = b.layer("layer_norm", (*g, "norm1"), x, "LayerNorm", shape, ("weight", "bias"))
        a = (*g, "attention")
        b.groups[a] = "Attention"
        heads = []
        for name in ("query", "key", "value"):
            z = b.layer("linear", (*a, name), y, "Linear", shape, ("weight", "bias"))
            for op in ("view", "transpose", "contiguous"):
                z = b.add(op, a, z, shape=(1, 8, 128, 64))
            heads.append(z)
        q, k, v = heads
        z = b.add("mul", a, b.add("matmul", a, q, b.add("transpose", a, k)), b.add("scale", a, kind="constant"))
        z = b.add("softmax", a, b.add("masked_fill", a, z, mask))
        z = b.add("matmul", a, b.add("dropout", (*a, "drop"), z), v)
        for op in ("transpose", "contiguous", "view"):
            z = b.add(op, a, z)
        z = b.layer("linear", (*a, "out"), z, "Linear", shape, ("weight", "bias"))
        x = b.add("add", g, x, b.add("dropout", (*g, "drop1"), z))
        y = b.layer("layer_norm", (*g, "norm2"), x, "LayerNorm", shape, ("weight", "bias"))
        f = (*g, "feedforward")
        b.groups[f] = "Sequential"
        for name in ("0", "2", "4"):
            y = b.layer("linear", (*f, name), y, "Linear", shape, ("weight", "bias"))
            for op in ("mul", "pow", "add", "tanh", "add", "mul"):
                y = b.add(op, f, y, shape=shape)
        for op in (
            "view",
            "dropout",
            "view",
            "mul",
            "clamp",
            "neg",
            "abs",
            "sqrt",
            "exp",
            "log",
            "sin",
            "cos",
            "sub",
            "neg",
            "abs",
            "neg",
        ):
            y = b.add(op, g, y, shape=shape)
        x = b.add("add", g, x, y, shape=shape)
    b.add("output", (), x, kind="output", shape=shape)
    return b.data("transformer")


def chain(n=3000):
    b = Builder()
    x = b.add("x", kind="leaf")
    for i in range(n - 1):
        x = b.add("sin" if i % 2 else "exp", (), x)
    return b.data("chain", "autograd")


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "a\"b'c&d`${x}\\",
    "日本語 \U0001f600 é",
    "\u2028\u2029\x00\x07",
    "\ud83d alone",
    "]]>",
    "@@data@@",
    "%s {0} \\u003c",
    "",
    " ",
    "x" * 500,
]


def hostile():
    nodes = [
        Node(f"{i}{text}", text, group=(text, "in"), details={text: text}, source=text, values=(Value((), text, text),))
        for i, text in enumerate(HOSTILE)
    ]
    nodes += [Node(f"second {i}", text, group=(text, "in")) for i, text in enumerate(HOSTILE)]
    edges = [Edge(a.id, b.id, label=b.label, reason=a.label, kind="cut") for a, b in pairwise(nodes)]
    return GraphData(nodes, edges, title=HOSTILE[0], groups={(text, "in"): text for text in HOSTILE})


def special():
    """Every kind, flag and kind of edge."""
    b = Builder()
    x = b.add("x", kind="leaf")
    w = b.add("w", ("net",), kind="parameter", shape=(64, 64))
    y = b.add("linear", ("net",), x, w, nbytes=4096, source="model.py:12 in forward")
    d = b.add("sqrt", ("net",), y, flags=frozenset({"nan"}))
    c = b.add("unbind", (), d)
    b.nodes[-1] = Node(c, "unbind", values=(Value((3,), "float32", "cpu"), Value((3,), "float32", "cuda:0")))
    s = b.add("result", (), kind="saved")
    u = b.add("mul", (), flags=frozenset({"unsafe"}))
    f = b.add("Clamp", (), u, kind="function", flags=frozenset({"no_grad"}))
    p = b.add("Fourier(64)", (), f, kind="operator", flags=frozenset({"freed"}))
    o = b.add("loss", (), p, kind="output")
    q = b.add("accumulate", (), o, kind="accumulate")
    k = b.add("2.0", (), kind="constant", count=3)
    b.edges = [Edge(e.source, e.target, norm=10.0 ** -len(e.target), rank=0) for e in b.edges]
    b.edges += [
        Edge(c, u, output=1, kind="cut", reason=".data", norm=0.0),
        Edge(c, f, kind="cut", reason="detach", input=1),
        Edge(d, s, kind="saved", norm=float("nan")),
        Edge(k, o, rank=1, norm=float("inf")),
        Edge(x, q, rank=2, norm=3.0),
    ]
    return b.data("special", "autograd")


def embedded(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(text)


def restored(page):
    graph = embedded(page)
    graph["nodes"] = [html._NODE_DEFAULTS | row for row in graph["nodes"]]
    graph["edges"] = [html._EDGE_DEFAULTS | row for row in graph["edges"]]
    return graph


@pytest.mark.parametrize("make", [resnet_like, hostile, lambda: GraphData([], []), lambda: chain(5)])
def test_page_holds_the_whole_graph(make):
    data = make()
    assert restored(to_html(data)) == data.to_json()


def test_numbers_that_json_cannot_hold_arrive_as_words():
    norms = [row.get("norm") for row in embedded(to_html(special()))["edges"]]
    assert {"nan", "inf", 0.0, 3.0} <= set(norms)


@pytest.mark.parametrize("make", [resnet_like, hostile, special])
def test_page_loads_nothing(make):
    page = to_html(make())
    assert "://" not in page.replace(json.dumps("://"), "")
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b", page)
    assert not re.search(
        r"\bsrc=|\beval\(|new Function|\bimport\(|@import|url\((?!#)(?!\$)", re.sub(r'id="data">.*?</script>', "", page)
    )
    assert "default-src 'none'" in page
    assert "@@" not in page.replace("@@data@@", "") and "MIT" not in page.split("<body>")[0]
    assert "Permission is hereby granted" in page


def test_labels_cannot_leave_their_place():
    page = to_html(hostile())
    assert page.isascii()
    assert page.count("<script") == 4 and page.count("</script>") == 4
    assert "alert(1)</script>" not in page
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt;</h1>" in page


def test_title_of_the_caller_wins():
    assert "<title>Mine &amp; yours</title>" in to_html(chain(3), title="Mine & yours")
    assert "<title>chain</title>" in to_html(chain(3))
    assert "<title>Fx graph</title>" in to_html(GraphData([], [], kind="fx"))


@pytest.mark.parametrize("name", sorted(THEMES))
def test_theme_gives_the_colours(name):
    page, theme = to_html(special(), name), THEMES[name]
    for kind, style in theme.kinds.items():
        assert re.search(rf"\.kind-{kind}{{--fill:{style.fill};--border:{style.border};--text:{style.text};", page)
    assert f'data-theme="{dict(basic="auto", dark="dark").get(name, "light")}"' in page


def test_styles_of_the_user():
    page = to_html(special(), styles={"parameter": {"fill": "#123456"}, "nan": {"border": "#654321"}})
    assert ".kind-parameter{--fill:#123456" in page and "--flag-border:#654321" in page
    assert 'data-theme="light"' in page
    with pytest.raises(ArgumentError, match="fill must be a colour"):
        to_html(special(), styles={"parameter": {"fill": "red;}</style><script>"}})
    with pytest.raises(ArgumentError, match="theme must be one of"):
        to_html(special(), "nosuch")


def test_pages_are_small():
    data = resnet_like()
    page = to_html(data)
    assert len(page) < 250_000
    big = transformer_like()
    assert len(big.nodes) >= 2000
    assert len(to_html(big)) < 900_000
