"""Total variation."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, per_axis, size
from pullback.functionals.arithmetic import is_live, member, total
from pullback.functionals.functional import Functional, Step
from pullback.functionals.norms import L1, L21
from pullback.linops import Gradient

_CHECK = 10  # iterations between two computations of the duality gap, which cost one more application each
# From how many samples of a signal and pixels of an image on the compiled loops are used; they take seconds to compile.
_LONG, _LARGE = 256, 128 * 128


class TV(Functional):
    """f(x) = sum_i |(grad x)_i|, with forward differences and no flow over the border (Neumann).

    Args:
        dims: shape of one member of the batch, any number of axes, each of at least 2 samples.
        isotropic: |.| is the Euclidean norm of the gradient vector; otherwise the sum of magnitudes of its components.
        sampling: distance between samples, one value or one an axis.
        maxiter: at most so many iterations in a prox.
        rtol: the prox stops when its distance from the exact one is below rtol |x| (proven by the duality gap; rounding
            allows about 1e-4 in float32). Each member of a batch stops by itself. rtol=0 runs maxiter
            iterations without looking.

    The prox is the fast gradient projection on the dual (Beck & Teboulle 2009, doi 10.1109/TIP.2009.2028250), started
    at zero, so that it is a function of its arguments alone; autograd unrolls it. Where no derivative is asked for and
    numba is installed, compiled loops do the same for real images (from 128 x 128 on), and the prox of a real signal
    (from 256 samples on) is exact (Johnson 2013). In f(x) = outer(operator x), as `pdhg` uses it, `operator` is the
    gradient and `outer` is L21 (isotropic) or L1.
    Cost of a prox: up to 1.1 maxiter applications of the gradient and of its adjoint. 200 iterations on 1024 x 1024 in
    float32 on one core: 1.1 s in torch, 0.2 s compiled; a signal of 1e6 samples: 0.03 s.
    """

    def __init__(
        self,
        dims: Dims,
        isotropic: bool = True,
        *,
        sampling: Sequence[float] | float = 1.0,
        maxiter: int = 200,
        rtol: float = 1e-4,
    ) -> None:
        super().__init__(dims)
        if maxiter < 1:
            raise ArgumentError(f"TV: maxiter must be at least 1; got {maxiter}")
        if not rtol >= 0:
            raise ArgumentError(f"TV: rtol must be >= 0; got {rtol}")
        self.isotropic, self.maxiter, self.rtol = isotropic, maxiter, rtol
        self.scales = tuple(1 / float(h) for h in per_axis(sampling, len(self.dims or ()), "TV", "sampling"))
        self.gradient = Gradient(self.dims or (), sampling=sampling, kind="forward")
        self.outer_norm: Functional = L21(self.gradient.dimsd, axis=0) if isotropic else L1(self.gradient.dimsd)

    @property
    def operator(self) -> LinearOperator:
        """The gradient."""
        return self.gradient

    @property
    def outer(self) -> Functional:
        """L21 or L1."""
        return self.outer_norm

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self.outer_norm._value(self.gradient._run(x), n + 1)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self._prox_from(x, step, n)[0]

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        # min_u |u - x|^2 / 2 + step |K u| has the dual min_q |x - K^H q|^2 / 2 over |q_i| <= step, and u = x - K^H q.
        # Gradient steps of length 1 / |K|^2 at the extrapolated point r.
        if self._is_fast(x, step, dual):
            return self._run_loops(x, step, dual)
        op, m = self.gradient, n + 1
        rate = 1 / op.norm_bound() ** 2
        radius = step.unsqueeze(-m) if isinstance(step, Tensor) and step.ndim else step
        q = r = torch.zeros_like(op._run(x)) if dual is None else dual
        done = torch.zeros(x.shape[: x.ndim - n], dtype=torch.bool, device=x.device)
        result = None
        t = 1.0
        live = is_live(x, step, dual)
        for k in range(1, self.maxiter + 1):
            u = self._primal(x, r, live)
            w = op._run(u)
            ahead = torch.add(r, w, alpha=rate, out=None if live else w)
            new = self.outer_norm._conjugate_prox(ahead, 1.0, m, radius)
            grown = (1 + (1 + 4 * t * t) ** 0.5) / 2
            r = torch.lerp(q, new, 1 + (t - 1) / grown, out=None if live or k == 1 else q)
            q, t = new, grown
            if self.rtol and k % _CHECK == 0:
                u = self._primal(x, q, live)
                newly = self._near(x, u, q, step, n) & ~done
                if bool(newly.any()):
                    done = done | newly
                    result = u if result is None else torch.where(newly.reshape(newly.shape + (1,) * n), u, result)
                    if bool(done.all()):
                        return result, q, None
        u = self._primal(x, q, live)
        u = u if result is None else torch.where(done.reshape(done.shape + (1,) * n), result, u)
        return u, q, None

    def _is_fast(self, x: Tensor, step: Step, dual: Any) -> bool:
        """Whether the compiled loops serve: real long signals or large images on the CPU, no derivative, numba."""
        dims = self.dims or ()
        if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu" or not x.numel():
            return False
        enough = (len(dims) == 1 and size(dims) >= _LONG) or (len(dims) == 2 and size(dims) >= _LARGE)
        return enough and not is_live(x, step, dual) and _has_numba()

    def _run_loops(self, x: Tensor, step: Step, dual: Any) -> tuple[Tensor, Any, Tensor | None]:
        n = len(self.dims or ())
        batch = x.shape[: x.ndim - n]
        members = x.detach().reshape(-1, *x.shape[x.ndim - n :]).contiguous()
        radii = torch.as_tensor(member(step, n), dtype=torch.float64).expand(batch).reshape(-1)
        if n == 1:
            import pullback.functionals._tv1d as direct

            return direct.proximal(members, radii * self.scales[0]).reshape(x.shape), None, None
        import pullback.functionals._fgp as loops

        q = x.new_zeros(len(members), 2, *members.shape[1:])
        if dual is not None:
            q.copy_(dual.expand(*batch, *q.shape[1:]).reshape(q.shape))
        rate = 1 / self.gradient.norm_bound() ** 2
        u = loops.proximal(members, radii, q, rate, self.scales, self.isotropic, self.maxiter, self.rtol, _CHECK)
        return u.reshape(x.shape), q.reshape(*batch, *q.shape[1:]), None

    def _primal(self, x: Tensor, q: Tensor, live: bool) -> Tensor:
        v = self.gradient._run(q, True)
        return torch.sub(x, v, out=None if live else v)

    @torch.no_grad()
    def _near(self, x: Tensor, u: Tensor, q: Tensor, step: Step, n: int) -> Tensor:
        """Whether |u - u*| <= rtol |x|, for each member: |u - u*|^2 / 2 <= gap = step |K u| - Re<q, K u>."""
        w = self.gradient._run(u)
        product = total((q.conj() * w).real if w.is_complex() else q * w, n + 1)
        weight = step.reshape(step.shape[: step.ndim - n]) if isinstance(step, Tensor) and step.ndim else step
        gap = weight * self.outer_norm._value(w, n + 1) - product
        energy = total((x.conj() * x).real if x.is_complex() else x * x, n)
        return 2 * gap <= self.rtol**2 * energy

    def extra_repr(self) -> str:
        """The dims, and what is not the default."""
        return f"{self.dims}" + ("" if self.isotropic else ", isotropic=False")


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
