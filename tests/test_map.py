"""map: from a checkpoint and a city's files to a georeferenced map with everything beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pystac
import pytest
import rasterio
from labelled_town import CRS, write_encoder
from mapped_city import SIZE, building_task, density_task, write_city, write_head

from rsosm_cli.errors import DiskError, FormatError, MissingError, UsageError
from rsosm_cli.inference.windows import WindowPlan
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.products.parts import MapParts
from rsosm_cli.settings import MapSettings
from rsosm_cli.workspace import Manifest

NAME = "Little Town"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a city, and heads of three modalities beside it."""
    root = tmp_path_factory.mktemp("root")
    write_city(root)
    for modality in ("image", "osm", "fused"):
        write_head(root / modality, building_task(modality=modality))
    write_head(root / "density", density_task())
    return root


@pytest.fixture
def root(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "root"))


def run(root: Path, head: str = "fused", task: str = "building", **changes):
    arguments = {"root": root, "checkpoint": root / head, "device": "cpu", "offline": True}
    return map_city(task, NAME, **{**arguments, **changes})


def folder_of(root: Path) -> Path:
    return root / "cities" / "little-town"


def read(path: str | Path) -> np.ndarray:
    with rasterio.open(path) as raster:
        return raster.read()


@pytest.mark.parametrize("head", ["image", "osm", "fused"])
def test_a_map_lies_where_the_city_is_and_keeps_to_it(root: Path, head: str):
    result = run(root, head)
    assert result.status == "done"
    with rasterio.open(result.paths["map"]) as raster:
        classes = raster.read(1)
        assert raster.crs.to_string() == CRS
        assert raster.res == (1.0, 1.0)
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        row, col = raster.index(499_200 + SIZE / 2, 3_056_000 - SIZE / 2)
        assert raster.tags()["RSOSM_CHECKPOINT"] == head
        assert "© OpenStreetMap contributors" in raster.tags()["TIFFTAG_COPYRIGHT"]
    y, x = np.mgrid[: classes.shape[0], : classes.shape[1]]
    away = np.hypot(y - row, x - col)
    assert (classes[away > SIZE * 0.48 + 2] == 255).all()
    inside = away < SIZE * 0.48 - 2
    top, left = row - SIZE // 2 + 60, col - SIZE // 2 + 60
    hole = (slice(top, top + 30), slice(left, left + 30))
    if head == "osm":  # what the image lacks does not matter
        assert (classes[inside] != 255).all()
    else:
        assert (classes[hole][2:-2, 2:-2] == 255).all()
        inside[hole] = False
        assert (classes[inside] != 255).mean() > 0.999
    assert not (folder_of(root) / "maps" / ".building.parts").exists()


def test_everything_lies_beside_the_map_and_agrees_with_it(root: Path):
    result = run(root, settings=MapSettings(probability=True, uncertainty=True, simplify_px=0))
    kinds = {
        "map",
        "polygons",
        "statistics",
        "preview",
        "page",
        "style",
        "stac",
        "probability",
        "uncertainty",
        "config",
    }
    assert kinds <= set(result.paths)
    classes = read(result.paths["map"])[0]
    probability, uncertainty = read(result.paths["probability"]), read(result.paths["uncertainty"])[0]
    known = classes != 255
    assert ((probability != 255).all(0) == known).all()
    assert (np.argmax(probability, 0) == classes)[known].mean() > 0.98  # ties of a step of 1/250
    p = probability[:, known] / probability[:, known].sum(0)
    entropy = -(p * np.log(np.maximum(p, 1e-9))).sum(0) / np.log(2)
    assert np.abs(entropy * 250 - uncertainty[known]).max() < 6
    statistics = json.loads(Path(result.paths["statistics"]).read_text(encoding="utf-8"))
    assert [row["area_m2"] for row in statistics["classes"]] == [(classes == k).sum() for k in range(2)]
    assert statistics["buildings"] > 15
    polygons = geopandas.read_file(result.paths["polygons"])
    assert set(polygons["class"]) <= {"building"}  # the background has none
    assert polygons["area_m2"].sum() == pytest.approx((classes == 1).sum())
    assert polygons["confidence"].between(0.5, 1).all()
    item = pystac.Item.from_file(result.paths["stac"])
    assert item.assets["map"].href.endswith("building.tif")
    assert item.properties["rsosm:checkpoint"] == "fused"
    sources = json.loads(Path(result.paths["statistics"]).read_text(encoding="utf-8"))["sources"]
    assert [s["name"] for s in sources] == ["OpenStreetMap", "Test imagery"]


