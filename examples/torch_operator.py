# %% [markdown]
# # A foreign operator inside a network
#
# $y = A \sin(x)$ and $y = S\,\mathrm{net}(x)$: an operator that knows nothing of torch becomes a layer, with exact
# derivatives of every order. Here a matrix and a smoothing operator; PyLops and SciPy operators, sparse matrices and
# pairs of NumPy functions are wrapped by the same call.

# %%
import numpy as np
import torch
from torch import nn

import pullback as pb

torch.manual_seed(0)

# %% [markdown]
# ## The gradient of a chain, by automatic differentiation and by hand
#
# $\nabla_x \, v^T A \sin(x) = \cos(x) \odot A^T v$.

# %%
n_x, n_y = 10, 6
matrix = np.random.default_rng(0).standard_normal((n_y, n_x))
A = pb.TorchOperator(pb.MatrixMult(matrix))

x = torch.arange(n_x, dtype=torch.float64, requires_grad=True)
v = torch.ones(n_y, dtype=torch.float64)
A.apply(torch.sin(x)).backward(v)
by_hand = torch.cos(x.detach()) * torch.from_numpy(matrix.T @ v.numpy())
error = float((x.grad - by_hand).abs().max())
print(f"gradient against the formula: largest difference {error:.1e}")
assert error < 1e-12

# %% [markdown]
# ## Numerical checks
#
# `gradcheck` compares with finite differences. `pb.check` goes further: adjoint, second order, forward mode, vmap,
# compilation, pickling.

# %%
assert torch.autograd.gradcheck(A.apply, torch.randn(n_x, dtype=torch.float64, requires_grad=True), eps=1e-6, atol=1e-4)
assert torch.autograd.gradgradcheck(
    lambda u: A.apply(u).sin(), torch.randn(n_x, dtype=torch.float64, requires_grad=True)
)
print(pb.check(A))


# %% [markdown]
# ## A convolutional network, then a smoothing operator


# %%
class Network(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels // 2, 1, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


net = Network(4)
smoothing = pb.TorchOperator(pb.Smoothing2D((5, 5), dims=(32, 32)))
y = smoothing.apply(net(torch.randn(1, 4, 32, 32)).reshape(32 * 32)).reshape(32, 32)
y.sum().backward()
print(f"loss {y.sum().item():.4f}, gradient of the first filter {net.layers[0].weight.grad.norm():.4f}")

# %% [markdown]
# ## A batch

# %%
smoothing = pb.TorchOperator(pb.Smoothing2D((5, 5), dims=(32, 32)), batch=True)
images = net(torch.randn(3, 4, 32, 32))
y = smoothing.apply(images.reshape(3, 32 * 32)).reshape(3, 32, 32)
y.sum().backward()

# The window holds 25 pixels: away from the border a pixel is the mean of its neighbourhood.
mean = images[1, 0, 8:13, 20:25].mean()
assert abs((y[1, 10, 22] - mean).item()) < 1e-6
