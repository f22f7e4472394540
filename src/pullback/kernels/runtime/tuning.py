"""Tiles measured on a device: tried on request, the fastest kept on disk.

`tune(f, *args)` is f(*args), and so is every call where the environment has PULLBACK_TUNE=1: each kernel that runs on
a GPU for the first time is run with several tiles, and the fastest is written beside the other cached files
(`runtime/compile.py`), under a hash of the kernel's text, the device's name and Triton's version. Later processes read
it. Without a choice the tile is the one of `codegen/triton_tiles.py`. Measuring waits for the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from pullback.core.errors import ArgumentError
from pullback.kernels.codegen import triton as codegen
from pullback.kernels.codegen.triton import Kernel
from pullback.kernels.codegen.triton_tiles import Tile, candidates
from pullback.kernels.runtime.compile import cache_folder

REPEATS = 3
T = TypeVar("T")

_state = threading.local()
_chosen: dict[str, Tile | None] = {}


def tune(f: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """f(*args, **kwargs), with the tile of every kernel that it runs on a GPU measured if it was not before.

    Args:
        f: what is called, such as a Genred, or a function that reduces a LazyTensor and calls backward.
        args, kwargs: its arguments, of the sizes that matter: the choice holds for all.

    Returns: what `f` returns.

    Raises: ArgumentError if `f` cannot be called.
    """
    if not callable(f):
        raise ArgumentError(f"tune: f must be callable, such as a Genred; got {type(f).__name__}")
    with tuning():
        return f(*args, **kwargs)


@contextlib.contextmanager
def tuning() -> Iterator[None]:
    """Measure within, in this thread; torch runs backward passes on a GPU in others, which PULLBACK_TUNE=1 reaches."""
    before = getattr(_state, "on", False)
    _state.on = True
    try:
        yield
    finally:
        _state.on = before


def within() -> bool:
    """Whether this thread is inside `tuning`."""
    return getattr(_state, "on", False)


def active() -> bool:
    """Whether tiles are to be measured."""
    return within() or os.environ.get("PULLBACK_TUNE") == "1"


def choice(kernel: Kernel, architecture: str) -> Tile | None:
    """The tile that was measured to be the fastest, or None."""
    name = _name(kernel, architecture)
    if name not in _chosen:
        _chosen[name] = _read(name)
    return _chosen[name]


def measure(kernel: Kernel, architecture: str, run: Callable[[Tile], None], device: torch.device) -> Tile:
    """Run with every candidate, keep the fastest; a tile that does not run is passed over."""
    from triton.errors import TritonError

    times: dict[Tile, float] = {}
    for tile in candidates(kernel.tile):
        with contextlib.suppress(TritonError, RuntimeError):  # too much shared memory, or what a compiler cannot do
            times[tile] = _time(lambda tile=tile: run(tile), device)  # type: ignore[misc]
    best = min(times, key=times.__getitem__, default=kernel.tile)
    name = _name(kernel, architecture)
    _chosen[name] = best
    _write(name, best)
    return best


def _time(run: Callable[[], None], device: torch.device) -> float:
    run()
    found = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop))
        else:
            begun = time.perf_counter()
            run()
            found.append(time.perf_counter() - begun)
    return min(found)


@lru_cache(maxsize=4096)
def _name(kernel: Kernel, architecture: str) -> str:
    import triton

    facts = (codegen.render(kernel), kernel.data, architecture, triton.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _read(name: str) -> Tile | None:
    """The choice on disk; None if there is none, or none that could have been written."""
    try:
        found = json.loads((cache_folder() / f"{name}.tile").read_text())
    except (OSError, RuntimeError, ValueError):
        return None
    powers = {1 << k for k in range(9)}
    if not isinstance(found, list) or len(found) != 4 or not all(type(v) is int for v in found):
        return None
    tile = Tile(*found)
    good = {tile.rows, tile.columns, tile.warps} <= powers and min(tile.rows, tile.columns) >= 16
    return tile if good and tile.warps <= 16 and 1 <= tile.stages <= 8 else None


def _write(name: str, tile: Tile) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(tile))
        Path(temporary).replace(folder / f"{name}.tile")
