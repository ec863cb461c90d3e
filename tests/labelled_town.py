"""A tiny town for tests of fine-tuning: bright squares on dark ground, half of them mapped, and labels of all."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import rasterio
import shapely
import torch
from affine import Affine
from element_tables import write_elements
from rasterio.features import rasterize

from rsosm_cli.models.checkpoint import Description, save_checkpoint
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.osm.elements import Elements
from rsosm_cli.pipeline.build_graph import build_graph
from rsosm_cli.settings import BuildSettings, GridSettings, ModelSettings, TaskSettings, load_preset
from rsosm_cli.text.encoder import load_text_encoder

CRS = "EPSG:32645"
GSD = 1.0
TILE = 32
ORIGIN = (15_600, -95_500)  # cell of the north-west tile, in the middle of the zone
SMALL = ModelSettings(
    image_encoder="vit_tiny_patch16_224", image_size=TILE, image_depth=4, osm_width=8, fusion_width=16,
    fusion_heads=2, decoder_width=16, decoder_heads=2, decoder_depth=1, projection_width=4,
)  # fmt: skip


def squares(columns: int, rows: int, seed: int) -> np.ndarray:
    """Return squares of 8 m, on average one and a half a tile."""
    rng = np.random.default_rng(seed)
    n = columns * rows * 3 // 2
    west, north = ORIGIN[0] * TILE * GSD, -ORIGIN[1] * TILE * GSD
    x = west + rng.uniform(0, columns * TILE - 8, n)
    y = north - rng.uniform(8, rows * TILE, n)
    return shapely.box(np.round(x), np.round(y), np.round(x) + 8, np.round(y) + 8)


def write_town(folder: Path, *, columns: int = 8, rows: int = 8, seed: int = 0, images: bool = True) -> Path:
    """Write ``tiles.h5`` and ``labels.gpkg`` (squares, with a value `height`) into ``folder``; return the store."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = squares(columns, rows, seed)
    frame = geopandas.GeoDataFrame({"height": np.arange(len(shapes)) % 7 + 1.0}, geometry=shapes, crs=CRS)
    frame.to_file(folder / "labels.gpkg")
    mapped = shapes[::2]
    tags = [{"building": "house" if i % 3 else "shed"} for i in range(len(mapped))]
    ways = np.ones(len(mapped), np.uint8)
    elements = Elements(CRS, ways, np.arange(1, len(mapped) + 1), ways + 1, tags, mapped)
    write_elements(folder / "osm.parquet", elements)
    width, height = columns * TILE, rows * TILE
    transform = Affine(GSD, 0, ORIGIN[0] * TILE * GSD, 0, -GSD, -ORIGIN[1] * TILE * GSD)
    picture = np.random.default_rng(seed).integers(0, 40, (3, height, width), dtype=np.uint8)
    picture[:, rasterize(shapes, out_shape=(height, width), transform=transform) > 0] += 180
    with rasterio.open(
        folder / "image.tif", "w", driver="GTiff", width=width, height=height, count=3, dtype="uint8", crs=CRS,
        transform=transform,
    ) as target:  # fmt: skip
        target.write(picture)
    settings = BuildSettings(grid=GridSettings(tile=TILE, stride=TILE, gsd=GSD))
    path = folder / "tiles.h5"
    imagery = folder / "image.tif" if images else None
    build_graph(osm=folder / "osm.parquet", imagery=imagery, output=path, settings=settings, root=folder)
    return path


def write_encoder(folder: Path, *, tile: int = TILE) -> Path:
    """Write a checkpoint of an encoder that was never trained, for the town's tiles at ``tile`` pixels."""
    torch.manual_seed(0)
    width = load_text_encoder("minilm", offline=True).width
    small = SMALL.model_copy(update={"image_size": tile})
    description = Description(
        model=small, text={"encoder": "minilm", "width": width, "identity": {}}, key_counts={"building": 5}, tile=tile,
        gsd=GSD * TILE / tile, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip
    save_checkpoint(folder, GeoLink(small, width), description)
    return folder


def building_task(**changes: object) -> TaskSettings:
    """Return the packaged building task, small and quick."""
    values = load_preset("tasks", "building")
    values |= {
        "decoder_width": 16,
        "workers": 0,
        "optim": {"lr": 3e-3, "epochs": 2, "warmup_epochs": 0, "batch_size": 16},
    }
    return TaskSettings.model_validate(values | changes)
