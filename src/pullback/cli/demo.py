"""`pullback demo`: a real CT slice, scanned by simulation with a low dose and a wrong centre, and reconstructed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.cli import figures, report
from pullback.core.errors import ArgumentError, FileFormatError
from pullback.imaging.calibrate import Calibration, calibrate
from pullback.imaging.metrics import psnr, rmse, ssim
from pullback.imaging.noise import noise_transmission
from pullback.imaging.reconstruct import reconstruct
from pullback.imaging.xray import XRayTransform
from pullback.io import replacing, write_json, write_npy, write_png, write_text

N_ANGLES = 60
N_COLUMNS = 144
PHOTONS = 2e4
OFFSET = 5.3  # detector pixels between the rotation axis and the middle of the detector
SEED = 2024
WATER = 0.02  # attenuation of water at about 70 keV [1/mm]

_METHODS = ("fbp", "cgls", "fista-tv", "pdhg-tv")


@dataclass(frozen=True)
class _Row:
    name: str
    image: Tensor
    seconds: float
    numbers: dict[str, float]


def run_demo(out: Path) -> list[str]:
    """Simulate, calibrate, reconstruct, compare; figures, report.html and report.json in `out`.

    The sinogram is made by Joseph's projector and reconstructed with the Fourier one, so the model is not exactly
    right, as in life. It is left in `out` as `sinogram.npz` for `pullback reconstruct`.

    Returns: the lines to print.
    Raises: ArgumentError if `out` is a file, FileFormatError without pydicom's sample file.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out: {out} is a file; give a folder")
    begin = time.perf_counter()
    truth, pixel = ct_slice()
    y, angles, axis = simulate(truth, pixel)
    wrong = (N_COLUMNS - 1) / 2
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "sinogram.npz") as temporary:
        np.savez(temporary, sinogram=y.numpy(), theta=np.rad2deg(angles.numpy()))

    start = time.perf_counter()
    found = calibrate(y, angles, center=wrong, parameters=("center",))
    seconds = time.perf_counter() - start

    before = _operator(truth, pixel, angles, wrong)
    after = _operator(truth, pixel, angles, found.center)
    rows = [_row(f"fbp, wrong centre {wrong:.2f}", "fbp", before, y, truth)]
    rows += [_row(f"{method}, centre {found.center:.2f}", method, after, y, truth) for method in _METHODS]
    total = time.perf_counter() - begin
    return _write(out, truth, y, axis, found, seconds, rows, total)


def ct_slice() -> tuple[Tensor, float]:
    """Attenuation [1/mm] of the CT slice that comes with pydicom, inside its inscribed disk, and the pixel's edge [mm].

    mu = 0.02 / mm (1 + HU / 1000), not below 0.

    Raises: FileFormatError if the file is not there.
    """
    from pydicom import dcmread
    from pydicom.data import get_testdata_file

    path = get_testdata_file("CT_small.dcm", download=False)
    if path is None:
        raise FileFormatError("pydicom's sample file CT_small.dcm is missing; reinstall pydicom")
    data: Any = dcmread(str(path))
    hounsfield = data.pixel_array.astype(np.float64) * float(data.RescaleSlope) + float(data.RescaleIntercept)
    mu = torch.from_numpy(WATER * np.clip(1 + hounsfield / 1000, 0, None)).float()
    n = mu.shape[0]
    grid = torch.arange(n) - (n - 1) / 2
    disk = grid[:, None] ** 2 + grid**2 <= ((n - 1) / 2) ** 2
    return mu * disk, float(data.PixelSpacing[0])


def simulate(truth: Tensor, pixel: float) -> tuple[Tensor, Tensor, float]:
    """The noisy sinogram, its angles [rad] and the true rotation axis [detector pixels]."""
    angles = torch.arange(N_ANGLES, dtype=torch.float64) * (math.pi / N_ANGLES)
    axis = (N_COLUMNS - 1) / 2 + OFFSET
    A = XRayTransform(tuple(truth.shape), angles, N_COLUMNS, det_spacing=pixel, center=axis, pixel_size=pixel)
    y = noise_transmission(A(truth), PHOTONS, torch.Generator().manual_seed(SEED))
    return y, angles, axis


def _operator(truth: Tensor, pixel: float, angles: Tensor, center: float) -> XRayTransform:
    return XRayTransform(
        tuple(truth.shape),
        angles,
        N_COLUMNS,
        det_spacing=pixel,
        center=center,
        pixel_size=pixel,
        method="fourier",
    )


def _row(name: str, method: str, A: XRayTransform, y: Tensor, truth: Tensor) -> _Row:
    start = time.perf_counter()
    result = reconstruct(A, y, method)
    seconds = time.perf_counter() - start
    numbers = {
        "psnr": float(psnr(result.image, truth)),
        "ssim": float(ssim(result.image, truth)),
        "rmse": float(rmse(result.image, truth)),
        "residual": result.residual,
        "iterations": result.iterations,
        "tv_weight": result.weight,
    }
    return _Row(name, result.image, seconds, numbers)


