"""When a closed way is an area and when a line, and which tags say nothing about an element.

OSM has no area type: a way that returns to its start is an area where one of its tags describes a surface. The table
below is our reading of the conventions on the OSM wiki (pages of the single keys, "Area", and "Overpass
turbo/Polygon Features"). ``area=yes`` and ``area=no`` decide over the table.
"""

from __future__ import annotations

# Key -> values. "*" stands for every value; a value with "-" before it is an exception to "*".
# Where a key is listed with plain values, only these make an area.
AREA_KEYS: dict[str, tuple[str, ...]] = {
    "aeroway": ("*", "-taxiway", "-taxilane", "-runway", "-parking_position", "-holding_position"),
    "amenity": ("*", "-bench", "-weighbridge"),
    "area:highway": ("*",),
    "boundary": ("*",),
    "building": ("*",),
    "building:part": ("*",),
    "club": ("*",),
    "craft": ("*",),
    "golf": ("*", "-hole", "-path", "-cartpath"),
    "healthcare": ("*",),
    "highway": ("elevator", "platform", "rest_area", "services"),
    "historic": ("*", "-citywalls", "-railway"),
    "indoor": ("*", "-wall", "-door"),
    "landcover": ("*",),
    "landuse": ("*",),
    "leisure": ("*", "-track", "-slipway"),
    "man_made": ("*", "-breakwater", "-cutline", "-dyke", "-embankment", "-goods_conveyor", "-groyne", "-pipeline"),
    "military": ("*", "-trench"),
    "natural": ("*", "-arete", "-cliff", "-coastline", "-earth_bank", "-ridge", "-tree_row", "-valley"),
    "office": ("*",),
    "place": ("*",),
    "playground": ("*", "-balancebeam", "-rope_traverse", "-zipwire"),
    "power": ("generator", "plant", "substation", "switchgear", "transformer"),
    "public_transport": ("platform", "station", "stop_area"),
    "railway": ("depot", "platform", "roundhouse", "station", "traverser", "turntable", "wash", "yard"),
    "ruins": ("*",),
    "shop": ("*",),
    "telecom": ("*", "-line"),
    "tourism": ("*",),
    "waterway": ("boatyard", "dam", "dock", "fuel", "riverbank"),
}

# Keys that editors and imports left behind: an element with nothing else is as good as untagged.
UNINFORMATIVE_KEYS: frozenset[str] = frozenset(
    {"attribution", "created_by", "odbl", "odbl:note", "source", "source:date", "source_ref"}
)
# `no` and its kin deny what the key says.
_DENYING: frozenset[str] = frozenset({"no", "false", "0"})


def informative(tags: dict[str, str]) -> dict[str, str]:
    """Return the tags that say more than where the element came from."""
    return {k: v for k, v in tags.items() if k not in UNINFORMATIVE_KEYS}


def says_area(key: str, value: str) -> bool:
    """Return whether one tag makes a closed way an area (``area=no`` apart)."""
    if key == "area":
        return value not in _DENYING
    values = AREA_KEYS.get(key)
    if values is None or value in _DENYING:
        return False
    return f"-{value}" not in values if values[0] == "*" else value in values


def denies_area(key: str, value: str) -> bool:
    """Return whether one tag makes a closed way a line whatever the others say."""
    return key == "area" and value in _DENYING
