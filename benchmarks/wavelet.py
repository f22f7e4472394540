"""Wavelet transforms beside PyLops: two-dimensional, three levels, forward and adjoint of W.

    python benchmarks/wavelet.py [--threads 1] [--quick]

Both in one process, alternating; values are compared before anything is timed. Every row prints the minimum and the
median of forward + adjoint of both sides, the ratio of the minima, and the time of a copy of the image in units of
which the transform takes so long: 4 is the least for forward + adjoint, which read and write everything once. With
`--torch` numba is left out. Needs PyLops 2.8 and PyWavelets: `pip install pullback[bench] PyWavelets`.
"""

# ruff: noqa: E402  (the number of threads must be set before NumPy and torch are imported)

from __future__ import annotations

import argparse
import os
import sys

_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
_parser.add_argument("--threads", type=int, default=1)
_parser.add_argument("--quick", action="store_true", help="small sizes and few repeats, for a look")
_parser.add_argument("--torch", action="store_true", help="the torch code, as where numba is not installed")
_arguments = _parser.parse_args() if __name__ == "__main__" else _parser.parse_args([])
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = str(_arguments.threads)

import math
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import pylops
import torch

from pullback.linops import _wavelet_apply
from pullback.linops.wavelet import DWT2D

BARS = {("haar", 2048): 4.0, ("db4", 2048): 2.0}


def alternate(calls: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return times


def row(n: int, wavelet: str, dtype: torch.dtype, repeats: int) -> str:
    name = f"{wavelet} {n}^2 {str(dtype).removeprefix('torch.')}"
    ours = DWT2D((n, n), wavelet=wavelet, level=3)
    theirs = pylops.signalprocessing.DWT2D((n, n), wavelet=wavelet, level=3, dtype=str(dtype).removeprefix("torch."))
    x = torch.randn(n, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y, flat = ours(x), x.numpy().ravel()
    other = theirs.matvec(flat)
    error = max(
        float(np.abs(y.numpy().ravel() - other).max()),
        float(np.abs(ours.H(y).numpy().ravel() - theirs.rmatvec(other)).max()),
    )
    if not error <= (1e-4 if dtype == torch.float32 else 1e-9):
        return f"{name:22} not timed: values differ by {error:.1e}"
    target = torch.empty_like(x)
    both = (lambda: ours.H(ours(x)), lambda: theirs.rmatvec(theirs.matvec(flat)), lambda: target.copy_(x))
    first, second, copy = alternate(list(both), repeats)
    low, high = min(first), min(second)
    bar = BARS.get((wavelet, n))
    judged = "" if bar is None else f"{bar:g}x {'met' if high / low >= bar else 'NOT MET'}"
    columns = "".join(f"{v * 1e3:10.2f}" for t in (first, second) for v in (min(t), statistics.median(t)))
    return f"{name:22}{columns} {high / low:8.1f}x {judged:10}{low / min(copy):8.1f} copies"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(_arguments.threads)
    if _arguments.torch:
        _wavelet_apply._NATIVE = math.inf
    print(f"DWT2D, 3 levels, beside PyLops {pylops.__version__}, {sys.platform}, {_arguments.threads} threads [ms]")
    print(f"{'':22}{'ours min':>10}{'median':>10}{'pylops':>10}{'median':>10} {'ratio':>9}")
    for n in (64, 256) if _arguments.quick else (64, 256, 512, 1024, 2048):
        for wavelet in ("haar", "db4", "bior4.4"):
            for dtype in (torch.float32, torch.float64):
                print(row(n, wavelet, dtype, 3 if _arguments.quick else (9 if n > 600 else 40)), flush=True)


if __name__ == "__main__":
    main()
