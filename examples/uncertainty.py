# %% [markdown]
# # Uncertainty through a function
#
# A damped oscillation $f(t; a, b) = a\, e^{-b t} \cos(2 t)$ is known up to its amplitude $a$ and damping $b$, which
# were measured together and are correlated: covariance $S$. To first order the curve has the covariance $J S J^T$ with
# $J = \partial f / \partial (a, b)$, and the standard deviation $\sigma_k = \sqrt{(J S J^T)_{kk}}$. That diagonal needs
# two products with $J$, not a $1000 \times 1000$ matrix.

# %%
import functools

import matplotlib.pyplot as plt
import torch

from pullback.autodiff.propagate import propagate

t = torch.linspace(0, 10, 1000, dtype=torch.float64)
x = torch.tensor([2.0, 0.3], dtype=torch.float64)
S = torch.tensor([[0.04, 0.009], [0.009, 0.0025]], dtype=torch.float64)  # correlation 0.9


def curve(p: torch.Tensor, t: torch.Tensor = t) -> torch.Tensor:
    return p[0] * torch.exp(-p[1] * t) * torch.cos(2 * t)


first = propagate(curve, x, S)
print(first)

# %% [markdown]
# ## Is the linear picture good enough?
#
# Samples tell, in standard errors of the samples. The second order, with $\tfrac12 \operatorname{tr}(H S)$ in the
# mean, is nearer.

# %%
second = propagate(curve, x, S, order=2)
samples = first.check(n=20_000)
print("first order:", samples)
print("second order:", second.check(n=20_000))

# %% [markdown]
# ## Correlation matters
#
# If the correlation is ignored, the band is too wide where the two errors cancel.

# %%
alone = propagate(curve, x, cov=S.diagonal())
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
first.plot(t, k=2, ax=left)
left.set(title="mean and 2 standard deviations", xlabel="t")
left.legend()
right.plot(t, first.std, label="first order")
right.plot(t, second.std, "--", label="second order")
right.plot(t, alone.std, label="without correlation")
right.plot(t[::25], samples.std[::25], "k.", markersize=4, label="20000 samples")
right.set(title="standard deviation", xlabel="t")
right.legend()
fig.savefig("uncertainty.png", dpi=100)

# %% [markdown]
# ## The standard deviation is differentiable
#
# Where is the curve known worst, after the start? At a maximum of $\sigma$, where its derivative in $t$ vanishes.

# %%
when = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
for _ in range(30):
    sigma = propagate(functools.partial(curve, t=when), x, S).std
    (slope,) = torch.autograd.grad(sigma, when)
    with torch.no_grad():
        when += 5 * slope  # uphill
print(f"first maximum of the standard deviation at t = {when.item():.3f}: {sigma.item():.4f}, slope {slope.item():.1e}")

J = torch.func.jacfwd(curve)(x)
dense = (J @ S @ J.T).diagonal().sqrt()
assert float((first.std - dense).abs().max()) < 1e-12
assert float((first.std - samples.std).abs().max()) < 0.01
assert float((second.std - samples.std).abs().max()) < float((first.std - samples.std).abs().max())
assert abs(slope.item()) < 1e-6
