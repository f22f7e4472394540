"""DOT text of a graph, for Graphviz of any version; needs no package."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pullback.core.errors import ArgumentError
from pullback.graphs.model import Edge, GraphData, Node, Value, ordered
from pullback.graphs.themes import Theme, theme_of

OPERATIONS = frozenset({"operation", "function", "operator", "module"})
DIRECTIONS = ("TB", "BT", "LR", "RL")
MANY = 1500  # nodes from which the layout is told to hurry
SPAN = 6000  # ranks that edges may cross in all before the longest are drawn as references
FAR = 16  # ranks from which an edge is among the longest
_LINE = 36  # letters of a label's line; longer labels are cut, and are whole in the tooltip
_UNSAFE = "\N{WARNING SIGN} .data"


def to_dot(
    data: GraphData,
    theme: Theme | None = None,
    *,
    direction: str = "TB",
    clusters: bool = True,
    shapes: bool = True,
    details: int = 0,
    attributes: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """DOT text.

    Where edges are so many and so long that their layout would take minutes, as in the joint graph of a deep network,
    each of the longest begins at a small mark with the label of its source instead of at the source.

    Args:
        data: the graph.
        theme: its look; "basic" if None.
        direction: of the flow: TB, BT, LR or RL.
        clusters: whether modules are drawn as frames around their nodes.
        shapes: whether nodes show shape and dtype of their results.
        details: letters of each further fact that nodes show; 0 leaves them to the tooltips.
        attributes: of Graphviz, set on top: {"graph": {"ranksep": "1"}, "node": {...}, "edge": {...}}.

    Raises: ArgumentError for a direction or an attribute of something else.
    """
    if direction not in DIRECTIONS:
        raise ArgumentError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    if not set(attributes or {}) <= {"graph", "node", "edge"}:
        raise ArgumentError(f"attributes are those of 'graph', 'node' and 'edge'; got {sorted(attributes or {})}")
    theme = theme or theme_of("basic")
    names = {n.id: f"n{i}" for i, n in enumerate(data.nodes)}
    lines = ["digraph {", *_head(data, theme, direction, attributes or {})]
    ends = _ends(data)
    drawn = _frames(data) if clusters else set()
    frames = {
        n.id: next((n.group[:k] for k in range(len(n.group), 0, -1) if n.group[:k] in drawn), ()) for n in data.nodes
    }
    text = {}
    for n in data.nodes:
        label = _label(n, theme, frames[n.id], shapes, details)
        text[n.id] = f"  {names[n.id]} [label=<{label}> {_list(_look(n, names[n.id], theme, ends.get(n.id)))}];"
    lines += _nested(data, text, frames, drawn, theme)
    labels = {n.id: n.label for n in data.nodes}
    several = {n.id for n in data.nodes if len(n.values) > 1}
    reach = _reach(data.edges)
    unsafe = {n.id for n in data.nodes if "unsafe" in n.flags}
    kinds = {n.id: n.kind for n in data.nodes}
    # Room for the parameters above an operation, so that frames stand one below the other instead of side by side.
    room = "3" if "accumulate" in kinds.values() else "2"
    far = _far(data)
    for number, e in enumerate(data.edges):
        look = _edge(e, theme, several, unsafe, reach)
        start = names[e.source]
        if number in far:
            start = f"r{number}"
            lines.append(f"  {start} [{_list(_reference(labels[e.source], names[e.source], theme))}];")
        elif kinds[e.source] in OPERATIONS and kinds[e.target] in OPERATIONS:
            look["weight"] = "6"  # keeps the main line straight and parameters beside it
        if frames[e.source] != frames[e.target] and frames[e.target] and number not in far:
            look["minlen"] = room
        lines.append(f"  {start} -> {names[e.target]}" + (f" [{_list(look)}];" if look else ";"))
    return "\n".join([*lines, "}", ""])


def _head(data: GraphData, theme: Theme, direction: str, own: Mapping[str, Mapping[str, str]]) -> list[str]:
    graph = {
        "bgcolor": theme.background,
        "rankdir": direction,
        "fontname": theme.font,
        "fontsize": _points(theme.size),
        "fontcolor": theme.text,
        "nodesep": "0.22",
        "ranksep": "0.32",
        "pad": "0.2",
        "charset": "UTF-8",
        "tooltip": data.title or " ",
    }
    if data.title:
        graph |= {"labelloc": "t", "fontsize": _points(theme.size + 3)}
    if len(data.nodes) > MANY:  # straight lines and few rounds: 3000 nodes in about a second
        graph |= {"splines": "polyline", "nslimit": "2", "nslimit1": "2", "mclimit": "0.3"}
    node = {
        "fontname": theme.font,
        "fontsize": _points(theme.size),
        "margin": "0.12,0.05",
        "height": "0.28",
        "width": "0.4",
    }
    edge = {
        "fontname": theme.font,
        "fontsize": _points(theme.size - 2.5),
        "color": theme.edge,
        "fontcolor": theme.faint,
        "arrowsize": "0.6",
        "penwidth": "1",
    }
    graph, node, edge = (a | dict(own.get(k, {})) for k, a in (("graph", graph), ("node", node), ("edge", edge)))
    label = [f"  label=<{_html(data.title, bold=True)}>;"] if data.title else []
    return [f"  graph [{_list(graph)}];", f"  node [{_list(node)}];", f"  edge [{_list(edge)}];", *label]


# --- nodes ------------------------------------------------------------------------------------------------------------


def _look(node: Node, name: str, theme: Theme, end: int | None) -> dict[str, str]:
    style = theme.style(node.kind, node.flags)
    fill = theme.ends[end] if end is not None and theme.ends and "nan" not in node.flags else style.fill
    lines = ["filled"] + (["rounded"] if style.shape == "box" else []) + ([style.line] if style.line != "solid" else [])
    look = {
        "shape": style.shape,
        "style": ",".join(lines),
        "fillcolor": fill,
        "color": style.border,
        "fontcolor": style.text,
        "penwidth": _points(style.width),
        "tooltip": tooltip(node),
        "id": name,
    }
    return look | ({"margin": "0.03,0.01"} if style.shape == "ellipse" else {})


def _label(node: Node, theme: Theme, frame: tuple[str, ...], shapes: bool, details: int) -> str:
    style = theme.style(node.kind, node.flags)
    title = _html(_short(_relative(node, frame)), bold=node.kind not in ("accumulate", "constant", "saved"))
    if node.count > 1:
        title += f" ×{node.count}"
    if "unsafe" in node.flags:
        title += f' <FONT COLOR="{theme.unsafe}">{_UNSAFE}</FONT>'
    if "nan" in node.flags:
        title += " <B>NaN</B>"
    small = []
    if node.kind == "module" and "module" in node.details:
        small.append(_short(str(node.details["module"])))
    if shapes and node.kind != "accumulate":
        small += [_short(line) for line in _results(node.values)]
    if node.nbytes:
        small.append(f"saves {memory(node.nbytes)}")
    if details:
        small += [
            _short(f"{key}: {_short(str(value), details)}", details + _LINE) for key, value in node.details.items()
        ]
    colour = _mixed(style.text, style.fill)
    return "<BR/>".join([title, *(_font(_html(line), theme.size - 2.5, colour) for line in small)])


def _relative(node: Node, frame: tuple[str, ...]) -> str:
    """The label without the part of the path that the frame tells, with or without its outermost name."""
    if node.kind in ("parameter", "input", "module"):
        for path in (frame, frame[1:]):
            inside = ".".join(path) + "."
            if path and node.label.startswith(inside):
                return node.label[len(inside) :]
    return node.label


def _results(values: Sequence[Value]) -> list[str]:
    return [str(v) for v in values[:3]] + ([f"and {len(values) - 3} more"] if len(values) > 3 else [])


def _font(html: str, size: float, colour: str) -> str:
    return f'<FONT POINT-SIZE="{_points(size)}" COLOR="{colour}">{html}</FONT>'


def tooltip(node: Node) -> str:
    """Everything that is known of a node, in lines."""
    lines = [node.label + (f" x{node.count}" if node.count > 1 else "")]
    lines += [f"{i}: {v}" if len(node.values) > 1 else str(v) for i, v in enumerate(node.values[:16])]
    if node.group:
        lines.append("in " + ".".join(node.group))
    lines += [f"{key}: {value}" for key, value in node.details.items()]
    if node.nbytes:
        lines.append(f"keeps {memory(node.nbytes)} for the derivative")
    lines += [_FLAGS[flag] for flag in sorted(node.flags)]
    if node.source:
        lines.append(node.source)
    return "\n".join(lines)


_FLAGS = {
    "nan": "first to make a NaN or an infinity",
    "unsafe": ".data: writes through it are not seen by autograd, and gradients may be silently wrong",
    "freed": "its saved tensors have been freed",
    "no_grad": "ran under no_grad",
}


def memory(nbytes: float) -> str:
    """3.21 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.3g} {unit}"


