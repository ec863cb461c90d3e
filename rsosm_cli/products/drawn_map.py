"""A map that is given as polygons, drawn as the class raster that everything else measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsosm_cli.errors import MissingError
from rsosm_cli.settings import TaskSettings

if TYPE_CHECKING:
    from shapely import Geometry

# Longer side of the raster that polygons are drawn on, in pixels of at least a metre: bounds its memory.
LONGEST_PX = 20_000


def draw_map(given: Path, task: TaskSettings, boundary: Geometry | None, path: Path) -> None:
    """Write the polygons in ``given`` as a GeoTIFF of class numbers to ``path``, in UTM, a metre a pixel or coarser.

    Ground that they leave is the task's background within ``boundary`` (in degrees), or else within their box. Raises
    :class:`MissingError` where there are none.
    """
    import rasterio
    import shapely
    from rasterio.features import rasterize

    from rsosm_cli.geometry import WGS84, Projection, reproject, utm_crs
    from rsosm_cli.tiles.label_files import IGNORE, read_frame, read_vector
    from rsosm_cli.workspace import atomic

    frame = read_frame(given)
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
    if not len(frame):
        raise MissingError(
            f"The map {given} holds no polygons.", hint="Give a file with at least one feature.", path=str(given)
        )
    if boundary is None:
        lonlat = reproject(np.asarray(frame.geometry, dtype=object), frame.crs.to_string(), WGS84)
        boundary = shapely.box(*shapely.total_bounds(lonlat))
    crs = utm_crs(boundary)
    ground = reproject(np.array([boundary], dtype=object), WGS84, crs)[0]
    layer = read_vector(given, task, crs, ground, [])
    west, south, east, north = shapely.bounds(ground)
    gsd = max(1.0, max(east - west, north - south) / LONGEST_PX)
    projection = Projection(crs, float(np.ceil(gsd)))
    box = projection.pixels_around(west, south, east, north)
    transform = projection.transform_of(box)
    values = np.full((box.height, box.width), IGNORE, np.uint8)
    if task.background is not None:
        index = [c.name for c in task.classes].index(task.background)
        rasterize([(ground, index)], out=values, transform=transform)
    inside = shapely.intersects(layer.geometry, ground)
    if inside.any():
        shapes = zip(layer.geometry[inside], layer.codes[inside].astype(int).tolist(), strict=True)
        rasterize(shapes, out=values, transform=transform)
    with atomic(path) as part, rasterio.open(
        part, "w", driver="GTiff", width=box.width, height=box.height, count=1, dtype="uint8", crs=crs,
        transform=transform, nodata=IGNORE, compress="deflate", tiled=True,
    ) as target:  # fmt: skip
        target.write(values, 1)
        target.update_tags(RSOSM_TASK=task.name)
