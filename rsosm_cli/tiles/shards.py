"""Many ``tiles.h5`` as one data set: one numbering of tiles, one tag table, a few open files at a time."""

from __future__ import annotations

import glob
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import MissingError, NoFileError, UsageError
from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.settings import GraphSettings
from rsosm_cli.tiles import ragged
from rsosm_cli.tiles.store import TileStore

# Stores kept open: well under the 1,024 file descriptors that most systems allow, with several workers' sockets.
_MAX_OPEN = 64
# Tiles whose tags are read at a time while counting.
_COUNT_CHUNK = 4096


def find_stores(items: Sequence[str | Path]) -> list[Path]:
    """Return the stores that ``items`` name: a ``tiles.h5``, a folder that holds some, a pattern, a text file.

    A text file has one a line, relative to it; empty lines and lines that start with ``#`` are skipped. Raises
    :class:`MissingError` where an item names nothing.
    """
    found: dict[Path, None] = {}
    for item in items:
        for path in _expand(Path(item)):
            found.setdefault(path.resolve())
    return list(found)


def _expand(item: Path) -> Iterator[Path]:
    if item.suffix == ".txt" and item.is_file():
        for line in item.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield from _expand(item.parent / line.strip())
        return
    if item.is_dir():
        paths = sorted(item.rglob("tiles.h5")) or sorted(item.glob("*.h5"))
    elif item.is_file():
        paths = [item]
    else:
        paths = sorted(Path(p) for p in glob.glob(str(item), recursive=True))
    if not paths:
        named = not glob.has_magic(str(item)) and not item.exists()
        raise (NoFileError if named else MissingError)(
            f"There is no tile store at {item}.",
            hint="Build one with `rsosm build-graph`, or give another path.",
            path=str(item),
        )
    yield from paths


@dataclass(frozen=True)
class _Shard:
    path: Path
    table: NDArray[np.int32]  # the store's tag id -> id in the united table


class TileShards:
    """Tiles of several stores, numbered store after store.

    Memory does not grow with images or graphs: stores are opened when asked for and at most 64 stay open. Pickled
    (for spawned workers) and forked it carries paths alone and opens its own files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise MissingError("No tile store was given.", hint="Build one with `rsosm build-graph --city NAME`.")
        first = TileStore.open(paths[0])
        self.tile_px: int = first.tile_px
        self.gsd_m: float = _gsd(first)
        self.bands: tuple[int, ...] = tuple(first.bands)
        self.vector_width: int = first.vector_width  # of ready node vectors; 0: nodes carry tags
        self.graph_settings: GraphSettings = first.settings.graph
        stores = [first, *(TileStore.open(path) for path in paths[1:])]
        for store, path in zip(stores, paths, strict=True):
            self._check(store, path, paths[0])
        self.grounds = [Ground(store.crs, store.bounds_m, tuple(store.names)) for store in stores]
        self.provenance: list[dict[str, Any]] = [store.provenance for store in stores]
        # One text may be of two keys (`a:b` = `c` and `a` = `b:c`): the longer one wins, as within a store.
        keys: dict[str, str] = {}
        for store in stores:
            for tag, key in zip(store.tags, store.tag_keys, strict=True):
                if len(key) > len(keys.get(tag, "")):
                    keys[tag] = key
        self.tags: list[str] = sorted(keys)
        self.tag_keys: list[str] = [keys[tag] for tag in self.tags]
        number = {tag: i for i, tag in enumerate(self.tags)}
        self._shards = [
            _Shard(Path(path), np.array([number[tag] for tag in store.tags], dtype=np.int32))
            for path, store in zip(paths, stores, strict=True)
        ]
        self._starts = ragged.offsets_of(np.array([len(store) for store in stores]))
        self.image_share = np.concatenate([store.image_share for store in stores])  # (T,)
        self.n_objects = np.concatenate([store.n_objects for store in stores])  # (T,)
        self._open: OrderedDict[int, TileStore] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Neither the open files nor the bounds are of use to a worker.
        return {**self.__dict__, "_open": OrderedDict(), "grounds": []}

    @property
    def paths(self) -> list[Path]:
        return [s.path for s in self._shards]

    def images(self, tiles: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return (B, C, H, W) of ``tiles``, in their order."""
        out = np.empty((len(tiles), len(self.bands), self.tile_px, self.tile_px), dtype=np.uint8)
        for shard, places, local in self._by_shard(tiles):
            out[places] = self._store(shard).images(local)
        return out

    def graphs(self, tiles: NDArray[np.int64]) -> GraphArrays:
        """Return the graphs of ``tiles``, in their order, with tags of the united table."""
        parts, order = [], []
        for shard, places, local in self._by_shard(tiles):
            parts.append(ragged.with_tags(self._store(shard).graphs(local), self._shards[shard].table))
            order.append(places)
        joined = ragged.join(parts)
        return joined if len(parts) == 1 else ragged.take_tiles(joined, np.argsort(np.concatenate(order)))

    def tag_counts(self, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how often each tag of the united table occurs on ``tiles`` (an object counts once a tile)."""
        counts = np.zeros(len(self.tags), dtype=np.int64)
        for start in range(0, len(tiles), _COUNT_CHUNK):
            graphs = self.graphs(tiles[start : start + _COUNT_CHUNK])
            for name in NODE_TYPES:
                counts += np.bincount(graphs.nodes[name].tag_ids, minlength=len(self.tags))
        return counts

    def _by_shard(self, tiles: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (shard, places in ``tiles``, tile numbers within the shard)."""
        shards = np.searchsorted(self._starts, tiles, side="right") - 1
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            yield int(shard), places, tiles[places] - self._starts[shard]

    def _store(self, shard: int) -> TileStore:
        store = self._open.pop(shard, None) or TileStore.open(self._shards[shard].path)
        self._open[shard] = store
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)
        return store

    def _check(self, store: TileStore, path: Path, first: Path) -> None:
        for what, ours, theirs in (
            ("tiles of {} pixels", self.tile_px, store.tile_px),
            ("a GSD of {} m", self.gsd_m, _gsd(store)),
            ("the bands {}", self.bands, tuple(store.bands)),
            ("node vectors of width {}", self.vector_width, store.vector_width),
        ):
            if ours != theirs:
                raise UsageError(
                    f"{path} has {what.format(theirs)}, and {first} has {what.format(ours)}: one training needs one.",
                    hint="Build both with the same settings, or name the stores that belong together.",
                )


def _gsd(store: TileStore) -> float:
    """Metres a pixel; of chips that differ, what the settings say."""
    return store.settings.grid.gsd if store.gsd_m is None else store.gsd_m


@dataclass(frozen=True)
class Ground:
    """Where the tiles of one store lie."""

    crs: str
    bounds_m: NDArray[np.float64]  # (T, 4) west, south, east, north
    names: tuple[str, ...] = ()  # (T,) of chips


def key_counts(shards: TileShards, tiles: NDArray[np.int64]) -> dict[str, int]:
    """Return how often each tag key occurs on ``tiles``, over all stores (an object counts once a tile)."""
    keys, inverse = np.unique(np.array(shards.tag_keys, dtype=np.str_), return_inverse=True)
    summed = np.bincount(inverse, shards.tag_counts(tiles), minlength=len(keys)).astype(np.int64)
    return dict(zip(keys.tolist(), summed.tolist(), strict=True))
