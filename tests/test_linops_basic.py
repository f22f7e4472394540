"""Values of the basic operators, derivatives, matrices and stacks: against PyLops where the conventions agree."""

import itertools

import numpy as np
import pylops
import pytest
import scipy.sparse as sp
import torch

import pullback as pb


def same(ours: pb.LinearOperator, theirs) -> None:
    matrix, want = ours.todense().numpy(), theirs.todense()
    assert matrix.shape == want.shape
    assert np.abs(matrix - want).max() < 1e-13
    assert np.abs(ours.H.todense().numpy() - want.conj().T).max() < 1e-13


rng = np.random.default_rng(0)
DIAG, MATRIX = rng.standard_normal(5), rng.standard_normal((3, 5))

PAIRS = {
    "identity": (pb.Identity(5), pylops.Identity(5)),
    "identity pads": (pb.Identity(5, 3), pylops.Identity(5, 3)),
    "identity truncates": (pb.Identity(3, 5), pylops.Identity(3, 5)),
    "zero": (pb.Zero(3, 5), pylops.Zero(3, 5)),
    "diagonal": (pb.Diagonal(DIAG), pylops.Diagonal(DIAG)),
    "diagonal axis 0": (pb.Diagonal(DIAG, (5, 2), axis=0), pylops.Diagonal(DIAG, dims=(5, 2), axis=0)),
    "diagonal axis 1": (pb.Diagonal(DIAG, (2, 5)), pylops.Diagonal(DIAG, dims=(2, 5), axis=1)),
    "restriction": (pb.Restriction((4, 3), [0, 2, 3], axis=0), pylops.Restriction((4, 3), [0, 2, 3], axis=0)),
    "pad": (pb.Pad((2, 3), ((1, 0), (2, 1))), pylops.Pad((2, 3), ((1, 0), (2, 1)))),
    "flip": (pb.Flip((3, 4), axis=0), pylops.Flip((3, 4), axis=0)),
    "roll": (pb.Roll((3, 4), axis=1, shift=3), pylops.Roll((3, 4), axis=1, shift=3)),
    "transpose": (pb.Transpose((2, 3, 4), (1, 2, 0)), pylops.Transpose((2, 3, 4), (1, 2, 0))),
    "sum": (pb.Sum((2, 3, 4), axis=1), pylops.Sum((2, 3, 4), axis=1)),
    "symmetrize": (pb.Symmetrize((3, 4), axis=1), pylops.Symmetrize((3, 4), axis=1)),
    "matrix": (pb.MatrixMult(MATRIX), pylops.MatrixMult(MATRIX)),
    "matrix otherdims": (pb.MatrixMult(MATRIX, otherdims=(2, 2)), pylops.MatrixMult(MATRIX, otherdims=(2, 2))),
    "sparse": (pb.MatrixMult(sp.csr_matrix(MATRIX)), pylops.MatrixMult(sp.csr_matrix(MATRIX))),
    "vstack": (
        pb.VStack([pb.Identity(5), pb.MatrixMult(MATRIX)]),
        pylops.VStack([pylops.Identity(5), pylops.MatrixMult(MATRIX)]),
    ),
    "hstack": (
        pb.HStack([pb.Identity(3), pb.MatrixMult(MATRIX)]),
        pylops.HStack([pylops.Identity(3), pylops.MatrixMult(MATRIX)]),
    ),
    "block": (
        pb.Block([[pb.Identity(3), pb.MatrixMult(MATRIX)], [pb.Flip(3), pb.Zero(3, 5)]]),
        pylops.Block([[pylops.Identity(3), pylops.MatrixMult(MATRIX)], [pylops.Flip(3), pylops.Zero(3, 5)]]),
    ),
    "blockdiag": (
        pb.BlockDiag([pb.Identity(3), pb.MatrixMult(MATRIX)]),
        pylops.BlockDiag([pylops.Identity(3), pylops.MatrixMult(MATRIX)]),
    ),
    "kronecker": (
        pb.Kronecker(pb.MatrixMult(MATRIX), pb.FirstDerivative(4)),
        pylops.Kronecker(pylops.MatrixMult(MATRIX), pylops.FirstDerivative(4)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_pylops(name):
    same(*PAIRS[name])


@pytest.mark.parametrize(("dims", "axis"), [((7,), 0), ((6, 5), 0), ((6, 5), 1), ((5, 3, 6), 0), ((5, 7, 3), 1)])
def test_derivatives_equal_pylops(dims, axis):
    for kind, edge, order in itertools.product(("forward", "backward", "centered"), (False, True), (3, 5)):
        theirs = pylops.FirstDerivative(dims, axis, 0.5, kind, edge, order)
        same(pb.FirstDerivative(dims, axis, 0.5, kind, edge, order), theirs)
        same(pb.SecondDerivative(dims, axis, 0.5, kind, edge), pylops.SecondDerivative(dims, axis, 0.5, kind, edge))
    for kind, first in itertools.product(("full", "half", "trapezoidal"), (False, True)):
        same(pb.CausalIntegration(dims, axis, 0.3, kind, first), pylops.CausalIntegration(dims, axis, 0.3, kind, first))


@pytest.mark.parametrize("kind", ["forward", "backward", "centered"])
@pytest.mark.parametrize("edge", [False, True])
def test_gradient_and_laplacian_equal_pylops(kind, edge):
    same(pb.Gradient((5, 6), (0.5, 2.0), edge, kind), pylops.Gradient((5, 6), (0.5, 2.0), edge, kind))
    ours = pb.Laplacian((5, 6, 3), (0, 2), (1, -2), (0.5, 2.0), edge, kind)
    same(ours, pylops.Laplacian((5, 6, 3), (0, 2), (1, -2), (0.5, 2.0), edge, kind))


def test_known_values():
    x = torch.arange(1.0, 5)
    assert pb.CausalIntegration(4)(x).tolist() == [1, 3, 6, 10]
    assert pb.CausalIntegration(4, kind="half")(x).tolist() == [0.5, 2, 4.5, 8]
    assert pb.CausalIntegration(4, kind="trapezoidal")(x).tolist() == [0.5, 1.5, 4, 7.5]
    assert pb.FirstDerivative(5)(torch.arange(5.0) ** 2).tolist() == [0, 2, 4, 6, 0]
    assert pb.Symmetrize(3)(torch.tensor([1.0, 2, 3])).tolist() == [3, 2, 1, 2, 3]


def test_slices_that_cannot_be_merged_are_written():
    # A stacked output with a batch axis of size one in the middle once lost its values.
    G = pb.Gradient((4, 5))
    x = torch.randn(6, 1, 4, 5, dtype=torch.float64)
    assert torch.equal(G(x), torch.stack([G(v) for v in x[:, 0]])[:, None])


def test_large_arrays_cross_the_block_boundaries():
    x = torch.randn(700, 300, dtype=torch.float64)
    D = pb.FirstDerivative((700, 300), axis=0, order=5)
    want = pylops.FirstDerivative((700, 300), axis=0, order=5)
    assert np.allclose(D(x).numpy(), (want @ x.numpy().ravel()).reshape(700, 300), atol=1e-13)
    assert np.allclose(D.H(x).numpy(), (want.H @ x.numpy().ravel()).reshape(700, 300), atol=1e-13)


def test_real_linear_operators():
    z = torch.randn(3, dtype=torch.complex128)
    assert torch.equal(pb.Real(3)(z), z.real)
    assert torch.equal(pb.Imag(3)(z), z.imag)
    assert torch.equal(pb.Conj(3)(z), z.conj().resolve_conj())
    assert torch.equal(pb.Imag(3).H(z.real), 1j * z.real)
    with pytest.raises(pb.DtypeError, match=r"Real\.H acts on real tensors"):
        pb.Real(3).H(z)


def test_restriction_mask_repeats_and_booleans():
    R = pb.Restriction(5, torch.tensor([True, False, True, False, False]))
    assert R(torch.arange(5.0)).tolist() == [0, 2]
    assert pb.Restriction(5, [0, -1]).mask(torch.ones(5)).tolist() == [1, 0, 0, 0, 1]
    assert pb.Restriction(3, [1, 1]).H(torch.ones(2)).tolist() == [0, 2, 0]
    assert pb.Restriction(3, [1, 1]).norm_bound() >= 2**0.5


def test_sparse_gradient_and_torch_layouts():
    dense = torch.tensor([[0.0, 2, 0], [1, 0, 3]], dtype=torch.float64)
    assert torch.equal(pb.MatrixMult(dense.to_sparse()).todense(), dense)
    op = pb.MatrixMult(dense.to_sparse())
    values = op.values.clone().requires_grad_()
    x = torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: torch.func.functional_call(op, {"values": v}, (x,)), values)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_large_single_precision_products(shape):
    # These run in oneDNN, outside of autograd; gradients come from the bridge.
    A = torch.randn(*shape)
    op, exact = pb.MatrixMult(A), pb.MatrixMult(A.double())
    x = torch.randn(2, 16, shape[1], requires_grad=True)
    y = op(x)
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), exact(x.double()), rtol=1e-4, atol=1e-3)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # an expanded gradient
    assert torch.allclose(g.double(), exact.H(torch.ones(2, 16, shape[0], dtype=torch.float64)), rtol=1e-4, atol=1e-3)
    hvp = torch.func.jvp(torch.func.grad(lambda u: (op(u) ** 2).sum() / 2), (x.detach(),), (x.detach(),))[1]
    assert torch.allclose(hvp.double(), exact.gram(x.detach().double()), rtol=1e-3, atol=1e-2)
    assert torch.allclose(torch.func.vmap(op)(x.detach()), y.detach(), rtol=1e-4, atol=1e-3)
    weight = A.clone().requires_grad_()
    (by_weight,) = torch.autograd.grad(pb.MatrixMult(weight)(x.detach()).sum(), weight)
    assert torch.allclose(by_weight, x.detach().sum((0, 1)).expand(shape), rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(x).dtype == torch.bfloat16


def test_matrix_inverse():
    A = pb.MatrixMult(torch.tensor([[2.0, 1], [0, 1]]))
    assert torch.allclose((A.inv() @ A).todense(), torch.eye(2))
    with pytest.raises(pb.ArgumentError, match="needs a dense square matrix"):
        pb.MatrixMult(MATRIX).inv()


def test_function_operator_derives_its_adjoint():
    F = pb.FunctionOperator(lambda x: x[1:] - x[:-1], 3, 4)
    assert torch.allclose(F.H.todense(), F.todense().T)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(pb.NotDifferentiableError, match="uses a tensor that requires grad but does not hold it"):
        pb.FunctionOperator(lambda x: x * weight, 3)(torch.ones(3, dtype=torch.float64, requires_grad=True))
    with pytest.raises(pb.ShapeError, match=r"must return a tensor of shape \(3,\)"):
        pb.FunctionOperator(lambda x: x, 3, 4)(torch.ones(4))
    with pytest.raises(pb.ArgumentError, match=r"expected \(f, n\)"):
        pb.FunctionOperator(lambda x: x)


def test_gram_of_a_stack_is_a_sum():
    S = pb.VStack([pb.Diagonal(torch.ones(3)), pb.Diagonal(2 * torch.ones(3))])
    assert isinstance(S.gram, pb.Diagonal)
    assert S.gram(torch.ones(3)).tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pb.FirstDerivative(5, kind="middle"), "kind must be one of forward, backward, centered; got 'middle'"),
        (lambda: pb.FirstDerivative(5, order=4), "order must be 3 or 5; got 4"),
        (lambda: pb.FirstDerivative(2), "needs at least 3 samples along the axis; got 2"),
        (lambda: pb.FirstDerivative(5, sampling=0), "sampling must be a positive number; got 0"),
        (lambda: pb.SecondDerivative(2), "needs at least 3 samples"),
        (lambda: pb.Laplacian((4, 4), weights=(1, 2, 3)), "weights must be one value or 2 values"),
        (lambda: pb.Laplacian((4, 4), weights=0), "weights must not all be zero"),
        (lambda: pb.Laplacian((4, 4), axes=(0, -2)), "axes must be distinct"),
        (lambda: pb.CausalIntegration(4, kind="none"), "kind must be full, half or trapezoidal"),
        (lambda: pb.Diagonal(torch.ones(3), (4, 4)), r"diag must have shape .* for axis -1; got \(3,\)"),
        (lambda: pb.Diagonal("abc"), "diag must be a tensor or an array of numbers"),
        (lambda: pb.Restriction(3, [5]), r"iava must lie in \[-3, 2\]"),
        (lambda: pb.Restriction(3, [0.5]), "non-empty list of integer indices"),
        (lambda: pb.Pad((3, 3), (1, 1)), r"one \(before, after\) pair"),
        (lambda: pb.Pad(3, (-1, 1)), "sizes >= 0"),
        (lambda: pb.Transpose((3, 4), (0,)), "axes must name all 2 axes"),
        (lambda: pb.MatrixMult(torch.ones(3)), r"A must be a matrix .* got shape \(3,\)"),
        (lambda: pb.VStack([]), "at least one operator"),
        (lambda: pb.VStack([pb.Flip(3), pb.Flip(4)]), "equally many columns"),
        (lambda: pb.HStack([pb.Flip(3), pb.Flip(4)]), "equally many rows"),
        (lambda: pb.Kronecker(pb.Real(3), pb.Flip(3)), "must be complex-linear"),
        (lambda: pb.VStack([3]), "expected an operator or a matrix; got int"),
    ],
)
def test_bad_arguments(make, text):
    with pytest.raises(pb.PullbackError, match=text):
        make()
