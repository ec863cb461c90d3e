"""OSM files (``.osm.pbf``, ``.osm.gz``, ``.osm.bz2``, ``.osm``) to elements, in one streaming pass and bounded memory.

libosmium reads the relations first (which ways make which multipolygon), then streams the file once: it locates the
nodes of ways and assembles multipolygons. Closed ways become areas or lines by ``osm/rules.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import DiskError, FormatError, NoFileError
from rsosm_cli.osm.elements import OSM_TYPES, tags_array
from rsosm_cli.osm.opl import Ways, blocks, in_order, read_nodes, read_ways
from rsosm_cli.osm.rules import UNINFORMATIVE_KEYS
from rsosm_cli.osm.sink import Batch, Counts, ElementSink
from rsosm_cli.progress import SILENT, Advance, Progress
from rsosm_cli.workspace import require_space

if TYPE_CHECKING:
    import osmium

SUFFIXES = (".osm.pbf", ".pbf", ".osm.gz", ".osm.bz2", ".osm", ".osm.xml", ".o5m")
NODE, WAY, RELATION = range(len(OSM_TYPES))
POINT, LINE, POLYGON = range(3)
_FLUSH = 50_000  # objects of a large file parsed at a time
# Bytes. Above, the locations of the nodes lie in a file (16 bytes each) instead of in memory, and the objects come in
# portions, which is slower by half but needs no room for the whole.
LARGE = 256 << 20
_FORM = "opl,add_metadata=version,locations_on_ways=true"


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
    except RuntimeError as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "No space left" in text:  # what libosmium writes on the way
            raise DiskError(f"The disk is full: {path.name} was not read.", hint="Free some space.") from error
        raise FormatError(
            f"{path.name} is damaged or not an OSM file.", hint="Download it again.", path=str(path), detail=text
        ) from error


def header_box(path: Path) -> tuple[float, float, float, float] | None:
    """Return west, south, east, north of the box in the file's header, ``None`` where it has none."""
    import osmium

    with reading(path), osmium.io.Reader(str(path), osmium.osm.NOTHING) as reader:
        box = reader.header().box()
        if not box.valid():
            return None
        low, high = box.bottom_left, box.top_right
        return (low.lon, low.lat, high.lon, high.lat)


def nodes_box(path: Path) -> tuple[float, float, float, float] | None:
    """Return the box of all nodes of a file, for those whose header has none; ``None`` where there are no nodes."""
    import osmium

    with reading(path):
        nodes: Any = osmium.FileProcessor(str(path), osmium.osm.NODE)
        spots = [(n.location.x, n.location.y) for n in nodes if n.location.valid()]
    if not spots:
        return None
    low, high = np.min(spots, axis=0) / 1e7, np.max(spots, axis=0) / 1e7  # fixed point of OSM
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))


@dataclass
class _Relations:
    """First pass: which ways are outer members of which multipolygon. Lets every relation through to libosmium."""

    tags: dict[int, dict[str, str]] = field(default_factory=dict)  # of multipolygons, without `type`
    outers: dict[int, list[int]] = field(default_factory=dict)  # way -> multipolygons
    candidates: set[int] = field(default_factory=set)  # relations that should become an area

    def relation(self, relation: osmium.osm.Relation) -> bool:
        kind = relation.tags.get("type")
        if kind not in ("multipolygon", "boundary"):
            return True
        self.candidates.add(relation.id)
        if kind == "multipolygon":
            self.tags[relation.id] = {t.k: t.v for t in relation.tags if t.k != "type"}
            for member in relation.members:
                if member.type == "w" and member.role in ("outer", ""):
                    self.outers.setdefault(member.ref, []).append(relation.id)
        return False


@dataclass
class _Areas:
    id: list[int] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    tags: list[dict[str, str]] = field(default_factory=list)
    wkb: list[str] = field(default_factory=list)


def read_extract(path: Path, sink: ElementSink, *, progress: Progress = SILENT) -> None:
    """Put the elements of an OSM file into ``sink``. Raises :class:`MissingError`, :class:`FormatError`."""
    with reading(path), progress.task(f"Reading {path.name}", None, "objects") as advance:
        _Reader(path, sink, advance).run()


