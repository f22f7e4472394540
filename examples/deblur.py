# %% [markdown]
# # Deblurring with total variation
#
# $\hat u = \arg\min_{0 \le u \le 1} \tfrac12 \|K u - f\|^2 + \lambda \, \mathrm{TV}(u)$, where $K$ convolves with a
# Gaussian and $f$ is noisy. Then the derivative of the data misfit in the *width* of the Gaussian: the kernel is a
# tensor like any other.

# %%
import torch
from skimage import data

import pullback as pb

torch.manual_seed(0)
image = torch.from_numpy(data.camera()[::4, ::4].copy()).double() / 255  # 128 x 128


def gaussian(width: torch.Tensor) -> torch.Tensor:
    g = torch.exp(-(torch.arange(-6.0, 7.0, dtype=torch.float64) ** 2) / (2 * width**2))
    return torch.outer(g, g) / g.sum() ** 2


true_width = torch.tensor(1.5, dtype=torch.float64)
K = pb.Convolve2D((128, 128), gaussian(true_width), offset=(6, 6))
f = K(image) + 0.01 * torch.randn(128, 128, dtype=torch.float64)
print(K, f"norm at most {K.norm_bound():.3f}")

# %% [markdown]
# ## Two ways back
#
# Least squares stopped early, and total variation with a box. Both say why they stopped.

# %%
least_squares = pb.cgls(K, f, maxiter=8)
tv = pb.solve(K, f, regularizer=2e-3 * pb.TV((128, 128)) + pb.Box(0, 1), maxiter=300)
print(tv.method)
for name, u in (("blurred", f), ("cgls", least_squares.x), ("TV", tv.x)):
    print(f"{name:8} PSNR {pb.imaging.psnr(u, image, 1.0):.2f} dB")

# %% [markdown]
# ## Calibrate the blur on a known picture
#
# $\frac{d}{ds} \tfrac12 \|K_s u - f\|^2$ flows through the operator into its kernel, and through the kernel into $s$.

# %%
width = torch.tensor(2.2, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.LBFGS([width], max_iter=20, line_search_fn="strong_wolfe")


def misfit() -> torch.Tensor:
    optimizer.zero_grad()
    blurred = pb.Convolve2D((128, 128), gaussian(width), offset=(6, 6))(image)
    loss = (blurred - f).square().sum() / 2
    loss.backward()
    return loss


optimizer.step(misfit)
print(f"width {width.item():.3f}, true {true_width.item()}")

assert abs(width.item() - 1.5) < 0.02
assert pb.imaging.psnr(tv.x, image, 1.0) > pb.imaging.psnr(f, image, 1.0) + 2.5
