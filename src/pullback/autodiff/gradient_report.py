"""What a check of gradients found, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pullback.core.check import CheckError


@dataclass(frozen=True)
class GradientResult:
    """One line of a report.

    Attributes:
        name: the input, or what else was looked at.
        mode: "reverse", "forward" or "".
        status: "passed", "failed", "kink" or "skipped".
        got: the derivative by autograd along the worst direction.
        numeric: the same by differences.
        bar: the error bar of `numeric`.
        slopes: orders in h of |f(x + hd) - f(x)| and of the same less h times the derivative: 1 and 2 if all is well;
            inf where the remainder is rounding only.
        detail: what is wrong, and why it may be.
    """

    name: str
    mode: str
    status: str
    got: float = math.nan
    numeric: float = math.nan
    bar: float = math.nan
    slopes: tuple[float, float] = (math.nan, math.nan)
    detail: str = ""

    @property
    def error(self) -> float:
        """|got - numeric| / |numeric|."""
        gap = abs(self.got - self.numeric)
        return gap / abs(self.numeric) if self.numeric else (math.inf if gap else 0.0)


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradient` found; `print(report)` shows the table."""

    function: str
    results: tuple[GradientResult, ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """True if nothing failed."""
        return all(r.status != "failed" for r in self.results)

    def raise_if_failed(self) -> None:
        """Raise CheckError with the table if something failed."""
        if not self.ok:
            raise CheckError(str(self))

    def __str__(self) -> str:
        width = max(len(r.name) for r in self.results)
        lines = [
            f"gradient of {self.function}",
            f"{'':8}{'':{width}}  mode      autograd       differences    error    orders in h",
        ]
        for r in self.results:
            line = f"{r.status:8}{r.name:{width}}  {r.mode:8}"
            if not math.isnan(r.numeric):
                line += f"  {r.got:<13.6g}  {r.numeric:<13.6g}  {r.error:<7.1e}"
            if not math.isnan(r.slopes[0]):
                line += f"  {r.slopes[0]:.2f}, {r.slopes[1]:.2f}"
            lines.append(line.rstrip())
            if r.detail:
                lines.append(f"        {r.detail}")
        return "\n".join(lines)
