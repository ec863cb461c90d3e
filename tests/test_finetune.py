"""finetune: labels and tiles to a checkpoint that loads, with metrics of other ground than it was trained on."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet
import pytest
import shapely
import torch
from labelled_town import CRS, building_task, write_encoder, write_town

from rsosm_cli.errors import FormatError, MissingError, NoFileError, UsageError
from rsosm_cli.models.checkpoint import load_checkpoint, read_description
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.pipeline.finetune import finetune
from rsosm_cli.pipeline.label_origin import warn_of_copies
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.training.task_data import turn_graphs, turn_images


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("town")
    write_town(folder)
    write_encoder(folder / "encoder")
    return folder


def run(town: Path, root: Path, task: TaskSettings | None = None, **changes: object):
    arguments = {
        "labels": [town / "labels.gpkg"], "tiles": [town / "tiles.h5"], "checkpoint": town / "encoder", "root": root,
        "device": "cpu", "offline": True,
    }  # fmt: skip
    return finetune(task or building_task(), **{**arguments, **changes})


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("modality", ["image", "osm", "fused"])
def test_a_run_leaves_a_model_that_loads(town: Path, tmp_path: Path, modality: str):
    result = run(town, tmp_path, building_task(modality=modality), name="first")
    assert result.status == "done"
    loaded = load_checkpoint(tmp_path / "runs" / "first")
    assert isinstance(loaded.model, TaskModel)
    assert loaded.description.task.modality == modality
    assert 0 <= result.numbers["miou"] <= 1
    assert loaded.description.metrics["miou"] == pytest.approx(result.numbers["miou"], abs=1e-4)
    split = loaded.description.provenance["split"]["ground"]
    assert {entry["part"] for entry in split} == {"train", "validation", "test"}
    assert {entry["crs"] for entry in split} == {CRS}
    features = json.loads(Path(result.paths["split"]).read_text())["features"]
    assert {f["properties"]["split"] for f in features} == {"train", "validation", "test"}
    assert "Worst tiles" in Path(result.paths["report"]).read_text()
    found = {(r["part"], r["metric"]) for r in rows(result.paths["metrics"])}
    assert {("train", "loss"), ("validation", "miou"), ("test", "iou/building")} <= found
    again = run(town, tmp_path, building_task(modality=modality), name="first")
    assert again.status == "skipped"
    assert again.numbers["miou"] == result.numbers["miou"]


def test_tiles_larger_than_the_encoder_knows_are_resized_and_reported(town: Path, tmp_path: Path):
    encoder = write_encoder(tmp_path / "encoder", tile=16)
    result = run(town, tmp_path, building_task(modality="image"), checkpoint=encoder)
    assert any("resized from 32 to 16" in note for note in result.notes)
    assert "Worst tiles" in Path(result.paths["report"]).read_text()


def test_training_learns_what_the_image_shows(town: Path, tmp_path: Path):
    task = building_task(
        modality="image", protocol="scratch",
        optim={"lr": 2e-3, "epochs": 25, "warmup_epochs": 1, "batch_size": 8, "betas": [0.9, 0.999]},
    )  # fmt: skip
    result = run(town, tmp_path, task)
    assert result.numbers["iou/building"] > 0.3
    losses = [float(r["value"]) for r in rows(result.paths["metrics"]) if (r["part"], r["metric"]) == ("train", "loss")]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_weights(town: Path, tmp_path: Path):
    first, second = (run(town, tmp_path / str(i), building_task(), name="r") for i in range(2))
    a, b = (load_checkpoint(Path(r.paths["checkpoint"])).model.state_dict() for r in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_interrupted_training_ends_with_the_same_weights(town: Path, tmp_path: Path, monkeypatch):
    from rsosm_cli.training import finetune as training

    whole = run(town, tmp_path / "whole", name="r")
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    end_epoch = training.Trainer._end_epoch

    def interrupt(self, epoch: int, loss: float) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        end_epoch(self, epoch, loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_end_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(town, tmp_path / "cut", name="r")
    resumed = run(town, tmp_path / "cut", name="r")
    assert resumed.numbers == whole.numbers
    a, b = (load_checkpoint(Path(r.paths["checkpoint"])).model.state_dict() for r in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("protocol", ["linear", "frozen"])
def test_a_frozen_encoder_stays_as_it_was(town: Path, tmp_path: Path, protocol: str):
    task = building_task(protocol=protocol, decoder="linear" if protocol == "linear" else "upernet")
    result = run(town, tmp_path, task)
    before = load_checkpoint(town / "encoder").model.state_dict()
    after = load_checkpoint(Path(result.paths["checkpoint"])).encoder.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("modality", ["image", "osm", "fused"])
def test_knn_measures_the_encoding(town: Path, tmp_path: Path, modality: str):
    result = run(town, tmp_path, building_task(protocol="knn", modality=modality))
    assert result.status == "done"
    assert result.numbers["overall_accuracy"] > 0.3
    assert "checkpoint" not in result.paths


def test_compare_and_seeds(town: Path, tmp_path: Path):
    task = building_task(protocol="linear", decoder="linear")
    result = run(town, tmp_path, task, compare=True, seeds=2, label_share=0.5, name="c")
    for modality in ("image", "osm", "fused"):
        assert f"{modality}_miou_mean" in result.numbers
        assert f"{modality}_miou_std" in result.numbers
    splits = [(tmp_path / "runs" / f"c-{m}" / "split.geojson").read_text() for m in ("image", "osm", "fused")]
    assert splits[0] == splits[1] == splits[2]
    assert len(rows(result.paths["metrics"])) == 9


def test_regression(town: Path, tmp_path: Path):
    task = TaskSettings(
        name="height", kind="regression", attribute="height", aggregate="sum", decoder="mlp", loss="mse", workers=0,
        log_target=True, optim={"lr": 1e-3, "epochs": 3, "warmup_epochs": 0, "batch_size": 16, "betas": [0.9, 0.999]},
    )  # fmt: skip
    cells = TileStore.open(town / "tiles.h5").bounds_m
    import geopandas
    import shapely

    labels = tmp_path / "cells.gpkg"
    geopandas.GeoDataFrame(
        {"height": np.arange(len(cells)) % 5 + 1.0}, geometry=shapely.box(*cells.T), crs=CRS
    ).to_file(labels)
    for protocol in ("finetune", "knn"):
        changed = task.model_copy(update={"protocol": protocol})
        result = run(town, tmp_path, changed, labels=[labels])
        assert 0 < result.numbers["rmse"] < 5
    result = run(town, tmp_path, task, labels=[labels])
    loaded = load_checkpoint(Path(result.paths["checkpoint"])).model
    assert loaded.target[0] == pytest.approx(np.log1p(np.arange(5) + 1.0).mean(), abs=0.2)


@pytest.mark.slow
def test_two_processes_train_one_model(town: Path, tmp_path: Path):
    result = run(town, tmp_path, gpus=2)
    assert result.status == "done"
    assert result.numbers["miou"] > 0


def test_dry_run_says_what_would_be_done(town: Path, tmp_path: Path):
    result = run(town, tmp_path, dry_run=True)
    assert result.status == "planned"
    assert result.numbers["tiles_train"] > result.numbers["tiles_validation"]
    assert not (tmp_path / "runs").exists()


def test_what_is_not_there_is_said(town: Path, tmp_path: Path):
    with pytest.raises(MissingError, match="--protocol scratch"):
        run(town, tmp_path, checkpoint=None)
    with pytest.raises(NoFileError, match="no labels"):
        run(town, tmp_path, labels=[tmp_path / "none.gpkg"])
    with pytest.raises(MissingError, match="nothing of Atlantis"):
        run(town, tmp_path, tiles=(), cities=["Atlantis"])
    with pytest.raises(UsageError, match="label share of 0"):
        run(town, tmp_path, label_share=0.0)
    scratch = run(town, tmp_path, building_task(protocol="scratch"), checkpoint=None, dry_run=True)
    assert "geolink-tiny" in scratch.notes[0]


def test_tiles_without_image_need_no_image_for_osm(tmp_path: Path):
    write_town(tmp_path, images=False)
    encoder = write_encoder(tmp_path / "encoder")
    arguments = {
        "labels": [tmp_path / "labels.gpkg"], "tiles": [tmp_path / "tiles.h5"], "checkpoint": encoder,
        "root": tmp_path, "device": "cpu", "offline": True,
    }  # fmt: skip
    with pytest.raises(MissingError, match="--modality osm"):
        finetune(building_task(modality="image"), **arguments)
    assert finetune(building_task(modality="osm"), **arguments).status == "done"


def test_a_run_of_other_settings_is_not_overwritten(town: Path, tmp_path: Path):
    run(town, tmp_path, name="r")
    with pytest.raises(UsageError, match="other settings"):
        run(town, tmp_path, building_task(seed=1), name="r")
    assert run(town, tmp_path, building_task(seed=1), name="r", force=True).status == "done"
    assert read_description(tmp_path / "runs" / "r").task.seed == 1


def test_graph_and_image_turn_alike(town: Path):
    """A key point lies on the same pixel before and after, for all eight turns."""
    store = TileStore.open(town / "tiles.h5")
    graphs = store.graphs(np.flatnonzero(store.n_objects > 0)[:8])
    turns = np.array([[(i >> b) & 1 for b in range(3)] for i in range(8)], bool)
    size = 64
    nodes = graphs.nodes["polygon"]
    tile = np.repeat(np.arange(8), np.diff(nodes.offsets))
    at = np.clip((nodes.centroid * size).astype(int), 0, size - 1)
    centred = replace(nodes, centroid=((at + 0.5) / size).astype(np.float32))
    marks = np.zeros((8, size, size), np.uint8)
    marks[tile, at[:, 1], at[:, 0]] = 1
    turned = turn_graphs(replace(graphs, nodes={**graphs.nodes, "polygon": centred}), turns).nodes["polygon"]
    moved = (turned.centroid * size).astype(int)
    assert (turn_images(torch.from_numpy(marks), turns).numpy()[tile, moved[:, 1], moved[:, 0]] == 1).all()
    whole = turn_graphs(graphs, turns).nodes["polygon"]
    assert np.allclose(whole.centroid, whole.key_points[:, -1])


def test_labels_that_are_copies_of_what_the_model_reads_are_told(town: Path, tmp_path: Path):
    from rsosm_cli.osm.elements import read_elements

    elements = read_elements(town / "osm.parquet")
    copies = geopandas.GeoDataFrame(geometry=elements.geometry, crs=elements.crs).to_crs(CRS)
    copies.to_file(tmp_path / "copies.gpkg")
    for labels, modality, told in (
        (tmp_path / "copies.gpkg", "fused", True),
        (tmp_path / "copies.gpkg", "image", False),
        (town / "labels.gpkg", "fused", False),  # half of them are mapped
    ):
        task = building_task(modality=modality)
        notes = run(town, tmp_path, task, labels=[labels], dry_run=True).notes
        assert any("100% of the polygons of copies.gpkg are elements of OpenStreetMap" in n for n in notes) == told


def test_copies_are_told_beside_labels_that_lie_nowhere_and_a_damaged_table_is_named(town: Path, tmp_path: Path):
    from rsosm_cli.osm.elements import read_elements

    polygons = [g for g in read_elements(town / "osm.parquet").geometry if g.geom_type == "Polygon"][:20]
    far = shapely.box(1e30, 1e30, 2e30, 2e30)  # its longitudes are infinite
    labels = geopandas.GeoDataFrame(geometry=polygons, crs=4326).to_crs(CRS)
    labels = geopandas.GeoDataFrame(geometry=[*labels.geometry, far], crs=CRS)
    labels.to_file(tmp_path / "labels.gpkg")
    (note,) = warn_of_copies([tmp_path / "labels.gpkg"], [town / "osm.parquet"])
    assert note.startswith("100% of the polygons of labels.gpkg")
    table = bytearray((town / "osm.parquet").read_bytes())
    with pyarrow.parquet.ParquetFile(town / "osm.parquet") as file:
        columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    for column in columns:
        if column.path_in_schema.startswith("bbox."):
            start = column.dictionary_page_offset or column.data_page_offset
            table[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "osm.parquet").write_bytes(table)
    with pytest.raises(FormatError, match=r"osm\.parquet is damaged"):
        warn_of_copies([tmp_path / "labels.gpkg"], [tmp_path / "osm.parquet"])
