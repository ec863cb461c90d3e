"""Which pieces of a tile may meet: the pairs whose bounding boxes do, over all tiles in one sweep."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Candidates looked at together: bounds the memory of a dense block (about 100 bytes a candidate).
_CHUNK = 2_000_000
# Places up to which fewer calls are quicker than fewer steps (the graph of one tile).
_FEW = 4_096


def ragged(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenated ranges ``starts[i] .. starts[i] + counts[i]``."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if total < _FEW:
        return np.arange(total) + np.repeat(starts - (ends - counts), counts)
    # Steps of one, and from the end of a range to the start of the next: a third of the time.
    there = counts.nonzero()[0]
    starts, counts, ends = starts[there], counts[there], ends[there]
    steps = np.ones(total, np.int64)
    steps[0] = starts[0]
    steps[ends[:-1]] = starts[1:] - starts[:-1] - counts[:-1] + 1
    return steps.cumsum(out=steps)


def meeting_boxes(
    tile: NDArray[np.int64], bounds: NDArray[np.float64], lone: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield chunks of pairs (p, q), p < q, of one tile whose boxes share a point; two ``lone`` pieces never pair.

    ``tile`` (P,), ``bounds`` (P, 4) west, south, east, north. A sweep along x, sorted once for all tiles.
    """
    if not len(tile):
        return
    order = np.lexsort((bounds[:, 0], tile))
    west, south, east, north = bounds[order].T
    t = tile[order]
    # One number line for all tiles: x from the west of the tile's pieces, a tile's span beyond the one before. Rounding
    # keeps the order of equal values, so it can add candidates but lose none.
    first = np.flatnonzero(np.r_[True, t[1:] != t[:-1]])
    run = np.cumsum(np.r_[True, t[1:] != t[:-1]]) - 1
    origin = west[first][run]
    span = float((east - origin).max()) * 2 + 1.0
    start = run * span + (west - origin)
    stop = run * span + (east - origin)
    counts = np.searchsorted(start, stop, side="right") - np.arange(len(t)) - 1
    lone_sorted = lone[order]
    cuts = np.searchsorted(np.cumsum(counts), np.arange(_CHUNK, counts.sum() + _CHUNK, _CHUNK)) + 1
    begin = 0
    for end in np.minimum(cuts, len(t)):
        n = counts[begin:end]
        i = np.repeat(np.arange(begin, end), n)
        j = ragged(np.arange(begin, end) + 1, n)
        begin = int(end)
        meet = (south[i] <= north[j]) & (south[j] <= north[i]) & (west[j] <= east[i]) & (t[i] == t[j])
        meet &= ~(lone_sorted[i] & lone_sorted[j])
        a, b = order[i[meet]], order[j[meet]]
        yield np.minimum(a, b), np.maximum(a, b)
