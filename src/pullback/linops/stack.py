"""Operators side by side: stacks, blocks, Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.algebra import Composite
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import size
from pullback.linops.basic import Identity
from pullback.linops.derivative import FirstDerivative
from pullback.linops.foreign import as_operator


def _operators(ops: Iterable[Any], owner: str) -> tuple[LinearOperator, ...]:
    parts = tuple(as_operator(op) for op in ops)
    if not parts:
        raise ArgumentError(f"{owner}: ops must hold at least one operator; got none")
    return parts


def _common(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that all share, or the flat one where only the sizes agree."""
    return shapes[0] if len(set(shapes)) == 1 else (size(shapes[0]),)


def _starts(sizes: Iterable[int]) -> tuple[int, ...]:
    starts = [0]
    for s in sizes:
        starts.append(starts[-1] + s)
    return tuple(starts)


class VStack(Composite):
    """y = (A_1 x, A_2 x, ...), flattened one after another.

    Args:
        ops: operators (or matrices) with as many columns as each other.
        dtype: what `.dtype` reports.

    Raises: ShapeError, ArgumentError. The output has shape (sum of rows,).
    """

    def __init__(self, ops: Iterable[Any], *, dtype: Any = None) -> None:
        parts = _operators(ops, type(self).__name__)
        if len({p.shape[1] for p in parts}) != 1:
            raise ShapeError(
                f"{type(self).__name__}: ops must have equally many columns; got {[p.shape for p in parts]}"
            )
        super().__init__(_common([p.dims for p in parts]), sum(p.shape[0] for p in parts), dtype=dtype)
        self._consist(parts)
        self._real_domain = any(p._real_domain for p in parts)
        self._at = _starts(p.shape[0] for p in parts)
        self._infer_range()

    def _shaped(self, x: Tensor, part: LinearOperator) -> Tensor:
        return x if part.dims == self.dims else x.reshape(*x.shape[: x.ndim - len(self.dims)], *part.dims)

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.dims)]
        if self._delegates:
            return torch.cat([p._run(self._shaped(x, p)).reshape(*batch, p.shape[0]) for p in self._sequence()], -1)
        y = torch.empty((*batch, self.shape[0]), dtype=self._out_dtype(x.dtype, False), device=x.device)
        for p, a in zip(self._sequence(), self._at, strict=False):
            p._forward_into(self._shaped(x, p), y.narrow(-1, a, p.shape[0]).unflatten(-1, p.dimsd))
        return y

    def _adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[:-1]
        x: Tensor | None = None
        for p, a in zip(self._sequence(), self._at, strict=False):
            part = y.narrow(-1, a, p.shape[0]).unflatten(-1, p.dimsd)
            part = part.real if p._real_range and part.is_complex() else part
            if x is None:
                x = p._run(part, True).reshape(*batch, *self.dims)
                if not self._delegates:
                    x = x.to(self._out_dtype(y.dtype, True), copy=p._aliases)
            elif self._delegates:
                x = x + p._run(part, True).reshape(*batch, *self.dims)
            else:
                p._adjoint_add(part, x if p.dims == self.dims else x.reshape(*batch, *p.dims))
        assert x is not None, "an empty stack; please report"
        return x.real if self._real_domain and x.is_complex() else x

    def _gram(self) -> LinearOperator:
        parts = self._sequence()
        if not all(p._clinear and p.dims == self.dims for p in parts):
            return super()._gram()
        total = parts[0].gram
        for p in parts[1:]:
            total = total + p.gram
        return total

    def _norm_bound(self) -> float | None:
        bounds = [p._norm_bound() for p in self._sequence()]
        return None if None in bounds else math.sqrt(sum(b * b for b in bounds if b is not None))

    def _expression(self, level: int = 0) -> str:
        return f"{type(self).__name__}([{', '.join(p._expression() for p in self._sequence())}])"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Of free operators, and of one that holds a tensor that requires grad."""
        if cls is VStack:
            yield cls([Identity((3, 4)), FirstDerivative((3, 4), axis=0)])
            yield cls([_matrix(2, 3).requires_grad_(), _matrix(4, 3)])


def _matrix(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * m + n))


class HStack(Composite):
    """y = A_1 x_1 + A_2 x_2 + ..., where x = (x_1, x_2, ...) is flat.

    Args:
        ops: operators (or matrices) with as many rows as each other.
        dtype: what `.dtype` reports.

    Raises: ShapeError, ArgumentError. The input has shape (sum of columns,).
    """

    def __init__(self, ops: Iterable[Any], *, dtype: Any = None) -> None:
        parts = _operators(ops, "HStack")
        if len({p.shape[0] for p in parts}) != 1:
            raise ShapeError(f"HStack: ops must have equally many rows; got {[p.shape for p in parts]}")
        stack = VStack([p.H for p in parts])
        super().__init__(stack.dimsd, stack.dims, dtype=dtype)
        self._consist((stack,))
        self._real_domain, self._real_range = stack._real_range, stack._real_domain

    def _forward(self, x: Tensor) -> Tensor:
        return self._sequence()[0]._run(x, True)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._sequence()[0]._run(y)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self._sequence()[0]._out_dtype(dtype, not adjoint)

    def _norm_bound(self) -> float | None:
        return self._sequence()[0]._norm_bound()

    def _expression(self, level: int = 0) -> str:
        stack = self._sequence()[0]
        assert isinstance(stack, VStack)
        return f"HStack([{', '.join(p.H._expression() for p in stack._sequence())}])"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Of free operators, and of matrices."""
        yield cls([Identity(4), FirstDerivative(4)])
        yield cls([_matrix(3, 2), _matrix(3, 4) * (1 + 2j)])


