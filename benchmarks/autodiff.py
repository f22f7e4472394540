"""Derivatives beside torch's own: one table of the speeds that `pullback.autodiff` holds itself to.

    python benchmarks/autodiff.py [--quick] [--only NAME]

float64, one thread, both sides in one process, alternating; values are compared before anything is timed. Every row
prints the minimum and the median of both sides, the ratio of the minima, the bar and whether it is met.
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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hvp

from pullback.autodiff.hessian import hessian
from pullback.autodiff.jacobian import jacobian
from pullback.autodiff.propagate import propagate
from pullback.autodiff.sparse.evaluate import sparse_jacobian
from pullback.autodiff.sparse.pattern import sparsity_pattern
from pullback.autodiff.sparse.plan import SparsePlan

Call = Callable[[], Any]
D = torch.float64


@dataclass
class Case:
    """Two callables that do the same work, and return tensors to be compared."""

    name: str
    bar: float  # of their time over ours
    make: Callable[[], tuple[Call, Call]]
    repeats: int = 15
    inner: int = 1  # calls between two readings of the clock
    rtol: float = 1e-9


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def valley(x: Tensor) -> Tensor:
    """A chained function whose Hessian is banded."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def network() -> tuple[torch.nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """A small network, its parameters, and its loss as a function of them in the order of the module."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)
    ).to(D)
    data, target = randn(32, 20), randn(32, 5, seed=1)
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def loss(*values: Tensor) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(parameters, values, strict=True)), (data,))
        return torch.nn.functional.mse_loss(out, target)

    return net, parameters, loss


def products(n: int, times: int) -> tuple[Call, Call]:
    """`times` Hessian products, the operator's construction among them."""
    x, vs = randn(n), randn(times, n, seed=1)

    def ours() -> Tensor:
        H = hessian(valley, x)
        return torch.stack([H(v) for v in vs])

    return ours, lambda: torch.stack([hvp(valley, x, v)[1] for v in vs])


def network_products(times: int) -> tuple[Call, Call]:
    """The same for the loss of a network in all of its parameters."""
    _, parameters, loss = network()
    x = tuple(parameters.values())
    trees = [tuple(randn(*p.shape, seed=k) for p in x) for k in range(times)]

    def ours() -> Tensor:
        H = hessian(loss, *x)
        return torch.stack([H.pack(H @ tree) for tree in trees])

    return ours, lambda: torch.stack([torch.cat([h.flatten() for h in hvp(loss, x, tree)[1]]) for tree in trees])


def dense(n: int, m: int) -> tuple[Call, Call]:
    """The dense Jacobian of a network with n inputs and m outputs beside torch.func, in the better of its modes."""
    torch.manual_seed(0)
    f = torch.nn.Sequential(torch.nn.Linear(n, 64), torch.nn.Tanh(), torch.nn.Linear(64, m), torch.nn.Tanh()).to(D)
    f.requires_grad_(False)
    x = randn(n)
    theirs = torch.func.jacrev(f) if m <= n else torch.func.jacfwd(f)
    return lambda: jacobian(f, x).todense(), lambda: theirs(x)


def tridiagonal(x: Tensor) -> Tensor:
    """Every value depends on three neighbours."""
    p = torch.nn.functional.pad(x, (1, 1))
    return 3 * x**2 + x * p[:-2] - torch.sin(p[2:])


def sparse(n: int, planned: bool) -> tuple[Call, Call]:
    """The tridiagonal Jacobian as CSR, checked, beside the dense one; with a plan, or with tracing and colouring."""
    x = randn(n)
    plan = SparsePlan.jacobian(sparsity_pattern(tridiagonal, x)) if planned else None
    return lambda: sparse_jacobian(tridiagonal, x, plan), lambda: torch.func.jacrev(tridiagonal)(x)


