"""Tasks of every kind, from labels to a map: a class a tile, shares of classes, change between two dates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from labelled_town import CRS, building_task, write_encoder, write_town
from mapped_city import write_city, write_head
from PIL import Image

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.pipeline.finetune import finetune
from rsosm_cli.pipeline.finetune_plan import label_stamp
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.settings import TaskSettings, load_preset
from rsosm_cli.tiles.folders import read_folder
from rsosm_cli.tiles.label_files import IGNORE
from rsosm_cli.tiles.labels import label_tiles, read_labels
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.training.metrics import distribution_metrics

CLASSES = [{"name": "few", "colour": "#112233"}, {"name": "many", "colour": "#aabbcc"}]
OPTIM = {"lr": 3e-3, "epochs": 2, "warmup_epochs": 0, "batch_size": 16}


def task_of(kind: str, **changes: object) -> TaskSettings:
    values = {"name": "own", "kind": kind, "classes": CLASSES, "decoder": "mlp", "workers": 0, "optim": OPTIM}
    return TaskSettings.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A town, and cells of a tile each with a class, shares of two classes, and the squares in them."""
    folder = tmp_path_factory.mktemp("town")
    store = TileStore.open(write_town(folder))
    write_encoder(folder / "encoder")
    squares = geopandas.read_file(folder / "labels.gpkg").geometry
    cells = shapely.box(*store.bounds_m.T)
    built = np.array([shapely.area(shapely.intersection(squares, cell)).sum() / cell.area for cell in cells])
    frame = geopandas.GeoDataFrame(
        {"class": np.where(built > 0.1, "many", "few"), "few": 1 - built, "many": built}, geometry=cells, crs=CRS
    )
    frame.to_file(folder / "cells.gpkg")
    frame.set_geometry(frame.centroid).to_file(folder / "points.gpkg")
    return folder


def run(town: Path, root: Path, task: TaskSettings, labels: str, **changes: object):
    arguments = {
        "labels": [town / labels], "tiles": [town / "tiles.h5"], "checkpoint": town / "encoder", "root": root,
        "device": "cpu", "offline": True,
    }  # fmt: skip
    return finetune(task, **{**arguments, **changes})


@pytest.mark.parametrize(("labels", "protocol"), [("cells.gpkg", "finetune"), ("points.gpkg", "knn")])
def test_a_class_a_tile(town: Path, tmp_path: Path, labels: str, protocol: str):
    result = run(town, tmp_path, task_of("classification", protocol=protocol), labels)
    assert result.numbers["tiles_test"] > 10
    assert 0.3 < result.numbers["overall_accuracy"] <= 1
    if protocol == "knn":
        return
    report = Path(result.paths["report"]).read_text()
    assert "labels: few; predicted: many" in report or "labels: many; predicted: few" in report
    assert "overall accuracy" in report
    assert "overall_accuracy" not in report


@pytest.mark.parametrize("protocol", ["finetune", "linear", "knn"])
def test_shares_of_the_classes(town: Path, tmp_path: Path, protocol: str):
    result = run(town, tmp_path, task_of("distribution", protocol=protocol), "cells.gpkg")
    assert 0 < result.numbers["l1"] < 2
    assert result.numbers["kl"] >= 0
    assert 0 < result.numbers["cosine"] <= 1
    assert result.numbers["mae/few"] == pytest.approx(result.numbers["l1"] / 2, abs=1e-3)


def test_shares_come_from_columns_or_from_classes(town: Path):
    store = TileStore.open(town / "tiles.h5")
    given = label_tiles(read_labels([town / "cells.gpkg"], task_of("distribution"), CRS), store.bounds_m, store.tile_px)
    frame = geopandas.read_file(town / "cells.gpkg")
    np.testing.assert_allclose(given.truth, frame[["few", "many"]], atol=1e-9)
    frame[["class", "geometry"]].to_file(town / "classes.gpkg")
    counted = label_tiles(
        read_labels([town / "classes.gpkg"], task_of("distribution"), CRS), store.bounds_m, store.tile_px
    )
    np.testing.assert_array_equal(counted.truth.argmax(1), (frame["class"] == "many").astype(int))


