"""The exact prox of total variation in one dimension, as a loop that numba compiles.

Only `variation.py` imports this file, when it first needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pullback.functionals._compile import compiled


@compiled
def _denoise(y: Any, radius: Any, out: Any, head: Any, knots: Any, slopes: Any) -> None:
    """Out = argmin_u |u - y|^2 / 2 + radius sum |u[i+1] - u[i]|, for radius > 0.

    Dynamic programming over the derivative of the cost-to-come, a piecewise linear function that is clipped to
    [-radius, radius] at every sample. `knots` and `slopes` hold its breakpoints as a deque of 2 n places, `head` the
    two places per sample where it was clipped.
    """
    n = y.size
    low, high = n - 1, n
    knots[low], knots[high] = y[0] - radius, y[0] + radius
    head[0, 0], head[0, 1] = knots[low], knots[high]
    # the derivative is slope * t + value on the outer pieces; slopes[k] is how slope and value change at knots[k]
    slopes[low, 0], slopes[low, 1] = 1.0, radius - y[0]
    slopes[high, 0], slopes[high, 1] = -1.0, radius + y[0]
    left = (1.0, -radius - y[1])
    right = (-1.0, y[1] - radius)
    for i in range(1, n - 1):
        # from the left: where does the derivative pass -radius?
        a, b = left
        lo = low
        while lo <= high:
            if a * knots[lo] + b > -radius:
                break
            a += slopes[lo, 0]
            b += slopes[lo, 1]
            lo += 1
        # from the right: where does it pass radius? (signs flipped)
        c, d = right
        hi = high
        while hi >= lo:
            if -c * knots[hi] - d < radius:
                break
            c += slopes[hi, 0]
            d += slopes[hi, 1]
            hi -= 1
        low, high = lo - 1, hi + 1
        knots[low] = (-radius - b) / a
        knots[high] = (radius + d) / -c
        slopes[low, 0], slopes[low, 1] = a, b + radius
        slopes[high, 0], slopes[high, 1] = c, d + radius
        head[i, 0], head[i, 1] = knots[low], knots[high]
        left = (1.0, -radius - y[i + 1])
        right = (-1.0, y[i + 1] - radius)
    a, b = left
    for k in range(low, high + 1):
        if a * knots[k] + b > 0:
            break
        a += slopes[k, 0]
        b += slopes[k, 1]
    u = -b / a
    out[n - 1] = u
    for i in range(n - 2, -1, -1):
        u = min(max(u, head[i, 0]), head[i, 1])
        out[i] = u


def proximal(x: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """The prox of total variation for each signal of a batch: x of shape (b, n), n >= 2, on the CPU; radii (b,).

    Cost: O(n) for nearly every signal, in float64. Source: Johnson 2013, doi 10.1080/10618600.2012.681238.
    """
    y = x.to(torch.float64).contiguous().numpy()
    out = np.empty_like(y)
    n = y.shape[1]
    head, knots, slopes = np.empty((n, 2)), np.empty(2 * n), np.empty((2 * n, 2))
    for signal, radius, u in zip(y, radii.tolist(), out, strict=True):
        _denoise(signal, radius, u, head, knots, slopes)
    return torch.from_numpy(out).to(x.dtype)
