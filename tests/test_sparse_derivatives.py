"""Sparse Jacobians and Hessians: patterns, colourings, values."""

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F

from pullback.autodiff.sparse.colouring import colour_columns, colour_symmetric, readable
from pullback.autodiff.sparse.evaluate import sparse_hessian, sparse_jacobian
from pullback.autodiff.sparse.pattern import sparsity_pattern
from pullback.autodiff.sparse.plan import SparsePlan
from pullback.autodiff.sparse.probe import probe
from pullback.autodiff.sparse.sets import from_pairs
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.linops.basic import Diagonal
from pullback.linops.derivative import FirstDerivative
from pullback.linops.matrix import MatrixMult

W = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BAND = torch.diag(torch.ones(12)).double() + torch.diag(torch.ones(11), 1).double()
WEIGHT = torch.randn(2, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
HOLES = torch.tensor([[[1.0, 0.0, 2.0]]], dtype=torch.float64)


def tridiagonal(x):
    p = F.pad(x, (1, 1))
    return x**2 * 3 + x * p[:-2] - torch.sin(p[2:])


def in_place(x):
    y = torch.zeros_like(x)
    y[1:-1] = x[2:] * x[:-2]
    y[0] += x[5]
    y.mul_(2)
    return y


def written_views(x):
    y = x.clone()
    y.view(3, 4)[1].add_(x[:4] ** 2)
    y.view(3, 4).t()[3] = 0.0
    return y


def scattered(x):
    index = torch.arange(12).flip(0) // 2
    return torch.zeros(8, dtype=x.dtype).index_add(0, index, x**2)


def put(x):
    y = torch.zeros(12, dtype=x.dtype)
    y.index_put_((torch.tensor([3, 3, 4]),), x[:3].sin(), accumulate=True)
    return y


def custom(x):
    return Cube.apply(x)[::2]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] ** 2 * t


def filled(x):
    y = torch.empty(4, dtype=x.dtype).fill_(x[2])
    z = torch.full_like(x, 3.0)
    z[:4].copy_(y)
    z[6:8].zero_()
    return torch.mul(z, x, out=torch.empty(12, dtype=x.dtype))


