"""Numbers about an operator: its matrix, norm, eigenvalues, condition number and trace, from applications alone."""

from __future__ import annotations

import math
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


def todense(op: LinearOperator, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """The matrix of `op`, column by column in batches."""
    if not op._clinear and not op._real_domain:
        raise ArgumentError(
            f"{type(op).__name__} is linear over the reals only and has no complex matrix; apply it to vectors instead"
        )
    dtype = torch_dtype(op.dtype) if dtype is None else dtype
    if op._real_domain and dtype.is_complex:
        dtype = real_of(dtype)
    device = device_of(op) if device is None else device
    m, n = op.shape
    step = max(1, _CHUNK // max(m, n))
    rows = []
    for start in range(0, n, step):
        stop = min(n, start + step)
        units = torch.zeros(stop - start, n, dtype=dtype, device=device)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1
        rows.append(op._call(units.reshape(-1, *op.dims), False).reshape(stop - start, m))
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
    dtype, device = torch_dtype(op.dtype), device_of(op)
    neval = max(3, n // 10) if neval is None else neval
    if neval < (3 if method == "hutch++" else 1):
        raise ArgumentError(
            f"trace: neval must be at least {3 if method == 'hutch++' else 1} for {method}; got {neval}"
        )
    generator = torch.Generator().manual_seed(seed)

    def signs(k: int) -> Tensor:
        return (torch.randint(0, 2, (k, n), generator=generator) * 2 - 1).to(device=device, dtype=dtype)

    def apply(rows: Tensor) -> Tensor:
        return op._call(rows.reshape(-1, *op.dims), False).reshape(-1, n)

    if method == "hutchinson":
        z = signs(neval)
        return (z * apply(z)).sum() / neval
    k = neval // 3
    q = torch.linalg.qr(apply(signs(k)).detach().T)[0].T  # rows: a basis of the dominant range
    z = signs(k)
    z = z - (z @ q.conj().T) @ q
    return (q.conj() * apply(q)).sum() + (z.conj() * apply(z)).sum() / k
