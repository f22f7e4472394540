"""Genred and its sisters against dense torch, called as KeOps' users call them."""

import copy
import pickle

import numpy as np
import pytest
import torch

from pullback.core.errors import ArgumentError, PullbackError, ShapeError
from pullback.kernels.generic import generic_argkmin, generic_argmin, generic_logsumexp, generic_sum
from pullback.kernels.genred import Genred
from pullback.kernels.reduce import KINDS

ALIASES = ["x = Vi(3)", "y = Vj(3)", "b = Vj(2)", "p = Pm(1)"]
SCALAR = "Exp(-SqDist(x, y) * p)"
VECTOR = f"{SCALAR} * b"
M, N = 4, 6


def arguments(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((M, 3), (N, 3), (N, 2), (1,))]


def dense(x, y, b, p):
    kernel = torch.exp(-(x[:, None] - y).square().sum(-1, keepdim=True) * p)
    return kernel, kernel * b


def smallest(f, k, dim, largest=False):
    order = f.sort(dim, descending=largest).indices.narrow(dim, 0, k)
    values = f.gather(dim, order)
    return (values, order) if dim == 1 else (values.transpose(0, 1), order.transpose(0, 1))


# reduction_op: (keywords, the same of the scalar kernel s (M, N, 1), the vector formula v (M, N, 2), b and the axis)
REDUCTIONS = {
    "Sum": ({}, lambda s, v, b, d: v.sum(d)),
    "Mean": ({}, lambda s, v, b, d: v.mean(d)),
    "Prod": ({}, lambda s, v, b, d: v.prod(d)),
    "Var": ({}, lambda s, v, b, d: v.var(d)),
    "Any": ({}, lambda s, v, b, d: (v != 0).any(d)),
    "All": ({}, lambda s, v, b, d: (v != 0).all(d)),
    "Count": ({}, lambda s, v, b, d: (v != 0).sum(d)),
    "Min": ({}, lambda s, v, b, d: v.min(d).values),
    "Max": ({}, lambda s, v, b, d: v.max(d).values),
    "ArgMin": ({}, lambda s, v, b, d: v.min(d).indices),
    "ArgMax": ({}, lambda s, v, b, d: v.max(d).indices),
    "Min_ArgMin": ({}, lambda s, v, b, d: tuple(v.min(d))),
    "MinArgMin": ({}, lambda s, v, b, d: tuple(v.min(d))),
    "Max_ArgMax": ({}, lambda s, v, b, d: tuple(v.max(d))),
    "MaxArgMax": ({}, lambda s, v, b, d: tuple(v.max(d))),
    "KMin": ({"opt_arg": 2}, lambda s, v, b, d: smallest(v, 2, d)[0]),
    "KMax": ({"opt_arg": 2}, lambda s, v, b, d: smallest(v, 2, d, True)[0]),
    "ArgKMin": ({"opt_arg": 3}, lambda s, v, b, d: smallest(v, 3, d)[1]),
    "ArgKMax": ({"opt_arg": 3}, lambda s, v, b, d: smallest(v, 3, d, True)[1]),
    "KMin_ArgKMin": ({"opt_arg": 3}, lambda s, v, b, d: smallest(v, 3, d)),
    "KMinArgKMin": ({"opt_arg": 3}, lambda s, v, b, d: smallest(v, 3, d)),
    "KMax_ArgKMax": ({"opt_arg": 3}, lambda s, v, b, d: smallest(v, 3, d, True)),
    "KMaxArgKMax": ({"opt_arg": 3}, lambda s, v, b, d: smallest(v, 3, d, True)),
    "LogSumExp": ({}, lambda s, v, b, d: s.logsumexp(d)),
    "LogSumExpWeight": ({"formula2": "b"}, lambda s, v, b, d: (s.exp() * b).sum(d).log()),
    "SumSoftMax": ({"formula2": "b"}, lambda s, v, b, d: (s.softmax(d) * b).sum(d)),
    "SumSoftMaxWeight": ({"formula2": "b"}, lambda s, v, b, d: (s.softmax(d) * b).sum(d)),
    "SoftMax": ({"formula2": "b"}, lambda s, v, b, d: (s.softmax(d) * b).sum(d)),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name, axis):
    options, reference = REDUCTIONS[name]
    args = arguments()
    scalar = "SoftMax" in name or "LogSumExp" in name
    f = Genred(SCALAR if scalar else VECTOR, ALIASES, name, axis=axis, **options)
    got, expected = f(*args), reference(*dense(*args), args[2], axis)
    for g, e in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, expected)), strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e)


