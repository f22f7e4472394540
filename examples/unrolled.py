# %% [markdown]
# # A solver that learns: unrolled deblurring
#
# A picture u is blurred and noisy, y = A u + n. The variational answer is argmin |A u - y|^2 / 2 + w TV(u). The learned
# answer keeps the solver, seven steps of ISTA
#
# u <- prox_k(u - s_k A^H (A u - y)),
#
# and learns the step lengths s_k and, in place of the prox of TV, a small convolutional network in each step. It is
# trained on some of scikit-image's pictures and judged on others, against TV with the weight that is best on the very
# pictures it is judged on. A minute or two on a CPU.

# %%
import time

import skimage.color
import skimage.data
import torch

import pullback as pb

torch.manual_seed(0)
torch.set_num_threads(1)  # these pictures are small: a second thread costs more than it brings
SIZE, SIGMA, STEPS = 48, 0.03, 450


def gray(picture):
    picture = skimage.color.rgb2gray(picture) if picture.ndim == 3 else picture / 255
    return torch.from_numpy(picture).float()


train = [gray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "brick", "rocket", "coins", "chelsea")]
test = torch.stack([gray(getattr(skimage.data, name)())[100:356, 130:386] for name in ("camera", "moon")])
test = torch.cat((test, gray(skimage.data.immunohistochemistry())[None, 100:356, 100:356]))


def blur(n):
    """Gaussian blur of standard deviation 1.2 pixels."""
    t = torch.arange(-4.0, 5.0)
    taps = torch.exp(-(t**2) / (2 * 1.2**2))
    kernel = torch.outer(taps, taps)
    return pb.Convolve2D((n, n), kernel / kernel.sum(), offset=(4, 4))


def psnr(u, truth):
    return float(-10 * (u.detach() - truth).square().mean((-2, -1)).log10().mean())


# %% [markdown]
# The variational answer, with the weight chosen in its favour.

# %%
A = blur(256)
y_test = A(test) + SIGMA * torch.randn_like(test)
scores = {
    w: psnr(pb.fista(A, y_test, w * pb.TV(A.dims, maxiter=15, rtol=0), maxiter=60, rtol=1e-4).x, test)
    for w in (0.002, 0.004, 0.006, 0.009)
}
best = max(scores, key=scores.get)
print(f"blurred {psnr(y_test, test):.2f} dB, TV {scores[best]:.2f} dB (weight {best}, the best of {list(scores)})")


# %% [markdown]
# The learned answer. `Unrolled` takes any solver; what is not learned stays as it is.


# %%
class Smooth(torch.nn.Module):
    """u + a small network of u."""

    def __init__(self, width=20):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3, padding=1, padding_mode="replicate"),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, 1, 3, padding=1, padding_mode="replicate"),
        )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, u):
        v = u.reshape(-1, 1, *u.shape[-2:])
        return (v + self.layers(v)).reshape(u.shape)


net = pb.Unrolled(pb.ista, 7, ["step"], prox=[Smooth() for _ in range(7)], step=1.0)
net = net.to(memory_format=torch.channels_last)  # twice as fast on CPUs
small = blur(SIZE)


def batch(count=16):
    crops = []
    for k in torch.randint(len(train), (count,)).tolist():
        i, j = (int(torch.randint(s - SIZE, ())) for s in train[k].shape)
        crop = train[k][i : i + SIZE, j : j + SIZE]
        crops.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    u = torch.stack(crops)
    return u, small(u) + SIGMA * torch.randn_like(u)


optimizer = torch.optim.Adam(net.parameters(), 2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
start = time.perf_counter()
for k in range(STEPS):
    u, y = batch()
    optimizer.zero_grad()
    loss = (net(small, y) - u).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    schedule.step()
    if k % 150 == 0:
        print(f"step {k}: loss {loss.item():.5f}")
print(f"trained in {time.perf_counter() - start:.0f} s; steps {net.theta['step'].exp().tolist()}")

# %%
with torch.no_grad():
    learned = psnr(net(A, y_test), test)
margin = learned - scores[best]
print(f"held-out pictures: TV {scores[best]:.2f} dB, unrolled {learned:.2f} dB, margin {margin:+.2f} dB")
assert margin > 0.2
