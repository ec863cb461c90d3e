"""Vector files (GeoPackage, GeoJSON, GeoParquet, shapefile, any CRS) of OSM elements or of a user's own objects."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, NoFileError, UsageError
from rsosm_cli.geometry import WGS84
from rsosm_cli.osm.elements import NODE, RELATION, WAY, tags_array
from rsosm_cli.osm.mend import mended
from rsosm_cli.osm.rules import informative
from rsosm_cli.osm.shapes import LINE, POINT, POLYGON
from rsosm_cli.osm.sink import Batch, ElementSink
from rsosm_cli.osm.tag_texts import sign_of, unpacked
from rsosm_cli.progress import SILENT, Progress

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd

log = logging.getLogger("rsosm")

SUFFIXES = (".gpkg", ".geojson", ".json", ".parquet", ".geoparquet", ".shp", ".fgb", ".gml")
# Columns that say which element a row is (as written by rsosm, OSMnx, overpass turbo, GDAL, osm2pgsql, QuickOSM).
# Where several do, the first that names one counts.
_ID_COLUMNS = ("osm_id", "@id", "osmid", "full_id", "osm_way_id", "id")
_TYPE_COLUMNS = ("osm_type", "@type", "element", "element_type")
# Columns of all tags of a row; where one of the first three holds them, the other columns are no tags.
_WHOLE_COLUMNS = ("tags", "label", "labels")
_TAG_COLUMNS = (*_WHOLE_COLUMNS, "other_tags", "all_tags")
# Bookkeeping of the formats, no tags.
_OTHER_COLUMNS = ("kind", "bbox", "fid", "ogc_fid", "z_order", "way_area", "version", "timestamp", "changeset", "uid")
_TYPES = {"n": NODE, "node": NODE, "w": WAY, "way": WAY, "r": RELATION, "relation": RELATION, "rel": RELATION}
# Layers of relations, as GDAL makes them of OSM files; where ways have a column of their own, osm_id is a relation's.
_RELATION_LAYERS = ("multilinestrings", "other_relations")
_WAY_COLUMN = "osm_way_id"
_NEGATED = 1 << 40  # osm2pgsql writes relations' ids below zero, down to here; ids of ours lie beyond
_KINDS = {0: POINT, 1: LINE, 2: LINE, 3: POLYGON, 6: POLYGON}  # by shapely's type id
_PARQUET = (".parquet", ".geoparquet")
_FORMATS = "Give a GeoPackage, GeoJSON, GeoParquet or shapefile."
_ROWS = 20_000  # features on their way to the table at a time
_LOOKED_AT = 1000  # values that tell whether a column holds tags


def is_vector_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def layers_of(path: Path) -> list[str | None]:
    """Return the layers of a vector file that have geometry; of GeoParquet, which has no layers, ``None``.

    Raises :class:`MissingError`, :class:`FormatError` (unreadable, or nothing but tables).
    """
    import pyogrio

    if not path.is_file():
        raise NoFileError(f"There is no vector file {path}.")
    if path.suffix.lower() in _PARQUET:
        return [None]
    with _reading(path):
        layers = [str(name) for name, geometry in pyogrio.list_layers(path) if geometry is not None]
    if not layers:
        raise FormatError(f"{path.name} has no geometry.", hint=_FORMATS)
    return list(layers)


def refuse_several(name: str, layers: Sequence[str | None]) -> None:
    """Raise :class:`FormatError` where a file of one layer is asked for and has several: none is chosen in silence."""
    if len(layers) > 1:
        raise FormatError(
            f"{name} has several layers: {', '.join(map(str, layers))}.",
            hint="Save the one that is meant as a file of its own.",
        )


def read_vectors(
    path: Path, bounds: tuple[float, float, float, float] | None = None, layer: str | None = None
) -> gpd.GeoDataFrame:
    """Return the features of a layer (default: the first) in its own CRS; ``bounds`` (WGS 84): those near a place.

    Raises :class:`MissingError`, :class:`FormatError` (unreadable), :class:`UsageError` (no CRS).
    """
    import geopandas as gpd
    import pyogrio
    from pyproj import Transformer

    def box_in(crs: Any) -> tuple[float, float, float, float] | None:
        if bounds is None or crs is None:
            return None
        return Transformer.from_crs(WGS84, crs, always_xy=True).transform_bounds(*bounds, densify_pts=21)

    layer = layer or layers_of(path)[0]
    with _reading(path):
        if layer is None:
            frame = gpd.read_parquet(path)
        else:
            box = box_in(pyogrio.read_info(path, layer=layer)["crs"])
            frame = gpd.read_file(path, layer=layer, bbox=box, engine="pyogrio")
    if not isinstance(frame, gpd.GeoDataFrame):
        raise FormatError(f"{path.name} has no geometry.", hint=_FORMATS)
    if frame.crs is None:
        raise UsageError(f"{path.name} does not say its CRS.", hint="Assign one, for instance in QGIS, and save it.")
    if layer is None and (box := box_in(frame.crs)) is not None:
        west, south, east, north = frame.bounds.to_numpy().T
        frame = frame[(west <= box[2]) & (east >= box[0]) & (south <= box[3]) & (north >= box[1])]
    return frame


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa
    from pyogrio.errors import DataLayerError, DataSourceError

    try:
        yield
    except (DataSourceError, DataLayerError, pa.ArrowInvalid, ValueError, OSError) as error:
        raise FormatError(f"{path.name} is damaged or not a vector file.", hint=_FORMATS) from error


def _unplaced(path: Path, layer: str | None) -> tuple[int, int]:
    """Return how many rows of a layer have no geometry, and how many there are: a box leaves such rows out."""
    import pyarrow.parquet as pq
    import pyogrio

    with _reading(path):
        if layer is None:
            with pq.ParquetFile(path) as file:
                geometry = json.loads(file.schema_arrow.metadata[b"geo"])["primary_column"]
                batches = file.iter_batches(columns=[geometry])
                return sum(batch.column(0).null_count for batch in batches), file.metadata.num_rows
        info = pyogrio.read_info(path, layer=layer)
        if info["driver"] == "FlatGeobuf" and info["capabilities"]["fast_spatial_filter"]:
            return 0, info["features"]  # its index has no place for them
        if info["driver"] == "GPKG":  # without a look at the other rows' shapes
            name = info["geometry_name"].replace('"', '""')
            where = f'"{name}" IS NULL OR ST_IsEmpty("{name}")'
            found = pyogrio.raw.read(
                path, layer=layer, columns=[], read_geometry=False, return_fids=True, where=where
            )  # fmt: skip
            return len(found[1]), info["features"]
        ids, boxes = pyogrio.read_bounds(path, layer=layer)
        return int(np.isnan(boxes[0]).sum()), len(ids)


def _box(path: Path, layer: str | None) -> NDArray[np.float64]:
    """Return the boxes (n, 4), WGS 84, that the rows of a layer lie in, as far as the file tells without reading it.

    Raises :class:`FormatError` where they would lie beyond the Earth.
    """
    import pyogrio
    from pyproj import CRS, Transformer

    if layer is None:
        return np.empty((0, 4))
    with _reading(path):
        info = pyogrio.read_info(path, layer=layer, force_total_bounds=True)
    if info["total_bounds"] is None or not np.isfinite(info["total_bounds"]).all():  # of rows without a geometry
        return np.empty((0, 4))
    west, south, east, north = info["total_bounds"]
    if CRS(info["crs"]).is_geographic and (min(west, south) < -180 or east > 180 or max(-south, north) > 90):
        raise FormatError(
            f"{path.name} lies in {west:.0f} {south:.0f} {east:.0f} {north:.0f}, which are no degrees, as those of "
            f"{CRS(info['crs']).name} are.",
            hint="Assign the CRS that its coordinates are in, for instance in QGIS, and save it.",
        )
    box = Transformer.from_crs(info["crs"], WGS84, always_xy=True).transform_bounds(west, south, east, north)
    return np.array([box])


def read_vector_elements(path: Path, sink: ElementSink, *, progress: Progress = SILENT) -> list[str]:
    """Put the objects of a vector file, of all its layers, into ``sink``; return notes on rows that are left out.

    Raises :class:`MissingError`, :class:`FormatError` (unreadable; a column of tags without any), :class:`UsageError`.
    """
    bounds = None if sink.place is None else sink.place.bounds
    layers = layers_of(path)
    rows = near = unplaced = unread = 0
    with progress.task(f"Reading {path.name}", len(layers), "layers") as advance:
        for layer in layers:
            frame = read_vectors(path, bounds, layer)
            columns = tag_columns(frame)
            if columns.unread and not (columns.packed or columns.plain):
                raise FormatError(
                    f"The column {columns.unread[0]} of {path.name} holds no tags.",
                    hint="Write them as key:value;key:value, or give each key a column of its own.",
                )
            for column in columns.unread:
                log.info("The column %s of %s holds no tags: it is left out.", column, path.name)
            missing, total = _unplaced(path, layer)
            unplaced, rows = unplaced + missing, rows + total
            if total and not len(frame):
                sink.saw(_box(path, layer))
            for start in range(0, len(frame), _ROWS):
                part = frame.iloc[start : start + _ROWS]
                part = part[~(part.geometry.isna() | part.geometry.is_empty)]
                near += len(part)
                unread += _take(part.to_crs(WGS84), layer, columns, sink)
            advance(1)
    sink.counts.unplaced += unplaced
    sink.counts.unread += unread
    notes = []
    if unplaced:
        notes.append(f"{unplaced} of {rows} rows of {path.name} have no geometry and are left out.")
    if unread:
        read, where = (rows, "") if near + unplaced == rows else (near, " near the place")
        notes.append(f"{unread} of {read} rows of {path.name}{where} have tags that cannot be read and are left out.")
    return notes


def _take(frame: gpd.GeoDataFrame, layer: str | None, columns: TagColumns, sink: ElementSink) -> int:
    """Put the rows with tags into ``sink``; return how many are left out as theirs could not be read."""
    import shapely

    tags, unread = _tags_of(frame, columns)
    of_relations = layer in _RELATION_LAYERS or _WAY_COLUMN in [str(c).lower() for c in frame.columns]
    if of_relations:  # their type is in what they are
        tags = [{k: v for k, v in t.items() if k != "type"} for t in tags]
    tagged = np.array([bool(informative(t)) for t in tags], bool)
    frame, tags = frame[tagged], [t for t, keep in zip(tags, tagged, strict=True) if keep]
    if len(frame):
        geometry, row, first = _parts(shapely.force_2d(frame.geometry.to_numpy()))
        kind = np.array([_KINDS[t] for t in shapely.get_type_id(geometry)], np.uint8)
        tags = [tags[i] for i in row]
        osm_type, osm_id = _identity(frame, row, first, kind, geometry, tags, of_relations)
        batch = Batch(osm_type=osm_type, osm_id=osm_id, kind=kind, tags=tags_array(tags), geometry=geometry)
        sink.add(mended(batch, sink.counts))
    return unread


def _parts(geometry: NDArray[np.object_]) -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.bool_]]:
    """Return simple geometries, the row of each, and whether it is the row's first; multipolygons stay whole."""
    import shapely

    row = np.arange(len(geometry))
    while True:
        several = ~np.isin(shapely.get_type_id(geometry), (0, 1, 2, 3, 6))
        if not several.any():
            break
        parts, owner = shapely.get_parts(geometry[several], return_index=True)
        geometry = np.concatenate([geometry[~several], parts])
        row = np.concatenate([row[~several], row[several][owner]])
    order = np.argsort(row, kind="stable")
    geometry, row = geometry[order], row[order]
    first = np.concatenate([[True], row[1:] != row[:-1]])
    return geometry, row, first


