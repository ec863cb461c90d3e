"""Groups of tiles that share no ground, so that one tile's objects are never partly another's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.tiles.shards import Ground


def groups_apart(grounds: Sequence[Ground], tiles: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a group number for each of ``tiles`` (M,), such that no two of a group overlap.

    On a grid whose tiles overlap by half that makes four groups; where nothing overlaps, one. Tiles of different CRS,
    and chips without a place, are taken not to overlap.
    """
    from scipy.spatial import cKDTree

    bounds = np.concatenate([g.bounds_m for g in grounds])[tiles]  # (M, 4)
    names = np.concatenate([np.repeat(g.crs, len(g.bounds_m)) for g in grounds])[tiles]
    placed: NDArray[np.bool_] = np.all(np.isfinite(bounds), axis=1)
    groups = np.zeros(len(tiles), dtype=np.int64)
    for crs in np.unique(names[placed]):
        rows = np.flatnonzero(placed & (names == crs))
        corners = bounds[rows, :2]
        side = float((bounds[rows, 2] - bounds[rows, 0]).max())
        # A millionth of slack: neighbours on a grid touch, and touching is not sharing.
        near = cKDTree(corners).query_ball_point(corners, side * (1 - 1e-6), p=math.inf)
        groups[rows] = _coloured(corners, near)
    return groups


def _coloured(corners: NDArray[np.float64], near: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return the smallest number for each tile that no tile near it has, tiles taken row by row."""
    colour = np.full(len(corners), -1, dtype=np.int64)
    for i in np.lexsort(corners.T):
        taken = set(colour[near[i]].tolist())
        colour[i] = next(c for c in range(len(taken) + 1) if c not in taken)
    return colour
