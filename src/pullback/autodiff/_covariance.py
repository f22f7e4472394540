"""The covariance of the input of a function, in whichever form it was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pullback.core import autograd
from pullback.core.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from pullback.core.operator import LinearOperator, OperatorLike
from pullback.linops import Diagonal, MatrixMult


@dataclass(frozen=True)
class Covariance:
    """S of shape (n, n); one of the four is set.

    Attributes:
        variances: S = diag(variances), of shape (n,).
        factor: S = L L^T, L of shape (n, r).
        matrix: S.
        operator: v -> S v.
    """

    n: int
    variances: Tensor | None = None
    factor: Tensor | None = None
    matrix: Tensor | None = None
    operator: LinearOperator | None = None

    @property
    def rank(self) -> int:
        """How many columns `pairs` gives."""
        return self.n if self.factor is None else self.factor.shape[1]

    def times(self, rows: Tensor) -> Tensor:
        """S v for every row v."""
        if self.variances is not None:
            return rows * self.variances
        if self.factor is not None:
            return (rows @ self.factor) @ self.factor.mT
        if self.matrix is not None:
            return rows @ self.matrix
        assert self.operator is not None, "a covariance without a form; please report"
        return self.operator._call(rows.reshape(-1, *self.operator.dims), False).reshape(rows.shape)

    def before(self, columns: Tensor) -> Tensor:
        """S A for a matrix A of shape (n, m)."""
        if self.variances is not None:
            return self.variances[:, None] * columns
        if self.matrix is not None:
            return self.matrix @ columns
        return self.times(columns.mT).mT

    def pairs(self, like: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Rows (u_i, v_i) with S = sum_i u_i v_i^T, some at a time; None where v is u."""
        for start in range(0, self.rank, chunk):
            stop = min(start + chunk, self.rank)
            if self.factor is not None:
                yield self.factor[:, start:stop].mT, None
                continue
            units = torch.zeros(stop - start, self.n, dtype=like.dtype, device=like.device)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            yield units, self.times(units)

    def root(self) -> Tensor:
        """L with L L^T = S, for samples: of shape (n, r), or (n,) if S is diagonal.

        Raises: ArgumentError if S has a negative eigenvalue, or is an operator of more than 4096 inputs.
        """
        if self.variances is not None:
            return self.variances.sqrt()
        if self.factor is not None:
            return self.factor
        matrix = self.matrix
        if matrix is None:
            assert self.operator is not None, "a covariance without a form; please report"
            if self.n > 4096:
                raise ArgumentError(
                    f"check: samples need a factor of the covariance, and cov is an operator on {self.n} inputs; give "
                    f"factor=L with cov = L L^T"
                )
            matrix = self.operator.todense()
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        if float(values.min()) < -1e3 * torch.finfo(values.dtype).eps * float(values.abs().max()) * self.n:
            raise ArgumentError(
                f"cov must be positive semidefinite; its smallest eigenvalue is {float(values.min()):.3g}"
            )
        return vectors * values.clamp(min=0).sqrt()

    def as_operator(self) -> LinearOperator:
        """S as an operator."""
        if self.variances is not None:
            return Diagonal(self.variances)
        if self.factor is not None:
            L = MatrixMult(self.factor)
            return L @ L.H
        if self.matrix is not None:
            return MatrixMult(self.matrix)
        assert self.operator is not None, "a covariance without a form; please report"
        return self.operator


def covariance(x: Any, cov: Any, std: Any, factor: Any) -> Covariance:
    """The covariance of the tree x from the one argument that is given.

    Raises: ArgumentError, ShapeError, DtypeError, DeviceError.
    """
    given = [name for name, value in (("cov", cov), ("std", std), ("factor", factor)) if value is not None]
    if len(given) != 1:
        raise ArgumentError(
            "propagate: give one of cov (variances or a covariance), std (standard deviations) and factor (L with "
            f"cov = L L^T); got {' and '.join(given) or 'none'}"
        )
    leaves, spec = tree_flatten(x)
    n = sum(t.numel() for t in leaves)
    like = leaves[0]
    if factor is not None:
        return _from_factor(leaves, n, factor)
    name, value = ("cov", cov) if std is None else ("std", std)
    if isinstance(value, OperatorLike):
        value = value.operator()
    if isinstance(value, LinearOperator):
        if name == "std" or value.shape != (n, n) or value._real_range != value._real_domain:
            raise ShapeError(f"propagate: {name} must be an operator on the {n} inputs, given as cov; got {value}")
        return Covariance(n, operator=value)
    if not isinstance(x, Tensor) and not isinstance(value, (Tensor, int, float)):
        parts, value_spec = tree_flatten(value)
        if value_spec != spec:
            raise ArgumentError(
                f"propagate: {name} must be a number, a tensor, or have the structure of x, {spec}; got {value_spec}"
            )
        blocks = [_one(name, v, t, tuple(t.shape)) for v, t in zip(parts, leaves, strict=True)]
        if all(b.ndim == 1 for b in blocks):
            return Covariance(n, variances=torch.cat(blocks))
        return Covariance(n, matrix=torch.block_diag(*(torch.diag(b) if b.ndim == 1 else b for b in blocks)))
    found = _one(name, value, like, tuple(x.shape) if isinstance(x, Tensor) else (n,))
    return Covariance(n, variances=found) if found.ndim == 1 else Covariance(n, matrix=found)


