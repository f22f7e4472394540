"""The gradient check: right gradients pass, and each kind of wrong one is caught and named."""

import pytest
import torch

from pullback.autodiff.gradient_check import check_gradient
from pullback.core.check import CheckError
from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.linops.derivative import FirstDerivative

X = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
Y = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Square(torch.autograd.Function):
    """x^2 with a reverse and a forward derivative that may be scaled wrongly."""

    @staticmethod
    def forward(x, back, ahead):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.back, ctx.ahead = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (None if ctx.back is None else ctx.back * 2 * x * g), None, None

    @staticmethod
    def jvp(ctx, t, *_):
        return ctx.ahead * 2 * ctx.saved_tensors[0] * t


def rows(report, name, mode="reverse"):
    return next(r for r in report.results if r.name == name and r.mode == mode)


RIGHT = {
    "product": (lambda x, y: torch.sin(x) * y.exp(), X, Y),
    "tree": (lambda p: {"a": p["u"] * p["v"][0], "b": p["u"].sum()}, {"u": X, "v": [Y]}),
    "linear": (lambda x: 3 * x + 1, X),
    "quadratic": (lambda x: x**2, X),
    "constant": (lambda x: 0 * x + 1, X),
    "small": (lambda x: 1e-12 * x.cos(), X),
    "large": (lambda x: 1e12 * x.cos(), X),
    "small x": (lambda x: torch.sin(1e6 * x), 1e-6 * X),
    "complex": (lambda z: z.abs() ** 2 * z, torch.complex(X, Y)),
    "real to complex": (torch.fft.rfft, X),
    "complex to real": (lambda z: z.abs().sum(), torch.complex(X, Y)),
    "number": (torch.sin, torch.tensor(0.3).double()),
    "with integers": (lambda x, i: x[i] ** 2, X, torch.tensor([1, 3])),
    "with numbers": (lambda x, p: x**p, X.abs(), 3),
    "operator": (lambda x: FirstDerivative(5)(x) ** 2, X),
    "custom Function": (lambda x: Square.apply(x, 1.0, 1.0), X),
    "float32": (lambda x: torch.sin(x) * 2, X.float()),
    "float32 inside": (lambda x: (x @ torch.ones(5, 3)).tanh(), X.float()),
    "strided": (lambda x: x.sum(0) ** 2, torch.stack([X, Y]).T),
    "solve": (lambda x: torch.linalg.solve(torch.diag(x) + torch.ones(5, 5).double(), x), X.abs() + 1),
    "away from its kink": (torch.relu, X),
    "zero at zero": (lambda x: x**2, torch.zeros(3).double()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_pass(name):
    f, *inputs = RIGHT[name]
    report = check_gradient(f, *inputs)
    assert report.ok
    for row in report.results:
        assert row.status == "passed"
        if row.mode == "reverse" and name not in ("constant", "zero at zero"):
            assert row.slopes[0] == pytest.approx(1.0, abs=0.2)
            assert row.slopes[1] > 1.7


def test_the_table():
    report = check_gradient(RIGHT["product"][0], X, Y)
    assert [(r.name, r.mode) for r in report.results] == [
        ("input 0", "reverse"),
        ("input 0", "forward"),
        ("input 1", "reverse"),
        ("input 1", "forward"),
    ]
    text = str(report)
    assert "autograd" in text and "passed  input 1  forward" in text and "1.00, 2.00" in text
    names = [r.name for r in check_gradient(*RIGHT["tree"], forward=False).results]
    assert names == ["input 0['u']", "input 0['v'][0]"]


def test_an_error_that_gradcheck_accepts():
    def f(x, y):
        return (Square.apply(x, 1.00075, 1.0) * torch.sin(y)).sum()

    assert torch.autograd.gradcheck(f, (X.clone().requires_grad_(), Y.clone().requires_grad_()))  # with its defaults
    with pytest.raises(CheckError, match=r"autograd / differences = 1\.00075") as caught:
        check_gradient(f, X, Y)
    assert "to blame is Square at test_gradient_check.py:" in str(caught.value)
    report = check_gradient(f, X, Y, throw=False)
    assert rows(report, "input 0").status == "failed"
    assert rows(report, "input 0").slopes[1] < 1.5  # the remainder falls as h, not as h^2
    assert [rows(report, "input 0", "forward").status, rows(report, "input 1").status] == ["passed", "passed"]
    assert not report.ok


def test_the_number_of_calls_does_not_grow_with_the_input():
    calls = []

    def f(x):
        calls.append(0)
        return torch.sin(x)

    for n in (3, 100000):
        calls.clear()
        check_gradient(f, torch.randn(n, dtype=torch.float64), n_directions=1)
        assert len(calls) < 70
    few = len(calls)
    check_gradient(f, X, n_directions=3)
    assert len(calls) - few > 2 * few


def test_one_wrong_number_among_many():
    x = torch.randn(10000, dtype=torch.float64)

    def f(x):
        y = x**2
        if y.requires_grad:
            y.register_hook(lambda g: g.index_fill(0, torch.tensor([77]), 0.0))
        return y.sum()

    with pytest.raises(CheckError, match="every operation is right by itself: look for hooks"):
        check_gradient(f, x, forward=False)


def test_forward_mode_is_checked_by_itself():
    f = lambda x: Square.apply(x, 1.0, 1.001)  # noqa: E731
    report = check_gradient(f, X, throw=False)
    assert rows(report, "input 0").status == "passed"
    row = rows(report, "input 0", "forward")
    assert row.status == "failed" and "to blame is Square" in row.detail
    assert check_gradient(f, X, forward=False).ok


def test_missing_forward_derivatives_are_skipped():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    report = check_gradient(Reverse.apply, X)
    assert rows(report, "input 0", "forward").status == "skipped"
    assert "no forward derivative" in str(report)


def no_grad(x):
    with torch.no_grad():
        y = x**2
    return y + x


CUT = {
    "detach": (lambda x: x.detach() * x, "autograd / differences = 0.5.*through detach"),
    "data": (lambda x: x.data**2, "is None, but f depends on this input.*through data"),
    "no_grad": (no_grad, r"through pow under torch.no_grad\(\) \(test_gradient_check.py:"),
    "float": (lambda x: x * float(x[0].detach()), "through detach"),
    "item": (lambda x: x * x[0].item(), "through item"),
    "numpy": (lambda x: torch.from_numpy(x.detach().numpy() ** 2), "is None.*through detach"),
    "zero": (lambda x: Square.apply(x, 0.0, 1.0), "is zero, but f depends on this input; to blame is Square"),
    "None": (lambda x: Square.apply(x, None, 1.0), "is None, but f depends on this input; to blame is Square"),
}


@pytest.mark.parametrize("name", CUT)
def test_gradients_that_are_cut_off(name):
    f, text = CUT[name]
    with pytest.raises(CheckError, match=text):
        check_gradient(f, X, forward=False)


def test_the_first_wrong_operation_is_named():
    def f(x):
        y = Square.apply(x, 1.0, 1.0)
        z = Square.apply(y.sin(), 1.01, 1.0)  # wrong
        return Square.apply(z, 1.02, 1.0)  # wrong, but later

    line = f.__code__.co_firstlineno + 2
    with pytest.raises(CheckError, match=f"to blame is Square at test_gradient_check.py:{line}: its derivative"):
        check_gradient(f, X, forward=False)
    assert torch.autograd.Function.apply.__module__ == "torch.autograd.function"  # as it was


class WrongAdjoint(LinearOperator):
    def __init__(self):
        super().__init__((5,))

    def _forward(self, x):
        return torch.from_numpy(x.numpy() * 2.0)

    def _adjoint(self, y):
        return torch.from_numpy(y.numpy() * 2.001)


def test_an_operator_with_a_wrong_adjoint_is_named():
    op = WrongAdjoint()
    with pytest.raises(CheckError, match=r"to blame is the operator WrongAdjoint\(5\): dot test"):
        check_gradient(lambda x: op(x.sin()) ** 2, X)


def test_an_operation_of_torch_with_a_wrong_forward_derivative():
    f = lambda x: x.scatter_reduce(0, torch.tensor([1, 2]), x[3:5], "prod")  # noqa: E731
    if torch.func.jvp(f, (X,), (X,))[1].any():
        pytest.skip("torch has mended scatter_reduce")
    report = check_gradient(f, X, throw=False)
    assert rows(report, "input 0").status == "passed"
    assert "to blame is scatter_reduce at" in rows(report, "input 0", "forward").detail


def test_kinks():
    for f in (torch.relu, torch.abs, lambda x: x.clamp(0, 1), lambda x: torch.maximum(x, -2 * x)):
        report = check_gradient(f, torch.zeros(3).double())
        assert report.ok
        assert {r.status for r in report.results} == {"kink"}
        assert "f has a kink at or near x: its derivatives to both sides are" in str(report)

    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.abs()

        @staticmethod
        def backward(ctx, g):
            return 3 * g

    with pytest.raises(CheckError, match=r"kink.*autograd's is none between; check at another x"):
        check_gradient(Outside.apply, torch.zeros(3).double())


def test_nearby_kinks_are_no_errors():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        a = torch.randn(20, 8, dtype=torch.float64, generator=generator)
        x = torch.randn(8, dtype=torch.float64, generator=generator)
        assert check_gradient(lambda x, a=a: torch.relu(a @ x), x, forward=False, n_directions=1).ok
    for distance in (1e-2, 1e-3, 3e-4, 1e-4, 1e-5):
        x = torch.tensor([distance, 1.0, -2.0]).double()
        assert check_gradient(lambda x: torch.relu(x) * 2, x).ok


def test_randomness_in_place_changes_and_infinities():
    with pytest.raises(CheckError, match=r"calls with the same input differ.*set a seed"):
        check_gradient(lambda x: x * torch.rand(1), X)
    with pytest.raises(CheckError, match=r"calls with the same input differ.*use eval\(\)"):
        check_gradient(torch.nn.Dropout(0.5), X.repeat(4))
    with pytest.raises(CheckError, match=r"failed  input 1\n.*f changes this input in place; work on a copy"):
        check_gradient(lambda x, y: x + y.mul_(2), X, Y)
    with pytest.raises(CheckError, match=r"f\(x\) is not finite: 1 of 2 numbers"):
        check_gradient(torch.log, torch.tensor([-1.0, 1.0]).double())
    assert torch.equal(X, torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))


def test_errors_of_the_backward_are_lines():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x**2

        @staticmethod
        def backward(ctx, g):
            raise ValueError("not written yet")

    with pytest.raises(CheckError, match="ValueError: not written yet"):
        check_gradient(Broken.apply, X)


def test_modules():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(6, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert [r.name for r in check_gradient(model, x, forward=False).results] == ["input 0"]
    report = check_gradient(model, x, parameters=True, forward=False)
    assert {r.name for r in report.results} == {"input 0"} | {f"parameter {n}" for n, _ in model.named_parameters()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    class Detached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0).double())
            self.bias = torch.nn.Parameter(torch.tensor(1.0).double())

        def forward(self, x):
            return self.weight.detach() * x**2 + self.bias

    assert check_gradient(Detached(), X).ok
    report = check_gradient(Detached(), X, parameters=True, throw=False)
    failed = {r.name for r in report.results if r.status == "failed"}
    assert failed == {"parameter weight"}
    assert "through detach" in rows(report, "parameter weight").detail


def test_float32():
    x = X.float()
    assert not check_gradient(lambda x: Square.apply(x, 1.01, 1.0), x, throw=False).ok
    assert check_gradient(lambda x: Square.apply(x, 1.0005, 1.0), x).ok  # within 1e-3, the default
    assert not check_gradient(lambda x: Square.apply(x, 1.0005, 1.0), x, rtol=1e-4, throw=False).ok
    single = torch.ones(5, 3)  # cannot be multiplied with float64
    assert not check_gradient(lambda x: Square.apply(x @ single, 1.02, 1.0), x, throw=False).ok


def test_errors():
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        check_gradient(torch.sin, X)
    with torch.no_grad():
        assert check_gradient(torch.sin, X).ok
    for arguments, options, text in (
        ((3, X), {}, "f must be a function or a module; got int"),
        ((torch.sin, X), {"parameters": True}, "parameters=True needs a module"),
        ((torch.sin, X), {"n_directions": 0}, "n_directions must be at least 1"),
        ((torch.sin,), {}, "none of the inputs is a floating point tensor"),
        ((torch.sin, X.int()), {}, "none of the inputs is a floating point tensor"),
        ((torch.sin, X[:0]), {}, "none of the inputs"),
        ((lambda x: x.argmax(), X), {}, "f returns no floating point tensor"),
        ((lambda x: None, X), {}, "f returns no floating point tensor"),
    ):
        with pytest.raises(ArgumentError, match=text):
            check_gradient(*arguments, **options)
