import gc
import inspect
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import pullback as pb
from pullback.autodiff.nan import nan_origin
from pullback.autodiff.nan_watch import Watch
from pullback.core.errors import ArgumentError

D = torch.float64
NAN, INF = float("nan"), float("inf")


def leaf(*values, dtype=D):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def line(f, offset):
    """The number of a line of f."""
    return inspect.getsourcelines(f)[1] + offset


def test_finite_programs():
    x = leaf(1.0, 2.0)
    o = nan_origin(lambda x: x.sin().exp(), x)
    assert not o and not o.found and repr(o) == "no NaN or Inf" and x.grad is None
    assert "no backward pass to look at" in repr(nan_origin(lambda x: x * 2, torch.ones(2)))
    assert not nan_origin(lambda: None)
    assert not nan_origin(lambda: {"a": torch.ones(2, dtype=torch.int64), "b": 3})
    assert not nan_origin(lambda x: x.sum(), torch.zeros(0, requires_grad=True))


# Forward ------------------------------------------------------------------------------------------------------------


def loss_of_log(x):
    h = x * 2
    h = torch.log(h)  # the line
    return (h * 3).sum() + 1


def test_forward():
    o = nan_origin(loss_of_log, leaf(1.0, -2.0, 0.0))
    assert (o.found, o.kind, o.stage, o.operation, o.module) == (True, "NaN", "forward", "log", None)
    assert (o.source.line, o.source.code) == (line(loss_of_log, 2), "h = torch.log(h)  # the line")
    assert o.source.file == __file__
    (s,) = o.inputs
    assert (s.shape, s.dtype, s.low, s.high, s.zeros, s.nans) == ((3,), "float64", -4.0, 2.0, 1, 0)
    assert "clamp(min=eps)" in o.advice and o.advice in repr(o).replace("\n  ", " ")
    assert max(map(len, repr(o).splitlines())) <= 160 and "<pre>" in o._repr_html_()


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layer1 = nn.Linear(3, 3).double()
        self.layer2 = nn.ModuleDict({"norm": norm})

    def forward(self, x):
        return self.layer2["norm"](self.layer1(x)).sum()


class BadNorm(nn.Module):
    def forward(self, x):
        return (x - x) / (x - x)


class RootNorm(nn.Module):
    def forward(self, x):
        return (x * x * 0).sum(-1).sqrt()


def test_the_module_is_named():
    o = nan_origin(Net(BadNorm()), torch.ones(2, 3, dtype=D))
    assert (o.operation, o.module, o.source.line) == ("div", "Net.layer2.norm", line(BadNorm, 2))
    assert "division by 0" in o.advice
    o = nan_origin(Net(RootNorm()), torch.ones(2, 3, dtype=D))
    assert (o.stage, o.operation, o.module) == ("backward", "Sqrt", "Net.layer2.norm")
    assert o.source.line == line(RootNorm, 2) and "infinite derivative at 0" in o.advice
    net = Net(nn.Identity())
    o = nan_origin(net, torch.full((1, 3), INF, dtype=D))
    assert (o.operation, o.module, o.cause.stage) == ("addmm", "Net.layer1", "input")


class Chooser(nn.Module):
    def forward(self, x):
        return nn.functional.softmax(x.masked_fill(x < 5, -INF), -1)


def test_inf_on_purpose_is_not_reported():
    assert not nan_origin(lambda x: x.masked_fill(x > 1, -INF).softmax(0), leaf(1.0, 2.0))
    o = nan_origin(Chooser(), leaf(1.0, 2.0))
    assert (o.kind, o.operation, o.module) == ("NaN", "softmax", "Chooser") and "no softmax" in o.advice
    assert (o.cause.kind, o.cause.operation) == ("Inf", "masked_fill")
    assert "the Inf that it met" in repr(o)
    assert nan_origin(Chooser(), leaf(1.0, 2.0), inf=True).operation == "masked_fill"