def _one(name: str, value: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The variances (n,) or the matrix (n, n) of one tensor of that shape."""
    n = math.prod(shape)
    what = "standard deviation" if name == "std" else "variance"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value < math.inf:
            raise ArgumentError(f"propagate: {name} is a {what} and must be finite and >= 0; got {value!r}")
        return x.new_full((n,), value * value if name == "std" else value)
    value = _as_real(name, value, x)
    if value.ndim == 0 or tuple(value.shape) == shape:
        flat = value.expand(n) if value.ndim == 0 else value.reshape(n)
        _require(flat, lambda v: bool((v >= 0).all()), f"{name} holds {what}s, which must be >= 0 (and not NaN)")
        return flat * flat if name == "std" else flat
    if name == "cov" and tuple(value.shape) in ((n, n), (*shape, *shape)):
        matrix = value.reshape(n, n)
        _require(matrix, _is_symmetric, "a matrix cov must be symmetric and finite")
        _require(
            matrix,
            _is_plausible,
            "cov must be positive semidefinite: variances S_ii >= 0 and correlations |S_ij| <= sqrt(S_ii S_jj)",
        )
        return matrix
    forms = f"a number, or of shape {shape} ({what}s)" + (f" or ({n}, {n})" if name == "cov" else "")
    extra = "" if name == "cov" else "; for correlated inputs use cov or factor"
    raise ShapeError(f"propagate: {name} must be {forms}; got shape {tuple(value.shape)}{extra}")


def _from_factor(leaves: list[Tensor], n: int, factor: Any) -> Covariance:
    L = _as_real("factor", factor, leaves[0])
    shape = tuple(leaves[0].shape) if len(leaves) == 1 else (n,)
    if L.ndim < 1 or tuple(L.shape[:-1]) not in ((n,), shape) or L.shape[-1] == 0:
        raise ShapeError(
            f"propagate: factor must have shape ({n}, r), cov being L L^T; got {tuple(L.shape)}; for uncorrelated "
            f"inputs use std"
        )
    _require(L, lambda v: bool(np.isfinite(v).all()), "factor must be finite")
    return Covariance(n, factor=L.reshape(n, -1))


def _as_real(name: str, value: Any, x: Tensor) -> Tensor:
    try:
        value = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"propagate: {name} must be a number, a tensor{' or a LinearOperator' if name == 'cov' else ''}; got "
            f"{type(value).__name__}"
        ) from None
    if value.is_complex() or value.dtype == torch.bool:
        raise DtypeError(f"propagate: {name} must be real; got {value.dtype}")
    if value.device != x.device and value.ndim:
        raise DeviceError(f"propagate: {name} lies on {value.device}, x on {x.device}; move one with .to()")
    return value.to(device=x.device, dtype=x.dtype)


def _require(value: Tensor, test: Callable[[Any], bool], text: str) -> None:
    value = value.detach()
    if not torch.compiler.is_compiling() and autograd.is_eager(value) and not test(value.cpu().numpy()):
        raise ArgumentError(f"propagate: {text}")


def _is_symmetric(S: Any) -> bool:
    return bool(np.abs(S - S.T).max() <= 1e3 * np.finfo(S.dtype).eps * np.abs(S).max() < math.inf)


def _is_plausible(S: Any) -> bool:
    d = S.diagonal()
    return bool((d >= 0).all() and (np.outer(d, d) * (1 + 1e3 * np.finfo(S.dtype).eps) >= S * S).all())
