"""OSM files to the element table."""

from __future__ import annotations

import bz2
import errno
import gzip
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import osmium
import pyarrow as pa
import pytest
import shapely
from element_tables import read
from hypothesis import given, settings
from hypothesis import strategies as st
from listening import Listener
from osm_documents import document, node, relation, ring, way

from rsosm_cli.errors import DiskError, FormatError, MissingError
from rsosm_cli.osm import blocks as blocks_module
from rsosm_cli.osm import extract
from rsosm_cli.osm import keys as keys_module
from rsosm_cli.osm import sink as sink_module
from rsosm_cli.osm.blocks import FORM, Nodes, Ways, read_blocks
from rsosm_cli.osm.extract import header_box, nodes_box, read_extract
from rsosm_cli.osm.keys import Keys
from rsosm_cli.osm.rules import denies_area, says_area
from rsosm_cli.osm.shapes import LINE, POLYGON, Shapes, surely_simple
from rsosm_cli.osm.sink import ElementSink


class TestExtract:
    def test_closed_ways_are_areas_or_lines_by_their_tags(self, tmp_path: Path) -> None:
        found, counts = read(
            tmp_path,
            document(
                way(1, ring(0, 0, 2), building="yes"),
                way(2, ring(0, 3, 2), highway="residential"),
                way(3, ring(3, 0, 2), highway="pedestrian", area="yes"),
                way(4, ring(3, 3, 2), leisure="park", area="no"),
                way(5, ring(6, 0, 2), natural="cliff"),
                way(6, [100, 101, 102], landuse="forest"),
                way(7, ring(6, 6, 2)),
                way(8, ring(6, 6, 2), created_by="JOSM"),
            ),
        )
        kinds = {number: kind for (_, number), (kind, _, _) in found.items()}
        assert kinds == {1: "polygon", 2: "line", 3: "polygon", 4: "line", 5: "line", 6: "line"}
        assert found["way", 1][2].equals(shapely.box(10, 50, 10.002, 50.002))
        assert (counts.polygon, counts.line, counts.point) == (2, 4, 0)

    def test_multipolygons_have_holes_and_their_ways_do_not_come_twice(self, tmp_path: Path) -> None:
        found, counts = read(
            tmp_path,
            document(
                way(1, ring(0, 0, 6), landuse="forest"),
                way(2, ring(1, 1, 2)),
                way(3, ring(0, 7, 2), barrier="fence"),
                relation(1, [(1, "outer"), (2, "inner")], type="multipolygon", landuse="forest", name="Wald"),
                relation(2, [(3, "outer")], type="multipolygon", leisure="park"),
            ),
        )
        assert set(found) == {("relation", 1), ("relation", 2), ("way", 3)}
        assert shapely.get_num_interior_rings(found["relation", 1][2]) == 1
        assert found["relation", 1][1] == {"landuse": "forest", "name": "Wald"}
        assert found["way", 3][0] == "line"
        assert counts.duplicates == 1

    def test_a_multipolygon_without_tags_takes_those_of_its_outer_ways(self, tmp_path: Path) -> None:
        found, _ = read(
            tmp_path,
            document(
                way(1, ring(0, 0, 4), natural="water"),
                way(2, ring(1, 1, 2), landuse="meadow"),
                relation(1, [(1, "outer"), (2, "inner")], type="multipolygon"),
            ),
        )
        assert set(found) == {("relation", 1), ("way", 2)}
        assert found["relation", 1][1] == {"natural": "water"}
        assert found["relation", 1][2].area == pytest.approx((16 - 4) * 1e-6)

    def test_outer_ways_that_say_more_than_their_multipolygon_stay(self, tmp_path: Path) -> None:
        house = {"building": "yes"}
        outers = [(1, "outer"), (2, "outer")]
        first, second = way(1, ring(0, 0, 3), **house, name="A"), way(2, ring(4, 4, 3), **house, name="B")
        # Two buildings of one multipolygon without tags: all of it is said by them.
        found, counts = read(tmp_path, document(first, second, relation(1, outers, type="multipolygon")))
        assert {number: tags["name"] for number, (_, tags, _) in found.items()} == {("way", 1): "A", ("way", 2): "B"}
        assert counts.duplicates == 0
        # One says no more than both: it is the multipolygon.
        found, counts = read(
            tmp_path, document(first, way(2, ring(4, 4, 3), **house), relation(1, outers, type="multipolygon"))
        )
        assert set(found) == {("relation", 1), ("way", 1)}
        assert found["relation", 1][1] == house
        # With a hole, the multipolygon says where it is.
        holed = relation(1, [*outers, (3, "inner")], type="multipolygon")
        found, _ = read(tmp_path, document(first, second, way(3, ring(1, 1, 1)), holed))
        assert set(found) == {("relation", 1), ("way", 1), ("way", 2)}
        # Halves of one ring are lines: the multipolygon is what has a surface.
        halves = [way(1, [100, 102, 122], **house, name="A"), way(2, [122, 120, 100], **house, name="B")]
        found, _ = read(tmp_path, document(*halves, relation(1, outers, type="multipolygon")))
        assert found["relation", 1][1] == house
        assert set(found) == {("relation", 1), ("way", 1), ("way", 2)}

    def test_what_the_file_cuts_is_left_out_and_counted(self, tmp_path: Path) -> None:
        found, counts = read(
            tmp_path,
            document(
                way(1, [100, 101, 999], highway="service"),
                way(2, ring(0, 0, 2), landuse="forest"),
                relation(1, [(2, "outer"), (77, "outer")], type="multipolygon", landuse="forest"),
            ),
        )
        assert set(found) == {("way", 2)}  # stays, as the relation that it belongs to could not be made
        assert counts.cut == 2

    def test_only_what_meets_the_place_is_kept_and_kept_whole(self, tmp_path: Path) -> None:
        found, counts = read(
            tmp_path,
            document(
                way(1, [100, 109], highway="primary"),
                way(2, [190, 199], highway="primary"),
                way(3, ring(0, 0, 9), landuse="residential"),
                node(1, 10.0005, 50.0005, amenity="cafe"),
                node(2, 10.008, 50.008, amenity="cafe"),
            ),
            place=shapely.box(10, 50, 10.001, 50.001),
        )
        assert set(found) == {("way", 1), ("way", 3), ("node", 1)}
        assert found["way", 1][2].bounds == (10, 50, 10.009, 50)
        assert counts.outside == 2

    def test_tags_survive_any_character(self, tmp_path: Path) -> None:
        tags = {
            "name": "Café, 東京 = 100 % 😀",
            "note": 'a "b" \\ c',
            "addr:full": "x@y %20% z",
            "empty": "",
            "k": "\t",
        }
        parts = "".join(
            f'<tag k="{k}" v="{v.replace("&", "&amp;").replace(chr(34), "&quot;").replace(chr(9), "&#9;")}"/>'
            for k, v in tags.items()
        )
        found, _ = read(tmp_path, document(f'<node id="1" version="1" lon="10" lat="50">{parts}</node>'))
        assert found["node", 1][1] == tags

    def test_bow_ties_are_mended_and_collapsed_shapes_dropped(self, tmp_path: Path) -> None:
        found, counts = read(
            tmp_path,
            document(
                way(1, [100, 122, 120, 102, 100], building="yes"),
                way(2, [100, 101, 102, 101, 100], building="yes"),
                way(3, [100, 100], highway="path"),
            ),
        )
        assert set(found) == {("way", 1)}
        assert found["way", 1][2].is_valid
        assert (counts.mended, counts.invalid) == (1, 2)

    def test_of_two_files_the_newer_copy_stays(self, tmp_path: Path) -> None:
        old = document(node(1, 10, 50, shop="yes"), way(1, [100, 101], highway="path"))
        new = document(node(1, 10, 50, shop="books").replace('id="1" version="1"', 'id="1" version="7"'))
        for files in ((old, new), (new, old)):
            found, counts = read(tmp_path, *files)
            assert found["node", 1][1] == {"shop": "books"}
            assert len(found) == 2
            assert counts.duplicates == 1

    @pytest.mark.parametrize("threshold", [0, extract.LARGE])
    def test_large_files_in_portions_give_the_same_bytes(
        self, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, threshold: int
    ) -> None:
        source = shared / "data/osm/monaco.osm.pbf"
        with ElementSink(tmp_path / "once.parquet") as sink:
            read_extract(source, sink, progress=(plain := Listener()))
        monkeypatch.setattr(extract, "LARGE", threshold)
        monkeypatch.setattr(extract, "_AREAS", 3)
        monkeypatch.setattr(blocks_module, "_PORTION", 500)
        monkeypatch.setattr(sink_module, "_SPILLED", 3000)
        monkeypatch.setattr(keys_module, "_PORTION", 500)
        with ElementSink(tmp_path / "again.parquet") as other:
            read_extract(source, other, progress=(counting := Listener()))
        assert counting.tasks[0].done == plain.tasks[0].done > 7000
        assert (tmp_path / "once.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()
        assert other.counts == sink.counts
        assert sorted(p.name for p in tmp_path.iterdir()) == ["again.parquet", "once.parquet"]

    def test_a_file_out_of_order_is_read_too(self, tmp_path: Path) -> None:
        parts = [
            way(1, [100, 1], highway="path"),
            way(2, [122, 144, 2, 122], natural="water"),
            relation(3, [(2, "outer")], type="multipolygon", landuse="reservoir"),
            node(1, 10, 50.5, shop="yes"),
            node(2, 10.1, 50),
        ]
        found, counts = read(tmp_path, document(*parts))
        assert set(found) == {("way", 1), ("way", 2), ("relation", 3), ("node", 1)}
        assert counts.cut == 0
        assert found == read(tmp_path, document(*parts[3:], *parts[:3]))[0]
        # Nodes of ways that come after them and have no tags: as of an export of Overpass.
        found, counts = read(tmp_path, document(*parts[:3], node(1, 10, 50.5), node(2, 10.1, 50)))
        assert set(found) == {("way", 1), ("way", 2), ("relation", 3)}
        assert counts.cut == 0

    def test_a_cut_multipolygon_before_a_whole_one(self, tmp_path: Path) -> None:
        water = {"type": "multipolygon", "natural": "water"}
        parts = [
            way(1, [100, 999, 122, 100]),
            way(2, ring(0, 0, 2)),
            way(3, ring(4, 4, 2)),
            relation(1, [(1, "outer")], **water),
            relation(2, [(2, "outer")], **water),
            relation(3, [(3, "outer")], **water),
        ]
        found, counts = read(tmp_path, document(*parts))
        assert set(found) == {("relation", 2), ("relation", 3)}
        assert counts.cut == 1

    def test_a_way_of_two_multipolygons_goes_with_either(self, tmp_path: Path) -> None:
        for whole, cut in ((5, 6), (6, 5)):
            water = {"type": "multipolygon", "natural": "water"}
            parts = [way(1, ring(0, 0, 2), natural="water"), *(
                relation(number, [(1, "outer"), *([(99, "outer")] if number == cut else [])], **water)
                for number in (5, 6)
            )]  # fmt: skip
            found, counts = read(tmp_path, document(*parts))
            assert set(found) == {("relation", whole)}
            assert (counts.duplicates, counts.cut) == (1, 1)

    def test_places_outside_the_world_are_none(self, tmp_path: Path) -> None:
        parts = [node(1, 10.5, 50.5, shop="yes"), node(2, 200, 95, shop="yes"), node(3, 10.6, 50.5)]
        found, counts = read(tmp_path, document(*parts, way(1, [1, 3], highway="path"), way(2, [1, 2], highway="path")))
        assert set(found) == {("node", 1), ("way", 1)}
        assert counts.cut == 2

    def test_broken_numbers_and_texts(self, tmp_path: Path) -> None:
        for text in (document().replace('lat="50', 'lat="x'), document(node("1x", 10, 50, shop="yes"))):
            path = tmp_path / "a.osm"
            path.write_text(text)
            with pytest.raises(FormatError, match=r"a\.osm is damaged"), ElementSink(tmp_path / "osm.parquet") as sink:
                read_extract(path, sink)

    def test_compressed_xml(self, tmp_path: Path) -> None:
        text = document(way(1, ring(0, 0, 2), building="yes")).encode()
        for name, packed in (("a.osm.gz", gzip.compress(text)), ("a.osm.bz2", bz2.compress(text))):
            (tmp_path / name).write_bytes(packed)
            assert set(read(tmp_path, tmp_path / name)[0]) == {("way", 1)}

    def test_boxes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.osm"
        path.write_text(document(box='<bounds minlat="50" minlon="10" maxlat="50.5" maxlon="10.5"/>'))
        assert header_box(path) == (10, 50, 10.5, 50.5)
        path.write_text(document())
        assert header_box(path) is None
        assert nodes_box(path) == pytest.approx((10, 50, 10.009, 50.009))

    @pytest.mark.parametrize("damage", ["truncated", "html", "zeros", "empty", "half gzip"])
    def test_a_damaged_file_is_one_sentence(self, tmp_path: Path, shared: Path, damage: str) -> None:
        whole = (shared / "data/osm/monaco.osm.pbf").read_bytes()
        path = tmp_path / ("a.osm.gz" if damage == "half gzip" else "a.osm.pbf")
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "html": b"<!DOCTYPE html><html>Not found</html>",
                "zeros": whole[:1000] + bytes(len(whole) - 1000),
                "empty": b"",
                "half gzip": gzip.compress(document().encode())[:300],
            }[damage]
        )
        target = tmp_path / "osm.parquet"
        with pytest.raises(FormatError, match=r"a\.osm\.\w+ is damaged"), ElementSink(target) as sink:
            read_extract(path, sink)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_a_full_disk_is_one_sentence(self, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = shared / "data/osm/monaco.osm.pbf"

        def fail(batch: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(sink_module, "_SPILLED", 100)
        full = SimpleNamespace(write_batch=fail, close=lambda: None)
        monkeypatch.setattr(pa.ipc, "new_file", lambda *given: full)
        with pytest.raises(DiskError, match="disk is full"), ElementSink(tmp_path / "osm.parquet") as sink:
            read_extract(source, sink)
        monkeypatch.undo()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
        with pytest.raises(DiskError, match="needs"), ElementSink(tmp_path / "osm.parquet") as sink:
            read_extract(source, sink)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_file_and_a_history_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MissingError, match="no OSM file"):
            header_box(tmp_path / "none.osm.pbf")
        (tmp_path / "a.osh.pbf").touch()
        with pytest.raises(FormatError, match="history"):
            header_box(tmp_path / "a.osh.pbf")


def test_the_real_extracts_hold_what_they_should(tmp_path: Path, shared: Path) -> None:
    found, counts = read(tmp_path, shared / "data/osm/porto.osm.pbf")
    buildings = [kind for kind, tags, _ in found.values() if "building" in tags]
    highways = [kind for kind, tags, _ in found.values() if "highway" in tags and tags.get("area") != "yes"]
    assert 11_000 < buildings.count("polygon") <= len(buildings) < 12_500
    assert 4_200 < len(highways) < 6_000
    assert highways.count("polygon") < 20  # but those that say area=yes, streets are lines
    assert counts.total == len(found)
    assert all(geometry.is_valid for _, _, geometry in found.values())


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)


