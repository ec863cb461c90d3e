"""A city in square blocks of tiles: each is built alone, in bounded memory, into one part of the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.geometry import Grid, PixelBounds
from rsosm_cli.memory import arrow_keeps_nothing, give_back, keep_little
from rsosm_cli.settings import BuildSettings
from rsosm_cli.tiles.parts import image_part, write_part

# A block is about this many pixels wide: 32 x 32 tiles of 224 pixels, so that elements on its edges are few against
# those inside.
_BLOCK_PX = 32 * 224
_MOST_TILES = 32
# A strip of a crowded block begins with the row of tiles in which this many objects are full. An object and its edges
# take about 5 kB while they are built, the libraries 200 MB.
_MOST_OBJECTS = 8_000
# Resampled image kept while the rows of a block are read: a row of 32 tiles takes 15 MB.
_IMAGE_CACHE_MB = 64


@dataclass(frozen=True)
class Block:
    """What a worker needs to build one part; small enough to send."""

    part: Path
    grid: Grid  # the tiles of this block
    osm: Path
    imagery: Path | None
    settings: BuildSettings

    def __len__(self) -> int:
        return len(self.grid)


def split(grid: Grid, osm: Path | None = None) -> list[Grid]:
    """Return the blocks of a grid, in reading order, the tiles within each in reading order.

    With the element file ``osm`` a block that is crowded is cut into strips of whole rows, so that memory does not grow
    with the density of a city either. The order of the tiles is the same.
    """
    side = int(np.clip(_BLOCK_PX // grid.tile_px, 1, _MOST_TILES))
    block = grid.cells // side
    order = np.lexsort((grid.cells[:, 0], grid.cells[:, 1], block[:, 0], block[:, 1]))
    cells, block = grid.cells[order], block[order]
    ends = (block[1:] != block[:-1]).any(axis=1)
    if osm is not None:
        row = np.r_[0, np.cumsum(ends | (cells[1:, 1] != cells[:-1, 1]))]  # of tiles within a block
        crowd = _crowd(grid, osm, cells, row)
        first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        before = np.cumsum(crowd) - crowd
        of_block = np.r_[0, np.cumsum(ends)][first]
        before -= before[np.searchsorted(of_block, of_block)]
        strip = before // _MOST_OBJECTS
        ends = ends | (strip[row[1:]] != strip[row[:-1]])
    cuts = np.flatnonzero(ends) + 1
    return [Grid(grid.projection, grid.tile_px, grid.stride_px, part) for part in np.split(cells, cuts)]


def _crowd(grid: Grid, osm: Path, cells: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many objects have their middle in the tiles of each of the rows that ``row`` (T,) numbers."""
    from rsosm_cli.osm.elements import element_middles

    corner = cells.min(axis=0)
    width, height = (cells.max(axis=0) - corner + 1).tolist()
    place = (cells - corner) @ [1, width]
    ranked = np.argsort(place)
    step = grid.stride_px * grid.projection.gsd_m
    counts = np.zeros(row[-1] + 1, np.int64)
    for middles in element_middles(osm, grid.projection.crs):
        at = np.floor(middles / [step, -step]).astype(np.int64) - corner
        at = at[((at >= 0) & (at < [width, height])).all(axis=1)] @ [1, width]
        found = np.searchsorted(place, at, sorter=ranked)
        tile = ranked[np.minimum(found, len(ranked) - 1)]
        counts += np.bincount(row[tile[place[tile] == at]], minlength=len(counts))
    # Tiles that overlap have each object several times.
    return counts * round((grid.tile_px / grid.stride_px) ** 2)


def build_block(block: Block) -> int:
    """Build the part of a block and return how many tiles it has. Images first: the graphs' file says "finished"."""
    keep_little()
    _build(block)
    give_back()
    return len(block)


def _build(block: Block) -> None:
    from rsosm_cli.graph.builder import build_graphs
    from rsosm_cli.graph.vocabulary import Vocabulary
    from rsosm_cli.osm.elements import read_elements

    grid, settings = block.grid, block.settings
    share = np.zeros(len(grid), np.float32)
    if block.imagery is not None:
        share = _write_images(block)
    bounds = grid.bounds_m()
    # A shifted element can come from beyond the tiles.
    reach = settings.graph.perturb.shift_m
    west, south = bounds[:, :2].min(axis=0) - reach
    east, north = bounds[:, 2:].max(axis=0) + reach
    with arrow_keeps_nothing():
        elements = read_elements(block.osm, grid.projection.crs, (float(west), float(south), float(east), float(north)))
    vocabulary = Vocabulary.of(elements, settings.graph.tags)
    built = build_graphs(elements, bounds, settings.graph, vocabulary)
    write_part(
        block.part,
        built.graphs,
        list(zip(vocabulary.tags, vocabulary.keys, strict=True)),
        cells=grid.cells,
        bounds_m=bounds,
        image_share=share,
        numbers={name: found for name, found in built.numbers.items() if name != "elements"},
    )


def _write_images(block: Block) -> NDArray[np.float32]:
    """Write the images of a block's tiles, a row of the grid at a time; return the share of each that is image."""
    from rsosm_cli.imagery.reader import ImageReader

    assert block.imagery is not None
    grid = block.grid
    n_bands, side = len(block.settings.bands), grid.tile_px
    shares = []
    with (
        image_part(block.part, len(grid), (n_bands, side, side)) as part,
        ImageReader(block.imagery, block.settings.bands, cache_mb=_IMAGE_CACHE_MB) as reader,
    ):
        for strip in _strips(grid):
            bounds = PixelBounds(*strip[0, :2].tolist(), *strip[-1, 2:].tolist())
            image, valid = reader.read(grid.projection, bounds)
            starts = strip[:, 0] - bounds.col_min
            # (C, H, W - side + 1, side) views of every position, of which the tiles' are taken.
            tiles = np.lib.stride_tricks.sliding_window_view(image, side, axis=2)[:, :, starts].transpose(2, 0, 1, 3)
            there = np.lib.stride_tricks.sliding_window_view(valid, side, axis=1)[:, starts]
            part.append(tiles)
            shares.append(there.mean(axis=(0, 2), dtype=np.float64))
    return np.concatenate(shares).astype(np.float32)


def _strips(grid: Grid) -> Iterator[NDArray[np.int64]]:
    """Yield the pixel bounds (n, 4) of the tiles of each row of the grid."""
    bounds = grid.bounds_px()
    for _, places in groupby(range(len(grid)), key=grid.cells[:, 1].tolist().__getitem__):
        yield bounds[list(places)]
