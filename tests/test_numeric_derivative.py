"""Numeric derivatives: values, error bars that hold, shapes, refusals."""

import pytest
import torch

from pullback.autodiff.numeric import numeric_derivative
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError

FUNCTIONS = {
    "sin": torch.sin,
    "exp": torch.exp,
    "cube": lambda x: x * x * x,
    "log": lambda x: (x * x + 0.1).log(),
    "tanh": lambda x: torch.tanh(3 * x),
    "pole": lambda x: 1 / (x + 7),
    "root": lambda x: (x * x + 1e-2).sqrt(),
    "line on a hill": lambda x: 3 * x + 1e4,
    "fast": lambda x: torch.sin(20 * x),
    "step": lambda x: torch.atan(10 * x),
    "constant": lambda x: x * 0 + 1.0,
    "large": lambda x: 1e6 * x.cos(),
    "small": lambda x: 1e-12 * x.cos(),
}


@pytest.mark.parametrize("method", ["central", "richardson", "complex"])
def test_the_error_bar_holds(method):
    outside = total = 0
    for f in FUNCTIONS.values():
        # 60 points as a batch: f is elementwise, so one direction gives all of the derivatives.
        x = 2 * torch.randn(60, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(f(leaf).sum(), leaf)
        for i in range(0, 60, 4):
            point = x[i : i + 4]
            got = numeric_derivative(f, point, torch.ones(4).double(), method=method)
            outside += int(((got.value - want[i : i + 4]).abs() > got.error).sum())
            total += 4
    assert total == 60 * len(FUNCTIONS)
    assert outside <= 0.02 * total


def test_accuracy_of_the_methods():
    x = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    f = lambda x: (x.sin() * x.exp()).sum()  # noqa: E731
    want = x.exp() * (x.sin() + x.cos())
    for method, digits in (("central", 1e-8), ("richardson", 1e-11), ("complex", 2e-15)):
        got = numeric_derivative(f, x, method=method)
        assert got.value.shape == x.shape and got.method == method
        assert float((got.value - want).abs().max()) < digits
        assert float(got.error.max()) < 100 * digits
    # The step is the one that is asked for.
    one = numeric_derivative(lambda x: x**3, x[:1], x[:1] * 0 + 1, method="central", step=0.5)
    assert one.value.item() == pytest.approx(3 * float(x[0]) ** 2 + 0.25, abs=1e-13)
    far = numeric_derivative(lambda x: torch.sin(20 * x), x[:1], x[:1] * 0 + 1, step=1e3)
    assert abs(far.value.item() - 20 * torch.cos(20 * x[0]).item()) > 1  # the step is the one that was asked for


def test_functions_that_round():
    single = lambda x: (x.float().sin() * 3).double()  # noqa: E731
    x = torch.randn(50, dtype=torch.float64)
    for method in ("central", "richardson"):
        v = torch.ones_like(x)
        got = numeric_derivative(single, x, v, method=method, rounding=1.2e-7)
        wrong = (got.value - 3 * x.cos()).abs()
        assert float((wrong > got.error).double().mean()) < 0.05
        assert float(wrong.max()) < 1e-3
        blind = numeric_derivative(single, x, v, method=method)
        assert float(((blind.value - 3 * x.cos()).abs() > blind.error).double().mean()) > 0.05


def test_shapes():
    x = torch.randn(2, 3, dtype=torch.float64)
    matrix = torch.randn(4, 3, dtype=torch.float64)
    f = lambda x: torch.sin(x @ matrix.T.to(x.dtype))  # noqa: E731
    want = torch.func.jacrev(f)(x)
    for method in ("central", "richardson", "complex"):
        got = numeric_derivative(f, x, method=method)
        assert got.value.shape == got.error.shape == (2, 4, 2, 3)
        torch.testing.assert_close(got.value, want, atol=1e-8, rtol=1e-8)
    v = torch.randn_like(x)
    got = numeric_derivative(f, x, v)
    torch.testing.assert_close(got.value, torch.func.jvp(f, (x,), (v,))[1], atol=1e-11, rtol=1e-11)
    assert numeric_derivative(lambda x: x.sum(), x).value.shape == (2, 3)
    assert numeric_derivative(lambda x: x.sum()[None], x).value.shape == (1, 2, 3)
    assert numeric_derivative(torch.sin, torch.tensor(0.3).double()).value.shape == ()
    assert numeric_derivative(torch.sin, 0.3).value.item() == pytest.approx(0.955336489125606, abs=1e-13)
    assert numeric_derivative(lambda x: x[:0], x[0]).value.shape == (0, 3)
    strided = torch.randn(3, 4, dtype=torch.float64).t()
    torch.testing.assert_close(numeric_derivative(lambda x: (x**2).sum(), strided).value, 2 * strided)
    zero = numeric_derivative(torch.sin, x, torch.zeros_like(x))
    assert not zero.value.any()


def test_trees():
    x = {"a": torch.randn(3, dtype=torch.float64), "b": [torch.tensor(0.5).double()]}
    f = lambda x: (x["a"] * x["b"][0], {"s": x["a"].sum() ** 2})  # noqa: E731
    got = numeric_derivative(f, x).value
    torch.testing.assert_close(got[0]["a"], 0.5 * torch.eye(3).double(), atol=1e-11, rtol=0)
    torch.testing.assert_close(got[0]["b"][0], x["a"], atol=1e-11, rtol=0)
    torch.testing.assert_close(got[1]["s"]["a"], (2 * x["a"].sum()).expand(3), atol=1e-10, rtol=0)
    assert got[1]["s"]["b"][0].item() == 0
    v = {"a": torch.ones(3).double(), "b": [torch.tensor(2.0).double()]}
    torch.testing.assert_close(numeric_derivative(f, x, v).value[0], 0.5 + 2 * x["a"], atol=1e-11, rtol=0)


def test_complex_numbers():
    z = torch.randn(3, dtype=torch.complex128)
    got = numeric_derivative(lambda z: z**2, z)
    torch.testing.assert_close(got.value, torch.diag(2 * z), atol=1e-10, rtol=0)
    assert not got.error.is_complex()
    v = torch.randn(3, dtype=torch.complex128)
    got = numeric_derivative(lambda z: z.abs() ** 2, z, v)
    torch.testing.assert_close(got.value, 2 * (z.conj() * v).real, atol=1e-10, rtol=0)
    assert not got.value.is_complex()
    with pytest.raises(NotDifferentiableError, match=r"not holomorphic.*view_as_real"):
        numeric_derivative(lambda z: z.abs() ** 2, z)
    phases = numeric_derivative(lambda x: torch.exp(1j * x), z.real)
    torch.testing.assert_close(phases.value, torch.diag(1j * torch.exp(1j * z.real)), atol=1e-10, rtol=0)


def test_float32_is_computed_in_float64():
    seen = set()

    def f(x):
        seen.add(x.dtype)
        return x.sin()

    x = torch.randn(3)
    got = numeric_derivative(f, x)
    assert seen == {torch.float64} and got.value.dtype == torch.float64
    torch.testing.assert_close(got.value, torch.diag(x.double().cos()), atol=1e-11, rtol=0)


def test_functions_that_cannot_be_batched():
    def f(x):
        return torch.tensor([float(x[0]) ** 2, 1.0]).double()  # float() is refused by vmap

    got = numeric_derivative(f, torch.tensor([3.0, 1.0]).double())
    torch.testing.assert_close(got.value, torch.tensor([[6.0, 0.0], [0.0, 0.0]]).double(), atol=1e-10, rtol=0)


REAL_ONLY = {
    "abs": torch.abs,
    "norm": lambda x: x.norm() ** 2,
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=0),
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "real": lambda x: (x.conj() * x).real,
    "half real": lambda x: x.real * x,
    "conj": lambda x: x.conj() * x,
    "relu": torch.relu,
    "real matrix": lambda x: torch.eye(3, dtype=torch.float64) @ x,
    "power": lambda x: x**7.0,
}


