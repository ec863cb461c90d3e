"""Small random heterographs in the layout that models take."""

from __future__ import annotations

import numpy as np
import torch
from torch_geometric.data import HeteroData

from rsosm_cli.graph.schema import EDGE_TYPES, EDGE_WIDTHS, KEY_POINTS, NODE_TYPES

SHAPE = ("area", "length", "envelope", "centroid")


def random_tile(counts: tuple[int, int, int], seed: int, width: int = 16, density: float = 0.4) -> HeteroData:
    """One tile with ``counts`` points, lines and polygons, and random edges."""
    draw = np.random.default_rng(seed)
    n = dict(zip(NODE_TYPES, counts, strict=True))
    data = HeteroData()
    data.n_graphs = 1
    for t in NODE_TYPES:
        data[t].x = torch.from_numpy(draw.standard_normal((n[t], width), dtype=np.float32))
        data[t].pos = torch.from_numpy(draw.random((n[t], KEY_POINTS[t], 2), dtype=np.float32))
        data[t].area = torch.from_numpy(draw.random(n[t], dtype=np.float32) / 10)
        data[t].length = torch.from_numpy(draw.random(n[t], dtype=np.float32))
        data[t].envelope = torch.from_numpy(draw.random((n[t], 4, 2), dtype=np.float32))
        data[t].centroid = torch.from_numpy(draw.random((n[t], 2), dtype=np.float32))
        data[t].batch = torch.zeros(n[t], dtype=torch.int64)
        data[t].num_nodes = n[t]
    for a, _, b in EDGE_TYPES:
        index = np.stack(np.nonzero(draw.random((n[a], n[b])) < density))
        if a == b:  # every object has a self loop, so that none is without a message
            index = np.concatenate((index[:, index[0] != index[1]], np.tile(np.arange(n[a]), (2, 1))), 1)
        columns = EDGE_WIDTHS[a, b]
        relation = draw.integers(0, columns, index.shape[1])
        data[a, "to", b].edge_index = torch.from_numpy(index).long()
        data[a, "to", b].edge_attr = torch.eye(columns)[torch.from_numpy(relation)]
    return data


def join(tiles: list[HeteroData]) -> HeteroData:
    """Tiles as one batch."""
    data = HeteroData()
    data.n_graphs = len(tiles)
    starts = {t: np.cumsum([0] + [tile[t].num_nodes for tile in tiles]) for t in NODE_TYPES}
    for t in NODE_TYPES:
        for field in ("x", "pos", *SHAPE):
            data[t][field] = torch.cat([tile[t][field] for tile in tiles])
        data[t].batch = torch.cat([tile[t].batch + i for i, tile in enumerate(tiles)])
        data[t].num_nodes = len(data[t].x)
    for edge in EDGE_TYPES:
        a, _, b = edge
        shift = [torch.tensor([[int(starts[a][i])], [int(starts[b][i])]]) for i in range(len(tiles))]
        data[edge].edge_index = torch.cat([tile[edge].edge_index + s for tile, s in zip(tiles, shift, strict=True)], 1)
        data[edge].edge_attr = torch.cat([tile[edge].edge_attr for tile in tiles])
    return data


def shuffled(tile: HeteroData, seed: int) -> HeteroData:
    """The same tile with its objects and edges in another order."""
    draw = torch.Generator().manual_seed(seed)
    data = HeteroData()
    data.n_graphs = 1
    place = {}
    for t in NODE_TYPES:
        order = torch.randperm(tile[t].num_nodes, generator=draw)
        place[t] = order.argsort()
        for field in ("x", "pos", *SHAPE):
            data[t][field] = tile[t][field][order]
        data[t].batch, data[t].num_nodes = tile[t].batch, tile[t].num_nodes
    for edge in EDGE_TYPES:
        index = tile[edge].edge_index
        order = torch.randperm(index.shape[1], generator=draw)
        data[edge].edge_index = torch.stack((place[edge[0]][index[0]], place[edge[2]][index[1]]))[:, order]
        data[edge].edge_attr = tile[edge].edge_attr[order]
    return data
