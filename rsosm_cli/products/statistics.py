"""Numbers of a map: area, share, confidence and built-up land of each class; total and spread of a value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray

from rsosm_cli.products.builtup import BUILT_UP, Buildings, ReadElements, built_up, rasterised
from rsosm_cli.products.polygons import Polygons, aligned
from rsosm_cli.products.raster import bounded, pixel_squares

_ROWS = 128  # of a square at a time


def class_statistics(
    raster_file: Path, names: Sequence[str], *, confidence: Path | None = None, read: ReadElements | None = None,
    buildings: Buildings | None = None, polygons: Polygons | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the numbers of a class raster (uint8, nodata 255).

    Areas are square metres of pixels, shares are of the mapped ground (0..1). With ``read``, the built-up land of OSM
    is rasterised on the map's pixels: ``share_of_built_up`` is the share of it that each class takes.
    """
    n = len(names)
    pixels, sure, built, count = (np.zeros(n) for _ in range(4))
    with bounded(), rasterio.open(raster_file) as raster:
        pixel_m2 = abs(raster.transform.a * raster.transform.e)
        for window in pixel_squares(raster):
            classes = raster.read(1, window=window)
            known = classes != 255
            if not known.any():
                continue
            pixels += _tally(classes, known, n)
            if confidence is not None:
                with rasterio.open(confidence) as second:
                    sure += _tally(classes, known, n, aligned(second, raster, window))
            if read is not None:
                transform = raster.window_transform(window)
                land = built_up(read(rasterio.windows.bounds(window, raster.transform)))
                built += _tally(classes, known & rasterised(land, classes.shape, transform), n)
        if buildings is not None:
            count = _classes_at(raster, buildings.inside, n)
    total, built_total = pixels.sum(), built.sum()
    rows = []
    for k, name in enumerate(names):
        row: dict[str, Any] = {
            "name": name,
            "value": k,
            "area_m2": round(pixels[k] * pixel_m2, 2),
            "share": _ratio(pixels[k], total),
        }
        if confidence is not None:
            row["mean_confidence"] = _ratio(sure[k], 100 * pixels[k])
        if polygons is not None:
            row["polygons"] = int((polygons.value == k).sum())
        if read is not None:
            row["built_up_m2"] = round(built[k] * pixel_m2, 2)
            row["share_of_built_up"] = _ratio(built[k], built_total)
        if buildings is not None:
            row["buildings"] = int(count[k])
            row["buildings_per_ha"] = _ratio(count[k], pixels[k] * pixel_m2 / 1e4)
        rows.append(row)
    numbers: dict[str, Any] = {"mapped_m2": round(total * pixel_m2, 2), "pixel_m2": round(pixel_m2, 6), "classes": rows}
    if read is not None:
        numbers["built_up"] = {"area_m2": round(built_total * pixel_m2, 2), "of": BUILT_UP}
    if buildings is not None:
        numbers["buildings"] = int(count.sum())
    return numbers


def add_shares(numbers: dict[str, Any], shares_file: Path) -> None:
    """Add to each class's row what its shares (a band a class, uint8 steps of ``scale``) add up to."""
    with bounded(), rasterio.open(shares_file) as raster:
        total, cells = np.zeros(raster.count), 0
        cell_m2 = abs(raster.transform.a * raster.transform.e)
        for window in pixel_squares(raster):
            block = raster.read(window=window)
            known = block[0] != raster.nodata
            total += block[:, known].sum(axis=1) * 0.004
            cells += int(known.sum())
    for row, amount in zip(numbers["classes"], total.tolist(), strict=True):
        row["mean_share"] = _ratio(amount, cells)
        row["area_by_share_m2"] = round(amount * cell_m2, 2)


def value_statistics(raster_file: Path) -> dict[str, Any]:
    """Return the numbers of a value raster (float32, NaN for none): the total is the sum of its cells."""
    values: list[NDArray[np.float32]] = []
    with bounded(), rasterio.open(raster_file) as raster:
        cell_m2 = abs(raster.transform.a * raster.transform.e)
        for window in pixel_squares(raster):
            block = raster.read(1, window=window)
            values.append(block[np.isfinite(block)])
    known = np.concatenate([*values, np.zeros(0, np.float32)]).astype(np.float64)
    numbers: dict[str, Any] = {
        "cell_m2": round(cell_m2, 6),
        "cells": len(known),
        "mapped_m2": round(len(known) * cell_m2, 2),
    }
    if len(known):
        low, median, high = np.percentile(known, [5, 50, 95]).tolist()
        numbers |= {
            "total": float(known.sum()),
            "per_km2": float(known.mean() / cell_m2 * 1e6),
            "mean": float(known.mean()),
            "minimum": float(known.min()),
            "p5": low,
            "median": median,
            "p95": high,
            "maximum": float(known.max()),
        }
    return numbers


def _tally(
    classes: NDArray[np.uint8], chosen: NDArray[np.bool_], n: int, weights: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """Return (n,) how many of the chosen pixels (H, W) are of each class, or the sum of their weights.

    A few rows at a time: numpy counts in numbers of eight bytes.
    """
    counts = np.zeros(n)
    for top in range(0, len(classes), _ROWS):
        rows = slice(top, top + _ROWS)
        picked = chosen[rows]
        counts += np.bincount(classes[rows][picked], None if weights is None else weights[rows][picked], n)[:n]
    return counts


def _classes_at(raster: Any, xy: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return (n,) how many of the points (P, 2) fall on each class."""
    cols = np.floor((xy[:, 0] - raster.transform.c) / raster.transform.a).astype(np.int64)
    rows = np.floor((xy[:, 1] - raster.transform.f) / raster.transform.e).astype(np.int64)
    counts = np.zeros(n)
    for window in pixel_squares(raster):
        left, top = int(window.col_off), int(window.row_off)
        here = (cols >= left) & (cols < left + window.width) & (rows >= top) & (rows < top + window.height)
        if here.any():
            found = raster.read(1, window=window)[rows[here] - top, cols[here] - left]
            counts += np.bincount(found[found < n], minlength=n)
    return counts


def _ratio(part: float, whole: float) -> float | None:
    return round(float(part / whole), 6) if whole > 0 else None