def row_tags(frame: gpd.GeoDataFrame) -> list[dict[str, str]]:
    """Return the tags of every row, by the columns of the whole frame: see :func:`tag_columns`."""
    return _tags_of(frame, tag_columns(frame))[0]


@dataclass(frozen=True)
class TagColumns:
    """Which columns of a table say the tags: ``packed`` all of a row's, ``plain`` one tag each, its key their name.

    ``unread``: columns called like the packed ones whose texts are no tags (a class, a remark).
    """

    packed: dict[str, str | None]  # with the sign between keys and values, where the texts tell
    plain: tuple[str, ...]
    unread: tuple[str, ...] = ()


def tag_columns(frame: gpd.GeoDataFrame) -> TagColumns:
    """Return the columns with tags: those of all tags where they hold some, else all but bookkeeping."""
    names = {str(c): str(c).lower() for c in frame.columns if c != frame.geometry.name}
    # A column of numbers called `label` is a class, not tags.
    called = [c for c, low in names.items() if low in _TAG_COLUMNS and frame[c].dtype.kind not in "iufb"]
    packed = {c: sign_of(_some(frame[c])) for c in called if _holds_tags(frame[c])}
    unread = [c for c in called if c not in packed and frame[c].notna().any()]
    whole = any(names[c] in _WHOLE_COLUMNS for c in packed)
    skipped = {*_ID_COLUMNS, *_TYPE_COLUMNS, *_TAG_COLUMNS, *_OTHER_COLUMNS}
    plain = [] if whole else [c for c, low in names.items() if low not in skipped]
    return TagColumns(packed, tuple(plain), tuple(unread))


