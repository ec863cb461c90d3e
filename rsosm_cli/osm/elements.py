"""The one element table that every OSM source becomes: GeoParquet on disk, arrays in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, MissingError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

OSM_TYPES: tuple[str, ...] = ("node", "way", "relation")
NODE, WAY, RELATION = range(len(OSM_TYPES))
KINDS: tuple[str, ...] = ("point", "line", "polygon")
ROW_GROUP = 8192  # elements: a window of a few tiles then reads a few hundred kilobytes, not the city
_COLUMNS = ("osm_type", "osm_id", "kind", "tags", "geometry", "bbox")


@dataclass(frozen=True)
class Elements:
    """OSM elements in memory, in one CRS. All arrays have length ``N``, sorted by (osm_type, osm_id, kind)."""

    crs: str
    osm_type: NDArray[np.uint8]  # index into OSM_TYPES
    osm_id: NDArray[np.int64]
    kind: NDArray[np.uint8]  # index into KINDS
    tags: list[dict[str, str]]
    geometry: NDArray[np.object_]  # shapely geometries, kept whole

    def __len__(self) -> int:
        return len(self.osm_id)


def schema() -> pa.Schema:
    """Return the Arrow schema of ``osm.parquet``, without its metadata."""
    import pyarrow as pa

    corner = pa.float64()
    return pa.schema(
        [
            pa.field("osm_type", pa.string(), nullable=False),
            pa.field("osm_id", pa.int64(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("tags", pa.map_(pa.string(), pa.string()), nullable=False),
            pa.field("geometry", pa.binary(), nullable=False),
            pa.field("bbox", pa.struct([(name, corner) for name in ("xmin", "ymin", "xmax", "ymax")]), nullable=False),
        ]
    )


def geo_metadata(kinds: NDArray[np.uint8], bounds: tuple[float, float, float, float] | None) -> dict[bytes, bytes]:
    """Return GeoParquet 1.1 file metadata; the CRS is the format's default, longitude and latitude of WGS 84."""
    covering = {corner: ["bbox", corner] for corner in ("xmin", "ymin", "xmax", "ymax")}
    names = (("Point",), ("LineString",), ("MultiPolygon", "Polygon"))
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({name for kind in np.unique(kinds) for name in names[kind]}),
        "covering": {"bbox": covering},
    }
    if bounds is not None:
        column["bbox"] = list(bounds)
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return {b"geo": json.dumps(geo, sort_keys=True).encode()}


def map_array(offsets: NDArray[np.int64], keys: pa.Array, values: pa.Array) -> pa.MapArray:
    """Return the tags of ``len(offsets) - 1`` elements as one Arrow map array."""
    import pyarrow as pa

    return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), keys.cast(pa.string()), values.cast(pa.string()))


def tags_array(tags: list[dict[str, str]]) -> pa.MapArray:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(t) for t in tags], dtype=np.int64)]).astype(np.int64)
    keys = pa.array([k for t in tags for k in t], pa.string())
    values = pa.array([v for t in tags for v in t.values()], pa.string())
    return map_array(offsets, keys, values)


def open_elements(path: Path) -> pq.ParquetFile:
    """Return an element file opened and checked. Raises :class:`MissingError` or :class:`FormatError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise MissingError(f"There is no file of OSM elements {path}.", hint="Make it with rsosm fetch.")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(
            f"{path} is not a readable Parquet file.",
            hint="Make it again with rsosm fetch --force.",
        ) from error
    missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
    if missing:
        file.close()
        raise FormatError(
            f"{path} is not a table of OSM elements: column {missing[0]!r} is missing.",
            hint="Give it to rsosm fetch --osm, which takes vector files with tags in columns.",
        )
    return file


def read_elements(
    path: Path, crs: str | None = None, bounds: tuple[float, float, float, float] | None = None
) -> Elements:
    """Return the elements of ``osm.parquet`` in ``crs`` (default WGS 84).

    ``bounds`` (west, south, east, north, in ``crs``): only elements whose box meets it, reading only the row groups
    that can hold one. Geometries are whole either way. Raises :class:`MissingError`, :class:`FormatError`.
    """
    import pyarrow as pa

    from rsosm_cli.geometry import WGS84

    crs = crs or WGS84
    box = None if bounds is None else _wgs84_box(bounds, crs)
    with open_elements(path) as file:
        try:
            if box is None:
                table = file.read(columns=list(_COLUMNS[:-1]))
            else:  # a group at a time: many more can hold an element of the box than do
                parts = [_meeting(file.read_row_group(g, columns=list(_COLUMNS)), box) for g in _groups(file, box)]
                table = pa.concat_tables(parts or [file.schema_arrow.empty_table()])
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"{path} is damaged.", hint="Make it again with rsosm fetch --force.") from error
    return _in_memory(table, crs, path)


def element_groups(path: Path, crs: str) -> Iterator[Elements]:
    """Yield the elements of ``osm.parquet`` in ``crs`` a row group at a time: memory stays that of one group.

    Raises :class:`MissingError`, :class:`FormatError`.
    """
    import pyarrow as pa

    with open_elements(path) as file:
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=list(_COLUMNS[:-1]))
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(f"{path} is damaged.", hint="Make it again with rsosm fetch --force.") from error
            yield _in_memory(table, crs, path)


def element_middles(path: Path, crs: str) -> Iterator[NDArray[np.float64]]:
    """Yield (n, 2) middles of the elements' boxes in ``crs``, a row group at a time."""
    from pyproj import Transformer

    from rsosm_cli.geometry import WGS84

    project = Transformer.from_crs(WGS84, crs, always_xy=True)
    for boxes, _ in _boxes(path):
        west, south, east, north = boxes.T
        yield np.stack(project.transform((west + east) / 2, (south + north) / 2), axis=1)


