"""Derivatives through linear solvers: every order, both modes, transforms, reports, hidden tensors."""

import warnings

import pytest
import torch
from linear_cases import CASES, DTYPES, SHORT, TIGHT, Case, N, data, differentiated, general, randn, spd
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.operator import LinearOperator
from pullback.linops import Diagonal, MatrixMult
from pullback.solvers import (
    CirculantPreconditioner,
    JacobiPreconditioner,
    NystromPreconditioner,
    Status,
    bicgstab,
    cg,
    gmres,
    kaczmarz,
    lsmr,
    minres,
)
from pullback.solvers.status import AccuracyWarning

# torch compiles its forward-mode formulas with torch.jit.script at their first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

# Derivatives -------------------------------------------------------------------------------------------------------


def sample(case, dtype):
    m, y = case.matrix(dtype), data(case, dtype)
    damp = torch.tensor(0.3, dtype=torch.float64) if case.damped else None
    return m, y, damp


BOTH = [
    pytest.param(n, d, id=f"{n}-{d}", marks=[] if n in SHORT and d == DTYPES[0] else pytest.mark.slow)
    for n in CASES
    for d in DTYPES
    if n != "gmres restarted"
]


@pytest.mark.parametrize(("name", "dtype"), BOTH)
def test_gradients_of_every_order_in_y_matrix_and_damp(name, dtype):
    case = CASES[name]
    m, y, damp = sample(case, dtype)
    inputs = [t.clone().requires_grad_() for t in (y, m, damp) if t is not None]

    def f(y, m, damp=None):
        return case.solve(m, y, damp).x

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs)


@differentiated
def test_start_has_the_derivative_that_it_should(name):
    case = CASES[name]
    m, y, damp = sample(case, torch.float64)
    x0 = randn(case.shape[1], seed=8).requires_grad_()
    x = lambda x0: case.solve(m, y, damp, x0=x0).x  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(x, x0)
    if case.shape[0] < case.shape[1]:
        assert jacobian.abs().max() > 0.1  # the solution nearest to x0
        assert gradcheck(x, (x0,))
    else:
        assert jacobian.abs().max() == 0


@differentiated
def test_unrolled_agrees_and_leaves_are_found(name):
    case = CASES[name]
    m, y, damp = sample(case, torch.float64)
    if case.slow:
        case = Case(case.run, case.make, *case.shape, **(case.options | {"rtol": 1e-10, "maxiter": 3000}))
        case.run = CASES[name].run

    def gradients(make, **k):
        leaves = [t.clone().requires_grad_() for t in (m, y, damp) if t is not None]
        x = case.solve(make(leaves[0]), leaves[1], *leaves[2:], **k).x
        return torch.autograd.grad(x.pow(3).sum(), leaves)

    for make in (torch.tanh, lambda t: t):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AccuracyWarning)
            a, b = gradients(make), gradients(make, unroll=True)
        if make is torch.tanh and name.startswith("chebyshev"):
            continue  # its interval is that of the other matrix
        for u, v in zip(a, b, strict=True):
            assert (u - v).abs().max() <= 1e-6 * (1 + v.abs().max())


