"""Functions that Triton lacks, or has in a slower form, as text: exp in float32, the derivatives of log Gamma.

Where the argument is small it is raised by ones to at least 10, and what that adds is summed; then Stirling's series
follows (Abramowitz and Stegun 1964, 6.3.18 and 6.4.11). Below zero the first two are reflected (6.3.7, 6.4.7). The
others are raised from there, by one step for each unit, up to 10,000 of them; farther down they are nan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache

from pullback.kernels.ir.primitives import PRIMITIVES

_TEXTS = {"Digamma": "digamma({0})", "Trigamma": "polygamma1({0})", "PolyGamma": "polygamma{p0}({0})"}
_TERMS = 12  # of Stirling's series; the first one left out is below 1e-17 of the sum for orders up to 8


def text(op: str) -> str | None:
    """The Triton text of a row of the table of primitives; None if there is none."""
    return PRIMITIVES[op].triton or _TEXTS.get(op)


def exponential(argument: str, elem: str, factor: float = 1.0) -> str:
    """exp(factor * argument).

    In float32 by exp2 of libdevice, one instruction of NVIDIA's, where `tl.exp` adds three for results below 1e-38,
    which this makes 0. Its relative error is 2 units in the last place and that of the rounded argument.
    """
    if elem == "tl.float32":
        return f"libdevice.exp2({argument} * {factor / math.log(2)!r})"
    return f"tl.exp({argument}{'' if factor == 1.0 else f' * {factor!r}'})"


def functions(lines: Iterable[str]) -> list[str]:
    """Text of the functions that the lines call."""
    names = {name for line in lines for name in re.findall(r"\b(?:digamma|polygamma\d+)(?=\()", line)}
    return [line for name in sorted(names) for line in (_digamma() if name == "digamma" else _polygamma(int(name[9:])))]


@lru_cache(maxsize=1)
def _bernoulli() -> list[Fraction]:
    """B_0, B_2, B_4, ..."""
    found = [Fraction(1)]
    for n in range(1, 2 * _TERMS + 1):
        found.append(-sum((math.comb(n + 1, k) * found[k] for k in range(n)), Fraction(0)) / (n + 1))
    return found[::2]


def _horner(coefficients: list[Fraction]) -> str:
    """c0 + q (c1 + q (c2 + ...)) with q = 1 / y^2."""
    total = repr(float(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        total = f"({float(c)!r} + q * {total})"
    return total


_RAISE = ["    small = y < 10.0", "    total += tl.where(small, {}, 0.0)", "    y = tl.where(small, y + 1.0, y)"]
_PI = f"{math.pi!r}"


def _raised(term: str) -> list[str]:
    return [f"    {line}" for line in ("for _ in range(10):", *(line.format(term) for line in _RAISE))]


@lru_cache(maxsize=1)
def _digamma() -> list[str]:
    series = _horner([b / (2 * j) for j, b in enumerate(_bernoulli()) if j])
    return [
        "@triton.jit",
        "def digamma(x):",
        "    y = tl.where(x < 0.0, 1.0 - x, x)",
        "    total = tl.zeros_like(y)",
        *_raised("1.0 / y"),
        "    q = 1.0 / (y * y)",
        f"    value = tl.log(y) - 0.5 / y - q * {series} - total",
        "    part = x - tl.floor(x + 0.5)",
        f"    turned = value - {_PI} * tl.cos({_PI} * part) / tl.sin({_PI} * part)",
        "    value = tl.where(x < 0.0, tl.where(part == 0.0, float('nan'), turned), value)",
        "    return tl.where(x == 0.0, -1.0 / x, tl.where(x == float('inf'), x, value))",
        "",
    ]


@lru_cache(maxsize=64)
def _polygamma(n: int) -> list[str]:
    """(-1)^(n+1) n! sum_k (x + k)^-(n+1)."""
    power = "1.0" + " / y" * (n + 1)
    numbers = enumerate(_bernoulli())
    rising = [b * math.factorial(2 * j + n - 1) / (math.factorial(2 * j) * math.factorial(n)) for j, b in numbers if j]
    series = _horner(rising)
    factor = float((-1) ** (n + 1) * math.factorial(n))
    lines = ["@triton.jit", f"def polygamma{n}(x):"]
    if n == 1:
        lines += ["    y = tl.where(x < 0.5, 1.0 - x, x)", "    total = tl.zeros_like(y)", *_raised(power)]
    else:
        lines += [
            "    x = x + tl.zeros((1, 1), tl.float32)",  # parameters are no tiles
            "    pole = (x <= 0.0) & (x == tl.floor(x))",
            "    y = tl.where(pole | (x < -1e4), 10.0, x)",
            "    total = tl.zeros_like(y)",
            "    while tl.min(tl.min(tl.where(y == y, y, 10.0), 1), 0) < 10.0:",
            *(f"    {line}" for line in (line.format(power) for line in _RAISE)),
        ]
    lines += [
        "    r = 1.0 / y",
        "    q = r * r",
        f"    total += {' * '.join(['r'] * n)} * ({1 / n!r} + r * (0.5 + r * {series}))",
    ]
    if n == 1:
        lines += [
            "    part = x - tl.floor(x + 0.5)",
            f"    sine = tl.sin({_PI} * part)",
            f"    return tl.where(x < 0.5, {math.pi**2!r} / (sine * sine) - total, total)",
        ]
    else:
        infinite = "float('inf')" if n % 2 else "float('-inf')"
        lines += [
            f"    value = {factor!r} * total",
            "    value = tl.where(x < -1e4, float('nan'), value)",
            f"    return tl.where(pole, {infinite}, value)",
        ]
    return [*lines, ""]
