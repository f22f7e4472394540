"""How single nodes and edges are drawn in DOT: labels, tooltips, colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pullback.graphs.model import Edge, GraphData, Node, Value
from pullback.graphs.text import LINE, escaped, font, memory, mixed, points, ramp, short
from pullback.graphs.themes import Theme

_UNSAFE = "\N{WARNING SIGN} .data"


def node_look(node: Node, name: str, theme: Theme, end: int | None) -> dict[str, str]:
    """The attributes of a node; `end` says which end of a highlighted path it is, see `ends_of`."""
    style = theme.style(node.kind, node.flags)
    fill = theme.ends[end] if end is not None and theme.ends and "nan" not in node.flags else style.fill
    lines = ["filled"] + (["rounded"] if style.shape == "box" else []) + ([style.line] if style.line != "solid" else [])
    look = {
        "shape": style.shape,
        "style": ",".join(lines),
        "fillcolor": fill,
        "color": style.border,
        "fontcolor": style.text,
        "penwidth": points(style.width),
        "tooltip": tooltip(node),
        "id": name,
    }
    return look | ({"margin": "0.03,0.01"} if style.shape == "ellipse" else {})


def node_label(node: Node, theme: Theme, frame: tuple[str, ...], shapes: bool, details: int) -> str:
    """The HTML label of a node inside of the frame of a module."""
    style = theme.style(node.kind, node.flags)
    width = LINE if node.kind != "operator" else 2 * LINE  # a formula cut off tells little
    title = escaped(short(_relative(node, frame), width), bold=node.kind not in ("accumulate", "constant", "saved"))
    if node.count > 1:
        title += f" ×{node.count}"
    if "unsafe" in node.flags:
        sign = _UNSAFE.removesuffix(" .data") if node.label.startswith(".data") else _UNSAFE
        title += f' <FONT COLOR="{theme.unsafe}">{sign}</FONT>'
    if "nan" in node.flags:
        title += " <B>NaN</B>"
    small = []
    if node.kind == "module" and "module" in node.details:
        small.append(short(str(node.details["module"])))
    formula = str(node.details.get("operator", "<"))
    if node.kind == "operator" and not formula.startswith("<"):  # a reduction or solver, by what it computes
        small.append(short(formula, 2 * LINE))
    if shapes and node.kind != "accumulate":
        small += [short(line) for line in _results(node.values)]
    if node.nbytes:
        small.append(f"saves {memory(node.nbytes)}")
    if details:
        small += [short(f"{key}: {short(str(value), details)}", details + LINE) for key, value in node.details.items()]
    colour = mixed(style.text, style.fill)
    return "<BR/>".join([title, *(font(escaped(line), theme.size - 2.5, colour) for line in small)])


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


def reference(label: str, name: str, theme: Theme) -> dict[str, str]:
    """A small mark that stands for a far node, and leads to it in SVG."""
    size = points(theme.size - 2.5)
    look = {"label": short(label), "shape": "plaintext", "fontsize": size, "fontcolor": theme.faint}
    return look | {"tooltip": f"from {label}, far above", "URL": f"#{name}", "height": "0.1", "width": "0.1"}


def edge_look(
    e: Edge,
    theme: Theme,
    several: set[str],
    unsafe: set[str],
    reach: tuple[float, float] | None,
) -> dict[str, str]:
    """The attributes of an edge; `several` are nodes with several results, `unsafe` those of `.data`."""
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
        if not math.isfinite(e.norm):
            bad = theme.style("operation", frozenset({"nan"}))
            look |= {"color": bad.border, "fontcolor": bad.border, "penwidth": "2.6"}
        elif reach is not None and e.kind == "data":
            part = _part(e.norm, reach)
            look |= {"color": ramp(theme.scale, part), "penwidth": f"{1 + 2.2 * part:.2f}"}
    if e.rank is not None:
        colour = theme.ranks[min(e.rank, len(theme.ranks) - 1)]
        look |= {"color": colour, "fontcolor": colour, "penwidth": f"{max(3.0 - 0.5 * e.rank, 2.0):.1f}"}
    if words:
        look["label"] = " " + ", ".join(words) + " "
    return look


def reach_of(edges: Iterable[Edge]) -> tuple[float, float] | None:
    """The smallest and largest norm, as logarithms."""
    norms = [math.log10(e.norm) for e in edges if e.norm is not None and 0 < e.norm < math.inf]
    return (min(norms), max(norms)) if norms else None


def _part(norm: float, reach: tuple[float, float]) -> float:
    """Where a norm lies between the smallest (0) and the largest (1)."""
    low, high = reach
    if not norm > 0:
        return 0.0
    return (math.log10(norm) - low) / (high - low) if high > low else 1.0


def ends_of(data: GraphData) -> dict[str, int]:
    """Ends of highlighted paths: node id -> 0 where they begin, 1 where they lead to."""
    ranked = [e for e in data.edges if e.rank is not None]
    sources, targets = {e.source for e in ranked}, {e.target for e in ranked}
    return dict.fromkeys(sources - targets, 0) | dict.fromkeys(targets - sources, 1)
