"""Linear operators beside PyLops: one table of the speeds that this library holds itself to.

    python benchmarks/operators.py [--quick] [--only NAME]

float32, one thread, forward + backward through autograd (pullback) and through `pylops.TorchOperator`, in one process,
alternating; values are compared before anything is timed. Every row prints the minimum and the median of both sides,
the ratio of the minima, the bar and whether it is met. Needs PyLops 2.8: `pip install pullback[bench]`.
"""

# ruff: noqa: E402  (the number of threads must be set before NumPy and torch are imported)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pylops
import torch
from pylops.optimization.basic import cgls as pylops_cgls
from pylops.optimization.sparsity import fista as pylops_fista

import pullback as pb
import pullback.functionals
import pullback.solvers

Call = Callable[[], Any]


class Absent(Exception):
    """The library does not offer yet what a case needs."""


def public(name: str) -> Any:
    """A public name of pullback, or Absent."""
    for module in (pb, pullback.functionals, pullback.solvers):
        if hasattr(module, name):
            return getattr(module, name)
    raise Absent(f"pullback.{name} does not exist yet")


@dataclass
class Case:
    """Two callables that do the same work, and what they return to be compared."""

    name: str
    bar: float  # ratio of times, or a time in us where `absolute`
    make: Callable[[], tuple[Call, Call]]
    repeats: int = 9
    rtol: float = 1e-4
    absolute: bool = False
    inner: int = 1  # calls between two readings of the clock


def pair(ours: Any, theirs: Any, batch: int = 0) -> tuple[Call, Call]:
    """Forward + backward of both; each returns (output, gradient) flat."""
    n, m = ours.shape[1], ours.shape[0]
    generator = torch.Generator().manual_seed(0)
    lead = (batch,) if batch else ()
    x = torch.randn(*lead, *ours.dims, generator=generator)
    out_dtype = torch.complex64 if np.issubdtype(theirs.dtype, np.complexfloating) else torch.float32
    g = torch.randn(*lead, *ours.dimsd, dtype=out_dtype, generator=generator)
    foreign = pylops.TorchOperator(theirs, batch=bool(batch))
    x_ours, x_theirs = x.clone().requires_grad_(), x.reshape(*lead, n).clone().requires_grad_()
    g_theirs = g.reshape(*lead, m)

    def run_ours() -> tuple[torch.Tensor, torch.Tensor]:
        x_ours.grad = None
        y = ours(x_ours)
        y.backward(g)
        return y.detach(), x_ours.grad

    def run_theirs() -> tuple[torch.Tensor, torch.Tensor]:
        x_theirs.grad = None
        y = foreign.apply(x_theirs)
        y.backward(g_theirs)
        return y.detach(), x_theirs.grad

    return run_ours, run_theirs


def smoothing(n: int, batch: int = 0) -> tuple[Call, Call]:
    return pair(public("Smoothing2D")((5, 5), (n, n)), pylops.Smoothing2D((5, 5), (n, n), dtype="float32"), batch)


def kernel() -> np.ndarray:
    """A 15 x 15 kernel that is not separable, with sum of magnitudes 1."""
    h = np.random.default_rng(0).standard_normal((15, 15)) + 3
    return (h / np.abs(h).sum()).astype(np.float32)


def blur(n: int) -> tuple[Any, Any]:
    ours = public("Convolve2D")((n, n), torch.from_numpy(kernel()), (7, 7))
    return ours, pylops.signalprocessing.Convolve2D((n, n), kernel(), (7, 7), dtype="float32")


def fourier(n: int) -> tuple[Call, Call]:
    theirs = pylops.signalprocessing.FFT2D((n, n), real=True, dtype="float32", engine="scipy")
    return pair(public("FFT2D")((n, n), real=True), theirs)


def gradient(n: int) -> tuple[Call, Call]:
    return pair(public("Gradient")((n, n)), pylops.Gradient((n, n), dtype="float32"))


def derivative(n: int) -> tuple[Call, Call]:
    return pair(public("FirstDerivative")((n, n), axis=0), pylops.FirstDerivative((n, n), axis=0, dtype="float32"))


def stack(n: int) -> tuple[Call, Call]:
    ours = public("VStack")([public("Identity")((n, n)), public("FirstDerivative")((n, n), axis=0)])
    parts = [pylops.Identity(n * n, dtype="float32"), pylops.FirstDerivative((n, n), axis=0, dtype="float32")]
    return pair(ours, pylops.VStack(parts, dtype="float32"))


def matrix(n: int, batch: int) -> tuple[Call, Call]:
    a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    return pair(public("MatrixMult")(a), pylops.MatrixMult(a, dtype="float32"), batch)


def scene(n: int) -> np.ndarray:
    """Blocks and a ramp."""
    i, j = np.mgrid[:n, :n] / n
    return ((np.abs(i - 0.4) < 0.2) * (np.abs(j - 0.5) < 0.3) + 0.3 * i).astype(np.float32)


def whole(solution: Any) -> torch.Tensor:
    """The result of a solver that did all 50 iterations."""
    done = int(torch.as_tensor(solution.iterations).max())
    if done != 50:
        raise Absent(f"a solver that stops after {done} of 50 iterations cannot be compared")
    return solution.x


def cgls(n: int) -> tuple[Call, Call]:
    solve = public("cgls")
    ours, theirs = blur(n)
    y = theirs @ scene(n)
    data = torch.from_numpy(y.reshape(n, n))
    # A tolerance of zero, so that both do 50 iterations.
    return (
        lambda: whole(solve(ours, data, maxiter=50, rtol=0.0, atol=0.0)),
        lambda: torch.from_numpy(pylops_cgls(theirs, y.ravel(), niter=50, tol=0.0)[0]),
    )


