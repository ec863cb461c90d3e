"""From the tags of a vocabulary to what a model gets of the objects that carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import HeteroData

from rsosm_cli.graph.arrays import GraphArrays, NodeArrays
from rsosm_cli.settings import AnyModel, MmgrSettings, RoseSettings
from rsosm_cli.tiles import ragged
from rsosm_cli.tiles.batch import to_hetero


@dataclass(frozen=True)
class Selection:
    """Which objects a method takes: those with a tag of ``keys`` (all where there are none), of the types ``types``.

    ``category``: of an object's tags, only the one of the first key counts.
    """

    keys: tuple[str, ...] = ()
    types: tuple[str, ...] = ("point", "line", "polygon")
    category: bool = False

    @classmethod
    def of(cls, model: AnyModel) -> Selection:
        """Return the selection of a model's settings."""
        if isinstance(model, RoseSettings):
            return cls(model.object_keys)
        if isinstance(model, MmgrSettings):
            return cls(model.point_keys, ("point", "polygon"), category=True)
        return cls()

    def ranks(self, tags: Sequence[str]) -> NDArray[np.int64] | None:
        """Return (V,) the place of each tag's key among the keys, their number for others; None without keys."""
        if not self.keys:
            return None
        place = {key: i for i, key in enumerate(self.keys)}
        return np.array([place.get(tag.partition(":")[0], len(place)) for tag in tags], np.int64)

    def __call__(self, graphs: GraphArrays, ranks: NDArray[np.int64] | None) -> GraphArrays:
        """Return the graphs with the objects that are taken. Ready vectors have no tags to tell by: all are."""
        if ranks is None or any(n.vectors is not None for n in graphs.nodes.values()):
            return graphs
        keep, nodes = {}, {}
        for name, n in graphs.nodes.items():
            first = _first_tag(n, ranks, len(self.keys))
            keep[name] = np.asarray(first >= 0) & (name in self.types)
            nodes[name] = n
            if self.category:
                counts = (first >= 0).astype(np.int64)
                tags = first[first >= 0].astype(np.int32)
                nodes[name] = replace(n, tag_offsets=ragged.offsets_of(counts), tag_ids=tags)
        return ragged.keep_nodes(GraphArrays(nodes, graphs.edges), keep)


def _first_tag(n: NodeArrays, ranks: NDArray[np.int64], n_keys: int) -> NDArray[np.int64]:
    """Return (N,) each node's tag of the lowest rank, the first in the vocabulary among equals; -1 for none."""
    out = np.full(len(n.osm_id), -1, np.int64)
    tagged = np.flatnonzero(np.diff(n.tag_offsets) > 0)
    if not len(tagged):
        return out
    size = len(ranks)
    order = ranks[n.tag_ids] * size + n.tag_ids  # by rank, then by tag
    best = np.minimum.reduceat(order, n.tag_offsets[tagged])
    tag = best % size
    out[tagged] = np.where(ranks[tag] < n_keys, tag, -1)
    return out


@dataclass(frozen=True)
class TagInputs:
    """``vectors`` (V, W) of a vocabulary on the device, its ``weights`` (V,), and which objects are taken."""

    vectors: Tensor
    weights: Tensor
    selection: Selection = Selection()
    ranks: NDArray[np.int64] | None = None  # of the tags, as the selection gives them

    def select(self, graphs: GraphArrays) -> GraphArrays:
        """Return the graphs with the objects that the model takes."""
        return self.selection(graphs, self.ranks)

    def batch(self, graphs: GraphArrays) -> HeteroData:
        """Return the graphs as one batch on the device of the vectors."""
        return to_hetero(self.select(graphs), self.vectors, self.weights)

    def to(self, device: torch.device) -> TagInputs:
        return replace(self, vectors=self.vectors.to(device))