def test_overflow():
    o = nan_origin(lambda x: x.exp() / x.exp(), leaf(1e3, 1.0))
    assert o.operation == "div" and o.cause.operation == "exp" and "overflows" in o.cause.advice
    o = nan_origin(lambda x: x.exp(), leaf(1e3))
    assert (o.kind, o.operation) == ("Inf", "exp")
    o = nan_origin(lambda x: (x * x).sum(), torch.full((3,), 300.0, dtype=torch.float16))
    assert (o.kind, o.operation) == ("Inf", "mul") and "wider type" in o.advice
    o = nan_origin(lambda x: x.half(), torch.full((3,), 1e6))
    assert o.operation == "to_copy" and "narrower" in o.advice


def test_nan_that_was_thrown_away_is_not_blamed():
    def f(x):
        a = torch.where(x > 0, x.log(), 0.0).detach()
        return (a + torch.acos(x)).sum()

    o = nan_origin(f, leaf(-0.5, 1.5))
    assert (o.stage, o.operation) == ("forward", "acos") and "[-1, 1]" in o.advice
    o = nan_origin(lambda x: torch.where(x > 0, x.log(), 0.0), torch.tensor([-1.0, 1.0]))
    assert not o and "log made NaN" in repr(o) and "did not reach the result" in repr(o)


def test_inputs_and_parameters():
    x = torch.tensor([1.0, NAN, INF])
    o = nan_origin(lambda a, *, b: a + b["k"][0], torch.ones(3), b={"k": [x]})
    assert (o.stage, o.operation, o.kind) == ("input", "input b['k'][0]", "NaN")
    assert "input b['k'][0] holds 1 NaN, 1 Inf" in repr(o) and "before the first operation" in repr(o)
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        net[0].weight[0, 1] = NAN
    o = nan_origin(net, torch.ones(2))
    assert (o.stage, o.operation) == ("input", "parameter 0.weight")
    assert nan_origin(lambda m, x: m(x), net, torch.ones(2)).operation == "parameter input 0.0.weight"
    assert nan_origin(net.forward, torch.ones(2)).operation == "parameter 0.weight"
    o = nan_origin(lambda a, b: a.sqrt(), torch.tensor([-1.0]), x)
    assert o.operation == "sqrt" and "input 1 holds" in repr(o)


def test_writing_in_place():
    def f(x):
        y = torch.empty(4, dtype=D)
        y.copy_(x)
        y[1:].log_()
        return y.sum()

    o = nan_origin(f, torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=D))
    assert (o.operation, o.source.line, o.inputs[0].nans, o.inputs[0].low) == ("log_", line(f, 3), 0, -1.0)
    out = torch.full((2,), NAN)
    assert nan_origin(lambda x: torch.log(x, out=out), torch.tensor([1.0, -1.0])).operation == "log"
    assert not nan_origin(lambda x: out.copy_(x) * 2, torch.ones(2))
    old = torch.full((1,), NAN)
    assert nan_origin(lambda x: old.copy_(x.exp()), torch.tensor([1e3])).operation == "exp"


def test_running_statistics():
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    with torch.no_grad():
        net[0].weight.fill_(3e38)
    o = nan_origin(net, torch.full((3, 2, 4), 2.0))
    assert (o.kind, o.module) == ("NaN", "Sequential.1") and "batch_norm" in o.operation
    assert (o.cause.operation, o.cause.module) == ("convolution", "Sequential.0")
    net[1].reset_running_stats()
    o = nan_origin(lambda x: [net(x), net[1].eval()(x * 0)][1], torch.full((3, 2, 4), 2.0))
    assert "batch_norm" in o.operation and o.module == "Sequential.1"


def test_nan_from_nowhere():
    def f(x):
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.log(x.numpy())) * 2

    o = nan_origin(f, torch.tensor([-1.0]))
    assert o.operation == "code outside of torch" and "NumPy" in o.advice and o.source.line == line(f, 2)
    assert nan_origin(lambda: torch.full((2,), NAN) + 1).operation == "full"
    assert nan_origin(lambda: torch.tensor(NAN) + 1).operation == "code outside of torch"


def test_complex():
    z = torch.zeros(2, dtype=torch.complex128)
    o = nan_origin(lambda z: z / z.abs(), z)
    assert (o.operation, o.inputs[0].dtype, o.inputs[1].zeros) == ("div", "complex128", 2)


