"""`convert`: released weights in, timm-loadable image encoders out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from graph_batches import join, random_tile

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.models.released import from_released
from rsosm_cli.models.vit import ImageEncoder
from rsosm_cli.models.weights import load_vit_weights
from rsosm_cli.pipeline.convert import convert, describe_released

CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "global_pool": "token",
    "pos_embed_requires_grad": False,
}


@pytest.fixture(scope="module")
def names(shared: Path) -> dict[str, list[int]]:
    """Names and shapes of the released ViT-L file."""
    return json.loads((shared / "weights" / "geolink_names.json").read_text())["geolink"]


@pytest.fixture(scope="module")
def released(shared: Path) -> dict[str, torch.Tensor]:
    """A random file of the released layout, on a small ViT, with PyG 2.4's doubled projections."""
    spec = json.loads((shared / "goldens" / "geolink" / "names_shapes_vit_tiny_patch16_224.json").read_text())
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in spec["geolink"].items()}
    for name in list(tensors):
        if name.endswith(".lin.weight"):
            tensors[name.replace(".lin.", ".lin_src.")] = tensors[name.replace(".lin.", ".lin_dst.")] = tensors.pop(
                name
            )
        if name.endswith("lin_dst.weight"):
            tensors[name] = tensors[name.replace("lin_dst", "lin_src")]
    return tensors


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"model_config": CONFIG, "model_state_dict": tensors}, path)
    return path


def test_every_released_name_and_shape_has_its_place(names):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    imported = from_released({n: t for n, t in tensors.items() if "lin_dst" not in n})
    settings, text_width = describe_released(tensors, {"architecture": "vit_large_patch16_224"})
    with torch.device("meta"):
        model = GeoLink(settings, text_width)
    assert {n: t.shape for n, t in imported.state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert not [name for name, reason in imported.left.items() if reason.startswith("no part")]
    read_and_left = {*imported.read, *imported.left, *(n for n in names if "lin_dst" in n)}
    assert read_and_left == set(names)


def test_a_released_file_becomes_a_checkpoint(tmp_path, released):
    file = save(tmp_path / "geolink.pth", released)
    result = convert(file)
    assert result.status == "done"
    assert result.numbers["tensors_read"] + result.numbers["tensors_left"] == len(released)
    assert any("sine-cosine" in note for note in result.notes)
    loaded = load_checkpoint(tmp_path / "geolink")
    assert loaded.description.text.encoder == "clip"
    assert loaded.description.model.osm_norm == "batch"
    assert torch.equal(loaded.encoder.vit.cls_token, released["cls_token"])
    graphs = join([random_tile((2, 3, 4), 0, width=512)])
    with torch.no_grad():
        assert torch.isfinite(loaded.encoder.encode(torch.randn(1, 3, 224, 224), graphs).fused).all()
    assert convert(file).status == "skipped"
    assert convert(file, force=True).status == "done"


def test_an_image_encoder_alone(tmp_path, released):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    file = save(tmp_path / "vit.pth", vit.state_dict())
    result = convert(file, output=tmp_path / "out")
    assert any("untrained" in note for note in result.notes)
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(loaded.encoder.vit.patch_embed.weight, vit.patch_embed.proj.weight)
    assert "fusion" in loaded.description.provenance["untrained"]


def test_what_is_not_plain_tensors_is_refused(tmp_path, released):
    class Surprise:
        def __reduce__(self):
            return (print, ("this must never be printed",))

    for content in ({"model_state_dict": {"a": Surprise()}}, Surprise()):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(FormatError, match="more than plain tensors"):
            convert(tmp_path / "bad.pth")
    torch.save({"model_state_dict": {"a": "text"}}, tmp_path / "bad.pth")
    with pytest.raises(FormatError, match="more than plain tensors"):
        convert(tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_bytes(b"not a zip")
    with pytest.raises(FormatError, match="damaged"):
        convert(tmp_path / "bad.pth")
    with pytest.raises(MissingError):
        convert(tmp_path / "none.pth")
    save(tmp_path / "bad.pth", {"a": torch.zeros(1)})
    with pytest.raises(FormatError, match="neither a GeoLink model nor a ViT"):
        convert(tmp_path / "bad.pth")
    assert not (tmp_path / "bad").exists()


def test_a_model_with_a_part_missing_is_refused(tmp_path, released):
    for part, expected in (
        ("osm_node_pred.bias", "predict_node.bias is missing"),
        ("osm_norm.line.bias", "2 of the 3 parts"),
    ):
        file = save(tmp_path / "part.pth", {n: t for n, t in released.items() if n != part})
        with pytest.raises(FormatError, match=expected):
            convert(file)
    different = {n: t + 1 if "line___to___line>.lin_dst" in n else t for n, t in released.items()}
    with pytest.raises(FormatError, match=r"differs from lin_src"):
        convert(save(tmp_path / "part.pth", different))


def test_timm_loads_what_is_written(tmp_path, released):
    convert(save(tmp_path / "geolink.pth", released))
    result = convert(tmp_path / "geolink")
    assert result.status == "done"
    folder = Path(result.paths["folder"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    encoder = load_checkpoint(tmp_path / "geolink").encoder
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        theirs = model.forward_features(images)
        ours = encoder.vit(images)
    torch.testing.assert_close(
        theirs[:, 1:], ours.patches, atol=1e-3, rtol=1e-3
    )  # timm's last norm has another epsilon
    card = (folder / "README.md").read_text()
    assert "ODbL" in card
    assert "geolink.pth" in card
    assert convert(tmp_path / "geolink").status == "skipped"


def test_a_folder_that_is_not_ours_is_kept(tmp_path, released):
    (tmp_path / "geolink").mkdir()
    (tmp_path / "geolink" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        convert(save(tmp_path / "geolink.pth", released))
    assert convert(tmp_path / "geolink.pth", dry_run=True).status == "planned"


@pytest.mark.parametrize("bands", [1, 3, 4, 7])
def test_image_weights_by_path(tmp_path, bands):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    torch.save({"model": {f"module.{n}": t for n, t in source.state_dict().items()}}, tmp_path / "vit.pth")
    vit = ImageEncoder("vit_tiny_patch16_224", 64, bands)
    imported = load_vit_weights(vit, tmp_path / "vit.pth")
    assert set(imported.left) == {"pos_embed", "head.weight", "head.bias"}
    torch.testing.assert_close(vit.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    grey = torch.randn(1, 1, 64, 64)
    expected = source.patch_embed.proj(grey.expand(1, 3, 64, 64))
    torch.testing.assert_close(vit.patch_embed(grey.expand(1, bands, 64, 64)), expected, atol=1e-5, rtol=1e-4)


def test_image_weights_of_another_vit(tmp_path):
    source = timm.create_model("vit_small_patch16_224", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(FormatError, match="does not fit vit_tiny_patch16_224"):
        load_vit_weights(ImageEncoder("vit_tiny_patch16_224", 64), tmp_path / "vit.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "none.pth")
    with pytest.raises(FormatError, match="holds no ViT"):
        load_vit_weights(ImageEncoder("vit_tiny_patch16_224", 64), tmp_path / "none.pth")
