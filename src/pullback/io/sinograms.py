"""Sinograms from files, one slice at a time.

| suffix | layout | reader |
|---|---|---|
| .h5 .hdf .hdf5 .nxs | Data Exchange: exchange/data, data_white, data_dark, theta | `data_exchange.DataExchangeFile` |
| .npz | `sinogram` ([n_slices,] n_angles, n_columns), `theta` or `angles` (n_angles,) in degrees | `ArrayFile` |
| .npy | the sinogram alone, the same axes; the angles are given by the caller | `ArrayFile` |

A sinogram is the line integral of the attenuation, -log(transmission), as XRayTransform gives it. Angles are in degrees
in every file and on the command line, in radians in the library.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np

from pullback.core.errors import ArgumentError, FileFormatError
from pullback.io.angles import check_angles, radian_note

HDF5_SUFFIXES = (".h5", ".hdf", ".hdf5", ".nxs")
SUFFIXES = (*HDF5_SUFFIXES, ".npz", ".npy")


class SinogramFile(Protocol):
    """A file of sinograms of one scan: the same angles and detector in each slice.

    Attributes:
        path: the file.
        angles: projection angles of shape (n_angles,), float64 [deg].
        n_slices: slices in the file.
        n_columns: detector columns.
        notes: remarks about the data that a report should show, gathered while slices are read.
    """

    path: Path
    angles: np.ndarray
    n_slices: int
    n_columns: int
    notes: list[str]

    def read(self, index: int) -> np.ndarray:
        """The sinogram of slice `index`, shape (n_angles, n_columns), float32.

        Raises: FileFormatError where the data hold NaN, infinities or a flat field that is not above the dark field.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def open_sinogram(path: str | Path, angles: np.ndarray | None = None) -> SinogramFile:
    """Open a sinogram file of any format in the table above. Nothing but shapes and angles is read yet.

    Args:
        path: the file.
        angles: angles [deg] that replace those in the file; `.npy` and HDF5 files without exchange/theta need them.

    Raises: FileFormatError (missing file or dataset, wrong axes, wrong angle count), ArgumentError (unknown suffix).
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"{path}: a sinogram file ends in {', '.join(SUFFIXES)}; got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise FileFormatError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.suffix.lower() in HDF5_SUFFIXES:
        from pullback.io.data_exchange import DataExchangeFile

        return DataExchangeFile(path, angles)
    return ArrayFile(path, angles)


class ArrayFile:
    """Sinograms in a `.npz` or `.npy` file; see the table above. `.npy` is memory-mapped, `.npz` is read whole.

    Args:
        path: the file.
        angles: angles [deg] that replace those in the file.

    Raises: FileFormatError.
    """

    def __init__(self, path: Path, angles: np.ndarray | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        if path.suffix.lower() == ".npz":
            data, stored = self._open_npz()
        else:
            data, stored = self._open_npy(), None
        if data.ndim == 2:
            data = data[None]
        if data.ndim != 3 or not all(data.shape):
            raise FileFormatError(
                f"{path}: the sinogram must have axes (n_angles, n_columns) or (n_slices, n_angles, n_columns); "
                f"got shape {tuple(data.shape)}"
            )
        if data.dtype.kind not in "fiu":
            raise FileFormatError(f"{path}: the sinogram must hold real numbers; got dtype {data.dtype}")
        self._data = data
        self.n_slices, n_angles, self.n_columns = data.shape
        angles = stored if angles is None else angles
        if angles is None:
            raise FileFormatError(
                f"{path}: a .npy file holds no angles; give them with --angles FILE or --angles start:stop:count"
            )
        self.angles = check_angles(angles, n_angles, path)
        note = radian_note(self.angles)
        if note:
            self.notes.append(note)

    def _open_npz(self) -> tuple[np.ndarray, np.ndarray | None]:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                names = list(archive.files)
                if "sinogram" not in names:
                    raise FileFormatError(f"{self.path}: no array 'sinogram'; it holds {', '.join(names) or 'nothing'}")
                key = next((k for k in ("theta", "angles") if k in names), None)
                sinogram: np.ndarray = archive["sinogram"]
                return sinogram, None if key is None else archive[key]
        except FileFormatError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise FileFormatError(f"{self.path} is not a readable .npz file: {error}") from None

    def _open_npy(self) -> np.ndarray:
        try:
            data: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
            return data
        except (OSError, ValueError, EOFError) as error:
            raise FileFormatError(f"{self.path} is not a readable .npy file: {error}") from None

    def read(self, index: int) -> np.ndarray:
        """The sinogram of slice `index`, shape (n_angles, n_columns), float32."""
        y = np.array(self._data[index], dtype=np.float32)  # a copy: the file's memory is read-only
        bad = ~np.isfinite(y)
        if bad.any():
            a, c = np.argwhere(bad)[0]
            raise FileFormatError(
                f"{self.path}: the sinogram of slice {index} holds {bad.sum()} NaN or infinite values, "
                f"the first at angle {a}, column {c}"
            )
        return y

    def close(self) -> None:
        """Close the file."""
