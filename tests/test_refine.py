"""Boundaries sharpened by a promptable segmenter: what is taken, what is left, and a tiny SamModel in the map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from mapped_city import building_task, density_task, write_city, write_head

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.models.segmenter import Segmenter
from rsosm_cli.pipeline.map import map_city
from rsosm_cli.pipeline.map_refine import find_segmenter
from rsosm_cli.products.refine import refine_classes
from rsosm_cli.settings import MapSettings

CRS = "EPSG:32645"


class Picture:
    """An image of ones, everywhere."""

    def read(self, projection: Projection, bounds_px: PixelBounds):
        shape = (bounds_px.height, bounds_px.width)
        return np.ones((3, *shape), np.uint8), np.ones(shape, bool)


def write_classes(path: Path, classes: np.ndarray) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", width=classes.shape[1], height=classes.shape[0], count=1, dtype="uint8", crs=CRS,
        nodata=255, transform=rasterio.Affine(1, 0, 500_000, 0, -1, 3_056_000),
    ) as target:  # fmt: skip
        target.write(classes, 1)
    return path


def test_a_mask_like_the_patch_is_taken_and_another_is_not(tmp_path: Path):
    classes = np.zeros((90, 130), np.uint8)
    classes[20:40, 20:40] = 1  # its mask is two pixels larger to the east
    classes[60:80, 70:90] = 2  # its masks are of something else
    classes[:, 120:] = 255
    asked = []

    def masks(image, boxes, points):
        side = image.shape[1]
        out = np.zeros((len(boxes), 2, side, side), bool)
        for i, ((x0, y0, x1, y1), (px, py)) in enumerate(zip(boxes.astype(int), points, strict=True)):
            asked.append((x1 - x0, y1 - y0))
            assert x0 < px < x1
            assert y0 < py < y1
            if i == 0:
                out[i, 1, y0:y1, x0 : x1 + 2] = True
            else:
                out[i, 0, :4, :4] = True
        return out

    source = write_classes(tmp_path / "c.tif", classes)
    found = refine_classes(
        source, tmp_path / "r.tif", Picture(), Projection(CRS, 1.0), background=0, side=256, masks=masks
    )
    with rasterio.open(tmp_path / "r.tif") as raster:
        fine = raster.read(1)
        assert raster.bounds == rasterio.open(source).bounds
    expected = classes.copy()
    expected[20:40, 40:42] = 1
    np.testing.assert_array_equal(fine, expected)
    assert (found.patches, found.sharpened, found.pixels) == (2, 1, 40)
    assert asked == [(20, 20), (20, 20)]


def test_what_a_mask_leaves_out_is_background_whatever_the_windows(tmp_path: Path):
    rng = np.random.default_rng(0)
    classes = np.zeros((300, 300), np.uint8)
    for x, y in rng.integers(0, 280, (25, 2)):
        classes[y : y + 16, x : x + 16] = 1

    def odd(image, boxes, points):  # the patch without its last column
        out = np.zeros((len(boxes), 1, image.shape[1], image.shape[1]), bool)
        for i, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
            out[i, 0, y0:y1, x0 : x1 - 1] = True
        return out

    source = write_classes(tmp_path / "c.tif", classes)
    refine_classes(source, tmp_path / "r.tif", Picture(), Projection(CRS, 1.0), background=0, side=64, masks=odd)
    with rasterio.open(tmp_path / "r.tif") as raster:
        fine = raster.read(1)
    assert set(np.unique(fine)) == {0, 1}
    assert 0.5 < (fine == 1).sum() / (classes == 1).sum() < 1.3


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SamModel as small as it gets, with random weights."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    torch.manual_seed(0)
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
            window_size=4, global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8,
        ).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4
        ).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16, num_hidden_layers=1
        ).to_dict(),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(folder)
    return folder


def test_a_segmenter_answers_every_prompt(sam: Path):
    segmenter = Segmenter(find_segmenter(str(sam), offline=True), torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8)
    boxes = np.array([[4, 4, 20, 20]] * 40, np.float32)
    found = segmenter.masks(image, boxes, np.full((40, 2), 12, np.float32))
    assert found.shape == (40, 3, 64, 64)
    np.testing.assert_array_equal(found[0], found[39])


def test_the_map_is_refined_with_weights_from_a_folder(sam: Path, tmp_path: Path):
    write_city(tmp_path, hole=False)
    write_head(tmp_path / "head", building_task(modality="image"))
    common = {"root": tmp_path, "checkpoint": tmp_path / "head", "device": "cpu", "offline": True}
    settings = MapSettings(refine="sam", refine_weights=str(sam))
    result = map_city("building", "Little Town", settings=settings, **common)
    assert any("Boundaries were sharpened" in note for note in result.notes)
    assert Path(result.paths["polygons"]).exists()
    plain = map_city("building", "Little Town", output=tmp_path / "plain", **common)
    assert result.numbers["mapped_km2"] == plain.numbers["mapped_km2"]


def test_a_dry_run_downloads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda weights, **options: asked.append(weights))
    write_city(tmp_path, hole=False, size=96)
    write_head(tmp_path / "head", building_task(modality="image"))
    planned = map_city(
        "building", "Little Town", root=tmp_path, checkpoint=tmp_path / "head", device="cpu", dry_run=True,
        settings=MapSettings(refine="sam"),
    )  # fmt: skip
    assert (planned.status, asked) == ("planned", [])


def test_what_is_missing_is_said_before_the_work_begins(sam: Path, tmp_path: Path):
    write_city(tmp_path, hole=False, size=96)
    write_head(tmp_path / "head", building_task(modality="image"))
    write_head(tmp_path / "density", density_task())
    common = {"root": tmp_path, "device": "cpu", "offline": True}
    with pytest.raises(MissingError, match=r"not on this machine.*--refine-weights"):
        map_city(
            "building", "Little Town", checkpoint=tmp_path / "head",
            settings=MapSettings(refine="sam", refine_weights="nobody/no-such-model"), **common,
        )  # fmt: skip
    with pytest.raises(UsageError, match="no background"):
        map_city(
            "density", "Little Town", checkpoint=tmp_path / "density", settings=MapSettings(refine="sam"), **common
        )
    assert not (tmp_path / "cities" / "little-town" / "maps").exists()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(MissingError, match=r"lacks model\.safetensors"):
        find_segmenter(str(tmp_path / "half"), offline=True)
    (tmp_path / "half" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FormatError, match="cannot be loaded"):
        Segmenter(tmp_path / "half", torch.device("cpu"))
