"""Solvers beside PyLops and PyProximal: time to the same result.

    python benchmarks/solvers.py [--quick] [--only NAME]

float32, one thread, both sides in one process, alternating. Least squares, FISTA and the wavelet transform do the same
iterations on both sides and are compared before anything is timed. TV deblurring is timed to the same objective value,
0.5 % above the minimum: the number of iterations that each method needs is found first, then runs of that length are
timed, without anything that only serves the comparison. Of PyProximal the fastest of five runs counts.
Needs PyLops and PyProximal: `pip install pullback[bench]`.
"""

# ruff: noqa: E402  (the number of threads must be set before NumPy and torch are imported)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pylops
import torch
from operators import Call, Case, blur, cgls, command_line, measure, scene, whole
from pylops.optimization.sparsity import fista as pylops_fista

import pullback as pb

WEIGHT, NOISE, EXCESS = 2e-3, 0.01, 5e-3


def wavelet_fista(n: int) -> tuple[Call, Call]:
    """The argmin of |A W^H c - y|^2 / 2 + eps / 2 |c|_1 for Haar coefficients c, 50 iterations."""
    ours, theirs = blur(n)
    y = theirs @ scene(n)
    data = torch.from_numpy(y.reshape(n, n))
    step, eps = 0.95, 1e-3
    # SOp synthesises: PyLops thresholds SOp.H x.
    peer = pylops.signalprocessing.DWT2D((n, n), wavelet="haar", level=3, dtype="float32")
    W = pb.DWT2D((n, n), wavelet="haar", level=3)
    penalty = (eps / 2) * (pb.L1() @ W)
    return (
        lambda: whole(pb.fista(ours, data, penalty, step=step, maxiter=50, rtol=0.0, atol=0.0)),
        lambda: torch.from_numpy(
            pylops_fista(theirs, y.ravel(), niter=50, eps=eps, alpha=step, tol=0.0, SOp=peer.H)[0]
        ),
    )


def wavelet(n: int) -> tuple[Call, Call]:
    """Forward and adjoint of DWT2D db4, level 3."""
    peer = pylops.signalprocessing.DWT2D((n, n), wavelet="db4", level=3, dtype="float32")
    W = pb.DWT2D((n, n), wavelet="db4", level=3)
    x = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    t = torch.from_numpy(x)

    def run_ours() -> torch.Tensor:
        return W.H(W(t))

    def run_theirs() -> torch.Tensor:
        return torch.from_numpy(peer.rmatvec(peer.matvec(x.ravel())))

    return run_ours, run_theirs


def cases(quick: bool) -> Iterator[Case]:
    image, large, few = (256, 512, 2) if quick else (1024, 2048, 3)
    yield Case(f"CGLS 50 iterations, deblurring {image}^2", 2, lambda: cgls(image), few, rtol=5e-2)
    side = 256 if quick else 512
    yield Case(f"FISTA 50 iterations, haar, {side}^2", 3, lambda: wavelet_fista(side), few, rtol=5e-2)
    yield Case(f"DWT2D db4 level 3, {large}^2, forward + adjoint", 2, lambda: wavelet(large), 3 * few, rtol=1e-4)


# TV deblurring to the same objective --------------------------------------------------------------------------------


def objective(A: Any, y: torch.Tensor, x: torch.Tensor) -> float:
    tv = pb.TV(tuple(x.shape))
    return float((A(x) - y).double().square().sum() / 2 + WEIGHT * tv(x.double()))


def peers(theirs: Any, y: np.ndarray, n: int) -> dict[str, Callable[[int, Any], np.ndarray]]:
    """Methods of PyProximal as (iterations, callback) -> x."""
    import pyproximal
    from pyproximal.optimization.primal import ADMML2, ProximalGradient
    from pyproximal.optimization.primaldual import PrimalDual

    gradient = pylops.Gradient((n, n), kind="forward", dtype="float32")
    # Two components after each other; TV with forward differences, as ours.
    l21 = pyproximal.L21(ndim=2, sigma=WEIGHT)
    start = np.zeros(n * n, dtype=np.float32)

    def fista(inner: int, k: int, callback: Any) -> np.ndarray:
        l2 = pyproximal.L2(Op=theirs, b=y)
        tv = pyproximal.TV((n, n), sigma=WEIGHT, niter=inner, rtol=0.0)
        return ProximalGradient(l2, tv, x0=start, tau=0.95, niter=k, acceleration="fista", callback=callback)

    def primal_dual(tau: float, k: int, callback: Any) -> np.ndarray:
        l2 = pyproximal.L2(Op=theirs, b=y, niter=4, warm=True)
        mu = 0.99 / 8 / tau
        return PrimalDual(l2, l21, gradient, x0=start, tau=tau, mu=mu, theta=1.0, niter=k, callback=callback)

    def admm(k: int, callback: Any) -> np.ndarray:
        return ADMML2(l21, theirs, y, gradient, x0=start, tau=10.0, niter=k, callback=callback, iter_lim=3)[0]

    # Steps and inner iterations as found best at 128 x 128.
    return {
        "FISTA, TV prox of 5": partial(fista, 5),
        "FISTA, TV prox of 10": partial(fista, 10),
        "PrimalDual, tau 2": partial(primal_dual, 2.0),
        "PrimalDual, tau 10": partial(primal_dual, 10.0),
        "ADMML2": admm,
    }


