"""Reductions against dense torch: values, derivatives of every order and mode, transforms, shapes, errors."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import pullback as pb
from pullback.kernels.ir.expr import PARAMETER, I, J, builders, index, variable
from pullback.kernels.reduce import KINDS, Reducer

SIGNATURE = ((3, I), (3, J), (2, J), (1, PARAMETER))
X, Y, B, P = (variable(p, dim, category) for p, (dim, category) in enumerate(SIGNATURE))
NAMES = ("x", "y", "b", "p")
KERNEL = builders["Exp"](-(builders["Sum"](builders["Square"](X - Y)) * P))
VECTOR = KERNEL * B + builders["Sum"](X * Y)
WEIGHT = builders["Square"](B)


def data(m=4, n=5, batch=(), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, m, 3), (*batch, n, 3), (*batch, n, 2), (*batch, 1))
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tuple(t.to(dtype) for t in (*made[:3], made[3].abs() + 0.5))


def pairs(x, y, b, p):
    """The kernel (..., M, N, 1) and the vector formula (..., M, N, 2)."""
    square = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1, keepdim=True)
    kernel = torch.exp(-square * p[..., None, None, :])
    return kernel, kernel * b[..., None, :, :] + (x[..., :, None, :] * y[..., None, :, :]).sum(-1, keepdim=True)


def topk(f, k, axis, largest):
    order = torch.sort(f, dim=axis, descending=largest, stable=True).indices.narrow(axis, 0, k)
    return f.gather(axis, order).transpose(-2, axis), order.transpose(-2, axis)


def _k(largest, pick):
    def dense(kernel, vector, weight, axis):
        # (..., K, other, dim) or (..., other, K, dim) -> (..., other, K, dim)
        values, order = topk(vector, 2, axis, largest)
        return {"v": values, "i": order, "vi": (values, order)}[pick]

    return dense


def _extreme(largest, pick):
    def dense(kernel, vector, weight, axis):
        found = (torch.max if largest else torch.min)(vector, axis)
        return {"v": found.values, "i": found.indices, "vi": tuple(found)}[pick]

    return dense


# kind -> (formula, weight, dense definition of (kernel, vector, weight, axis))
DENSE = {
    "Sum": (VECTOR, None, lambda k, v, w, axis: v.sum(axis)),
    "LogSumExp": (KERNEL, WEIGHT, lambda k, v, w, axis: torch.log((k.exp() * w).sum(axis))),
    "SumSoftMax": (KERNEL, B, lambda k, v, w, axis: (torch.softmax(k, axis) * w).sum(axis)),
    "Prod": (VECTOR, None, lambda k, v, w, axis: v.prod(axis)),
    "Mean": (VECTOR, None, lambda k, v, w, axis: v.mean(axis)),
    "Var": (VECTOR, None, lambda k, v, w, axis: v.var(axis)),
    "Any": (builders["LessThan"](2.0, VECTOR), None, lambda k, v, w, axis: (v > 2).any(axis)),
    "All": (builders["LessThan"](-2.0, VECTOR), None, lambda k, v, w, axis: (v > -2).all(axis)),
    "Count": (builders["LessThan"](0.0, VECTOR), None, lambda k, v, w, axis: (v > 0).sum(axis)),
    **{
        f"{a}{name}": (VECTOR, None, make(largest, pick))
        for name, largest in (("Min", False), ("Max", True))
        for a, pick in (("", "v"), ("Arg", "i"), (f"{name}_Arg", "vi"))
        for make in (_extreme,)
    },
    **{
        f"{a}K{name}": (VECTOR, None, _k(largest, pick))
        for name, largest in (("Min", False), ("Max", True))
        for a, pick in (("", "v"), ("Arg", "i"), (f"K{name}_Arg", "vi"))
    },
}
SMOOTH = ["Sum", "LogSumExp", "SumSoftMax", "Prod", "Mean", "Var", "Min", "Max", "KMin", "KMax"]
BACKENDS = ["auto", "eager"]


def reducer(kind, axis=1):
    formula, weight, _ = DENSE[kind]
    return Reducer(kind, formula, SIGNATURE, axis, weight=weight, k=2, names=NAMES)


def dense(kind, args, axis=1):
    kernel, vector = pairs(*args)
    b = args[2][..., None, :, :].expand(*kernel.shape[:-1], 2)
    weight = b**2 if kind == "LogSumExp" else b
    return DENSE[kind][2](kernel, vector, weight, -3 if axis == 0 else -2)


def same(found, expected, tol=1e-12):
    if isinstance(expected, tuple):
        for a, b in zip(found, expected, strict=True):
            same(a, b, tol)
    else:
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_every_kind_is_tested():
    assert set(DENSE) == set(KINDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_value(kind, axis, backend):
    for m, n, batch in ((4, 5, ()), (3, 37, (2,)), (70, 2, ())):
        args = data(m, n, batch)
        same(reducer(kind, axis)(args, backend=backend), dense(kind, args, axis))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", SMOOTH)
def test_derivatives(kind, axis):
    args = tuple(t.requires_grad_() for t in data(3, 4))
    r = reducer(kind, axis)
    f = lambda *a: r(a)  # noqa: E731
    assert gradcheck(f, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, args, check_batched_grad=True, check_fwd_over_rev=True)


TRANSFORMS = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "third": lambda f: jacfwd(jacrev(jacfwd(f))),
    "jvp": lambda f: lambda *a: jvp(f, a, tuple(t.cos() for t in a))[1],
    "vmap": lambda f: (
        lambda x, *a: vmap(f, (0, None, 0, None))(
            torch.stack([x, 2 * x, -x]), a[0], torch.stack([a[1], a[1], a[1].sin()]), a[2]
        )
    ),
    "vmap(jacrev)": lambda f: (
        lambda x, *a: vmap(jacrev(f, 1), (None, 2, None, None))(x, torch.stack([a[0], a[0].sin()], 2), *a[1:])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["Sum", "LogSumExp", "SumSoftMax", "KMin"])
def test_torch_func(kind, transform):
    r, args = reducer(kind), data(3, 4)
    found = TRANSFORMS[transform](lambda *a: r(a))(*args)
    expected = TRANSFORMS[transform](lambda *a: dense(kind, a))(*args)
    same(found, expected, 1e-10)


def test_all_gradients_come_from_one_program():
    from pullback.kernels.ir import reductions

    program = reducer("Sum")._program("Sum", VECTOR)
    gradient, layout = reductions.pullback(program, (0, 1, 2, 3))
    assert gradient.axes == (1, 0, 2) and layout == ((0,), (1, 2), (3,))


@pytest.mark.parametrize("kind", ["Sum", "LogSumExp", "Max"])
def test_compile_and_export(kind):
    r = reducer(kind)
    args = tuple(t.requires_grad_() for t in data(6, 7))

    def loss(*a):
        return r(a).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), loss(*args))
    same(torch.autograd.grad(compiled(*args), args), torch.autograd.grad(loss(*args), args))

    class Module(torch.nn.Module):
        def forward(self, *a):
            return r(a)

    plain = tuple(t.detach() for t in args)
    same(torch.export.export(Module(), plain).module()(*plain), r(plain))


def test_fake_and_meta():
    from torch._subclasses import FakeTensorMode

    args = data(6, 7, (2,))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in args]
        assert reducer("Sum")(fake).shape == (2, 6, 2)
        assert reducer("ArgKMin", 0)(fake).dtype == torch.int64
    assert reducer("LogSumExp")([t.to("meta") for t in args]).shape == (2, 6, 2)


def test_batches_broadcast():
    x, y, b, p = data(4, 5)
    x = torch.stack([x, x.sin()])[:, None]
    y = torch.stack([y, y.cos(), 2 * y])
    r = reducer("Sum")
    found = r((x, y, b, p))
    assert found.shape == (2, 3, 4, 2)
    for s in range(2):
        for t in range(3):
            same(found[s, t], dense("Sum", (x[s, 0], y[t], b, p)))
    args = tuple(t.requires_grad_() for t in (x, y, b, p))
    same(
        torch.autograd.grad(r(args).sin().sum(), args),
        torch.autograd.grad(dense("Sum", (x, y, b.expand(3, 5, 2), p)).sin().sum(), args),
    )


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["Sum", "LogSumExp", "SumSoftMax", "Max"])
def test_dtypes(kind, dtype, tol):
    args = data(9, 33, dtype=dtype)
    expected = dense(kind, tuple(t.double() for t in args))
    found = reducer(kind)(args)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tol, atol=tol)


def test_integers_follow_the_floating_point_arguments():
    x, y, b, p = data(4, 5)
    whole = b.round()
    same(reducer("Sum")((x, y, whole.long(), p)), reducer("Sum")((x, y, whole, p)))


def test_numpy_in_numpy_out():
    args = data(4, 5)
    arrays = [t.numpy() for t in args]
    found = reducer("Min_ArgMin")(arrays)
    assert all(isinstance(f, np.ndarray) for f in found) and found[1].dtype == np.int64
    same(tuple(map(torch.from_numpy, found)), dense("Min_ArgMin", args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_infinite_rows(backend):
    f = variable(0, 1, J)
    r = Reducer("LogSumExp", f + 0.0 * variable(1, 1, I), ((1, J), (1, I)), 1)
    one = torch.zeros(1, 1, dtype=torch.float64)
    for values in (
        [],
        [-math.inf, -math.inf],
        [-math.inf, 1.0],
        [1.0, math.inf],
        [math.nan, 1.0],
        [1e4, 1e4],
        [-1e4, 3],
    ):
        y = torch.tensor(values, dtype=torch.float64)
        found = r((y[:, None], one), backend=backend)
        torch.testing.assert_close(found, torch.logsumexp(y, 0).reshape(1, 1), equal_nan=True)
    empty = data(3, 0)
    same(reducer("Sum")(empty, backend=backend), torch.zeros(3, 2, dtype=torch.float64))
    same(reducer("ArgMin")(empty, backend=backend), torch.full((3, 2), -1))
    assert reducer("Min")(empty, backend=backend).eq(math.inf).all()
    same(reducer("Prod")(empty, backend=backend), torch.ones(3, 2, dtype=torch.float64))


def test_gradient_of_all_minus_infinity_is_finite():
    f = variable(0, 1, J) + variable(1, 1, I)
    y = torch.full((3, 1), -math.inf, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, 1, dtype=torch.float64)
    r = Reducer("LogSumExp", f, ((1, J), (1, I)), 1)
    assert torch.autograd.grad(r((y, x)).sum(), y)[0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_index_wins_ties_and_missing_are_minus_one(backend):
    f = variable(0, 1, J) + 0.0 * variable(1, 1, I)
    y = torch.tensor([2.0, 1.0, 1.0, 2.0])[:, None]
    x = torch.zeros(20, 1)
    for kind, expected in (("ArgKMin", [1, 2, 0, 3, -1, -1]), ("ArgKMax", [0, 3, 1, 2, -1, -1])):
        found = Reducer(kind, f, ((1, J), (1, I)), 1, k=6)((y, x), backend=backend)
        assert found.tolist() == [expected] * 20


def test_prod_with_zeros():
    f = variable(0, 1, J) * variable(1, 1, I)
    r = Reducer("Prod", f, ((1, J), (1, I)), 1)
    for values in ([0.0, 2, 3], [0.0, 0, 3], [1.0, 2, 3]):
        y = torch.tensor(values, dtype=torch.float64)[:, None]
        x = torch.tensor([[1.5]], dtype=torch.float64)
        same(jacrev(lambda y, x=x: r((y, x)))(y), jacrev(lambda y, x=x: (y * x).prod(0, keepdim=True))(y))
    y = torch.tensor([0.0, 2, 3], dtype=torch.float64)[:, None]
    same(hessian(lambda y: r((y, x)))(y), hessian(lambda y: (y * x).prod(0, keepdim=True))(y))
    y = torch.tensor([0.0, 0, 3], dtype=torch.float64)[:, None]
    assert not hessian(lambda y: r((y, x)))(y).isfinite().all()  # loud, not zero


@pytest.mark.parametrize("backend", BACKENDS)
def test_index_variables(backend):
    args = data(6, 7)
    below = builders["LessThan"](index(J), index(I))
    found = Reducer("Sum", VECTOR * below, SIGNATURE, 1)(args, backend=backend)
    mask = torch.ones(6, 7, dtype=torch.float64).tril(-1)[..., None]
    same(found, (pairs(*args)[1] * mask).sum(1))
    only_pm = Reducer("Sum", builders["Add"](P, index(J)), ((3, I), (3, J), (2, J), (1, PARAMETER)), 0)
    same(only_pm(args, backend=backend), (args[3] + torch.arange(7, dtype=torch.float64)[:, None]) * 6)


def pattern():
    tensors = ([[0, 2], [3, 6]], [1, 3], [[1, 4], [0, 2], [5, 7]], [[0, 3], [3, 7]], [1, 2], [[2, 5], [0, 1]])
    return tuple(torch.tensor(t) for t in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kind", ["Sum", "LogSumExp", "ArgKMin", "Mean", "Prod", "Max"])
def test_ranges(kind, batch, backend):
    args = data(6, 7, batch)
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[0:2, 1:4] = mask[3:6, 0:2] = mask[3:6, 5:7] = True
    found = reducer(kind)(args, ranges=pattern(), backend=backend)
    for row in range(6):
        columns = mask[row].nonzero()[:, 0]
        if kind in ("Max", "Mean", "LogSumExp", "ArgKMin") and not len(columns):
            continue
        x, y, b, p = args
        expected = dense(kind, (x[..., row : row + 1, :], y[..., columns, :], b[..., columns, :], p))
        if kind == "ArgKMin":
            expected = columns[expected]
        same(found[..., row, :] if kind != "ArgKMin" else found[..., row, :, :], expected.squeeze(len(batch)))


def test_gradient_with_ranges():
    args = tuple(t.requires_grad_() for t in data(6, 7))
    blocks = pattern()
    ranges = (*blocks[:3], *transposed(blocks[:3]))
    mask = torch.zeros(6, 7, 1, dtype=torch.float64)
    mask[0:2, 1:4] = mask[3:6, 0:2] = mask[3:6, 5:7] = 1
    found = reducer("Sum")(args, ranges=ranges)
    expected = (pairs(*args)[1] * mask).sum(1)
    same(found, expected)
    same(torch.autograd.grad(found.sin().sum(), args), torch.autograd.grad(expected.sin().sum(), args))


def transposed(triple):
    """The same set of pairs listed by columns."""
    blocks, ends, spans = (t.tolist() for t in triple)
    cuts = sorted({0, 7, *(c for s in spans for c in s)})
    ranges_j, slices_j, redranges_i = [], [], []
    for a, b in itertools.pairwise(cuts):
        start = 0
        for block, end in zip(blocks, ends, strict=True):
            redranges_i += [block for s in spans[start:end] if s[0] <= a and b <= s[1]]
            start = end
        ranges_j.append([a, b])
        slices_j.append(len(redranges_i))
    return tuple(torch.tensor(t, dtype=torch.int64) for t in (ranges_j, slices_j, redranges_i))


def test_strided_and_shared_inputs():
    x, _, _, p = data(6, 7)
    wide = torch.randn(7, 9, dtype=torch.float64)
    args = (x.t().contiguous().t(), wide[:, 1:7:2], wide[:, :2], p.expand(1))
    same(reducer("Sum")(args), dense("Sum", args))
    same(reducer("LogSumExp")((x, x, x[:, :2], p)), dense("LogSumExp", (x, x, x[:, :2], p)))


def test_lazy_minus_signs_are_resolved():
    x, y, b, p = data(6, 7)
    negated = torch.complex(y, -b.sum(-1, keepdim=True).expand(7, 3)).conj().imag
    assert negated.is_neg()
    same(reducer("Sum")((x, negated, b, p)), dense("Sum", (x, negated.clone(), b, p)))


def test_parameters_and_views_keep_their_gradients():
    x, y, b, p = data(4, 5)
    weight = torch.nn.Parameter(b.clone())
    reducer("Sum")((x, y, weight, p)).sum().backward()
    assert weight.grad.shape == b.shape and weight.grad.abs().sum() > 0


def test_a_changed_input_is_an_error_in_backward():
    args = tuple(t.requires_grad_() for t in data(4, 5))
    y = reducer("Sum")(args)
    with torch.no_grad():
        args[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out():
    args = data(4, 5)
    target = torch.empty(4, 2, dtype=torch.float64)
    assert reducer("Sum")(args, out=target) is target
    same(target, dense("Sum", args))
    with pytest.raises(pb.ShapeError, match=r"out must have shape \(4, 2\)"):
        reducer("Sum")(args, out=torch.empty(5, 2))


def test_pickle():
    args = data(4, 5)
    same(pickle.loads(pickle.dumps(reducer("KMin")))(args), reducer("KMin")(args))


BAD = {
    "feature dimension": (
        lambda x, y, b, p: (x[:, :2], y, b, p),
        pb.ShapeError,
        r"x is Vi\(3\) and expects shape \(..., M, dim\) with dim = 3; got \(4, 2\); in the formula",
    ),
    "rows": (
        lambda x, y, b, p: (x, y, b[:4], p),
        pb.ShapeError,
        r"y and b are both Vj, but have 5 and 4 rows: shapes \(5, 3\) and \(4, 2\)",
    ),
    "dtype": (lambda x, y, b, p: (x.float(), y, b, p), pb.DtypeError, "arguments differ in dtype: x: torch.float32"),
    "complex": (lambda x, y, b, p: (x + 0j, y, b, p), pb.DtypeError, "x must be real"),
    "device": (lambda x, y, b, p: (x, y.to("meta"), b, p), pb.DeviceError, "y: meta.*move them to one device"),
    "count": (lambda x, y, b, p: (x, y, b), pb.ArgumentError, r"expected 4 arguments \(x, y, b, p\); got 3"),
    "batch": (
        lambda x, y, b, p: (x.expand(2, 4, 3), y.expand(3, 5, 3), b, p),
        pb.ShapeError,
        r"batch axes do not broadcast: x: \(2, 4, 3\); y: \(3, 5, 3\)",
    ),
    "rank": (lambda x, y, b, p: (x[0], y, b, p), pb.ShapeError, r"got \(3,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, text = BAD[case]
    r = reducer("Sum")
    r(data())  # what is remembered of good shapes must not let bad ones through
    with pytest.raises(error, match=text):
        r(change(*data()))


def test_what_is_no_tensor():
    x, y, b, p = data()
    for bad in (None, "x", [None]):
        with pytest.raises(pb.DtypeError, match="arguments must be tensors or arrays of numbers; got"):
            reducer("Sum")((x, y, b, bad))
    with pytest.raises(pb.DtypeError, match="out must be a tensor or an array; got str"):
        reducer("Sum")((x, y, b, p), out="y")
    with pytest.raises(pb.ArgumentError, match="at least one variable"):
        Reducer("Sum", builders["Add"](1.0, 2.0), (), 1)


def test_bad_options():
    with pytest.raises(pb.ArgumentError, match="axis must be 1"):
        Reducer("Sum", VECTOR, SIGNATURE, 2)
    with pytest.raises(pb.ArgumentError, match="unknown reduction 'Summ'"):
        Reducer("Summ", VECTOR, SIGNATURE, 1)
    with pytest.raises(pb.ShapeError, match="LogSumExp expects a scalar formula; got dimension 2"):
        Reducer("LogSumExp", VECTOR, SIGNATURE, 1)
    with pytest.raises(pb.ArgumentError, match="needs tensors on a GPU"):
        reducer("Sum")(data(), backend="GPU_1D")
    with pytest.raises(pb.ArgumentError, match="redranges_j must hold intervals"):
        blocks = list(pattern())
        blocks[2] = blocks[2] + 5
        reducer("Sum")(data(6, 7), ranges=blocks)


def test_patterns_are_prepared_once_and_not_kept():
    import gc
    import weakref

    from pullback.kernels.plan.ranges import as_ranges

    blocks = pattern()
    first = as_ranges(blocks, 6, 7)
    assert as_ranges(blocks, 6, 7) is first
    blocks[2][0, 1] = 3
    assert as_ranges(blocks, 6, 7) is not first
    reducer("Sum")(data(6, 7), ranges=first)
    known = weakref.ref(next(iter(first.tasks.values())))
    del first
    for _ in range(20):
        as_ranges(pattern(), 6, 7)
    gc.collect()
    assert known() is None