# --- modules ----------------------------------------------------------------------------------------------------------


def _frames(data: GraphData) -> set[tuple[str, ...]]:
    """The modules that are drawn as frames. Modules of all, of one or of scattered operations have none."""
    kinds = {n.id: n for n in data.nodes if n.kind in OPERATIONS}
    inside: dict[tuple[str, ...], int] = {}  # operations less the edges that join them, so 1 if all hang together
    size: dict[tuple[str, ...], int] = {}
    owner: dict[tuple[tuple[str, ...], str], str] = {}

    def root(frame: tuple[str, ...], name: str) -> str:
        while (found := owner.get((frame, name), name)) != name:
            owner[frame, name] = owner.get((frame, found), found)
            name = found
        return name

    for n in kinds.values():
        for depth in range(1, len(n.group) + 1):
            frame = n.group[:depth]
            inside[frame] = inside.get(frame, 0) + 1
            size[frame] = size.get(frame, 0) + 1
    for e in data.edges:
        if e.source in kinds and e.target in kinds:
            for depth, (a, b) in enumerate(zip(kinds[e.source].group, kinds[e.target].group, strict=False), 1):
                if a != b:
                    break
                frame = kinds[e.source].group[:depth]
                first, second = root(frame, e.source), root(frame, e.target)
                if first != second:
                    owner[frame, first] = second
                    inside[frame] -= 1
    return {frame for frame, number in size.items() if 1 < number < len(kinds) and inside[frame] == 1}


