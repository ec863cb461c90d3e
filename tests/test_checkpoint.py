"""Checkpoints: self-contained, never unpickled, refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from graph_batches import join, random_tile

from rsosm_cli.errors import FormatError, MissingError
from rsosm_cli.models.checkpoint import Description, find_checkpoint, load_checkpoint, read_description, save_checkpoint
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.settings import ClassSettings, ModelSettings, TaskSettings

SMALL = ModelSettings(
    image_encoder="vit_tiny_patch16_224", image_size=32, osm_width=8, fusion_width=16, fusion_heads=2,
    decoder_width=16, decoder_heads=2, decoder_depth=1, projection_width=4,
)  # fmt: skip
TASK = TaskSettings(
    name="uv", classes=tuple(ClassSettings(name=n, colour="#123456") for n in "ab"), decoder="linear", modality="osm"
)


def describe(task: TaskSettings | None = None) -> Description:
    return Description(
        model=SMALL, text={"encoder": "minilm", "width": 16, "identity": {"name": "x"}}, key_counts={"building": 3},
        tile=32, gsd=0.6, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), task=task,
    )  # fmt: skip


@pytest.mark.parametrize("task", [None, TASK])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, task: TaskSettings | None):
    torch.manual_seed(0)
    model = GeoLink(SMALL, 16)
    whole = (TaskModel(model, task) if task is not None else model).eval()
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last", whole, describe(task))
    graphs = join([random_tile((2, 3, 4), 0), random_tile((0, 0, 0), 1)])
    for path in ("run", "run/checkpoints/last", "run/checkpoints/last/model.safetensors"):
        loaded = load_checkpoint(tmp_path / path)
        assert loaded.description == describe(task)
        assert not loaded.model.training
        with torch.no_grad():
            assert torch.equal(loaded.encoder.encode(None, graphs).osm, model.encode(None, graphs).osm)
            if task is not None:
                assert torch.equal(loaded.model(None, graphs), whole(None, graphs))


def test_the_best_is_preferred(tmp_path: Path):
    for which in ("last", "best"):
        save_checkpoint(tmp_path / "checkpoints" / which, GeoLink(SMALL, 16), describe())
    assert find_checkpoint(tmp_path).name == "best"


def edit(folder: Path, **values: object) -> None:
    file = folder / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path):
    folder = tmp_path / "c"
    save_checkpoint(folder, GeoLink(SMALL, 16), describe())
    weights = (folder / "model.safetensors").read_bytes()
    with pytest.raises(MissingError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(FormatError, match="rsosm convert"):
        load_checkpoint(tmp_path / "a.pth")

    (folder / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(FormatError, match="damaged"):
        load_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(weights)
    edit(folder, model={**SMALL.model_dump(), "osm_width": 16})
    with pytest.raises(FormatError, match="of another model"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"model\.safetensors is not there"):
        load_checkpoint(folder)

    edit(folder, surprise=1)
    with pytest.raises(FormatError, match="surprise"):
        read_description(folder)
    edit(folder, method="magic")
    with pytest.raises(FormatError, match="of method 'magic'"):
        read_description(folder)
    edit(folder, format=99)
    with pytest.raises(FormatError, match="format 99"):
        read_description(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        read_description(folder)


def test_equal_weights_give_equal_bytes(tmp_path: Path):
    model = GeoLink(SMALL, 16)
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, model, describe())
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "b" / "model.safetensors").read_bytes()
    # Several keys would stand in another order in every process.
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
