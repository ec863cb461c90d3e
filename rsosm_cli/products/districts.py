"""Sub-districts of a place, from its own OSM elements, and the numbers of a map in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize

from rsosm_cli.osm.elements import Elements
from rsosm_cli.products.builtup import POLYGON, Buildings, ReadElements, built_up, rasterised, squares
from rsosm_cli.products.raster import bounded, pixel_squares

# A district of which less lies in the place is a neighbour that reaches in.
INSIDE = 0.5
# Of the levels below the place's own, the first whose districts cover this much of it.
COVER = 0.5


@dataclass(frozen=True)
class Districts:
    """``D`` districts of one administrative level, cut to the place, in the CRS of the map."""

    level: int
    names: tuple[str, ...]
    osm_ids: tuple[int, ...]
    geometry: NDArray[np.object_]  # (D,)


def read_areas(read: ReadElements, bounds: tuple[float, float, float, float]) -> Elements | None:
    """Return the administrative areas that meet ``bounds`` (metres), read square by square; None without any."""
    kept: dict[tuple[int, int], tuple[dict[str, str], Any]] = {}
    crs = ""
    for square in squares(bounds):
        elements = read(square)
        crs = elements.crs
        for i in np.flatnonzero(elements.kind == POLYGON).tolist():
            if _level(elements.tags[i]):
                key = (int(elements.osm_type[i]), int(elements.osm_id[i]))
                kept.setdefault(key, (elements.tags[i], elements.geometry[i]))
    if not kept:
        return None
    kinds, ids = np.array(list(kept)).T
    geometry = np.array([g for _, g in kept.values()], dtype=object)
    kind = np.full(len(kept), POLYGON, np.uint8)
    return Elements(crs, kinds.astype(np.uint8), ids, kind, [t for t, _ in kept.values()], geometry)


def find_districts(elements: Elements, place: shapely.Geometry, level: int | None) -> Districts | None:
    """Return the administrative areas of the next level below the place's ``level`` that cover most of it.

    ``elements`` and ``place`` share a CRS. None where the OSM elements have no such areas; a single one that is the
    place itself says nothing and is none, too.
    """
    if not len(elements.tags):
        return None
    levels = np.array([_level(tags) for tags in elements.tags])
    mine = np.flatnonzero((elements.kind == POLYGON) & (levels > (0 if level is None else level)))
    if not len(mine):
        return None
    shapes = shapely.make_valid(elements.geometry[mine])
    cut = shapely.intersection(shapes, place)
    inside = shapely.area(cut) >= INSIDE * shapely.area(shapes)
    for found in np.unique(levels[mine]).tolist():
        chosen = np.flatnonzero(inside & (levels[mine] == found))
        # One area alone is the place again, under whatever level.
        if len(chosen) < 2 or shapely.area(cut[chosen]).sum() < COVER * place.area:
            continue
        order = chosen[np.argsort([elements.tags[mine[i]].get("name", "") for i in chosen], kind="stable")]
        ids = elements.osm_id[mine[order]].tolist()
        names = tuple(
            elements.tags[mine[i]].get("name") or f"district {n}" for i, n in zip(order.tolist(), ids, strict=True)
        )
        return Districts(int(found), names, tuple(ids), cut[order])
    return None


def _level(tags: dict[str, str]) -> int:
    said = tags.get("admin_level", "")
    return int(said) if tags.get("boundary") == "administrative" and said.isdigit() else 0


def district_statistics(
    raster_file: Path, classes: Sequence[str], districts: Districts, *, read: ReadElements | None = None,
    buildings: Buildings | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row a district: the area and share of each class (or the total of a value), built-up land, buildings.

    A pixel belongs to the district that its centre lies in.
    """
    d, k = len(districts.names), max(1, len(classes))
    pixels, built, total = np.zeros((d + 1, k)), np.zeros((d + 1, k)), np.zeros(d + 1)
    shapes = [(shape, i + 1) for i, shape in enumerate(districts.geometry) if not shape.is_empty]
    with bounded(), rasterio.open(raster_file) as raster:
        pixel_m2 = abs(raster.transform.a * raster.transform.e)
        for window in pixel_squares(raster):
            values = raster.read(1, window=window)
            known = np.isfinite(values) if not classes else values < k
            if not known.any():
                continue
            transform = raster.window_transform(window)
            owner = rasterize(shapes, out_shape=values.shape, transform=transform, dtype="int32")
            cell = owner[known] * k + (values[known].astype(np.int64) if classes else 0)
            pixels += np.bincount(cell, minlength=(d + 1) * k).reshape(d + 1, k)
            if not classes:
                total += np.bincount(owner[known], values[known], minlength=d + 1)
            elif read is not None:
                land = built_up(read(rasterio.windows.bounds(window, raster.transform)))
                on = rasterised(land, values.shape, transform)[known]
                built += np.bincount(cell[on], minlength=(d + 1) * k).reshape(d + 1, k)
    counts = np.zeros(d)
    if buildings is not None and len(buildings):
        where, _ = shapely.STRtree(shapely.points(buildings.inside)).query(districts.geometry, predicate="contains")
        counts = np.bincount(where, minlength=d).astype(float)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(districts.names):
        mapped = float(pixels[i + 1].sum() * pixel_m2)
        entry: dict[str, Any] = {
            "name": name, "osm_id": districts.osm_ids[i], "admin_level": districts.level, "mapped_m2": round(mapped, 2),
        }  # fmt: skip
        for c, label in enumerate(classes):
            entry[f"{label} m2"] = round(float(pixels[i + 1, c] * pixel_m2), 2)
            entry[f"{label} share"] = round(float(pixels[i + 1, c] * pixel_m2 / mapped), 6) if mapped else None
            if read is not None:
                whole = built[i + 1].sum()
                entry[f"{label} share of built-up land"] = round(float(built[i + 1, c] / whole), 6) if whole else None
        if not classes:
            entry["total"] = float(total[i + 1])
        if buildings is not None:
            entry["buildings"] = int(counts[i])
        rows.append(entry)
    return rows
