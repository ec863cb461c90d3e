"""Elements in, ``osm.parquet`` out: only those that meet the place, each once, in spatial order, in bounded memory.

What arrives is spilled to an Arrow file beside the target, and the numbers that decide about order and duplicates to
files of their own (``osm/keys.py``); in memory stay only the last of it. Row groups are gathered from the spilled file
through its memory map.
"""

from __future__ import annotations

import mmap
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.memory import arrow_keeps_nothing, give_back
from rsosm_cli.osm.beside import Beside
from rsosm_cli.osm.elements import KINDS, OSM_TYPES, ROW_GROUP, geo_metadata, schema
from rsosm_cli.osm.keys import Keys
from rsosm_cli.osm.shapes import Shapes
from rsosm_cli.workspace import atomic, disk_of

if TYPE_CHECKING:
    import pyarrow as pa
    from shapely import Geometry


_SPILLED, _HEAVY = 24_576, 12 << 20  # elements written at a time, some 8 MB; bytes, of shapes with many corners fewer
_UNTIL_RETURNED = 4  # such steps, after which memory is given back: what is given back at once is soon asked for again
_GROUPS = 2  # row groups gathered at a time: more take fewer looks at each batch, and more memory


@dataclass(frozen=True)
class Batch:
    """Elements on their way to the table, WGS 84; all of length ``N``."""

    osm_type: NDArray[np.uint8]
    osm_id: NDArray[np.int64]
    kind: NDArray[np.uint8]
    tags: pa.MapArray
    geometry: NDArray[np.object_] | Shapes
    version: NDArray[np.int32] | None = None  # of several copies of an element the highest version stays

    def __len__(self) -> int:
        return len(self.osm_id)

    def __getitem__(self, rows: NDArray[np.int64]) -> Batch:
        import pyarrow as pa

        return Batch(
            osm_type=self.osm_type[rows],
            osm_id=self.osm_id[rows],
            kind=self.kind[rows],
            tags=self.tags.take(pa.array(rows)),
            geometry=self.geometry[rows],
            version=None if self.version is None else self.version[rows],
        )

    def boxes(self) -> NDArray[np.float64]:
        """Return west, south, east, north of each: (N, 4)."""
        import shapely

        return self.geometry.boxes if isinstance(self.geometry, Shapes) else shapely.bounds(self.geometry)

    def objects(self) -> NDArray[np.object_]:
        return self.geometry.objects() if isinstance(self.geometry, Shapes) else self.geometry

    def wkb(self) -> pa.BinaryArray:
        import pyarrow as pa
        import shapely

        if isinstance(self.geometry, Shapes):
            return self.geometry.wkb()
        return pa.array(shapely.to_wkb(self.geometry, output_dimension=2, byte_order=1), pa.binary())


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
    unplaced: int = 0  # rows of vector files left out: without a geometry
    unread: int = 0  # rows of vector files left out: what stands for their tags holds none

    @property
    def total(self) -> int:
        return self.point + self.line + self.polygon

    def as_dict(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in self.__dataclass_fields__}


