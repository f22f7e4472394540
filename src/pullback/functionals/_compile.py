"""numba for the loops of this folder; imported only by the files that hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as machine code, kept on disk where numba finds a directory that it may write to."""
    options: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(**options)(kernel)
