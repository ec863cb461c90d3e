"""A batch of heterographs laid out flat, type after type, and sums over segments of it.

Everything that follows works on all nodes and edges at once. How many objects a tile has is kept on the host
(``graphs.counts``, set where the batch is made), so that no step waits for the device to say how large something is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import HeteroData

from rsosm_cli.graph.schema import KEY_POINTS, NODE_TYPES

N_TYPES = len(NODE_TYPES)


@dataclass(frozen=True)
class FlatGraph:
    """``N`` nodes of ``B`` graphs: all of the first type, graph after graph, then all of the second ...

    ``counts`` lies on the host, everything else on the device. Edge tensors are over all nine edge types together.
    """

    n_graphs: int
    counts: NDArray[np.int64]  # (B, 3) nodes a graph and type
    sizes: tuple[int, ...]  # nodes a type
    x: tuple[Tensor, ...]  # a type: (N_t, W)
    pos: tuple[Tensor, ...]  # a type: (N_t, k, 2) tile units
    batch: Tensor  # (N,) graph of a node
    kind: Tensor  # (N,) type of a node, in the order of NODE_TYPES
    source: Tensor  # (E,) node number over all types
    target: Tensor  # (E,)
    source_kind: Tensor  # (E,)
    target_kind: Tensor  # (E,)
    attr: tuple[Tensor, ...]  # an edge type, source-major: (E_st, width)

    @property
    def n_nodes(self) -> int:
        return sum(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First node number of each type."""
        return tuple(int(o) for o in np.cumsum((0, *self.sizes))[:-1])

    @property
    def segment(self) -> Tensor:
        """(N,) ``type * B + graph``: the segments within which nodes are sorted."""
        return self.kind * self.n_graphs + self.batch

    @property
    def totals(self) -> NDArray[np.int64]:
        """(B,) objects a graph, on the host."""
        return self.counts.sum(1)


def flatten(graphs: HeteroData) -> FlatGraph:
    """Lay out a batch as :func:`rsosm_cli.tiles.batch.to_hetero` makes it; all node and edge types must be there."""
    n_graphs = int(graphs.n_graphs)
    stores = [graphs[t] for t in NODE_TYPES]
    sizes = tuple(int(s.x.shape[0]) for s in stores)
    offsets = np.cumsum((0, *sizes))
    device = stores[0].x.device
    for name, store in zip(NODE_TYPES, stores, strict=True):
        if store.pos.shape[1:] != (KEY_POINTS[name], 2):
            raise ValueError(f"pos of {name} must be (N, {KEY_POINTS[name]}, 2), not {tuple(store.pos.shape)}")
    counts = getattr(graphs, "counts", None)
    if counts is None:
        # A batch that was not made by us: ask the device once.
        counts = np.stack([np.bincount(s.batch.cpu().numpy(), minlength=n_graphs) for s in stores], 1)
    pairs = [(a, b) for a in range(N_TYPES) for b in range(N_TYPES)]
    edges = [graphs[NODE_TYPES[a], "to", NODE_TYPES[b]] for a, b in pairs]
    index = [e.edge_index for e in edges]

    def spread(values: list[int], lengths: list[int]) -> Tensor:
        return torch.cat(
            [torch.full((n,), v, dtype=torch.int64, device=device) for v, n in zip(values, lengths, strict=True)]
        )

    n_edges = [int(i.shape[1]) for i in index]
    return FlatGraph(
        n_graphs=n_graphs,
        counts=np.asarray(counts, np.int64).reshape(n_graphs, N_TYPES),
        sizes=sizes,
        x=tuple(s.x for s in stores),
        pos=tuple(s.pos for s in stores),
        batch=torch.cat([s.batch for s in stores]),
        kind=spread(list(range(N_TYPES)), list(sizes)),
        source=torch.cat([i[0] + int(offsets[a]) for (a, _), i in zip(pairs, index, strict=True)]),
        target=torch.cat([i[1] + int(offsets[b]) for (_, b), i in zip(pairs, index, strict=True)]),
        source_kind=spread([a for a, _ in pairs], n_edges),
        target_kind=spread([b for _, b in pairs], n_edges),
        attr=tuple(e.edge_attr for e in edges),
    )


def segment_sum(values: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Return sums (S, ...) of ``values`` (N, ...) over ``segment`` (N,), in float32 at least."""
    values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    return values.new_zeros((n_segments, *values.shape[1:])).index_add(0, segment, values)


def segment_softmax(scores: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Return the softmax (N, ...) of ``scores`` (N, ...) within each segment."""
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    with torch.no_grad():
        index = segment.view(-1, *([1] * (scores.ndim - 1))).expand_as(scores)
        top = scores.new_full((n_segments, *scores.shape[1:]), float("-inf"))
        top = top.scatter_reduce(0, index, scores, "amax")
    weight = (scores - top.index_select(0, segment)).exp()
    return weight / segment_sum(weight, segment, n_segments).index_select(0, segment)


def segment_rank(keys: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Return the place (N,) of every element within its segment when that is sorted by ``keys`` (N,)."""
    by_key = keys.argsort(stable=True)
    order = by_key[segment[by_key].argsort(stable=True)]
    ones = torch.ones_like(segment)
    counts = torch.zeros(n_segments, dtype=segment.dtype, device=segment.device).index_add(0, segment, ones)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(segment), device=segment.device) - starts[segment[order]]
    return torch.empty_like(place).index_copy(0, order, place)
