"""Graphs of many tiles as one PyTorch Geometric batch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import HeteroData
from torch_geometric.data.storage import EdgeStorage, NodeStorage

from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.pairs import ragged
from rsosm_cli.graph.schema import EDGE_WIDTHS, NODE_TYPES
from rsosm_cli.tiles.rooms import LARGE_BYTES, room

# Of a node, besides its key points: what Rose looks at.
_SHAPE = ("area", "length", "envelope", "centroid", "class_code")
_EYES = {width: np.eye(width, dtype=np.float32) for width in set(EDGE_WIDTHS.values())}


def to_hetero(graphs: GraphArrays, tag_vectors: Tensor, tag_weights: Tensor) -> HeteroData:
    """Return ``B`` graphs as one batch on the device of ``tag_vectors``.

    ``tag_vectors`` (V, W) float32 and ``tag_weights`` (V,) are those of the vocabulary that the graphs' tag ids point
    into. Per node type: ``x`` (N, W) the weighted mean of the node's tag vectors, sum(w h) / sum(w) (GeoLink, section
    3.1; the plain mean where all weights are 0, zeros where there is no tag; ready node vectors as they are), ``pos``
    (N, k, 2) key points in tile units, ``area`` and ``length`` (N,) as shares of the tile's area and perimeter,
    ``envelope`` (N, 4, 2), ``centroid`` (N, 2), ``class_code`` (N,), ``batch`` (N,) int64 ascending. Per edge type:
    ``edge_index`` (2, E) int64 and ``edge_attr`` (E, width) float32 one-hot. Besides, ``n_graphs`` and ``counts``
    (B, 3), a numpy array of the nodes of each graph and type, which stays on the host. All node and edge types are
    there, maybe empty.
    """
    device = tag_vectors.device
    data = HeteroData()
    nodes = [graphs.nodes[name] for name in NODE_TYPES]
    counts = np.stack([n.offsets[1:] - n.offsets[:-1] for n in nodes], axis=1)
    data.n_graphs = graphs.n_tiles
    data.counts = counts
    ready = [n.vectors for n in nodes]
    if any(v is None for v in ready):
        tag_counts = np.concatenate([n.tag_offsets[1:] - n.tag_offsets[:-1] for n in nodes])
        tag_ids = np.concatenate([n.tag_ids for n in nodes])
        vectors = mean_vectors(tag_ids, tag_counts, tag_vectors, tag_weights)
    else:
        vectors = _tensor(np.concatenate([v for v in ready if v is not None]), device)
    graph = np.arange(graphs.n_tiles)
    start = 0
    for k, (name, n) in enumerate(zip(NODE_TYPES, nodes, strict=True)):
        end = start + len(n.osm_id)
        fields: dict[str, Any] = {"x": vectors[start:end], "pos": _tensor(np.ascontiguousarray(n.key_points), device)}
        for field in _SHAPE:
            fields[field] = _tensor(np.ascontiguousarray(getattr(n, field)), device)
        fields["batch"] = _tensor(graph.repeat(counts[:, k]), device)
        fields["num_nodes"] = end - start
        _fill(data.get_node_store(name), fields)
        start = end
    for (a, b), (index, attributes) in _edge_tensors(graphs, device).items():
        _fill(data.get_edge_store(a, "to", b), {"edge_index": index, "edge_attr": attributes})
    return data


def _fill(store: NodeStorage | EdgeStorage, fields: dict[str, Any]) -> None:
    """Set the fields of a new, empty store.

    Past its item access, which looks for cached attributes and properties at each of the 45 fields: a quarter of the
    time that a tile takes.
    """
    store._mapping.update(fields)


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device)


def _edge_tensors(graphs: GraphArrays, device: torch.device) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return of each pair of types (2, E) int64 ends, numbered over the batch, and (E, width) float32 one-hot rows."""
    numbers = sum(e.index.size for e in graphs.edges.values())
    ones = sum(len(e.relation) * EDGE_WIDTHS[pair] for pair, e in graphs.edges.items()) if device.type == "cpu" else 0
    memory = room(8 * numbers + 4 * ones)  # one piece for all
    ends, rows = memory[: 8 * numbers].view(np.int64), memory[8 * numbers :].view(np.float32)
    out, at, row_at = {}, 0, 0
    for (a, b), edges in graphs.edges.items():
        n, width = len(edges.relation), EDGE_WIDTHS[a, b]
        index = ends[at : at + 2 * n].reshape(2, n)
        at += 2 * n
        if graphs.n_tiles > 1:
            # Each graph's nodes of a type are numbered after those of the graphs before it.
            per_graph = edges.offsets[1:] - edges.offsets[:-1]
            np.add(edges.index[0], graphs.nodes[a].offsets[:-1].repeat(per_graph), out=index[0])
            np.add(edges.index[1], graphs.nodes[b].offsets[:-1].repeat(per_graph), out=index[1])
        else:
            index[...] = edges.index
        if device.type == "cpu":
            attributes = rows[row_at : row_at + n * width].reshape(n, width)
            row_at += n * width
            # A relation is a column of its pair: with "clip" numpy writes where it is told, without a buffer.
            _EYES[width].take(edges.relation, axis=0, out=attributes, mode="clip")
            out[a, b] = torch.from_numpy(index), torch.from_numpy(attributes)
        else:
            column = _tensor(edges.relation.astype(np.int32), device)
            out[a, b] = _tensor(index, device), _one_hot_rows(width, device).index_select(0, column)
    return out


