"""Text and colours as DOT writes them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

LINE = 36  # letters of a label's line; longer labels are cut, and are whole in the tooltip


def memory(nbytes: float) -> str:
    """3.21 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.3g} {unit}"


def mixed(a: str, b: str, part: float = 0.3) -> str:
    """The colour between `a` (part 0) and `b` (part 1); `a` if one of them is not "#rrggbb"."""
    try:
        first, second = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (a, b))
    except ValueError:
        return a
    return "#" + "".join(f"{round(x + (y - x) * part):02x}" for x, y in zip(first, second, strict=True))


def ramp(colours: Sequence[str], part: float) -> str:
    """The colour at `part` (0 to 1) of the way along several."""
    at = part * (len(colours) - 1)
    i = min(int(at), len(colours) - 2)
    return mixed(colours[i], colours[i + 1], at - i)


def short(text: str, size: int = LINE) -> str:
    """One line of at most `size` letters."""
    text = " ".join(text.split())
    return text if len(text) <= size else text[: size - 1] + "…"


def escaped(text: str, bold: bool = False) -> str:
    """Text inside of an HTML label, without characters that XML forbids."""
    clean = escape("".join(c if c.isprintable() else " " for c in text)) or " "
    return f"<B>{clean}</B>" if bold else clean


def listed(attributes: dict[str, str]) -> str:
    """Attributes as DOT writes them."""
    return " ".join(f"{key}={quoted(value)}" for key, value in attributes.items())


def quoted(text: str) -> str:
    """Text as a quoted DOT string: backslashes and quotes are themselves, line ends are kept."""
    clean = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return '"' + clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def points(size: float) -> str:
    """A number without needless digits."""
    return f"{size:g}"


def font(inside: str, size: float, colour: str) -> str:
    """What is inside, in another size and colour, for an HTML label."""
    return f'<FONT POINT-SIZE="{points(size)}" COLOR="{colour}">{inside}</FONT>'
