"""What `explain` returns: paths with their factors and contributions, and how they are printed."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WIDEST_PATH, _WIDEST_FACTORS, _LONGEST_TABLE = 44, 28, 20


def size(value: Any) -> float:
    """|value|, the Euclidean norm of a tensor."""
    if not isinstance(value, Tensor):
        return abs(value)
    return float(torch.linalg.vector_norm(value.detach())) if value.numel() else 0.0


@dataclass(frozen=True, eq=False)
class PathNode:
    """A station on a path.

    Attributes:
        label: its name, or the operation.
        key: the Scalar, or the node of autograd's graph that made the tensor.
        index: which of the results of that node the path goes through.
    """

    label: str
    key: Any
    index: int


class Path:
    """One path from y to x.

    Attributes:
        nodes: the stations, y first, x last.
        factors: the derivative of each station in the next. Where both are one number that is exact; between tensors it
            is by how much this step changed the norm of the gradient.
        contribution: what this path adds to dy/dx: a number, or a tensor of the shape of x.
        share: its part of the total, <contribution, total> / |total|^2; the shares of all paths sum to 1.
    """

    def __init__(self, nodes: tuple[PathNode, ...], factors: tuple[Any, ...], contribution: Any, total: Any) -> None:
        self.nodes, self.factors, self.contribution = nodes, factors, contribution
        self.share = _share(contribution, total)

    def __repr__(self) -> str:
        return f"Path({_chain(self.nodes, 10**9)}: {_value(self.contribution)})"


class Explanation:
    """dy/dx as a sum over paths; printed as a table. Iterating it gives paths lazily, also those beyond `paths`.

    Attributes:
        paths: the largest contributions that were asked for, largest first.
        total: dy/dx, from one sweep over the graph.
        count: the number of all paths, exact.
        complete: whether `paths` are all of them.
        exact_order: whether `paths` are known to be the largest; if not, the order is a heuristic.
        cancellation: sum of |contribution| over all paths, divided by |total|: 1 if nothing cancels. None if not all
            paths are known.
    """

    def __init__(self, source: Any, paths: Sequence[Path], exact_order: bool) -> None:
        self._source = source
        self.paths = tuple(paths)
        self.total, self.count = source.total, source.paths.count
        self.complete = len(self.paths) == self.count
        self.exact_order = exact_order
        self.y, self.x = source.title, source.name
        absolute = source.absolute
        if absolute is None and self.complete:
            absolute = math.fsum(s for p in paths if math.isfinite(s := size(p.contribution)))
        length = size(self.total)
        self.cancellation = None if absolute is None else absolute / length if length else math.inf

    def __iter__(self) -> Iterator[Path]:
        return self._source.iterate()

    def iter(self) -> Iterator[Path]:
        """All paths, lazily, largest contribution first (or in heuristic order, see `exact_order`)."""
        return iter(self)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = [self._headline(), self._subline()]
        for row in rows:
            cells = [
                f"{c:<{w}}" if k in (1, 2) else f"{c:>{w}}" for k, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        cells = lambda row, tag: "".join(  # noqa: E731
            f'<{tag} style="text-align:{"left" if k in (1, 2) else "right"}">{html.escape(c)}</{tag}>'
            for k, c in enumerate(row)
        )
        rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
        title = f"{html.escape(self._headline())}<br>{html.escape(self._subline())}"
        return f"<table><caption>{title}</caption><tr>{cells(head, 'th')}</tr>{rows}</table>"

    def _headline(self) -> str:
        exact = repr(float(self.total)) if _is_number(self.total) else _value(self.total)
        y = f"({self.y})" if " " in self.y else self.y
        return _cut(f"d {y} / d {self.x}", 80) + f" = {exact}"

    def _subline(self) -> str:
        shown = "all shown" if self.complete else f"{len(self.paths)} largest listed"
        if not self.exact_order:
            shown += ", heuristic order"
        text = f"{_count(self.count)} path{'s' if self.count != 1 else ''}, {shown}"
        if self.cancellation is not None:
            text += f"; sum of |contributions| = {self.cancellation:.4g} |total|"
            text += ", so paths cancel" if self.cancellation > 1 + 1e-9 else ""
        return text

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        tensor = any(isinstance(p.contribution, Tensor) and p.contribution.numel() != 1 for p in self.paths)
        rows = [
            ("#", "path", "gains" if tensor else "factors", "|contribution|" if tensor else "contribution", "share")
        ]
        shown = self.paths[:_LONGEST_TABLE]
        for k, p in enumerate(shown, 1):
            rows.append((str(k), _chain(p.nodes), _product(p.factors), _number_of(p.contribution), _percent(p.share)))
        if len(shown) < self.count:
            rest = f"{_count(self.count - len(shown))} more"
            rows.append(("", rest, "", "", _percent(1 - sum(p.share for p in shown))))
        return [*rows, ("", "sum of all paths", "", _number_of(self.total), _percent(_share(self.total, self.total)))]


class Explanations(tuple[Explanation, ...]):
    """One `Explanation` for each x, printed one after the other."""

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        return "".join(e._repr_html_() for e in self)


def _share(contribution: Any, total: Any) -> float:
    if isinstance(total, Tensor):
        length = float(total.abs().square().sum())
        product = (
            float((contribution.conj() * total).real.sum())
            if total.is_complex()
            else float((contribution * total).sum())
        )
        return product / length if length else math.nan
    return complex(contribution / total).real if total else math.nan


def _count(number: int) -> str:
    """An exact number as long as it is readable."""
    if number < 10**15:
        return f"{number:,}"
    digits = f"{number // 10 ** (magnitude := int(number.bit_length() * math.log10(2)) - 5)}"
    return f"about {digits[0]}.{digits[1:4]}e+{magnitude + len(digits) - 1}"


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def _number_of(value: Any) -> str:
    return (
        f"{float(value): .9g}"
        if _is_number(value)
        else f"{value: .6g}"
        if isinstance(value, complex)
        else (f"{size(value): .6g}")
    )


def _value(value: Any) -> str:
    if _is_number(value):
        return f"{float(value):.9g}"
    if not isinstance(value, Tensor):
        return f"{value:.9g}"
    return f"a tensor of shape {tuple(value.shape)}, norm {size(value):.6g}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f} %" if abs(share) < 1e4 else f"{share:.1e}"


def _chain(nodes: Sequence[PathNode], widest: int = _WIDEST_PATH) -> str:
    """A -> B -> ... -> Y -> Z, shortened in the middle."""
    return _shortened([n.label for n in nodes], " -> ", widest)


def _product(factors: Sequence[Any]) -> str:
    texts = [
        f"({f:.4g})" if isinstance(f, complex) else f"{size(f) if isinstance(f, Tensor) else f:.4g}" for f in factors
    ]
    return _shortened(texts, " * ", _WIDEST_FACTORS)


def _shortened(parts: Sequence[str], link: str, widest: int) -> str:
    if len(parts) <= widest:
        text = link.join(parts)
        if len(text) <= widest:
            return text
    for keep in range(min(len(parts) // 2, widest), 0, -1):
        head, tail = parts[: keep - keep // 2], parts[len(parts) - keep // 2 - 1 :]
        missing = len(parts) - len(head) - len(tail)
        text = link.join([*head, f"({missing} more)", *tail])
        if missing > 0 and len(text) <= widest:
            return text
    return _cut(f"{_cut(parts[0], widest // 2 - 6)}{link}...{link}{_cut(parts[-1], widest // 2 - 6)}", widest)


def _cut(text: str, widest: int) -> str:
    return text if len(text) <= widest else text[: widest - 3] + "..."
