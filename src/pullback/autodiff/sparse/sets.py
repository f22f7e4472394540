"""Families of index sets: for every element of a tensor, the inputs that it depends on.

A family is stored as compressed rows of sorted column numbers, in NumPy. All operations are made of sorting and
repeating, without a loop over elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pullback.core.errors import ArgumentError

_LARGEST = 200_000_000
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sets:
    """The sets S_0 ... S_{N-1} of numbers below `n`: S_i = columns[pointers[i]:pointers[i+1]], increasing."""

    pointers: Ints
    columns: Ints
    n: int

    def __len__(self) -> int:
        return len(self.pointers) - 1

    @property
    def counts(self) -> Ints:
        """The size of every set."""
        return np.diff(self.pointers)

    @property
    def rows(self) -> Ints:
        """For every element of `columns`, the set that it is in."""
        return np.repeat(np.arange(len(self)), self.counts)

    def take(self, index: Ints) -> Sets:
        """The family S_{index[k]}; a negative index stands for the empty set."""
        if len(index) == len(self) and np.array_equal(index, np.arange(len(self))):
            return self
        starts = self.pointers[index]
        counts = np.where(index < 0, 0, self.pointers[index + 1] - starts)
        pointers = np.concatenate([[0], np.cumsum(counts)])
        if pointers[-1] > _LARGEST:
            raise ArgumentError(
                f"the sparsity pattern of f, or of a step of f, has {pointers[-1]:,} entries, more than {_LARGEST:,}: "
                f"give a pattern= by hand if the result is sparse; else use a matrix-free Jacobian"
            )
        position = np.arange(pointers[-1]) + np.repeat(starts - pointers[:-1], counts)
        return Sets(pointers, self.columns[position], self.n)

    def put(self, index: Ints, other: Sets) -> Sets:
        """The same family with S_{index[k]} replaced by the k-th set of `other`."""
        source = np.arange(len(self))
        source[index] = np.arange(len(self), len(self) + len(index))
        return concatenate([self, other]).take(source)

    def join(self, label: Ints, n_labels: int) -> Sets:
        """Set l is the union of the S_i with label[i] = l."""
        return from_pairs(np.repeat(label, self.counts), self.columns, n_labels, self.n)

    def union(self, other: Sets) -> Sets:
        """S_i and the i-th set of `other` together."""
        if other is self or not len(other.columns):
            return self
        if not len(self.columns):
            return other
        rows = np.concatenate([self.rows, other.rows])
        return from_pairs(rows, np.concatenate([self.columns, other.columns]), len(self), self.n)

    def gather(self, rows: Ints, members: Ints, n_rows: int) -> Sets:
        """Set r is the union of the S_members[k] with rows[k] = r: a Boolean matrix product."""
        return self.take(members).join(rows, n_rows)


def from_pairs(rows: Ints, columns: Ints, n_rows: int, n: int) -> Sets:
    """The family with columns[k] in set rows[k]; pairs may come in any order and more than once."""
    keys = rows.astype(np.int64) * max(n, 1) + columns
    if len(keys) > 1 and not np.all(keys[1:] > keys[:-1]):
        keys = np.unique(keys)
    rows, columns = np.divmod(keys, max(n, 1))
    pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))]).astype(np.int64)
    return Sets(pointers, columns, n)


def empty(n_rows: int, n: int) -> Sets:
    """`n_rows` empty sets."""
    return Sets(np.zeros(n_rows + 1, np.int64), np.zeros(0, np.int64), n)


def singletons(n: int) -> Sets:
    """S_i = {i}."""
    return Sets(np.arange(n + 1), np.arange(n), n)


def concatenate(parts: list[Sets]) -> Sets:
    """The families one after the other."""
    counts = np.concatenate([p.counts for p in parts])
    pointers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Sets(pointers, np.concatenate([p.columns for p in parts]), parts[0].n)
