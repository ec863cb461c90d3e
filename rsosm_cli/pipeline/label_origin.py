"""Labels that are OSM elements themselves: a model that reads OSM need only copy them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.pipeline.evaluate_inputs import VECTORS
from rsosm_cli.tiles.label_files import read_frame

_SAMPLED = 1000  # polygons that are looked up
_SAME_DEGREES = 2e-6  # 0.2 m: what rounding and reprojection may move a corner
_COPIED = 0.8  # share of the polygons from which on it is said


def warn_of_copies(labels: Sequence[Path], osm: Iterable[Path]) -> list[str]:
    """Return a sentence for every vector file of ``labels`` most of whose polygons are elements of a table of ``osm``.

    Two polygons count as one where their boxes are the same: by chance those of different ones hardly ever are.
    """
    import shapely

    notes, tables = [], [path for path in osm if path.is_file()]
    for path in labels:
        if not tables or not path.is_file() or path.suffix.lower() not in VECTORS:
            continue
        frame = read_frame(path)
        geometry = np.asarray(frame.geometry.values)
        polygons = geometry[np.isin(shapely.get_type_id(geometry), (3, 6)) & ~shapely.is_empty(geometry)]
        if len(polygons) > _SAMPLED:
            polygons = np.random.default_rng(0).choice(polygons, _SAMPLED, replace=False)
        share = _share(shapely.bounds(reproject(polygons, frame.crs, WGS84)), tables) if len(polygons) else 0.0
        if share >= _COPIED:
            notes.append(
                f"{share:.0%} of the polygons of {path.name} are elements of OpenStreetMap, which the model reads: its "
                "score tells how well it copies them. Take labels of another source, or train on the images alone "
                "(--modality image)."
            )
    return notes


def _share(boxes: NDArray[np.float64], tables: Sequence[Path]) -> float:
    """Return the share of ``boxes`` (N, 4), WGS 84, that are boxes of polygons of the tables.

    Boxes that are not finite, as of corners that the CRS of the labels cannot have, are left out.
    """
    from scipy.spatial import cKDTree

    from rsosm_cli.osm.elements import polygon_boxes

    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if not len(boxes):
        return 0.0
    found = np.zeros(len(boxes), bool)
    low, high = boxes[:, :2].min(axis=0) - _SAME_DEGREES, boxes[:, 2:].max(axis=0) + _SAME_DEGREES
    for path in tables:
        for known in polygon_boxes(path):
            # Comparisons leave out what is not finite here, too.
            near = known[(known[:, :2] >= low).all(axis=1) & (known[:, 2:] <= high).all(axis=1)]
            if len(near):
                found |= np.isfinite(cKDTree(near).query(boxes, distance_upper_bound=_SAME_DEGREES, p=np.inf)[0])
    return float(found.mean())
