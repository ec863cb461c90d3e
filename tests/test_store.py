"""``tiles.h5`` and what is read from it: graphs as they were built, batches, ready graphs, damaged files."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import shapely
import torch
from torch_geometric.data import HeteroData

from rsosm_cli.errors import FormatError, MissingError
from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.builder import build_graphs
from rsosm_cli.graph.schema import EDGE_WIDTHS, KEY_POINTS, NODE_TYPES
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.osm.elements import Elements
from rsosm_cli.settings import BuildSettings
from rsosm_cli.tiles import batch, rooms
from rsosm_cli.tiles.batch import to_hetero
from rsosm_cli.tiles.checksums import check
from rsosm_cli.tiles.describe import describe
from rsosm_cli.tiles.parts import assemble, image_part, write_part
from rsosm_cli.tiles.ready import read_ready
from rsosm_cli.tiles.store import PAIRS, TileStore, edge_bytes, edge_numbers, pack_edges, unpack_edges

SETTINGS = BuildSettings.model_validate({"grid": {"tile": 16, "stride": 16, "gsd": 1.0}})
N_TILES = 12
BOUNDS = np.array([[16.0 * i, 0.0, 16.0 * i + 16, 16.0] for i in range(N_TILES)])


def make_elements(seed: int = 0, n: int = 60) -> Elements:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n).astype(np.uint8)
    at = rng.uniform((0, 0), (16.0 * (N_TILES - 2), 16), (n, 2))  # the last tile stays empty
    size = rng.uniform(0.5, 9, (n, 2))
    shapes = [
        (shapely.Point(p), shapely.LineString([p, p + s]), shapely.box(*p, *(p + s)))[k]
        for k, p, s in zip(kind, at, size, strict=True)
    ]
    tags = [{"building": str(i % 5), **({"amenity": "bank"} if i % 3 == 0 else {})} for i in range(n)]
    return Elements("EPSG:32629", (kind > 0).astype(np.uint8), np.arange(n), kind, tags, np.array(shapes, dtype=object))


def make_store(folder: Path, images: bool = True) -> tuple[Path, GraphArrays, Vocabulary, np.ndarray]:
    elements = make_elements()
    vocabulary = Vocabulary.of(elements, SETTINGS.graph.tags)
    graphs = build_graphs(elements, BOUNDS, SETTINGS.graph, vocabulary).graphs
    pixels = np.random.default_rng(1).integers(0, 256, (N_TILES, 3, 16, 16)).astype(np.uint8)
    parts = []
    for number, rows in enumerate(np.split(np.arange(N_TILES), [5])):  # two parts of different vocabularies
        part = folder / f"{number}.npz"
        own = build_graphs(elements, BOUNDS[rows], SETTINGS.graph, vocabulary).graphs
        if images:
            with image_part(part, len(rows), (3, 16, 16)) as writer:
                writer.append(pixels[rows])
        write_part(
            part, own, list(zip(vocabulary.tags, vocabulary.keys, strict=True)), cells=np.stack([rows, rows * 0], 1),
            bounds_m=BOUNDS[rows], image_share=np.ones(len(rows), np.float32), numbers={},
        )  # fmt: skip
        parts.append(part)
    assemble(
        folder / "tiles.h5", parts, settings=SETTINGS, crs="EPSG:32629", gsd_m=1.0, provenance={"city": "X"},
        has_images=images,
    )  # fmt: skip
    return folder / "tiles.h5", graphs, vocabulary, pixels


def assert_same(one: GraphArrays, other: GraphArrays) -> None:
    for name in NODE_TYPES:
        for field, value in vars(one.nodes[name]).items():
            theirs = getattr(other.nodes[name], field)
            assert (value is None) == (theirs is None)
            if value is not None:
                np.testing.assert_array_equal(value, theirs, err_msg=f"{name}.{field}")
                assert value.dtype == theirs.dtype, f"{name}.{field}"
    for pair, edges in one.edges.items():
        for field, value in vars(edges).items():
            np.testing.assert_array_equal(value, getattr(other.edges[pair], field))


def test_a_store_gives_back_what_was_built(tmp_path: Path) -> None:
    path, graphs, vocabulary, pixels = make_store(tmp_path)
    store = TileStore.open(path)
    assert (len(store), store.crs, store.gsd_m, store.tile_px, store.bands) == (12, "EPSG:32629", 1.0, 16, (1, 2, 3))
    assert store.settings == SETTINGS
    assert store.tags == list(vocabulary.tags)
    assert store.tag_keys == list(vocabulary.keys)
    assert_same(store.graphs(range(N_TILES)), graphs)
    np.testing.assert_array_equal(store.images([7, 2]), pixels[[7, 2]])
    counts = np.bincount(np.concatenate([graphs.nodes[n].tag_ids for n in NODE_TYPES]), minlength=len(store.tags))
    np.testing.assert_array_equal(store.tag_counts, counts)
    assert store.n_objects[-1] == 0
    assert sum(store.n_nodes.values()) == store.n_objects.sum()


def test_any_choice_of_tiles_is_those_tiles_in_that_order(tmp_path: Path) -> None:
    store = TileStore.open(make_store(tmp_path, images=False)[0])
    chosen = [3, 11, 0, 3]
    several = store.graphs(chosen)
    for place, tile in enumerate(chosen):
        alone = store.graphs([tile])
        for name in NODE_TYPES:
            nodes = several.nodes[name]
            here = slice(nodes.offsets[place], nodes.offsets[place + 1])
            np.testing.assert_array_equal(nodes.osm_id[here], alone.nodes[name].osm_id)
            np.testing.assert_array_equal(nodes.key_points[here], alone.nodes[name].key_points)
        for pair, edges in several.edges.items():
            here = slice(edges.offsets[place], edges.offsets[place + 1])
            np.testing.assert_array_equal(edges.index[:, here], alone.edges[pair].index)
    with pytest.raises(MissingError, match="no images"):
        store.images([0])


def test_a_store_travels_by_its_path(tmp_path: Path) -> None:
    store = TileStore.open(make_store(tmp_path)[0])
    text = pickle.dumps(store)
    assert len(text) < 500
    assert_same(pickle.loads(text).graphs([1]), store.graphs([1]))


@pytest.mark.parametrize("bits", [1, 6, 7, 9, 10, 11, 14, 15, 20, 26])
def test_edges_of_any_size_come_back_as_packed(bits: int) -> None:
    rng = np.random.default_rng(bits)
    index = rng.integers(0, 2**bits, (50, 2), dtype=np.int32)
    index[0] = 2**bits - 1
    relation = rng.integers(0, 8, 50).astype(np.uint8)
    packed = pack_edges(index, relation, bits)
    assert packed.shape == (50, edge_bytes(bits))
    assert packed.shape[1] * 8 >= 2 * bits + 3 > packed.shape[1] * 8 - 8
    size = packed.shape[1]
    back, column = unpack_edges(edge_numbers(packed, slice(None)), size, bits)
    some = rng.integers(0, 50, 70)
    few, few_columns = unpack_edges(edge_numbers(packed, some), size, bits)
    assert np.array_equal(few, back[:, some])
    assert np.array_equal(few_columns, column[some])
    assert np.array_equal(back.T, index)
    assert np.array_equal(column, relation)
    assert back.dtype == np.int32
    assert column.dtype == np.uint8


def test_edges_are_read_with_h5py_alone_as_documented(tmp_path: Path) -> None:
    path, graphs, *_ = make_store(tmp_path)
    tile, pair = 3, PAIRS.index(("polygon", "polygon"))
    with h5py.File(path) as f:
        a, b = f["edges/offsets"][pair, tile : tile + 2]
        packed, bits = f["edges/packed"][a:b], int(f.attrs["edge_bits"])
    number = packed @ (256 ** np.arange(packed.shape[1]))
    found = np.stack([number >> bits + 3, (number >> 3) % 2**bits, number % 8])
    edges = graphs.edges["polygon", "polygon"]
    here = slice(*edges.offsets[tile : tile + 2])
    assert b > a
    assert np.array_equal(found, np.concatenate([edges.index[:, here], edges.relation[None, here]]))


def test_what_is_no_store_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = make_store(tmp_path)[0]
    with pytest.raises(MissingError, match="no tile store"):
        TileStore.open(tmp_path / "none.h5")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="damaged"):
        TileStore.open(path)
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(FormatError, match="version 99"):
        TileStore.open(path)
    with h5py.File(path, "w"):
        pass
    with pytest.raises(FormatError, match="no tile store of rsosm"):
        TileStore.open(path)


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    path = make_store(tmp_path)[0]
    describe(path, images=True)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        found: list[str] = []
        file.visit(found.append)
        spans = {n: (file[n].id.get_offset(), file[n].nbytes) for n in found if isinstance(file[n], h5py.Dataset)}
    assert {"images", "edges/packed", "nodes/polygon", "tags/text"} < set(spans)
    text = whole.index(b"amenity:bank")
    for name, (offset, size) in spans.items():
        at = text if name == "tags/text" else offset + size // 2
        with path.open("r+b") as damaged:
            damaged.seek(at)
            damaged.write(bytes([whole[at] ^ 1]))
        with pytest.raises(FormatError, match=f"damaged.*{name} is not as it was written"):
            check(path, images=True)
        path.write_bytes(whole)
    # The images are compared only where that is asked for.
    offset, size = spans["images"]
    path.write_bytes(whole[: offset + 5] + bytes(size - 5) + whole[offset + size :])
    describe(path)
    with pytest.raises(FormatError, match="images is not"):
        describe(path, images=True)


def test_batch_joins_tiles_with_means_of_their_tags(tmp_path: Path) -> None:
    store = TileStore.open(make_store(tmp_path)[0])
    graphs = store.graphs([2, 11, 4])
    vectors = torch.randn(len(store.tags), 8, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(len(store.tags), dtype=torch.float32)  # the first tag weighs nothing
    data = to_hetero(graphs, vectors, weights)
    assert data.n_graphs == 3
    assert data.counts[1].sum() == 0
    for name in NODE_TYPES:
        nodes = graphs.nodes[name]
        for i in range(len(nodes.osm_id)):
            ids = torch.from_numpy(nodes.tag_ids[nodes.tag_offsets[i] : nodes.tag_offsets[i + 1]].astype(np.int64))
            w = weights[ids] if weights[ids].sum() > 0 else torch.ones(len(ids))
            torch.testing.assert_close(data[name].x[i], (w[:, None] * vectors[ids]).sum(0) / w.sum())
        assert data[name].pos.shape == (len(nodes.osm_id), KEY_POINTS[name], 2)
        assert (data[name].batch.diff() >= 0).all()
    for (a, b), width in EDGE_WIDTHS.items():
        index, attr = data[a, "to", b].edge_index, data[a, "to", b].edge_attr
        assert attr.shape == (index.shape[1], width)
        assert (attr.sum(1) == 1).all()
        assert (data[a].batch[index[0]] == data[b].batch[index[1]]).all()


def test_means_of_many_nodes_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n, n_tags = 4000, 300
    counts = rng.integers(0, 4, n)
    # Sets that come often, sets that come once, beginnings of other sets, none at all.
    tag_ids = np.concatenate([np.sort(rng.choice(12 if i % 2 else n_tags, c, False)) for i, c in enumerate(counts)])
    vectors = torch.randn(n_tags, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randint(0, 3, (n_tags,)).float()
    ids = tag_ids.astype(np.int32)
    few = batch.mean_vectors(ids, counts, vectors, weights)
    taken = np.split(ids, counts.cumsum()[:-1])
    nodes, same_as = batch._alike(ids, counts)
    assert all(np.array_equal(taken[nodes[s]], tags) for s, tags in zip(same_as, taken, strict=True))
    assert len({tuple(t) for t in taken}) <= len(nodes) < n / 2
    monkeypatch.setattr(batch, "LARGE_BYTES", 0)
    torch.testing.assert_close(batch.mean_vectors(ids, counts, vectors, weights), few, rtol=0, atol=0)
    none = np.zeros(0, np.int64)
    assert batch.mean_vectors(none.astype(np.int32), none, vectors, weights).shape == (0, 8)


def test_memory_is_used_again_only_when_nothing_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "LARGE_BYTES", 0)
    first = torch.from_numpy(rooms.room(4096).view(np.float32).reshape(-1, 4)).fill_(1)
    place, part = first.data_ptr(), first[3:5].T
    del first
    second = torch.from_numpy(rooms.room(4096)).fill_(9)
    assert second.data_ptr() != place
    assert (part == 1).all()
    del part
    assert torch.from_numpy(rooms.room(4000)).data_ptr() == place


def test_little_memory_lies_idle_however_batches_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "LARGE_BYTES", 0)
    rooms.release()
    tracemalloc.start()
    for size in range(12, 24):
        batches = [rooms.room(2**size) for _ in range(4)]
        del batches
    held, _ = tracemalloc.get_traced_memory()
    rooms.release()
    freed = held - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 4 * 2**23 <= freed <= 4 * (2**23 + 2**22) + 2**16  # the last two sizes, and no more of the ten before


class Intruder:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("intruded"),)  # type: ignore[return-value]


def released_graph() -> HeteroData:
    data = HeteroData()
    data["polygon"].x = torch.randn(3, 4 + 8)
    data["point"].x = torch.randn(2, 4 + 2)
    data["polygon", "to", "point"].edge_index = torch.tensor([[0, 2], [1, 0]])
    data["polygon", "to", "point"].edge_attr = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return data


def test_ready_graphs_of_pyg_are_read_without_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = released_graph()
    torch.save(data, tmp_path / "a.pt")
    graphs = read_ready(tmp_path / "a.pt")
    np.testing.assert_array_equal(graphs.nodes["polygon"].vectors, data["polygon"].x[:, :4].numpy())
    np.testing.assert_array_equal(graphs.nodes["polygon"].key_points, data["polygon"].x[:, 4:].reshape(3, 4, 2).numpy())
    edges = graphs.edges["polygon", "point"]
    assert (edges.index.tolist(), edges.relation.tolist()) == ([[0, 2], [1, 0]], [1, 0])
    data.extra = Intruder()
    torch.save(data, tmp_path / "b.pt")
    with pytest.raises(FormatError, match="without running code"):
        read_ready(tmp_path / "b.pt")
    assert not (tmp_path / "intruded").exists()


def test_a_ready_graph_whose_edges_miss_its_nodes_is_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", x__point=np.zeros((2, 6)), edge_index__point__point=np.array([[0], [2]]),
        edge_attr__point__point=np.ones((1, 2)),
    )  # fmt: skip
    with pytest.raises(FormatError, match="do not fit"):
        read_ready(tmp_path / "a.npz")
