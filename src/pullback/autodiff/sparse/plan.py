"""A pattern with its colours, and how the entries are read from the products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.autodiff.sparse.colouring import colour_columns, colour_symmetric, read_directly, transpose
from pullback.autodiff.sparse.pattern import SparsityPattern, as_pattern, csr
from pullback.autodiff.sparse.sets import Ints, Sets
from pullback.core.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class SparsePlan:
    """What can be used again for other x: a pattern and its colours. Made by `SparsePlan.jacobian` and `.hessian`.

    Attributes:
        pattern: the SparsityPattern.
        mode: "forward" (products with columns), "reverse" (with rows), or "symmetric" (with columns of a Hessian).
        colours: (n,) or, for "reverse", (m,): the group of every column or row; -1 for those without entries.
    """

    pattern: SparsityPattern
    mode: str
    colours: Ints = field(repr=False)
    places: Tensor = field(repr=False)  # for every entry, where it lies in the flattened products
    csr: Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return self.pattern.shape

    @property
    def n_colours(self) -> int:
        """The number of products that one evaluation takes."""
        return int(self.colours.max(initial=-1)) + 1

    @classmethod
    def jacobian(cls, pattern: Any, mode: str | None = None) -> SparsePlan:
        """Colour a Jacobian's pattern.

        Args:
            pattern: (m, n): a SparsityPattern, a matrix whose entries count if they are not zero (dense, sparse tensor,
                SciPy), or a LinearOperator, which is probed.
            mode: "forward", "reverse", or None: what takes fewer products.
        """
        if mode not in (None, "forward", "reverse"):
            raise ArgumentError(f'mode must be "forward", "reverse" or None; got {mode!r}')
        found = as_pattern(pattern, None)
        sets = found.sets
        flipped = transpose(sets)
        columns = colour_columns(sets) if mode != "reverse" else None
        if columns is not None:
            # As many row colours are needed as the fullest column has entries: that may decide already.
            n_colours = columns.max(initial=-1) + 1
            if mode == "forward" or n_colours <= flipped.counts.max(initial=0):
                return _made(found, "forward", columns)
        rows = colour_columns(flipped)
        if columns is not None and columns.max(initial=-1) <= rows.max(initial=-1):
            return _made(found, "forward", columns)
        return _made(found, "reverse", rows)

    @classmethod
    def hessian(cls, pattern: Any) -> SparsePlan:
        """Colour a Hessian's pattern, (n, n) in a form as for `jacobian`; its other triangle is added."""
        found = as_pattern(pattern, None)
        if found.shape[0] != found.shape[1]:
            raise ShapeError(f"pattern: a Hessian's pattern must be square; got {found.shape}")
        sets = found.sets.union(transpose(found.sets))
        found = SparsityPattern(sets, found.dense_operations, found.branches)
        return _made(found, "symmetric", colour_symmetric(sets))

    def seeds(self, like: Tensor) -> Tensor:
        """(n_colours, *like.shape): the sum of the unit vectors of every colour."""
        seeds = torch.zeros(self.n_colours, len(self.colours), dtype=like.dtype, device=like.device)
        used = torch.from_numpy(np.flatnonzero(self.colours >= 0))
        seeds[torch.from_numpy(self.colours)[used], used] = 1
        return seeds.reshape(self.n_colours, *like.shape)

    def read(self, products: Tensor) -> Tensor:
        """The matrix from its products (n_colours, m), or (n_colours, n) with rows, as a CSR tensor."""
        device = products.device
        values = products.reshape(-1)[self.places.to(device)]
        pointers, columns = self.csr.crow_indices().to(device), self.csr.col_indices().to(device)
        return csr(pointers, columns, values, self.shape)


def _made(pattern: SparsityPattern, mode: str, colours: Ints) -> SparsePlan:
    return SparsePlan(
        pattern, mode, colours, torch.from_numpy(_places(pattern.sets, mode, colours)), pattern.to_sparse_csr()
    )


def _places(sets: Sets, mode: str, colours: Ints) -> Ints:
    """Entry (i, j) is product[colour of j, i] or product[colour of i, j]; in a Hessian where it stands alone."""
    rows, columns = sets.rows, sets.columns
    by_column = colours[columns] * len(sets) + rows if mode != "reverse" else np.zeros(0, np.int64)
    by_row = colours[rows] * sets.n + columns if mode != "forward" else np.zeros(0, np.int64)
    if mode != "symmetric":
        return by_column if mode == "forward" else by_row
    return np.where(read_directly(sets, colours), by_column, by_row)
