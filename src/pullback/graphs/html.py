"""A graph as one interactive page that needs nothing but a browser: no network, no server, no further file."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pullback.core.errors import ArgumentError
from pullback.graphs.model import FLAGS, GraphData
from pullback.graphs.themes import BASIC, DARK, Style, Theme, theme_of

# In this order one script: each part uses names of those above it.
SCRIPTS = (
    "model.js",
    "layers.js",
    "bus.js",
    "ports.js",
    "layout.js",
    "routes.js",
    "draw.js",
    "camera.js",
    "tooltip.js",
    "search.js",
    "marks.js",
    "export.js",
    "main.js",
)
_HERE = Path(__file__).parent
_DASHES = {"dashed": "5 3", "dotted": "1.5 3"}
_NODE_DEFAULTS: dict[str, Any] = {
    "kind": "operation",
    "values": [],
    "group": [],
    "details": {},
    "flags": [],
    "nbytes": 0,
    "source": "",
    "count": 1,
}
_EDGE_DEFAULTS: dict[str, Any] = {
    "output": 0,
    "input": 0,
    "kind": "data",
    "reason": "",
    "label": "",
    "norm": None,
    "rank": None,
}


def to_html(
    data: GraphData,
    theme: str | Theme | Mapping[str, Any] = "basic",
    title: str | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page: pan, zoom, modules that open and close, search, tooltips, paths, light and dark.

    It opens with the outermost modules closed. Nothing is loaded from elsewhere, and a policy in the page forbids it,
    so that it works offline, from a file, and inside of a notebook's frame.

    Args:
        data: the graph.
        theme: "basic" follows the light or dark preference of the system; any other stays as it is until the button
            is pressed. As for `theme_of`.
        title: of the page; that of the graph, if None.
        styles: kind or flag of a node -> fields of `Style` to change.

    Returns: the text of the page, in ASCII, hence safe in any encoding.
    Raises: ArgumentError for a theme that does not exist, or a colour that is none.
    Cost: linear in the graph; the layout is made by the browser.
    """
    chosen = theme_of(theme, styles)
    dark = _brightness(chosen.background) < 0.5
    scheme = "auto" if chosen == BASIC else "dark" if dark else "light"
    title = title or data.title or f"{data.kind.capitalize()} graph"
    parts = {
        "title": html.escape(title),
        "kind": html.escape(data.kind),
        "scheme": scheme,
        "colours": _palette(BASIC if dark else chosen, "light") + _palette(chosen if dark else DARK, "dark"),
        "data": _embed(_compact(data.to_json())),
    }
    page = re.sub("@@([a-z]+)@@", lambda found: parts.get(found[1], found[0]), _template())
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


@cache
def _template() -> str:
    """The page with its style sheet and scripts, and places for what depends on the graph."""
    page, vendor = _HERE / "page", _HERE / "vendor"
    fixed = {
        "css": (page / "page.css").read_text(encoding="utf-8"),
        "licence": (vendor / "LICENSE-dagre").read_text(encoding="utf-8").strip(),
        "dagre": (vendor / "dagre.min.js").read_text(encoding="utf-8").strip(),
        "script": "\n".join((page / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    # Scripts do not read the character references of HTML: what is not ASCII takes their own escape.
    fixed["script"] = re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{{{ord(found[0]):x}}}", fixed["script"])
    text = (page / "page.html").read_text(encoding="utf-8")
    return re.sub("@@([a-z]+)@@", lambda found: fixed.get(found[1], found[0]), text)


def _compact(graph: dict[str, Any]) -> dict[str, Any]:
    """The same graph without what the page knows: fields that have their usual value."""
    rows = {"nodes": _NODE_DEFAULTS, "edges": _EDGE_DEFAULTS}
    short = {
        name: [{k: v for k, v in row.items() if k not in usual or v != usual[k]} for row in graph[name]]
        for name, usual in rows.items()
    }
    for edge in short["edges"]:
        norm = edge.get("norm")
        if norm is not None and not math.isfinite(norm):  # JSON has no word for these
            edge["norm"] = str(norm)
    return graph | short


def _embed(value: Any) -> str:
    """JSON that neither ends the element it stands in nor opens a comment there."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _palette(theme: Theme, scheme: str) -> str:
    """The theme as variables of the style sheet."""
    root = f':root[data-scheme="{scheme}"]'
    low, *_, high = theme.scale
    page = {
        "paper": theme.background,
        "ink": theme.text,
        "muted": theme.faint,
        "edge": theme.edge,
        "cut": theme.cut,
        "saved": theme.saved,
        "unsafe": theme.unsafe,
        "norm-low": low,
        "norm-high": high,
        "group-0": theme.groups[0],
        "group-1": theme.groups[-1],
        "group-rim": theme.group_border,
        "group-ink": theme.group_text,
        "font": theme.font,
    }
    page |= {f"rank{i}": theme.ranks[min(i, len(theme.ranks) - 1)] for i in range(3)}
    rules = [_rule(root, page, f"color-scheme:{scheme};")]
    rules += [_rule(f"{root} .kind-{kind}", _style(style)) for kind, style in theme.kinds.items()]
    for flag in reversed(FLAGS):
        row = {f"flag-{name}": value for name, value in _style(theme.flags.get(flag, {})).items()}
        rules.append(_rule(f"{root} .flag-{flag}", row))
    return "\n".join(rules) + "\n"


def _style(style: Style | Mapping[str, Any]) -> dict[str, str]:
    names = ("fill", "border", "text", "line", "width")
    row = (
        {n: getattr(style, n) for n in names}
        if isinstance(style, Style)
        else {n: style[n] for n in names if n in style}
    )
    line = row.pop("line", None)
    if line is not None:
        row["dash"] = _DASHES.get(line, "none")
    if "width" in row:
        row["width"] = f"{1.3 * row['width']:.3g}px"
    return row


def _rule(selector: str, variables: Mapping[str, str], more: str = "") -> str:
    for name, value in variables.items():
        if not re.fullmatch(r"[\w#%.,()'\" /+-]+", value):
            raise ArgumentError(f"theme: {name} must be a colour such as '#1f77b4' or a font family; got {value!r}")
    return f"{selector}{{{more}" + "".join(f"--{name}:{value};" for name, value in variables.items()) + "}"


def _brightness(colour: str) -> float:
    """Between 0 (black) and 1 (white) for "#rrggbb"; 1 for anything else."""
    found = re.fullmatch("#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", colour)
    if not found:
        return 1.0
    red, green, blue = (int(part, 16) / 255 for part in found.groups())
    return 0.299 * red + 0.587 * green + 0.114 * blue
