"""LazyTensor against dense torch in float64: every method, shapes, batches, parts, errors, NumPy, complex numbers."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import pullback as pb
from pullback.kernels.lazy import ComplexLazyTensor, LazyTensor, Pm, Var, Vi, Vj
from pullback.kernels.operator import KernelOperator

M, N, D = 5, 4, 3
_generator = torch.Generator().manual_seed(7)


def rand(*shape, low=-1.5, high=1.5):
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=_generator)


x, y, p = rand(M, D), rand(N, D), rand(D)
u, v = rand(M, D, low=0.2, high=0.9), rand(N, D, low=0.2, high=0.9)
X, Y, P, U, V = Vi(x), Vj(y), Pm(p), Vi(u), Vj(v)
xd, yd, ud, vd = x[:, None], y[None], u[:, None], v[None]  # the dense twins
A, B = X - Y, xd - yd
S, Sd = A.sum(-1), B.sum(-1)
dot = lambda a, b: (a * b).sum(-1, keepdim=True)  # noqa: E731


def dense_of(lazy):
    y = lazy.dense() if isinstance(lazy, LazyTensor) else lazy
    return y


def close(lazy, expected, **tolerance):
    got = dense_of(lazy)
    if isinstance(lazy, LazyTensor):
        assert tuple(got.shape) == lazy.shape
        got = got.unsqueeze(-1) if lazy.ndim == 1 else got
    got, expected = torch.broadcast_tensors(got, expected)
    torch.testing.assert_close(got, expected, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))


UNARY = {
    "abs": torch.abs,
    "neg": torch.neg,
    "square": torch.square,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "asinh": torch.asinh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "sign": torch.sign,
    "step": lambda t: (t >= 0).double(),
    "relu": torch.relu,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "sinc": torch.sinc,
    "sinxdivx": lambda t: torch.sinc(t / math.pi),
    "logical_not": lambda t: (t == 0).double(),
    "sqnorm2": lambda t: t.square().sum(-1, keepdim=True),
    "norm2": lambda t: t.norm(dim=-1, keepdim=True),
    "norm": lambda t: t.norm(dim=-1, keepdim=True),
    "normalize": lambda t: t / t.norm(dim=-1, keepdim=True),
    "sum": lambda t: t.sum(-1, keepdim=True),
    "mean": lambda t: t.mean(-1, keepdim=True),
    "min": lambda t: t.amin(-1, keepdim=True),
    "max": lambda t: t.amax(-1, keepdim=True),
    "argmin": lambda t: t.argmin(-1, keepdim=True).double(),
    "argmax": lambda t: t.argmax(-1, keepdim=True).double(),
    "factorize": lambda t: t,
    "auto_factorize": lambda t: t,
}
POSITIVE = {
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "xlogx": lambda t: t * t.log(),
    "lgamma": torch.lgamma,
}


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one(name):
    arguments = (X,) if name == "factorize" else ()
    close(getattr(A, name)(*arguments), UNARY[name](B))


@pytest.mark.parametrize("name", POSITIVE)
def test_functions_of_positive(name):
    close(getattr(U * V, name)(), POSITIVE[name](ud * vd))


@pytest.mark.parametrize("name", ["asin", "acos"])
def test_functions_on_the_unit_interval(name):
    close(getattr(U * V, name)(), getattr(torch, name)(ud * vd))


CASES = {
    "add": (lambda: X + Y, lambda: xd + yd),
    "add number": (lambda: 2 + X, lambda: xd + 2),
    "add float": (lambda: X + 2.5, lambda: xd + 2.5),
    "subtract reflected": (lambda: 1.5 - X, lambda: 1.5 - xd),
    "multiply vector by scalar": (lambda: S * A, lambda: Sd[..., None] * B),
    "divide": (lambda: X / V, lambda: xd / vd),
    "divide reflected": (lambda: 3 / V, lambda: 3 / vd),
    "inverse": (lambda: 1 / V, lambda: 1 / vd),
    "powers": (lambda: X**2 + X**3, lambda: xd**2 + xd**3),
    "root": (lambda: V**0.5 + V**-0.5 + V**1.7 + V**-1, lambda: vd**0.5 + vd**-0.5 + vd**1.7 + vd**-1),
    "power of two": (lambda: U**V, lambda: ud**vd),
    "power reflected": (lambda: 2**X + 1.5**Y, lambda: 2**xd + 1.5**yd),
    "power method": (lambda: X.power(2) + U.pow(V), lambda: xd**2 + ud**vd),
    "negate": (lambda: -X + +Y, lambda: yd - xd),
    "abs": (lambda: abs(X), lambda: xd.abs()),
    "matern12": (lambda: (U | V).matern12(), lambda: torch.exp(-dot(ud, vd))),
    "matern32": (
        lambda: (U | V).matern32(),
        lambda: (1 + 3**0.5 * dot(ud, vd)) * torch.exp(-(3**0.5) * dot(ud, vd)),
    ),
    "matern52": (
        lambda: (U | V).matern52(),
        lambda: (1 + 5**0.5 * dot(ud, vd) + 5 / 3 * dot(ud, vd) ** 2) * torch.exp(-(5**0.5) * dot(ud, vd)),
    ),
    "scalar product": (lambda: X | Y, lambda: dot(xd, yd)),
    "python sum": (lambda: sum([X, Y]), lambda: xd + yd),
    "mod": (lambda: X.mod(2, 1), lambda: xd - 2 * torch.floor((xd - 1) / 2)),
    "percent": (lambda: X % 0.5, lambda: xd % 0.5),
    "parameter": (lambda: X * P, lambda: xd * p),
    "tensor left": (lambda: p * X + p - X, lambda: p * xd + p - xd),
    "tensor divides": (lambda: p / V, lambda: p / vd),
    "array left": (lambda: p.numpy() * X, lambda: p * xd),
    "numpy number": (lambda: np.float64(0.3) * X + np.int64(2), lambda: 0.3 * xd + 2),
    "0-d tensor": (lambda: X * torch.tensor(0.5), lambda: xd * 0.5),
    "list": (lambda: X - [1.0, 2.0, 3.0], lambda: xd - torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    "times zero": (lambda: X * 0, lambda: xd * 0),
    "addop": (lambda: X.addop(Y).subop(P).mulop(2).divop(4), lambda: (xd + yd - p) * 2 / 4),
    "less": (lambda: X < Y, lambda: (xd < yd).double()),
    "at most": (lambda: X <= Y, lambda: (xd <= yd).double()),
    "greater": (lambda: X > Y, lambda: (xd > yd).double()),
    "at least": (lambda: X >= 0, lambda: (xd >= 0).double()),
    "equal": (lambda: X == X, lambda: torch.ones(M, 1, D, dtype=torch.float64)),
    "not equal": (lambda: X != Y, lambda: (xd != yd).double()),
    "tensor compares": (lambda: p < X, lambda: (p < xd).double()),
    "tensor equals": (lambda: p == X, lambda: (p == xd).double()),
    "and not": (lambda: (X < Y) & ~(X < 0), lambda: ((xd < yd) & ~(xd < 0)).double()),
    "logical": (lambda: (X < 0).logical_or(Y < 0), lambda: ((xd < 0) | (yd < 0)).double()),
    "logical_and": (lambda: (X < 0).logical_and(Y < 0), lambda: ((xd < 0) & (yd < 0)).double()),
    "where": (lambda: (X < Y).where(X, 2.0), lambda: torch.where(xd < yd, xd, 2.0)),
    "ifelse": (lambda: X.ifelse(Y, 0), lambda: torch.where(xd >= 0, yd, 0.0)),
    "clamp": (lambda: X.clamp(0, 1) + X.clamp(-0.5, V), lambda: xd.clamp(0, 1) + xd.clamp(min=-0.5).minimum(vd)),
    "maximum": (lambda: X.maximum(Y) + X.minimum(0), lambda: xd.maximum(yd) + xd.clamp(max=0)),
    "atan2": (lambda: X.atan2(Y), lambda: torch.atan2(xd, yd)),
    "round": (lambda: X.round(2), lambda: xd.round(decimals=2)),
    "sqdist": (lambda: X.sqdist(Y), lambda: (B**2).sum(-1, keepdim=True)),
    "weighted norm 1": (lambda: A.weightedsqnorm(2.5), lambda: 2.5 * dot(B, B)),
    "weighted norm D": (lambda: A.weightedsqnorm(V), lambda: dot(B * vd, B)),
    "weighted norm matrix": (
        lambda: A.weightedsqnorm(U.tensorprod(V)),
        lambda: dot(B, ud) * dot(B, vd),
    ),
    "weighted distance": (lambda: X.weightedsqdist(Y, P), lambda: dot(B * p, B)),
    "difference matrix": (
        lambda: X.difference_matrix(Y[:2]),
        lambda: (xd[..., :, None] - yd[..., None, :2]).flatten(-2),
    ),
    "elem": (lambda: X.elem(1) + X[-1], lambda: xd[..., 1:2] + xd[..., 2:]),
    "extract": (lambda: X.extract(1, 2) + X[1:] + X[:, :, 1:], lambda: 3 * xd[..., 1:]),
    "strided components": (lambda: X[::2], lambda: xd[..., ::2]),
    "one_hot": (
        lambda: (X[0] * 2).one_hot(3),
        lambda: ((xd[..., :1] * 2 + 0.5).floor() == torch.arange(3)).double(),
    ),
    "concat": (lambda: X.concat(Y), lambda: torch.cat(torch.broadcast_tensors(xd, yd), -1)),
    "cat": (lambda: LazyTensor.cat((X, P, X[0]), 2), lambda: torch.cat([xd, p.expand(M, 1, D), xd[..., :1]], -1)),
    "concatenate": (lambda: LazyTensor.concatenate((X,), -1), lambda: xd),
    "matvecmult": (lambda: X.tensorprod(V).matvecmult(Y), lambda: xd * dot(vd, yd)),
    "vecmatmult": (lambda: Y.vecmatmult(X.tensorprod(V)), lambda: dot(xd, yd) * vd),
    "tensorprod": (lambda: X.tensorprod(Y), lambda: (xd[..., :, None] * yd[..., None, :]).flatten(-2)),
    "tensordot": (lambda: X.keops_tensordot(Y, (3,), (3,), (0,), (0,)), lambda: dot(xd, yd)),
    "tensordot permuted": (
        lambda: X.keops_tensordot(Y, (3,), (3,), (), (), (1, 0)),
        lambda: (yd[..., :, None] * xd[..., None, :]).flatten(-2),
    ),
    "kron": (lambda: X.keops_kron(Y, (3,), (3,)), lambda: (xd[..., :, None] * yd[..., None, :]).flatten(-2)),
    "grad": (lambda: (X**2 * Y).grad(X, P), lambda: 2 * xd * yd * p),
    "diff": (lambda: (X**2 * Y).diff(X, P), lambda: 2 * xd * yd * p),
    "grad_matrix": (lambda: (X * Y).grad_matrix(X), lambda: torch.diag_embed(yd + 0 * xd).flatten(-2)),
    "divergence": (lambda: (X**3).divergence(X), lambda: (3 * xd**2).sum(-1, keepdim=True)),
    "laplacian": (lambda: (X | X * Y).laplacian(X), lambda: 2 * yd.sum(-1, keepdim=True)),
    "trace_operator": (lambda: (X * Y).trace_operator(X), lambda: yd.sum(-1, keepdim=True)),
    "adjoint_operator": (lambda: (X * Y).adjoint_operator(X, P), lambda: p * yd),
    "unary": (lambda: X.unary("Exp", dimres=3).unary("Elem", 1, 2), lambda: xd[..., 2:].exp()),
    "binary": (lambda: X.binary(Y, "+").binary(Y, "Scalprod"), lambda: dot(xd + yd, yd)),
    "ternary": (lambda: X.ternary(Y, 0, "IfElse"), lambda: torch.where(xd >= 0, yd, 0.0)),
    "torch function": (lambda: torch.exp(X) + torch.sub(X, Y), lambda: xd.exp() + xd - yd),
    "index": (
        lambda: S * (S.i <= S.j) + S.i,
        lambda: (Sd * (torch.arange(M)[:, None] <= torch.arange(N)) + torch.arange(M)[:, None])[..., None],
    ),
    "transposed index": (
        lambda: (S * (S.i <= S.j + 1)).T,
        lambda: (Sd * (torch.arange(M)[:, None] <= torch.arange(N) + 1)).T[..., None],
    ),
    "not the diagonal": (
        lambda: S * (S.i != S.j),
        lambda: (Sd * (torch.arange(M)[:, None] != torch.arange(N)))[..., None],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operation(name):
    lazy, expected = CASES[name]
    lazy, expected = lazy(), expected()
    close(lazy, expected)
    total = lazy.sum(1)  # the engine agrees with the dense values, and keeps rows
    rows = torch.broadcast_to(expected, (*lazy._shape[:2], expected.shape[-1]))
    torch.testing.assert_close(total, rows.sum(1), rtol=1e-12, atol=1e-11)


def test_bspline_and_softdtw():
    knots = torch.linspace(0, 1, 7, dtype=torch.float64)
    basis = Pm(knots).bspline(U[0], 2)
    assert basis.ndim == 4
    inside = ((u[:, 0] >= knots[2]) & (u[:, 0] < knots[4]))[:, None]
    torch.testing.assert_close(
        torch.where(inside, basis.dense().squeeze(1).sum(-1, keepdim=True), 1.0), torch.ones(M, 1).double()
    )
    assert X.softdtw_sqdist(Y, 0.1).shape == (M, N)


REDUCTIONS = {
    "sum": lambda t, d: t.sum(d),
    "mean": lambda t, d: t.mean(d),
    "var": lambda t, d: t.var(d),
    "prod": lambda t, d: t.prod(d),
    "min": lambda t, d: t.amin(d),
    "max": lambda t, d: t.amax(d),
    "argmin": lambda t, d: t.argmin(d),
    "argmax": lambda t, d: t.argmax(d),
    "any": lambda t, d: (t != 0).any(d),
    "all": lambda t, d: (t != 0).all(d),
    "count": lambda t, d: (t != 0).sum(d),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name, dim):
    expected = REDUCTIONS[name](B, dim)
    for got in (
        getattr(A, name)(dim),
        getattr(A, name)(dim=dim - 3),
        getattr(A, name + "_reduction")(axis=dim),
        A.reduction({"any": "Any", "argmin": "ArgMin", "argmax": "ArgMax"}.get(name, name.capitalize()), dim=dim),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1])
def test_weighted_and_selecting_reductions(dim):
    g = A.cos()
    gd = B.cos()
    torch.testing.assert_close(S.logsumexp(dim), Sd.logsumexp(dim)[:, None])
    weighted = (Sd.exp()[..., None] * ud).sum(dim).log()
    torch.testing.assert_close(S.logsumexp(dim, weight=U), weighted)
    torch.testing.assert_close(S.reduction("LogSumExpWeight", U, dim=dim), weighted)
    soft = (Sd.softmax(dim)[..., None] * gd).sum(dim)
    torch.testing.assert_close(S.sumsoftmaxweight(g, dim), soft)
    torch.testing.assert_close(S.sumsoftmaxweight_reduction(weight=g, dim=dim), soft)
    for largest, name in ((False, "Kmin"), (True, "Kmax")):
        values, indices = Sd.movedim(dim, 1).topk(2, 1, largest=largest)
        torch.testing.assert_close(getattr(S, name)(2, dim), values)
        assert torch.equal(getattr(S, "arg" + name)(K=2, dim=dim), indices)
        both = getattr(S, f"{name}_arg{name}")(2, dim=dim)
        torch.testing.assert_close(both[0], values)
        assert torch.equal(both[1], indices)
        wide = B.movedim(dim, 1).topk(2, 1, largest=largest)
        torch.testing.assert_close(getattr(A, name)(2, dim), wide.values)
    for name in ("min", "max"):
        value, where = getattr(A, f"{name}_arg{name}")(dim=dim)
        torch.testing.assert_close(value, getattr(B, "a" + name)(dim))
        assert torch.equal(where, getattr(B, "arg" + name)(dim))


def test_options_of_reductions():
    expected = B.sum(1)
    out = torch.empty(M, D, dtype=torch.float64)
    assert A.sum(1, out=out) is out
    torch.testing.assert_close(out, expected)
    for options in (
        {"backend": "eager"},
        {"backend": "CPU", "device_id": 0, "enable_chunks": True, "use_fast_math": True},
        {"dtype_acc": "float64"},
        {"use_double_acc": True},
        {"sum_scheme": "kahan_scheme"},
    ):
        torch.testing.assert_close(A.sum(1, **options), expected)
    with pytest.raises(pb.ArgumentError, match="no argument 'foo'"):
        A.sum(1, foo=3)


def test_products():
    b, c = rand(N), rand(M, 2)
    torch.testing.assert_close(S @ b, Sd @ b)
    torch.testing.assert_close(S @ b[:, None], (Sd @ b)[:, None])
    torch.testing.assert_close(S.T @ c, Sd.T @ c)
    torch.testing.assert_close(S.t() @ c[:, 0], Sd.T @ c[:, 0])
    wide, stack = rand(N, 70), rand(2, N, 3)
    torch.testing.assert_close(S @ wide, Sd @ wide)
    torch.testing.assert_close(S @ stack, Sd @ stack)
    z = torch.complex(rand(N, 2), rand(N, 2))
    torch.testing.assert_close(S @ z, Sd.to(z.dtype) @ z)
    close((A - A.T.T) + (S - S.T.T), torch.zeros(M, N, 1).double())


def test_attributes():
    assert (S.shape, S._shape, A.shape, S.dim(), A.ndim, S.ndim) == ((M, N), (M, N, 1), (M, N, D), 3, D, 1)
    assert (A.ni, A.nj, X.ni, X.nj, A.nbatchdims, len(A)) == (M, N, M, None, 0, M)
    assert (X.axis, Y.axis, P.axis, A.axis) == (0, 1, 2, None)
    assert X._shape == (M, 1, D) and Y._shape == (1, N, D) and P._shape == (1, 1, D)
    assert A.dtype == "float64" and A.backend is None and A.ranges is None and not A.is_complex
    assert A.variables[0] is x
    assert S.formula == "Sum(Subtract(Var(0,3,0),Var(1,3,1)))"
    assert A.T.shape == (N, M, D)
    assert "LazyTensor of shape (5, 4, 1): Sum(Subtract(x0, x1))" in repr(S)
    assert "x1 = Vj(3), float64 of shape (4, 3)" in repr(S)


def test_every_way_to_make_one():
    for lazy in (
        Vi(x),
        LazyTensor(x[:, None]),
        LazyTensor(x, axis=0),
        Var(x, None, 0),
        LazyTensor(torch.nn.Parameter(x), 0),
    ):
        close(lazy, xd)
    for lazy in (Vj(y), LazyTensor(y[None]), LazyTensor(y, axis=1)):
        close(lazy, yd)
    for lazy in (Pm(p), LazyTensor(p), LazyTensor(p[None, None]), Pm(p.tolist()) + X * 0, LazyTensor(p, axis=2)):
        close(lazy, p)
    close(Pm(2.5) * X, 2.5 * xd)
    close(Pm(2) * X, 2 * xd)
    close(LazyTensor(2) * X, 2 * xd)
    close(Vi(x.t().contiguous().t()[:, ::2]), xd[..., ::2])
    close(Vi(torch.arange(M)[:, None]) * X, torch.arange(M)[:, None, None] * xd)  # integers take the others' dtype
    close(Vi(torch.arange(M)[:, None] > 2) * X, (torch.arange(M) > 2)[:, None, None] * xd)
    assert (Vi(torch.arange(M)[:, None]) * 1).dtype == "float32"


def test_equal_formulas_share_a_program_and_equal_data_a_variable():
    other = Vi(rand(9, D)) - Vj(rand(2, D))
    assert other._expr is A._expr
    assert len((A * (Vi(x) + Vj(y)))._domain.leaves) == 2
    assert len((X * 0.5 + X * 0.5)._domain.leaves) == 3  # each float is a parameter of its own
    half = X * 0.25
    assert len((half * half)._domain.leaves) == 2


def test_symbolic():
    f = (Vi(0, D) - Vj(1, D)).sqnorm2().sum(1)
    expected = (B**2).sum((1, 2))[:, None]
    torch.testing.assert_close(f(x, y), expected)
    np.testing.assert_allclose(f(x.numpy(), y.numpy()), expected)
    assert "argument 0 of the call" in repr(f) and f.axis == 1
    g = (X - Var(0, D, 1)).sqnorm2().sum(dim=1)
    torch.testing.assert_close(g(y), expected)
    h = A.sqnorm2().sum(1, call=False)
    torch.testing.assert_close(h(), expected)
    with pytest.raises(pb.ArgumentError, match="argument 1 of the formula is open"):
        f(x)
    with pytest.raises(pb.ShapeError, match=r"got \(4, 2\)"):
        f(x, y[:, :2])
    with pytest.raises(pb.ShapeError, match="dimensions 3 and 2"):
        Vi(0, 3)[:2] - Vi(0, 2)


def test_batches_broadcast():
    a, b = rand(2, 1, M, D), rand(3, N, D)
    K = (-(Vi(a) - Vj(b)).sqnorm2()).exp()
    dense = (-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)).exp()
    assert K.shape == (2, 3, M, N) and K.nbatchdims == 2 and K.dim() == 5
    torch.testing.assert_close(K.dense(), dense)
    torch.testing.assert_close(K.sum(3), dense.sum(3)[..., None])
    torch.testing.assert_close(K.sum(dim=-3), dense.sum(2)[..., None])
    assert torch.equal(K.argmin(axis=2)[..., 0], dense.argmin(2))
    c = rand(N, 2)
    torch.testing.assert_close(K @ c, dense @ c)
    torch.testing.assert_close((K * Pm(rand(3, 1)))[..., 1:3, :].dense().shape, torch.Size([2, 3, 2, N]))
    s = rand(3, 1)
    torch.testing.assert_close((K * Pm(s)).sum(2), (dense * s[..., None]).sum(2)[..., None])
    same = LazyTensor(a[..., :, None, :]) - LazyTensor(b[..., None, :, :])
    torch.testing.assert_close(same.sum(3), (a[..., :, None, :] - b[..., None, :, :]).sum(3))


def test_rows_and_columns():
    mask = (S < 0.3) * S
    full = mask.dense()
    i, j = torch.tensor([3, 0, -1]), torch.tensor([True, False, True, True])
    for key in (
        (slice(1, 3), slice(None)),
        (slice(None), slice(1, None)),
        (i, slice(None)),
        (i, j),
        (slice(None, None, 2), slice(None, None, -1)),
    ):
        expected = (
            full[key[0]][:, key[1]] if not isinstance(key[1], slice) or key[1].step != -1 else full[key[0]].flip(1)
        )
        torch.testing.assert_close(mask[key].dense(), expected)
    torch.testing.assert_close(S[:2].dense(), Sd[:2])
    torch.testing.assert_close(A[1:3, :, 0].dense(), B[1:3, :, 0])
    torch.testing.assert_close(S[..., 1:3].dense(), Sd[:, 1:3])
    lower = S * (S.i >= S.j)
    tri = Sd * (torch.arange(M)[:, None] >= torch.arange(N))
    for key in (slice(2, 4), slice(None, None, 2), torch.tensor([4, 1])):
        torch.testing.assert_close(lower[key, 1:].dense(), tri[key][:, 1:])  # the index still counts rows of the whole
        torch.testing.assert_close(lower[key, 1:].sum(1), tri[key][:, 1:].sum(1, keepdim=True))
    cut = S[2:4]
    torch.testing.assert_close((cut * (cut.i == cut.j)).dense(), Sd[2:4] * torch.eye(2, N).double())
    with pytest.raises(pb.ShapeError, match="mask for i must have 5"):
        S[torch.ones(3, dtype=torch.bool), :]
    with pytest.raises(pb.ShapeError, match=r"outside 0 \.\. 3"):
        S[:, torch.tensor([4])]
    with pytest.raises(pb.ArgumentError, match="varies with j"):
        X[:, 1:2]
    with pytest.raises(pb.ShapeError, match="component 3"):
        X[3]


def test_diagonal_and_trace():
    square = (X - Vj(x + 1)).sum(-1)
    torch.testing.assert_close(square.diag(), square.dense().diagonal())
    torch.testing.assert_close(square.trace(), square.dense().trace())
    torch.testing.assert_close(
        (square * (square.i + 1)).trace(), (square.dense().diagonal() * torch.arange(1, M + 1)).sum()
    )
    with pytest.raises(pb.ShapeError, match="as many rows as columns"):
        S.diag()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: X + Vj(rand(N, 2)), pb.ShapeError, r"3, 2.*shapes \(5, 1, 3\), \(1, 4, 2\)"),
        (lambda: X + Vi(rand(6, D)), pb.ShapeError, r"5 and 6, in tensors of shapes \(5, 3\) and \(6, 3\)"),
        (lambda: Y + Vj(rand(6, D)), pb.ShapeError, "numbers of rows j disagree: 4 and 6"),
        (lambda: X + Vj(y.float()), pb.DtypeError, "float64.*float32"),
        (lambda: X + Vj(torch.empty(N, D, dtype=torch.float64, device="meta")), pb.DeviceError, "cpu.*meta"),
        (lambda: Vi(rand(2, M, D)) + Vj(rand(3, N, D)), pb.ShapeError, r"\(2,\) and \(3,\)"),
        (lambda: LazyTensor(x), pb.ShapeError, "axis=0"),
        (lambda: LazyTensor(rand(2, 3, 4)), pb.ShapeError, "must have length 1"),
        (lambda: LazyTensor("text"), pb.ArgumentError, "got str"),
        (lambda: bool(S), pb.ArgumentError, "no truth value"),
        (lambda: list(S), pb.ArgumentError, "cannot be iterated"),
        (lambda: A.logsumexp(1), pb.ShapeError, "scalar formula"),
        (lambda: S.logsumexp(2), pb.ArgumentError, "over i or j"),
        (lambda: S.sum(3), pb.ArgumentError, r"axis must be 0 \(i\), 1 \(j\)"),
        (lambda: S.logsumexp(), pb.ArgumentError, "needs axis"),
        (lambda: A @ rand(N), pb.ShapeError, "one component"),
        (lambda: S @ rand(N + 1), pb.ShapeError, r"\(4,\).*got \(5,\)"),
        (lambda: S @ rand(N).float(), pb.DtypeError, "float32"),
        (lambda: rand(M) @ S, pb.ArgumentError, "K.T @ b"),
        (lambda: A.grad(A, X), pb.ArgumentError, "by a variable"),
        (lambda: A.one_hot(3), pb.ShapeError, "one component"),
        (lambda: A.unary("Foo"), pb.ArgumentError, "unknown operation 'Foo'"),
        (lambda: P.i, pb.ArgumentError, "varies with i"),
        (lambda: S.reduction("Foo", axis=1), pb.ArgumentError, "unknown reduction"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_numpy_twin():
    xa, ya, ba = x.numpy(), y.numpy(), rand(N).numpy()
    K = (-((Vi(xa) - Vj(ya)) ** 2).sum(-1)).exp()
    dense = np.exp(-((xa[:, None] - ya[None]) ** 2).sum(-1))
    for got, expected in (
        (K.sum(1), dense.sum(1, keepdims=True)),
        (K @ ba, dense @ ba),
        (K.dense(), dense),
        (K.argKmin(2, dim=1), dense.argsort(1)[:, :2]),
        (K.min_argmin(dim=0)[0], dense.min(0)[:, None]),
        (K[1:3].dense(), dense[1:3]),
        ((K * (K.i < K.j)).sum(1), np.triu(dense, 1).sum(1, keepdims=True)),
        (LazyTensor(xa[:, None, :]).sum(0), xa.sum(0, keepdims=True)),
        (K.T @ xa, dense.T @ xa),
    ):
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert len((Vi(xa) * Vi(xa))._domain.leaves) == 1
    assert isinstance((Vi(xa) - Vj(y)).sum(1), torch.Tensor)


def test_scipy():
    from scipy.sparse.linalg import aslinearoperator, cg, eigsh

    K = (-(X - Vj(x)).sqnorm2()).exp()
    op = aslinearoperator(K)
    dense = K.dense().numpy()
    assert op.shape == (M, M) and op.dtype == np.float64
    b = rand(M, 2).numpy()
    np.testing.assert_allclose(op @ b, dense @ b)
    np.testing.assert_allclose(op.T @ b[:, 0], dense.T @ b[:, 0])
    np.testing.assert_allclose(op.matvec(b[:, :1]), dense @ b[:, :1])
    solution, info = cg(op, b[:, 0], rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(dense @ solution, b[:, 0], atol=1e-8)
    np.testing.assert_allclose(eigsh(op, 1)[0][0], np.linalg.eigvalsh(dense)[-1])
    single = aslinearoperator(K.float())  # SciPy hands over float64 vectors
    assert single.dtype == np.float32 and single.matvec(b[:, 0]).dtype == np.float32


def test_complex():
    z, w = torch.complex(x, rand(M, D)), torch.complex(y, rand(N, D))
    Z, W = Vi(z), Vj(w)
    zd, wd = z[:, None], w[None]
    assert isinstance(Z, ComplexLazyTensor) and Z.shape == (M, 1, D) and Z.dtype == "complex128" and Z.is_complex
    for lazy, expected in (
        (Z + W, zd + wd),
        (Z - Y, zd - yd),
        (X * W, xd * wd),
        (Z / W, zd / wd),
        (2 * Z - 0.5j * W, 2 * zd - 0.5j * wd),
        (Z / 2 + 1, zd / 2 + 1),
        (1 / Z, 1 / zd),
        (Z.conj() - (-W), zd.conj() + wd),
        ((Z * W).exp(), (zd * wd).exp()),
        (Z**3 + Z**-2 + Z**0, zd**3 + zd**-2 + 1),
        (Z.sum(-1) * W, zd.sum(-1, keepdim=True) * wd),
        (Z.mean(-1), zd.mean(-1, keepdim=True)),
        (Z.real + W.imag, zd.real + wd.imag),
        (Z.abs() + abs(W), zd.abs() + wd.abs()),
        (Z.angle(), zd.angle()),
        (Z.norm2(), zd.norm(dim=-1, keepdim=True)),
        (Z[1] + Z[1:].sum(-1), zd[..., 1:2] + zd[..., 1:].sum(-1, keepdim=True)),
        (Z.concat(X), torch.cat([zd, xd.to(zd.dtype)], -1)),
        (X.real2complex() + Y.imag2complex(), torch.complex(*torch.broadcast_tensors(xd, yd))),
        (X.exp1j(), torch.exp(1j * xd)),
        (X + 1j * Y, xd + 1j * yd),
        (Z == Z, torch.ones(M, 1, D).double()),
        (Z != W, (zd != wd).double()),
    ):
        close(lazy, expected)
    torch.testing.assert_close((Z * W).sum(1), (zd * wd).sum(1))
    torch.testing.assert_close((Z * W).mean(0), (zd * wd).mean(0))
    K, Kd = (1j * (X | Y)).exp(), (1j * dot(xd, yd)).exp().squeeze(-1)
    b, c = rand(N, 2), torch.complex(rand(N), rand(N))
    torch.testing.assert_close(K @ b, Kd @ b.to(Kd.dtype))
    torch.testing.assert_close(K @ c, Kd @ c)
    torch.testing.assert_close(K.T @ c[:1].expand(M), Kd.T @ c[:1].expand(M))
    np.testing.assert_allclose(K.rmatvec(x[:, 0].numpy()), (Kd.mH @ x[:, 0].to(Kd.dtype)).numpy())
    torch.testing.assert_close(K[1:3].dense(), Kd[1:3])
    assert isinstance(Vi(z.numpy()).sum(0), np.ndarray)
    with pytest.raises(pb.DtypeError, match="not defined for complex"):
        Z.cos()
    with pytest.raises(pb.DtypeError, match="not ordered"):
        _ = Z < W
    with pytest.raises(pb.DtypeError, match="Max of complex"):
        Z.reduction("Max", axis=1)


def test_gradients():
    a, b, s = (t.clone().requires_grad_() for t in (x, y, p))

    def f(a, b, s):
        K = (-(Vi(a) - Vj(b)).weightedsqnorm(Pm(s) ** 2)).exp()
        return K @ b[:, 0], (K * 0.5).logsumexp(1), K.max(1)

    def dense(a, b, s):
        K = (-((a[:, None] - b) ** 2 * s**2).sum(-1)).exp()
        return K @ b[:, 0], (K * 0.5).logsumexp(1, keepdim=True), K.amax(1, keepdim=True)

    weights = [rand(*t.shape) for t in dense(a, b, s)]
    for got, expected in zip(f(a, b, s), dense(a, b, s), strict=True):
        torch.testing.assert_close(got, expected)
    first = [
        torch.autograd.grad(
            sum((t * w).sum() for t, w in zip(g(a, b, s), weights, strict=True)), (a, b, s), create_graph=True
        )
        for g in (f, dense)
    ]
    torch.testing.assert_close(first[0], first[1])
    second = [torch.autograd.grad(sum(t.square().sum() for t in g), (a, b, s)) for g in first]
    torch.testing.assert_close(second[0], second[1])
    torch.testing.assert_close(
        torch.func.hessian(lambda t: f(a, t, s)[0].sum())(b), torch.func.hessian(lambda t: dense(a, t, s)[0].sum())(b)
    )
    parameter = torch.nn.Parameter(x)
    (Vi(parameter) * Y).sum(1).sum().backward()
    torch.testing.assert_close(parameter.grad, y.sum(0).expand(M, D))
    scale = torch.tensor(0.3, requires_grad=True)  # a 0-d float32 tensor among float64 ones
    (X * scale).sum(0).sum().backward()
    torch.testing.assert_close(scale.grad, x.sum().float())


COMPILED = {
    "product": lambda a: (-(Vi(a) - Vj(a)).sqnorm2()).exp() @ y[:, :1].repeat(2, 1)[:M],
    "closure and mask": lambda a: (S * (S.i < S.j)) @ a[:N],
    "weight and float": lambda a: ((Vi(a) * 0.5) | Y).logsumexp(1, weight=V),
    "tensors on both sides": lambda a: ((p - Vi(a)) / p * Y - a[0]).var(0),
    "transpose": lambda a: (Vi(a)[0] - Y[1]).T @ a,
    "minimum": lambda a: (Vi(a) - Y).min(1),
    "complex": lambda a: (Vi(a) | Y).exp1j().real.sum(1),
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile(name):
    torch._dynamo.reset()
    f = COMPILED[name]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a = x.clone().requires_grad_()
    torch.testing.assert_close(compiled(a), f(a))
    got, expected = (torch.autograd.grad(g(a).sin().sum(), a) for g in (compiled, f))
    torch.testing.assert_close(got, expected)


def test_copies():
    K = (A * 0.5).sum(-1) + Pm(p)[0]
    for other in (pickle.loads(pickle.dumps(K)), copy.deepcopy(K), copy.copy(K)):
        assert other._expr is K._expr
        torch.testing.assert_close(other.dense(), K.dense())
        torch.testing.assert_close((other + other).sum(1), 2 * K.sum(1))


def test_conversions():
    assert A.float().dtype == "float32" and A.float().double().dtype == "float64"
    close(A.float().to(torch.float64), B, rtol=1e-6, atol=1e-6)
    a = x.clone().requires_grad_()
    assert not Vi(a).detach().sum(0).requires_grad and Vi(a).sum(0).requires_grad
    half = (Vi(x.bfloat16()) - Vj(y.bfloat16())).sum(1)
    assert half.dtype == torch.bfloat16 and (Vi(x.bfloat16()) * 1).dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), B.sum(1), rtol=0.05, atol=0.05)


def test_linear_operator():
    K = (-(X - Y).sqnorm2()).exp()
    op, dense = K.operator(), K.dense()
    assert isinstance(op, KernelOperator) and op.shape == (M, N) and op.dims == (N,)
    b, c = rand(3, 2, N), rand(M)
    torch.testing.assert_close(op(b), b @ dense.T)
    torch.testing.assert_close(op.H(c), dense.T @ c)
    torch.testing.assert_close(op.todense(), dense)
    F = pb.FirstDerivative(N)
    torch.testing.assert_close((K @ F)(b), F(b) @ dense.T)
    torch.testing.assert_close((F @ K.T)(c), F(dense.T @ c))
    torch.testing.assert_close((pb.MatrixMult(dense) + K)(b), 2 * b @ dense.T)
    torch.testing.assert_close((K - pb.MatrixMult(dense))(b), 0 * b @ dense.T)
    torch.testing.assert_close((K @ K.T)(c), dense @ dense.T @ c)
    assert pickle.loads(pickle.dumps(op))(b).equal(op(b))
    square = (-(X - Vj(x)).sqnorm2()).exp()
    solution = pb.cg(square, c, damp=0.1, rtol=1e-12).x
    torch.testing.assert_close(solution, torch.linalg.solve(square.dense() + 0.1 * torch.eye(M).double(), c))
    torch.testing.assert_close(
        pb.lsqr(K, dense @ b[0, 0], maxiter=200, atol=1e-14, btol=1e-14).x, b[0, 0], rtol=1e-6, atol=1e-6
    )
    with pytest.raises(pb.ShapeError, match="a matrix"):
        A.operator()


@pytest.mark.parametrize("k", range(4))
def test_conformance(k):
    op = list(KernelOperator.examples())[k]
    pb.check(op, compile=False).raise_if_failed()


def test_ranges():
    from pullback.kernels import cluster

    keep = torch.tensor([[True, False], [False, True]])
    pattern = cluster.from_matrix(torch.tensor([[0, 2], [2, M]]), torch.tensor([[0, 1], [1, N]]), keep)
    mask = torch.zeros(M, N, dtype=torch.float64)
    mask[:2, :1] = 1
    mask[2:, 1:] = 1
    K = S.exp()
    K.ranges = pattern
    b = rand(N)
    torch.testing.assert_close(K @ b, (Sd.exp() * mask) @ b)
    torch.testing.assert_close((2 * K).sum(0), 2 * (Sd.exp() * mask).sum(0)[:, None])
    torch.testing.assert_close(K.T @ x[:, 0], (Sd.exp() * mask).T @ x[:, 0])
    torch.testing.assert_close(K.operator().todense(), Sd.exp() * mask)
    torch.testing.assert_close(S.exp().sum(1, ranges=pattern), (Sd.exp() * mask).sum(1, keepdim=True))
    assert "with ranges" in repr(K)
    with pytest.raises(pb.ArgumentError, match="set ranges = None"):
        K[:2]
