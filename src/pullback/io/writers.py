"""Writers: every file appears under its name complete or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback.core.errors import ArgumentError, FileFormatError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOLUME_FORMATS = ("tiff", "npy")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, renamed to `path` when the block ends well and removed when it fails.

    The rename replaces an existing file in one step, so a reader sees the old file or the new one. The data are flushed
    to the disk before the rename, so this also holds when the machine stops.

    Args:
        path: the file to write; its folder must exist.

    Yields: the path to write to. It keeps the suffix of `path`, from which some writers take the format.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON. NumPy numbers, arrays and paths are converted; NaN and infinities become null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises: FileFormatError if the file does not hold JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} does not hold JSON: {error}") from None


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Write one array as `.npy`, in its own dtype."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_png(path: str | Path, figure: Figure, dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG. The same figure gives the same bytes (no date or version inside)."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})


def write_volume(
    path: str | Path, slices: Iterable[np.ndarray], shape: tuple[int, int, int], format: str = "tiff"
) -> None:
    """Write a float32 volume of shape (n_slices, n_y, n_x), slice after slice: one slice is in memory at a time.

    Args:
        path: the file.
        slices: n_slices arrays of shape (n_y, n_x).
        shape: (n_slices, n_y, n_x).
        format: `tiff` (one page a slice, uncompressed, BigTIFF where it exceeds 4 GB) or `npy`.

    Raises: ArgumentError for another format, or slices that do not fit `shape`.
    """
    if format not in VOLUME_FORMATS:
        raise ArgumentError(f"write_volume: format must be one of {', '.join(VOLUME_FORMATS)}; got {format!r}")
    with replacing(path) as temporary:
        pages = _checked(slices, shape)
        if format == "npy":
            volume = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            for i, page in enumerate(pages):
                volume[i] = page
            volume.flush()
            del volume
        else:
            import tifffile

            big = math.prod(shape) * 4 > 2**32 - 2**25
            tifffile.imwrite(
                temporary,
                pages,
                shape=shape,
                dtype=np.float32,
                bigtiff=big,
                photometric="minisblack",
                metadata={"axes": "ZYX"},
            )


def _checked(slices: Iterable[np.ndarray], shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    n = 0
    for page in slices:
        if page.shape != shape[1:] or n == shape[0]:
            raise ArgumentError(
                f"write_volume: expected {shape[0]} slices of shape {shape[1:]}; slice {n} has {page.shape}"
            )
        n += 1
        yield np.ascontiguousarray(page, dtype=np.float32)
    if n != shape[0]:
        raise ArgumentError(f"write_volume: expected {shape[0]} slices; got {n}")


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ArgumentError(
        f"write_json: cannot write a {type(value).__name__} as JSON; convert it to numbers, text, lists or dicts"
    )
