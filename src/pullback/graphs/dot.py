"""DOT text of a graph, for Graphviz of any version; needs no package."""

from __future__ import annotations

from collections.abc import Mapping

from pullback.core.errors import ArgumentError
from pullback.graphs.model import GraphData, ordered
from pullback.graphs.strokes import edge_look, ends_of, node_label, node_look, reach_of, reference
from pullback.graphs.text import escaped, font, listed, points, short
from pullback.graphs.themes import Theme, theme_of

OPERATIONS = frozenset({"operation", "function", "operator", "module"})
DIRECTIONS = ("TB", "BT", "LR", "RL")
MANY = 1500  # nodes from which the layout is told to hurry
SPAN = 6000  # ranks that edges may cross in all before the longest are drawn as references
FAR = 16  # ranks from which an edge is among the longest


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
    ends = ends_of(data)
    drawn = _frames(data) if clusters else set()
    frames = {
        n.id: next((n.group[:k] for k in range(len(n.group), 0, -1) if n.group[:k] in drawn), ()) for n in data.nodes
    }
    text = {}
    for n in data.nodes:
        label = node_label(n, theme, frames[n.id], shapes, details)
        text[n.id] = f"  {names[n.id]} [label=<{label}> {listed(node_look(n, names[n.id], theme, ends.get(n.id)))}];"
    lines += _nested(data, text, frames, drawn, theme)
    labels = {n.id: n.label for n in data.nodes}
    several = {n.id for n in data.nodes if len(n.values) > 1}
    reach = reach_of(data.edges)
    unsafe = {n.id for n in data.nodes if "unsafe" in n.flags}
    kinds = {n.id: n.kind for n in data.nodes}
    # Room for the parameters above an operation, so that frames stand one below the other instead of side by side.
    room = "3" if "accumulate" in kinds.values() else "2"
    far = _far(data)
    for number, e in enumerate(data.edges):
        look = edge_look(e, theme, several, unsafe, reach)
        start = names[e.source]
        if number in far:
            start = f"r{number}"
            lines.append(f"  {start} [{listed(reference(labels[e.source], names[e.source], theme))}];")
        elif kinds[e.source] in OPERATIONS and kinds[e.target] in OPERATIONS:
            look["weight"] = "6"  # keeps the main line straight and parameters beside it
        if frames[e.source] != frames[e.target] and frames[e.target] and number not in far:
            look["minlen"] = room
        lines.append(f"  {start} -> {names[e.target]}" + (f" [{listed(look)}];" if look else ";"))
    return "\n".join([*lines, "}", ""])


def _head(data: GraphData, theme: Theme, direction: str, own: Mapping[str, Mapping[str, str]]) -> list[str]:
    graph = {
        "bgcolor": theme.background,
        "rankdir": direction,
        "fontname": theme.font,
        "fontsize": points(theme.size),
        "fontcolor": theme.text,
        "nodesep": "0.22",
        "ranksep": "0.32",
        "pad": "0.2",
        "charset": "UTF-8",
        "tooltip": data.title or " ",
    }
    if data.title:
        graph |= {"labelloc": "t", "fontsize": points(theme.size + 3)}
    if len(data.nodes) > MANY:  # straight lines and few rounds: 3000 nodes in about a second
        graph |= {"splines": "polyline", "nslimit": "2", "nslimit1": "2", "mclimit": "0.3"}
    node = {
        "fontname": theme.font,
        "fontsize": points(theme.size),
        "margin": "0.12,0.05",
        "height": "0.28",
        "width": "0.4",
    }
    edge = {
        "fontname": theme.font,
        "fontsize": points(theme.size - 2.5),
        "color": theme.edge,
        "fontcolor": theme.faint,
        "arrowsize": "0.6",
        "penwidth": "1",
    }
    graph, node, edge = (a | dict(own.get(k, {})) for k, a in (("graph", graph), ("node", node), ("edge", edge)))
    label = [f"  label=<{escaped(data.title, bold=True)}>;"] if data.title else []
    return [f"  graph [{listed(graph)}];", f"  node [{listed(node)}];", f"  edge [{listed(edge)}];", *label]


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
            title = escaped(frame[-1], bold=True)
            if name and name != frame[-1].split(" ")[0]:
                title += f" {escaped(short(name))}"
            title = font(title, theme.size - 1, theme.group_text)
            lines += [f"  subgraph cluster_{number} {{", f"  graph [label=<{title}> {listed(look)}];"]
            number += 1
            work.append(None)
        lines += members.get(frame, [])
        work += reversed(children.get(frame, {}))
    return lines


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
