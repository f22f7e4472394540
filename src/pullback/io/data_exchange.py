"""Data Exchange: the HDF5 layout of synchrotron tomography.

Source: De Carlo et al., "Scientific data exchange: a schema for HDF5-based storage of raw and analyzed data", Journal
of Synchrotron Radiation 21 (2014), doi 10.1107/S160057751401604X.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pullback.core.errors import FileFormatError
from pullback.io.angles import check_angles, radian_note

TRANSMISSION_FLOOR = 1e-4


class DataExchangeFile:
    """y = -log((data - dark) / (white - dark)) of one slice, white and dark the means of their frames.

    Reads exchange/data, exchange/data_white, exchange/data_dark of axes (frame, slice, column) and exchange/theta [deg]
    (or radians, where its attribute `units` says so). One slice is read at a time, never the whole file. Transmissions
    below 1e-4 are set to 1e-4, and `notes` says how many: dead pixels, or rays that no photon survived.

    Args:
        path: the file.
        angles: angles [deg] that replace exchange/theta.

    Raises: FileFormatError if this is not HDF5, a dataset is missing, or shapes and angles do not fit together.
    """

    def __init__(self, path: Path, angles: np.ndarray | None = None) -> None:
        import h5py

        self.path = path
        self.notes: list[str] = []
        try:
            self._file: Any = h5py.File(path, "r")
        except OSError as error:
            raise FileFormatError(f"{path} is not a readable HDF5 file: {str(error).splitlines()[0]}") from None
        try:
            self._open(angles)
        except BaseException:
            self._file.close()
            raise

    def _open(self, angles: np.ndarray | None) -> None:
        import h5py

        names: list[str] = []
        self._file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        needed = ["exchange/data", "exchange/data_white", "exchange/data_dark"]
        if angles is None:
            needed.append("exchange/theta")
        missing = [n for n in needed if n not in names]
        if missing:
            hint = "; give the angles with --angles" if missing == ["exchange/theta"] else ""
            raise FileFormatError(
                f"{self.path}: missing dataset {', '.join(missing)}; it holds {', '.join(names) or 'no dataset'}{hint}"
            )
        self._data, self._white, self._dark = (self._file[n] for n in needed[:3])
        for dataset in (self._data, self._white, self._dark):
            name = dataset.name.lstrip("/")
            if dataset.ndim != 3 or not all(dataset.shape):
                raise FileFormatError(
                    f"{self.path}: {name} must have axes (frame, slice, column); got shape {dataset.shape}"
                )
            if dataset.dtype.kind not in "fiu":
                raise FileFormatError(f"{self.path}: {name} must hold real numbers; got dtype {dataset.dtype}")
            if dataset.shape[1:] != self._data.shape[1:]:
                raise FileFormatError(
                    f"{self.path}: {name} has frames of shape {dataset.shape[1:]}, "
                    f"exchange/data of {self._data.shape[1:]}"
                )
        n_angles, self.n_slices, self.n_columns = self._data.shape
        if angles is None:
            theta = self._file["exchange/theta"]
            angles = np.asarray(theta[()])
            units = theta.attrs.get("units", "deg")
            units = units.decode() if isinstance(units, bytes) else str(units)
            if units.lower().startswith("rad"):
                angles = np.rad2deg(angles)
        self.angles = check_angles(angles, n_angles, self.path)
        note = radian_note(self.angles)
        if note:
            self.notes.append(note)

    def read(self, index: int) -> np.ndarray:
        """The sinogram of slice `index`, shape (n_angles, n_columns), float32."""
        frames = {name: self._slice(name, data, index) for name, data in self._parts()}
        white, dark = frames["data_white"].mean(0), frames["data_dark"].mean(0)
        flat = white - dark
        if not (flat > 0).all():
            column = int(np.argmax(~(flat > 0)))
            raise FileFormatError(
                f"{self.path}: in slice {index} the mean data_white is not above the mean data_dark in "
                f"{(~(flat > 0)).sum()} of {flat.size} columns, the first {column} "
                f"(white {white[column]:.6g}, dark {dark[column]:.6g})"
            )
        transmission = (frames["data"] - dark) / flat
        low = transmission < TRANSMISSION_FLOOR
        if low.any():
            note = (
                f"slice {index}: {low.sum()} of {low.size} transmissions below {TRANSMISSION_FLOOR:g} were set to "
                f"{TRANSMISSION_FLOOR:g} (dead pixels or rays without photons)"
            )
            if note not in self.notes:
                self.notes.append(note)
            transmission = np.maximum(transmission, TRANSMISSION_FLOOR)
        return np.asarray(-np.log(transmission), dtype=np.float32)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _parts(self) -> tuple[tuple[str, Any], ...]:
        return (("data", self._data), ("data_white", self._white), ("data_dark", self._dark))

    def _slice(self, name: str, dataset: Any, index: int) -> np.ndarray:
        try:
            values = np.asarray(dataset[:, index], dtype=np.float64)
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot read exchange/{name}: {str(error).splitlines()[0]}") from None
        bad = ~np.isfinite(values)
        if bad.any():
            frame, column = np.argwhere(bad)[0]
            raise FileFormatError(
                f"{self.path}: exchange/{name} holds {bad.sum()} NaN or infinite values in slice {index}, "
                f"the first in frame {frame}, column {column}"
            )
        return values
