"""Colours for rows or columns, so that a few products with the matrix tell every entry of a known pattern.

Columns that share no row may be added up and still be read apart. A colouring puts every column into a group of such
columns; the number of groups is the number of products. For a symmetric matrix an entry may be read from either side
(star colouring), which needs fewer groups. The best colouring is NP-hard; these are heuristics, and each result is
tried in this order: every p-th column together (best for bands, one vectorised check for each p), greedy in natural
order, greedy with the fullest columns first. Groups taken are kept as the bits of one Python integer for each row.

Source: Curtis, Powell, Reid 1974 (columns); Coleman, More 1984 (symmetric); Gebremedhin, Manne, Pothen 2005,
doi:10.1137/S0036144504444711 (star colouring and direct recovery).
"""

from __future__ import annotations

import numpy as np

from pullback.autodiff.sparse.sets import Ints, Sets, from_pairs

_PERIODS = 8  # how many periods p above the lower bound are tried before greedy colouring


def transpose(pattern: Sets) -> Sets:
    """The pattern of the transposed matrix."""
    return from_pairs(pattern.columns, pattern.rows, pattern.n, len(pattern))


def colour_columns(pattern: Sets) -> Ints:
    """A colour for every column, such that columns of one colour share no row; -1 for a column without entries.

    Cost: O(entries) for each of the orders tried.
    """
    by_column = transpose(pattern)
    used = by_column.counts > 0
    bound = int(pattern.counts.max(initial=0))
    candidates = []
    for period in range(max(bound, 1), min(bound + _PERIODS, pattern.n) + 1):
        colours = np.where(used, np.arange(pattern.n) % period, -1)
        if len(np.unique(pattern.rows * period + colours[pattern.columns])) == len(pattern.columns):
            candidates.append(colours)
            break
    if not candidates or candidates[0].max(initial=-1) + 1 > bound:
        for order in _orders(by_column.counts):
            candidates.append(_greedy(pattern, by_column, order))
            if candidates[-1].max(initial=-1) + 1 == bound:
                break
    return min(candidates, key=lambda c: int(c.max(initial=-1)))


def colour_symmetric(pattern: Sets) -> Ints:
    """A colour for every column of a symmetric pattern, such that each entry can be read from one side or the other.

    -1 for a column without entries. Does not verify that the pattern is symmetric.
    """
    used = pattern.counts > 0
    candidates = []
    for period in range(1, min(_PERIODS, pattern.n) + 1):
        colours = np.where(used, np.arange(pattern.n) % period, -1)
        if readable(pattern, colours).all():
            candidates.append(colours)
            break
    if not candidates or candidates[0].max(initial=-1) >= 3:
        candidates += [_star(pattern, order) for order in _orders(pattern.counts)]
    return min(candidates, key=lambda c: int(c.max(initial=-1)))


def readable(pattern: Sets, colours: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For every entry (i, j) of a symmetric pattern: can it be read from the row i, or from the row j, of the products?

    Row i of the product with colour c is the sum of the entries (i, k) whose column k has colour c.
    """
    alone = read_directly(pattern, colours)
    # Entries of a symmetric pattern sorted by (column, row) are those of the transpose sorted by (row, column).
    flipped = np.lexsort((pattern.rows, pattern.columns))
    return alone | alone[flipped]


def read_directly(pattern: Sets, colours: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For every entry (i, j): is j the only column of its colour that row i has?"""
    n_colours = int(colours.max(initial=-1)) + 1
    keys = pattern.rows * max(n_colours, 1) + colours[pattern.columns]
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] == 1)


def _orders(counts: Ints) -> list[Ints]:
    natural = np.flatnonzero(counts)
    fullest = natural[np.argsort(-counts[natural], kind="stable")]
    return [natural] if np.array_equal(natural, fullest) else [natural, fullest]


def _greedy(pattern: Sets, by_column: Sets, order: Ints) -> Ints:
    """The smallest colour that no row of the column has yet, column by column."""
    taken = [0] * len(pattern)
    pointers, rows = by_column.pointers.tolist(), by_column.columns.tolist()
    colours = np.full(pattern.n, -1)
    for j in order.tolist():
        mine = rows[pointers[j] : pointers[j + 1]]
        forbidden = 0
        for i in mine:
            forbidden |= taken[i]
        bit = ~forbidden & (forbidden + 1)
        for i in mine:
            taken[i] |= bit
        colours[j] = bit.bit_length() - 1
    return colours


def _star(pattern: Sets, order: Ints) -> Ints:
    """Greedy star colouring: neighbours differ, and no path of four vertices has only two colours.

    once[v], twice[v]: colours that at least one, at least two neighbours of v have. hub[w]: colours of those neighbours
    of w that have two neighbours coloured as w.
    """
    n = pattern.n
    pointers, columns = pattern.pointers.tolist(), pattern.columns.tolist()
    once, twice, hub = [0] * n, [0] * n, [0] * n
    bits = [0] * n
    colours = np.full(n, -1)
    for v in order.tolist():
        around = [w for w in columns[pointers[v] : pointers[v + 1]] if w != v]
        forbidden = once[v]
        for w in around:
            if bits[w]:
                forbidden |= hub[w]  # v - w - x - y: x, of the colour of v, has a second neighbour coloured as w
                if twice[v] & bits[w]:
                    forbidden |= once[w]  # u - v - w - x: u and w have one colour, so x may not have that of v
        bit = ~forbidden & (forbidden + 1)
        bits[v] = bit
        colours[v] = bit.bit_length() - 1
        for w in around:
            if bits[w] and twice[v] & bits[w]:
                hub[w] |= bit  # v has two neighbours coloured as w
            if once[w] & bit:
                if bits[w] and not twice[w] & bit:
                    for z in columns[pointers[w] : pointers[w + 1]]:
                        if z != w and bits[z] == bit:
                            hub[z] |= bits[w]
                elif bits[w]:
                    hub[v] |= bits[w]
                twice[w] |= bit
            once[w] |= bit
    return colours
