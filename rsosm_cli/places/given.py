"""Boundaries that the user gives: a vector file, a box, the box of an extract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsosm_cli.errors import FormatError, NoFileError, UsageError
from rsosm_cli.geometry import WGS84
from rsosm_cli.places.place import Place, checked, lies_across


def place_of_file(name: str, path: Path) -> Place:
    """Return all polygons of a vector file as one place. Raises MissingError, FormatError, UsageError."""
    import shapely

    from rsosm_cli.osm.vectors import read_vectors

    if not path.is_file():
        raise NoFileError(f"There is no boundary file {path}.", hint="Give a GeoJSON, GeoPackage or shapefile.")
    frame = read_vectors(path).to_crs(WGS84)
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
        # The commonest mistakes: latitude before longitude, and west, east, south, north.
        if _on_globe(south, west, north, east):
            hint = f"Is it latitude before longitude? Then write {south:g} {west:g} {north:g} {east:g}. {hint}"
        elif _on_globe(west, east, south, north):
            hint = f"Is it west, east, south, north? Then write {west:g} {east:g} {south:g} {north:g}. {hint}"
        raise UsageError(f"{source} {west:g} {south:g} {east:g} {north:g} is not a box on the globe.", hint=hint)
    return checked(Place(name, shapely.box(west, south, east, north), source))


def _on_globe(west: float, south: float, east: float, north: float) -> bool:
    return -180 <= west < east <= 180 and -90 <= south < north <= 90


def place_of_extract(name: str, files: Sequence[Path]) -> Place:
    """Return the box of OSM files (in their headers) or of vector files (of their features) as a place."""
    import shapely

    from rsosm_cli.osm.extract import LARGE, header_box, is_osm_file, nodes_box
    from rsosm_cli.osm.vectors import layers_of, read_vectors

    if not files:
        raise UsageError("--boundary extract needs a file.", hint="Add --osm FILE.osm.pbf")
    boxes = []
    for file in files:
        if is_osm_file(file):
            box = header_box(file)
            # Counting a country's nodes would take minutes, and such files have a box.
            if box is None and file.stat().st_size < LARGE:
                box = nodes_box(file)
        else:
            frames = [read_vectors(file, layer=layer).to_crs(WGS84) for layer in layers_of(file)]
            box = shapely.total_bounds(np.concatenate([frame.geometry.to_numpy() for frame in frames]))
        if box is None:
            raise FormatError(
                f"{file.name} has no box in its header.", hint="Give the place with --bbox or --boundary FILE."
            )
        boxes.append(shapely.box(*box))
    source = "box of " + ", ".join(f.name for f in files)
    return checked(Place(name, shapely.union_all(boxes), source))
