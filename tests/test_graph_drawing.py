"""Drawings: valid text for any label, pictures of every kind, themes, files, notebooks, peers' functions."""

import json
import re
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pullback.graphs.render as rendering
from pullback.core.errors import ArgumentError
from pullback.graphs import (
    THEMES,
    Edge,
    Graph,
    GraphData,
    Node,
    Value,
)
from pullback.graphs.dot import to_dot
from pullback.graphs.model import EDGE_KINDS, FLAGS, KINDS
from pullback.graphs.render import MissingPackageError, render, resolution
from pullback.graphs.strokes import tooltip
from pullback.graphs.text import memory
from pullback.graphs.themes import theme_of

ODD = [
    'a "b"',
    "<b>&amp;</b>",
    "back\\slash \\n \\N",
    "line\nend\t",
    "é 漢 ∂ 🙂",
    "",
    "\x00\x07",
    "]];}",
    "-->",
    "a" * 300,
]


def value(*shape):
    return (Value(shape, "float32", "cpu"),)


def every():
    """A graph with a node of every kind and flag, and edges of every kind."""
    nodes = [Node(kind, kind, kind, value(2, 3), nbytes=7) for kind in KINDS]
    nodes += [Node(f"flag {f}", "f", flags=frozenset({f}), source="model.py:3") for f in FLAGS]
    nodes += [Node("many", "split", values=value(1) * 5, count=3)]
    edges = [Edge("leaf", "output", kind=kind, reason="detach" if kind == "cut" else "") for kind in EDGE_KINDS]
    edges += [Edge("leaf", "operation", rank=r, norm=10.0**r, label="-0.5") for r in range(4)]
    edges += [Edge("many", "output", output=2), Edge("input", "operation", kind="cut", reason=".data")]
    return Graph(nodes, edges, title="all of it")


