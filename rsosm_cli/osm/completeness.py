"""A hint on where OSM may be incomplete: how evenly its objects lie over a place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsosm_cli.osm.elements import open_elements

if TYPE_CHECKING:
    from shapely import Geometry

_KM_PER_DEGREE = 111.2
_MOST_CELLS = 1_000_000  # a side longer than a kilometre where a place is larger than a country
SPARSE = 0.1  # of the average


@dataclass(frozen=True)
class Density:
    """Objects over cells of ``cell_km`` (their centres inside the place), by the middle of each object's box.

    ``median_per_km2``: of the cells; ``sparse_share``: share of the cells with less than a tenth of the average.
    """

    cell_km: float
    cells: int
    mean_per_km2: float
    median_per_km2: float
    sparse_share: float

    def numbers(self) -> dict[str, float]:
        return {
            "objects_per_km2_median": round(self.median_per_km2, 1),
            "sparse_share": round(self.sparse_share, 3),
        }

    def note(self) -> str:
        """Return a sentence where much of the place is nearly empty, else ""."""
        if self.cells < 4 or self.sparse_share <= 0.25:
            return ""
        return (
            f"{100 * self.sparse_share:.0f} % of the place has less than a tenth of the average of "
            f"{self.mean_per_km2:,.0f} objects a km²: open country, or ground that OSM does not have yet."
        )


def density(path: Path, place: Geometry) -> Density:
    """Return how evenly the elements of ``osm.parquet`` lie over ``place`` (WGS 84)."""
    import shapely

    west, south, east, north = place.bounds
    shrink = float(np.cos(np.radians((south + north) / 2)))
    width, height = (east - west) * _KM_PER_DEGREE * shrink, (north - south) * _KM_PER_DEGREE
    side = max(1.0, float(np.sqrt(width * height / _MOST_CELLS)))
    columns, rows = max(1, round(width / side)), max(1, round(height / side))
    counts = np.zeros((rows, columns), np.int64)
    with open_elements(path) as file:
        for batch in file.iter_batches(columns=["bbox"]):
            x0, y0, x1, y1 = (c.to_numpy(zero_copy_only=False) for c in batch.column(0).flatten())
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            col = np.floor((x - west) / max(east - west, 1e-12) * columns).astype(np.int64)
            row = np.floor((y - south) / max(north - south, 1e-12) * rows).astype(np.int64)
            inside = (col >= 0) & (col < columns) & (row >= 0) & (row < rows)
            np.add.at(counts, (row[inside], col[inside]), 1)
    xs = west + (np.arange(columns) + 0.5) * (east - west) / columns
    ys = south + (np.arange(rows) + 0.5) * (north - south) / rows
    shapely.prepare(place)
    centres = shapely.contains_xy(place, *np.meshgrid(xs, ys))
    if not centres.any():
        centres[:] = True
    area = width * height / (rows * columns)
    found = counts[centres] / area
    mean = float(found.mean())
    sparse = float((found < SPARSE * mean).mean()) if mean else 1.0
    return Density(side, int(centres.sum()), mean, float(np.median(found)), sparse)
