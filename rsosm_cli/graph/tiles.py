"""Which tiles a box meets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph.pairs import ragged

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Cells of the table over the tiles' extent, beyond which a sparse set of tiles is searched by a tree.
_MOST_CELLS = 4_000_000


@dataclass(frozen=True)
class TileIndex:
    """Finds tiles with ``bounds_m`` (T, 4). Where each is one cell between the lines of all their edges, as the tiles
    of a grid without overlap are, comparisons with the lines do; other tiles take a tree.
    """

    bounds_m: Floats
    xs: Floats  # sorted lines of the edges
    ys: Floats
    table: Ints | None  # (columns, rows) the tile of a cell, -1 for none

    @classmethod
    def of(cls, bounds_m: Floats) -> TileIndex:
        xs, ys = np.unique(bounds_m[:, [0, 2]]), np.unique(bounds_m[:, [1, 3]])
        column, row = np.searchsorted(xs, bounds_m[:, 0]), np.searchsorted(ys, bounds_m[:, 1])
        shape = max(len(xs) - 1, 0), max(len(ys) - 1, 0)
        cells = np.searchsorted(xs, bounds_m[:, 2]) == column + 1
        cells &= np.searchsorted(ys, bounds_m[:, 3]) == row + 1
        table = None
        if cells.all() and shape[0] * shape[1] <= _MOST_CELLS:
            table = np.full(shape, -1, np.int64)
            table[column, row] = np.arange(len(bounds_m))
            if (table >= 0).sum() < len(bounds_m):  # two tiles at one place
                table = None
        return cls(bounds_m, xs, ys, table)

    def meeting(self, boxes: Floats) -> tuple[Ints, Ints]:
        """Return (box, tile) of all pairs that share a point, edges included; ``boxes`` (N, 4), by box.

        Boxes of NaN meet none.
        """
        if self.table is None:
            box, tile = shapely.STRtree(shapely.box(*self.bounds_m.T)).query(shapely.box(*boxes.T))
            return box, tile
        west, south, east, north = boxes.T
        first_x, first_y = np.searchsorted(self.xs[1:], west), np.searchsorted(self.ys[1:], south)
        columns = np.maximum(np.searchsorted(self.xs[:-1], east, side="right") - first_x, 0)
        rows = np.maximum(np.searchsorted(self.ys[:-1], north, side="right") - first_y, 0)
        # Column by column of each box, then row by row of each column.
        column = ragged(first_x, columns)
        box = np.repeat(np.arange(len(boxes)), columns)
        cells = rows[box]
        row = ragged(first_y[box], cells)
        box, column = np.repeat(box, cells), np.repeat(column, cells)
        tile = self.table[column, row]
        there = tile >= 0
        return box[there], tile[there]
