# %% [markdown]
# # Kriging of an elevation map
#
# $$z(p) = \sum_j k(p - p_j)\, w_j, \qquad (K + \sigma^2 I)\, w = z$$
#
# Gaussian-process regression (kriging) of a digital elevation model of Jacksboro, Texas: 138,632 points, of which a
# random tenth is known, and the rest is predicted. Every product with the kernel matrix is a sum within a tolerance,
# at a cost that grows with the number of points and not with its square.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import cbook

import pullback as pb
from pullback.kernels import fast

torch.manual_seed(0)
torch.set_num_threads(1)

with np.load(cbook.get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as data:
    height = torch.from_numpy(data["elevation"].astype(np.float64))
n_rows, n_columns = height.shape
rows, columns = torch.meshgrid(torch.arange(n_rows), torch.arange(n_columns), indexing="ij")
place = torch.stack([rows, columns], -1).reshape(-1, 2).double() / n_rows
value = height.reshape(-1)
print(f"{len(place)} points, heights {value.min():.0f} to {value.max():.0f} m")

order = torch.randperm(len(place))
known, hidden = order[: len(order) // 10], order[len(order) // 10 :]
mean = value[known].mean()
spread = value[known].std()
z = (value[known] - mean) / spread

# %% [markdown]
# ## The model
#
# A sum of two Gaussians: broad hills and narrow ridges. `tolerance` makes each product fast, and the solver pays for
# the plan once. `preconditioner="fourier"` inverts the system in the span of the kernel's largest Fourier modes first:
# a tenth of the iterations.


# %%
def kernel(p: torch.Tensor, q: torch.Tensor) -> pb.LazyTensor:
    """k(p - q) = 0.7 exp(-|p - q|^2 / 2 l^2) + 0.3 exp(-|p - q|^2 / 2 s^2), lengths in units of the map's height."""
    squared = ((pb.Vi(p) - pb.Vj(q)) ** 2).sum(-1)
    return 0.7 * (-squared / (2 * 0.06**2)).exp() + 0.3 * (-squared / (2 * 0.015**2)).exp()


K = kernel(place[known], place[known])
start = time.perf_counter()
with fast.watch() as sums:
    weights, info = K.solve(z, alpha=0.003, eps=1e-3, tolerance=1e-5, preconditioner="fourier", info=True)
elapsed = time.perf_counter() - start
print(f"{len(known)} equations: {info.iterations} iterations in {elapsed:.1f} s, products by {sums[-1].method} with")
print(f"{sums[-1].detail}, errors on checked rows at most {max(s.error for s in sums):.1e}")

# %% [markdown]
# ## Prediction
#
# At every point of the map, from the weights.

# %%
with fast.watch() as sums:
    guess = mean + spread * (kernel(place, place[known]).with_tolerance(1e-5) @ weights)
print(f"{len(place)} x {len(known)} pairs in {sums[0].seconds:.2f} s")
error = (guess - value)[hidden].square().mean().sqrt()
nearest = ((pb.Vi(place[hidden]) - pb.Vj(place[known])) ** 2).sum(-1).argmin(1).squeeze(-1)
plain = (value[known][nearest] - value[hidden]).square().mean().sqrt()
print(
    f"held-out points: {error:.2f} m rms; nearest known neighbour: {plain:.2f} m; spread of the heights {spread:.1f} m"
)

figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
points = torch.full_like(value, torch.nan)
points[known] = value[known]
limits = {"vmin": float(value.min()), "vmax": float(value.max())}
pictures = [(points, "known tenth", "terrain"), (guess, f"kriging, {error:.1f} m rms", "terrain")]
for axis, (picture, title, colours) in zip(axes, pictures, strict=False):
    shown = axis.imshow(picture.reshape(n_rows, n_columns), cmap=colours, **limits)
    axis.set_title(title)
figure.colorbar(shown, ax=axes[:2], label="height [m]", shrink=0.8)
shown = axes[2].imshow((guess - value).reshape(n_rows, n_columns), cmap="RdBu", vmin=-30, vmax=30)
axes[2].set_title("error")
figure.colorbar(shown, ax=axes[2], label="[m]", shrink=0.8)
for axis in axes:
    axis.set_axis_off()
figure.savefig("kriging.png", dpi=110)

# %%
assert error < 0.65 * plain and error < 0.12 * spread
