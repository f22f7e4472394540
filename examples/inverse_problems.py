# %% [markdown]
# # Linear inverse problems, from the power iteration to a chosen regularization
#
# $y = K x + e$. What the singular values of $K$ say about $x$, and what to do about the small ones. The path is that of
# a well-known set of notebooks on PyTorch and inverse problems; where their cells go wrong, the text here says so.
#
# `python inverse_problems.py [folder]` writes two pictures into the folder (the current one by default).

# %%
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import pullback as pb
from pullback.linops import RandomProjection, Toeplitz, distortion
from pullback.solvers.spectral import (
    bias_variance,
    cond,
    discrepancy,
    filter_factors,
    gcv,
    noise_amplification,
    picard,
    pinv,
    power_iteration,
    rank,
    svd,
    tikhonov,
    tsvd,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")

# %% [markdown]
# ## Power iteration
#
# $v \leftarrow A v / |A v|$. Ten steps are enough for a matrix of positive numbers, whose largest eigenvalue stands
# far above the rest, and not in general. $|A v - \lambda v|$ bounds the error of $\lambda$ for a symmetric matrix:
# it is what stops the iteration.

# %%
B = torch.randn(256, 256)
A = pb.MatrixMult(B @ B.T)
ten = power_iteration(A, maxiter=10)
found = power_iteration(A, maxiter=5000)
exact = torch.linalg.eigvalsh(B @ B.T)[-1]
print(f"10 steps: {ten}")
print(f"to 1e-6:  {found}, error {abs(found.value - exact):.1e}")
largest = power_iteration(
    pb.MatrixMult(B), gram=True, maxiter=5000
)  # of B^T B: the square of the largest singular value

# %% [markdown]
# ## Random projection
#
# Distances between a few points survive a projection to few dimensions. A dense $10^5 \times 10^5$ matrix of float32
# would take 40 GB; here no matrix exists: each entry is a function of its place and a seed, so the adjoint is exact.
# (kind="gaussian" serves at this size too, in tens of seconds; the structured kinds take milliseconds.)

# %%
points = torch.randn(20, 100_000)
for kind in ("srht", "sparse", "countsketch"):
    d = distortion(RandomProjection(100_000, 2_000, kind=kind), points)
    print(f"{kind:12} distances change by {d.abs().mean():.3f} on average, {d.abs().max():.3f} at most")
square = RandomProjection(100_000, 100_000, kind="srht")
norms = square(points).norm(dim=1) / points.norm(dim=1)

# %% [markdown]
# ## Derivatives both ways
#
# The Jacobian as an operator: `J(v)` is the Jacobian-vector product, `J.H(w)` the vector-Jacobian product. For
# $f: R \to R^2$ one JVP gives the whole Jacobian, for $g: R^n \to R$ one VJP does.


# %%
class Spiral(pb.Operator):
    """f(t) = (t cos t, t sin t)."""

    def _forward(self, t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t * t.cos(), t * t.sin()), -1)


class Energy(pb.Operator):
    """g(x) = |x|^4 / 4."""

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(-1, keepdim=True) ** 2 / 4


t = torch.tensor([2.0])
J = Spiral(1, 2).linearize(t)
column, rows = J(torch.ones(1)), J.H(torch.eye(2))  # one JVP; two VJPs
z = torch.randn(1000)
G = Energy(1000, 1).linearize(z)
gradient, slope = G.H(torch.ones(1)), G(z)  # one VJP; one JVP along z
print(f"f'(2) = {column.tolist()}, g'(z) z = {slope.item():.6g} = |z|^4 = {z.norm().item() ** 4:.6g}")

# %% [markdown]
# ## Too many equations, too few equations
#
# $K x = y$ has a solution if and only if $y$ does not raise the rank: rank$(K \; y)$ = rank$(K)$. (That the rank is
# smaller than the number of rows does not decide it.) Where there are many solutions the pseudo-inverse takes the
# shortest, where there is none the best fit. It never forms $(K K^T)^{-1}$, which squares the condition number.

# %%
tall = torch.tensor([[1.0, 1], [1, 2], [1, 3]])
for y in (tall @ torch.tensor([1.0, -1]), torch.tensor([1.0, 0, 0])):
    augmented = pb.MatrixMult(torch.cat((tall, y[:, None]), 1))
    consistent = rank(augmented) == rank(pb.MatrixMult(tall))
    best = pinv(pb.MatrixMult(tall))(y)
    word = "consistent" if consistent else "inconsistent"
    print(f"{word}: x = {best.tolist()}, misfit {(tall @ best - y).norm():.3f}")
wide = pb.MatrixMult(tall.T.float().contiguous())
shortest = pinv(wide)(torch.tensor([6.0, 14.0], dtype=torch.float32))
by_lsqr = pinv(wide, method="lsqr")(torch.tensor([6.0, 14.0], dtype=torch.float32))
print(f"shortest solution {shortest.tolist()}, without a decomposition {by_lsqr.tolist()}")

# %% [markdown]
# ## Deconvolution of a step
#
# A Gaussian blur $\exp(-(s - t)^2 / 2 \sigma^2)$ (with a minus) as a Toeplitz matrix: zero outside the signal, so that
# near the ends the rows sum to less than one. White noise of standard deviation $\sigma$ comes back from the
# pseudo-inverse with norm $\sigma \sqrt{\sum 1 / s_i^2}$, which is `noise_amplification`.