# Functions of 12 numbers whose traced pattern is exactly where the Jacobian has entries.
EXACT = {
    "tridiagonal": tridiagonal,
    "difference": lambda x: torch.diff(x) ** 2,
    "constant rows": lambda x: torch.cat([x[:2], torch.ones(3).double(), x[4:6] * 2]),
    "in place": in_place,
    "written views": written_views,
    "scattered": scattered,
    "index_put": put,
    "roll, flip": lambda x: torch.roll(x, 2) * x.flip(0),
    "gather": lambda x: x[torch.tensor([3, 1, 3, 7])] * x[:4],
    "Boolean mask": lambda x: x[torch.arange(12) % 3 == 0].exp(),
    "transpose": lambda x: x.reshape(3, 4).t().sin().reshape(-1),
    "sum of rows": lambda x: x.reshape(3, 4).pow(2).sum(1),
    "mean, all": lambda x: x.reshape(3, 4).exp().mean((0, 1)) + x,
    "softmax": lambda x: torch.softmax(x.reshape(3, 4), 1),
    "matrix": lambda x: W @ x,
    "matrix with zeros": lambda x: BAND @ x.sin(),
    "matrix from the right": lambda x: x.reshape(2, 6)[:, :5] @ W[:, :4],
    "sparse matrix": lambda x: BAND.to_sparse_coo() @ x.sin(),
    "outer": lambda x: torch.outer(x[:3], x[3:7]),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x[:6].reshape(2, 3), x[6:].reshape(3, 2)),
    "convolution": lambda x: F.conv1d(x.reshape(1, 1, -1), WEIGHT, stride=2, padding=1, dilation=2),
    "convolution with holes": lambda x: F.conv1d(x.reshape(1, 1, -1), HOLES),
    "convolution 2d": lambda x: F.conv2d(x.reshape(1, 2, 2, 3), torch.ones(2, 1, 2, 2).double(), groups=2),
    "stack": lambda x: torch.stack([x[1:], x[:-1]], 1),
    "repeat": lambda x: x[:3].repeat(2, 2) * 2,
    "expand": lambda x: x[:3, None].expand(3, 4) * x[3:7],
    "unfold": lambda x: x.unfold(0, 3, 2).sum(1),
    "reflection": lambda x: F.pad(x.reshape(1, -1), (2, 1), mode="reflect"),
    "tril": lambda x: torch.tril(x[:9].reshape(3, 3)),
    "complex": lambda x: torch.view_as_real(torch.complex(x[:6], x[6:]) * (1 + 2j)),
    "transposed convolution": lambda x: F.conv_transpose1d(x.reshape(1, 1, -1), WEIGHT.transpose(0, 1)),
    "interpolate": lambda x: F.interpolate(x.reshape(1, 1, -1), size=7, mode="linear"),
    "pooling": lambda x: F.avg_pool2d(x.reshape(1, 1, 3, 4), 2, 1),
    "squared error": lambda x: F.mse_loss(x, x.flip(0) * 2, reduction="none"),
    "maximum": lambda x: torch.maximum(x[:6], x[6:]) + torch.minimum(x[:6], x[6:]),
    "custom Function": custom,
    "number": lambda x: x[2:5].prod(),
    "operator": lambda x: FirstDerivative(12)(x.sin()),
    "operator of a batch": lambda x: FirstDerivative((3,))(x.reshape(4, 3) ** 2),
    "adjoint": lambda x: FirstDerivative(12).H(x),
}
WIDER = {  # right, but the traced pattern is wider
    "relu": lambda x: torch.relu(x) + F.leaky_relu(x.flip(0)),
    "where": lambda x: torch.where(torch.arange(12) > 5, x, x.flip(0)),
    "cumsum": lambda x: torch.cumsum(x, 0),
    "gradient inside": lambda x: torch.func.grad(lambda v: (v[1:] * v[:-1] ** 2).sum())(x),
    "vmap inside": lambda x: torch.func.vmap(lambda v: v * v.flip(0))(x.reshape(3, 4)),
    "embedding": lambda x: F.embedding(torch.tensor([1, 2, 1]), x.reshape(4, 3)),
    "dropout": lambda x: F.dropout(x, 0.0, training=True) * 2,
    "foreach": lambda x: torch.stack(torch._foreach_mul([x[:6], x[6:]], 2.0)),
    "sort": lambda x: torch.sort(x.reshape(3, 4), -1).values,
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "max": lambda x: x.reshape(3, 4).max(1).values,
    "norm": lambda x: torch.linalg.vector_norm(x.reshape(3, 4), dim=1),
    "logsumexp": lambda x: torch.logsumexp(x.reshape(3, 4), 0),
    "zero times": lambda x: x * torch.tensor([0.0, 1.0]).repeat(6).double(),
    "inverse": lambda x: torch.linalg.inv(x[:9].reshape(3, 3) + 3 * torch.eye(3).double()),
    "mean squared error": lambda x: F.mse_loss(x, x.flip(0) * 2),
    "sampling": lambda x: F.grid_sample(x.reshape(1, 1, 3, 4), torch.zeros(1, 2, 2, 2).double(), align_corners=True),
    "padded": lambda x: F.pad(x.reshape(1, 3, 4), (1, 1, 1, 1), mode="replicate") ** 2,
    "layer norm": lambda x: F.layer_norm(x.reshape(3, 4), (4,)),
}