@lru_cache(maxsize=64)
def _one_hot_rows(width: int, device: torch.device) -> Tensor:
    return torch.eye(width, device=device)


def mean_vectors(
    tag_ids: NDArray[np.int32], tag_counts: NDArray[np.int64], tag_vectors: Tensor, tag_weights: Tensor
) -> Tensor:
    """Return (N, W) weighted means of the tag vectors of ``N`` nodes with ``tag_counts`` (N,) tags each."""
    device, width = tag_vectors.device, tag_vectors.shape[1]
    large = len(tag_counts) * width * 4 >= LARGE_BYTES
    if not large or device.type != "cpu" or tag_vectors.requires_grad or tag_vectors.dtype != torch.float32:
        return _means(tag_ids, tag_counts, tag_vectors, tag_weights)
    # Most nodes carry the tags of another one ("building:yes"): a tenth of the means, each copied to where it is due.
    nodes, same_as = _alike(tag_ids, tag_counts)
    starts = tag_counts.cumsum() - tag_counts
    counts = tag_counts[nodes]
    means = _means(tag_ids[ragged(starts[nodes], counts)], counts, tag_vectors, tag_weights)
    out = torch.from_numpy(room(len(tag_counts) * width * 4).view(np.float32).reshape(-1, width))
    return torch.index_select(means, 0, torch.from_numpy(same_as), out=out)


def _alike(tag_ids: NDArray[np.int32], tag_counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (U,) nodes that stand for all of their tags, and (N,) which of those each node has the tags of.

    Nodes meet in a table by a hash of their tags; what meets is compared, so a clash costs a mean, never a wrong one.
    """
    n = len(tag_counts)
    ends = tag_counts.cumsum()
    starts = ends - tag_counts
    mixed = (tag_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    sums = np.zeros(len(tag_ids) + 1, np.uint64)
    np.cumsum(mixed, out=sums[1:])
    hashed = (sums[ends] - sums[starts]) * np.uint64(0x9E3779B97F4A7C15)
    bits = max(2 * n, 2).bit_length()
    slot = (hashed >> np.uint64(64 - bits)).astype(np.int64)
    table = np.zeros(1 << bits, np.int64)
    own = np.arange(n)
    table[slot] = own
    other = table[slot]
    differs = tag_counts[other] != tag_counts
    other[differs] = own[differs]
    unequal = tag_ids[ragged(starts[other], tag_counts)] != tag_ids
    if unequal.any():
        clash = own.repeat(tag_counts)[unequal]
        other[clash] = clash
    stands = other == own
    return np.flatnonzero(stands), (stands.cumsum() - 1)[other]


def _means(
    tag_ids: NDArray[np.int32], tag_counts: NDArray[np.int64], tag_vectors: Tensor, tag_weights: Tensor
) -> Tensor:
    device = tag_vectors.device
    weights = tag_weights.detach().cpu().numpy()[tag_ids].astype(np.float64)
    owner = np.arange(len(tag_counts)).repeat(tag_counts)
    total = np.bincount(owner, weights, minlength=len(tag_counts))
    none = total == 0
    if none.any():
        weights[none[owner]] = 1.0
        total[none] = tag_counts[none]
    share = (weights / total[owner]).astype(np.float32)
    starts = tag_counts.cumsum() - tag_counts
    return functional.embedding_bag(
        _tensor(tag_ids.astype(np.int64), device),
        tag_vectors,
        _tensor(starts.astype(np.int64), device),
        mode="sum",
        per_sample_weights=_tensor(share, device).to(tag_vectors.dtype),
    )
