"""Random projections and Toeplitz matrices: what the matrix is, without ever storing it."""

import math
import resource

import pytest
import scipy.linalg
import torch

import pullback as pb
from pullback.core.errors import ArgumentError, ShapeError
from pullback.linops import Convolve1D, RandomProjection, Toeplitz, distortion, projection_dimension
from pullback.linops import random as module

KINDS = ["gaussian", "sparse", "srht", "countsketch"]
kinds = pytest.mark.parametrize("kind", KINDS)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@kinds
def test_adjoint_is_exact_and_the_seed_decides(kind):
    A = RandomProjection((7, 30), 101, kind=kind, seed=3)
    m = A.todense()
    torch.testing.assert_close(A.H.todense(), m.T, atol=0, rtol=0)
    assert (RandomProjection((7, 30), 101, kind=kind, seed=3).todense() == m).all()
    assert (RandomProjection((7, 30), 101, kind=kind, seed=4).todense() != m).any()
    x = randn(2, 7, 30, dtype=torch.complex128)
    torch.testing.assert_close(A(x), (x.flatten(1) @ m.T.to(x.dtype)))
    assert not list(A.buffers())
    assert not list(A.parameters())


def test_gaussian_numbers_do_not_depend_on_the_chunks(monkeypatch):
    A = RandomProjection(333, 57)
    m = A.todense()
    for chunk in (64, 333, 1000, 1 << 22):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        torch.testing.assert_close(A.todense(), m, atol=1e-7, rtol=0)
        torch.testing.assert_close(A.H.todense(), m.T, atol=1e-7, rtol=0)


@pytest.mark.slow
@kinds
def test_lengths_are_kept_on_average(kind):
    x = torch.tensor([1.0, -2, 3] + [0.0] * 30 + [0.1] * 17, dtype=torch.float64)
    squares = torch.stack([RandomProjection(50, 20, kind=kind, seed=s)(x).square().sum() for s in range(600)])
    mean, error = squares.mean() / x.square().sum(), squares.std() / x.square().sum() / 600**0.5
    assert abs(mean - 1) < 4 * error
    assert error < 0.025


def test_gaussian_statistics():
    m = RandomProjection(1000, 1000, seed=11).todense() * 1000**0.5
    n = m.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((m**power).mean() - moment) < 4.5 * math.sqrt(variance / n)
    for rows in (m, m.T):
        rest = torch.corrcoef(rows) - torch.eye(1000, dtype=m.dtype)
        assert rest.abs().max() < 6.5 / 1000**0.5  # of 5e5 pairs
        shifted = (rows[:-1, :-1] * rows[1:, 1:]).mean()
        assert abs(shifted) < 4.5 / 1000
    assert abs(torch.linalg.svdvals(m)[0] / 1000**0.5 - 2) < 0.05  # Marchenko-Pastur


def test_structure_of_the_others():
    m = RandomProjection(60, 31, kind="sparse", nonzeros=4).todense()
    assert ((m != 0).sum(0) == 4).all()
    torch.testing.assert_close(m[m != 0].abs(), torch.full((240,), 0.5, dtype=m.dtype))
    m = RandomProjection(60, 31, kind="countsketch").todense()
    assert ((m != 0).sum(0) == 1).all()
    assert (m != 0).any(1).sum() > 20  # spread over the rows
    A = RandomProjection(64, 64, kind="srht")
    torch.testing.assert_close(A.todense() @ A.todense().T, torch.eye(64, dtype=torch.float64))
    A = RandomProjection(50, 40, kind="srht")
    assert torch.linalg.matrix_norm(A.todense(), 2) <= A.norm_bound() <= math.sqrt(64 / 40) * 1.001
    h = torch.from_numpy(scipy.linalg.hadamard(256)).double()
    torch.testing.assert_close(module._walsh(torch.eye(256, dtype=torch.float64), 8), h)


@pytest.mark.parametrize("log2", [1, 2, 3, 7, 12])
def test_permutations_are_permutations(log2):
    orders = torch.stack([module._permuted(seed, 1 << log2, log2, torch.device("cpu")) for seed in range(300)])
    assert (orders.sort(1).values == torch.arange(1 << log2)).all()
    first = orders[:, 0].double().mean() / ((1 << log2) - 1)
    assert abs(first - 0.5) < 0.12


