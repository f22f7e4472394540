"""Sums, products, multiples, powers and relatives of operators.

They stay lazy and keep what is known about structure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.linearize import Recording, _Differential, cast, frozen, recordable
from pullback.core.operator import LinearOperator, Operator, algebra
from pullback.core.shapes import complex_of, real_of


def _has_tensors(op: torch.nn.Module) -> bool:
    return any(True for tensors in (op.parameters(), op.buffers()) for _ in tensors)


class Composite(LinearOperator):
    """A linear operator made of others.

    Where a part holds tensors, or all parts are plain torch, autograd sees the parts. Otherwise the whole is one node
    of the graph whose backward is the whole adjoint.
    """

    def _consist(self, parts: Iterable[LinearOperator]) -> None:
        """Take over what the parts are: called once, at the end of __init__."""
        parts = tuple(parts)
        for i, part in enumerate(parts):
            self.add_module(str(i), part)
        self._clinear = all(p._clinear for p in parts)
        self._half = all(p._half for p in parts)  # type: ignore[misc]
        self._aliases = any(p._aliases for p in parts)
        if any(_has_tensors(p) for p in parts) or all(p._native or p._delegates for p in parts):
            self.__dict__["_delegates"] = True

    def _sequence(self) -> tuple[LinearOperator, ...]:
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        """That of a sum or stack of the parts."""
        result: torch.dtype | None = None
        for p in self._sequence():
            given = real_of(dtype) if adjoint and p._real_range else dtype
            out = p._out_dtype(given, adjoint)
            result = out if result is None else torch.promote_types(result, out)
        assert result is not None, "a composite without parts; please report"
        return real_of(result) if adjoint and self._real_domain else result

    def _infer_range(self) -> None:
        """The range is real if an input from the whole domain comes out real."""
        self._real_range = not self._out_dtype(
            torch.float64 if self._real_domain else torch.complex128, False
        ).is_complex

    @staticmethod
    def _back(part: LinearOperator, y: Tensor) -> Tensor:
        """part^H y. Where a real result went on as complex, the adjoint of that inclusion is the real part."""
        return part._run(y.real if part._real_range and y.is_complex() else y, True)


class OperatorSum(Composite):
    """A x = sum_i A_i x."""

    def __init__(self, parts: Iterable[LinearOperator]) -> None:
        parts = tuple(parts)
        first = parts[0]
        super().__init__(first.dims, first.dimsd)
        self._consist(parts)
        self._real_domain = any(p._real_domain for p in parts)
        self._infer_range()

    def _forward(self, x: Tensor) -> Tensor:
        first, *rest = self._sequence()
        y = first._run(x)
        for p in rest:
            y = y + p._run(x)
        return y

    def _adjoint(self, y: Tensor) -> Tensor:
        first, *rest = self._sequence()
        x = self._back(first, y)
        for p in rest:
            x = x + self._back(p, y)
        return x.real if self._real_domain and x.is_complex() else x

    def _norm_bound(self) -> float | None:
        bounds = [p._norm_bound() for p in self._sequence()]
        return None if None in bounds else sum(b for b in bounds if b is not None)

    def _expression(self, level: int = 0) -> str:
        text = " + ".join(p._expression(1) for p in self._sequence()).replace("+ -", "- ")
        return f"({text})" if level > 1 else text


class OperatorProduct(Composite):
    """A x = A_1 (A_2 (... x))."""

    def __init__(self, parts: Iterable[LinearOperator]) -> None:
        parts = tuple(parts)
        super().__init__(parts[-1].dims, parts[0].dimsd)
        self._consist(parts)
        self._real_domain = self._meets_complex(torch.complex128)
        if self._meets_complex(torch.float64):
            raise ArgumentError(
                f"cannot compose {self._expression()}: a factor that acts on real input gets complex values"
            )
        self._infer_range()

    def _meets_complex(self, dtype: torch.dtype) -> bool:
        """Whether, for input of `dtype`, a factor with a real domain would be given complex values."""
        for p in reversed(self._sequence()):
            if p._real_domain and dtype.is_complex:
                return True
            dtype = p._out_dtype(dtype, False)
        return False

    def _forward(self, x: Tensor) -> Tensor:
        for p in reversed(self._sequence()):
            if p.dims != x.shape[-len(p.dims) :]:
                x = _refit(x, p.dims)
            x = p._run(x)
        return x

    def _adjoint(self, y: Tensor) -> Tensor:
        for p in self._sequence():
            if p.dimsd != y.shape[-len(p.dimsd) :]:
                y = _refit(y, p.dimsd)
            y = self._back(p, y)
        return y

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        for p in self._sequence() if adjoint else reversed(self._sequence()):
            if adjoint and p._real_range:
                dtype = real_of(dtype)
            dtype = p._out_dtype(dtype, adjoint)
        return dtype

    def _gram(self) -> LinearOperator:
        first, *rest = self._sequence()
        inner = compose_all(rest)
        return inner.H @ first.gram @ inner

    def _norm_bound(self) -> float | None:
        bounds = [p._norm_bound() for p in self._sequence()]
        return None if None in bounds else math.prod(b for b in bounds if b is not None)

    def _coisometry(self) -> float | None:
        return self._constant([p._coisometry() for p in self._sequence()])

    def _isometry(self) -> float | None:
        return self._constant([p._isometry() for p in self._sequence()])

    def _constant(self, factors: list[float | None]) -> float | None:
        parts = self._sequence()
        # Where a real result goes on as complex, the inclusion is a factor of its own, and no coisometry.
        fits = all(a._real_domain == b._real_range for a, b in itertools.pairwise(parts))
        return math.prod(c for c in factors if c is not None) if fits and None not in factors else None

    def _expression(self, level: int = 0) -> str:
        text = " @ ".join(p._expression(2) for p in self._sequence())
        return f"({text})" if level > 2 else text


class Scaled(Composite):
    """A x = c B x, where the number c may be a tensor that requires grad."""

    def __init__(self, op: LinearOperator, factor: Any) -> None:
        super().__init__(op.dims, op.dimsd)
        self._consist((op,))
        self._real_domain = op._real_domain
        if isinstance(factor, Tensor):
            self.factor = factor
            self.__dict__["_delegates"] = True
        else:
            self.__dict__["factor"] = factor = factor.item() if hasattr(factor, "item") else factor
        self._infer_range()

    def _forward(self, x: Tensor) -> Tensor:
        (op,) = self._sequence()
        y = op._run(x)
        return y * self._number(y)

    def _adjoint(self, y: Tensor) -> Tensor:
        (op,) = self._sequence()
        c = self._number(y)
        return self._back(op, y * (c.conj() if isinstance(c, Tensor) else c.conjugate()))

    def _number(self, like: Tensor) -> Any:
        return self._cast(self.factor, like) if isinstance(self.factor, Tensor) else self.factor

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        is_complex = self.factor.is_complex() if isinstance(self.factor, Tensor) else isinstance(self.factor, complex)
        (op,) = self._sequence()
        if adjoint:
            dtype = complex_of(dtype) if is_complex and not op._real_range else dtype
            return op._out_dtype(dtype, True)
        dtype = op._out_dtype(dtype, False)
        return complex_of(dtype) if is_complex else dtype

    def _gram(self) -> LinearOperator:
        (op,) = self._sequence()
        if not op._clinear:
            return self.H @ self
        c = self.factor
        return (c.conj() * c).real * op.gram if isinstance(c, Tensor) else abs(c) ** 2 * op.gram

    def _norm_bound(self) -> float | None:
        (op,) = self._sequence()
        bound = op._norm_bound()
        return None if bound is None else float(abs(self.factor)) * bound

    def _coisometry(self) -> float | None:
        return self._constant(self._sequence()[0]._coisometry())

    def _isometry(self) -> float | None:
        return self._constant(self._sequence()[0]._isometry())

    def _constant(self, c: float | None) -> float | None:
        (op,) = self._sequence()
        mixed = isinstance(self.factor, complex) and (not op._clinear or op._real_domain or op._real_range)
        return None if c is None or mixed or isinstance(self.factor, Tensor) else abs(self.factor) ** 2 * c

    def _expression(self, level: int = 0) -> str:
        (op,) = self._sequence()
        if isinstance(self.factor, Tensor):
            text = f"c * {op._expression(2)}"
        elif self.factor == -1:
            text = f"-{op._expression(2)}"
        else:
            c = self.factor
            text = f"{c if isinstance(c, complex) else format(c, '.6g')} * {op._expression(2)}"
        return f"({text})" if level > 1 else text


class Adjoint(Composite):
    """The adjoint of an operator; its adjoint is that operator."""

    def __init__(self, op: LinearOperator) -> None:
        super().__init__(op.dimsd, op.dims)
        self._consist((op,))
        self._real_domain, self._real_range = op._real_range, op._real_domain

    def _forward(self, x: Tensor) -> Tensor:
        return self._sequence()[0]._run(x, True)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._sequence()[0]._run(y)

    def _run(self, x: Tensor, adjoint: bool = False, tensors: Any = None) -> Tensor:
        return self._sequence()[0]._run(x, not adjoint)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self._sequence()[0]._out_dtype(dtype, not adjoint)

    @property
    def H(self) -> LinearOperator:
        """The operator itself."""
        return self._sequence()[0]

    def _norm_bound(self) -> float | None:
        return self._sequence()[0]._norm_bound()

    def _coisometry(self) -> float | None:
        return self._sequence()[0]._isometry()

    def _isometry(self) -> float | None:
        return self._sequence()[0]._coisometry()

    def _name(self, adjoint: bool) -> str:
        return self._sequence()[0]._name(not adjoint)

    def _expression(self, level: int = 0) -> str:
        return f"{self._sequence()[0]._expression(3)}.H"


class Conjugate(Composite):
    """conj(A) x = conj(A conj(x))."""

    def __init__(self, op: LinearOperator) -> None:
        super().__init__(op.dims, op.dimsd)
        self._consist((op,))
        self._real_domain, self._real_range = op._real_domain, op._real_range

    def _forward(self, x: Tensor) -> Tensor:
        return torch.conj_physical(self._sequence()[0]._run(torch.conj_physical(x)))

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.conj_physical(self._sequence()[0]._run(torch.conj_physical(y), True))

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self._sequence()[0]._out_dtype(dtype, adjoint)

    def conj(self) -> LinearOperator:
        """The operator itself."""
        return self._sequence()[0]

    def _norm_bound(self) -> float | None:
        return self._sequence()[0]._norm_bound()

    def _coisometry(self) -> float | None:
        return self._sequence()[0]._coisometry()

    def _isometry(self) -> float | None:
        return self._sequence()[0]._isometry()

    def _expression(self, level: int = 0) -> str:
        return f"{self._sequence()[0]._expression(3)}.conj()"


class Derivative(_Differential):
    """F'(x) v, the derivative of a non-linear operator at x, and its adjoint.

    The graph of F at x is recorded once and lives as long as this operator; see `core/linearize.py`.
    """

    def __init__(self, op: Operator, at: Tensor) -> None:
        if tuple(at.shape) != op.dims:
            raise ShapeError(f"linearize: x must have shape {op.dims}; got {tuple(at.shape)}")
        at = frozen(at)
        recording = Recording(lambda p: (op._run(p[0]),), (at,)) if recordable(at) else None
        super().__init__(op.dims, op.dimsd)
        self.op = op
        value = recording.values[0] if recording is not None else op._run(at)
        self._real_domain, self._real_range = not at.is_complex(), not value.is_complex()
        self._clinear = self._real_domain and self._real_range
        self._set_up((at,), recording)

    def _outputs(self, points: Sequence[Tensor]) -> Sequence[Tensor]:
        return (self.op._run(points[0]),)  # type: ignore[operator]

    def _enter(self, x: Tensor, batch: tuple[int, ...], adjoint: bool) -> list[Tensor]:
        return [x]

    def _leave(self, found: Sequence[Tensor], batch: tuple[int, ...], adjoint: bool, dtype: torch.dtype) -> Tensor:
        return cast(found[0], dtype)

    def _expression(self, level: int = 0) -> str:
        return f"{type(self.op).__name__}'(x)"


class Composition(Operator):
    """F(G(x)), for operators that are not all linear."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        super().__init__(inner.dims, outer.dimsd)
        self.outer, self.inner = outer, inner

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer._run(_refit(self.inner._run(x), self.outer.dims))

    def linearize(self, x: Tensor) -> LinearOperator:
        """F'(G(x)) G'(x)."""
        return self.outer.linearize(_refit(self.inner._run(x), self.outer.dims)) @ self.inner.linearize(x)


