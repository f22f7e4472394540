"""The pattern of a linear map by a few products, without its columns one by one.

Columns are thrown into buckets at random. Two products with a bucket, one of them with every column weighted by its
number, tell for a row with one entry in the bucket which column it is, as a quotient. A third product with random
weights rejects rows with several. What is known is subtracted and the rest is thrown again, until a random product
agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pullback.autodiff.sparse.sets import Ints, Sets, from_pairs
from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator

Floats = np.ndarray[Any, np.dtype[np.float64]]
_TINY = 1e-11  # what is left of a row, relative to the row, counts as rounding
_ROUNDS = 24


def probe(apply: Callable[[Floats], Floats], m: int, n: int, seed: int = 0) -> Sets:
    """The places of the entries of A that are not zero, where apply(V) = V A^T for V of shape (k, n).

    Entries below about 1e-11 of the sum of the others in their row are lost. Cost: about 10 products for each entry of
    the fullest row, at most n.
    """
    generator = np.random.default_rng(seed)
    check = generator.uniform(0.5, 1.5, n) * generator.choice([-1.0, 1.0], n)
    target = apply(check[None])[0]
    rows, columns, values = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    buckets = 4
    for _ in range(_ROUNDS):
        known = np.bincount(rows, values * check[columns], m)
        scale = np.bincount(rows, np.abs(values * check[columns]), m) + np.abs(target)
        left = np.abs(target - known) > _TINY * scale
        if not left.any():
            return from_pairs(rows, columns, m, n)
        if 3 * buckets >= n:
            break
        bucket = generator.integers(0, buckets, n)
        weights = generator.uniform(0.5, 1.5, (2, n))
        new_rows, new_columns, new_values = [], [], []
        for k in range(buckets):
            inside = bucket == k
            tests = np.stack([weights[0], weights[0] * (1 + np.arange(n)), weights[1]]) * inside
            out = apply(tests)
            for line, test in zip(out, tests, strict=True):
                line -= np.bincount(rows, values * test[columns], m)
            one, number, other = out
            held = np.bincount(rows, np.abs(values) * inside[columns], m) + np.abs(one)
            alive = np.abs(one) > _TINY * np.maximum(held, np.abs(target))
            safe = np.where(alive, one, 1.0)
            column = np.clip(np.nan_to_num(np.rint(number / safe)) - 1, 0, n - 1).astype(np.int64)
            single = alive & (np.abs(number / safe - column - 1) < 1e-3) & inside[column]
            single &= np.abs(other / safe - weights[1, column] / weights[0, column]) < 1e-5
            new_rows.append(np.flatnonzero(single))
            new_columns.append(column[single])
            new_values.append((one / weights[0, column])[single])
        found = sum(map(len, new_rows))
        rows, columns, values = _merge(
            np.concatenate([rows, *new_rows]), np.concatenate([columns, *new_columns]),
            np.concatenate([values, *new_values]), n,
        )  # fmt: skip
        if found < left.sum():
            buckets *= 2
    return _column_by_column(apply, m, n)


def _merge(rows: Ints, columns: Ints, values: Floats, n: int) -> tuple[Ints, Ints, Floats]:
    """Add the values of entries that were found twice (a rest was left of them)."""
    keys, inverse = np.unique(rows * n + columns, return_inverse=True)
    return keys // n, keys % n, np.bincount(inverse, values, len(keys)).astype(np.float64)


def _column_by_column(apply: Callable[[Floats], Floats], m: int, n: int) -> Sets:
    rows, columns = [], []
    for start in range(0, n, 256):
        block = np.eye(min(256, n - start), n, start)
        member, row = np.nonzero(apply(block))
        rows.append(row)
        columns.append(member + start)
    return from_pairs(np.concatenate(rows), np.concatenate(columns), m, n)


def operator_pattern(op: LinearOperator) -> Sets:
    """The pattern of a linear operator, by probing: it is the same at every x."""
    if op._real_range != op._real_domain:
        raise ArgumentError(
            f"sparsity_pattern: {type(op).__name__} maps between real and complex tensors; give the pattern as a matrix"
        )
    m, n = op.shape

    def apply(v: Floats) -> Floats:
        with torch.no_grad():
            y = op._run(torch.from_numpy(v).reshape(-1, *op.dims)).reshape(-1, m)
        y = y.real + torch.pi * y.imag if y.is_complex() else y
        return np.array(y.detach().numpy())

    return probe(apply, m, n)