def test_every_reduction_is_here():
    assert set(KINDS) <= set(REDUCTIONS)
    assert set(REDUCTIONS) - set(KINDS) == {
        "LogSumExpWeight",
        "SumSoftMaxWeight",
        "SoftMax",
        "MinArgMin",
        "MaxArgMax",
        "KMinArgKMin",
        "KMaxArgKMax",
    }


def test_options():
    args = arguments()
    b = args[2]
    kernel, vector = dense(*args)
    torch.testing.assert_close(Genred(VECTOR, ALIASES)(*args), vector.sum(0))  # axis=0 is the default, as in KeOps
    weighted = Genred(SCALAR, ALIASES, reduction_op="LogSumExp", axis=1, formula2="b")
    torch.testing.assert_close(weighted(*args), (kernel.exp() * b).sum(1).log())
    biased = Genred(VECTOR, ALIASES, "Var", axis=1, opt_arg=0)
    torch.testing.assert_close(biased(*args), vector.var(1, correction=0))
    scalar = Genred(SCALAR, ALIASES, "KMin", axis=1, opt_arg=2)
    assert scalar(*args).shape == (M, 2)  # (M, K, 1) is squeezed, as in KeOps
    arrays = Genred(VECTOR, ALIASES, axis=1)(*(a.numpy() for a in args))
    assert isinstance(arrays, np.ndarray)
    np.testing.assert_allclose(arrays, vector.sum(1))
    # what KeOps' programs pass and has no meaning here
    f = Genred(
        VECTOR,
        ALIASES,
        "Sum",
        1,
        "float64",
        None,
        None,
        "float64",
        "auto",
        False,
        "auto",
        False,
        True,
        use_fast_math=False,
    )
    torch.testing.assert_close(f(*args, backend="CPU", device_id=0), vector.sum(1))


def test_out_and_ranges_and_backend_are_passed_on():
    args = arguments()
    f = Genred(VECTOR, ALIASES, axis=1)
    out = torch.empty(M, 2, dtype=torch.float64)
    assert f(*args, out=out) is out
    torch.testing.assert_close(out, dense(*args)[1].sum(1))
    blocks = [torch.tensor(r) for r in ([[0, 2], [2, 4]], [1, 2], [[0, 3], [3, 6]])]
    transposed = [torch.tensor(r) for r in ([[0, 3], [3, 6]], [1, 2], [[0, 2], [2, 4]])]
    part = f(*args, ranges=(*blocks, *transposed))
    torch.testing.assert_close(part[:2], dense(*args)[1][:2, :3].sum(1))
    torch.testing.assert_close(f(*args, backend="eager"), out)
    with pytest.raises(ArgumentError, match="backend"):
        f(*args, backend="abacus")


def test_accumulator_and_scheme_have_an_effect():
    """4096 plus many small numbers: direct sums in float32 lose digits, in float64 they do not; Kahan's differ."""
    n = 200_000
    y = torch.full((n, 1), 1e-4)
    y[0] = 4096.0
    args = (torch.ones(1, 1), y)
    exact = 4096 + (n - 1) * 1e-4
    errors = {}
    for name, options in {
        "direct": {"sum_scheme": "direct_sum", "dtype_acc": "float32"},
        "kahan": {"sum_scheme": "kahan_scheme", "dtype_acc": "float32"},
        "double": {"sum_scheme": "direct_sum", "use_double_acc": True},
        "float64": {"sum_scheme": "direct_sum", "dtype_acc": "float64"},
        "default": {},
    }.items():
        f = Genred("x * y", ["x = Vi(1)", "y = Vj(1)"], axis=1, **options)
        errors[name] = abs(f(*args).item() - exact)
    assert max(errors["double"], errors["float64"]) < 5e-4 < errors["direct"]
    assert errors["kahan"] < errors["direct"]
    assert errors["default"] < errors["direct"]


