"""``tiles.h5``: images and heterographs of a city's tiles as flat arrays, read through memory maps.

The layout is documented in ``docs/formats.md``. Every array is contiguous and uncompressed, so HDF5 serves to find the
arrays and numpy to read them: a tile costs slices, a batch one ragged gather an array.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsosm_cli.errors import FormatError, MissingError, NoFileError
from rsosm_cli.graph.arrays import EdgeArrays, GraphArrays, NodeArrays
from rsosm_cli.graph.pairs import ragged
from rsosm_cli.graph.schema import KEY_POINTS, NODE_TYPES, RELATIONS
from rsosm_cli.settings import BuildSettings

FORMAT = "rsosm tiles"
VERSION = 2

# Bits of an edge's relation, the lowest of its number: no pair of types has more than 8 columns.
_RELATION_BITS = 3

# Order of the nine blocks of the edge arrays.
PAIRS: tuple[tuple[str, str], ...] = tuple((a, b) for a in NODE_TYPES for b in NODE_TYPES)

# Columns of `nodes/<type>`, float32, all in tile units. A point is its own centroid and envelope; the last key point of
# a polygon is its centroid; a line has no area.
SHAPE_COLUMNS: dict[str, tuple[str, ...]] = {
    "point": ("key_points",),
    "line": ("key_points", "length", "centroid", "envelope"),
    "polygon": ("key_points", "area", "length", "envelope"),
}
_WIDTHS = {"area": 1, "length": 1, "centroid": 2, "envelope": 8}


@cache
def column_slices(node_type: str) -> dict[str, slice]:
    """Return where each field lies in the columns of ``nodes/<type>``."""
    slices, start = {}, 0
    for name in SHAPE_COLUMNS[node_type]:
        width = 2 * KEY_POINTS[node_type] if name == "key_points" else _WIDTHS[name]
        slices[name] = slice(start, start + width)
        start += width
    return slices


def shape_width(node_type: str) -> int:
    return max(s.stop for s in column_slices(node_type).values())


def pack_shapes(node_type: str, nodes: NodeArrays) -> NDArray[np.float32]:
    """Return the (N, width) columns of ``nodes/<type>``."""
    n = len(nodes.osm_id)
    packed = np.empty((n, shape_width(node_type)), np.float32)
    for name, where in column_slices(node_type).items():
        packed[:, where] = getattr(nodes, name).reshape(n, where.stop - where.start)
    return packed


def edge_bytes(bits: int) -> int:
    """Return the bytes of an edge whose ends are numbers of ``bits`` bits."""
    return -(-(2 * bits + _RELATION_BITS) // 8)


def pack_edges(index: NDArray[np.integer], relation: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return (E, bytes) little-endian numbers: source, target and relation, from the highest bits down.

    ``index`` (E, 2) numbers below ``2 ** bits``, ``relation`` (E,) columns.
    """
    number = (index[:, 0].astype("<u8") << bits | index[:, 1].astype("<u8")) << _RELATION_BITS | relation
    return number.view(np.uint8).reshape(-1, 8)[:, : edge_bytes(bits)]


def edge_numbers(packed: NDArray[np.uint8], rows: NDArray[np.int64] | slice) -> NDArray[np.unsignedinteger[Any]]:
    """Return the numbers, of 4 or 8 bytes, of ``rows`` of :func:`pack_edges`; the edge is in the highest bytes.

    Edges are copied as they lie, with bytes to begin with, so that every number starts in the bytes of the edge
    before it: there is nothing to put together.
    """
    size = packed.shape[1]
    lead = _edge_lead(size)
    edges = packed.view(f"V{size}")[:, 0]
    n = len(range(*rows.indices(len(edges)))) if isinstance(rows, slice) else len(rows)
    room = np.empty(lead + n * size, np.uint8)
    room[:lead] = 0
    if isinstance(rows, slice):
        room[lead:].view(edges.dtype)[:] = edges[rows]
    else:
        edges.take(rows, out=room[lead:].view(edges.dtype), mode="clip")
    return np.ndarray((n,), f"<u{lead + size}", room, 0, (size,))


