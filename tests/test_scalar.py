import copy
import gc
import math
import pickle
import random
import weakref

import numpy as np
import pytest
import torch

from pullback.autodiff import scalar_functions as sf
from pullback.autodiff.scalar import Scalar
from pullback.autodiff.scalar_functions import FUNCTIONS, exp, log, sin, sqrt
from pullback.core.errors import ArgumentError, NotDifferentiableError

ROWS = list(FUNCTIONS.values())
IDS = [row.name for row in ROWS]
OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "%": "mod", "**": "pow"}


def blog(x1, x2):
    return (1 + sin(x2)) / (x2 + exp(x1)) + x1 * x2


def arguments(row, seed=0):
    draw = random.Random(seed)
    return [draw.uniform(*row.sample) for _ in row.partials]


# The table ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_derivative_are_torchs(row, seed):
    values = arguments(row, seed)
    scalars = [Scalar(v) for v in values]
    tensors = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    y, t = Scalar._record(row, scalars), row.torch(*tensors)
    assert y.value == pytest.approx(t.item(), rel=1e-14)
    grads = torch.autograd.grad(t, tensors)
    for x, g in zip(scalars, grads, strict=True):
        assert y.grad(x) == pytest.approx(g.item(), rel=1e-12, abs=1e-14)
        assert y.numeric_grad(x) == pytest.approx(g.item(), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_second_derivatives_are_torchs(row):
    values = arguments(row, 5)
    scalars = [Scalar(v) for v in values]
    tensors = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    first = Scalar._record(row, scalars).grad(*scalars, create_graph=True)
    torch_first = torch.autograd.grad(row.torch(*tensors), tensors, create_graph=True)
    for f, t in zip(first if isinstance(first, tuple) else (first,), torch_first, strict=True):
        expected = [None] * len(tensors)
        if t.requires_grad:
            expected = torch.autograd.grad(t, tensors, retain_graph=True, allow_unused=True)
        for x, e in zip(scalars, expected, strict=True):
            want = 0.0 if e is None else e.item()
            assert f.grad(x, allow_unused=True) == pytest.approx(want, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_tensors_act_element_by_element(row):
    rows = [arguments(row, k) for k in range(4)]
    values = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    scalars = [Scalar(v) for v in values]
    y = Scalar._record(row, scalars)
    for k, numbers in enumerate(rows):
        single = [Scalar(v) for v in numbers]
        one = Scalar._record(row, single)
        assert y.value[k].item() == pytest.approx(one.value, rel=1e-13)
        for x, s in zip(scalars, single, strict=True):
            assert y.grad(x)[k].item() == pytest.approx(one.grad(s), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("row", [r for r in ROWS if r.complex], ids=[r.name for r in ROWS if r.complex])
def test_complex_derivatives(row):
    values = [complex(a, 0.3 + 0.1 * k) for k, a in enumerate(arguments(row, 2))]
    scalars = [Scalar(v) for v in values]
    y = Scalar._record(row, scalars)
    assert y.value == pytest.approx(row.complex(*values), rel=1e-13)
    for x in scalars:
        assert y.grad(x) == pytest.approx(y.numeric_grad(x), rel=1e-8)


def test_every_row_is_an_operator_or_a_method_and_a_function():
    for row in ROWS:
        if row.name in OPERATORS:
            assert hasattr(Scalar, f"__{OPERATORS[row.name]}__") and hasattr(Scalar, f"__r{OPERATORS[row.name]}__")
            continue
        values = arguments(row)
        scalars = [Scalar(v) for v in values]
        assert getattr(scalars[0], row.name)(*scalars[1:]).value == row(*values)
        if row.name not in ("abs", "neg"):
            function = getattr(sf, row.name)
            assert function.__name__ == row.name
            assert function(*scalars).operation == row.name
            assert function(*values) == row(*values)


@pytest.mark.parametrize("name", ["log", "sqrt", "exp", "asin", "acosh", "atanh", "reciprocal", "log1p", "sinh"])
@pytest.mark.parametrize("value", [-2.0, -1.0, 0.0, 1.0, 1000.0, math.inf, -math.inf, math.nan])
def test_values_outside_of_the_domain_are_torchs(name, value):
    expected = getattr(torch, name)(torch.tensor(value, dtype=torch.float64)).item()
    np.testing.assert_allclose(getattr(Scalar(value), name)().value, expected, rtol=1e-14)


@pytest.mark.parametrize("x", [-2.0, 0.0, 3.0, math.inf, math.nan])
@pytest.mark.parametrize("y", [-1.0, 0.0, 0.5, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["/", "**", "%", "maximum", "minimum", "hypot"])
def test_binary_values_and_derivatives_at_the_edges_are_torchs(name, x, y):
    row = FUNCTIONS[name]
    t = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, y)]
    expected = row.torch(*t)
    s = [Scalar(x), Scalar(y)]
    found = Scalar._record(row, s)
    np.testing.assert_allclose(found.value, expected.item(), rtol=1e-14)
    if (
        name in ("**", "maximum", "minimum")
        and math.isfinite(expected.item())
        and math.isfinite(x)
        and math.isfinite(y)
    ):
        np.testing.assert_allclose(found.grad(*s), [g.item() for g in torch.autograd.grad(expected, t)], rtol=1e-13)


def test_kinks_take_torchs_subgradient():
    for name in ("abs", "relu"):
        x = Scalar(0.0)
        assert getattr(x, name)().grad(x) == 0.0
    x, y = Scalar(1.0), Scalar(1.0)
    assert x.maximum(y).grad(x, y) == (0.5, 0.5)
    assert sqrt(Scalar(0.0, "x")).children[0][1] == math.inf


# The blog's function ------------------------------------------------------------------------------------------------


def test_the_function_of_the_blog():
    x1, x2 = Scalar(1.5, "x1"), Scalar(0.5, "x2")
    y = blog(x1, x2)
    t = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, 0.5)]
    expected = torch.autograd.grad(blog(*t), t)
    assert y.grad(x2) == pytest.approx(1.6165488003791766, rel=1e-15)
    assert y.grad(x1) == pytest.approx(expected[0].item(), rel=1e-14)
    assert y.grad(x1) == pytest.approx(0.2328337, abs=1e-7)
    assert y.name == "(1 + sin(x2)) / (x2 + exp(x1)) + x1 * x2"
    assert y.numeric_grad(x1) == pytest.approx(y.grad(x1), rel=1e-10)
    assert [(s.name, d) for s, d in (x1 * x2).children] == [("x1", 0.5), ("x2", 1.5)]
    assert y.leaves == (x2, x1)
    mixed = y.grad(x1, create_graph=True).grad(x2)
    assert mixed == pytest.approx(y.grad(x2, create_graph=True).grad(x1), rel=1e-14)


