"""Drawing leaves the user's model as it was, whatever the model does when it runs, and also if it fails."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

import pullback as pb
from pullback.core.errors import NotDifferentiableError


class Restless(nn.Module):
    """Changes everything that a module can change."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.words = nn.Embedding(4, 3, max_norm=0.1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.train(not self.training)
        self.count = self.count + 1
        self.count += 2
        self.norm.running_mean = 2 * self.norm.running_mean + 1
        self.register_buffer("cache", x)
        self.linear.weight.data.clamp_(-0.1, 0.1)
        with torch.no_grad():
            self.linear.bias[0] = 7.0
        self.norm.weight.requires_grad_(False)
        y = self.norm(self.linear(x)) + self.words(torch.tensor([1])) + np.random.rand() + random.random()
        if self.fails:
            raise ValueError("mine")
        y = nn.functional.dropout(y).sum()
        (2 * y).backward(retain_graph=True)
        return y


def state_of(net):
    tensors = {name: (id(t), t.detach().clone()) for name, t in net.state_dict(keep_vars=True).items()}
    tensors |= {
        f"{name}.grad": (id(p.grad), p.grad.clone()) for name, p in net.named_parameters() if p.grad is not None
    }
    flags = [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]
    return tensors, flags, [dict(m._buffers).keys() for m in net.modules()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["forward", "autograd"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_model_is_as_before(kind, fails, wrapped):
    net = Restless(fails)
    calls = []
    net.linear.register_forward_hook(lambda *_: calls.append(1))
    net.linear.weight.grad = torch.ones(3, 3)
    before, seeds = state_of(net), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    f = (lambda x: net(x)) if wrapped else net
    if fails:
        with pytest.raises(ValueError, match="mine"):
            pb.graph(f, torch.ones(4, 3), kind=kind)
    else:
        assert len(pb.graph(f, torch.ones(4, 3), kind=kind).nodes) > 10
    after = state_of(net)
    assert before[0].keys() == after[0].keys() and before[1:] == after[1:] and calls == [1]
    for name, (identity, numbers) in before[0].items():
        assert after[0][name][0] == identity and torch.equal(after[0][name][1], numbers), name
    assert torch.equal(torch.get_rng_state(), seeds[0]) and (np.random.get_state()[1] == seeds[1]).all()
    assert random.getstate() == seeds[2]
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def test_stand_ins_of_a_hidden_module_are_not_kept():
    class Holder:
        net = nn.Linear(2, 2)

    holder = [Holder()]
    weight = Holder.net.weight
    given = {"weight": torch.ones(2, 2, requires_grad=True), "bias": torch.zeros(2)}
    pb.graph(lambda x: torch.func.functional_call(holder[0].net, given, x), torch.ones(2))
    assert Holder.net.weight is weight and isinstance(Holder.net.bias, nn.Parameter)


def test_gradients_with_numbers_that_were_put_back_are_refused():
    net = nn.Linear(3, 3)

    def f(x):
        net.weight.data.clamp_(-0.1, 0.1)
        return net(net(x)).sum()

    old = net.weight.detach().clone()
    with pytest.raises(NotDifferentiableError, match="modified by an inplace operation"):
        pb.graph(f, torch.ones(3), gradients=True)
    assert torch.equal(net.weight, old) and len(pb.graph(f, torch.ones(3)).nodes) > 5


def test_no_global_hook_stays():
    """One that stays makes every torch.compile of a module warn."""
    net = torch.nn.Linear(2, 2)
    pb.graph(net, torch.rand(1, 2))
    pb.graph(net, torch.rand(1, 2), kind="autograd")
    assert not torch.nn.modules.module._has_any_global_hook()
