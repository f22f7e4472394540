"""Pictures of DOT text by pygraphviz, whose wheels bring Graphviz with them: no `dot` on PATH is needed."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pullback.core.errors import ArgumentError, PullbackError

FORMATS = ("svg", "png", "pdf")
DPI = 144
MAX_SIDE = 16_000  # pixels
MAX_AREA = 60_000_000  # pixels; four bytes each
_POINTS = 72.0

_LOCK = threading.Lock()  # Graphviz keeps global state
_NOISE = re.compile(r"Fontconfig (warning|error)|Pango-WARNING|^\s*$")


class MissingPackageError(PullbackError, ImportError):
    """A package that only some drawings need is not installed."""


def render(text: str, format: str, dpi: int | None = None) -> bytes:
    """The picture of DOT text.

    Args:
        text: DOT.
        format: "svg", "png" or "pdf".
        dpi: pixels per inch of a PNG, 144 by default; less where the picture would exceed 16,000 pixels in a direction
            or 60 million in all, so a large graph costs at most about a quarter of a gigabyte. SVG, PDF and HTML stay
            readable at any size.

    Raises: MissingPackageError without pygraphviz; ArgumentError for another format, or text that is not DOT.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if dpi is not None and not 1 <= dpi <= 2400:
        raise ArgumentError(f"dpi must lie between 1 and 2400; got {dpi}")
    pygraphviz = _pygraphviz()
    with _LOCK, _quiet() as noise:
        try:
            graph = pygraphviz.AGraph(string=text)
        except Exception as error:
            raise ArgumentError(f"Graphviz cannot read this DOT text: {error} {' '.join(noise())}".strip()) from None
        try:
            return _drawn(pygraphviz.graphviz, graph, format, dpi)
        finally:
            graph.close()


def _drawn(gv: Any, graph: Any, format: str, dpi: int | None) -> bytes:
    """Lay out, and for bitmaps choose the resolution by the size before drawing."""
    context = gv.gvContextWithBuiltins()
    try:
        _call(gv.gvLayout(context, graph.handle, b"dot"))
        if format != "png":
            return _data(gv, context, graph, format)
        _data(gv, context, graph, "dot")  # notes positions and the size in the graph
        gv.gvFreeLayout(context, graph.handle)
        graph.graph_attr["dpi"] = f"{resolution(graph.graph_attr['bb'], dpi or DPI):g}"
        _call(gv.gvLayout(context, graph.handle, b"nop2"))
        return _data(gv, context, graph, format)
    finally:
        gv.gvFreeLayout(context, graph.handle)
        gv.gvFreeContext(context)


def _data(gv: Any, context: Any, graph: Any, format: str) -> bytes:
    code, data = gv.gvRenderData(context, graph.handle, format.encode())
    _call(code)
    return data if isinstance(data, bytes) else data.encode()


def _call(code: int) -> None:
    if code:
        raise PullbackError(f"Graphviz failed ({code}); save .dot or .html instead, and please report it")


def resolution(box: str, dpi: float) -> float:
    """`dpi`, or less, such that a drawing of size `box` ("0,0,width,height" [points]) stays within the limits."""
    left, low, right, high = (float(v) for v in box.split(","))
    width, height = ((right - left + 40) / _POINTS, (high - low + 40) / _POINTS)
    return min(dpi, MAX_SIDE / max(width, height), (MAX_AREA / (width * height)) ** 0.5)


def _pygraphviz() -> Any:
    try:
        import pygraphviz
    except ImportError as error:
        raise MissingPackageError(
            f"SVG, PNG and PDF need pygraphviz, which brings Graphviz: pip install 'pullback[viz]' ({error}). "
            ".dot, .html and .json need nothing."
        ) from None
    if not hasattr(pygraphviz.graphviz, "gvContextWithBuiltins"):
        raise MissingPackageError("pygraphviz must be 2.0.4 or newer: pip install --upgrade 'pullback[viz]'")
    return pygraphviz


@contextmanager
def _quiet() -> Iterator[Any]:
    """Keep what C libraries write about fonts from the terminal; everything else they write still arrives there.

    Yields: a function that takes the lines written so far.
    """
    with tempfile.TemporaryFile() as file:
        try:
            keep = os.dup(2)
        except OSError:  # no standard error, as in some windowed programs
            yield list
            return

        def taken() -> list[str]:
            file.seek(0)
            found = file.read().decode(errors="replace").splitlines()
            file.seek(0)
            file.truncate()
            return [t for t in found if not _NOISE.search(t)]

        os.dup2(file.fileno(), 2)
        try:
            yield taken
        finally:
            os.dup2(keep, 2)
            found = taken()
            if found:
                os.write(keep, ("\n".join(found) + "\n").encode())
            os.close(keep)