def test_a_second_run_is_skipped_and_other_settings_are_not(root: Path):
    first = run(root)
    again = run(root, settings=MapSettings(batch_size=3))
    assert (first.status, again.status) == ("done", "skipped")
    assert again.paths == first.paths
    assert run(root, settings=MapSettings(overlap=0.25)).status == "done"
    assert run(root, settings=MapSettings(overlap=0.25), force=True).status == "done"


def test_the_same_inputs_give_the_same_bytes(root: Path, tmp_path: Path):
    paths = [run(root, output=tmp_path / name, settings=MapSettings(batch_size=5)).paths for name in ("a", "b")]
    for kind in set(paths[0]) - {"config"}:
        assert Path(paths[0][kind]).read_bytes() == Path(paths[1][kind]).read_bytes(), kind


def test_turns_and_mirrorings_are_averaged(root: Path, tmp_path: Path):
    plain = run(root, output=tmp_path / "plain", settings=MapSettings(probability=True))
    turned = run(root, output=tmp_path / "tta", settings=MapSettings(probability=True, tta=True))
    a, b = read(plain.paths["probability"]), read(turned.paths["probability"])
    assert ((a == 255) == (b == 255)).all()
    assert 0 < np.abs(a.astype(int) - b)[a != 255].mean() < 40


def test_a_value_is_a_raster_whose_sum_is_the_total(root: Path):
    result = run(root, "density", "density")
    with rasterio.open(result.paths["map"]) as raster:
        values = raster.read(1)
        assert raster.dtypes == ("float32",)
        assert raster.res == (16.0, 16.0)
        assert np.isnan(raster.nodata)
        assert raster.units == ("people a cell",)
    statistics = json.loads(Path(result.paths["statistics"]).read_text(encoding="utf-8"))
    assert statistics["total"] == pytest.approx(np.nansum(values))
    assert np.isnan(values).any()
    assert np.isfinite(values).sum() > 60


def test_dry_run_tells_the_windows_and_writes_nothing(root: Path):
    result = run(root, dry_run=True)
    assert result.status == "planned"
    assert 60 < result.numbers["windows"] < 140
    assert not (folder_of(root) / "maps").exists()


def test_files_stand_in_for_a_city(root: Path, tmp_path: Path):
    city = folder_of(root)
    result = map_city(
        "building", root=tmp_path / "elsewhere", checkpoint=root / "fused", imagery=city / "imagery.tif",
        osm=city / "osm.parquet", place=city / "place.geojson", output=tmp_path / "out", device="cpu", offline=True,
    )  # fmt: skip
    assert result.status == "done"
    assert Path(result.paths["map"]).parent == tmp_path / "out"
    own = read(run(root).paths["map"])
    np.testing.assert_array_equal(read(result.paths["map"]), own)
    without_place = map_city(
        "building", root=tmp_path / "elsewhere", checkpoint=root / "image", imagery=city / "imagery.tif",
        output=tmp_path / "box", device="cpu", offline=True,
    )  # fmt: skip
    assert without_place.numbers["mapped_km2"] > 0.02


