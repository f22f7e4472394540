# %% [markdown]
# # Inpainting: pixels that nobody measured
#
# $y = M u + e$, where $M$ keeps some of the pixels: $\hat u = \arg\min_u \tfrac12 |M u - y|^2 + w R(u)$. Although
# $M M^H = I$, the adjoint $M^H y$ is no answer: it fills the holes with zeros. What stands in a hole is what $R$
# prefers there, for the data are silent; so look at the picture, not at its PSNR alone.
#
# `python inpainting.py [folder]` writes a picture into the folder (the current one by default).

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
N, SIGMA = tuple(picture.shape), 0.02

# %% [markdown]
# ## Two masks
#
# 70 % of the pixels missing at random, and a page of text written across.

# %%
scattered = torch.rand(N) < 0.3
letters = torch.from_numpy(skimage.data.text()[:, 140:396].copy()) < 100
unwritten = torch.ones(N, dtype=torch.bool)
unwritten[40:212] = ~letters
masks = {"scattered": scattered, "text": unwritten}

# %% [markdown]
# ## Five fillings
#
# - harmonic, $\min |M x - y|^2 + \alpha^2 |\nabla x|^2$: the holes satisfy Laplace's equation;
# - wavelets, $R(x) = |W x|_1$, and the same averaged over shifts, $\sum_s |W S_s x|_1$: with one grid the blocks of the
#   wavelets show;
# - total variation, which continues edges straight and flat; TGV, which also continues ramps.
#
# A `Restriction` takes the pixels out of a flat picture, `Identity` says which shape that picture has. All start from
# the harmonic filling: from zeros, the solvers would spend most of their time filling the holes. The weights are
# proportional to the noise level, which is known here; where the iterations are cut off, the print says so.


# %%
def fill(seen):
    """The picture with its holes filled in, by name; the data."""
    M = pb.Restriction(seen.numel(), seen.flatten()) @ pb.Identity(N)
    y = M(picture) + SIGMA * torch.randn(M.dimsd)
    stack = pb.VStack([M, 0.1 * pb.Gradient(N, kind="forward")])
    harmonic = pb.lsqr(stack, torch.cat((y, torch.zeros(2 * seen.numel())))).x
    W = pb.DWT2D(N, wavelet="sym4", level=4)
    shifted = [0.2 * SIGMA * (pb.L1() @ (W @ pb.Roll(N, 0, i) @ pb.Roll(N, 1, j))) for i in (0, 5) for j in (0, 5)]
    solutions = {
        "wavelets": pb.fista(M, y, SIGMA * (pb.L1() @ W), x0=harmonic, rtol=1e-4),
        "shifted wavelets": pb.pdhg(M, y, shifted, x0=harmonic, maxiter=150),
        "TV": pb.pdhg(M, y, 0.5 * SIGMA * pb.TV(N), x0=harmonic, maxiter=500),
        "TGV": pb.fista(M, y, 0.5 * SIGMA * pb.TGV(N, maxiter=20, rtol=0), x0=harmonic, maxiter=60),
    }
    for name, solution in solutions.items():
        print(f"  {name:16} {solution.iterations:3} iterations, {solution.status.name}")
    return {"data": M.H(y), "harmonic": harmonic} | {name: solution.x for name, solution in solutions.items()}


figure = Figure(figsize=(13.2, 4.9), layout="constrained")
scores = {}
for row, (mask, seen) in zip(figure.subplots(2, 6), masks.items(), strict=True):
    print(f"{mask}: {100 * float((~seen).float().mean()):.0f} % of the pixels are missing")
    for ax, (name, x) in zip(row, fill(seen).items(), strict=True):
        scores[mask, name] = float(pb.imaging.psnr(x, picture, 1.0))
        hole = (x - picture)[~seen].square().mean().sqrt()
        print(f"  {name:16} PSNR {scores[mask, name]:.2f} dB, error in the holes {hole:.3f}")
        ax.imshow(x[20:180, 40:200].numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(f"{name}: {scores[mask, name]:.2f} dB", loc="left", fontsize=9)
        ax.axis("off")
figure.savefig(folder / "inpainting.png", dpi=90)

assert all(scores[mask, name] > scores[mask, "data"] + 10 for mask in masks for name in ("harmonic", "TV", "TGV"))
