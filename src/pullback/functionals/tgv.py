"""Second-order total generalised variation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, per_axis
from pullback.core.shapes import size as size_of
from pullback.functionals.arithmetic import inner, lift, member, norm, squares, total
from pullback.functionals.functional import Functional, Step
from pullback.functionals.norms import L21
from pullback.linops import Gradient
from pullback.linops.stencil import Stencil, apply_stencil

_CHECK = 20  # iterations between two computations of the duality gap, which cost one more iteration each
_BALANCE = 8.0  # of dual to primal steps in a prox; 1 takes up to 10 times as many iterations (noisy ramps with a step)


class TGV(Functional):
    """f(x) = min_w alpha_1 sum_i |(grad x - w)_i| + alpha_0 sum_i |(E w)_i|, E w = (grad w + grad w^T) / 2.

    Zero for affine x: unlike TV it prefers ramps to steps. Differences reach over no border.

    Args:
        dims: shape of one member of the batch, any number of axes, each of at least 3 samples.
        alpha: (alpha_1, alpha_0), both > 0; 1 and 2 suit most images. `c * TGV(dims)` scales both.
        sampling: distance between samples, one value or one an axis.
        maxiter: at most so many iterations in a prox or a value.
        rtol: the prox stops when its distance from the exact one is below rtol |x|, the value when its error is below
            rtol times itself, as the duality gap tells if the best w is at most twice as large as the present one (not
            verified). rtol=0 runs maxiter iterations without looking.

    Prox and value are computed by the primal-dual method of Chambolle and Pock, started at zero, so that they are
    functions of their arguments alone; autograd unrolls it. The value that is returned is an upper bound.
    Cost: an iteration is about 2.5 (two axes) applications of the gradient and of its adjoint.
    Source: Bredies, Kunisch & Pock 2010, doi 10.1137/090769521.
    """

    def __init__(
        self,
        dims: Dims,
        alpha: tuple[float, float] = (1.0, 2.0),
        *,
        sampling: Sequence[float] | float = 1.0,
        maxiter: int = 1000,
        rtol: float = 1e-3,
    ) -> None:
        super().__init__(dims)
        if len(alpha) != 2 or not all(a > 0 for a in alpha):
            raise ArgumentError(f"TGV: alpha must be two numbers > 0, (alpha_1, alpha_0); got {alpha!r}")
        if maxiter < 1:
            raise ArgumentError(f"TGV: maxiter must be at least 1; got {maxiter}")
        if not rtol >= 0:
            raise ArgumentError(f"TGV: rtol must be >= 0; got {rtol}")
        shape = self.dims or ()
        if min(shape) < 3:
            raise ArgumentError(f"TGV: dims must have at least 3 samples on each axis; got {shape}")
        self.alpha, self.maxiter, self.rtol = (float(alpha[0]), float(alpha[1])), maxiter, rtol
        self.gradient = Gradient(shape, sampling=sampling, kind="forward")
        self.symmetrized = _SymmetrizedGradient(shape, per_axis(sampling, len(shape), "TGV", "sampling"))
        self.outer_norm = L21(axis=0)
        valid = torch.ones(self.gradient.dimsd, dtype=torch.bool)
        for k in range(len(shape)):
            valid[k].select(k, -1).zero_()
        self.valid = valid  # where grad x is a difference; elsewhere w = 0

    def _value(self, x: Tensor, n: int) -> Tensor:
        return self._iterate(x, None, n)[0]

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        return self._iterate(x, step, n)[0]

    def _prox_from(self, x: Tensor, step: Step, n: int, dual: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        u, dual, energy = self._iterate(x, step, n, dual)
        return u, dual, energy / member(step, n)

    def _iterate(self, x: Tensor, step: Step | None, n: int, start: Any = None) -> tuple[Tensor, Any, Tensor]:
        """The prox, where it ended, step times its value. Without step u = x is fixed, and the energy comes first."""
        gradient, sym, g, m = self.gradient, self.symmetrized, self.outer_norm, n + 1
        number = 1.0 if step is None else lift(member(step, n), m)
        first, second = number * self.alpha[0], number * self.alpha[1]
        # |K|^2 for K (u, w) = (grad u - w, E w) is at most that of this matrix of norms.
        bound = torch.tensor([[0.0 if step is None else gradient.norm_bound(), 1.0], [0.0, sym.norm_bound()]])
        u = ahead = x
        slope = gradient._run(x)
        balance: Step = _BALANCE
        if step is None:  # the dual variables have the size of alpha, w that of the gradient: steps in this proportion
            size = norm(slope.detach(), m)
            balance = size_of(self.dims or ()) ** 0.5 * self.alpha[0] / torch.where(size > 0, size, 1)
        length = 1 / float(torch.linalg.matrix_norm(bound, 2))
        tau, sigma = length / balance, length * balance
        w = w_ahead = p = torch.zeros_like(slope)
        q = torch.zeros_like(sym._run(w))
        if start is not None:
            u, w, p, q = start
            ahead, w_ahead = u, w
        done = torch.zeros(x.shape[: x.ndim - n], dtype=torch.bool, device=x.device)
        result: Tensor | None = None
        answer, energy = x, torch.zeros_like(done, dtype=x.dtype.to_real())
        for k in range(1, self.maxiter + 1):
            if step is not None:
                slope = gradient._run(ahead)
            p = g._project(p + sigma * (slope - w_ahead), first, m)
            q = g._project(q + sigma * sym._run(w_ahead), second, m)
            w_new = torch.where(self.valid, w + tau * (p - sym._run(q, True)), 0)
            w, w_ahead = w_new, 2 * w_new - w
            if step is not None:
                u_new = (u + tau * (x - gradient._run(p, True))) / (1 + tau)
                u, ahead = u_new, 2 * u_new - u
            last = k == self.maxiter
            if not last and (not self.rtol or k % _CHECK):
                continue
            energy = self._energy(u, w, first, second, n)
            answer = energy if step is None else u
            if self.rtol and not last:
                newly = self._near(x, None if step is None else u, w, energy, p, q, n) & ~done
                done = done | newly
                flags = newly if step is None else newly.reshape(newly.shape + (1,) * n)
                result = answer if result is None else torch.where(flags, answer, result)
                if bool(done.all()):
                    return result, (u, w, p, q), energy
        kept = done if step is None else done.reshape(done.shape + (1,) * n)
        return answer if result is None else torch.where(kept, result, answer), (u, w, p, q), energy

    def _energy(self, u: Tensor, w: Tensor, first: Step, second: Step, n: int) -> Tensor:
        m = n + 1
        v = self.outer_norm._value(self.gradient._run(u) - w, m) * member(first, m)
        return v + self.outer_norm._value(self.symmetrized._run(w), m) * member(second, m)

    @torch.no_grad()
    def _near(self, x: Tensor, u: Tensor | None, w: Tensor, energy: Tensor, p: Tensor, q: Tensor, n: int) -> Tensor:
        """Whether the gap is within the tolerance. What p lacks of E^H q counts |w| times: the best w is not known."""
        m = n + 1
        lack = torch.where(self.valid, self.symmetrized._run(q, True) - p, 0)
        gap = energy + 2 * member(norm(w, m) * norm(lack, m), m)
        if u is None:
            return gap - inner(p, self.gradient._run(x), m) <= self.rtol * energy
        pulled = self.gradient._run(p, True)  # the dual energy is |x|^2 / 2 - |x - pulled|^2 / 2
        size = total(squares(x), n)
        gap = gap + total(squares(u - x), n) / 2 - (size - total(squares(x - pulled), n)) / 2
        return 2 * gap <= self.rtol**2 * size

    def extra_repr(self) -> str:
        """The dims and alpha."""
        return f"{self.dims}, alpha={self.alpha}"


class _SymmetrizedGradient(LinearOperator):
    """y = E w: d_k w_k for every axis k, then (d_k w_l + d_l w_k) / sqrt(2) for every pair: |y_i| = |(E w)_i|_F.

    d_k are backward differences where both samples of w carry a difference of x: w_k lacks the last sample of axis k.
    """

    def __init__(self, dims: tuple[int, ...], sampling: Sequence[float]) -> None:
        d = len(dims)
        pairs = list(itertools.combinations(range(d), 2))
        super().__init__((d, *dims), (d + len(pairs), *dims))

        def stencil(k: int, lacks_last: bool) -> Stencil:
            n, c = dims[k], 1 / float(sampling[k])
            rows: dict[int, dict[int, float]] = {0: {}, n - 1: {}} if lacks_last else {0: {}}
            return Stencil(n, {-1: -c, 0: c}, 1, n - lacks_last, rows)

        # (output, input, axis, stencil)
        terms = [(k, k, k, stencil(k, True)) for k in range(d)]
        for i, (k, el) in enumerate(pairs):
            terms += [
                (d + i, el, k, stencil(k, False).scaled(0.5**0.5)),
                (d + i, k, el, stencil(el, False).scaled(0.5**0.5)),
            ]
        self._terms = [(o, i, k - d, s, s.transposed) for o, i, k, s in terms]
        self._bound = sum((2 / float(h)) ** 2 for h in sampling) ** 0.5  # |E w| <= |grad w|

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply_terms(x, self.dimsd, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply_terms(y, self.dims, True)

    def _apply_terms(self, x: Tensor, dims: tuple[int, ...], adjoint: bool) -> Tensor:
        n = len(dims)
        y = torch.zeros((*x.shape[: x.ndim - n], *dims), dtype=x.dtype, device=x.device)
        for o, i, axis, s, transposed in self._terms:
            source, target = (o, i) if adjoint else (i, o)
            apply_stencil(transposed if adjoint else s, x.select(-n, source), axis, y.select(-n, target), add=True)
        return y

    def _norm_bound(self) -> float:
        return self._bound