def test_killed_half_way_it_goes_on_where_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = read(run(root, "image", output=tmp_path / "whole").paths["map"])
    # Strips of 32 rows, so that the small city has several; the process dies before it keeps the third.
    code = f"""
import os, signal
from pathlib import Path
from rsosm_cli.inference.windows import WindowPlan
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.products.parts import MapParts
WindowPlan.of.__func__.__kwdefaults__["strip_px"] = 32
write = MapParts.write
def dying(self, strip, layers):
    if strip.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, strip, layers)
MapParts.write = dying
root = Path({str(root)!r})
map_city("building", {NAME!r}, root=root, checkpoint=root / "image", device="cpu", offline=True)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder_of(root) / "maps" / "building.tif").exists()
    monkeypatch.setitem(WindowPlan.of.__func__.__kwdefaults__, "strip_px", 32)
    written, write = [], MapParts.write
    monkeypatch.setattr(
        MapParts, "write", lambda self, strip, of: (written.append(strip.index), write(self, strip, of))
    )
    assert run(root, "image").status == "done"
    assert written[0] == 2
    np.testing.assert_array_equal(read(folder_of(root) / "maps" / "building.tif"), whole)


def finished_run(root: Path, head: str, task: str, finished: str) -> None:
    folder = root / "runs" / f"{task}-{finished[-3:-1]}"
    shutil.copytree(root / head, folder / "checkpoints" / "best")
    Manifest(folder / "manifest.json").update(kind="finetune", task=task, key="k", finished=finished, fits="map")


def test_the_newest_run_that_fits_is_taken_and_named(root: Path):
    with pytest.raises(MissingError, match="rsosm finetune building"):
        run(root, checkpoint=None)
    finished_run(root, "image", "building", "2026-01-01T00:00:01Z")
    finished_run(root, "fused", "building", "2026-01-01T00:00:02Z")
    finished_run(root, "density", "density", "2026-01-01T00:00:03Z")
    result = run(root, checkpoint=None, dry_run=True)
    assert "building-02" in result.notes[0]


def test_what_does_not_fit_is_refused_in_a_sentence(root: Path, tmp_path: Path):
    write_encoder(root / "encoder")
    with pytest.raises(FormatError, match=r"pretraining checkpoint.*finetune building"):
        run(root, "encoder")
    with pytest.raises(UsageError, match="task density, not building"):
        run(root, "density")
    with pytest.raises(MissingError, match="fetch --city"):
        map_city("building", "Nowhere", root=root, checkpoint=root / "fused")
    grey = tmp_path / "grey.tif"
    with rasterio.open(folder_of(root) / "imagery.tif") as raster:
        profile = raster.profile | {"count": 1}
        with rasterio.open(grey, "w", **profile) as target:
            target.write(raster.read(1), 1)
    with pytest.raises(UsageError, match=r"bands 1, 2, 3, and grey\.tif has 1"):
        run(root, imagery=grey)
    (folder_of(root) / "imagery.tif").unlink()
    with pytest.raises(MissingError, match="no imagery of Little Town"):
        run(root)
    assert run(root, "osm").status == "done"  # the objects are enough for it
    (folder_of(root) / "osm.parquet").unlink()
    with pytest.raises(MissingError, match="no OSM elements"):
        run(root, "osm", force=True)


def test_a_full_disk_is_told_before_the_work_begins(root: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskError, match="free"):
        run(root)


def test_windows_without_objects_and_elements_without_tags_are_mapped(tmp_path: Path):
    root = tmp_path / "root"
    write_city(root, hole=False, size=120)
    from element_tables import write_elements

    from rsosm_cli.osm.elements import read_elements

    path = root / "cities" / "little-town" / "osm.parquet"
    elements = read_elements(path)
    from dataclasses import replace

    few = slice(0, 3)
    write_elements(path, replace(
        elements, osm_type=elements.osm_type[few], osm_id=elements.osm_id[few], kind=elements.kind[few],
        tags=[{"note": "x"}, *elements.tags[1:3]], geometry=elements.geometry[few],
    ))  # fmt: skip
    write_head(root / "fused", building_task(modality="fused"))
    started = time.monotonic()
    result = run(root)
    assert result.seconds <= time.monotonic() - started + 1
    statistics = json.loads(Path(result.paths["statistics"]).read_text(encoding="utf-8"))
    assert statistics["mapped_m2"] == pytest.approx(np.pi * (120 * 0.48) ** 2, rel=0.02)
