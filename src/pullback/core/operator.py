"""Operator and LinearOperator: what an operator is, how it is called, and how it is combined.

A subclass writes `_forward` (and `_adjoint`, if linear) on torch tensors of shape (..., *dims); everything else is
here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pullback.core import autograd, interop, spectrum
from pullback.core.errors import ArgumentError, DeviceError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.shapes import Dims, as_dims, complex_of, real_of, size

_HALF = (torch.float16, torch.bfloat16)

# How operators combine; `core/algebra.py` fills it. (The combined operators are LinearOperators themselves, so the
# functions cannot live below this class.)
algebra: dict[str, Callable[..., Any]] = {}


class OperatorLike:
    """What can be seen as a linear operator without being one, as a kernel matrix; algebra and solvers accept it."""

    __slots__ = ()

    def operator(self) -> LinearOperator:
        """The linear operator."""
        raise NotImplementedError(f"{type(self).__name__} does not define operator()")


class Operator(torch.nn.Module):
    """y = F(x), a differentiable map from tensors of shape (..., *dims) to tensors of shape (..., *dimsd).

    Args:
        dims: shape of the input without batch axes.
        dimsd: shape of the output without batch axes.
        dtype: what `.dtype` reports (NumPy or torch dtype). It never converts data: the result's dtype follows the
            input.

    A subclass writes `_forward(x)` in differentiable torch. Tensors that are assigned as attributes become buffers (or
    parameters, if they are `nn.Parameter`), so `.to()`, `state_dict()`, pickling and `torch.func.functional_call` work.
    """

    dims: tuple[int, ...]
    dimsd: tuple[int, ...]
    shape: tuple[int, int]
    linear: ClassVar[bool] = False
    _dtype: np.dtype[Any] | None
    _half: ClassVar[bool] = True  # False: float16 and bfloat16 are computed in float32
    _real_domain: bool = False  # the domain is R^n: complex input is refused
    _real_range: bool = False  # the range is R^m: complex input to the adjoint is refused
    _aliases: bool = False  # _forward may return (a view of) its input; the public call then looks and copies

    def __init__(self, dims: Dims, dimsd: Dims, *, dtype: Any = None) -> None:
        super().__init__()
        name = type(self).__name__
        dims, dimsd = as_dims(dims, "dims", name), as_dims(dimsd, "dimsd", name)
        number = None if dtype is None else interop.numpy_dtype(dtype)
        # Past __setattr__ of modules, which is slow.
        self.__dict__.update(dims=dims, dimsd=dimsd, shape=(size(dimsd), size(dims)), _dtype=number)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _forward(x)")

    def forward(self, x: Any) -> Any:
        """F(x) for a tensor or NumPy array of shape (..., *dims) or (..., prod(dims)); the result has the same kind.

        Raises: ShapeError, DtypeError, DeviceError.
        """
        return self._call(x, False)

    def linearize(self, x: Tensor) -> LinearOperator:
        """F'(x), the derivative of the operator at `x` of shape dims, as a LinearOperator."""
        return algebra["derivative"](self, x)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, OperatorLike):
            other = other.operator()
        if isinstance(other, Operator):
            return algebra["compose"](self, other)
        return self(other)

    def __add__(self, other: Any) -> Any:
        return algebra["add"](self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return algebra["add"](self, -other) if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> Any:
        return algebra["scale"](self, -1)

    def __mul__(self, other: Any) -> Any:
        if interop.is_scalar(other):
            return algebra["scale"](self, other)
        return self @ other if isinstance(other, (Operator, Tensor, np.ndarray)) else NotImplemented

    def __rmul__(self, other: Any) -> Any:
        return algebra["scale"](self, other) if interop.is_scalar(other) else NotImplemented

    def __truediv__(self, other: Any) -> Any:
        if interop.is_scalar(other):
            return algebra["scale"](self, 1 / other)
        raise ArgumentError("an operator can be divided by a number only; to solve A x = y write pullback.lsqr(A, y).x")

    __array_ufunc__ = None  # NumPy scalars and arrays on the left leave the operation to us

    # Application ---------------------------------------------------------------------------------------------------

    def _call(self, x: Any, adjoint: bool) -> Any:
        if not isinstance(x, Tensor):
            return interop.apply_numpy(self, x, adjoint)
        if not (x.is_floating_point() or x.is_complex()):
            raise DtypeError(
                f"{self._name(adjoint)} expects a floating point or complex tensor; got {x.dtype}; use x.float()"
            )
        if (self._real_range if adjoint else self._real_domain) and x.is_complex():
            raise DtypeError(
                f"{self._name(adjoint)} acts on real tensors; got {x.dtype}; apply it to x.real and x.imag"
            )
        if not self._half and x.dtype in _HALF:
            return self._call(x.float(), adjoint).to(self._out_dtype(x.dtype, adjoint))
        dims = self.dimsd if adjoint else self.dims
        n = len(dims)
        if x.shape[-n:] == dims:
            y = self._run(x, adjoint)
        elif x.ndim and x.shape[-1] == size(dims):
            y = self._run(x.reshape(*x.shape[:-1], *dims), adjoint)
            y = y.reshape(*x.shape[:-1], self.shape[1] if adjoint else self.shape[0])
        else:
            raise ShapeError(
                f"{self._name(adjoint)} expects shape (..., {', '.join(map(str, dims))})"
                + (f" or (..., {size(dims)})" if n > 1 else "")
                + f"; got {tuple(x.shape)}; leading axes are the batch"
                + ("; for the columns of a matrix use matmat" if x.ndim == 2 and x.shape[0] == size(dims) else "")
            )
        return _unshared(y, x) if self._aliases else y

    def _run(self, x: Tensor, adjoint: bool = False) -> Tensor:
        """Apply to (..., *dims) without checks; what operators call on each other."""
        return self._forward(x)

    def _name(self, adjoint: bool) -> str:
        return f"{type(self).__name__}.H" if adjoint else type(self).__name__

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        """The dtype of the result for an input of `dtype`."""
        if self._real_domain if adjoint else self._real_range:
            return real_of(dtype)
        becomes_complex = not adjoint and self._real_domain and not self._real_range
        if not dtype.is_complex and (becomes_complex or any(t.is_complex() for t in self._held())):
            return complex_of(dtype)
        return dtype

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype that SciPy sees: as given, or that of the tensors held, or float64.

        It never converts data.
        """
        if self._dtype is not None:
            return self._dtype
        dtype = torch.float64
        tensors = [t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point() or t.is_complex()]
        if tensors:
            dtype = tensors[0].dtype
            for t in tensors[1:]:
                dtype = torch.promote_types(dtype, t.dtype)
        dtype = torch.float32 if dtype in _HALF else dtype
        return interop.numpy_dtype(self._out_dtype(dtype, False))

    # Tensors held --------------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and name not in self._buffers:
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def _held(self) -> tuple[Tensor, ...]:
        """The tensors that this operator itself holds: parameters, then buffers, in order of assignment."""
        if not self._buffers and not self._parameters:
            return ()
        return tuple(t for d in (self._parameters, self._buffers) for t in d.values() if t is not None)

    def _rebind(self, tensors: Sequence[Tensor]) -> Any:
        """The same operator holding other values; itself if they are the ones that it holds."""
        held = self._held()
        if all(a is b for a, b in zip(held, tensors, strict=True)):
            return self
        new = self._copy()
        values = iter(tensors)
        for source in (self._parameters, self._buffers):
            for name, value in source.items():
                if value is not None:
                    new._parameters.pop(name, None)
                    new._buffers[name] = next(values)
        return new

    def _cast(self, tensor: Tensor, x: Tensor) -> Tensor:
        """A held tensor in the precision of `x` (complex stays complex).

        Cached where no derivative can be asked for.
        """
        if tensor.device != x.device:
            raise DeviceError(
                f"{type(self).__name__} lies on {tensor.device}, its input on {x.device}; move one with "
                f".to({str(x.device)!r})"
            )
        dtype = complex_of(x.dtype) if tensor.is_complex() else real_of(x.dtype)
        if tensor.dtype == dtype:
            return tensor
        return self._cached(("cast", dtype), tensor, lambda t: t.to(dtype))

    def _cached(
        self, key: Any, tensors: Tensor | Sequence[Tensor], function: Callable[..., Any], *, on_host: bool = False
    ) -> Any:
        """function(*tensors), kept until one of the tensors is replaced or changed in place.

        Never kept where it may be differentiated, traced or made of tensors that do not tell when they are changed. On
        a GPU kept for each stream, unless the result lies `on_host`.
        """
        held = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        if (
            torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()
            or any(not autograd.is_eager(t) or autograd.is_live(t) or t.is_inference() for t in held)
        ):
            return function(*held)
        stream = 0 if on_host else _stream(held)
        if stream is None:
            return function(*held)
        cache = self.__dict__.setdefault("_cache", {})
        key = (key, stream, *map(id, held))
        entry = cache.get(key)
        if entry is not None and all(a is b and v == b._version for a, v, b in zip(*entry[:2], held, strict=True)):
            return entry[2]
        value = function(*held)
        if len(cache) >= 8:
            cache.clear()
        cache[key] = (held, [t._version for t in held], value)
        return value

    def _copy(self) -> Any:
        """A shallow copy: its own dictionaries, the same tensors."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__getstate__())
        for name in ("_parameters", "_buffers"):
            new.__dict__[name] = dict(self.__dict__[name])
        new.__dict__["_modules"] = {
            k: m._copy() if isinstance(m, Operator) else copy.deepcopy(m) for k, m in self.__dict__["_modules"].items()
        }
        new._wake()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._wake()

    def _wake(self) -> None:
        """Set what does not travel with a copy."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # torch.nn.Module's hook under .to(), .double(), .cuda()
        self.__dict__.pop("_cache", None)
        return super()._apply(fn, recurse)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A copy whose tensors have another device or dtype (as `torch.Tensor.to`); this operator stays as it is.

        A plain tensor that requires grad stays connected: gradients of the copy reach it. An `nn.Parameter` becomes a
        new `nn.Parameter`, as in a module. (A module that contains the operator moves it in place, as torch does.)
        """
        new = self._copy()
        for module in new.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(p.detach().clone(), p.requires_grad)
        return torch.nn.Module.to(new, *args, **kwargs)

    # Text ----------------------------------------------------------------------------------------------------------

    def _expression(self, level: int = 0) -> str:
        """The operator as a formula; `level` is how strongly what surrounds it binds: 1 sum, 2 product, 3 power."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """What stands in the brackets of repr."""
        return f"{_show(self.dims)} -> {_show(self.dimsd)}" if self.dims != self.dimsd else _show(self.dims)

    def __repr__(self) -> str:
        kind = "LinearOperator" if self.linear else "Operator"
        return (
            f"<{self.shape[0]}x{self.shape[1]} {kind} {_show(self.dims)} -> {_show(self.dimsd)}: {self._expression()}>"
        )


class LinearOperator(Operator):
    """y = A x, a matrix-free linear map with its exact adjoint: <A x, y> = <x, A.H y>.

    Args:
        dims: shape of the input without batch axes.
        dimsd: shape of the output without batch axes.
        dtype: what `.dtype` reports to SciPy. It never converts data: the result's dtype follows the input.

    A subclass writes `_forward(x)` and `_adjoint(y)` on tensors of shape (..., *dims) and (..., *dimsd). They may leave
    torch (NumPy, numba): the pair alone gives derivatives of every order. A class whose two methods are plain torch
    with a good autograd sets `_native = True`; then gradients also reach every tensor that it holds.
    """

    linear: ClassVar[bool] = True
    _native: ClassVar[bool] = False
    _bridge_live: ClassVar[bool] = False  # True: even tensors that need gradients go through the bridge
    _has_range_derivatives: ClassVar[bool] = False
    _clinear: bool = True  # complex-linear; False for Real, Imag, Conj, real FFT, which are linear over the reals only
    _handle: int  # the operator's name in traced graphs
    _delegates: bool = False  # made of other operators that hold tensors, so it must be differentiated part by part

    def __init__(self, dims: Dims, dimsd: Dims | None = None, *, dtype: Any = None) -> None:
        super().__init__(dims, dims if dimsd is None else dimsd, dtype=dtype)
        self._wake()

    def _wake(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            self.__dict__["_delegates"] = True  # made while tracing (A.H): it has no name, only its parts have
        else:
            self.__dict__["_handle"] = autograd.register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, torch.nn.Module) and any(True for d in (value.parameters(), value.buffers()) for _ in d):
            self.__dict__["_delegates"] = True

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotDifferentiableError(
            f"{type(self).__name__} has no adjoint, so neither A.H nor a gradient exists; define _adjoint(y)"
        )

    def _run(self, x: Tensor, adjoint: bool = False, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """A x or A^H x for x of shape (..., *dims) without checks, differentiably.

        `tensors` replaces the tensors that the operator holds (order of `_held()`), so that one operator built once can
        serve for parameters that are computed at every call.
        """
        if tensors is None:
            if self._native or self._delegates:
                return self._adjoint(x) if adjoint else self._forward(x)
            tensors = self._held()
            if tensors and not self._bridge_live and self._is_live(tensors):
                return self._adjoint(x) if adjoint else self._forward(x)
        return autograd.call(x, self, adjoint, tensors)

    def _forward_into(self, x: Tensor, out: Tensor) -> None:
        """Out = A x. Only where no graph is built; operators that can write in place override it."""
        out.copy_(self._forward(x))

    def _adjoint_add(self, y: Tensor, out: Tensor) -> None:
        """Out += A^H y. Only where no graph is built."""
        out.add_(self._adjoint(y))

    def _is_live(self, tensors: Sequence[Tensor] | None = None) -> bool:
        tensors = self._held() if tensors is None else tensors
        if torch.compiler.is_compiling():
            return any(t.requires_grad for t in tensors)
        return any(autograd.is_live(t) for t in tensors)

    def _range_derivative(self, i: int) -> LinearOperator | None:
        """D_i with d(A x)/d theta_i [delta] = delta * (D_i x), theta_i being the i-th held tensor.

        theta_i broadcasts to dimsd. D_i holds as many tensors of the same shapes in the same order; their values come
        with every call. None: the derivative is zero.
        """
        raise AssertionError(f"{type(self).__name__} has no range derivatives; please report")

    def _derivative(self, i: int) -> LinearOperator | None:
        """`_range_derivative(i)`, made once and alive as long as this operator, because traced graphs name it."""
        made = self.__dict__.setdefault("_derivatives", {})
        if i not in made:
            made[i] = self._range_derivative(i)
        return made[i]

    def _norm_bound(self) -> float | None:
        """An upper bound of the spectral norm from the structure, or None."""
        return None

    def _coisometry(self) -> float | None:
        """The number c with A A^H = c I, where the structure tells it; None otherwise."""
        return None

    def _isometry(self) -> float | None:
        """The number c with A^H A = c I, where the structure tells it; None otherwise."""
        same_space = self.shape[0] == self.shape[1] and self._real_domain == self._real_range
        return self._coisometry() if same_space else None

    # Simplification: each returns the merged operator, or None where nothing better than the lazy form is known.

    def _compose_left(self, right: LinearOperator) -> LinearOperator | None:
        """Self @ right."""
        return None

    def _compose_right(self, left: LinearOperator) -> LinearOperator | None:
        """Left @ self."""
        return None

    def _add_left(self, right: LinearOperator) -> LinearOperator | None:
        """Self + right."""
        return None

    def _scale(self, factor: Any) -> LinearOperator | None:
        """Factor * self."""
        return None

    def linearize(self, x: Tensor) -> LinearOperator:
        """F'(x) = A for every x."""
        return self

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Small instances on which the conformance kit runs."""
        return iter(())

    # Relatives -----------------------------------------------------------------------------------------------------

    @property
    def H(self) -> LinearOperator:
        """The adjoint: <A x, y> = <x, A.H y>. `A.H.H is A`."""
        known = self.__dict__.get("_adjoint_ref")
        op = known() if known is not None else None
        if op is None:
            op = algebra["adjoint"](self)
            if op.H is self and not torch.compiler.is_compiling():
                self.__dict__["_adjoint_ref"] = weakref.ref(op)
        return op

    def adjoint(self) -> LinearOperator:
        """The adjoint operator, `A.H`."""
        return self.H

    @property
    def T(self) -> LinearOperator:
        """The transpose: A.T x = conj(A.H conj(x))."""
        return self.H.conj()

    def transpose(self) -> LinearOperator:
        """The transpose, `A.T`."""
        return self.T

    def conj(self) -> LinearOperator:
        """Conjugate the operator: x -> conj of A applied to the conjugate of x."""
        return algebra["conj"](self)

    @property
    def gram(self) -> LinearOperator:
        """A^H A, in the cheapest way that the operator knows."""
        return self._gram()

    def _gram(self) -> LinearOperator:
        return algebra["compose"](self.H, self)

    def __pow__(self, power: int) -> LinearOperator:
        return algebra["power"](self, power)

    def __rmatmul__(self, other: Any) -> Any:
        if isinstance(other, (Tensor, np.ndarray)):
            raise ArgumentError("x @ A is not defined because leading axes are the batch; write A.T(x) for x^T A")
        return NotImplemented

    # SciPy and PyLops style ----------------------------------------------------------------------------------------

    def matvec(self, x: Any) -> Any:
        """A x for a flat vector of length n (or (n, 1)), as SciPy calls it."""
        return interop.apply_columns(self, x, False)

    def rmatvec(self, y: Any) -> Any:
        """A^H y for a flat vector of length m (or (m, 1))."""
        return interop.apply_columns(self, y, True)

    def matmat(self, x: Any) -> Any:
        """A X for the columns of X of shape (n, p)."""
        return interop.apply_columns(self, x, False)

    def rmatmat(self, y: Any) -> Any:
        """A^H Y for the columns of Y of shape (m, p)."""
        return interop.apply_columns(self, y, True)

    def dot(self, other: Any) -> Any:
        """A @ other."""
        return self @ other

    # Numbers about the operator ------------------------------------------------------------------------------------

    def todense(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The matrix of A, of shape (m, n), differentiable in what the operator holds.

        Cost: n applications, `chunk_size` at a time.
        """
        return spectrum.todense(self, dtype, device, chunk_size)

    def norm(self, maxiter: int = 100, rtol: float = 1e-6) -> float:
        """||A||_2, the largest singular value, by Lanczos on A^H A. It approaches from below: see `norm_bound`."""
        return spectrum.norm(self, maxiter, rtol)

    def norm_bound(self, maxiter: int = 40) -> float:
        """A number >= ||A||_2: the operator's own bound, or a Lanczos bound that fails with a chance of at most 1e-9.

        Kept until a tensor that the operator holds changes.
        """
        tensors = (*self.parameters(), *self.buffers())
        with torch.no_grad():
            function = lambda *_: spectrum.norm_bound(self, maxiter)  # noqa: E731
            return self._cached(("norm bound", maxiter), tensors, function, on_host=True)

    def eigs(self, neigs: int | None = None, symmetric: bool = False, **kwargs: Any) -> np.ndarray:
        """Eigenvalues by decreasing magnitude; of a rectangular operator its singular values. See `spectrum.eigs`."""
        return spectrum.eigs(self, neigs, symmetric, **kwargs)

    def cond(self, **kwargs: Any) -> float:
        """||A|| ||A^-1||, the ratio of the extreme singular values."""
        return spectrum.cond(self, **kwargs)

    def trace(self, neval: int | None = None, method: str = "explicit", seed: int = 0) -> Tensor:
        """sum_i A_ii: `explicit` (n applications), `hutchinson` or `hutch++` (neval applications, an estimate)."""
        return spectrum.trace(self, neval, method, seed)

    def diagonal(
        self,
        neval: int | None = None,
        method: str = "explicit",
        seed: int = 0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """A_ii, of shape dims: `explicit` (n applications, chunk_size at a time) or `hutchinson` (an estimate)."""
        return spectrum.diagonal(self, neval, method, seed, chunk_size)

    def density(self, steps: int = 50, neval: int = 10, seed: int = 0) -> spectrum.Density:
        """How the eigenvalues of a self-adjoint operator are distributed, from neval * steps applications."""
        return spectrum.density(self, steps, neval, seed)

    def __copy__(self) -> Any:
        return self._copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        state = self.__getstate__()
        # Tensors computed by autograd cannot be deep-copied; a copy of the values is what a copy means.
        state["_buffers"] = {
            k: b if b is None or b.is_leaf else b.detach().clone().requires_grad_(b.requires_grad)
            for k, b in state["_buffers"].items()
        }
        new.__dict__.update(copy.deepcopy(state, memo))
        new._wake()
        return new


_TRANSIENT = {"_handle", "_cache", "_derivatives", "_adjoint_ref"}


def _unshared(y: Tensor, x: Tensor) -> Tensor:
    """y, copied if it lies in the memory of x, or if that cannot be seen because somebody traces."""
    if autograd.is_eager(y) and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return y
    return y.clone(memory_format=torch.contiguous_format)


def _stream(tensors: Sequence[Tensor]) -> int | None:
    """The stream on which something computed now will be ready; None while a CUDA graph is recorded, which computes
    nothing. Another stream would not wait for it.
    """
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is None:
        return 0
    return None if torch.cuda.is_current_stream_capturing() else int(torch.cuda.current_stream(device).cuda_stream)


def _show(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))
