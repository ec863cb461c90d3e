"""Elements in, ``osm.parquet`` out: only those that meet the place, each once, in spatial order, in bounded memory.

What arrives is spilled to an Arrow file beside the target; in memory stay only the numbers that decide about order
and duplicates (about 40 bytes an element). Row groups are gathered from the spilled file through its memory map.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import DiskError
from rsosm_cli.osm.elements import KINDS, OSM_TYPES, ROW_GROUP, geo_metadata, schema
from rsosm_cli.workspace import atomic

if TYPE_CHECKING:
    import pyarrow as pa
    from shapely import Geometry


@dataclass(frozen=True)
class Batch:
    """Elements on their way to the table, WGS 84; all of length ``N``."""

    osm_type: NDArray[np.uint8]
    osm_id: NDArray[np.int64]
    kind: NDArray[np.uint8]
    tags: pa.MapArray
    geometry: NDArray[np.object_]
    version: NDArray[np.int32] | None = None  # of several copies of an element the highest version stays
    # Relation that this way is drawn for: the way goes if the relation became an area itself. 0: none.
    stands_for: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.osm_id)


@dataclass
class Counts:
    """What became of the elements of the sources, for the manifest and the message."""

    point: int = 0
    line: int = 0
    polygon: int = 0
    outside: int = 0  # does not meet the place
    duplicates: int = 0  # same element in two files, or a way that only repeats its multipolygon
    mended: int = 0  # invalid polygons made valid
    invalid: int = 0  # left out: no area or length, or not to be mended
    cut: int = 0  # left out: nodes or ways of it are not in the file

    @property
    def total(self) -> int:
        return self.point + self.line + self.polygon

    def as_dict(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass
class _Keys:
    """The numbers kept in memory, a list of arrays each."""

    type: list[NDArray[np.uint8]] = field(default_factory=list)
    id: list[NDArray[np.int64]] = field(default_factory=list)
    kind: list[NDArray[np.uint8]] = field(default_factory=list)
    version: list[NDArray[np.int32]] = field(default_factory=list)
    stands_for: list[NDArray[np.int64]] = field(default_factory=list)
    curve: list[NDArray[np.uint64]] = field(default_factory=list)


class ElementSink:
    """Context manager that collects :class:`Batch` and writes the table when it is left without an error."""

    def __init__(self, path: Path, place: Geometry | None = None) -> None:
        import shapely

        self.path = path
        self.counts = Counts()
        self.place = place
        if place is not None:
            shapely.prepare(place)
        self._keys = _Keys()
        self._stack = ExitStack()
        self._bounds: tuple[float, float, float, float] | None = None

    def __enter__(self) -> ElementSink:
        import pyarrow as pa

        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix=".osm-", dir=self.path.parent, ignore_cleanup_errors=True)
        )
        self._spill = Path(folder) / "elements.arrow"
        self._writer = pa.ipc.new_file(self._spill, schema())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                with _naming_full_disk(self.path):
                    self._writer.close()
                    self._finish()
            else:
                with suppress(OSError):  # where the disk is full, closing fails again
                    self._writer.close()

    @property
    def pending(self) -> int:
        """Elements taken so far."""
        return sum(len(part) for part in self._keys.id)

    def add(self, batch: Batch) -> None:
        """Take the elements of ``batch`` that meet the place."""
        import pyarrow as pa
        import shapely

        if not len(batch):
            return
        boxes = shapely.bounds(batch.geometry)  # (N, 4)
        keep = ~np.isnan(boxes).any(axis=1)
        self.counts.invalid += int((~keep).sum())
        if self.place is not None:
            west, south, east, north = shapely.bounds(self.place)
            near = keep & (boxes[:, 0] <= east) & (boxes[:, 2] >= west)
            near &= (boxes[:, 1] <= north) & (boxes[:, 3] >= south)
            near[near] = shapely.intersects(self.place, batch.geometry[near])
            self.counts.outside += int((keep & ~near).sum())
            keep = near
        rows = np.flatnonzero(keep)
        if not len(rows):
            return
        boxes = boxes[rows]
        corners = [pa.array(boxes[:, i]) for i in range(4)]
        table = [
            pa.array(np.array(OSM_TYPES, dtype=object)[batch.osm_type[rows]], pa.string()),
            pa.array(batch.osm_id[rows]),
            pa.array(np.array(KINDS, dtype=object)[batch.kind[rows]], pa.string()),
            batch.tags.take(pa.array(rows)),
            pa.array(shapely.to_wkb(batch.geometry[rows], output_dimension=2, byte_order=1), pa.binary()),
            pa.StructArray.from_arrays(corners, fields=list(schema().field("bbox").type)),
        ]
        with _naming_full_disk(self.path):
            self._writer.write_batch(pa.record_batch(table, schema=schema()))
        keys = self._keys
        keys.type.append(batch.osm_type[rows].astype(np.uint8))
        keys.id.append(batch.osm_id[rows].astype(np.int64))
        keys.kind.append(batch.kind[rows].astype(np.uint8))
        zero = np.zeros(len(rows), np.int64)
        keys.version.append((zero if batch.version is None else batch.version[rows]).astype(np.int32))
        keys.stands_for.append((zero if batch.stands_for is None else batch.stands_for[rows]).astype(np.int64))
        keys.curve.append(_z_order((boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2))
        low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        if self._bounds is not None:
            low, high = np.minimum(low, self._bounds[:2]), np.maximum(high, self._bounds[2:])
        self._bounds = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))

    def _finish(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        keys = {name: _joined(parts) for name, parts in vars(self._keys).items()}
        batch_of, row_of = _positions(self._keys.id)
        rows = self._unique(keys)
        rows = rows[np.lexsort((keys["kind"][rows], keys["id"][rows], keys["type"][rows], keys["curve"][rows]))]
        kinds = keys["kind"][rows]
        for code, name in enumerate(KINDS):
            setattr(self.counts, name, int((kinds == code).sum()))
        bounds = self._bounds if len(rows) == len(keys["id"]) else None  # without: a dropped copy may have set it
        final = schema().with_metadata(geo_metadata(kinds, bounds))
        with (
            pa.memory_map(str(self._spill)) as source,
            atomic(self.path) as part,
            pq.ParquetWriter(
                part,
                final,
                compression="zstd",
                compression_level=1,
                # Numbers and shapes hardly repeat, and only boxes are looked up.
                use_dictionary=["osm_type", "kind", "tags.key_value.key", "tags.key_value.value"],
                write_statistics=["osm_type", "kind", *(f"bbox.{c}" for c in ("xmin", "ymin", "xmax", "ymax"))],
            ) as writer,
        ):
            spilled = pa.ipc.open_file(source)
            for start in range(0, len(rows), ROW_GROUP):
                chosen = rows[start : start + ROW_GROUP]
                writer.write_table(_gather(spilled, batch_of[chosen], row_of[chosen]), row_group_size=ROW_GROUP)

    def _unique(self, keys: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Return the rows that stay: the newest copy of each element, without ways that repeat their relation."""
        n = len(keys["id"])
        order = np.lexsort((np.arange(n), -keys["version"].astype(np.int64), keys["id"], keys["type"]))
        first = np.ones(n, bool)
        same = (np.diff(keys["id"][order]) == 0) & (np.diff(keys["type"][order].astype(np.int8)) == 0)
        first[1:] = ~same
        rows = order[first]
        relations = keys["id"][rows][keys["type"][rows] == OSM_TYPES.index("relation")]
        repeats = (keys["stands_for"][rows] != 0) & np.isin(keys["stands_for"][rows], relations)
        self.counts.duplicates += int(n - len(rows) + repeats.sum())
        return rows[~repeats]


