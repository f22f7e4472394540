"""Tiles: how many rows and columns a program of the grid holds at once, by how many warps.

Heuristics that were checked by counting registers and spills of compiled code, not by measuring time; `tune` in
`runtime/tuning.py` measures.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Tile(NamedTuple):
    """Rows and columns of a tile, warps that share it, and stages of the pipeline that loads columns."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3


FAMILIES = ("sm_90", "sm_80", "gfx")  # NVIDIA's from Hopper on, before, AMD's


def elementwise(live: int) -> Tile:
    """The tile of a kernel without products of matrices, that keeps `live` registers for each pair."""
    for rows, columns in ((64, 32), (32, 32), (32, 16)):
        if live * rows * columns // 128 <= 64:
            return Tile(rows, columns)
    return Tile(16, 16)


def products(data: str, wide: int, spare: bool, family: str) -> Tile:
    """The tile of a kernel with products of matrices, of which `wide` columns are summed; `spare`: and little else."""
    if data == "float64":
        return Tile(32, 16 if wide and family != "gfx" else 32, 4, 2)
    if data == "float32":
        if family == "sm_90" and spare:
            return Tile(128, 32, 4, 2)  # what is done for each column alone is shared by more rows
        return Tile(32 if wide and family == "sm_80" else 64, 32, 4, 2)
    if family == "gfx" or wide > 64:
        return Tile(64, 32, 4, 2 if family == "gfx" else 3)
    return Tile(128, 64, 8, 3)


def candidates(tile: Tile) -> list[Tile]:
    """What `tune` tries: the tile of the table first."""
    found = [tile]
    for rows, columns, warps in itertools.product((1, 2, 4), (1, 2), (4, 8)):
        other = Tile(max(tile.rows * rows // 2, 16), tile.columns * columns, warps, tile.stages)
        if other not in found and other.rows <= 128:
            found.append(other)
    return found


def smaller(tile: Tile) -> Tile | None:
    """What is tried where a device has too little shared memory; None if nothing is smaller."""
    if tile.stages > 1:
        return tile._replace(stages=1)
    if tile.columns > 16:
        return tile._replace(columns=tile.columns // 2)
    return tile._replace(rows=tile.rows // 2) if tile.rows > 16 else None
