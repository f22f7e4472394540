"""Numbers about an operator: its matrix, norm, eigenvalues, condition number and trace, from applications alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.core.interop import device_of, torch_dtype
from pullback.core.shapes import complex_of, real_of, size

if TYPE_CHECKING:
    from pullback.core.operator import LinearOperator

_CHUNK = 1 << 24  # elements of output computed at a time
_SMALL = 1024  # matrices up to this size are decomposed densely


def probe_dtype(op: LinearOperator, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of vectors that exercise the whole domain of `op`."""
    dtype = torch_dtype(op.dtype) if dtype is None else dtype
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if op._real_domain:
        return real_of(dtype)
    return dtype if op._clinear or dtype.is_complex else complex_of(dtype)


def unit_chunks(
    n: int, other: int, dtype: torch.dtype, device: torch.device | str, chunk_size: int | None
) -> Iterator[Tensor]:
    """The n unit vectors as the rows of matrices (k, n), k = chunk_size, or such that results (k, other) stay small."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"chunk_size must be an int >= 1 or None; got {chunk_size!r}")
    step = chunk_size or max(1, _CHUNK // max(n, other))
    for start in range(0, n, step):
        stop = min(n, start + step)
        units = torch.zeros(stop - start, n, dtype=dtype, device=device)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        yield units


def _require_matrix(op: LinearOperator) -> None:
    if not op._clinear and not op._real_domain:
        raise ArgumentError(
            f"{type(op).__name__} is linear over the reals only and has no complex matrix; apply it to vectors instead"
        )


def todense(
    op: LinearOperator,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    chunk_size: int | None = None,
) -> Tensor:
    """The matrix of `op`, column by column in batches."""
    _require_matrix(op)
    dtype = torch_dtype(op.dtype) if dtype is None else dtype
    if op._real_domain and dtype.is_complex:
        dtype = real_of(dtype)
    device = device_of(op) if device is None else device
    m, n = op.shape
    rows = []
    for units in unit_chunks(n, m, dtype, device, chunk_size):
        rows.append(op._call(units.reshape(-1, *op.dims), False).reshape(len(units), m))
    return torch.cat(rows).T


def _lanczos(op: LinearOperator, steps: int, rtol: float) -> tuple[float, int, bool]:
    """The largest Ritz value of A^H A after at most `steps` steps, the number of steps, and whether it is exact.

    Three vectors in memory: the extreme Ritz value needs no reorthogonalisation.
    """
    dtype, device = probe_dtype(op), device_of(op)
    generator = torch.Generator().manual_seed(20)
    v = torch.randn(op.dims, dtype=dtype, generator=generator).to(device)
    v = v / torch.linalg.vector_norm(v)
    previous = torch.zeros_like(v)
    alphas: list[float] = []
    betas: list[float] = []
    beta, ritz, tiny = 0.0, 0.0, 10 * torch.finfo(dtype).eps
    with torch.no_grad():
        for k in range(1, steps + 1):
            u = op._run(v)
            alphas.append(float(torch.linalg.vector_norm(u)) ** 2)
            w = op._run(u, True)
            w = w.to(dtype) - alphas[-1] * v - beta * previous
            beta = float(torch.linalg.vector_norm(w))
            scale = max(alphas) + max(betas, default=0.0)
            if scale == 0.0:
                return 0.0, k, True
            exhausted = beta <= tiny * scale or k >= size(op.dims) * (2 if dtype.is_complex and not op._clinear else 1)
            if exhausted or k == steps or k % 5 == 0:
                values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
                ritz = max(float(values[-1]), 0.0)
                if exhausted:
                    return ritz, k, True
                if beta * abs(float(vectors[-1, -1])) <= rtol * ritz:
                    return ritz, k, False
            betas.append(beta)
            previous, v = v, w / beta
    return ritz, steps, False


def norm(op: LinearOperator, maxiter: int = 100, rtol: float = 1e-6) -> float:
    """||A||_2 from below, to a relative accuracy of about `rtol`."""
    if maxiter < 1:
        raise ArgumentError(f"norm: maxiter must be at least 1; got {maxiter}")
    return math.sqrt(_lanczos(op, maxiter, rtol)[0])


def norm_bound(op: LinearOperator, maxiter: int = 40) -> float:
    """A number that is at least ||A||_2.

    The structural bound if there is one, else sqrt(theta / (1 - eps)), where theta is the largest Ritz value of A^H A
    after k Lanczos steps from a random start and eps = (log(1.648 sqrt(n) / p) / (2 k - 1))^2: the bound fails with
    chance p = 1e-9 at most (J. Kuczynski, H. Wozniakowski, 1992, doi 10.1137/0613066).
    """
    structural = op._norm_bound()
    if structural is not None and structural == 0.0:
        return 0.0
    n = size(op.dims)
    margin = 1 + 100 * torch.finfo(probe_dtype(op)).eps
    need = math.log(1.648 * math.sqrt(n) / 1e-9)
    if structural is not None:
        return structural * margin
    steps = max(maxiter, math.ceil(need))  # below that eps would not be under 1/4
    ritz, k, exact = _lanczos(op, steps, 0.0)
    if exact:
        return math.sqrt(ritz) * margin
    eps = (need / (2 * k - 1)) ** 2
    return math.sqrt(ritz / (1 - eps)) * margin


def eigs(op: LinearOperator, neigs: int | None = None, symmetric: bool = False, **kwargs: Any) -> np.ndarray:
    """Eigenvalues of a square operator, singular values of a rectangular one, by decreasing magnitude.

    Args:
        neigs: how many; all (through the dense matrix) if None.
        symmetric: the operator is Hermitian (not verified): real eigenvalues by the symmetric algorithm.
        kwargs: for `scipy.sparse.linalg.eigs`, `eigsh` or `svds` where they are used (`tol`, `maxiter`, `which` ...).

    Small operators (or neigs=None) are decomposed densely by torch; larger ones need SciPy (ARPACK).
    """
    m, n = op.shape
    if neigs is not None and not 1 <= neigs <= min(m, n):
        raise ArgumentError(f"eigs: neigs must lie in [1, {min(m, n)}]; got {neigs}")
    if neigs is None or max(m, n) <= _SMALL or neigs >= min(m, n) - 1:
        matrix = op.todense().detach().cpu()
        if m != n:
            values = torch.linalg.svdvals(matrix).numpy()
        elif symmetric:
            values = torch.linalg.eigvalsh(matrix).numpy()
        else:
            values = torch.linalg.eigvals(matrix).numpy()
    else:
        sla = _arpack()
        linear = sla.aslinearoperator(op)
        if m != n:
            values = sla.svds(linear, k=neigs, return_singular_vectors=False, **kwargs)
        else:
            solver = sla.eigsh if symmetric else sla.eigs
            values = solver(linear, k=neigs, return_eigenvectors=False, **kwargs)
    return values[np.argsort(-np.abs(values), kind="stable")][:neigs]


def _arpack() -> Any:  # scipy.sparse.linalg
    try:
        import scipy.sparse.linalg
    except ModuleNotFoundError:
        text = f"operators with more than {_SMALL} rows or columns need SciPy here: pip install scipy"
        raise ModuleNotFoundError(text, name="scipy") from None
    return scipy.sparse.linalg


def cond(op: LinearOperator, **kwargs: Any) -> float:
    """The ratio of the largest to the smallest singular value (inf if the smallest is zero)."""
    if max(op.shape) <= _SMALL:
        values = torch.linalg.svdvals(op.todense().detach().cpu())
        return float(values[0] / values[-1])
    sla = _arpack()
    linear = sla.aslinearoperator(op)
    largest = sla.svds(linear, k=1, which="LM", return_singular_vectors=False, **kwargs)[0]
    smallest = sla.svds(linear, k=1, which="SM", return_singular_vectors=False, **kwargs)[0]
    return float(largest / smallest) if smallest > 0 else math.inf


def trace(op: LinearOperator, neval: int | None = None, method: str = "explicit", seed: int = 0) -> Tensor:
    """The trace, exactly or by random probing (Hutchinson 1990; Hutch++: Meyer et al.

    2021, doi 10.1137/1.9781611976496.16).
    """
    m, n = op.shape
    if m != n:
        raise ArgumentError(f"trace: the operator must be square; got shape {op.shape}")
    if method == "explicit":
        return op.todense().diagonal().sum()
    if method not in ("hutchinson", "hutch++"):
        raise ArgumentError(f"trace: method must be 'explicit', 'hutchinson' or 'hutch++'; got {method!r}")
    neval = max(3, n // 10) if neval is None else neval
    if neval < (3 if method == "hutch++" else 1):
        raise ArgumentError(
            f"trace: neval must be at least {3 if method == 'hutch++' else 1} for {method}; got {neval}"
        )
    signs = _signs(op, seed)
    if method == "hutchinson":
        z = signs(neval)
        return (z * _rows(op, z)).sum() / neval
    k = neval // 3
    q = torch.linalg.qr(_rows(op, signs(k)).detach().T)[0].T  # rows: a basis of the dominant range
    z = signs(k)
    z = z - (z @ q.conj().T) @ q
    return (q.conj() * _rows(op, q)).sum() + (z.conj() * _rows(op, z)).sum() / k


def _signs(op: LinearOperator, seed: int) -> Callable[[int], Tensor]:
    """A function k -> k random sign vectors, the rows of a matrix (k, n)."""
    generator = torch.Generator().manual_seed(seed)
    dtype, device = torch_dtype(op.dtype), device_of(op)
    dtype = real_of(dtype) if op._real_domain else dtype
    return lambda k: (torch.randint(0, 2, (k, op.shape[1]), generator=generator) * 2 - 1).to(device, dtype)


def _rows(op: LinearOperator, rows: Tensor) -> Tensor:
    """A applied to the rows of a matrix (k, n)."""
    return op._call(rows.reshape(-1, *op.dims), False).reshape(len(rows), -1)


def diagonal(op: LinearOperator, neval: int | None, method: str, seed: int, chunk_size: int | None = None) -> Tensor:
    """The diagonal, of shape dims, exactly or by random probing (C. Bekas, E. Kokiopoulou, Y. Saad 2007,

    doi 10.1016/j.apnum.2007.01.003).
    """
    m, n = op.shape
    if m != n:
        raise ArgumentError(f"diagonal: the operator must be square; got shape {op.shape}")
    _require_matrix(op)
    if method == "explicit":
        dtype = torch_dtype(op.dtype)
        dtype = real_of(dtype) if op._real_domain else dtype
        found, start = [], 0
        for units in unit_chunks(n, n, dtype, device_of(op), chunk_size):
            found.append(_rows(op, units).diagonal(start))
            start += len(units)
        return torch.cat(found).reshape(op.dims)
    if method != "hutchinson":
        raise ArgumentError(f"diagonal: method must be 'explicit' or 'hutchinson'; got {method!r}")
    neval = max(3, n // 10) if neval is None else neval
    if neval < 1:
        raise ArgumentError(f"diagonal: neval must be at least 1; got {neval}")
    z = _signs(op, seed)(neval)
    return (z * _rows(op, z)).mean(0).reshape(op.dims)


@dataclass(frozen=True)
class Density:
    """The distribution of the eigenvalues of A as point masses: sum_k weights_k f(nodes_k) is about trace(f(A)) / n.

    Attributes:
        nodes: Ritz values, of shape (neval, steps).
        weights: their masses, of the same shape, with sum 1.
    """

    nodes: Tensor
    weights: Tensor

    def mean(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Trace(f(A)) / n for a function of real numbers, element by element."""
        heavy = self.weights > 0
        return (self.weights[heavy] * function(self.nodes[heavy])).sum()

    def __call__(self, t: Tensor, width: float | None = None) -> Tensor:
        """The density at t, smoothed by a normal distribution of standard deviation `width` (range / 50 if None).

        The share of the eigenvalues between a and b is about its integral from a to b.
        """
        width = self._width(width)
        gap = (torch.as_tensor(t)[..., None] - self.nodes.flatten()) / width
        return (self.weights.flatten() * torch.exp(-(gap**2) / 2)).sum(-1) / (width * math.sqrt(2 * math.pi))

    def curve(self, n_points: int = 200, width: float | None = None) -> tuple[Tensor, Tensor]:
        """A grid over the spectrum and the density on it, to be plotted."""
        width = self._width(width)
        low, high = float(self.nodes.min()) - 4 * width, float(self.nodes.max()) + 4 * width
        t = torch.linspace(low, high, n_points, dtype=self.nodes.dtype, device=self.nodes.device)
        return t, self(t, width)

    def _width(self, width: float | None) -> float:
        if width is None:
            spread = float(self.nodes.max() - self.nodes.min())
            return spread / 50 or max(abs(float(self.nodes.max())), 1.0) / 50
        if not width > 0:
            raise ArgumentError(f"density: width must be a positive number; got {width!r}")
        return width


