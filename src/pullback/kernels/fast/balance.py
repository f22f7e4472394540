"""How long sums over trees take, roughly: constants measured on two cores with AVX-512."""

from __future__ import annotations

import math

import torch

POINT, COEFFICIENT = 5e-8, 7e-10  # seconds on one thread, for a point, and for each of its p^D coefficients
PRODUCT = 5.5e-11  # for a multiplication and addition between cells
ENTRY = 6e-9  # for an entry of the matrices between cells, made once for each kernel and level
PLACED = 2.5e-7  # to sort a point into a tree


def leaf_for(tolerance: float, dim: int) -> int:
    """The `leaf` of a plan that balances the near and the far pairs."""
    return {1: 50, 2: 60, 3: round(min(max(60 * _digits(tolerance) + 10, 100), 330))}[dim]


def threads() -> float:
    """By how much the threads of torch divide times."""
    return float(torch.get_num_threads() ** 0.85)


def estimate(m: int, n: int, dim: int, tolerance: float, rate: float, width: int = 1) -> tuple[float, float]:
    """Seconds of a sum over a tree of evenly spread points: (the first time, again with the same points and kernel).

    Args:
        m, n: number of points.
        dim: D.
        tolerance: of the sum.
        rate: pairs that the exact engine does in a second on all threads.
        width: number of products of a kernel with a weight.
    """
    if not m or not n:
        return 0.0, 0.0
    digits = _digits(tolerance)
    order = round(1 + 1.1 * digits)
    rank = {1: digits + 1, 2: 6 * digits, 3: (1.65 * digits + 0.8) ** 2}[dim]
    pairs = float(m) * n
    depth = max(0, math.ceil(math.log2(pairs / leaf_for(tolerance, dim) ** 2) / (2 * dim)))
    near = min(1.0, 3**dim / 2 ** (dim * depth)) * pairs / rate
    groups = (3**dim - 1) * sum(2 ** (dim * k) for k in range(1, depth))
    far = (m + n) * (POINT + COEFFICIENT * order**dim) + groups * (2**dim * rank) ** 2 * PRODUCT
    once = (m + n) * PLACED / threads() + preparation(order, dim, max(0, depth - 1))
    again = near * width + (far * width if depth > 1 else 0.0) / threads()
    return again + once, again


def preparation(order: int, dim: int, n: int) -> float:
    """Seconds to make the matrices between cells, for `n` pairs of a level and a kernel."""
    return n * (7**dim - 3**dim) * order ** (2 * dim) * ENTRY / threads()


def _digits(tolerance: float) -> float:
    return min(max(-math.log10(tolerance), 1.0), 12.0)