def _edge_lead(size: int) -> int:
    """Return the bytes before the first edge of ``size`` bytes that its number begins with."""
    return (4 if size <= 4 else 8) - size


def unpack_edges(
    numbers: NDArray[np.unsignedinteger[Any]], size: int, bits: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return (2, E) sources and targets and (E,) columns of :func:`edge_numbers`."""
    number = numbers >> numbers.dtype.type(8 * _edge_lead(size))
    index = np.empty((2, len(number)), np.int32)
    relation = (number & ((1 << _RELATION_BITS) - 1)).astype(np.uint8)
    number >>= _RELATION_BITS
    np.bitwise_and(number, (1 << bits) - 1, out=index[1], casting="unsafe")
    np.right_shift(number, bits, out=index[0], casting="unsafe")
    return index, relation


@dataclass(frozen=True)
class _Shapes:
    key_points: NDArray[np.float32]
    area: NDArray[np.float32]
    length: NDArray[np.float32]
    envelope: NDArray[np.float32]
    centroid: NDArray[np.float32]


def unpack_shapes(node_type: str, packed: NDArray[np.float32]) -> _Shapes:
    """Return the fields of ``nodes/<type>``, those that are not stored filled in."""
    n = len(packed)
    fields = {name: packed[:, where] for name, where in column_slices(node_type).items()}
    key_points = fields["key_points"].reshape(n, KEY_POINTS[node_type], 2)
    zero = np.zeros(n, np.float32)
    centroid = fields.get("centroid", key_points[:, -1])
    envelope = fields["envelope"].reshape(n, 4, 2) if "envelope" in fields else np.repeat(key_points, 4, axis=1)
    area = fields["area"][:, 0] if "area" in fields else zero
    length = fields["length"][:, 0] if "length" in fields else zero
    return _Shapes(key_points, area, length, envelope, centroid)


class TileStore:
    """A tile store, open for reading. Make one with :meth:`open`.

    ``crs``, ``gsd_m`` (None where tiles differ, as folders of chips do), ``tile_px``, ``bands``, ``tags`` (sorted
    ``key:value`` strings), ``tag_keys`` (the key of each), ``tag_counts`` (V,) occurrences over all nodes, ``cells``
    (T, 2) column and row of the grid, ``bounds_m`` (T, 4) west, south, east, north in the CRS, ``image_share`` (T,)
    0..1, ``n_objects`` (T,), ``names`` (T,) of chips, else empty.

    Picklable, and safe to use after a fork: nothing but the path and read-only maps is held.
    """

    def __init__(
        self, path: Path, attributes: dict[str, Any], arrays: dict[str, NDArray[Any]], tags: list[str]
    ) -> None:
        self.path = path
        self._arrays = arrays
        self._attributes = attributes
        self.tags = tags
        self.crs: str = attributes["crs"]
        self.gsd_m: float | None = attributes["gsd_m"]
        self.tile_px: int = attributes["tile_px"]
        self.bands: tuple[int, ...] = tuple(attributes["bands"])
        self.vector_width: int = attributes["vector_width"]
        self.provenance: dict[str, Any] = attributes["provenance"]
        self.names: list[str] = attributes["names"]
        self.cells: NDArray[np.int64] = np.asarray(arrays["tiles/cells"])
        self.bounds_m: NDArray[np.float64] = np.asarray(arrays["tiles/bounds_m"])
        self.image_share: NDArray[np.float32] = np.asarray(arrays["tiles/image_share"])
        self.tag_counts: NDArray[np.int64] = np.asarray(arrays["tags/count"])
        self._node_offsets = arrays["nodes/offsets"]
        self._tag_offsets = arrays["nodes/tag_offsets"]
        self._edge_offsets = arrays["edges/offsets"]
        # Where the rows of each type begin in the arrays over all nodes.
        self._type_base = [int(o) for o in self._node_offsets[:, 0]]
        self.has_images = "images" in arrays

    @classmethod
    def open(cls, path: Path) -> TileStore:
        """Open a store. Raises :class:`NoFileError` or :class:`FormatError`."""
        path = Path(path)
        if not path.is_file():
            raise NoFileError(
                f"There is no tile store {path}.", hint="Build it with rsosm build-graph.", path=str(path)
            )
        again = "Build it again with rsosm build-graph --force."
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT:
                    raise FormatError(
                        f"{path} is no tile store of rsosm.", hint="Give a tiles.h5 of rsosm build-graph."
                    )
                version = int(file.attrs["version"])
                if version != VERSION:
                    raise FormatError(
                        f"{path} is of tile store version {version}, and this rsosm reads version {VERSION}.",
                        hint=again,
                    )
                attributes = _attributes(file)
                names, tags = [], []
                if "tiles/name" in file:
                    names = list(file["tiles/name"].asstr()[:])
                if len(file["tags/text"]):
                    tags = list(file["tags/text"].asstr()[:])
                arrays = _maps(path, file)
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path} is a damaged tile store: {_first_line(error)}.", hint=again) from error
        return cls(path, {**attributes, "names": names}, arrays, tags)

    def __reduce__(self) -> tuple[Any, ...]:
        return TileStore.open, (self.path,)

    def __len__(self) -> int:
        return len(self.bounds_m)

    @cached_property
    def settings(self) -> BuildSettings:
        """The settings that the store was built with."""
        return BuildSettings.model_validate(self._attributes["settings"])

    @cached_property
    def tag_keys(self) -> list[str]:
        lengths = self._arrays["tags/key_length"].tolist()
        return [tag[:length] for tag, length in zip(self.tags, lengths, strict=True)]

    @cached_property
    def n_objects(self) -> NDArray[np.int64]:
        """(T,) nodes of a tile, all types."""
        return np.diff(self._node_offsets.astype(np.int64), axis=1).sum(axis=0)

    @cached_property
    def n_edges(self) -> dict[tuple[str, str], int]:
        """Edges of each pair of types, over all tiles."""
        sizes = self._edge_offsets[:, -1].astype(np.int64) - self._edge_offsets[:, 0].astype(np.int64)
        return dict(zip(PAIRS, sizes.tolist(), strict=True))

    @cached_property
    def n_nodes(self) -> dict[str, int]:
        """Nodes of each type, over all tiles."""
        sizes = self._node_offsets[:, -1].astype(np.int64) - self._node_offsets[:, 0].astype(np.int64)
        return dict(zip(NODE_TYPES, sizes.tolist(), strict=True))

    def relation_counts(self) -> dict[tuple[str, str], dict[str, int]]:
        """Return how many edges of each pair have each relation."""
        counts = {}
        for number, pair in enumerate(PAIRS):
            first, last = int(self._edge_offsets[number, 0]), int(self._edge_offsets[number, -1])
            columns = self._edges(slice(first, last))[1]
            found = np.bincount(columns, minlength=len(RELATIONS[pair])).tolist()
            counts[pair] = dict(zip(RELATIONS[pair], found, strict=True))
        return counts

    def images(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Return (B, C, H, W) uint8 images of tiles; zeros where there is no image."""
        if not self.has_images:
            raise MissingError(
                f"{self.path} has no images: it was built without imagery.",
                hint="Fetch the city with --imagery, then build the graph again.",
            )
        return self._arrays["images"][np.asarray(indices, np.int64)]

    def graphs(self, indices: ArrayLike) -> GraphArrays:
        """Return the heterographs of tiles, in the order given."""
        tiles = np.atleast_1d(np.asarray(indices, np.int64))
        arrays = self._arrays
        starts, counts = _spans(self._node_offsets, tiles)
        rows = ragged(starts.ravel(), counts.ravel())
        ends = np.cumsum(counts.sum(axis=1))
        tag_starts, tag_counts = _spans(self._tag_offsets, tiles)
        tag_rows = ragged(tag_starts.ravel(), tag_counts.ravel())
        tag_ends = np.cumsum(tag_counts.sum(axis=1))
        element = arrays["nodes/element"][rows]
        codes = arrays["nodes/class_code"][rows].astype(np.int16)
        n_tags = arrays["nodes/n_tags"][rows]
        tag_ids = arrays["nodes/tag_ids"][tag_rows].astype(np.int32)
        vectors = arrays["nodes/vectors"][rows] if self.vector_width else None
        offsets = _offsets(counts)
        nodes = {}
        for k, name in enumerate(NODE_TYPES):
            here = slice(int(ends[k - 1]) if k else 0, int(ends[k]))
            tags_here = slice(int(tag_ends[k - 1]) if k else 0, int(tag_ends[k]))
            shapes = unpack_shapes(name, arrays[f"nodes/{name}"].take(rows[here] - self._type_base[k], axis=0))
            nodes[name] = NodeArrays(
                offsets=offsets[k],
                osm_type=(element[here] & 3).astype(np.uint8),
                osm_id=element[here] >> 2,
                tag_offsets=_offsets(n_tags[here]),
                tag_ids=tag_ids[tags_here],
                key_points=shapes.key_points,
                area=shapes.area,
                length=shapes.length,
                envelope=shapes.envelope,
                centroid=shapes.centroid,
                class_code=codes[here],
                vectors=None if vectors is None else vectors[here],
            )
        starts, counts = _spans(self._edge_offsets, tiles)
        rows = ragged(starts.ravel(), counts.ravel())
        ends = np.cumsum(counts.sum(axis=1))
        index, relation = self._edges(rows)
        offsets = _offsets(counts)
        edges = {}
        for number, pair in enumerate(PAIRS):
            here = slice(int(ends[number - 1]) if number else 0, int(ends[number]))
            edges[pair] = EdgeArrays(offsets[number], index[:, here], relation[here])
        return GraphArrays(nodes, edges)

    def _edges(self, rows: NDArray[np.int64] | slice) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return (2, E) ends and (E,) columns of rows of the edge arrays."""
        bits = self._attributes["edge_bits"]
        return unpack_edges(edge_numbers(self._arrays["edges/packed"], rows), edge_bytes(bits), bits)


def _spans(offsets: NDArray[Any], tiles: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (rows, B) starts and counts of ``tiles`` in each row of offsets."""
    starts = offsets[:, tiles].astype(np.int64)
    return starts, offsets[:, tiles + 1].astype(np.int64) - starts


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return (..., n + 1) offsets of (..., n) counts."""
    offsets = np.zeros((*counts.shape[:-1], counts.shape[-1] + 1), np.int64)
    counts.cumsum(axis=-1, out=offsets[..., 1:])
    return offsets


def _attributes(file: h5py.File) -> dict[str, Any]:
    attrs = file.attrs
    gsd = float(attrs["gsd_m"])
    return {
        "crs": str(attrs["crs"]),
        "gsd_m": gsd if gsd > 0 else None,
        "tile_px": int(attrs["tile_px"]),
        "bands": [int(b) for b in attrs["bands"]],
        "vector_width": int(attrs["vector_width"]),
        "edge_bits": int(attrs["edge_bits"]),
        "settings": json.loads(attrs["settings"]),
        "provenance": json.loads(attrs["provenance"]),
    }


def _maps(path: Path, file: h5py.File) -> dict[str, NDArray[Any]]:
    """Return every numeric dataset as a read-only memory map."""
    arrays: dict[str, NDArray[Any]] = {}
    size = path.stat().st_size

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind == "O":
            return
        offset = item.id.get_offset()
        if item.size == 0:
            arrays[name] = np.empty(item.shape, item.dtype)
        elif offset is None or offset + item.nbytes > size:
            raise FormatError(f"{path} is a damaged tile store: {name} is not a contiguous array within the file.")
        else:
            arrays[name] = np.memmap(path, item.dtype, "r", offset, item.shape).view(np.ndarray)

    file.visititems(visit)
    return arrays


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
