"""Where the windows of a map lie: overlapping squares on the lattice, in strips that are finished one by one.

The area is cut into column blocks (so that buffers stay small in a wide city), each block into strips from the north
to the south. A strip is the unit that is kept: what an interruption leaves finished is never computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import UsageError
from rsosm_cli.geometry import PixelBounds

# Height of a strip: two rows of blocks of the parts, a few rows of windows.
STRIP_PX = 512
# Width of a column block: at 224 px a window and half overlap, fewer than 1 % of the windows are computed twice.
BLOCK_PX = 16384


@dataclass(frozen=True)
class Strip:
    """A strip of the output, of one column block."""

    index: int
    block: int
    bounds_px: PixelBounds

    @property
    def name(self) -> str:
        return f"b{self.block:03d}-s{self.index:05d}"


@dataclass(frozen=True)
class WindowPlan:
    """Windows of ``tile_px`` every ``step_px`` over ``area``; both are multiples of ``cell_px``, the head's stride.

    Window (i, j) starts at column ``origin[0] + i * step_px`` and row ``origin[1] + j * step_px``. The origin is that
    of the lattice, so a place's box does not move the windows.
    """

    area: PixelBounds
    tile_px: int
    step_px: int
    cell_px: int
    origin: tuple[int, int] = (0, 0)
    strip_px: int = STRIP_PX
    block_px: int = BLOCK_PX

    @classmethod
    def of(
        cls, place_px: PixelBounds, *, tile_px: int, overlap: float, cell_px: int, whole_steps: bool = False,
        origin: tuple[int, int] = (0, 0), strip_px: int = STRIP_PX, block_px: int = BLOCK_PX,
    ) -> WindowPlan:  # fmt: skip
        """Return the windows for ``place_px`` where the next window covers at least the share ``overlap`` again.

        ``whole_steps``: a window is a whole number of steps wide (and a cell of the output is a step): what
        regression needs, where a window's value is shared out over its cells. Raises :class:`UsageError`.
        """
        if tile_px % cell_px:
            raise UsageError(f"A window of {tile_px} px is no multiple of the head's stride, {cell_px} px.")
        wanted = (1.0 - overlap) * tile_px
        if whole_steps:
            parts = next(n for n in range(1, tile_px + 1) if tile_px % n == 0 and tile_px / n <= wanted + 1e-9)
            step_px = cell_px = tile_px // parts
        else:
            step_px = max(cell_px, math.floor(wanted / cell_px + 1e-9) * cell_px)
        return cls(
            _snapped(place_px, cell_px, origin), tile_px, step_px, cell_px, origin,
            math.ceil(strip_px / cell_px) * cell_px, math.ceil(block_px / cell_px) * cell_px,
        )  # fmt: skip

    def strips(self) -> Iterator[Strip]:
        """Yield the strips: block by block from the west, each from the north to the south."""
        a = self.area
        for block, col in enumerate(range(a.col_min, a.col_max, self.block_px)):
            for index, row in enumerate(range(a.row_min, a.row_max, self.strip_px)):
                box = PixelBounds(col, row, col + self.block_px, row + self.strip_px)
                yield Strip(index, block, box.intersection(a))

    def rows_of(self, strip: Strip) -> range:
        """Return the rows of windows that a strip needs, those that only its upsampling touches included."""
        box = strip.bounds_px.padded(self.cell_px).intersection(self.area)
        return self._touching(box.row_min, box.row_max, self.origin[1])

    def columns_of(self, strip: Strip) -> range:
        """Return the columns of windows that a strip needs."""
        box = strip.bounds_px.padded(self.cell_px).intersection(self.area)
        return self._touching(box.col_min, box.col_max, self.origin[0])

    def _touching(self, low: int, high: int, origin: int) -> range:
        first = (low - origin - self.tile_px) // self.step_px + 1
        last = -((origin - high) // self.step_px)
        return range(first, last)

    def starts(self, row: int, columns: range) -> NDArray[np.int64]:
        """Return (W, 2) first column and row, in pixels, of the windows of one row."""
        cols = self.origin[0] + np.arange(columns.start, columns.stop, dtype=np.int64) * self.step_px
        return np.stack([cols, np.full_like(cols, self.origin[1] + row * self.step_px)], axis=1)

    def weight(self) -> NDArray[np.float32]:
        """Return (n, n) float32 weights of a window's cells: a raised cosine, never 0.

        At half overlap the raised cosines of neighbours add up to a constant; at others the sum is divided out. A
        window's border, where the model sees least context, weighs least.
        """
        n = self.tile_px // self.cell_px
        line = np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2
        return np.outer(line, line).astype(np.float32)


def _snapped(box: PixelBounds, cell: int, origin: tuple[int, int]) -> PixelBounds:
    x, y = origin
    return PixelBounds(
        (box.col_min - x) // cell * cell + x, (box.row_min - y) // cell * cell + y,
        -((x - box.col_max) // cell) * cell + x, -((y - box.row_max) // cell) * cell + y,
    )  # fmt: skip
