"""Shapes that are not valid: told from the sound ones, and made valid where a surface is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.shapes import POINT, POLYGON, Shapes, surely_simple
from rsosm_cli.osm.sink import Batch, Counts


def sound_and_broken(shapes: Shapes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which shapes are valid, and which are areas that must be mended; lines without length are neither."""
    import shapely

    sound = np.asarray((shapes.boxes[:, :2] < shapes.boxes[:, 2:]).any(axis=1))
    areas = np.flatnonzero((shapes.kind == POLYGON) & ~surely_simple(shapes))
    valid = np.asarray(shapely.is_valid(shapes[areas].objects()))
    sound[areas] = valid
    return np.flatnonzero(sound), areas[~valid]


def mended(batch: Batch, counts: Counts) -> Batch:
    """Return ``batch`` with invalid polygons made valid, and without what has no length or area left."""
    import shapely

    geometry = batch.objects()
    polygons = batch.kind == POLYGON
    broken = np.flatnonzero(polygons & ~shapely.is_valid(geometry))
    if len(broken):
        geometry = geometry.copy()
        whole = shapely.make_valid(geometry[broken], method="structure", keep_collapsed=False)
        # A collection would be a polygon with lines left over: only its surface counts.
        parts, owner = shapely.get_parts(whole, return_index=True)
        surface = shapely.get_type_id(parts) == shapely.GeometryType.POLYGON
        many = np.isin(np.arange(len(whole)), owner[~surface])
        whole[many] = [shapely.multipolygons(parts[(owner == i) & surface]) for i in np.flatnonzero(many)]
        geometry[broken] = whole
    # A multipolygon of one part is that part: fewer geometry types for every reader.
    single = np.flatnonzero(
        polygons & (shapely.get_type_id(geometry) == 6) & (shapely.get_num_geometries(geometry) == 1)
    )
    if len(single):
        geometry = geometry.copy() if geometry is batch.geometry else geometry
        geometry[single] = shapely.get_geometry(geometry[single], 0)
    usable = ~shapely.is_missing(geometry) & ~shapely.is_empty(geometry)
    usable &= np.where(polygons, shapely.area(geometry) > 0, (batch.kind == POINT) | (shapely.length(geometry) > 0))
    counts.mended += int(usable[broken].sum())
    counts.invalid += int((~usable).sum())
    batch = replace(batch, geometry=geometry)
    return batch if usable.all() else batch[np.flatnonzero(usable)]
