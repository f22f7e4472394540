"""Sparsity patterns: given as any kind of matrix, read from a function's operations, or probed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.autodiff.sparse.probe import operator_pattern, probe
from pullback.autodiff.sparse.sets import Sets, from_pairs
from pullback.autodiff.sparse.trace import trace_pattern
from pullback.core import autograd
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.operator import LinearOperator, OperatorLike


@dataclass(frozen=True)
class SparsityPattern:
    """Where a Jacobian or Hessian can have entries. Made by `sparsity_pattern`.

    Attributes:
        shape: (m, n).
        nnz: the number of places.
        dense_operations: operations without a rule, whose results were taken to depend on all of their operands.
        branches: operations that read numbers computed from x: the pattern holds for x that take the same branches.
    """

    sets: Sets = field(repr=False)
    dense_operations: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.sets), self.sets.n

    @property
    def nnz(self) -> int:
        """The number of places."""
        return len(self.sets.columns)

    def to_sparse_csr(self) -> Tensor:
        """The pattern as a Boolean CSR tensor."""
        pointers, columns = torch.from_numpy(self.sets.pointers), torch.from_numpy(self.sets.columns)
        values = torch.ones(self.nnz, dtype=torch.bool)
        return csr(pointers, columns, values, self.shape)

    def todense(self) -> Tensor:
        """The pattern as a Boolean matrix."""
        dense = torch.zeros(self.shape, dtype=torch.bool)
        dense[torch.from_numpy(self.sets.rows), torch.from_numpy(self.sets.columns)] = True
        return dense

    def __repr__(self) -> str:
        m, n = self.shape
        text = f"<SparsityPattern {m}x{n}, {self.nnz} entries"
        if self.dense_operations:
            text += f"; dense in what they depend on: {', '.join(self.dense_operations)}"
        if self.branches:
            text += f"; depends on x through {', '.join(self.branches)}"
        return text + ">"


def sparsity_pattern(
    f: Callable[[Tensor], Tensor] | LinearOperator, x: Tensor, *, hessian: bool = False, method: str = "trace"
) -> SparsityPattern:
    """The places (i, j) where df_i / dx_j can differ from zero, or with `hessian` d^2 f / dx_i dx_j.

    Args:
        f: maps a real tensor to a tensor (to one number, if `hessian`).
        x: a point; with method "trace" its shape, dtype and the branches that f takes there are what counts.
        hessian: the pattern of the second derivative.
        method: "trace": f is run once, and index sets follow its operations. The pattern holds for every x. It can be
            too wide (an operation without a rule makes its results depend on all of its operands; see
            `dense_operations`; `x - x` counts as an entry) and too narrow only if f branches on values of x (`branches`
            lists where it read them) or leaves torch (NumPy, an extension); a wrapped operator of this library is
            probed. "probe": products with the Jacobian at x; entries that happen to be zero at this x are missed, so
            use it for linear maps or to see how wide a traced pattern is.

    Returns: a SparsityPattern, which `sparse_jacobian`, `sparse_hessian` and `SparsePlan` accept.

    Raises: ArgumentError, DtypeError, NotDifferentiableError (f does not return a tensor made from x).

    Cost: "trace": one run of f, and sorting the index sets at each operation. "probe": about 10 products for each entry
        of the fullest row, at most n.
    """
    check_input(f, x, "sparsity_pattern")
    if method not in ("trace", "probe"):
        raise ArgumentError(f'sparsity_pattern: method must be "trace" or "probe"; got {method!r}')
    if method == "probe":
        return SparsityPattern(_probed(_gradient(f, True) if hessian else f, x))
    sets, trace, y = trace_pattern(_gradient(f, False) if hessian else f, x, needs_grad=hessian)
    check_output(y, None)
    return SparsityPattern(sets, tuple(trace.dense), tuple(trace.branches))


def csr(pointers: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR tensor without its checks, and without the warning that torch gives in a process once."""
    _warned()
    return torch.sparse_csr_tensor(pointers, columns, values, shape, check_invariants=False)


@functools.cache
def _warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def as_pattern(pattern: Any, shape: tuple[int, int] | None) -> SparsityPattern:
    """A pattern given in any form; ArgumentError or ShapeError if it is none, or not of the shape expected."""
    if isinstance(pattern, OperatorLike):
        pattern = pattern.operator()
    if isinstance(pattern, SparsityPattern):
        found = pattern
    elif isinstance(pattern, LinearOperator):
        found = SparsityPattern(operator_pattern(pattern))
    else:
        found = SparsityPattern(_from_matrix(pattern))
    if shape is not None and found.shape != shape:
        raise ShapeError(f"pattern: expected shape {shape}, (numbers of f(x), numbers of x); got {found.shape}")
    return found


