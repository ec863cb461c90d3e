"""What lies on the ground of a window: its image and its heterograph, cut as `build-graph` cuts tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
import torch
from numpy.typing import NDArray
from torch_geometric.data import HeteroData

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.builder import build_graphs
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.inference.mapping import RowImage, WindowBatch
from rsosm_cli.inference.tags import TagTable
from rsosm_cli.inference.windows import WindowPlan
from rsosm_cli.osm.elements import Elements, read_elements
from rsosm_cli.settings import GraphSettings
from rsosm_cli.tiles.ragged import take_tiles

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.products.view import Reads

# Elements are read for a band of this height at a time and serve the rows of windows in it: some ten thousand in a
# dense city, which is far below the memory of the model.
BAND_M = 1000.0

Bounds = tuple[float, float, float, float]


class ElementBand:
    """Elements of ``osm.parquet`` around a box, read a band at a time as boxes go from the north to the south."""

    def __init__(self, path: Path, crs: str) -> None:
        self.path, self.crs = path, crs
        self._box: Bounds | None = None
        self._elements: Elements | None = None
        self._bounds: NDArray[np.float64] = np.zeros((0, 4))

    def read(self, box: Bounds) -> Elements:
        """Return the elements whose boxes meet ``box`` (west, south, east, north, metres)."""
        west, south, east, north = box
        b = self._box
        if self._elements is None or b is None or not (
            b[0] <= west and b[1] <= south and b[2] >= east and b[3] >= north
        ):  # fmt: skip
            self._box = (west, min(south, north - BAND_M), east, north)
            self._elements = read_elements(self.path, self.crs, self._box)
            self._bounds = shapely.bounds(self._elements.geometry).reshape(-1, 4)
        e, edges = self._elements, self._bounds
        meets = (edges[:, 0] <= east) & (edges[:, 2] >= west) & (edges[:, 1] <= north) & (edges[:, 3] >= south)
        if meets.all():
            return e
        return replace(
            e, osm_type=e.osm_type[meets], osm_id=e.osm_id[meets], kind=e.kind[meets],
            tags=list(compress(e.tags, meets.tolist())), geometry=e.geometry[meets],
        )  # fmt: skip


@dataclass
class Ground:
    """Image and graphs of squares of ``tile_px`` pixels on the lattice of ``projection``. Either may be left out."""

    projection: Projection
    tile_px: int
    image: Reads | None
    elements: ElementBand | None
    graph: GraphSettings
    tags: TagTable | None

    def bounds_m(self, starts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (B, 4) west, south, east, north of the squares that start at ``starts`` (B, 2) column, row."""
        c, r = starts[:, 0], starts[:, 1]
        edges = np.stack([c, -(r + self.tile_px), c + self.tile_px, -r], axis=1)
        return edges * self.projection.gsd_m

    def graphs(self, starts: NDArray[np.int64]) -> Graphs | None:
        """Return the heterographs of the squares; None where none are wanted."""
        if self.elements is None or self.tags is None:
            return None
        boxes = self.bounds_m(starts)
        west, south = boxes[:, :2].min(axis=0).tolist()
        east, north = boxes[:, 2:].max(axis=0).tolist()
        elements = self.elements.read((west, south, east, north))
        vocabulary = Vocabulary.of(elements, self.graph.tags)
        return Graphs(build_graphs(elements, boxes, self.graph, vocabulary).graphs, vocabulary.tags, self.tags)


@dataclass(frozen=True)
class Graphs:
    """Graphs of some squares with the tags that their ids mean."""

    arrays: GraphArrays
    names: tuple[str, ...]
    table: TagTable

    def batch(self, rows: NDArray[np.int64]) -> HeteroData:
        return self.table.of(self.names).batch(take_tiles(self.arrays, rows))


@dataclass
class CityWindows:
    """The windows of a place as a source of the mapping loop: those that meet the place and, if an image is wanted,
    have any of it.
    """

    plan: WindowPlan
    ground: Ground
    place: Geometry  # in the CRS of the ground
    batch_size: int

    def __post_init__(self) -> None:
        shapely.prepare(self.place)

    def meeting(self, row: int, columns: range) -> NDArray[np.int64]:
        """Return (W, 2) starts of the windows of a row that meet the place."""
        starts = self.plan.starts(row, columns)
        return starts[shapely.intersects(self.place, shapely.box(*self.ground.bounds_m(starts).T))]

    def read(self, row: int, columns: range) -> Iterator[RowImage | WindowBatch]:
        starts = self.meeting(row, columns)
        if not len(starts):
            return
        tile = self.plan.tile_px
        left, right = int(starts[0, 0]), int(starts[-1, 0]) + tile
        bounds = PixelBounds(left, int(starts[0, 1]), right, int(starts[0, 1]) + tile)
        pixels = None
        trust = np.ones(len(starts), np.float32)
        if self.ground.image is None:
            yield RowImage(bounds, np.ones((tile, bounds.width), bool))
        else:
            pixels, valid = self.ground.image.read(self.ground.projection, bounds)
            yield RowImage(bounds, valid)
            columns_with = np.concatenate([[0], np.cumsum(valid.sum(axis=0))])
            first = starts[:, 0] - left
            trust = ((columns_with[first + tile] - columns_with[first]) / tile**2).astype(np.float32)
            starts, trust = starts[trust > 0], trust[trust > 0]
        if not len(starts):
            return
        graphs = self.ground.graphs(starts)
        for begin in range(0, len(starts), self.batch_size):
            rows = np.arange(begin, min(begin + self.batch_size, len(starts)))
            images = None
            if pixels is not None:
                windows = np.lib.stride_tricks.sliding_window_view(pixels, tile, axis=2)  # (C, tile, W', tile)
                chosen = windows[:, :, starts[rows, 0] - left]  # (C, tile, B, tile)
                images = torch.from_numpy(np.ascontiguousarray(chosen.transpose(2, 0, 1, 3)))
            yield WindowBatch(starts[rows], images, None if graphs is None else graphs.batch(rows), trust[rows])
