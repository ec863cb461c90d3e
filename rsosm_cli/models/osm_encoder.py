"""Encoders of OSM objects over the heterograph: text vectors and relations in, one vector an object out.

GeoLink (NeurIPS 2025), section 3.2 and the ablation of the encoder. Nine parallel convolutions, one an ordered pair of
types, are computed as one projection a source type and one segment softmax over all edges.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsosm_cli.graph.schema import EDGE_WIDTHS, NODE_TYPES
from rsosm_cli.models.flat import N_TYPES, FlatGraph, segment_softmax, segment_sum

PAIRS: tuple[tuple[str, str], ...] = tuple((a, b) for a in NODE_TYPES for b in NODE_TYPES)


class _Relations(nn.Module):
    """A learned vector (``width``) a relation of each of the nine pairs, summed over an edge's one-hot columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables = nn.ParameterDict(
            {f"{a}__{b}": nn.Parameter(torch.empty(EDGE_WIDTHS[a, b], width)) for a, b in PAIRS}
        )
        for table in self.tables.values():
            nn.init.xavier_uniform_(table)

    def forward(self, graph: FlatGraph) -> Tensor:
        """Return (E, width) in the order of the graph's edges."""
        return torch.cat([attr @ self.tables[f"{a}__{b}"] for attr, (a, b) in zip(graph.attr, PAIRS, strict=True)])

    def scores(self, graph: FlatGraph, attention: Tensor) -> Tensor:
        """Return (E,) the product of each edge's vector with ``attention`` (9, width) of its pair."""
        return torch.cat(
            [attr @ (self.tables[f"{a}__{b}"] @ attention[i])
             for i, (attr, (a, b)) in enumerate(zip(graph.attr, PAIRS, strict=True))]
        )  # fmt: skip


def _project(x: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """Return (3 N, C): row ``3 n + t`` is node n under the convolution to type t; ``weight`` (3, 3, C, W) by source,
    target.
    """
    width = weight.shape[2]
    return torch.cat([F.linear(x[s], weight[s].flatten(0, 1)) for s in range(N_TYPES)]).view(-1, width)


class GatLayer(nn.Module):
    """Nine parallel GATConvs (Velickovic et al., 2018; one head, no added self loops), mean over the edge types.

    With ``edge_dim`` the relation's one-hot enters the attention, as in PyG's ``GATConv(edge_dim=...)``.
    """

    def __init__(self, in_width: int, width: int, *, edge_dim: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(N_TYPES, N_TYPES, width, in_width))
        self.att_source = nn.Parameter(torch.empty(N_TYPES, N_TYPES, width))
        self.att_target = nn.Parameter(torch.empty(N_TYPES, N_TYPES, width))
        self.bias = nn.Parameter(torch.zeros(N_TYPES, N_TYPES, width))
        _xavier(self.weight)
        _xavier(self.att_source[:, :, None])
        _xavier(self.att_target[:, :, None])
        self.relations = _Relations(width) if edge_dim else None
        if edge_dim:
            self.att_relation = nn.Parameter(torch.empty(N_TYPES * N_TYPES, width))
            _xavier(self.att_relation[:, None])

    def forward(self, x: tuple[Tensor, ...], graph: FlatGraph) -> Tensor:
        """Return (N, width), before any activation."""
        hidden = _project(x, self.weight)  # (3 N, C)
        # The attention's source half is a product with the projected node; its target half needs the projection by the
        # convolutions that arrive, so the two matrices are multiplied first.
        arrive = torch.einsum("stcw,stc->tsw", self.weight, self.att_target)  # (target, source, W)
        scores_to = torch.cat([F.linear(x[t], arrive[t]) for t in range(N_TYPES)]).view(-1)  # 3 n + source type
        parts = hidden.view(-1, N_TYPES, self.width).split(list(graph.sizes))
        scores_from = torch.cat([(parts[s] * self.att_source[s]).sum(-1) for s in range(N_TYPES)]).view(-1)
        row = graph.source * N_TYPES + graph.target_kind
        slot = graph.target * N_TYPES + graph.source_kind
        scores = scores_from.index_select(0, row) + scores_to.index_select(0, slot)
        if self.relations is not None:
            scores = scores + self.relations.scores(graph, self.att_relation)
        alpha = segment_softmax(F.leaky_relu(scores, 0.2), slot, N_TYPES * graph.n_nodes) / N_TYPES
        messages = alpha[:, None] * hidden.index_select(0, row)
        out = segment_sum(messages, graph.target, graph.n_nodes)
        return out + self.bias.mean(0).index_select(0, graph.kind)


class GcnLayer(nn.Module):
    """Nine parallel graph convolutions (Kipf and Welling, 2017) with symmetric normalisation a pair, mean over the
    edge types.

    With ``edge_dim`` a learned vector of the relation is added to each message.
    """

    def __init__(self, in_width: int, width: int, *, edge_dim: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N_TYPES, N_TYPES, width, in_width))
        self.bias = nn.Parameter(torch.zeros(N_TYPES, N_TYPES, width))
        _xavier(self.weight)
        self.relations = _Relations(width) if edge_dim else None

    def forward(self, x: tuple[Tensor, ...], graph: FlatGraph) -> Tensor:
        """Return (N, width), before any activation."""
        hidden = _project(x, self.weight)
        row = graph.source * N_TYPES + graph.target_kind
        slot = graph.target * N_TYPES + graph.source_kind
        ones = torch.ones_like(row, dtype=torch.float32)
        n_slots = N_TYPES * graph.n_nodes
        out_degree = segment_sum(ones, row, n_slots)
        in_degree = segment_sum(ones, slot, n_slots)
        norm = (out_degree.index_select(0, row) * in_degree.index_select(0, slot)).rsqrt() / N_TYPES
        messages = hidden.index_select(0, row)
        if self.relations is not None:
            messages = messages + self.relations(graph)
        out = segment_sum(norm[:, None] * messages, graph.target, graph.n_nodes)
        return out + self.bias.mean(0).index_select(0, graph.kind)


