# %% [markdown]
# # Magnetic resonance imaging with several coils and a quarter of the data
#
# $y_c = M F S_c u + e_c$: coil $c$ sees the complex image $u$ through its sensitivity $S_c$, $F$ is the Fourier
# transform (orthonormal: $F^{-1} = F^H$), and $M$ keeps 64 of 256 lines. The image is a real slice that comes with
# matplotlib; coils and data are simulated, for no package ships raw data. Data simulated with the operator that inverts
# them leave out what real ones have, such as motion, drifts and maps that are not exact.
#
# `python mri.py [folder]` writes a picture into the folder (the current one by default).

# %%
import math
import sys
from pathlib import Path

import torch
from matplotlib import cbook
from matplotlib.figure import Figure

import pullback as pb

torch.manual_seed(0)
torch.set_num_threads(1)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
N, COILS, SIGMA = (256, 256), 6, 0.02
with cbook.get_sample_data("s1045.ima.gz") as file:
    slice_ = torch.frombuffer(bytearray(file.read()), dtype=torch.uint16).reshape(N).float()
slice_ = slice_ / slice_.max()
t = torch.linspace(-1, 1, 256)
row, column = torch.meshgrid(t, t, indexing="ij")
images = torch.stack((slice_, slice_.sqrt())) * torch.exp(1j * (column + row**2))  # a batch of two contrasts

# %% [markdown]
# ## The operator by algebra
#
# Smooth maps around the head, normalized so that $\sum_c |S_c|^2 = 1$; lines drawn with a density that falls off, and
# all of the 24 in the middle.

# %%
angle = 2 * math.pi * torch.arange(COILS)[:, None, None] / COILS
up, right = 1.2 * angle.sin(), 1.2 * angle.cos()
maps = torch.exp(-((row - up) ** 2 + (column - right) ** 2) / 1.5) * torch.exp(1j * (angle + 1.5 * up * column))
maps = maps / maps.abs().square().sum(0).sqrt()

line = torch.arange(256) - 128
density = 1 / (1 + (line / 20) ** 2)
density[line.abs() < 12] = 1e9
lines = torch.multinomial(density, 64).sort().values
F = pb.FFT2D(N, fftshift_after=True)
M = pb.Restriction(N, lines, axis=0)


def camera(maps):
    return pb.VStack([M @ F @ pb.Diagonal(s) for s in maps])


A = camera(maps)
y = A(images)
y = y + SIGMA * torch.randn_like(y)  # complex: E |e|^2 = SIGMA^2
print(f"{A.shape[0]} x {A.shape[1]}, {COILS} coils, {256 // len(lines)} times fewer lines")

# %% [markdown]
# ## Four reconstructions of the whole batch
#
# The adjoint ("zero-filled") folds the image. CG-SENSE, $\min |A x - y|$, unfolds it and must stop early: run to the
# end, it returns the noise amplified, though there are more data than pixels. (Its stop is the noise level again.)
# Wavelets and TV take complex images as they are: magnitudes are thresholded, phases stay.

# %%
noise = SIGMA * A.shape[0] ** 0.5
solutions = {
    "CG-SENSE": pb.cgls(A, y, callback=lambda state: bool((state.values["residual"] <= noise).all())),
    "CG-SENSE, 40 steps": pb.cgls(A, y, maxiter=40),
}
start = solutions["CG-SENSE"].x
W = pb.DWT2D(N, wavelet="sym4", level=4)
solutions["wavelets"] = pb.fista(A, y, 0.5 * SIGMA * (pb.L1() @ W), x0=start, rtol=1e-3)
solutions["TV"] = pb.pdhg(A, y, 0.25 * SIGMA * pb.TV(N), x0=start, maxiter=200, rtol=1e-3)
shown = {"zero-filled": A.H(y)} | {name: solution.x for name, solution in solutions.items()}
scores = {name: pb.imaging.psnr(x.abs(), images.abs(), 1.0) for name, x in shown.items()}
for name, score in scores.items():
    steps = solutions[name].member_iterations.tolist() if name in solutions else "no"
    print(f"{name:18} PSNR {score[0]:.2f} and {score[1]:.2f} dB, {steps} iterations")

figure = Figure(figsize=(13.2, 4.9), layout="constrained")
for k, axes in enumerate(figure.subplots(2, 6)):
    for ax, (name, x) in zip(axes, ({"truth": images} | shown).items(), strict=True):
        ax.imshow(x[k, 20:236, 20:236].abs().numpy(), cmap="gray", vmin=0, vmax=0.9)
        ax.set_title(name if name == "truth" else f"{name}: {scores[name][k]:.1f} dB", loc="left", fontsize=9)
        ax.axis("off")
figure.savefig(folder / "mri.png", dpi=90)

# %% [markdown]
# ## Maps that are wrong
#
# Suppose each coil has an unknown gain $g_c$: $S_c \to g_c S_c$. The $g$ for which the data are explained best,
# $\min_g |A_g x_g - y|^2$ with $x_g = \arg\min |A_g x - y|^2 + \delta^2 |x|^2$, follow from gradients through the
# solver into the maps. (A factor common to all gains belongs to the image, so it is divided out.)

# %%
gains = 1 + 0.3 * torch.randn(COILS, dtype=torch.complex64)
measured = camera(gains[:, None, None] * maps)(images[0])
measured = measured + SIGMA * torch.randn_like(measured)
g = torch.tensor([[1.0, 0.0]] * COILS, requires_grad=True)
optimizer = torch.optim.LBFGS([g], max_iter=20, line_search_fn="strong_wolfe")


def error():
    """Of the gains, up to a common factor."""
    found = torch.view_as_complex(g.detach())
    factor = torch.vdot(found, gains) / torch.vdot(found, found)
    return float((factor * found - gains).norm() / gains.norm())


def misfit():
    optimizer.zero_grad()
    guess = torch.view_as_complex(g)
    A = camera((guess / guess.abs().square().mean().sqrt())[:, None, None] * maps)
    x = pb.cgls(A, measured, damp=0.1, rtol=1e-3).x
    loss = (A(x) - measured).abs().square().sum()
    loss.backward()
    return loss


before = error()
optimizer.step(misfit)
print(f"error of the gains {before:.4f} before, {error():.4f} after")

assert all((scores["TV"] > scores["CG-SENSE"] + 2) & (scores["wavelets"] > scores["CG-SENSE"] + 1))
assert all(scores["CG-SENSE, 40 steps"] < scores["CG-SENSE"] - 3)
assert error() < 0.2 * before
