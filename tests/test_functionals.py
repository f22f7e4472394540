"""Functionals: prox against its definition, Moreau's identity, derivatives, batches, combinations, errors."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.functionals import (
    ETP,
    L0,
    L1,
    L2,
    L21,
    MCP,
    SCAD,
    TV,
    AffineSet,
    Box,
    Geman,
    HalfSpace,
    Huber,
    Hyperplane,
    KullbackLeibler,
    L0Ball,
    L1Ball,
    L2Ball,
    LeastSquares,
    Lhalf,
    Linf,
    LinfBall,
    Log,
    Lp,
    Nuclear,
    NuclearBall,
    Quadratic,
    Rank,
    Simplex,
    SquaredL2,
    Stack,
    ZeroFunctional,
)
from pullback.linops import FFT2D, Diagonal, Gradient, MatrixMult, Restriction

DIMS = (3, 4)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT = rand(4, seed=1)
UNITARY = torch.linalg.qr(randn(12, 12, seed=6)).Q
CONVEX = {
    "L1": lambda: L1(DIMS),
    "L1 weighted": lambda: L1(DIMS, weight=WEIGHT),
    "L2": lambda: L2(DIMS),
    "L21": lambda: L21(DIMS, axis=0),
    "L21 last": lambda: L21(DIMS, axis=-1),
    "Linf": lambda: Linf(DIMS),
    "SquaredL2": lambda: SquaredL2(DIMS),
    "SquaredL2 centre": lambda: SquaredL2(DIMS, b=randn(*DIMS, seed=2)),
    "Huber": lambda: Huber(0.4, dims=DIMS),
    "Nuclear": lambda: Nuclear(DIMS),
    "Zero": lambda: ZeroFunctional(DIMS),
    "LeastSquares": lambda: LeastSquares(MatrixMult(randn(2, 3, seed=8), otherdims=4), randn(2, 4, seed=2), rtol=1e-12),
    "LeastSquares diagonal": lambda: LeastSquares(Diagonal(randn(*DIMS, seed=8))),
    "LeastSquares rows": lambda: LeastSquares(Restriction(DIMS, [2, 0], axis=0), 0.5),
    "Quadratic": lambda: Quadratic(MatrixMult(randn(5, 3, seed=8), 4).gram, randn(*DIMS, seed=2), 0.3, rtol=1e-12),
    "L1Ball": lambda: L1Ball(2.0, dims=DIMS),
    "L2Ball": lambda: L2Ball(0.7, dims=DIMS).translate(randn(*DIMS, seed=4)),
    "LinfBall": lambda: LinfBall(0.5, dims=DIMS),
    "NuclearBall": lambda: NuclearBall(1.5, dims=DIMS),
    "Hyperplane": lambda: Hyperplane(randn(*DIMS, seed=5), 0.3, dims=DIMS),
    "HalfSpace": lambda: HalfSpace(randn(4, seed=5), -0.3, dims=DIMS),
    "AffineSet": lambda: AffineSet(MatrixMult(randn(2, 3, seed=8), otherdims=4), randn(2, 4, seed=2), rtol=1e-12),
    "AffineSet rows": lambda: AffineSet(Restriction(DIMS, [2, 0], axis=0), randn(2, 4, seed=2)),
    "TV": lambda: TV(DIMS, maxiter=400, rtol=1e-6),
    "TV anisotropic": lambda: TV(DIMS, isotropic=False, maxiter=400, rtol=1e-6),
    "scaled": lambda: 0.3 * L1(DIMS) / 2,
    "scaled by tensor": lambda: torch.tensor(0.7, dtype=torch.float64) * L21(DIMS),
    "scaled Huber": lambda: 0.6 * Huber(0.4, dims=DIMS),
    "translated": lambda: L2(DIMS).translate(randn(*DIMS, seed=4)),
    "elastic net": lambda: 0.4 * L1(DIMS) + 0.7 * SquaredL2(DIMS, b=randn(*DIMS, seed=4)),
    "sparse groups": lambda: 0.2 * L1(DIMS) + 0.3 * L21(DIMS),
    "after FFT": lambda: 0.3 * L1() @ FFT2D(DIMS, norm="none"),
    "after rows": lambda: Linf() @ (2 * Restriction(DIMS, [2, 0], axis=0)),
    "stack": lambda: 0.8 * Stack([L1((1, 4)), Huber(0.3, dims=(2, 4))], axis=0),
    "Box": lambda: Box(-0.5, 0.8, dims=DIMS),
    "Box tensor": lambda: Box(-randn(4, seed=3).abs(), 0.8, dims=DIMS),
    "box and L1": lambda: 0.4 * L1(DIMS) + Box(0, 1, dims=DIMS),
    "box, L1 and groups": lambda: 0.2 * L1(DIMS) + Box(0, None, dims=DIMS) + 0.3 * L21(DIMS),
    "KullbackLeibler, no box": lambda: KullbackLeibler(DIMS, b=3 * rand(*DIMS, seed=3)),
    "KullbackLeibler background, no box": lambda: 0.7 * KullbackLeibler(DIMS, b=rand(4, seed=3), background=0.3),
    "Simplex, no box": lambda: Simplex(1.5, dims=DIMS),
    "Simplex axis, no box": lambda: Simplex(1.5, axis=0, dims=DIMS),
}
NONCONVEX = {
    "L0": lambda: 0.3 * L0(DIMS),
    "Lp": lambda: 0.3 * Lp(0.7, dims=DIMS),
    "Lhalf": lambda: 0.3 * Lhalf(DIMS),
    "Log": lambda: 0.5 * Log(0.3, dims=DIMS),
    "Geman": lambda: 0.6 * Geman(0.5, dims=DIMS),
    "ETP": lambda: 0.6 * ETP(2.0, dims=DIMS),
    "SCAD": lambda: SCAD(0.3, 3.0, dims=DIMS),
    "SCAD steep": lambda: 4.0 * SCAD(0.3, 2.2, dims=DIMS),
    "MCP": lambda: MCP(0.4, 2.0, dims=DIMS),
    "MCP steep": lambda: 5.0 * MCP(0.2, 2.0, dims=DIMS),
}
FUNCTIONALS = CONVEX | NONCONVEX | {"L0Ball": lambda: L0Ball(5, dims=DIMS), "Rank": lambda: 0.5 * Rank(DIMS)}
REAL_ONLY = [k for k in FUNCTIONALS if "ox" in k]  # complex numbers have no order


def kinds(names):
    """Each kind in both dtypes; what iterates is slow."""
    cases = [(k, torch.float64) for k in names] + [(k, torch.complex128) for k in names if k not in REAL_ONLY]
    return pytest.mark.parametrize(
        ("name", "dtype"),
        [pytest.param(k, dtype, marks=[pytest.mark.slow] if "TV" in k else []) for k, dtype in cases],
    )


pairs = kinds(FUNCTIONALS)


@kinds(CONVEX)
def test_prox_is_the_minimum(name, dtype):
    f, x, step = FUNCTIONALS[name](), randn(5, *DIMS, dtype=dtype), 0.6

    def objective(u):
        return f(u) + (u - x).abs().square().sum((-2, -1)) / (2 * step)

    u = f.prox(x, step)
    best = objective(u)
    slack = 1e-4 if "TV" in name else 1e-9
    assert f.convex
    assert f.has_prox
    assert best.shape == (5,)
    assert torch.isfinite(best).all()
    for seed in range(10):  # |u - v|^2 / (2 step) is what strong convexity promises above the minimum
        for size in (1e-3, 0.1, 1.0):
            away = u + size * randn(5, *DIMS, dtype=dtype, seed=seed)
            for v in (away, f.prox(away, 0.1)):  # the second lies in the domain of f
                room = (u - v).abs().square().sum((-2, -1)) / (2 * step)
                assert (objective(v) - best >= room - slack * (1 if "TV" in name else size)).all()


@pairs
def test_moreau(name, dtype):
    f, x = FUNCTIONALS[name](), 2 * randn(2, *DIMS, dtype=dtype)
    for step in (0.3, 2.0):
        rest = step * f.prox(x / step, 1 / step)
        torch.testing.assert_close(f.conjugate_prox(x, step) + rest, x, atol=1e-8, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3), st.floats(0, 1e3))
def test_moreau_of_norms_with_any_numbers(values, step, weight):
    x = torch.tensor(values, dtype=torch.float64)
    for norm in (L1(), L2(), L21(axis=-1), Linf()):
        f = weight * norm
        total = f.conjugate_prox(x, step) + step * f.prox(x / step, 1 / step)
        torch.testing.assert_close(total, x, atol=1e-9 * max(1.0, step * weight), rtol=1e-9)


@pairs
def test_batch_is_loop_and_flat_is_shaped(name, dtype):
    f, x = FUNCTIONALS[name](), randn(2, 3, *DIMS, dtype=dtype)
    steps = rand(2, 3)
    atol = 1e-5 if "TV" in name else 1e-9  # rounding may end TV at another iteration
    u, c = f.prox(x, steps), f.conjugate_prox(x, steps + 0.1)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(f(x)[i, j], f(x[i, j]))
            torch.testing.assert_close(u[i, j], f.prox(x[i, j], steps[i, j].item()), atol=atol, rtol=0)
            torch.testing.assert_close(c[i, j], f.conjugate_prox(x[i, j], steps[i, j].item() + 0.1), atol=atol, rtol=0)
    assert torch.equal(f.prox(x.flatten(-2), 0.5), f.prox(x, 0.5).flatten(-2))
    assert torch.equal(f(x.flatten(-2)), f(x))


@pairs
def test_prox_leaves_x_alone(name, dtype):
    f, x = FUNCTIONALS[name](), randn(*DIMS, dtype=dtype)
    before = x.clone()
    u = f.prox(x, 0.1)
    f.conjugate_prox(x, 0.1)
    assert torch.equal(x, before)
    assert u.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@kinds([k for k in FUNCTIONALS if "TV" not in k])
def test_prox_gradcheck(name, dtype):
    f, x = FUNCTIONALS[name](), randn(1, *DIMS, dtype=dtype).requires_grad_()
    step = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    check = {"fast_mode": True}
    assert torch.autograd.gradcheck(f.prox, (x, step), check_forward_ad=True, **check)
    assert torch.autograd.gradgradcheck(f.prox, (x, step), **check)
    assert torch.autograd.gradcheck(f.conjugate_prox, (x, step), **check)
    inside = f.prox(x, step).detach().requires_grad_()
    if name not in REAL_ONLY and f(x).isfinite() and "Rank" not in name:
        assert torch.autograd.gradcheck(f, (x,), **check)
    assert f(inside).isfinite()


@kinds([k for k in FUNCTIONALS if k not in ("Rank", "L0")])
def test_gradient_is_that_of_autograd(name, dtype):
    f, x = FUNCTIONALS[name](), (3 * rand(2, *DIMS)).to(dtype).requires_grad_()
    try:
        g = f.grad(x)
    except NotDifferentiableError:
        if "stack" not in name:
            assert f.lipschitz == float("inf")
        return
    torch.testing.assert_close(g, torch.autograd.grad(f(x).sum(), x)[0])
    v = rand(2, *DIMS, seed=9).to(dtype)
    change = (f.grad(x + v) - g).detach()
    assert (change.norm(dim=(1, 2)) <= f.lipschitz * v.norm(dim=(1, 2)) * (1 + 1e-9)).all()
    growth = (change * v.conj()).real.sum((1, 2))
    assert (growth >= (f.strong_convexity - 1e-9) * v.norm(dim=(1, 2)) ** 2).all()


# Fenchel: f(v) + f^*(u) >= Re<u, v>, with equality where u = (x - v) / step at v = prox.
@kinds([k for k in CONVEX if "TV" not in k and "AffineSet" not in k and "Quadratic" not in k and "LeastS" not in k])
def test_conjugate(name, dtype):
    f, x, step = FUNCTIONALS[name](), randn(4, *DIMS, dtype=dtype), 0.7
    if name in ("box and L1", "box, L1 and groups", "sparse groups"):
        with pytest.raises(ArgumentError, match="is not known in closed form"):
            f.conjugate(x)
        return
    v = f.prox(x, step)
    u = (x - v) / step
    pairing = (u.conj() * v).real.sum((1, 2))
    torch.testing.assert_close(f.conjugate(u), pairing - f(v), atol=1e-9, rtol=1e-9)
    assert f.conjugate(u).shape == (4,)
    for seed in range(5):
        w = f.prox(2 * randn(4, *DIMS, dtype=dtype, seed=seed), 0.3)
        assert (f(w) + f.conjugate(u) - (u.conj() * w).real.sum((1, 2)) >= -1e-9).all()
    if f.operator is None:
        for scale in (0.5, 2.0):
            scaled = (scale * f).conjugate(scale * u)
            torch.testing.assert_close(scaled, scale * f.conjugate(u), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "outside"), [("L1", 1.1), ("L2", 1.1), ("L21", 1.1), ("Linf", 1.1), ("Nuclear", 1.1)])
def test_conjugate_of_a_norm_is_the_dual_ball(name, outside):
    f, x = FUNCTIONALS[name](), randn(3, *DIMS)
    u = f.conjugate_prox(5 * x, 1.0)  # on the boundary
    assert (f.conjugate(u) == 0).all()
    assert (f.conjugate(outside * u) == float("inf")).all()
    assert (f.conjugate(u.float()) == 0).all()


@pytest.mark.parametrize("name", list(NONCONVEX))
def test_nonconvex_prox_finds_the_global_minimum(name):
    f = NONCONVEX[name]()
    assert not f.convex
    grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    penalty = torch.stack([f(torch.full(DIMS, g)) / 12 for g in (0.0, 0.5)])  # phi on a constant member
    torch.testing.assert_close(penalty[0], torch.zeros_like(penalty[0]))
    phi = f(grid.reshape(-1, 1, 1).expand(-1, *DIMS)) / 12
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(DIMS)
    for step in (1e-3, 0.2, 1.0, 3.0):
        u = f.prox(x, step)
        for at, found in zip(x.flatten(), u.flatten(), strict=True):
            least = (phi + (grid - at) ** 2 / (2 * step)).min()
            reached = f(found.expand(DIMS)) / 12 + (found - at) ** 2 / (2 * step)
            assert reached <= least + 1e-12
    assert torch.equal(f.prox(x, 0.0), x)
    z = x * torch.exp(torch.tensor(0.7j))
    torch.testing.assert_close(f.prox(z, 0.5), f.prox(x, 0.5) * torch.exp(torch.tensor(0.7j)))


def test_weights_get_gradients():
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    w = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    x = randn(*DIMS)
    assert torch.autograd.gradcheck(lambda c, w: (c * L1(weight=w)).prox(x, 0.7), (c, w))
    assert torch.autograd.gradcheck(lambda c: (c * L21())(x), (c,))
    b = randn(*DIMS).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: SquaredL2(b=b).prox(x, 0.7), (b,))
    lower = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda lower: Box(lower, 1.0).prox(x, 0.7), (lower,))


def test_grad_and_lipschitz():
    f = 0.7 * SquaredL2(DIMS)
    x = randn(*DIMS).requires_grad_()
    assert f.lipschitz == f.strong_convexity == 0.7
    composed = f @ Gradient((4,), kind="forward") if f.dims is None else (0.7 * SquaredL2()) @ Gradient(DIMS)
    (g,) = torch.autograd.grad(composed(x), x)
    torch.testing.assert_close(composed.grad(x), g)
    v = randn(*DIMS, seed=9)
    assert (composed.grad(x + v) - composed.grad(x)).norm() <= composed.lipschitz * v.norm()


def test_grad_of_a_norm_is_refused():
    with pytest.raises(NotDifferentiableError, match="not smooth"):
        L1().grad(randn(3))
    assert L1().lipschitz == float("inf")


def test_values():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    assert L1()(x) == 7
    assert L2()(x) == 5
    assert L21(axis=-1)(x) == 5
    assert L21(axis=0)(x) == 7
    assert SquaredL2()(x) == 12.5
    assert L1(2)(x).tolist() == [7, 0]
    assert L2(2)(torch.zeros(2)) == 0
    assert Box(-4, 3, dims=2)(x).tolist() == [0, 0]
    assert Box(0, None, dims=2)(x).tolist() == [float("inf"), 0]
    assert L1().prox(x, 3.5).tolist() == [[0, -0.5], [0, 0]]
    assert torch.equal(L1().prox(torch.tensor([3 + 4j]), 1.0), torch.tensor([3 + 4j]) * 0.8)
    assert (L1() + SquaredL2())(x) == 19.5


def test_combinations():
    f = 2 * (0.5 * L1())
    assert repr(f) == "L1()"
    assert repr(3 * (L1() + Box(0, None))) == "3 * L1() + Box(0, None)"
    assert (np.float64(0.5) * L1())(torch.ones(2)) == 1.0
    assert len((0.1 * TV((4, 4)) + L1() + Box(0, 1)).terms) == 3
    composed = L1() @ Gradient((4, 5))
    assert composed.dims == (4, 5)
    with pytest.raises(ArgumentError, match=r"use pullback.pdhg or pullback.solve"):
        composed.prox(torch.ones(4, 5), 1.0)
    with pytest.raises(ArgumentError, match="no prox in closed form"):
        (L1() + Linf()).prox(torch.ones(3), 1.0)
    zero = 0.0 * L21(axis=-1)
    x = randn(3)
    torch.testing.assert_close(zero.prox(x, 1.0), x)
    assert (zero.conjugate_prox(x, 1.0) == 0).all()


@pytest.mark.parametrize("name", list(FUNCTIONALS))
def test_copies_and_dtypes(name):
    f, x = FUNCTIONALS[name](), randn(*DIMS)
    for g in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert torch.equal(f.prox(x, 0.5), g.prox(x, 0.5))
    assert f(x.float()).dtype == torch.float32
    assert f.prox(x.float(), 0.5).dtype == torch.float32
    assert f.conjugate_prox(x.float(), torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32
    u = f.prox(x.numpy(), 0.5)
    assert isinstance(u, np.ndarray)
    np.testing.assert_array_equal(u, f.prox(x, 0.5).numpy())
    assert isinstance(f(x.numpy()), np.ndarray)


def test_bad_input():
    with pytest.raises(ShapeError, match=r"L1: x must have shape \(..., 3, 4\) or \(..., 12\); got \(4, 3\)"):
        L1(DIMS)(torch.ones(4, 3))
    with pytest.raises(DtypeError, match=r"use x.float\(\)"):
        L1()(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="step must be a number >= 0"):
        L1().prox(torch.ones(3), -1.0)
    with pytest.raises(ShapeError, match="give L1 its dims"):
        L1().prox(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ArgumentError, match="real numbers >= 0 only; got -1"):
        -1 * L1()
    with pytest.raises(DtypeError, match="complex numbers have no order"):
        Box(0, 1).prox(torch.ones(2, dtype=torch.complex64), 1.0)
    with pytest.raises(ArgumentError, match="lower must not exceed upper"):
        Box(2, 1)
    with pytest.raises(ShapeError, match="cannot add functionals"):
        L1(3) + L1(4)
    with pytest.raises(ArgumentError, match="maxiter must be at least 1"):
        TV(DIMS, maxiter=0)
    with pytest.raises(ArgumentError, match="axis must lie in"):
        L21(DIMS, axis=2)
    with pytest.raises(ShapeError, match="cannot compose"):
        L1(DIMS) @ Gradient(DIMS)
