"""The folder of a job: what is finished, for which settings and data, so that a second run goes on where one ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pullback.core.errors import ArgumentError, FileFormatError
from pullback.io import read_json, write_json, write_npy

_OUTPUTS = ("slices", "volume.tiff", "volume.npy", "figure.png", "calibration.png", "report.html", "report.json")
_LAYOUT = 1  # of the folder; raise it when older folders can no longer be resumed


@dataclass(frozen=True)
class Store:
    """OUT/state.json, and OUT/slices/slice_0007.npy with its numbers in slice_0007.json.

    A slice is finished when its `.json` exists, which is written after its `.npy`; both appear complete or not at all.

    Args:
        folder: OUT.
    """

    folder: Path

    @property
    def state_path(self) -> Path:
        """What the folder belongs to and what is known so far."""
        return self.folder / "state.json"

    def prepare(self, identity: dict[str, Any], force: bool) -> dict[str, Any]:
        """Create the folder or take it up again, and return what an earlier run with the same identity had found.

        Args:
            identity: settings, data and version, as JSON values.
            force: forget what the folder holds for another identity.

        Raises: ArgumentError if the folder holds other results, FileFormatError for a damaged state, unless `force`.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ArgumentError(f"--out: {self.folder} is a file; give a folder")
        found: dict[str, Any] = {}
        if self.state_path.exists():
            found = self._resumable(identity, force)
        elif not force:
            foreign = [name for name in _OUTPUTS if (self.folder / name).exists()]
            if foreign:
                raise ArgumentError(
                    f"--out: {self.folder} holds {', '.join(foreign)} without a state.json that says what they are; "
                    f"choose another folder, or --force to replace them"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "slices").mkdir(exist_ok=True)
        for path in (*self.folder.glob(".*.part*"), *(self.folder / "slices").glob(".*.part*")):
            path.unlink()  # what a killed run was writing
        if not found:
            for path in (self.folder / "slices").glob("slice_*"):
                path.unlink()
            self.keep(identity, {})
        return found

    def _resumable(self, identity: dict[str, Any], force: bool) -> dict[str, Any]:
        try:
            state = read_json(self.state_path)
            known, layout = state["identity"], state["layout"]
        except (FileFormatError, KeyError, TypeError):
            if force:
                return {}
            raise FileFormatError(
                f"{self.state_path} is damaged; choose another --out, or --force to start again"
            ) from None
        changes = _changes(known, identity) if layout == _LAYOUT else ["layout of the folder"]
        if not changes:
            result: dict[str, Any] = state["found"]
            return result
        if force:
            return {}
        raise ArgumentError(
            f"--out: {self.folder} holds results of other settings ({'; '.join(changes[:3])}); "
            f"choose another folder, or --force to replace them"
        )

    def keep(self, identity: dict[str, Any], found: dict[str, Any]) -> None:
        """Write what is known so far."""
        write_json(self.state_path, {"layout": _LAYOUT, "identity": identity, "found": found})

    def finished(self, index: int, shape: tuple[int, int]) -> dict[str, Any] | None:
        """The numbers of a finished slice; None if it is to be done (again)."""
        try:
            numbers = read_json(self._json(index))
            image = np.load(self.slice_path(index), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return numbers if isinstance(numbers, dict) and image.shape == shape else None

    def finish(self, index: int, image: np.ndarray, numbers: dict[str, Any]) -> None:
        """Keep a slice."""
        write_npy(self.slice_path(index), np.asarray(image, dtype=np.float32))
        write_json(self._json(index), numbers)

    def load(self, index: int) -> np.ndarray:
        """The image of a finished slice."""
        image: np.ndarray = np.load(self.slice_path(index), allow_pickle=False)
        return image

    def slice_path(self, index: int) -> Path:
        """The file of a slice."""
        return self.folder / "slices" / f"slice_{index:04d}.npy"

    def _json(self, index: int) -> Path:
        return self.slice_path(index).with_suffix(".json")


def _changes(known: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs, as `name: was -> is`."""
    names = [*known, *(n for n in wanted if n not in known)]
    return [f"{n}: {known.get(n)} -> {wanted.get(n)}" for n in names if known.get(n) != wanted.get(n)]