@pytest.mark.parametrize("name", [*EXACT, *WIDER])
def test_jacobian_and_its_pattern(name):
    f = (EXACT | WIDER)[name]
    x = torch.randn(12, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(f, x).reshape(-1, 12)
    dense = sparsity_pattern(f, x).todense()
    assert not (~dense & (want != 0)).any(), "the pattern lacks an entry"
    if name in EXACT:
        assert torch.equal(dense, want != 0)
    for mode in (None, "reverse"):
        torch.testing.assert_close(sparse_jacobian(f, x, mode=mode).to_dense(), want, atol=1e-13, rtol=1e-13)


ENERGIES = {
    "chain": lambda x: (x[1:] * x[:-1] ** 2).sum() + x.exp().sum(),
    "arrow": lambda x: (x[0] * x).sum() + (x**3).sum(),
    "linear": lambda x: x.sum(),
    "squares": lambda x: (x**2).sum(),
    "square of the sum": lambda x: x.sum() ** 2,
    "blocks": lambda x: x.reshape(3, 4).prod(1).sum(),
    "grid": lambda x: sum((torch.diff(x.reshape(3, 4), dim=d) ** 4).sum() for d in (0, 1)),
    "matrix": lambda x: ((BAND @ x) ** 4).sum(),
    "written": lambda x: written_views(x).pow(3).sum(),
    "scattered": lambda x: scattered(x).pow(2).sum(),
    "softmax": lambda x: torch.logsumexp(x.reshape(3, 4), 1).sum(),
    "operator": lambda x: (FirstDerivative(12)(x) ** 4).sum(),
    "constant up to rounding": lambda x: F.normalize(x.reshape(3, 4)).pow(2).sum(),
    "convolution": lambda x: (F.conv1d(x.reshape(1, 1, -1), WEIGHT) ** 3).sum(),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_hessian(name):
    f = ENERGIES[name]
    x = torch.randn(12, dtype=torch.float64)
    want = torch.autograd.functional.hessian(f, x)
    got = sparse_hessian(f, x)
    assert got.layout == torch.sparse_csr and got.shape == (12, 12)
    torch.testing.assert_close(got.to_dense(), want, atol=1e-12, rtol=1e-12)
    pattern = sparsity_pattern(f, x, hessian=True).todense()
    assert not (~pattern & (want != 0)).any()
    if name in ("chain", "arrow", "linear", "squares", "grid", "operator", "convolution"):
        assert torch.equal(pattern, want != 0)


def test_writes_into_other_memory():
    x = torch.randn(12, dtype=torch.float64)
    want = torch.eye(12).bool()
    want[:4, 2] = True
    assert torch.equal(sparsity_pattern(filled, x).todense(), want)


def test_numbers_of_colours():
    x = torch.randn(300, dtype=torch.float64)
    assert SparsePlan.jacobian(sparsity_pattern(tridiagonal, x)).n_colours == 3
    assert SparsePlan.hessian(sparsity_pattern(ENERGIES["chain"], x, hessian=True)).n_colours == 3
    assert SparsePlan.hessian(sparsity_pattern(ENERGIES["arrow"], x, hessian=True)).n_colours == 2
    assert SparsePlan.hessian(sparsity_pattern(ENERGIES["squares"], x, hessian=True)).n_colours == 1
    wide = SparsePlan.jacobian(torch.cat([torch.ones(1, 50), torch.eye(50)]))
    assert (wide.mode, wide.n_colours) == ("reverse", 2)  # the dense row costs one product, not 50
    tall = SparsePlan.jacobian(torch.cat([torch.ones(1, 50), torch.eye(50)]).T)
    assert (tall.mode, tall.n_colours) == ("forward", 2)
    assert SparsePlan.jacobian(torch.ones(4, 7)).mode == "reverse"
    assert SparsePlan.jacobian(torch.zeros(4, 7)).n_colours == 0


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4, 1.0])
def test_colourings_of_random_patterns_are_valid(density):
    generator = np.random.default_rng(3)
    for n in (1, 2, 7, 30, 61):
        dense = generator.random((n + 3, n)) < density
        rows, columns = np.nonzero(dense)
        colours = colour_columns(from_pairs(rows, columns, n + 3, n))
        for c in range(colours.max(initial=-1) + 1):
            assert (dense[:, colours == c].sum(1) <= 1).all()
        assert ((colours >= 0) == dense.any(0)).all()
        dense = generator.random((n, n)) < density
        dense |= dense.T
        pattern = from_pairs(*np.nonzero(dense), n, n)
        colours = colour_symmetric(pattern)
        assert readable(pattern, colours).all()
        assert colours.max(initial=-1) <= colour_columns(pattern).max(initial=-1)


def test_given_patterns_of_every_kind():
    x = torch.randn(12, dtype=torch.float64)
    want = torch.func.jacrev(tridiagonal)(x)
    band = torch.ones(12, 12).tril(1).triu(-1)
    kinds = [band, band.bool(), band.numpy(), band.to_sparse_csr(), band.bool().to_sparse_coo(), band.tolist()]
    kinds += [scipy.sparse.csr_array(band.numpy()), MatrixMult(band.double()), sparsity_pattern(tridiagonal, x)]
    kinds += [SparsePlan.jacobian(band), torch.ones(12, 12)]
    for pattern in kinds:
        torch.testing.assert_close(sparse_jacobian(tridiagonal, x, pattern).to_dense(), want)
    # One triangle is enough for a Hessian.
    hessian = sparse_hessian(ENERGIES["chain"], x, band.tril())
    torch.testing.assert_close(hessian.to_dense(), torch.func.hessian(ENERGIES["chain"])(x))