def fista(n: int) -> tuple[Call, Call]:
    solve, l1 = public("fista"), public("L1")
    ours, theirs = blur(n)
    y = theirs @ scene(n)
    data = torch.from_numpy(y.reshape(n, n))
    step, eps = 0.95, 1e-3  # pylops: threshold eps * alpha / 2, cost |A x - y|^2 / 2 + eps / 2 |x|_1
    return (
        lambda: whole(solve(ours, data, l1(weight=eps / 2), step=step, maxiter=50, rtol=0.0, atol=0.0)),
        lambda: torch.from_numpy(pylops_fista(theirs, y.ravel(), niter=50, eps=eps, alpha=step, tol=0.0)[0]),
    )


def foreign(backward: bool) -> tuple[Call, Call]:
    wrap = public("TorchOperator")
    op = pylops.Diagonal(np.arange(1.0, 9.0), dtype="float64")
    ours, theirs = wrap(op), pylops.TorchOperator(op)
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if not backward:
        return lambda: ours(x), lambda: theirs.apply(x)

    def run(apply: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        leaf, g = x.clone().requires_grad_(), torch.ones(8, dtype=torch.float64)

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            leaf.grad = None
            y = apply(leaf)
            y.backward(g)
            return y.detach(), leaf.grad

        return call

    return run(ours), run(theirs.apply)


def cases(quick: bool) -> Iterator[Case]:
    large, larger = (512, 1024) if quick else (2048, 4096)
    few = 3 if quick else 9
    yield Case(f"Smoothing2D (5,5) {large}^2", 6, lambda: smoothing(large), few)
    yield Case("Smoothing2D (5,5) 32^2, batch 3", 4, lambda: smoothing(32, 3), 20 * few, inner=20)
    yield Case(f"Convolve2D 15x15 {large}^2", 2, lambda: pair(*blur(large)), few)
    yield Case(f"FFT2D real {large}^2", 1.7, lambda: fourier(large), 2 * few)
    yield Case(f"Gradient {large}^2", 6, lambda: gradient(large), few)
    yield Case(f"FirstDerivative {larger}^2 axis 0", 4.5, lambda: derivative(larger), few)
    yield Case(f"VStack[I, FirstDerivative] {large}^2", 4.5, lambda: stack(large), few)
    yield Case("MatrixMult 4000^2, batch 16", 6, lambda: matrix(500 if quick else 4000, 16), few, rtol=1e-3)
    image = 256 if quick else 1024
    yield Case(f"CGLS 50 iterations, deblurring {image}^2", 2, lambda: cgls(image), 2 if quick else 3, rtol=5e-2)
    yield Case(f"FISTA 50 iterations, deblurring {image}^2", 3, lambda: fista(image), 2 if quick else 3, rtol=5e-2)
    yield Case("TorchOperator, 8 elements, forward", 12, lambda: foreign(False), 20 * few, absolute=True, inner=200)
    yield Case("TorchOperator, 8 elements, fwd+bwd", 50, lambda: foreign(True), 20 * few, absolute=True, inner=100)


def difference(a: Any, b: Any) -> float:
    """The largest relative difference in norm of two results."""
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else ((a, b),)
    worst = 0.0
    for u, v in pairs:
        u, v = u.detach().reshape(-1), v.detach().reshape(-1)
        dtype = torch.promote_types(u.dtype, v.dtype)
        worst = max(worst, float(torch.linalg.vector_norm(u.to(dtype) - v.to(dtype)) / torch.linalg.vector_norm(v)))
    return worst


def measure(case: Case) -> str:
    """Compare, time and judge one case; the text of its row."""
    try:
        ours, theirs = case.make()
        error = difference(ours(), theirs())
    except Absent as reason:
        return f"{case.name:40} skipped: {reason}"
    if not error <= case.rtol:
        return f"{case.name:40} not timed: values differ by {error:.1e}, more than {case.rtol:.0e}"
    times: tuple[list[float], list[float]] = ([], [])
    for call in (ours, theirs):
        call()
    for _ in range(case.repeats):
        for call, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            for _ in range(case.inner):
                call()
            record.append((time.perf_counter() - start) / case.inner)
    low, high = min(times[0]), min(times[1])
    scale, unit = (1e6, "us") if low < 1e-3 else (1e3, "ms")
    columns = "".join(f"{v * scale:11.2f}" for t in times for v in (min(t), statistics.median(t)))
    if case.absolute:
        met, bar = low * 1e6 <= case.bar, f"<={case.bar:g}us"
    else:
        met, bar = high / low >= case.bar, f"{case.bar:g}x"
    return (
        f"{case.name:40}{columns} {unit}{high / low:8.2f}x {bar:>8}  {'met' if met else 'NOT MET'}   diff {error:.0e}"
    )


def command_line(description: str | None) -> argparse.Namespace:
    """The arguments of a benchmark that runs on one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look; the bars are for the full sizes")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return parser.parse_args()


def main() -> None:
    arguments = command_line(__doc__)
    print(f"pullback beside PyLops {pylops.__version__}, torch {torch.__version__}, {sys.platform}, 1 thread, float32")
    print(f"{'':40}{'ours min':>11}{'median':>11}{'pylops min':>11}{'median':>11}   {'ratio':>8} {'bar':>9}")
    for case in cases(arguments.quick):
        if arguments.only.lower() in case.name.lower():
            print(measure(case), flush=True)


if __name__ == "__main__":
    main()
