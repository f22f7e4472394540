"""Checkpointed chains: gradients as without checkpoints, at the cost that the plan says."""

import weakref
from functools import lru_cache

import pytest
import torch
from torch import nn

from pullback.autodiff.chain import Chain, advances, split
from pullback.core.errors import ArgumentError, NotDifferentiableError

N = 9
PLANS = [{}, {"slots": 1}, {"slots": 3}, {"slots": 20}, {"schedule": "binomial"}, {"schedule": "none"}]
same = torch.testing.assert_close


def stages(n=N, width=4):
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()).double() for _ in range(n)]


def point():
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def loss(f):
    return lambda x: f(x).sin().square().sum()


class Counted:
    """Counts the calls of stages."""

    def __init__(self, chain):
        self.n = 0
        for stage in chain:
            stage.register_forward_pre_hook(self.count)

    def count(self, *args):
        self.n += 1


@lru_cache(None)
def fewest(length, slots):
    """The definition: try every place of the next state."""
    if length < 2:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(m + fewest(m, slots) + fewest(length - m, slots - 1) for m in range(1, length))


def test_the_binomial_schedule_is_optimal():
    for length in range(1, 45):
        for slots in range(1, 9):
            assert advances(length, slots) == fewest(length, slots)
            if length > 1 and slots > 1:
                m = split(length, slots)
                assert m + fewest(m, slots) + fewest(length - m, slots - 1) == fewest(length, slots)


@pytest.mark.parametrize("kwargs", PLANS, ids=str)
def test_gradients_are_those_of_plain_evaluation_at_the_planned_cost(kwargs):
    chain, x = Chain(*stages(), **kwargs), point()
    counted, wanted = Counted(chain), [x, *chain.parameters()]
    grads = torch.autograd.grad(loss(chain)(x), wanted)
    assert counted.n == chain.plan.evaluations
    for a, b in zip(grads, torch.autograd.grad(loss(nn.Sequential(*chain))(x), wanted), strict=True):
        same(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", PLANS[:3], ids=str)
def test_second_derivatives(kwargs):
    chain, x = Chain(*stages(5), **kwargs), point()
    plain, wanted = nn.Sequential(*chain), [x, *chain.parameters()]

    def second(f):
        first = torch.autograd.grad(loss(f)(x), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), wanted)

    for a, b in zip(second(chain), second(plain), strict=True):
        same(a, b)


def test_gradcheck_of_both_orders_and_modes():
    chain = Chain(*stages(4), slots=2)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        chain, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(chain, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("kwargs", PLANS[:4], ids=str)
def test_transforms(kwargs):
    chain = Chain(*stages(6), **kwargs)
    plain, x = nn.Sequential(*chain), point().detach()
    f, f0 = loss(chain), loss(plain)
    counted = Counted(chain)
    g = torch.func.grad(f)(x)
    assert counted.n == chain.plan.evaluations  # memory is saved there, too
    same(g, torch.func.grad(f0)(x))
    same(torch.func.vmap(torch.func.grad(f))(x[:, None]), torch.func.vmap(torch.func.grad(f0))(x[:, None]))
    hessian = torch.func.hessian(f0)(x)
    for outer, inner in (("jacfwd", "jacrev"), ("jacrev", "jacrev"), ("jacrev", "jacfwd"), ("jacfwd", "jacfwd")):
        same(getattr(torch.func, outer)(getattr(torch.func, inner)(f))(x), hessian)
    p = {k: v.detach() * 1.1 for k, v in chain.named_parameters()}
    by_chain = torch.func.grad(lambda p: torch.func.functional_call(chain, p, (x,)).square().sum())(p)
    by_plain = torch.func.grad(lambda p: torch.func.functional_call(plain, p, (x,)).square().sum())(p)
    for k in p:
        same(by_chain[k], by_plain[k])


def test_tensors_that_stages_close_over_get_their_gradients():
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    v = w * 2  # depends on w: counted once each
    chain = Chain(*[lambda x: torch.tanh(x @ w + x @ v)] * 5, slots=2)

    def plain(x):
        for _ in range(5):
            x = torch.tanh(x @ w + x @ v)
        return x

    x = point()
    for f in (loss, lambda f: lambda x: f(x).sum() * x.sum()):
        grads = [torch.autograd.grad(f(g)(x), (x, w), retain_graph=True) for g in (chain, plain)]
        for a, b in zip(*grads, strict=True):
            same(a, b)
    # in a transform, both for the tensor of the transform and for the one outside
    inside = torch.func.grad(lambda w: Chain(*[lambda x: torch.tanh(x @ w)] * 3, slots=1)(x.detach()).sum())
    outside = torch.func.grad(lambda w: torch.tanh(torch.tanh(torch.tanh(x.detach() @ w) @ w) @ w).sum())
    same(inside(w.detach()), outside(w.detach()))
    totals = [torch.func.grad(lambda x, f=f: f(x).sum())(x.detach()).sum() for f in (chain, plain)]
    same(*(torch.autograd.grad(t, w, retain_graph=True) for t in totals))


@pytest.mark.parametrize("kwargs", [{}, {"slots": 2}], ids=str)
def test_compile(kwargs):
    chain, x = Chain(*stages(4), **kwargs), point()
    plain = nn.Sequential(*chain)
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(loss(compiled)(x), x), torch.autograd.grad(loss(plain)(x), x))
    g = torch.compile(torch.func.grad(loss(chain)), fullgraph=True, backend="aot_eager")(x.detach())
    same(g, torch.func.grad(loss(plain))(x.detach()))


