"""Operators whose code comes from elsewhere: functions, SciPy, PyLops, anything with matvec and rmatvec."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.operator import LinearOperator, OperatorLike
from pullback.core.shapes import Dims, as_dims, complex_of, size
from pullback.linops.matrix import MatrixMult


class FunctionOperator(LinearOperator):
    """y = f(x) for a linear function f.

    Args:
        f: maps a tensor of shape dims to one of shape dimsd.
        args: as in PyLops: `n`, `n, m`, `fc, n` or `fc, n, m`, where `fc` is the adjoint function, `n` the output shape
            (rows) and `m` the input shape (columns, as n if left out).
        batched: f and fc accept leading batch axes. Otherwise they are called once for each member of a batch.
        dtype: what `.dtype` reports.

    Without `fc` the adjoint is derived from f by reverse-mode differentiation, so f must be torch code. That f is
    linear is not verified: `pullback.check` does. Raises: ArgumentError; NotDifferentiableError if f uses a tensor that
    requires grad (its gradient would be lost).
    """

    _half = False
    _aliases = True

    def __init__(self, f: Callable[[Tensor], Any], *args: Any, batched: bool = False, dtype: Any = None) -> None:
        fc = args[0] if args and callable(args[0]) else None
        sizes = args[1:] if fc is not None else args
        if not callable(f) or len(sizes) not in (1, 2):
            raise ArgumentError("FunctionOperator: expected (f, n), (f, n, m), (f, fc, n) or (f, fc, n, m)")
        rows = as_dims(sizes[0], "n", "FunctionOperator")
        super().__init__(rows if len(sizes) == 1 else as_dims(sizes[1], "m", "FunctionOperator"), rows, dtype=dtype)
        self._f, self._fc, self.batched = f, fc, bool(batched)

    def _forward(self, x: Tensor) -> Tensor:
        return self._each(self._f, x, self.dims, self.dimsd)

    def _adjoint(self, y: Tensor) -> Tensor:
        if self._fc is not None:
            return self._each(self._fc, y, self.dimsd, self.dims)
        batch = y.shape[: y.ndim - len(self.dimsd)] if self.batched else ()
        zero = torch.zeros((*batch, *self.dims), dtype=y.dtype, device=y.device)
        pull = torch.func.vjp(lambda x: self._each(self._f, x, self.dims, self.dimsd), zero)[1]
        return self._each(lambda g: pull(g)[0], y, self.dimsd, self.dims)

    def _each(
        self, function: Callable[[Tensor], Any], x: Tensor, dims: tuple[int, ...], dimsd: tuple[int, ...]
    ) -> Tensor:
        batch = x.shape[: x.ndim - len(dims)]
        x = x.resolve_conj().resolve_neg()
        if self.batched or not batch:
            return self._result(function(x), (*batch, *dimsd), x)
        rows = [self._result(function(row), dimsd, x) for row in x.reshape(-1, *dims)]
        return torch.stack(rows).reshape(*batch, *dimsd) if rows else x.new_zeros((*batch, *dimsd))

    def _result(self, y: Any, shape: tuple[int, ...], x: Tensor) -> Tensor:
        y = torch.from_numpy(y) if isinstance(y, np.ndarray) else y
        if not isinstance(y, Tensor) or tuple(y.shape) != tuple(shape):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ShapeError(f"FunctionOperator: the function must return a tensor of shape {tuple(shape)}; got {got}")
        return y

    def extra_repr(self) -> str:
        """What stands in the brackets of repr."""
        return f"{getattr(self._f, '__name__', type(self._f).__name__)}, {super().extra_repr()}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """With an adjoint, with a derived adjoint, in NumPy."""
        yield cls(_double_reverse, _double_reverse, 4)
        yield cls(_differences, 3, 4, batched=True)
        yield cls(_numpy_roll, _numpy_unroll, (2, 3))


def _double_reverse(x: Tensor) -> Tensor:
    return 2 * x.flip(-1)


def _differences(x: Tensor) -> Tensor:
    return x[..., 1:] - x[..., :-1]


def _numpy_roll(x: Tensor) -> np.ndarray:
    return np.roll(x.numpy(), 1)


def _numpy_unroll(x: Tensor) -> np.ndarray:
    return np.roll(x.numpy(), -1)


class TorchOperator(LinearOperator):
    """y = A x for a foreign operator A, with derivatives of every order.

    Args:
        op: one of: a pullback operator; a PyLops operator; a `scipy.sparse.linalg.LinearOperator`; a `scipy.sparse`
            matrix;
            a matrix (tensor or array); any object with `shape`, `matvec` and `rmatvec`; a pair of NumPy functions
            (forward, adjoint) on flat vectors, with `dims` and `dimsd`.
        batch: allow leading batch axes.
        flatten: accept flat vectors (..., n) besides (..., *dims); the result is flat where the input was. If False,
            only (..., *dims) is accepted.
        device: one of ours is copied there. Foreign operators compute on NumPy arrays, so only "cpu" is possible for
            them; tensors from elsewhere travel there and back, and the result lies where the input lay.
        dims, dimsd: shapes, for a pair of functions.
        dtype: what `.dtype` reports.

    The result's dtype follows the input. A foreign operator that declares a real dtype is applied to the real and the
    imaginary part of complex input. Gradients with respect to what the foreign operator holds do not exist.

    Raises: ArgumentError, ShapeError; NotDifferentiableError where a gradient is asked of an operator without adjoint.
    Cost: that of the operator, once for each member of the batch (sparse matrices: once), and about 5 us.
    """

    _half = False

    def __init__(
        self,
        op: Any,
        batch: bool = False,
        flatten: bool = True,
        device: torch.device | str | None = None,
        *,
        dims: Dims | None = None,
        dimsd: Dims | None = None,
        dtype: Any = None,
    ) -> None:
        kind = _wrap(op, dims, dimsd)
        super().__init__(kind.dims, kind.dimsd, dtype=kind.dtype if dtype is None else dtype)
        self.batch, self.flatten = bool(batch), bool(flatten)
        self._foreign: _Foreign | None = None
        if isinstance(kind, LinearOperator):
            self.op = kind if device is None else kind.to(device)
            self._clinear, self._real_domain, self._real_range = kind._clinear, kind._real_domain, kind._real_range
            self._half, self._aliases = kind._half, kind._aliases  # type: ignore[misc]
            self.__dict__["_delegates"] = True
        else:
            if device is not None and torch.device(device).type != "cpu":
                raise ArgumentError(
                    f"TorchOperator: the wrapped {kind.name} computes on NumPy arrays, so device must be 'cpu'; got "
                    f"{str(device)!r}; tensors on other devices are accepted and travel there and back"
                )
            self._foreign = kind
            self._clinear = kind.clinear

    def _forward(self, x: Tensor) -> Tensor:
        return self.op._run(x) if self._foreign is None else self._compute(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.op._run(y, True) if self._foreign is None else self._compute(y, True)

    def _call(self, x: Any, adjoint: bool) -> Any:
        if not (self.batch and self.flatten) and isinstance(x, (Tensor, np.ndarray)):
            self._refuse_layout(tuple(x.shape), adjoint)
        return super()._call(x, adjoint)

    def _refuse_layout(self, shape: tuple[int, ...], adjoint: bool) -> None:
        dims = self.dimsd if adjoint else self.dims
        if shape == dims:
            return
        shaped = shape[-len(dims) :] == dims
        if not self.flatten and not shaped:
            raise ShapeError(
                f"{self._name(adjoint)} with flatten=False expects shape (..., {', '.join(map(str, dims))}); got "
                f"{shape}"
            )
        if not self.batch and len(shape) > (len(dims) if shaped else 1):
            raise ShapeError(
                f"{self._name(adjoint)} with batch=False expects shape {dims} or ({size(dims)},); got {shape}; "
                f"pass batch=True"
            )

    def apply(self, x: Any) -> Any:
        """A x. (A function is applied to every submodule, as `torch.nn.Module.apply` does.)"""
        return super().apply(x) if callable(x) and not isinstance(x, (Tensor, np.ndarray)) else self._call(x, False)

    def adjoint(self, y: Any = None) -> Any:
        """A^H y; without an argument the adjoint operator."""
        return self.H if y is None else self._call(y, True)

    def _compute(self, x: Tensor, adjoint: bool) -> Tensor:
        foreign = self._foreign
        assert foreign is not None, "a foreign operator is missing; please report"
        dims, dimsd = (self.dimsd, self.dims) if adjoint else (self.dims, self.dimsd)
        n, m = self.shape if adjoint else (self.shape[1], self.shape[0])
        device, dtype = x.device, self._out_dtype(x.dtype, adjoint)
        if device.type != "cpu":
            x = x.cpu()
        if x.is_complex():
            x = x.resolve_conj()
        array = x.resolve_neg().numpy()
        rows = array.reshape(-1, n)
        if x.is_complex() and not foreign.complex and foreign.clinear:
            out: np.ndarray = foreign.rows(rows.real, adjoint, m) + 1j * foreign.rows(rows.imag, adjoint, m)
        else:
            out = foreign.rows(rows, adjoint, m)
        if out.dtype.kind == "c" and not dtype.is_complex:
            out = out.real
        if np.may_share_memory(out, array):
            out = out.copy()
        y = torch.from_numpy(np.ascontiguousarray(out))
        if y.dtype != dtype:
            y = y.to(dtype)
        shape = dimsd if x.ndim == len(dims) else (*x.shape[: x.ndim - len(dims)], *dimsd)
        y = y.view(shape)
        return y if device.type == "cpu" else y.to(device)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        if self._foreign is None:
            return self.op._out_dtype(dtype, adjoint)
        if dtype.is_complex:
            return dtype
        return complex_of(dtype) if self._foreign.complex else dtype

    def _norm_bound(self) -> float | None:
        return self.op._norm_bound() if self._foreign is None else None

    def extra_repr(self) -> str:
        """What stands in the brackets of repr."""
        name = self.op._expression() if self._foreign is None else self._foreign.name
        return f"{name}, {super().extra_repr()}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """A pair of NumPy functions, an object with matvec, one of ours, a complex one."""
        yield cls((_numpy_roll_vector, _numpy_unroll_vector), batch=True, dims=(2, 3), dimsd=(2, 3))
        matrix = np.random.default_rng(0).standard_normal((3, 4))
        yield cls(_ArrayOperator(matrix), batch=True)
        yield cls(_ArrayOperator(matrix + 1j * matrix[::-1]), batch=True)
        yield cls(MatrixMult(torch.from_numpy(matrix)), batch=True)


class _Foreign:
    """What a foreign operator looks like from here: rows of a 2-D array in, rows of a 2-D array out."""

    def __init__(
        self, op: Any, forward: Any, adjoint: Any, dims: Any, dimsd: Any, *, dtype: Any, clinear: bool = True
    ) -> None:
        self.op, self._forward, self._adjoint = op, forward, adjoint
        self.dims = as_dims(dims, "dims", "TorchOperator")
        self.dimsd = as_dims(dimsd, "dimsd", "TorchOperator")
        self.complex = dtype is not None and np.dtype(dtype).kind == "c"
        self.dtype = dtype if dtype is not None and np.dtype(dtype).kind in "fc" else None
        self.clinear = clinear
        self.name = type(op).__name__ if not isinstance(op, tuple) else "functions"

    def rows(self, x: np.ndarray, adjoint: bool, m: int) -> np.ndarray:
        """The operator applied to every row of `x`; rows of m elements."""
        function = self._adjoint if adjoint else self._forward
        if function is None:
            raise NotDifferentiableError(
                f"TorchOperator: the wrapped {self.name} has no adjoint (rmatvec), so no gradient exists"
            )
        if isinstance(function, _Columns):
            return function(x)
        try:
            results = [np.asarray(function(row)) for row in x]
        except NotImplementedError:
            raise NotDifferentiableError(
                f"TorchOperator: the wrapped {self.name} does not implement its "
                f"{'adjoint (rmatvec)' if adjoint else 'matvec'}"
            ) from None
        for r in results:
            if r.size != m:
                raise ShapeError(f"TorchOperator: the wrapped {self.name} returned {r.size} elements, expected {m}")
        if len(results) == 1:
            return results[0].reshape(1, m)
        return np.stack(results).reshape(-1, m) if results else np.zeros((0, m), x.dtype)


class _Columns:
    """A sparse matrix applied to all rows of an array at once."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.matrix @ rows.T).T


