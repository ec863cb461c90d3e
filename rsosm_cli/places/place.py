"""A place: the ground that is asked for, and ``place.geojson``, which keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.geometry import area_km2
from rsosm_cli.workspace import write_text

if TYPE_CHECKING:
    from shapely import Geometry

# Smaller is a house or a mapping error, not a city (a city block has about 0.01 km2).
TINY_KM2 = 0.01
OSM_SOURCE = {
    "name": "OpenStreetMap",
    "licence": "ODbL-1.0",
    "attribution": "© OpenStreetMap contributors",
}


@dataclass(frozen=True)
class Place:
    """A city's ground. ``geometry``: polygon or multipolygon, WGS 84."""

    name: str
    geometry: Geometry
    source: str  # where the boundary is from: a file's name, "Nominatim", "--bbox" ...
    osm_id: str = ""  # R1155955; empty where the boundary is no OSM object
    admin_level: int | None = None
    country: str = ""
    notes: tuple[str, ...] = ()  # what was chosen on the way, one sentence each
    asked: float | None = None  # when a server answered, in seconds since 1970; None: no server did

    @property
    def area_km2(self) -> float:
        return area_km2(self.geometry)

    @property
    def from_osm(self) -> bool:
        return bool(self.osm_id)

    def sentence(self, called: str) -> str:
        """Return which ground it is; ``called``: what its source calls it."""
        level = "" if self.admin_level is None else f"admin_level {self.admin_level}"
        facts = ", ".join(filter(None, (self.osm_id, level, self.country, f"{self.area_km2:,.1f} km²")))
        return f"{self.name} is {called} ({facts}) of {self.source}."


def checked(place: Place) -> Place:
    """Return ``place`` if it can be a city: a valid surface on the globe that is not tiny. Raises UsageError."""
    from dataclasses import replace

    import shapely

    geometry = place.geometry
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry, method="structure", keep_collapsed=False)
    parts = [p for p in shapely.get_parts(geometry) if p.geom_type in ("Polygon", "MultiPolygon")]
    surface = shapely.union_all(parts) if len(parts) > 1 else (parts[0] if parts else shapely.Polygon())
    if surface.is_empty:
        raise UsageError(
            f"The boundary of {place.name} ({place.source}) has no surface.", hint="Give polygons: --boundary FILE"
        )
    west, south, east, north = surface.bounds
    if west < -180 or east > 180 or south < -90 or north > 90:
        raise UsageError(
            f"The boundary of {place.name} ({place.source}) leaves the globe: {west:g} {south:g} {east:g} {north:g}.",
            hint="Coordinates are longitude and latitude, or the file must say its CRS.",
        )
    if (sides := _beyond_180(surface)) is not None:
        raise lies_across(
            f"The boundary of {place.name} ({place.source})", place.name, sides[1], south, sides[0], north
        )
    place = replace(place, geometry=surface)
    boxes = shapely.bounds(shapely.get_parts(surface))
    if (width := float((boxes[:, 2] - boxes[:, 0]).max())) > 180:  # neither an area nor a grid of metres makes sense
        raise UsageError(
            f"The boundary of {place.name} ({place.source}) is {width:g} degrees wide, more than half the world.",
            hint="Give the ground of a city: --boundary FILE or --bbox WEST SOUTH EAST NORTH",
        )
    if place.area_km2 < TINY_KM2:
        raise UsageError(
            f"The boundary of {place.name} ({place.source}) encloses only {place.area_km2 * 1e6:,.0f} m².",
            hint="Give the ground that you mean: --boundary FILE or --bbox WEST SOUTH EAST NORTH",
        )
    return place


def lies_across(what: str, name: str, west: float, south: float, east: float, north: float) -> UsageError:
    """Return the refusal of what reaches from ``west`` over the 180th meridian to ``east``: degrees end there."""
    south_north = f"{south:.4f}", f"{north:.4f}"
    sides = [
        f'--city "{name} {side}" --bbox {first:.4f} {south_north[0]} {last:.4f} {south_north[1]}'
        for side, first, last in (("west", west, 180.0), ("east", -180.0, east))
    ]
    return UsageError(
        f"{what} lies on both sides of the 180th meridian, where a map would be as wide as the world.",
        hint=f"Fetch its two sides as two cities: {' and '.join(sides)}",
    )


def _beyond_180(surface: Geometry) -> tuple[float, float] | None:
    """Return the edges, from west to east, of a stretch of more than half the world that parts of a surface enclose.

    The other way round, across the 180th meridian, is the shorter one then; ``None`` where there is no such stretch.
    """
    import numpy as np
    import shapely

    boxes = shapely.bounds(shapely.get_parts(surface))
    boxes = boxes[np.argsort(boxes[:, 0])]
    reached = np.maximum.accumulate(boxes[:, 2])
    gaps = boxes[1:, 0] - reached[:-1]
    if not (gaps > 180).any():
        return None
    at = int(gaps.argmax())
    return float(reached[at]), float(boxes[at + 1, 0])


def write_place(path: Path, place: Place) -> None:
    """Write ``place.geojson``: one feature, longitude and latitude with seven decimals (a centimetre)."""
    import shapely

    properties: dict[str, Any] = {
        "name": place.name,
        "source": place.source,
        "osm_id": place.osm_id,
        "admin_level": place.admin_level,
        "country": place.country,
        "area_km2": round(place.area_km2, 6),
    }
    snapped = shapely.transform(shapely.normalize(place.geometry), lambda xy: xy.round(7))
    geometry = json.loads(shapely.to_geojson(snapped))
    feature = {"type": "Feature", "properties": properties, "geometry": geometry}
    write_text(path, json.dumps({"type": "FeatureCollection", "features": [feature]}, ensure_ascii=False) + "\n")


def read_place(path: Path) -> Place:
    """Return the place of a ``place.geojson`` of ours. Raises :class:`MissingError` or :class:`FormatError`."""
    import shapely

    try:
        feature = json.loads(path.read_text(encoding="utf-8"))["features"][0]
        geometry = shapely.from_geojson(json.dumps(feature["geometry"]))
        facts = feature["properties"]
        return Place(
            name=str(facts["name"]),
            geometry=geometry,
            source=str(facts["source"]),
            osm_id=str(facts["osm_id"]),
            admin_level=facts["admin_level"],
            country=str(facts["country"]),
        )
    except FileNotFoundError:
        raise MissingError(f"There is no place {path}.", hint="Make it with rsosm fetch.") from None
    except (ValueError, KeyError, IndexError, TypeError, shapely.errors.GEOSException) as error:
        raise FormatError(
            f"{path} is not a place.geojson of rsosm.", hint="Make it again with rsosm fetch --force."
        ) from error
