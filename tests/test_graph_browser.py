"""The interactive page in a real browser: what people see and do. Skipped, with the reason, where there is none."""

import random
import re
import shutil
from xml.etree import ElementTree

import pytest
from test_graph_html import HOSTILE, chain, hostile, resnet_like, special, transformer_like

from pullback.graphs.html import to_html
from pullback.graphs.model import EDGE_KINDS, KINDS, Edge, GraphData, Node

pytestmark = pytest.mark.slow  # a browser takes seconds to start

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser on PATH; looked for {', '.join(BROWSERS)}")
    with api.sync_playwright() as p:
        found = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens graphs from files; no page may log an error, raise one, or ask for anything but itself."""
    pages, problems = [], []

    def open_(data, theme="basic", query="#graph .nodes", **options):
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(to_html(data, theme), encoding="utf-8")
        page = browser.new_page(viewport={"width": 1200, "height": 800}, accept_downloads=True, **options)
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("dialog", lambda d: (problems.append(f"dialog {d.message}"), d.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else problems.append(r.url))
        page.set_default_timeout(4000)
        page.goto(path.as_uri())
        page.wait_for_selector(query, state="attached")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert not problems


def shown(page):
    return page.evaluate("pullbackGraph.shown()")


def group(page, path):
    return page.locator(f'[data-path="{path}"]')


def scale(page):
    return float(re.search(r"scale\(([\d.]+)\)", page.locator("#layer").get_attribute("transform"))[1])


def random_graph(rng, n=50):
    """Any nesting, cycles, double edges, edges to itself, one source for many."""
    groups = [()]
    for _ in range(rng.randrange(1, 12)):
        groups.append((*rng.choice(groups), f"m{rng.randrange(4)}"))
    nodes = [Node(f"n{i}", "op" * rng.randrange(1, 9), rng.choice(KINDS), group=rng.choice(groups)) for i in range(n)]
    edges = []
    for _ in range(int(n * 1.4)):
        i, j = rng.randrange(n), rng.randrange(n)
        if rng.random() < 0.9:
            i, j = min(i, j), max(i, j)
        edges.append(
            Edge(f"n{i}", f"n{j}", kind=rng.choice(EDGE_KINDS), reason=rng.choice(["", "", "detach", ".data"]))
        )
    edges += [Edge("n3", f"n{i}") for i in range(4, n, 6)]
    return GraphData(nodes, edges)


def overlaps(page):
    """Pairs of node bodies that overlap, and bodies that stick out of the box of their module."""
    return page.evaluate("""() => {
      const box = (r) => ["x", "y", "width", "height"].map((n) => Number(r.getAttribute(n)));
      const bodies = [...document.querySelectorAll("#graph .body")].map(box);
      const hits = [];
      bodies.forEach(([x, y, w, h], i) => bodies.slice(0, i).forEach(([a, b, c, d]) => {
        if (x < a + c && a < x + w && y < b + d && b < y + h) hits.push([x, y, a, b]);
      }));
      const frames = [...document.querySelectorAll("#graph .frame")].map(box);
      for (const [x, y, w, h] of bodies) for (const [a, b, c, d] of frames) {
        const meet = x < a + c && a < x + w && y < b + d && b < y + h;
        if (meet && !(a <= x && b <= y && x + w <= a + c && y + h <= b + d)) hits.push(["frame", x, y, a, b]);
      }
      return hits;
    }""")


def test_opens_closed_and_fast(show):
    page = show(resnet_like())
    assert page.evaluate("pullbackGraph.ready") < 500
    assert {"layer1", "layer2", "layer3", "layer4"} <= set(shown(page))
    assert len(shown(page)) <= 60 and page.locator("#graph .open").count() == 0
    assert page.locator("h1").inner_text() == "ResNet18"
    assert page.locator("#counts").inner_text() == "133 nodes · 140 edges · 29.5 MB saved"
    assert "parameter" in page.locator("#legend").inner_text()
    assert overlaps(page) == []


def test_modules_open_and_close_in_place(show):
    page = show(resnet_like())
    before = shown(page)
    group(page, "layer2").click()
    assert {"layer2/0", "layer2/1"} <= set(shown(page)) and "layer2" not in shown(page)
    assert group(page, "layer2").get_attribute("aria-expanded") == "true"
    group(page, "layer2/0").click()
    group(page, "layer2/0/conv1").click()
    assert page.locator('[data-path="layer2/0/conv1"] .title').text_content() == "conv1 · Conv2d"
    assert page.locator("#graph .node", has_text="layer2.0.conv1.weight").count() == 1
    assert overlaps(page) == []
    group(page, "layer2").click()
    assert shown(page) == before
    # What was open inside is open again, and a double click opens once.
    group(page, "layer3").dblclick()
    assert "layer3/0" in shown(page)


def test_keys_open_and_close(show):
    page = show(resnet_like())
    group(page, "layer4").focus()
    page.keyboard.press("Enter")
    assert "layer4/1" in shown(page)
    assert page.evaluate("document.activeElement.dataset.path") == "layer4"
    page.keyboard.press("Enter")
    assert "layer4" in shown(page)
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.path") == "layer3"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert "adaptive_avg_pool2d" in page.evaluate("document.activeElement.getAttribute('aria-label')")


def test_depth_of_all_modules(show):
    page = show(resnet_like())
    page.click("#expand-all")
    assert len(shown(page)) == 133
    assert overlaps(page) == []
    page.click("#shallower")
    assert page.locator("#depth").inner_text() == "depth 3" and len(shown(page)) < 133
    page.click("#collapse-all")
    assert len(shown(page)) == 13
    page.click("#deeper")
    assert "layer1/0" in shown(page)


def test_calls_of_one_module_in_several_places_stand_where_they_are(show):
    page = show(resnet_like())
    page.click("#expand-all")
    assert group(page, "layer1/0/relu").count() == 0  # called after bn1 and after the sum
    assert page.locator("#graph .node", has_text="relu").count() == 17
    # Every edge runs down, that is, no module is both before and after another.
    ends = page.locator("#graph .line").evaluate_all(
        "(all) => all.map((e) => [e.getPointAtLength(0).y, e.getPointAtLength(e.getTotalLength()).y])"
    )
    assert all(a < b for a, b in ends)


def test_one_source_for_many_is_drawn_as_one_trunk(show):
    nodes = [Node("mask", "mask"), *(Node(f"n{i}", "n") for i in range(20))]
    edges = [Edge(f"n{i}", f"n{i + 1}") for i in range(19)] + [Edge("mask", f"n{i}") for i in range(20)]
    page = show(GraphData(nodes, edges))
    places = page.locator("#graph .line").evaluate_all("(all) => all.map((e) => e.getBBox().x)")
    assert max(places) - min(places) < 200  # 20 lines side by side take more
    xs = page.locator("#graph .body").evaluate_all("(all) => all.map((e) => Number(e.getAttribute('x')))")
    assert max(xs[1:]) - min(xs[1:]) < 1  # and the chain is straight
    assert overlaps(page) == []


@pytest.mark.parametrize("ends", ["pq", "qp"])
def test_edges_into_a_module_do_not_cross(show, ends):
    nodes = [Node("a", "a"), Node("b", "b"), Node("p", "p", group=("m",)), Node("q", "q", group=("m",))]
    page = show(GraphData(nodes, [Edge("a", ends[0]), Edge("b", ends[1])]))
    page.evaluate("pullbackGraph.expand('m')")
    x = {n: float(page.locator(f'[data-id="{n}"] .body').get_attribute("x")) for n in "abpq"}
    assert (x["a"] < x["b"]) == (x[ends[0]] < x[ends[1]])


def test_edges_of_hidden_nodes_belong_to_their_module(show):
    page = show(resnet_like())
    labels = page.locator("#graph .edge-label").all_text_contents()
    assert labels == ["×2"] * 4  # into layer1 and between layers: the main path and the skip
    box = page.locator("#graph .edge-label").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] - 4)
    tip = page.locator("#tooltip").inner_text()
    assert "max_pool2d → layer1" in tip and "2 edges" in tip and "float32(1, 64, 56, 56)" in tip


def test_search_finds_reveals_and_marks(show):
    page = show(resnet_like())
    page.keyboard.press("/")
    page.keyboard.type("layer3.1 (1,256,14,14) conv2d operation")
    assert page.locator("#hits").inner_text() == "2 hits"
    assert group(page, "layer3").get_attribute("class").endswith("holds-hit")
    page.keyboard.press("Enter")
    assert page.locator("#hits").inner_text() == "1 of 2"
    assert page.locator("#graph .node.hit.current").count() == 1
    box = page.locator("#graph .node.current").bounding_box()
    assert abs(box["x"] + box["width"] / 2 - 600) < 30 and 100 < box["y"] < 800
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("#hits").inner_text() == "1 of 2"
    page.keyboard.press("Shift+Enter")
    assert page.locator("#hits").inner_text() == "2 of 2"
    page.keyboard.press("Escape")
    assert page.locator("#graph .hit").count() == 0 and page.input_value("#search") == ""
    page.fill("#search", "no such node")
    assert page.locator("#hits").inner_text() == "no hits"
    page.fill("#search", "conv2")  # a part of every "Conv2d", but the modules of this name come first
    page.press("#search", "Enter")
    assert page.locator("#graph .current").first.get_attribute("aria-label").startswith("Module layer1.0.conv2,")
    page.fill("#search", "BasicBlock")
    assert "hit" in page.locator("#hits").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#graph .current").count() > 0


def test_tooltips_by_pointer_and_by_keyboard(show):
    page = show(special())
    page.locator('[data-id="n2"]').hover()
    tip = page.locator("#tooltip").inner_text()
    for text in ("linear", "operation", "float32(1, 64)", "net", "4.1 kB", "model.py:12 in forward"):
        assert text in tip
    page.mouse.move(5, 400)
    assert not page.locator("#tooltip").is_visible()
    page.locator('[data-id="n3"]').focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert "First to make a NaN" in page.locator("#tooltip").inner_text()
    page.locator('[data-id="n6"]').hover()
    tip = page.locator("#tooltip").inner_text()
    assert "Unsafe" in tip and "gradients do not (.data)" in tip
    assert "float32(3) cuda:0" in page.evaluate("document.querySelector('[data-id=n4]').getAttribute('aria-label')")


def test_looks_of_edges_and_flags(show):
    page = show(special())
    style = "(s) => { const c = getComputedStyle(document.querySelector(s)); return [c.stroke, c.strokeDasharray]; }"
    assert page.evaluate(style, ".style-cut .line")[1] == "6px, 4px"
    assert page.evaluate(style, ".style-unsafe .line")[0] == "rgb(214, 69, 0)"
    ranks = [page.evaluate(style, f".rank{i} .line")[0] for i in range(3)]
    assert ranks == ["rgb(139, 0, 0)", "rgb(224, 32, 32)", "rgb(255, 152, 0)"]
    assert page.evaluate(style, ".flag-nan .body")[0] == "rgb(200, 0, 0)"
    assert page.locator(".edge-label.style-unsafe").text_content() == ".data"
    legend = page.locator("#legend").inner_text()
    for text in (
        "first NaN",
        "under no_grad",
        "cut: no gradient",
        "largest gradient path",
        "second",
        "0.001 to 3",
    ):
        assert text in legend


def test_largest_paths_alone_and_norms(show):
    page = show(special())
    opacity = "(s) => Number(getComputedStyle(document.querySelector(s)).opacity)"
    page.click("#paths")
    assert page.evaluate(opacity, ".edge.style-cut") < 0.2 and page.evaluate(opacity, ".edge.rank0") == 1
    assert page.evaluate(opacity, '[data-id="n5"]') < 0.2 and page.evaluate(opacity, '[data-id="n2"]') == 1
    page.click("#paths")
    assert page.evaluate(opacity, ".edge.style-cut") == 1
    page.click("#norms")
    widths = page.evaluate(
        "[...document.querySelectorAll('.edge .line')].map((e) => parseFloat(getComputedStyle(e).strokeWidth))"
    )
    assert max(widths) > 5 and min(widths) < 1.5
    assert page.locator(".norm-zero").count() == 1 and page.locator(".norm-bad").count() == 2
    page.click("#norms")
    assert page.locator(".norm-bad").count() == 0


def test_click_highlights_what_leads_to_a_node_and_what_follows(show):
    page = show(special())
    lit = "[...document.querySelectorAll('.node.lit')].map((e) => e.dataset.id).sort()"
    page.locator('[data-id="n3"]').click()
    assert page.evaluate(lit) == ["n0", "n1", "n2", "n3", "n4", "n5"]  # n4 passes its values on through cuts only
    assert page.locator("#status").inner_text() == "sqrt: 3 nodes before, 2 nodes after"
    assert page.locator(".edge.lit").count() == 5
    page.click("#direction")
    assert page.evaluate(lit) == ["n0", "n1", "n2", "n3"]
    page.click("#direction")
    assert page.evaluate(lit) == ["n3", "n4", "n5"]
    page.keyboard.press("Escape")
    assert page.evaluate(lit) == [] and page.locator("#graph.tracing").count() == 0


def test_highlight_of_a_module(show):
    page = show(resnet_like())
    group(page, "layer4").click(modifiers=["Shift"])
    assert page.locator(".closed.selected").count() == 1
    assert page.locator("#status").inner_text().startswith("layer4: 96 nodes before, ")


def test_pan_and_zoom(show):
    page = show(resnet_like())
    start = scale(page)
    page.mouse.move(300, 400)
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        f"!document.querySelector('#layer').getAttribute('transform').includes('scale({start:.4f})')"
    )
    assert scale(page) > start
    page.keyboard.press("0")
    fitted = scale(page)
    page.click("#zoom-in")
    assert scale(page) == pytest.approx(fitted * 1.25, rel=1e-3)
    page.keyboard.press("-")
    page.keyboard.press("+")
    page.keyboard.press("-")
    assert scale(page) == pytest.approx(fitted, rel=1e-3)
    before = page.locator("#layer").get_attribute("transform")
    page.mouse.move(200, 300)
    page.mouse.down()
    page.mouse.move(260, 350, steps=3)
    page.mouse.up()
    x, y = (float(v) for v in re.findall(r"-?[\d.]+", before)[:2])
    u, v = (float(v) for v in re.findall(r"-?[\d.]+", page.locator("#layer").get_attribute("transform"))[:2])
    assert (u - x, v - y) == pytest.approx((60, 50), abs=1)
    # A drag that begins on a module does not open it.
    closed = shown(page)
    box = group(page, "layer1").bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 50, steps=3)
    page.mouse.up()
    assert shown(page) == closed


@pytest.mark.parametrize(
    ("preference", "theme", "dark"),
    [
        ("light", "basic", False),
        pytest.param("dark", "basic", True, marks=pytest.mark.slow),
        pytest.param("light", "dark", True, marks=pytest.mark.slow),
        pytest.param("dark", "print", False, marks=pytest.mark.slow),
    ],
)
def test_light_and_dark(show, preference, theme, dark):
    page = show(special(), theme, color_scheme=preference)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = "rgb(255, 255, 255)"
    assert (page.evaluate(paper) != light) is dark
    page.click("#scheme")
    assert (page.evaluate(paper) == light) is dark


def test_any_label_is_shown_as_text(show):
    page = show(hostile())
    page.evaluate("pullbackGraph.expandAll()")
    texts = page.locator("#graph .label").all_text_contents()
    assert texts.count("<script>alert(1)</script>") == 2 and "日本語 \U0001f600 é" in texts
    assert page.locator("h1").inner_text() == HOSTILE[0]
    page.fill("#search", "alert(1)")
    page.press("#search", "Enter")
    page.locator('[data-id="0<script>alert(1)</script>"]').hover()
    assert "<script>alert(1)</script>" in page.locator("#tooltip").inner_text()
    assert page.locator("img").count() == 0


def test_saved_picture_is_complete(show):
    page = show(special())
    with page.expect_download() as waiting:
        page.click("#save")
    assert waiting.value.suggested_filename == "special.svg"
    root = ElementTree.fromstring(waiting.value.path().read_bytes())
    space = "{http://www.w3.org/2000/svg}"
    assert {t.text for t in root.iter(f"{space}text")} >= {"linear", "float32(1, 64)", "Fourier(64)", ".data"}
    bodies = [r for r in root.iter(f"{space}rect") if "rgb(255, 222, 222)" in (r.get("fill") or "")]
    assert len(bodies) == 1 and "var(" not in ElementTree.tostring(root, "unicode")
    assert root.get("viewBox").startswith("-20 -20 ")


def test_inside_a_notebook_frame(browser):
    page = browser.new_page(viewport={"width": 800, "height": 500})
    page.set_content("<iframe width=700 height=400 sandbox='allow-scripts'></iframe>")
    page.evaluate("(html) => { document.querySelector('iframe').srcdoc = html; }", to_html(resnet_like()))
    frame = page.frame_locator("iframe")
    frame.locator('[data-path="conv1"]').click(timeout=4000)
    assert frame.locator('[data-path="conv1"] .title').text_content() == "conv1 · Conv2d"
    assert not frame.locator("#legend ul").first.is_visible()  # no room
    page.close()


def test_large_transformer(show):
    page = show(transformer_like())
    assert page.evaluate("pullbackGraph.ready") < 1000
    assert len(shown(page)) <= 60
    taken = page.evaluate("{ const t = performance.now(); pullbackGraph.expandAll(); performance.now() - t; }")
    assert len(shown(page)) == len(transformer_like().nodes) and taken < 5000


def test_long_chain_and_empty_graph(show):
    page = show(chain())
    assert page.evaluate("pullbackGraph.ready") < 4000 and len(shown(page)) == 3000
    page = show(GraphData([], []))
    assert page.locator("#empty").is_visible()


def test_module_used_twice_and_cycles(show):
    names = ["a", "m1", "b", "m2", "m3", "c"]
    nodes = [Node(n, n, group=("shared",) if n[0] == "m" else ()) for n in names]
    pairs = [("a", "m1"), ("m1", "b"), ("b", "m2"), ("m2", "m3"), ("m3", "c"), ("c", "c")]
    edges = [Edge(source, target) for source, target in pairs]
    page = show(GraphData(nodes, edges))
    assert page.locator("#graph .edge").count() == 6
    page.evaluate("pullbackGraph.collapse('shared')")
    assert page.locator("#graph .edge").count() == 5  # a, b <-> shared -> c, and c to itself
    page.evaluate("pullbackGraph.expand('shared')")
    assert overlaps(page) == []
    paths = page.locator("#graph .line").evaluate_all("(all) => all.map((e) => e.getAttribute('d'))")
    assert not any("NaN" in d or "undefined" in d for d in paths)
    through = page.evaluate("""() => {
      const bodies = [...document.querySelectorAll("#graph .body")].map((r) => r.getBBox());
      const within = (at, start, size) => at > start + 3 && at < start + size - 3;
      const inside = ({ x, y }) => bodies.some((b) => within(x, b.x, b.width) && within(y, b.y, b.height));
      return [...document.querySelectorAll("#graph .line")].filter((line) => {
        const length = line.getTotalLength();
        return [...Array(60).keys()].some((i) => inside(line.getPointAtLength((i / 59) * length)));
      }).length;
    }""")
    assert through == 0  # edges against the flow go around


def test_modules_that_hold_one_module_open_together(show):
    nodes = [Node("x", "x"), *(Node(f"n{i}", "n", group=("a", "b")) for i in range(13))]
    page = show(GraphData(nodes, [Edge(f"n{i}", f"n{i + 1}") for i in range(12)]))
    page.evaluate("pullbackGraph.collapseAll()")
    assert shown(page) == ["x", "a"]
    group(page, "a").click()
    assert len(shown(page)) == 14


def test_random_graphs_lie_without_overlap(show):
    rng = random.Random(3)
    for _ in range(3):
        page = show(random_graph(rng))
        for _ in range(3):
            closed = page.locator("#graph .closed").evaluate_all("(all) => all.map((e) => e.dataset.path)")
            if closed:
                page.evaluate("(path) => pullbackGraph.expand(path)", rng.choice(closed))
            assert overlaps(page) == []
        page.evaluate("pullbackGraph.expandAll()")
        assert overlaps(page) == []
        paths = page.locator("#graph .line").evaluate_all("(all) => all.map((e) => e.getAttribute('d'))")
        assert paths and not any("NaN" in d or "undefined" in d for d in paths)