class _Reader:
    def __init__(self, path: Path, sink: ElementSink, advance: Advance) -> None:
        self.path = path
        self.sink = sink
        self.advance = advance
        self.relations = _Relations()
        self.areas = _Areas()
        self.done: set[int] = set()  # relations that became an area
        # Tags of the outer ways of multipolygons that have none themselves (the way of tagging until 2017).
        self.lent: dict[int, list[dict[str, str]]] = {}

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix=".osm-", dir=self.sink.path.parent) as name:
            folder = Path(name)
            size = self.path.stat().st_size
            large = size > LARGE
            # Measured: lines of tagged objects take 7 times an extract in PBF; locations 1.6 times.
            require_space(folder, size * (2 if large or self.path.suffix == ".osm" else 8), f"Reading {self.path.name}")
            if large or not self._at_once(folder):
                stream = self._objects(f"sparse_file_array,{folder}/locations" if large else "flex_mem")
                while self._portion(stream, folder):
                    pass
        self.sink.counts.cut += len(self.relations.candidates - self.done)

    def _at_once(self, folder: Path) -> bool:
        """Let libosmium alone write all tagged objects as lines, then parse them; ``False``: the file is not in order.

        Fast, as no object reaches Python, but the lines take six times the room of the file.
        """
        import osmium

        bits, pool = osmium.osm, osmium.io.ThreadPool()
        manager = osmium.area.AreaManager()
        with osmium.io.Reader(str(self.path), bits.RELATION, thread_pool=pool) as reader:
            osmium.apply(reader, self.relations, manager.first_pass_handler())
        locations = osmium.NodeLocationsForWays(osmium.index.create_map("flex_mem"))
        locations.ignore_errors()
        chain = [locations, manager.second_pass_handler(self), *_filters(bits.NODE | bits.WAY)]
        file = folder / "objects.opl"
        with (
            osmium.SimpleWriter(osmium.io.File(str(file), _FORM), overwrite=True) as writer,
            osmium.io.Reader(str(self.path), bits.ALL, thread_pool=pool) as reader,
        ):
            osmium.apply(reader, *chain, writer)
        if not in_order(file):  # a way before its nodes has no place yet
            self.relations, self.areas, self.done = _Relations(), _Areas(), set()
            return False
        for text in blocks(file):
            self.advance(self._take_nodes(text) if text[:1] == b"n" else self._take_ways(text))
        self._take_areas()
        return True

    def area(self, area: osmium.osm.Area) -> None:
        """Called by libosmium with every area; those of closed ways are made from the ways themselves."""
        if not area.from_way():
            self._add_area(area)

    def _objects(self, index: str) -> Iterator[Any]:
        import osmium

        objects = osmium.FileProcessor(str(self.path)).with_locations(index).with_areas(self.relations)
        for only in _filters(osmium.osm.NODE | osmium.osm.WAY | osmium.osm.AREA):
            objects.with_filter(only)
        return iter(objects)

    def _portion(self, stream: Iterator[Any], folder: Path) -> bool:
        """Take the next ``_FLUSH`` objects; return whether there may be more. For large files and unordered ones."""
        import osmium

        files = {name: folder / f"{name}.opl" for name in ("nodes", "ways")}
        writers = {n: osmium.SimpleWriter(osmium.io.File(str(f), _FORM), overwrite=True) for n, f in files.items()}
        add_node, add_way = writers["nodes"].add_node, writers["ways"].add_way
        count = 0
        try:
            for obj in stream:
                if obj.is_way():
                    add_way(obj)
                elif obj.is_node():
                    add_node(obj)
                elif not obj.from_way():
                    self._add_area(obj)
                count += 1
                if count == _FLUSH:
                    break
        finally:
            for writer in writers.values():
                writer.close()
        for file in files.values():
            for text in blocks(file):
                self.advance(self._take_nodes(text) if text[:1] == b"n" else self._take_ways(text))
        self._take_areas()
        return count == _FLUSH

    def _add_area(self, area: osmium.osm.Area) -> None:
        import osmium

        try:
            wkb = osmium.geom.WKBFactory().create_multipolygon(area)
        except (RuntimeError, osmium.InvalidLocationError):  # an area without rings: libosmium could not assemble it
            return
        self.areas.id.append(area.orig_id())
        self.areas.version.append(area.version)
        self.areas.tags.append({t.k: t.v for t in area.tags if t.k != "type"})
        self.areas.wkb.append(wkb)
        self.done.add(area.orig_id())

    def _take_nodes(self, text: bytes) -> int:
        import shapely

        nodes = read_nodes(text)
        located = ~np.isnan(nodes.lonlat).any(axis=1)
        self.sink.counts.cut += int((nodes.tags.informative & ~located).sum())
        rows = np.flatnonzero(nodes.tags.informative & located)
        self.sink.add(
            Batch(
                osm_type=np.full(len(rows), NODE, np.uint8),
                osm_id=nodes.id[rows],
                kind=np.full(len(rows), POINT, np.uint8),
                tags=nodes.tags.arrow(rows),
                geometry=shapely.points(nodes.lonlat[rows]),
                version=nodes.version[rows],
            )
        )
        return len(nodes.id)

    def _take_ways(self, text: bytes) -> int:
        ways = read_ways(text)
        stands_for = self._repeated(ways)
        wanted = ways.tags.informative
        self.sink.counts.cut += int((wanted & (ways.lengths == 0)).sum())
        wanted = wanted & (ways.lengths > 0)
        geometry, is_area = way_geometry(ways, wanted)
        rows = np.flatnonzero(wanted)
        batch = Batch(
            osm_type=np.full(len(rows), WAY, np.uint8),
            osm_id=ways.id[rows],
            kind=np.where(is_area[rows], POLYGON, LINE).astype(np.uint8),
            tags=ways.tags.arrow(rows),
            geometry=geometry[rows],
            version=ways.version[rows],
            stands_for=stands_for[rows],
        )
        self.sink.add(mended(batch, self.sink.counts))
        return len(ways.id)

    def _repeated(self, ways: Ways) -> NDArray[np.int64]:
        """Return for each way the multipolygon that it only repeats (same tags, or lending its tags), else 0."""
        stands_for = np.zeros(len(ways.id), np.int64)
        outers = self.relations.outers
        members = np.flatnonzero(np.isin(ways.id, np.fromiter(outers, np.int64, len(outers))))
        for row in members.tolist():
            tags = informative(ways.tags.of(row))
            if not tags:
                continue
            for relation in outers[int(ways.id[row])]:
                own = informative(self.relations.tags[relation])
                if not own:
                    self.lent.setdefault(relation, []).append(tags)
                    stands_for[row] = relation
                elif tags.items() <= own.items():
                    stands_for[row] = relation
        return stands_for

    def _take_areas(self) -> None:
        import shapely

        areas, self.areas = self.areas, _Areas()
        tags = []
        for number, own in zip(areas.id, areas.tags, strict=True):
            lent = self.lent.pop(number, [])
            # Outer ways that disagree say nothing about the whole: then they stay as they are.
            common = set.intersection(*(set(t.items()) for t in lent)) if lent else set()
            tags.append(own if informative(own) else dict(sorted(common)))
        rows = np.flatnonzero([bool(informative(t)) for t in tags])
        batch = Batch(
            osm_type=np.full(len(rows), RELATION, np.uint8),
            osm_id=np.array(areas.id, np.int64)[rows],
            kind=np.full(len(rows), POLYGON, np.uint8),
            tags=tags_array([tags[i] for i in rows]),
            geometry=shapely.from_wkb(np.array(areas.wkb, dtype=object)[rows]),
            version=np.array(areas.version, np.int32)[rows],
        )
        self.sink.add(mended(batch, self.sink.counts))


