"""How fast a store is read: ``python benchmarks/store_read.py TILES_H5``.

Against the same graphs as PyTorch Geometric files, one ``.pt`` a tile with 512-float node vectors: a random tile from
the store (graph and vectors) against ``torch.load``; a batch of 256 random tiles against ``Batch.from_data_list`` of
graphs already in memory; and the sizes. Medians of interleaved rounds of one run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Batch, HeteroData

from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.tiles.batch import to_hetero
from rsosm_cli.tiles.store import TileStore

WIDTH = 512
BATCH = 256


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def plain(data: HeteroData) -> HeteroData:
    """Return a copy with the tensors of a tile alone, as a collection of files would hold them."""
    out = HeteroData()
    for name in NODE_TYPES:
        out[name].x, out[name].pos = data[name].x.clone(), data[name].pos.clone()
    for edge in data.edge_types:
        out[edge].edge_index, out[edge].edge_attr = data[edge].edge_index.clone(), data[edge].edge_attr.clone()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = TileStore.open(options.store)
    rng = np.random.default_rng(0)
    vectors = torch.randn(len(store.tags), WIDTH)
    weights = torch.rand(len(store.tags)) + 0.1
    filled = np.flatnonzero(store.n_objects)
    tiles = rng.choice(filled, min(BATCH, len(filled)), replace=False)

    def read(chosen: Any) -> HeteroData:
        return to_hetero(store.graphs(chosen), vectors, weights)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = [plain(read([t])) for t in tiles]
        for i, graph in enumerate(graphs):
            torch.save(graph, folder / f"{i}.pt")
        times: dict[str, list[float]] = {"load": [], "read": [], "arrays": [], "list": [], "batch": []}
        for _ in range(options.rounds):
            few = rng.integers(0, len(graphs), 40)
            theirs_first = seconds(lambda few=few: [torch.load(folder / f"{i}.pt", weights_only=False) for i in few])
            ours_first = seconds(lambda few=few: [read([tiles[i]]) for i in few])
            arrays = seconds(lambda few=few: [store.graphs([tiles[i]]) for i in few])
            times["arrays"].append(arrays / len(few))
            times["load"].append(theirs_first / len(few))
            times["read"].append(ours_first / len(few))
            times["list"].append(seconds(lambda: Batch.from_data_list(graphs)))
            times["batch"].append(seconds(lambda: read(tiles)))
            load, one, alone, collate, batch = (
                statistics.median(times[k]) * 1e3 for k in ("load", "read", "arrays", "list", "batch")
            )
        files = sum(p.stat().st_size for p in folder.glob("*.pt"))
    tensors = sum(
        t.numel() * t.element_size()
        for g in graphs
        for s in g.stores
        for t in s.values()
        if isinstance(t, torch.Tensor)
    )
    share = float(store.n_objects[tiles].sum()) / float(store.n_objects.sum())
    images = store.images([0]).nbytes * len(store) if store.has_images else 0
    size = (options.store.stat().st_size - images) * share
    print(f"{len(tiles)} tiles, {store.n_objects[tiles].sum():,} nodes")
    print(f"one tile:  torch.load {load:.2f} ms, store {one:.2f} ms, {load / one:.1f} x")
    print(f"           its arrays alone {alone:.2f} ms, {load / alone:.1f} x")
    print(f"batch:     from_data_list {collate:.0f} ms, store {batch:.1f} ms, {collate / batch:.1f} x")
    print(
        f"size:      .pt {files / 1e6:.1f} MB ({tensors / 1e6:.1f} MB of tensors), store {size / 1e6:.2f} MB,", end=" "
    )
    print(f"1/{files / size:.0f} (of the tensors alone 1/{tensors / size:.0f})")


if __name__ == "__main__":
    main()
