"""The reductions of a LazyTensor, over i or over j, and the products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core import interop
from pullback.core.autograd import constant_in_graphs
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.kernels.ir.expr import Expr, builders, variable
from pullback.kernels.ir.expr import I as ROW
from pullback.kernels.ir.expr import J as COLUMN
from pullback.kernels.lazy_base import Domain, LazyBase, join
from pullback.kernels.lazy_data import from_pairs, to_pairs
from pullback.kernels.lazy_expr import build, number_of, numbered, shelf, shelve, text_of
from pullback.kernels.reduce import Reducer
from pullback.kernels.task import within

_IGNORED = {"device_id", "enable_chunks", "use_fast_math", "rec_multVar_highdim", "dtype", "cuda_type"}  # KeOps' own
_WIDE = 64  # columns of a matrix that one pass takes: code is unrolled over them
_NAMES = {
    "SumSoftMaxWeight": "SumSoftMax",
    "SoftMax": "SumSoftMax",
    "LogSumExpWeight": "LogSumExp",
    "Max_SumShiftExp": "LogSumExp",
    "Max_SumShiftExpWeight": "LogSumExp",
}


@lru_cache(maxsize=4096)
def reducer(
    kind: str,
    expr: Expr,
    signature: tuple[tuple[int, int], ...],
    axis: int,
    weight: Expr | None = None,
    k: int = 1,
    correction: float = 1,
    accumulator: str = "auto",
    scheme: str = "auto",
) -> Reducer:
    """The prepared reduction; equal ones are the same object."""
    return Reducer(
        kind,
        expr,
        signature,
        axis,
        weight=weight,
        k=k,
        correction=correction,
        accumulator=accumulator,
        scheme=scheme,
        names=tuple(f"x{p}" for p in range(len(signature))),
        formula=text_of(expr),
    )


@lru_cache(maxsize=4096)
def product_reducer(
    expr: Expr, signature: tuple[tuple[int, int], ...], width: int, axis: int, is_complex: bool
) -> Reducer:
    """sum_j F_ij b_j (axis 1), or sum_i F_ij b_i (axis 0), for b of `width` columns, the argument after all others."""
    category = COLUMN if axis == 1 else ROW
    b = variable(len(signature), width, category)
    if is_complex:  # pairs (re, im)
        re, im = builders["Gather"](expr, (0,)), builders["Gather"](expr, (1,))
        turned = builders["Gather"](b, tuple(k ^ 1 for k in range(width)))
        signs = builders["Concat"](*([-im, im] * (width // 2)))
        product = re * b + signs * turned
    else:
        product = expr * b
    return reducer("Sum", product, (*signature, (width, category)), axis)


@constant_in_graphs
def _traced_reducer(kind: str, expr: int, signature: Any, axis: int, weight: int | None, *options: Any) -> str:
    w = None if weight is None else numbered(weight)
    return shelve(reducer(kind, numbered(expr), signature, axis, w, *options))


@constant_in_graphs
def _traced_product(expr: int, *rest: Any) -> str:
    return shelve(product_reducer(numbered(expr), *rest))


def _reducer(kind: str, expr: Any, signature: Any, axis: int, weight: Any, *options: Any) -> Reducer:
    if torch.compiler.is_compiling():
        w = None if weight is None else number_of(weight)
        return getattr(shelf, _traced_reducer(kind, number_of(expr), signature, axis, w, *options))
    return reducer(kind, expr, signature, axis, weight, *options)


def _product(expr: Any, *rest: Any) -> Reducer:
    if torch.compiler.is_compiling():
        return getattr(shelf, _traced_product(number_of(expr), *rest))
    return product_reducer(expr, *rest)


class LazyReduction:
    """A reduction of a formula with open slots: call it with their data.

    `f = (Vi(0, 3) - Vj(1, 3)).sqnorm2().sum(1)`, then `f(x, y)`.
    """

    def __init__(
        self,
        lazy: LazyBase,
        domain: Domain,
        reduce: Reducer,
        finish: Callable[[Any], Any],
        tolerance: float | None = None,
    ) -> None:
        self.tolerance = tolerance
        self._lazy, self._domain, self._reducer, self._finish = lazy, domain, reduce, finish
        self.axis = reduce.axis
        self.reducer = reduce
        self.reduction_op = reduce.kind

    def __call__(
        self,
        *args: Any,
        backend: str | None = None,
        ranges: Any = None,
        out: Any = None,
        tolerance: float | None = None,
        **ignored: Any,
    ) -> Any:
        """The reduction for tensors or arrays that fill the slots in order; see `Reducer.__call__`."""
        _refuse_unknown(ignored)
        numpy = bool(args) and all(isinstance(a, np.ndarray) for a in args)
        given = [torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a for a in args]
        ranges = self._lazy._ranges if ranges is None else ranges
        backend = within(self.tolerance if tolerance is None else tolerance, backend or self._lazy.backend)
        y = self._reducer(self._domain.args(given), ranges=ranges, backend=backend, out=out)
        y = self._finish(y)
        return _to_numpy(y) if numpy else y

    def __repr__(self) -> str:
        leaves = [f"  x{p} = {leaf}" for p, leaf in enumerate(self._domain.leaves)]
        return "\n".join([f"LazyReduction: {self._reducer!r}", *leaves])


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name not in _IGNORED:
            raise ArgumentError(f"a reduction has no argument {name!r}")


class LazyReductions(LazyBase):
    """Methods that compute.

    `axis` (or `dim`) counts all axes: batch axes first, then i, then j, then the components; or from the end: -3 is i,
    -2 is j, -1 are the components. Keyword arguments of every reduction: `call=False` gives a LazyReduction; `backend`,
    `ranges`, `out`, `dtype_acc`, `use_double_acc`, `sum_scheme`, `tolerance` as in Genred. KeOps' `device_id`,
    `enable_chunks` and `use_fast_math` are accepted and have no effect.
    """

    __slots__ = ()

    def _axis(self, axis: int | None, dim: int | None, name: str) -> int:
        """0 (over i), 1 (over j) or 2 (the components)."""
        given = axis if dim is None else dim
        if given is None:
            raise ArgumentError(f"{name} needs axis = {self.nbatchdims} (over i) or {self.nbatchdims + 1} (over j)")
        n = self.nbatchdims + 3
        found = given + n if given < 0 else given
        if not self.nbatchdims <= found < n:
            raise ArgumentError(
                f"{name}: axis must be {self.nbatchdims} (i), {self.nbatchdims + 1} (j) or -1 (the components) for a "
                f"LazyTensor of {self.nbatchdims} batch axes; got {given}"
            )
        return found - self.nbatchdims

    def _reduce(
        self,
        kind: str,
        axis: int | None,
        dim: int | None,
        *,
        weight: Any = None,
        k: int = 1,
        correction: float = 1,
        call: bool = True,
        backend: str | None = None,
        ranges: Any = None,
        out: Any = None,
        dtype_acc: str = "auto",
        use_double_acc: bool = False,
        sum_scheme: str = "auto",
        tolerance: float | None = None,
        **ignored: Any,
    ) -> Any:
        if ignored:
            _refuse_unknown(ignored)
        over = self._axis(axis, dim, kind)
        if over == 2:
            raise ArgumentError(f"{kind} reduces over i or j, axis {self.nbatchdims} or {self.nbatchdims + 1}")
        lead: LazyBase = self
        expr, domain, g = self._expr, self._domain, None
        if weight is not None:
            (expr, g), places, lead, domain = join((self, weight))
            g = g if places[1] is None else build("Same", (g,), (places[1],))
            if isinstance(weight, LazyBase) and weight._complex:
                raise DtypeError(f"{kind}: a complex weight is not supported; reduce its .real and .imag")
        accumulator = "float64" if use_double_acc else dtype_acc
        reduce = _reducer(kind, expr, domain.signature, over, g, k, correction, accumulator, sum_scheme)
        finish = self._finish
        if tolerance is not None:
            reduce.check_tolerance()
        if domain.symbolic or not call:
            return LazyReduction(lead, domain, reduce, finish, tolerance)
        backend = within(tolerance, backend or self.backend)
        return self._run(reduce, domain, domain.args(), lead._ranges if ranges is None else ranges, backend, out)

    def _run(
        self, reduce: Reducer, domain: Domain, args: Sequence[Tensor], ranges: Any, backend: str | None, out: Any
    ) -> Any:
        y = reduce(args, ranges=ranges, backend=backend or self.backend or "auto", out=_as_out(out))
        if self._complex:
            y = self._finish(y)
        if out is not None:
            return out
        return _to_numpy(y) if domain.numpy else y

    def _finish(self, y: Any) -> Any:
        """The form of the result; complex LazyTensors join pairs."""
        return y

    # Sums -----------------------------------------------------------------------------------------------------------

    def sum(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """sum_j F_ij, of shape (..., M, D); over i, (..., N, D); with axis -1 the sum of the components, symbolic."""
        if self._axis(axis, dim, "sum") == 2:
            return self._apply("Sum")
        return self._reduce("Sum", axis, dim, **kwargs)

    def mean(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """The mean over j (of the pairs that `ranges` keeps), over i, or of the components."""
        if self._axis(axis, dim, "mean") == 2:
            return self._apply("Sum")._apply("Divide", self.ndim)
        return self._reduce("Mean", axis, dim, **kwargs)

    def var(self, axis: int | None = None, dim: int | None = None, correction: float = 1, **kwargs: Any) -> Any:
        """sum_j (F_ij - mean)^2 / (N - correction), in two passes."""
        return self._reduce("Var", axis, dim, correction=correction, **kwargs)

    def prod(self, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """prod_j F_ij."""
        return self._reduce("Prod", axis, dim, **kwargs)

    def logsumexp(self, axis: int | None = None, dim: int | None = None, weight: Any = None, **kwargs: Any) -> Any:
        """The logarithm log sum_j exp(F_ij) G_ij for a scalar F, computed without overflow; G = `weight`, 1 if None."""
        return self._reduce("LogSumExp", axis, dim, weight=weight, **kwargs)

    def sumsoftmaxweight(self, weight: Any, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """sum_j exp(F_ij) G_ij / sum_j exp(F_ij) for a scalar F and G = `weight`."""
        return self._reduce("SumSoftMax", axis, dim, weight=weight, **kwargs)

    # Truth ----------------------------------------------------------------------------------------------------------

    def any(self, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """Whether some F_ij is not 0."""
        return self._reduce("Any", axis, dim, **kwargs)

    def all(self, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """Whether no F_ij is 0."""
        return self._reduce("All", axis, dim, **kwargs)

    def count(self, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """How many F_ij are not 0, int64."""
        return self._reduce("Count", axis, dim, **kwargs)

    # Extrema --------------------------------------------------------------------------------------------------------

    def min(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """min_j F_ij; with axis -1 the smallest component, symbolic."""
        return self._extremum("Min", axis, dim, kwargs)

    def max(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """max_j F_ij; with axis -1 the largest component, symbolic."""
        return self._extremum("Max", axis, dim, kwargs)

    def argmin(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """The first j at which F_ij is least, int64; with axis -1 the component, symbolic."""
        return self._extremum("ArgMin", axis, dim, kwargs)

    def argmax(self, axis: int = -1, dim: int | None = None, **kwargs: Any) -> Any:
        """The first j at which F_ij is greatest, int64; with axis -1 the component, symbolic."""
        return self._extremum("ArgMax", axis, dim, kwargs)

    def _extremum(self, kind: str, axis: int, dim: int | None, kwargs: dict[str, Any]) -> Any:
        if self._axis(axis, dim, kind.lower()) == 2:
            return self._apply(kind)
        return self._reduce(kind, axis, dim, **kwargs)

    def min_argmin(self, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """(min, argmin)."""
        return self._reduce("Min_ArgMin", axis, dim, **kwargs)

    def max_argmax(self, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """(max, argmax)."""
        return self._reduce("Max_ArgMax", axis, dim, **kwargs)

    def Kmin(self, K: int, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """The K smallest F_ij by increasing value: (..., M, K), or (..., M, K, D) for D > 1 components."""
        return self._reduce("KMin", axis, dim, k=K, **kwargs)

    def argKmin(self, K: int, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """Their indices, int64; the first index first in ties, -1 where there are fewer than K."""
        return self._reduce("ArgKMin", axis, dim, k=K, **kwargs)

    def Kmin_argKmin(self, K: int, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """(Kmin, argKmin)."""
        return self._reduce("KMin_ArgKMin", axis, dim, k=K, **kwargs)

    def Kmax(self, K: int, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """The K largest F_ij by decreasing value."""
        return self._reduce("KMax", axis, dim, k=K, **kwargs)

    def argKmax(self, K: int, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """Their indices, int64."""
        return self._reduce("ArgKMax", axis, dim, k=K, **kwargs)

    def Kmax_argKmax(self, K: int, axis: int | None = None, dim: int | None = None, **kwargs: Any) -> Any:
        """(Kmax, argKmax)."""
        return self._reduce("KMax_ArgKMax", axis, dim, k=K, **kwargs)

    def reduction(
        self,
        reduction_op: str,
        other: Any = None,
        opt_arg: Any = None,
        axis: int | None = None,
        dim: int | None = None,
        call: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Any reduction by its Genred name; `other` is a weight (formula2), `opt_arg` the K of the K-reductions."""
        name = reduction_op.removesuffix("_Reduction")
        k = 1 if opt_arg is None else int(opt_arg)
        return self._reduce(_NAMES.get(name, name), axis, dim, weight=other, k=k, call=call, **kwargs)

    # KeOps has each of them twice.
    sum_reduction, min_reduction, max_reduction = sum, min, max
    argmin_reduction, argmax_reduction = argmin, argmax
    logsumexp_reduction, sumsoftmaxweight_reduction = logsumexp, sumsoftmaxweight
    min_argmin_reduction, max_argmax_reduction = min_argmin, max_argmax
    Kmin_reduction, argKmin_reduction, Kmin_argKmin_reduction = Kmin, argKmin, Kmin_argKmin
    Kmax_reduction, argKmax_reduction, Kmax_argKmax_reduction = Kmax, argKmax, Kmax_argKmax
    mean_reduction, var_reduction, prod_reduction = mean, var, prod
    any_reduction, all_reduction, count_reduction = any, all, count

    # Products -------------------------------------------------------------------------------------------------------

    def _times(self, b: Any, axis: int, backend: str | None = None, ranges: Any = None) -> Any:
        """sum_j F_ij b_j (axis 1) or sum_i F_ij b_i (axis 0) for scalar F; b (n,), (..., n, p) or an array."""
        domain = self._domain
        if self.ndim != 1:
            raise ShapeError(
                f"K @ b needs a LazyTensor of one component; this one has shape {self._shape}"  # type: ignore[attr-defined]
            )
        if domain.symbolic:
            raise ArgumentError("K @ b needs data for every variable; reduce (K * Vj(n, dim)).sum(1) and call it")
        is_array = isinstance(b, np.ndarray)
        t = interop.share(b, "K @ b") if is_array else b
        if not isinstance(t, Tensor):
            raise DtypeError(f"K @ b expects a tensor or an array; got {type(b).__name__}")
        rows = domain.nj if axis == 1 else domain.ni
        flat = t.ndim == 1
        if flat:
            t = t.unsqueeze(-1)
        if t.ndim < 2 or (rows is not None and t.shape[-2] != rows):
            raise ShapeError(
                f"K @ b: b must have shape ({rows},) or (..., {rows}, p) for a LazyTensor of shape "
                f"{self.shape}; got {tuple(b.shape)}"  # type: ignore[attr-defined]
            )
        if t.is_complex() or self._complex:
            y = self._times_complex(t, axis, backend, ranges)
        else:
            width = t.shape[-1]
            if width > _WIDE:
                y = torch.cat([self._times(c, axis, backend, ranges) for c in t.split(_WIDE, -1)], -1)
            else:
                reduce = _product(self._expr, domain.signature, width, axis, False)
                ranges = self._ranges if ranges is None else ranges
                y = reduce((*domain.args(), t), ranges=ranges, backend=backend or self.backend or "auto")
        if flat:
            y = y.squeeze(-1)
        return _to_numpy(y) if is_array else y

    def _times_complex(self, t: Tensor, axis: int, backend: str | None, ranges: Any) -> Tensor:
        """The product where K, b or both are complex: complex numbers as pairs of columns."""
        if not self._complex:
            return from_pairs(self._times(to_pairs(t), axis, backend, ranges))
        t = t if t.is_complex() else torch.complex(t, torch.zeros_like(t))
        domain = self._domain
        ranges = self._ranges if ranges is None else ranges
        parts = []
        for c in t.split(_WIDE // 2, -1):
            reduce = _product(self._expr, domain.signature, 2 * c.shape[-1], axis, True)
            parts.append(
                reduce((*domain.args(), to_pairs(c)), ranges=ranges, backend=backend or self.backend or "auto")
            )
        return from_pairs(parts[0] if len(parts) == 1 else torch.cat(parts, -1))


def _as_out(out: Any) -> Any:
    return torch.from_numpy(out) if isinstance(out, np.ndarray) else out


def _to_numpy(y: Any) -> Any:
    if isinstance(y, tuple):
        return tuple(map(_to_numpy, y))
    return y.detach().resolve_conj().cpu().numpy()
