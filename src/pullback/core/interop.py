"""NumPy in, NumPy out: the one place where arrays become tensors and back, and where SciPy's calling style is
served.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    from pullback.core.operator import Operator

_TO_TORCH: dict[Any, torch.dtype] = {
    np.dtype("float16"): torch.float16,
    np.dtype("float32"): torch.float32,
    np.dtype("float64"): torch.float64,
    np.dtype("complex64"): torch.complex64,
    np.dtype("complex128"): torch.complex128,
}
_TO_NUMPY = {v: k for k, v in _TO_TORCH.items()}


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """A floating point or complex dtype (torch, NumPy or a name) as a NumPy dtype."""
    if isinstance(dtype, torch.dtype):
        found = _TO_NUMPY.get(dtype)
    else:
        found = np.dtype(dtype) if np.dtype(dtype) in _TO_TORCH else None
    if found is None:
        raise ArgumentError(f"dtype must be float16, float32, float64, complex64 or complex128; got {dtype!r}")
    return found


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a NumPy dtype."""
    return _TO_TORCH[dtype]


def is_scalar(value: Any) -> bool:
    """A number, or a tensor or array without axes."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.ndim == 0
    return isinstance(value, numbers.Number)


def as_tensor(value: Any, name: str, owner: str) -> Tensor:
    """A tensor as it is, an array or a nested sequence of numbers as a floating point or complex tensor.

    Data from outside torch is copied, so that an operator never changes with the caller's array.
    """
    if isinstance(value, Tensor):
        tensor = value
    else:
        try:
            # Copied by torch, whose memory is aligned to 64 bytes: on NumPy's 16 some products take half as long again.
            tensor = torch.from_numpy(np.require(value, requirements=["C", "W"])).clone()
        except (TypeError, ValueError):
            raise ArgumentError(
                f"{owner}: {name} must be a tensor or an array of numbers; got {type(value).__name__}"
            ) from None
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.double()
    return tensor


def share(x: np.ndarray, owner: str) -> Tensor:
    """An array as a tensor on the same memory where torch can (else a copy); integers become float64."""
    if x.dtype.kind in "iub":
        x = x.astype(np.float64)
    elif x.dtype.newbyteorder("=") not in _TO_TORCH:
        raise DtypeError(f"{owner} expects a real or complex array; got dtype {x.dtype}; use x.astype(numpy.float64)")
    if not x.dtype.isnative or not x.flags.writeable or any(s < 0 for s in x.strides):
        x = x.astype(x.dtype.newbyteorder("="), order="C", copy=True)
    return torch.from_numpy(x)


def device_of(op: Operator) -> torch.device:
    """Where the operator's tensors lie; the CPU if it holds none."""
    for tensors in (op.parameters(), op.buffers()):
        for t in tensors:
            return t.device
    return torch.device("cpu")


def apply_numpy(op: Operator, x: Any, adjoint: bool) -> Any:
    """op(x) for an ndarray."""
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"{op._name(adjoint)} expects a torch tensor or a NumPy array; got {type(x).__name__}")
    t = share(x, op._name(adjoint))
    with torch.no_grad():
        y = op._call(t.to(device_of(op)), adjoint)
    return y.resolve_conj().resolve_neg().cpu().numpy()


def apply_columns(op: Any, x: Any, adjoint: bool) -> Any:
    """A x for x of shape (n,) or A X for the columns of X of shape (n, p)."""
    n = op.shape[0] if adjoint else op.shape[1]
    if not isinstance(x, (Tensor, np.ndarray)):
        x = np.asarray(x)
    if x.ndim not in (1, 2) or x.shape[0] != n:
        raise ShapeError(f"{op._name(adjoint)} as a matrix expects shape ({n},) or ({n}, p); got {tuple(x.shape)}")
    dims = op.dimsd if adjoint else op.dims
    columns = x.T if x.ndim == 2 else x
    y = op._call(columns.reshape(*columns.shape[:-1], *dims), adjoint)
    y = y.reshape(*columns.shape[:-1], -1)
    return y.T if x.ndim == 2 else y
