"""How fast a store is read: ``python benchmarks/store_read.py TILES_H5``.

Against the same graphs as PyTorch Geometric files, one ``.pt`` a tile with 512-float node vectors: a random tile from
the store, graph and node vectors, as arrays and as ``HeteroData``, against ``torch.load``; a batch of 256 random tiles
against ``Batch.from_data_list`` of graphs already in memory, and what bounds it: the time that the machine takes to
write as many fresh vectors; and the sizes. Medians of interleaved rounds of one run.
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
from numpy.typing import NDArray
from torch_geometric.data import Batch, HeteroData

from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.tiles.batch import mean_vectors, to_hetero
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

    def with_vectors(graph: GraphArrays) -> tuple[GraphArrays, torch.Tensor]:
        nodes = [graph.nodes[name] for name in NODE_TYPES]
        counts = np.concatenate([n.tag_offsets[1:] - n.tag_offsets[:-1] for n in nodes])
        return graph, mean_vectors(np.concatenate([n.tag_ids for n in nodes]), counts, vectors, weights)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = [plain(read([t])) for t in tiles]
        for i, graph in enumerate(graphs):
            torch.save(graph, folder / f"{i}.pt")
        n_nodes = int(store.n_objects[tiles].sum())
        times: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            few = rng.integers(0, len(graphs), 40)

            def each(call: Callable[[int], Any], few: NDArray[np.int64] = few) -> float:
                return seconds(lambda: [call(i) for i in few.tolist()]) / len(few)

            for name, spent in (
                ("load", each(lambda i: torch.load(folder / f"{i}.pt", weights_only=False))),
                ("read", each(lambda i: read([tiles[i]]))),
                ("arrays", each(lambda i: with_vectors(store.graphs([tiles[i]])))),
                ("list", seconds(lambda: Batch.from_data_list(graphs))),
                ("batch", seconds(lambda: read(tiles))),
                ("fill", seconds(lambda: torch.empty(n_nodes, WIDTH).fill_(0.0))),
            ):
                times.setdefault(name, []).append(spent * 1e3)
        load, one, arrays, collate, batch, fill = (statistics.median(v) for v in times.values())
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
    print(f"{len(tiles)} tiles, {n_nodes:,} nodes")
    print(f"one tile:  torch.load {load:.2f} ms, store {arrays:.2f} ms as arrays with vectors, {load / arrays:.1f} x")
    print(f"           {one:.2f} ms as HeteroData, {load / one:.1f} x")
    print(f"batch:     from_data_list {collate:.0f} ms, store {batch:.1f} ms, {collate / batch:.1f} x")
    print(f"           {n_nodes * WIDTH * 4 / 1e6:.0f} MB of fresh vectors take {fill:.1f} ms to write:", end=" ")
    print(f"no more than {collate / fill:.0f} x is possible")
    print(
        f"size:      .pt {files / 1e6:.1f} MB ({tensors / 1e6:.1f} MB of tensors), store {size / 1e6:.2f} MB,", end=" "
    )
    print(f"1/{files / size:.0f} (of the tensors alone 1/{tensors / size:.0f})")


if __name__ == "__main__":
    main()
