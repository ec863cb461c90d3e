"""Labels on ground: rasters, polygons, lines, points and CSV files become classes of pixels or tiles, shares, values.

What is *labelled ground*, and what is "no label":

- A raster labels its pixels, but for nodata and the task's ``ignore`` values.
- Polygons, lines and points label what they cover. Where the task has a ``background`` class, ground that none of them
  covers is of that class inside the extent: the one given, or else the convex hull of the labels of each file.
- A tile has the class that most of its labelled ground (or of its points) has, and the shares that the classes have
  of it; labels of areas must cover half of the tile.
- An extent that is given cuts everything: outside it nothing is labelled.
- Of labels that overlap, the later file, and within a file the later feature, lies on top.

Ground without a label counts neither in a loss nor in a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import MissingError, NoFileError, UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.label_files import (
    IGNORE,
    RasterLayer,
    VectorLayer,
    cells_of,
    class_codes,
    read_frame,
    read_raster,
    read_vector,
)

if TYPE_CHECKING:
    from affine import Affine
    from shapely import Geometry

RASTER_SUFFIXES = (".tif", ".tiff", ".vrt", ".img", ".jp2", ".png")
# A strip of tiles is rasterised at once; longer rows of tiles are broken, to bound memory (pixels).
STRIP_PX = 16384
# A tile whose labelled share is below this has no value (regression): a sliver says little of the whole.
MIN_COVER = 0.5

Extent = tuple[float, float, float, float] | Path


@dataclass(frozen=True)
class TileLabels:
    """Labels of the tiles that have any. ``L`` tiles."""

    tiles: NDArray[np.int64]  # (L,) tile numbers, ascending
    classes: NDArray[np.uint8] | None  # (L, H, W) class index, IGNORE for no label; (L,) of the tile (classification)
    values: NDArray[np.float64] | None  # (L,) value of the tile (regression), (L, K) shares (distribution)

    def __len__(self) -> int:
        return len(self.tiles)

    @property
    def truth(self) -> NDArray[np.uint8] | NDArray[np.float64]:
        found = self.values if self.classes is None else self.classes
        assert found is not None
        return found


@dataclass(frozen=True)
class Labels:
    """All label files of a task, in one CRS."""

    task: TaskSettings
    crs: str
    layers: tuple[VectorLayer | RasterLayer, ...]
    extent: Geometry | None  # in ``crs``
    notes: tuple[str, ...] = ()

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Return (west, south, east, north) around all labelled ground, in ``crs``."""
        import shapely

        boxes = [layer.bounds if isinstance(layer, RasterLayer) else _bounds(layer) for layer in self.layers]
        box = np.array(boxes)
        (w, s), (e, n) = box[:, :2].min(axis=0), box[:, 2:].max(axis=0)
        if self.extent is not None:
            ew, es, ee, en = shapely.bounds(self.extent)
            w, s, e, n = max(w, ew), max(s, es), min(e, ee), min(n, en)
        return float(w), float(s), float(e), float(n)

    def rasterise(self, transform: Affine, width: int, height: int) -> NDArray[np.uint8]:
        """Return the class index of each pixel of a raster in ``crs``, (H, W) uint8, IGNORE for no label.

        A pixel takes the class at its centre; a finer label raster gives the most frequent class within it.
        """
        out = np.full((height, width), IGNORE, np.uint8)
        for layer in self.layers:
            if isinstance(layer, RasterLayer):
                drawn = self._warp(layer, transform, width, height)
            else:
                drawn = self._draw(layer, transform, width, height)
            np.copyto(out, drawn, where=drawn != IGNORE)
        if self.extent is not None:
            out[~inside_mask(self.extent, transform, width, height)] = IGNORE
        return out

    def _draw(self, layer: VectorLayer, transform: Affine, width: int, height: int) -> NDArray[np.uint8]:
        import shapely
        from rasterio.features import rasterize

        window = shapely.box(
            transform.c, transform.f + transform.e * height, transform.c + transform.a * width, transform.f
        )
        out = np.full((height, width), IGNORE, np.uint8)
        if layer.ground is not None and self.task.background is not None:
            background = [c.name for c in self.task.classes].index(self.task.background)
            out[inside_mask(layer.ground, transform, width, height)] = background
        hit = shapely.intersects(layer.geometry, window)
        if hit.any():
            shapes = zip(layer.geometry[hit], layer.codes[hit].astype(int).tolist(), strict=True)
            rasterize(shapes, out=out, transform=transform)
        return out

    def _warp(self, layer: RasterLayer, transform: Affine, width: int, height: int) -> NDArray[np.uint8]:
        import rasterio
        from rasterio.enums import Resampling
        from rasterio.vrt import WarpedVRT
        from rasterio.warp import calculate_default_transform

        with rasterio.open(layer.path) as source:
            # How fine the labels are in the target's CRS decides between "the most frequent" and "the one here".
            finer, _, _ = calculate_default_transform(source.crs, self.crs, source.width, source.height, *source.bounds)
            method = Resampling.mode if abs(finer.a) * 1.5 < abs(transform.a) else Resampling.nearest
            with WarpedVRT(
                source,
                crs=self.crs,
                transform=transform,
                width=width,
                height=height,
                resampling=method,
                add_alpha=False,
            ) as warped:
                values = warped.read(1)
                valid = warped.read_masks(1) > 0
            covered = _inside_bounds(layer.bounds, transform, width, height)
        valid &= covered
        found, where = np.unique(values[valid], return_inverse=True)
        out = np.full((height, width), IGNORE, np.uint8)
        out[valid] = class_codes(self.task, found.tolist(), layer.name)[where]
        return out

    def values(self, boxes_m: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the value of each box (T, 4) in ``crs`` (regression), (T,) float64, NaN without label.

        ``aggregate: mean`` takes the area-weighted mean of the polygons or cells, or the mean of the points; ``sum``
        shares the total of each by area, and takes a box that is labelled in part to be all alike.
        """
        import shapely

        boxes = shapely.box(*boxes_m.T)
        area = np.zeros(len(boxes))
        total = np.zeros(len(boxes))
        points = np.zeros(len(boxes))  # points that fell into each box, for their mean
        point_sum = np.zeros(len(boxes))
        tree = shapely.STRtree(boxes)
        for layer in self.layers:
            geometry, codes = self._areas(layer)
            kind = shapely.get_dimensions(geometry)
            if not (kind == 2).all():
                at = geometry if (kind == 0).all() else shapely.centroid(geometry)
                feature, box = tree.query(at, predicate="intersects")
                np.add.at(points, box, 1)
                np.add.at(point_sum, box, codes[feature])
                continue
            feature, box = tree.query(geometry, predicate="intersects")
            shared = shapely.area(shapely.intersection(geometry[feature], boxes[box]))
            np.add.at(area, box, shared)
            if self.task.aggregate == "sum":
                np.add.at(total, box, codes[feature] * shared / shapely.area(geometry[feature]))
            else:
                np.add.at(total, box, codes[feature] * shared)
        size = shapely.area(boxes)
        inside = size if self.extent is None else shapely.area(shapely.intersection(self.extent, boxes))
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = size if self.task.aggregate == "sum" else 1.0
            value = np.where(area >= MIN_COVER * size, total / area * whole, np.nan)
            if points.any():
                if self.task.aggregate == "sum":
                    ground = self._point_ground()
                    share = shapely.area(shapely.intersection(ground, boxes))
                    counted = np.where(share >= MIN_COVER * size, point_sum / share * size, np.nan)
                else:
                    counted = np.where(points > 0, point_sum / points, np.nan)
                value = np.where(np.isnan(counted), value, counted)
        return np.where(inside >= MIN_COVER * size, value, np.nan)

    def shares(self, boxes_m: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the shares of the classes in each box (T, 4) in ``crs``, (T, K) float64, NaN without label.

        Of labels that have a column of shares a class: the mean of the polygons by area, or of the points.
        """
        import shapely

        boxes = shapely.box(*boxes_m.T)
        size, k = shapely.area(boxes), len(self.task.classes)
        total, weight, enough = np.zeros((len(boxes), k)), np.zeros(len(boxes)), np.zeros(len(boxes), bool)
        tree = shapely.STRtree(boxes)
        for layer in self.layers:
            if not isinstance(layer, VectorLayer) or layer.shares is None:
                continue
            at = shapely.get_dimensions(layer.geometry) == 0
            feature, box = tree.query(layer.geometry, predicate="intersects")
            shared = shapely.area(shapely.intersection(layer.geometry[feature], boxes[box]))
            part = np.where(at[feature], size[box], shared)
            np.add.at(total, box, part[:, None] * layer.shares[feature])
            np.add.at(weight, box, part)
            enough[box[at[feature]]] = True
        enough |= weight >= MIN_COVER * size
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(enough[:, None], total / total.sum(axis=1, keepdims=True), np.nan)

    @property
    def has_shares(self) -> bool:
        """Return whether the labels say the shares of the classes themselves."""
        return any(isinstance(layer, VectorLayer) and layer.shares is not None for layer in self.layers)

    @property
    def only_points(self) -> bool:
        """Return whether all labels are points: a sample of places, not labelled ground."""
        import shapely

        return all(
            isinstance(layer, VectorLayer) and bool((shapely.get_dimensions(layer.source) == 0).all())
            for layer in self.layers
        )

    def points(self) -> tuple[NDArray[np.object_], NDArray[np.uint8]]:
        """Return all points and their classes."""
        layers = [layer for layer in self.layers if isinstance(layer, VectorLayer)]
        shapes = np.concatenate([layer.source for layer in layers])
        return shapes, np.concatenate([layer.codes for layer in layers]).astype(np.uint8)

    def zones(self) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
        """Return all polygons, points and cells of rasters with their values (regression)."""
        found = [self._areas(layer) for layer in self.layers]
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _point_ground(self) -> Geometry:
        """Return where the absence of points means none: the extent, or the convex hull of all points."""
        import shapely

        if self.extent is not None:
            return self.extent
        every = [layer.geometry for layer in self.layers if isinstance(layer, VectorLayer)]
        return shapely.convex_hull(shapely.union_all(np.concatenate(every)))

    def _areas(self, layer: VectorLayer | RasterLayer) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
        if isinstance(layer, VectorLayer):
            return layer.geometry, layer.codes
        return cells_of(layer, self.crs, self.task, self.bounds)


def read_labels(paths: Sequence[Path], task: TaskSettings, crs: str, *, extent: Extent | None = None) -> Labels:
    """Read label files into the CRS of the tiles or of the map that they are for.

    Raises :class:`MissingError` for a file that is not there, :class:`FormatError` for one that cannot be read or has
    no CRS, :class:`UsageError` for classes that the task does not know.
    """
    if not paths:
        raise UsageError("No labels are given.", hint="Give a raster, vector file or CSV: --labels FILE")
    ground = _read_extent(extent, crs)
    notes: list[str] = []
    layers: list[VectorLayer | RasterLayer] = []
    for path in paths:
        if not path.exists():
            raise NoFileError(f"There is no label file {path}.", path=str(path))
        if path.suffix.lower() in RASTER_SUFFIXES:
            layers.append(read_raster(path, crs))
        else:
            layers.append(read_vector(path, task, crs, ground, notes))
    return Labels(task, crs, tuple(layers), ground, tuple(notes))


def label_tiles(labels: Labels, bounds_m: NDArray[np.float64], tile_px: int) -> TileLabels:
    """Return the labels of the tiles (T, 4) in the CRS of ``labels`` that have any.

    Raises :class:`MissingError` where no tile meets labelled ground.
    """
    west, south, east, north = labels.bounds
    meets = (bounds_m[:, 0] < east) & (bounds_m[:, 2] > west) & (bounds_m[:, 1] < north) & (bounds_m[:, 3] > south)
    near = np.flatnonzero(meets)
    if labels.task.kind == "regression":
        values = labels.values(bounds_m[near]) if len(near) else np.empty(0)
        known = np.isfinite(values)
        _require_overlap(bool(known.any()), labels, bounds_m)
        return TileLabels(near[known], None, values[known])
    if labels.has_shares:
        shares = labels.shares(bounds_m[near]) if len(near) else np.empty((0, 1))
        known = np.asarray(np.isfinite(shares).all(axis=1), bool)
        _require_overlap(bool(known.any()), labels, bounds_m)
        return TileLabels(near[known], None, shares[known])
    numbers: list[NDArray[np.int64]] = []
    stacks: list[NDArray[Any]] = []
    for strip in _strips(bounds_m, near, tile_px):
        classes = _strip_classes(labels, bounds_m[strip], tile_px)
        if labels.task.dense:
            known = (classes != IGNORE).any(axis=(1, 2))
            stacks.append(classes[known])
        else:
            counts, known = _counts(labels, classes)
            stacks.append(counts[known])
        numbers.append(strip[known])
    _require_overlap(any(len(n) for n in numbers), labels, bounds_m)
    tiles = np.concatenate(numbers)
    order = np.argsort(tiles, kind="stable")
    found = np.concatenate(stacks)[order]
    if labels.task.kind == "classification":
        return TileLabels(tiles[order], found.argmax(axis=1).astype(np.uint8), None)
    if labels.task.kind == "distribution":
        return TileLabels(tiles[order], None, found / found.sum(axis=1, keepdims=True))
    return TileLabels(tiles[order], found, None)


def _counts(labels: Labels, classes: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the labelled pixels of each class (T, K) of tiles (T, H, W), and which tiles have enough of them."""
    flat = classes.reshape(len(classes), -1)
    counts = np.stack([(flat == c).sum(axis=1) for c in range(len(labels.task.classes))], axis=1)
    return counts, counts.sum(axis=1) >= (1 if labels.only_points else MIN_COVER * flat.shape[1])


def _require_overlap(found: bool, labels: Labels, bounds_m: NDArray[np.float64]) -> None:
    if found:
        return
    names = ", ".join(layer.name for layer in labels.layers)
    west, south, east, north = _to_wgs84(labels.bounds, labels.crs)
    ours = np.concatenate([bounds_m[:, :2].min(axis=0), bounds_m[:, 2:].max(axis=0)])
    w, s, e, n = _to_wgs84(tuple(ours), labels.crs)
    theirs = f"they lie in {west:.4f}, {south:.4f}, {east:.4f}, {north:.4f}"
    if not np.isfinite([west, south, east, north]).all():
        theirs = "read in the CRS that they name, they lie nowhere near"
    raise MissingError(
        f"The labels ({names}) do not overlap the tiles: {theirs}, and the tiles in {w:.4f}, {s:.4f}, {e:.4f}, {n:.4f} "
        "(lon, lat).",
        hint="Check the labels' CRS (are their numbers degrees, or metres?), and that they are of this city.",
    )


def _to_wgs84(bounds: tuple[float, ...], crs: str) -> tuple[float, float, float, float]:
    import shapely

    if not np.isfinite(bounds).all():
        return (np.nan,) * 4
    west, south, east, north = shapely.bounds(reproject(np.array([shapely.box(*bounds)], dtype=object), crs, WGS84)[0])
    return float(west), float(south), float(east), float(north)


def _strips(bounds_m: NDArray[np.float64], near: NDArray[np.int64], tile_px: int) -> list[NDArray[np.int64]]:
    """Return groups of tiles of one row of the grid, each short enough to be rasterised at once."""
    if not len(near):
        return []
    size = bounds_m[near, 2] - bounds_m[near, 0]
    chunk = np.floor(bounds_m[near, 0] / (size * max(1, STRIP_PX // tile_px)))
    row = np.round(bounds_m[near, 3] / (size / tile_px))
    _, group = np.unique(np.stack([row, chunk]), axis=1, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    cuts = np.flatnonzero(np.diff(group.ravel()[order])) + 1
    return [near[part] for part in np.split(order, cuts)]


def _strip_classes(labels: Labels, bounds_m: NDArray[np.float64], tile_px: int) -> NDArray[np.uint8]:
    from affine import Affine

    gsd = float((bounds_m[0, 2] - bounds_m[0, 0]) / tile_px)
    west = float(bounds_m[:, 0].min())
    starts = np.round((bounds_m[:, 0] - west) / gsd).astype(int)
    transform = Affine(gsd, 0, west, 0, -gsd, float(bounds_m[0, 3]))
    strip = labels.rasterise(transform, int(starts.max()) + tile_px, tile_px)
    windows = np.lib.stride_tricks.sliding_window_view(strip, tile_px, axis=1)[:, starts]  # (H, n, W)
    return np.ascontiguousarray(windows.transpose(1, 0, 2))


def inside_mask(ground: Geometry, transform: Affine, width: int, height: int) -> NDArray[np.bool_]:
    """Return which pixels of a raster have their centre in ``ground``, (H, W)."""
    from rasterio.features import rasterize

    if ground.is_empty:
        return np.zeros((height, width), bool)
    return rasterize([(ground, 1)], out_shape=(height, width), transform=transform, dtype="uint8").astype(bool)


def _inside_bounds(
    bounds: tuple[float, float, float, float], transform: Affine, width: int, height: int
) -> NDArray[np.bool_]:
    x = transform.c + transform.a * (np.arange(width) + 0.5)
    y = transform.f + transform.e * (np.arange(height) + 0.5)
    west, south, east, north = bounds
    return ((y >= south) & (y <= north))[:, None] & ((x >= west) & (x <= east))[None, :]


def _bounds(layer: VectorLayer) -> tuple[float, float, float, float]:
    import shapely

    shapes = layer.geometry if layer.ground is None else np.append(layer.geometry, layer.ground)
    box = shapely.bounds(shapes[~shapely.is_empty(shapes)]).reshape(-1, 4)
    if not len(box):  # everything in the file is ignored
        return np.inf, np.inf, -np.inf, -np.inf
    low, high = box[:, :2].min(axis=0), box[:, 2:].max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _read_extent(extent: Extent | None, crs: str) -> Geometry | None:
    import shapely

    if extent is None:
        return None
    if not isinstance(extent, Path):
        west, south, east, north = extent
        if west >= east or south >= north:
            raise UsageError(
                f"The extent {west}, {south}, {east}, {north} is empty.",
                hint="Give west, south, east, north in degrees.",
            )
        # A long edge of a lon/lat box is not straight in a projected CRS.
        box = shapely.segmentize(shapely.box(west, south, east, north), max(east - west, north - south) / 64)
        return reproject(np.array([box], dtype=object), WGS84, crs)[0]
    frame = read_frame(extent)
    shapes = reproject(shapely.make_valid(np.asarray(frame.geometry, dtype=object)), frame.crs.to_string(), crs)
    return shapely.union_all(shapes)
