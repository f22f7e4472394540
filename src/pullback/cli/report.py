"""report.html: one file that needs no network, with its figures inside."""

from __future__ import annotations

import base64
import html
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("pullback", "torch", "numpy", "numba", "finufft", "h5py")

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --paper: #ffffff; --tint: #f4f6f8; --accent: #0b6e8f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #333b45; --paper: #14181d; --tint: #1d232a; --accent: #5cc3e4; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
p { max-width: 72ch; } .lead { color: var(--soft); margin: 0 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 0; }
.tiles div { background: var(--tint); border-radius: 8px; padding: 14px 16px; }
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: 2px 0 0; font-size: 1.3rem; font-weight: 620; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 560; } td.n, th.n { text-align: right; }
tr.best td { color: var(--accent); font-weight: 620; }
figure { margin: 0 0 20px; } figure img { width: 100%; height: auto; border-radius: 6px; background: #fff; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: 6px; max-width: 90ch; }
footer { margin-top: 48px; color: var(--soft); font-size: .84rem; } code { font-size: .9em; overflow-wrap: anywhere; }
"""


def versions() -> dict[str, str]:
    """Python, the machine and the packages that the numbers depend on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def page(title: str, lead: str, blocks: Sequence[str]) -> str:
    """The whole document."""
    body = "\n".join(blocks)
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n'
        f"<footer>{html.escape(used)}</footer>\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section's title."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """The figures that matter most, each as (name, value, remark)."""
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(remark)}</small></dd></div>"
        for name, value, remark in facts
    )
    return f'<dl class="tiles">{items}</dl>'


def figure(png: bytes, caption: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], best: int | None = None) -> str:
    """A table; numbers are aligned right, and the row `best` is marked."""

    def cell(tag: str, value: Any, numeric: bool) -> str:
        return f"<{tag}{' class=n' if numeric else ''}>{html.escape(shown(value))}</{tag}>"

    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    head = "".join(cell("th", name, number) for name, number in zip(header, numeric, strict=True))
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>"
        + "".join(cell("td", value, number) for value, number in zip(row, numeric, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def settings_table(values: Mapping[str, Any]) -> str:
    """Names and values, one a row."""
    return table(("setting", "value"), [(name.replace("_", "-"), shown(value)) for name, value in values.items()])


def shown(value: Any) -> str:
    """A value as a reader wants it: four or five digits, lists with commas, a dash for nothing."""
    if value is None or value == "" or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(v) for v in value)
    return str(value)