def density(op: LinearOperator, steps: int, neval: int, seed: int) -> Density:
    """Stochastic Lanczos quadrature: the mean of the measures of `neval` random vectors, by `steps` Lanczos steps each.

    Exact for trace(p(A)) / n and polynomials p up to degree 2 steps - 1 but for the error of the random vectors, about
    1 / sqrt(neval n). The basis is orthogonalised fully, and kept: steps vectors.

    Raises: ArgumentError if the operator is not square or, for two random vectors, not self-adjoint.

    Source: L. Lin, Y. Saad, C. Yang 2016, doi 10.1137/130934283; G. H. Golub, G. Meurant 2010, chapter 4.
    """
    m, n = op.shape
    if m != n:
        raise ArgumentError(f"density: the operator must be square and self-adjoint; got shape {op.shape}")
    for name, value in (("steps", steps), ("neval", neval)):
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(f"density: {name} must be an int >= 1; got {value!r}")
    dtype, device = probe_dtype(op), device_of(op)
    generator = torch.Generator().manual_seed(seed)
    pairs = not op._clinear and not op._real_domain  # linear over the reals: the space has 2 n dimensions
    steps = min(steps, 2 * n if pairs else n)

    def draw(k: int) -> Tensor:
        v = torch.randn(k, n, dtype=dtype, generator=generator).to(device)
        return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)

    def inner(a: Tensor, b: Tensor) -> Tensor:  # (..., k, n), (..., n) -> (..., k)
        c = (a.conj() @ b[..., None])[..., 0]
        return c.real.to(dtype) if pairs else c

    with torch.no_grad():
        u, v = draw(2)
        au, av = _rows(op, torch.stack((u, v)))
        left, right = inner(u[None], av).real, inner(au[None], v).real
        size_of = torch.linalg.vector_norm(au) + torch.linalg.vector_norm(av)
        if not float((left - right).abs()) <= 1e3 * torch.finfo(dtype).eps * float(size_of):
            raise ArgumentError(
                f"density: {type(op).__name__} is not self-adjoint (or not finite): <u, A v> = {float(left):.6g}, "
                f"<A u, v> = {float(right):.6g} for random u, v; use A.gram for the squares of singular values"
            )
        together = max(1, min(neval, (1 << 26) // (steps * n)))
        found = [_lanczos_measure(op, draw(min(together, neval - k)), steps, inner) for k in range(0, neval, together)]
    nodes, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Density(nodes, weights / neval)


def _lanczos_measure(op: LinearOperator, q: Tensor, steps: int, inner: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Ritz values and squared first components for each unit vector of q (k, n)."""
    basis = torch.zeros(q.shape[0], steps, q.shape[1], dtype=q.dtype, device=q.device)
    alphas, betas = [], []
    for j in range(steps):
        basis[:, j] = q
        w = _rows(op, q).to(q.dtype)
        alphas.append(inner(q[:, None], w)[:, 0].real)
        reach = torch.linalg.vector_norm(w, dim=-1)
        for _ in range(2):  # once is not enough where much cancels
            w = w - (inner(basis[:, : j + 1], w)[:, None] @ basis[:, : j + 1])[:, 0]
        beta = torch.linalg.vector_norm(w, dim=-1)
        going = (
            beta > 100 * torch.finfo(q.dtype).eps * reach
        )  # else the space is exhausted, and the rest weighs nothing
        betas.append(torch.where(going, beta, 0))
        q = torch.where(going[:, None], w / beta[:, None], 0)
    matrix = torch.diag_embed(torch.stack(alphas, -1))
    if steps > 1:
        off = torch.diag_embed(torch.stack(betas[:-1], -1), 1)
        matrix = matrix + off + off.mT
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[:, 0] ** 2
