"""The pictures of a report. Each function returns a matplotlib figure; none opens a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback.imaging.calibrate import Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "axes.axisbelow": True,
}
_DARK, _BLUE, _ORANGE = "#1c2430", "#0b6e8f", "#d1762c"


def comparison(before: np.ndarray, after: np.ndarray, names: tuple[str, str]) -> Figure:
    """Before, after and their difference side by side; the first two share their grey scale, set by `after`."""
    low, high = np.percentile(after, (0.5, 99.8))
    difference = after - before
    reach = float(np.percentile(np.abs(difference), 99.5))
    panels = (
        (before, names[0], "gray", low, high),
        (after, names[1], "gray", low, high),
        (difference, "difference: after - before", "RdBu_r", -reach, reach),
    )
    return _row([_Panel(*panel) for panel in panels])


def gallery(images: Sequence[tuple[str, np.ndarray]], low: float, high: float) -> Figure:
    """Images side by side in one grey scale."""
    return _row([_Panel(image, name, "gray", low, high) for name, image in images])


def calibration(result: Calibration, sinogram: np.ndarray) -> Figure:
    """The sinogram with its rotation axis, the path of the centre, and the angle corrections."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    moved = result.angle_change > 0
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12.6, 3.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        low, high = np.percentile(sinogram, (0.5, 99.8))
        left.imshow(sinogram, cmap="gray", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        left.axvline(result.center_before, color=_ORANGE, lw=1.3, ls="--", label=f"before {result.center_before:.2f}")
        left.axvline(result.center, color="#5cc3e4", lw=1.3, label=f"after {result.center:.2f}")
        left.set(title="sinogram and rotation axis", xlabel="detector pixel", ylabel="view")
        left.legend(loc="lower right", framealpha=0.85)
        left.grid(False)

        middle.plot([entry["center"] for entry in result.history], color=_BLUE, lw=1.4, marker="o", ms=3)
        stages = [entry["stage"] for entry in result.history]
        for i in range(1, len(stages)):
            if stages[i] != stages[i - 1]:
                middle.axvline(i - 0.5, color="#9aa5b1", lw=0.8, ls=":")
        middle.set(title="rotation centre [detector pixels]", xlabel="evaluation (dotted: next stage)")

        if moved:
            change = np.rad2deg((result.angles - result.angles_before).numpy())
            right.plot(np.rad2deg(result.angles_before.numpy()), change, color=_BLUE, lw=0, marker=".", ms=4)
            right.set(title="angle corrections [deg]", xlabel="nominal angle [deg]")
        else:
            for stage in sorted(set(stages)):
                entries = [entry for entry in result.history if entry["stage"] == stage]
                label = f"binned by {entries[0]['binning']}"
                right.plot(
                    [e["center"] for e in entries], [e["misfit"] for e in entries], lw=0, marker="o", label=label
                )
            right.set(title="misfit, relative to each stage's start", xlabel="rotation centre [detector pixels]")
            right.legend(framealpha=0.85)
    return figure


class _Panel:
    """An image and how it is shown."""

    def __init__(self, image: np.ndarray, title: str, cmap: str, low: float, high: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and high > low):
            low, high = -1.0, 1.0
        self.image, self.title, self.cmap, self.low, self.high = image, title, cmap, float(low), float(high)


def _row(panels: Sequence[_Panel]) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.2 * len(panels), 4.1), layout="constrained")
        axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
        for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            shown = axis.imshow(panel.image, cmap=panel.cmap, vmin=panel.low, vmax=panel.high, interpolation="nearest")
            axis.set_title(panel.title, color=_DARK)
            axis.set_axis_off()
            last_of_kind = i + 1 == len(panels) or panels[i + 1].cmap != panel.cmap
            if last_of_kind:
                figure.colorbar(shown, ax=axis, shrink=0.85, pad=0.02)
    return figure
