"""Devices that are not at hand: torch's fake tensors, which have a device, a dtype and a shape but no numbers.

Inside `pretended()` code runs on fake tensors of any device. Reading a number raises, as it would make the host wait
for a real device: `.item()`, `.tolist()`, `bool(t)`, `t[mask]`, `nonzero`. So does a copy from one device to another,
such as `torch.tensor(list, device=...)`, `.cpu()` or `.to(device)`. Autograd needs a real device: ask for no gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class HostCopy(Exception):
    """A copy from one device to another, or an index whose numbers the host must read."""


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        if f in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            places = {t.device.type for t in (*args, out) if isinstance(t, Tensor)}
            if len(places) > 1:
                raise HostCopy(f"{f} copies between {' and '.join(sorted(places))}")
        return out


class _Indexing(TorchFunctionMode):
    """t[...] and copies by functions: torch's own code for them asks a build without the device for that device."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is Tensor.__getitem__:
            return _view(*args)
        if f is Tensor.__setitem__:
            return _copied(_view(*args[:2]), args[2])
        if f is Tensor.copy_:
            return _copied(*args[:2])
        return f(*args, **(kwargs or {}))


def _copied(t: Tensor, value: Any) -> Tensor:
    """`t`, into which `value` fits: there are no numbers to copy."""
    if isinstance(value, Tensor):
        if value.device.type != t.device.type:
            raise HostCopy(f"a copy between {value.device.type} and {t.device.type}")
        torch.broadcast_to(value, t.shape)
    return t


def _view(t: Tensor, at: Any) -> Tensor:
    index = at if isinstance(at, tuple) else (at,)
    if any(isinstance(k, (Tensor, list)) for k in index):
        if any(isinstance(k, list) or k.dtype == torch.bool for k in index if isinstance(k, (Tensor, list))):
            raise HostCopy("an index of which the host must know or copy the numbers")
        return torch.ops.aten.index(t, [None if isinstance(k, slice) else k for k in index])
    used = sum(k is not None and k is not Ellipsis for k in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    axis = 0
    for k in index:
        if k is Ellipsis:
            axis += t.ndim - axis - (used - _before(index))
        elif k is None:
            t, axis = t.unsqueeze(axis), axis + 1
        elif isinstance(k, slice):
            start, stop, step = k.indices(t.shape[axis])
            t, axis = torch.ops.aten.slice(t, axis, start, max(start, stop), step), axis + 1
        else:
            t = t.select(axis, k)
    return t


def _before(index: tuple[Any, ...]) -> int:
    return sum(k is not None for k in index[: index.index(Ellipsis)])


@contextlib.contextmanager
def pretended(copies: bool = False) -> Iterator[None]:
    """A context for fake tensors of any device; `copies` allows copies between devices."""
    with FakeTensorMode(), contextlib.nullcontext() if copies else _NoCopies(), _Indexing():
        yield
