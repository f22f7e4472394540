"""Functionals with operators, of singular values, of counts, of stacks; known values, structure, errors."""

import pytest
import torch
from registry import algebra_examples, public_classes
from test_functionals import DIMS, rand, randn

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
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
    HalfSpace,
    Huber,
    Hyperplane,
    KullbackLeibler,
    L0Ball,
    L1Ball,
    L2Ball,
    LeastSquares,
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
    WaveletL1,
    ZeroFunctional,
)
from pullback.functionals.functional import Functional
from pullback.linops import (
    FFT,
    FFT2D,
    Conj,
    FirstDerivative,
    Flip,
    Identity,
    MatrixMult,
    Pad,
    Real,
    Restriction,
    Roll,
    Transpose,
    VStack,
)
from pullback.solvers import fista


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Operators -----------------------------------------------------------------------------------------------------------

OPERATORS = {
    "flip": Flip((3, 4)),
    "scaled": 3 * Roll(5),
    "product": Restriction((4, 3), [2, 0], axis=0) @ (2 * Transpose((3, 4), (1, 0))),
    "adjoint of pad": Pad(4, (2, 1)).H,
    "cut FFT": FFT((3, 8), nfft=5, norm="none"),
    "adjoint of long FFT": FFT(5, nfft=8, norm="1/n").H,
    "square FFT": (2j * FFT2D((3, 4))).H,
    "conjugate": (1j * FFT(5)).conj(),
    "conj": Conj(4),
    "real part": Real(4),
    "square": (Flip(4) @ Roll(4)) ** 2,
}
NONE = {
    "pad": Pad(4, (2, 1)),
    "repeats": Restriction(4, [1, 1]),
    "real FFT": FFT(6, real=True),
    "long FFT": FFT(5, nfft=8),
    "rows of columns": Restriction(4, [0, 1]).H @ Restriction(4, [0, 1]),
    "i times a real part": 1j * Real(4),
    "derivative": FirstDerivative(5),
}


def is_multiple_of_identity(op, c, adjoint):
    """A A^H y = c y (or A^H A x = c x) for vectors of the operator's own space."""
    first, dims = (op, op.dims) if adjoint else (op.H, op.dimsd)
    real = op._real_domain if adjoint else op._real_range
    for seed in range(3):
        x = randn(*dims, dtype=torch.float64 if real else torch.complex128, seed=seed)
        y = first.H(first(x))
        if not torch.allclose(y, (c * x).to(y.dtype), atol=1e-9):
            return False
    return True


@pytest.mark.parametrize("name", list(OPERATORS))
def test_coisometries(name):
    op = OPERATORS[name]
    c = op._coisometry()
    assert c is not None
    assert is_multiple_of_identity(op, c, False)
    assert op.H._isometry() == c


@pytest.mark.parametrize("name", list(NONE))
def test_what_is_no_coisometry(name):
    assert NONE[name]._coisometry() is None
    with pytest.raises(ArgumentError, match="no prox in closed form"):
        (L1() @ NONE[name]).prox(torch.ones(NONE[name].dims), 1.0)


def test_every_claimed_constant_holds():
    claims = 0
    for op in [op for cls in public_classes() for op in cls.examples()] + algebra_examples():
        for adjoint, c in ((False, op._coisometry()), (True, op._isometry())):
            if c is not None:
                claims += 1
                assert is_multiple_of_identity(op, c, adjoint), op
    assert claims > 10


def test_composition_with_a_coisometry():
    f = 0.4 * Huber(0.5) @ (2 * Restriction((4, 5), [3, 0], axis=0))
    x = randn(2, 4, 5)
    u = f.prox(x, 0.3)
    assert torch.equal(u[:, 1:3], x[:, 1:3])
    torch.testing.assert_close(u[:, [3, 0]], (0.4 * Huber(0.5)).prox(2 * x[:, [3, 0]], 4 * 0.3) / 2)
    assert (L1() @ Flip(4)).has_prox
    assert (SquaredL2() @ (2 * Flip(4))).strong_convexity == 4
    real = (0.1 * L1() @ FFT2D((4, 5))).prox(x, 1.0)
    assert real.dtype == torch.float64
    torch.testing.assert_close(
        real.to(torch.complex128), (0.1 * L1() @ FFT2D((4, 5))).prox(x.to(torch.complex128), 1.0)
    )