def needed(run: Callable[[int, Any], Any], value: Callable[[np.ndarray], float], goal: float, limit: int) -> int | None:
    """After how many iterations the objective is at most the goal; None if after more than the limit."""
    seen: list[float] = []

    class Enough(Exception):
        pass

    def callback(x: np.ndarray) -> None:
        seen.append(value(x))
        if seen[-1] <= goal:
            raise Enough

    try:
        run(limit, callback)
    except Enough:
        return len(seen)
    return None


def total_variation(n: int, repeats: int) -> None:
    ours, theirs = blur(n)
    generator = np.random.default_rng(1)
    y = (theirs @ scene(n)).reshape(n, n) + NOISE * generator.standard_normal((n, n))
    y = y.astype(np.float32)
    data = torch.from_numpy(y)
    tv = WEIGHT * pb.TV((n, n))
    best = pb.admm(ours, data, tv, maxiter=400, rtol=0.0)
    least = min(objective(ours, data, best.x), float(best.history["objective"].min()))
    goal = least * (1 + EXCESS)
    print(f"TV deblurring {n}^2: minimum {least:.4f}, goal {goal:.4f}")
    rows: list[tuple[str, Call]] = []

    def value(x: np.ndarray) -> float:
        return objective(ours, data, torch.from_numpy(np.asarray(x, dtype=np.float32).reshape(n, n)))

    chosen = pb.solve(ours, data, tv, maxiter=1000, rtol=0.0, callback=lambda s: bool(s.values["objective"] <= goal))
    name = chosen.method.split(":")[0]
    print(f"  solve() says: {chosen.method}")
    for method, solver in (("pdhg", pb.pdhg), ("admm", pb.admm), ("fista", pb.fista)):
        s = solver(ours, data, tv, maxiter=1000, rtol=0.0, callback=lambda s: bool(s.values["objective"] <= goal))
        k = s.iterations
        if k == 1000:
            print(f"  pullback {method}: not reached in 1000 iterations")
            continue
        label = f"pullback {method}{' (what solve chooses)' if method == name else ''}, {k} iterations"
        rows.append((label, lambda solver=solver, k=k: solver(ours, data, tv, maxiter=k, rtol=0.0)))
    for method, run in peers(theirs, y.ravel(), n).items():
        count = needed(run, value, goal, 300)
        if count is None:
            print(f"  PyProximal {method}: not reached in 300 iterations")
            continue
        rows.append((f"PyProximal {method}, {count} iterations", lambda run=run, k=count: run(k, None)))
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(repeats):
        for (_, call), record in zip(rows, times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    for (label, _), record in zip(rows, times, strict=True):
        print(f"  {label:60} min {min(record):8.2f} s, median {statistics.median(record):8.2f} s")
    mine = [min(t) for (label, _), t in zip(rows, times, strict=True) if "what solve chooses" in label]
    others = [min(t) for (label, _), t in zip(rows, times, strict=True) if label.startswith("PyProximal")]
    if mine and others:
        ratio = min(others) / mine[0]
        print(f"  ratio {ratio:.2f}x, bar 3x: {'met' if ratio >= 3 else 'NOT MET'}")


def main() -> None:
    arguments = command_line(__doc__)
    print(f"pullback beside PyLops {pylops.__version__}, torch {torch.__version__}, 1 thread, float32")
    print(f"{'':40}{'ours min':>11}{'median':>11}{'peer min':>11}{'median':>11}   {'ratio':>8} {'bar':>9}")
    for case in cases(arguments.quick):
        if arguments.only.lower() in case.name.lower():
            print(measure(case), flush=True)
    if arguments.only.lower() in "tv deblurring":
        total_variation(256 if arguments.quick else 1024, 2)


if __name__ == "__main__":
    main()
