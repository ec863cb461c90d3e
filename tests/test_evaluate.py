"""evaluate: a map against polygons, rasters and points; samples; training ground left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from command_line import call
from labelled_town import SMALL, building_task
from shapely.geometry import Point, box

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.models.checkpoint import Description, save_checkpoint
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.pipeline.evaluate import evaluate
from rsosm_cli.settings import TaskSettings
from rsosm_cli.workspace import Manifest

CRS = "EPSG:32645"
X0, Y0, GSD = 500_000.0, 3_056_000.0, 2.0
SIZE = 1000  # pixels, 2 km: sixteen blocks of 500 m


def write_map(path: Path, values: np.ndarray, crs: str = CRS, gsd: float = GSD, **tags: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=values.shape[1], height=values.shape[0], count=1, dtype=values.dtype, crs=crs,
        transform=Affine(gsd, 0, X0, 0, -gsd, Y0), nodata=255 if values.dtype == np.uint8 else np.nan,
    ) as target:  # fmt: skip
        target.write(values, 1)
        target.update_tags(**tags)
    return path


@pytest.fixture
def city(tmp_path: Path) -> Path:
    """A map whose western half is building; the eastern edge has no data."""
    values = np.zeros((SIZE, SIZE), np.uint8)
    values[:, : SIZE // 2] = 1
    values[:, -10:] = 255
    write_map(tmp_path / "cities" / "x" / "maps" / "building.tif", values)
    return tmp_path


def labels_of(path: Path, shapes: list, **columns: list) -> Path:
    geopandas.GeoDataFrame(columns or {"n": range(len(shapes))}, geometry=shapes, crs=CRS).to_file(path)
    return path


def run(root: Path, **changes: object):
    return evaluate(**{"task": "building", "city": "x", "root": root, **changes})


def test_polygons_by_hand(city: Path):
    # Labels: 1 km2 in the north west is building, of which the map knows all; a strip of 0.1 km2 it does not.
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 1000, X0 + 1000, Y0), box(X0 + 1000, Y0 - 1000, X0 + 1100, Y0)])
    extent = city / "extent.gpkg"
    geopandas.GeoDataFrame(geometry=[box(X0, Y0 - 1000, X0 + 2000, Y0)], crs=CRS).to_file(extent)
    result = run(city, labels=[truth], labels_extent=extent)
    assert result.numbers["iou/building"] == pytest.approx(1.0 / 1.1, abs=1e-3)
    assert result.numbers["precision/building"] == 1
    assert result.numbers["pixels"] == 500 * 990
    assert result.numbers["miou_low"] <= result.numbers["miou"] <= result.numbers["miou_high"]
    matrix = Path(result.paths["matrix"]).read_text().splitlines()
    assert matrix == ["map,other,building", "other,220000,25000", "building,0,250000"]
    assert json.loads(Path(result.paths["accuracy"]).read_text())["numbers"] == result.numbers


def test_a_sample_is_drawn_filled_in_and_assessed(city: Path):
    drawn = run(city, sample=200)
    path = Path(drawn.paths["sample"])
    points = geopandas.read_file(path)
    assert points["stratum"].value_counts().tolist() == [101, 99]
    assert not points.geometry.duplicated().any()
    assert points["class"].isna().all()
    assert run(city, sample=200).status == "skipped"  # what may have been filled in is not overwritten
    with pytest.raises(MissingError, match=r"has a class\..*Fill in the column `class`"):
        run(city, labels=[path])
    # The truth: 300 m of the map's "other" beside the border are buildings, too.
    x = points.to_crs(CRS).geometry.x
    points["class"] = np.where(x < X0 + 1300, "building", "other")
    points.to_file(path)
    found = run(city, labels=[path]).numbers
    whole = (SIZE - 10) * SIZE * GSD**2
    assert found["area_m2/building"] == pytest.approx(1300 * 2000, abs=found["area_m2/building_margin"])
    assert found["area_m2/building"] + found["area_m2/other"] == pytest.approx(whole, abs=2)
    assert found["users/building"] == 1
    assert found["producers/building"] == pytest.approx(1000 / 1300, abs=found["producers/building_margin"])
    assert found["overall_accuracy"] == pytest.approx(1 - 300 / 1980, abs=found["overall_accuracy_margin"])


def trained_on(root: Path, boxes: list[list[float]], name: str = "c") -> Path:
    torch.manual_seed(0)
    task = building_task(decoder="linear")
    ground = [{"city": "x", "crs": CRS, "part": "train", "boxes_m": boxes}]
    description = Description(
        model=SMALL, text={"encoder": "minilm", "width": 8, "identity": {}}, tile=32, gsd=1.0, mean=(0.5,) * 3,
        std=(0.2,) * 3, task=task, provenance={"split": {"ground": ground}},
    )  # fmt: skip
    save_checkpoint(root / name, TaskModel(GeoLink(SMALL, 8), task), description)
    return root / name


def test_training_ground_is_left_out_and_said(city: Path):
    checkpoint = trained_on(city, [[X0, Y0 - 2000, X0 + 600, Y0]])
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 2000, X0 + 1000, Y0)])
    assert run(city, labels=[truth]).numbers["pixels"] == 500 * 1000
    held = run(city, labels=[truth], checkpoint=checkpoint)
    assert held.numbers["pixels"] == 200 * 1000
    assert any("1.20 km2" in note for note in held.notes)
    assert run(city, labels=[truth], checkpoint=checkpoint, held_out=False).numbers["pixels"] == 500 * 1000
    inside = labels_of(city / "i.gpkg", [box(X0, Y0 - 2000, X0 + 500, Y0)])
    with pytest.raises(UsageError, match="trained on"):
        run(city, labels=[inside], checkpoint=checkpoint)


def test_the_training_ground_is_that_of_the_run_that_made_the_map(city: Path):
    for name, width, when in (("older", 600, "2026-01-01"), ("newer", 0.1, "2026-02-01")):
        trained_on(city, [[X0, Y0 - 2000, X0 + width, Y0]], f"runs/{name}/checkpoints/best")
        facts = {"kind": "finetune", "task": "building", "finished": f"{when}T00:00:00Z"}
        Manifest(city / "runs" / name / "manifest.json").update(**facts)
    with rasterio.open(city / "cities" / "x" / "maps" / "building.tif", "r+") as raster:
        raster.update_tags(RSOSM_CHECKPOINT="older")
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 2000, X0 + 1000, Y0)])
    found = run(city, labels=[truth])
    assert found.numbers["pixels"] == 200 * 1000
    assert found.notes[0] == "The training ground is that of older, which the map was made with."
    shutil.rmtree(city / "runs" / "older")
    gone = run(city, labels=[truth])
    assert gone.numbers["pixels"] > 490 * 1000
    assert "made with older, which is not under" in gone.notes[0]
    assert "that of newer, the newest run" in gone.notes[0]


def test_a_map_made_elsewhere_has_the_labels_values(city: Path):
    classes = [{"name": "water", "colour": "#0000ff", "value": 40}, {"name": "green", "colour": "#00ff00", "value": 7}]
    task = TaskSettings.model_validate({"name": "own", "classes": classes})
    values = np.broadcast_to(np.where(np.arange(SIZE) < 500, 40, 7).astype(np.uint8), (SIZE, SIZE)).copy()
    path = write_map(city / "other.tif", values)
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 2000, X0 + 2000, Y0)], **{"class": ["water"]})
    result = evaluate(task, map=path, labels=[truth], root=city)
    assert result.numbers["recall/water"] == pytest.approx(0.5)
    with pytest.raises(UsageError, match="does not know: 40"):
        run(city, map=path, labels=[labels_of(city / "u.gpkg", [box(X0, Y0 - 99, X0 + 99, Y0)])])


def test_regression_zones(city: Path):
    task = TaskSettings(name="pop", kind="regression", aggregate="sum", attribute="n", loss="mse")
    values = np.full((20, 20), 2.0, np.float32)
    values[:, 10:] = 3.0
    path = write_map(city / "pop.tif", values, gsd=100.0)
    zones = [box(X0 + 500 * i, Y0 - 1000, X0 + 500 * (i + 1), Y0) for i in range(4)]
    truth = labels_of(city / "z.gpkg", zones, n=[100.0, 100.0, 150.0, 170.0])
    found = evaluate(task, map=path, labels=[truth], root=city).numbers
    assert found["zones"] == 4
    assert found["mae"] == pytest.approx(5)
    assert found["rmse"] == pytest.approx(10)


def test_points_of_a_class_that_is_not_sampled(city: Path):
    points = [Point(X0 + 100, Y0 - 100 - i) for i in range(5)]
    path = labels_of(city / "p.gpkg", points, **{"class": ["building"] * 5})
    with pytest.raises(UsageError, match="map class other"):
        run(city, labels=[path])


def test_what_does_not_fit_is_said(city: Path):
    far = labels_of(city / "far.gpkg", [box(X0 + 9e4, Y0, X0 + 9e4 + 9, Y0 + 9)])
    with pytest.raises(MissingError, match="do not overlap the map"):
        run(city, labels=[far])
    with pytest.raises(MissingError, match="There is nothing of x under"):
        run(city, task="uv", sample=10)
    with pytest.raises(UsageError, match="nothing to evaluate against"):
        run(city)
    lonlat = write_map(city / "lonlat.tif", np.zeros((4, 4), np.uint8), crs="EPSG:4326", gsd=1e-9)
    with pytest.raises(FormatError, match="no projected CRS"):
        run(city, map=lonlat, labels=[far])


def test_polygons_give_accuracy_adjusted_for_the_areas_mapped(city: Path):
    # In the labelled north the map misses a tenth of "other", and the south has as much of each class unlabelled.
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 1000, X0 + 1100, Y0)])
    extent = city / "extent.gpkg"
    geopandas.GeoDataFrame(geometry=[box(X0, Y0 - 1000, X0 + 2000, Y0)], crs=CRS).to_file(extent)
    result = run(city, labels=[truth], labels_extent=extent)
    found = result.numbers
    missed = 50 / 490  # columns of the map's "other" that are building
    assert found["users/building"] == 1
    assert found["users/other"] == pytest.approx(1 - missed, abs=1e-3)
    assert found["area_m2/building"] == pytest.approx(1000 * 2000 + missed * 980 * 2000, rel=1e-3)
    assert found["mapped_m2/building"] == 1000 * 2000
    assert found["producers/building"] == pytest.approx(1000 / (1000 + missed * 980), abs=1e-3)
    assert 0 < found["area_m2/building_margin"] < 400_000
    assert "user's accuracy" in Path(result.paths["report"]).read_text().replace("&#x27;", "'")
    assert any("too few for the intervals" in note for note in result.notes)  # eight blocks


def test_ways_of_assessing_keep_their_own_files(city: Path):
    checkpoint = trained_on(city, [[X0, Y0 - 2000, X0 + 600, Y0]])
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 2000, X0 + 1000, Y0)])
    points = [Point(X0 + 700 + 80 * i, Y0 - 100 - 7 * i) for i in range(15)]
    sample = labels_of(city / "p.gpkg", points, **{"class": ["building"] * 15})
    ways = [
        run(city, labels=[truth], checkpoint=checkpoint), run(city, labels=[truth], checkpoint=checkpoint,
        held_out=False), run(city, labels=[sample], checkpoint=checkpoint),
    ]  # fmt: skip
    files = [Path(r.paths["accuracy"]).name for r in ways]
    assert files == ["building.accuracy.json", "building.accuracy-all-ground.json", "building.accuracy-points.json"]
    for r in ways:
        assert json.loads(Path(r.paths["accuracy"]).read_text())["numbers"] == r.numbers
    assert any("building (4), other (11)" in note or "other (11)" in note for note in ways[2].notes)
    assert not any("convex hull" in note for note in ways[2].notes)


def test_cities_are_pooled_by_stratum(city: Path):
    from rsosm_cli.pipeline.evaluate_pool import pool, read_regions

    # A second city, half the size, of which the map's "building" is half wrong.
    values = np.zeros((SIZE // 2, SIZE), np.uint8)
    values[:, : SIZE // 2] = 1
    write_map(city / "cities" / "y" / "maps" / "building.tif", values)
    results = []
    for name, wrong, height in (("x", 0, 2000), ("y", 10, 1000)):
        shapes = [Point(X0 + 20 + 40 * i, Y0 - 10 - height / 100 * i) for i in range(20)]
        shapes += [Point(X0 + 1020 + 40 * i, Y0 - 10 - height / 100 * i) for i in range(20)]
        classes = ["other"] * wrong + ["building"] * (20 - wrong) + ["other"] * 20
        path = labels_of(city / f"{name}.gpkg", shapes, **{"class": classes})
        results.append(run(city, city=name, labels=[path]))
    pooled = pool("building", results, root=city)
    found = pooled.numbers
    assert found["users/building"] == pytest.approx((2.0 + 0.5) / 3.0, abs=1e-3)  # weighted by the areas mapped
    assert found["users/building_margin"] == pytest.approx(1.96 * np.sqrt((1 / 3) ** 2 * 0.25 / 19), abs=1e-3)
    assert found["area_m2/building"] == pytest.approx(2.5e6)
    assert found["producers/building"] == 1
    strata = Path(pooled.paths["strata"]).read_text().splitlines()
    assert strata[0] == "region,map class,points,right,mapped_m2"
    assert "y,building,20,10,1000000" in strata
    pixels = run(city, labels=[labels_of(city / "b.gpkg", [box(X0, Y0 - 99, X0 + 99, Y0)])])
    apart = pool("building", [pixels], root=city)
    assert (apart.status, apart.exit_status) == ("skipped", 0)
    assert "none of them was assessed by points" in apart.notes[0]
    (city / "regions.csv").write_text("city,region\nx,south\ny,south\n")
    joined = pool("building", results, root=city, regions=read_regions(city / "regions.csv"))
    assert joined.numbers["regions"] == 1
    assert joined.numbers["users/building"] == pytest.approx(30 / 40)
    (city / "regions.csv").write_text("city,region\nx,south\n")
    partly = pool("building", results, root=city, regions=read_regions(city / "regions.csv"))
    assert any(note.endswith("each a region of its own: y.") for note in partly.notes)


def test_cities_assessed_by_polygons_are_not_pooled(city: Path, monkeypatch: pytest.MonkeyPatch):
    write_map(city / "cities" / "y" / "maps" / "building.tif", np.ones((SIZE // 2, SIZE), np.uint8))
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 99, X0 + 99, Y0)])
    cities = ["--city", "x", "--city", "y"]
    words = ["--json", "--root", str(city), "evaluate", "building", *cities, "--labels", str(truth)]
    status, out, _ = call(*words)
    results = [json.loads(line) for line in out.splitlines()]
    assert (status, [r["status"] for r in results]) == (0, ["done", "done", "skipped"])

    def fails(*args: object, **options: object):
        raise PermissionError(13, "Permission denied", "accuracy.json")

    monkeypatch.setattr("rsosm_cli.pipeline.evaluate_pool.pool", fails)
    status, out, _ = call(*words)
    results = [json.loads(line) for line in out.splitlines()]
    assert (status, [r["status"] for r in results]) == (3, ["done", "done", "failed"])


def test_one_map_is_of_one_city(city: Path):
    words = ["--root", str(city), "evaluate", "building", "--city", "x", "--city", "y", "--map", str(city / "m.tif")]
    status, _, err = call(*words)
    assert status == 2
    assert "is one map, and several cities are named" in err


def test_polygons_made_elsewhere_are_assessed_and_summarised(city: Path):
    villages = labels_of(
        city / "villages.gpkg", [box(X0, Y0 - 500, X0 + 1000, Y0), box(X0, Y0 - 2000, X0 + 9, Y0 - 1990)]
    )
    assert run(city, city=None, map=villages, dry_run=True).status == "planned"
    assert run(city, city=None, map=villages).paths["statistics"].startswith(str(city / "evaluated" / "building"))
    assert not list(city.glob("villages.*.tif"))
    empty = city / "empty.gpkg"
    geopandas.read_file(villages).iloc[:0].to_file(empty)
    with pytest.raises(MissingError, match=r"empty\.gpkg holds no polygons"):
        run(city, city=None, map=empty)
    summary = run(city, city=None, map=villages, output=city / "out")
    assert summary.numbers["building_km2"] == pytest.approx(0.5, rel=1e-3)
    assert summary.numbers["building_share"] == pytest.approx(0.25, rel=1e-2)
    assert json.loads(Path(summary.paths["statistics"]).read_text())["classes"][1]["name"] == "building"
    truth = labels_of(city / "t.gpkg", [box(X0, Y0 - 400, X0 + 1000, Y0)])
    extent = city / "extent.gpkg"
    geopandas.GeoDataFrame(geometry=[box(X0, Y0 - 1000, X0 + 1000, Y0)], crs=CRS).to_file(extent)
    found = run(city, city=None, map=villages, output=city / "out", labels=[truth], labels_extent=extent).numbers
    assert found["users/building"] == pytest.approx(0.8, abs=0.01)
    assert found["iou/building"] == pytest.approx(0.8, abs=0.01)
    # A raster with values of its own is translated first.
    classes = [{"name": "water", "colour": "#0000ff", "value": 40}, {"name": "green", "colour": "#00ff00", "value": 7}]
    task = TaskSettings.model_validate({"name": "own", "classes": classes})
    path = write_map(city / "other.tif", np.full((100, 100), 7, np.uint8))
    assert evaluate(task, map=path, root=city).numbers["green_share"] == 1
