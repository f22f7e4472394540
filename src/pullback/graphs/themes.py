"""How graphs look: one row a kind of node, one table a theme. Every drawing reads its colours here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pullback.core.errors import ArgumentError
from pullback.graphs.model import FLAGS, KINDS


@dataclass(frozen=True, slots=True)
class Style:
    """How a node looks: colours as "#rrggbb", a Graphviz shape ("box", "ellipse", "octagon"), "solid" or "dashed"."""

    fill: str
    border: str
    text: str
    shape: str = "box"
    line: str = "solid"
    width: float = 1.0


@dataclass(frozen=True)
class Theme:
    """Colours and lines of a drawing.

    Attributes:
        name: of the theme.
        kinds: kind of node -> `Style`.
        flags: flag of a node -> fields of `Style` that it changes: {"nan": {"border": "#d00000"}}.
        background, text, faint: of the page, of titles, of shapes and other small print.
        edge, cut, saved, unsafe: colours of edges.
        ranks: colours of the largest gradient path, the second, the third; later paths take the last.
        ends: fills of the first and last node of a highlighted path: (leaf, result); empty to leave them.
        scale: colours of edges from the smallest to the largest gradient norm.
        groups: fill of modules by depth, cycled; group_border, group_text: their lines and names.
        font: families by preference; size: of labels [points].
    """

    name: str
    kinds: Mapping[str, Style]
    flags: Mapping[str, Mapping[str, Any]]
    background: str = "#ffffff"
    text: str = "#1f2933"
    faint: str = "#5f6b7a"
    edge: str = "#7b8794"
    cut: str = "#a3adb8"
    saved: str = "#d9822b"
    unsafe: str = "#d64500"
    ranks: tuple[str, ...] = ("#8b0000", "#e02020", "#ff9800")
    ends: tuple[str, ...] = ("#7cc47f", "#c49a6c")
    scale: tuple[str, ...] = ("#c6d4e3", "#4b83bd", "#0b3c74")
    groups: tuple[str, ...] = ("#f5f7fa", "#ebeff4")
    group_border: str = "#cbd2d9"
    group_text: str = "#52606d"
    font: str = "Helvetica,Arial,DejaVu Sans,sans-serif"
    size: float = 11.0

    def style(self, kind: str, flags: frozenset[str] = frozenset()) -> Style:
        """The style of a node: that of its kind, changed by its flags in the order of `FLAGS`, the first on top."""
        found = self.kinds[kind]
        for flag in reversed(FLAGS):
            if flag in flags and flag in self.flags:
                found = replace(found, **self.flags[flag])
        return found


def _kinds(**rows: tuple[Any, ...]) -> dict[str, Style]:
    return {kind: Style(*row) for kind, row in rows.items()}


_WARNINGS: dict[str, dict[str, Any]] = {
    "nan": {"fill": "#ffdede", "border": "#c80000", "text": "#8b0000", "width": 2.4},
    "unsafe": {"border": "#d64500", "width": 2.2},
    "no_grad": {"line": "dashed"},
}

# kind: fill, border, text, shape, line, width
BASIC = Theme(
    "basic",
    _kinds(
        leaf=("#dcefdc", "#5a9e5d", "#1d4d20", "ellipse"),
        parameter=("#dbe9f9", "#6c9bd1", "#173e6b", "ellipse"),
        input=("#fff6d6", "#d1a92b", "#5c4700", "ellipse"),
        constant=("#f1f1f1", "#b5b5b5", "#4a4a4a", "ellipse"),
        operation=("#f7f8fa", "#8d99a6", "#1f2933"),
        function=("#efe3fb", "#9466c9", "#43217a"),
        operator=("#ffe3cf", "#dd7a35", "#6d3105"),
        accumulate=("#ffffff", "#b8c1cb", "#66727f"),
        saved=("#fff3e2", "#d9822b", "#7a4504", "note"),
        output=("#e6dac9", "#8a6a45", "#4a3415", "ellipse"),
        module=("#dfe7ef", "#5d7590", "#1d3044", "box3d"),
    ),
    _WARNINGS,
)

BLUE = replace(
    BASIC,
    name="blue",
    kinds=_kinds(
        leaf=("#e3f1ff", "#2f74c0", "#0c2f57", "ellipse", "solid", 1.6),
        parameter=("#ffffff", "#7c96bc", "#26456e", "ellipse"),
        input=("#ffffff", "#2f74c0", "#0c2f57", "ellipse"),
        constant=("#f2f5fa", "#b7c3d6", "#4d5c74", "ellipse"),
        operation=("#bcd6fc", "#7c96bc", "#202020"),
        function=("#a9c3f5", "#4d6fae", "#101c36"),
        operator=("#8db4f2", "#33589c", "#0a1730"),
        accumulate=("#eef4fe", "#b7c9e6", "#5c7090"),
        saved=("#f4f8ff", "#8aa7d6", "#38517c", "note"),
        output=("#2f62b0", "#1d3f75", "#ffffff", "ellipse"),
        module=("#9cc0f7", "#4b6ea6", "#10203a", "box3d"),
    ),
    edge="#7c96bc",
    saved="#8aa7d6",
    groups=("#f3f7fe", "#e5eefc"),
    group_border="#c3d3ec",
    group_text="#4b6ea6",
)

DARK = replace(
    BASIC,
    name="dark",
    kinds=_kinds(
        leaf=("#1f4a2c", "#58b070", "#d5f5dd", "ellipse"),
        parameter=("#1d3a5c", "#5c96d6", "#d6e8fb", "ellipse"),
        input=("#4d4115", "#cfae3d", "#fbf1cb", "ellipse"),
        constant=("#33383f", "#717b87", "#c9d1d9", "ellipse"),
        operation=("#2a313b", "#76828f", "#eef2f6"),
        function=("#3f2a5c", "#a57fdb", "#eadcfb"),
        operator=("#59341a", "#e08a48", "#fde3cf"),
        accumulate=("#1d232b", "#55606c", "#9aa6b2"),
        saved=("#423018", "#d9913f", "#fbe3c2", "note"),
        output=("#52412c", "#b8925f", "#f5e6d0", "ellipse"),
        module=("#33475c", "#7fa0c2", "#e4eef8", "box3d"),
    ),
    flags={
        "nan": {"fill": "#5c1418", "border": "#ff5a5a", "text": "#ffd9d9", "width": 2.4},
        "unsafe": {"border": "#ff7a3c", "width": 2.2},
        "no_grad": {"line": "dashed"},
    },
    background="#14181d",
    text="#e6ebf0",
    faint="#9fabb8",
    edge="#8592a0",
    cut="#5f6b77",
    saved="#d9913f",
    unsafe="#ff7a3c",
    ranks=("#ff4d4d", "#ff8a8a", "#ffb74d"),
    ends=("#2e8b47", "#8a6236"),
    scale=("#3a4a5c", "#5c96d6", "#c4e0ff"),
    groups=("#1b2128", "#222a33"),
    group_border="#3b4652",
    group_text="#9fb0c2",
)

PRINT = replace(
    BASIC,
    name="print",
    kinds=_kinds(
        leaf=("#ffffff", "#000000", "#000000", "ellipse", "solid", 1.6),
        parameter=("#ffffff", "#000000", "#000000", "ellipse"),
        input=("#ffffff", "#000000", "#000000", "ellipse", "dashed"),
        constant=("#ffffff", "#808080", "#000000", "ellipse", "dotted"),
        operation=("#ffffff", "#000000", "#000000"),
        function=("#ffffff", "#000000", "#000000", "component"),
        operator=("#e8e8e8", "#000000", "#000000"),
        accumulate=("#ffffff", "#808080", "#404040"),
        saved=("#ffffff", "#000000", "#000000", "note"),
        output=("#ffffff", "#000000", "#000000", "ellipse", "solid", 2.4),
        module=("#f2f2f2", "#000000", "#000000", "box3d"),
    ),
    flags={
        "nan": {"fill": "#000000", "text": "#ffffff", "width": 3.0},
        "unsafe": {"shape": "octagon", "width": 2.6},
        "no_grad": {"line": "dashed"},
    },
    text="#000000",
    faint="#404040",
    edge="#000000",
    cut="#707070",
    saved="#000000",
    unsafe="#000000",
    ranks=("#000000", "#505050", "#909090"),
    ends=(),
    scale=("#c0c0c0", "#606060", "#000000"),
    groups=("#ffffff",),
    group_border="#909090",
    group_text="#000000",
)

THEMES = {theme.name: theme for theme in (BASIC, BLUE, DARK, PRINT)}

_PEER = {  # names of hiddenlayer's theme dictionaries
    "background_color": "background",
    "font_color": "text",
    "font_name": "font",
    "font_size": "size",
}
_STYLE = {f.name for f in fields(Style)}
_THEME = {f.name for f in fields(Theme)} - {"name", "kinds", "flags"}


def theme_of(theme: str | Theme | Mapping[str, Any], styles: Mapping[str, Mapping[str, Any]] | None = None) -> Theme:
    """The theme called `theme`, or made by a dictionary, with styles of the user on top.

    Args:
        theme: "basic", "blue", "dark", "print"; a `Theme`; or a dict of what to change in one: {"base": "dark",
            "background": "#000000", "parameter": {"fill": "#ffffff"}}. The keys of hiddenlayer's theme dicts
            (`background_color`, `fill_color`, `outline_color`, `font_color`, `font_name`, `font_size`) are known, too.
        styles: kind or flag of a node -> fields of `Style` to change: {"parameter": {"fill": "#ffffff"}}.

    Raises: ArgumentError for a name, kind or field that does not exist.
    """
    changes: dict[str, Any] = dict(theme) if isinstance(theme, Mapping) else {}
    base: Any = changes.pop("base", "basic") if isinstance(theme, Mapping) else theme
    if isinstance(base, str):
        if base not in THEMES:
            raise ArgumentError(f"theme must be one of {', '.join(THEMES)}, or a dict of changes; got {base!r}")
        base = THEMES[base]
    if not isinstance(base, Theme):
        raise ArgumentError(f"theme must be a name, a dict or a Theme; got a {type(base).__name__}")
    top: dict[str, Any] = {}
    rows = dict(styles or {})
    for key, value in changes.items():
        name = _PEER.get(key, key)
        if name in _THEME:
            top[name] = float(value) if name == "size" else value
        elif key in ("fill_color", "outline_color"):
            part = {"fill_color": "fill", "outline_color": "border"}[key]
            for kind in KINDS:
                rows[kind] = {part: value} | dict(rows.get(kind, {}))
        elif key in KINDS or key in FLAGS:
            rows[key] = dict(value) | dict(rows.get(key, {}))
        elif key not in ("margin", "padding"):
            raise ArgumentError(f"theme: {key!r} is neither a field ({', '.join(sorted(_THEME))}) nor a kind of node")
    kinds, flags = dict(base.kinds), dict(base.flags)
    for key, row in rows.items():
        if not isinstance(row, Mapping) or not set(row) <= _STYLE:
            raise ArgumentError(f"styles: {key!r} needs a dict with {', '.join(sorted(_STYLE))}; got {row!r}")
        if key in KINDS:
            kinds[key] = replace(kinds[key], **row)
        elif key in FLAGS:
            flags[key] = dict(flags.get(key, {})) | dict(row)
        else:
            raise ArgumentError(f"styles: {key!r} is not a kind of node; kinds are {', '.join(KINDS + FLAGS)}")
    return replace(base, kinds=kinds, flags=flags, **top)
