"""Functionals: prox against its definition, Moreau's identity, derivatives, batches, combinations, errors."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.functionals import L1, L2, L21, TV, Box, SquaredL2
from pullback.linops import Gradient

DIMS = (3, 4)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


WEIGHT = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FUNCTIONALS = {
    "L1": lambda: L1(DIMS),
    "L1 weighted": lambda: L1(DIMS, weight=WEIGHT),
    "L2": lambda: L2(DIMS),
    "L21": lambda: L21(DIMS, axis=0),
    "L21 last": lambda: L21(DIMS, axis=-1),
    "SquaredL2": lambda: SquaredL2(DIMS),
    "SquaredL2 centre": lambda: SquaredL2(DIMS, b=randn(*DIMS, seed=2)),
    "Box": lambda: Box(-0.5, 0.8, dims=DIMS),
    "Box tensor": lambda: Box(-randn(4, seed=3).abs(), 0.8, dims=DIMS),
    "TV": lambda: TV(DIMS, maxiter=400, rtol=1e-6),
    "TV anisotropic": lambda: TV(DIMS, isotropic=False, maxiter=400, rtol=1e-6),
    "scaled": lambda: 0.3 * L1(DIMS) / 2,
    "scaled by tensor": lambda: torch.tensor(0.7, dtype=torch.float64) * L21(DIMS),
    "translated": lambda: L2(DIMS).translate(randn(*DIMS, seed=4)),
    "box and L1": lambda: 0.4 * L1(DIMS) + Box(0, 1, dims=DIMS),
}
COMPLEX = [k for k in FUNCTIONALS if "ox" not in k]
KINDS = [(k, torch.float64) for k in FUNCTIONALS] + [(k, torch.complex128) for k in COMPLEX]
pairs = pytest.mark.parametrize(("name", "dtype"), KINDS)


@pairs
def test_prox_is_the_minimum(name, dtype):
    f, x, step = FUNCTIONALS[name](), randn(5, *DIMS, dtype=dtype), 0.6

    def objective(u):
        return f(u) + (u - x).abs().square().sum((-2, -1)) / (2 * step)

    u = f.prox(x, step)
    best = objective(u)
    slack = 1e-4 if "TV" in name else 1e-9
    assert best.shape == (5,)
    assert torch.isfinite(best).all()
    for seed in range(20):  # |u - v|^2 / (2 step) is what strong convexity promises above the minimum
        for size in (1e-3, 0.1, 1.0):
            d = size * randn(5, *DIMS, dtype=dtype, seed=seed)
            gain = objective(u + d) - best
            assert (gain >= d.abs().square().sum((-2, -1)) / (2 * step) - slack * size).all()


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
    for norm in (L1(), L2(), L21(axis=-1)):
        f = weight * norm
        total = f.conjugate_prox(x, step) + step * f.prox(x / step, 1 / step)
        torch.testing.assert_close(total, x, atol=1e-9 * max(1.0, step * weight), rtol=1e-9)


@pairs
def test_batch_is_loop_and_flat_is_shaped(name, dtype):
    f, x = FUNCTIONALS[name](), randn(2, 3, *DIMS, dtype=dtype)
    steps = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize(("name", "dtype"), [p for p in KINDS if "TV" not in p[0]])
def test_prox_gradcheck(name, dtype):
    f, x = FUNCTIONALS[name](), randn(2, *DIMS, dtype=dtype).requires_grad_()
    step = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f.prox, (x, step), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f.prox, (x, step))
    assert torch.autograd.gradcheck(f.conjugate_prox, (x, step))
    if "ox" not in name:
        assert torch.autograd.gradcheck(f, (x,))


def test_tv_prox_gradcheck():
    f, x = TV((3, 3), maxiter=15, rtol=0), randn(2, 3, 3).requires_grad_()
    step = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f.prox, (x, step))
    flat = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)  # gradient zero everywhere: no nan
    TV((4, 4)).prox(flat, step[0]).sum().backward()
    assert torch.isfinite(flat.grad).all()


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


@pytest.mark.parametrize("name", ["SquaredL2", "SquaredL2 centre"])
def test_grad_and_lipschitz(name):
    f = 0.7 * FUNCTIONALS[name]()
    x = randn(*DIMS).requires_grad_()
    (g,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(f.grad(x), g)
    assert f.lipschitz == 0.7
    composed = f @ Gradient((4,), kind="forward") if f.dims is None else (0.7 * SquaredL2()) @ Gradient(DIMS)
    (g,) = torch.autograd.grad(composed(x), x)
    torch.testing.assert_close(composed.grad(x), g)
    v = randn(*DIMS, seed=9)
    assert (composed.grad(x + v) - composed.grad(x)).norm() <= composed.lipschitz * v.norm()


def test_grad_of_a_norm_is_refused():
    with pytest.raises(NotDifferentiableError, match="not smooth"):
        L1().grad(randn(3))
    assert L1().lipschitz == float("inf")


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("dims", [(12,), (6, 7), (3, 4, 5)])
def test_tv_value_and_prox_against_smoothed_minimisation(dims, isotropic):
    x, step = randn(*dims), 0.4
    f = TV(dims, isotropic, maxiter=20000, rtol=1e-6)
    steps = [torch.diff(x, dim=k, append=x.narrow(k, -1, 1)) for k in range(len(dims))]
    magnitude = torch.stack(steps).norm(dim=0) if isotropic else torch.stack(steps).abs().sum(0)
    torch.testing.assert_close(f(x), magnitude.sum())
    u = x.clone().requires_grad_()
    eps = 1e-5
    optimizer = torch.optim.LBFGS(
        [u], max_iter=1500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        g = f.operator(u)
        size = (g.square().sum(0) + eps**2).sqrt() if isotropic else (g.square() + eps**2).sqrt()
        loss = step * size.sum() + (u - x).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    # The smoothed minimum is at most step * eps * (number of terms) higher, so within sqrt(2 * that) of the exact one.
    assert (f.prox(x, step) - u.detach()).norm() < 1e-6 * x.norm() + (2 * step * eps * x.numel() * len(dims)) ** 0.5


def test_tv_prox_error_is_below_rtol():
    x = randn(3, 8, 9)
    exact = TV((8, 9), maxiter=5000, rtol=1e-9).prox(x, 0.5)
    for rtol in (1e-1, 1e-2, 1e-3):
        u = TV((8, 9), maxiter=20000, rtol=rtol).prox(x, 0.5)
        assert ((u - exact).norm(dim=(1, 2)) <= rtol * x.norm(dim=(1, 2))).all()


def test_tv_structure():
    f = 0.3 * TV((4, 5))
    x = randn(2, 4, 5)
    assert f.operator.dimsd == (2, 4, 5)
    torch.testing.assert_close(f.outer(f.operator(x)), f(x))
    torch.testing.assert_close(TV((4, 5), sampling=2.0)(x), TV((4, 5))(x) / 2)
    shifted = TV((4, 5)).translate(x[0])
    torch.testing.assert_close(shifted.outer(shifted.operator(x)), shifted(x))


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
        (L1() + L2()).prox(torch.ones(3), 1.0)
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
