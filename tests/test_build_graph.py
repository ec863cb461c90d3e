"""``build-graph``: a city's store, whole, resumed, skipped, on any number of workers; chips; wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from element_tables import write_elements
from rasterio.transform import from_origin

import rsosm_cli.tiles.blocks as blocks
from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.geometry import Grid
from rsosm_cli.osm.elements import Elements
from rsosm_cli.pipeline.build_graph import build_graph
from rsosm_cli.pipeline.pool import run_jobs
from rsosm_cli.places.place import Place, write_place
from rsosm_cli.products.tile_preview import draw_tile
from rsosm_cli.settings import BuildSettings
from rsosm_cli.tiles.describe import describe, describe_tile
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.workspace import Workspace

# 2 km round a point in the middle of a UTM zone; blocks of 4 x 4 tiles of 64 m.
ORIGIN = (9.0, 47.0)
SETTINGS = BuildSettings.model_validate({"grid": {"tile": 64, "stride": 64, "gsd": 2.0}})


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_PX", 64 * 4)


def make_city(root: Path, name: str = "Town", size: float = 0.02) -> Path:
    rng = np.random.default_rng(0)
    n = 400
    at = rng.uniform(ORIGIN, (ORIGIN[0] + size, ORIGIN[1] + size), (n, 2))
    kind = rng.integers(0, 3, n).astype(np.uint8)
    extent = rng.uniform(1e-4, 2e-3, (n, 2))
    shapes = [
        (shapely.Point(p), shapely.LineString([p, p + s]), shapely.box(*p, *(p + s)))[k]
        for k, p, s in zip(kind, at, extent, strict=True)
    ]
    tags = [{"building": str(i % 7)} for i in range(n)]
    elements = Elements(
        "EPSG:4326", (kind > 0).astype(np.uint8), np.arange(1, n + 1), kind, tags, np.array(shapes, object)
    )
    files = Workspace(root).city(name)
    files.folder.mkdir(parents=True)
    write_elements(files.osm, elements)
    write_place(files.place, Place(name, shapely.box(*ORIGIN, ORIGIN[0] + size, ORIGIN[1] + size), "--bbox"))
    return files.tiles


def make_image(path: Path, west: float, north: float, side: int = 200) -> Path:
    pixels = np.random.default_rng(2).integers(1, 256, (3, side, side)).astype(np.uint8)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", crs="EPSG:4326",
        transform=from_origin(west, north, 5e-5, 5e-5),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_city_becomes_a_store_once(tmp_path: Path) -> None:
    tiles = make_city(tmp_path)
    planned = build_graph("Town", root=tmp_path, settings=SETTINGS, dry_run=True)
    assert (planned.status, tiles.exists()) == ("planned", False)
    result = build_graph("Town", root=tmp_path, settings=SETTINGS)
    assert result.status == "done"
    assert result.numbers["tiles"] == planned.numbers["tiles"] > 100
    store = TileStore.open(tiles)
    assert not store.has_images
    assert store.n_objects.sum() == result.numbers["points"] + result.numbers["lines"] + result.numbers["polygons"]
    assert sorted(p.name for p in tiles.parent.iterdir() if not p.name.startswith(".")) == [
        "config.build-graph.yaml", "manifest.json", "osm.parquet", "place.geojson", "tiles.h5",
    ]  # fmt: skip
    before = digest(tiles)
    assert build_graph("Town", root=tmp_path, settings=SETTINGS).status == "skipped"
    assert build_graph("Town", root=tmp_path, settings=SETTINGS, force=True).status == "done"
    assert digest(tiles) == before
    other = SETTINGS.model_copy(update={"bands": (1,)})
    assert build_graph("Town", root=tmp_path, settings=other).status == "done"


def test_blocks_and_workers_and_clusters_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = make_city(tmp_path)
    one = build_graph("Town", root=tmp_path, settings=SETTINGS)
    alone = digest(tiles)
    build_graph("Town", root=tmp_path, settings=SETTINGS, workers=2, force=True)
    assert digest(tiles) == alone
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        build_graph("Town", root=tmp_path, settings=SETTINGS, scheduler=cluster.scheduler_address, force=True)
    assert digest(tiles) == alone
    # One block over all gives the same graphs in another order of tiles.
    few = TileStore.open(tiles)
    by_cell = {tuple(c): few.graphs([i]) for i, c in enumerate(few.cells.tolist())}
    copy = tmp_path / "whole.h5"
    monkeypatch.setattr(blocks, "_BLOCK_PX", 10**6)
    build_graph("Town", root=tmp_path, settings=SETTINGS, output=copy)
    whole = TileStore.open(copy)
    assert len(whole) == one.numbers["tiles"]
    assert whole.tags == few.tags
    for i in range(0, len(whole), 17):
        a, b = whole.graphs([i]), by_cell[tuple(whole.cells[i].tolist())]
        for name, nodes in a.nodes.items():
            np.testing.assert_array_equal(nodes.key_points, b.nodes[name].key_points)
            np.testing.assert_array_equal(nodes.tag_ids, b.nodes[name].tag_ids)
        for pair, edges in a.edges.items():
            np.testing.assert_array_equal(edges.index, b.edges[pair].index)
            np.testing.assert_array_equal(edges.relation, b.edges[pair].relation)


def test_crowded_blocks_are_built_in_strips_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = make_city(tmp_path)
    build_graph("Town", root=tmp_path, settings=SETTINGS)
    alone, store = digest(tiles), TileStore.open(tiles)
    place = shapely.box(*ORIGIN, ORIGIN[0] + 0.02, ORIGIN[1] + 0.02)
    grid = Grid.covering(place, tile_px=64, stride_px=64, gsd_m=2.0)
    osm = tiles.with_name("osm.parquet")
    whole = blocks.split(grid, osm)
    assert len(whole) == len(blocks.split(grid))
    monkeypatch.setattr(blocks, "_MOST_OBJECTS", 6)
    strips = blocks.split(grid, osm)
    assert len(strips) > 2 * len(whole)
    np.testing.assert_array_equal(np.concatenate([s.cells for s in strips]), store.cells)
    assert all(set(np.diff(s.cells[:, 1])) <= {0, 1} for s in strips)
    build_graph("Town", root=tmp_path, settings=SETTINGS, force=True)
    assert digest(tiles) == alone


def test_a_killed_build_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    tiles = make_city(tmp_path)
    build_graph("Town", root=tmp_path, settings=SETTINGS)
    expected = digest(tiles)
    tiles.unlink()
    script = (
        "import os, sys; from pathlib import Path; import rsosm_cli.tiles.blocks as b; b._BLOCK_PX = 256\n"
        "import rsosm_cli.pipeline.build_graph as p; from rsosm_cli.settings import BuildSettings\n"
        "whole, done = p.build_block, []\n"
        "def work(job):\n"
        "    if len(done) == 3: print('three', flush=True); import time; time.sleep(60)\n"
        "    done.append(1); return whole(job)\n"
        "p.build_block = work\n"
        f"settings = BuildSettings.model_validate({SETTINGS.model_dump()!r})\n"
        f"p.build_graph('Town', root=Path({str(tmp_path)!r}), settings=settings)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "three"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not tiles.exists()
    parts = list(tiles.parent.glob(".tiles.h5.*.parts/block-*.npz"))
    assert len(parts) == 3
    stamps = {p: p.stat().st_mtime_ns for p in parts}
    time.sleep(0.01)
    shutil.copytree(parts[0].parent, tmp_path / "kept")
    assert build_graph("Town", root=tmp_path, settings=SETTINGS).status == "done"
    assert digest(tiles) == expected
    assert not list(tiles.parent.glob(".tiles.h5.*.parts"))
    assert len(stamps) == 3


def test_images_are_cut_on_the_tiles_and_gaps_marked(tmp_path: Path) -> None:
    tiles = make_city(tmp_path)
    image = make_image(tmp_path / "image.tif", ORIGIN[0], ORIGIN[1] + 0.02)  # a quarter of the place
    build_graph("Town", root=tmp_path, settings=SETTINGS, imagery=image)
    store = TileStore.open(tiles)
    share = store.image_share
    assert (share == 0).any()
    assert (share == 1).any()
    assert ((share > 0) & (share < 1)).any()
    pixels = store.images(np.flatnonzero(share == 0)[:3])
    assert pixels.shape == (3, 3, 64, 64)
    assert not pixels.any()
    assert store.images([int(share.argmax())]).std() > 10
    number = int(np.argmax(share * store.n_objects))
    draw_tile(store, number, tmp_path / "tile.png")
    assert (tmp_path / "tile.png").read_bytes()[:4] == b"\x89PNG"
    assert describe(tiles)["tiles"] == len(store)
    assert describe_tile(tiles, number)["image_share"] > 0
    with pytest.raises(UsageError, match="no tile"):
        describe_tile(tiles, len(store))


def test_wrong_input_is_answered_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is nothing of Atlantis"):
        build_graph("Atlantis", root=tmp_path)
    make_city(tmp_path)
    far = make_image(tmp_path / "far.tif", 9.8, 47.8)
    with pytest.raises(SourceError, match="does not meet the city"):
        build_graph("Town", root=tmp_path, imagery=far, settings=SETTINGS)
    with pytest.raises(UsageError, match="which city"):
        build_graph(root=tmp_path)
    with pytest.raises(MissingError, match="no file of imagery"):
        build_graph("Town", root=tmp_path, imagery=tmp_path / "none.tif")
    with pytest.raises(SourceError, match="does not answer"):
        list(run_jobs(str, [1], scheduler="nonsense://1"))


def make_chip(folder: Path, name: str, crs: str = "EPSG:4326") -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    Image.fromarray(np.full((30, 50, 3), 99, np.uint8)).save(folder / f"{name}.png")
    (folder / f"{name}.json").write_text(json.dumps({"bounds": [0, 0, 2, 1], "crs": crs}))
    feature = {"type": "Feature", "properties": {"label": "building:yes;roof:flat"}, "geometry": {}}
    shapes = [("point", "Point", [0.5, 0.25]), ("line", "LineString", [[0, 0], [3, 0]])]
    for ending, kind, coordinates in shapes:
        feature["geometry"] = {"type": kind, "coordinates": coordinates}
        text = json.dumps({"type": "FeatureCollection", "features": [feature]})
        (folder / f"{name}_{ending}.geojson").write_text(text)


def test_a_folder_of_chips_becomes_a_store(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make_chip(tmp_path / "chips" / name, name)
    result = build_graph(chips=tmp_path / "chips", output=tmp_path / "chips.h5", settings=SETTINGS)
    store = TileStore.open(tmp_path / "chips.h5")
    assert (store.names, store.crs, store.gsd_m) == (["a", "b"], "EPSG:4326", None)
    assert store.tags == ["building:yes", "roof:flat"]
    # Chips over the same ground keep their own objects.
    assert (result.numbers["points"], result.numbers["lines"]) == (2, 2)
    nodes = store.graphs([0]).nodes
    np.testing.assert_allclose(nodes["point"].key_points, [[[0.25, 0.75]]])
    np.testing.assert_allclose(nodes["line"].key_points[0], [[0.5, 1], [0, 1], [1, 1]])
    assert (store.images([0, 1]) == 99).all()
    assert build_graph(chips=tmp_path / "chips", output=tmp_path / "chips.h5", settings=SETTINGS).status == "skipped"
    make_chip(tmp_path / "chips" / "c", "c", crs="EPSG:32629")
    with pytest.raises(UsageError, match="needs one CRS"):
        build_graph(chips=tmp_path / "chips", output=tmp_path / "chips.h5", settings=SETTINGS)


def test_published_chips_and_ready_graphs_are_imported(tmp_path: Path, shared: Path) -> None:
    chips = build_graph(chips=shared / "data" / "geolink_chips", output=tmp_path / "a.h5")
    assert {k: chips.numbers[k] for k in ("tiles", "points", "lines", "polygons")} == {
        "tiles": 3, "points": 1, "lines": 16, "polygons": 30,
    }  # fmt: skip
    build_graph(chips=shared / "data" / "geolink_ufz", output=tmp_path / "b.h5")
    store = TileStore.open(tmp_path / "b.h5")
    with np.load(shared / "data" / "geolink_ufz" / f"{store.names[0]}.npz") as arrays:
        graph = store.graphs([0])
        x = arrays["x__line"]
        np.testing.assert_array_equal(graph.nodes["line"].vectors, x[:, :512])
        np.testing.assert_array_equal(graph.nodes["line"].key_points.reshape(len(x), 6), x[:, 512:])
        edges = graph.edges["line", "polygon"]
        np.testing.assert_array_equal(edges.index, arrays["edge_index__line__polygon"])
        np.testing.assert_array_equal(edges.relation, arrays["edge_attr__line__polygon"].argmax(1))
