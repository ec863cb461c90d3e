"""The papers' robustness experiments: an OSM that misses objects, is shifted, or lacks keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph.keypoints import unit_draws
from rsosm_cli.graph.vocabulary import matches
from rsosm_cli.osm.elements import Elements
from rsosm_cli.settings import PerturbSettings

# Metres of one degree of latitude, on the sphere of the WGS 84 mean radius.
_METRES_A_DEGREE = 111_195.0


def element_numbers(elements: Elements) -> NDArray[np.int64]:
    """Return (N,) one number an OSM object: ``osm_id * 4 + osm_type``."""
    return elements.osm_id * 4 + elements.osm_type


def take(elements: Elements, rows: NDArray[np.int64]) -> Elements:
    """Return the elements of ``rows``, in that order."""
    return Elements(
        elements.crs,
        elements.osm_type[rows],
        elements.osm_id[rows],
        elements.kind[rows],
        [elements.tags[i] for i in rows.tolist()],
        elements.geometry[rows],
    )


def perturb(elements: Elements, settings: PerturbSettings) -> tuple[Elements, NDArray[np.int64]]:
    """Return the elements with objects dropped, keys removed and positions shifted, as seeded, and which rows stayed.

    Each object's fate hangs on its id and the seed alone: blocks and workers cannot disagree about it.
    """
    number = element_numbers(elements)
    kept = np.arange(len(number))
    if settings.drop_objects > 0:
        kept = np.flatnonzero(unit_draws(number, 1, settings.seed)[:, 0] >= settings.drop_objects)
        elements, number = take(elements, kept), number[kept]
    if settings.drop_keys:
        tags = [{k: v for k, v in t.items() if not matches(k, settings.drop_keys)} for t in elements.tags]
        rows = np.flatnonzero(np.fromiter(map(bool, tags), bool, len(tags)))
        elements = take(replace(elements, tags=tags), rows)
        kept, number = kept[rows], number[rows]
    if settings.shift_m > 0 and len(elements):
        angle = 2 * np.pi * unit_draws(number, 2, settings.seed)[:, 1]
        step = settings.shift_m * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        if _geographic(elements.crs):
            latitude = np.radians(shapely.bounds(elements.geometry)[:, [1, 3]].mean(axis=1))
            step /= _METRES_A_DEGREE * np.stack([np.cos(latitude), np.ones_like(latitude)], axis=1)
        coordinates, owner = shapely.get_coordinates(elements.geometry, return_index=True)
        moved = shapely.set_coordinates(elements.geometry.copy(), coordinates + step[owner])
        elements = replace(elements, geometry=moved)
    return elements, kept


def _geographic(crs: str) -> bool:
    from pyproj import CRS

    return bool(CRS.from_user_input(crs).is_geographic)
