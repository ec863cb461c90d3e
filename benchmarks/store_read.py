"""How fast a store is read: ``python benchmarks/store_read.py TILES_H5``.

Against the same graphs as PyTorch Geometric files, one ``.pt`` a tile with 512-float node vectors: a random tile from
the store, graph and node vectors, as arrays and as ``HeteroData``, against ``torch.load``; a batch of 256 random tiles
against ``Batch.from_data_list`` of graphs already in memory; and the sizes. Medians of interleaved rounds of one run.

What bounds the batch is printed, too: the time that the machine takes to write as many vectors into memory that was
written before (as batches are, from the second on). Of crowded tiles a batch is nearly all vectors, which both ways
have to write: the ratio is highest where objects are few.

Each ratio is given twice: against files with every field that the store's ``HeteroData`` has ("all fields": the same
graphs), and against files with vectors, key points and edges alone ("bare": what GeoLink needs, without the areas,
lengths, envelopes, centroids and class codes that the other methods read from the store too).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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


FIELDS = {
    "all fields": ("x", "pos", "area", "length", "envelope", "centroid", "class_code", "edge_index", "edge_attr"),
    "bare": ("x", "pos", "edge_index", "edge_attr"),
}


def plain(data: HeteroData, fields: Sequence[str]) -> HeteroData:
    """Return a copy with the tensors of a tile alone, as a collection of files would hold them."""
    out = HeteroData()
    for key in (*NODE_TYPES, *data.edge_types):
        for field in fields:
            if field in data[key]:
                setattr(out[key], field, data[key][field].clone())
    return out


def size_of(graphs: Sequence[HeteroData]) -> int:
    """Return the bytes of all tensors."""
    values = (t for g in graphs for s in g.stores for t in s.values())
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))


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
        graphs = {label: [plain(read([t]), fields) for t in tiles] for label, fields in FIELDS.items()}
        for label, some in graphs.items():
            (folder / label).mkdir()
            for i, graph in enumerate(some):
                torch.save(graph, folder / label / f"{i}.pt")
        n_nodes = int(store.n_objects[tiles].sum())
        used = np.ones((n_nodes, WIDTH), np.float32)
        times: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            few = rng.integers(0, len(tiles), 40)

            def each(call: Callable[[int], Any], few: NDArray[np.int64] = few) -> float:
                return seconds(lambda: [call(i) for i in few.tolist()]) / len(few)

            spent = {
                "read": each(lambda i: read([tiles[i]])),
                "arrays": each(lambda i: with_vectors(store.graphs([tiles[i]]))),
                "batch": seconds(lambda: read(tiles)),
                "fill": seconds(lambda: used.fill(0.0)),
            }
            for label, some in graphs.items():
                files = [folder / label / f"{i}.pt" for i in range(len(some))]
                spent[f"load {label}"] = each(lambda i, files=files: torch.load(files[i], weights_only=False))
                spent[f"list {label}"] = seconds(lambda some=some: Batch.from_data_list(some))
            for name, value in spent.items():
                times.setdefault(name, []).append(value * 1e3)
        ms = {name: statistics.median(values) for name, values in times.items()}
        files_of = {label: sum(p.stat().st_size for p in (folder / label).glob("*.pt")) for label in graphs}
    share = float(store.n_objects[tiles].sum()) / float(store.n_objects.sum())
    images = store.images([0]).nbytes * len(store) if store.has_images else 0
    size = (options.store.stat().st_size - images) * share
    one, arrays, batch, fill = ms["read"], ms["arrays"], ms["batch"], ms["fill"]
    print(f"{len(tiles)} tiles, {n_nodes:,} nodes")
    print(f"store:  one tile {one:.2f} ms as HeteroData ({arrays:.2f} ms as arrays with vectors), batch {batch:.1f} ms")
    print(f"        {n_nodes * WIDTH * 4 / 1e6:.0f} MB of vectors of the batch alone take {fill:.1f} ms to write")
    for label, some in graphs.items():
        load, collate, files, tensors = ms[f"load {label}"], ms[f"list {label}"], files_of[label], size_of(some)
        print(f"files with {label}:")
        print(
            f"  one tile: torch.load {load:.2f} ms, {load / one:.1f} x as HeteroData, {load / arrays:.1f} x as arrays"
        )
        print(f"  batch:    from_data_list {collate:.0f} ms, {collate / batch:.1f} x (no more than", end=" ")
        print(f"{collate / fill:.0f} x is possible)")
        print(
            f"  size:     .pt {files / 1e6:.1f} MB ({tensors / 1e6:.1f} MB of tensors), store {size / 1e6:.2f} MB,",
            end=" ",
        )
        print(f"1/{files / size:.1f} (of the tensors alone 1/{tensors / size:.1f})")


if __name__ == "__main__":
    main()