def test_gradients_of_every_order():
    args = [a.requires_grad_() for a in arguments()]
    f = Genred(VECTOR, ALIASES, axis=1)
    got, expected = f(*args), dense(*args)[1].sum(1)
    first = [torch.autograd.grad(r.square().sum(), args, create_graph=True) for r in (got, expected)]
    for g, e in zip(*first, strict=True):
        torch.testing.assert_close(g, e)
    second = [torch.autograd.grad(sum(g.square().sum() for g in r), args) for r in first]
    for g, e in zip(*second, strict=True):
        torch.testing.assert_close(g, e)


def test_positions():
    """Arguments may be placed, left without a name, declared in the formula, or unused."""
    x, y = torch.rand(M, 2, dtype=torch.float64), torch.rand(N, 2, dtype=torch.float64)
    expected = (x[:, None] * y[None]).sum(1)
    for formula, aliases, args in (
        ("x * y", ["x = Vi(1, 2)", "y = Vj(0, 2)"], (y, x)),
        ("Var(0, 2, 0) * Var(1, 2, 1)", [], (x, y)),
        ("Var(0, 2, 0) * Var(1, 2, 1)", ["Vi(2)", "Vj(2)"], (x, y)),
        ("x * Var(1, 2, 1)", ["x = Vi(2)"], (x, y)),
        ("x * y", ["x = Vi(2)", "y = Vj(2)", "z = Pm(7)"], (x, y, torch.zeros(7, dtype=torch.float64))),
    ):
        torch.testing.assert_close(Genred(formula, aliases, axis=1)(*args), expected)


def test_copies_and_text():
    args = arguments()
    f = Genred(SCALAR, ALIASES, "SumSoftMaxWeight", 1, formula2="b", use_double_acc=True)
    for again in (pickle.loads(pickle.dumps(f)), copy.deepcopy(f), copy.copy(f)):
        assert repr(again) == repr(f)
        torch.testing.assert_close(again(*args), f(*args), rtol=0, atol=0)
    assert repr(f) == (
        "Genred: SumSoftMaxWeight over j of 'Exp(-SqDist(x, y) * p)', weight 'b', of dimension 1\n"
        "  x: Vi, (..., M, 3)\n"
        "  y: Vj, (..., N, 3)\n"
        "  b: Vj, (..., N, 2)\n"
        "  p: Pm, (..., 1)\n"
        "  one result for each of the M i"
    )


def test_keops_tutorial():
    """The LogSumExp of KeOps' tutorial, with its gradient."""
    aliases = ["x = Vi(1)", "y = Vj(1)", "a = Vj(1)", "p = Pm(1)"]
    f = Genred("Square(p-a)*Exp(x+y)", aliases, reduction_op="LogSumExp", axis=1, dtype="float64")
    x, y, a, p = args = [
        torch.rand(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 1), (9, 1), (9, 1), (1,))
    ]
    expected = ((p - a.T).square() * torch.exp(x + y.T)).logsumexp(1, keepdim=True)
    torch.testing.assert_close(f(*args), expected)
    for g, e in zip(torch.autograd.grad(f(*args).sum(), args), torch.autograd.grad(expected.sum(), args), strict=True):
        torch.testing.assert_close(g, e)


