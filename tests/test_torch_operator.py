"""TorchOperator: what PyLops' wrapper gets wrong works here or is refused with a reason."""

import pickle

import numpy as np
import pylops
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as sla
import torch

import pullback as pb
from pullback.core.check import check

rng = np.random.default_rng(0)
MATRIX = rng.standard_normal((6, 10))
COMPLEX = MATRIX[:4, :3] + 1j * MATRIX[:4, 3:6]


class MatVec:
    shape, dtype = MATRIX.shape, MATRIX.dtype

    def matvec(self, x):
        return MATRIX @ x

    def rmatvec(self, y):
        return MATRIX.T @ y


def forward(x):
    return MATRIX @ x


def adjoint(y):
    return MATRIX.T @ y


WRAPPED = {
    "pylops": lambda: pb.TorchOperator(pylops.MatrixMult(MATRIX), batch=True),
    "pylops complex": lambda: pb.TorchOperator(pylops.MatrixMult(COMPLEX, dtype="complex128"), batch=True),
    "pylops 2-D": lambda: pb.TorchOperator(pylops.Smoothing2D((3, 3), dims=(4, 5)), batch=True),
    "pylops dims differ from dimsd": lambda: pb.TorchOperator(pylops.Gradient((4, 5)), batch=True),
    "pylops flat dimsd": lambda: pb.TorchOperator(pylops.Sum((4, 5), axis=0), batch=True),
    "pylops stencil, complex input": lambda: pb.TorchOperator(pylops.FirstDerivative(7), batch=True),
    "pylops real FFT": lambda: pb.TorchOperator(pylops.signalprocessing.FFT(8, real=True), batch=True),
    "pylops Real": lambda: pb.TorchOperator(pylops.Real(5), batch=True),
    "scipy LinearOperator": lambda: pb.TorchOperator(sla.aslinearoperator(MATRIX), batch=True),
    "scipy sparse": lambda: pb.TorchOperator(sp.csr_matrix(MATRIX), batch=True),
    "matvec object": lambda: pb.TorchOperator(MatVec(), batch=True),
    "functions": lambda: pb.TorchOperator((forward, adjoint), batch=True, dims=10, dimsd=6),
    "matrix": lambda: pb.TorchOperator(MATRIX, batch=True),
    "ours": lambda: pb.TorchOperator(pb.Gradient((3, 4)), batch=True),
}


@pytest.mark.parametrize("name", [n if n == "matrix" else pytest.param(n, marks=pytest.mark.slow) for n in WRAPPED])
def test_kit_passes(name):
    check(WRAPPED[name]()).raise_if_failed()


def test_values():
    x = torch.randn(10, dtype=torch.float64)
    for name in ("pylops", "scipy LinearOperator", "scipy sparse", "matvec object", "functions", "matrix"):
        T = WRAPPED[name]()
        assert torch.allclose(T.apply(x), torch.from_numpy(MATRIX) @ x)
        assert torch.allclose(T.adjoint(T(x)), torch.from_numpy(MATRIX).T @ T(x))


def test_hessian_and_mixed_losses_are_not_silently_zero():
    T = WRAPPED["pylops"]()
    x = torch.randn(10, dtype=torch.float64)
    want = torch.from_numpy(MATRIX.T @ MATRIX) * 2
    assert torch.allclose(torch.autograd.functional.hessian(lambda v: (T(v) ** 2).sum(), x), want)
    assert torch.allclose(
        torch.func.hessian(lambda v: (T(v) ** 2).sum() + (v**4).sum())(x), want + torch.diag(12 * x**2)
    )


def test_third_order():
    T = WRAPPED["pylops"]()
    x, D = torch.randn(10, dtype=torch.float64), torch.from_numpy(MATRIX)
    third = torch.func.jacfwd(torch.func.jacrev(torch.func.jacfwd(lambda v: (T(v) ** 3).sum())))(x)
    assert torch.allclose(third, 6 * torch.einsum("ki,kj,kl->ijl", D, D, D))


def test_batches_of_unequal_ranks():
    T = WRAPPED["pylops dims differ from dimsd"]()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = T(x)
    assert y.shape == (2, 3, 2, 4, 5)
    want = pylops.Gradient((4, 5)) @ x.detach().numpy()[1, 2]
    assert np.allclose(y[1, 2].detach().numpy(), want)
    (g,) = torch.autograd.grad(y.square().sum(), x)
    assert g.shape == x.shape
    assert T.adjoint(y.detach()).shape == x.shape


def test_real_leaf_through_a_complex_operator():
    T = WRAPPED["pylops complex"]()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(T(x).abs().square().sum(), x)
    assert torch.allclose(g, 2 * torch.from_numpy((COMPLEX.conj().T @ COMPLEX).real) @ x)


def test_stencils_keep_the_imaginary_part():
    z = torch.randn(7, dtype=torch.complex128)
    assert torch.allclose(WRAPPED["pylops stencil, complex input"]()(z), pb.FirstDerivative(7)(z))


