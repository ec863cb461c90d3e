"""Rose and MMGR through the whole chain: pretraining, encodings, heads, maps, and what a method cannot do."""

from __future__ import annotations

import csv
from pathlib import Path

import geopandas
import h5py
import numpy as np
import pytest
import shapely
import timm
import torch
from graph_batches import join, random_tile
from labelled_town import CRS, building_task, write_town
from pretrain_cases import small_settings
from tile_stores import make_store

from rsosm_cli.errors import UsageError
from rsosm_cli.inference.tags import TagTable
from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.models.mmgr import Mmgr
from rsosm_cli.models.rose import Rose
from rsosm_cli.pipeline.convert import convert
from rsosm_cli.pipeline.embed import embed
from rsosm_cli.pipeline.finetune import finetune
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.pipeline.pretrain import pretrain
from rsosm_cli.settings import MmgrSettings, PretrainSettings, RoseSettings, TaskSettings, resolve
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.tiles.tags import Selection
from rsosm_cli.training.runs import newest_run

MODELS = {
    "rose": {"image_encoder": "vit_tiny_patch16_224", "image_size": 32, "image_depth": 3, "heads": 4, "osm_width": 16},
    "mmgr": {"image_encoder": "resnet18", "image_size": 32, "width": 16, "point_width": 8, "categories": {"least": 1}},
}
TAGS = sorted(
    [f"amenity:kind{i}" for i in range(5)] + [f"shop:kind{i}" for i in range(3)] + ["building:yes", "highway:path"]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "tiles.h5", without_image=2, without_objects=4, tags=TAGS)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("town")
    write_town(folder, columns=6, rows=6)
    return folder


@pytest.fixture(scope="module")
def cells(town: Path) -> Path:
    """Labels of every tile, with a value `height`."""
    bounds = TileStore.open(town / "tiles.h5").bounds_m
    path = town / "cells.gpkg"
    frame = geopandas.GeoDataFrame(
        {"height": np.arange(len(bounds)) % 5 + 1.0}, geometry=shapely.box(*bounds.T), crs=CRS
    )
    frame.to_file(path)
    return path


def settings_of(method: str, **changes: object) -> PretrainSettings:
    optim = {"epochs": 3, "batch_size": 8, "lr": 8e-3, "schedule": "step", "milestones": [2]}
    return small_settings(method=method, model=MODELS[method], **{"optim": optim, **changes})


