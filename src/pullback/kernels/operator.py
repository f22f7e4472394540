"""A kernel matrix as a linear operator: (A b)_i = sum_j K_ij b_j, with its exact adjoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pullback.core import autograd, maps
from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import complex_of
from pullback.kernels.ir import grad
from pullback.kernels.ir.expr import PARAMETER, Expr, builders, substitute, variable
from pullback.kernels.ir.expr import I as ROW
from pullback.kernels.ir.expr import J as COLUMN
from pullback.kernels.ir.reductions import OVER_I, OVER_J, Program
from pullback.kernels.lazy_base import Domain, LazyBase, Leaf, make
from pullback.kernels.lazy_data import from_pairs, to_pairs
from pullback.kernels.lazy_expr import renumber
from pullback.kernels.plan.ranges import Ranges, as_ranges
from pullback.kernels.task import task, tolerance_of

_WIDE = 64  # real columns that one pass takes: code is unrolled over them

Signature = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LinearForm:
    """F_ij(b_j), linear in b, without its data: what (A b)_i = sum_j F_ij(b_j) sums.

    Args:
        expr: "scalar": K_ij, for F = K b; "complex": the same as a pair of real numbers; "linear": F itself, with b the
            variable after the arguments of `signature`, of category j.
        signature: (dimension, category) of each argument but b.
        mode: "scalar", "complex" or "linear".
        unit_in, unit_out: real numbers for each b_j and each (A b)_i.
        accumulator, scheme: as in Program.
    """

    expr: Expr
    signature: Signature
    mode: str
    unit_in: int = 1
    unit_out: int = 1
    accumulator: str = "auto"
    scheme: str = "block_sum"

    def __post_init__(self) -> None:
        if self.mode == "linear":
            v = self._variable
            if not grad.is_linear(self.expr, v):
                raise ArgumentError(f"the formula {self.expr} must be linear in the variable {v} that is solved for")

    @property
    def _variable(self) -> Expr:
        return variable(len(self.signature), self.unit_in, COLUMN)

    def product(self, args: Sequence[Tensor], b: Tensor, adjoint: bool, ranges: Ranges | None, backend: str) -> Tensor:
        """A b, or A^H b, for columns b of shape (..., rows, columns * unit), in passes over at most 64 columns."""
        pieces = self.pieces(b, adjoint)
        parts = [
            maps.call(task(program, ranges, backend), [*args, piece])
            for program, piece in zip(self.programs(b, adjoint), pieces, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def pieces(self, b: Tensor, adjoint: bool) -> Sequence[Tensor]:
        """`b` cut into what one pass takes."""
        unit = self.unit_out if adjoint else self.unit_in
        width = max(1, _WIDE // max(self.unit_in, self.unit_out)) * unit
        return (b,) if b.shape[-1] <= width else b.split(width, -1)

    def programs(self, b: Tensor, adjoint: bool) -> list[Program]:
        """The program of each piece."""
        unit = self.unit_out if adjoint else self.unit_in
        return [_program(self, piece.shape[-1] // unit, adjoint) for piece in self.pieces(b, adjoint)]


@lru_cache(maxsize=1024)
def _program(form: LinearForm, columns: int, adjoint: bool) -> Program:
    width = columns * (form.unit_out if adjoint else form.unit_in)
    category, axis = (ROW, OVER_I) if adjoint else (COLUMN, OVER_J)
    b = variable(len(form.signature), width, category)
    if form.mode == "scalar":
        product = form.expr * b
    elif form.mode == "complex":
        re, im = builders["Gather"](form.expr, (0,)), builders["Gather"](form.expr, (1,))
        im = -im if adjoint else im
        turned = builders["Gather"](b, tuple(k ^ 1 for k in range(width)))
        product = re * b + builders["Concat"](*([-im, im] * columns)) * turned
    else:
        unit = width // columns
        blocks = [builders["Gather"](b, tuple(range(k * unit, (k + 1) * unit))) for k in range(columns)]
        v = form._variable
        terms = [grad.grad(form.expr, v, e) if adjoint else substitute(form.expr, {v: e}) for e in blocks]
        product = terms[0] if len(terms) == 1 else builders["Concat"](*terms)
    signature = (*form.signature, (width, category))
    return Program("Sum", (product,), (axis,), signature, 1, form.accumulator, form.scheme)


def form_of(lazy: LazyBase, var: LazyBase | None = None) -> tuple[LinearForm, Domain]:
    """The linear form of a LazyTensor, and the leaves that are its arguments.

    `var`: the open variable (a slot of category j) that the formula is linear in; None: the LazyTensor is the kernel.
    """
    expr, domain = lazy._expr, lazy._domain
    if var is None:
        if lazy.ndim != 1:
            raise ShapeError(
                f"a LazyTensor of one component is a matrix; this one has shape {lazy._shape}; "  # type: ignore[attr-defined]
                f"give the variable that a vector-valued formula is linear in: KernelOperator(F, var)"
            )
        mode, unit = ("complex", 2) if lazy._complex else ("scalar", 1)
        form = LinearForm(expr, domain.signature, mode, unit, unit)
    else:
        slot = var._domain.leaves[0] if len(var._domain.leaves) == 1 else None
        where = [p for p, leaf in enumerate(domain.leaves) if slot is not None and leaf.key == slot.key]
        if slot is None or slot.slot < 0 or slot.category != COLUMN or not where:
            raise ArgumentError("var must be a variable Vj(position, dim) without data that the formula uses")
        p, n = where[0], len(domain.leaves)
        places = tuple(n - 1 if k == p else k - (k > p) for k in range(n))
        expr = renumber(expr, places)
        domain = Domain(tuple(leaf for k, leaf in enumerate(domain.leaves) if k != p))
        form = LinearForm(expr, domain.signature, "linear", slot.dim, expr.dim)
    if domain.symbolic:
        raise ArgumentError("a kernel matrix needs data for every variable")
    return form, domain


class KernelOperator(LinearOperator):
    """(A b)_i = sum_j K_ij b_j for a LazyTensor K_ij of one (real or complex) component.

    Args:
        K: the LazyTensor, of shape (..., M, N); dims is (..., N) and dimsd (..., M), with K's batch axes as blocks.
        var: a variable Vj(position, d) without data in which K is linear: then dims is (..., N, d), dimsd (..., M, e).

    The tensors of K are held as x0, x1 ..., and gradients of every order reach them. Leading axes of the input become
    columns of one product, so a batch costs one evaluation of the kernel for 64 members. `K.ranges` is kept.
    `K.with_tolerance(...)` makes products, adjoints and derivatives that keep that relative l2 error; the members of a
    batch are scaled to one size for it, so that a small one keeps it too.
    Raises: ShapeError, ArgumentError. Cost: M N evaluations of the formula.
    """

    _native = True
    _half = False

    def __init__(self, K: Any, var: Any = None) -> None:
        if not isinstance(K, LazyBase):
            raise ArgumentError(f"KernelOperator expects a LazyTensor; got {type(K).__name__}")
        form, domain = form_of(K, var)
        batch, m, n = domain.batch, *domain.pairs[-2:]
        linear = form.mode == "linear"
        super().__init__(
            (*batch, n, form.unit_in) if linear else (*batch, n), (*batch, m, form.unit_out) if linear else (*batch, m)
        )
        self.form, self.backend = form, K.backend or "auto"
        self.ranges = as_ranges(K._ranges, m, n)
        for p, (leaf, value) in enumerate(zip(domain.leaves, domain.args(), strict=True)):
            is_parameter = isinstance(leaf.source, torch.nn.Parameter) and leaf.source.shape == value.shape
            setattr(self, f"x{p}", leaf.source if is_parameter else value)

    def _run(self, x: Tensor, adjoint: bool = False, tensors: Sequence[Tensor] | None = None) -> Tensor:
        if torch.compiler.is_compiling():  # tracers see one op; building programs is not for them
            return autograd.call(x, self, adjoint, self._held() if tensors is None else tensors)
        return super()._run(x, adjoint, tensors)

    def _forward(self, x: Tensor) -> Tensor:
        return self._product(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._product(y, True)

    def _product(self, x: Tensor, adjoint: bool) -> Tensor:
        form = self.form
        dims, dimsd = (self.dimsd, self.dims) if adjoint else (self.dims, self.dimsd)
        if x.is_complex() and form.mode != "complex":
            x = x.resolve_conj()
            return torch.complex(*self._product(torch.stack([x.real, x.imag]), adjoint).unbind(0))
        x = x.resolve_neg()
        n = len(dims)
        batch = x.shape[: x.ndim - n]
        if form.mode == "complex":
            x = x if x.is_complex() else torch.complex(x, torch.zeros_like(x))
        args = [self._cast(getattr(self, f"x{p}"), x) for p in range(len(form.signature))]
        columns = x.reshape(-1, *dims)
        scale = self._sizes(columns)
        columns = columns if scale is None else columns / scale
        if form.mode == "linear":
            columns = columns.movedim(0, -2).flatten(-2)
        else:
            columns = columns.movedim(0, -1)
            columns = to_pairs(columns) if form.mode == "complex" else columns
        y = form.product(args, columns, adjoint, self.ranges, self.backend)
        if form.mode == "linear":
            y = y.unflatten(-1, (-1, dimsd[-1])).movedim(-2, 0)
        else:
            y = (from_pairs(y) if form.mode == "complex" else y).movedim(-1, 0)
        y = y if scale is None else y * scale.reshape(-1, *(1,) * (y.ndim - 1))
        return y.reshape(*batch, *dimsd)

    def _sizes(self, columns: Tensor) -> Tensor | None:
        """Constants to divide columns by, where their sums share a tolerance."""
        if tolerance_of(self.backend) is None or columns.shape[0] < 2:
            return None
        size = columns.detach().abs().square().sum(tuple(range(1, columns.ndim)), keepdim=True).sqrt()
        return torch.where((size > 0) & (size < float("inf")), size, 1.0)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return complex_of(dtype) if self.form.mode == "complex" else dtype

    def extra_repr(self) -> str:
        """What stands in the brackets of repr."""
        tolerance = tolerance_of(self.backend)
        return super().extra_repr() + (f", tolerance={tolerance:g}" if tolerance is not None else "")

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """A Gaussian with a parameter, one with batch axes, a complex one, a vector-valued one."""
        generator = torch.Generator().manual_seed(5)
        x, y = (torch.randn(n, 2, dtype=torch.float64, generator=generator) for n in (4, 3))
        x_i, y_j = variable(0, 2, ROW), variable(1, 2, COLUMN)
        squared = builders["SqDist"](x_i, y_j)
        scale = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        yield cls(
            _lazy(builders["Exp"](-squared * variable(2, 1, PARAMETER)), (x, ROW), (y, COLUMN), (scale, PARAMETER))
        )
        yield cls(_lazy(1 / (1 + squared), (torch.stack([x, 2 * x]), ROW), (y, COLUMN)))
        wave = builders["ComplexExp1j"](builders["Scalprod"](x_i, y_j))
        yield cls(_lazy(wave, (x, ROW), (y, COLUMN), is_complex=True))
        b = Leaf((0, 2, COLUMN), None, 2, COLUMN, 0)
        vector = builders["Exp"](-squared) * (x_i - y_j) * builders["Scalprod"](x_i - y_j, variable(2, 2, COLUMN))
        lazy = _lazy(vector, (x, ROW), (y, COLUMN), b)
        yield cls(lazy, make(variable(0, 2, COLUMN), lazy, Domain((b,))))


class _Formula(LazyBase):
    """The least that a LazyTensor can be, for examples."""

    __slots__ = ("_complex",)


def _lazy(expr: Expr, *data: Any, is_complex: bool = False) -> Any:
    lazy: Any = object.__new__(_Formula)
    leaves = tuple(d if isinstance(d, Leaf) else Leaf(d[0], d[0], d[0].shape[-1], d[1]) for d in data)
    lazy._expr, lazy._domain, lazy._ranges, lazy.backend = expr, Domain(leaves), None, None
    lazy._complex = is_complex
    return lazy
