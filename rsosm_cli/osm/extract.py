"""OSM files (``.osm.pbf``, ``.osm.gz``, ``.osm.bz2``, ``.osm``) to elements, streamed and in bounded memory.

libosmium streams the file once: it locates the nodes of ways and writes what has tags into blocks. Ways with a node
that had no place by then are streamed once more: some files have ways before their nodes. The blocks are read by
``osm/blocks.py``, relations first (which ways make which multipolygon). The members of multipolygons are put together
by libosmium again; other closed ways become areas or lines by ``osm/rules.py``.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import DiskError, FormatError, NoFileError
from rsosm_cli.memory import give_back, keep_little, let_go
from rsosm_cli.osm.blocks import FORM, Nodes, Relations, Tags, Ways, read_blocks, read_header, sort_ways, take_relations
from rsosm_cli.osm.elements import OSM_TYPES, tags_array
from rsosm_cli.osm.reader import Ticker, open_reader
from rsosm_cli.osm.rules import UNINFORMATIVE_KEYS
from rsosm_cli.osm.shapes import LINE, POINT, POLYGON, Shapes, spread, surely_simple
from rsosm_cli.osm.sink import Batch, Counts, ElementSink
from rsosm_cli.progress import SILENT, Advance, Progress
from rsosm_cli.workspace import require_space

if TYPE_CHECKING:
    import osmium

SUFFIXES = (".osm.pbf", ".pbf", ".osm.gz", ".osm.bz2", ".osm", ".osm.xml", ".o5m")
NODE, WAY, RELATION = range(len(OSM_TYPES))
# Bytes. Above, the locations of the nodes lie in a file (16 bytes each) instead of in memory.
LARGE = 8 << 20
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

    with reading(path), _decoding(), osmium.io.Reader(str(path), osmium.osm.NOTHING) as reader:
        box = reader.header().box()
        if not box.valid():
            return None
        low, high = box.bottom_left, box.top_right
        return (low.lon, low.lat, high.lon, high.lat)


def nodes_box(path: Path) -> tuple[float, float, float, float] | None:
    """Return the box of all nodes of a file, for those whose header has none; ``None`` where there are no nodes."""
    import osmium

    with reading(path), _decoding():
        nodes: Any = osmium.FileProcessor(str(path), osmium.osm.NODE)
        spots = [(n.location.x, n.location.y) for n in nodes if n.location.valid()]
    if not spots:
        return None
    low, high = np.min(spots, axis=0) / 1e7, np.max(spots, axis=0) / 1e7  # fixed point of OSM
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))


class _Members:
    """Which ways are members of the relations that should become areas; these come in ``portions``."""

    def __init__(self, portions: Iterable[Relations]) -> None:
        self._tags: list[Tags] = []
        relations, ways, outers = [], [], []
        for number, block in enumerate(portions):
            self._tags.append(block.tags)
            relations.append(block.id)
            members = np.unique(block.ways)
            ways.append(np.stack([members, np.full(len(members), number)]))
            lends = block.outer & block.tags.having("type", "multipolygon")[block.owner]
            rows = block.owner[lends]
            outers.append(np.stack([block.ways[lends], block.id[rows], np.full(len(rows), number), rows]))
        self.relations = np.concatenate([np.empty(0, np.int64), *relations])  # with boundaries
        self._order = np.argsort(self.relations, kind="stable")
        self._firsts = np.cumsum([0, *map(len, relations)])[:-1]  # of each portion
        # Ways, sorted, and the portion that needs each; and the multipolygon that each is an outer of (its id, portion
        # and row in it). Both may have a way several times.
        self.ways, self._needed_by = _sorted(ways, 2)
        self.outers, *self._outer_of = _sorted(outers, 4)

    def outer_of(self, first: int, last: int) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield id and informative tags of the multipolygons that the outers from ``first`` to ``last`` belong to."""
        for relation, portion, row in zip(*(part[first:last].tolist() for part in self._outer_of), strict=True):
            yield relation, informative(self._without_type(portion, row))

    def tags_of(self, relation: int) -> dict[str, str]:
        """Return the tags of a relation but for its type; libosmium would not read texts that are no UTF-8."""
        row = int(self._order[np.searchsorted(self.relations, relation, sorter=self._order)])
        portion = int(np.searchsorted(self._firsts, row, "right")) - 1
        return self._without_type(portion, row - int(self._firsts[portion]))

    def _without_type(self, portion: int, row: int) -> dict[str, str]:
        return {k: v for k, v in self._tags[portion].of(row).items() if k != "type"}

    def needed_by(self, ways: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield portions with the rows of ``ways`` that they need."""
        first, last = (np.searchsorted(self.ways, ways, side) for side in ("left", "right"))
        counts = last - first
        rows, portions = np.repeat(np.arange(len(ways)), counts), self._needed_by[spread(first, counts)]
        for portion in np.unique(portions).tolist():
            yield portion, rows[portions == portion]


def _sorted(parts: list[NDArray[np.int64]], rows: int) -> NDArray[np.int64]:
    """Return parts (``rows``, n) side by side, sorted by their first row."""
    joined = np.concatenate([np.empty((rows, 0), np.int64), *parts], axis=1)
    return joined[:, np.argsort(joined[0], kind="stable")]


@dataclass
class _Areas:
    id: list[int] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    tags: list[dict[str, str]] = field(default_factory=list)
    wkb: list[bytes] = field(default_factory=list)

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
        self.members = _Members([])
        self.areas = _Areas()  # not yet in the table
        self.done = array("q")  # relations that became an area
        # Tags of the outer ways of multipolygons that have none themselves (the way of tagging until 2017).
        self.lent: dict[int, list[dict[str, str]]] = {}

    def run(self) -> None:
        import osmium

        size = self.path.stat().st_size
        self.large = size > LARGE
        if self.large:
            keep_little()
        with tempfile.TemporaryDirectory(prefix=".osm-", dir=self.sink.path.parent, ignore_cleanup_errors=True) as name:
            self.folder = folder = Path(name)
            # Measured: blocks of tagged objects take 1.3 times an extract in PBF; locations 1.6 times.
            require_space(folder, size * (4 if self.large else 2), f"Reading {self.path.name}")
            self.objects = folder / "objects.osm.pbf"
            index = osmium.index.create_map(f"sparse_file_array,{folder}/locations" if self.large else "flex_mem")
            locations = osmium.NodeLocationsForWays(index)
            locations.ignore_errors()
            self._stream(locations)
            relations = folder / "relations.osm.pbf"
            take_relations(self.objects, relations)
            portions: list[Path] = []
            self.members = _Members(self._portions(relations, portions))
            self._rest()
            of_areas = [folder / f"members-{number}.osm.pbf" for number in range(len(portions))]
            for path in of_areas:
                path.write_bytes(read_header(self.objects))
            lost = self._take_blocks(self.objects, of_areas)
            if len(lost):
                # The file may have ways before their nodes: by now the places of all nodes are known.
                again = folder / "again.osm.pbf"
                self._stream_ways(lost, locations, again)
                self._take_blocks(again, of_areas, last=True)
                for path in of_areas:
                    sort_ways(path)
            del locations, index  # their room is needed no more
            for portion, members in zip(portions, of_areas, strict=True):
                self._rest()
                self._assemble(portion, members)
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
            osmium.SimpleWriter(osmium.io.File(str(self.objects), FORM), overwrite=True) as writer,
            open_reader(self.path, bits.NODE | bits.WAY | bits.RELATION) as reader,
        ):
            osmium.apply(reader, locations, tagged, become_areas, writer, few, self.ticker)

    def _stream_ways(self, ways: NDArray[np.int64], locations: osmium.NodeLocationsForWays, target: Path) -> None:
        """Let libosmium write some ways once more."""
        import osmium

        wanted = osmium.filter.IdFilter(ways.tolist())
        with (
            _decoding(),
            osmium.SimpleWriter(osmium.io.File(str(target), FORM), overwrite=True) as writer,
            open_reader(self.path, osmium.osm.WAY) as reader,
        ):
            osmium.apply(reader, wanted, locations, writer)

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

    def _take_blocks(self, path: Path, of_areas: Sequence[Path], *, last: bool = False) -> NDArray[np.int64]:
        """Put nodes and ways into the table, members of relations into the files ``of_areas``, one a portion.

        Return the ids of ways with a node that has no place: they are left alone unless it is the ``last`` time.
        """
        lost = [np.empty(0, np.int64)]
        for block in read_blocks(path, relations=False):
            if not last:
                self.ticker.count(len(block.id))
            if isinstance(block, Nodes):
                self._take_nodes(block)
            elif isinstance(block, Ways):
                rows = np.flatnonzero((block.lengths > 0) | last)
                lost.append(np.delete(block.id, rows))
                for portion, some in self.members.needed_by(block.id[rows]):
                    with of_areas[portion].open("ab") as file:
                        block.write(rows[some], file)
                self._take_ways(block, rows)
        return np.concatenate(lost)

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
            lent = self.lent.get(area.orig_id(), [])
            # Outer ways that disagree say nothing about the whole: then they stay as they are.
            tags = dict(sorted(set.intersection(*(set(t.items()) for t in lent)))) if lent else {}
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
        self._find_repeated(ways, rows)
        shapes = way_shapes(ways, rows)
        sound, broken = _sound(shapes)
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

    def _find_repeated(self, ways: Ways, rows: NDArray[np.int64]) -> None:
        """Note the ways that only repeat a multipolygon (same tags), and those that lend their tags to one."""
        ids = ways.id[rows]
        first, last = (np.searchsorted(self.members.outers, ids, side) for side in ("left", "right"))
        repeated = []
        for at in np.flatnonzero(last > first).tolist():
            tags = informative(ways.tags.of(rows[at]))
            for relation, own in self.members.outer_of(first[at], last[at]):
                if not own:
                    self.lent.setdefault(relation, []).append(tags)
                if not own or tags.items() <= own.items():
                    repeated.append((ids[at], relation))
        if repeated:
            self.sink.drop_ways(*np.array(repeated, np.int64).T)

    def _take_areas(self) -> None:
        import shapely

        areas, self.areas = self.areas, _Areas()
        batch = Batch(
            osm_type=np.full(len(areas), RELATION, np.uint8),
            osm_id=np.array(areas.id, np.int64),
            kind=np.full(len(areas), POLYGON, np.uint8),
            tags=tags_array(areas.tags),
            geometry=shapely.from_wkb(np.array(areas.wkb, dtype=object)),
            version=np.array(areas.version, np.int32),
        )
        self.sink.add(mended(batch, self.sink.counts))


def informative(tags: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in tags.items() if k not in UNINFORMATIVE_KEYS}


def way_shapes(ways: Ways, rows: NDArray[np.int64]) -> Shapes:
    """Return the ways ``rows``, which have coordinates, as areas where they are closed and their tags say so."""
    starts = (np.cumsum(ways.lengths) - ways.lengths)[rows]
    lengths = ways.lengths[rows]
    closed = (lengths >= 4) & (ways.lonlat[starts] == ways.lonlat[starts + lengths - 1]).all(axis=1)
    kind = np.where(closed & ways.tags.says_area[rows], POLYGON, LINE).astype(np.uint8)
    return Shapes(kind, lengths, ways.lonlat[spread(starts, lengths)])


def _sound(shapes: Shapes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which shapes are valid, and which are areas that must be mended; lines without length are neither."""
    import shapely

    boxes = shapes.boxes()
    sound = np.asarray((boxes[:, :2] < boxes[:, 2:]).any(axis=1))
    areas = np.flatnonzero((shapes.kind == POLYGON) & ~surely_simple(shapes))
    valid = np.asarray(shapely.is_valid(shapes[areas].objects()))
    sound[areas] = valid
    return np.flatnonzero(sound), areas[~valid]


def mended(batch: Batch, counts: Counts) -> Batch:
    """Return ``batch`` with invalid polygons made valid, and without what has no length or area left."""
    import shapely

    geometry = batch.objects()
    polygons = batch.kind == POLYGON
    broken = np.flatnonzero(polygons & ~shapely.is_valid(geometry))
    if len(broken):
        geometry = geometry.copy()
        whole = shapely.make_valid(geometry[broken], method="structure", keep_collapsed=False)
        # A collection would be a polygon with lines left over: only its surface counts.
        parts, owner = shapely.get_parts(whole, return_index=True)
        surface = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
        many = np.isin(np.arange(len(whole)), owner[~surface])
        whole[many] = [shapely.multipolygons(parts[(owner == i) & surface]) for i in np.flatnonzero(many)]
        geometry[broken] = whole
    # A multipolygon of one part is that part: fewer geometry types for every reader.
    single = np.flatnonzero(
        polygons & (shapely.get_type_id(geometry) == 6) & (shapely.get_num_geometries(geometry) == 1)
    )
    if len(single):
        geometry = geometry.copy() if geometry is batch.geometry else geometry
        geometry[single] = shapely.get_geometry(geometry[single], 0)
    usable = ~shapely.is_missing(geometry) & ~shapely.is_empty(geometry)
    usable &= np.where(polygons, shapely.area(geometry) > 0, (batch.kind == POINT) | (shapely.length(geometry) > 0))
    counts.mended += int(usable[broken].sum())
    counts.invalid += int((~usable).sum())
    batch = replace(batch, geometry=geometry)
    return batch if usable.all() else batch[np.flatnonzero(usable)]
