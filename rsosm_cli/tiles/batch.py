"""Graphs of many tiles as one PyTorch Geometric batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import HeteroData

from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import EDGE_WIDTHS, NODE_TYPES


def to_hetero(graphs: GraphArrays, tag_vectors: Tensor, tag_weights: Tensor) -> HeteroData:
    """Return ``B`` graphs as one batch on the device of ``tag_vectors``.

    ``tag_vectors`` (V, W) float32 and ``tag_weights`` (V,) are those of the vocabulary that the graphs' tag ids point
    into. Per node type: ``x`` (N, W) the weighted mean of the node's tag vectors, sum(w h) / sum(w) (GeoLink, section
    3.1; the plain mean where all weights are 0, zeros where there is no tag; ready node vectors as they are), ``pos``
    (N, k, 2) key points in tile units, ``batch`` (N,) int64 ascending, ``num_nodes``. Per edge type: ``edge_index``
    (2, E) int64 and ``edge_attr`` (E, width) float32 one-hot. Besides, ``n_graphs`` and ``counts`` (B, 3), a numpy
    array of the nodes of each graph and type, which stays on the host. All node and edge types are there, maybe empty.
    """
    device = tag_vectors.device
    data = HeteroData()
    nodes = [graphs.nodes[name] for name in NODE_TYPES]
    counts = np.stack([np.diff(n.offsets) for n in nodes], axis=1)
    data.n_graphs = graphs.n_tiles
    data.counts = counts
    ready = [n.vectors for n in nodes]
    if any(v is None for v in ready):
        tag_counts = np.concatenate([np.diff(n.tag_offsets) for n in nodes])
        tag_ids = np.concatenate([n.tag_ids for n in nodes])
        vectors = mean_vectors(tag_ids, tag_counts, tag_vectors, tag_weights)
    else:
        vectors = torch.from_numpy(np.concatenate([v for v in ready if v is not None])).to(device)
    graph = np.arange(graphs.n_tiles)
    start = 0
    # Offset of each graph's first node of a type in the batch, to number edges over the batch.
    for k, (name, n) in enumerate(zip(NODE_TYPES, nodes, strict=True)):
        store = data[name]
        end = start + len(n.osm_id)
        store.x = vectors[start:end]
        store.pos = torch.from_numpy(np.ascontiguousarray(n.key_points)).to(device)
        store.batch = torch.from_numpy(np.repeat(graph, counts[:, k])).to(device)
        store.num_nodes = end - start
        start = end
    for (a, b), edges in graphs.edges.items():
        per_graph = np.diff(edges.offsets)
        index = edges.index.astype(np.int64)
        index[0] += np.repeat(graphs.nodes[a].offsets[:-1], per_graph)
        index[1] += np.repeat(graphs.nodes[b].offsets[:-1], per_graph)
        store = data[a, "to", b]
        store.edge_index = torch.from_numpy(index).to(device)
        relation = torch.from_numpy(edges.relation.astype(np.int64)).to(device)
        store.edge_attr = functional.one_hot(relation, EDGE_WIDTHS[a, b]).to(torch.float32)
    return data


def mean_vectors(
    tag_ids: NDArray[np.int32], tag_counts: NDArray[np.int64], tag_vectors: Tensor, tag_weights: Tensor
) -> Tensor:
    """Return (N, W) weighted means of the tag vectors of ``N`` nodes with ``tag_counts`` (N,) tags each."""
    device = tag_vectors.device
    owner = np.repeat(np.arange(len(tag_counts)), tag_counts)
    weights = tag_weights.detach().cpu().numpy().astype(np.float64)[tag_ids]
    total = np.bincount(owner, weights, minlength=len(tag_counts))[owner]
    share = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1.0 / np.maximum(tag_counts, 1)[owner])
    starts = np.cumsum(tag_counts) - tag_counts
    return functional.embedding_bag(
        torch.from_numpy(tag_ids.astype(np.int64)).to(device),
        tag_vectors,
        torch.from_numpy(starts.astype(np.int64)).to(device),
        mode="sum",
        per_sample_weights=torch.from_numpy(share).to(device, tag_vectors.dtype),
    )