def test_errors_of_f():
    o = nan_origin(lambda x: torch.linalg.cholesky(x.log().diag()), torch.tensor([1.0, -1.0], dtype=D))
    assert o.operation == "log" and "f raised LinAlgError" in repr(o)
    with pytest.raises(RuntimeError, match="must match"):
        nan_origin(lambda x: x + torch.ones(5), torch.tensor([1.0, INF, 1.0]))
    with pytest.raises(ArgumentError, match=r"write nan_origin\(lambda"):
        nan_origin(torch.ones(3))


# Backward -----------------------------------------------------------------------------------------------------------


def masked_root(x):
    return torch.where(x > 0, x.sqrt(), 0.0)  # the line


def test_the_classic_where():
    x = leaf(0.0, 1.0)
    o = nan_origin(masked_root, x)
    assert (o.kind, o.stage, o.operation, o.source.line) == ("NaN", "backward", "Sqrt", line(masked_root, 1))
    assert "torch.where first" in o.advice and x.grad is None and o.node.name() == "SqrtBackward0"
    assert [(s.name, s.zeros) for s in o.inputs] == [("result", 1), ("gradient", 1)]
    o = nan_origin(masked_root, leaf(-1.0, 1.0))  # the NaN of the forward pass comes back
    assert (o.stage, o.operation, o.cause.stage, o.cause.operation) == ("backward", "Sqrt", "forward", "sqrt")
    assert "the NaN that it met" in repr(o)
    safe = lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)  # noqa: E731
    assert not nan_origin(safe, leaf(-1.0, 0.0, 1.0))
    assert not nan_origin(masked_root, x, backward=False)


@pytest.mark.parametrize(
    ("f", "values", "operation", "advice"),
    [
        (lambda x: x.sqrt(), (0.0, 1.0), "Sqrt", "infinite derivative at 0"),
        (lambda x: x.abs().sqrt(), (0.0, 1.0), "Sqrt", "infinite derivative at 0"),
        (lambda x: x**0.5, (0.0, 1.0), "Pow", "p < 1"),
        (lambda x: x.acos(), (1.0,), "Acos", "clamp"),
        (lambda x: torch.where(x > 0, x.log(), 0.0), (0.0, 1.0), "Log", "clamp"),
        (lambda x: torch.where(x > 0, 1 / x, 0.0), (0.0, 1.0), "Reciprocal", "add eps"),
        (lambda x: x.expand(3).std(), (1.0,), None, None),
        (lambda x: torch.linalg.eigh(torch.diag(x))[1].sum(), (1.0, 1.0), "LinalgEigh", "perturb"),
    ],
)
def test_backward_table(f, values, operation, advice):
    o = nan_origin(lambda x: f(x).sum(), leaf(*values))
    if operation is None:  # torch defines this one as 0
        assert not o
        return
    assert (o.stage, o.operation) == ("backward", operation) and advice in o.advice


def test_grad_output():
    x = leaf(0.0, 1.0)
    f = lambda x: [x.abs(), x.sqrt()]  # noqa: E731
    assert nan_origin(f, x).operation == "Sqrt"
    ones = torch.ones(2, dtype=D)
    o = nan_origin(f, x, grad_output=[ones, torch.tensor([0.0, 1.0], dtype=D)])
    assert o.kind == "NaN" and o.operation == "Sqrt"
    with pytest.raises(ArgumentError, match="grad_output must match the 2 results"):
        nan_origin(f, x, grad_output=ones)


def test_a_training_step():
    net = nn.Linear(2, 1).double()
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        loss = net(x).norm(dim=-1).sqrt().sum()
        loss.backward()
        return loss.item()

    o = nan_origin(step, torch.ones(3, 2, dtype=D))
    assert (o.stage, o.operation, o.source.line) == ("backward", "Sqrt", line(step, 2))
    o = nan_origin(lambda x: torch.autograd.grad(x.sqrt().sum(), x)[0], leaf(0.0))
    assert (o.stage, o.operation) == ("backward", "Sqrt")


class LogFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.log()  # the line

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / x


