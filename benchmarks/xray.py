"""X-ray transform, 512 x 512 pixels, 180 views, 725 detector pixels, float32: time and memory beside ASTRA's CPU code.

    python benchmarks/xray.py [--size 512] [--repeats 9] [--astra-path DIRECTORY]
    python benchmarks/xray.py --device cuda [--size 2048] [--views 1800] [--clock 1.98] [--bandwidth 4.8]

On a GPU: times by events beside the limit of the processor, which is counted (see `limits`); no ASTRA.

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


def limits(n: int, angles: np.ndarray, n_k: int, batch: int, clock: float, bandwidth: float) -> dict[str, list[float]]:
    """Seconds that a pass takes at least: (arithmetic, loads from the level-1 cache, memory) for both directions.

    Samples: a ray of angle theta has n columns to cross in each of n rows and steps 1/p columns a ray, p = max(|cos|,
    |sin|), so n^2 p of them meet the image. Instructions of 32 lanes, four a clock of a multiprocessor:

    forward, a sample: position, weight (1 each), interpolation (2), sum (1); two numbers are loaded.
    adjoint, a pixel and view: position, first ray, distance to it (3), then for two rays distance, 1 - |t|, maximum
    with 0, product with the sum (4 each); two numbers are loaded.

    A multiprocessor loads 128 bytes a clock. The memory moves the image and the sinogram once. Neither texture units
    nor tensor cores are counted on.
    """
    n_sm = torch.cuda.get_device_properties(0).multi_processor_count
    samples = batch * n * n * float(np.maximum(np.abs(np.cos(angles)), np.abs(np.sin(angles))).sum())
    pixels = batch * n * n * len(angles)
    memory = 4 * batch * (n * n + len(angles) * n_k) / (bandwidth * 1e12)
    per_second = n_sm * clock * 1e9
    return {
        "forward": [5 * samples / (128 * per_second), 8 * samples / (128 * per_second), memory],
        "adjoint": [11 * pixels / (128 * per_second), 8 * pixels / (128 * per_second), memory],
    }


def on_gpu(n: int, angles: np.ndarray, n_k: int, repeats: int, clock: float, bandwidth: float) -> None:
    """Both directions in float32, and all gradients, beside their limits; the dot test."""
    print(f"{torch.cuda.get_device_name()}, limits at {clock} GHz and {bandwidth} TB/s; ms, median of {repeats}\n")
    header = f"{'batch':>5} {'what':24} {'ms':>9} {'of limit':>9} {'arithmetic':>11} {'cache':>8} {'memory':>8}"
    header += f" {'extra MB':>9}"
    print(f"{header}\n{'-' * len(header)}")
    A = XRayTransform((n, n), torch.as_tensor(angles, device="cuda"), n_k)
    theta = torch.as_tensor(angles, device="cuda").requires_grad_()
    B = XRayTransform((n, n), theta, n_k)
    for batch in (1, 8):
        x = torch.randn(batch, n, n, device="cuda", requires_grad=True)
        image, y = x.detach(), torch.randn(batch, *A.dimsd, device="cuda")
        candidates: dict[str, Callable[[], Any]] = {
            "forward": lambda image=image: A(image),
            "adjoint": lambda y=y: A.H(y),
            "forward + all gradients": lambda x=x: torch.autograd.grad(B(x).square().sum(), (x, theta)),
        }
        bounds = limits(n, angles, n_k, batch, clock, bandwidth)
        for name, run in candidates.items():
            run()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(repeats):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                stop.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(stop))
            extra = (torch.cuda.max_memory_allocated() - before) / 1e6
            line = f"{batch:5} {name:24} {statistics.median(times):9.3f}"
            if name in bounds:
                least = [1e3 * t for t in bounds[name]]
                line += (
                    f" {max(least) / statistics.median(times):9.1%} {least[0]:11.3f} {least[1]:8.3f} {least[2]:8.3f}"
                )
            else:
                line += " " * 40
            print(f"{line} {extra:9.0f}")
        Ax, Ay = A(image).double(), A.H(y).double()
        error = abs(float((Ax * y).sum() - (Ay * image).sum())) / float(Ax.norm() * y.double().norm())
        print(f"{batch:5} dot test {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, help="512, on a GPU 2048")
    parser.add_argument("--views", type=int, help="180, on a GPU 1800")
    parser.add_argument("--clock", type=float, default=1.98, help="of the GPU's multiprocessors [GHz]")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the GPU's memory [TB/s]")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--astra-path", help="site-packages directory of another environment that holds astra-toolbox")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.size, args.views = args.size or (2048 if cuda else 512), args.views or (1800 if cuda else 180)
    if args.astra_path:
        sys.path.append(args.astra_path)
    n, n_k = args.size, math.ceil(args.size * math.sqrt(2))
    angles = np.linspace(0, math.pi, args.views, endpoint=False)
    print(f"{n} x {n} pixels, {args.views} views, {n_k} detector pixels, float32; {args.repeats} alternating repeats")
    if cuda:
        on_gpu(n, angles, n_k, args.repeats, args.clock, args.bandwidth)
        return
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
