"""The points of interest of a corpus, and the embeddings of their categories (MMGR)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.settings import MmgrSettings
from rsosm_cli.text.categories import ROOT, CategoryRows, category_names, key_of
from rsosm_cli.text.cooccurrence import cooccurrences, delaunay_network, embed_categories, random_walks
from rsosm_cli.tiles import ragged
from rsosm_cli.tiles.shards import TileShards
from rsosm_cli.tiles.tags import Selection
from rsosm_cli.training.corpus import Corpus

_CHUNK = 4096  # tiles read at a time


@dataclass(frozen=True)
class Categories:
    """Rows of a table of categories: ``names`` (K,) and ``vectors`` (K, W); empty where a method has none."""

    names: tuple[str, ...] = ()
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def learn_categories(corpus: Corpus, model: MmgrSettings, seed: int) -> Categories:
    """Return the categories of the points of the training tiles, embedded by their co-occurrence."""
    shards, train = corpus.shards, corpus.division.train
    points = collect_points(shards, train, Selection.of(model))
    met = np.bincount(points.tag, minlength=len(shards.tags))
    names = category_names(shards.tags, met, model.categories.least)
    rows = CategoryRows(names)
    row_of_tag = rows.rows(shards.tags)
    parent = rows.rows([key_of(name) for name in names])
    network = delaunay_network(points.offsets, points.xy)
    walks = random_walks(network, model.categories, seed)
    counts = cooccurrences(walks, row_of_tag[points.tag], len(names), model.categories.window)
    vectors = embed_categories(counts, parent, model.point_width, model.categories, seed)
    notes = []
    if not counts.any():
        notes.append("The training tiles have too few points of interest: MMGR learns from images alone.")
    elif points.bare:
        notes.append(f"{points.bare} training tiles have no point of interest and take part in the views alone.")
    numbers = {"pois": len(points.tag), "poi_categories": len(names) - len({key_of(n) for n in names} | {ROOT})}
    return Categories(names, vectors.numpy(), numbers, tuple(notes))


@dataclass(frozen=True)
class Points:
    """``N`` points, each once, in groups of common ground: group g is ``offsets[g]:offsets[g + 1]``."""

    offsets: NDArray[np.int64]
    xy: NDArray[
        np.float64
    ]  # (N, 2) metres from the corner of the group's ground; of tiles without a place, their units
    tag: NDArray[np.int64]  # (N,) category, as a tag of the shards
    bare: int  # tiles without any


def collect_points(shards: TileShards, tiles: NDArray[np.int64], selection: Selection) -> Points:
    """Return the points on ``tiles`` (T,); one that lies on several overlapping tiles counts once.

    A group is a store; a tile that says not where it lies is a group of its own.
    """
    ranks = selection.ranks(shards.tags)
    bounds = np.concatenate([ground.bounds_m for ground in shards.grounds])
    store = np.repeat(np.arange(len(shards.grounds)), [len(g.bounds_m) for g in shards.grounds])
    found = []
    bare = 0
    for start in range(0, len(tiles), _CHUNK):
        chosen = tiles[start : start + _CHUNK]
        graphs = selection(shards.graphs(chosen), ranks)
        has = np.zeros(len(chosen), bool)
        for name in NODE_TYPES:
            n = graphs.nodes[name]
            own = ragged.owners(n.offsets)
            has[own] = True
            tile = chosen[own]
            west, south, east, north = bounds[tile].T
            placed = np.isfinite(bounds[tile]).all(axis=1)
            u, v = n.centroid.T.astype(np.float64)
            x = np.where(placed, west + u * (east - west), u)
            y = np.where(placed, north - v * (north - south), v)
            group = np.where(placed, store[tile], len(shards.grounds) + tile)
            found.append((group, n.osm_type.astype(np.int64), n.osm_id, n.tag_ids.astype(np.int64), x, y))
        bare += int((~has).sum())
    empty = np.zeros(0, np.int64)
    group, kind, number, tag, x, y = (
        (np.concatenate(column) for column in zip(*found, strict=True)) if found else (empty,) * 6
    )
    order = np.lexsort((number, kind, group))
    group, kind, number = group[order], kind[order], number[order]
    new = np.ones(len(order), bool)
    new[1:] = (group[1:] != group[:-1]) | (kind[1:] != kind[:-1]) | (number[1:] != number[:-1])
    order, group = order[new], group[new]
    sizes = np.unique(group, return_counts=True)[1]
    xy = np.stack([x[order], y[order]], axis=1).astype(np.float64)
    return Points(ragged.offsets_of(sizes), xy, tag[order], bare)
