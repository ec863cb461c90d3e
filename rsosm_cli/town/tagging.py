"""What the mappers of the demo town put into OpenStreetMap: elements with tags, incomplete and uneven as they are.

A block mapped ``full`` has its land use (often), buildings by kind, points of interest and small things; ``buildings``
has bare outlines, as imports leave them; ``streets`` has nothing between its streets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.random import Generator
from shapely import LineString, Point, Polygon

from rsosm_cli.town.layout import Block, Layout
from rsosm_cli.town.objects import Building, Objects, Surface

Tags = dict[str, str]

_NAMES = (
    "Alder", "Almond", "Anchor", "Ash", "Baker", "Birch", "Bridge", "Canal", "Castle", "Cedar", "Chapel", "Cherry",
    "Church", "Copper", "Elm", "Falcon", "Farm", "Ferry", "Garden", "Granary", "Harbour", "Hazel", "Heron", "High",
    "Hill", "Juniper", "Lake", "Lark", "Laurel", "Lime", "Linden", "Maple", "Market", "Meadow", "Mill", "Mint",
    "North", "Oak", "Orchard", "Park", "Pine", "Poplar", "Quarry", "River", "Rose", "Sage", "Saddler", "School",
    "South", "Spring", "Station", "Sun", "Tanner", "Temple", "Thistle", "Walnut", "Weaver", "West", "Willow", "Wood",
)  # fmt: skip
_LANDUSE: dict[tuple[str, str], Tags] = {
    ("commercial", "perimeter"): {"landuse": "commercial"},
    ("commercial", "bigbox"): {"landuse": "retail"},
    ("green", "park"): {"leisure": "park"},
    ("green", "forest"): {"natural": "wood"},
    ("green", "pitch"): {"landuse": "recreation_ground"},
    ("green", "meadow"): {"landuse": "grass"},
    ("farmland", "fields"): {"landuse": "farmland"},
    ("farmland", "orchard"): {"landuse": "orchard", "trees": "apple_trees"},
    ("farmland", "meadow"): {"landuse": "meadow"},
}
_SHOPS = ("clothes", "bakery", "shoes", "hairdresser", "books", "jewelry", "convenience", "florist", "optician")
_AMENITIES = ("restaurant", "cafe", "bank", "bar", "pharmacy", "fast_food", "dentist", "post_office")
_OFFICES = ("company", "lawyer", "insurance", "estate_agent", "accountant")
_QUIET = ("kindergarten", "doctors", "place_of_worship", "community_centre", "recycling")
_SMALL = ({"amenity": "bench"}, {"amenity": "waste_basket"}, {"leisure": "picnic_table"}, {"tourism": "artwork"})


@dataclass(frozen=True)
class Feature:
    """An element before it has an id: a point, a line or a polygon (metres) with its tags."""

    geometry: Point | LineString | Polygon
    tags: Tags


def tag(rng: Generator, layout: Layout, objects: Objects) -> list[Feature]:
    """Return what is mapped of the town."""
    made = _network(rng, layout)
    made += _junctions(rng, layout)
    for block in layout.blocks:
        if block.mapped == "full":
            made += _ground(rng, block)
            made += _points(rng, block)
    for number, surface in objects.surfaces:
        if layout.blocks[number].mapped == "full":
            made += _surface(rng, surface)
    for number, path in objects.paths:
        if layout.blocks[number].mapped == "full":
            made.append(Feature(path, {"highway": "footway", "surface": str(rng.choice(["gravel", "paved"]))}))
    for building in objects.buildings:
        made += _building(rng, building, layout.blocks[building.block])
    made += _trees(rng, layout, objects)
    return made


def _one(rng: Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _network(rng: Generator, layout: Layout) -> list[Feature]:
    made = [
        Feature(layout.river, {"waterway": "river", "name": "Ros"}),
        Feature(layout.river_water, {"natural": "water", "water": "river"}),
        Feature(layout.lake, {"natural": "water", "water": "lake", "name": "Ros Mere"}),
        Feature(layout.rail, {"railway": "rail", "gauge": "1435", "electrified": "contact_line"}),
    ]
    order = rng.permutation(len(_NAMES))
    ends = ("Street", "Road", "Lane", "Avenue")
    speed = {"primary": "50", "secondary": "50", "residential": "30"}
    for road in layout.roads:
        tags = {"highway": road.highway}
        if road.highway == "track":
            tags |= {"tracktype": f"grade{1 + road.number % 5}"}
        else:
            name = _NAMES[order[(road.number + 37 * (road.number // 100)) % len(_NAMES)]]
            tags |= {"name": f"{name} {ends[road.number % 4]}", "surface": "asphalt", "maxspeed": speed[road.highway]}
            if road.highway == "primary":
                tags |= {"lanes": "4", "lit": "yes"}
        if road.bridge:
            tags |= {"bridge": "yes", "layer": "1"}
        made.append(Feature(road.line, tags))
    return made


def _junctions(rng: Generator, layout: Layout) -> list[Feature]:
    made = []
    for road in layout.roads:
        if road.highway in ("primary", "secondary"):
            start, middle = Point(road.line.coords[0]), road.line.interpolate(0.5, normalized=True)
            if rng.random() < 0.3:
                made.append(Feature(start, {"highway": "traffic_signals"}))
            if rng.random() < 0.25:
                made.append(
                    Feature(middle, {"highway": "bus_stop", "name": f"{_one(rng, _NAMES)} Stop", "bench": "yes"})
                )
            elif rng.random() < 0.3:
                made.append(Feature(middle, {"highway": "crossing", "crossing": "zebra"}))
        elif road.highway == "residential" and rng.random() < 0.12:
            made.append(Feature(road.line.interpolate(0.3, normalized=True), {"highway": "street_lamp"}))
    return made


def _ground(rng: Generator, block: Block) -> list[Feature]:
    made = []
    if rng.random() < 0.55:
        tags = dict(_LANDUSE.get((block.use, block.look), {"landuse": block.use}))
        if rng.random() < 0.06:  # out of date
            tags = {"landuse": _one(rng, ("farmland", "greenfield", "brownfield", "residential"))}
        if tags.get("leisure") == "park":
            tags["name"] = f"{_one(rng, _NAMES)} Park"
        made.append(Feature(block.polygon.buffer(-4, join_style="mitre"), tags))
    fence = {"industrial": {"barrier": "fence"}, "residential": {"barrier": "hedge"}, "farmland": {"barrier": "hedge"}}
    if block.use in fence and rng.random() < 0.35:
        ring = np.array(block.polygon.buffer(-6, join_style="mitre").envelope.boundary.coords)
        line = shapely.intersection(LineString(ring[:3]), block.polygon.buffer(-6))
        if isinstance(line, LineString) and line.length > 20:
            made.append(Feature(line, fence[block.use]))
    return [f for f in made if isinstance(f.geometry, (LineString, Polygon)) and not f.geometry.is_empty]


def _points(rng: Generator, block: Block) -> list[Feature]:
    """Return the points of interest of a block: many where people shop, few where they live."""
    per_ha = {"commercial": 9.0, "residential": 0.7, "industrial": 0.8, "green": 1.6, "farmland": 0.12}.get(
        block.use, 0
    )
    count = min(int(rng.poisson(per_ha * block.polygon.area / 1e4)), 40)
    west, south, east, north = block.polygon.bounds
    xy = rng.uniform((west, south), (east, north), (3 * count, 2))
    xy = xy[shapely.contains_xy(block.polygon.buffer(-5), xy)][:count] if count else xy
    made = []
    for point in xy:
        draw = rng.random()
        if block.use == "commercial":
            kind = "shop" if draw < 0.5 else ("amenity" if draw < 0.8 else "office")
            tags = {kind: _one(rng, {"shop": _SHOPS, "amenity": _AMENITIES, "office": _OFFICES}[kind])}
            tags["name"] = f"{_one(rng, _NAMES)} & {_one(rng, _NAMES)}"
        elif block.use == "residential":
            tags = {"amenity": _one(rng, _QUIET)} if draw < 0.6 else {"shop": _one(rng, _SHOPS)}
        elif block.use == "industrial":
            tags = {"man_made": "chimney"} if draw < 0.4 else {"craft": _one(rng, ("metal_construction", "sawmill"))}
        elif block.use == "green":
            tags = dict(_SMALL[int(rng.integers(len(_SMALL)))])
        else:
            tags = {"man_made": "water_well"}
        made.append(Feature(Point(point), tags))
    return made


def _surface(rng: Generator, surface: Surface) -> list[Feature]:
    tags = {
        "parking": {"amenity": "parking", "surface": "asphalt"},
        "pitch": {"leisure": "pitch", "sport": "soccer"},
        "court": {"leisure": "pitch", "sport": "basketball"},
        "pool": {"leisure": "swimming_pool"},
        "pond": {"natural": "water", "water": "pond"},
        "wheat": {"landuse": "farmland", "crop": "wheat"},
        "rape": {"landuse": "farmland", "crop": "rapeseed"},
    }.get(surface.kind)
    if tags is None or rng.random() > (0.3 if surface.kind in ("wheat", "rape", "pool") else 0.75):
        return []
    return [Feature(surface.polygon, dict(tags))]


def _building(rng: Generator, building: Building, block: Block) -> list[Feature]:
    if block.mapped == "streets" or rng.random() < 0.08:
        return []
    shape = building.polygon.simplify(0.05)
    if block.mapped == "buildings":
        return [Feature(shape, {"building": "yes"})]
    tags: Tags = {"building": "yes"}
    if building.roof == "round":
        tags = {"man_made": "storage_tank"}
    elif rng.random() < 0.8:
        kinds = {
            ("residential", "houses"): ("house", "house", "detached"),
            ("residential", "slabs"): ("apartments",),
            ("residential", "perimeter"): ("apartments", "residential"),
            ("commercial", "perimeter"): ("commercial", "office", "retail"),
            ("commercial", "bigbox"): ("retail", "supermarket"),
            ("industrial", "halls"): ("industrial", "warehouse"),
            ("industrial", "bigbox"): ("industrial", "manufacture"),
        }
        tags["building"] = _one(rng, kinds.get((block.use, block.look), ("yes",)))
        if rng.random() < 0.5 and building.height_m > 9:
            tags["building:levels"] = str(max(1, round(building.height_m / 3)))
        if block.look == "houses" and rng.random() < 0.4:
            tags["addr:housenumber"] = str(rng.integers(1, 180))
    return [Feature(shape, tags)]


def _trees(rng: Generator, layout: Layout, objects: Objects) -> list[Feature]:
    """Return the few trees that somebody mapped: those of parks and of some streets."""
    parks = [b.polygon for b in layout.blocks if b.mapped == "full" and b.look in ("park", "houses")]
    xy = np.array(objects.trees)[:, :2] if objects.trees else np.empty((0, 2))
    inside = shapely.contains_xy(shapely.union_all(parks), xy) if parks else np.zeros(len(xy), bool)
    chosen = xy[inside & (rng.random(len(xy)) < 0.12)]
    leaf = rng.random(len(chosen)) < 0.3
    return [
        Feature(Point(p), {"natural": "tree", **({"leaf_type": "broadleaved"} if known else {})})
        for p, known in zip(chosen, leaf, strict=True)
    ]