class ElementSink:
    """Context manager that collects :class:`Batch` and writes the table when it is left without an error."""

    def __init__(self, path: Path, place: Geometry | None = None) -> None:
        import shapely

        self.path = path
        self.counts = Counts()
        self.place = place
        if place is not None:
            shapely.prepare(place)
        self._drawn: list[NDArray[np.int64]] = []
        self._waiting: list[pa.RecordBatch] = []
        self._lengths: list[int] = []  # of the batches spilled
        self._bounds: tuple[float, float, float, float] | None = None
        self.read_bounds: tuple[float, float, float, float] | None = None  # of all elements, those outside too

    def __enter__(self) -> ElementSink:
        import pyarrow as pa

        with disk_of(self.path), ExitStack() as stack:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".osm-", dir=self.path.parent, ignore_cleanup_errors=True)
            )
            stack.enter_context(arrow_keeps_nothing())
            self._keys = stack.enter_context(Keys(Path(folder)))
            self._spill = Path(folder) / "elements.arrow"
            self._writer = pa.ipc.new_file(self._spill, schema())
            self._beside = stack.enter_context(Beside())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with disk_of(self.path), self._stack:
                self._finish()
            return
        with suppress(OSError):  # where the disk is full, closing fails again
            self._beside.wait()
        with suppress(OSError):
            self._writer.close()
        self._stack.__exit__(kind, error, trace)

    @property
    def pending(self) -> int:
        """Elements taken so far."""
        return len(self._keys)

    def add(self, batch: Batch) -> None:
        """Take the elements of ``batch`` that meet the place."""
        import pyarrow as pa
        import shapely

        if not len(batch):
            return
        boxes = batch.boxes()
        keep = ~np.isnan(boxes).any(axis=1)
        self.counts.invalid += int((~keep).sum())
        self.saw(boxes[keep])
        if self.place is not None:
            west, south, east, north = shapely.bounds(self.place)
            near = keep & (boxes[:, 0] <= east) & (boxes[:, 2] >= west)
            near &= (boxes[:, 1] <= north) & (boxes[:, 3] >= south)
            rows = np.flatnonzero(near)
            near[rows] = shapely.intersects(self.place, batch[rows].objects())
            self.counts.outside += int((keep & ~near).sum())
            keep = near
        if not keep.any():
            return
        if not keep.all():
            batch, boxes = batch[np.flatnonzero(keep)], boxes[keep]
        corners = [pa.array(boxes[:, i]) for i in range(4)]
        table = [
            pa.array(OSM_TYPES).take(pa.array(batch.osm_type)),
            pa.array(batch.osm_id),
            pa.array(KINDS).take(pa.array(batch.kind)),
            batch.tags,
            batch.wkb(),
            pa.StructArray.from_arrays(corners, fields=list(schema().field("bbox").type)),
        ]
        self._waiting.append(pa.record_batch(table, schema=schema()))
        with disk_of(self.path):
            self._keys.add(
                type=batch.osm_type,
                id=batch.osm_id,
                kind=batch.kind,
                version=np.zeros(len(batch)) if batch.version is None else batch.version,
                curve=_z_order((boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2),
            )
        if sum(p.num_rows for p in self._waiting) >= _SPILLED or sum(p.nbytes for p in self._waiting) >= _HEAVY:
            self._spill_waiting()
        self._bounds = _around(self._bounds, boxes)

    def saw(self, boxes: NDArray[np.float64]) -> None:
        """Take note of where elements lie (n, 4), those outside the place too."""
        self.read_bounds = _around(self.read_bounds, boxes)

    def drop_ways(self, ways: NDArray[np.int64], relations: NDArray[np.int64]) -> None:
        """Leave out the ways (n,) that only repeat relations (n,), each if its relation is an element itself."""
        self._drawn.append(np.stack([ways, relations]))

    def _spill_waiting(self) -> None:
        """Write what waits as one batch: the fewer there are, the sooner a row group is gathered from them."""
        with disk_of(self.path):
            self._beside.do(self._writer.write_batch, self._take_waiting())
        if len(self._lengths) % _UNTIL_RETURNED == 0:
            give_back()

    def _take_waiting(self) -> pa.RecordBatch:
        import pyarrow as pa

        batches = pa.Table.from_batches(self._waiting, schema()).combine_chunks().to_batches()
        self._waiting.clear()
        self._lengths.append(sum(batch.num_rows for batch in batches))
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema())

    @contextmanager
    def _batches(self) -> Iterator[Callable[[int], pa.RecordBatch]]:
        """Yield what returns the batch of a number: from the file of those spilled; the last one never went there."""
        import pyarrow as pa

        last = self._take_waiting()
        self._beside.wait()
        self._writer.close()
        with self._spill.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        spilled = pa.ipc.open_file(pa.py_buffer(pages))

        def batch_of(number: int) -> pa.RecordBatch:
            if number >= spilled.num_record_batches:
                return last
            if sys.platform == "linux":  # else the pages read before count as the process's until memory runs out
                pages.madvise(mmap.MADV_DONTNEED)
            return spilled.get_batch(number)

        yield batch_of

    def _finish(self) -> None:
        import pyarrow.parquet as pq

        if self._lengths:  # what the reader held
            give_back()
        stays = self._stay()
        counts = np.zeros(len(KINDS), np.int64)
        for start, kinds in self._keys.in_parts("kind"):
            counts += np.bincount(kinds[stays[start : start + len(kinds)]], minlength=len(KINDS))
        for name, count in zip(KINDS, counts.tolist(), strict=True):
            setattr(self.counts, name, count)
        bounds = self._bounds if stays.all() else None  # without: a dropped copy may have set it
        final = schema().with_metadata(geo_metadata(np.flatnonzero(counts).astype(np.uint8), bounds))
        texts = ["osm_type", "kind", "tags.key_value.key", "tags.key_value.value"]
        boxes = [f"bbox.{corner}" for corner in ("xmin", "ymin", "xmax", "ymax")]
        with (
            self._batches() as batch_of,
            atomic(self.path) as part,
            pq.ParquetWriter(
                part,
                final,
                # Coordinates hardly repeat: snappy would take a tenth off the file, and twice the time of writing it.
                compression={"geometry": "none"} | dict.fromkeys([*texts, "osm_id", *boxes], "zstd"),
                compression_level=dict.fromkeys([*texts, "osm_id", *boxes], 1),
                use_dictionary=texts,
                write_statistics=["osm_type", "kind", *boxes],
            ) as writer,
        ):
            starts = np.cumsum([0, *self._lengths])
            for number, chosen in enumerate(_in_groups(self._keys.along_the_curve(stays))):
                if number and number % _UNTIL_RETURNED == 0:
                    give_back()
                batch = np.searchsorted(starts, chosen, side="right") - 1
                table = _gather(batch_of, batch, chosen - starts[batch])
                self._beside.do(partial(writer.write_table, row_group_size=ROW_GROUP), table)
                del table
            self._beside.wait()

    def _stay(self) -> NDArray[np.bool_]:
        """Return which rows stay: the newest copy of each element, without ways that repeat their relation."""
        stays = self._keys.newest()
        if self._drawn:
            ways, relations = np.concatenate(self._drawn, axis=1)
            there = self._keys.rows_of(OSM_TYPES.index("relation"), relations, stays)
            drawn = np.isin(relations, self._keys.column("id")[there])
            stays[self._keys.rows_of(OSM_TYPES.index("way"), ways[drawn], stays)] = False
        self.counts.duplicates += int((~stays).sum())
        return stays