def nested():
    nodes = [Node("x", "x", "input")]
    for i in range(6):
        nodes.append(Node(f"w{i}", f"net.{i // 3}.w{i}", "parameter", value(3), ("net", str(i // 3))))
        nodes.append(Node(f"n{i}", "mm", group=("net", str(i // 3)), nbytes=i))
    nodes.append(Node("y", "y"))
    edges = [Edge("x", "n0"), Edge("n5", "y")] + [Edge(f"n{i}", f"n{i + 1}") for i in range(5)]
    edges += [Edge(f"w{i}", f"n{i}", input=1) for i in range(6)]
    groups = {("net",): "Sequential", ("net", "0"): "Block"}
    return Graph(nodes, edges, groups=groups)


def chain(n):
    nodes = [Node(f"n{i}", "sin", values=value(3, 4)) for i in range(n)]
    return Graph(nodes, [Edge(f"n{i}", f"n{i + 1}") for i in range(n - 1)])


def texts(svg):
    return ["".join(t.itertext()) for t in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_svg_shows_every_label():
    shown = texts(every().to_svg())
    for word in (*KINDS, "split", " ×3", "float32(2, 3)", "saves 7 B", "and 2 more", "all of it"):
        assert any(word in t for t in shown), word
    for word in ("detach", "result 2", "⚠ .data", "NaN"):
        assert any(word in t for t in shown), word


@pytest.mark.parametrize("odd", ODD)
def test_any_text_is_drawn(odd):
    g = Graph([Node(odd, odd, details={odd: odd}, source=odd), Node("b", "b")], [Edge(odd, "b", label=odd)], title=odd)
    for kind in ("parameter", "module"):
        g.nodes[0] = replace(g.nodes[0], kind=kind, group=(odd, "b"))
        svg = g.to_svg(details=10)
        ET.fromstring(svg)
    visible = odd.strip()
    if visible and visible.isprintable() and len(visible) < 30:
        assert any(" ".join(visible.split()) in t for t in texts(svg))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_random_text_is_drawn(label, fact):
    g = Graph([Node("a", label, details={fact: label}, group=(fact,))], [], title=fact)
    ET.fromstring(g.to_svg())


def test_tooltips_tell_everything():
    node = Node(
        "a", "conv", "operation", value(2), ("l", "0"), {"stride": (2, 2)}, frozenset({"unsafe"}), 4096, "m.py:3"
    )
    assert tooltip(node).splitlines() == [
        "conv",
        "float32(2)",
        "in l.0",
        "stride: (2, 2)",
        "keeps 4.1 kB for the derivative",
        ".data: writes through it are not seen by autograd, and gradients may be silently wrong",
        "m.py:3",
    ]
    svg = Graph([node], []).to_svg()
    assert "stride: (2, 2)" in svg


def test_memory_units():
    assert [memory(n) for n in (0, 999, 1000, 3.211e6, 5e9, 5e13)] == [
        "0 B",
        "999 B",
        "1 kB",
        "3.21 MB",
        "5 GB",
        "5e+04 GB",
    ]


def test_frames_of_modules():
    svg = nested().to_svg()
    assert svg.count('class="cluster"') == 3
    assert any(t == "w0" for t in texts(svg))  # the frame tells the rest of its path
    assert nested().to_svg(clusters=False).count('class="cluster"') == 0
    apart = nested()
    apart.edges = [e for e in apart.edges if (e.source, e.target) != ("n1", "n2")]
    assert apart.to_svg().count('class="cluster"') == 1


def test_directions_shapes_details_and_attributes():
    tall, wide = (ET.fromstring(chain(6).to_svg(direction=d)) for d in ("TB", "LR"))
    size = [tuple(float(e.get(k).removesuffix("pt")) for k in ("width", "height")) for e in (tall, wide)]
    assert size[0][1] > size[0][0]
    assert size[1][0] > size[1][1]
    assert "float32" not in "".join(texts(chain(2).to_svg(shapes=False)))
    detailed = Graph([Node("a", "a", details={"stride": "2" * 80})], [])
    assert any(t == "stride: 2222…" for t in texts(detailed.to_svg(details=5)))
    assert 'ranksep="3"' in chain(2).to_dot(attributes={"graph": {"ranksep": "3"}})
    with pytest.raises(ArgumentError, match="direction must be one of TB"):
        chain(2).to_dot(direction="up")
    with pytest.raises(ArgumentError, match="'graph', 'node' and 'edge'"):
        chain(2).to_dot(attributes={"nodes": {}})


# --- themes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEMES)
def test_every_theme_has_every_kind(name):
    theme = THEMES[name]
    assert set(theme.kinds) == set(KINDS)
    svg = every().with_theme(name).to_svg()
    assert theme.background in svg or theme.background == "#ffffff"
    for style in theme.kinds.values():
        assert contrast(style.text, style.fill) > 4.5, (name, style)


def contrast(a, b):
    def light(c):
        parts = [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_print_theme_is_grey():
    found = set(re.findall(r"#([0-9a-f]{6})", every().with_theme("print").to_svg()))
    assert found
    assert all(c[:2] == c[2:4] == c[4:] for c in found)


def test_styles_of_the_user():
    g = Graph([Node("w", "w", "parameter"), Node("b", "b", flags=frozenset({"nan"}))], [Edge("w", "b")])
    assert "#123456" in g.to_svg(styles={"parameter": {"fill": "#123456"}})
    assert "#123456" in g.with_theme("dark", {"nan": {"border": "#123456"}}).to_svg()
    assert "#123456" in g.with_theme({"base": "dark", "background": "#123456"}).to_svg()
    assert "#123456" in g.with_theme({"fill_color": "#123456"}).to_svg()
    for theme, styles, words in (
        ("pink", None, "theme must be one of basic"),
        ({"colour": 1}, None, "'colour' is neither"),
        (3, None, "must be a name"),
        ("basic", {"param": {"fill": "#ffffff"}}, "'param' is not a kind"),
        ("basic", {"parameter": {"colour": "#ffffff"}}, "needs a dict with border"),
        ("basic", {"parameter": "#ffffff"}, "needs a dict with border"),
    ):
        with pytest.raises(ArgumentError, match=words):
            theme_of(theme, styles)


def test_paths_and_cuts_have_their_colours():
    text = every().to_dot()
    for colour in theme_of("basic").ranks:
        assert colour in text
    ends = theme_of("basic").ends
    assert text.count(ends[0]) == 1
    assert text.count(ends[1]) == 1
    assert re.search(r'style="dashed".*color="#a3adb8".*label=" detach "', text)
    assert 'style="dotted"' in text


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf"), 1e-300, 1e300])
def test_norms_of_any_size(norm):
    g = Graph([Node("a", "a"), Node("b", "b")], [Edge("a", "b", norm=norm), Edge("a", "b", norm=1.0)])
    assert any(f"{norm:.3g}" in t for t in texts(g.to_svg()))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending, start", [("dot", b"digraph"), ("gv", b"digraph"), ("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_save_by_ending(tmp_path, ending, start):
    path = nested().save(tmp_path / f"g.{ending.upper()}")
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_save_json_and_html(tmp_path):
    g = every()
    g.edges.append(Edge("leaf", "saved", norm=float("nan")))
    data = json.loads(g.save(tmp_path / "g.json").read_text())
    assert len(data["nodes"]) == len(g.nodes)
    assert data["edges"][-1]["norm"] is None
    page = g.save(tmp_path / "g.html", theme="dark").read_text()
    assert "<html" in page
    assert "all of it" in page


def test_save_refuses(tmp_path):
    with pytest.raises(ArgumentError, match=r"must end in one of \.dot, \.gv, \.svg.*got 'g\.bmp'"):
        nested().save(tmp_path / "g.bmp")
    with pytest.raises(ArgumentError, match="must end in"):
        nested().save(tmp_path / "g")
    with pytest.raises(ArgumentError, match="does not exist; create it"):
        nested().save(tmp_path / "none" / "g.svg")
    with pytest.raises(ArgumentError, match="'dpi' has no effect"):
        nested().save(tmp_path / "g.svg", dpi=100)
    with pytest.raises(ArgumentError, match="'direction' has no effect"):
        nested().save(tmp_path / "g.html", direction="LR")
    with pytest.raises(ArgumentError, match="dpi must lie"):
        nested().save(tmp_path / "g.png", dpi=0)
    with pytest.raises(ArgumentError, match="theme must be one of"):
        nested().save(tmp_path / "g.svg", theme="pink")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = nested().save(tmp_path / "g.svg")
    before = path.read_bytes()
    with pytest.raises(ArgumentError):
        nested().save(path, theme="pink")
    assert path.read_bytes() == before


def png_size(data):
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_resolution_of_bitmaps():
    small, large = (png_size(nested().encoded("png", dpi=d)) for d in (72, 144))
    assert large[0] == pytest.approx(2 * small[0], abs=4)
    assert resolution("0,0,72,72", 144) == 144
    width, height = 100_000.0, 90_000.0
    dpi = resolution(f"0,0,{width},{height}", 144)
    assert max(width, height) / 72 * dpi <= rendering.MAX_SIDE
    assert width * height / 72**2 * dpi**2 <= rendering.MAX_AREA
    tall = png_size(chain(400).encoded("png", shapes=False))
    assert 0.9 * rendering.MAX_SIDE < tall[1] <= rendering.MAX_SIDE


@pytest.mark.slow
def test_large_graphs_are_drawn():
    svg = chain(3000).to_svg()
    assert len(texts(svg)) >= 3000


def test_far_edges_become_references():
    g = chain(120)
    g.edges += [Edge(f"n{i}", f"n{119 - i}", input=1) for i in range(59)]
    assert "#n0" not in g.to_dot()
    g = chain(240)
    g.edges += [Edge(f"n{i}", f"n{239 - i}", input=1) for i in range(119)]
    text = g.to_dot()
    assert text.count("URL=") == sum(239 - 2 * i > 16 for i in range(119))
    assert 'URL="#n0"' in text
    assert g.to_svg().count("far above") >= 1


def test_without_pygraphviz(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pullback\[viz\]'.*need nothing"):
        nested().save(tmp_path / "g.svg")
    with pytest.raises(ImportError):
        nested().to_svg()
    assert nested().save(tmp_path / "g.dot").exists()
    assert "<iframe" in nested()._repr_html_()


def test_what_graphviz_cannot_read():
    with pytest.raises(ArgumentError, match="cannot read this DOT text"):
        render("digraph { a -> ", "svg")
    with pytest.raises(ArgumentError, match="format must be one of svg"):
        render("digraph {}", "bmp")


def test_rendering_is_silent(capfd):
    chain(1200).to_svg(shapes=False)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_threads_may_draw(tmp_path):
    wanted = nested().to_svg()
    found = []
    threads = [threading.Thread(target=lambda: found.append(nested().to_svg())) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [wanted] * 6


@pytest.mark.slow
def test_importing_needs_no_pygraphviz():
    code = "import sys, pullback.graphs; sys.exit('pygraphviz' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_dot_text_alone_needs_no_theme():
    assert to_dot(GraphData([Node("a", "a")], [])).startswith("digraph {")
