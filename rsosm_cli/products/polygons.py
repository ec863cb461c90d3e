"""Polygons of a class raster: band by band, borders shared, each with its area, perimeter and mean confidence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import shapes
from rasterio.windows import Window
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rsosm_cli.products.raster import bounded

# Pixels of the raster at a time, in whole rows: they take some thirty bytes each.
BAND_PX = 2**21


@dataclass(frozen=True)
class Polygons:
    """Polygons of a map, by class, the largest first. All arrays have length ``P``."""

    crs: str
    geometry: NDArray[np.object_]
    value: NDArray[np.int64]  # class
    area_m2: NDArray[np.float64]  # of the pixels, so that it adds up to the raster's
    perimeter_m: NDArray[np.float64]  # of the outline as it is drawn
    confidence: NDArray[np.float64]  # 0..1, mean over the pixels; NaN where it is not known
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)  # further columns

    def __len__(self) -> int:
        return len(self.geometry)


def polygonise(
    classes: Path, *, skip: Collection[int] = (), confidence: Path | None = None, min_area_m2: float = 0.0,
    simplify_px: float = 1.0,
) -> Polygons:  # fmt: skip
    """Return the polygons of a class raster (uint8, nodata 255), pixels joined along edges.

    ``skip``: classes of no interest. ``confidence``: a raster in percent over the same ground, as fine or coarser.
    Polygons below ``min_area_m2`` are left out. Outlines are simplified as one coverage (Visvalingam and Whyatt with a
    tolerance of ``simplify_px`` pixels; 0 leaves the pixels' edges), so that neighbours keep sharing their borders.
    """
    with bounded(), rasterio.open(classes) as raster:
        pixel_m2 = abs(raster.transform.a * raster.transform.e)
        transform = raster.transform
        crs = raster.crs.to_string()
        pieces = _Pieces()
        for band in _bands(raster, confidence, skip):
            pieces.add(band, min_area_m2 / pixel_m2)
    owner, n = pieces.joined()
    value = np.zeros(n, np.int64)
    value[owner] = pieces.value
    pixels = np.bincount(owner, pieces.pixels, n)
    sure = np.bincount(owner, pieces.sure, n)
    keep = pixels * pixel_m2 >= min_area_m2
    geometry = _unions(pieces, owner, n)
    keep &= np.array([g is not None for g in geometry], dtype=bool)
    order = np.flatnonzero(keep)
    order = order[np.lexsort((-pixels[order], value[order]))]
    geometry = _coverage(geometry[order], simplify_px)
    geometry = shapely.transform(geometry, lambda xy: _metres(xy, transform))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sure / pixels / 100 if confidence is not None else np.full(n, np.nan)
    return Polygons(
        crs, geometry, value[order], pixels[order] * pixel_m2, shapely.length(geometry), np.asarray(mean)[order]
    )


@dataclass(frozen=True)
class _Band:
    labels: NDArray[np.int32]  # (H, W) 0 where there is nothing
    value: NDArray[np.int64]  # (n,) class of label 1 ... n
    pixels: NDArray[np.float64]
    sure: NDArray[np.float64]  # summed confidence, percent
    transform: rasterio.Affine  # to pixels of the whole raster: whole numbers, so that neighbours meet exactly
    last: bool


def _bands(raster: Any, confidence: Path | None, skip: Collection[int]) -> Iterator[_Band]:
    with rasterio.open(confidence) if confidence is not None else _nothing() as second:
        height = max(1, BAND_PX // raster.width)
        for row in range(0, raster.height, height):
            window = Window(0, row, raster.width, min(height, raster.height - row))
            classes = raster.read(1, window=window)
            labels, mine = np.zeros(classes.shape, np.int32), np.empty(classes.shape, np.int32)
            values: list[int] = []
            for k in np.unique(classes).tolist():
                if k == raster.nodata or k in skip:
                    continue
                n = ndimage.label(classes == k, output=mine)
                np.add(labels, mine, out=labels)
                np.add(labels, np.int32(len(values)), out=labels, where=mine > 0)
                values += [k] * n
            n = len(values)
            pixels = np.bincount(labels.ravel(), minlength=n + 1)[1:].astype(float)
            sure: NDArray[Any] = np.zeros(n)
            if second is not None and n:
                percent = aligned(second, raster, window)
                sure = np.bincount(labels.ravel(), percent.ravel(), n + 1)[1:]
            transform = rasterio.Affine.translation(0, row)
            last = row + height >= raster.height
            yield _Band(labels, np.array(values, np.int64), pixels, sure, transform, last)


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None


def aligned(second: Any, raster: Any, window: Window) -> NDArray[np.float32]:
    """Return the second raster's values on the pixels of ``window`` of the first: each coarse pixel repeated."""
    factor = round(second.transform.a / raster.transform.a)
    row, height = int(window.row_off), int(window.height)
    first, last = row // factor, -(-(row + height) // factor)
    col, width = int(window.col_off), int(window.width)
    left, right = col // factor, -(-(col + width) // factor)
    coarse = second.read(1, window=Window(left, first, right - left, last - first))
    coarse = np.where(coarse == second.nodata, 0, coarse).astype(np.float32)
    full = coarse.repeat(factor, 0).repeat(factor, 1)
    return full[row - first * factor :, col - left * factor :][:height, :width]


class _Pieces:
    """Pieces of polygons, band by band, with the pairs that a border between bands cuts."""

    def __init__(self) -> None:
        self._values: list[NDArray[np.int64]] = []
        self._pixels: list[NDArray[np.float64]] = []
        self._sure: list[NDArray[np.float64]] = []
        self._pairs: list[NDArray[np.int64]] = []
        self.geometry: list[NDArray[np.object_]] = []
        self.number: list[NDArray[np.int64]] = []  # piece that each geometry is of
        self._count = 0
        self._above: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None  # piece, class of the last row; -1

    def add(self, band: _Band, min_pixels: float) -> None:
        labels = band.labels
        top, bottom = self._row(band, labels[0]), self._row(band, labels[-1])
        if self._above is not None:
            same = (self._above[1] == top[1]) & (top[1] >= 0)
            pairs = np.stack([self._above[0][same], top[0][same]], axis=1)
            self._pairs.append(np.unique(pairs, axis=0))
        # What is too small and cannot grow in another band is not even drawn.
        drawn = band.pixels >= min_pixels
        if self._above is not None:
            drawn[labels[0][labels[0] > 0] - 1] = True
        if not band.last:
            drawn[labels[-1][labels[-1] > 0] - 1] = True
        mask = np.concatenate([[False], drawn])[labels]
        found = [(_polygon(shape), int(label) - 1) for shape, label in shapes(labels, mask, 4, band.transform)]
        self.geometry.append(np.array([g for g, _ in found], dtype=object))
        self.number.append(np.array([i for _, i in found], np.int64) + self._count)
        self._values.append(band.value)
        self._pixels.append(band.pixels)
        self._sure.append(band.sure)
        self._count += len(band.value)
        self._above = bottom

    def _row(self, band: _Band, row: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        known = row > 0
        value = np.concatenate([[-1], band.value])[row]
        return np.where(known, row.astype(np.int64) - 1 + self._count, -1), value

    @property
    def value(self) -> NDArray[np.int64]:
        return np.concatenate([*self._values, np.zeros(0, np.int64)])

    @property
    def pixels(self) -> NDArray[np.float64]:
        return np.concatenate([*self._pixels, np.zeros(0)])

    @property
    def sure(self) -> NDArray[np.float64]:
        return np.concatenate([*self._sure, np.zeros(0)])

    def joined(self) -> tuple[NDArray[np.int64], int]:
        """Return the polygon that each piece belongs to, and the number of polygons."""
        pairs = np.concatenate([*self._pairs, np.zeros((0, 2), np.int64)])
        if self._count == 0:
            return np.zeros(0, np.int64), 0
        graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(self._count, self._count))
        n, owner = connected_components(graph, directed=False)
        return owner.astype(np.int64), int(n)


def _unions(pieces: _Pieces, owner: NDArray[np.int64], n: int) -> NDArray[np.object_]:
    """Return the geometry of each of ``n`` polygons, its pieces joined; None where none was drawn."""
    out = np.full(n, None, dtype=object)
    if not pieces.geometry:
        return out
    geometry = np.concatenate(pieces.geometry)
    polygon = owner[np.concatenate(pieces.number)]
    order = np.argsort(polygon, kind="stable")
    geometry, polygon = geometry[order], polygon[order]
    ids, first, counts = np.unique(polygon, return_index=True, return_counts=True)
    single = counts == 1
    out[ids[single]] = geometry[first[single]]
    for i, start, count in zip(ids[~single], first[~single], counts[~single], strict=True):
        out[i] = shapely.union_all(geometry[start : start + count])
    return out


def _coverage(geometry: NDArray[np.object_], simplify_px: float) -> NDArray[np.object_]:
    """Return polygons in pixel units simplified as one coverage.

    Where two neighbours meet at the straight side of a third, that one has no vertex: a vertex a pixel makes the
    outlines match, and the simplification takes out all those that no corner needs.
    """
    if not len(geometry):
        return geometry
    dense = shapely.transform(shapely.segmentize(geometry, 1.0), np.round)
    return np.asarray(shapely.coverage_simplify(dense, simplify_px))


def _metres(xy: NDArray[np.float64], transform: rasterio.Affine) -> NDArray[np.float64]:
    return np.stack([transform.c + xy[:, 0] * transform.a, transform.f + xy[:, 1] * transform.e], axis=1)


def _polygon(shape: dict[str, Any]) -> shapely.Polygon:
    shell, *holes = shape["coordinates"]
    return shapely.Polygon(shell, holes)


def write_polygons(path: Path, polygons: Polygons, names: Sequence[str], layer: str) -> None:
    """Write a GeoPackage, whole or not at all: class (name), value, area_m2, perimeter_m, confidence, extra columns."""
    import geopandas
    import pyogrio

    frame = geopandas.GeoDataFrame(
        {
            "class": np.array(names, dtype=object)[polygons.value],
            "value": polygons.value,
            "area_m2": polygons.area_m2.round(2),
            "perimeter_m": polygons.perimeter_m.round(2),
            "confidence": polygons.confidence.round(4),
            **polygons.extra,
        },
        geometry=polygons.geometry,
        crs=polygons.crs,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # GDAL goes by the file's extension: the file is made in a folder of its own rather than under another name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        # A fixed date in the file's records: equal maps are equal files.
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "2000-01-01T00:00:00.000Z"})
        try:
            frame.to_file(made, driver="GPKG", layer=layer, engine="pyogrio", geometry_type="Unknown" if len(frame) == 0
                          else None)  # fmt: skip
        finally:
            pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})
        os.replace(made, path)
