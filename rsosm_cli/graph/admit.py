"""Which objects enter the graph: those that are something on the ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.graph.vocabulary import CLASS_KEYS, matches

# Keys that say what a thing is, besides the two under which OSM keeps the divisions of the map itself.
_THINGS = frozenset(CLASS_KEYS) - {"boundary", "place"}


def left_out(tags: Sequence[Mapping[str, str]], patterns: Sequence[str]) -> NDArray[np.bool_]:
    """Return (N,) whether each object carries one of ``patterns`` and nothing that makes it a thing on the ground.

    A pattern is ``key=value``, the value a shell pattern. A river or a road that is a border, too, stays: it has
    another key of :data:`~rsosm_cli.graph.vocabulary.CLASS_KEYS` (`place` aside).
    """
    found = np.zeros(len(tags), bool)
    for key in {pattern.partition("=")[0] for pattern in patterns}:
        values = tuple(p.partition("=")[2] for p in patterns if p.partition("=")[0] == key)
        carry = np.flatnonzero(np.fromiter((key in t for t in tags), bool, len(tags)))
        for i in carry.tolist():
            found[i] |= matches(tags[i][key], values) and (_THINGS - {key}).isdisjoint(tags[i])
    return found
