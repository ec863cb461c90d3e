"""The loop of a map: windows from a source, logits from a model, finished strips to a sink, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsosm_cli.geometry import PixelBounds
from rsosm_cli.inference.blend import CHUNK_PX, Accumulator, Cells, argmax, chunks, covered_pixels, upsampled
from rsosm_cli.inference.prefetch import prefetched
from rsosm_cli.inference.windows import Strip, WindowPlan

CLASS_NODATA = 255
# Confidence is kept in percent, probability and uncertainty in steps of 1/250, so that 255 is left for "no data".
PERCENT = 100
SHARE_STEPS = 250

# Pixels of a strip that belong to the place: (H, W) bool for the bounds given.
Mask = Callable[[PixelBounds], NDArray[np.bool_]]


@dataclass(frozen=True)
class RowImage:
    """Which pixels of a row of windows have image."""

    bounds_px: PixelBounds
    valid: NDArray[np.bool_]  # (H, W)


@dataclass(frozen=True)
class WindowBatch:
    """Windows for one forward pass. ``trust``: how much each counts in the blend (its share with image)."""

    starts: NDArray[np.int64]  # (B, 2) first column and row, in pixels of the lattice
    images: Tensor | None  # (B, C, H, W) uint8
    graphs: object | None  # HeteroData of B graphs
    trust: NDArray[np.float32]  # (B,)


class Source(Protocol):
    """Where windows come from."""

    def read(self, row: int, columns: range) -> Iterator[RowImage | WindowBatch]:
        """Yield what a row of windows holds; windows that there is nothing to say of are left out."""
        ...


class Sink(Protocol):
    """Where finished strips go."""

    def has(self, strip: Strip) -> bool: ...

    def write(self, strip: Strip, layers: dict[str, NDArray[np.generic]]) -> None: ...


@dataclass(frozen=True)
class Layers:
    """What is drawn from the blended logits."""

    kind: Literal["segmentation", "tiles", "regression"]  # `tiles`: one class a cell of the output
    probability: bool = False
    uncertainty: bool = False
    shares: bool = False  # of the classes in each cell (`tiles`)
    amounts: bool = True  # values are amounts, of which a cell that the border cuts has a share; else they are rates


def map_area(
    plan: WindowPlan, source: Source, predict: Callable[[WindowBatch], Tensor], sink: Sink, *, channels: int,
    layers: Layers, mask: Mask, device: torch.device, only: Container[str] | None = None,
    on_batch: Callable[[int], None] = lambda windows: None, on_strip: Callable[[Strip], None] = lambda strip: None,
) -> None:  # fmt: skip
    """Map every strip of ``plan`` that the sink does not have.

    ``predict`` returns (B, ``channels``, n, n) logits on the cells of a window (regression: the value of each cell).
    ``only``: names of the strips to look at; default: all. ``on_batch`` hears how many windows each pass took,
    ``on_strip`` each strip that is finished or found finished.
    """
    blend = Accumulator(plan, channels, device)
    for item in prefetched(lambda: _work(plan, source, sink, only)):
        if isinstance(item, RowImage):
            blend.add_valid(item.bounds_px, item.valid)
        elif isinstance(item, WindowBatch):
            blend.add(item.starts, predict(item), item.trust)
            on_batch(len(item.starts))
        elif item.opens:
            blend.open(item.strip)
        else:
            if item.windows:
                sink.write(item.strip, render(blend.close(), layers, mask))
            on_strip(item.strip)


@dataclass(frozen=True)
class _Mark:
    strip: Strip
    opens: bool
    windows: bool = True  # False: the strip was finished before


def _work(
    plan: WindowPlan, source: Source, sink: Sink, only: Container[str] | None
) -> Iterator[_Mark | RowImage | WindowBatch]:
    """Yield the windows strip by strip; a row that two strips share is read once, unless the first was finished."""
    above: Strip | None = None
    for strip in plan.strips():
        if only is not None and strip.name not in only:
            continue
        if sink.has(strip):
            above = None
            yield _Mark(strip, opens=False, windows=False)
            continue
        rows = plan.rows_of(strip)
        if above is not None and (above.block, above.index + 1) == (strip.block, strip.index):
            rows = range(max(rows.start, plan.rows_of(above).stop), rows.stop)
        yield _Mark(strip, opens=True)
        for row in rows:
            yield from source.read(row, plan.columns_of(strip))
        yield _Mark(strip, opens=False)
        above = strip


def render(cells: Cells, layers: Layers, mask: Mask) -> dict[str, NDArray[np.generic]]:
    """Return the layers of a strip, nodata outside of the place, of the image and of the windows.

    Segmentation: ``class`` (H, W) uint8; ``confidence`` uint8 percent, the probability of the likeliest class on the
    cells of the head; on request ``probability`` (K, H, W) and ``uncertainty`` (H, W), uint8 in steps of 1/250: the
    uncertainty is the entropy of the class probabilities over its largest value, ln K.
    Tiles: the same a cell, ``shares`` (K, r, c) among them on request; a cell of which less than half lies in the place
    or has an image is none. Regression: ``value`` (r, c) float32 a cell, amounts times the cell's share inside of the
    place; NaN where there is none.
    """
    inside = mask(cells.bounds_px) & cells.valid
    if layers.kind == "regression":
        return {"value": _values(cells, mask(cells.bounds_px), layers.amounts)}
    if layers.kind == "tiles":
        return _cell_classes(cells, mask(cells.bounds_px), layers)
    height, width = cells.bounds_px.height, cells.bounds_px.width
    k = len(cells.logits)
    out: dict[str, NDArray[np.generic]] = {"confidence": _confidence(cells)}
    out["class"] = classes = np.full((height, width), CLASS_NODATA, np.uint8)
    if layers.probability:
        out["probability"] = shares = np.full((k, height, width), CLASS_NODATA, np.uint8)
    if layers.uncertainty:
        out["uncertainty"] = doubt = np.full((height, width), CLASS_NODATA, np.uint8)
    for box in chunks(cells.bounds_px, max(1, CHUNK_PX // cells.cell_px) * cells.cell_px):
        span = slice(box.col_min - cells.bounds_px.col_min, box.col_max - cells.bounds_px.col_min)
        known = inside[:, span] & covered_pixels(cells, box)
        if not known.any():
            continue
        logits = upsampled(cells, box)
        classes[:, span] = np.where(known, argmax(logits).cpu().numpy(), CLASS_NODATA)
        if layers.probability or layers.uncertainty:
            logp = torch.log_softmax(logits, 0)
            p = logp.exp()
            if layers.probability:
                shares[:, :, span] = np.where(known, _steps(p), CLASS_NODATA)
            if layers.uncertainty:
                doubt[:, span] = np.where(known, _steps(-(p * logp).sum(0) / math.log(k)), CLASS_NODATA)
    return out


def _steps(share: Tensor) -> NDArray[np.uint8]:
    return np.asarray((share.clamp(0, 1) * SHARE_STEPS).round().to(torch.uint8).cpu())


def _own_cells(cells: Cells) -> tuple[slice, slice]:
    cell, strip, around = cells.cell_px, cells.bounds_px, cells.around_px
    top, left = (strip.row_min - around.row_min) // cell, (strip.col_min - around.col_min) // cell
    return slice(top, top + strip.height // cell), slice(left, left + strip.width // cell)


def _confidence(cells: Cells) -> NDArray[np.uint8]:
    own = _own_cells(cells)
    best = torch.softmax(cells.logits[:, own[0], own[1]], 0).amax(0)
    percent = (best * PERCENT).round().to(torch.uint8)
    return np.asarray(torch.where(cells.covered[own], percent, CLASS_NODATA).to(torch.uint8).cpu())


def _cell_classes(cells: Cells, inside: NDArray[np.bool_], layers: Layers) -> dict[str, NDArray[np.generic]]:
    own = _own_cells(cells)
    logits = cells.logits[:, own[0], own[1]]
    known = (_share(cells, inside) >= 0.5) & (_share(cells, cells.valid) >= 0.5)
    known &= np.asarray(cells.covered[own].cpu())
    logp = torch.log_softmax(logits, 0)
    p = logp.exp()
    found: dict[str, NDArray[np.generic]] = {
        "confidence": np.asarray((p.amax(0) * PERCENT).round().to(torch.uint8).cpu()),
        "class": np.asarray(argmax(logits).cpu()),
    }
    if layers.probability:
        found["probability"] = _steps(p)
    if layers.shares:
        found["shares"] = _steps(p)
    if layers.uncertainty:
        found["uncertainty"] = _steps(-(p * logp).sum(0) / math.log(len(logits)))
    return {name: np.where(known, values, np.uint8(CLASS_NODATA)) for name, values in found.items()}


def _share(cells: Cells, pixels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (r, c) the share of each cell of the strip whose pixels are set."""
    cell = cells.cell_px
    rows, cols = cells.bounds_px.height // cell, cells.bounds_px.width // cell
    return np.asarray(pixels.reshape(rows, cell, cols, cell).mean(axis=(1, 3)))


def _values(cells: Cells, inside: NDArray[np.bool_], amounts: bool) -> NDArray[np.float32]:
    own = _own_cells(cells)
    part = _share(cells, inside)
    values = cells.logits[0][own].cpu().numpy() * (part if amounts else 1.0)
    known = (part > 0) & (_share(cells, cells.valid) >= 0.5) & cells.covered[own].cpu().numpy()
    return np.where(known, values, np.nan).astype(np.float32)
