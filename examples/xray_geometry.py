# %% [markdown]
# # A scan whose geometry is not known
#
# $\min_{c, \theta} \min_u \|A(c, \theta)\, u - y\|^2$: the rotation centre $c$ and the angles $\theta$ are
# parameters of the X-ray transform, so the misfit has a gradient in them. The scan is simulated with a centre three
# pixels away from where it should be, and with angles that are off by a degree.

# %%
import math

import torch

import pullback as pb

torch.manual_seed(0)
n, n_angles = 64, 90

# A disc with holes: everything a phantom needs here.
row, column = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64),) * 2, indexing="ij")
image = (row**2 + column**2 < 0.7).double()
for y0, x0, r, value in (
    (-0.3, 0.2, 0.2, -0.6),
    (0.35, -0.2, 0.15, 0.8),
    (0.1, 0.5, 0.1, -1.0),
    (-0.5, -0.3, 0.12, 0.5),
):
    image += value * ((row - y0) ** 2 + (column - x0) ** 2 < r**2)

nominal = torch.arange(n_angles, dtype=torch.float64) * math.pi / n_angles
true_angles = nominal + math.radians(1.0) * torch.randn(n_angles, dtype=torch.float64)
true_center = 45.0 - 3.0
A_true = pb.imaging.XRayTransform((n, n), true_angles, 91, center=true_center)
y = A_true(image)
y += 0.002 * y.max() * torch.randn(y.shape, dtype=torch.float64)

# %% [markdown]
# ## The gradient is exact
#
# Central differences against automatic differentiation, in the centre and in one angle.

# %%
center = torch.tensor(45.0, dtype=torch.float64, requires_grad=True)
angles = nominal.clone().requires_grad_()


def misfit(center: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return (pb.imaging.XRayTransform((n, n), angles, 91, center=center, method="fourier")(image) - y).square().sum() / 2


by_center, by_angles = torch.autograd.grad(misfit(center, angles), (center, angles))
h = 1e-5
difference = (misfit(center + h, angles) - misfit(center - h, angles)) / (2 * h)
print(f"d/dc by autograd {by_center.item():.6f}, by differences {difference.item():.6f}")
assert abs(by_center - difference) < 1e-5 * abs(difference)
turn = torch.zeros_like(nominal)
turn[17] = h
difference = (misfit(center, angles + turn) - misfit(center, angles - turn)) / (2 * h)
print(f"d/dtheta_17 by autograd {by_angles[17].item():.6f}, by differences {difference.item():.6f}")
assert abs(by_angles[17] - difference) < 1e-5 * abs(difference)

# %% [markdown]
# ## Calibrate, then reconstruct

# %%
found = pb.imaging.calibrate(y, nominal)
before = (nominal - true_angles).square().mean().sqrt()
# A common turn of all angles only turns the image: compare without it.
error = found.angles - true_angles
after = (error - error.mean()).square().mean().sqrt()
print(f"centre {found.center:.3f}, true {true_center}; residual {found.residual_before:.4f} -> {found.residual:.4f}")
print(f"angle errors {math.degrees(before):.3f} -> {math.degrees(after):.3f} degrees (rms)")

wrong = pb.imaging.fbp(pb.imaging.XRayTransform((n, n), nominal, 91), y)
right = pb.imaging.fbp(pb.imaging.XRayTransform((n, n), found.angles, 91, center=found.center), y)
for name, u in (("as given", wrong), ("calibrated", right)):
    print(f"{name:10} PSNR {pb.imaging.psnr(u, image, 1.0):.2f} dB")

assert abs(found.center - true_center) < 0.2
assert after < before / 2
