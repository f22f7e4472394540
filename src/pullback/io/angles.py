"""Projection angles in degrees, as files and users give them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from pullback.core.errors import ArgumentError, FileFormatError


def check_angles(angles: np.ndarray, count: int, path: str | Path) -> np.ndarray:
    """The angles as float64 of shape (count,) [deg].

    Raises: FileFormatError if there are more or fewer, or if one is not finite.
    """
    angles = np.asarray(angles)
    if angles.dtype.kind not in "fiu":
        raise FileFormatError(f"{path}: the angles must be numbers in degrees; got dtype {angles.dtype}")
    angles = angles.astype(np.float64).ravel()
    if len(angles) != count:
        raise FileFormatError(
            f"{path}: {len(angles)} angles for {count} projections; one angle [deg] a projection is needed"
        )
    if not np.isfinite(angles).all():
        raise FileFormatError(f"{path}: angle {int(np.argmin(np.isfinite(angles)))} is not finite")
    return angles


def radian_note(angles: np.ndarray) -> str | None:
    """A remark where the angles look like radians (a heuristic: many of them within 2 pi degrees)."""
    span = float(np.ptp(angles))
    if len(angles) >= 16 and 0 < span <= 2 * math.pi + 1e-6:
        return f"the {len(angles)} angles span only {span:.4g} degrees; if they are in radians, multiply them by 180/pi"
    return None


def parse_angles(text: str) -> np.ndarray:
    """Angles [deg] from `start:stop:count` (stop excluded, so 0:180:60 is 0, 3, ..., 177), or from a file.

    Args:
        text: the range, or the path of a `.npy` file or of a text file with one number a line (or separated by commas).

    Raises: ArgumentError for a malformed range, FileFormatError for a file that holds no numbers.
    """
    path = Path(text)
    if ":" in text and not path.exists():
        try:
            start, stop, number = text.split(":")
            first, last, count = float(start), float(stop), int(number)
        except ValueError:
            raise ArgumentError(
                f"--angles: expected start:stop:count in degrees, as 0:180:181, or a file; got {text!r}"
            ) from None
        if count < 1 or not (math.isfinite(first) and math.isfinite(last)) or (first == last and count > 1):
            raise ArgumentError(f"--angles: start:stop:count needs start != stop and count >= 1; got {text!r}")
        return first + (last - first) * np.arange(count) / count
    if not path.is_file():
        raise ArgumentError(f"--angles: {text!r} is neither a file nor a range start:stop:count in degrees")
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            values = np.array(path.read_text(encoding="utf-8").replace(",", " ").split(), dtype=np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise FileFormatError(f"{path} does not hold angles, one number [deg] a line: {error}") from None
    if values.dtype.kind not in "fiu" or not values.size:
        raise FileFormatError(f"{path} does not hold angles, one number [deg] a line")
    result: np.ndarray = values.astype(np.float64).ravel()
    return result
