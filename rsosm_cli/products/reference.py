"""A finished map against reference labels, in bounded memory: pixels, points, zones, and the drawing of samples.

Work goes window by window; a window is a block of ground, so that its counts are also the unit of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.label_files import IGNORE, class_codes
from rsosm_cli.tiles.labels import Labels, inside_mask

if TYPE_CHECKING:
    from affine import Affine
    from shapely import Geometry

# Side of a block, in metres: the default of SplitSettings, and beyond the reach of most buildings and blocks.
BLOCK_M = 500.0
# Windows of fine maps are cut to this many pixels a side, those of coarse ones are not made smaller than the least.
WINDOW_PX = (64, 4096)
# A zone less than half of which the map covers says little about the map.
MIN_COVER = 0.5


@dataclass(frozen=True)
class MapRaster:
    """A map on disk. ``own``: made by rsosm, so that its values are class numbers in the order of the task."""

    path: Path
    task: TaskSettings
    own: bool
    crs: str
    transform: Affine
    width: int
    height: int
    band: int = 1

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        t = self.transform
        return t.c, t.f + self.height * t.e, t.c + self.width * t.a, t.f

    @property
    def pixel_m2(self) -> float:
        return abs(self.transform.a * self.transform.e)

    @classmethod
    def open(cls, path: Path, task: TaskSettings, *, own: bool, band: int = 1) -> MapRaster:
        """Open a map; raises :class:`FormatError` for a raster without a CRS in metres."""
        import rasterio
        from rasterio.errors import RasterioIOError

        if not path.exists():
            raise MissingError(
                f"There is no map {path}.", hint="Make it with `rsosm map`, or name one.", path=str(path)
            )
        try:
            with rasterio.open(path) as source:
                if source.crs is None or not source.crs.is_projected:
                    raise FormatError(
                        f"The map {path} has no projected CRS, so its areas cannot be measured.",
                        hint="Warp it to a UTM zone, for example with gdalwarp -t_srs.",
                    )
                t = source.transform
                if t.b or t.d:
                    raise FormatError(f"The map {path} is rotated.", hint="Warp it north up, with gdalwarp.")
                return cls(path, task, own, source.crs.to_string(), t, source.width, source.height, band)
        except RasterioIOError as error:
            raise FormatError(f"The map {path} cannot be read: {error}.") from error

    def windows(self, exclude: Geometry | None) -> Iterator[Window]:
        """Yield the map in blocks of ground; pixels in ``exclude`` count as nodata."""
        import rasterio
        from affine import Affine
        from rasterio.windows import Window as Box

        side = int(np.clip(round(BLOCK_M / self.transform.a), *WINDOW_PX))
        with rasterio.open(self.path) as source:
            for row in range(0, self.height, side):
                for col in range(0, self.width, side):
                    box = Box(col, row, min(side, self.width - col), min(side, self.height - row))
                    values = source.read(self.band, window=box)
                    valid = source.read_masks(self.band, window=box) > 0
                    if values.dtype.kind == "f":
                        valid &= np.isfinite(values)
                    if not valid.any():
                        continue
                    t = self.transform
                    transform = Affine(t.a, 0, t.c + col * t.a, 0, t.e, t.f + row * t.e)
                    if exclude is not None:
                        valid &= ~inside_mask(exclude, transform, box.width, box.height)
                    yield Window(row, col, transform, values, valid)

    def as_classes(self, path: Path) -> Path:
        """Return a raster of class numbers: this one, or where another made it, its translation written to ``path``."""
        import rasterio
        from rasterio.windows import Window as Box

        from rsosm_cli.workspace import atomic

        if self.own:
            return self.path
        with atomic(path) as part, rasterio.open(
            part, "w", driver="GTiff", width=self.width, height=self.height, count=1, dtype="uint8", crs=self.crs,
            transform=self.transform, nodata=IGNORE, compress="deflate", tiled=True,
        ) as target:  # fmt: skip
            for window in self.windows(None):
                height, width = window.values.shape
                target.write(self.classes(window), 1, window=Box(window.col, window.row, width, height))
        return path

    def classes(self, window: Window) -> NDArray[np.uint8]:
        """Return the class of each pixel of a window, IGNORE where it has none."""
        out = np.full(window.values.shape, IGNORE, np.uint8)
        found, where = np.unique(window.values[window.valid], return_inverse=True)
        n_classes = len(self.task.classes)
        if self.own:
            codes = np.where(found < n_classes, found, IGNORE).astype(np.uint8)
        else:
            codes = class_codes(self.task, found.tolist(), self.path.name)
        out[window.valid] = codes[where.ravel()]
        return out


@dataclass(frozen=True)
class Window:
    row: int
    col: int
    transform: Affine
    values: NDArray[Any]  # (H, W)
    valid: NDArray[np.bool_]  # (H, W)


def compare(raster: MapRaster, labels: Labels, exclude: Geometry | None) -> NDArray[np.int64]:
    """Return confusion matrices (B, K, K) of the map's pixels, labels in rows, one a block of ground."""
    from rsosm_cli.training.metrics import confusion

    west, south, east, north = labels.bounds
    matrices = []
    for window in raster.windows(exclude):
        t, (height, width) = window.transform, window.values.shape
        if not (t.c < east and t.c + width * t.a > west and t.f > south and t.f + height * t.e < north):
            continue
        predicted = raster.classes(window)
        truth = labels.rasterise(window.transform, width, height)
        truth[predicted == IGNORE] = IGNORE
        matrices.append(confusion(truth[None], predicted[None], len(raster.task.classes)))
    found = np.concatenate(matrices) if matrices else np.zeros((0, 1, 1), np.int64)
    return found[found.any(axis=(1, 2))]