def _innermost(group: tuple[str, ...], drawn: set[tuple[str, ...]]) -> tuple[str, ...]:
    while group and group not in drawn:
        group = group[:-1]
    return group


def _nested(
    data: GraphData,
    text: dict[str, str],
    frames: dict[str, tuple[str, ...]],
    drawn: set[tuple[str, ...]],
    theme: Theme,
) -> list[str]:
    """The lines of the nodes, in the frames of their modules."""
    members: dict[tuple[str, ...], list[str]] = {}
    children: dict[tuple[str, ...], dict[tuple[str, ...], None]] = {}
    for n in data.nodes:
        path = frames[n.id]
        members.setdefault(path, []).append(text[n.id])
        above: tuple[str, ...] = ()
        for frame in (path[:k] for k in range(1, len(path) + 1) if path[:k] in drawn):
            children.setdefault(above, {})[frame] = None
            above = frame
    lines: list[str] = []
    number = 0
    work: list[tuple[str, ...] | None] = [()]
    while work:
        if (now := work.pop()) is None:
            lines.append("  }")
            continue
        frame = now
        if frame:
            look = {
                "style": "filled,rounded",
                "fillcolor": theme.groups[(len(frame) - 1) % len(theme.groups)],
                "color": theme.group_border,
                "margin": "9",
                "tooltip": ".".join(frame),
                "labeljust": "l",
            }
            name = data.groups.get(frame, "")
            title = _html(frame[-1], bold=True) + (f" {_html(_short(name))}" if name else "")
            title = _font(title, theme.size - 1, theme.group_text)
            lines += [f"  subgraph cluster_{number} {{", f"  graph [label=<{title}> {_list(look)}];"]
            number += 1
            work.append(None)
        lines += members.get(frame, [])
        work += reversed(children.get(frame, {}))
    return lines


# --- edges ------------------------------------------------------------------------------------------------------------


def _far(data: GraphData) -> set[int]:
    """Numbers of edges that are drawn as references: the longest, where all together would take minutes to lay out."""
    rank: dict[str, int] = {}
    incoming = data.inputs()
    order = ordered(data.nodes, data.edges)
    for n in order:
        rank[n.id] = max((rank[e.source] + 1 for e in incoming[n.id] if e.source in rank), default=0)
    outgoing = data.outputs()
    for n in order:
        if not incoming[n.id]:
            rank[n.id] = min((rank[e.target] - 1 for e in outgoing[n.id]), default=0)
    spans = [rank[e.target] - rank[e.source] for e in data.edges]
    return {i for i, span in enumerate(spans) if span > FAR} if sum(spans) > SPAN + len(spans) else set()


