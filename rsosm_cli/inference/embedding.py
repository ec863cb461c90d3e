"""The loop of `embed`: tiles from a store or straight from the ground, encodings in blocks that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import HeteroData

from rsosm_cli.geometry import Grid, PixelBounds
from rsosm_cli.inference.ground import Ground
from rsosm_cli.inference.prefetch import prefetched
from rsosm_cli.inference.tags import TagTable
from rsosm_cli.models.checkpoint import Description
from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.tiles.augment import normalise, view_images, whole_views
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.tiles.tags import TagInputs
from rsosm_cli.workspace import atomic

# Tiles of a block: what an interruption costs at most, and what memory holds. Patch maps are a thousand times larger.
BLOCK, BLOCK_WITH_MAPS = 1024, 64


@dataclass(frozen=True)
class Tiles:
    """Tiles for one forward pass."""

    images: Tensor | None  # (B, C, H, W) uint8
    image_share: NDArray[np.float32]  # (B,)
    graphs: HeteroData
    n_objects: NDArray[np.int64]  # (B,)


class TileSource(Protocol):
    """Where tiles come from. ``bounds_m`` (T, 4), ``cells`` (T, 2)."""

    crs: str
    bounds_m: NDArray[np.float64]
    cells: NDArray[np.int64]
    has_images: bool

    def read(self, rows: NDArray[np.int64]) -> Tiles: ...


class StoreTiles:
    """The tiles of a ``tiles.h5``, resized to the checkpoint's tile where theirs is another."""

    def __init__(self, store: TileStore, table: TagTable, tile_px: int) -> None:
        self.store, self.table, self.tile_px = store, table, tile_px
        self.crs, self.bounds_m, self.cells = store.crs, store.bounds_m, store.cells
        self.has_images = bool(store.has_images)
        self._inputs: TagInputs | None = None

    def read(self, rows: NDArray[np.int64]) -> Tiles:
        if self._inputs is None:  # of imported graphs with ready vectors, the store has no tags
            self._inputs = self.table.of(tuple(self.store.tags))
        graphs = self._inputs.batch(self.store.graphs(rows))
        images = None
        if self.has_images:
            views = whole_views(len(rows), self.store.tile_px)
            images = view_images(self.store.images(rows), views, self.tile_px)
        return Tiles(images, self.store.image_share[rows], graphs, self.store.n_objects[rows])


class GroundTiles:
    """The tiles of a grid, cut from imagery and elements as they are asked for."""

    def __init__(self, grid: Grid, ground: Ground) -> None:
        self.grid, self.ground = grid, ground
        self.crs, self.cells = grid.projection.crs, grid.cells
        self.bounds_m = grid.bounds_m()
        self._bounds_px = grid.bounds_px()
        self.has_images = ground.image is not None

    def read(self, rows: NDArray[np.int64]) -> Tiles:
        boxes = self._bounds_px[rows]
        images, share = None, np.zeros(len(rows), np.float32)
        if self.ground.image is not None:
            read = [self.ground.image.read(self.grid.projection, PixelBounds(*box)) for box in boxes.tolist()]
            images = torch.from_numpy(np.stack([image for image, _ in read]))
            share = np.array([valid.mean() for _, valid in read], np.float32)
        graphs = self.ground.graphs(boxes[:, :2])
        assert graphs is not None
        nodes = graphs.arrays.nodes.values()
        objects = np.sum([np.diff(n.offsets) for n in nodes], axis=0).astype(np.int64)
        return Tiles(images, share, graphs.batch(np.arange(len(rows))), objects)


@dataclass(frozen=True)
class Encoder:
    """The encoder of a checkpoint on a device."""

    model: TileEncoder
    description: Description
    device: torch.device
    patch_maps: bool = False
    precision: Literal["32", "bf16"] = "32"

    @torch.inference_mode()
    def encode(self, tiles: Tiles) -> dict[str, NDArray[Any]]:
        """Return the encodings of the tiles; NaN where a tile has no image."""
        d = self.description
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        if tiles.images is None:
            with cast:
                found = self.model.encode(None, tiles.graphs)
            return {"osm": _host(found.osm)}
        mean, std = (torch.tensor(v, device=self.device) for v in (d.mean, d.std))
        images = normalise(tiles.images.to(self.device), mean, std)
        with cast:
            found = self.model.encode(images, tiles.graphs, maps=self.patch_maps, gsd_m=d.gsd)
        out = {name: _host(getattr(found, name)) for name in self.model.MODALITIES}
        if self.patch_maps:
            maps = [name for name in ("image_map", "fused_map") if getattr(found, name) is not None]
            out |= {name: _host(getattr(found, name), np.float16) for name in maps}
        blind = tiles.image_share == 0
        for name, values in out.items():
            if name != "osm":
                values[blind] = np.nan
        return out


def _host(values: Tensor | None, dtype: type[np.floating] = np.float32) -> NDArray[np.floating]:
    assert values is not None
    return values.float().cpu().numpy().astype(dtype)


def embed_blocks(
    source: TileSource, encoder: Encoder, folder: Path, *, batch_size: int,
    on_tiles: Callable[[int], None] = lambda tiles: None,
) -> list[Path]:  # fmt: skip
    """Encode the tiles block by block into ``folder``, leaving out blocks that are there; return all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    size = BLOCK_WITH_MAPS if encoder.patch_maps else BLOCK
    total = len(source.bounds_m)
    starts = list(range(0, total, size))
    files = [folder / f"block-{start:09d}.npz" for start in starts]
    missing = [(start, file) for start, file in zip(starts, files, strict=True) if not file.exists()]
    on_tiles(total - sum(min(size, total - start) for start, _ in missing))

    def batches() -> Iterator[tuple[Path, bool, Tiles]]:
        for start, file in missing:
            stop = min(start + size, total)
            for begin in range(start, stop, batch_size):
                end = min(begin + batch_size, stop)
                yield file, end == stop, source.read(np.arange(begin, end))

    gathered: list[dict[str, NDArray[Any]]] = []
    for file, last, tiles in prefetched(batches):
        seen: dict[str, NDArray[Any]] = {"image_share": tiles.image_share, "n_objects": tiles.n_objects}
        gathered.append({**encoder.encode(tiles), **seen})
        on_tiles(len(tiles.image_share))
        if last:
            with atomic(file) as part, part.open("wb") as stream:
                np.savez(stream, **{k: np.concatenate([g[k] for g in gathered]) for k in gathered[0]})  # type: ignore[arg-type]
            gathered = []
    return files
