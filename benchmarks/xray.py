"""X-ray transform, 512 x 512 pixels, 180 views, 725 detector pixels, float32: time and memory beside ASTRA's CPU code.

    python benchmarks/xray.py [--size 512] [--repeats 9] [--astra-path DIRECTORY]

Every repeat runs each candidate once, in turn, so that a disturbance of the machine meets all. CPU ms is the process's
CPU time (all threads), the comparable number on a shared machine. ASTRA's CPU projector uses one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pullback.imaging.xray import XRayTransform

_DISCS = ((0.0, 0.0, 0.45, 1.0), (0.15, -0.1, 0.12, 0.5), (-0.2, 0.15, 0.07, -0.8), (0.05, 0.25, 0.02, 2.0))


def astra_pair(n: int, angles: np.ndarray, n_k: int) -> dict[str, Callable[[], Any]]:
    """ASTRA's `linear` projector, forward and adjoint, on data that it holds already."""
    try:
        import astra
    except ImportError:
        print("astra-toolbox is not installed: pip install astra-toolbox\n")
        return {}
    volume = astra.create_vol_geom(n, n)
    detector = astra.create_proj_geom("parallel", 1.0, n_k, angles)
    projector = astra.create_projector("linear", detector, volume)
    rng = np.random.default_rng(0)
    image = astra.data2d.create("-vol", volume, rng.standard_normal((n, n)).astype(np.float32))
    sinogram = astra.data2d.create("-sino", detector, rng.standard_normal((len(angles), n_k)).astype(np.float32))
    image_out, sinogram_out = astra.data2d.create("-vol", volume), astra.data2d.create("-sino", detector)
    pair: dict[str, Callable[[], Any]] = {}
    for name, kind, options in (
        ("forward", "FP", {"VolumeDataId": image, "ProjectionDataId": sinogram_out}),
        ("adjoint", "BP", {"ReconstructionDataId": image_out, "ProjectionDataId": sinogram}),
    ):
        config = astra.astra_dict(kind)
        config |= {"ProjectorId": projector, **options}
        algorithm = astra.algorithm.create(config)
        pair[name] = lambda algorithm=algorithm: astra.algorithm.run(algorithm)
    return pair


def compare(n: int, angles: np.ndarray, n_k: int) -> None:
    """Relative difference of every projector from ASTRA's `strip` (area-weighted) on discs and on white noise."""
    try:
        import astra
    except ImportError:
        return
    g = np.arange(n) - (n - 1) / 2
    discs = sum((np.hypot(g - n * x, g[:, None] - n * y) < n * r) * v for x, y, r, v in _DISCS)
    images = {"discs": discs.astype(np.float32), "noise": np.random.default_rng(0).standard_normal((n, n))}
    volume = astra.create_vol_geom(n, n)
    detector = astra.create_proj_geom("parallel", 1.0, n_k, angles)
    print(f"\n{'difference from astra strip':28} {'discs':>9} {'noise':>9}")
    rows: dict[str, list[float]] = {}
    for image in images.values():
        # ASTRA's first row lies at the largest y, ours at the smallest
        strip, *others = (
            astra.create_sino(np.flipud(image).astype(np.float32), astra.create_projector(kind, detector, volume))[1]
            for kind in ("strip", "linear", "line")
        )
        found = dict(zip(("astra linear", "astra line"), others, strict=True))
        for method in ("joseph", "fourier"):
            A = XRayTransform((n, n), angles, n_k, method=method)
            found[method] = A(torch.as_tensor(image, dtype=torch.float32)).numpy()
        for name, sinogram in found.items():
            rows.setdefault(name, []).append(float(np.linalg.norm(sinogram - strip) / np.linalg.norm(strip)))
    for name, errors in rows.items():
        print(f"{name:28} {errors[0]:9.1e} {errors[1]:9.1e}")


def peak_extra(run: Callable[[], Any]) -> float:
    """Peak resident memory of one call above what was there before [MB]; nan where the system does not tell."""
    try:
        status = Path("/proc/self/status")
        read = lambda key: next(int(s.split()[1]) for s in status.read_text().splitlines() if s.startswith(key))  # noqa: E731
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps from earlier calls would hide the need of this one
        Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
        result = run()
        peak = (read("VmHWM") - before) / 1024
        del result
        return peak
    except (OSError, AttributeError):
        return math.nan


