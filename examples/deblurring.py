# %% [markdown]
# # Deblurring: stop early, Tikhonov, wavelets, total variation, and a blur nobody measured
#
# $y = A u + e$, where $A$ blurs with a Gaussian and crops: a camera does not see the rim that is blurred into its
# picture. (Data made with $A$ = a full convolution with zeros outside would hide that problem.) $A^H$ is not the
# inverse of $A$; all methods here are ways to put one in its place.
#
# `python deblurring.py [folder]` writes two pictures into the folder (the current one by default).

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
camera = torch.from_numpy(skimage.data.camera()).double() / 255
RIM, SIGMA = 6, 0.01


def camera_blur(n, width):
    """A scene of n x n pixels, blurred with standard deviation `width`; its rim is not seen."""
    taps = torch.exp(-(torch.arange(-RIM, RIM + 1.0, dtype=torch.float64) ** 2) / (2 * width**2))
    blur = pb.Convolve2D((n, n), torch.outer(taps, taps) / taps.sum() ** 2, offset=(RIM, RIM))
    return pb.Pad((n - 2 * RIM, n - 2 * RIM), ((RIM, RIM), (RIM, RIM))).H @ blur


# %% [markdown]
# ## Small enough for matrices: semiconvergence
#
# $\min |A x - y|$ by LSQR. The residual falls for ever, the error falls and then rises: the noise is inverted last.
# The noise level says when to stop, $|A x_k - y| \le \sigma \sqrt{m}$; the error itself is known in examples only.
# Tikhonov's $\min |A x - y|^2 + \alpha^2 |L x|^2$ finds its $\alpha$ by the same rule.

# %%
small = camera[96:352, 136:392].reshape(32, 8, 32, 8).mean((1, 3))
A, L, inside = camera_blur(32, 1.5), pb.Laplacian((32, 32)), slice(RIM, -RIM)
y = A(small) + SIGMA * torch.randn(A.dimsd, dtype=torch.float64)
xs: list[torch.Tensor] = []
curve = pb.lsqr(A, y, maxiter=300, atol=0, btol=0, callback=lambda state: xs.append(state.x.clone()))
errors = pb.imaging.rmse(torch.stack(xs)[:, inside, inside], small[inside, inside])
excess = curve.history["residual"] / (SIGMA * y.numel() ** 0.5)
stop, best = int((excess <= 1).int().argmax()), int(errors.argmin())
direct = pb.tikhonov(A, y, "discrepancy", noise=SIGMA, L=L)
alpha = float(direct.history["alpha"][-1])
normal = (A.H @ A + alpha**2 * L.H @ L).todense()
by_matrix = torch.linalg.solve(normal, A.H(y).flatten()).reshape(32, 32)
print(f"LSQR: error {errors[stop]:.3f} at the noise level (k = {stop}), {errors[-1]:.3f} at k = 300")
smooth = float(pb.imaging.rmse(direct.x[inside, inside], small[inside, inside]))
print(f"least error {errors[best]:.3f} at k = {best}\n{direct}: error {smooth:.3f}")

figure = Figure(figsize=(5.6, 3.8), layout="constrained")
ax = figure.add_subplot(xlabel="iterations of LSQR", title="semiconvergence")
ax.loglog(errors.numpy(), label="error of the seen pixels")
ax.loglog(excess.numpy(), label="|A x - y| / noise")
ax.legend()
figure.savefig(folder / "semiconvergence.png")

# %% [markdown]
# ## A real picture
#
# The $\alpha$ of the large picture comes from 140 x 140 pixels of it: it depends on noise and texture, not on the size.
# Stacked below $A$, $\alpha L$ makes Tikhonov a least-squares problem, with zeros as its data. Wavelets and total
# variation take $\min \frac12 |A x - y|^2 + w |W x|_1$ and $w \, \mathrm{TV}(x)$; of some weights the largest is taken
# whose residual is not above the noise. No choice looks at the truth, which then may judge.

