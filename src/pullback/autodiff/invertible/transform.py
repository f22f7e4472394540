"""Invertible layers over space: fast orthogonal operators, and filters in the Fourier domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pullback.autodiff.invertible.layer import Invertible, constant
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_dims
from pullback.linops import DWTND


class OperatorLayer(Invertible):
    """y = A x for a square operator with A^H A = c I, whose inverse is A^H / c; or for a wavelet transform.

    Args:
        op: a Fourier transform (`FFT2D`; complex input), a wavelet transform with as many coefficients as samples
            (orthogonal or biorthogonal: periodization, sizes divisible by 2^level), a permutation, a `Flip`, `Roll`, or
            a product of such operators. It acts on the trailing axes, further ones are batch.

    Raises: ArgumentError if the inverse is not known; ShapeError; DtypeError if a real input would become complex.
    """

    def __init__(self, op: LinearOperator) -> None:
        super().__init__()
        if not isinstance(op, LinearOperator):
            raise ArgumentError(f"OperatorLayer: op must be a LinearOperator; got {type(op).__name__}")
        self.op = op
        self.factor = op._isometry() if op.shape[0] == op.shape[1] else None
        self.back: LinearOperator | None = None
        if self.factor is None:
            if not isinstance(op, DWTND) or op.shape[0] != op.shape[1]:
                raise ArgumentError(
                    f"OperatorLayer: no inverse is known for {op}; it must be square with A^H A = c I, or a wavelet "
                    f"transform with as many coefficients as samples"
                )
            self.back = op.inverse()

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        y = self.op(x)
        if y.is_complex() and not x.is_complex():
            raise DtypeError(
                f"OperatorLayer({type(self.op).__name__}) makes a real input complex, so the inverse would not be "
                f"real; give a complex input, or use FourierLayer"
            )
        return y

    def inverse(self, y: Tensor) -> Tensor:
        """A^-1 y."""
        if self.back is not None:
            return self.back(y)
        x = self.op.H(y)
        return x if self.factor == 1 else x / self.factor

    def log_det(self, x: Tensor) -> Tensor:
        """log(c) n / 2, for every copy of the operator's domain in a member.

        Raises: ArgumentError for a biorthogonal wavelet transform.
        """
        if self.factor is None:
            raise ArgumentError("OperatorLayer: the determinant of a biorthogonal wavelet transform is not known")
        return constant(x, math.log(self.factor) / 2 * (x[0].numel() if x.shape[0] else 0))


class FourierLayer(Invertible):
    """y = F^-1 exp(g) F x: a circular convolution with a positive spectrum, one gain for every frequency.

    Args:
        dims: shape of the trailing axes that are transformed; the others share the gains.

    The parameter `log_gain` has shape dims; g is its even part, g(k) = g(-k), so that a real input stays real. It
    starts at zero: the identity.

    Raises: ArgumentError, ShapeError.
    Cost: two FFTs, both ways.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = as_dims(dims, "dims", "FourierLayer")
        self.axes = tuple(range(-len(self.dims), 0))
        self.log_gain = torch.nn.Parameter(torch.zeros(self.dims))

    def _even(self) -> Tensor:
        g = self.log_gain
        return (g + g.flip(self.axes).roll((1,) * len(self.dims), self.axes)) / 2

    def _apply_gain(self, x: Tensor, sign: float) -> Tensor:
        if x.shape[-len(self.dims) :] != self.dims:
            raise ShapeError(
                f"FourierLayer expects shape (..., {', '.join(map(str, self.dims))}); got {tuple(x.shape)}"
            )
        if x.numel() == 0:
            return x.clone()  # torch's FFT refuses an empty batch
        gain = torch.exp(sign * self._even())
        if x.is_complex():
            return torch.fft.ifftn(gain * torch.fft.fftn(x, dim=self.axes), dim=self.axes)
        half = gain[..., : self.dims[-1] // 2 + 1]
        return torch.fft.irfftn(half * torch.fft.rfftn(x, dim=self.axes), s=self.dims, dim=self.axes)

    def forward(self, x: Tensor) -> Tensor:
        """F^-1 exp(g) F x."""
        return self._apply_gain(x, 1.0)

    def inverse(self, y: Tensor) -> Tensor:
        """F^-1 exp(-g) F y."""
        return self._apply_gain(y, -1.0)

    def log_det(self, x: Tensor) -> Tensor:
        """The sum of g, for every copy of dims in a member."""
        copies = (x[0].numel() if x.shape[0] else 0) // math.prod(self.dims)
        return constant(x, self.log_gain.sum() * copies)

    def extra_repr(self) -> str:
        """The shape."""
        return str(self.dims)