def test_gradients_of_intermediate_results():
    x = Scalar(2.0, "x")
    s = x * x
    y = s * s + x
    assert y.grad(s) == 8.0
    assert y.grad(x, s) == (33.0, 8.0)
    assert y.grad(y) == 1.0


def test_third_derivative():
    x = Scalar(0.7)
    y = sin(x) * x
    for _ in range(2):
        y = y.grad(x, create_graph=True)
    assert y.grad(x) == pytest.approx(-3 * math.sin(0.7) - 0.7 * math.cos(0.7), rel=1e-13)


# Names --------------------------------------------------------------------------------------------------------------


def random_expression(draw, leaves, depth):
    if depth == 0:
        return draw.choice([*leaves, draw.choice([2, 3.0, -1.5])])
    kind = draw.randrange(9)
    a, b = (random_expression(draw, leaves, draw.randrange(depth)) for _ in range(2))
    if not isinstance(a, Scalar):
        a = a * leaves[0]
    return [
        lambda: a + b,
        lambda: b + a,
        lambda: a - b,
        lambda: b - a,
        lambda: a * b,
        lambda: b / (a * a + 1),
        lambda: -a,
        lambda: (a * a + 1) ** 2,
        lambda: sin(a),
    ][kind]()


@pytest.mark.parametrize("seed", range(100))
def test_an_expression_is_python_that_computes_the_value(seed, monkeypatch):
    monkeypatch.setattr("pullback.autodiff.scalar_graph._LONGEST", 10**6)
    x, y = Scalar(0.3, "x"), Scalar(-0.8, "y")
    z = random_expression(random.Random(seed), [x, y], 4)
    if isinstance(z, Scalar):
        assert eval(z.expression, {"x": 0.3, "y": -0.8, "sin": math.sin}) == z.value, z.expression