def test_a_plan_serves_other_points_and_shapes():
    x = torch.randn(12, dtype=torch.float64)
    plan = SparsePlan.jacobian(sparsity_pattern(tridiagonal, x))
    calls = []

    def counted(x):
        calls.append(0)
        return tridiagonal(x.flatten())

    for point in (x + 1, torch.randn(3, 4), torch.randn(4, 3).double().T):
        want = torch.func.jacrev(lambda v: tridiagonal(v))(point.reshape(-1))
        calls.clear()
        got = sparse_jacobian(counted, point, plan)
        assert len(calls) == plan.n_colours + 1  # three products and the check
        assert got.dtype == point.dtype
        torch.testing.assert_close(got.to_dense(), want)
    calls.clear()
    sparse_jacobian(counted, x, plan, check=False)
    assert len(calls) == plan.n_colours


def test_missed_entries_are_an_error():
    x = torch.randn(12, dtype=torch.float64)
    with pytest.raises(NotDifferentiableError, match=r"lacks entries: row \d+ .*torch.ones\(m, n\) is always"):
        sparse_jacobian(tridiagonal, x, torch.eye(12))
    with pytest.raises(NotDifferentiableError, match="lacks entries: column"):
        sparse_jacobian(tridiagonal, x, torch.eye(12), mode="reverse")
    with pytest.raises(NotDifferentiableError, match="lacks entries"):
        sparse_hessian(ENERGIES["chain"], x, torch.eye(12))
    assert sparse_jacobian(tridiagonal, x, torch.eye(12), check=False).shape == (12, 12)  # on the user's own word


def test_patterns_that_do_not_fit_into_memory_are_refused():
    x = torch.ones(20000, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="entries, more than 200,000,000: give a pattern="):
        sparsity_pattern(lambda x: torch.softmax(x, 0), x)
    with pytest.raises(ArgumentError, match="matrix-free"):
        sparsity_pattern(lambda x: torch.linalg.inv(torch.diag(x[:150]))[:1].expand(20000, 150) * x[:150], x)


def test_branches_are_listed_and_missed_ones_found():
    def f(x):
        return x * x.roll(1) if x.sum() > 0 else x**2

    def g(x):
        return x[x.argsort()] ** 2

    x = torch.ones(12, dtype=torch.float64)
    pattern = sparsity_pattern(f, -x)
    assert pattern.branches == ("aten._local_scalar_dense",)
    assert "depends on x through" in repr(pattern)
    plan = SparsePlan.jacobian(pattern)
    with pytest.raises(NotDifferentiableError, match="find the pattern at this x"):
        sparse_jacobian(f, x, plan)
    assert sparsity_pattern(g, x).branches == ("aten.index",)
    assert sparsity_pattern(lambda x: torch.where(x > 0, x, x**2), x).branches == ()


def test_operations_without_a_rule_are_named():
    pattern = sparsity_pattern(WIDER["inverse"], torch.randn(12, dtype=torch.float64))
    assert pattern.dense_operations == ("aten.linalg_inv_ex",) and "linalg_inv_ex" in repr(pattern)


class Foreign(LinearOperator):
    """A banded matrix in NumPy, which no tracer can look into."""

    def __init__(self, n):
        super().__init__((n,))
        self.matrix = scipy.sparse.diags_array([1.0, -2.0, 0.5], offsets=[-3, 0, 1], shape=(n, n), format="csr")

    def _forward(self, x):
        return torch.from_numpy((self.matrix @ x.reshape(-1, self.shape[1]).numpy().T).T.reshape(x.shape).copy())

    def _adjoint(self, y):
        return torch.from_numpy((self.matrix.T @ y.reshape(-1, self.shape[0]).numpy().T).T.reshape(y.shape).copy())


def test_operators_outside_of_torch_are_probed():
    op = Foreign(2000)
    want = torch.from_numpy(op.matrix.toarray())
    x = torch.randn(2000, dtype=torch.float64)
    got = sparse_jacobian(lambda x: op(x**2), x)
    torch.testing.assert_close(got.to_dense(), want * 2 * x)
    assert SparsePlan.jacobian(op).n_colours == 4  # rows 0, 1, 3 and 4 columns further: periods of 3 are not enough
    back = sparsity_pattern(op.H, x)
    assert torch.equal(back.todense(), want.T != 0)
    energy = sparse_hessian(lambda x: (op(x) ** 4).sum(), x)
    weight = 12 * (want @ x) ** 2
    torch.testing.assert_close(energy.to_dense(), want.T @ (weight[:, None] * want))


