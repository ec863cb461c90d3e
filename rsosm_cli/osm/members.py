"""Which ways make which multipolygon: known from the relations before the ways are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.blocks import Relations, Tags, Ways, rank, sort_ways
from rsosm_cli.osm.rules import informative
from rsosm_cli.osm.shapes import spread


class Members:
    """Which ways are members of the relations that should become areas; these come in ``portions``."""

    def __init__(self, portions: Iterable[Relations]) -> None:
        self._tags: list[Tags] = []
        relations, ways, outers = [], [], []
        for number, block in enumerate(portions):
            self._tags.append(block.tags)
            relations.append(block.id)
            members = np.unique(block.ways)
            ways.append(np.stack([members, np.full(len(members), number)]))
            lends = block.outer & block.tags.having("type", "multipolygon")[block.owner]
            rows = block.owner[lends]
            outers.append(np.stack([block.ways[lends], block.id[rows], np.full(len(rows), number), rows]))
        self.relations = np.concatenate([np.empty(0, np.int64), *relations])  # with boundaries
        self._order = np.argsort(self.relations, kind="stable")
        self._firsts = np.cumsum([0, *map(len, relations)])[:-1]  # of each portion
        # Ways, sorted, and the portion that needs each; and the multipolygon that each is an outer of (its id, portion
        # and row in it). Both may have a way several times.
        self.ways, self._needed_by = _sorted(ways, 2)
        self.outers, *self._outer_of = _sorted(outers, 4)

    def outer_of(self, first: int, last: int) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield id and informative tags of the multipolygons that the outers from ``first`` to ``last`` belong to."""
        for relation, portion, row in zip(*(part[first:last].tolist() for part in self._outer_of), strict=True):
            yield relation, informative(self._without_type(portion, row))

    def tags_of(self, relation: int) -> dict[str, str]:
        """Return the tags of a relation but for its type; libosmium would not read texts that are no UTF-8."""
        row = int(self._order[np.searchsorted(self.relations, relation, sorter=self._order)])
        portion = int(np.searchsorted(self._firsts, row, "right")) - 1
        return self._without_type(portion, row - int(self._firsts[portion]))

    def _without_type(self, portion: int, row: int) -> dict[str, str]:
        return {k: v for k, v in self._tags[portion].of(row).items() if k != "type"}

    def needed_by(self, ways: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield portions with the rows of ``ways`` that they need."""
        first, last = (np.searchsorted(self.ways, ways, side) for side in ("left", "right"))
        counts = last - first
        rows, portions = np.repeat(np.arange(len(ways)), counts), self._needed_by[spread(first, counts)]
        for portion in np.unique(portions).tolist():
            yield portion, rows[portions == portion]


class MemberFile:
    """The ways of a portion of the relations, written as they come."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self._last = np.iinfo(np.int64).min
        self._sorted = True
        path.write_bytes(header)

    def append(self, ways: Ways, rows: NDArray[np.int64]) -> None:
        ranks = np.concatenate([[self._last], rank(ways.id[rows])])
        self._sorted &= bool((ranks[1:] > ranks[:-1]).all())
        self._last = ranks[-1]
        with self.path.open("ab") as file:
            ways.write(rows, file)

    def finish(self) -> Path:
        """Return the file, its ways in the order that libosmium asks for: not every OSM file has them in it."""
        if not self._sorted:
            sort_ways(self.path)
        return self.path


def _sorted(parts: list[NDArray[np.int64]], rows: int) -> NDArray[np.int64]:
    """Return parts (``rows``, n) side by side, sorted by their first row."""
    joined = np.concatenate([np.empty((rows, 0), np.int64), *parts], axis=1)
    return joined[:, np.argsort(joined[0], kind="stable")]
