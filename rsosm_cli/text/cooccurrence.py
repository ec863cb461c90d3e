"""Embeddings of POI categories by co-occurrence: walks over the network of points, and a skip-gram of what they meet.

MMGR (ISPRS Journal 201, 2023), section 3.2: walks as in node2vec (Grover and Leskovec, 2016) over the Delaunay network;
skip-gram with negative samples (Mikolov et al., 2013); siblings in the tree of categories pulled together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rsosm_cli.graph.delaunay import delaunay_pairs
from rsosm_cli.settings import CategorySettings

Ints = NDArray[np.int64]

# Exponent of the frequencies that negatives are drawn by (word2vec).
_NOISE = 0.75
_RATE = 0.05  # of Adam; the objective is small and smooth
_ROWS = 1024  # categories at a time against all: bounds the memory of thousands of categories


@dataclass(frozen=True)
class Network:
    """Neighbours of ``N`` points: those of point i are ``neighbours[starts[i]:starts[i + 1]]``, ascending."""

    starts: Ints  # (N + 1,)
    neighbours: Ints


def delaunay_network(offsets: Ints, xy: NDArray[np.float64]) -> Network:
    """Return the Delaunay network within each group of points: group g has ``xy[offsets[g]:offsets[g + 1]]``."""
    sizes = np.diff(offsets)
    group = np.repeat(np.arange(len(sizes)), sizes)
    # In units of the group, near the origin: Qhull loses edges to rounding elsewhere.
    some = sizes > 0
    low, high = np.zeros((len(sizes), 2)), np.ones((len(sizes), 2))
    low[some] = np.minimum.reduceat(xy, offsets[:-1][some]) if len(xy) else 0
    high[some] = np.maximum.reduceat(xy, offsets[:-1][some]) if len(xy) else 1
    span = np.maximum((high - low).max(axis=1), 1e-9)
    p, q = delaunay_pairs(offsets, (xy - low[group]) / span[group, None])
    source, target = np.concatenate([p, q]), np.concatenate([q, p])
    order = np.lexsort((target, source))
    starts = np.zeros(len(xy) + 1, np.int64)
    np.cumsum(np.bincount(source, minlength=len(xy)), out=starts[1:])
    return Network(starts, target[order])


def random_walks(network: Network, settings: CategorySettings, seed: int) -> Ints:
    """Return (N * walks, steps) points met by walks from every point; -1 where a point has no neighbour to go to.

    All walks go at once. A step from v, coming from u, goes to u with weight 1 / p, to a common neighbour of both with
    1, to another one with 1 / q.
    """
    starts, neighbours = network.starts, network.neighbours
    n = len(starts) - 1
    draw = np.random.default_rng(seed)
    here = np.tile(np.arange(n), settings.walks)
    walks = np.full((len(here), settings.steps), -1, np.int64)
    walks[:, 0] = here
    if not len(neighbours):
        return walks
    # Edges as single numbers, ascending: to ask whether two points are neighbours.
    edges = np.repeat(np.arange(n), np.diff(starts)) * n + neighbours
    moving = np.flatnonzero(np.diff(starts)[here] > 0)
    before = np.full(len(here), -1, np.int64)
    for step in range(1, settings.steps):
        v, u = here[moving], before[moving]
        degree = starts[v + 1] - starts[v]
        first = np.cumsum(degree) - degree
        walker = np.repeat(np.arange(len(v)), degree)
        options = neighbours[np.arange(degree.sum()) - first[walker] + starts[v][walker]]
        weight = np.ones(len(options))
        if step > 1:
            back = options == u[walker]
            pair = u[walker] * n + options
            found = np.minimum(np.searchsorted(edges, pair), len(edges) - 1)
            common = edges[found] == pair
            weight = np.where(back, 1 / settings.p, np.where(common, 1.0, 1 / settings.q))
        total = np.cumsum(weight)
        low = total[first] - weight[first]
        mark = low + draw.random(len(v)) * (total[first + degree - 1] - low)
        # Rounding may put a mark on the border of the next walker's options.
        taken = np.clip(np.searchsorted(total, mark, side="right"), first, first + degree - 1)
        before[moving], here[moving] = v, options[taken]
        walks[moving, step] = here[moving]
    return walks


def cooccurrences(walks: Ints, category: Ints, n_categories: int, window: int) -> Ints:
    """Return (K, K) how often two categories are at most ``window`` points of a walk apart; ``category`` (N,)."""
    counts = np.zeros(n_categories**2, np.int64)
    for apart in range(1, min(window, walks.shape[1] - 1) + 1):
        a, b = walks[:, :-apart].ravel(), walks[:, apart:].ravel()
        both = (a >= 0) & (b >= 0)
        counts += np.bincount(category[a[both]] * n_categories + category[b[both]], minlength=n_categories**2)
    table = counts.reshape(n_categories, n_categories)
    return table + table.T


def embed_categories(counts: Ints, parent: Ints, width: int, settings: CategorySettings, seed: int) -> Tensor:
    """Return the vectors (K, ``width``) of categories with co-occurrences ``counts`` (K, K), of mean square 1.

    ``parent`` (K,) is the row of each category's parent, its own for the root. The skip-gram's loss is taken over all
    pairs with its negatives in expectation (Levy and Goldberg, 2014), so that nothing is drawn but the start. A
    category without co-occurrences has the mean of its children, or else the vector of its parent.
    """
    generator = torch.Generator().manual_seed(seed)
    k = len(counts)
    pairs = torch.from_numpy(counts).float()
    total = pairs.sum().clamp(min=1)
    often = pairs.sum(1) / total  # (K,)
    noise = often**_NOISE / (often**_NOISE).sum().clamp(min=1e-12)
    pairs = pairs / total
    group = torch.from_numpy(parent)
    known = often > 0
    # Siblings: the children of one parent that are known; the parent itself stands for the rest of them.
    weight = known.float()
    members = torch.zeros(k).index_add(0, group, weight).clamp(min=1)
    inner = torch.randn(k, width, generator=generator).mul_(0.1).requires_grad_()
    outer = torch.randn(k, width, generator=generator).mul_(0.1).requires_grad_()
    optimizer = torch.optim.Adam([inner, outer], lr=_RATE)
    for _ in range(settings.updates if bool(known.any()) else 0):
        optimizer.zero_grad()
        for start in range(0, k, _ROWS):
            rows = slice(start, start + _ROWS)
            scores = inner[rows] @ outer.T
            hits = pairs[rows] * functional.logsigmoid(scores)
            misses = settings.negatives * often[rows, None] * noise * functional.logsigmoid(-scores)
            (-(hits + misses).sum()).backward()  # type: ignore[no-untyped-call]
        centre = torch.zeros(k, width).index_add(0, group, inner * weight[:, None]) / members[:, None]
        apart = ((inner - centre[group]).square().sum(1) * weight).sum() / weight.sum()
        (settings.siblings * apart).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    vectors = inner.detach()
    if not bool(known.any()):
        return torch.zeros(k, width)
    # What all have in common says nothing, and would drown what tells them apart.
    vectors = vectors - vectors[known].mean(0)
    return _fill(vectors / vectors[known].square().mean().clamp(min=1e-12).sqrt(), parent, known)


def _fill(vectors: Tensor, parent: Ints, known: Tensor) -> Tensor:
    """Return the vectors with those of unknown rows made of their relatives': keys first, then the root."""
    group, out = torch.from_numpy(parent), torch.where(known[:, None], vectors, 0)
    settled = known.clone()
    rows = torch.arange(len(out))
    root = rows[group == rows]
    for level in (group != group[group], group == group[group]):  # leaves tell keys, keys tell the root
        told = (settled & level & (group != rows)).float()
        count = torch.zeros(len(out)).index_add(0, group, told)
        mean = torch.zeros_like(out).index_add(0, group, out * told[:, None]) / count.clamp(min=1)[:, None]
        new = ~settled & (count > 0)
        out = torch.where(new[:, None], mean, out)
        settled |= new
    out = torch.where(settled[:, None], out, out[group])
    settled |= settled[group]
    return torch.where(settled[:, None], out, out[root])