def class_pixels(raster: MapRaster, exclude: Geometry | None) -> NDArray[np.int64]:
    """Return the number of pixels of each class, (K,)."""
    n_classes = len(raster.task.classes)
    total = np.zeros(n_classes, np.int64)
    for window in raster.windows(exclude):
        codes = raster.classes(window)
        total += np.bincount(codes[codes != IGNORE], minlength=n_classes)
    return total


def classes_at(raster: MapRaster, xy: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the class of the map at points (N, 2) in its CRS, IGNORE where it has none."""
    out = np.full(len(xy), IGNORE, np.uint8)
    col = np.floor((xy[:, 0] - raster.transform.c) / raster.transform.a).astype(np.int64)
    row = np.floor((xy[:, 1] - raster.transform.f) / raster.transform.e).astype(np.int64)
    for window in raster.windows(None):
        height, width = window.values.shape
        here = (row >= window.row) & (row < window.row + height) & (col >= window.col) & (col < window.col + width)
        if here.any():
            out[here] = raster.classes(window)[row[here] - window.row, col[here] - window.col]
    return out


def draw_points(
    raster: MapRaster, n_points: NDArray[np.int64], seed: int, exclude: Geometry | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return points (N, 2) in the map's CRS and the class they were drawn from (N,): pixel centres, in random order.

    Within a class every pixel is as likely as any other, and none is drawn twice. ``n_points`` (K,) are wanted.
    """
    rng = np.random.default_rng(seed)
    held = class_pixels(raster, exclude)
    ranks = [np.sort(_distinct(rng, int(n), int(min(k, n)))) for n, k in zip(held, n_points, strict=True)]
    before = np.zeros(len(held), np.int64)
    points, strata = [], []
    for window in raster.windows(exclude):
        codes = raster.classes(window)
        counts = np.bincount(codes[codes != IGNORE], minlength=len(held))
        for index in np.flatnonzero(counts):
            low, high = np.searchsorted(ranks[index], [before[index], before[index] + counts[index]])
            if low == high:
                continue
            place = np.flatnonzero(codes.ravel() == index)[ranks[index][low:high] - before[index]]
            row, col = np.divmod(place, codes.shape[1])
            t = window.transform
            points.append(np.column_stack([t.c + (col + 0.5) * t.a, t.f + (row + 0.5) * t.e]))
            strata.append(np.full(len(place), index))
        before += counts
    order = rng.permutation(sum(len(p) for p in points))
    return np.concatenate(points)[order], np.concatenate(strata)[order]


def _distinct(rng: np.random.Generator, n: int, k: int) -> NDArray[np.int64]:
    """Return ``k`` distinct numbers below ``n``, without holding all ``n``."""
    if k * 4 >= n:
        return rng.permutation(n)[:k]
    drawn = np.unique(rng.integers(0, n, 2 * k + 16))
    return rng.permutation(drawn)[:k]


def zone_values(
    raster: MapRaster, zones: NDArray[np.object_], exclude: Geometry | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the mean of the map's pixels in each zone (N,), NaN where the map covers too little of it.

    Zones are polygons in the map's CRS that do not overlap, or points, which take the pixel they lie in. The sum is
    that of the zone where the map covers part of it: it is scaled up to the whole.
    """
    import shapely
    from rasterio.features import rasterize

    total, pixels = np.zeros(len(zones) + 1), np.zeros(len(zones) + 1)
    tree = shapely.STRtree(zones)
    for window in raster.windows(exclude):
        t, (height, width) = window.transform, window.values.shape
        box = shapely.box(t.c, t.f + height * t.e, t.c + width * t.a, t.f)
        hit = tree.query(box, predicate="intersects")
        if not len(hit):
            continue
        ids = rasterize(
            list(zip(zones[hit], (hit + 1).tolist(), strict=True)),
            out_shape=(height, width), transform=t, dtype="int32",
        )  # fmt: skip
        ids = np.where(window.valid, ids, 0)
        total += np.bincount(ids.ravel(), np.where(window.valid, window.values, 0).ravel(), minlength=len(total))
        pixels += np.bincount(ids.ravel(), minlength=len(total))
    size = shapely.area(zones) / raster.pixel_m2
    whole = np.where(size > 0, size, 1.0)  # a point is one pixel
    cover = pixels[1:] / whole
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where((cover >= MIN_COVER) & (pixels[1:] > 0), total[1:] / pixels[1:], np.nan)
    return mean * whole, mean


def require_pixels(found: int, raster: MapRaster, excluded: bool) -> None:
    """Raise :class:`MissingError` where nothing of the map could be compared."""
    if found:
        return
    if excluded:
        raise UsageError(
            f"All labels that meet {raster.path.name} lie on ground that the map's model was trained on.",
            hint="Give labels elsewhere, or assess the training ground too, which flatters the map.",
        )
    raise MissingError(
        f"The labels do not overlap the map {raster.path}.",
        hint="Check the labels' CRS, and that they are of this city.",
    )
