"""The L1 norm of wavelet coefficients."""

from __future__ import annotations

from typing import Any

from pullback.core.shapes import Dims
from pullback.functionals.base import Composed
from pullback.functionals.norms import L1


class WaveletL1(Composed):
    """f(x) = sum_i w_i |(W x)_i|, W a wavelet transform over all axes of x; `operator` is W.

    Args:
        dims: shape of one member of the batch.
        wavelet: as in `DWTND`: a name that PyWavelets knows, or taps.
        level: number of levels.
        weight: w >= 0 (not verified), a number or a tensor that broadcasts against W x; zeros at the coarsest scale
            leave the approximation free. It may require grad.
        mode: how x goes on beyond its ends, as in `DWTND`.

    With an orthogonal wavelet, mode "periodization" and dims that 2^level divides, W is orthogonal and the prox is
    W^H soft(W x). Otherwise f has no prox, and `pdhg` splits it.
    Cost of a prox: one transform and its adjoint.
    """

    def __init__(
        self, dims: Dims, wavelet: Any = "db4", level: int = 3, *, weight: Any = None, mode: str = "periodization"
    ) -> None:
        from pullback.linops.wavelet import DWTND

        op = DWTND(dims, None, wavelet, level, mode)
        super().__init__(L1(op.dimsd, weight=weight), op)

    def __repr__(self) -> str:
        return f"WaveletL1({self.dims})"