class NumpyFunction(torch.autograd.Function):
    @staticmethod
    def forward(x):
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.log(x.detach().numpy()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(np.full(g.shape, NAN))


def test_custom_functions():
    o = nan_origin(LogFunction.apply, leaf(-1.0))
    assert (o.operation, o.function, o.source.line) == ("log", "LogFunction", line(LogFunction, 4))
    assert "inside of LogFunction" in repr(o)
    o = nan_origin(lambda x: LogFunction.apply(x.clamp(min=0)).exp(), leaf(0.0))
    assert (o.stage, o.operation) == ("backward", "LogFunction")
    o = nan_origin(lambda x: NumpyFunction.apply(x).sum(), leaf(-1.0))
    assert (o.stage, o.operation) == ("forward", "NumpyFunction")
    o = nan_origin(lambda x: NumpyFunction.apply(x).sum(), leaf(1.0))
    assert (o.stage, o.operation) == ("backward", "NumpyFunction") and "NumPy" in o.advice


def test_our_operators():
    A = pb.Smoothing2D((3, 3), dims=(6, 6))
    o = nan_origin(lambda x: A(x).sqrt().sum(), torch.zeros(6, 6, dtype=D, requires_grad=True))
    assert (o.stage, o.operation) == ("backward", "Sqrt")
    o = nan_origin(lambda x: A(x * 1e308 * 10).sum(), torch.ones(6, 6, dtype=D))
    assert (o.operation, o.cause.operation) == (A._expression(), "mul")
    K = pb.Genred("Exp(x*x) - Exp(y*y)", ["x = Vi(1)", "y = Vj(1)"], reduction_op="Sum", axis=1)
    o = nan_origin(lambda x: K(x, x).sum(), torch.full((4, 1), 30.0, dtype=D))
    assert o.kind == "NaN" and o.stage == "forward" and o.operation not in ("map", "apply")
    solved = nan_origin(lambda b: pb.cg(pb.Diagonal(torch.ones(3, dtype=D)), b).x.sqrt().sum(), leaf(0.0, 1.0, 2.0))
    assert (solved.stage, solved.operation) == ("backward", "Sqrt")
    assert "the backward pass raised ConvergenceError" in repr(solved)


def test_transforms():
    x = torch.tensor([0.0, -1.0], dtype=D)
    o = nan_origin(lambda x: torch.func.vmap(torch.func.grad(torch.sqrt))(x), x)
    assert o.found and o.kind == "NaN"
    o = nan_origin(lambda x: torch.func.jacrev(torch.sqrt)(x), torch.zeros(2, dtype=D))
    assert o.found and o.stage == "backward"
    o = nan_origin(lambda x: torch.utils.checkpoint.checkpoint(masked_root, x, use_reentrant=False), leaf(0.0))
    assert (o.stage, o.operation) == ("backward", "Sqrt")


def test_nothing_is_left_behind():
    hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    before = [len(h) for h in hooks]
    x = leaf(0.0, 1.0)
    net = Net(RootNorm())
    y = x.sqrt()
    nan_origin(lambda: y.sum() + net(torch.ones(1, 3, dtype=D)))
    with pytest.raises(ValueError, match="mine"):
        nan_origin(Raising(), x)
    assert [len(h) for h in hooks] == before
    assert not torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert all(p.grad is None for p in net.parameters()) and x.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y.sum().backward()
    assert x.grad[1] == 0.5


def test_no_hook_stays_on_a_graph(monkeypatch):
    made = []
    monkeypatch.setattr("pullback.autodiff.nan.Watch", lambda: made.append(Watch()) or made[-1])
    y = leaf(0.0, 1.0).sqrt()
    assert nan_origin(lambda: y.sum())
    seen = weakref.ref(made.pop())
    gc.collect()
    assert seen() is None


class Raising(nn.Module):
    def forward(self, x):
        raise ValueError("mine")


def test_f_runs_once_and_no_grad_and_integers():
    calls = []

    def f(x):
        calls.append(1)
        with torch.no_grad():
            return x[torch.tensor([0, 1])].log().argmax()

    assert not nan_origin(f, leaf(1.0, 2.0)) and calls == [1]
    with torch.inference_mode():
        assert nan_origin(Net(BadNorm()), torch.ones(1, 3, dtype=D)).module == "Net.layer2.norm"