# %%
n = 100
s = torch.linspace(0, 1, n)
kernel = torch.exp(-(s**2) / (2 * 0.011**2)) / (n * 0.011 * math.sqrt(2 * math.pi))
K = Toeplitz(kernel)
truth = ((s > 0.3) & (s < 0.6)).double()
clean, e = K(truth), torch.randn(n)
S = svd(K)
print(f"{S}\ncondition {cond(S):.0f}, noise amplification {noise_amplification(S):.0f}")
levels = (1e-3, 1e-2, 1e-1)
D = pb.FirstDerivative(n, kind="forward")
errors: dict[str, list[float]] = {}
figure = Figure(figsize=(12.6, 7.2), layout="constrained")
axes = figure.subplots(2, 3, sharex=True, sharey=True)
for axis, sigma in zip(axes.T, levels, strict=True):
    y = clean + sigma * e
    solutions = {
        "pseudo-inverse": (pinv(S)(y), ""),
        "TSVD, GCV": tsvd(S, y, "gcv"),
        "Tikhonov, discrepancy": tikhonov(S, y, "discrepancy", noise=sigma),
        "Tikhonov on x', GCV": tikhonov(K, y, "gcv", L=D),
    }
    for ax in axis:
        ax.plot(s, truth, color="#1c2430", lw=0.8)
        ax.set_ylim(-0.6, 1.6)
        ax.spines[["top", "right"]].set_visible(False)
    axis[1].plot(s, y, color="#9aa5b1", lw=0, marker=".", ms=4, label="data")
    colors = ("#c8ccd2", "#d1762c", "#0b6e8f", "#5a8f29")
    for (name, result), color in zip(solutions.items(), colors, strict=True):
        x, method = (result.x, result.method) if name != "pseudo-inverse" else result
        error = float((x - truth).norm() / truth.norm())
        errors.setdefault(name, []).append(error)
        print(f"noise {sigma:g}: {name:22} error {error:.3f}  {method}")
        ax = axis[0] if name in ("pseudo-inverse", "TSVD, GCV") else axis[1]
        ax.plot(s, x, color=color, lw=1.4, label=f"{name} ({error:.2f})", zorder=1 if name == "pseudo-inverse" else 2)
    axis[0].set_title(f"noise {sigma:g}", loc="left", fontsize=10)
    for ax in axis:
        ax.legend(fontsize=8, loc="lower right", framealpha=0.9)
figure.savefig(folder / "deconvolution.png", dpi=90)

# %% [markdown]
# ## Bias and variance
#
# $E |x_k - x|^2$ = what truncation leaves out, squared, + noise that comes through: no experiment is needed for either.

# %%
k = torch.arange(n + 1)
split = bias_variance(S, truth, 1e-1, filter_factors(S.S, "tsvd", k))
best_k = int(split.total.argmin())
chosen_k = int(gcv(S, clean + 1e-1 * e, filter="tsvd").parameter)
print(f"least expected error {split.total.min().sqrt():.3f} at k = {best_k}; GCV took k = {chosen_k}")

figure = Figure(figsize=(10.6, 7.2), layout="constrained")
(ax_split, ax_picard), (ax_gcv, ax_discrepancy) = figure.subplots(2, 2)
for values, name, color in (
    (split.bias2, r"bias$^2$", "#0b6e8f"),
    (split.variance, "variance", "#d1762c"),
    (split.total, "expected squared error", "#1c2430"),
):
    ax_split.semilogy(k, values.clamp(min=1e-6), color=color, lw=1.6, label=name)
ax_split.axvline(best_k, color="#1c2430", lw=1, ls=":")
ax_split.set(xlabel="k", ylim=(1e-2, None))
ax_split.set_title(f"truncated SVD, noise 0.1: best k = {best_k}", loc="left", fontsize=10)
ax_split.legend(fontsize=8)
ax_split.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Picard plot and parameter curves
#
# Once $|u_i^T y|$ has fallen to the noise, dividing it by $s_i$ amplifies noise only.

# %%
y = clean + 1e-2 * e
plot = picard(S, y, noise=1e-2)
plot.plot(ax_picard)
gcv(S, y).plot(ax_gcv)
discrepancy(S, y, 1e-2).plot(ax_discrepancy)
figure.savefig(folder / "parameter_choice.png", dpi=90)
print(plot)

assert ten.residual > 1e3 * found.residual
assert abs(found.value - exact) <= found.residual
assert abs(largest.value / exact - 1) < 1e-6
assert d.abs().max() < 0.1
assert (norms - 1).abs().max() < 0.02
assert torch.allclose(column, rows[:, 0])
assert torch.allclose(gradient, z.norm() ** 2 * z)
assert torch.allclose(shortest, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float32), atol=1e-5)
assert torch.allclose(by_lsqr, shortest, atol=1e-4)
assert errors["pseudo-inverse"][2] > 1
assert all(errors[name][2] < 0.5 for name in errors if name != "pseudo-inverse")
assert errors["Tikhonov, discrepancy"][0] < 0.25
assert abs(best_k - chosen_k) < 15
assert 0 < plot.index < n
