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
from rsosm_cli.graph.schema import EDGE_WIDTHS, NODE_TYPES

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
    for (a, b), edges in graphs.edges.items():
        index = edges.index.astype(np.int64, order="C")
        if graphs.n_tiles > 1:
            # Each graph's nodes of a type are numbered after those of the graphs before it.
            per_graph = edges.offsets[1:] - edges.offsets[:-1]
            index[0] += graphs.nodes[a].offsets[:-1].repeat(per_graph)
            index[1] += graphs.nodes[b].offsets[:-1].repeat(per_graph)
        attributes = _one_hot(edges.relation, EDGE_WIDTHS[a, b], device)
        _fill(data.get_edge_store(a, "to", b), {"edge_index": _tensor(index, device), "edge_attr": attributes})
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


def _one_hot(column: NDArray[np.uint8], width: int, device: torch.device) -> Tensor:
    """Return (E, width) float32 rows with a one in each row's column, made on the device."""
    if device.type == "cpu":
        return torch.from_numpy(_EYES[width].take(column, axis=0))  # a third of the overhead of torch's
    return _one_hot_rows(width, device).index_select(0, _tensor(column.astype(np.int32), device))


@lru_cache(maxsize=64)
def _one_hot_rows(width: int, device: torch.device) -> Tensor:
    return torch.eye(width, device=device)


def mean_vectors(
    tag_ids: NDArray[np.int32], tag_counts: NDArray[np.int64], tag_vectors: Tensor, tag_weights: Tensor
) -> Tensor:
    """Return (N, W) weighted means of the tag vectors of ``N`` nodes with ``tag_counts`` (N,) tags each."""
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
