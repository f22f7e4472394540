"""Kernel reductions beside KeOps: one table of the speeds that this library holds itself to.

    python benchmarks/kernels.py [--only NAME] [--repeats 9] [--no-peer]
    python benchmarks/kernels.py --device cuda      another table, see `kernels_device.py`

On the CPU: float32, two threads, both libraries at their defaults, on the same data, alternating in one process; values
are compared before anything is timed. A row prints minimum and median of both sides, the ratio of the minima beside its
bar, Gpairs/s, and the share of the machine's measured multiply-adds that the row's `ops` are (vector instructions a
pair, counted in `kernels_cases.py`; additions may run beside multiply-adds, so a share is a guide, not a bound). Where
KeOps takes seconds it does fewer rows (column "rows") and its time is scaled: its rows are independent.

Compiling is excluded, except in "first result" and "second process", which start a fresh process with a cache of its
own each time. Needs pykeops 2.3 and a C++ compiler for it: `pip install pullback[bench]`.
"""

# ruff: noqa: E402  (threads and caches must be set before NumPy, torch and pykeops are imported)

from __future__ import annotations

import os

THREADS = 2
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = str(THREADS)

import argparse
import atexit
import importlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernels_device
import torch
from kernels_cases import GAUSSIAN, Call, Case, cases, gaussian_aliases, points, tutorial_data, weights
from kernels_peak import Peak

import pullback as pb

WIDTH = 36
PAUSE = 0.005  # between readings: the threads of KeOps' OpenMP spin for some milliseconds after a call
MEGABYTE = 1e6


def peer() -> Any | None:
    """pykeops.torch with an empty cache; None where it is not installed."""
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)  # after KeOps has written into it at its own exit
    os.environ |= {"PYKEOPS_VERBOSE": "0", "KEOPS_VERBOSE": "0", "KEOPS_CACHE_FOLDER": cache}
    try:
        return importlib.import_module("pykeops.torch")
    except ImportError:
        print("pykeops is not installed: pip install pykeops; its columns stay empty")
        return None


def reading(call: Call, inner: int) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - start) / inner


