"""OSM files (``.osm.pbf``, ``.osm.gz``, ``.osm.bz2``, ``.osm``) to elements, streamed and in bounded memory.

libosmium streams the file once: it locates the nodes of ways and writes what has tags into blocks. The blocks are read
by ``osm/blocks.py``, relations first (which ways make which multipolygon). Ways with a node that had no place by then
are located once more: some files have ways before their nodes, some have nodes below zero (``osm/negative.py``). The
members of multipolygons are put together by libosmium again; other closed ways become areas or lines by
``osm/rules.py``.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import DiskError, FormatError, NoFileError
from rsosm_cli.memory import give_back, keep_little, keep_much, let_go
from rsosm_cli.osm.beside import ahead
from rsosm_cli.osm.blocks import FORM, Nodes, Relations, Ways, read_blocks, read_header, take_relations
from rsosm_cli.osm.elements import NODE, RELATION, WAY, tags_array
from rsosm_cli.osm.members import MemberFile, Members
from rsosm_cli.osm.mend import mended, sound_and_broken
from rsosm_cli.osm.negative import locate_ways
from rsosm_cli.osm.reader import Ticker, open_reader, osm_file
from rsosm_cli.osm.rules import informative
from rsosm_cli.osm.shapes import LINE, POINT, POLYGON, Shapes, spread
from rsosm_cli.osm.sink import Batch, ElementSink
from rsosm_cli.progress import SILENT, Advance, Progress
from rsosm_cli.workspace import require_space

if TYPE_CHECKING:
    import osmium

SUFFIXES = (".osm.pbf", ".pbf", ".osm.gz", ".osm.bz2", ".osm", ".osm.xml", ".o5m")
# Bytes. Above, the locations of the nodes lie in a file (16 bytes each) instead of in memory.
LARGE = 8 << 20
_COUNTED = 1 << 16  # nodes in memory at a time, where their box is looked for
_BUFFER = 1 << 18  # bytes that libosmium gathers before it encodes them beside the reading; by itself it waits for 4 MB
_AREAS = 200  # multipolygons on their way to the table at a time


def is_osm_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pyosmium raises on a missing or damaged file into one sentence."""
    if not path.is_file():
        raise NoFileError(f"There is no OSM file {path}.", hint="Give the path of an extract: --osm FILE.osm.pbf")
    if ".osh" in path.suffixes or ".osc" in path.suffixes:
        raise FormatError(f"{path.name} holds a history or changes of OSM.", hint="Give an extract of one state.")
    try:
        yield
    except (RuntimeError, _Unreadable) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "No space left" in text:  # what libosmium writes on the way
            raise DiskError(f"The disk is full: {path.name} was not read.", hint="Free some space.") from error
        raise FormatError(
            f"{path.name} is damaged or not an OSM file.", hint="Download it again.", path=str(path), detail=text
        ) from error


class _Unreadable(Exception):
    """A file holds what libosmium cannot turn into objects."""


@contextmanager
def _decoding() -> Iterator[None]:
    """Tell what pyosmium raises on broken numbers, places and texts from errors of ours."""
    import osmium

    try:
        yield
    except (osmium.InvalidLocationError, ValueError) as error:
        raise _Unreadable(str(error)) from error


def header_box(path: Path) -> tuple[float, float, float, float] | None:
    """Return west, south, east, north of the box in the file's header, ``None`` where it has none."""
    import osmium

    with reading(path), _decoding(), osmium.io.Reader(osm_file(path), osmium.osm.NOTHING) as reader:
        box = reader.header().box()
        if not box.valid():
            return None
        low, high = box.bottom_left, box.top_right
        return (low.lon, low.lat, high.lon, high.lat)


def nodes_box(path: Path) -> tuple[float, float, float, float] | None:
    """Return the box of all nodes of a file, for those whose header has none; ``None`` where there are no nodes."""
    import osmium

    with reading(path), _decoding():
        nodes: Any = osmium.FileProcessor(osm_file(path), osmium.osm.NODE)
        spots = ((n.location.x, n.location.y) for n in nodes if n.location.valid())
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        while some := list(islice(spots, _COUNTED)):
            low, high = np.minimum(low, np.min(some, axis=0)), np.maximum(high, np.max(some, axis=0))
    if not np.isfinite(low).all():
        return None
    west, south, east, north = (float(value) for value in np.concatenate([low, high]) / 1e7)  # fixed point of OSM
    return (west, south, east, north)


