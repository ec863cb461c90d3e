"""map over many cities: past a failing one, gathered, only what is missing; and one city over two processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from command_line import call
from labelled_town import CRS
from mapped_city import building_task, write_city, write_head

from rsosm_cli.errors import UsageError
from rsosm_cli.osm.elements import Elements
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.products.collection import write_vrt
from rsosm_cli.products.districts import district_statistics, find_districts, read_areas


def run(root: Path, *more: str) -> tuple[int, list[dict]]:
    arguments = ["--json", "--root", str(root), "map", "building", "--checkpoint", str(root / "head"), "--offline"]
    status, out, _ = call(*arguments, "--device", "cpu", *more)
    return status, [json.loads(line) for line in out.splitlines()]


def test_many_cities(tmp_path: Path):
    write_city(tmp_path, "One", size=96)
    write_city(tmp_path, "Two", size=128)
    write_head(tmp_path / "head", building_task(modality="image"))
    (tmp_path / "list.txt").write_text("One\nNowhere\nTwo\n")
    status, results = run(tmp_path, "--cities", str(tmp_path / "list.txt"))
    assert status == 3
    assert [r["status"] for r in results] == ["done", "failed", "done", "done"]
    folder = tmp_path / "maps" / "building"
    with open(folder / "cities.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["city"] for r in rows] == ["One", "Nowhere", "Two"]
    assert "fetch" in rows[1]["error"]
    areas = [float(r["building km2"]) + float(r["other km2"]) for r in rows if r["map"]]
    assert areas == pytest.approx([float(r["mapped_km2"]) for r in rows if r["map"]])
    assert results[3]["numbers"]["mapped_km2"] == pytest.approx(sum(areas), abs=1e-4)
    with rasterio.open(folder / "building.vrt") as mosaic:
        both = mosaic.read(1)
        assert mosaic.colormap(1)[1][:3] == (0xC0, 0x39, 0x2B)
    with rasterio.open(results[2]["paths"]["map"]) as raster:
        larger = raster.read(1)
    assert (both != 255).sum() >= (larger != 255).sum() > 0
    collection = pystac.Collection.from_file(str(folder / "collection.json"))
    collection.validate()
    assert [item.id for item in collection.get_items()] == ["one-building", "two-building"]
    write_city(tmp_path, "Nowhere", size=96)
    status, results = run(tmp_path, "--cities", str(tmp_path / "list.txt"))
    assert status == 0
    assert [r["status"] for r in results] == ["skipped", "done", "skipped", "done"]
    assert results[3]["numbers"]["cities"] == 3


def test_a_mosaic_over_two_zones(tmp_path: Path):
    files = []
    for zone in (32, 33):
        path = tmp_path / f"c{zone}" / "maps" / "a.tif"
        path.parent.mkdir(parents=True)
        west = 799_000 if zone == 32 else 201_000
        with rasterio.open(
            path, "w", driver="GTiff", width=60, height=50, count=1, dtype="uint8", crs=f"EPSG:326{zone}", nodata=255,
            transform=rasterio.Affine(10, 0, west, 0, -10, 5_500_000),
        ) as target:  # fmt: skip
            target.write(np.full((50, 60), zone - 32, np.uint8), 1)
            target.write_colormap(1, {0: (9, 9, 9), 1: (200, 0, 0)})
        files.append(path)
    write_vrt(tmp_path / "all.vrt", files)
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)  # the mosaic names its sources from where it is
    with rasterio.open(moved / "all.vrt") as mosaic:
        assert mosaic.crs.to_epsg() == 4326
        values = mosaic.read(1)
    assert set(np.unique(values)) == {0, 1, 255}
    assert (values == 0).sum() == pytest.approx((values == 1).sum(), rel=0.05)


@pytest.mark.slow
def test_two_processes_map_one_city(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_city(tmp_path)
    write_head(tmp_path / "head", building_task(modality="fused"))
    common = {"root": tmp_path, "checkpoint": tmp_path / "head", "device": "cpu", "offline": True}
    alone = map_city("building", "Little Town", output=tmp_path / "a", **common)
    both = map_city("building", "Little Town", output=tmp_path / "b", gpus=2, **common)
    for kind in ("map", "polygons", "statistics"):
        assert Path(alone.paths[kind]).read_bytes() == Path(both.paths[kind]).read_bytes(), kind


def test_strips_are_shared_out_by_their_windows():
    from rsosm_cli.geometry import PixelBounds
    from rsosm_cli.inference.windows import Strip
    from rsosm_cli.pipeline.map_job import share_of

    strips = [Strip(i, 0, PixelBounds(0, 0, 1, 1)) for i in range(6)]
    windows = {s.name: n for s, n in zip(strips, [10, 10, 0, 0, 10, 10], strict=True)}
    shares = [[s.index for s in share_of(strips, windows, rank, 2)] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert [sum(windows[f"b000-s{i:05d}"] for i in share) for share in shares] == [20, 20]


def test_a_map_that_waited_for_another_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from contextlib import contextmanager

    from rsosm_cli.pipeline import map as module

    write_city(tmp_path, size=96)
    write_head(tmp_path / "head", building_task(modality="image"))
    common = {"root": tmp_path, "checkpoint": tmp_path / "head", "device": "cpu", "offline": True}

    @contextmanager
    def slow_lock(folder: Path, name: str):
        monkeypatch.undo()
        assert map_city("building", "Little Town", **common).status == "done"  # the other process
        yield

    monkeypatch.setattr(module, "locked", slow_lock)
    assert map_city("building", "Little Town", **common).status == "skipped"


def test_an_unknown_task_names_the_nearest(tmp_path: Path):
    with pytest.raises(UsageError, match="Did you mean building"):
        map_city("buildng", "x", root=tmp_path)


def areas_of(levels: list[int], shapes: list) -> Elements:
    tags = [
        {"boundary": "administrative", "admin_level": str(level), "name": f"{'NESW'[i % 4]}{level}"}
        for i, level in enumerate(levels)
    ]
    n = len(shapes)
    return Elements(
        CRS, np.full(n, 2, np.uint8), np.arange(n), np.full(n, 2, np.uint8), tags, np.array(shapes, dtype=object)
    )


def test_districts_are_of_the_next_level_and_have_their_numbers(tmp_path: Path):
    place = shapely.box(0, 0, 200, 100)
    west, east = shapely.box(0, 0, 100, 100), shapely.box(100, 0, 200, 100)
    neighbour = shapely.box(190, 0, 400, 100)
    elements = areas_of([8, 9, 9, 9, 10], [place, east, west, neighbour, shapely.box(0, 0, 9, 9)])
    found = find_districts(elements, place, 8)
    assert found is not None
    assert (found.level, found.names) == (9, ("E9", "S9"))
    assert find_districts(elements, place, 10) is None
    read = read_areas(lambda bounds: elements, (0.0, 0.0, 9000.0, 100.0))  # in three squares
    assert read is not None
    assert find_districts(read, place, 8).names == found.names
    assert len(read.tags) == 5
    with rasterio.open(
        tmp_path / "m.tif", "w", driver="GTiff", width=200, height=100, count=1, dtype="uint8", crs=CRS, nodata=255,
        transform=rasterio.Affine(1, 0, 0, 0, -1, 100),
    ) as target:  # fmt: skip
        values = np.zeros((100, 200), np.uint8)
        values[:, 50:120] = 1
        values[:10] = 255
        target.write(values, 1)
    rows = district_statistics(tmp_path / "m.tif", ["a", "b"], found)
    assert [r["b m2"] for r in rows] == [20 * 90, 50 * 90]
    assert [r["b share"] for r in rows] == pytest.approx([0.2, 0.5])
    assert [r["mapped_m2"] for r in rows] == [9000, 9000]
