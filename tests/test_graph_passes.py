"""Passes: every one keeps a graph a graph; patterns mean what they say."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.core.errors import ArgumentError
from pullback.graphs.model import FLAGS, Edge, GraphData, Node, Value, ordered
from pullback.graphs.passes import (
    Collapse,
    CommonNames,
    Filter,
    Fold,
    FoldDuplicates,
    FoldId,
    Hide,
    Prune,
    PruneBranch,
    Rename,
    matches,
    parse,
    verify,
)
from pullback.graphs.passes.names import common


def value(*shape, dtype="float32"):
    return (Value(shape, dtype, "cpu"),)


def made(text, labels=None, **nodes):
    """A graph from "a-b b-c a-c"; a node is called by its id up to a digit, unless told otherwise."""
    edges, names = [], dict.fromkeys(nodes)
    inputs = {}
    for pair in text.split():
        source, _, target = pair.partition("-")
        names |= {source: None}
        if target:
            names |= {target: None}
            edges.append(Edge(source, target, input=inputs.setdefault(target, 0)))
            inputs[target] += 1
    found = [Node(n, (labels or {}).get(n, n.rstrip("0123456789")), **nodes.get(n, {})) for n in names]
    return GraphData(ordered(found, edges), edges)


def labels(data):
    return [n.label for n in data.nodes]


def pairs(data):
    name = {n.id: n.label for n in data.nodes}
    return sorted({(name[e.source], name[e.target]) for e in data.edges})


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 14))
    kinds = st.sampled_from(["operation"] * 6 + ["leaf", "parameter", "constant", "operator", "saved", "input"])
    nodes = []
    edges = []
    for i in range(size):
        kind = draw(kinds)
        group = tuple(draw(st.lists(st.sampled_from("pqr"), max_size=3)))
        flags = frozenset(draw(st.lists(st.sampled_from(FLAGS), max_size=1)))
        label = draw(st.sampled_from(["conv2d", "relu", "add", "Relu"]))
        nodes.append(
            Node(f"n{i}", label, kind, value(i, 2), group, flags=flags, nbytes=draw(st.integers(0, 9)), count=1 + i % 2)
        )
        if kind not in ("leaf", "parameter", "constant", "input"):
            usable = [n.id for n in nodes[:i] if n.kind != "saved"]  # saved tensors are ends
            for j, source in enumerate(draw(st.lists(st.sampled_from(usable), max_size=3)) if usable else []):
                edges.append(
                    Edge(
                        source,
                        f"n{i}",
                        input=j,
                        kind="saved" if kind == "saved" else draw(st.sampled_from(["data", "data", "cut"])),
                        norm=draw(st.sampled_from([None, 0.0, 2.0, math.inf, math.nan])),
                        rank=draw(st.sampled_from([None, 0, 3])),
                    )
                )
    return GraphData(nodes, edges)


PASSES = [
    Prune("Relu"),
    Prune(lambda n: n.nbytes > 4),
    PruneBranch("conv"),
    Hide("relu"),
    Hide("parameter"),
    Filter("conv, add"),
    Fold("conv > relu", "block"),
    Fold("(conv | relu) > add", "block"),
    Fold("conv > (relu | skip) > add", "block", name="Block"),
    Fold("relu", "__first__"),
    FoldDuplicates(),
    FoldId(r"n(\d)", "digit"),
    FoldId(r"(p)/", "p"),
    Collapse(1),
    Collapse(2),
    Collapse("p.*"),
    Rename("conv(.*)", r"C\1"),
    CommonNames(),
]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(graphs())
def test_every_pass_leaves_a_graph_without_cycles(data):
    before = (list(data.nodes), list(data.edges))
    for one in PASSES:
        after = one(data)
        verify(after)
        assert (data.nodes, data.edges) == before, one
        if not isinstance(one, (Prune, PruneBranch, Hide, Filter)):
            assert after.nbytes == data.nbytes, one
            assert {f for n in after.nodes for f in n.flags} == {f for n in data.nodes for f in n.flags}, one


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_passes_that_reach_a_fixpoint_do_nothing_twice(data):
    for one in (Prune("Relu"), PruneBranch("conv"), Hide("relu"), Filter("conv, add"), FoldDuplicates(), CommonNames()):
        once = one(data)
        twice = one(once)
        assert [replace(n, id="") for n in twice.nodes] == [replace(n, id="") for n in once.nodes], one
        assert len(twice.edges) == len(once.edges), one


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_hiding_keeps_who_depends_on_whom(data):
    def reach(graph):
        below = {}
        for n in graph.nodes:
            below[n.id] = set()
            for e in graph.inputs()[n.id]:
                below[n.id] |= below[e.source] | {e.source}
        return below

    before, after = reach(data), reach(Hide("relu")(data))
    assert all(after[n] == before[n] & after.keys() for n in after)


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_folding_keeps_who_depends_on_whom(data):
    after = Collapse(1)(data)
    assert sum(n.kind == "module" for n in after.nodes) <= sum(bool(n.group) for n in data.nodes) + len(data.nodes)
    kept = {n.id for n in after.nodes if n.kind != "module"}
    for e in data.edges:
        if e.source in kept and e.target in kept:
            assert (e.source, e.target) in {(a.source, a.target) for a in after.edges}


def test_prune_removes_nodes_and_their_edges():
    g = made("x-conv conv-relu relu-y c-relu", c={"kind": "constant"})
    assert pairs(Prune("Constant")(g)) == [("conv", "relu"), ("relu", "y"), ("x", "conv")]
    assert pairs(Prune("relu")(g)) == [("x", "conv")]
    assert labels(Prune("conv > relu")(g)) == ["x", "c", "y"] or set(labels(Prune("conv > relu")(g))) == {"x", "c", "y"}
    assert "x" not in labels(Prune(lambda n: n.id == "x")(g))


def test_prune_branch_takes_what_only_it_used():
    g = made("a-b b-c a-d c-e d-e")
    assert set(labels(PruneBranch("c")(g))) == {"a", "d", "e"}
    assert labels(PruneBranch("e")(g)) == []


def test_hide_bridges():
    g = made("x-drop drop-y drop-z w-drop")
    after = Hide("drop")(g)
    assert pairs(after) == [("w", "y"), ("w", "z"), ("x", "y"), ("x", "z")]
    cut = made("x-drop drop-y")
    cut.edges[0] = replace(cut.edges[0], kind="cut", reason="detach")
    assert [(e.kind, e.reason) for e in Hide("drop")(cut).edges] == [("cut", "detach")]


def test_filter_keeps_and_joins():
    g = made("conv1-bn bn-relu relu-conv2 conv2-linear")
    assert pairs(Filter("conv, linear")(g)) == [("conv", "conv"), ("conv", "linear")]


def test_fold_chain_needs_a_single_user():
    g = made("x-conv1 conv1-bn1 bn1-relu1 relu1-conv2 conv2-bn2 conv2-y bn2-relu2 w-conv1", w={"kind": "parameter"})
    after = Fold("Conv > BN > Relu", "ConvBnRelu")(g)
    assert sorted(labels(after)) == sorted(["x", "w", "ConvBnRelu", "conv", "bn", "relu", "y"])
    assert ("w", "ConvBnRelu") in pairs(after)
    assert ("ConvBnRelu", "conv") in pairs(after)
    assert after.node("ConvBnRelu").details["contains"] == "conv > bn > relu"


def test_fold_adds_up_bytes_and_keeps_what_leaves():
    g = made("x-conv conv-relu relu-y", conv={"nbytes": 3}, relu={"nbytes": 4, "values": value(2, 2)})
    node = Fold("conv > relu", "block")(g).node("block")
    assert (node.nbytes, node.values) == (7, value(2, 2))


def test_parallel_branches_and_skip():
    block = "((conv > relu > conv) | conv) > add > relu"
    down = made("x-conv1 conv1-relu1 relu1-conv2 conv2-add x-conv3 conv3-add add-relu2 relu2-y")
    assert pairs(Fold(block, "Down")(down)) == [("Down", "y"), ("x", "Down")]
    same = made("x-conv1 conv1-relu1 relu1-conv2 conv2-add x-add add-relu2 relu2-y")
    assert Fold(block, "Down")(same).edges == same.edges
    assert pairs(Fold("((conv > relu > conv) | skip) > add > relu", "Same")(same)) == [("Same", "y"), ("x", "Same")]
    assert Fold("(conv | conv) > add", "b")(made("x-conv1 x-conv2 x-relu conv1-add conv2-add")).node("add")


def test_patterns_of_hiddenlayers_tests():
    g = made("a-b b-c b-d c-e d-e")
    for text, number in {
        "a > b": 2,
        "b > c": 0,
        "c | d": 2,
        "a > b > (c | d)": 4,
        "(a > b) > (c | d)": 4,
        "a > b > (c | d) > e": 5,
        "(c | d) > e": 3,
    }.items():
        assert sum(map(len, matches(parse(text), g))) == number, text
    assert sum(map(len, matches(parse("((b > c) | d) > e"), made("a-b b-c a-d c-e d-e")))) == 4


def test_choice_both_and_wildcards():
    g = made("x-conv1 conv1-relu conv1b-relu2 linear-relu3", labels={"conv1b": "conv2d"})
    assert {n.label for m in matches(parse("(conv, linear) > relu"), g) for n in m} == {
        "conv",
        "conv2d",
        "linear",
        "relu",
    }
    g = made("a b", a={"details": {"stride": (2, 2)}}, b={"details": {"stride": (1, 1)}})
    assert [m[0].id for m in matches(parse("* & [stride=2]"), g)] == ["a"]
    assert [m[0].id for m in matches(parse("[stride=2x2]"), g)] == ["a"]
    assert [m[0].id for m in matches(parse("*[stride!=2]"), g)] == ["b"]
    assert [m[0].id for m in matches(parse("'b'"), g)] == ["b"]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("Conv[1x1]", ["c1"]),
        ("Conv[3x3]", ["c3", "cd"]),
        ("Conv[3x3, stride=2]", ["c3"]),
        ("Conv[3]", ["c3", "cd"]),
        ("Conv[out=8]", ["c1"]),
        ("Conv[in=4]", ["c1"]),
        ("Linear[out=10]", ["fc"]),
        ("[shape=1x8x?x6]", ["c1"]),
        ("[shape=*x10]", ["fc"]),
        ("[dtype=float64]", ["c3"]),
        ("[kind=operator]", ["op"]),
        ("operator", ["op"]),
        ("[group=layer1*]", ["c3", "cd"]),
        ("[nbytes>1e6]", ["fc"]),
        ("[nbytes<=5][nbytes>=5]", ["op"]),
        ("[flag=nan]", ["op"]),
        ("[count=3]", ["op"]),
        ("conv[kernel!=1x1]", ["c3", "cd"]),
        ("Conv[unheard=3]", []),
    ],
)
def test_conditions_are_applied(text, ids):
    w1 = Node("w1", "w1", "parameter", value(8, 4, 1, 1))
    nodes = [
        w1,
        Node("c1", "Convolution", values=value(1, 8, 6, 6)),
        Node("c3", "conv2d", values=value(1, 2, dtype="float64"), group=("layer1", "0"), details={"stride": "(2, 2)"}),
        Node("cd", "aten.convolution.default", group=("layer1",), details={"kernel_size": (3, 3), "stride": 1}),
        Node("fc", "Addmm", values=value(2, 10), nbytes=2_000_000),
        Node("op", "A", "operator", nbytes=5, flags=frozenset({"nan"}), count=3),
    ]
    nodes[2].details["kernel_size"] = (3, 3)
    g = GraphData(nodes, [Edge("w1", "c1", input=1)])
    assert [m[0].id for m in matches(parse(text), g)] == ids


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "expected a name"),
        ("Conv >", "at its end"),
        ("Conv > > Relu", "expected a name"),
        ("(Conv", r"expected '\)'"),
        ("Conv)", "expected the end"),
        ("A > B | C", "need parentheses"),
        ("A | B > C", "need parentheses"),
        ("Conv[3x]", "conditions are"),
        ("Conv[out>many]", "compares numbers"),
        ("Conv $", r"cannot read '\$'"),
        ("skip", "skip is a branch"),
        ("A > skip", "skip is a branch"),
        ("A | skip | skip", "one skip"),
        ("(A > B) & C", "one node"),
        (7, "must be text"),
    ],
)
def test_what_is_no_pattern_is_refused(text, words):
    with pytest.raises(ArgumentError, match=words):
        parse(text)


def test_fold_keeps_first_and_later_folds_find_it_by_op():
    g = made("a-b b-c c-d")
    assert labels(Fold("b > c", "__first__")(g)) == ["a", "b", "d"]
    named = Fold("b > c", "BC", name="Both")(g)
    assert labels(named) == ["a", "Both", "d"]
    assert labels(Fold("a > BC", "ABC")(named)) == ["ABC", "d"]


def test_fold_duplicates_counts():
    g = made("x-relu1 relu1-relu2 relu2-relu3 relu3-y", relu1={"count": 2})
    after = FoldDuplicates()(g)
    assert labels(after) == ["x", "relu", "y"]
    assert after.node("relu").count == 4
    assert len(FoldDuplicates()(made("x-relu1 relu1-relu2 relu1-y")).nodes) == 4


def test_rename():
    g = made("w-conv2d conv2d-relu", labels={"conv2d": "conv2d"}, w={"kind": "parameter"})
    assert labels(Rename(op=r"conv(\d)d", to=r"C\1")(g)) == ["w", "C2", "relu"]
    assert labels(Rename(r"^w$", "x")(g)) == ["w", "conv2d", "relu"]
    assert labels(Rename(name=r"^w$", to="weight")(g)) == ["weight", "conv2d", "relu"]
    for bad in ({}, {"op": "a"}, {"op": "a", "name": "b", "to": "c"}):
        with pytest.raises(ArgumentError, match="Rename needs"):
            Rename(**bad)
    with pytest.raises(ArgumentError, match="no regular expression"):
        Rename("(", "x")


def test_fold_id():
    g = made("a1-a2 a2-b1 b1-b2 b2-c")
    assert labels(FoldId(r"([ab])\d", "group")(g)) == ["group", "group", "c"]
    nodes = [replace(n, group=("layer1", "0")) if n.id != "c" else n for n in g.nodes]
    assert labels(FoldId(r"(layer\d)/", "layer")(g.replaced(nodes, g.edges))) == ["layer", "c"]
    with pytest.raises(ArgumentError, match="needs a group"):
        FoldId("abc", "x")


def module(name, *path, **fields):
    return Node(name, name.rstrip("0123456789"), group=path, **fields)


def test_collapse_takes_parameters_and_divides_calls():
    nodes = [
        Node("x", "x", "input"),
        Node("w", "l.w", "parameter", value(3, 4), ("l",)),
        Node("b", "b", "parameter", value(4)),
        Node("shared", "s", "parameter", value(5)),
        module("mm1", "l", nbytes=3),
        module("relu1"),
        module("mm2", "l", nbytes=4, values=value(7)),
        Node("y", "y", "output"),
    ]
    edges = [Edge("x", "mm1"), Edge("w", "mm1", input=1), Edge("mm1", "relu1"), Edge("relu1", "mm2")]
    edges += [Edge("w", "mm2", input=1), Edge("b", "mm2", input=2), Edge("mm2", "y")]
    edges += [Edge("shared", "relu1", input=1), Edge("shared", "mm1", input=2)]
    g = GraphData(nodes, edges, groups={("l",): "Linear"})
    after = Collapse(1)(g)
    verify(after)
    assert labels(after) == ["x", "s", "l", "relu", "l", "y"]
    first, second = (n for n in after.nodes if n.kind == "module")
    assert first.details == {"module": "Linear", "contains": "mm", "parameters": 12}
    assert second.details == {"module": "Linear", "contains": "mm", "parameters": 4}
    assert second.values == value(7)
    assert (first.id, second.id, after.nbytes) == ("l", "l#2", 7)


def test_collapse_by_path():
    g = GraphData([module("a", "p", "q"), module("b", "p", "r"), module("c", "s")], [Edge("a", "b"), Edge("b", "c")])
    assert labels(Collapse("p")(g)) == ["p", "c"]
    assert labels(Collapse("p.*")(g)) == ["p.q", "p.r", "c"]
    assert labels(Collapse(2)(g)) == ["p.q", "p.r", "s"]
    for bad in (0, -1, True, None, 1.5):
        with pytest.raises(ArgumentError, match="depth of at least 1"):
            Collapse(bad)


def test_modules_that_wait_for_each_other_are_divided_or_left():
    nodes = [module("a1", "p"), module("b1", "q"), module("b2", "q"), module("a2", "p")]
    g = GraphData(nodes, [Edge("a1", "b1"), Edge("b2", "a2")])
    after = Collapse(1)(g)
    verify(after)
    assert len(after.nodes) >= 3
    alternating = [module(f"n{i}", "pq"[i % 2]) for i in range(30)]
    g = GraphData(alternating, [Edge(f"n{i}", f"n{i + 1}") for i in range(29)])
    after = Collapse(1)(g)
    verify(after)
    assert len(after.nodes) == 30


def test_common_names_of_all_tracers():
    same = {
        "conv": ["conv2d", "Conv2d", "Convolution", "ConvolutionBackward0", "aten.convolution.default", "conv"],
        "batchnorm": ["batch_norm", "NativeBatchNorm", "BatchNorm2d", "BatchNormalization", "bn"],
        "relu": ["relu", "relu_", "ReLU", "ReluBackward0", "aten.relu.default", "torch.relu"],
        "linear": ["linear", "Addmm", "Gemm", "aten.addmm.default"],
        "add": ["add", "add_", "__add__", "Add", "__iadd__"],
        "maxpool": ["max_pool2d", "MaxPool2DWithIndices", "MaxPool2d", "aten.max_pool2d_with_indices.default"],
        "log1p": ["log1p", "Log1P"],
    }
    for name, forms in same.items():
        assert {common(form) for form in forms} == {name}
    assert labels(CommonNames()(made("conv2d-batch_norm", labels={"conv2d": "conv2d"}))) == [
        "Conv",
        "BatchNormalization",
    ]


@pytest.mark.slow
def test_ten_thousand_nodes_without_recursion():
    n = 10_000
    nodes = [Node(f"n{i}", ("conv", "relu", "add")[i % 3], group=(f"l{i // 100}",), nbytes=1) for i in range(n)]
    edges = [Edge(f"n{i}", f"n{i + 1}") for i in range(n - 1)]
    edges += [Edge(f"n{i}", f"n{i + 3}", input=1) for i in range(2, n - 3, 3)]
    g = GraphData(nodes, edges)
    for one in (*PASSES, Fold("((conv > relu) | skip) > add", "block")):
        verify(one(g))
    assert len(Fold("conv > relu", "block")(g).nodes) < 0.7 * n
    assert len(Collapse(1)(g).nodes) == 100


@pytest.mark.parametrize("wrong", ["id", "source", "target", "kind", "order", "flag"])
def test_verify_sees_what_is_wrong(wrong):
    nodes, edges = [Node("a", "a"), Node("b", "b")], [Edge("a", "b")]
    if wrong == "id":
        nodes[1] = Node("a", "b")
    elif wrong == "kind":
        nodes[0] = Node("a", "a", "thing")
    elif wrong == "flag":
        nodes[0] = Node("a", "a", flags=frozenset({"odd"}))
    elif wrong == "order":
        edges = [Edge("b", "a")]
    else:
        edges = [replace(edges[0], **{wrong: "c"})]
    with pytest.raises(AssertionError):
        verify(GraphData(nodes, edges))


def test_signs_in_another_meaning_are_explained():
    with pytest.raises(ArgumentError, match=r"write Conv2d \| Relu for parallel branches, Conv2d, Relu for one or"):
        Fold("(Conv2d & Relu) > Add", "X")
    Fold("Conv & conv2d & [1x1]", "X")
    for one in (Prune, PruneBranch, Hide, Filter):
        with pytest.raises(ArgumentError, match=r"one or the other write 'Dropout, Identity'"):
            one("Dropout | Identity")
    assert [n.label for n in Prune("x > (Dropout | Relu)")(made("x-dropout x-relu dropout-add relu-add")).nodes] == [
        "add"
    ]
