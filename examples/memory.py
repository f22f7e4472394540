# %% [markdown]
# # Gradients of deep networks in little memory
#
# Reverse mode needs the states of all $N$ layers in reverse order. Either they are kept (plain autograd), or some are
# kept and the others computed again (`Chain`), or they are computed backwards from the output, because every layer can
# be inverted (`Reversible`). The gradient is the same.
#
# Memory is measured, not estimated: a dispatch mode sees every tensor that any operation makes, forward and backward,
# and hears when its storage is freed.

# %%
import time
import weakref

import matplotlib.pyplot as plt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

from pullback.autodiff.chain import Chain
from pullback.autodiff.invertible import AdditiveCoupling, Reversible, check_inverse

N, WIDTH, BATCH = 64, 64, 2048
torch.manual_seed(0)


class Peak(TorchDispatchMode):
    """The most bytes of new storages alive at one time."""

    def __init__(self):
        super().__init__()
        self.seen = weakref.WeakSet()
        self.now = self.most = 0

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage() not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


def net() -> torch.nn.Module:
    half = WIDTH // 2
    return torch.nn.Sequential(torch.nn.Linear(half, half), torch.nn.Tanh(), torch.nn.Linear(half, half))


layers = [AdditiveCoupling(net(), swap=k % 2 == 1) for k in range(N)]
plain = torch.nn.Sequential(*layers)
x = torch.randn(BATCH, WIDTH, requires_grad=True)
state = x.numel() * x.element_size()
parameters = list(plain.parameters())

# %% [markdown]
# ## Seven ways to the same gradient

# %%
ways = {
    "plain": plain,
    "torch checkpoint, 8 segments": lambda x: checkpoint_sequential(plain, 8, x, use_reentrant=False),
    "Chain, sqrt": Chain(layers),
    "Chain, binomial, 7 slots": Chain(layers, slots=7),
    "Chain, binomial, 3 slots": Chain(layers, slots=3),
    "Chain, 8 MB": Chain(layers, memory=8e6),
    "Reversible": Reversible(layers),
}
for chain in ways.values():
    if isinstance(chain, Chain):
        print(chain.measure(x))
print(str(check_inverse(ways["Reversible"], x.detach())).splitlines()[-1])

peaks, seconds, gradients = {}, {}, {}
for name, way in ways.items():
    start = time.perf_counter()
    torch.autograd.grad(way(x).square().mean(), [x, *parameters])
    seconds[name] = time.perf_counter() - start
    with Peak() as peak:
        gradients[name] = torch.autograd.grad(way(x).square().mean(), [x, *parameters])
    peaks[name] = peak.most
    print(f"{name:30} {peak.most / 2**20:7.1f} MB = {peak.most / state:6.1f} states, {seconds[name]:.2f} s")

# %% [markdown]
# ## Depth
#
# The memory of invertible layers does not grow with depth.

# %%
depths = (8, 16, 32, 64)
growth = {}
for name, make in (("plain", torch.nn.Sequential), ("Chain, sqrt", Chain), ("Reversible", Reversible)):
    growth[name] = []
    for depth in depths:
        with Peak() as peak:
            make(*layers[:depth])(x).square().mean().backward(inputs=[x])
        growth[name].append(peak.most / 2**20)

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
bars = left.barh(list(peaks), [p / 2**20 for p in peaks.values()])
left.bar_label(bars, [f"{p / 2**20:.0f} MB, {seconds[n]:.2f} s" for n, p in peaks.items()], padding=3)
left.set(title=f"peak memory of one gradient, {N} layers", xlabel="MB", xlim=(0, 1.35 * max(peaks.values()) / 2**20))
left.invert_yaxis()
for name, values in growth.items():
    right.plot(depths, values, "o-", label=name)
right.set(title="peak memory and depth", xlabel="layers", ylabel="MB", ylim=(0, None))
right.legend()
fig.savefig("memory.png", dpi=100)

largest = max(float(g.abs().max()) for g in gradients["plain"])
for name, found in gradients.items():
    error = max(float((a - b).abs().max()) for a, b in zip(found, gradients["plain"], strict=True))
    assert error < 1e-5 * largest, name

assert peaks["Reversible"] < peaks["Chain, binomial, 3 slots"] < peaks["Chain, binomial, 7 slots"]
assert peaks["Chain, binomial, 7 slots"] < peaks["Chain, sqrt"] < 1.1 * peaks["torch checkpoint, 8 segments"]
assert peaks["Chain, 8 MB"] < 1.1 * 8e6
assert peaks["torch checkpoint, 8 segments"] < 0.3 * peaks["plain"]
assert growth["Reversible"][-1] < 1.3 * growth["Reversible"][0]
