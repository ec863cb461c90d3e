"""Boundaries sharpened by a promptable segmenter, prompted by the coarse map (GeoLink-UV, arXiv 2602.18765).

The raster is walked in windows of the segmenter's size. Every connected patch of a class in a window prompts it with
its box and its innermost point; of the masks that come back the one most like the patch is taken, and only if it is
like it: a mask that has found something else leaves the patch as it is. What a mask leaves out becomes background, what
it adds was background. Only the middle of a window is written, so that a patch at its rim is seen whole by another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window
from scipy import ndimage

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.products.raster import bounded
from rsosm_cli.products.view import Reads
from rsosm_cli.workspace import atomic

# A mask less like its patch than this has found another thing.
LEAST_IOU = 0.5
# Patches of fewer pixels have no shape that could be sharpened.
LEAST_PX = 16
# Share of a window's side that is rim: seen, but not written.
RIM = 0.125
NODATA = 255

# (image (3, S, S), boxes (N, 4), points (N, 2)) -> (N, M, S, S) candidate masks
Masks = Callable[[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]], NDArray[np.bool_]]


@dataclass(frozen=True)
class Refined:
    """How many patches were prompted with, how many took a mask, and how many pixels changed their class."""

    patches: int
    sharpened: int
    pixels: int


def refine_classes(
    source: Path, target: Path, image: Reads, projection: Projection, *, background: int, side: int, masks: Masks,
    on_window: Callable[[int], None] = lambda windows: None,
) -> Refined:  # fmt: skip
    """Write the class raster ``source`` (uint8, 255 for none) to ``target`` with sharpened boundaries.

    ``image`` is read on the map's own lattice, that of ``projection``. Patches in the rim of two windows are prompted
    with in both, and each writes its own ground.
    """
    counted = np.zeros(3, np.int64)
    rim = int(side * RIM)
    step = side - 2 * rim
    with bounded(), rasterio.open(source) as coarse, atomic(target) as part, rasterio.open(
        part, "w", driver="GTiff", width=coarse.width, height=coarse.height, count=1, dtype="uint8", nodata=NODATA,
        crs=coarse.crs, transform=coarse.transform, tiled=True, blockxsize=512, blockysize=512, compress="DEFLATE",
        zlevel=1, BIGTIFF="IF_SAFER",
    ) as out:  # fmt: skip
        left, top = round(coarse.transform.c / projection.gsd_m), round(-coarse.transform.f / projection.gsd_m)
        for row in range(0, coarse.height, step):
            for col in range(0, coarse.width, step):
                window = Window(col - rim, row - rim, side, side)
                classes = coarse.read(1, window=window, boundless=True, fill_value=NODATA)
                fine = classes.copy()
                patches = _patches(classes, background)
                if patches:
                    x, y = left + col - rim, top + row - rim
                    pixels, known = image.read(projection, PixelBounds(x, y, x + side, y + side))
                    counted += _sharpen(fine, classes, patches, _three(pixels), known, background, masks)
                height, width = min(step, coarse.height - row), min(step, coarse.width - col)
                middle = (slice(rim, rim + height), slice(rim, rim + width))
                counted[2] += int((fine[middle] != classes[middle]).sum())
                out.write(fine[middle], 1, window=Window(col, row, width, height))
                on_window(1)
    return Refined(*counted.tolist())


@dataclass(frozen=True)
class _Patch:
    value: int
    where: tuple[slice, slice]
    mine: NDArray[np.bool_]  # within ``where``
    point: tuple[float, float]  # x, y


def _patches(classes: NDArray[np.uint8], background: int) -> list[_Patch]:
    found = []
    for value in np.unique(classes).tolist():
        if value in (background, NODATA):
            continue
        labels, n = ndimage.label(classes == value)
        for k, where in enumerate(ndimage.find_objects(labels), start=1):
            mine = labels[where] == k
            if n and mine.sum() >= LEAST_PX:
                deep = ndimage.distance_transform_edt(np.pad(mine, 1))[1:-1, 1:-1]
                y, x = np.unravel_index(int(deep.argmax()), mine.shape)
                found.append(_Patch(value, where, mine, (where[1].start + x + 0.5, where[0].start + y + 0.5)))
    return found


def _sharpen(
    fine: NDArray[np.uint8], classes: NDArray[np.uint8], patches: list[_Patch], image: NDArray[np.uint8],
    known: NDArray[np.bool_], background: int, masks: Masks,
) -> NDArray[np.int64]:  # fmt: skip
    boxes = np.array([[p.where[1].start, p.where[0].start, p.where[1].stop, p.where[0].stop] for p in patches])
    points = np.array([p.point for p in patches])
    candidates = masks(image, boxes.astype(np.float32), points.astype(np.float32))  # (N, M, S, S)
    taken = 0
    free = (classes == background) & known
    for patch, offered in zip(patches, candidates, strict=True):
        coarse = np.zeros(classes.shape, bool)
        coarse[patch.where] = patch.mine
        both, either = (offered & coarse).sum(axis=(1, 2)), (offered | coarse).sum(axis=(1, 2))
        best = int((both / np.maximum(either, 1)).argmax())
        if both[best] < LEAST_IOU * either[best]:
            continue
        taken += 1
        mask = offered[best]
        fine[coarse & ~mask] = background
        fine[mask & free & (fine == background)] = patch.value
        fine[mask & coarse] = patch.value
    return np.array([len(patches), taken, 0])


def _three(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    return pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
