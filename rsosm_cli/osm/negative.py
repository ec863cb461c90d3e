"""Ways with nodes below zero: editors and converters give ids like -1 to what OSM does not have yet.

pyosmium's index of node locations has only one map, of ids from zero on, and its filter of ids takes no others. The few
files that need more are read by a loop over their nodes and ways.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.blocks import FORM
from rsosm_cli.osm.reader import osm_file

if TYPE_CHECKING:
    import osmium

_ABOVE_ALL = 1 << 44  # no node of OSM has an id beyond


def locate_ways(path: Path, ids: NDArray[np.int64], locations: osmium.NodeLocationsForWays, target: Path) -> None:
    """Write the ways ``ids`` of a file with the places of their nodes, also of those below zero.

    ``locations`` knows the other nodes already. The nodes below zero get ids above all others on the way, which nobody
    meets again: a way's shape is made of places.
    """
    import osmium

    listed = array("q", np.unique(ids).tobytes())
    moved = target.with_suffix(".moved.pbf")
    with osmium.SimpleWriter(osmium.io.File(str(moved), FORM.replace(",locations_on_ways=true", ""))) as writer:
        for item in osmium.FileProcessor(osm_file(path), osmium.osm.NODE | osmium.osm.WAY):
            found: Any = item
            if found.is_node():
                if found.id < 0 and found.location.valid():
                    writer.add_node(found.replace(id=_moved(found.id), tags={}))
            elif (at := bisect_left(listed, found.id)) < len(listed) and listed[at] == found.id:
                writer.add_way(found.replace(nodes=[_moved(node.ref) for node in found.nodes]))
    osmium.apply(str(moved), locations)  # first all nodes: the file may have ways before them
    with (
        osmium.SimpleWriter(osmium.io.File(str(target), FORM), overwrite=True) as writer,
        osmium.io.Reader(str(moved), osmium.osm.WAY) as reader,
    ):
        osmium.apply(reader, locations, writer)
    moved.unlink()


def _moved(node: int) -> int:
    return node if node >= 0 else _ABOVE_ALL - node
