"""Readers and writers: values, every kind of bad file, and files that appear complete or not at all."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import tifffile

from pullback import io
from pullback.core.errors import ArgumentError, FileFormatError

N_ANGLES, N_SLICES, N_COLUMNS = 7, 3, 11


def write_scan(path, **changes):
    """A Data Exchange file; a keyword replaces a dataset (None drops it), `units` sets theta's attribute."""
    rng = np.random.default_rng(0)
    parts = {
        "data": rng.uniform(200, 900, (N_ANGLES, N_SLICES, N_COLUMNS)).astype(np.float32),
        "data_white": rng.uniform(990, 1010, (4, N_SLICES, N_COLUMNS)).astype(np.float32),
        "data_dark": rng.uniform(9, 11, (2, N_SLICES, N_COLUMNS)).astype(np.float32),
        "theta": np.linspace(0, 180, N_ANGLES, endpoint=False),
    }
    units = changes.pop("units", None)
    parts.update(changes)
    with h5py.File(path, "w") as file:
        for name, value in parts.items():
            if value is not None:
                file[f"exchange/{name}"] = value
        if units is not None:
            file["exchange/theta"].attrs["units"] = units
    return parts


# Data Exchange -------------------------------------------------------------------------------------------------------


def test_data_exchange_is_the_log_of_the_corrected_transmission(tmp_path):
    parts = write_scan(tmp_path / "scan.h5")
    source = io.open_sinogram(tmp_path / "scan.h5")
    assert (source.n_slices, source.n_columns) == (N_SLICES, N_COLUMNS)
    np.testing.assert_array_equal(source.angles, parts["theta"])
    white, dark = parts["data_white"].astype(float).mean(0), parts["data_dark"].astype(float).mean(0)
    expected = -np.log((parts["data"][:, 1] - dark[1]) / (white[1] - dark[1]))
    y = source.read(1)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert source.notes == []
    source.close()


def test_theta_in_radians_is_converted(tmp_path):
    write_scan(tmp_path / "scan.h5", theta=np.linspace(0, 3, N_ANGLES), units="radians")
    source = io.open_sinogram(tmp_path / "scan.h5")
    np.testing.assert_allclose(source.angles, np.rad2deg(np.linspace(0, 3, N_ANGLES)))
    source.close()


def test_counts_below_the_dark_field_are_noted(tmp_path):
    data = np.full((N_ANGLES, N_SLICES, N_COLUMNS), 500.0)
    data[2, 0, 3] = 0
    write_scan(tmp_path / "scan.h5", data=data)
    source = io.open_sinogram(tmp_path / "scan.h5")
    y = source.read(0)
    assert y[2, 3] == pytest.approx(-np.log(1e-4))
    source.read(0)
    assert len(source.notes) == 1 and "1 of 77 transmissions" in source.notes[0]
    source.close()


@pytest.mark.parametrize("name", ["data", "data_white", "data_dark", "theta"])
def test_missing_dataset_is_named_with_those_present(tmp_path, name):
    write_scan(tmp_path / "scan.h5", **{name: None})
    with pytest.raises(FileFormatError, match=rf"missing dataset exchange/{name}; it holds exchange/"):
        io.open_sinogram(tmp_path / "scan.h5")


def test_given_angles_replace_theta(tmp_path):
    write_scan(tmp_path / "scan.h5", theta=None)
    source = io.open_sinogram(tmp_path / "scan.h5", np.arange(N_ANGLES))
    np.testing.assert_array_equal(source.angles, np.arange(7.0))
    source.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": np.zeros(5)}, "5 angles for 7 projections"),
        ({"theta": np.full(7, np.nan)}, "angle 0 is not finite"),
        ({"data": np.ones((7, 11))}, r"axes \(frame, slice, column\); got shape \(7, 11\)"),
        ({"data": np.ones((7, 3, 0))}, "must have axes"),
        ({"data_white": np.ones((4, 3, 12))}, r"frames of shape \(3, 12\), exchange/data of \(3, 11\)"),
        ({"data": np.ones((7, 3, 11), dtype=complex)}, "real numbers; got dtype complex128"),
    ],
)
def test_data_exchange_that_does_not_fit(tmp_path, changes, message):
    write_scan(tmp_path / "scan.h5", **changes)
    with pytest.raises(FileFormatError, match=message):
        io.open_sinogram(tmp_path / "scan.h5")


@pytest.mark.parametrize("name", ["data", "data_white", "data_dark"])
def test_nan_is_located(tmp_path, name):
    parts = write_scan(tmp_path / "scan.h5")
    parts[name][1, 2, 4] = np.nan
    write_scan(tmp_path / "scan.h5", **{name: parts[name]})
    source = io.open_sinogram(tmp_path / "scan.h5")
    source.read(0)
    with pytest.raises(FileFormatError, match=rf"exchange/{name} holds 1 NaN .* slice 2, .* frame 1, column 4"):
        source.read(2)
    source.close()


def test_flat_field_not_above_the_dark_field(tmp_path):
    parts = write_scan(tmp_path / "scan.h5")
    parts["data_white"][:, 1, 5] = 0
    write_scan(tmp_path / "scan.h5", data_white=parts["data_white"])
    source = io.open_sinogram(tmp_path / "scan.h5")
    with pytest.raises(FileFormatError, match=r"data_white is not above .* in 1 of 11 columns, the first 5 \(white 0,"):
        source.read(1)
    source.close()


# npz, npy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["theta", "angles"])
def test_npz(tmp_path, key):
    y = np.random.default_rng(0).random((2, 5, 6))
    np.savez(tmp_path / "y.npz", sinogram=y, **{key: np.arange(5.0)})
    source = io.open_sinogram(tmp_path / "y.npz")
    assert (source.n_slices, source.n_columns) == (2, 6)
    np.testing.assert_array_equal(source.read(1), y[1].astype(np.float32))
    np.testing.assert_array_equal(source.angles, np.arange(5.0))


