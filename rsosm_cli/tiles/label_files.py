"""Label files: rasters, vector files and CSV tables, read into one CRS with their values as class codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, NoFileError, UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.osm.vectors import refuse_several
from rsosm_cli.settings import TaskSettings

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely import Geometry

IGNORE = 255  # "no label" in class rasters; GDAL's usual nodata of a byte raster, and more classes than a task has
LON_COLUMNS = ("lon", "longitude", "lng", "long", "x")
LAT_COLUMNS = ("lat", "latitude", "y")


@dataclass(frozen=True)
class VectorLayer:
    """Features of one file in the CRS of the labels."""

    name: str
    geometry: NDArray[np.object_]  # (N,) points widened to what they speak for
    source: NDArray[np.object_]  # (N,) as they came
    codes: NDArray[np.float64]  # (N,) class index, or value (regression); NaN where ``shares`` say it
    ground: Geometry | None  # where uncovered ground is background; None: nowhere
    shares: NDArray[np.float64] | None = None  # (N, K) of the classes (distribution)


@dataclass(frozen=True)
class RasterLayer:
    name: str
    path: Path
    bounds: tuple[float, float, float, float]  # in the CRS of the labels


def read_raster(path: Path, crs: str) -> RasterLayer:
    import rasterio
    from rasterio.errors import RasterioIOError
    from rasterio.warp import transform_bounds

    try:
        with rasterio.open(path) as source:
            if source.crs is None:
                raise FormatError(
                    f"The label raster {path} has no CRS.", hint="Set one, for example with gdal_edit.py -a_srs."
                )
            return RasterLayer(path.name, path, transform_bounds(source.crs, crs, *source.bounds))
    except RasterioIOError as error:
        raise FormatError(f"The label raster {path} cannot be read: {error}.") from error


def read_vector(path: Path, task: TaskSettings, crs: str, extent: Geometry | None, notes: list[str]) -> VectorLayer:
    import shapely

    frame = read_frame(path)
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
    if not len(frame) and extent is None:
        raise FormatError(f"{path} holds no geometry.", hint="Give labels with at least one feature, or an extent.")
    shares = _shares(frame, task, path)
    codes = np.full(len(frame), np.nan) if shares is not None else _codes(frame, task, path)
    geometry = np.asarray(frame.geometry, dtype=object)
    broken = ~shapely.is_valid(geometry)
    if broken.any():
        geometry[broken] = shapely.make_valid(geometry[broken])
        notes.append(f"{path.name}: {int(broken.sum())} invalid geometries were mended.")
    geometry = reproject(geometry, frame.crs.to_string(), crs)
    source = geometry.copy()
    if task.kind != "regression" and task.point_radius_m > 0:
        at = shapely.get_dimensions(geometry) == 0
        geometry[at] = shapely.buffer(geometry[at], task.point_radius_m)
    ground = None
    if task.kind != "regression" and task.background is not None and shares is None:
        ground = extent
        # Points are a sample of places: what lies between them is not labelled, unless an extent says that it is.
        if extent is None and (shapely.get_dimensions(source) > 0).any():
            ground = shapely.convex_hull(shapely.union_all(shapely.convex_hull(geometry)))
            notes.append(
                f"{path.name}: ground that no label covers counts as {task.background} within the convex hull of the "
                "labels; --labels-extent says otherwise."
            )
    if shares is not None:
        keep, cut = np.isfinite(shares).all(axis=1) & (shares.sum(axis=1) > 0), np.zeros(len(codes), bool)
        shares = shares[keep]
    else:
        keep = np.isfinite(codes) & (codes != IGNORE if task.kind != "regression" else True)
        cut = ~np.isfinite(codes) if task.kind == "regression" else codes == IGNORE
    if cut.any() and ground is not None:
        ground = shapely.difference(ground, shapely.union_all(geometry[cut]))  # ignored areas are not background
    return VectorLayer(path.name, geometry[keep], source[keep], codes[keep], ground, shares)


def cells_of(
    layer: RasterLayer, crs: str, task: TaskSettings, bounds: tuple[float, float, float, float]
) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
    """Return the cells of a raster around ``bounds`` (in ``crs``) as polygons in ``crs``, with their values."""
    import rasterio
    import shapely
    from rasterio.warp import transform_bounds
    from rasterio.windows import Window

    with rasterio.open(layer.path) as source:
        west, south, east, north = transform_bounds(crs, source.crs, *bounds)
        t = source.transform
        if t.b or t.d:
            raise FormatError(f"The label raster {layer.path} is rotated.", hint="Warp it north up (gdalwarp).")
        cols = np.clip(np.sort([(west - t.c) / t.a, (east - t.c) / t.a]), 0, source.width)
        rows = np.clip(np.sort([(north - t.f) / t.e, (south - t.f) / t.e]), 0, source.height)
        window = Window.from_slices(
            (int(np.floor(rows[0])), int(np.ceil(rows[1]))), (int(np.floor(cols[0])), int(np.ceil(cols[1])))
        )
        if not (window.width and window.height):
            return np.empty(0, object), np.empty(0)
        values = source.read(1, window=window).astype(np.float64)
        valid = (source.read_masks(1, window=window) > 0) & np.isfinite(values)
        transform = source.window_transform(window)
        source_crs = source.crs.to_string()
    valid &= ~np.isin(values, task.ignore)
    rows, cols = np.nonzero(valid)
    west, east = transform.c + transform.a * cols, transform.c + transform.a * (cols + 1)
    north, south = transform.f + transform.e * rows, transform.f + transform.e * (rows + 1)
    return reproject(shapely.box(west, south, east, north), source_crs, crs), values[valid]


def read_frame(path: Path) -> GeoDataFrame:
    """Return a vector file, GeoParquet or CSV with lon/lat columns as a GeoDataFrame with a CRS."""
    import geopandas
    import pandas
    import pyogrio
    from pyogrio.errors import DataSourceError

    if not path.exists():
        raise NoFileError(f"There is no file {path}.", path=str(path))
    suffix = path.suffix.lower()
    if suffix in (".csv", ".txt", ".tsv"):
        try:
            table = pandas.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
        except (ValueError, OSError) as error:
            raise FormatError(f"{path} cannot be read as a table: {error}.") from error
        names = {str(c).strip().casefold(): c for c in table.columns}
        lon = next((names[n] for n in LON_COLUMNS if n in names), None)
        lat = next((names[n] for n in LAT_COLUMNS if n in names), None)
        if lon is None or lat is None:
            raise FormatError(
                f"{path} has no columns for longitude and latitude: {', '.join(map(str, table.columns))}.",
                hint="Name them lon and lat (degrees, WGS 84).",
            )
        return geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(table[lon], table[lat]), crs=WGS84)
    try:
        layers = [] if suffix == ".parquet" else [n for n, kind in pyogrio.list_layers(path) if kind is not None]
        if suffix == ".parquet":
            frame = geopandas.read_parquet(path)
        elif len(layers) <= 1:
            frame = geopandas.read_file(path, layer=layers[0] if layers else None)  # not a table beside it
    except (DataSourceError, ValueError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read as a vector file: {error}.",
            hint="Give GeoPackage, GeoJSON, GeoParquet, Shapefile or CSV.",
        ) from error
    refuse_several(str(path), layers)
    if not isinstance(frame, geopandas.GeoDataFrame):
        raise FormatError(f"{path} holds a table without geometry.", hint="Give a layer with geometries.")
    if frame.crs is None:
        raise FormatError(f"{path} has no CRS.", hint="Save it with one.")
    return frame


def class_codes(task: TaskSettings, values: Sequence[Any], where: str) -> NDArray[np.uint8]:
    """Return the class index of each label value; ``ignore`` values and nulls give IGNORE.

    A value is a class's ``value``, or its name (case apart), or its place in the list from 0 where it has no ``value``.
    """
    by_value: dict[str, int] = {}
    for i, entry in enumerate(task.classes):
        by_value[entry.name.casefold()] = i
        by_value[_plain(i if entry.value is None else entry.value)] = i
    ignored = {_plain(v) for v in task.ignore}
    codes, unknown = [], []
    for value in values:
        plain = _plain(value)
        if plain in by_value:
            codes.append(by_value[plain])
        elif plain in ignored or plain in ("", "nan", "none", "<na>"):
            codes.append(IGNORE)
        else:
            unknown.append(str(value))
    if unknown:
        shown = ", ".join(sorted(set(unknown))[:8])
        known = ", ".join(c.name if c.value is None else f"{c.name} ({c.value})" for c in task.classes)
        raise UsageError(
            f"{where}: the labels hold classes that task {task.name} does not know: {shown}.",
            hint=f"Known: {known}. Add them to the task's `classes`, or name its attribute: --set attribute=NAME",
            unknown=sorted(set(unknown)),
        )
    return np.array(codes, np.uint8)


def _codes(frame: GeoDataFrame, task: TaskSettings, path: Path) -> NDArray[np.float64]:
    """Return class indices or values of the features, NaN or IGNORE where they have none."""
    import pandas

    others = [c.name for c in task.classes if c.name != task.background]
    columns = [str(c) for c in frame.columns if c != frame.geometry.name]
    if task.attribute not in columns:
        if task.categorical and task.background is not None and len(others) == 1:
            index = [c.name for c in task.classes].index(others[0])
            return np.full(len(frame), float(index))
        raise UsageError(
            f"{path} has no attribute {task.attribute!r}: it has {', '.join(columns) or 'none'}.",
            hint=f"Name the one that holds the {'class' if task.classes else 'value'}: --set attribute=NAME",
        )
    column = frame[task.attribute]
    if task.kind == "regression":
        return pandas.to_numeric(column, errors="coerce").to_numpy(np.float64)
    found, where = np.unique(column.map(_plain).to_numpy(dtype=str), return_inverse=True)
    return class_codes(task, found.tolist(), path.name)[where].astype(np.float64)


def _shares(frame: GeoDataFrame, task: TaskSettings, path: Path) -> NDArray[np.float64] | None:
    """Return the shares of the classes (N, K) where each has a column, rows adding up to 1 (or 0); else None."""
    import pandas

    if task.kind != "distribution":
        return None
    columns = {str(c).strip().casefold(): c for c in frame.columns}
    if not all(c.name.casefold() in columns for c in task.classes):
        return None
    table = frame[[columns[c.name.casefold()] for c in task.classes]].apply(pandas.to_numeric, errors="coerce")
    shares = table.to_numpy(np.float64)
    if (shares < 0).any():
        raise FormatError(f"{path} has negative shares of the classes.", hint="Give shares, amounts or counts from 0.")
    total = shares.sum(axis=1, keepdims=True)
    return np.where(total > 0, shares / np.where(total > 0, total, 1), shares)


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().casefold()