@given(
    st.lists(
        st.tuples(
            st.integers(-(2**62), 2**62),
            st.dictionaries(TEXT.filter(bool), TEXT, min_size=1, max_size=4),
            st.lists(st.tuples(st.integers(-1800000000, 1800000000), st.integers(-900000000, 900000000)), max_size=300),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda part: part[0],
    )
)
@settings(max_examples=30, deadline=None)
def test_what_libosmium_writes_is_read_back(parts: list[tuple[int, dict[str, str], list[tuple[int, int]]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.osm.pbf", Path(folder) / "target.osm.pbf"
        spots = {spot: number for number, spot in enumerate(sorted({s for _, _, line in parts for s in line}), 1)}
        with osmium.SimpleWriter(str(source)) as writer:
            for spot, number in spots.items():
                place = (spot[0] / 1e7, spot[1] / 1e7)
                writer.add_node(osmium.osm.mutable.Node(id=number, version=1, location=place, tags={"n": str(number)}))
            for number, tags, line in parts:
                nodes = [spots[spot] for spot in line]
                writer.add_way(osmium.osm.mutable.Way(id=number, version=7, nodes=nodes, tags=tags))
        index = osmium.index.create_map("flex_mem")
        locations = osmium.NodeLocationsForWays(index)
        with osmium.SimpleWriter(osmium.io.File(str(target), FORM)) as writer:
            osmium.apply(str(source), locations, writer)
        blocks = list(read_blocks(target, relations=True))
    nodes = [block for block in blocks if isinstance(block, Nodes)]
    found = {int(n): xy for block in nodes for n, xy in zip(block.id, block.lonlat.tolist(), strict=True)}
    assert found == {number: [x / 1e7, y / 1e7] for (x, y), number in spots.items()}
    assert all(block.tags.of(row) == {"n": str(n)} for block in nodes for row, n in enumerate(block.id))
    (ways,) = (block for block in blocks if isinstance(block, Ways))
    assert ways.id.tolist() == [number for number, _, _ in parts]
    assert ways.version.tolist() == [7] * len(parts)
    assert [ways.tags.of(row) for row in range(len(parts))] == [tags for _, tags, _ in parts]
    assert ways.tags.arrow(np.arange(len(parts))).to_pylist() == [list(tags.items()) for _, tags, _ in parts]
    lines = np.split(ways.lonlat, np.cumsum(ways.lengths)[:-1])
    assert [(line * 1e7).round().astype(int).tolist() for line in lines] == [[list(s) for s in p] for _, _, p in parts]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_coordinates_become_the_wkb_of_shapely(parts: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    kind = np.array([k for k, _ in parts], np.uint8)
    lengths = np.array([(1, 2 + n, 4 + n)[k] for k, n in parts], np.int64)
    lonlat = rng.uniform(-90, 90, (lengths.sum(), 2))
    last = np.cumsum(lengths) - 1
    lonlat[last[kind == POLYGON]] = lonlat[(last - lengths + 1)[kind == POLYGON]]
    shapes = Shapes(kind, lengths, lonlat)
    assert shapes.wkb().to_pylist() == shapely.to_wkb(shapes.objects(), byte_order=1).tolist()
    assert shapes.boxes.tolist() == shapely.bounds(shapes.objects()).tolist()
    some = np.arange(0, len(parts), 2)
    assert shapes[some].wkb().to_pylist() == shapes.wkb().to_pylist()[::2]


def test_what_is_surely_simple_is_valid() -> None:
    rng = np.random.default_rng(0)
    rings = []
    for corners in range(3, 14):
        # On few places rings touch, cross and turn back on themselves; around a middle they are sound.
        wild = rng.integers(0, 6, (200, corners, 2))
        angles = np.sort(rng.uniform(0, 2 * np.pi, (200, corners)), axis=1)
        round_ = np.stack([np.cos(angles), np.sin(angles)], axis=2) * 1000
        rings += [*wild, *np.rint(round_).astype(int)]
    closed = [np.concatenate([ring, ring[:1]]) / 1e7 for ring in rings]
    lengths = np.array([len(ring) for ring in closed])
    shapes = Shapes(np.full(len(closed), POLYGON, np.uint8), lengths, np.concatenate(closed))
    sure, valid = surely_simple(shapes), shapely.is_valid(shapes.objects())
    assert not (sure & ~valid).any()
    few = lengths <= 13
    assert not sure[~few].any()
    assert sure[few & valid].mean() > 0.6
    lines = Shapes(np.full(len(closed), LINE, np.uint8), lengths, np.concatenate(closed))
    assert not surely_simple(lines).any()


@pytest.mark.parametrize(("portion", "distinct"), [(1000, 40), (7, 40), (7, 400), (7, 1)])
def test_keys_sorted_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portion: int, distinct: int) -> None:
    monkeypatch.setattr(keys_module, "_PORTION", portion)
    rng = np.random.default_rng(0)
    n = 500
    numbers = {name: rng.integers(0, distinct, n) for name in ("id", "version", "curve")}
    numbers |= {name: rng.integers(0, 3, n) for name in ("type", "kind")}
    with Keys(tmp_path) as keys:
        for start in range(0, n, 60):
            keys.add(**{name: values[start : start + 60] for name, values in numbers.items()})
        assert len(keys) == n
        stays = keys.newest()
        rows = [part.tolist() for part in keys.along_the_curve(stays)]
    best: dict[tuple[int, int], int] = {}
    for row, key in enumerate(zip(numbers["type"].tolist(), numbers["id"].tolist(), strict=True)):
        if key not in best or numbers["version"][row] > numbers["version"][best[key]]:
            best[key] = row
    assert np.flatnonzero(stays).tolist() == sorted(best.values())
    along = sorted(best.values(), key=lambda row: [int(numbers[name][row]) for name in ("curve", "type", "id")])
    assert [row for part in rows for row in part] == along
    if portion < distinct:
        assert len(rows) > 5


def test_area_rules() -> None:
    assert says_area("building", "yes")
    assert not says_area("building", "no")
    assert says_area("natural", "water")
    assert not says_area("natural", "coastline")
    assert not says_area("highway", "residential")
    assert denies_area("area", "no")