def _write(
    out: Path,
    truth: Tensor,
    y: Tensor,
    axis: float,
    found: Calibration,
    seconds: float,
    rows: list[_Row],
    total: float,
) -> list[str]:
    best = max(range(len(rows)), key=lambda i: rows[i].numbers["psnr"])
    names = (f"before: {rows[0].name}", f"after: {rows[best].name}")
    write_png(out / "figure.png", figures.comparison(rows[0].image.numpy(), rows[best].image.numpy(), names))
    low, high = 0.0, float(torch.quantile(truth, 0.998))
    panels = [("truth", truth.numpy())] + [
        (f"{row.name.split(',')[0]}: {row.numbers['psnr']:.1f} dB", row.image.numpy()) for row in rows[1:]
    ]
    write_png(out / "methods.png", figures.gallery(panels, low, high))
    write_png(out / "calibration.png", figures.calibration(found, y.numpy()))
    write_npy(out / "reconstruction.npy", rows[best].image.numpy())

    header = ("method", "PSNR [dB]", "SSIM", "residual", "seconds")
    table: list[list[Any]] = [
        [
            row.name,
            round(row.numbers["psnr"], 2),
            round(row.numbers["ssim"], 3),
            round(row.numbers["residual"], 4),
            round(row.seconds, 1),
        ]
        for row in rows
    ]
    write_json(
        out / "report.json",
        {
            "simulation": {"angles": N_ANGLES, "columns": N_COLUMNS, "photons": PHOTONS, "seed": SEED, "center": axis},
            "calibration": {
                "center_true": axis,
                "center_before": found.center_before,
                "center": found.center,
                "misfit_before": found.residual_before,
                "misfit": found.residual,
                "evaluations": found.evaluations,
                "seconds": seconds,
            },
            "methods": [{"name": row.name, "seconds": row.seconds, **row.numbers} for row in rows],
            "seconds": total,
            "versions": report.versions(),
        },
    )
    facts = [
        ("Rotation centre found", f"{found.center:.2f}", f"true {axis:.2f}, start {found.center_before:.2f} pixels"),
        ("Best PSNR", f"{rows[best].numbers['psnr']:.1f} dB", rows[best].name),
        ("Before", f"{rows[0].numbers['psnr']:.1f} dB", rows[0].name),
        ("Time", f"{total:.1f} s", "simulation, calibration and all methods"),
    ]
    blocks = [
        report.tiles(facts),
        report.heading("Before and after"),
        report.figure((out / "figure.png").read_bytes(), "One grey scale for both; right: their difference."),
        report.heading("Methods"),
        report.table(header, table, best),
        report.figure((out / "methods.png").read_bytes(), f"Attenuation from 0 to {high:.3g} per mm, one grey scale."),
        report.heading("Calibration"),
        report.figure((out / "calibration.png").read_bytes(), _CAPTION),
        report.heading("What was simulated"),
        report.paragraph(_STORY.format(angles=N_ANGLES, photons=PHOTONS, offset=OFFSET)),
    ]
    lead = f"{N_ANGLES} views, {PHOTONS:.0f} photons a ray, rotation axis {OFFSET} pixels off"
    write_text(out / "report.html", report.page("A low-dose CT slice with a wrong rotation centre", lead, blocks))
    return _lines(header, table, found, axis, total, out)


def _lines(
    header: tuple[str, ...], table: list[list[Any]], found: Calibration, axis: float, total: float, out: Path
) -> list[str]:
    text = [list(header)] + [[str(value) for value in row] for row in table]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    lines = [f"rotation centre: start {found.center_before:.2f}, found {found.center:.2f}, true {axis:.2f}"]
    for row in text:
        lines.append(
            row[0].ljust(widths[0]) + "".join(v.rjust(w + 2) for v, w in zip(row[1:], widths[1:], strict=True))
        )
    return [*lines, f"{total:.1f} s; wrote {out / 'report.html'}"]


_CAPTION = (
    "The centre is found from the sinogram alone, by the gradient of min_u |A(centre) u - y|^2 through the X-ray "
    "transform: first on coarsely binned data, then on all."
)
_STORY = (
    "A CT slice of a patient (CT_small.dcm of pydicom), turned into attenuation and cut to its inscribed disk, is "
    "projected along parallel rays from {angles} directions by Joseph's method. Poisson noise is that of {photons:.0f} "
    "photons a ray. The rotation axis lies {offset} detector pixels beside the middle, which the reconstruction is "
    "not told. All methods use the Fourier-slice projector, so simulation and reconstruction differ as model and "
    "measurement do."
)