def _holds_tags(column: pd.Series) -> bool:
    """Return whether most texts of a column are tags: a remark may have a colon, too."""
    some = [tags for tags in map(unpacked, _some(column)) if tags != {}]  # empty texts tell nothing
    return 2 * sum(tags is not None for tags in some) > len(some)


def _some(column: pd.Series) -> list[Any]:
    return column.dropna().head(_LOOKED_AT).tolist()


def _tags_of(frame: gpd.GeoDataFrame, columns: TagColumns) -> tuple[list[dict[str, str]], int]:
    """Return the tags of every row, and how many rows have none because what they say could not be read."""
    tags: list[dict[str, str]] = [{} for _ in range(len(frame))]
    unread = set()
    for column, sign in columns.packed.items():
        for row, value in enumerate(frame[column].tolist()):
            found = unpacked(value, sign)
            if found is None:
                unread.add(row)
            else:
                tags[row].update(found)
    for column in columns.plain:
        values = frame[column]
        for i in np.flatnonzero(values.notna().to_numpy()):
            text = _text(values.iloc[i])
            if text:
                tags[i][column] = text
    return tags, sum(not tags[row] for row in unread)


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # numbers pass through float columns where others are missing
    return str(value).strip()


def _identity(
    frame: gpd.GeoDataFrame,
    row: NDArray[np.int64],
    first: NDArray[np.bool_],
    kind: NDArray[np.uint8],
    geometry: NDArray[np.object_],
    tags: list[dict[str, str]],
    of_relations: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return type and id of every part; where the file gives none, a negative id made from shape and tags."""
    import shapely

    osm_type = np.where(kind == POINT, NODE, WAY).astype(np.uint8)
    osm_id = np.zeros(len(row), np.int64)
    given_type, given_id = _given_first(frame, of_relations)
    known = first & (given_id[row] != 0)
    osm_id[known] = given_id[row][known]
    typed = known & (given_type[row] >= 0)
    osm_type[typed] = given_type[row][typed]
    negated = known & ~typed & (kind != POINT) & (osm_id < 0) & (osm_id > -_NEGATED)
    osm_type[negated], osm_id[negated] = RELATION, -osm_id[negated]
    wkb = shapely.to_wkb(geometry, output_dimension=2, byte_order=1)
    for i in np.flatnonzero(osm_id == 0):
        text = json.dumps(sorted(tags[i].items()), ensure_ascii=False).encode()
        digest = hashlib.sha256(wkb[i] + text).digest()
        osm_id[i] = -(int.from_bytes(digest[:8], "big") >> 4) - 1  # room for two bits of type beside it
    return osm_type, osm_id


def _given_first(frame: gpd.GeoDataFrame, of_relations: bool) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Return type (-1: not said) and id (0: not said) of every row, by the first of its columns that says one."""
    lower = {str(c).lower(): c for c in frame.columns}
    types = next((frame[lower[c]] for c in _TYPE_COLUMNS if c in lower), None)
    osm_type, osm_id = np.full(len(frame), -1, np.int8), np.zeros(len(frame), np.int64)
    for column in (c for c in _ID_COLUMNS if c in lower):
        given_type, given_id = _given(frame[lower[column]], types)
        if column == "id":  # numbers alone count the rows of any file: OSM's say of which type they are
            given_id[given_type < 0] = 0
        elif column == _WAY_COLUMN:
            given_type[given_type < 0] = WAY
        elif column == "osm_id" and of_relations:
            given_type[given_type < 0] = RELATION
        new = (osm_id == 0) & (given_id != 0)
        osm_type[new], osm_id[new] = given_type[new], given_id[new]
    return osm_type, osm_id


def _given(ids: pd.Series, types: pd.Series | None) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Return type (-1: not said) and id (0: not said) of every row, from ``123``, ``way/123`` or ``w123``."""
    osm_type = np.full(len(ids), -1, np.int8)
    osm_id = np.zeros(len(ids), np.int64)
    for i, value in enumerate(ids.tolist()):
        match = re.fullmatch(r"([a-z]*)[/ ]?(-?\d+)(?:\.0)?", str(value).strip().lower())
        if match is not None and (not match.group(1) or match.group(1) in _TYPES):
            osm_id[i] = int(match.group(2))
            osm_type[i] = _TYPES.get(match.group(1), -1)
    if types is not None:
        said = np.array([_TYPES.get(str(t).strip().lower(), -1) for t in types.tolist()], np.int8)
        osm_type = np.where(said >= 0, said, osm_type).astype(np.int8)
    return osm_type, osm_id
