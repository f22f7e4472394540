# %% [markdown]
# # Plug and play: a trained denoiser in place of a prox
#
# $x = N(x - \tau A^H (A x - y))$. ADMM for $\tfrac12 |A x - y|^2 + R(x)$ needs of $R$ only its prox, which denoises;
# so a network $N$ that denoises can stand there. There is no $R$ any more, and no minimum: only a fixed point.
#
# The network is a DnCNN of six layers, trained by others and shipped in the Python package `scico`. Without the package
# the example says so and stops; `python plug_and_play.py scico-*.whl [folder]` takes a wheel.

# %%
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import skimage.color
import skimage.data
import torch
from matplotlib.figure import Figure

import pullback as pb

torch.manual_seed(0)
torch.set_num_threads(1)


def weights(folder):
    """The wheel given, the installed package (not imported), or the wheel from the package index."""
    given = [Path(argument) for argument in sys.argv[1:] if argument.endswith(".whl")]
    found = importlib.util.find_spec("scico")
    if given or (found and found.submodule_search_locations):
        return given[0] if given else Path(found.submodule_search_locations[0])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, "scico"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=60, capture_output=True)
    return next(Path(folder).glob("*.whl"), None)


with tempfile.TemporaryDirectory() as temporary:
    path, reason = weights(temporary), "no package scico, and none could be downloaded"
    try:
        net = pb.imaging.DnCNN.load(path, "6L") if path else None
    except (FileNotFoundError, ModuleNotFoundError, pb.FileFormatError) as error:
        net, reason = None, str(error)
if net is None:
    print(f"skipped: {reason}")
    raise SystemExit(0)
net = net.requires_grad_(False).to(memory_format=torch.channels_last)  # no derivatives wanted; the layout CPUs like

# %% [markdown]
# ## A picture to choose with, two to judge on
#
# A Gaussian blur of 1.6 pixels and noise of 0.02. The network removes noise of $\sigma_N = 0.06$, so the step that
# balances it against the data should be about $\tau = (\sigma_N / \sigma)^2 = 9$. It is chosen on one picture and used
# on the others. TV has the advantage: its weight is the best on the very picture that it is judged on.

# %%
SIGMA, N = 0.02, (256, 256)
t = torch.arange(-6, 7.0)
taps = torch.exp(-(t**2) / (2 * 1.6**2))
A = pb.Convolve2D(N, torch.outer(taps, taps) / taps.sum() ** 2, offset=(6, 6))


def restore(y, step):
    return pb.plug_and_play(A, y, net, method="admm", step=step, x0=y, maxiter=12, rtol=1e-3)


def psnr(x, truth):
    return float(pb.imaging.psnr(x, truth, 1.0))


pictures = {
    "coins": torch.from_numpy(skimage.data.coins() / 255.0)[:256, 100:356].float(),
    "camera": torch.from_numpy(skimage.data.camera() / 255.0)[50:306, 100:356].float(),
    "astronaut": torch.from_numpy(skimage.color.rgb2gray(skimage.data.astronaut()))[:256, 100:356].float(),
}
data = {name: A(u) + SIGMA * torch.randn(N) for name, u in pictures.items()}
tried = {step: psnr(restore(data["coins"], step).x, pictures["coins"]) for step in (4.0, 9.0, 16.0, 25.0)}
step = max(tried, key=tried.get)
print(f"step {step}, best of {list(tried)} on the coins")

# %%
figure = Figure(figsize=(13.2, 7), layout="constrained")
axes = figure.subplots(2, 4)
margins = {}
for row, name in zip(axes, ("camera", "astronaut"), strict=True):
    u, y = pictures[name], data[name]
    tv = [pb.solve(A, y, regularizer=w * pb.TV(N)).x for w in (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3)]
    tv = max(tv, key=lambda x, u=u: psnr(x, u))
    solution = restore(y, step)
    margins[name] = psnr(solution.x, u) - psnr(tv, u)
    print(f"{name:9} blurred {psnr(y, u):.2f} dB, TV {psnr(tv, u):.2f} dB, plug and play {psnr(solution.x, u):.2f} dB")
    print(f"{'':9} {solution}")
    shown = {"truth": u, "data": y, "TV, best weight": tv, "plug and play": solution.x}
    for ax, (title, x) in zip(row, shown.items(), strict=True):
        ax.imshow(x[20:180, 40:200].numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(title if title == "truth" else f"{title}: {psnr(x, u):.2f} dB", loc="left", fontsize=10)
        ax.axis("off")
folder = next((argument for argument in sys.argv[1:] if not argument.endswith(".whl")), ".")
figure.savefig(Path(folder) / "plug_and_play.png", dpi=80)

assert min(margins.values()) > 0.4, margins
