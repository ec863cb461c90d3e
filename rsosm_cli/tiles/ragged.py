"""Picking and joining tiles and nodes of :class:`GraphArrays` without a loop over either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.graph.arrays import EdgeArrays, GraphArrays, NodeArrays
from rsosm_cli.graph.schema import NODE_TYPES

_PER_NODE = ("osm_type", "osm_id", "key_points", "area", "length", "envelope", "centroid", "class_code")


def offsets_of(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return (n + 1,) offsets of (n,) counts."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def owners(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row that each item of a ragged array belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def gather(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (flat places, new offsets) of ``rows`` of a ragged array, in their order."""
    counts = offsets[rows + 1] - offsets[rows]
    new = offsets_of(counts)
    return np.arange(new[-1]) + np.repeat(offsets[rows] - new[:-1], counts), new


def take_tiles(graphs: GraphArrays, tiles: NDArray[np.int64]) -> GraphArrays:
    """Return the graphs of ``tiles``, in their order."""
    nodes = {name: _take_nodes(n, *gather(n.offsets, tiles)) for name, n in graphs.nodes.items()}
    edges = {}
    for pair, e in graphs.edges.items():
        places, offsets = gather(e.offsets, tiles)
        edges[pair] = EdgeArrays(offsets, e.index[:, places], e.relation[places])
    return GraphArrays(nodes, edges)


def keep_nodes(graphs: GraphArrays, keep: Mapping[str, NDArray[np.bool_]]) -> GraphArrays:
    """Return the graphs with the nodes where ``keep`` (N,) of their type holds, and the edges among them."""
    nodes: dict[str, NodeArrays] = {}
    renumbered: dict[str, NDArray[np.int64]] = {}
    for name in NODE_TYPES:
        n, kept = graphs.nodes[name], keep[name]
        offsets = offsets_of(np.bincount(owners(n.offsets)[kept], minlength=graphs.n_tiles))
        nodes[name] = _take_nodes(n, np.flatnonzero(kept), offsets)
        renumbered[name] = np.cumsum(kept) - 1  # numbers among all kept nodes of the type
    edges = {}
    for (a, b), e in graphs.edges.items():
        tile = owners(e.offsets)
        source = e.index[0] + graphs.nodes[a].offsets[tile]
        target = e.index[1] + graphs.nodes[b].offsets[tile]
        kept = keep[a][source] & keep[b][target]
        tile, source, target = tile[kept], source[kept], target[kept]
        index = np.stack(
            [renumbered[a][source] - nodes[a].offsets[tile], renumbered[b][target] - nodes[b].offsets[tile]]
        ).astype(np.int32)
        offsets = offsets_of(np.bincount(tile, minlength=graphs.n_tiles))
        edges[a, b] = EdgeArrays(offsets, index, e.relation[kept])
    return GraphArrays(nodes, edges)


def join(parts: Sequence[GraphArrays]) -> GraphArrays:
    """Return the tiles of all ``parts``, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    nodes: dict[str, NodeArrays] = {}
    for name in NODE_TYPES:
        columns = [p.nodes[name] for p in parts]
        ready = [n.vectors for n in columns if n.vectors is not None]
        nodes[name] = NodeArrays(
            offsets=_join_offsets([n.offsets for n in columns]),
            tag_offsets=_join_offsets([n.tag_offsets for n in columns]),
            tag_ids=np.concatenate([n.tag_ids for n in columns]),
            vectors=np.concatenate(ready) if len(ready) == len(columns) else None,
            **{field: np.concatenate([getattr(n, field) for n in columns]) for field in _PER_NODE},
        )
    edges = {}
    for pair in parts[0].edges:
        many = [p.edges[pair] for p in parts]
        edges[pair] = EdgeArrays(
            _join_offsets([e.offsets for e in many]),
            np.concatenate([e.index for e in many], axis=1),
            np.concatenate([e.relation for e in many]),
        )
    return GraphArrays(nodes, edges)


def with_tags(graphs: GraphArrays, table: NDArray[np.int32]) -> GraphArrays:
    """Return the graphs with tag ``i`` renamed ``table[i]``."""
    return replace(graphs, nodes={k: replace(n, tag_ids=table[n.tag_ids]) for k, n in graphs.nodes.items()})


def _take_nodes(n: NodeArrays, places: NDArray[np.int64], offsets: NDArray[np.int64]) -> NodeArrays:
    tag_places, tag_offsets = gather(n.tag_offsets, places)
    return NodeArrays(
        offsets=offsets,
        tag_offsets=tag_offsets,
        tag_ids=n.tag_ids[tag_places],
        vectors=None if n.vectors is None else n.vectors[places],
        **{field: getattr(n, field)[places] for field in _PER_NODE},
    )


def _join_offsets(many: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return offsets_of(np.concatenate([np.diff(o) for o in many]))
