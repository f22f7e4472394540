# %% [markdown]
# # Denoising: one prox, two kinds of noise
#
# $\hat u = \arg\min_u \tfrac12 |u - y|^2 + w R(u) = \mathrm{prox}_{w R}(y)$. For Gaussian noise there is nothing to
# iterate outside the prox: `R.prox(y, w)` is the answer. Salt and pepper are outliers; they need another data term,
# $\arg\min_u |u - y|_1 + w R(u)$, and a solver.
#
# `python denoising.py [folder]` writes a picture into the folder (the current one by default).

# %%
import sys
from pathlib import Path

import skimage.data
import torch
from matplotlib.figure import Figure

import pullback as pb

torch.manual_seed(0)
torch.set_num_threads(1)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
picture = torch.from_numpy(skimage.data.camera()[50:306, 100:356].copy()).float() / 255
N = picture.shape
SIGMA = 0.08
y = picture + SIGMA * torch.randn(N)
sigma = float(pb.imaging.noise_level(y))
print(f"noise level from the picture {sigma:.3f}, true {SIGMA}")

# %% [markdown]
# ## The weight from the data
#
# Stein's unbiased risk estimate needs the noise level and no truth:
# $E |\hat u - u|^2 = E |\hat u - y|^2 - n \sigma^2 + 2 \sigma^2 E\, \mathrm{div}\, \hat u(y)$. The divergence comes
# from one derivative along random signs $b$, $\mathrm{div} \approx \langle b, \hat u'(y) b \rangle$. (The discrepancy
# $|\hat u - y| = \sigma \sqrt n$ chooses weights that smooth too much: the residual is noise *minus* what was fitted.)

# %%
b = torch.randint(0, 2, N) * 2.0 - 1
STEP = 0.1 * sigma  # of a difference: the proxes of TV and TGV are iterations, whose derivative is their own affair


def risk(denoise):
    """The estimate of the mean squared error."""
    x = denoise(y)
    divergence = (b * (denoise(y + STEP * b) - x)).sum() / STEP
    return float((x - y).square().mean() - sigma**2 + 2 * sigma**2 * divergence / y.numel())


def best(functional, weights):
    """The solution whose estimated risk is least, and its weight."""
    risks = {w: risk(lambda v, w=w: functional.prox(v, w)) for w in weights}
    w = min(risks, key=risks.get)
    return functional.prox(y, w), w, risks[w]


# %% [markdown]
# ## Wavelets, TV, TGV
#
# The wavelets are orthogonal, so their prox is $W^H \mathrm{soft}_w(W y)$. The mean (the coarsest scale) should not
# shrink: its weight is zero. Where the blocks of the wavelets lie is an accident: averaging over shifts of the picture
# ("cycle spinning") removes it. (The estimate moves up and down with the error of sigma; the choice hardly does.)

# %%
W = pb.DWT2D(N, wavelet="sym4", level=4)
details = torch.ones(N)
W.split(details)[0].zero_()  # a view of the coarsest scale
wavelets = pb.L1(weight=details) @ W
by_hand = W.H(torch.sign(W(y)) * (W(y).abs() - 0.1 * details).clamp(min=0))
formula = float((wavelets.prox(y, 0.1) - by_hand).abs().max())

weights = [sigma * f for f in (0.5, 0.7, 1.0, 1.4, 2.0)]
pictures, chosen = {"noisy": y}, {}
for name, functional in (("wavelets", wavelets), ("TV", pb.TV(N)), ("TGV", pb.TGV(N, maxiter=200))):
    pictures[name], chosen[name], estimate = best(functional, weights)
    error = float((pictures[name] - picture).square().mean())
    print(f"{name:9} weight {chosen[name]:.3f}, mean squared error estimated {estimate:.5f}, true {error:.5f}")
shifts = [(i, j) for i in range(4) for j in range(4)]
shifted = torch.stack([y.roll(s, (0, 1)) for s in shifts])  # a batch for one prox
spun = wavelets.prox(shifted, chosen["wavelets"])
pictures["wavelets, shifted"] = torch.stack(
    [x.roll((-i, -j), (0, 1)) for x, (i, j) in zip(spun, shifts, strict=True)]
).mean(0)

# %% [markdown]
# ## Salt and pepper
#
# A fifth of the pixels is black or white. Least squares spreads each of them; $|u - y|_1$ asks for the median and
# ignores how far an outlier is away, and Huber's function does so beyond $\delta$. `pdhg` needs the prox of the data
# term, not its derivative. The weights were tried on this picture, for all three alike.

# %%
dirty = picture.clone()
hit = torch.rand(N) < 0.2
dirty[hit] = (torch.rand(N) < 0.5).float()[hit]
identity = pb.Identity(N)
terms = {"L2 + TV": (None, 0.3), "Huber + TV": (20 * pb.Huber(0.05), 0.7), "L1 + TV": (pb.L1(), 0.7)}
outliers = {"salt and pepper": dirty}
for name, (data_term, weight) in terms.items():
    solution = pb.pdhg(identity, dirty, weight * pb.TV(N), data_term=data_term, maxiter=400, rtol=1e-3)
    outliers[name] = solution.x
    print(f"{name:10} {solution}")

# %%
scores = {k: float(pb.imaging.psnr(x, picture, 1.0)) for k, x in (pictures | outliers).items()}
for name, score in scores.items():
    print(f"{name:18} PSNR {score:.2f} dB, SSIM {pb.imaging.ssim((pictures | outliers)[name], picture, 1.0):.3f}")
shown = pictures | outliers
figure = Figure(figsize=(9.6, 10.2), layout="constrained")
for ax, (name, x) in zip(figure.subplots(3, 3).flat, shown.items(), strict=True):
    ax.imshow(x.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_title(f"{name}: {scores[name]:.2f} dB", loc="left", fontsize=10)
    ax.axis("off")
figure.savefig(folder / "denoising.png", dpi=80)

assert formula < 1e-5
assert min(scores["TV"], scores["TGV"]) > scores["wavelets, shifted"] > scores["wavelets"] > scores["noisy"] + 4
assert scores["L1 + TV"] > scores["L2 + TV"] + 3
