"""What the base class promises: shapes, dtypes, NumPy and SciPy, algebra, numbers, errors by their text."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pullback as pb

torch.manual_seed(0)
M = torch.randn(6, 4, dtype=torch.float64)


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


class TestShapes:
    def test_exact_match_first_then_flat(self):
        A = pb.Smoothing2D((3, 3), dims=(4, 5))
        x = rand(2, 3, 4, 5)
        assert A(x).shape == (2, 3, 4, 5)
        assert torch.equal(A(x.reshape(2, 3, 20)), A(x).reshape(2, 3, 20))
        assert A(x[0, 0]).shape == (4, 5)

    def test_flat_in_flat_out_where_dimsd_has_other_axes(self):
        G = pb.Gradient((4, 5))
        x = rand(3, 20).requires_grad_()
        y = G(x)
        assert y.shape == (3, 40)
        (g,) = torch.autograd.grad(y.sum(), x)
        assert g.shape == (3, 20)

    def test_wrong_shape_says_what_was_expected(self):
        with pytest.raises(
            pb.ShapeError, match=r"Gradient expects shape \(\.\.\., 4, 5\) or \(\.\.\., 20\); got \(4, 4\)"
        ):
            pb.Gradient((4, 5))(rand(4, 4))
        with pytest.raises(pb.ShapeError, match=r"Gradient\.H expects .*leading axes are the batch"):
            pb.Gradient((4, 5)).H(rand(3))

    def test_columns_get_a_hint(self):
        with pytest.raises(pb.ShapeError, match="for the columns of a matrix use matmat"):
            pb.Flip(4) @ rand(4, 2)

    def test_empty_batch(self):
        assert pb.Gradient((4, 5))(rand(0, 4, 5)).shape == (0, 2, 4, 5)

    def test_bad_dims(self):
        with pytest.raises(pb.ArgumentError, match="dims must hold at least one size"):
            pb.Flip(())
        with pytest.raises(pb.ArgumentError, match=r"dims must be an int or a sequence of ints; got 2\.5"):
            pb.Flip(2.5)
        with pytest.raises(pb.ArgumentError, match=r"axis must lie in \[-2, 1\]"):
            pb.Roll((3, 4), axis=2)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
    def test_follows_the_input(self, dtype):
        A = pb.MatrixMult(M) + pb.MatrixMult(M.numpy())
        assert A(rand(4).to(dtype)).dtype == dtype

    def test_complex_input_acts_on_both_parts(self):
        x = rand(5, dtype=torch.complex128)
        D = pb.FirstDerivative(5)
        assert torch.allclose(D(x), torch.complex(D(x.real), D(x.imag)))

    def test_complex_operator_on_real_leaf(self):
        C = pb.MatrixMult(M * (1 + 1j))
        x = rand(4).requires_grad_()
        C(x).abs().square().sum().backward()
        assert x.grad.dtype == torch.float64
        assert torch.autograd.gradcheck(C, rand(4).requires_grad_(), check_forward_ad=True)

    def test_half_input_of_a_complex_operator_keeps_the_imaginary_part(self):
        d = torch.tensor([1j, 2j])
        assert torch.allclose(pb.Diagonal(d)(torch.ones(2, dtype=torch.bfloat16)), d)

    def test_integers_are_refused(self):
        with pytest.raises(
            pb.DtypeError, match=r"expects a floating point or complex tensor; got torch\.int64; use x\.float"
        ):
            pb.Flip(3)(torch.arange(3))

    def test_lists_are_refused(self):
        with pytest.raises(pb.DtypeError, match="expects a torch tensor or a NumPy array; got list"):
            pb.Flip(3)([1.0, 2.0, 3.0])

    def test_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = pb.MatrixMult(M.float())(rand(2, 4, dtype=torch.float32))
        assert y.dtype == torch.bfloat16


class TestNumpyAndScipy:
    def test_numpy_in_numpy_out_on_shared_memory(self):
        x = np.arange(4.0)
        y = pb.MatrixMult(M)(x)
        assert isinstance(y, np.ndarray)
        assert np.allclose(y, M.numpy() @ x)
        assert np.allclose(pb.Flip(4)(np.arange(4)), [3, 2, 1, 0])
        assert np.allclose(pb.Flip(4)(x[::-1]), x)
        read_only = np.broadcast_to(np.float64(1.0), 4)
        assert np.allclose(pb.Flip(4)(read_only), 1)

    def test_numpy_result_owns_its_memory(self):
        x = np.arange(4.0)
        y = pb.Identity(4)(x)
        y += 1
        assert np.array_equal(x, np.arange(4.0))

    def test_scipy_solvers(self):
        A = pb.MatrixMult(M)
        b = rand(6).numpy()
        want = np.linalg.lstsq(M.numpy(), b, rcond=None)[0]
        assert np.allclose(sla.lsqr(A, b, atol=1e-12, btol=1e-12)[0], want)
        normal = A.gram + 0.1 * pb.Identity(4)
        solution, info = sla.cg(normal, A.rmatvec(b), rtol=1e-12)
        assert info == 0
        assert np.allclose(normal.todense().numpy() @ solution, A.rmatvec(b))
        values = sla.eigsh(sla.aslinearoperator(A.gram), k=2, return_eigenvectors=False)
        assert np.allclose(np.sort(values), torch.linalg.eigvalsh(M.T @ M)[-2:].numpy())

    def test_columns(self):
        A = pb.MatrixMult(M)
        X = rand(4, 3)
        assert torch.allclose(A.matmat(X), M @ X)
        assert torch.allclose(A.rmatmat(M @ X), M.T @ M @ X)
        assert A.matvec(X[:, :1].numpy()).shape == (6, 1)
        with pytest.raises(pb.ShapeError, match=r"MatrixMult as a matrix expects shape \(4,\) or \(4, p\); got \(5,\)"):
            A.matvec(rand(5))
        with pytest.raises(pb.ShapeError, match=r"MatrixMult\.H as a matrix expects shape \(6,\)"):
            A.rmatmat(rand(5, 2))

    def test_array_scalars_multiply(self):
        A = np.float32(2) * pb.MatrixMult(M)
        assert torch.allclose(A.todense(), 2 * M)
        assert torch.allclose((pb.MatrixMult(M) * np.array(2.0)).todense(), 2 * M)

    def test_dtype_is_what_scipy_wants(self):
        assert pb.Flip(3).dtype == np.float64
        assert pb.MatrixMult(M.float()).dtype == np.float32
        assert pb.Flip(3, dtype="float32").dtype == np.float32
        assert pb.Flip(3, dtype=torch.complex64).dtype == np.complex64
        with pytest.raises(pb.ArgumentError, match="dtype must be float16"):
            pb.Flip(3, dtype=int)


class TestAlgebra:
    def test_dense_matrices_agree(self):
        A, B, D = pb.MatrixMult(M), pb.MatrixMult(M * 1j), pb.Diagonal(rand(4))
        cases = {
            "sum": (A + B, M + M * 1j),
            "difference": (A - B, M - M * 1j),
            "negative": (-A, -M),
            "multiple": (3 * A / 2, 1.5 * M),
            "product": (A @ D, M @ torch.diag(D.diag)),
            "adjoint": (B.H, (M * 1j).mH),
            "transpose": (B.T, (M * 1j).mT),
            "conjugate": (B.conj(), (M * 1j).conj()),
            "power": (D**3, torch.diag(D.diag**3)),
            "gram": (B.gram, (M.mT @ M).to(torch.complex128)),
            "all": (2 * A.H @ A + pb.Identity(4), 2 * M.T @ M + torch.eye(4, dtype=torch.float64)),
        }
        for name, (op, want) in cases.items():
            assert torch.allclose(op.todense().to(torch.complex128), want.to(torch.complex128)), name

    def test_identities(self):
        A = pb.MatrixMult(M)
        one, none = pb.Identity(4), pb.Zero(6, 4)
        assert A.H.H is A
        assert A.conj().conj() is A
        assert (A @ one) is A
        assert (none + A) is A
        assert (A + none) is A
        assert isinstance(A.H @ none, pb.Zero)
        assert ((-1) * (-A)) is A
        d, e = pb.Diagonal(rand(4)), pb.Diagonal(rand(4))
        assert isinstance(d @ e, pb.Diagonal)
        assert isinstance(2 * d + e + one, pb.Diagonal)
        assert isinstance(d.gram, pb.Diagonal)

    def test_weight_that_requires_grad(self):
        weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        x = rand(4)
        for B in (weight * pb.MatrixMult(M), pb.MatrixMult(M) * weight, pb.MatrixMult(M) @ (weight * pb.Identity(4))):
            (g,) = torch.autograd.grad(B(x).sum(), weight)
            assert torch.allclose(g, (M @ x).sum())

    def test_errors(self):
        A = pb.MatrixMult(M)
        with pytest.raises(pb.ShapeError, match=r"cannot compose MatrixMult of input dims \(4,\) .*: 4 != 6 elements"):
            A @ A
        with pytest.raises(pb.ShapeError, match="cannot add"):
            A + A.H
        with pytest.raises(pb.ArgumentError, match=r"pullback\.lsqr\(A, y\)"):
            A / rand(6)
        with pytest.raises(pb.ArgumentError, match=r"write A\.T\(x\)"):
            rand(6) @ A
        with pytest.raises(pb.ArgumentError, match="n >= 1"):
            A.gram**0
        with pytest.raises(pb.ArgumentError, match="a factor that acts on real input gets complex values"):
            pb.VStack([pb.FFT(4, real=True)]) @ pb.Diagonal(torch.ones(4) * 1j)
        with pytest.raises(TypeError):
            A + 3

    def test_flat_factors_fit_shaped_ones(self):
        stack = pb.VStack([pb.Identity((3, 4)), pb.FirstDerivative((3, 4))])
        assert (pb.Flip(24) @ stack)(rand(2, 3, 4)).shape == (2, 24)
        assert (pb.Flip((6, 4)) @ stack)(rand(2, 3, 4)).shape == (2, 6, 4)

    def test_repr_shows_structure(self):
        A = pb.FirstDerivative((3, 4))
        assert repr(2 * A.H @ A + pb.Identity((3, 4))) == (
            "<12x12 LinearOperator 3x4 -> 3x4: 2 * FirstDerivative(3x4).H @ FirstDerivative(3x4) + Identity(3x4)>"
        )
        assert "(Flip(3) + Flip(3)).H @ Flip(3)" in repr((pb.Flip(3) + pb.Flip(3)).H @ pb.Flip(3))

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.sampled_from(["add", "mul", "scale", "H", "conj", "stack"]), min_size=1, max_size=5),
        st.integers(0, 99),
    )
    def test_random_expressions(self, steps, seed):
        g = torch.Generator().manual_seed(seed)
        m = torch.randn(3, 3, dtype=torch.complex128, generator=g)
        op, dense = pb.MatrixMult(m), m
        for step in steps:
            if step == "add":
                op, dense = op + pb.Identity(3), dense + torch.eye(3)
            elif step == "mul":
                op, dense = op @ pb.MatrixMult(m), dense @ m
            elif step == "scale":
                op, dense = (1 - 2j) * op, (1 - 2j) * dense
            elif step == "H":
                op, dense = op.H, dense.mH
            elif step == "conj":
                op, dense = op.conj(), dense.conj()
            else:
                op, dense = pb.HStack([op, op]) @ pb.VStack([op, pb.Identity(3)]), dense @ dense + dense
        assert torch.allclose(op.todense(), dense, rtol=1e-10, atol=1e-9)
        assert pb.dottest(op) < 1e-12


class TestNumbers:
    def test_norm_and_its_bound(self):
        A = pb.MatrixMult(M)
        true = float(torch.linalg.matrix_norm(M, 2))
        assert abs(A.norm() - true) < 1e-6 * true
        assert A.norm() <= true * (1 + 1e-12)
        assert A.norm_bound() >= true

    @pytest.mark.parametrize("seed", range(5))
    def test_bound_holds_where_lanczos_has_not_converged(self, seed):
        # 300 nearly equal singular values: after 40 steps the Ritz value is still below the largest.
        s = torch.linspace(1, 1.001, 300, dtype=torch.float64)
        q, _ = torch.linalg.qr(
            torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )
        A = pb.MatrixMult(q * s)
        assert A.norm(maxiter=40, rtol=0) < 1.001
        assert 1.001 <= A.norm_bound() < 1.4

    def test_structural_bounds_hold(self):
        for op in (
            pb.Gradient((7, 8)),
            pb.Laplacian((7, 8), weights=(1, 3)),
            pb.FirstDerivative(9, edge=True),
            pb.Sum((3, 5)),
        ):
            assert op.norm_bound() >= float(torch.linalg.matrix_norm(op.todense(), 2))

    def test_bound_is_kept_until_a_tensor_changes(self):
        A = pb.MatrixMult(M.clone())
        first = A.norm_bound()
        assert A.norm_bound() == first
        A.A.mul_(10)
        assert A.norm_bound() >= 10 * float(torch.linalg.matrix_norm(M, 2))

    def test_zero(self):
        assert pb.Zero(4).norm() == 0
        assert pb.Zero(4).norm_bound() == 0

    def test_eigs_cond_trace(self):
        S = M.T @ M
        A = pb.MatrixMult(S)
        want = torch.linalg.eigvalsh(S).flip(0).numpy()
        assert np.allclose(A.eigs(symmetric=True), want)
        assert np.allclose(np.sort(np.abs(A.eigs(2)))[::-1], want[:2])
        assert np.allclose(pb.MatrixMult(M).eigs(2), torch.linalg.svdvals(M)[:2].numpy())
        assert np.isclose(A.cond(), want[0] / want[-1])
        assert torch.isclose(A.trace(), S.trace())
        assert abs(A.trace(2000, "hutchinson") - S.trace()) < 0.05 * S.trace()
        assert torch.isclose(A.trace(12, "hutch++"), S.trace())
        with pytest.raises(pb.ArgumentError, match="must be square"):
            pb.MatrixMult(M).trace()
        with pytest.raises(pb.ArgumentError, match="method must be"):
            A.trace(method="magic")
        with pytest.raises(pb.ArgumentError, match="neigs must lie in"):
            A.eigs(9)

    def test_large_operators_use_arpack(self):
        D = pb.Diagonal(torch.arange(1.0, 1501, dtype=torch.float64))
        assert np.allclose(D.eigs(3, symmetric=True), [1500, 1499, 1498])

    def test_todense_is_differentiable(self):
        d = rand(3).requires_grad_()
        assert torch.autograd.gradcheck(lambda d: pb.Diagonal(d).todense(), d)

    def test_todense_of_a_real_linear_operator_is_refused(self):
        with pytest.raises(pb.ArgumentError, match="linear over the reals only and has no complex matrix"):
            pb.Conj(3).todense()


class TestState:
    def test_to_returns_a_copy(self):
        A = pb.MatrixMult(torch.nn.Parameter(M.clone()))
        B = A.to(torch.float32)
        assert A.A.dtype == torch.float64
        assert B.A.dtype == torch.float32
        assert isinstance(B.A, torch.nn.Parameter)
        C = (2 * A.H @ A).to(torch.float32)
        assert A.A.dtype == torch.float64
        assert C(rand(4).float()).dtype == torch.float32

    def test_to_keeps_the_graph_of_a_plain_tensor(self):
        w = rand(3).requires_grad_()
        (g,) = torch.autograd.grad(pb.Diagonal(w).to(torch.float32)(torch.ones(3)).sum(), w)
        assert torch.equal(g, torch.ones(3, dtype=torch.float64))

    def test_inside_a_module(self):
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), pb.MatrixMult(torch.nn.Parameter(M.float())))
        assert len(list(net.parameters())) == 3
        assert "1.A" in net.state_dict()
        net.double()
        assert net(rand(2, 4)).dtype == torch.float64

    def test_pickle_deepcopy_of_a_computed_tensor(self):
        w = rand(3).requires_grad_()
        D = pb.Diagonal(2 * w)
        assert torch.equal(copy.deepcopy(D)(rand(3) * 0 + 1), (2 * w).detach())
        assert torch.equal(pickle.loads(pickle.dumps(pb.Gradient((3, 4))))(torch.ones(3, 4)), torch.zeros(2, 3, 4))

    def test_results_do_not_change_with_the_callers_array(self):
        a = np.ones(3)
        D = pb.Diagonal(a)
        a[:] = 7
        assert torch.equal(D(torch.ones(3)), torch.ones(3))

    def test_cast_cache_sees_in_place_changes(self):
        D = pb.Diagonal(torch.ones(3, dtype=torch.float64))
        x = torch.ones(3)
        assert torch.equal(D(x), torch.ones(3))
        D.diag.mul_(2)
        assert torch.equal(D(x), 2 * torch.ones(3))


class TestMemory:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: pb.VStack([pb.Identity(3)]),
            lambda: pb.VStack([pb.Identity(3)]).H,
            lambda: pb.HStack([pb.Identity(3)]),
            lambda: pb.Block([[pb.Identity(3)]]),
            lambda: pb.BlockDiag([pb.Identity(3)]),
            lambda: pb.Kronecker(pb.Identity(1), pb.Identity(3)),
            lambda: pb.Transpose((1, 3), (1, 0)).H @ pb.Transpose((1, 3), (1, 0)),
            lambda: pb.Identity(3).conj(),
            lambda: pb.TorchOperator(pb.Identity(3)),
            lambda: pb.FunctionOperator(lambda x: x.view(-1), lambda y: y.view(-1), 3),
            lambda: pb.FunctionOperator(lambda x: x[:], 3),
            lambda: TestMemory.Same().linearize(torch.ones(3)),
        ],
    )
    def test_results_own_their_memory(self, make):
        op = make()
        for adjoint in (False, True):
            v = torch.ones(op.dimsd if adjoint else op.dims)
            op._call(v, adjoint).add_(1)
            assert torch.equal(v, torch.ones_like(v)), f"{op!r}, adjoint {adjoint}"

    class Same(pb.Operator):
        def __init__(self):
            super().__init__(3, 3)

        def _forward(self, x):
            return x

    def test_numpy_goes_where_a_parameter_lies(self):
        op = pb.MatrixMult(torch.nn.Parameter(M.clone()), dtype="float64").to("meta")
        with pytest.raises((NotImplementedError, RuntimeError), match="meta") as error:
            op(np.ones(4))  # a meta tensor holds no numbers to give back
        assert not isinstance(error.value, pb.DeviceError)  # but the array had been sent to the parameter's device


class TestNonlinear:
    class Square(pb.Operator):
        def __init__(self, n):
            super().__init__(n, n)

        def _forward(self, x):
            return x**2

    def test_linearize_and_compose(self):
        F, A = self.Square(4), pb.MatrixMult(M)
        x = rand(4)
        J = (A @ F).linearize(x)
        assert torch.allclose(J.todense(), M @ torch.diag(2 * x))
        assert torch.allclose(J.H.todense(), (M @ torch.diag(2 * x)).T)
        assert torch.allclose((2 * F - F)(x), x**2)
        assert torch.allclose((F @ A.H)(rand(6) * 0), torch.zeros(4, dtype=torch.float64))
        assert A.linearize(x) is A
        with pytest.raises(pb.ShapeError, match="linearize"):
            F.linearize(rand(5))
