"""The heterographs of many tiles as flat arrays, tile after tile: what the builder makes and the store keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NodeArrays:
    """All nodes of one type, tile-major. ``N`` nodes over ``T`` tiles, ``k`` key points a node.

    Positions are tile units (0..1, x to the right, y down); lengths and areas are of the clipped piece.
    """

    offsets: NDArray[np.int64]  # (T + 1,) nodes of tile t are offsets[t]:offsets[t + 1]
    osm_type: NDArray[np.uint8]  # (N,) 0 node, 1 way, 2 relation
    osm_id: NDArray[np.int64]  # (N,)
    tag_offsets: NDArray[np.int64]  # (N + 1,) tags of node n are tag_ids[tag_offsets[n]:tag_offsets[n + 1]]
    tag_ids: NDArray[np.int32]  # (sum,) into the sorted vocabulary
    key_points: NDArray[np.float32]  # (N, k, 2)
    area: NDArray[np.float32]  # (N,) share of the tile's area
    length: NDArray[np.float32]  # (N,) share of the tile's perimeter
    envelope: NDArray[np.float32]  # (N, 4, 2) corners of the minimum rotated rectangle
    centroid: NDArray[np.float32]  # (N, 2)
    class_code: NDArray[np.int16]  # (N,) see graph/classes: the key group that Rose and MMGR use; -1 for none
    vectors: NDArray[np.float32] | None = None  # (N, W) ready node vectors of imported graphs, else None


@dataclass(frozen=True)
class EdgeArrays:
    """All edges of one ordered pair of types, tile-major."""

    offsets: NDArray[np.int64]  # (T + 1,)
    index: NDArray[np.int32]  # (2, E) node numbers within the tile and type (source row 0, target row 1)
    relation: NDArray[np.uint8]  # (E,) column of RELATIONS[(source, target)]


@dataclass(frozen=True)
class GraphArrays:
    """Heterographs of ``T`` tiles. All three node types and all nine edge pairs are always present."""

    nodes: dict[str, NodeArrays]
    edges: dict[tuple[str, str], EdgeArrays]

    @property
    def n_tiles(self) -> int:
        return len(self.nodes["point"].offsets) - 1
