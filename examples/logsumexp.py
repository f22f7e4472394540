# %% [markdown]
# # A log-sum-exp that does not overflow
#
# $c_i = \log \sum_{j=1}^N \exp\big((p - a_j)^2 e^{x_i + y_j}\big)$ for $i = 1, \dots, M$, and the gradient of
# $\sum_i e_i c_i$ in $y$. Neither the $M \times N$ matrix of exponents nor that of their exponentials is ever stored.
#
# This is the problem of KeOps' tutorial on LogSumExp. A program for KeOps becomes one for this library by its import:
# `from pykeops.torch import Genred` turns into the line below.

# %%
import time
from importlib.util import find_spec

import torch

from pullback import Genred

torch.manual_seed(0)
M, N = 3000, 5000
x, y = torch.randn(M, 1), torch.randn(N, 1, requires_grad=True)
a, p = torch.rand(N, 1), torch.rand(1)

formula = "Square(p-a)*Exp(x+y)"
aliases = ["x = Vi(1)", "y = Vj(1)", "a = Vj(1)", "p = Pm(1)"]
log_sum_exp = Genred(formula, aliases, reduction_op="LogSumExp", axis=1)

start = time.perf_counter()
c = log_sum_exp(x, y, a, p)
e = torch.rand_like(c)
(g,) = torch.autograd.grad(c, y, e)
print(f"value and gradient, the first time: {1e3 * (time.perf_counter() - start):.0f} ms, compilation included")
start = time.perf_counter()
torch.autograd.grad(log_sum_exp(x, y, a, p), y, e)
print(f"the second time: {1e3 * (time.perf_counter() - start):.1f} ms for {M * N / 1e6:.0f} million pairs, twice")

# %% [markdown]
# ## Two references
#
# *Dense*: the matrix of exponents as one torch tensor, and `torch.logsumexp`. *Unstable*: the same reduction without
# subtracting the largest exponent, `log(sum(exp(f)))`. Float32 overflows where an exponent exceeds 88.


# %%
def exponents(y: torch.Tensor) -> torch.Tensor:
    return (p - a.T) ** 2 * torch.exp(x + y.T)  # (M, N)


dense = torch.logsumexp(exponents(y), dim=1, keepdim=True)
(g_dense,) = torch.autograd.grad(dense, y, e)

unstable = Genred(f"Exp({formula})", aliases, reduction_op="Sum", axis=1)(x, y, a, p).log()
(g_unstable,) = torch.autograd.grad(unstable, y, e)


def error(u: torch.Tensor, v: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((u - v).norm() / v.norm())


value_error, gradient_error = error(c.detach(), dense.detach()), error(g, g_dense)
overflown = int((~unstable.isfinite()).sum())
print(f"relative error against the dense version: {value_error:.1e} (value), {gradient_error:.1e} (gradient)")
print(
    f"unstable version: {overflown} of {M} values and {int((~g_unstable.isfinite()).sum())} of {N} gradients not finite"
)

# %% [markdown]
# ## Picture
#
# Sorted by $x$, the unstable values stop where the exponents become too large; the stable ones go on.

# %%
if find_spec("matplotlib"):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    order = x[:, 0].argsort()
    for axis, title, values in ((axes[0], "stable: LogSumExp", c), (axes[1], "unstable: log of Sum of Exp", unstable)):
        axis.plot(x[order, 0], dense.detach()[order, 0], color="0.8", linewidth=5, label="torch, dense")
        axis.plot(x[order, 0], values.detach()[order, 0], color="C0", linewidth=1.5, label="kernel reduction")
        axis.set(title=title, xlabel="$x_i$", yscale="log")
        axis.legend()
    axes[0].set_ylabel("$c_i$")
    figure.savefig("logsumexp.png", dpi=120)
    plt.close(figure)
    print("wrote logsumexp.png")

# %%
assert value_error < 5e-7
assert gradient_error < 1e-6
assert overflown > 0