@kinds
def test_distances_survive(kind):
    points = randn(60, 4096)
    m = projection_dimension(60, 0.3)
    assert m == math.ceil(4 * math.log(60) / (0.3**2 / 2 - 0.3**3 / 3))
    d = distortion(RandomProjection(4096, m, kind=kind), points)
    assert d.shape == (60 * 59 // 2,)
    assert ((1 + d) ** 2 - 1).abs().max() < 0.3
    x, A = points[:2], RandomProjection(4096, m, kind=kind)
    torch.testing.assert_close(1 + d[0], A(x[0] - x[1]).norm() / (x[0] - x[1]).norm())


@kinds
def test_derivatives_and_precision(kind):
    A = RandomProjection(9, 6, kind=kind)
    x = randn(9).requires_grad_()
    assert torch.autograd.gradcheck(A, (x,), check_forward_ad=True)
    torch.testing.assert_close(A(x.float()).double(), A(x), atol=1e-6, rtol=1e-5)
    assert A(x.half()).dtype == torch.float16


@pytest.mark.parametrize("kind", ["sparse", "srht", "countsketch"])
def test_a_hundred_thousand_squared_in_milliseconds(kind):
    A = RandomProjection(100_000, 100_000, kind=kind)  # 40 GB as a matrix
    x = torch.randn(100_000)
    y = A(x)
    torch.testing.assert_close((A.H(y) @ x).item(), y.square().sum().item(), rtol=1e-4, atol=0)
    assert abs(y.norm() / x.norm() - 1) < 0.02


@pytest.mark.slow
def test_large_gaussian_in_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    A = RandomProjection(100_000, 3_000)  # 1.2 GB as a matrix; 1e5 x 1e5 takes the same memory
    x = torch.randn(100_000)
    y = A(x)
    torch.testing.assert_close((A.H(y) @ x).item(), y.square().sum().item(), rtol=1e-4, atol=0)
    assert abs(y.norm() / x.norm() - 1) < 0.08
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: RandomProjection(5, 3, kind="dct"), ArgumentError, "gaussian, sparse, srht, countsketch; got 'dct'"),
        (lambda: RandomProjection(5, 3, seed=-1), ArgumentError, r"seed must be an int in \[0, 2\^64\); got -1"),
        (lambda: RandomProjection(5, 9, kind="srht"), ArgumentError, "needs m <= 8, .* got n = 5, m = 9; use kind="),
        (
            lambda: RandomProjection(5, 3, kind="sparse", nonzeros=0),
            ArgumentError,
            "nonzeros must be an int >= 1",
        ),
        (lambda: RandomProjection(2**31, 3), ArgumentError, r"must be below 2\^31"),
        (lambda: distortion(RandomProjection(5, 3), torch.ones(1, 5)), ShapeError, r"shape \(p, 5\) with p >= 2"),
        (lambda: distortion(RandomProjection(5, 3), torch.ones(2, 5)), ArgumentError, "points must be distinct"),
        (lambda: distortion(torch.eye(5), torch.ones(2, 5)), ArgumentError, "must be a pullback.LinearOperator"),
        (lambda: projection_dimension(1, 0.1), ArgumentError, r"n_points must be >= 2 and epsilon in \(0, 1\)"),
        (lambda: Toeplitz(torch.ones(2, 2)), ArgumentError, r"c must have one axis and be non-empty; got \(2, 2\)"),
        (lambda: Toeplitz(torch.ones(2), torch.ones(0)), ArgumentError, "r must have one axis and be non-empty"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


# Toeplitz ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (1, 6), (200, 200), (150, 40), (40, 150)], ids=str)
def test_toeplitz_equals_scipy(dtype, shape):
    c, r = randn(shape[0], dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
    A, m = Toeplitz(c, r), torch.from_numpy(scipy.linalg.toeplitz(c.numpy(), r.numpy()))
    torch.testing.assert_close(A.todense(), m)
    torch.testing.assert_close(A.H.todense(), m.mH.contiguous())
    assert torch.linalg.matrix_norm(m, 2) <= A.norm_bound()
    x = randn(2, shape[1], dtype=torch.complex128, seed=2)
    torch.testing.assert_close(A(x), x @ m.T.to(x.dtype))


@pytest.mark.parametrize("n", [6, 140])
def test_toeplitz_without_row_is_hermitian_and_learns(n):
    c = randn(n, dtype=torch.complex128)
    m = Toeplitz(c).todense()
    torch.testing.assert_close(m, torch.from_numpy(scipy.linalg.toeplitz(c.numpy())))
    c, r, x = randn(n).requires_grad_(), randn(n, seed=1).requires_grad_(), randn(n, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r, x: Toeplitz(c, r)(x), (c, r, x), fast_mode=True, check_forward_ad=True)
    (g,) = torch.autograd.grad(Toeplitz(c, r)(x).sum(), r)
    assert g[0] == 0  # r[0] is not used


def test_toeplitz_and_convolution_agree():
    h = randn(9)
    A = Convolve1D(200, h, offset=4)
    c, r = torch.zeros(2, 200, dtype=torch.float64)
    c[:5], r[:5] = h[4:], h[:5].flip(0)
    torch.testing.assert_close(Toeplitz(c, r).todense(), A.todense())
    assert isinstance(pb.lsqr(Toeplitz(c, r), randn(200)).x, torch.Tensor)