@pytest.mark.parametrize("f", REAL_ONLY.values(), ids=REAL_ONLY)
def test_the_complex_step_refuses_what_is_not_analytic(f):
    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    with pytest.raises(NotDifferentiableError, match=r'method "complex" needs an f made of analytic.*"richardson"'):
        numeric_derivative(f, x, torch.ones(3).double(), method="complex")


def test_errors():
    x = torch.randn(3, dtype=torch.float64)
    for arguments, options, error, text in (
        ((3, x), {}, ArgumentError, "f must be a function; got int"),
        ((torch.sin, x), {"method": "forward"}, ArgumentError, "one of central, richardson, complex; got 'forward'"),
        ((torch.sin, x), {"step": -1.0}, ArgumentError, "step must be a positive number"),
        ((torch.sin, x), {"step": 1e-3, "method": "complex"}, ArgumentError, "has no step"),
        ((torch.sin, x), {"rounding": 2.0}, ArgumentError, "rounding must be a number between 0 and 1"),
        ((torch.sin, x, x[:2]), {}, ShapeError, r"shape of x, \(3,\); got \(2,\)"),
        ((torch.sin, x, [x, x]), {}, ShapeError, "structure of x"),
        ((torch.sin, x, x + 0j), {}, DtypeError, "must be real where x is"),
        ((torch.sin, x.int()), {}, DtypeError, r"use x.double\(\)"),
        ((torch.sin, "x"), {}, ArgumentError, "got str"),
        ((lambda x: 3.0, x), {}, ArgumentError, "must return tensors; got float"),
        ((lambda x: x > 0, x), {}, NotDifferentiableError, "no derivative"),
        ((torch.sin, x[:0]), {}, ShapeError, "no numbers"),
        ((torch.sin, x + 0j), {"method": "complex"}, DtypeError, "is for real x"),
        ((lambda x: x + 1j, x), {"method": "complex"}, NotDifferentiableError, "is for real f"),
    ):
        with pytest.raises(error, match=text):
            numeric_derivative(*arguments, **options)