def _filters(entities: Any) -> list[Any]:
    """Return filters that let only ``entities`` through, and of nodes and ways the tagged ones."""
    import osmium

    tagged = osmium.filter.EmptyTagFilter()
    tagged.enable_for(osmium.osm.NODE | osmium.osm.WAY)  # a multipolygon may borrow the tags of its ways
    return [osmium.filter.EntityFilter(entities), tagged]


def informative(tags: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in tags.items() if k not in UNINFORMATIVE_KEYS}


def way_geometry(ways: Ways, wanted: NDArray[np.bool_]) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
    """Return the geometries of the ways ``wanted`` (others ``None``) and which of them are areas."""
    import shapely

    starts = np.cumsum(ways.lengths) - ways.lengths
    last = np.maximum(starts + ways.lengths - 1, 0)
    geometry = np.full(len(ways.id), None, dtype=object)
    if not len(ways.lonlat):
        return geometry, np.zeros(len(ways.id), bool)
    clipped = np.minimum(starts, len(ways.lonlat) - 1)
    closed = (ways.lengths >= 4) & (ways.lonlat[clipped] == ways.lonlat[last]).all(axis=1)
    is_area = closed & ways.tags.says_area

    def coordinates(chosen: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        mask = np.repeat(chosen, ways.lengths)
        return ways.lonlat[mask], np.repeat(np.arange(int(chosen.sum())), ways.lengths[chosen])

    lines = wanted & ~is_area & (ways.lengths >= 2)
    if lines.any():
        xy, owner = coordinates(lines)
        geometry[lines] = shapely.linestrings(xy, indices=owner)
    areas = wanted & is_area
    if areas.any():
        xy, owner = coordinates(areas)
        geometry[areas] = shapely.polygons(shapely.linearrings(xy, indices=owner))
    return geometry, is_area


def mended(batch: Batch, counts: Counts) -> Batch:
    """Return ``batch`` with invalid polygons made valid, and without what has no length or area left."""
    import shapely

    geometry = batch.geometry
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
    if usable.all():
        return _with(batch, geometry, None)
    return _with(batch, geometry, np.flatnonzero(usable))


def _with(batch: Batch, geometry: NDArray[np.object_], rows: NDArray[np.int64] | None) -> Batch:
    import pyarrow as pa

    if rows is None:
        rows = np.arange(len(batch))
    return Batch(
        osm_type=batch.osm_type[rows],
        osm_id=batch.osm_id[rows],
        kind=batch.kind[rows],
        tags=batch.tags.take(pa.array(rows)),
        geometry=geometry[rows],
        version=None if batch.version is None else batch.version[rows],
        stands_for=None if batch.stands_for is None else batch.stands_for[rows],
    )