def difference(ours: Any, theirs: Any) -> float:
    """The largest relative difference in norm, or the share of different indices; `theirs` may have fewer rows."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else ((ours, theirs),)
    worst = 0.0
    for u, v in pairs:
        u = u[: len(v)].detach()
        if not u.is_floating_point():
            worst = max(worst, float((u != v).double().mean()))
        else:
            worst = max(worst, float((u.double() - v.double()).norm() / v.double().norm()))
    return worst


def seconds(t: float) -> str:
    """Three digits and a unit."""
    scale, unit = (1e6, "us") if t < 1e-3 else (1e3, "ms") if t < 1 else (1, "s")
    return f"{t * scale:.3g} {unit}" if t * scale < 999.5 else f"{t * scale:.0f} {unit}"


def verdict(bar: float | None, value: float, unit: str, at_most: bool = False) -> str:
    """The bar and whether `value` meets it."""
    if bar is None:
        return f"{'':>9}"
    met = value <= bar if at_most else value >= bar
    return f"{('<=' if at_most else '') + f'{bar:g}{unit}':>9} {'ok' if met else 'MISSED'}"


def measure(case: Case, library: Any | None, repeats: int, peak: Peak) -> str:
    """Compare, time and judge one case; the text of its row."""
    ours = case.make(pb, case.m)
    theirs = case.make(library, case.peer_rows or case.m) if library else None
    value = ours()
    if theirs:
        error = difference(value, theirs())
        if not error <= case.rtol:
            return f"{case.name:{WIDTH}} not timed: values differ by {error:.1e}, more than {case.rtol:.0e}"
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        peak.measure()
        times[0].append(reading(ours, case.inner))
        if theirs:
            times[1].append(reading(theirs, case.inner) * case.scale)
    low = min(times[0])
    row = f"{case.name:{WIDTH}}{seconds(low):>9}{seconds(statistics.median(times[0])):>9}"
    ratio = min(times[1]) / low if theirs else 0.0
    if theirs:
        part = str(case.peer_rows or "")
        row += f"{seconds(min(times[1])):>9}{seconds(statistics.median(times[1])):>9}{part:>6}{ratio:>8.1f}x"
    else:
        row += f"{'':>33}"
    rate = case.pairs / low
    if case.absolute:  # the median of many calls, in microseconds
        return row + verdict(case.bar, statistics.median(times[0]) * 1e6, "us", at_most=True)
    share = rate * case.ops / peak.best
    judged = verdict(case.bar, ratio, "x") if theirs else f"{'':>9}"
    return f"{row}{judged:<17}{rate / 1e9:8.2f}{case.ops:6}{share:7.0%}"


# Processes of their own ---------------------------------------------------------------------------------------------


def alone(task: str, name: str, cache: Path, *options: str) -> dict[str, float]:
    """The numbers that kernels_alone.py prints."""
    env = os.environ | {"PULLBACK_CACHE": str(cache), "KEOPS_CACHE_FOLDER": str(cache)}
    program = str(Path(__file__).with_name("kernels_alone.py"))
    done = subprocess.run([sys.executable, program, task, name, *options], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("JSON"))[4:])


def first_results(names: list[str], repeats: int) -> Iterator[str]:
    """A new formula in a fresh process: with an empty cache, then with the cache that this one left."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for k in range(repeats):
        for name in names:
            if name == "pykeops" and k >= 2:  # 11 seconds each
                continue
            with tempfile.TemporaryDirectory() as cache:
                for label in ("cold", "warm"):
                    found.setdefault((label, name), []).append(alone("first", name, Path(cache)))
    for label, title, bar in (
        ("cold", "first result + gradient, no cache", 0.15),
        ("warm", "second process, warm cache", None),
    ):
        row, lows = f"{title:{WIDTH}}", []
        for name in names:
            values = [v["both"] for v in found[label, name]]
            lows.append(min(values))
            row += f"{seconds(min(values)):>9}{seconds(statistics.median(values)):>9}"
        row += f"{'':6}{lows[1] / lows[0]:>8.1f}x" if len(lows) > 1 else f"{'':>33}"
        forward = min(v["forward"] for v in found[label, "pullback"])
        yield f"{row}{verdict(bar, lows[0], 's', at_most=True):<17} forward alone {seconds(forward)}"


def memory(names: list[str]) -> Iterator[str]:
    """Peak memory of a million points against a million."""
    with tempfile.TemporaryDirectory() as cache:
        for name in names:
            block = "20000" if name == "pullback" else "2000"
            found = alone("memory", name, Path(cache), block)
            for task in ("forward", "fwd+grad x"):
                columns, rows, time_all = (found[f"{task} {k}"] for k in ("columns", "rows", "seconds"))
                extra = (rows + columns) / MEGABYTE
                bar = 64 if name == "pullback" and task == "forward" else None
                judged = verdict(bar, extra, "MB", at_most=True)
                yield (
                    f"{f'memory M=N=1e6 D=3 {task}':{WIDTH}}{name:>9}{extra:6.1f} MB {judged:<17}"
                    f" beyond inputs and outputs: {columns / MEGABYTE:.1f} by columns + {rows / MEGABYTE:.1f} by rows; "
                    f"all pairs in {time_all:.0f} s, from {block} rows"
                )


# Accuracy -----------------------------------------------------------------------------------------------------------