@contextmanager
def _naming_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskError(
            f"The disk is full: {path.name} was not written.", hint="Free some space and run the command again."
        ) from error


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _positions(parts: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for every row its spilled batch and its place in it."""
    lengths = np.array([len(p) for p in parts], np.int64)
    batch = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return batch, np.arange(int(lengths.sum())) - starts


def _gather(spilled: pa.ipc.RecordBatchFileReader, batch: NDArray[np.int64], row: NDArray[np.int64]) -> pa.Table:
    """Return rows of the spilled batches in the order asked for."""
    import pyarrow as pa

    order = np.argsort(batch, kind="stable")
    numbers, starts = np.unique(batch[order], return_index=True)
    pieces = [
        spilled.get_batch(int(number)).take(pa.array(rows))
        for number, rows in zip(numbers, np.split(row[order], starts[1:]), strict=True)
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(pieces).take(pa.array(back)).combine_chunks()


def _z_order(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return the place of each WGS 84 point on a Z-order curve: 32 bits an axis, about a centimetre."""

    def spread(values: NDArray[np.float64], span: float) -> NDArray[np.uint64]:
        bits = (np.clip(values / span + 0.5, 0, 1) * 0xFFFFFFFF).astype(np.uint64)
        for shift, mask in (
            (16, 0x0000FFFF0000FFFF),
            (8, 0x00FF00FF00FF00FF),
            (4, 0x0F0F0F0F0F0F0F0F),
            (2, 0x3333333333333333),
            (1, 0x5555555555555555),
        ):
            bits = (bits | (bits << np.uint64(shift))) & np.uint64(mask)
        return bits

    return spread(x, 360.0) | (spread(y, 180.0) << np.uint64(1))
