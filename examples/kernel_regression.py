# %% [markdown]
# # Kernel regression on a hundred thousand pixels
#
# $\hat f(x) = \sum_j w_j(x)\, v_j$ with $w_j(x) \propto \exp\big(-\tfrac12 \sum_d (x_d - y_{jd})^2 / h_d^2\big)$ and
# $\sum_j w_j = 1$: a weighted mean of the known values $v_j$ at $y_j$ (Nadaraya 1964, Watson 1964). The widths $h$ are
# learned: they minimise the error on points that were kept aside,
# $\min_h \sum_i \big(\hat f_h(x_i) - f(x_i)\big)^2$.
#
# Each evaluation of this loss and of its gradient sums over $5 \cdot 10^8$ pairs, of which none is stored.

# %%
import time
from importlib.util import find_spec

import torch
from skimage import data

import pullback as pb

torch.manual_seed(0)
image = torch.from_numpy(data.camera().copy()).float() / 255
n = len(image)


def points(pixels: torch.Tensor) -> torch.Tensor:
    """(row, column) of pixels that are given by number."""
    return torch.stack([pixels // n, pixels % n], 1).float()


def values(pixels: torch.Tensor) -> torch.Tensor:
    return image.reshape(-1)[pixels, None]


known, aside, test = torch.randperm(n * n)[:115_000].split([100_000, 5_000, 10_000])


def regression(h: torch.Tensor | float, pixels: torch.Tensor) -> torch.Tensor:
    x_i, y_j = pb.Vi(points(pixels) / h), pb.Vj(points(known) / h)
    return (-((x_i - y_j) ** 2).sum(-1) / 2).sumsoftmaxweight(pb.Vj(values(known)), axis=1)


# %% [markdown]
# ## Learn the widths
#
# The loss is a torch function of $\log h$; quasi-Newton steps need no step size. The start is the mean distance between
# neighbours, $\sqrt{512^2 / 10^5} = 1.6$ pixels.

# %%
spacing = (n * n / len(known)) ** 0.5
log_h = torch.full((2,), spacing).log().requires_grad_()
optimizer = torch.optim.LBFGS([log_h], max_iter=10, tolerance_change=1e-6, line_search_fn="strong_wolfe")
history = []


def loss() -> torch.Tensor:
    optimizer.zero_grad()
    error = (regression(log_h.exp(), aside) - values(aside)).square().mean()
    error.backward()
    history.append(error.item())
    return error


start = time.perf_counter()
optimizer.step(loss)
h = log_h.detach().exp()
pairs = len(history) * len(known) * len(aside)
print(
    f"{len(history)} evaluations, {pairs / 1e9:.1f} billion pairs, {time.perf_counter() - start:.1f} s with gradients"
)
print(f"widths: {h[0]:.2f} pixels down, {h[1]:.2f} across (start {spacing:.2f})")

# %% [markdown]
# ## Test on pixels that nobody saw
#
# Beside it: the value of the nearest known pixel, another reduction (ArgKMin), and the widths of the start.

# %%
nearest = ((pb.Vi(points(test)) - pb.Vj(points(known))) ** 2).sum(-1).argKmin(1, axis=1)[:, 0]
guesses = {
    "nearest neighbour": values(known[nearest]),
    "width = spacing": regression(spacing, test),
    "learned widths": regression(h, test),
}
rmse = {name: float((u - values(test)).square().mean().sqrt()) for name, u in guesses.items()}
for name, u in guesses.items():
    print(f"{name:18} RMSE {rmse[name]:.4f}, PSNR {pb.imaging.psnr(u, values(test), 1.0):.2f} dB")

# %% [markdown]
# ## A Gaussian process in a window
#
# The mean of a Gaussian process with covariance $k(x, y) = e^{-|x - y| / \ell}$ and noise $\alpha$ is
# $\sum_j k(x, y_j)\, a_j$ with $(K + \alpha I)\, a = v$: conjugate gradients on a $10^4 \times 10^4$ matrix that is
# computed anew in every iteration. Sharp edges suit this covariance, which is rough, better than they suit a mean over
# neighbours.

# %%
top, left, size, ell, alpha = 60, 160, 160, 8.0, 1e-3


def inside(pixels: torch.Tensor) -> torch.Tensor:
    row, column = pixels // n, pixels % n
    return pixels[(row >= top) & (row < top + size) & (column >= left) & (column < left + size)]


def covariance(pixels: torch.Tensor, others: torch.Tensor) -> pb.LazyTensor:
    x_i, y_j = pb.Vi(points(pixels) / ell), pb.Vj(points(others) / ell)
    return (-((x_i - y_j) ** 2).sum(-1).sqrt()).exp()


y, x = inside(known), inside(test)
start = time.perf_counter()
mean = values(y).mean()
a = covariance(y, y).solve(values(y) - mean, alpha=alpha, eps=1e-4)
print(f"{len(y)} unknowns solved in {time.perf_counter() - start:.1f} s")
process = float((covariance(x, y) @ a + mean - values(x)).square().mean().sqrt())
local = float((regression(h, x) - values(x)).square().mean().sqrt())
print(f"RMSE in the window: {local:.4f} kernel regression, {process:.4f} Gaussian process")

# %% [markdown]
# ## Picture

# %%
if find_spec("matplotlib"):
    import matplotlib.pyplot as plt

    window = (torch.arange(top, top + size)[:, None] * n + torch.arange(left, left + size)).reshape(-1)
    sampled = torch.full((n * n,), float("nan"))
    sampled[known] = image.reshape(-1)[known]
    panels = {
        "all pixels": values(window),
        "known pixels": sampled[window],
        "learned widths": regression(h, window),
        "Gaussian process": covariance(window, y) @ a + mean,
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
    for axis, (title, u) in zip(axes, panels.items(), strict=True):
        axis.imshow(u.reshape(size, size), cmap="gray", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig("kernel_regression.png", dpi=120)
    plt.close(figure)
    print("wrote kernel_regression.png")

# %%
assert rmse["learned widths"] < 0.97 * rmse["width = spacing"]
assert rmse["learned widths"] < 0.8 * rmse["nearest neighbour"]
assert process < 0.95 * local
