"""Whether inverses reconstruct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.autodiff.invertible.container import Reversible
from pullback.core.errors import ArgumentError


@dataclass(frozen=True)
class InverseReport:
    """Relative errors |x - f^-1(f(x))| / |x|: of each layer at its own input, and of all layers together."""

    layers: tuple[tuple[str, float], ...]
    total: float
    tolerance: float

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.layers)
        rows = [f"{name:{width}}  {error:.1e}" for name, error in self.layers]
        return "\n".join([*rows, f"{'together':{width}}  {self.total:.1e}  (tolerance {self.tolerance:.1e})"])


@torch.no_grad()
def check_inverse(layer: Any, x: Tensor, tolerance: float | None = None) -> InverseReport:
    """Compare x with f^-1(f(x)), for every layer of a `Reversible` and for the whole.

    Args:
        layer: a `Reversible`, or one module with a method `inverse`.
        x: an input.
        tolerance: largest relative error that is accepted; sqrt(eps) of the dtype of `x` if None.

    Returns: the errors, which print as a table.
    Raises: ArgumentError that names the worst layer, if a layer or the whole exceeds the tolerance.

    Layers that draw random numbers are compared with the same numbers. That f is differentiable is not checked.
    """
    layer = layer if isinstance(layer, Reversible) else Reversible(layer)
    if not x.is_floating_point() and not x.is_complex():
        raise ArgumentError(f"check_inverse: x must be a floating point or complex tensor; got {x.dtype}")
    bound = torch.finfo(x.dtype).eps ** 0.5 if tolerance is None else float(tolerance)
    errors, inputs, states = [], [x], []
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices=devices):
        for i, f in enumerate(layer):
            states.append(torch.get_rng_state())
            y = f(inputs[-1])
            torch.set_rng_state(states[-1])
            errors.append((f"layer {i}, {type(f).__name__}", _error(inputs[-1], f.inverse(y))))
            inputs.append(y)
        back = inputs[-1]
        for f, state in zip(reversed(list(layer)), reversed(states), strict=True):
            torch.set_rng_state(state)
            back = f.inverse(back)
    report = InverseReport(tuple(errors), _error(x, back), bound)
    worst = max(errors, key=lambda e: e[1] if e[1] == e[1] else float("inf"))
    if not worst[1] <= bound:
        raise ArgumentError(
            f"check_inverse: {worst[0]} reconstructs its input with a relative error of {worst[1]:.1e}, more than the "
            f"tolerance {bound:.1e}; its inverse is wrong, or its derivative is nearly singular"
        )
    if not report.total <= bound:
        raise ArgumentError(
            f"check_inverse: the layers together reconstruct the input with a relative error of {report.total:.1e}, "
            f"more than the tolerance {bound:.1e}, the worst single one is {worst[0]} with {worst[1]:.1e}; errors pile "
            f"up: use keep_every, a smaller bound in AffineCoupling, or float64"
        )
    return report


def _error(x: Tensor, back: Tensor) -> float:
    if back.shape != x.shape or back.dtype != x.dtype:
        raise ArgumentError(
            f"check_inverse: the inverse returned shape {tuple(back.shape)} and {back.dtype} for an input of shape "
            f"{tuple(x.shape)} and {x.dtype}"
        )
    scale = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(back - x)) / (scale or 1.0)
