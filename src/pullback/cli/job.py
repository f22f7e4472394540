"""`pullback reconstruct`: from a file of sinograms to a volume and a report."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pullback.cli import figures, report
from pullback.cli.store import Store
from pullback.core.errors import ArgumentError, FileFormatError
from pullback.imaging.calibrate import PARAMETERS, Calibration, calibrate
from pullback.imaging.fbp import fbp
from pullback.imaging.reconstruct import METHODS, check_method, reconstruct, relative_residual, tv_weight
from pullback.imaging.xray import XRayTransform
from pullback.io import SinogramFile, open_sinogram, parse_angles, write_json, write_png, write_text, write_volume

PROJECTORS = ("joseph", "fourier")
FORMATS = ("tiff", "npy")

_ENOUGH = 160  # degrees of views that a calibration needs
_CALIBRATION_SLICES = 3  # evenly spaced; more would cost more than they add


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see `pullback reconstruct --help`. Angles in degrees, lengths in the user's unit."""

    file: str
    method: str = "fista-tv"
    calibrate: tuple[str, ...] = ()
    slices: str = ""
    angles: str = ""
    center: float | None = None
    det_spacing: float = 1.0
    pixel_size: float | None = None
    size: int | None = None
    maxiter: int | None = None
    weight: float | None = None
    filter: str = "ramp"
    projector: str = "fourier"
    format: str = "tiff"

    def check(self) -> None:
        """Raise ArgumentError for a value that cannot be used, before any file is opened."""
        check_method(self.method, self.weight, self.maxiter, self.filter)
        for name, value, known in (("projector", self.projector, PROJECTORS), ("format", self.format, FORMATS)):
            if value not in known:
                raise ArgumentError(f"--{name} must be one of {', '.join(known)}; got {value!r}")
        for part in self.calibrate:
            if part not in PARAMETERS:
                raise ArgumentError(f"--calibrate takes {', '.join(PARAMETERS)} or both; got {part!r}")
        for name, length in (("det-spacing", self.det_spacing), ("pixel-size", self.pixel_size)):
            if length is not None and not (length > 0 and math.isfinite(length)):
                raise ArgumentError(f"--{name} must be a length > 0; got {length:g}")
        if self.size is not None and self.size < 2:
            raise ArgumentError(f"--size must be at least 2 pixels; got {self.size}")
        if self.center is not None and not math.isfinite(self.center):
            raise ArgumentError(f"--center must be a number [detector pixels]; got {self.center}")


def run_job(settings: Settings, out: Path, force: bool = False) -> list[str]:
    """Do the job, or the rest of it, and return the lines to print.

    The input is checked completely before `out` is touched. Finished slices, the calibration and the weight are kept in
    `out` as they come, and taken up by the next run with the same settings, data and version.

    Raises: ArgumentError, FileFormatError; KeyboardInterrupt after saying how to resume.
    """
    settings.check()
    name = check_method(settings.method, settings.weight, settings.maxiter, settings.filter)
    settings = replace(settings, method=name)
    angles = parse_angles(settings.angles) if settings.angles else None
    source = open_sinogram(settings.file, angles)
    try:
        job = _Job(settings, source, Store(out))
        return job.run(force)
    finally:
        source.close()


