"""Functionals of parts of x."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.shapes import as_axis, size
from pullback.functionals.arithmetic import lift, member
from pullback.functionals.functional import Functional, Step


class Stack(Functional):
    """f(x) = sum_i f_i(x_i), x = (x_1, x_2, ...); prox: that of f_i on x_i.

    Args:
        parts: functionals f_i that know their dims.
        axis: the axis of a member along which the x_i follow one another; their other axes must agree. None flattens
            the x_i and puts them one after another, as the output of `VStack` is.

    So `Stack([0.1 * L1(D.dimsd), L2(E.dimsd)]) @ VStack([D, E])` is 0.1 |D x|_1 + |E x|_2.
    Raises: ArgumentError, ShapeError.
    """

    def __init__(self, parts: Iterable[Functional], axis: int | None = None) -> None:
        parts = tuple(parts)
        shapes = []
        for f in parts:
            if not isinstance(f, Functional) or f.dims is None:
                raise ArgumentError(
                    f"Stack: parts must be functionals that know their dims; got {f!r}; write for example L1((3, 4))"
                )
            shapes.append(f.dims)
        if not shapes:
            raise ArgumentError("Stack: parts must hold at least one functional; got none")
        if axis is None:
            self_axis, sizes = -1, [size(s) for s in shapes]
            dims = [sum(sizes)]
        else:
            self_axis = as_axis(axis, len(shapes[0]), "Stack")
            dims = list(shapes[0])
            for s in shapes:
                rest = [(len(s) == len(dims)) and (a == b or k == len(dims) + self_axis)
                        for k, (a, b) in enumerate(zip(s, dims, strict=False))]  # fmt: skip
                if not all(rest) or not rest:
                    raise ShapeError(f"Stack: parts must agree in all axes but {axis}; got {shapes}")
            sizes = [s[self_axis] for s in shapes]
            dims[self_axis] = sum(sizes)
        super().__init__(dims)
        self.axis, self.sizes, self.is_flat = self_axis, sizes, axis is None
        for i, f in enumerate(parts):
            self.add_module(str(i), f)
        self.has_prox = all(f.has_prox for f in parts)
        self.convex = all(f.convex for f in parts)
        self.elementwise = all(f.elementwise for f in parts)
        self.homogeneous = all(f.homogeneous for f in parts)
        self.radial = all(f.radial for f in parts)
        self.is_box = all(f.is_box for f in parts)

    @property
    def parts(self) -> tuple[Functional, ...]:
        """The f_i."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def _split(self, x: Tensor) -> list[tuple[Functional, Tensor, int]]:
        """f_i, x_i and the number of axes of x_i."""
        pieces = []
        for f, v in zip(self.parts, x.split(self.sizes, self.axis), strict=True):
            assert f.dims is not None, "a part without dims; please report"
            pieces.append((f, v.unflatten(-1, f.dims) if self.is_flat else v, len(f.dims)))
        return pieces

    def _join(self, pieces: list[Tensor]) -> Tensor:
        if self.is_flat:
            pieces = [v.flatten(-len(f.dims or ())) for v, f in zip(pieces, self.parts, strict=True)]
        return torch.cat(pieces, self.axis)

    def _value(self, x: Tensor, n: int) -> Tensor:
        return sum_of([f._value(v, m) for f, v, m in self._split(x)])

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self._join([f._prox(v, lift(member(step, n), m), m) for f, v, m in self._split(x)])

    def _conjugate_prox(self, x: Tensor, step: Step, n: int, scale: Step = 1.0) -> Tensor:
        step, scale = member(step, n), member(scale, n)
        return self._join([f._conjugate_prox(v, lift(step, m), m, lift(scale, m)) for f, v, m in self._split(x)])

    def _conjugate_value(self, x: Tensor, n: int, scale: Step = 1.0) -> Tensor:
        scale = member(scale, n)
        return sum_of([f._conjugate_value(v, m, lift(scale, m)) for f, v, m in self._split(x)])

    def _grad(self, x: Tensor, n: int) -> Tensor:
        return self._join([f._grad(v, m) for f, v, m in self._split(x)])

    def _scale(self, factor: float | Tensor) -> Functional:
        return Stack([f._scale(factor) for f in self.parts], None if self.is_flat else self.axis)

    @property
    def lipschitz(self) -> Any:
        """The largest of the constants (for tensors, their sum)."""
        constants = [f.lipschitz for f in self.parts]
        return sum(constants) if any(isinstance(c, Tensor) for c in constants) else max(constants)

    @property
    def strong_convexity(self) -> Any:
        """The least of the constants (for tensors, 0)."""
        constants = [f.strong_convexity for f in self.parts]
        return 0.0 if any(isinstance(c, Tensor) for c in constants) else min(constants)

    def __repr__(self) -> str:
        return f"Stack([{', '.join(map(repr, self.parts))}])"


def sum_of(values: list[Tensor]) -> Tensor:
    """The sum of a non-empty list."""
    first, *rest = values
    for v in rest:
        first = first + v
    return first
