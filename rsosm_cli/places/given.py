"""Boundaries that the user gives: a vector file, a box, the box of an extract."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsosm_cli.errors import FormatError, NoFileError, UsageError
from rsosm_cli.geometry import WGS84
from rsosm_cli.places.place import Place, checked, lies_across

log = logging.getLogger("rsosm")


def place_of_file(name: str, path: Path) -> Place:
    """Return all polygons of a vector file as one place. Raises MissingError, FormatError, UsageError."""
    import shapely

    from rsosm_cli.osm.vectors import layers_of, read_vectors, refuse_several

    if not path.is_file():
        raise NoFileError(f"There is no boundary file {path}.", hint="Give a GeoJSON, GeoPackage or shapefile.")
    layers = layers_of(path)
    refuse_several(path.name, layers)
    frame = read_vectors(path, layer=layers[0]).to_crs(WGS84)
    geometry = frame.geometry[frame.geom_type.isin(["Polygon", "MultiPolygon"])].to_numpy()
    if not len(geometry):
        raise UsageError(f"{path.name} holds no polygon.", hint="A boundary is one or more polygons.")
    notes = (f"The {len(geometry)} polygons of {path.name} together are the place.",) if len(geometry) > 1 else ()
    whole = shapely.union_all(shapely.make_valid(geometry))
    return checked(Place(name, whole, path.name, notes=notes))


def place_of_box(name: str, bbox: Sequence[float], source: str = "--bbox") -> Place:
    """Return the box west, south, east, north in degrees as a place. Raises :class:`UsageError`."""
    import shapely

    if len(bbox) != 4 or not all(math.isfinite(v) for v in bbox):
        raise UsageError(
            f"--bbox {' '.join(map(str, bbox))} is not four numbers.", hint="Give WEST SOUTH EAST NORTH in degrees."
        )
    west, south, east, north = bbox
    beyond = east if east <= 180 else east - 360  # both are written
    sides = _on_globe(west, south, 180, north) and _on_globe(-180, south, beyond, north)
    if sides and beyond < west - 180:  # else west and east are mixed up
        raise lies_across(f"{source} {west:g} {south:g} {east:g} {north:g}", name, west, south, beyond, north)
    if not _on_globe(west, south, east, north):
        hint = "Give WEST SOUTH EAST NORTH in degrees, west below east and south below north."
        # The commonest mistakes: latitude before longitude, west and east swapped, and west, east, south, north.
        if _on_globe(south, west, north, east):
            hint = f"Is it latitude before longitude? Then write {south:g} {west:g} {north:g} {east:g}. {hint}"
        elif _on_globe(east, south, west, north):
            hint = f"Are west and east swapped? Then write {east:g} {south:g} {west:g} {north:g}. {hint}"
        elif _on_globe(west, east, south, north):
            hint = f"Is it west, east, south, north? Then write {west:g} {east:g} {south:g} {north:g}. {hint}"
        raise UsageError(f"{source} {west:g} {south:g} {east:g} {north:g} is not a box on the globe.", hint=hint)
    return checked(Place(name, shapely.box(west, south, east, north), source))


def _on_globe(west: float, south: float, east: float, north: float) -> bool:
    return -180 <= west < east <= 180 and -90 <= south < north <= 90


def place_of_extract(name: str, files: Sequence[Path]) -> Place:
    """Return the box of OSM files (in their headers, else of their nodes) or of vector files (of their features).

    Raises :class:`MissingError`, :class:`FormatError` (unreadable, or empty), :class:`UsageError`.
    """
    import shapely

    from rsosm_cli.osm.extract import LARGE, header_box, is_osm_file, nodes_box
    from rsosm_cli.osm.vectors import layers_of, read_vectors

    if not files:
        raise UsageError("--boundary extract needs a file.", hint="Add --osm FILE.osm.pbf")
    boxes = []
    for file in files:
        if is_osm_file(file):
            box = header_box(file)
            if box is None:
                if file.stat().st_size > LARGE:  # a country's nodes take minutes, but such files have a box
                    log.info("%s has no box in its header: that of its nodes is looked for.", file.name)
                box = nodes_box(file)
        else:
            frames = [read_vectors(file, layer=layer).to_crs(WGS84) for layer in layers_of(file)]
            corners = shapely.bounds(np.concatenate([frame.geometry.to_numpy() for frame in frames]))
            corners = corners[~np.isnan(corners).any(axis=1)]
            box = (*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0)) if len(corners) else None
        if box is None:
            raise FormatError(
                f"{file.name} holds no objects, so that it has no box.",
                hint="Give a file with objects, or the place with --bbox or --boundary FILE.",
            )
        boxes.append(shapely.box(*box))
    source = "box of " + ", ".join(f.name for f in files)
    return checked(Place(name, shapely.union_all(boxes), source))