def test_probing_takes_few_products():
    n = 3000
    generator = np.random.default_rng(0)
    rows, columns = np.repeat(np.arange(n), 5), generator.integers(0, n, 5 * n)
    matrix = scipy.sparse.coo_array((generator.standard_normal(5 * n), (rows, columns)), (n, n)).tocsr()
    count = 0

    def apply(v):
        nonlocal count
        count += len(v)
        return (matrix @ v.T).T.copy()

    found = probe(apply, n, n)
    assert np.array_equal(found.columns, matrix.sorted_indices().indices)
    assert np.array_equal(found.pointers, matrix.indptr)
    assert count < 500
    pattern = sparsity_pattern(tridiagonal, torch.randn(200, dtype=torch.float64), method="probe")
    assert torch.equal(pattern.todense(), torch.ones(200, 200).tril(1).triu(-1).bool())
    pattern = sparsity_pattern(ENERGIES["chain"], torch.randn(12).double(), hessian=True, method="probe")
    assert torch.equal(pattern.todense(), torch.ones(12, 12).tril(1).triu(-1).bool())


def test_values_carry_the_graph():
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    a = torch.randn(12, dtype=torch.float64, requires_grad=True)
    for mode in ("forward", "reverse"):
        f = lambda x: tridiagonal(x) * a  # noqa: E731
        got = torch.autograd.grad(sparse_jacobian(f, x, mode=mode).values().pow(2).sum(), (x, a))
        want = torch.autograd.grad(torch.autograd.functional.jacobian(f, x, create_graph=True).pow(2).sum(), (x, a))
        torch.testing.assert_close(got, want)
        (only,) = torch.autograd.grad(sparse_jacobian(f, x.detach(), mode=mode).values().pow(2).sum(), a)
        torch.testing.assert_close(only, want[1])
    f = lambda x: ENERGIES["chain"](x * a)  # noqa: E731
    got = torch.autograd.grad(sparse_hessian(f, x).values().pow(2).sum(), (x, a))
    want = torch.autograd.grad(torch.autograd.functional.hessian(f, x, create_graph=True).pow(2).sum(), (x, a))
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not sparse_jacobian(tridiagonal, x).requires_grad
        assert not sparse_hessian(ENERGIES["chain"], x).requires_grad
    assert not sparse_jacobian(tridiagonal, x.detach()).requires_grad
    assert not sparse_jacobian(tridiagonal, x.detach(), mode="reverse").requires_grad
    assert not sparse_hessian(ENERGIES["chain"], x.detach()).requires_grad
    assert x.grad is None and a.grad is None


def test_without_forward_derivative_rows_are_used():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    x = torch.randn(12, dtype=torch.float64)
    f = lambda x: torch.diff(Reverse.apply(x))  # noqa: E731
    torch.testing.assert_close(sparse_jacobian(f, x).to_dense(), torch.autograd.functional.jacobian(f, x))
    with pytest.raises(NotImplementedError, match="jvp"):
        sparse_jacobian(f, x, mode="forward")


def test_wrong_forward_derivatives_are_found():
    x = torch.randn(12, dtype=torch.float64)
    f = lambda x: x.scatter_reduce(0, torch.tensor([1, 2]), x[5:7], "prod")  # noqa: E731 (torch 2.13: zero tangent)
    want = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(sparse_jacobian(f, x, mode="reverse").to_dense(), want)
    if torch.func.jvp(f, (x,), (x,))[1].abs().max() == 0:
        with pytest.raises(NotDifferentiableError, match=r'forward and the reverse derivative.*mode="reverse"'):
            sparse_jacobian(f, x)


def test_odd_input():
    x = torch.randn(4, dtype=torch.float64)
    assert sparse_jacobian(lambda x: x[:0], x).shape == (0, 4)
    assert sparse_jacobian(lambda x: x**2, x[:0]).shape == (0, 0)
    assert sparse_jacobian(lambda x: torch.ones(3, dtype=torch.float64), x, mode="forward")._nnz() == 0
    assert sparse_jacobian(lambda x: x.sin(), x[0]).to_dense().item() == pytest.approx(float(x[0].cos()))
    complex_ = sparse_jacobian(lambda x: torch.complex(x, x.flip(0)), x).to_dense()
    torch.testing.assert_close(complex_, torch.eye(4) + 1j * torch.eye(4).flip(0), check_dtype=False)
    bad = torch.tensor([1.0, float("nan"), 2.0, 3.0], dtype=torch.float64)
    assert sparse_jacobian(lambda x: x**2, bad).to_dense().isnan().sum() == 1
    sparse_hessian(lambda x: (x**3).sum(), bad)
    torch.testing.assert_close(sparse_jacobian(lambda x: x**2, x.float()).to_dense(), torch.diag(2 * x.float()))
    strided = torch.randn(4, 6, dtype=torch.float64)[:, ::2]
    want = torch.func.jacrev(lambda v: v.t().sin().reshape(-1))(strided).reshape(12, 12)
    torch.testing.assert_close(sparse_jacobian(lambda v: v.t().sin().reshape(-1), strided).to_dense(), want)
    diagonal = sparse_jacobian(Diagonal(torch.arange(4).double()), x)
    torch.testing.assert_close(diagonal.to_dense(), torch.diag(torch.arange(4).double()))


