"""Fusion of image patches and OSM objects: one two-way attention block. GeoLink (NeurIPS 2025), section 3.2.

Tiles have very different numbers of objects. They are padded in buckets of similar size, so that padding is bounded
without leaving objects out; the buckets are chosen from counts on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rsosm_cli.models.flat import FlatGraph
from rsosm_cli.models.position import embed_points, in_patches


@dataclass(frozen=True)
class Pack:
    """Objects of some graphs, padded: object ``index`` (b, M) into the flat nodes, ``valid`` (b, M), of graphs
    ``graphs`` (b,).

    ``graphs`` is None where the pack holds all graphs in order.
    """

    index: Tensor
    valid: Tensor
    graphs: Tensor | None


def pack(graph: FlatGraph, totals: NDArray[np.int64], chosen: Tensor | None = None, *, waste: int = 16) -> list[Pack]:
    """Group the graphs of a batch so that padding is bounded, with the objects of each.

    ``totals`` (B,) objects a graph on the host, ``chosen`` (N,) which nodes they are (all). One pack where padding to
    the largest graph costs at most ``waste`` slots a graph or doubles the objects; else one pack a power of two.
    """
    device = graph.batch.device
    key = graph.batch if chosen is None else graph.batch * 2 + (~chosen)
    order = key.argsort(stable=True)  # graph after graph, the chosen nodes of each first
    ones = torch.ones_like(graph.batch)
    nodes = torch.zeros(graph.n_graphs, dtype=torch.int64, device=device).index_add(0, graph.batch, ones)
    starts = nodes.cumsum(0) - nodes
    largest = int(totals.max(initial=1))
    if largest * graph.n_graphs <= max(2 * int(totals.sum()), waste * graph.n_graphs):
        buckets: list[tuple[int, NDArray[np.int64] | None]] = [(max(largest, 1), None)]
    else:
        levels = np.ceil(np.log2(np.maximum(totals, waste))).astype(np.int64)
        buckets = []
        for level in np.unique(levels):
            mine = np.flatnonzero(levels == level).astype(np.int64)
            buckets.append((max(int(totals[mine].max()), 1), mine))
    count = torch.from_numpy(np.ascontiguousarray(totals)).to(device, non_blocking=True)
    packs = []
    for width, members in buckets:
        who = None if members is None else torch.from_numpy(members).to(device, non_blocking=True)
        start, n = (starts, count) if who is None else (starts[who], count[who])
        slots = torch.arange(width, device=device)
        valid = slots < n[:, None]
        index = torch.where(valid, start[:, None] + slots, 0)
        # An empty batch has no node to point at; callers append a row of zeros for it.
        index = order[index] if len(order) else index
        packs.append(Pack(index, valid, who))
    return packs


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values come from different tensors; fused where torch can."""

    def __init__(self, width: int, heads: int, dropout: float, *, inner: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        inner = inner or width
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return (B, Q, W) for ``query`` (B, Q, W) over ``key``, ``value`` (B, K, W); ``valid`` (B, K) masks padding
        out.

        Where nothing is valid the result is zero, so that the tokens pass unchanged.
        """
        q = self.query(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.key(key).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.value(value).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mask = None
        if valid is not None:
            some = valid.any(1, keepdim=True)
            mask = (valid | ~some)[:, None, None]
        dropout = self.dropout if self.training else 0.0
        out = self.out(F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2))
        return out if valid is None else torch.where(some[..., None], out, 0)


class TwoWayBlock(nn.Module):
    """Objects attend to each other, patches to objects, objects to patches; positions are added to queries and keys.

    ``inner`` is the width inside the two cross attentions. Published, values carry no position, so that of objects with
    equal tags every patch receives the same average, wherever they are. With ``placed_values`` the values, and the
    patches and objects themselves, carry their positions.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, *, inner: int | None = None, placed_values: bool = False
    ) -> None:
        super().__init__()
        self.placed_values = placed_values
        self.objects_self = Attention(width, heads, dropout)
        self.patches_to_objects = Attention(width, heads, dropout, inner=inner)
        self.objects_to_patches = Attention(width, heads, dropout, inner=inner)
        self.norm_self = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.norm_objects = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def hybrid_patches(
        self,
        patches: Tensor,
        patch_position: Tensor,
        objects: Tensor,
        object_position: Tensor,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return patches (B, L, W) that know the objects, and objects (B, M, W) that know each other."""
        if self.placed_values:
            objects, patches = objects + object_position, patches + patch_position
        keys = objects + object_position
        objects = self.norm_self(objects + self.objects_self(keys, keys, objects, valid))
        keys = objects + object_position
        seen = self.patches_to_objects(patches + patch_position, keys, objects, valid)
        return self.norm_patches(patches + seen), objects

    def hybrid_objects(
        self, patches: Tensor, patch_position: Tensor, objects: Tensor, object_position: Tensor
    ) -> Tensor:
        """Return objects (B, M, W) that know the hybrid ``patches``."""
        seen = self.objects_to_patches(objects + object_position, patches + patch_position, patches)
        return self.norm_out(self.linear(self.norm_objects(objects + seen)))


def object_position(graph: FlatGraph, rows: int, columns: int, width: int) -> Tensor:
    """Return (N, ``width``): the mean embedding of each object's key points, in patches of a grid of ``rows`` x
    ``columns``.
    """
    places = (in_patches(pos, rows, columns) for pos in graph.pos)
    return torch.cat([embed_points(place, width).mean(1) for place in places])
