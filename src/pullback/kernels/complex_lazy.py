"""ComplexLazyTensor: complex numbers as interleaved pairs of real ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from pullback.core.errors import DtypeError
from pullback.kernels.ir.expr import Expr, builders
from pullback.kernels.lazy_base import LazyBase, classes, derive, make, same_leaves
from pullback.kernels.lazy_data import from_pairs
from pullback.kernels.lazy_tensor import LazyTensor

_OPERATIONS = {"Add": "ComplexAdd", "Subtract": "ComplexSubtract", "Mult": "ComplexMult", "Divide": "ComplexDivide"}
_ALLOWED = {"Sum", "Mean"}  # reductions that act on both parts alike


class ComplexLazyTensor(LazyTensor):
    """F_ij, a vector of D complex components for every pair, from complex tensors or arrays.

    Arithmetic, `real imag angle conj abs exp square`, powers with whole exponents, components, `sum(-1)`, sums and
    means over i and j, and `K @ b` are defined; everything else is for real numbers and raises DtypeError. A real
    operand counts as complex. The real dtype must be that of the real tensors it meets.
    """

    __slots__ = ()
    _complex: ClassVar[bool] = True
    __hash__ = object.__hash__

    def _apply(self, name: str, *others: Any, params: tuple[Any, ...] = ()) -> Any:
        """Operations of real numbers are refused; those of complex numbers are methods here."""
        raise DtypeError(
            f"{name} is not defined for complex numbers here; apply it to .real, .imag, .abs() or .angle()"
        )

    def _real(self, name: str) -> Any:
        return same_leaves(name, self)

    def _same(self, name: str, *params: Any) -> Any:
        return same_leaves(name, self, *params, is_complex=True)

    @property
    def real(self) -> Any:
        """Re z."""
        return self._real("ComplexReal")

    @property
    def imag(self) -> Any:
        """Im z."""
        return self._real("ComplexImag")

    def angle(self) -> Any:
        """The argument of z, in (-pi, pi]."""
        return self._real("ComplexAngle")

    def abs(self) -> Any:
        """|z|, with the derivative 0 at 0."""
        return self._real("ComplexAbs")

    def conj(self) -> Any:
        """Re z - i Im z."""
        return self._same("Conj")

    def exp(self) -> Any:
        """e^z."""
        return self._same("ComplexExp")

    def neg(self) -> Any:
        """-z."""
        return self._same("Minus")

    def square(self) -> Any:
        """z^2."""
        return self.arithmetic("Mult", self, self)

    def reciprocal(self) -> Any:
        """1 / z."""
        return self.arithmetic("Divide", 1, self)

    def power(self, other: Any) -> Any:
        """z^n for a whole number n."""
        if not isinstance(other, int):
            raise DtypeError(f"a complex LazyTensor has powers with whole exponents only; got {other!r}")
        if other <= 0:
            return self.arithmetic("Divide", 1, self.power(-other)) if other else self * 0 + 1
        half = self.power(other // 2) if other > 1 else None
        result = self if half is None else half * half
        return result * self if other % 2 and other > 1 else result

    pow = power

    def sqnorm2(self) -> Any:
        """sum_k |z_k|^2."""
        return self._real("ComplexSquareAbs").sum(-1)

    def norm2(self) -> Any:
        """sqrt(sum_k |z_k|^2)."""
        return self.sqnorm2().sqrt()

    def elem(self, i: int) -> Any:
        """z_i."""
        k = self._component(i)
        return self._same("Gather", (2 * k, 2 * k + 1))

    def extract(self, i: int, d: int) -> Any:
        """z_i, ..., z_(i+d-1)."""
        return self._same("Gather", tuple(range(2 * i, 2 * (i + d))))

    def concat(self, other: Any) -> Any:
        """The components of both, one after the other."""
        return make_complex(derive(builders["Concat"], (self, as_complex(other))))

    def sum(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """The sum over i or j, a complex tensor; with axis -1 that of the components, symbolic."""
        if self._axis(axis, dim, "sum") == 2:
            return self._same("ComplexSum")
        return self._reduce("Sum", axis, dim, **kwargs)

    def mean(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """The mean over i or j, or of the components."""
        if self._axis(axis, dim, "mean") == 2:
            return self.sum(-1) / self.ndim
        return self._reduce("Mean", axis, dim, **kwargs)

    sum_reduction, mean_reduction = sum, mean

    @staticmethod
    def arithmetic(name: str, a: Any, b: Any) -> Any:
        """The value of a + b, a - b, a * b, a / b, a == b or a != b, where an operand is complex."""
        if name in ("Equal", "NotEqual"):
            same = derive(_equal, (as_complex(a), as_complex(b)))
            return same if name == "Equal" else same.logical_not()
        if name not in _OPERATIONS:
            raise DtypeError("complex numbers are not ordered; compare .real, .imag or .abs()")
        if name == "Mult" and isinstance(a, (int, float)):
            a, b = b, a
        if name in ("Mult", "Divide") and isinstance(b, (int, float)):  # a real factor scales both parts
            return make_complex(derive(builders[name], (a, b)))
        return make_complex(derive(builders[_OPERATIONS[name]], (as_complex(a), as_complex(b))))

    def _reduce(self, kind: str, axis: int | None, dim: int | None, **kwargs: Any) -> Any:
        if kind not in _ALLOWED:
            raise DtypeError(f"{kind} of complex numbers is not defined; reduce .real, .imag or .abs()")
        return super()._reduce(kind, axis, dim, **kwargs)

    def _finish(self, y: Any) -> Any:
        return from_pairs(y)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.Tensor.to`; a complex dtype means the real dtype of its precision."""
        real = {torch.complex64: torch.float32, torch.complex128: torch.float64}
        args = tuple(real.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: real.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
        return super().to(*args, **kwargs)


def make_complex(x: LazyBase) -> Any:
    """A LazyTensor of interleaved pairs, read as complex."""
    return make(x._expr, x, is_complex=True)


def as_complex(x: Any) -> Any:
    """A complex LazyTensor from an operand of any kind."""
    x = x if isinstance(x, LazyBase) else LazyTensor(x)
    return x if x._complex else x.real2complex()


def _equal(a: Expr, b: Expr) -> Expr:
    same = builders["Equal"](a, b)
    return builders["LogicalAnd"](builders["ComplexReal"](same), builders["ComplexImag"](same))


classes[True] = ComplexLazyTensor