def measure(
    candidates: dict[Any, tuple[int, Callable[[], Any]]], repeats: int
) -> dict[Any, tuple[list[float], list[float]]]:
    """CPU and wall times [ms] of each candidate (number of threads, function), alternating."""
    for threads, run in candidates.values():
        torch.set_num_threads(threads)
        run()
        run()
    times: dict[Any, tuple[list[float], list[float]]] = {key: ([], []) for key in candidates}
    for _ in range(repeats):
        for key, (threads, run) in candidates.items():
            torch.set_num_threads(threads)
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[key][1].append((time.perf_counter() - wall) * 1e3)
            times[key][0].append((time.process_time() - cpu) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--views", type=int, default=180)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--astra-path", help="site-packages directory of another environment that holds astra-toolbox")
    args = parser.parse_args()
    if args.astra_path:
        sys.path.append(args.astra_path)
    n, n_k = args.size, math.ceil(args.size * math.sqrt(2))
    angles = np.linspace(0, math.pi, args.views, endpoint=False)
    print(f"{n} x {n} pixels, {args.views} views, {n_k} detector pixels, float32; {args.repeats} alternating repeats")
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}\n")

    torch.manual_seed(0)
    candidates: dict[Any, tuple[int, Callable[[], Any]]] = {}
    memory: dict[Any, float] = {}
    for name, run in astra_pair(n, angles, n_k).items():
        candidates["astra linear", 1, name, 1] = (1, run)
    batch = 32
    for method in ("joseph", "fourier"):
        start = time.perf_counter()
        A = XRayTransform((n, n), angles, n_k, method=method)
        for size in (1, batch):
            x, y = torch.randn(size, *A.dims), torch.randn(size, *A.dimsd)
            for threads in (1, 2):
                candidates[method, size, "forward", threads] = (threads, lambda A=A, x=x: A(x))
                candidates[method, size, "adjoint", threads] = (threads, lambda A=A, y=y: A.H(y))
            for name in ("forward", "adjoint"):
                run = candidates[method, size, name, 1][1]
                first = time.perf_counter()
                run()
                if size == 1 and name == "forward":
                    print(
                        f"{method}: construction {first - start:.2f} s, first call {time.perf_counter() - first:.2f} s"
                    )
                memory[method, size, name] = peak_extra(run)
        theta = torch.tensor(angles, requires_grad=True)
        B = XRayTransform((n, n), theta, n_k, method=method)
        image = torch.randn(n, n, requires_grad=True)
        for threads in (1, 2):
            candidates[method, 1, "forward + all gradients", threads] = (
                threads,
                lambda B=B, theta=theta, image=image: torch.autograd.grad(B(image).square().sum(), (image, theta)),
            )
    times = measure(candidates, args.repeats)

    columns = f"{'operator':13} {'batch':>5} {'what':24} {'threads':>7} {'CPU ms min':>11} {'median':>8}"
    print(f"\n{columns} {'wall ms min':>12} {'median':>8} {'CPU ratio':>10} {'wall ratio':>10} {'extra MB':>9}")
    print("-" * 124)
    for key, (cpu, wall) in times.items():
        name, size, what, threads = key
        line = f"{name:13} {size:5} {what:24} {threads:7} {min(cpu):11.1f} {statistics.median(cpu):8.1f}"
        line += f" {min(wall):12.1f} {statistics.median(wall):8.1f}"
        reference = times.get(("astra linear", 1, what, 1))
        if reference is not None:
            line += f" {size * min(reference[0]) / min(cpu):9.1f}x {size * min(reference[1]) / min(wall):9.1f}x"
        extra = memory.get(key[:3])
        print(line + (f" {extra:9.0f}" if extra is not None else ""))
    print("\nratio: time of astra linear for as many images / ours. extra MB: peak above the input, output included.")
    compare(n, angles, n_k)


if __name__ == "__main__":
    main()
