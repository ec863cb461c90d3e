"""embed: vectors of every tile, from a store or from the ground, whole or with what there is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import geopandas
import h5py
import numpy as np
import pytest
import torch
from labelled_town import write_encoder, write_town
from mapped_city import building_task, write_city, write_head
from PIL import Image

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.inference import embedding
from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.pipeline.embed import embed
from rsosm_cli.products.embeddings import VECTORS, Pooled, principal_components
from rsosm_cli.text.encoder import load_text_encoder
from rsosm_cli.text.weights import tag_weights
from rsosm_cli.tiles.augment import normalise
from rsosm_cli.tiles.batch import to_hetero
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.workspace import Manifest, Workspace


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_town(root / "town", columns=5, rows=4)
    write_town(root / "blind", columns=4, rows=3, images=False)
    write_encoder(root / "encoder")
    write_city(root)
    return root


@pytest.fixture
def root(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "root"))


def run(root: Path, city: str | None = None, **changes):
    arguments = {"root": root, "checkpoint": root / "encoder", "device": "cpu", "offline": True, "batch_size": 7}
    if city is None:
        arguments["tiles"] = root / "town" / "tiles.h5"
    return embed(city, **{**arguments, **changes})


def arrays(path: str | Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        return {name: file[name][:] for name in file}


def test_vectors_in_bf16_are_near_and_made_of_their_own(root: Path):
    full, half = arrays(run(root).paths["embeddings"]), run(root, precision="bf16")
    assert half.status == "done"
    for name, values in arrays(half.paths["embeddings"]).items():
        if name in VECTORS:
            assert not np.array_equal(values, full[name], equal_nan=True)
            scale = np.nanmax(np.abs(full[name]))
            assert np.nanmax(np.abs(values - full[name])) < 0.05 * scale
    with pytest.raises(UsageError, match="precision '16'"):
        run(root, precision="16")


def test_the_vectors_are_those_of_the_encoder(root: Path):
    result = run(root, patch_maps=True)
    store = TileStore.open(root / "town" / "tiles.h5")
    assert (result.status, result.numbers["tiles"]) == ("done", len(store))
    found = arrays(result.paths["embeddings"])
    loaded = load_checkpoint(root / "encoder")
    d = loaded.description
    rows = np.flatnonzero(store.image_share == 1)[[1, 9]]
    vectors = load_text_encoder("minilm", offline=True).encode(store.tags)
    graphs = to_hetero(store.graphs(rows), vectors, tag_weights(store.tags, d.key_counts, d.tag_weight))
    images = normalise(torch.from_numpy(store.images(rows)), torch.tensor(d.mean), torch.tensor(d.std))
    with torch.no_grad():
        expected = loaded.encoder.encode(images, graphs, maps=True)
    for name in ("image", "osm", "fused"):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name][rows], getattr(expected, name).numpy(), atol=1e-4)
    for name in ("image_map", "fused_map"):
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name][rows], getattr(expected, name).numpy(), atol=2e-2)
    np.testing.assert_array_equal(found["bounds_m"], store.bounds_m)
    with h5py.File(result.paths["embeddings"]) as file:
        assert file.attrs["crs"] == store.crs
        assert file.attrs["format"] == "rsosm embeddings"
        assert "sources" in json.loads(file.attrs["provenance"])


def test_a_second_run_is_skipped_and_extras_are_added(root: Path):
    first = run(root)
    stamp = Path(first.paths["embeddings"]).stat().st_mtime_ns
    assert run(root).status == "skipped"
    more = run(root, parquet=True, preview=True)
    assert more.status == "done"
    assert Path(first.paths["embeddings"]).stat().st_mtime_ns == stamp
    assert run(root, parquet=True, preview=True).status == "skipped"
    assert run(root, patch_maps=True).status == "done"
    assert run(root, force=True).status == "done"
    table = geopandas.read_parquet(more.paths["parquet"])
    assert len(table) == first.numbers["tiles"]
    assert table.crs.name.startswith("WGS 84")
    np.testing.assert_allclose(np.stack(table["osm"]), arrays(first.paths["embeddings"])["osm"])
    with Image.open(more.paths["preview"]) as picture:
        assert min(picture.size) > 400


def test_the_same_inputs_give_the_same_bytes(root: Path, tmp_path: Path):
    paths = [run(root, output=tmp_path / n / "e.h5", parquet=True, preview=True).paths for n in "ab"]
    for kind in paths[0]:
        assert Path(paths[0][kind]).read_bytes() == Path(paths[1][kind]).read_bytes()


def test_without_images_the_objects_are_encoded_alone(root: Path):
    result = run(root, tiles=root / "blind" / "tiles.h5", preview=True)
    found = arrays(result.paths["embeddings"])
    assert "image" not in found
    assert np.isfinite(found["osm"]).all()
    assert "alone" in " ".join(result.notes)


@pytest.mark.parametrize("image", [True, False])
def test_without_a_store_tiles_are_cut_from_the_ground(root: Path, tmp_path: Path, image: bool):
    if not image:
        Workspace(root).city("Little Town").imagery.unlink()
    result = run(root, "Little Town", preview=True)
    found = arrays(result.paths["embeddings"])
    assert ("fused" in found) == image
    assert found["n_objects"].sum() > 30
    assert Workspace(root).city("Little Town").manifest.step("embed")["numbers"]["tiles"] == len(found["osm"])
    if image:
        assert (np.isnan(found["image"]).all(1) == (found["image_share"] == 0)).all()
    assert run(root, "Little Town", preview=True).status == "skipped"


def test_interrupted_half_way_it_goes_on_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch):
    encode, calls = embedding.Encoder.encode, []

    def counted(self, tiles):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, tiles)

    whole = arrays(run(root, batch_size=6).paths["embeddings"])
    monkeypatch.setattr(embedding, "BLOCK", 6)
    monkeypatch.setattr(embedding.Encoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        run(root, batch_size=6, output=root / "k.h5")
    assert not (root / "k.h5").exists()
    run(root, batch_size=6, output=root / "k.h5")
    assert len(calls) == 3 + math.ceil(len(whole["osm"]) / 6) - 2
    for name, values in arrays(root / "k.h5").items():
        np.testing.assert_array_equal(values, whole[name])
    assert not (root / ".k.h5.parts").exists()


@pytest.mark.parametrize("maps", [False, True])
def test_dry_run_tells_the_size_of_what_is_written(root: Path, maps: bool):
    planned = run(root, patch_maps=maps, dry_run=True).numbers["vectors_mb"]
    result = run(root, patch_maps=maps)
    written = sum(v.nbytes for n, v in arrays(result.paths["embeddings"]).items() if n.removesuffix("_map") in VECTORS)
    assert planned == pytest.approx(written / 1e6, abs=0.0051)
    assert planned > 0.01


def test_dry_run_writes_nothing(root: Path):
    result = run(root, dry_run=True)
    assert (result.status, result.numbers["tiles"]) == ("planned", len(TileStore.open(root / "town" / "tiles.h5")))
    assert not (root / "town" / "embeddings.h5").exists()


def test_the_newest_pretraining_is_taken_and_a_head_s_encoder_serves(root: Path):
    with pytest.raises(MissingError, match="rsosm pretrain"):
        run(root, checkpoint=None)
    folder = root / "runs" / "first"
    shutil.copytree(root / "encoder", folder / "checkpoints" / "last")
    Manifest(folder / "manifest.json").update(kind="pretrain", key="k", finished="2026-01-01T00:00:00Z")
    assert "run first" in run(root, checkpoint=None).notes[0]
    write_head(root / "head", building_task())
    assert run(root, checkpoint=root / "head").status == "done"


def test_what_does_not_fit_is_refused_in_a_sentence(root: Path):
    with pytest.raises(UsageError, match="--tiles"):
        embed(root=root, checkpoint=root / "encoder")
    with pytest.raises(MissingError, match="fetch --city"):
        run(root, "Nowhere")
    file = root / "encoder" / "model.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | {"bands": [4, 3, 2]}))
    with pytest.raises(UsageError, match="wants 4, 3, 2"):
        run(root)


def test_principal_components_order_the_variance(root: Path, tmp_path: Path):
    path = tmp_path / "e.h5"
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((200, 3)) * [5.0, 2.0, 1.0]
    axes = np.linalg.qr(rng.standard_normal((8, 3)))[0]
    vectors = (scores @ axes.T + 3).astype(np.float32)
    vectors[7] = np.nan
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "rsosm embeddings", "version": 1, "crs": "EPSG:32645"})
        file["osm"], file["bounds_m"] = vectors, np.zeros((200, 4))
    found = principal_components(Pooled.open(path))
    known = np.arange(200) != 7
    assert np.isnan(found.scores[7]).all()
    assert found.shares.sum() == pytest.approx(1, abs=1e-4)
    for i in range(3):
        assert abs(np.corrcoef(found.scores[known, i], scores[known, i])[0, 1]) > 0.97
