"""The linear solvers with a system that suits each, for the tests of their values and of their derivatives."""

import pytest
import torch

from pullback.linops import MatrixMult
from pullback.solvers import (
    bicgstab,
    cg,
    cgls,
    chebyshev,
    gmres,
    kaczmarz,
    landweber,
    lsmr,
    lsqr,
    minres,
    sirt,
)

DTYPES = [torch.float64, torch.complex128]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["real", "complex"])
N = 6


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def spd(m):
    return m.mH @ m + torch.eye(m.shape[-1], dtype=m.dtype)


def indefinite(m):
    signs = torch.tensor([1.0, -1.0] * m.shape[-1], dtype=torch.float64)[: m.shape[-1]]
    return m + m.mH + 6 * torch.diag(signs)


def general(m):
    return m + 6 * torch.eye(m.shape[-1], dtype=m.dtype)


def same(m):
    return m


class Case:
    """A solver with a matrix of the kind that it is made for, and options under which it converges to rounding."""

    def __init__(self, run, make, m=N, n=N, damped=True, real=False, slow=False, **options):
        self.run, self.make, self.shape, self.damped, self.real, self.slow = run, make, (m, n), damped, real, slow
        self.options = options

    def matrix(self, dtype=torch.float64, seed=0):
        m = randn(*self.shape, dtype=torch.float64 if self.real else dtype, seed=seed)
        return m.abs() if self.run is sirt else m

    def dense(self, matrix, y, damp=0.0):
        if self.square:
            return solved(matrix + damp * torch.eye(len(matrix), dtype=matrix.dtype), y)
        if self.run is sirt and self.shape[0] > self.shape[1]:
            weights = 1 / matrix.sum(-1)
            return solved(matrix.mH @ (weights[:, None] * matrix), (weights * y) @ matrix.conj())
        if self.run is sirt:
            weights = 1 / matrix.sum(0)
            return weights * (solved(matrix @ (weights[:, None] * matrix.mH), y) @ matrix.conj())
        if not self.shape[0] > self.shape[1]:
            return (torch.linalg.pinv(matrix) @ y.unsqueeze(-1)).squeeze(-1)
        normal = matrix.mH @ matrix + damp**2 * torch.eye(matrix.shape[1], dtype=matrix.dtype)
        return solved(normal, y @ matrix.conj())

    @property
    def square(self):
        return self.make is not same

    def solve(self, m, y, damp=None, **more):
        given = {} if damp is None else {"damp": damp}
        return self.run(MatrixMult(self.make(m)), y, **(self.options | given | more))


def solved(matrix, y):
    return torch.linalg.solve(matrix, y.unsqueeze(-1)).squeeze(-1)


TIGHT = {"rtol": 1e-13, "maxiter": 400}
LONG = {"rtol": 1e-13, "maxiter": 20000}
CASES = {
    "cg": Case(cg, spd, **TIGHT),
    "minres": Case(minres, indefinite, **TIGHT),
    "gmres": Case(gmres, general, **TIGHT),
    "gmres restarted": Case(gmres, general, restart=3, **TIGHT),
    "bicgstab": Case(bicgstab, general, **TIGHT),
    "chebyshev": Case(chebyshev, spd, interval=(0.9, 40.0), **TIGHT),
    "cgls": Case(cgls, same, 7, 4, **TIGHT),
    "lsqr": Case(lsqr, same, 7, 4, atol=1e-14, btol=1e-14, maxiter=400),
    "lsmr": Case(lsmr, same, 7, 4, **TIGHT),
    "lsmr wide": Case(lsmr, same, 4, 7, damped=False, **TIGHT),
    "chebyshev normal": Case(chebyshev, same, 7, 4, normal=True, interval=(0.3, 40.0), **LONG),
    "landweber": Case(landweber, same, 7, 4, damped=False, slow=True, **LONG),
    "kaczmarz": Case(kaczmarz, same, 4, 7, damped=False, **LONG),
    "kaczmarz random": Case(kaczmarz, same, 4, 7, damped=False, order="random", block=2, relax=0.9, **LONG),
    "sirt": Case(sirt, same, 7, 4, damped=False, real=True, slow=True, **LONG),
    "sirt wide": Case(sirt, same, 4, 7, damped=False, real=True, slow=True, **LONG),
}
every = pytest.mark.parametrize("name", list(CASES))
# One of each kind of equation and recursion, for what is costly; all of them in the long run.
SHORT = ("cg", "minres", "gmres", "bicgstab", "lsmr", "lsmr wide", "kaczmarz")
differentiated = pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "gmres restarted"]
)


def data(case, dtype, *batch, seed=1):
    return randn(*batch, case.shape[0], dtype=torch.float64 if case.real else dtype, seed=seed)