def test_the_number_of_living_states_is_bounded():
    alive, most = weakref.WeakSet(), 0

    class Step(nn.Module):
        def forward(self, x):
            nonlocal most
            y = torch.sin(x) * 1.01
            if not torch.is_grad_enabled():  # a state on the way, not what is recorded
                alive.add(y.untyped_storage())
                most = max(most, len(alive))
            return y

    for slots in (1, 3, 5):
        most = 0
        chain = Chain(*[Step() for _ in range(30)], slots=slots)
        loss(chain)(point()).backward()
        assert most <= slots + 2  # the kept ones but the input, and one step's input and output on the way
        assert not alive


def test_a_graph_can_be_used_twice():
    chain, x = Chain(*stages(), slots=2), point()
    y = loss(chain)(x)
    first = torch.autograd.grad(y, x, retain_graph=True)
    same(torch.autograd.grad(y, x), first)


@pytest.mark.parametrize("transform", [False, True])
def test_random_numbers_are_the_same_again(transform):
    chain = Chain(*[nn.Dropout(0.5) for _ in range(6)], slots=2)
    x = torch.ones(200, dtype=torch.float64, requires_grad=True)
    if transform:
        g, y = torch.func.grad_and_value(lambda x: chain(x).sum())(x.detach())
        assert g.sum() == y > 0
    else:
        y = chain(x)
        y.sum().backward()
        same(x.grad, y.detach())
    torch.manual_seed(1)
    a = chain(x)
    follows = torch.rand(1)
    a.sum().backward()  # running again leaves the generator alone
    b = torch.rand(1)
    torch.manual_seed(1)
    nn.Sequential(*chain)(x)
    assert torch.equal(torch.rand(1), follows) and torch.equal(torch.rand(1), b)


def test_autocast_is_the_same_again():
    chain = Chain(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], slots=1)
    x = torch.randn(3, 8, requires_grad=True)
    grads = []
    for f in (chain, nn.Sequential(*chain)):
        with torch.autocast("cpu", torch.bfloat16):
            y = f(x)
        assert y.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(y.float().square().sum(), [x, *chain.parameters()]))
    for a, b in zip(*grads, strict=True):
        same(a, b, rtol=0, atol=0)


def test_states_may_be_structures():
    def step(s):
        return {"u": s["u"] + 0.1 * s["v"], "v": s["v"] - 0.1 * torch.sin(s["u"]), "n": s["n"] + 1}

    u = torch.randn(4, dtype=torch.float64, requires_grad=True)
    start = {"u": u, "v": torch.zeros_like(u), "n": torch.tensor(0)}
    chain, plain = Chain([step] * 7, slots=2), Chain([step] * 7, schedule="none")
    assert chain(start)["n"] == 7
    same(torch.autograd.grad(chain(start)["u"].sum(), u), torch.autograd.grad(plain(start)["u"].sum(), u))
    g = torch.func.grad(lambda u: chain({**start, "u": u})["u"].sum())(u.detach())
    same(g, torch.autograd.grad(plain(start)["u"].sum(), u)[0])


