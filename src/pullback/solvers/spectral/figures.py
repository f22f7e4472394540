"""Pictures of spectra and of parameter choices. matplotlib is imported where it is used; no window is opened."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pullback.solvers.spectral.choice import Choice
    from pullback.solvers.spectral.picard import PicardPlot

_BLUE, _ORANGE, _GREY = "#0b6e8f", "#d1762c", "#7a8794"
_LABELS = {
    "discrepancy": r"residual $\|A x - y\|$",
    "gcv": "generalised cross-validation",
    "sure": r"estimate of $E\,\|A x - A x_{true}\|^2$",
    "lcurve": r"seminorm $\|L x\|$",
}


def _axis(ax: Any) -> Any:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(5.4, 3.9), layout="constrained").subplots()


def png(plot: Callable[[], Any]) -> bytes:
    """What `plot` draws into a new figure, as PNG."""
    buffer = io.BytesIO()
    plot().figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _tidy(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e3e7ec", lw=0.8)
    ax.set_axisbelow(True)


def plot_choice(choice: Choice, ax: Any) -> Any:
    """The curve of the first member with the parameter chosen."""
    ax = _axis(ax)
    p = choice.parameters.cpu().numpy()
    values, residual, seminorm = (
        t.reshape(len(t), -1)[:, 0].cpu().numpy() for t in (choice.values, choice.residual, choice.seminorm)
    )
    chosen = choice.parameter.flatten()[0].item()
    if choice.method == "lcurve":
        at = abs(p - chosen).argmin()
        ax.loglog(residual, seminorm, color=_BLUE, lw=1.6)
        ax.loglog(residual[at], seminorm[at], "o", color=_ORANGE)
        ax.set(xlabel=r"residual $\|A x - y\|$", ylabel=_LABELS["lcurve"])
    else:
        discrete = choice.name == "k"
        keep = values > 0
        draw = ax.semilogy if discrete else ax.loglog
        draw(p[keep], values[keep], color=_BLUE, lw=1.6, **({"marker": ".", "ms": 5} if discrete else {}))
        ax.axvline(chosen, color=_ORANGE, lw=1.3)
        if choice.target is not None:
            ax.axhline(choice.target.flatten()[0].item(), color=_GREY, lw=1, ls="--")
        ax.set(xlabel="k" if discrete else r"$\alpha$", ylabel=_LABELS[choice.method])
    ax.set_title(f"{choice.method}: {choice.name} = {chosen:.3g}", loc="left", fontsize=10)
    _tidy(ax)
    return ax


def plot_picard(data: PicardPlot, ax: Any) -> Any:
    """Singular values, coefficients and their ratios over the index."""
    ax = _axis(ax)
    s, c, ratios = (t.detach().cpu().numpy() for t in (data.S, data.coefficients, data.ratios))
    i = range(1, len(s) + 1)
    ax.semilogy(i, s, color=_BLUE, lw=1.6, label=r"$s_i$")
    ax.semilogy(i, c, color=_ORANGE, lw=0, marker=".", ms=4, label=r"$|u_i^H y|$")
    ax.semilogy(i, ratios, color=_GREY, lw=0, marker="x", ms=3, mew=0.8, label=r"$|u_i^H y| / s_i$")
    if data.noise > 0:
        ax.axhline(data.noise, color=_ORANGE, lw=0.9, ls="--")
    if data.index < len(s):
        ax.axvline(data.index + 0.5, color="#1c2430", lw=1, ls=":")
    ax.set(xlabel="index i")
    ax.set_title(f"Picard condition holds for i $\\leq$ {data.index}", loc="left", fontsize=10)
    ax.legend(fontsize=8, framealpha=0.85)
    _tidy(ax)
    return ax