def test_parentheses():
    x, y = Scalar(3.0, "x"), Scalar(2.0, "y")
    expected = {
        "(x + y) * x": (x + y) * x,
        "x - (y - x)": x - (y - x),
        "x - y - x": x - y - x,
        "x / (y * x)": x / (y * x),
        "-x**2": -(x**2),
        "(-x)**2": (-x) ** 2,
        "x**y**x": x ** (y**x),
        "(x**y)**x": (x**y) ** x,
        "2 * x": 2 * x,
        "1 / x": 1 / x,
        "2**x": 2**x,
        "5 - x": 5 - x,
        "7 % x": 7 % x,
        "x * (-2)": x * -2,
        "maximum(x, y)": x.maximum(y),
        "abs(x - y)": abs(x - y),
    }
    for text, z in expected.items():
        assert z.name == text


def test_names_of_intermediate_results_are_used():
    x = Scalar(3.0, "x")
    s = x + 1
    s.name = "s"
    y = s * s
    assert (y.name, s.expression, repr(s)) == ("s * s", "x + 1", "Scalar(4.0, name='s')")
    assert repr(y) == "Scalar(16.0, 's * s')"
    assert repr(Scalar(2)) == "Scalar(2.0)"


def test_names_do_not_blow_up():
    x = Scalar(1.0, "x")
    y = x
    for _ in range(200):
        y = y + y
    assert len(repr(y)) < 150 and repr(y).endswith("...')")
    assert y.grad(x) == 2.0**200


# The tape -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_long_chains_neither_recurse_nor_leak():
    x = Scalar(0.5, "x")
    y = x
    for k in range(100_000):
        y = y * 1.00001 if k % 2 else y + 1e-6
    assert y.grad(x) == pytest.approx(1.00001**50_000, rel=1e-9)
    assert len(repr(y)) < 200
    assert copy.deepcopy(y).value == y.value
    assert y.evaluate({x: 0.5}) == y.value
    gone = weakref.ref(y)
    del y
    assert gone() is None


def test_a_dropped_graph_is_freed_without_the_garbage_collector():
    x = Scalar(1.0)
    gc.disable()
    try:
        refs = [weakref.ref(sin(x) * x) for _ in range(10)]
        assert all(r() is None for r in refs)
    finally:
        gc.enable()


def test_copies_and_pickles_keep_the_graph():
    x1, x2 = Scalar(1.5, "x1"), Scalar(0.5, "x2")
    y = blog(x1, x2)
    for new, a in (copy.deepcopy((y, x1)), pickle.loads(pickle.dumps((y, x1)))):
        assert new is not y and new.grad(a) == y.grad(x1) and new.name == y.name


def test_evaluate():
    x, y = Scalar(2.0, "x"), Scalar(3.0, "y")
    s = x * y
    z = s + x
    assert z.evaluate({x: 5.0}) == 20.0
    assert z.evaluate({s: 1.0}) == 3.0
    assert z.evaluate({}) == z.value
    with pytest.raises(ArgumentError, match="does not depend on x = q"):
        z.evaluate({Scalar(1.0, "q"): 1.0})


# What users write ---------------------------------------------------------------------------------------------------