class _Job:
    def __init__(self, settings: Settings, source: SinogramFile, store: Store) -> None:
        self.settings, self.source, self.store = settings, source, store
        self.indices = parse_slices(settings.slices, source.n_slices)
        n = source.n_columns
        self.pixel_size = settings.det_spacing if settings.pixel_size is None else settings.pixel_size
        self.size = settings.size or max(2, math.ceil(n * settings.det_spacing / self.pixel_size - 1e-9))
        self.center = (n - 1) / 2 if settings.center is None else settings.center
        if not -0.5 * n <= self.center <= 1.5 * n:
            raise ArgumentError(f"--center must lie near the detector of {n} pixels; got {self.center:g}")
        self.angles = torch.deg2rad(torch.from_numpy(source.angles))
        covered = _coverage(source.angles)
        if settings.calibrate and covered < _ENOUGH:
            source.notes.append(f"the views cover {covered:.0f} of 180 degrees: do not rely on the calibration")

    def run(self, force: bool) -> list[str]:
        begin = time.perf_counter()
        identity = self._identity(self._check_data())
        found = self.store.prepare(identity, force)
        try:
            if "weight" not in found:
                found = self._prepare_geometry()
                self.store.keep(identity, found)
            result = _calibration_from(found["calibration"])
            resumed, numbers = self._reconstruct_all(self._operator(result), found["weight"])
        except KeyboardInterrupt:
            done = sum(self.store.finished(i, (self.size, self.size)) is not None for i in self.indices)
            print(
                f"pullback: interrupted; {done} of {len(self.indices)} slices are kept in {self.store.folder}; "
                f"the same command resumes",
                file=sys.stderr,
            )
            raise
        return self._write_results(result, found, numbers, resumed, time.perf_counter() - begin)

    # Input ---------------------------------------------------------------------------------------------------------

    def _check_data(self) -> str:
        """Read every chosen slice once, which raises on bad data, and return a hash of what was read."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.source.angles).tobytes(), digest_size=16)
        energy = 0.0
        for i in progress(self.indices, "check data"):
            y = np.ascontiguousarray(self.source.read(i))
            digest.update(y.tobytes())
            energy += float(np.abs(y).sum())
        if energy == 0:
            raise FileFormatError(f"{self.source.path}: the sinograms are zero everywhere; there is nothing to see")
        return digest.hexdigest()

    def _identity(self, digest: str) -> dict[str, Any]:
        identity = {**asdict(self.settings), "data": digest, "version": version("pullback")}
        del identity["format"]  # of the volume only: the slices serve for any
        identity["file"] = Path(self.settings.file).name
        identity["calibrate"] = ",".join(self.settings.calibrate)
        return identity

    def _sinogram(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.source.read(index))

    def _operator(self, result: Calibration | None) -> XRayTransform:
        return XRayTransform(
            (self.size, self.size),
            self.angles if result is None else result.angles,
            self.source.n_columns,
            det_spacing=self.settings.det_spacing,
            center=self.center if result is None else result.center,
            pixel_size=self.pixel_size,
            method=self.settings.projector,
        )

    # Work ----------------------------------------------------------------------------------------------------------

    def _prepare_geometry(self) -> dict[str, Any]:
        """Calibrate on a few slices, and find the weight of the total variation on the middle one."""
        begin = time.perf_counter()
        result = None
        chosen: list[int] = []
        if self.settings.calibrate:
            count = min(_CALIBRATION_SLICES, len(self.indices))
            chosen = [self.indices[round((k + 0.5) * len(self.indices) / count - 0.5)] for k in range(count)]
            y = torch.stack([self._sinogram(i) for i in chosen])
            with _bar(None, "calibrate", "evaluation") as bar:

                def show(entry: dict[str, Any]) -> None:
                    bar.set_postfix_str(f"centre {entry['center']:.2f}", refresh=False)
                    bar.update()

                result = calibrate(
                    y, self.angles, center=self.center, parameters=self.settings.calibrate, callback=show
                )
        weight = self.settings.weight
        if weight is None and METHODS[self.settings.method].is_tv:
            weight = tv_weight(self._operator(result), self._sinogram(self._middle))
        return {
            "calibration": None if result is None else _calibration_to(result),
            "calibration_slices": chosen,
            "weight": weight,
            "seconds": time.perf_counter() - begin,
        }

    @property
    def _middle(self) -> int:
        return self.indices[len(self.indices) // 2]

    def _reconstruct_all(self, A: XRayTransform, weight: float | None) -> tuple[int, list[dict[str, Any]]]:
        """Do the slices that are not finished; how many were, and the numbers of all."""
        known = {i: self.store.finished(i, (self.size, self.size)) for i in self.indices}
        resumed = sum(numbers is not None for numbers in known.values())
        with _bar(len(self.indices), self.settings.method, "slice", resumed) as bar:
            for i in self.indices:
                if known[i] is not None:
                    continue
                begin = time.perf_counter()
                s = self.settings
                result = reconstruct(
                    A, self._sinogram(i), s.method, weight=weight, maxiter=s.maxiter, filter=s.filter, progress=True
                )
                numbers = {
                    "slice": i,
                    "residual": result.residual,
                    "iterations": result.iterations,
                    "status": result.status,
                    "seconds": time.perf_counter() - begin,
                }
                self.store.finish(i, result.image.numpy(), numbers)
                known[i] = numbers
                bar.set_postfix_str(f"residual {result.residual:.4f}", refresh=False)
                bar.update()
        return resumed, [n for n in known.values() if n is not None]

    # Results -------------------------------------------------------------------------------------------------------

    def _write_results(
        self,
        result: Calibration | None,
        found: dict[str, Any],
        numbers: list[dict[str, Any]],
        resumed: int,
        seconds: float,
    ) -> list[str]:
        folder, s = self.store.folder, self.settings
        volume = folder / f"volume.{s.format}"
        shape = (len(self.indices), self.size, self.size)
        write_volume(volume, (self.store.load(i) for i in self.indices), shape, s.format)

        middle = self._middle
        y = self._sinogram(middle)
        start = self._operator(None)
        before = fbp(start, y, s.filter)
        residual_before = relative_residual(start, before, y)
        residual = next(n["residual"] for n in numbers if n["slice"] == middle)
        axis = "start" if result is not None else "as given"
        names = (f"before: fbp, centre {self.center:.2f} ({axis})", f"after: {s.method}, slice {middle}")
        write_png(folder / "figure.png", figures.comparison(before.numpy(), self.store.load(middle), names))
        if result is not None:
            write_png(folder / "calibration.png", figures.calibration(result, y.numpy()))

        total = found["seconds"] + sum(n["seconds"] for n in numbers)
        data = {
            "settings": asdict(s),
            "geometry": {
                "angles": len(self.angles),
                "columns": self.source.n_columns,
                "center": self.center if result is None else result.center,
                "pixel_size": self.pixel_size,
                "size": self.size,
                "tv_weight": found["weight"],
            },
            "calibration": _summary(result, found["calibration_slices"]),
            "residuals": {"slice": middle, "before": residual_before, "after": residual},
            "slices": numbers,
            "resumed_slices": resumed,
            "notes": self.source.notes,
            "seconds": {"calibration": found["seconds"], "all_slices": total - found["seconds"], "this_run": seconds},
            "versions": report.versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(folder / "report.json", data)
        write_text(folder / "report.html", self._page(data, folder))
        lines = []
        if result is not None:
            lines.append(
                f"centre {result.center_before:.2f} -> {result.center:.2f} detector pixels, angles changed by "
                f"{math.degrees(result.angle_change):.3g} degrees rms, "
                f"misfit {result.residual_before:.4f} -> {result.residual:.4f}"
            )
        kept = f", {resumed} of them kept from an earlier run" if resumed else ""
        lines.append(f"{len(numbers)} slices{kept}; residual of slice {middle}: {residual:.4f}; {seconds:.1f} s")
        lines.extend(f"note: {note}" for note in self.source.notes)
        lines.append(f"wrote {volume}, {folder / 'report.html'}")
        return lines

    def _page(self, data: dict[str, Any], folder: Path) -> str:
        s, geometry, moved = self.settings, data["geometry"], data["calibration"]
        residuals, seconds = data["residuals"], data["seconds"]
        facts = [
            ("Volume", f"{len(self.indices)} × {self.size} × {self.size}", f"{s.format}, float32"),
            ("Residual |Au − y| / |y|", f"{residuals['after']:.4f}", f"fbp before: {residuals['before']:.4f}"),
        ]
        if moved is not None:
            facts.append(("Rotation centre", f"{moved['center']:.2f}", f"start: {moved['center_before']:.2f} pixels"))
            if "angles" in s.calibrate:
                facts.append(("Angle corrections", f"{moved['angle_change_deg']:.3g}°", "root mean square"))
        facts.append(("Time", f"{seconds['calibration'] + seconds['all_slices']:.1f} s", "computing, over all runs"))
        blocks = [report.tiles(facts)]
        blocks += [report.paragraph("Note: " + note) for note in data["notes"]]
        blocks += [
            report.heading("Before and after"),
            report.figure(
                (folder / "figure.png").read_bytes(),
                f"Slice {residuals['slice']}. Left: filtered back-projection with the geometry as given. "
                f"Middle: {s.method} with the geometry used. Both in one grey scale. Right: their difference.",
            ),
        ]
        if moved is not None:
            blocks += [
                report.heading("Calibration"),
                report.figure((folder / "calibration.png").read_bytes(), _CALIBRATION_CAPTION),
                report.table(("", "before", "after"), _calibration_rows(moved)),
            ]
        blocks += [
            report.heading("Slices"),
            report.table(
                ("slice", "residual", "iterations", "seconds", "status"),
                [[n[k] for k in ("slice", "residual", "iterations", "seconds", "status")] for n in data["slices"]],
            ),
            report.heading("Geometry"),
            report.settings_table(geometry),
            report.heading("Settings"),
            report.settings_table(data["settings"]),
        ]
        lead = f"{s.method}, {geometry['angles']} angles, {geometry['columns']} detector columns; {data['finished']}"
        return report.page(f"Reconstruction of {Path(s.file).name}", lead, blocks)


_CALIBRATION_CAPTION = (
    "Found from the data alone, by the gradient of min_u |A(centre, angles) u - y|^2 through the X-ray transform. "
    "The mean angle correction is fixed at zero, because a turned image fits turned angles."
)


def parse_slices(text: str, count: int) -> list[int]:
    """Slices from `a:b`, `a:b:step` or one index; all if empty. Negative numbers count from the end, as in Python.

    Raises: ArgumentError if the text is malformed or no slice is chosen.
    """
    try:
        if not text:
            chosen = range(count)
        elif ":" in text:
            parts = [int(part) if part.strip() else None for part in text.split(":")]
            if len(parts) > 3:
                raise ValueError
            chosen = range(count)[slice(*parts)]
        else:
            chosen = range(count)[int(text) :][:1]
            if not -count <= int(text) < count:
                raise ArgumentError(f"--slices: slice {int(text)} does not exist; the file has {count}")
    except ArgumentError:
        raise
    except ValueError:
        raise ArgumentError(f"--slices: expected a:b, a:b:step or one index; got {text!r}") from None
    if not len(chosen):
        raise ArgumentError(f"--slices: {text} chooses none of the {count} slices")
    return list(chosen)


def progress(items: Sequence[int], name: str) -> Iterator[int]:
    """The items, with a progress bar on stderr if that is a terminal."""
    with _bar(len(items), name, "slice") as bar:
        for item in items:
            yield item
            bar.update()


def _bar(total: int | None, name: str, unit: str, initial: int = 0) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit=unit, initial=initial, disable=None, file=sys.stderr, dynamic_ncols=True)


def _coverage(angles: np.ndarray) -> float:
    """180 minus the largest gap between views modulo 180, plus one mean step [deg]."""
    views = np.sort(np.mod(angles, 180.0))
    gaps = np.diff(views, append=views[0] + 180)
    return float(min(180.0, 180 - gaps.max() + np.median(gaps)))


def _summary(result: Calibration | None, slices: Sequence[int]) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "center_before": result.center_before,
        "center": result.center,
        "angle_change_deg": math.degrees(result.angle_change),
        "angles_deg": np.rad2deg(result.angles.numpy()),
        "misfit_before": result.residual_before,
        "misfit": result.residual,
        "binning": result.binning,
        "evaluations": result.evaluations,
        "slices": list(slices),
    }


def _calibration_rows(moved: dict[str, Any]) -> list[list[Any]]:
    binned = f" (binned by {moved['binning']})" if moved["binning"] > 1 else ""
    return [
        ["rotation centre [detector pixels]", moved["center_before"], moved["center"]],
        ["angle corrections, rms [deg]", 0.0, moved["angle_change_deg"]],
        [f"misfit of the best image{binned}", moved["misfit_before"], moved["misfit"]],
    ]


def _calibration_to(result: Calibration) -> dict[str, Any]:
    values = dict(vars(result))
    values["angles"], values["angles_before"] = result.angles.tolist(), result.angles_before.tolist()
    return values


def _calibration_from(values: dict[str, Any] | None) -> Calibration | None:
    if values is None:
        return None
    tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in ("angles", "angles_before")}
    return Calibration(**{**values, **tensors})
