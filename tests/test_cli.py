"""The command line: whole jobs on small files, every bad input, resuming, and nothing half-written."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch

from pullback.cli import job
from pullback.cli.main import main
from pullback.imaging.xray import XRayTransform

N_ANGLES, N_SLICES, N_COLUMNS, CENTER = 30, 4, 40, 21.6
TOOTH = Path(__file__).parents[2] / "shared" / "data" / "tooth.h5"


def attenuation():
    """Disks with a hole that wanders from slice to slice."""
    grid = torch.arange(32) - 15.5
    images = []
    for i in range(N_SLICES):
        disk = (grid[:, None] ** 2 + grid**2) < 13**2
        hole = ((grid[:, None] - 4) ** 2 + (grid - 2 * i + 3) ** 2) < 4**2
        images.append(0.05 * (disk & ~hole))
    return torch.stack(images)


def sinograms():
    angles = torch.arange(N_ANGLES, dtype=torch.float64) * math.pi / N_ANGLES
    return XRayTransform((32, 32), angles, N_COLUMNS, center=CENTER)(attenuation())


def write_scan(path, **changes):
    """A Data Exchange file with 10000 photons; a keyword replaces a dataset, None drops it."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(1e4 * torch.exp(-sinograms()), generator=generator) + 100
    parts = {
        "data": counts.movedim(0, 1).numpy(),
        "data_white": np.full((2, N_SLICES, N_COLUMNS), 10100.0),
        "data_dark": np.full((2, N_SLICES, N_COLUMNS), 100.0),
        "theta": np.arange(N_ANGLES) * 180 / N_ANGLES,
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, value in parts.items():
            if value is not None:
                file[f"exchange/{name}"] = value
    return parts


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "scan.h5"
    write_scan(path)
    return path


@pytest.fixture
def call(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        return exit_.value.code, *capsys.readouterr()

    return run


class _Checker(HTMLParser):
    """Collects what a page would load from elsewhere, and checks that tags close."""

    void = frozenset(("meta", "img", "br", "link"))

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.images = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        self.images += tag == "img"
        self.sources += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(path, images):
    checker = _Checker()
    text = path.read_text()
    checker.feed(text)
    assert checker.open == [] and checker.sources == [] and checker.images == images
    assert "http" not in text
    return text


# Whole jobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["cgls", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fbp", "fista-tv", "pdhg-tv", "split-bregman-tv"))],
)
def test_reconstruct_makes_a_volume_and_a_report(scan, tmp_path, call, method):
    out = tmp_path / "out"
    code, text, errors = call("reconstruct", scan, "--method", method, "--calibrate", "center", "--out", out)
    assert (code, errors) == (0, "")
    assert "centre 19.50 -> 21." in text and "4 slices; residual of slice 2" in text
    volume = tifffile.imread(out / "volume.tiff")
    assert volume.dtype == np.float32 and volume.shape == (4, 40, 40)
    truth = attenuation().numpy()
    error = np.sqrt(((volume[:, 4:-4, 4:-4] - truth) ** 2).mean()) / np.sqrt((truth**2).mean())
    print(method, "relative error", error)
    assert error < (0.12 if method.endswith("tv") else 0.35)
    data = json.loads((out / "report.json").read_text())
    assert abs(data["calibration"]["center"] - CENTER) < 0.2
    assert data["calibration"]["misfit"] < data["calibration"]["misfit_before"]
    assert data["residuals"]["after"] < data["residuals"]["before"]
    assert [n["slice"] for n in data["slices"]] == [0, 1, 2, 3]
    assert data["settings"]["method"] == method and data["versions"]["torch"] and data["seconds"]["all_slices"] > 0
    page = check_page(out / "report.html", 2)
    assert "Rotation centre" in page and method in page
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_formats_slices_and_geometry(tmp_path, call):
    np.savez(tmp_path / "y.npz", sinogram=sinograms().numpy(), angles=np.arange(N_ANGLES) * 6.0)
    out = tmp_path / "out"
    code, _, _ = call(
        "reconstruct", tmp_path / "y.npz", "--out", out, "--method", "fbp", "--slices", "1:4:2", "--format", "npy",
        "--center", CENTER, "--size", 64, "--pixel-size", 0.5, "--filter", "hann", "--projector", "joseph",
    )  # fmt: skip
    assert code == 0
    volume = np.load(out / "volume.npy")
    assert volume.shape == (2, 64, 64) and volume.dtype == np.float32
    coarse = volume.reshape(2, 32, 2, 32, 2).mean((2, 4))
    truth = attenuation()[1::2].numpy()
    assert np.sqrt(((coarse - truth) ** 2).mean()) < 0.25 * np.sqrt((truth**2).mean())
    data = json.loads((out / "report.json").read_text())
    assert data["calibration"] is None and data["geometry"]["center"] == CENTER
    check_page(out / "report.html", 1)


def test_lengths_scale_the_attenuation(tmp_path, call):
    """Attenuation is per unit of length: a detector twice as coarse gives half of it."""
    np.savez(tmp_path / "y.npz", sinogram=sinograms()[0].numpy(), theta=np.arange(N_ANGLES) * 6.0)
    volumes = []
    for spacing in (1.0, 2.0):
        out = tmp_path / f"out{spacing}"
        code, *_ = call(
            "reconstruct",
            tmp_path / "y.npz",
            "--out",
            out,
            "--det-spacing",
            spacing,
            "--center",
            CENTER,
            "--maxiter",
            30,
        )
        assert code == 0
        volumes.append(tifffile.imread(out / "volume.tiff"))
    np.testing.assert_allclose(volumes[0], 2 * volumes[1], atol=2e-3 * volumes[0].max())


@pytest.mark.slow
def test_angles_are_calibrated_too(scan, tmp_path, call):
    out = tmp_path / "out"
    code, *_ = call("reconstruct", scan, "--method", "fbp", "--calibrate", "center,angles", "--out", out)
    assert code == 0
    moved = json.loads((out / "report.json").read_text())["calibration"]
    assert 0 < moved["angle_change_deg"] < 2 and len(moved["angles_deg"]) == N_ANGLES
    assert len(set(moved["slices"])) == 3


def test_npy_with_a_range_of_angles(tmp_path, call):
    np.save(tmp_path / "y.npy", sinograms()[0].numpy())
    code, *_ = call(
        "reconstruct", tmp_path / "y.npy", "--angles", "0:180:30", "--method", "fbp", "--out", tmp_path / "o"
    )
    assert code == 0


# Bad input -----------------------------------------------------------------------------------------------------------


def _nan(parts):
    parts["data"][3, 2, 1] = np.nan
    return {"data": parts["data"]}


def _flat(parts):
    parts["data_white"][:, 3, 7] = 0
    return {"data_white": parts["data_white"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_white": None}, "missing dataset exchange/data_white; it holds exchange/data"),
        ({"theta": None}, "missing dataset exchange/theta; .*give the angles with --angles"),
        ({"theta": np.zeros(29)}, "29 angles for 30 projections"),
        (_nan, "exchange/data holds 1 NaN or infinite values in slice 2, the first in frame 3, column 1"),
        (_flat, "in slice 3 the mean data_white is not above the mean data_dark in 1 of 40 columns"),
        ({"data": np.full((N_ANGLES, N_SLICES, N_COLUMNS), 10100.0)}, "zero everywhere"),
    ],
)
def test_bad_scan_is_one_line_and_leaves_nothing(tmp_path, call, changes, message):
    path = tmp_path / "scan.h5"
    parts = write_scan(path)
    write_scan(path, **(changes(parts) if callable(changes) else changes))
    code, text, errors = call("reconstruct", path, "--out", tmp_path / "out", "--method", "fbp")
    assert (code, text) == (2, "")
    _one_line(errors, message)
    assert [p.name for p in tmp_path.iterdir()] == ["scan.h5"]


def _one_line(errors, message):
    import re

    assert errors.count("\n") == 1 and errors.startswith("pullback: error: "), errors
    assert re.search(message, errors), errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--det-spacing", "-1"], "--det-spacing must be a length > 0; got -1"),
        (["--pixel-size", "0"], "--pixel-size must be a length > 0; got 0"),
        (["--size", "0"], "--size must be at least 2 pixels; got 0"),
        (["--method", "magic"], "method must be one of fbp, cgls, lsqr, lsmr, landweber, sirt, irls, omp, ista-tv"),
        (["--filter", "boxcar"], "filter must be one of ramp"),
        (["--projector", "magic"], "--projector must be one of joseph, fourier"),
        (["--format", "jpg"], "--format must be one of tiff, npy"),
        (["--calibrate", "center,tilt"], "--calibrate takes center, angles or both; got 'tilt'"),
        (["--weight", "-1"], "weight must be a number >= 0"),
        (["--maxiter", "0"], "maxiter must be at least 1"),
        (["--maxiter", "many"], "--maxiter"),
        (["--center", "nan"], "--center must be a number"),
        (["--center", "4000"], "--center must lie near the detector of 40 pixels; got 4000"),
        (["--slices", "9"], "slice 9 does not exist; the file has 4"),
        (["--slices", "2:2"], "--slices: 2:2 chooses none of the 4 slices"),
        (["--slices", "a:b"], "--slices: expected a:b, a:b:step or one index; got 'a:b'"),
        (["--angles", "0:180:29"], "29 angles for 30 projections"),
        (["--angles", "0:180"], "--angles: expected start:stop:count in degrees"),
        (["--no-such-option"], "No such option: --no-such-option"),
    ],
)
def test_bad_option_is_one_line_and_leaves_nothing(scan, tmp_path, call, options, message):
    code, text, errors = call("reconstruct", scan, "--out", tmp_path / "out", *options)
    assert (code, text) == (2, "")
    _one_line(errors, message)
    assert not (tmp_path / "out").exists()