def test_npy_of_one_slice_needs_angles(tmp_path):
    y = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    with pytest.raises(FileFormatError, match=r"holds no angles; give them with --angles"):
        io.open_sinogram(tmp_path / "y.npy")
    source = io.open_sinogram(tmp_path / "y.npy", np.arange(5))
    np.testing.assert_array_equal(source.read(0), y)


def test_angles_in_radians_are_noted(tmp_path):
    np.savez(tmp_path / "y.npz", sinogram=np.ones((60, 6)), theta=np.linspace(0, np.pi, 60))
    assert "multiply them by 180/pi" in io.open_sinogram(tmp_path / "y.npz").notes[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.ones(3)}, "no array 'sinogram'; it holds other"),
        ({"sinogram": np.ones((5, 6))}, "holds no angles"),
        ({"sinogram": np.ones((5, 6)), "theta": np.ones(4)}, "4 angles for 5 projections"),
        ({"sinogram": np.ones(5), "theta": np.ones(5)}, r"got shape \(5,\)"),
        ({"sinogram": np.array([["a"]]), "theta": np.ones(1)}, "real numbers; got dtype <U1"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "y.npz", **arrays)
    with pytest.raises(FileFormatError, match=message):
        io.open_sinogram(tmp_path / "y.npz")


def test_nan_in_an_array(tmp_path):
    y = np.ones((5, 6))
    y[3, 2] = np.inf
    np.savez(tmp_path / "y.npz", sinogram=y, theta=np.arange(5))
    with pytest.raises(FileFormatError, match="slice 0 holds 1 NaN or infinite values, the first at angle 3, column 2"):
        io.open_sinogram(tmp_path / "y.npz").read(0)


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".npy"])
def test_a_file_of_another_kind(tmp_path, suffix):
    path = tmp_path / f"y{suffix}"
    path.write_text("this is text")
    with pytest.raises(FileFormatError, match=r"not a readable (HDF5|\.npz|\.npy) file"):
        io.open_sinogram(path)


def test_no_file_or_unknown_suffix(tmp_path):
    with pytest.raises(FileFormatError, match="does not exist"):
        io.open_sinogram(tmp_path / "y.h5")
    with pytest.raises(ArgumentError, match=r"ends in \.h5, .*; got \.txt"):
        io.open_sinogram(tmp_path / "y.txt")
    (tmp_path / "d.h5").mkdir()
    with pytest.raises(FileFormatError, match="is not a file"):
        io.open_sinogram(tmp_path / "d.h5")


# Angles --------------------------------------------------------------------------------------------------------------


def test_parse_angles(tmp_path):
    np.testing.assert_allclose(io.parse_angles("0:180:4"), [0, 45, 90, 135])
    np.testing.assert_allclose(io.parse_angles("90:-90:3"), [90, 30, -30])
    (tmp_path / "angles.txt").write_text("0\n1.5, 3\n")
    np.testing.assert_allclose(io.parse_angles(str(tmp_path / "angles.txt")), [0, 1.5, 3])
    np.save(tmp_path / "angles.npy", np.arange(3))
    np.testing.assert_allclose(io.parse_angles(str(tmp_path / "angles.npy")), [0, 1, 2])


@pytest.mark.parametrize("text", ["0:180", "0:180:x", "0:180:0", "0:nan:3", "5:5:2", "nowhere.txt"])
def test_parse_angles_refuses(text):
    with pytest.raises(ArgumentError, match="--angles"):
        io.parse_angles(text)


def test_parse_angles_refuses_a_file_without_numbers(tmp_path):
    (tmp_path / "angles.txt").write_text("zero one")
    with pytest.raises(FileFormatError, match="does not hold angles"):
        io.parse_angles(str(tmp_path / "angles.txt"))


# Writers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["tiff", "npy"])
def test_volume_round_trip(tmp_path, format):
    volume = np.random.default_rng(0).random((3, 4, 5))
    path = tmp_path / f"v.{format}"
    io.write_volume(path, iter(volume), volume.shape, format)
    read = tifffile.imread(path) if format == "tiff" else np.load(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, volume.astype(np.float32))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", ["tiff", "npy"])
def test_volume_that_fails_leaves_the_old_file(tmp_path, format):
    path = tmp_path / f"v.{format}"
    path.write_text("old")

    def slices():
        yield np.zeros((4, 5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        io.write_volume(path, slices(), (3, 4, 5), format)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_volume_refuses(tmp_path):
    with pytest.raises(ArgumentError, match="format must be one of tiff, npy; got 'jpg'"):
        io.write_volume(tmp_path / "v.jpg", [], (0, 1, 1), "jpg")
    with pytest.raises(ArgumentError, match="expected 2 slices; got 1"):
        io.write_volume(tmp_path / "v.npy", [np.zeros((2, 2))], (2, 2, 2), "npy")
    with pytest.raises(ArgumentError, match=r"slice 0 has \(3, 2\)"):
        io.write_volume(tmp_path / "v.npy", [np.zeros((3, 2))], (1, 2, 2), "npy")
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    io.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), io.replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    io.write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    io.write_json(
        path, {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": tmp_path, "e": (1, None, True)}
    )
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": None, "d": str(tmp_path), "e": [1, None, True]}
    assert io.read_json(path)["b"] == [0, 1]
    with pytest.raises(ArgumentError, match="cannot write a set as JSON"):
        io.write_json(path, {1, 2})
    path.write_text("{")
    with pytest.raises(FileFormatError, match="does not hold JSON"):
        io.read_json(path)


def test_png(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    io.write_png(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