def test_structure_finer_than_the_steps_is_seen():
    """Large steps can agree with each other on something else than the derivative."""
    tensor = lambda p: torch.tensor(p, dtype=torch.float64)  # noqa: E731
    cases = [
        (torch.sin, torch.cos, (1e3, 1e4, 1e5, 1e6)),
        (lambda x: torch.sin(50 * x), lambda x: 50 * torch.cos(50 * x), (2.0, 30.0)),
        (torch.tan, lambda x: torch.cos(x) ** -2, (1.5, 1.57, 1.5707)),
        (lambda x: 1 / (1 - x), lambda x: (1 - x) ** -2, (0.9, 0.99, 0.9999, 1.0001)),
        (lambda x: torch.tanh(1e3 * (x - 1)), lambda x: 1e3 / torch.cosh(1e3 * (x - 1)) ** 2, (1.0, 1.001, 1.003)),
        (lambda x: torch.relu(x - 1), lambda x: (x > 1).double(), (0.999, 1.001, 1.0001, 1.1)),
        (lambda x: torch.sqrt(1 - x), lambda x: -0.5 / torch.sqrt(1 - x), (0.9999,)),
    ]
    for f, df, points in cases:
        for p in points:
            found, want = numeric_derivative(f, tensor(p)), float(df(tensor(p)))
            error = abs(float(found.value) - want)
            assert error <= 3 * float(found.error) + 1e-12 * abs(want), (p, found, want)
            assert error <= 0.05 * abs(want) + 1e-5, (p, found, want)


def test_jumps_of_rounding_are_no_structure():
    """A function that computes in single precision is constant between jumps; larger steps are right."""
    x = torch.tensor([1.0, 2.0, 0.3], dtype=torch.float64)
    found = numeric_derivative(lambda x: torch.sin(x.float()).double(), x, torch.ones_like(x))
    torch.testing.assert_close(found.value, torch.cos(x), rtol=1e-3, atol=0)
