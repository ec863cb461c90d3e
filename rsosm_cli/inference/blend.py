"""Blending what a head says of overlapping windows, at the head's stride, in the memory of one strip.

The weighted logits of the windows are added up on cells (the head's stride), divided by the summed weights once a
strip is complete, and only then brought to full resolution, as the model's own forward pass does with one window.
Class and argmax come last, once a pixel and not once a window: at full resolution the argmax alone would take longer
than a small model's forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from rsosm_cli.geometry import PixelBounds
from rsosm_cli.inference.windows import Strip, WindowPlan

# Columns brought to full resolution at a time: bounds the memory of the logits of a strip (512 rows x 2048 columns x
# 4 bytes = 4 MB a class).
CHUNK_PX = 2048


@dataclass(frozen=True)
class Cells:
    """Blended logits of a strip at the head's stride, with one cell of surroundings where there is any."""

    logits: Tensor  # (K, r, c) float32
    covered: Tensor  # (r, c) bool: some window said something
    valid: NDArray[np.bool_]  # (H, W) pixels of the strip with image
    bounds_px: PixelBounds  # of the strip
    around_px: PixelBounds  # of the cells
    cell_px: int


class Accumulator:
    """Sums of the strip at hand; what reaches into the next strip is kept when that one is opened."""

    def __init__(self, plan: WindowPlan, channels: int, device: torch.device) -> None:
        self.plan = plan
        self.channels = channels
        self.device = device
        self._weight = torch.from_numpy(plan.weight()).to(device)  # (n, n)
        self._strip: Strip | None = None
        self._extent = PixelBounds(0, 0, 0, 0)
        self._sums = torch.zeros(0)  # (K + 1, r, c): weighted logits, then the weights
        self._valid = np.zeros((0, 0), bool)  # (rows, columns) pixels of the extent

    def continues(self, strip: Strip) -> bool:
        """Return whether the open strip is the one above ``strip``: the windows they share need no second pass."""
        s = self._strip
        return s is not None and (s.block, s.index + 1) == (strip.block, strip.index)

    def open(self, strip: Strip) -> None:
        """Start a strip, carrying over what windows of the strip above have said of it."""
        plan, old, sums, valid = self.plan, self._extent, self._sums, self._valid
        box = strip.bounds_px.padded(plan.cell_px)
        # The last windows that touch the strip end at most a window below it.
        box = PixelBounds(box.col_min, box.row_min, box.col_max, box.row_max + plan.tile_px)
        self._extent = box = box.intersection(plan.area)
        rows, cols = box.height // plan.cell_px, box.width // plan.cell_px
        self._sums = torch.zeros(self.channels + 1, rows, cols, device=self.device)
        self._valid = np.zeros((box.height, box.width), bool)
        if self.continues(strip):
            shared = box.intersection(old)
            a, b = self._cells(shared, box), self._cells(shared, old)
            self._sums[:, a[0], a[1]] = sums[:, b[0], b[1]]
            self._valid[_pixels(shared, box)] = valid[_pixels(shared, old)]
        self._strip = strip

    def add_valid(self, bounds_px: PixelBounds, valid: NDArray[np.bool_]) -> None:
        """Mark pixels that have image: ``valid`` (H, W) over ``bounds_px``."""
        shared = bounds_px.intersection(self._extent)
        if not shared.empty:
            self._valid[_pixels(shared, self._extent)] |= valid[_pixels(shared, bounds_px)]

    def add(self, starts: NDArray[np.int64], logits: Tensor, trust: NDArray[np.float32]) -> None:
        """Add windows: first pixels ``starts`` (B, 2), ``logits`` (B, K, n, n), ``trust`` (B,) weight of each."""
        weight = self._weight * torch.from_numpy(trust).to(self.device)[:, None, None]  # (B, n, n)
        weighted = torch.cat([logits.float() * weight[:, None], weight[:, None]], dim=1)
        tile = self.plan.tile_px
        for (col, row), window in zip(starts.tolist(), weighted, strict=True):
            box = PixelBounds(col, row, col + tile, row + tile)
            shared = box.intersection(self._extent)
            if not shared.empty:
                a, b = self._cells(shared, self._extent), self._cells(shared, box)
                self._sums[:, a[0], a[1]] += window[:, b[0], b[1]]

    def close(self) -> Cells:
        """Return the blended cells of the open strip."""
        assert self._strip is not None
        strip = self._strip.bounds_px
        around = strip.padded(self.plan.cell_px).intersection(self.plan.area)
        rows, cols = self._cells(around, self._extent)
        sums = self._sums[:, rows, cols]
        covered = sums[-1] > 0
        logits = torch.where(covered, sums[:-1] / sums[-1].clamp_min(1e-12), 0.0)
        return Cells(logits, covered, self._valid[_pixels(strip, self._extent)], strip, around, self.plan.cell_px)

    def _cells(self, part: PixelBounds, whole: PixelBounds) -> tuple[slice, slice]:
        cell = self.plan.cell_px
        top, left = (part.row_min - whole.row_min) // cell, (part.col_min - whole.col_min) // cell
        return slice(top, top + part.height // cell), slice(left, left + part.width // cell)


def _pixels(part: PixelBounds, whole: PixelBounds) -> tuple[slice, slice]:
    top, left = part.row_min - whole.row_min, part.col_min - whole.col_min
    return slice(top, top + part.height), slice(left, left + part.width)


def chunks(box: PixelBounds, step_px: int) -> list[PixelBounds]:
    """Return ``box`` cut into columns of at most ``step_px``."""
    return [
        PixelBounds(col, box.row_min, min(col + step_px, box.col_max), box.row_max)
        for col in range(box.col_min, box.col_max, step_px)
    ]


def upsampled(cells: Cells, box: PixelBounds) -> Tensor:
    """Return (K, H, W) logits at full resolution over ``box``, a part of the strip that starts on a cell.

    Bilinear, as :class:`TaskModel` upsamples one window. Cells that no window covers are left out of the
    interpolation rather than taken for 0.
    """
    cell = cells.cell_px
    around = box.padded(cell).intersection(cells.around_px)
    top, left = ((around.row_min - cells.around_px.row_min) // cell, (around.col_min - cells.around_px.col_min) // cell)
    rows, cols = slice(top, top + -(-around.height // cell)), slice(left, left + -(-around.width // cell))
    logits, covered = cells.logits[:, rows, cols], cells.covered[rows, cols]
    if cell > 1:
        full = _bilinear(logits, cell)
        if not bool(covered.all()):
            full = full / _bilinear(covered.float()[None], cell).clamp_min(1e-6)
    else:
        full = logits
    inside = _pixels(box, around)
    return full[:, inside[0], inside[1]]


def _bilinear(values: Tensor, factor: int) -> Tensor:
    return functional.interpolate(values[None], scale_factor=factor, mode="bilinear", align_corners=False)[0]


def covered_pixels(cells: Cells, box: PixelBounds) -> NDArray[np.bool_]:
    """Return (H, W) bool over ``box``: the pixel's own cell is covered by a window."""
    cell, around = cells.cell_px, cells.around_px
    top, left = (box.row_min - around.row_min) // cell, (box.col_min - around.col_min) // cell
    mine = cells.covered[top : top + -(-box.height // cell), left : left + -(-box.width // cell)]
    full = mine.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return np.asarray(full[: box.height, : box.width].cpu())


def argmax(logits: Tensor) -> Tensor:
    """Return (H, W) uint8 index of the largest of (K, H, W); the first of equals.

    A running maximum over the few classes: torch's argmax over a leading axis is an order of magnitude slower on a CPU.
    """
    best = logits[0].clone()
    index = torch.zeros(best.shape, dtype=torch.uint8, device=logits.device)
    for k in range(1, len(logits)):
        index.masked_fill_(logits[k] > best, k)
        torch.maximum(best, logits[k], out=best)
    return index