def polygon_boxes(path: Path) -> Iterator[NDArray[np.float64]]:
    """Yield (n, 4) west, south, east, north of the elements that are polygons, WGS 84, a row group at a time."""
    for boxes, kinds in _boxes(path):
        yield boxes[kinds == KINDS.index("polygon")]


def _boxes(path: Path) -> Iterator[tuple[NDArray[np.float64], NDArray[np.uint8]]]:
    """Yield the boxes (n, 4) and kinds (n,) of the elements, a row group at a time."""
    import pyarrow as pa

    with open_elements(path) as file:
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=["bbox", "kind"])
            except (pa.ArrowInvalid, OSError) as error:
                raise FormatError(f"{path} is damaged.", hint="Make it again with rsosm fetch --force.") from error
            box = table["bbox"].combine_chunks()
            corners = [box.field(name).to_numpy(zero_copy_only=False) for name in ("xmin", "ymin", "xmax", "ymax")]
            yield np.stack(corners, axis=1), _codes(table["kind"], KINDS, path)


def _in_memory(table: pa.Table, crs: str, path: Path) -> Elements:
    import pyarrow as pa
    import shapely

    from rsosm_cli.geometry import WGS84, reproject

    table = table.combine_chunks()
    osm_type = _codes(table["osm_type"], OSM_TYPES, path)
    kind = _codes(table["kind"], KINDS, path)
    osm_id = table["osm_id"].to_numpy()
    order = np.lexsort((kind, osm_id, osm_type))
    table = table.take(pa.array(order))
    geometry = shapely.from_wkb(table["geometry"].to_numpy())
    return Elements(
        crs=crs,
        osm_type=osm_type[order],
        osm_id=osm_id[order],
        kind=kind[order],
        tags=_tag_dicts(table["tags"]),
        geometry=reproject(geometry, WGS84, crs) if len(geometry) else geometry,
    )


def _codes(column: pa.ChunkedArray, names: tuple[str, ...], path: Path) -> NDArray[np.uint8]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(column, value_set=pa.array(names))
    if found.null_count:
        value = column.filter(pc.is_null(found))[0].as_py()
        raise FormatError(f"{path} holds the unknown value {value!r}.", hint=f"Known: {', '.join(names)}.")
    return found.to_numpy().astype(np.uint8)


def _tag_dicts(column: pa.ChunkedArray) -> list[dict[str, str]]:
    import pyarrow as pa

    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy()
    start, stop = int(offsets[0]), int(offsets[-1])

    def strings(part: pa.Array) -> list[str]:
        # Through a dictionary, so that one string object serves every element that has it.
        coded = part.slice(start, stop - start).dictionary_encode()
        return np.array([*coded.dictionary.to_pylist(), ""], dtype=object)[coded.indices.to_numpy()].tolist()

    keys, values = strings(array.keys), strings(array.items)
    bounds = (offsets - start).tolist()
    return [dict(zip(keys[a:b], values[a:b], strict=True)) for a, b in pairwise(bounds)]


def _wgs84_box(bounds: tuple[float, float, float, float], crs: str) -> tuple[float, float, float, float]:
    from pyproj import Transformer

    from rsosm_cli.geometry import WGS84

    if crs == WGS84:
        return bounds
    west, south, east, north = Transformer.from_crs(crs, WGS84, always_xy=True).transform_bounds(
        *bounds, densify_pts=21
    )
    return (west, south, east, north) if west <= east else (-180.0, south, 180.0, north)


def _meeting(table: pa.Table, box: tuple[float, float, float, float]) -> pa.Table:
    """Return the rows whose boxes meet ``box``."""
    import pyarrow as pa

    corners = table["bbox"].combine_chunks().flatten()
    xmin, ymin, xmax, ymax = (c.to_numpy(zero_copy_only=False) for c in corners)
    meets = (xmin <= box[2]) & (xmax >= box[0]) & (ymin <= box[3]) & (ymax >= box[1])
    return table.filter(pa.array(meets)).drop_columns("bbox")


def _groups(file: pq.ParquetFile, box: tuple[float, float, float, float]) -> list[int]:
    """Return the row groups whose elements can meet ``box``, from the statistics of the covering columns."""
    metadata = file.metadata
    paths = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    xmin, ymin, xmax, ymax = (paths[f"bbox.{corner}"] for corner in ("xmin", "ymin", "xmax", "ymax"))
    kept = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(i).statistics for i in (xmin, ymin, xmax, ymax)]
        if all(s is not None and s.has_min_max for s in columns):
            x0, y0, x1, y1 = columns[0].min, columns[1].min, columns[2].max, columns[3].max
            if x0 > box[2] or x1 < box[0] or y0 > box[3] or y1 < box[1]:
                continue
        kept.append(group)
    return kept