UNROLLED = [
    n if n in ("cg", "gmres", "lsmr wide") else pytest.param(n, marks=pytest.mark.slow)
    for n in ("cg", "minres", "gmres", "bicgstab", "cgls", "lsmr", "lsmr wide")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_derivatives_of_few_iterations(name):
    case = CASES[name]
    m, y, damp = sample(case, torch.float64)
    inputs = [t.clone().requires_grad_() for t in (torch.stack([y, y.flip(0)]), m, damp) if t is not None]

    def f(y, m, damp=None):
        return case.solve(m, y, damp, maxiter=3, rtol=0.0, unroll=True).x

    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


@differentiated
def test_function_transforms(name):
    case = CASES[name]
    m, y, damp = sample(case, torch.float64)

    def f(y, m, damp=damp):
        return case.solve(m, y, damp).x

    def cost(y, m, damp=damp):
        return f(y, m, damp).pow(3).sum()

    def close(a, b):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-6 * (1 + b.abs().max())

    jacobian = torch.autograd.functional.jacobian
    in_y, in_m = jacobian(lambda y: f(y, m), y), jacobian(lambda m: f(y, m), m)
    for jac in (jacrev, jacfwd):
        close(jac(f)(y, m), in_y)
        close(jac(f, 1)(y, m), in_m)
    close(hessian(cost)(y, m), torch.autograd.functional.hessian(lambda y: cost(y, m), y))
    ys, ms = torch.stack([y, y.flip(0), 2 * y]), torch.stack([m, 1.1 * m, 1.2 * m])
    close(vmap(f, (0, None))(ys, m), torch.stack([f(v, m) for v in ys]))
    close(vmap(f, (None, 0))(y, ms), torch.stack([f(y, v) for v in ms]))
    close(vmap(jacrev(f), (0, None))(ys, m), in_y.expand(3, *in_y.shape))
    close(vmap(grad(cost, 1))(ys, ms), torch.stack([grad(cost, 1)(a, b) for a, b in zip(ys, ms, strict=True)]))
    close(vmap(hessian(cost))(ys, ms), torch.stack([hessian(cost)(a, b) for a, b in zip(ys, ms, strict=True)]))
    if damp is not None:
        ds = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
        close(
            vmap(grad(cost, 2), (0, None, 0))(ys, m, ds),
            torch.stack([grad(cost, 2)(a, m, d) for a, d in zip(ys, ds, strict=True)]),
        )


@pytest.mark.parametrize("name", ["cg", "gmres", "lsmr"])
def test_transforms_of_transforms(name):
    case = CASES[name]
    m, y, _ = sample(case, torch.float64)

    def cost(y, damp):
        return case.solve(m, y, damp).x.pow(3).sum()

    damp = torch.tensor(0.3, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda y: cost(y, damp), y)
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            torch.testing.assert_close(outer(inner(cost))(y, damp), expected, atol=1e-6, rtol=1e-6)
    batch = torch.stack([y, 2 * y, y - 1])
    damps = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    both = vmap(jacrev(cost, 1), (None, 0))(batch, damps)  # members with their own damp, within vmap
    torch.testing.assert_close(both, torch.stack([jacrev(cost, 1)(batch, d) for d in damps]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["cg", "cgls", *(pytest.param(n, marks=pytest.mark.slow) for n in ("minres", "gmres", "bicgstab", "lsmr"))]
)
def test_members_with_their_own_damp(name):
    case = CASES[name]
    m, y = case.matrix(), data(case, torch.float64, 3).requires_grad_()
    damp = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda y, d: case.solve(m, y, d).x, (y, damp), check_forward_ad=True)
    assert gradgradcheck(lambda y, d: case.solve(m, y, d).x, (y, damp))


def test_derivatives_do_not_depend_on_the_preconditioner():
    matrix, y = spd(randn(N, N)), randn(N, seed=1)

    def f(matrix, make):
        A = MatrixMult(matrix)
        return cg(A, y, preconditioner=None if make is None else make(A), **TIGHT).x

    expected = torch.autograd.functional.jacobian(lambda m: f(m, None), matrix)
    ms = torch.stack([matrix, 2 * matrix])
    for make in (
        JacobiPreconditioner,
        lambda A: NystromPreconditioner(A, 0.1, 3),
        lambda A: CirculantPreconditioner(A, 0.1),
        lambda A: lambda r: 2 * r,
        lambda A: Diagonal(1 / A.A.diagonal()),
    ):
        g = lambda m, make=make: f(m, make)  # noqa: E731
        for jacobian in (torch.autograd.functional.jacobian(g, matrix), jacrev(g)(matrix), jacfwd(g)(matrix)):
            torch.testing.assert_close(jacobian, expected, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(vmap(g)(ms), torch.stack([g(m) for m in ms]), atol=1e-9, rtol=1e-9)
    for solver in (minres, gmres, bicgstab):
        for dtype in DTYPES:
            A = spd(randn(N, N, dtype=dtype))
            P = JacobiPreconditioner(MatrixMult(A))
            b = randn(N, dtype=dtype).requires_grad_()
            assert gradcheck(lambda b, A=A, P=P, s=solver: s(MatrixMult(A), b, preconditioner=P, **TIGHT).x, (b,))


def test_preconditioner_serves_the_adjoint_solve():
    d = torch.logspace(0, 5, 80, dtype=torch.float64)
    A, y = MatrixMult(torch.diag(d)), randn(80).requires_grad_()
    for solver in (cg, minres, gmres, bicgstab):
        s = solver(A, y, preconditioner=JacobiPreconditioner(A), rtol=1e-10)
        s.x.sum().backward()
        assert s.adjoint[0].iterations <= 2


@pytest.mark.parametrize("name", ["cg", "minres", "gmres", "bicgstab", "lsmr", "cgls", "sirt"])
def test_adjoint_report(name):
    case = CASES[name]
    case = Case(case.run, case.make, *((30, 30) if case.square else (40, 20)), real=case.real)
    m = case.matrix()
    y = data(case, torch.float64).requires_grad_()
    options = {"rtol": 1e-4, "maxiter": 20000}
    for wanted in (1e-3, 1e-8):
        s = case.solve(m, y, adjoint_rtol=wanted, **options)
        assert s.adjoint == []
        s.x.sum().backward()
        (report,) = s.adjoint
        assert report.kind == "cotangent"
        assert report.iterations > 0
        assert report.residual <= wanted
        assert report.status.ok
    s = case.solve(m, y, adjoint_maxiter=3, adjoint_rtol=1e-12, **options)
    with pytest.warns(AccuracyWarning, match="after 3 iterations .* increase adjoint_maxiter or loosen adjoint_rtol"):
        s.x.sum().backward()
    assert s.adjoint[0].iterations == 3
    assert s.adjoint[0].status is Status.MAXITER


def test_unconverged_solution_warns_about_its_derivative():
    y = randn(20).requires_grad_()
    with pytest.warns(AccuracyWarning, match="those of the exact solution, not of this iterate; use unroll=True"):
        gmres(MatrixMult(general(randn(20, 20))), y, maxiter=2)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("solver", [cg, gmres, lsmr, kaczmarz])
def test_hidden_tensors_are_refused(solver, native):
    hidden = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)

    class Hiding(LinearOperator):
        _native = native

        def __init__(self):
            super().__init__(4)

        def _forward(self, x):
            return hidden * x

        def _adjoint(self, y):
            return hidden * y

    y = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="assign the tensor as an attribute"):
        solver(Hiding(), y)


def test_kaczmarz_without_an_equation():
    y = randn(7).requires_grad_()
    with pytest.raises(ArgumentError, match="no equation that could be differentiated; use unroll=True"):
        kaczmarz(MatrixMult(randn(7, 4)), y)
    x = lambda y: kaczmarz(MatrixMult(randn(7, 4)), y, maxiter=2, rtol=0.0, unroll=True).x  # noqa: E731
    assert gradcheck(x, (y,))
