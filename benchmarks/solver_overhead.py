"""What an iteration of each solver costs beyond its operator, on problems so small that little else is left.

    python benchmarks/solver_overhead.py [name ...]

A is a dense 20 x 50 matrix (its 50 x 50 normal matrix for square systems) in float64, one thread. "overhead" is the
time of an iteration less that of the operator's calls; "batch" is how many times faster 64 right-hand sides in one call
are than 64 calls. Times are minima.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import pullback as pb
from pullback import solvers

BUDGET, SPEEDUP, MEMBERS = 20.0, 10.0, 64


def best(f: Callable[[], Any], repeats: int = 30, least: float = 0.004) -> float:
    """Seconds a call."""
    f()
    once = time.perf_counter()
    f()
    once = time.perf_counter() - once
    count = max(1, int(least / max(once, 1e-7)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            f()
        times.append((time.perf_counter() - start) / count)
    return min(times)


def each_member(run: Callable[..., Any], A: Any, B: torch.Tensor, count: int) -> None:
    """One call a member."""
    for b in B:
        run(A, b, maxiter=count)


def cases() -> dict[str, tuple[str, Callable[..., Any]]]:
    l1 = 0.01 * pb.L1()
    least, square = "A, A.H", "A"
    none = {"rtol": 0.0}
    return {
        "cgls": (least, lambda A, y, **k: solvers.cgls(A, y, **none, **k)),
        "lsqr": (least, lambda A, y, **k: solvers.lsqr(A, y, atol=0.0, btol=0.0, conlim=1e30, **k)),
        "lsmr": (least, lambda A, y, **k: solvers.lsmr(A, y, conlim=0, **none, **k)),
        "landweber": (least, lambda A, y, **k: solvers.landweber(A, y, **none, **k)),
        "sirt": (least, lambda A, y, **k: solvers.sirt(A, y, **none, **k)),
        "chebyshev normal": (
            least,
            lambda A, y, **k: solvers.chebyshev(A, y, normal=True, interval=(1e-9, 1.1), **none, **k),
        ),
        "ista": (least, lambda A, y, **k: solvers.ista(A, y, l1, **none, **k)),
        "fista": (least, lambda A, y, **k: solvers.fista(A, y, l1, **none, **k)),
        "pdhg": (least, lambda A, y, **k: solvers.pdhg(A, y, l1, **none, **k)),
        "cg": (square, lambda A, y, **k: solvers.cg(A, y, **none, **k)),
        "cg preconditioned": (
            square,
            lambda A, y, **k: solvers.cg(A, y, preconditioner=pb.Diagonal(torch.ones(50).double()), **none, **k),
        ),
        "minres": (square, lambda A, y, **k: solvers.minres(A, y, **none, **k)),
        "gmres": (square, lambda A, y, **k: solvers.gmres(A, y, **none, **k)),
        "chebyshev": (square, lambda A, y, **k: solvers.chebyshev(A, y, interval=(1e-9, 1.1), **none, **k)),
        "bicgstab": ("A, A", lambda A, y, **k: solvers.bicgstab(A, y, **none, **k)),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.rand(20, 50, dtype=torch.float64, generator=generator), full_matrices=False)
    # Slowly converging, so that many iterations are timed; a positive matrix, as sirt needs it.
    dull = (u * torch.logspace(0, -5, 20, dtype=torch.float64)) @ vh
    positive = torch.rand(20, 50, dtype=torch.float64, generator=generator)
    normal = (vh.mT * torch.logspace(0, -10, 20, dtype=torch.float64)) @ vh
    normal = normal + 1e-9 * torch.eye(50, dtype=torch.float64)
    Y = torch.randn(MEMBERS, 20, dtype=torch.float64, generator=generator)
    Z = torch.randn(MEMBERS, 50, dtype=torch.float64, generator=generator)
    print(f"{'':18} {'iterations':>10} {'us each':>8} {'operator':>8} {'overhead':>8} {'setup':>7} {'batch':>6}")
    for name, (calls, run) in cases().items():
        if names and name not in names:
            continue
        A = pb.MatrixMult(positive if name == "sirt" else dull if "H" in calls else normal)
        B = Y if "H" in calls else Z
        y = B[0]
        x = torch.randn(50, dtype=torch.float64)
        H = A.H
        once = best(partial(A, x))
        back = best(partial(H, y)) if "H" in calls else 0.0
        operator = once + back if "H" in calls else once * len(calls.split(","))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = run(A, y, maxiter=100).iterations
            setup = best(partial(run, A, y, maxiter=0))
            each = (best(partial(run, A, y, maxiter=count)) - setup) / count
            few = min(count, 20)
            loop = best(partial(each_member, run, A, B, few), 5)
            batch = best(partial(run, A, B, maxiter=few), 10)
        overhead, gain = (each - operator) * 1e6, loop / batch
        marks = ("  over budget" if overhead > BUDGET else "") + ("  slow batch" if gain < SPEEDUP else "")
        print(
            f"{name:18} {count:10} {each * 1e6:8.1f} {operator * 1e6:8.1f} {overhead:8.1f} {setup * 1e6:7.0f} "
            f"{gain:6.1f}{marks}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