def _reference(label: str, name: str, theme: Theme) -> dict[str, str]:
    """A small mark that stands for a far node, and leads to it in SVG."""
    size = _points(theme.size - 2.5)
    look = {"label": _short(label), "shape": "plaintext", "fontsize": size, "fontcolor": theme.faint}
    return look | {"tooltip": f"from {label}, far above", "URL": f"#{name}", "height": "0.1", "width": "0.1"}


def _edge(
    e: Edge,
    theme: Theme,
    several: set[str],
    unsafe: set[str],
    reach: tuple[float, float] | None,
) -> dict[str, str]:
    look: dict[str, str] = {}
    words = [e.label] if e.label else []
    if e.kind == "cut":
        hot = e.reason == ".data" or e.source in unsafe or e.target in unsafe
        colour = theme.unsafe if hot else theme.cut
        look = {"style": "dashed", "color": colour, "fontcolor": colour, "arrowhead": "empty"}
        words.append((_UNSAFE if e.reason == ".data" else e.reason) or "cut")
    elif e.kind == "saved":
        look = {"style": "dotted", "color": theme.saved, "penwidth": "1.4", "arrowhead": "none"}
    elif e.source in several:
        words.append(f"result {e.output}")
    if e.norm is not None:
        words.append(f"{e.norm:.3g}")
        if reach is not None and e.kind == "data":
            part = _part(e.norm, reach)
            look |= {"color": _ramp(theme.scale, part), "penwidth": f"{1 + 2.2 * part:.2f}"}
    if e.rank is not None:
        colour = theme.ranks[min(e.rank, len(theme.ranks) - 1)]
        look |= {"color": colour, "fontcolor": colour, "penwidth": f"{max(3.0 - 0.5 * e.rank, 2.0):.1f}"}
    if words:
        look["label"] = " " + ", ".join(words) + " "
    return look


def _reach(edges: Iterable[Edge]) -> tuple[float, float] | None:
    """The smallest and largest norm, as logarithms."""
    norms = [math.log10(e.norm) for e in edges if e.norm is not None and 0 < e.norm < math.inf]
    return (min(norms), max(norms)) if norms else None


def _part(norm: float, reach: tuple[float, float]) -> float:
    """Where a norm lies between the smallest (0) and the largest (1)."""
    low, high = reach
    if not norm > 0:  # 0 or nan
        return 0.0
    return 1.0 if math.isinf(norm) else (math.log10(norm) - low) / max(high - low, 1e-12) if high > low else 1.0


def _ends(data: GraphData) -> dict[str, int]:
    """Ends of highlighted paths: node id -> 0 where they begin, 1 where they lead to."""
    ranked = [e for e in data.edges if e.rank is not None]
    sources, targets = {e.source for e in ranked}, {e.target for e in ranked}
    return dict.fromkeys(sources - targets, 0) | dict.fromkeys(targets - sources, 1)


# --- colours and text -------------------------------------------------------------------------------------------------


def _mixed(a: str, b: str, part: float = 0.3) -> str:
    """The colour between `a` (part 0) and `b` (part 1); `a` if one of them is not "#rrggbb"."""
    try:
        first, second = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (a, b))
    except ValueError:
        return a
    return "#" + "".join(f"{round(x + (y - x) * part):02x}" for x, y in zip(first, second, strict=True))


def _ramp(colours: Sequence[str], part: float) -> str:
    at = part * (len(colours) - 1)
    i = min(int(at), len(colours) - 2)
    return _mixed(colours[i], colours[i + 1], at - i)


def _short(text: str, size: int = _LINE) -> str:
    text = " ".join(text.split())
    return text if len(text) <= size else text[: size - 1] + "…"


def _html(text: str, bold: bool = False) -> str:
    """Text inside of an HTML label, without characters that XML forbids."""
    clean = escape("".join(c if c.isprintable() else " " for c in text)) or " "
    return f"<B>{clean}</B>" if bold else clean


def _list(attributes: dict[str, str]) -> str:
    return " ".join(f"{key}={quoted(value)}" for key, value in attributes.items())


def quoted(text: str) -> str:
    """Text as a quoted DOT string: backslashes and quotes are themselves, line ends are kept."""
    clean = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return '"' + clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _points(size: float) -> str:
    return f"{size:g}"
