"""The one element table that every OSM source becomes: GeoParquet on disk, arrays in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OSM_TYPES: tuple[str, ...] = ("node", "way", "relation")
KINDS: tuple[str, ...] = ("point", "line", "polygon")


@dataclass(frozen=True)
class Elements:
    """OSM elements in memory, in one CRS. All arrays have length ``N``, sorted by (osm_type, osm_id, kind)."""

    crs: str
    osm_type: NDArray[np.uint8]  # index into OSM_TYPES
    osm_id: NDArray[np.int64]
    kind: NDArray[np.uint8]  # index into KINDS
    tags: list[dict[str, str]]
    geometry: NDArray[np.object_]  # shapely geometries, kept whole

    def __len__(self) -> int:
        return len(self.osm_id)