def test_wavelet_l1():
    f = 0.3 * WaveletL1((16, 16), "db2", 2)
    x = randn(2, 16, 16)
    assert f.has_prox
    W = f.operator
    torch.testing.assert_close(f(x), 0.3 * W(x).abs().sum((-2, -1)))
    torch.testing.assert_close(f.prox(x, 0.5), W.H(L1().prox(W(x), 0.15)))
    assert not WaveletL1((9, 9), "db2", 2).has_prox
    free = WaveletL1((16, 16), level=1, weight=torch.zeros(16, 16))
    torch.testing.assert_close(free.prox(x, 3.0), x)
    y = fista(Identity((16, 16)), x, 0.3 * WaveletL1((16, 16), "db2", 2)).x
    torch.testing.assert_close(y, f.prox(x, 1.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_least_squares_and_affine_set_against_dense_algebra(dtype):
    K, b, x = randn(3, 5, dtype=dtype), randn(3, dtype=dtype, seed=1), randn(2, 5, dtype=dtype, seed=2)
    f = LeastSquares(MatrixMult(K), b, rtol=1e-13)
    u = f.prox(x, torch.tensor([0.5, 2.0]))
    for i, step in enumerate((0.5, 2.0)):
        A = torch.eye(5, dtype=dtype) + step * K.mH @ K
        torch.testing.assert_close(u[i], torch.linalg.solve(A, x[i] + step * K.mH @ b))
    torch.testing.assert_close(f(x), (x @ K.T - b).abs().square().sum(-1) / 2)
    set_ = AffineSet(MatrixMult(K), b, rtol=1e-13)
    torch.testing.assert_close(set_.prox(x, 1.0), x - (x @ K.T - b) @ torch.linalg.pinv(K).T)
    assert (set_(set_.prox(x, 1.0)) == 0).all()
    assert (set_(x) == float("inf")).all()
    P = Quadratic(MatrixMult(K.mH @ K), rtol=1e-13)
    torch.testing.assert_close(P.prox(x[0], 2.0), torch.linalg.solve(torch.eye(5, dtype=dtype) + 2 * K.mH @ K, x[0]))
    assert f.operator is f.op
    torch.testing.assert_close(f.outer(f.operator(x)), f(x))


def test_a_complex_operator_on_real_vectors():
    F, x, b = FFT(6, nfft=4), randn(6), randn(4, dtype=torch.complex128, seed=1)
    dense = F.todense(torch.complex128)
    real = torch.cat([dense.real, dense.imag])
    data = torch.cat([b.real, b.imag])
    u = LeastSquares(F, b, rtol=1e-13).prox(x, 0.7)
    torch.testing.assert_close(
        u, torch.linalg.solve(torch.eye(6).double() + 0.7 * real.T @ real, x + 0.7 * real.T @ data)
    )
    c = F(randn(6, seed=3))
    v = AffineSet(F, c, rtol=1e-13).prox(x, 1.0)
    target = torch.cat([c.real, c.imag])
    torch.testing.assert_close(v, x - torch.linalg.pinv(real, rtol=1e-10) @ (real @ x - target))


def test_operators_and_data_get_gradients():
    x = randn(2, 5)
    K = randn(3, 5).requires_grad_()
    b = randn(3, seed=1).requires_grad_()
    solve = lambda K, b: LeastSquares(MatrixMult(K), b, rtol=1e-13).prox(x, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(solve, (K, b), check_forward_ad=True)  # x lies among the rows of K: cg ends early
    assert torch.autograd.gradgradcheck(solve, (K, b), fast_mode=True)
    assert torch.autograd.gradcheck(lambda K, b: AffineSet(MatrixMult(K), b, rtol=1e-13).prox(x, 0.7), (K, b))
    r = tensor(0.8).reshape(()).requires_grad_()
    for ball in (L1Ball, L2Ball, LinfBall, Simplex):
        assert torch.autograd.gradcheck(lambda r, ball=ball: ball(r).prox(x, 1.0), (r,))
    for make in (Log, ETP, lambda p: SCAD(p, 3.0), lambda p: MCP(p, 2.0), Huber):
        assert torch.autograd.gradcheck(lambda r, make=make: make(r).prox(x, 0.5), (r,))
    assert torch.autograd.gradcheck(lambda a, r: HalfSpace(a, r - 3).prox(x[0], 1.0), (randn(5).requires_grad_(), r))
    counts = rand(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, r: KullbackLeibler(b=b, background=r).prox(x.abs(), 0.5), (counts, r))


# Known values --------------------------------------------------------------------------------------------------------


def test_projections_on_balls():
    x = tensor(3.0, -1.0, 0.5)
    assert L1Ball(2.0).prox(x, 1.0).tolist() == [2, 0, 0]
    assert L1Ball(3.0).prox(x, 1.0).tolist() == [2.5, -0.5, 0]
    assert torch.equal(L1Ball(5.0).prox(x, 1.0), x)
    assert Linf().prox(x, 1.0).tolist() == [2, -1, 0.5]
    assert Linf()(x) == 3
    assert LinfBall(1.0).prox(x, 1.0).tolist() == [1, -1, 0.5]
    assert L2Ball(1.0).prox(tensor(3.0, 4.0), 1.0).tolist() == [0.6000000000000001, 0.8]
    assert L0Ball(1).prox(x, 1.0).tolist() == [3, 0, 0]
    assert L0Ball(7).prox(x, 1.0).tolist() == x.tolist()
    assert Simplex().prox(x, 1.0).tolist() == [1, 0, 0]
    assert Simplex(1.0).prox(tensor(0.4, 0.4, 0.4), 1.0).sum() == pytest.approx(1)
    assert L1Ball(1.0).prox(tensor(1.0, 1.0, 1.0, 1.0), 1.0).tolist() == [0.25] * 4  # ties
    assert L1Ball(1.0).prox(torch.zeros(3), 1.0).tolist() == [0, 0, 0]
    z = torch.tensor([3 + 4j, 0.1j])
    torch.testing.assert_close(L1Ball(1.0).prox(z, 1.0), torch.tensor([0.6 + 0.8j, 0]))
    for ball in (L1Ball(2.0), L2Ball(1.0), LinfBall(1.0), L0Ball(1), Simplex(), Hyperplane(x), HalfSpace(x)):
        u = ball.prox(x, 1.0)
        assert ball(u) == 0
        assert ball(u.float()) == 0
        assert ball(4 * x) == float("inf")
        assert (3 * ball)(u) == 0
    columns = Simplex(2.0, axis=0, dims=DIMS)
    u = columns.prox(randn(2, *DIMS), 1.0)
    torch.testing.assert_close(u.sum(1), torch.full((2, 4), 2.0, dtype=torch.float64))
    assert (columns(u) == 0).all()
    assert Hyperplane(tensor(1.0, 1.0), 2.0).prox(tensor(0.0, 0.0), 1.0).tolist() == [1, 1]
    assert HalfSpace(tensor(1.0, 1.0), 2.0).prox(tensor(0.0, 0.0), 1.0).tolist() == [0, 0]
    assert HalfSpace(tensor(1.0, 1.0), 2.0).conjugate(tensor(3.0, 3.0)) == 6
    assert HalfSpace(tensor(1.0, 1.0), 2.0).conjugate(tensor(-3.0, -3.0)) == float("inf")
    assert Hyperplane(tensor(1.0, 1.0), 2.0).conjugate(tensor(-3.0, -3.0)) == -6
    assert Hyperplane(tensor(1.0, 1.0), 2.0).conjugate(tensor(-3.0, 3.0)) == float("inf")


def test_penalties():
    x = tensor(2.0, -1.0, 0.0)
    assert L0()(x) == 2
    assert L0().prox(x, 1.0).tolist() == [2, 0, 0]
    assert Lp(0.5)(tensor(4.0, 9.0)) == 5
    # the threshold of the half norm: |x| <= 1.5 step^(2/3) goes to zero
    edge = 1.5 * 0.3 ** (2 / 3)
    assert Lp(0.5).prox(tensor(0.999 * edge, 1.001 * edge), 0.3).tolist() == [0, pytest.approx(edge / 1.5, rel=1e-2)]
    torch.testing.assert_close(Log(0.5)(x), torch.log(tensor(5.0, 3.0, 1.0)).sum())
    assert SCAD(1.0, 3.0)(tensor(5.0)) == 2
    assert MCP(1.0, 3.0)(tensor(5.0)) == 1.5
    assert ETP(2.0)(tensor(1.0)) == pytest.approx(1)
    assert Rank()(torch.ones(2, 3, 4)) == 2
    assert ZeroFunctional().prox(x, 1.0).tolist() == x.tolist()
    assert (L1() + ZeroFunctional()).prox(x, 1.0).tolist() == [1, 0, 0]
    delta = torch.nn.functional.huber_loss(x, torch.zeros(3).double(), reduction="sum", delta=1.5)
    torch.testing.assert_close(Huber(1.5)(x), delta)


def test_kullback_leibler():
    counts, x = tensor(3.0, 0.0, 1.0), tensor(2.0, 1.0, 0.5)
    f = KullbackLeibler(b=counts)
    torch.testing.assert_close(f(x), 3 * (tensor(1.5).log() - 1).sum() + 2 + 1 + (tensor(2.0).log() - 1).sum() + 0.5)
    assert f(counts) == 0
    assert f(tensor(1.0, -0.1, 1.0)) == float("inf")
    assert f(tensor(1.0, 0.0, 0.0)) == float("inf")
    assert f.conjugate(tensor(0.5, 1.0, 0.0)) == pytest.approx(3 * tensor(2.0).log().item())
    assert f.conjugate(tensor(0.5, 1.1, 0.0)) == float("inf")
    later = (2 * KullbackLeibler(3, background=0.5)).about(counts)
    torch.testing.assert_close(later(x), 2 * KullbackLeibler(b=counts)(x + 0.5))
    assert (SquaredL2() + L1()).about(x)(x) == 0
    assert L1().about(x)(x + 1) == 3
    # far out the root does not cancel
    w = KullbackLeibler(b=1.0).prox(torch.tensor([-1e6]), 1.0)
    torch.testing.assert_close(w, torch.tensor([1e-6]), rtol=1e-4, atol=0)


# Singular values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
def test_nuclear_prox_is_differentiable_where_singular_values_are_equal(shape, dtype):
    k = min(shape)
    left, right = torch.linalg.qr(randn(shape[0], k, dtype=dtype)).Q, torch.linalg.qr(randn(shape[1], k, dtype=dtype)).Q
    values = tensor(2.0, 2.0, 0.1, 0.1)[:k]
    x = ((left * values) @ right.mH).requires_grad_()
    for f in (Nuclear(), NuclearBall(3.0)):
        assert torch.autograd.gradcheck(lambda x, f=f: f.prox(x, 0.5), (x,), check_forward_ad=True)
    zero = torch.zeros(shape, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Nuclear().prox(x, 0.5), (zero,))


def test_matrices_of_a_member():
    x = randn(2, 5, 4, 3)
    f = Nuclear((5, 4, 3))
    s = torch.linalg.svdvals(x)
    torch.testing.assert_close(f(x), s.sum((-2, -1)))
    torch.testing.assert_close(torch.linalg.svdvals(f.prox(x, 0.7)), (s - 0.7).clamp(min=0))
    ball = NuclearBall(2.0, dims=(5, 4, 3))
    torch.testing.assert_close(torch.linalg.svdvals(ball.prox(x, 1.0)).sum((-2, -1)), tensor(2.0, 2.0))
    assert ball.conjugate(x).shape == (2,)
    together = torch.func.vmap(lambda m: Nuclear().prox(m, 0.7))(x[0])
    torch.testing.assert_close(together, f.prox(x, 0.7)[0])


# Sums and stacks -----------------------------------------------------------------------------------------------------


def test_which_sums_have_a_prox():
    has = [
        L1() + SquaredL2(), TV((4, 5)) + SquaredL2(), L1() + L21(), L1() + L2(), L1() + Box(0, None) + L21(),
        L1() + Box(0, 1) + Box(0.5, 2), L0() + SquaredL2(),
    ]  # fmt: skip
    has_not = [L1() + Linf(), Box(0, 1) + L21(), L21() + L2(), L0() + Box(0, 1), L1() + Nuclear(), Huber() + L21()]
    assert all(f.has_prox for f in has)
    assert not any(f.has_prox for f in has_not)
    assert not (L0() + SquaredL2()).convex
    assert (L1() + 3 * SquaredL2()).strong_convexity == 3
    x = tensor(-3.0, 0.2, 5.0)
    clipped = (L1() + Box(0, 4) + Box(1, 9)).prox(x, 0.5)
    assert clipped.tolist() == [1, 1, 4]


def test_stack_follows_vstack():
    D, K = FirstDerivative((3, 4), axis=0), MatrixMult(randn(2, 12))
    f = Stack([0.2 * L1(D.dimsd), L2(K.dimsd).translate(randn(2))])
    x = randn(2, 3, 4)
    g = f @ VStack([D, K @ Identity(12, (3, 4))])
    torch.testing.assert_close(g(x), 0.2 * D(x).abs().sum((-2, -1)) + (K(x.flatten(-2)) - randn(2)).norm(dim=-1))
    y = randn(2, 14)
    u = f.prox(y, torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(u[1, :12], (0.2 * L1()).prox(y[1, :12], 0.5))
    torch.testing.assert_close(u[1, 12:], L2().translate(randn(2)).prox(y[1, 12:], 0.5))
    both = Stack([SquaredL2((2, 4)), 3 * SquaredL2((1, 4))], axis=0)
    assert both.dims == (3, 4)
    assert (both.lipschitz, both.strong_convexity) == (3, 1)
    torch.testing.assert_close(both.grad(x), torch.cat([x[:, :2], 3 * x[:, 2:]], 1))
    assert Stack([Box(0, 1, dims=2), Box(-1, 0, dims=3)]).is_box
    assert not Stack([L0(2), L1(3)]).convex


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: L1Ball(0.0), ArgumentError, "L1Ball: radius must be a number > 0; got 0.0"),
        (lambda: Simplex(torch.ones(2)), ArgumentError, "Simplex: radius must be one number"),
        (lambda: Simplex(axis=2, dims=DIMS), ArgumentError, "axis must lie in"),
        (lambda: Simplex()(torch.ones(2, dtype=torch.complex64)), DtypeError, "Simplex: x must be real"),
        (lambda: L0Ball(0), ArgumentError, "k must be an int >= 1; got 0"),
        (lambda: Lp(1.0), ArgumentError, r"p must lie in \(0, 1\); got 1.0; use L1"),
        (lambda: Log(-1), ArgumentError, "Log: scale must be a number > 0; got -1"),
        (lambda: SCAD(1.0, 0.5), ArgumentError, "SCAD: a must be a number > 1; got 0.5"),
        (lambda: Huber(0), ArgumentError, "Huber: delta must be a number > 0; got 0"),
        (lambda: KullbackLeibler()(torch.ones(2)), ArgumentError, r"no counts b yet; write KullbackLeibler\(b=y\)"),
        (lambda: KullbackLeibler(b=torch.ones(2) * 1j), ArgumentError, "b must be real; got torch.complex64"),
        (lambda: KullbackLeibler(b=1.0)(torch.ones(2) * 1j), DtypeError, "KullbackLeibler: x must be real"),
        (lambda: Hyperplane(torch.zeros(3)), ArgumentError, "Hyperplane: normal must not be zero"),
        (lambda: HalfSpace(torch.ones(3), torch.ones(3)), ArgumentError, "offset must be one real number"),
        (lambda: AffineSet(torch.ones(2, 3), torch.ones(2)), ArgumentError, "wrap a matrix with MatrixMult"),
        (lambda: LeastSquares(None), ArgumentError, "op must be a pullback.LinearOperator; got NoneType"),
        (lambda: Quadratic(Pad(3, (1, 1))), ShapeError, r"maps? a space to itself; got \(3,\) -> \(5,\)"),
        (lambda: Nuclear()(torch.ones(3)), ShapeError, "a member must have two axes or more"),
        (lambda: Stack([L1()]), ArgumentError, "functionals that know their dims"),
        (lambda: Stack([]), ArgumentError, "at least one functional"),
        (lambda: Stack([L1((2, 3)), L1((2, 4))], axis=0), ShapeError, "must agree in all axes but 0"),
        (lambda: Linf().conjugate("x"), DtypeError, "got str"),
        (lambda: TV((4, 5)).conjugate(torch.ones(4, 5)), ArgumentError, "is not known in closed form"),
    ],
)
def test_errors(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_every_functional_is_shown_and_exported():
    import pullback.functionals as module

    names = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Functional)]
    assert len(names) >= 35
    for f in (L1Ball(2.0), Simplex(1.0, axis=-1), SCAD(0.3), KullbackLeibler(), Lp(0.5), Stack([L1(3), 2 * L2(4)])):
        assert repr(f) in (
            "L1Ball(2)", "Simplex(1, axis=-1)", "SCAD(0.3, 3.7)", "KullbackLeibler()", "Lp(0.5)",
            "Stack([L1(dims=(3,)), 2 * L2(dims=(4,))])",
        )  # fmt: skip


def test_data_of_operators_must_fit():
    K = MatrixMult(torch.ones(5, 3, dtype=torch.float64))
    S = MatrixMult(torch.eye(3, dtype=torch.float64))
    for make in (lambda b: LeastSquares(K, b), lambda b: AffineSet(K, b)):
        with pytest.raises(ShapeError, match=r": b must broadcast against K x of shape \(5,\); got \(3,\)"):
            make(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"Quadratic: b must broadcast against K x of shape \(3,\); got \(2,\)"):
        Quadratic(S, torch.ones(2, dtype=torch.float64))
    x = torch.ones(3, dtype=torch.float64)
    assert LeastSquares(K, 1.0)(x) == 10.0  # |3 - 1|^2 / 2 in five rows
    assert LeastSquares(K, torch.ones(2, 5, dtype=torch.float64))(x.expand(2, 3)).tolist() == [10.0, 10.0]