def test_values_of_functional_call_last_until_backward():
    chain, x = Chain(*stages(), slots=1), point()
    p = {k: (v.detach() * 2).requires_grad_() for k, v in chain.named_parameters()}
    y = torch.func.functional_call(chain, p, (x,))
    z = torch.func.functional_call(nn.Sequential(*chain), p, (x,))
    wanted = [x, *p.values()]
    for a, b in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(z.sum(), wanted), strict=True):
        same(a, b)


def test_frozen_parameters_and_inputs_without_gradient():
    chain = Chain(*stages(6), slots=2)
    for p in list(chain.parameters())[:6]:
        p.requires_grad_(False)
    x = point().detach()
    loss(chain)(x).backward()
    assert chain[0][0].weight.grad is None and chain[5][0].weight.grad is not None
    with torch.no_grad():
        assert not chain(x).requires_grad


def test_memory_chooses_the_slots():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)  # a state has 8000 bytes, sin saves its input
    f = [torch.sin] * 20
    chain = Chain(f, memory=82_000)
    with pytest.raises(ArgumentError, match="measure"):
        _ = chain.plan
    assert chain.measure(x).slots == 5 == chain.plan.states
    y = chain(x)
    same(torch.autograd.grad(y.sum(), x), torch.autograd.grad(Chain(f, schedule="none")(x).sum(), x))
    assert Chain(f, memory=1e6).measure(x).schedule == "none"
    assert chain.measure(x[:500]).slots == 14  # of 4000 bytes; another shape, another plan
    with pytest.raises(ArgumentError, match="at least 48000 bytes"):
        Chain(f, memory=10_000)(x)
    norm = nn.BatchNorm1d(3)
    Chain(norm, memory=1e9).measure(torch.randn(5, 3))
    assert norm.num_batches_tracked == 0  # measuring leaves no trace


def test_what_cannot_be_repeated_is_refused():
    x = point()
    inplace = Chain(nn.Tanh(), nn.ReLU(inplace=True), nn.Tanh(), nn.Tanh(), slots=2)
    with pytest.raises(NotDifferentiableError, match=r"stage 1 was changed in place.*inplace=False"):
        inplace(x)
    chain = Chain(*stages(), slots=2)
    y = chain(x)
    with torch.no_grad():
        chain[2][0].weight.mul_(2)
    with pytest.raises(NotDifferentiableError, match=r"stage 2 uses a parameter of shape.*changed in place"):
        y.sum().backward()
    z = torch.randn(4, dtype=torch.float64)
    y = chain(z)
    z.zero_()
    with pytest.raises(NotDifferentiableError, match="input of the chain was changed in place"):
        y.sum().backward()
    calls = iter(range(100))
    moody = Chain([torch.tanh, lambda x: x.sin() if next(calls) == 0 else x.sum(1, keepdim=True).cos(), torch.tanh])
    with pytest.raises(NotDifferentiableError, match="must do the same at every call"):
        moody(x).sum().backward()
    silent = iter(range(100))
    moody = Chain([torch.tanh, lambda x: x.sin().exp() if next(silent) == 0 else x, torch.tanh], slots=3)
    with pytest.raises(NotDifferentiableError, match="another number of tensors"):
        moody(x).sum().backward()


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "at least one stage"),
        ((3,), {}, "stage 0 must be a module or a function; got int"),
        ((torch.sin,), {"schedule": "log"}, "schedule must be one of sqrt, binomial, none; got 'log'"),
        ((torch.sin,), {"slots": 0}, "slots must be an int >= 1"),
        ((torch.sin,), {"slots": 2, "memory": 10}, "not both"),
        ((torch.sin,), {"memory": -1}, "positive number of bytes"),
        ((torch.sin,), {"schedule": "sqrt", "slots": 2}, "belong to schedule='binomial'"),
    ],
)
def test_errors(args, kwargs, text):
    with pytest.raises(ArgumentError, match=text):
        Chain(*args, **kwargs)


def test_plans_and_texts():
    chain = Chain(nn.Sequential(*stages(16)))
    assert chain.plan.groups == (4, 4, 4, 4) and chain.plan.evaluations == 28 and chain.plan.states == 4
    assert "28 evaluations (1.75 a stage), at most 4 states" in repr(chain)
    assert len(chain) == 16 and isinstance(chain[3][0], nn.Linear)
    assert Chain(*stages(16), slots=16).plan.evaluations == 31
    assert Chain(torch.sin)(torch.zeros(2)).shape == (2,)
    assert list(chain.state_dict()) == list(nn.Sequential(*stages(16)).state_dict())