def test_half_precision_and_autocast():
    T = WRAPPED["pylops"]()
    x = torch.randn(10)
    assert T(x).dtype == torch.float32
    assert T(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = T(torch.nn.functional.linear(x[None], torch.eye(10)))
    assert y.dtype == torch.bfloat16


def test_no_aliasing():
    T = pb.TorchOperator(pylops.Identity(3, inplace=True))
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = T(x * 1)
    (y.add_(1) ** 2).sum().backward()
    assert x.grad.tolist() == [4, 4, 4]
    U = pb.TorchOperator((lambda v: v, lambda v: v), dims=3)
    v = torch.ones(3)
    U(v).add_(1)
    assert v.tolist() == [1, 1, 1]


def test_pickle_and_loader_workers():
    T = WRAPPED["scipy sparse"]()
    x = torch.randn(10, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(T))(x), T(x))


def test_survives_its_owner():
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    y = WRAPPED["functions"]()(x)  # the operator is gone, the graph keeps it
    (g,) = torch.autograd.grad(y.sum(), x)
    assert np.allclose(g.numpy(), MATRIX.sum(0))


def test_batch_and_flatten_are_contracts():
    single = pb.TorchOperator(pylops.Gradient((4, 5)))
    assert single(torch.randn(4, 5)).shape == (2, 4, 5)
    assert single(torch.randn(20)).shape == (40,)
    with pytest.raises(pb.ShapeError, match=r"batch=False expects shape .*pass batch=True"):
        single(torch.randn(3, 4, 5))
    with pytest.raises(pb.ShapeError, match="pass batch=True"):
        pb.TorchOperator(np.eye(3))(torch.randn(3, 3))
    shaped = pb.TorchOperator(pylops.Gradient((4, 5)), batch=True, flatten=False)
    assert shaped(torch.randn(3, 4, 5)).shape == (3, 2, 4, 5)
    with pytest.raises(pb.ShapeError, match="flatten=False expects shape"):
        shaped(torch.randn(3, 20))


def test_what_cannot_be_differentiated_is_an_error():
    class OneWay:
        shape = (3, 3)

        def matvec(self, x):
            return 2 * x

    T = pb.TorchOperator(OneWay())
    x = torch.ones(3, requires_grad=True)
    assert T(x).tolist() == [2, 2, 2]
    with pytest.raises(pb.NotDifferentiableError, match=r"has no adjoint \(rmatvec\), so no gradient exists"):
        T(x).sum().backward()
    scipy_one_way = pb.TorchOperator(sla.LinearOperator((3, 3), matvec=lambda v: v))
    with pytest.raises(pb.NotDifferentiableError, match="does not implement its adjoint"):
        scipy_one_way(x).sum().backward()


def test_bad_arguments():
    with pytest.raises(pb.ArgumentError, match="op must be an operator, a matrix, an object with shape"):
        pb.TorchOperator(3)
    with pytest.raises(pb.ArgumentError, match="needs dims="):
        pb.TorchOperator((forward, adjoint))
    with pytest.raises(pb.ArgumentError, match="belong to a pair of functions"):
        pb.TorchOperator(np.eye(3), dims=3)
    with pytest.raises(pb.ShapeError, match="returned 6 elements, expected 5"):
        pb.TorchOperator((forward, adjoint), dims=10, dimsd=5)(torch.ones(10))


def test_device():
    ours = pb.TorchOperator(pb.MatrixMult(MATRIX), device="meta")
    assert next(ours.buffers()).device.type == "meta"
    with pytest.raises(pb.ArgumentError, match="computes on NumPy arrays, so device must be 'cpu'; got 'cuda'"):
        pb.TorchOperator(sp.csr_matrix(MATRIX), device="cuda")


def test_module_apply_still_walks_modules():
    seen = []
    torch.nn.Sequential(pb.TorchOperator(np.eye(2))).apply(lambda m: seen.append(type(m).__name__))
    assert "TorchOperator" in seen


def test_composes_with_our_operators():
    T = pb.TorchOperator(pylops.FirstDerivative((4, 5), axis=0), batch=True)
    A = T.H @ T + 0.1 * pb.Identity((4, 5))
    want = pb.FirstDerivative((4, 5), axis=0)
    assert torch.allclose(A.todense(), (want.gram + 0.1 * pb.Identity((4, 5))).todense())
    assert torch.autograd.gradcheck(A, torch.randn(4, 5, dtype=torch.float64, requires_grad=True))


def test_checkpoint_and_threads():
    from concurrent.futures import ThreadPoolExecutor

    T = WRAPPED["pylops"]()
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(T, x, use_reentrant=False)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.from_numpy(MATRIX.sum(0)))
    with ThreadPoolExecutor(4) as pool:
        grads = list(pool.map(lambda _: torch.autograd.grad(T(x).sum(), x)[0], range(20)))
    assert all(torch.allclose(g, torch.from_numpy(MATRIX.sum(0))) for g in grads)


def test_export_keeps_the_operator():
    T = WRAPPED["functions"]()
    program = torch.export.export(torch.nn.Sequential(T), (torch.randn(10),))
    assert "pullback.apply" in str(program.graph)
    x = torch.randn(10)
    assert torch.equal(program.module()(x), T(x))