def test_metrics_of_shares_by_hand():
    truth, said = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    found = {m.name: m.value for m in distribution_metrics(truth, said, np.array([0, 1]), ["a", "b"])}
    assert found["l1"] == pytest.approx(0.5)
    assert found["kl"] == pytest.approx(np.log(2) / 2)
    assert found["cosine"] == pytest.approx((np.sqrt(0.5) + 1) / 2)
    assert found["mae/a"] == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["classification", "distribution"])
def test_a_map_of_cells(tmp_path: Path, kind: str):
    write_city(tmp_path)
    task = task_of(kind)
    write_head(tmp_path / "head", task)
    result = map_city("own", "Little Town", root=tmp_path, checkpoint=tmp_path / "head", device="cpu", offline=True)
    with rasterio.open(result.paths["map"]) as raster:
        classes = raster.read(1)
        assert raster.res == (16.0, 16.0)
    assert set(np.unique(classes)) <= {0, 1, IGNORE}
    assert (classes != IGNORE).sum() > 50
    statistics = json.loads(Path(result.paths["statistics"]).read_text())
    area = sum(row["area_m2"] for row in statistics["classes"])
    assert area == (classes != IGNORE).sum() * 256
    if kind == "distribution":
        with rasterio.open(result.paths["shares"]) as raster:
            shares = raster.read()
        assert shares.shape[0] == 2
        assert np.abs(shares[:, classes != IGNORE].astype(int).sum(0) - 250).max() <= 1
        assert sum(row["mean_share"] for row in statistics["classes"]) == pytest.approx(1, abs=0.01)