def _from_matrix(pattern: Any) -> Sets:
    if hasattr(pattern, "tocoo"):  # SciPy
        coo = pattern.tocoo()
        keep = coo.data != 0
        return from_pairs(coo.row[keep].astype(np.int64), coo.col[keep].astype(np.int64), *coo.shape)
    if isinstance(pattern, Tensor) and pattern.layout != torch.strided:
        coo = pattern.detach().cpu().to_sparse_coo()
        coo = (coo.to(torch.int8) if coo.dtype == torch.bool else coo).coalesce()
        (rows, columns), keep = coo.indices().numpy(), coo.values().numpy() != 0
        shape = tuple(coo.shape)
        return from_pairs(rows[keep], columns[keep], shape[0], shape[1])
    try:
        dense = pattern.detach().cpu() if isinstance(pattern, Tensor) else torch.as_tensor(pattern)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"pattern: expected a matrix (dense, sparse, SciPy), a LinearOperator, a SparsityPattern or a SparsePlan; "
            f"got {type(pattern).__name__}"
        ) from None
    if dense.ndim != 2:
        raise ShapeError(f"pattern: expected a matrix (numbers of f(x), numbers of x); got shape {tuple(dense.shape)}")
    rows, columns = (dense != 0).nonzero().T.numpy()
    return from_pairs(rows, columns, *dense.shape)


def _gradient(f: Callable[[Tensor], Tensor], create_graph: bool) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return gradient_of(f, leaf, create_graph)

    return gradient


def gradient_of(f: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool) -> Tensor:
    """The gradient of a scalar function at `x`, which requires grad; zeros if f is constant in it."""
    y = f(x)
    check_output(y, None)
    if y.numel() != 1 or y.is_complex():
        raise ShapeError(
            f"f must return one real number for a Hessian; got shape {tuple(y.shape)} {y.dtype}; for a vector use "
            f"sparse_jacobian"
        )
    if not y.requires_grad:
        raise NotDifferentiableError(
            "f(x) does not require grad although x does: was it computed under no_grad, detached, or without x?"
        )
    (g,) = torch.autograd.grad(y.reshape(()), x, create_graph=create_graph, materialize_grads=True)
    return g


def _probed(f: Callable[[Tensor], Tensor], x: Tensor) -> Sets:
    """By vector-Jacobian products with the transpose: rows and columns change places."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = f(leaf)
    check_output(y, None)
    if not y.requires_grad:
        return from_pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), y.numel(), x.numel())

    def apply(v: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        seeds = torch.from_numpy(v).to(y.dtype).reshape(-1, *y.shape)
        rows = [torch.autograd.grad(y, leaf, s, retain_graph=True, materialize_grads=True)[0] for s in seeds]
        return torch.stack(rows).reshape(len(rows), -1).double().numpy()

    flipped = probe(apply, x.numel(), y.numel())
    return from_pairs(flipped.columns, flipped.rows, y.numel(), x.numel())


def check_input(f: Any, x: Any, name: str) -> None:
    """Raise unless f can be called and x is a real tensor."""
    if not callable(f):
        raise ArgumentError(f"{name}: f must be a function of one tensor; got {type(f).__name__}")
    if autograd.transforms_active():
        raise ArgumentError(
            f"{name} cannot run inside a torch.func transform; the values of its result carry a graph if x requires "
            f"grad, so use torch.autograd.grad outside"
        )
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{name} cannot run under torch.inference_mode(), which has no gradients; use torch.no_grad()"
        )
    if not isinstance(x, Tensor):
        raise ArgumentError(
            f"{name}: x must be one tensor; got {type(x).__name__}; several inputs can be concatenated into one"
        )
    if not x.is_floating_point():
        fix = "write f of torch.view_as_real(x)" if x.is_complex() else "use x.double()"
        raise DtypeError(f"{name}: x must be a real floating point tensor; got {x.dtype}; {fix}")
    if x.layout != torch.strided:
        raise ArgumentError(f"{name}: x must be a dense tensor; got layout {x.layout}; use x.to_dense()")


def check_output(y: Any, m: int | None) -> None:
    """Raise unless y = f(x) is a real or complex tensor with m numbers."""
    if not isinstance(y, Tensor):
        raise ArgumentError(f"f must return one tensor; got {type(y).__name__}; concatenate what it returns, flattened")
    if not (y.is_floating_point() or y.is_complex()):
        raise NotDifferentiableError(f"f returns {y.dtype}, which has no derivative; return a floating point tensor")
    if m is not None and y.numel() != m:
        raise ShapeError(f"pattern: expected {y.numel()} rows, one for each number of f(x); got {m}")