def test_generic():
    args = arguments()
    kernel, vector = dense(*args)
    for make, formula, output, expected in (
        (generic_sum, VECTOR, "a = Vi(2)", vector.sum(1)),
        (generic_sum, VECTOR, "a = Vj(2)", vector.sum(0)),
        (generic_logsumexp, SCALAR, "a = Vi(1)", kernel.logsumexp(1)),
        (generic_argmin, VECTOR, "a = Vi(2)", vector.argmin(1)),
        (generic_argkmin, SCALAR, "a = Vi(3)", smallest(kernel, 3, 1)[1].squeeze(-1)),
        (generic_argkmin, SCALAR, "a = Vj(2)", smallest(kernel, 2, 0)[1].squeeze(-1)),
    ):
        torch.testing.assert_close(make(formula, output, *ALIASES)(*args), expected)
    assert torch.equal(
        generic_sum(VECTOR, "a = Vi(2)", *ALIASES, use_double_acc=True)(*args), Genred(VECTOR, ALIASES, axis=1)(*args)
    )
    with pytest.raises(ArgumentError, match=r"must be Vi \(reduce over j\) or Vj"):
        generic_sum(VECTOR, "a = Pm(2)", *ALIASES)
    with pytest.raises(ShapeError, match=r"has dimension 2, its result is declared 'a = Vi\(3\)'"):
        generic_sum(VECTOR, "a = Vi(3)", *ALIASES)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"reduction_op": "ArgKmin"}, "unknown reduction_op 'ArgKmin'; did you mean ArgKMin?"),
        ({"reduction_op": "Quantile"}, "unknown reduction_op 'Quantile'; known are Sum, LogSumExp"),
        ({"reduction_op": "KMin"}, "reduction_op='KMin' needs the number K; give it as opt_arg"),
        ({"reduction_op": "KMin", "opt_arg": 0}, "K must be a positive integer; got 0"),
        ({"opt_arg": 3}, "opt_arg is K of K-reductions or the correction of Var; Sum has none"),
        ({"reduction_op": "SoftMax", "formula": SCALAR}, "reduction_op='SoftMax' needs a weight; give it as formula2"),
        ({"formula2": "b"}, "formula2 is the weight of LogSumExp and SumSoftMax; Sum has none"),
        ({"dtype_acc": "float64", "use_double_acc": True}, "give dtype_acc or use_double_acc, not both"),
        ({"dtype_acc": "float128"}, "dtype_acc must be one of"),
        ({"sum_scheme": "pairwise"}, "sum_scheme must be one of"),
        ({"reduction_op": "Min", "use_double_acc": True}, "Min adds nothing; leave dtype_acc"),
        ({"axis": 2}, r"axis must be 1 \(reduce over j\) or 0"),
        ({"reduction_op": "LogSumExp"}, "LogSumExp expects a scalar formula; got dimension 2"),
        ({"formula": "x * w"}, "unknown name w at position 4"),
        ({"reduction_op": "LogSumExp", "formula": SCALAR, "formula2": "w"}, "unknown name w at position 0"),
        ({"formula": "x * Var(4, 2, 1) + Var(9, 1, 2)"}, "Mult expects operands of equal dimension"),
        ({"formula": "x * Var(9, 1, 2)"}, "nothing declares argument 4"),
        ({"formula": "x * Var(1, 1, 2)"}, "argument 1 is declared as y of category Vj and dimension 3 and as Var"),
    ],
)
def test_bad_arguments(changes, text):
    options = {"formula": VECTOR, "aliases": ALIASES, **changes}
    with pytest.raises(PullbackError, match=text.replace("?", r"\?")):
        Genred(**options)


def test_bad_calls():
    f = Genred(VECTOR, ALIASES, axis=1)
    x, y, b, p = arguments()
    for args, text in (
        ((x, y, b), "expected 4 arguments"),
        ((x[:, :2], y, b, p), "x is Vi"),
        ((x, y[1:], b, p), "y and b are both Vj, but have 5 and 6 rows"),
        ((x, y.float(), b, p), "arguments differ in dtype"),
    ):
        with pytest.raises(PullbackError, match=text) as caught:
            f(*args)
        assert VECTOR in str(caught.value)
