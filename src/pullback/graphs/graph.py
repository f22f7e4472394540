"""`Graph`: a traced computation that can be simplified, drawn, saved and shown in a notebook."""

from __future__ import annotations

import json
import math
import secrets
import tempfile
import webbrowser
from collections import Counter
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, Self

from pullback.core.errors import ArgumentError
from pullback.graphs.dot import to_dot
from pullback.graphs.html import to_html
from pullback.graphs.model import KINDS, GraphData
from pullback.graphs.render import MissingPackageError, render
from pullback.graphs.text import memory
from pullback.graphs.themes import Theme, theme_of

Look = str | Theme | Mapping[str, Any]
Styles = Mapping[str, Mapping[str, Any]]

_DRAWN = frozenset({"direction", "clusters", "shapes", "details", "attributes"})
# Ending of a file -> options of `save` that have an effect there.
OPTIONS: dict[str, frozenset[str]] = {
    "dot": _DRAWN,
    "gv": _DRAWN,
    "svg": _DRAWN,
    "pdf": _DRAWN,
    "png": _DRAWN | {"dpi"},
    "html": frozenset(),
    "json": frozenset(),
}
_INLINE = 40  # nodes up to which a notebook shows the picture itself instead of the interactive page


class Graph(GraphData):
    """A graph that draws itself.

    Attributes:
        nodes, edges, kind, title, groups: as in `GraphData`.
        theme: "basic", "blue", "dark", "print", or a dict of changes (see `themes.theme_of`).
        styles: kind or flag of a node -> changes of its style.
    """

    theme: Look = "basic"
    styles: Styles | None = None

    @classmethod
    def of(cls, data: GraphData, theme: Look = "basic", styles: Styles | None = None) -> Self:
        """A graph of this class with the nodes and edges of `data`."""
        new = cls(data.nodes, data.edges, kind=data.kind, title=data.title, groups=data.groups)
        new.theme, new.styles = theme, styles
        return new

    def apply(self, *passes: Callable[[GraphData], GraphData]) -> Self:
        """The graph after these passes, one after the other; this one stays as it is.

        Args:
            passes: `Prune("Constant")`, `Collapse(1)` ..., or any function from a graph to a graph.

        Raises: ArgumentError for what is no pass.
        """
        data: GraphData = self
        for one in passes:
            if not callable(one):
                raise ArgumentError(f"apply takes passes such as Prune('Constant'); got a {type(one).__name__}")
            data = one(data)
            if not isinstance(data, GraphData):
                raise ArgumentError(f"the pass {one!r} returned a {type(data).__name__}, not a graph")
        return type(self).of(data, self.theme, self.styles)

    def with_theme(self, theme: Look, styles: Styles | None = None) -> Self:
        """The same graph with another look."""
        return type(self).of(self, theme, styles)

    def save(
        self, path: str | Path, theme: Look | None = None, *, styles: Styles | None = None, **options: Any
    ) -> Path:
        """Write the graph; the ending of the name says as what. The file appears complete or not at all.

        Args:
            path: .dot or .gv (DOT text), .svg, .png, .pdf (drawn by Graphviz), .html (one interactive page that works
                offline), .json (nodes and edges).
            theme: instead of the graph's own.
            styles: kind or flag of a node -> changes of its style: {"parameter": {"fill": "#ffffff"}}.
            **options: of drawings: `direction` ("TB", "LR" ...), `clusters` (modules as frames), `shapes`, `details`
                (letters of each further fact on a node) and `attributes` (of Graphviz); of .png: `dpi`.

        Returns: the path.
        Raises: ArgumentError for another ending, an option without effect on it, or a folder that does not exist;
            MissingPackageError for .svg, .png and .pdf without pygraphviz.
        """
        path = Path(path)
        ending = path.suffix.lower().removeprefix(".")
        if ending not in OPTIONS:
            known = ", ".join("." + name for name in OPTIONS)
            raise ArgumentError(f"save: the name must end in one of {known}; got {path.name!r}")
        if not path.parent.is_dir():
            raise ArgumentError(f"save: the folder {str(path.parent)!r} does not exist; create it first")
        data = self.encoded(ending, theme, styles, **options)
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def encoded(self, format: str, theme: Look | None = None, styles: Styles | None = None, **options: Any) -> bytes:
        """What `save` writes into a file that ends in `format`."""
        if format not in OPTIONS:
            raise ArgumentError(f"format must be one of {', '.join(OPTIONS)}; got {format!r}")
        for name in options:
            if name not in OPTIONS[format]:
                known = ", ".join(sorted(OPTIONS[format])) or "none"
                raise ArgumentError(f"the option {name!r} has no effect on .{format}; options of it are: {known}")
        look, rows = self._look(theme, styles)
        if format == "html":
            return to_html(self, look, styles=rows).encode()
        if format == "json":
            return (json.dumps(_finite(self.to_json()), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
        dpi = options.pop("dpi", None)
        text = to_dot(self, theme_of(look, rows), **options)
        return text.encode() if format in ("dot", "gv") else render(text, format, dpi)

    def to_dot(self, theme: Look | None = None, styles: Styles | None = None, **options: Any) -> str:
        """DOT text; the options are those of `save`."""
        return self.encoded("dot", theme, styles, **options).decode()

    def to_svg(self, theme: Look | None = None, styles: Styles | None = None, **options: Any) -> str:
        """An <svg> element, to be placed into a page; the options are those of `save`."""
        text = self.encoded("svg", theme, styles, **options).decode()
        return text[text.index("<svg") :]

    def to_html(self, theme: Look | None = None, styles: Styles | None = None) -> str:
        """The interactive page."""
        return self.encoded("html", theme, styles).decode()

    def view(self) -> Path:
        """Open the interactive page in the browser; returns the file, which stays."""
        path = self.save(Path(tempfile.mkdtemp(prefix="pullback-")) / "graph.html")
        webbrowser.open(path.as_uri())
        return path

    def summary(self) -> str:
        """The graph in numbers, as text: nodes by kind, parameters, memory and who keeps most of it, warnings."""
        lines = [repr(self)[1:-1].replace(type(self).__name__, "Graph", 1)]
        kinds = Counter({kind: sum(n.count for n in self.nodes if n.kind == kind) for kind in KINDS})
        lines += _table([(kind, str(number)) for kind, number in kinds.items() if number])
        named = [n for n in self.nodes if n.kind == "parameter" and n.values]
        held = sum(math.prod(n.values[0].shape) for n in named)
        held += sum(p for n in self.nodes if isinstance(p := n.details.get("parameters"), int))
        if held:
            lines.append(f"parameters: {held:,} numbers")
        keepers = sorted((n for n in self.nodes if n.nbytes), key=lambda n: -n.nbytes)
        if keepers:
            lines.append(f"kept for the derivative: {memory(self.nbytes)}, most by")
            lines += _table([(".".join((*n.group, n.label)), memory(n.nbytes)) for n in keepers[:5]])
        cuts = Counter(e.reason or "cut" for e in self.edges if e.kind == "cut")
        if cuts:
            lines.append("gradients end at: " + ", ".join(f"{reason} ({number})" for reason, number in cuts.items()))
        for flag, text in (("nan", "NaN or infinity begins at"), ("unsafe", "unsafe .data at")):
            found = [n.label + (f" ({n.source})" if n.source else "") for n in self.nodes if flag in n.flags]
            if found:
                lines.append(f"{text}: " + ", ".join(found[:5]) + (" ..." if len(found) > 5 else ""))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()

    def _look(self, theme: Look | None, styles: Styles | None) -> tuple[Look, Styles]:
        rows = {key: dict(row) for key, row in (self.styles or {}).items()}
        for key, row in (styles or {}).items():
            rows[key] = rows.get(key, {}) | dict(row)
        return (self.theme if theme is None else theme), rows

    def _repr_html_(self) -> str:
        """For notebooks: a small graph as a picture, a large one as the interactive page in a frame."""
        if len(self.nodes) <= _INLINE:
            try:
                return f'<div style="overflow:auto;max-width:100%">{self.to_svg()}</div>'
            except MissingPackageError:
                pass
        page = escape(self.to_html())
        return (
            '<iframe sandbox="allow-scripts allow-downloads" '
            f'style="width:100%;height:600px;border:1px solid #cbd2d9;border-radius:6px" srcdoc="{page}"></iframe>'
        )


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    last = max((len(value) for _, value in rows), default=0)
    return [f"  {name.ljust(width)}  {value.rjust(last)}" for name, value in rows]


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