class TransformerLayers(nn.Module):
    """Two pre-norm transformer blocks whose attention runs along the edges of all nine types together.

    Nodes enter by one projection a type; with ``edge_dim`` a learned vector of the relation is added to keys and
    values. The paper names a 2-block Transformer and gives no more of it.
    """

    def __init__(self, in_width: int, width: int, *, edge_dim: bool, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads if width % heads == 0 else 1
        self.weight = nn.Parameter(torch.empty(N_TYPES, width, in_width))
        self.bias = nn.Parameter(torch.zeros(N_TYPES, width))
        _xavier(self.weight)
        self.norm_1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.norm_2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(blocks)
        )
        self.relations = nn.ModuleList(_Relations(width) for _ in range(blocks)) if edge_dim else None

    def forward(self, x: tuple[Tensor, ...], graph: FlatGraph) -> Tensor:
        """Return (N, width), before any activation."""
        h = torch.cat([F.linear(x[t], self.weight[t], self.bias[t]) for t in range(N_TYPES)])
        for block in range(len(self.qkv)):
            query, key, value = self.qkv[block](self.norm_1[block](h)).chunk(3, -1)
            key, value = key.index_select(0, graph.source), value.index_select(0, graph.source)
            if self.relations is not None:
                relation = self.relations[block](graph)
                key, value = key + relation, value + relation
            query = query.index_select(0, graph.target).unflatten(-1, (self.heads, -1))
            key, value = key.unflatten(-1, (self.heads, -1)), value.unflatten(-1, (self.heads, -1))
            scores = (query * key).sum(-1) * key.shape[-1] ** -0.5  # (E, heads)
            alpha = segment_softmax(scores, graph.target, graph.n_nodes)
            h = h + self.out[block](segment_sum((alpha[..., None] * value).flatten(1), graph.target, graph.n_nodes))
            h = h + self.mlp[block](self.norm_2[block](h))
        return h


class GraphNorm(nn.Module):
    """Normalisation over all nodes and channels of one type, within each graph or over the whole batch, then affine by
    type.

    The published code normalises over the batch, which makes a tile depend on its batch mates; the default does not.
    """

    def __init__(self, width: int, *, per_graph: bool) -> None:
        super().__init__()
        self.per_graph = per_graph
        self.weight = nn.Parameter(torch.ones(N_TYPES, width))
        self.bias = nn.Parameter(torch.zeros(N_TYPES, width))

    def forward(self, x: Tensor, graph: FlatGraph) -> Tensor:
        """Return (N, C) from ``x`` (N, C)."""
        segment = graph.segment if self.per_graph else graph.kind
        n_segments = N_TYPES * graph.n_graphs if self.per_graph else N_TYPES
        count = segment_sum(torch.ones_like(segment, dtype=x.dtype), segment, n_segments)
        size = (count * x.shape[1]).clamp(min=1)
        mean = segment_sum(x.sum(1), segment, n_segments) / size
        x = x - mean.index_select(0, segment)[:, None]
        variance = segment_sum(x.square().sum(1), segment, n_segments) / size
        # The root has no finite slope at 0, where all channels of a tile's only node can lie after the ReLU.
        scale = 1 / (variance.clamp(min=1e-12).sqrt() + 1e-5)
        x = x * scale.index_select(0, segment)[:, None]
        return x * self.weight.index_select(0, graph.kind) + self.bias.index_select(0, graph.kind)


class OsmEncoder(nn.Module):
    """One layer over the heterograph, ReLU, and the norm: (N, ``in_width``) text vectors to (N, ``width``)."""

    def __init__(self, kind: str, in_width: int, width: int, *, edge_dim: bool = True, per_graph: bool = True) -> None:
        super().__init__()
        layers = {"gat": GatLayer, "gcn": GcnLayer, "transformer": TransformerLayers}
        self.layer = layers[kind](in_width, width, edge_dim=edge_dim)
        self.norm = GraphNorm(width, per_graph=per_graph)

    def forward(self, x: tuple[Tensor, ...], graph: FlatGraph) -> Tensor:
        """Encode ``x``, a tensor (N_t, W) a type: the graph's own or one with nodes masked."""
        return self.norm(self.layer(x, graph).relu(), graph)


def _xavier(weight: Tensor) -> None:
    """Xavier initialisation of the trailing matrices of a stack."""
    bound = (6.0 / (weight.shape[-1] + weight.shape[-2])) ** 0.5
    nn.init.uniform_(weight, -bound, bound)
