"""Many stores as one data set: finding, joining, dividing, loading."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tile_stores import make_store

from rsosm_cli.errors import MissingError, NoFileError, UsageError
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.settings import AugmentSettings
from rsosm_cli.tiles import shards as shards_module
from rsosm_cli.tiles.dataset import Part, PretrainBatches, TileBatch, divide, loader
from rsosm_cli.tiles.shards import Ground, TileShards, find_stores, key_counts
from rsosm_cli.tiles.store import TileStore


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    return [
        make_store(folder / "a" / "tiles.h5", side=6, tags=["building:yes", "landuse:forest", "shop:bakery"]),
        make_store(
            folder / "b" / "tiles.h5", side=5, seed=1, tags=["amenity:cafe", "building:yes"], origin=(50, 0),
            without_image=3, without_objects=2,
        ),
    ]  # fmt: skip


def test_stores_are_found_by_folder_pattern_and_text_file(two_stores: list[Path], tmp_path: Path) -> None:
    folder = two_stores[0].parents[1]
    assert find_stores([folder]) == two_stores
    assert find_stores([str(folder / "*" / "tiles.h5")]) == two_stores
    text = tmp_path / "cities.txt"
    text.write_text(f"# all\n{two_stores[1]}\n\n{two_stores[0]}\n{two_stores[1]}\n")
    assert find_stores([text]) == two_stores[::-1]
    with pytest.raises(NoFileError, match="no tile store"):
        find_stores([tmp_path / "none" / "tiles.h5"])
    with pytest.raises(MissingError, match="no tile store"):
        find_stores([str(tmp_path / "*" / "none.h5")])


def test_tiles_of_two_stores_are_what_each_has(two_stores: list[Path]) -> None:
    shards = TileShards(two_stores)
    stores = [TileStore.open(path) for path in two_stores]
    tiles = np.array([40, 3, 37, 0])  # from both, not in order
    assert shards.tags == ["amenity:cafe", "building:yes", "landuse:forest", "shop:bakery"]
    places = ((stores[1], 4), (stores[0], 3), (stores[1], 1), (stores[0], 0))
    np.testing.assert_array_equal(shards.images(tiles), np.concatenate([s.images([t]) for s, t in places]))
    seen = shards.graphs(tiles)
    for place, (store, tile) in enumerate(places):
        own = store.graphs([tile])
        for name in NODE_TYPES:
            n, o = seen.nodes[name], own.nodes[name]
            here = slice(n.offsets[place], n.offsets[place + 1])
            np.testing.assert_array_equal(n.key_points[here], o.key_points)
            tags = n.tag_ids[n.tag_offsets[here.start] : n.tag_offsets[here.stop]]
            assert [shards.tags[i] for i in tags] == [store.tags[i] for i in o.tag_ids]


def test_key_counts_are_summed_over_stores_and_over_the_tiles_asked_for(two_stores: list[Path]) -> None:
    shards = TileShards(two_stores)
    stores = [TileStore.open(path) for path in two_stores]
    counts = key_counts(shards, np.arange(len(shards)))
    by_tag = [dict(zip(s.tags, s.tag_counts.tolist(), strict=True)) for s in stores]
    assert counts["building"] == sum(c["building:yes"] for c in by_tag)
    assert counts["amenity"] == by_tag[1]["amenity:cafe"]
    assert sum(key_counts(shards, np.arange(36)).values()) == stores[0].tag_counts.sum()


def test_few_files_stay_open(two_stores: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN", 1)
    shards = TileShards(two_stores)
    shards.images(np.array([0, 40, 1, 41]))
    assert len(shards._open) == 1


def test_stores_that_do_not_belong_together_are_refused(two_stores: list[Path], tmp_path: Path) -> None:
    other = make_store(tmp_path / "tiles.h5", side=2, tile_px=48)
    with pytest.raises(UsageError, match="tiles of 48 pixels"):
        TileShards([two_stores[0], other])


def test_held_out_tiles_are_whole_blocks_and_share_no_ground_with_training(two_stores: list[Path]) -> None:
    shards = TileShards(two_stores)
    division = divide(shards, 0.2, seed=0)
    assert division.without_image == 3
    held = np.concatenate([g.bounds_m for g in shards.grounds])[division.holdout]
    train = np.concatenate([g.bounds_m for g in shards.grounds])[division.train]
    overlap = (held[:, None, :2] < train[None, :, 2:] - 1e-6) & (train[None, :, :2] < held[:, None, 2:] - 1e-6)
    assert not overlap.all(axis=2).any()
    share = len(division.holdout) / (len(division.holdout) + len(division.train))
    assert 0.05 < share < 0.5
    assert divide(shards, 0.2, seed=0).holdout.tolist() == division.holdout.tolist()
    assert not len(divide(shards, 0.0, seed=0).holdout)


def test_tiles_that_overlap_held_out_ground_are_in_neither_part(tmp_path: Path) -> None:
    # The same ground twice, the second time shifted by half a tile.
    first = make_store(tmp_path / "a.h5", side=9)
    shifted = make_store(tmp_path / "b.h5", side=9)
    shards = TileShards([first, shifted])
    shards.grounds[1] = Ground(shards.grounds[1].crs, shards.grounds[1].bounds_m + 8.0)
    division = divide(shards, 0.2, seed=1)
    assert division.beside_holdout > 0
    bounds = np.concatenate([g.bounds_m for g in shards.grounds])
    held, train = bounds[division.holdout], bounds[division.train]
    overlap = (held[:, None, :2] < train[None, :, 2:] - 1e-6) & (train[None, :, :2] < held[:, None, 2:] - 1e-6)
    assert not overlap.all(axis=2).any()


def batches_of(paths: list[Path], part: Part | None = None) -> PretrainBatches:
    shards = TileShards(paths)
    train = divide(shards, 0.1, 0).train
    return PretrainBatches(
        shards, train, batch_size=8, size=32, augment=AugmentSettings(), seed=4, part=part
    )  # fmt: skip


def same(a: TileBatch, b: TileBatch) -> bool:
    return (
        torch.equal(a.samples, b.samples)
        and torch.equal(a.images, b.images)
        and all(np.array_equal(a.graphs.nodes[t].key_points, b.graphs.nodes[t].key_points) for t in NODE_TYPES)
    )


def test_an_epoch_shows_each_tile_at_most_once_and_ranks_share_a_batch(two_stores: list[Path]) -> None:
    whole = batches_of(two_stores)
    parts = [batches_of(two_stores, Part(rank, 2)) for rank in range(2)]
    seen = np.concatenate([whole.samples(0, step) for step in range(whole.steps)])
    assert len(set(seen.tolist())) == len(seen) >= len(whole.tiles) - 8
    for step in range(whole.steps):
        shared = np.concatenate([part.samples(1, step) for part in parts])
        np.testing.assert_array_equal(shared, whole.samples(1, step))


@pytest.mark.parametrize(("start_method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_give_what_the_main_process_gives(two_stores: list[Path], start_method: str, workers: int) -> None:
    batches = batches_of(two_stores)
    batches.shards.images(np.array([0]))  # open a store first: a worker must not depend on it
    alone = [batches[divmod(step, batches.steps)] for step in range(3, 2 * batches.steps)]
    found = list(loader(batches, epochs=2, start=3, workers=workers, start_method=start_method))
    assert len(found) == len(alone)
    assert all(same(a, b) for a, b in zip(alone, found, strict=True))


def test_a_pickled_data_set_carries_no_tiles(two_stores: list[Path]) -> None:
    batches = batches_of(two_stores)
    assert len(pickle.dumps(batches)) < 20_000