def test_bad_files_and_folders(scan, tmp_path, call):
    (tmp_path / "text.h5").write_text("text")
    (tmp_path / "file").write_text("a file")
    for arguments, message in (
        ([tmp_path / "none.h5", "--out", tmp_path / "out"], "none.h5 does not exist"),
        ([tmp_path / "text.h5", "--out", tmp_path / "out"], "not a readable HDF5 file"),
        ([tmp_path / "scan.dat", "--out", tmp_path / "out"], "a sinogram file ends in"),
        ([scan, "--out", tmp_path / "file"], "is a file; give a folder"),
        ([scan], "Missing option '?--out'?"),
    ):
        code, _, errors = call("reconstruct", *arguments)
        assert code == 2
        _one_line(errors, message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "scan.h5", "text.h5"]


def test_version_and_help(call):
    assert call("--version")[:2] == (0, "pullback 0.1.0\n")
    code, text, _ = call("reconstruct", "--help")
    assert code == 0 and "--calibrate" in text and "fista-tv" in text


def test_calibration_over_a_narrow_range_is_noted(tmp_path, call):
    np.savez(tmp_path / "y.npz", sinogram=sinograms()[:1, :20].numpy(), theta=np.arange(20) * 6.0)
    code, text, _ = call(
        "reconstruct", tmp_path / "y.npz", "--method", "fbp", "--calibrate", "center", "--out", tmp_path / "out"
    )
    assert code == 0 and "note: the views cover 120 of 180 degrees: do not rely on the calibration" in text
    assert "do not rely" in (tmp_path / "out" / "report.html").read_text()


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Counts reconstructions, and interrupts at the one whose number is put into `stop`."""
    calls = {"n": 0, "stop": None}
    original = job.reconstruct

    def reconstruct(*arguments, **options):
        if calls["n"] == calls["stop"]:
            raise KeyboardInterrupt
        calls["n"] += 1
        return original(*arguments, **options)

    monkeypatch.setattr(job, "reconstruct", reconstruct)
    return calls


def test_interrupted_run_keeps_slices_and_resumes(scan, tmp_path, call, counted, monkeypatch):
    out = tmp_path / "out"
    arguments = ("reconstruct", scan, "--method", "cgls", "--calibrate", "center", "--out", out)
    counted["stop"] = 2
    code, _, errors = call(*arguments)
    assert code == 130 and f"interrupted; 2 of 4 slices are kept in {out}; the same command resumes" in errors
    assert not list(out.glob("volume*")) and not (out / "report.html").exists()
    assert sorted(p.name for p in (out / "slices").iterdir()) == [
        f"slice_{i:04d}{suffix}" for i in (0, 1) for suffix in (".json", ".npy")
    ]
    # the second run does not touch what is finished, nor calibrates again
    marked = np.load(out / "slices" / "slice_0001.npy") * 0 + 7
    np.save(out / "slices" / "slice_0001.npy", marked)
    monkeypatch.setattr(job, "calibrate", lambda *a, **k: pytest.fail("calibrated again"))
    counted.update(n=0, stop=None)
    code, text, _ = call(*arguments)
    assert code == 0 and "4 slices, 2 of them kept from an earlier run" in text
    assert counted["n"] == 2
    volume = tifffile.imread(out / "volume.tiff")
    assert (volume[1] == 7).all() and not (volume[2] == 7).any()
    assert json.loads((out / "report.json").read_text())["resumed_slices"] == 2


def test_half_written_or_broken_slices_are_done_again(scan, tmp_path, call, counted):
    out = tmp_path / "out"
    arguments = ("reconstruct", scan, "--method", "fbp", "--out", out)
    assert call(*arguments)[0] == 0
    (out / "slices" / "slice_0000.json").unlink()
    (out / "slices" / "slice_0002.npy").write_bytes(b"\x93NUMPY")
    counted["n"] = 0
    assert call(*arguments)[0] == 0
    assert counted["n"] == 2


def test_other_settings_or_data_are_refused_unless_forced(scan, tmp_path, call, counted):
    out = tmp_path / "out"
    assert call("reconstruct", scan, "--method", "fbp", "--out", out)[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    other = ("reconstruct", scan, "--method", "cgls", "--out", out)
    code, _, errors = call(*other)
    assert code == 2
    _one_line(errors, r"holds results of other settings \(method: fbp -> cgls\); choose another folder, or --force")
    parts = write_scan(scan)
    write_scan(scan, data=parts["data"] + 1)
    code, _, errors = call("reconstruct", scan, "--method", "fbp", "--out", out)
    assert code == 2
    _one_line(errors, "other settings .data: ")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    counted["n"] = 0
    assert call(*other, "--force")[0] == 0
    assert counted["n"] == 4


def test_damaged_state(scan, tmp_path, call):
    out = tmp_path / "out"
    arguments = ("reconstruct", scan, "--method", "fbp", "--out", out)
    assert call(*arguments)[0] == 0
    (out / "state.json").write_text("{")
    code, _, errors = call(*arguments)
    assert code == 2
    _one_line(errors, "state.json is damaged")
    assert call(*arguments, "--force")[0] == 0
    (out / "state.json").unlink()
    code, _, errors = call(*arguments)
    assert code == 2
    _one_line(errors, "holds slices, volume.tiff, figure.png, report.html, report.json without a state.json")


def test_another_volume_format_needs_no_new_slices(scan, tmp_path, call, counted):
    out = tmp_path / "out"
    arguments = ("reconstruct", scan, "--method", "fbp", "--out", out)
    assert call(*arguments)[0] == 0
    (out / "slices" / ".slice_0001.ab12.part.npy").write_text("what a killed run left")
    counted["n"] = 0
    assert call(*arguments, "--format", "npy")[0] == 0
    assert counted["n"] == 0
    np.testing.assert_array_equal(np.load(out / "volume.npy"), tifffile.imread(out / "volume.tiff"))
    assert not list(out.rglob("*.part*"))


@pytest.mark.slow
def test_control_c_in_a_real_process(scan, tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "pullback.cli", "reconstruct", str(scan)),
        *("--method", "fista-tv", "--weight", "1e-3", "--maxiter", "400", "--size", "96", "--out", str(out)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (out / "slices" / "slice_0000.json").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted; " in errors and "Traceback" not in errors
    assert not list(out.glob("volume*")) and not list(out.rglob("*.part*"))


# The demo, and measured data ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo(tmp_path, call):
    code, text, errors = call("demo", "--out", tmp_path / "demo")
    print(text)
    assert (code, errors) == (0, "")
    data = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert abs(data["calibration"]["center"] - data["calibration"]["center_true"]) < 0.2
    scores = {m["name"].split(",")[0]: m["psnr"] for m in data["methods"][1:]}
    assert data["methods"][0]["psnr"] < 17 < scores["fbp"] < scores["cgls"] < scores["pdhg-tv"]
    assert scores["fista-tv"] > 32.5
    check_page(tmp_path / "demo" / "report.html", 3)
    code, _, errors = call("demo", "--out", tmp_path / "demo" / "report.json")
    assert code == 2
    _one_line(errors, "is a file; give a folder")


@pytest.mark.slow
@pytest.mark.skipif(not TOOTH.exists(), reason="the measured scan ../shared/data/tooth.h5 is not there")
def test_tooth(tmp_path, call):
    out = tmp_path / "out"
    code, text, _ = call(
        "reconstruct",
        TOOTH,
        "--method",
        "cgls",
        "--calibrate",
        "center",
        "--center",
        320,
        "--slices",
        "0:1",
        "--out",
        out,
    )
    print(text)
    assert code == 0
    data = json.loads((out / "report.json").read_text())
    assert abs(data["calibration"]["center"] - 296) < 1.5
    assert data["residuals"]["after"] < 0.02 < data["residuals"]["before"]
    volume = tifffile.imread(out / "volume.tiff")[0]
    outside = np.hypot(*np.mgrid[-319.5:320, -319.5:320]) > 250
    assert abs(volume[outside].mean()) < 0.02 * np.percentile(volume, 99)