def exact(kind: str, x: torch.Tensor, y: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The definition in float64, differences taken directly."""
    x, y, b = x.double(), y.double(), b.double()
    rows = []
    for part in x.split(50):
        exponent = -(part[:, None, :] - y).square().sum(-1)
        rows.append(exponent.exp() @ b if kind == "Sum" else torch.logsumexp(exponent + b[:, 0].log(), 1, keepdim=True))
    return torch.cat(rows)


def accuracy(libraries: dict[str, Any]) -> Iterator[str]:
    """The largest relative error of float32 for N = 1e4 positive weights, also with all points shifted by 1000."""
    n, rows = 10_000, 500
    for kind, dim in (("Sum", 3), ("Sum", 50), ("Sum", 200), ("LogSumExp", 3), ("LogSumExp", 50)):
        for shift in (0.0, 1000.0):
            x, y, b = points(0, rows, dim) + shift, points(1, n, dim) + shift, weights(n)
            formula = GAUSSIAN if kind == "Sum" else "Log(b)-SqDist(x,y)"
            want = exact(kind, x, y, b)
            row = f"{f'accuracy {kind} D={dim}' + (' shifted' if shift else ''):{WIDTH}}"
            for name, library in libraries.items():
                got = library.Genred(formula, gaussian_aliases(dim), reduction_op=kind, axis=1)(x, y, b)
                error = float(((got.double() - want) / want).abs().max())
                row += f"{error:9.1e}" + (
                    f"{verdict(1e-6, error, '', at_most=True):<17}" if name == "pullback" else " pykeops"
                )
            yield row
    x, y, a = tutorial_data()
    p = torch.tensor([0.3])
    d = [t.double() for t in (x, y, a)]
    want = torch.logsumexp((p.double() - d[2].T) ** 2 * (d[0] + d[1].T).exp(), 1, keepdim=True)
    row = f"{'accuracy LSE tutorial':{WIDTH}}"
    for name, library in libraries.items():
        f = library.Genred(
            "Square(p-a)*Exp(x+y)", ["x = Vi(1)", "y = Vj(1)", "a = Vj(1)", "p = Pm(1)"], "LogSumExp", axis=1
        )
        error = float((f(x, y, a, p).double() - want).norm() / want.norm())
        row += f"{error:9.1e}" + (f"{verdict(1e-6, error, '', at_most=True):<17}" if name == "pullback" else " pykeops")
    yield row + "  (norm)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=9, help="readings of each side")
    parser.add_argument("--no-peer", action="store_true", help="time pullback alone")
    parser.add_argument("--device", default="", help="the table of this device, such as cuda")
    parser.add_argument("--sizes", default="", help="numbers of points there, such as 10000,100000")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    if arguments.device:
        sizes = tuple(int(float(n)) for n in arguments.sizes.split(",") if n) or kernels_device.SIZES
        library = peer() if torch.device(arguments.device).type == "cuda" and not arguments.no_peer else None
        kernels_device.main(arguments.device, sizes, arguments.only, library, not arguments.no_peer)
        return

    def wanted(name: str) -> bool:
        return arguments.only.lower() in name.lower()

    library = None if arguments.no_peer else peer()
    names = ["pullback"] + (["pykeops"] if library else [])
    peak = Peak(THREADS)
    for _ in range(20):
        peak.measure()
    print(f"pullback {pb.__version__}, torch {torch.__version__}, {platform.machine()}, {THREADS} threads, float32")
    print(f"multiply-adds: {peak.best / 1e9:.0f} G/s in {peak.lanes} lanes ({2 * peak.best / 1e9:.0f} Gflop/s)\n")
    heads = ("ours min", 9), ("median", 9), ("KeOps", 9), ("median", 9), ("rows", 6), ("ratio", 9), ("bar", 9), ("", 8)
    print(f"{'':{WIDTH}}" + "".join(f"{text:>{w}}" for text, w in (*heads, ("Gpair/s", 8), ("ops", 6), ("share", 7))))
    for case in cases():
        if wanted(case.name):
            print(measure(case, library, arguments.repeats, peak), flush=True)
    if wanted("first result, second process"):
        for row in first_results(names, min(arguments.repeats, 5)):
            print(row, flush=True)
    if wanted("memory"):
        for row in memory(names):
            print(row, flush=True)
    if wanted("accuracy"):
        for row in accuracy({"pullback": pb} | ({"pykeops": library} if library else {})):
            print(row, flush=True)
    print(
        f"\nmultiply-adds at the end: {peak.best / 1e9:.0f} G/s at best, the median {peak.steady:.0%} of it", end="; "
    )
    print(f"load {os.getloadavg()[0]:.1f} (above {THREADS}: others were at work)")


if __name__ == "__main__":
    main()