def _wrap(op: Any, dims: Dims | None, dimsd: Dims | None) -> Any:
    """The kind of `op`, as a LinearOperator or a _Foreign."""
    if not isinstance(op, tuple) and (dims is not None or dimsd is not None):
        raise ArgumentError(
            "TorchOperator: dims and dimsd belong to a pair of functions; the operator given has its own"
        )
    op = op.operator() if isinstance(op, OperatorLike) else op
    if isinstance(op, LinearOperator):
        return op
    if isinstance(op, (Tensor, np.ndarray)):
        return MatrixMult(op)
    if isinstance(op, tuple):
        if len(op) != 2 or not callable(op[0]) or not (op[1] is None or callable(op[1])) or dims is None:
            raise ArgumentError(
                "TorchOperator: a pair (forward, adjoint) of functions needs dims=... (and dimsd=... if it differs)"
            )
        return _Foreign(op, op[0], op[1], dims, dims if dimsd is None else dimsd, dtype=None)
    if hasattr(op, "tocsr"):
        matrix = op.tocsr()
        return _Foreign(
            op, _Columns(matrix), _Columns(matrix.conj().T.tocsr()), op.shape[1], op.shape[0], dtype=op.dtype
        )
    if hasattr(op, "matvec") and hasattr(op, "shape"):
        m, n = op.shape
        inner, outer = getattr(op, "dims", n), getattr(op, "dimsd", m)
        rmatvec = getattr(op, "rmatvec", None)
        clinear = bool(getattr(op, "clinear", True))
        return _Foreign(op, op.matvec, rmatvec, inner, outer, dtype=getattr(op, "dtype", None), clinear=clinear)
    raise ArgumentError(
        f"TorchOperator: op must be an operator, a matrix, an object with shape, matvec and rmatvec, or a pair of "
        f"functions; "
        f"got {type(op).__name__}"
    )


def as_operator(op: Any) -> LinearOperator:
    """`op` as a LinearOperator: itself, a matrix as MatrixMult, anything foreign as TorchOperator."""
    op = op.operator() if isinstance(op, OperatorLike) else op
    if isinstance(op, LinearOperator):
        return op
    if isinstance(op, (Tensor, np.ndarray)) or hasattr(op, "tocsr"):
        return MatrixMult(op)
    if isinstance(op, (int, float, complex, str, bool)) or op is None:
        raise DtypeError(f"expected an operator or a matrix; got {type(op).__name__}")
    return TorchOperator(op, batch=True)


class _ArrayOperator:
    """The least that a foreign operator can be, for the examples."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype

    def matvec(self, x: np.ndarray) -> np.ndarray:
        return self.matrix @ x

    def rmatvec(self, y: np.ndarray) -> np.ndarray:
        return self.matrix.conj().T @ y


def _numpy_roll_vector(x: np.ndarray) -> np.ndarray:
    return np.roll(x, 1)


def _numpy_unroll_vector(x: np.ndarray) -> np.ndarray:
    return np.roll(x, -1)