class Block(VStack):
    """y_i = sum_j A_ij x_j, from a nested list of operators.

    Args:
        ops: rows of operators (or matrices).
        dtype: what `.dtype` reports.

    Raises: ShapeError, ArgumentError.
    """

    def __init__(self, ops: Iterable[Iterable[Any]], *, dtype: Any = None) -> None:
        super().__init__([HStack(row) for row in ops], dtype=dtype)

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Two by two."""
        yield cls([[Identity(4), FirstDerivative(4)], [_matrix(3, 4), _matrix(3, 4) + 1]])


class BlockDiag(Composite):
    """y_i = A_i x_i.

    Args:
        ops: operators (or matrices). If all have the same dims, x has shape (len(ops), *dims), else it is flat; so has
            y.
        dtype: what `.dtype` reports.

    Raises: ArgumentError.
    """

    def __init__(self, ops: Iterable[Any], *, dtype: Any = None) -> None:
        parts = _operators(ops, "BlockDiag")
        shapes = []
        for dims in ([p.dims for p in parts], [p.dimsd for p in parts]):
            shapes.append((len(parts), *dims[0]) if len(set(dims)) == 1 else (sum(size(d) for d in dims),))
        super().__init__(shapes[0], shapes[1], dtype=dtype)
        self._consist(parts)
        self._real_domain = any(p._real_domain for p in parts)
        self._at, self._at_d = _starts(p.shape[1] for p in parts), _starts(p.shape[0] for p in parts)
        self._infer_range()

    def _apply_parts(self, x: Tensor, adjoint: bool) -> Tensor:
        dims, dimsd = (self.dimsd, self.dims) if adjoint else (self.dims, self.dimsd)
        batch = x.shape[: x.ndim - len(dims)]
        flat = x.reshape(*batch, size(dims))
        results = []
        for p, a in zip(self._sequence(), self._at_d if adjoint else self._at, strict=False):
            n, shape = (p.shape[0], p.dimsd) if adjoint else (p.shape[1], p.dims)
            part = flat.narrow(-1, a, n).unflatten(-1, shape)
            y = self._back(p, part) if adjoint else p._run(part)
            results.append(y.reshape(*batch, y.shape[len(batch) :].numel()))
        if len({r.dtype for r in results}) > 1:
            dtype = self._out_dtype(x.dtype, adjoint)
            results = [
                r.to(dtype) if r.is_complex() == dtype.is_complex or dtype.is_complex else r.real for r in results
            ]
        return torch.cat(results, -1).reshape(*batch, *dimsd)

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply_parts(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply_parts(y, True)

    def _gram(self) -> LinearOperator:
        return BlockDiag([p.gram for p in self._sequence()])

    def _norm_bound(self) -> float | None:
        bounds = [p._norm_bound() for p in self._sequence()]
        return None if None in bounds else max(b for b in bounds if b is not None)

    def _expression(self, level: int = 0) -> str:
        return f"BlockDiag([{', '.join(p._expression() for p in self._sequence())}])"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Equal and unequal blocks."""
        yield cls([FirstDerivative((3, 4), axis=0), FirstDerivative((3, 4), axis=1)])
        yield cls([_matrix(2, 3), Identity(4), _matrix(3, 2) * 1j])


class Kronecker(Composite):
    """y = (A kron B) x, with flat vectors in the order of `numpy.kron`: Y = A X B^T for matrices A and B.

    Args:
        Op1: the operator A.
        Op2: the operator B.
        dtype: what `.dtype` reports.

    x has shape (..., *A.dims, *B.dims). Cost: B for every element of A's domain, then A for every element of B's range.
    """

    def __init__(self, Op1: Any, Op2: Any, *, dtype: Any = None) -> None:
        a, b = _operators((Op1, Op2), "Kronecker")
        super().__init__((*a.dims, *b.dims), (*a.dimsd, *b.dimsd), dtype=dtype)
        if not (a._clinear and b._clinear):
            raise ArgumentError(
                "Kronecker: both operators must be complex-linear; got one that is linear over the reals only"
            )
        self._consist((a, b))

    def _forward(self, x: Tensor) -> Tensor:
        a, b = self._sequence()
        return _swap_back(a._run(_swap(b._run(x), len(a.dims), len(b.dimsd))), len(a.dimsd), len(b.dimsd))

    def _adjoint(self, y: Tensor) -> Tensor:
        a, b = self._sequence()
        return _swap_back(a._run(_swap(b._run(y, True), len(a.dimsd), len(b.dims)), True), len(a.dims), len(b.dims))

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        a, b = self._sequence()
        return a._out_dtype(b._out_dtype(dtype, adjoint), adjoint)

    def _gram(self) -> LinearOperator:
        a, b = self._sequence()
        return Kronecker(a.gram, b.gram)

    def _norm_bound(self) -> float | None:
        one, two = (p._norm_bound() for p in self._sequence())
        return None if one is None or two is None else one * two

    def _expression(self, level: int = 0) -> str:
        return f"Kronecker({', '.join(p._expression() for p in self._sequence())})"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Matrices, and a derivative with a matrix."""
        yield cls(_matrix(2, 3), _matrix(4, 2) * (1 - 1j))
        yield cls(FirstDerivative((2, 3)), _matrix(2, 3))


def _swap(x: Tensor, n_a: int, n_b: int) -> Tensor:
    """(..., *a, *b) -> (..., *b, *a)."""
    batch = x.ndim - n_a - n_b
    return x.permute(*range(batch), *range(batch + n_a, x.ndim), *range(batch, batch + n_a))


def _swap_back(x: Tensor, n_a: int, n_b: int) -> Tensor:
    """(..., *b, *a) -> (..., *a, *b)."""
    return _swap(x, n_b, n_a)
