"""A small town and its photo, for tests of ``fetch``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from osm_documents import document, node, ring, way

BBOX = (10.0, 50.0, 10.009, 50.009)


def write_town(path: Path) -> Path:
    path.write_text(document(way(1, ring(0, 0, 2), building="yes"), node(1, 10.005, 50.005, amenity="cafe")))
    return path


def write_photo(path: Path, side: int = 64, box: tuple[float, float, float, float] = BBOX, **profile: object) -> Path:
    transform = rasterio.transform.from_bounds(*box, side, side)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", crs="EPSG:4326",
        transform=transform, **profile,
    ) as target:  # fmt: skip
        target.write(np.random.default_rng(0).integers(1, 255, (3, side, side), dtype=np.uint8))
    return path
