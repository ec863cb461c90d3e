"""A small city under a root, with imagery, elements and checkpoints of heads that were never trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import shapely
import torch
from affine import Affine
from element_tables import write_elements
from labelled_town import CRS, SMALL, building_task
from rasterio.features import rasterize

from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.models.checkpoint import Description, save_checkpoint
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.osm.elements import Elements
from rsosm_cli.places.place import OSM_SOURCE, Place, write_place
from rsosm_cli.settings import TaskSettings
from rsosm_cli.text.encoder import load_text_encoder
from rsosm_cli.workspace import Workspace

GSD = 1.0
WEST, NORTH = 499_200.0, 3_056_000.0
SIZE = 160  # metres


def write_city(
    root: Path, name: str = "Little Town", *, image: bool = True, hole: bool = True, size: int = SIZE
) -> None:
    """Write place (a disc), elements (squares of 8 m, one road) and imagery (with a hole) of a city."""
    files = Workspace(root).city(name)
    files.folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    disc = shapely.Point(WEST + size / 2, NORTH - size / 2).buffer(size * 0.48)
    place = reproject(np.array([disc], dtype=object), CRS, WGS84)[0]
    write_place(files.place, Place(name, place, "a test"))
    n = size * size // 600
    x, y = WEST + rng.uniform(0, size - 8, n), NORTH - rng.uniform(8, size, n)
    squares = shapely.box(x, y, x + 8, y + 8)
    road = shapely.LineString([(WEST, NORTH), (WEST + size, NORTH - size)])
    geometry = reproject(np.array([road, *squares], dtype=object), CRS, WGS84)
    tags = [{"highway": "primary"}, *({"building": "house" if i % 3 else "shed"} for i in range(n))]
    kind = np.array([1] + [2] * n, np.uint8)
    ids = np.arange(n + 1)
    write_elements(files.osm, Elements(WGS84, np.ones(n + 1, np.uint8), ids, kind, tags, geometry))
    if image:
        pixels = int(size / 0.5)
        transform = Affine(0.5, 0, WEST, 0, -0.5, NORTH)
        picture = rng.integers(1, 40, (3, pixels, pixels), dtype=np.uint8)
        picture[:, rasterize(squares, out_shape=(pixels, pixels), transform=transform) > 0] += 180
        if hole:
            picture[:, 120:180, 120:180] = 0
        with rasterio.open(
            files.imagery, "w", driver="GTiff", width=pixels, height=pixels, count=3, dtype="uint8", crs=CRS,
            transform=transform, nodata=0 if hole else None,
        ) as target:  # fmt: skip
            target.write(picture)
    files.manifest.update(name=name)
    credit = {"name": "Test imagery", "licence": "CC-BY-4.0", "attribution": "© Nobody"}
    sources = [OSM_SOURCE, credit] if image else [OSM_SOURCE]
    files.manifest.record("fetch", "key", files=[files.place], seconds=0, sources=sources)


def density_task() -> TaskSettings:
    return TaskSettings(
        name="density", title="Density", kind="regression", unit="people", aggregate="sum", loss="mse", decoder="mlp"
    )


def write_head(folder: Path, task: TaskSettings, *, tile: int = 32, seed: int = 0) -> Path:
    """Write a checkpoint of a head that was never trained, or of an encoder alone."""
    torch.manual_seed(seed)
    width = load_text_encoder("minilm", offline=True).width
    description = Description(
        model=SMALL, text={"encoder": "minilm", "width": width, "identity": {}},
        key_counts={"building": 5, "highway": 2}, tile=tile, gsd=GSD, mean=(0.3, 0.3, 0.3), std=(0.25, 0.25, 0.25),
        task=task,
    )  # fmt: skip
    save_checkpoint(folder, TaskModel(GeoLink(SMALL, width), task), description)
    return folder


__all__ = ["SIZE", "building_task", "density_task", "write_city", "write_head"]