def picture(path: Path, bright: bool, seed: int, size: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    low = 150 if bright else 20
    Image.fromarray(np.random.default_rng(seed).integers(low, low + 60, (size, size, 3), dtype=np.uint8)).save(path)


def test_a_folder_a_class_names_the_classes(tmp_path: Path):
    data = tmp_path / "Scenes" / "Images"
    for i in range(12):
        picture(data / "Beach" / f"b{i}.jpg", True, i)
        picture(data / "Forest" / f"f{i}.jpg", False, i)
    write_encoder(tmp_path / "encoder")
    task = TaskSettings.model_validate(load_preset("tasks", "scene") | {"workers": 0, "optim": OPTIM | {"epochs": 6}})
    arguments = {
        "labels": [tmp_path / "Scenes"], "checkpoint": tmp_path / "encoder", "root": tmp_path, "device": "cpu",
        "offline": True,
    }  # fmt: skip
    result = finetune(task, **arguments)
    assert any("split one by one" in note for note in result.notes)
    learnt = load_checkpoint(Path(result.paths["checkpoint"])).description.task
    assert [c.name for c in learnt.classes] == ["Beach", "Forest"]
    assert result.numbers["overall_accuracy"] > 0.9
    assert [p.suffix for p in (tmp_path / "folders").iterdir() if not p.name.startswith(".")] == [".h5"]
    with pytest.raises(UsageError, match="--modality image"):
        finetune(task.model_copy(update={"modality": "fused"}), **arguments)
    with pytest.raises(UsageError, match="single images"):
        finetune(TaskSettings.model_validate(load_preset("tasks", "change")), **arguments)
    # Parts that the data set names are kept.
    for i in range(12):
        picture(tmp_path / "parted" / ("train" if i < 8 else "test") / "Beach" / f"b{i}.jpg", True, i)
        picture(tmp_path / "parted" / ("train" if i < 8 else "test") / "Forest" / f"f{i}.jpg", False, i)
    parted = finetune(task, **{**arguments, "labels": [tmp_path / "parted"]})
    assert parted.numbers["tiles_test"] == 8


def test_a_changed_image_of_a_class_folder_changes_the_labels(tmp_path: Path):
    for name in ("field", "forest"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    before = label_stamp(tmp_path)
    assert label_stamp(tmp_path) == before
    Image.new("RGB", (9, 9), "white").save(tmp_path / "field" / "0.png")
    assert label_stamp(tmp_path) != before


def test_pairs_of_images_teach_change(tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(16):
        before = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        after, mask = before.copy(), np.zeros((32, 32), np.uint8)
        x, y = rng.integers(0, 16, 2)
        after[y : y + 16, x : x + 16] += 150
        mask[y : y + 16, x : x + 16] = 255
        for name, values in (("A", before), ("B", after), ("label", mask)):
            (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / "pairs" / name / f"{i:02d}.png")
    write_encoder(tmp_path / "encoder")
    task = TaskSettings.model_validate(
        load_preset("tasks", "change")
        | {"workers": 0, "decoder_width": 16, "encoder_lr": 1.0, "optim": OPTIM | {"epochs": 12, "batch_size": 4}}
    )
    given = {"labels": [tmp_path / "pairs"], "checkpoint": tmp_path / "encoder", "root": tmp_path, "device": "cpu"}
    assert finetune(task, dry_run=True, offline=True, **given).status == "planned"
    assert not (tmp_path / "folders").exists()
    result = finetune(task, offline=True, **given)
    assert result.numbers["iou/changed"] > 0.5
    assert finetune(task, dry_run=True, offline=True, **given).status == "skipped"
    assert "the earlier image, the later one" in Path(result.paths["report"]).read_text()


@pytest.fixture
def two_dates(tmp_path: Path) -> Path:
    """A city with imagery of 2019 (dark) and 2023 (its eastern half bright), its tiles, and the change between."""
    from rsosm_cli.pipeline.build_graph import build_graph
    from rsosm_cli.settings import BuildSettings, resolve

    write_city(tmp_path, hole=False, size=224)
    city = tmp_path / "cities" / "little-town"
    with rasterio.open(city / "imagery.tif") as source:
        profile, pixels = source.profile, source.read()
    for year, add in (("2019", 0), ("2023", 150)):
        later = (pixels // 4).copy()
        later[:, :, later.shape[2] // 2 :] += np.uint8(add)
        with rasterio.open(city / f"imagery-{year}.tif", "w", **profile) as target:
            target.write(later)
    build_graph(
        "Little Town",
        root=tmp_path,
        settings=resolve(BuildSettings, options={"grid.tile": 32, "grid.stride": 32, "grid.gsd": 1.0}),
    )
    west, south, east, north = TileStore.open(city / "tiles.h5").bounds_m[:, [0, 1, 2, 3]].T
    box = shapely.box(499_200 + 112, south.min(), east.max(), north.max())
    extent = shapely.box(west.min(), south.min(), east.max(), north.max())
    geopandas.GeoDataFrame(geometry=[box], crs=CRS).to_file(tmp_path / "changes.gpkg")
    geopandas.GeoDataFrame(geometry=[extent], crs=CRS).to_file(tmp_path / "extent.gpkg")
    write_encoder(tmp_path / "encoder")
    return tmp_path


def test_change_between_two_dates_of_a_city(two_dates: Path):
    task = TaskSettings.model_validate(
        load_preset("tasks", "change")
        | {"workers": 0, "decoder_width": 16, "encoder_lr": 1.0, "optim": OPTIM | {"epochs": 8, "batch_size": 4}}
    )
    common = {"root": two_dates, "device": "cpu", "offline": True}
    given = {"labels": [two_dates / "changes.gpkg"], "checkpoint": two_dates / "encoder", **common}
    everywhere = finetune(task, epochs=("2019", "2023"), dry_run=True, **given)
    assert "made first, of Little Town" in everywhere.notes[1]
    assert not list(two_dates.glob("cities/*/tiles-*.h5"))
    tiles = [two_dates / "cities" / "little-town" / "tiles.h5"]
    with pytest.raises(UsageError, match="leave out one of them"):
        finetune(task, epochs=("2019", "2023"), tiles=tiles, **given)
    with pytest.raises(UsageError, match="Name two dates: --from"):
        finetune(task, tiles=tiles, labels_extent=two_dates / "extent.gpkg", **given)
    with pytest.raises(MissingError, match=r"epoch '2018'.*2019, 2023"):
        finetune(task, epochs=("2018", "2023"), **given)
    trained = finetune(
        task, labels=[two_dates / "changes.gpkg"], labels_extent=two_dates / "extent.gpkg", cities=["Little Town"],
        checkpoint=two_dates / "encoder", epochs=("2019", "2023"), **common,
    )  # fmt: skip
    assert trained.numbers["iou/changed"] > 0.6
    with pytest.raises(UsageError, match="none are named"):
        finetune(task, cities=["Little Town"], **given)
    head = {"checkpoint": Path(trained.paths["run"]), **common}
    found = map_city("change", "Little Town", epochs=("2019", "2023"), **head)
    with rasterio.open(found.paths["map"]) as raster:
        classes = raster.read(1)
        east = np.arange(raster.width) * raster.res[0] + raster.transform.c > 499_200 + 112
    known = classes != IGNORE
    assert (classes[:, east][known[:, east]] == 1).mean() > 0.8
    assert (classes[:, ~east][known[:, ~east]] == 0).mean() > 0.8
    same = map_city("change", "Little Town", epochs=("2019", "2019"), output=two_dates / "same", **head)
    assert same.numbers["changed_km2"] < 0.2 * found.numbers["changed_km2"]
    with pytest.raises(MissingError, match=r"epoch '2018'.*2019, 2023"):
        map_city("change", "Little Town", epochs=("2018", ""), **head)
    with pytest.raises(UsageError, match="--from 2019"):
        map_city("change", "Little Town", **head)


def test_chips_with_label_images(shared: Path, tmp_path: Path):
    task = TaskSettings.model_validate(
        load_preset("tasks", "ufz")
        | {"protocol": "scratch", "decoder_width": 16, "workers": 0, "optim": OPTIM | {"epochs": 1, "batch_size": 2}}
    )
    arguments = {
        "labels": [shared / "data" / "geolink_ufz"], "root": tmp_path, "device": "cpu", "offline": True,
    }  # fmt: skip
    result = finetune(task, **arguments)
    assert result.numbers["tiles_train"] + result.numbers["tiles_validation"] + result.numbers["tiles_test"] == 6
    by_city = task.model_copy(
        update={"split": task.split.model_copy(update={"by": "city", "test_cities": ("singapore",), "validation": 0.0})}
    )
    assert finetune(by_city, **arguments).numbers["tiles_test"] == 3
    shutil.rmtree(tmp_path / "runs")


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("")
    with pytest.raises(FormatError, match="one folder a class"):
        read_folder(tmp_path / "x")


def test_probabilities_are_calibrated_on_validation_ground(town: Path, tmp_path: Path):
    result = run(town, tmp_path, building_task(modality="image"), "labels.gpkg")
    description = load_checkpoint(Path(result.paths["checkpoint"])).description
    assert description.temperature == result.numbers["temperature"] != 1
    assert 0 <= result.numbers["calibration_error"] <= 1
    assert "divided by" in Path(result.paths["report"]).read_text()


def test_what_calibration_cannot_do_is_said():
    from rsosm_cli.training.calibration import Calibration

    assert Calibration(1.4, before=0.08, after=0.03).warning == ""
    assert "not calibrated" in Calibration(1.0, before=0.1, after=0.1, found=False).warning
    assert "0.077, before 0.025" in Calibration(9.0, before=0.0245, after=0.0766).warning


def test_a_temperature_makes_confidence_true():
    import torch

    from rsosm_cli.training.calibration import expected_error, fit_temperature

    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=draw)
    truth = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    assert fit_temperature(4 * logits, truth) == pytest.approx(4, rel=0.05)
    assert expected_error(logits, truth) < 0.01 < expected_error(4 * logits, truth)
