"""The k largest singular triples without the matrix: Golub-Kahan Lanczos with restarts, and random sketches.

Triples are rows: u_i = U[i], v_i = V[i], so that A v_i = s_i u_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pullback.solvers.spectral.space import Flat

Triples = tuple[Tensor, Tensor, Tensor]


class _Swapped:
    """The adjoint of a Flat, as far as this file needs it."""

    def __init__(self, flat: Flat) -> None:
        self.m, self.n, self.dtype, self.device = flat.n, flat.m, flat.dtype, flat.device
        self.forward, self.adjoint, self.random = flat.adjoint, flat.forward, flat.random


class Bidiagonalisation:
    """A V = U B and A^H U = V B^H + beta v e_p^H, in at most p steps, with full reorthogonalisation.

    Args:
        flat: the operator, with at least as many rows as columns.
        p: how many vectors there is room for, at most n.
        generator: where starting vectors come from.
    """

    def __init__(self, flat: Flat | _Swapped, p: int, generator: torch.Generator) -> None:
        self.flat, self.p, self.generator = flat, p, generator
        self.U = torch.zeros(p, flat.m, dtype=flat.dtype, device=flat.device)
        self.V = torch.zeros(p, flat.n, dtype=flat.dtype, device=flat.device)
        self.B = torch.zeros(p, p, dtype=flat.dtype, device=flat.device)
        self.tiny = 10 * torch.finfo(flat.dtype).eps
        self.beta, self.kept, self.next = 0.0, 0, self._fresh(self.V[:0], flat.n)

    def extend(self) -> None:
        """Steps until the room is full."""
        scale = float(self.B.abs().max())
        for j in range(self.kept, self.p):
            self.V[j] = self.next
            w, h = _orthogonal(self.flat.forward(self.next[None])[0], self.U[:j])
            alpha = float(torch.linalg.vector_norm(w))
            scale = max(scale, alpha, float(h.abs().max()) if j else 0.0)
            self.B[:j, j] = h
            if alpha <= self.tiny * scale:  # A v lies in the span of U: any further direction will do
                self.U[j] = self._fresh(self.U[:j], self.flat.m)
            else:
                self.U[j], self.B[j, j] = w / alpha, alpha
            z, _ = _orthogonal(self.flat.adjoint(self.U[j : j + 1])[0], self.V[: j + 1])
            self.beta = float(torch.linalg.vector_norm(z))
            if j + 1 == self.flat.n:
                self.beta = 0.0
            elif self.beta <= self.tiny * scale:  # an invariant subspace is complete
                self.beta, self.next = 0.0, self._fresh(self.V[: j + 1], self.flat.n)
            else:
                self.next = z / self.beta
        self.kept = self.p

    def ritz(self) -> tuple[Triples, Tensor]:
        """Approximate triples by decreasing value, and the residuals |A^H u - s v|."""
        x, s, yh = torch.linalg.svd(self.B)
        return (x.mT @ self.U, s, yh.conj() @ self.V), self.beta * x[-1].abs()

    def restart(self, triples: Triples, count: int, *, afresh: bool) -> None:
        """Keep the first `count` triples and go on from the residual, or from a random vector."""
        U, s, V = triples
        self.U[:count], self.V[:count], self.kept = U[:count], V[:count], count
        self.B.zero_()
        self.B.diagonal()[:count] = s[:count].to(self.B.dtype)
        if afresh:
            self.next = self._fresh(self.V[:count], self.flat.n)

    def _fresh(self, basis: Tensor, n: int) -> Tensor:
        """A random unit vector orthogonal to the rows of `basis`."""
        v, _ = _orthogonal(self.flat.random(1, n, self.generator)[0], basis)
        v, _ = _orthogonal(v / torch.linalg.vector_norm(v), basis)
        return v / torch.linalg.vector_norm(v)


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """W minus its part in the span of the rows of `basis`, and the coefficients of that part. Twice is enough."""
    h = basis.conj() @ w
    w = w - h @ basis
    again = basis.conj() @ w
    return w - again @ basis, h + again


def bidiagonalise(flat: Flat, p: int, seed: int) -> Bidiagonalisation:
    """Run p steps from a random start, on A^H where A is wide."""
    side = flat if flat.m >= flat.n else _Swapped(flat)
    made = Bidiagonalisation(side, min(p, side.n), torch.Generator().manual_seed(seed))
    made.extend()
    return made


def lanczos(flat: Flat, k: int, rtol: float, maxiter: int, seed: int) -> tuple[Triples, int, bool]:
    """The k largest triples, the number of cycles, and whether they converged: |A^H u - s v| <= rtol s_1.

    Restarted from the Ritz vectors (Baglama & Reichel 2005, doi 10.1137/04060593X). One starting vector sees one copy
    of a multiple singular value, so what has converged is kept and the search repeated from a random vector until that
    finds nothing larger.
    """
    made = bidiagonalise(flat, 2 * k + 20, seed)
    known: Tensor | None = None
    cycle, converged = 1, False
    while True:
        triples, residuals = made.ritz()
        s = triples[1]
        bound = rtol * float(s[0])
        n_good = int((residuals <= bound).long().cumprod(0).sum())
        good = n_good >= k
        if good and (made.p == made.flat.n or (known is not None and bool((s[:k] - known <= 10 * bound).all()))):
            converged = True
            break
        if cycle == maxiter:
            break
        if good:
            known = s[:k].clone()
            made.restart(triples, min(n_good, (made.p + k) // 2), afresh=True)
        else:
            made.restart(triples, k + (made.p - k) // 3, afresh=made.beta == 0.0)
        made.extend()
        cycle += 1
    U, s, V = (t[:k] for t in triples)
    return ((U, s, V) if flat.m >= flat.n else (V, s, U)), cycle, converged


def randomized(flat: Flat, k: int, oversample: int, power: int, seed: int) -> Triples:
    """The k largest triples of the projection of A on the range of (A A^H)^power A Omega, Omega random with k +
    oversample columns (Halko, Martinsson, Tropp 2011, doi 10.1137/090771806, algorithms 4.4 and 5.1).
    """
    count = min(k + oversample, flat.m, flat.n)
    omega = flat.random(count, flat.n, torch.Generator().manual_seed(seed))
    q = _basis(flat.forward(omega))
    for _ in range(power):
        q = _basis(flat.forward(_basis(flat.adjoint(q))))
    x, s, yh = torch.linalg.svd(flat.adjoint(q).conj(), full_matrices=False)  # rows of Q^H A
    return (x.mT @ q)[:k], s[:k], yh.conj()[:k]


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal rows that span those given."""
    return torch.linalg.qr(rows.mT)[0].mT