@pytest.fixture(scope="module", params=["rose", "mmgr"])
def trained(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished run."""
    root = tmp_path_factory.mktemp(request.param)
    result = pretrain(root=root, tiles=[store], settings=settings_of(request.param), device="cpu")
    assert result.status == "done"
    return root


def run_of(root: Path):
    return newest_run(root, kind="pretrain")


def method_of(root: Path) -> str:
    return load_checkpoint(run_of(root).folder).description.method


def test_losses_fall_and_the_report_shows_what_the_method_does(trained: Path) -> None:
    run, method = run_of(trained), method_of(trained)
    with run.metrics.open() as file:
        rows = list(csv.DictReader(file))
    parts = {"rose": ("image", "node"), "mmgr": ("views", "points")}[method]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[2]["lr"]) == pytest.approx(0.1 * float(rows[1]["lr"]))
    assert all(f"{kind}{part}" in rows[0] for part in parts for kind in ("", "heldout_"))
    page = run.report.read_text()
    assert ("nearest tags" in page) == (method == "rose")
    assert ("Reconstructions" in page) == (method == "rose")
    assert ("Retrieval" in page) == (method == "mmgr")
    assert "heldout_" not in page


def test_the_checkpoint_says_its_method_and_categories(trained: Path) -> None:
    loaded = load_checkpoint(run_of(trained).folder)
    d = loaded.description
    assert isinstance(loaded.model, {"rose": Rose, "mmgr": Mmgr}[d.method])
    assert isinstance(d.model, {"rose": RoseSettings, "mmgr": MmgrSettings}[d.method])
    if d.method == "mmgr":
        assert set(d.categories) == {"", "amenity", "shop", *(t for t in TAGS if t.startswith(("amenity", "shop")))}
        assert isinstance(loaded.model, Mmgr)
        assert loaded.model.table is not None
        assert loaded.model.table.abs().sum() > 0
        assert d.text.encoder == "categories"
    else:
        assert d.categories == ()
        assert d.text.encoder == "minilm"


def test_embeddings_are_those_that_the_method_has(trained: Path, town: Path, tmp_path: Path) -> None:
    method = method_of(trained)
    result = embed(
        tiles=town / "tiles.h5", checkpoint=run_of(trained).folder, output=tmp_path / "e.h5", patch_maps=True,
        device="cpu", offline=True, root=tmp_path,
    )  # fmt: skip
    with h5py.File(tmp_path / "e.h5") as file:
        found = {name: file[name].shape for name in file}
    assert ("fused" in found) == ("fused_map" in found) == (method == "rose")
    assert found["image"][1] == {"rose": 192, "mmgr": 512}[method]
    assert found["osm"][1] == {"rose": 32, "mmgr": 16}[method]
    assert any("none of both fused" in note for note in result.notes) == (method == "mmgr")


def test_a_head_on_the_image_maps_the_city(trained: Path, town: Path, tmp_path: Path) -> None:
    task = building_task(modality="image")
    arguments = {
        "labels": [town / "labels.gpkg"], "tiles": [town / "tiles.h5"], "root": tmp_path, "device": "cpu",
        "offline": True,
    }  # fmt: skip
    result = finetune(task, checkpoint=run_of(trained).folder, name="head", **arguments)
    assert 0 <= result.numbers["miou"] <= 1
    mapped = map_city(
        "building", root=tmp_path, checkpoint=tmp_path / "runs" / "head", imagery=town / "image.tif",
        osm=town / "osm.parquet", output=tmp_path / "maps", device="cpu", offline=True,
    )  # fmt: skip
    assert mapped.numbers["mapped_km2"] > 0
    # The exported image encoder gives what ours gives.
    convert(run_of(trained).folder, output=tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    loaded = load_checkpoint(run_of(trained).folder)
    with torch.no_grad():
        ours = loaded.encoder.encode(image, None).image
        features = theirs.forward_features(image)
    theirs_pooled = features[:, 0] if loaded.description.method == "rose" else features.mean((2, 3))
    torch.testing.assert_close(ours, theirs_pooled, atol=1e-4, rtol=1e-4)


def test_what_a_method_cannot_do_is_a_sentence(trained: Path, town: Path, cells: Path, tmp_path: Path) -> None:
    method, labels = method_of(trained), [town / "labels.gpkg"]
    start = {"checkpoint": run_of(trained).folder, "tiles": [town / "tiles.h5"], "root": tmp_path, "device": "cpu"}
    with pytest.raises(UsageError, match=f"{method} has no map of the OSM objects"):
        finetune(building_task(modality="osm"), labels=labels, dry_run=True, **start)
    fused = building_task(modality="fused")
    if method == "mmgr":
        with pytest.raises(UsageError, match="mmgr has no fused encoding"):
            finetune(fused, labels=labels, dry_run=True, **start)
        with pytest.raises(UsageError, match="only the modality image for the segmentation"):
            finetune(fused, labels=labels, dry_run=True, compare=True, **start)
    else:
        finetune(fused, labels=labels, dry_run=True, **start)
    height = TaskSettings(name="height", kind="regression", attribute="height", decoder="mlp", modality="osm")
    assert finetune(height, labels=[cells], dry_run=True, **start).status == "planned"


def test_rose_on_fused_maps_and_mmgr_on_points_train(trained: Path, town: Path, cells: Path, tmp_path: Path) -> None:
    start = {"checkpoint": run_of(trained).folder, "tiles": [town / "tiles.h5"], "root": tmp_path, "device": "cpu"}
    task, labels = building_task(modality="fused"), town / "labels.gpkg"
    if method_of(trained) == "mmgr":
        labels = cells
        task = TaskSettings(
            name="height", kind="regression", attribute="height", loss="mse", decoder="mlp", modality="osm", workers=0,
            optim={"lr": 1e-3, "epochs": 2, "warmup_epochs": 0, "batch_size": 16},
        )  # fmt: skip
    result = finetune(task, labels=[labels], name="head", offline=True, **start)
    assert result.status == "done"
    assert load_checkpoint(tmp_path / "runs" / "head").description.task == task


def test_the_objects_of_a_method(store: Path) -> None:
    graphs = TileStore.open(store).graphs(np.arange(60))
    tags = TileStore.open(store).tags

    def carried(selection: Selection) -> list[set[str]]:
        found = selection(graphs, selection.ranks(tags))
        return [
            {tags[i] for i in n.tag_ids[a:b]}
            for n in found.nodes.values()
            for a, b in zip(n.tag_offsets[:-1], n.tag_offsets[1:], strict=True)
        ]

    rose, mmgr = Selection.of(RoseSettings()), Selection.of(MmgrSettings())
    assert all(any(not t.startswith("shop") for t in own) for own in carried(rose))
    points = carried(mmgr)
    assert {len(own) for own in points} == {1}
    assert all(t.startswith(("amenity", "shop")) for own in points for t in own)
    assert len(mmgr(graphs, mmgr.ranks(tags)).nodes["line"].osm_id) == 0
    # An object that is both is of the first key.
    both = {"amenity:kind0", "shop:kind0"}
    n = graphs.nodes["point"]
    carries = [{tags[i] for i in n.tag_ids[a:b]} for a, b in zip(n.tag_offsets[:-1], n.tag_offsets[1:], strict=True)]
    kept = mmgr(graphs, mmgr.ranks(tags)).nodes["point"]
    own = dict(zip(kept.osm_id.tolist(), (tags[i] for i in kept.tag_ids), strict=True))
    for number, tagged in zip(n.osm_id.tolist(), carries, strict=True):
        if tagged == both:
            assert own[number] == "amenity:kind0"


def test_an_unknown_category_has_the_vector_of_its_key(trained: Path) -> None:
    loaded = load_checkpoint(run_of(trained).folder)
    if loaded.description.method != "mmgr":
        pytest.skip("of MMGR alone")
    table = TagTable(loaded.description, torch.device("cpu"), offline=True)
    rows = table.of(("amenity:kind1", "amenity:never_met", "office:lawyer")).vectors[:, 0].long().tolist()
    names = loaded.description.categories
    assert [names[row] for row in rows] == ["amenity:kind1", "amenity", ""]


@pytest.mark.parametrize("method", ["rose", "mmgr"])
def test_a_tile_does_not_depend_on_its_mates(method: str) -> None:
    torch.manual_seed(0)
    model = (
        Rose(RoseSettings.model_validate(MODELS["rose"]), 16)
        if method == "rose"
        else Mmgr(MmgrSettings.model_validate({**MODELS["mmgr"], "points": "text"}), 16)
    ).eval()
    tiles = [random_tile((4, 3, 5), 0), random_tile((0, 2, 1), 1), random_tile((0, 0, 0), 2)]
    images = torch.randn(3, 3, 32, 64)  # not square
    with torch.no_grad():
        together = model.encode(images, join(tiles), maps=True, levels=model.default_levels())
        for i, tile in enumerate(tiles):
            alone = model.encode(images[i : i + 1], tile, maps=True)
            for name in model.MODALITIES:
                torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i], atol=1e-4, rtol=1e-4)
    assert [level.shape[1] for level in together.levels] == model.level_widths(model.default_levels())
    assert together.image_map.shape[2:] == model.check_size(32, 64)


@pytest.mark.parametrize("method", ["geolink", "rose", "mmgr"])
def test_presets_of_a_method(method: str) -> None:
    for preset in (method, f"{method}-tiny"):
        settings = resolve(PretrainSettings, kind="pretrain", preset=preset)
        assert settings.method == method
    bare = resolve(PretrainSettings, kind="pretrain", options={"method": method})
    published = resolve(PretrainSettings, kind="pretrain", preset=method)
    assert bare.model == published.model
    assert bare.optim.model_copy(update={"batch_size": published.optim.batch_size}) == published.optim
    with pytest.raises(UsageError, match=r"unknown key 'model\.nothing'"):
        resolve(PretrainSettings, options={"method": method}, assignments=["model.nothing=1"])
