"""Sums within a tolerance: seconds, true errors and memory, beside the exact engine and KeOps.

    python benchmarks/fast_sums.py [--quick] [--only NAME]

Two threads, points uniform in the unit cube, random weights. "first" includes everything (formula, plan, check),
"again" the same points once more. The error is the relative l2 error of 256 rows against the exact engine in double.
At 1e5 points the exact engine and, if it is installed, pykeops sum the same in the same run; at 1e6 they take minutes,
so their time is that of some rows, scaled. Bars are for the full sizes.
"""

# ruff: noqa: E402  (the number of threads must be set before NumPy and torch are imported)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "2"

import argparse
import functools
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pullback as pb
from pullback.kernels import fast

KERNELS = {
    "gaussian": "Exp(-SqDist(x,y)*s)*b",  # s = 1 / (2 sigma^2)
    "exp(-r/0.1)": "Exp(-Norm2(x-y)*s)*b",
    "matern 3/2": "(IntCst(1)+Norm2(x-y)*s)*Exp(-Norm2(x-y)*s)*b",
    "1/r": "Rsqrt(SqDist(x,y))*b",
}
EXACT_SECONDS = 3.0  # what the exact engine and KeOps may take; beyond that they do fewer rows


@dataclass
class Case:
    """One row of the table: bars are seconds, or None."""

    kernel: str
    d: int
    n: int
    tolerance: float
    dtype: torch.dtype = torch.float64
    scale: float = 50.0
    first: float | None = None
    again: float | None = None
    gradients: float | None = None
    faster: float | None = None  # than the exact engine, at least
    megabytes: float | None = None

    @property
    def name(self) -> str:
        """What the row is called."""
        kind = "float" if self.dtype == torch.float32 else "double"
        return f"{self.kernel}, D = {self.d}, {self.n:.0e}, {self.tolerance:.0e}, {kind}".replace("e+0", "e")