def _around(
    known: tuple[float, float, float, float] | None, boxes: NDArray[np.float64]
) -> tuple[float, float, float, float] | None:
    """Return the box around a box known before and ``boxes`` (n, 4)."""
    if known is not None:
        boxes = np.concatenate([boxes, [known]])
    if not len(boxes):
        return None
    (west, south), (east, north) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    return west, south, east, north


def _in_groups(parts: Iterator[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of ``parts`` as many at a time as some row groups have, but for the last."""
    rest, size = np.empty(0, np.int64), _GROUPS * ROW_GROUP
    for rows in parts:
        rest = np.concatenate([rest, rows])
        whole = len(rest) // size * size
        yield from np.split(rest[:whole], range(size, whole, size)) if whole else ()
        rest = rest[whole:]
    if len(rest):
        yield rest


def _gather(batch_of: Callable[[int], pa.RecordBatch], batch: NDArray[np.int64], row: NDArray[np.int64]) -> pa.Table:
    """Return rows of the batches in the order asked for."""
    import pyarrow as pa

    if batch[0] == batch[-1] and (batch == batch[0]).all():
        return pa.Table.from_batches([batch_of(int(batch[0])).take(pa.array(row))])
    order = np.argsort(batch, kind="stable")
    numbers, starts = np.unique(batch[order], return_index=True)
    pieces = [
        batch_of(int(number)).take(pa.array(rows))
        for number, rows in zip(numbers, np.split(row[order], starts[1:]), strict=True)
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(pieces).take(pa.array(back)).combine_chunks()


def _z_order(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return the place of each WGS 84 point on a Z-order curve: 32 bits an axis, about a centimetre."""

    def every_second_bit(values: NDArray[np.float64], span: float) -> NDArray[np.uint64]:
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

    return every_second_bit(x, 360.0) | (every_second_bit(y, 180.0) << np.uint64(1))