# %%
camera = camera.float()
A, L, W = camera_blur(512, 2.0), pb.Laplacian((512, 512)), pb.DWT2D((512, 512), wavelet="sym4", level=5)
y = A(camera) + SIGMA * torch.randn(A.dimsd)
sigma = float(pb.imaging.noise_level(y))  # from the data: the true 0.01 is not needed
noise = sigma * y.numel() ** 0.5
start = torch.nn.functional.pad(y[None], (RIM,) * 4, mode="replicate")[0]
part, part_blur = y[180:308, 140:268], camera_blur(140, 2.0)
alpha = float(pb.discrepancy(part_blur, part, sigma, L=pb.Laplacian((140, 140)), rtol=1e-3).parameter)


def at_noise_level(solve):
    for weight in (4e-3, 2.8e-3, 2e-3, 1.4e-3, 1e-3):
        x = solve(weight).x
        if (A(x) - y).norm() <= noise:
            break
    return x


stack, data = pb.VStack([A, alpha * L]), torch.cat((y.flatten(), torch.zeros(512**2)))
pictures = {
    "data": start,
    "adjoint": A.H(y),
    "LSQR": pb.lsqr(A, y, x0=start, callback=lambda state: bool(state.values["residual"] <= noise)).x,
    "Tikhonov": pb.lsqr(stack, data, maxiter=300, atol=1e-4, btol=1e-4).x,
    "wavelets": at_noise_level(lambda w: pb.fista(A, y, w * (pb.L1() @ W), x0=start, maxiter=60, rtol=1e-4)),
    "TV": at_noise_level(lambda w: pb.solve(A, y, regularizer=w * pb.TV((512, 512)), x0=start, rtol=1e-3)),
}
seen, scores = camera[inside, inside], {}
print(f"noise level {sigma:.4f}, alpha {alpha:.3f}")
figure = Figure(figsize=(12.6, 8.6), layout="constrained")
for ax, (name, x) in zip(figure.subplots(2, 3).flat, pictures.items(), strict=True):
    scores[name] = float(pb.imaging.psnr(x[inside, inside], seen, 1.0))
    print(f"{name:9} PSNR {scores[name]:.2f} dB, SSIM {pb.imaging.ssim(x[inside, inside], seen, 1.0):.3f}")
    ax.imshow(x[60:260, 150:350].numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_title(f"{name}: {scores[name]:.2f} dB", loc="left", fontsize=10)
    ax.axis("off")
figure.savefig(folder / "deblurring.png", dpi=80)

# %% [markdown]
# ## The width of the blur from the blurred picture
#
# Neither the width $s$ nor $\alpha$ is known, nor any sharp picture. Hide a tenth of the pixels, solve with the others,
# and ask how well $A_s x_{s, \alpha}$ predicts the hidden ones. Its derivative in $s$ and $\alpha$ goes through the
# solution $x_{s, \alpha}$: the implicit derivative of LSQR, one more linear solve. (What is hidden now was used for the
# choice, so it does not say how good the result is.)

# %%
n, truth = 128, 1.5
y = camera_blur(n, truth)(camera[100:228, 180:308].double()).flatten()
y = y + 0.005 * torch.randn_like(y)
hidden = torch.rand(y.shape) < 0.1
keep = pb.Restriction(y.numel(), ~hidden)
data = torch.cat((y[~hidden], torch.zeros(n * n, dtype=torch.float64)))
parameters = torch.tensor([2.2, 0.1], dtype=torch.float64).log().requires_grad_()  # both positive
optimizer = torch.optim.LBFGS([parameters], max_iter=12, line_search_fn="strong_wolfe")


def prediction():
    optimizer.zero_grad()
    width, alpha = parameters.exp()
    A = camera_blur(n, width)
    stack = pb.VStack([keep @ A, alpha * pb.Laplacian((n, n))])
    x = pb.lsqr(stack, data, maxiter=500, atol=1e-4, btol=1e-4, adjoint_rtol=1e-3).x
    loss = 1000 * (A(x).flatten() - y)[hidden].square().mean().sqrt()
    loss.backward()
    return loss


optimizer.step(prediction)
width, alpha = parameters.detach().exp().tolist()
print(f"width {width:.3f} (true {truth}), alpha {alpha:.3f}")

assert torch.allclose(by_matrix, direct.x, atol=1e-6)
assert smooth < errors[stop] < 1.2 * errors[best] < errors[-1]
assert scores["TV"] > scores["wavelets"] > scores["data"] + 1.5
assert abs(width - truth) < 0.15