def uncertainty(transform: Callable[..., Any], damped: bool) -> tuple[Call, Call]:
    """Mean and standard deviation of a decay, 2 inputs and 1000 outputs, beside f(x) and sqrt(diag(J S J^T))."""
    t = torch.linspace(0, 10, 1000, dtype=D)
    x = torch.tensor([2.0, 0.3], dtype=D)
    S = torch.tensor([[0.04, 0.003], [0.003, 0.001]], dtype=D)

    def f(p: Tensor) -> Tensor:
        decay = p[0] * torch.exp(-p[1] * t)
        return decay * torch.cos(2 * t) if damped else decay

    def ours() -> Tensor:
        result = propagate(f, x, S)
        return torch.stack([result.mean, result.std])

    def theirs() -> Tensor:
        J = transform(f)(x)
        return torch.stack([f(x), (J @ S @ J.T).diagonal().sqrt()])

    return ours, theirs


def cases(quick: bool) -> Iterator[Case]:
    few = 5 if quick else 15
    large = 1000 if quick else 10000
    yield Case("hvp, 1 product, n = 50", 1, lambda: products(50, 1), few, 20)
    yield Case("hvp, 100 products, n = 50", 2, lambda: products(50, 100), few)
    yield Case(f"hvp, 1 product, n = {large}", 1, lambda: products(large, 1), few, 10)
    yield Case(f"hvp, 100 products, n = {large}", 2, lambda: products(large, 100), few)
    yield Case("hvp, 1 product, network loss", 1, lambda: network_products(1), few, 10)
    yield Case("hvp, 100 products, network loss", 2, lambda: network_products(100), few)
    yield Case("dense Jacobian 10 x 500, reverse", 1, lambda: dense(500, 10), few, 10)
    yield Case("dense Jacobian 500 x 10, forward", 1, lambda: dense(10, 500), few, 10)
    yield Case("sparse Jacobian, n = 3000, by jacrev", 200, lambda: sparse(3000, True), 4 if quick else 7)
    yield Case("the same with its pattern and colouring", 20, lambda: sparse(3000, False), 1 if quick else 5)
    for name, transform in (("jacrev", torch.func.jacrev), ("jacfwd", torch.func.jacfwd)):
        yield Case(f"propagate, by {name}", 5, partial(uncertainty, transform, False), few, 10)
        yield Case(f"propagate, damped, by {name}", 5, partial(uncertainty, transform, True), few, 10)


def difference(a: Tensor, b: Tensor) -> float:
    """The relative difference in norm of two results."""
    a = a if a.layout == torch.strided else a.to_dense()
    return float(torch.linalg.vector_norm(a.detach() - b.detach()) / torch.linalg.vector_norm(b.detach()))


def measure(case: Case) -> str:
    """Compare, time and judge one case; the text of its row."""
    ours, theirs = case.make()
    error = difference(ours(), theirs())
    if not error <= case.rtol:
        return f"{case.name:40} not timed: values differ by {error:.1e}, more than {case.rtol:.0e}"
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(case.repeats):
        for call, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            for _ in range(case.inner):
                call()
            record.append((time.perf_counter() - start) / case.inner)
    low, high = min(times[0]), min(times[1])
    columns = "".join(f"{v * 1e6:11.1f}" for t in times for v in (min(t), statistics.median(t)))
    met = "met" if high / low >= case.bar else "NOT MET"
    return f"{case.name:40}{columns} us{high / low:8.2f}x {case.bar:>6g}x  {met}   diff {error:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look; the bars are for the full sizes")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"pullback.autodiff beside torch {torch.__version__}, {sys.platform}, 1 thread, float64")
    print(f"{'':40}{'ours min':>11}{'median':>11}{'torch min':>11}{'median':>11}   {'ratio':>9} {'bar':>6}")
    for case in cases(arguments.quick):
        if arguments.only.lower() in case.name.lower():
            print(measure(case), flush=True)


if __name__ == "__main__":
    main()