class _Lender(NamedTuple):
    id: int
    tags: dict[str, str]
    area: bool


@dataclass
class _Areas:
    id: list[int] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    tags: list[dict[str, str]] = field(default_factory=list)
    wkb: list[bytes] = field(default_factory=list)
    repeated: list[tuple[int, int]] = field(default_factory=list)  # ways that say no more than their relation

    def __len__(self) -> int:
        return len(self.id)


def read_extract(path: Path, sink: ElementSink, *, progress: Progress = SILENT) -> None:
    """Put the elements of an OSM file into ``sink``. Raises :class:`MissingError`, :class:`FormatError`."""
    # What libosmium holds ready in its queues is most of what a large file takes in memory; fewer cost no time.
    for queue in ("INPUT", "OSMDATA", "OUTPUT", "WORK"):
        os.environ.setdefault(f"OSMIUM_MAX_{queue}_QUEUE_SIZE", "2")
    with reading(path), progress.task(f"Reading {path.name}", None, "objects") as advance:
        _Reader(path, sink, advance).run()


class _Reader:
    def __init__(self, path: Path, sink: ElementSink, advance: Advance) -> None:
        self.path = path
        self.sink = sink
        self.ticker = Ticker(advance, self._let_go)
        self.large = False
        self.members = Members([])
        self.areas = _Areas()  # not yet in the table
        self.done = array("q")  # relations that became an area
        # Outer ways of multipolygons that have no tags themselves (the way of tagging until 2017).
        self.lent: dict[int, list[_Lender]] = {}

    def run(self) -> None:
        import osmium

        size = self.path.stat().st_size
        self.large = size > LARGE
        (keep_little if self.large else keep_much)()
        with tempfile.TemporaryDirectory(prefix=".osm-", dir=self.sink.path.parent, ignore_cleanup_errors=True) as name:
            self.folder = folder = Path(name)
            # Measured: blocks of tagged objects take 1.3 times an extract in PBF; locations 1.6 times.
            require_space(folder, size * (4 if self.large else 2), f"Reading {self.path.name}")
            self.objects = folder / "objects.osm.pbf"
            kind = f"sparse_file_array,{folder}/locations" if self.large else "sparse_mem_array"
            index = osmium.index.create_map(kind)
            locations = osmium.NodeLocationsForWays(index)
            locations.ignore_errors()
            self._stream(locations)
            relations = folder / "relations.osm.pbf"
            take_relations(self.objects, relations)
            portions: list[Path] = []
            self.members = Members(self._portions(relations, portions))
            self._rest()
            header = read_header(self.objects)
            of_areas = [MemberFile(folder / f"members-{number}.osm.pbf", header) for number in range(len(portions))]
            lost, again = folder / "lost.osm.pbf", folder / "again.osm.pbf"
            lost.write_bytes(header)
            below_zero = self._take_blocks(self.objects, of_areas, lost)
            self.objects.unlink()
            # The file may have ways before their nodes: by now the places of all nodes are known.
            if lost.stat().st_size > len(header):
                self._locate(lost, locations, again)
                self._take_blocks(again, of_areas)
            if len(below_zero):
                locate_ways(self.path, below_zero, locations, again)
                self._take_blocks(again, of_areas)
            del locations, index  # their room is needed no more
            for portion, members in zip(portions, of_areas, strict=True):
                self._rest()
                self._assemble(portion, members.finish())
        self.sink.counts.cut += len(np.setdiff1d(self.members.relations, np.frombuffer(self.done, np.int64)))

    def _stream(self, locations: osmium.NodeLocationsForWays) -> None:
        """Let libosmium write tagged nodes, all ways and the relations that should become areas to ``objects``.

        Fast, as no object reaches Python.
        """
        import osmium

        bits = osmium.osm
        tagged = osmium.filter.EmptyTagFilter()
        tagged.enable_for(bits.NODE)  # a multipolygon may be of ways without tags
        become_areas = osmium.filter.TagFilter(("type", "multipolygon"), ("type", "boundary"))
        become_areas.enable_for(bits.RELATION)
        few = osmium.filter.KeyFilter(*Ticker.KEYS)
        with (
            _decoding(),
            osmium.SimpleWriter(osmium.io.File(str(self.objects), FORM), _BUFFER, overwrite=True) as writer,
            open_reader(self.path, bits.NODE | bits.WAY | bits.RELATION) as reader,
        ):
            osmium.apply(reader, locations, tagged, become_areas, writer, few, self.ticker)

    def _locate(self, lost: Path, locations: osmium.NodeLocationsForWays, target: Path) -> None:
        """Write the ways of the file ``lost`` with the places of their nodes that are known by now."""
        import osmium

        with (
            osmium.SimpleWriter(osmium.io.File(str(target), FORM), _BUFFER, overwrite=True) as writer,
            open_reader(lost, osmium.osm.WAY) as reader,
        ):
            osmium.apply(reader, locations, writer)

    def _portions(self, relations: Path, files: list[Path]) -> Iterator[Relations]:
        """Yield the relations some at a time, each portion written to a file of its own that is added to ``files``."""
        for portion in read_blocks(relations, relations=True):
            if isinstance(portion, Relations):
                files.append(relations.with_name(f"relations-{len(files)}.osm.pbf"))
                with files[-1].open("wb") as file:
                    file.write(read_header(relations))
                    portion.write(file)
                yield portion

    def _rest(self) -> None:
        if self.large:
            give_back()
            self._let_go()

    def _let_go(self) -> None:
        """Leave the index of nodes to its file."""
        if self.large:
            let_go(self.folder)

    def _take_blocks(self, path: Path, of_areas: Sequence[MemberFile], lost: Path | None = None) -> NDArray[np.int64]:
        """Put nodes and ways into the table, members of relations into the files ``of_areas``, one a portion.

        Ways with a node that has no place are left alone and added to the file ``lost``, if there is one; of those
        among them that are below zero, or have nodes there, the ids are returned instead.
        """
        below_zero = [np.empty(0, np.int64)]
        blocks = read_blocks(path, relations=False)
        for block in ahead(blocks) if self.large else blocks:
            if lost is not None:
                self.ticker.count(len(block.id))
            if isinstance(block, Nodes):
                self._take_nodes(block)
            elif isinstance(block, Ways):
                rows = np.arange(len(block.id))
                if lost is not None and len(left := np.flatnonzero(block.lengths == 0)):
                    low = block.below_zero[left] | (block.id[left] < 0)
                    below_zero.append(block.id[left[low]])
                    with lost.open("ab") as file:
                        block.write(left[~low], file, tagged=True)
                    rows = np.delete(rows, left)
                for portion, some in self.members.needed_by(block.id[rows]):
                    of_areas[portion].append(block, rows[some])
                self._take_ways(block, rows)
        return np.concatenate(below_zero)

    def _assemble(self, relations: Path, members: Path) -> None:
        """Let libosmium put the members of a portion of the relations together: a whole country's take its memory."""
        import osmium

        manager = osmium.area.AreaManager()
        with open_reader(relations) as reader:
            osmium.apply(reader, manager.first_pass_handler())
        with open_reader(members) as reader:
            osmium.apply(reader, manager.second_pass_handler(self))
        self._take_areas()

    def area(self, area: osmium.osm.Area) -> None:
        """Called by libosmium with every area; those of closed ways are made from the ways themselves."""
        import osmium

        if area.from_way():
            return
        try:
            wkb = osmium.geom.WKBFactory().create_multipolygon(area)
        except (RuntimeError, osmium.InvalidLocationError):  # an area without rings: libosmium could not assemble it
            return
        self.done.append(area.orig_id())
        tags = self.members.tags_of(area.orig_id())
        if not informative(tags):
            lenders = self.lent.pop(area.orig_id(), [])
            # What the outer ways agree on is what they say about the whole; those that say more stay beside it.
            tags = dict(sorted(set.intersection(*(set(way.tags.items()) for way in lenders)))) if lenders else {}
            repeated = [(way.id, area.orig_id()) for way in lenders if way.tags.items() <= tags.items()]
            if not repeated and area.num_rings() == (len(lenders), 0) and all(way.area for way in lenders):
                return  # of areas that all say more, the whole says nothing new
            self.areas.repeated += repeated
        if not informative(tags):
            return
        self.areas.id.append(area.orig_id())
        self.areas.version.append(area.version)
        self.areas.tags.append(tags)
        self.areas.wkb.append(bytes.fromhex(wkb))
        if len(self.areas) == _AREAS:
            self._take_areas()

    def _take_nodes(self, nodes: Nodes) -> None:
        located = ~np.isnan(nodes.lonlat).any(axis=1)
        self.sink.counts.cut += int((nodes.tags.informative & ~located).sum())
        rows = np.flatnonzero(nodes.tags.informative & located)
        kind = np.full(len(rows), POINT, np.uint8)
        self.sink.add(
            Batch(
                osm_type=np.full(len(rows), NODE, np.uint8),
                osm_id=nodes.id[rows],
                kind=kind,
                tags=nodes.tags.arrow(rows),
                geometry=Shapes(kind, np.ones(len(rows), np.int64), nodes.lonlat[rows]),
                version=nodes.version[rows],
            )
        )

    def _take_ways(self, ways: Ways, rows: NDArray[np.int64]) -> None:
        rows = rows[ways.tags.informative[rows]]
        located = ways.lengths[rows] > 0
        self.sink.counts.cut += int((~located).sum())
        rows = rows[located]
        shapes = way_shapes(ways, rows)
        self._find_repeated(ways, rows, shapes)
        sound, broken = sound_and_broken(shapes)
        self.sink.counts.invalid += len(rows) - len(sound) - len(broken)
        for part in filter(len, (sound, broken)):
            chosen = rows[part]
            batch = Batch(
                osm_type=np.full(len(part), WAY, np.uint8),
                osm_id=ways.id[chosen],
                kind=shapes.kind[part],
                tags=ways.tags.arrow(chosen),
                geometry=shapes if len(part) == len(rows) else shapes[part],
                version=ways.version[chosen],
            )
            if part is broken:
                batch = mended(replace(batch, geometry=batch.objects()), self.sink.counts)
            self.sink.add(batch)

    def _find_repeated(self, ways: Ways, rows: NDArray[np.int64], shapes: Shapes) -> None:
        """Note the ways that only repeat a multipolygon (same tags), and those that lend their tags to one."""
        ids = ways.id[rows]
        first, last = (np.searchsorted(self.members.outers, ids, side) for side in ("left", "right"))
        repeated = []
        for at in np.flatnonzero(last > first).tolist():
            tags = informative(ways.tags.of(rows[at]))
            for relation, own in self.members.outer_of(first[at], last[at]):
                if not own:
                    lender = _Lender(int(ids[at]), tags, bool(shapes.kind[at] == POLYGON))
                    self.lent.setdefault(relation, []).append(lender)
                elif tags.items() <= own.items():
                    repeated.append((ids[at], relation))
        if repeated:
            self.sink.drop_ways(*np.array(repeated, np.int64).T)

    def _take_areas(self) -> None:
        import shapely

        areas, self.areas = self.areas, _Areas()
        if areas.repeated:
            self.sink.drop_ways(*np.array(areas.repeated, np.int64).T)
        batch = Batch(
            osm_type=np.full(len(areas), RELATION, np.uint8),
            osm_id=np.array(areas.id, np.int64),
            kind=np.full(len(areas), POLYGON, np.uint8),
            tags=tags_array(areas.tags),
            geometry=shapely.from_wkb(np.array(areas.wkb, dtype=object)),
            version=np.array(areas.version, np.int32),
        )
        self.sink.add(mended(batch, self.sink.counts))


def way_shapes(ways: Ways, rows: NDArray[np.int64]) -> Shapes:
    """Return the ways ``rows``, which have coordinates, as areas where they are closed and their tags say so."""
    starts = (np.cumsum(ways.lengths) - ways.lengths)[rows]
    lengths = ways.lengths[rows]
    first, last = (ways.lonlat.take(places, axis=0) for places in (starts, starts + lengths - 1))
    closed = (lengths >= 4) & (first == last).all(axis=1)
    kind = np.where(closed & ways.tags.says_area[rows], POLYGON, LINE).astype(np.uint8)
    # `take` is ten times as fast as brackets here.
    return Shapes(kind, lengths, ways.lonlat.take(spread(starts, lengths), axis=0))
