# %% [markdown]
# # Matching two point clouds by optimal transport
#
# $$f_i = -\varepsilon \log \frac1N \sum_j e^{(g_j - \frac12 |x_i - y_j|^2)/\varepsilon}, \qquad
#   g_j = -\varepsilon \log \frac1M \sum_i e^{(f_i - \frac12 |x_i - y_j|^2)/\varepsilon}$$
#
# Sinkhorn's iteration between two clouds of 100,000 points each: every step is a LogSumExp over $10^{10}$ pairs, done
# within a tolerance by sums of linear cost. Moving the first cloud down the gradient of the debiased Sinkhorn
# divergence (Feydy et al., 2019, arXiv:1810.08278) turns it into the second.

# %%
import math
import time

import matplotlib.pyplot as plt
import torch

import pullback as pb
from pullback.kernels import fast

torch.manual_seed(0)
torch.set_num_threads(1)
N, tolerance = 100_000, 1e-5


def ring(n: int) -> torch.Tensor:
    """A ring around (0.3, 0.5)."""
    angle, radius = 2 * math.pi * torch.rand(n).double(), 0.15 + 0.05 * torch.rand(n).double()
    return torch.stack([0.3 + radius * angle.cos(), 0.5 + radius * angle.sin()], -1)


def moons(n: int) -> torch.Tensor:
    """Two interleaved half circles."""
    angle, radius = math.pi * torch.rand(n).double(), 0.14 + 0.05 * torch.rand(n).double()
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, 0.6 + radius * angle.cos(), 0.74 + radius * angle.cos())
    return torch.stack([x, torch.where(upper, 0.52 + radius * angle.sin(), 0.5 - radius * angle.sin())], -1)


def softmin(x: torch.Tensor, y: torch.Tensor, g: torch.Tensor, epsilon: float) -> torch.Tensor:
    """-epsilon log mean_j exp((g_j - |x_i - y_j|^2 / 2) / epsilon), for every i."""
    exponent = (pb.Vj(g[:, None]) - ((pb.Vi(x) - pb.Vj(y)) ** 2).sum(-1) / 2) / epsilon
    return -epsilon * (exponent.logsumexp(1, tolerance=tolerance).squeeze(-1) - math.log(len(y)))


# %% [markdown]
# ## One LogSumExp, compared with the exact one on some rows

# %%
x, y = ring(N), moons(N)
epsilon = 0.15**2
zero = torch.zeros(N, dtype=torch.float64)
with fast.watch() as done:
    f = softmin(x, y, zero, epsilon)
print(f"{N} x {N} pairs by {done[0].method} ({done[0].detail}) in {done[0].seconds:.2f} s")
exact = -epsilon * (torch.logsumexp(-(x[:200, None] - y).square().sum(-1) / (2 * epsilon), 1) - math.log(N))
worst = float((f[:200] - exact).abs().max() / exact.abs().max())
print(f"largest error of 200 rows: {worst:.1e}")

# %% [markdown]
# ## The gradient flow
#
# The potentials of the last step are the start of the next. By the envelope theorem their own derivatives drop out:
# the gradient is that of one more softmin with fixed potentials. The blur $\sqrt\varepsilon$ shrinks on the way, so
# that the cloud moves as a whole first and takes the shape of the target later.

# %%
f = g = p = zero
frames, moved = [x], []
start = time.perf_counter()
for step in range(30):
    epsilon = max(0.03, 0.15 * 0.9**step) ** 2
    for _ in range(6 if step == 0 else 2):
        f = (f + softmin(x, y, g, epsilon)) / 2
        g = (g + softmin(y, x, f, epsilon)) / 2
        p = (p + softmin(x, x, p, epsilon)) / 2
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad((softmin(x, y, g, epsilon) - softmin(x, x.detach(), p, epsilon)).sum(), x)
    x = (x - 0.7 * gradient).detach()
    moved.append(float(gradient.norm(dim=-1).mean()))
    frames.append(x)
print(f"{len(moved)} steps in {time.perf_counter() - start:.0f} s; mean gradient {moved[0]:.3f} -> {moved[-1]:.1e}")

figure, axes = plt.subplots(1, 5, figsize=(14, 2.2), layout="constrained", sharex=True, sharey=True)
for axis, (k, cloud) in zip(axes, [*((k, frames[k]) for k in (0, 1, 6, 30)), (-1, y)], strict=True):
    axis.plot(*cloud[::20].T, ".", markersize=0.8, color="tab:green" if k < 0 else "tab:blue")
    axis.set_title("the target" if k < 0 else f"step {k}")
    axis.set_aspect("equal")
figure.savefig("sinkhorn.png", dpi=110)

# %%
assert worst < 1e-4 and moved[-1] < 0.05 * moved[0]