def cases(quick: bool) -> Iterator[Case]:
    """The table."""
    n = 100_000 if quick else 1_000_000
    yield Case("gaussian", 3, n, 1e-6, first=0.6, again=0.4, gradients=2.5)
    yield Case("gaussian", 3, n // 10, 1e-6)
    yield Case("gaussian", 3, 10 * n, 1e-4, torch.float32, first=6.0, megabytes=6000)
    for name in ("exp(-r/0.1)", "matern 3/2", "1/r"):
        scale = 3**0.5 / 0.1 if name == "matern 3/2" else 10.0
        yield Case(name, 3, n, 1e-4, scale=scale, first=15.0)
        yield Case(name, 3, n // 10, 1e-4, scale=scale, faster=5.0)
    for d in (1, 2):
        yield Case("gaussian", d, n, 1e-8, first=1.5)
        yield Case("exp(-r/0.1)", d, n, 1e-8, scale=10.0, first=1.5)


def points(case: Case) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(case.n, case.d, dtype=case.dtype, generator=g) for _ in range(2))
    b = torch.randn(case.n, 1, dtype=case.dtype, generator=g)
    return [x, y, b, torch.tensor([case.scale], dtype=case.dtype)]


def formula(case: Case, library: Any, **options: Any) -> Callable[..., Tensor]:
    aliases = [f"x = Vi({case.d})", f"y = Vj({case.d})", "b = Vj(1)", "s = Pm(1)"]
    return library.Genred(KERNELS[case.kernel], aliases, axis=1, **options)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def peak() -> float:
    """The largest memory of this process so far [MB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def other(case: Case, f: Callable[..., Tensor], args: list[Tensor]) -> float:
    """Seconds of an exact sum over all rows, from as many rows as fit into the time."""
    x, *rest = args
    f(x[:1000], *rest)
    rows, seconds = 1000, 0.0
    while True:
        seconds, _ = timed(functools.partial(f, x[:rows], *rest))
        if rows >= len(x) or seconds > EXACT_SECONDS / 4:
            return seconds * len(x) / rows
        rows = min(len(x), 4 * rows)


def judged(value: float, bar: float | None, least: bool = False) -> str:
    if bar is None:
        return ""
    return f" ({'met' if (value >= bar if least else value <= bar) else 'MISSED'}: {bar:g})"


def run(case: Case, keops: Any) -> float:
    args = points(case)
    f, exact = formula(case, pb, tolerance=case.tolerance), formula(case, pb)
    small = [a[:2000] if len(a) > 1 else a for a in args]
    f(*small), exact(*small)  # compiles the code of the check
    first, again = [], []
    for _ in range(2 if case.n > 2e6 else 3):
        fast.clear()
        with fast.watch() as done:
            seconds, y = timed(lambda: f(*args))
        first.append(seconds)
        again.append(timed(lambda: f(*args))[0])
    rows = torch.randint(0, case.n, (256,), generator=torch.Generator().manual_seed(1))
    true = exact(args[0][rows].double(), *(a.double() for a in args[1:]))
    error = float((y[rows].double() - true).norm() / true.norm())
    print(f"{case.name}: {done[0].method}, {done[0].detail}")
    print(f"    first {min(first):7.3f} s{judged(min(first), case.first)}, again {min(again):7.3f} s", end="")
    print(f"{judged(min(again), case.again)}, error {error:.1e}{judged(error, case.tolerance)}")
    if case.gradients:
        leaves = [a.clone().requires_grad_() for a in args[:3]]
        f(*leaves, args[3]).square().sum().backward()
        seconds = min(timed(lambda: f(*leaves, args[3]).square().sum().backward())[0] for _ in range(3))
        print(f"    with gradients to x, y and b {seconds:.3f} s{judged(seconds, case.gradients)}")
    if case.megabytes:
        print(f"    memory of the process at most {peak():.0f} MB{judged(peak(), case.megabytes)}")
    if case.n <= 1e6:
        seconds = other(case, exact, args)
        ratio = seconds / min(first)
        print(f"    exact engine {seconds:.2f} s: {ratio:.1f}x{judged(ratio, case.faster, True)}", end="")
        if keops is not None and case.n <= 1e5:
            theirs = other(case, formula(case, keops), args)
            print(f"; KeOps {theirs:.2f} s: {theirs / min(first):.1f}x", end="")
        print()
    return min(first)


def regression(quick: bool) -> None:
    """Gaussian-process regression by conjugate gradients, with two preconditioners."""
    n = 100_000 if quick else 1_000_000
    _regression(n, "fourier", None, 60.0)
    _regression(n // 10, "nystrom", 200, None)


def _regression(n: int, preconditioner: str, rank: int | None, bar: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, dtype=torch.float64, generator=g)
    z = (12 * x[:, 0]).sin() * (9 * x[:, 1]).cos() + 0.1 * torch.randn(n, dtype=torch.float64, generator=g)
    K = (-50 * pb.Vi(x).sqdist(pb.Vj(x))).exp()
    options = {"alpha": 0.1**2, "eps": 1e-4, "tolerance": 1e-5, "maxiter": 3000, "info": True}
    with fast.watch() as done:
        seconds, (w, info) = timed(lambda: K.solve(z, preconditioner=preconditioner, rank=rank, **options))
    rows = torch.randint(0, n, (128,), generator=g)
    residual = (-50 * pb.Vi(x[rows]).sqdist(pb.Vj(x))).exp() @ w + 0.01 * w[rows] - z[rows]
    print(
        f"Gaussian-process regression, D = 2, {n:.0e} points, noise 0.1, to 1e-4, {preconditioner}: {seconds:.1f} s",
        end="",
    )
    print(judged(seconds, bar))
    print(f"    {info.iterations} iterations, {done[-1].method}, {info.message}; exact residual on 128 rows ", end="")
    print(f"{float(residual.norm() / z[rows].norm()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the points; the bars are for the full sizes")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    try:
        import pykeops.torch as keops
    except ImportError:
        keops = None
        print("pykeops is not installed; its times stay out")
    print(f"pullback {pb.__version__}, torch {torch.__version__}, {platform.processor() or sys.platform}, 2 threads")
    seconds: dict[tuple[str, int], dict[int, float]] = {}
    for case in cases(arguments.quick):
        if arguments.only in case.name:
            seconds.setdefault((case.kernel, case.d), {})[case.n] = run(case, keops)
    for (kernel, d), found in seconds.items():
        sizes = sorted(n for n in found if n <= 1_000_000)
        if len(sizes) == 2:
            growth = found[sizes[1]] / found[sizes[0]]
            print(
                f"growth of {kernel}, D = {d}, from {sizes[0]:.0e} to {sizes[1]:.0e}: {growth:.1f}{judged(growth, 13)}"
            )
    if arguments.only in "regression":
        regression(arguments.quick)


if __name__ == "__main__":
    main()
