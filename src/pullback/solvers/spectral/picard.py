"""Do the data decay faster than the singular values? The Picard condition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.interop import is_scalar
from pullback.solvers.problem import Problem
from pullback.solvers.spectral.decompose import as_svd
from pullback.solvers.spectral.figures import plot_picard, png
from pullback.solvers.spectral.filters import cast, project
from pullback.solvers.spectral.numbers import noise_share


@dataclass(frozen=True, eq=False)
class PicardPlot:
    """Singular values and data coefficients side by side.

    Attributes:
        S: s_i, shape (k,).
        coefficients: |<u_i, y>|, shape (k,).
        ratios: their quotients, the size of the solution's components (inf where s_i = 0), shape (k,).
        index: the condition holds for the first `index` terms: from there on the coefficients are noise.
        noise: the standard deviation of a coefficient that was assumed or estimated.
    """

    S: Tensor
    coefficients: Tensor
    ratios: Tensor
    index: int
    noise: float

    def plot(self, ax: Any = None) -> Any:
        """Draw into a matplotlib axis (a new figure if None). Returns: the axis."""
        return plot_picard(self, ax)

    def _repr_png_(self) -> bytes:
        return png(self.plot)

    def __repr__(self) -> str:
        return f"PicardPlot({self.index} of {len(self.S)} coefficients above the noise {self.noise:.2g})"


def picard(A: Any, y: Any, noise: float | None = None, *, window: int = 5) -> PicardPlot:
    """|<u_i, y>| against s_i: least squares makes sense as long as the first falls faster than the second.

    Args:
        A: LinearOperator with at most 1024 rows and columns, or its SVD.
        y: data of shape A.dimsd, or flat: one member.
        noise: standard deviation of an element of y; if None, estimated as the root mean square of the last quarter of
            the coefficients.
        window: the condition is said to fail at the first i where the geometric mean of `window` coefficients around i
            is below the noise. A heuristic: that of pure Gaussian noise is 0.53 times it.

    Returns: PicardPlot. Raises: ShapeError, DtypeError, ArgumentError.
    Source: P. C. Hansen 1990, "The discrete Picard condition for discrete ill-posed problems", doi 10.1007/BF01933214.
    """
    if noise is not None and not (is_scalar(noise) and float(noise) >= 0):
        raise ArgumentError(f"picard: noise must be a number >= 0; got {noise!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ArgumentError(f"picard: window must be an int >= 1; got {window!r}")
    with torch.no_grad():
        d = as_svd(A, "picard")
        problem = Problem("picard", d.operator(), y)
        if problem.batch:
            raise ShapeError(
                f"picard: y must be one member, shape {d.A.dimsd}; got the batch {problem.batch}; pass y[0]"
            )
        beta, S = project(problem, d)[0].abs(), cast(d.S, problem.y)
        if noise is None:
            level = float((beta[-max(1, len(beta) // 4) :] ** 2).mean().sqrt())
        else:
            level = float(noise) * math.sqrt(noise_share(d))
        logs = beta.clamp(min=torch.finfo(beta.dtype).tiny).log()
        half = window // 2
        means = torch.stack([logs[max(0, i - half) : i + half + 1].mean() for i in range(len(logs))])
        failed = (means <= math.log(max(level, 1e-300))) | S.le(d.cutoff() * S[0])
        index = int(failed.long().argmax()) if bool(failed.any()) else len(S)
        return PicardPlot(S, beta, torch.where(S > 0, beta / torch.where(S > 0, S, 1), math.inf), index, level)