def test_errors():
    x = torch.randn(4, dtype=torch.float64)
    for f, point, pattern, error, text in (
        (lambda x: x, 3.0, None, ArgumentError, "x must be one tensor; got float"),
        (3, x, None, ArgumentError, "f must be a function"),
        (lambda x: x, x + 0j, None, DtypeError, "torch.view_as_real"),
        (lambda x: x, x.int(), None, DtypeError, "use x.double"),
        (lambda x: (x, x), x, None, ArgumentError, "must return one tensor; got tuple"),
        (lambda x: x.argmax(), x, None, NotDifferentiableError, "has no derivative"),
        (lambda x: x, x, torch.ones(4, 5), ShapeError, "expected 4 columns"),
        (lambda x: x, x, torch.ones(5, 4), ShapeError, "expected 4 rows"),
        (lambda x: x, x, torch.ones(4), ShapeError, "expected a matrix"),
        (lambda x: x, x, "band", ArgumentError, "got str"),
        (lambda x: x, x.to_sparse(), None, ArgumentError, "use x.to_dense"),
    ):
        with pytest.raises(error, match=text):
            sparse_jacobian(f, point, pattern)
    with pytest.raises(NotDifferentiableError, match="detached"):
        sparse_jacobian(lambda x: x.detach() ** 2, x, mode="reverse")
    with pytest.raises(ShapeError, match="one real number for a Hessian"):
        sparse_hessian(lambda x: x, x)
    with pytest.raises(NotDifferentiableError, match="does not require grad"):
        sparse_hessian(lambda x: x.detach().sum(), x)
    with pytest.raises(ArgumentError, match=r"cannot run inside a torch.func transform"):
        torch.func.vmap(lambda x: sparse_jacobian(torch.sin, x))(x[None])
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"use torch.no_grad\(\)"):
        sparse_hessian(lambda x: x.sum(), x)
    with pytest.raises(ShapeError, match="square"):
        sparse_hessian(lambda x: x.sum(), x, torch.ones(4, 5))
    with pytest.raises(ArgumentError, match=r"SparsePlan.hessian"):
        sparse_hessian(lambda x: x.sum(), x, SparsePlan.jacobian(torch.ones(4, 4)))
    with pytest.raises(ArgumentError, match=r"SparsePlan.jacobian"):
        sparse_jacobian(lambda x: x, x, SparsePlan.hessian(torch.ones(4, 4)))
    with pytest.raises(ArgumentError, match='the plan has mode "reverse"'):
        sparse_jacobian(lambda x: x, x, SparsePlan.jacobian(torch.ones(4, 4), "reverse"), mode="forward")
    with pytest.raises(ArgumentError, match="mode must be"):
        sparse_jacobian(lambda x: x, x, mode="both")
    with pytest.raises(ArgumentError, match='method must be "trace" or "probe"'):
        sparsity_pattern(lambda x: x, x, method="guess")


@pytest.mark.slow
def test_large_bands_and_grids():
    def grid(x):
        u = x.reshape(200, 200)
        p = F.pad(u, (1, 1, 1, 1))
        return u**2 * 4 - p[2:, 1:-1] - p[:-2, 1:-1] - p[1:-1, 2:] * u - p[1:-1, :-2]

    x = torch.randn(40000, dtype=torch.float64)
    for f, nnz in ((grid, 5 * 40000 - 4 * 200), (tridiagonal, 3 * 40000 - 2)):
        jacobian = sparse_jacobian(f, x)  # compared with a true product inside
        assert jacobian._nnz() == nnz
    hessian = sparse_hessian(lambda x: (torch.diff(x) ** 4).sum(), x)
    assert hessian._nnz() == 3 * 40000 - 2