class Combination(Operator):
    """sum_i c_i F_i(x), for operators that are not all linear."""

    def __init__(self, terms: Iterable[tuple[Any, Operator]]) -> None:
        terms = tuple(terms)
        super().__init__(terms[0][1].dims, terms[0][1].dimsd)
        self.factors = [c for c, _ in terms]
        for i, (_, op) in enumerate(terms):
            self.add_module(str(i), op)

    def _forward(self, x: Tensor) -> Tensor:
        y: Any = 0
        for c, op in zip(self.factors, self._modules.values(), strict=True):
            y = y + c * op._run(x)  # type: ignore[union-attr, operator]
        return y


def _refit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A factor's output in the shape of the next factor's input, which has as many elements."""
    n, have = math.prod(dims), 1
    axes = 0
    while have < n:
        axes += 1
        have *= x.shape[-axes]
    axes = max(axes, 1)
    return x.reshape(*x.shape[: x.ndim - axes], *dims)


def compose(a: Operator, b: Operator) -> Operator:
    """The operator a after b."""
    if a.shape[1] != b.shape[0]:
        raise ShapeError(
            f"cannot compose {type(a).__name__} of input dims {a.dims} with {type(b).__name__} of output dims "
            f"{b.dimsd}: "
            f"{a.shape[1]} != {b.shape[0]} elements"
        )
    if not (isinstance(a, LinearOperator) and isinstance(b, LinearOperator)):
        return Composition(a, b)
    if isinstance(a, Scaled) and not isinstance(b, Scaled) and a._clinear:
        return scale(compose(a._sequence()[0], b), a.factor)
    if isinstance(b, Scaled) and a._clinear:
        return scale(compose(a, b._sequence()[0]), b.factor)
    if a.dims == b.dimsd:
        merged = a._compose_left(b)
        merged = b._compose_right(a) if merged is None else merged
        if merged is not None:
            return merged
    parts: list[LinearOperator] = []
    for op in (a, b):
        parts.extend(op._sequence() if isinstance(op, OperatorProduct) else (op,))
    return OperatorProduct(parts)


def compose_all(parts: Iterable[LinearOperator]) -> LinearOperator:
    """The product of a non-empty sequence."""
    first, *rest = parts
    for op in rest:
        first = first @ op
    return first


def add(a: Operator, b: Operator) -> Operator:
    """The operator a + b."""
    if a.shape != b.shape or a.dims != b.dims or a.dimsd != b.dimsd:
        raise ShapeError(
            f"cannot add {type(a).__name__} {a.dims} -> {a.dimsd} and {type(b).__name__} {b.dims} -> {b.dimsd}: "
            f"dims differ"
        )
    if not (isinstance(a, LinearOperator) and isinstance(b, LinearOperator)):
        return Combination([(1, a), (1, b)])
    merged = a._add_left(b)
    if merged is None:
        merged = b._add_left(a)
    if merged is not None:
        return merged
    parts: list[LinearOperator] = []
    for op in (a, b):
        parts.extend(op._sequence() if isinstance(op, OperatorSum) else (op,))
    return OperatorSum(parts)


def scale(op: Operator, factor: Any) -> Operator:
    """The operator factor * op."""
    if not isinstance(op, LinearOperator):
        return Combination([(factor, op)])
    if isinstance(op, Scaled):
        inner = op._sequence()[0]
        if not isinstance(factor, Tensor) and not isinstance(op.factor, Tensor) and factor * op.factor == 1:
            return inner
        return Scaled(inner, factor * op.factor)
    merged = op._scale(factor)
    return Scaled(op, factor) if merged is None else merged


def power(op: LinearOperator, n: Any) -> LinearOperator:
    """Op applied n times, n >= 1."""
    if not isinstance(n, int) or n < 1:
        raise ArgumentError(f"A ** n needs an int n >= 1; got {n!r}")
    if op.shape[0] != op.shape[1]:
        raise ShapeError(f"A ** n needs a square operator; got shape {op.shape}")
    return compose_all([op] * n)


def conj(op: LinearOperator) -> LinearOperator:
    """The conjugate of an operator."""
    if isinstance(op, Adjoint):
        inner = op._sequence()[0].conj()
        return inner.H
    return Conjugate(op)


algebra.update(compose=compose, add=add, scale=scale, power=power, conj=conj, adjoint=Adjoint, derivative=Derivative)