def test_other_numbers():
    x = Scalar(2.0, "x")
    tensor = torch.tensor([1.0, 2.5], dtype=torch.float64)
    for y, value in (
        (np.float64(3) * x, 6.0),
        (x / np.float32(2), 1.0),
        (np.float64(3) - x, 1.0),
        (np.int64(3) ** x, 9.0),
        (x**True, 2.0),
        (np.sin(x), math.sin(2.0)),
        (np.arctan2(x, 1.0), math.atan2(2.0, 1.0)),
        (torch.sin(x), math.sin(2.0)),
        (torch.exp(-x), math.exp(-2.0)),
    ):
        assert isinstance(y, Scalar) and y.value == pytest.approx(value, rel=1e-15)
        assert y.grad(x) == pytest.approx(y.numeric_grad(x), rel=1e-8)
    for y, value in (
        (tensor * x, tensor * 2),
        (tensor - x, tensor - 2),
        (tensor / x, tensor / 2),
        (tensor**x, tensor**2),
        (x - tensor, 2 - tensor),
        (x**tensor, 2**tensor),
        (tensor % x, tensor % 2),
    ):
        assert isinstance(y, Scalar) and torch.equal(y.value, value)
        assert torch.allclose(y.grad(x), y.numeric_grad(x), rtol=1e-8)


def test_tensor_values_broadcast_and_are_copied():
    value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    t, s = Scalar(value, "t"), Scalar(2.0, "s")
    value.zero_()
    y = t * s + 0.1
    assert torch.equal(y.grad(s), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert torch.equal(y.grad(t), torch.full((3,), 2.0, dtype=torch.float64))
    assert (s + 0 * t).grad(s).shape == (3,)
    assert y.value[0].item() == 2.1  # constants keep the precision of the tensor
    assert (Scalar(torch.ones(2)) * 0.1).value.dtype == torch.float32
    second = (t**3).grad(t, create_graph=True).grad(t)
    assert torch.allclose(second, 6 * t.value)


def test_functions_take_plain_numbers_tensors_and_arrays():
    assert sin(0.5) == math.sin(0.5)
    assert log(-1.0) != log(-1.0)
    assert torch.equal(exp(torch.ones(2)), torch.ones(2).exp())
    x = torch.ones(2, requires_grad=True)
    assert exp(x).requires_grad
    np.testing.assert_array_equal(exp(np.ones(2)), np.exp(np.ones(2)))


def test_comparisons_are_of_values_and_max_works():
    x, y = Scalar(1.0, "x"), Scalar(2.0, "y")
    assert x < y and x <= 1 and y > 1.5 and y >= y and x == 1.0 and x != y and bool(x) and not Scalar(0.0)
    assert max(x, y) is y
    assert len({x, Scalar(1.0)}) == 2


def test_errors():
    x, q = Scalar(1.0, "x"), Scalar(1.0, "q")
    y = x * 2
    with pytest.raises(ArgumentError, match=r"y = x \* 2 does not depend on x = q; it was computed from x"):
        y.grad(q)
    assert y.grad(q, x, allow_unused=True) == (0.0, 2.0)
    with pytest.raises(ArgumentError, match="at least one variable"):
        y.grad()
    with pytest.raises(ArgumentError, match="variables must be Scalars; got list"):
        y.grad([x])
    with pytest.raises(ArgumentError, match="got str"):
        Scalar("1")
    with pytest.raises(ArgumentError, match="got ndarray; arrays go through"):
        Scalar(np.ones(2))
    with pytest.raises(ArgumentError, match="got a Scalar"):
        Scalar(x)
    with pytest.raises(ArgumentError, match=r"give value.detach\(\)"):
        Scalar(torch.ones(1, requires_grad=True))
    with pytest.raises(ArgumentError, match=r"torch.int64; use value.double"):
        Scalar(torch.ones(1, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="name must be a string"):
        Scalar(1.0, 2)
    with pytest.raises(TypeError, match=r"write x.value"):
        math.sin(x)
    with pytest.raises(NotDifferentiableError, match=r"x.value // y.value"):
        x // 2
    with pytest.raises(NotDifferentiableError, match="torch's cumsum does not know"):
        torch.cumsum(x, 0)
    with pytest.raises(NotDifferentiableError, match="abs has no complex derivative"):
        abs(Scalar(1j))
    with pytest.raises(TypeError, match="unsupported operand"):
        x + "1"
    with pytest.raises(TypeError, match="takes 1 arguments; got 0"):
        x.maximum()
