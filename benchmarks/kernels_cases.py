"""The rows of `kernels.py`: for each, data and the same calls to any library with KeOps' interface.

`ops` counts vector instructions a pair, in the cheapest known order: a multiply-add is one and so is an addition, a
comparison or a rounding; exp is EXP; |x - y|^2 is 2 D for small D and D + 2 by |x|^2 + |y|^2 - 2 (x|y) for large. Work
that is done once for a row or column does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

EXP = 11  # AVX-512: scale, round, two-step reduction, clamp, five multiply-adds, scalef
TUTORIAL = "Square(p-a)*Exp(x+y)"
TUTORIAL_ALIASES = ["x = Vi(1)", "y = Vj(1)", "a = Vj(1)", "p = Pm(1)"]
GAUSSIAN = "Exp(-SqDist(x,y))*b"


def gaussian_aliases(dim: int) -> list[str]:
    return [f"x = Vi({dim})", f"y = Vj({dim})", "b = Vj(1)"]


@dataclass
class Case:
    """One row: the same work for two libraries.

    Args:
        name: what `--only` looks for.
        make: (library, number of rows i) -> a call.
        bar: ratio of times at least, or microseconds at most where `absolute`; None: for information.
        m, n: rows and columns.
        batch: batch members.
        ops: vector instructions a pair.
        peer_rows: rows that the peer does where all take seconds; its time is scaled.
        inner: calls between two readings of the clock.
        rtol: how far results may differ; for indices, the share that may differ.
    """

    name: str
    make: Callable[[Any, int], Call]
    bar: float | None
    m: int
    n: int
    ops: int
    batch: int = 1
    peer_rows: int | None = None
    inner: int = 1
    absolute: bool = False
    rtol: float = 2e-5

    @property
    def pairs(self) -> float:
        """Pairs of a call."""
        return float(self.batch) * self.m * self.n

    @property
    def scale(self) -> float:
        """What the peer's time is multiplied with."""
        return self.m / (self.peer_rows or self.m)


@lru_cache(maxsize=4)  # one copy for both libraries: the caches of the processor hold it once
def points(seed: int, *shape: int) -> Tensor:
    """Normal points whose squared distances are near 2, whatever their dimension."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


@lru_cache(maxsize=2)
def weights(n: int) -> Tensor:
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(7))


def tutorial_data(m: int = 3000, n: int = 5000) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(m, 1, generator=g),
        torch.randn(n, 1, generator=g),
        *(torch.rand(k, 1, generator=g) for k in (n,)),
    ]


def tutorial(library: Any, gradient: bool) -> Call:
    f = library.Genred(TUTORIAL, TUTORIAL_ALIASES, reduction_op="LogSumExp", axis=1)
    x, y, a = tutorial_data()
    p = torch.tensor([0.3])
    if not gradient:
        return lambda: f(x, y, a, p)
    y.requires_grad_()
    c, g = f(x, y, a, p), torch.randn(3000, 1, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(c, y, g, retain_graph=True)[0]


def sums(library: Any, formula: str, dim: int, m: int, n: int, rows: int, gradient: bool = False) -> Call:
    """sum_j F(x_i, y_j) b_j, and its gradient to x."""
    f = library.Genred(formula, gaussian_aliases(dim), reduction_op="Sum", axis=1)
    x, y, b, g = points(0, m, dim)[:rows], points(1, n, dim), weights(n), weights(m)[:rows]
    if not gradient:
        return lambda: f(x, y, b)
    x = x.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        out = f(x, y, b)
        return out.detach(), torch.autograd.grad(out, x, g)[0]

    return call


def neighbours(library: Any, dim: int, n: int, rows: int) -> Call:
    aliases = [f"x = Vi({dim})", f"y = Vj({dim})"]
    f = library.Genred("SqDist(x,y)", aliases, reduction_op="ArgKMin", axis=1, opt_arg=10)
    x, y = points(0, n, dim)[:rows], points(1, n, dim)
    return lambda: f(x, y)


def batched(library: Any, batch: int, n: int) -> Call:
    f = library.Genred(GAUSSIAN, gaussian_aliases(3), reduction_op="Sum", axis=1)
    x, y, b = points(0, batch, n, 3), points(1, batch, n, 3), weights(batch * n).reshape(batch, n, 1)
    return lambda: f(x, y, b)


def lazy_product(library: Any) -> Call:
    x, y, b = points(0, 10, 3), points(1, 10, 3), weights(10)
    x_i, y_j = library.LazyTensor(x[:, None, :]), library.LazyTensor(y[None, :, :])
    K = (-((x_i - y_j) ** 2).sum(-1)).exp()
    return lambda: K @ b


def cases() -> Iterator[Case]:
    thousands = 10_000

    def gaussian(dim: int, gradient: bool = False) -> Callable[[Any, int], Call]:
        return lambda lib, rows: sums(lib, GAUSSIAN, dim, thousands, thousands, rows, gradient)

    yield Case("LSE tutorial 3000x5000, forward", lambda lib, _: tutorial(lib, False), 20, 3000, 5000, 5 + 2 * EXP)
    yield Case("LSE tutorial 3000x5000, gradient y", lambda lib, _: tutorial(lib, True), 25, 3000, 5000, 5 + 2 * EXP)
    yield Case("Gaussian D=3 1e4, forward", gaussian(3), 25, thousands, thousands, 7 + EXP)
    yield Case("Gaussian D=3 1e4, fwd+grad x", gaussian(3, True), 25, thousands, thousands, 17 + 2 * EXP)
    for dim, bar, rows in ((50, 20, 3000), (200, 40, 1000)):
        square = 53 if dim == 50 else 203
        yield Case(f"Gaussian D={dim} 1e4, forward", gaussian(dim), bar, *[thousands] * 2, square + EXP, peer_rows=rows)
        yield Case(
            f"Gaussian D={dim} 1e4, fwd+grad x",
            gaussian(dim, True),
            None,
            *[thousands] * 2,
            2 * (square + EXP) + dim + 1,
            peer_rows=rows // 2,
            rtol=5e-5,
        )
    yield Case(
        "Exp(x|y)*b D=50 1e4, forward",
        lambda lib, rows: sums(lib, "Exp(x|y)*b", 50, thousands, thousands, rows),
        100,
        *[thousands] * 2,
        51 + EXP,
        peer_rows=500,
    )
    for dim, bar, rows in ((3, 3, None), (100, 10, 3000)):
        yield Case(
            f"ArgKMin K=10 D={dim} 1e4",
            lambda lib, rows, dim=dim: neighbours(lib, dim, thousands, rows),
            bar,
            *[thousands] * 2,
            7 if dim == 3 else 103,
            peer_rows=rows,
            rtol=1e-3,
        )
    yield Case(
        "Gaussian D=3, M=1 N=1e6",
        lambda lib, rows: sums(lib, GAUSSIAN, 3, 1, 10**6, rows),
        10,
        1,
        10**6,
        7 + EXP,
        inner=3,
    )
    yield Case(
        "Gaussian D=3, 1000 x (50, 50)", lambda lib, _: batched(lib, 1000, 50), 10, 50, 50, 7 + EXP, batch=1000, inner=3
    )
    yield Case(
        "call M=N=10, Genred",
        lambda lib, rows: sums(lib, GAUSSIAN, 3, 10, 10, rows),
        20,
        10,
        10,
        7 + EXP,
        inner=100,
        absolute=True,
    )
    yield Case("call M=N=10, K @ b", lambda lib, _: lazy_product(lib), 40, 10, 10, 7 + EXP, inner=100, absolute=True)
