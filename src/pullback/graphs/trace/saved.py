"""What autograd keeps for the derivative: tensors and bytes, each storage counted once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def storage_of(tensor: Tensor) -> tuple[Any, int]:
    """(a key that tensors on the same memory share while one of them lives, the bytes of that memory)."""
    try:
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse tensors and some subclasses lie in no single storage
        return id(tensor), _parts(tensor)


def _parts(tensor: Tensor) -> int:
    if str(tensor.layout) == "torch.sparse_coo":
        parts: Iterable[Tensor] = (tensor._indices(), tensor._values())
    elif str(tensor.layout) in ("torch.sparse_csr", "torch.sparse_bsr"):
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif str(tensor.layout) in ("torch.sparse_csc", "torch.sparse_bsc"):
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        return tensor.numel() * tensor.element_size()
    return sum(p.numel() * p.element_size() for p in parts)


class Ledger:
    """Bytes by storage. Memory of `owned` tensors (leaves, parameters, buffers) is there anyway and costs nothing."""

    def __init__(self, owned: Iterable[Tensor]) -> None:
        self._seen = {storage_of(t)[0] for t in owned}

    def charge(self, tensor: Tensor) -> int:
        """The bytes that keeping `tensor` adds: those of its whole storage the first time, then 0."""
        key, nbytes = storage_of(tensor)
        if key in self._seen:
            return 0
        self._seen.add(key)
        return nbytes
