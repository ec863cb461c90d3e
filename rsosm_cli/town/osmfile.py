"""Writes features as an OSM file: shared nodes, closed ways, multipolygon relations, an administrative boundary."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import osmium
import shapely
from numpy.typing import NDArray
from osmium.osm import mutable
from shapely import Point, Polygon

from rsosm_cli.town.tagging import Feature, Tags
from rsosm_cli.workspace import atomic

_SCALE = 10_000_000  # OSM keeps coordinates as whole multiples of 1e-7 degrees


class _Writer:
    """Collects elements, then writes them sorted: nodes, ways, relations."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], int] = {}
        self.node_tags: dict[int, Tags] = {}
        self.ways: list[tuple[list[int], Tags]] = []
        self.relations: list[tuple[list[tuple[int, str]], Tags]] = []  # (way id, role)

    def node(self, lon: float, lat: float) -> int:
        key = (round(lon * _SCALE), round(lat * _SCALE))
        return self.nodes.setdefault(key, len(self.nodes) + 1)

    def way(self, coords: NDArray[np.float64], tags: Tags) -> int:
        """Add a way along coordinates (n, 2) in degrees; return its id, 0 if it shrank to a point."""
        refs: list[int] = []
        for lon, lat in coords.tolist():
            number = self.node(lon, lat)
            if not refs or refs[-1] != number:
                refs.append(number)
        if len(refs) < 2:
            return 0
        self.ways.append((refs, tags))
        return len(self.ways)

    def add(self, feature: Feature) -> None:
        geometry = feature.geometry
        if isinstance(geometry, Point):
            self.node_tags.setdefault(self.node(geometry.x, geometry.y), feature.tags)
        elif isinstance(geometry, Polygon):
            # OSM's rings by habit: nothing depends on their direction.
            outer = np.array(geometry.exterior.coords)
            if not geometry.interiors:
                self.way(outer, feature.tags)
                return
            members = [(self.way(outer, {}), "outer")]
            members += [(self.way(np.array(ring.coords), {}), "inner") for ring in geometry.interiors]
            self.relations.append((members, {"type": "multipolygon", **feature.tags}))
        else:
            self.way(np.array(geometry.coords), feature.tags)

    def boundary(self, ring: NDArray[np.float64], tags: Tags) -> None:
        """Add a boundary relation whose ring (n, 2), closed, is split into four ways."""
        cuts = np.linspace(0, len(ring) - 1, 5).astype(int)
        edge = {"boundary": "administrative", "admin_level": tags["admin_level"]}
        members = [(self.way(ring[a : b + 1], edge), "outer") for a, b in itertools.pairwise(cuts)]
        self.relations.append((members, {"type": "boundary", **tags}))

    def write(self, path: Path, box: tuple[float, float, float, float]) -> None:
        header = osmium.io.Header()
        header.set("generator", "rsosm demo")
        west, south, east, north = box
        header.add_box(osmium.osm.Box(osmium.osm.Location(west, south), osmium.osm.Location(east, north)))
        with atomic(path) as part:
            # The part's name does not say the format, so it is given.
            target = osmium.io.File(str(part), "osm.pbf")
            with osmium.SimpleWriter(target, header=header, overwrite=True) as out:
                for (lon, lat), number in self.nodes.items():
                    location = (lon / _SCALE, lat / _SCALE)
                    tags = self.node_tags.get(number, {})
                    out.add_node(mutable.Node(id=number, version=1, location=location, tags=tags))
                for number, (refs, tags) in enumerate(self.ways, 1):
                    out.add_way(mutable.Way(id=number, version=1, nodes=refs, tags=tags))
                for number, (members, tags) in enumerate(self.relations, 1):
                    listed = [("w", way, role) for way, role in members]
                    out.add_relation(mutable.Relation(id=number, version=1, members=listed, tags=tags))


def write_osm(
    path: Path,
    features: Sequence[Feature],
    boundary: Polygon,
    boundary_tags: Tags,
    box: tuple[float, float, float, float],
) -> None:
    """Write features and a boundary relation (all WGS 84) as an OSM file with ``box`` in its header."""
    writer = _Writer()
    for feature in features:
        writer.add(feature)
    writer.boundary(shapely.get_coordinates(boundary.exterior), boundary_tags)
    writer.write(path, box)
