"""A boundary by name or id from the administrative relations of OSM files.

Three short passes (relations, their ways, their nodes) without an index of all locations. A relation whose ways
are not all in the file is never guessed at. Its country is what its tags say, or the boundary around it that says one.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.osm.extract import reading
from rsosm_cli.osm.reader import osm_file
from rsosm_cli.places.place import Place

if TYPE_CHECKING:
    import osmium
    from shapely import Geometry

_NAME_KEYS = ("name", "alt_name", "official_name", "short_name", "int_name", "loc_name", "nat_name", "reg_name")
_ROLES = ("outer", "inner", "", "exclave", "enclave")
# The code of a country, in the order in which they are trusted; ISO3166-2 is that of a part of one, as in DE-BY.
_COUNTRY_KEYS = ("ISO3166-1:alpha2", "ISO3166-1", "ISO3166-2", "addr:country", "is_in:country_code")
_COUNTRY = re.compile(r"[A-Za-z]{2}(?=-|$)")
# Ways of the boundaries that may lie around one, in a file; those of a continent would take minutes for a code.
_MOST_AROUND = 20_000
_WORDS = {"R": "relation", "W": "way"}
_NO_LEVEL = 99  # sorts boundaries without admin_level behind all others
OTHER_WAYS = (
    "Give --boundary FILE, --bbox WEST SOUTH EAST NORTH, --boundary extract (the box of the file; the city's name is "
    "then only the label), or --osm-id of another boundary."
)


@dataclass
class Candidate:
    """A boundary relation (or way) of a file, with as much of its line work as the file holds."""

    id: int
    file: Path
    tags: dict[str, str]
    ways: list[int]
    lines: dict[int, np.ndarray] = field(default_factory=dict)  # way -> (n, 2) lon, lat
    geometry: Geometry | None = None
    country: str = ""
    letter: str = "R"

    @property
    def osm_id(self) -> str:
        return f"{self.letter}{self.id}"

    @property
    def level(self) -> int:
        text = self.tags.get("admin_level", "")
        return int(text) if text.isdecimal() else _NO_LEVEL

    @property
    def missing(self) -> int:
        return len(self.ways) - len(self.lines)

    @property
    def name(self) -> str:
        return self.tags.get("name") or self.tags.get("name:en") or f"{_WORDS[self.letter]} {self.id}"

    def __str__(self) -> str:
        level = "" if self.level == _NO_LEVEL else f", admin_level {self.level}"
        return f"{self.name} ({self.osm_id}{level})"


def normal(name: str) -> str:
    """Return a name for comparison: compatibility forms, case and spaces put aside, in any script."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def names_of(tags: dict[str, str]) -> set[str]:
    """Return all names of an element, normalised: ``name``, ``name:*``, ``alt_name`` and its kin, ``;`` parted."""
    values = [v for k, v in tags.items() if k.partition(":")[0] in _NAME_KEYS]
    return {normal(part) for value in values for part in value.split(";") if part.strip()}


def place_by_name(name: str, files: Sequence[Path]) -> Place:
    """Return the boundary called ``name``; of nested namesakes the one with the lowest ``admin_level``.

    Raises :class:`MissingError` (no such boundary, or cut by the file) or :class:`UsageError` (ambiguous).
    """
    wanted = normal(name)
    known: dict[str, str] = {}

    def match(relation: osmium.osm.Relation) -> bool:
        tags = {t.k: t.v for t in relation.tags}
        known.update({normal(v): v for k, v in tags.items() if k in ("name", "name:en")})
        return wanted in names_of(tags)

    found = _candidates(files, match, named=True)
    where = " and ".join(f.name for f in files)
    if not found:
        close = [known[n] for n in difflib.get_close_matches(wanted, known, n=3, cutoff=0.75)]
        hint = f"Did you mean {', '.join(close)}?" if close else ""
        raise MissingError(
            f"No administrative boundary called {name!r} is in {where}.",
            hint=f"{hint} {OTHER_WAYS} --boundary nominatim asks the public server.".strip(),
            name=name,
        )
    chosen = found[0]
    if [c.level for c in found].count(chosen.level) > 1:
        raise _ambiguous(name, found, where)
    _refuse_cut(chosen, found[1:])
    others = [c for c in found[1:] if c.lines]
    if not all(_inside(c, chosen) for c in others):
        raise _ambiguous(name, [chosen, *others], where)
    notes = []
    if others:
        listed = ", ".join(str(c) for c in others)
        notes.append(f"Of the nested boundaries called {name}, {chosen} is taken; inside it lies {listed}.")
    return _place(name, chosen, notes)


def country_of(tags: dict[str, str]) -> str:
    """Return the country's two letters that tags say, "" where they say none."""
    found = (_COUNTRY.match(tags.get(key, "").strip()) for key in _COUNTRY_KEYS)
    return next((match[0].upper() for match in found if match), "")


def place_by_id(name: str, relation_id: int, files: Sequence[Path]) -> Place:
    """Return the boundary of one relation. Raises :class:`MissingError` where no file has it, or has it whole."""
    return _only(name, f"relation/{relation_id}", _candidates(files, lambda r: r.id == relation_id, named=False), files)


def listed_place(name: str, relation_id: int, files: Sequence[Path]) -> Place | None:
    """Return the boundary of one relation if it is called ``name``, ``None`` where no file has such a one.

    Raises :class:`MissingError` where it is cut.
    """

    def match(relation: osmium.osm.Relation) -> bool:
        return relation.id == relation_id and normal(name) in names_of({t.k: t.v for t in relation.tags})

    found = _candidates(files, match, named=False)
    return _only(name, f"relation/{relation_id}", found, files) if found else None


def place_by_way(name: str, way_id: int, files: Sequence[Path]) -> Place:
    """Return the surface of one closed way. Raises :class:`MissingError` where no file has it, or has it whole."""
    import osmium

    found = []
    for file in files:
        with reading(file):
            for way in _of_ids(file, osmium.osm.WAY, {way_id}):
                candidate = Candidate(way_id, file, {t.k: t.v for t in way.tags}, [way_id], letter="W")
                candidate.lines = way_lines(file, {way_id})
                candidate.geometry = polygon_of(list(candidate.lines.values()))
                candidate.country = country_of(candidate.tags)
                found.append(candidate)
                break
    found.sort(key=lambda candidate: candidate.geometry is None)
    return _only(name, f"way/{way_id}", found, files)


def _only(name: str, asked: str, found: Sequence[Candidate], files: Sequence[Path]) -> Place:
    """Return the place of the object ``asked`` for by its id, if it was found, and whole."""
    if not found:
        where = " or ".join(file.name for file in files)
        raise MissingError(f"{asked} is not in {where}.", hint=OTHER_WAYS, osm_id=asked)
    _refuse_cut(found[0], [])
    return _place(name, found[0], [])


def _place(name: str, chosen: Candidate, notes: list[str]) -> Place:
    assert chosen.geometry is not None
    place = Place(
        name=name,
        geometry=chosen.geometry,
        source=chosen.file.name,
        osm_id=chosen.osm_id,
        admin_level=None if chosen.level == _NO_LEVEL else chosen.level,
        country=chosen.country,
    )
    return replace(place, notes=(place.sentence(chosen.name), *notes))


def _refuse_cut(chosen: Candidate, namesakes: Sequence[Candidate]) -> None:
    if chosen.geometry is not None:
        return
    if chosen.missing:
        what = f"is cut by {chosen.file.name}: {chosen.missing} of its {len(chosen.ways)} ways are not whole in it"
    else:
        what = f"is not closed in {chosen.file.name}"
    whole = [c for c in namesakes if c.geometry is not None]
    also = f" Complete in the file: {', '.join(f'--osm-id R{c.id}' for c in whole)}." if whole else ""
    raise MissingError(f"The boundary of {chosen} {what}.", hint=OTHER_WAYS + also, osm_id=chosen.osm_id)


def _ambiguous(name: str, found: Sequence[Candidate], where: str) -> UsageError:
    listed = "; ".join(str(c) for c in found[:12])
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    return UsageError(
        f"{name!r} is the name of {len(found)} boundaries in {where}: {listed}{more}.",
        hint=f"Choose one: --osm-id R{found[0].id}",
        candidates=[f"R{c.id}" for c in found],
    )


def _inside(inner: Candidate, outer: Candidate) -> bool:
    """Return whether ``inner`` lies in ``outer``: its surface nearly all, or, where it is cut, its known points."""
    import shapely

    assert outer.geometry is not None
    if inner.geometry is not None:
        shared = shapely.intersection(inner.geometry, outer.geometry).area
        return bool(shared > 0.99 * inner.geometry.area)  # shared borders may be drawn twice
    points = np.concatenate(list(inner.lines.values()))
    return bool(shapely.dwithin(outer.geometry, shapely.points(points), 1e-6).mean() > 0.99)


def _candidates(files: Sequence[Path], match: Callable[[osmium.osm.Relation], bool], *, named: bool) -> list[Candidate]:
    """Return the matching boundary relations, lowest admin_level first, complete ones of several files preferred."""
    best: dict[int, Candidate] = {}
    for file in files:
        with reading(file):
            for candidate in _in_file(file, match, named):
                known = best.get(candidate.id)
                if known is None or (known.geometry is None and candidate.geometry is not None):
                    best[candidate.id] = candidate
    return sorted(best.values(), key=lambda c: (c.level, c.id))


def _in_file(file: Path, match: Callable[[osmium.osm.Relation], bool], named: bool) -> list[Candidate]:
    import osmium

    relations: Any = osmium.FileProcessor(osm_file(file), osmium.osm.RELATION)  # only relations come out of it
    if named:
        relations.with_filter(osmium.filter.TagFilter(("boundary", "administrative")))
    found: list[Candidate] = []
    around: list[Candidate] = []
    for relation in relations:
        if relation.tags.get("type") not in ("boundary", "multipolygon"):
            continue
        chosen = match(relation)
        if chosen or (relation.tags.get("boundary") == "administrative" and _says_country(relation)):
            # Some relations have a way twice, which is as good as once.
            ways = dict.fromkeys(m.ref for m in relation.members if m.type == "w" and m.role in _ROLES)
            candidate = Candidate(relation.id, file, {t.k: t.v for t in relation.tags}, list(ways))
            (found if chosen else around).append(candidate)
    around = _worth_asking(around) if any(not country_of(c.tags) for c in found) else []
    lines = way_lines(file, {way for c in (*found, *around) for way in c.ways})
    for candidate in (*found, *around):
        candidate.lines = {way: lines[way] for way in candidate.ways if way in lines}
        if not candidate.missing:
            candidate.geometry = polygon_of(list(candidate.lines.values()))
    for candidate in found:
        candidate.country = country_of(candidate.tags) or _country_around(candidate, around)
    return found


def _says_country(relation: osmium.osm.Relation) -> bool:
    return any(key in relation.tags for key in _COUNTRY_KEYS)


def _worth_asking(around: Sequence[Candidate]) -> list[Candidate]:
    """Return the boundaries that can say a country, the largest first, as far as they are few."""
    ordered = sorted((c for c in around if country_of(c.tags)), key=lambda c: (c.level, c.id))
    ways = np.cumsum([len(c.ways) for c in ordered])
    return ordered[: int((ways <= _MOST_AROUND).sum())]


def _country_around(inner: Candidate, around: Sequence[Candidate]) -> str:
    import shapely

    if inner.geometry is None:
        return ""
    spot = shapely.point_on_surface(inner.geometry)
    outer = (c for c in around if c.geometry is not None and shapely.covers(c.geometry, spot))
    return next((country_of(c.tags) for c in outer), "")


def way_lines(file: Path, ids: set[int]) -> dict[int, np.ndarray]:
    """Return lon, lat (n, 2) of the ways ``ids`` of a file; those with a node that the file lacks are left out."""
    import osmium

    refs = {way.id: array("q", [node.ref for node in way.nodes]) for way in _of_ids(file, osmium.osm.WAY, ids)}
    if not refs:
        return {}
    wanted = {ref for way in refs.values() for ref in way}
    numbers, spots = array("q"), array("d")  # a country's border has a million nodes
    for node in _of_ids(file, osmium.osm.NODE, wanted):
        if node.location.valid():
            numbers.append(node.id)
            spots.extend((node.lon, node.lat))
    known, lonlat = np.array(numbers, np.int64), np.array(spots).reshape(-1, 2)
    order = np.argsort(known, kind="stable")
    known = known[order]
    lines = {}
    for way, line in refs.items():
        at = np.searchsorted(known, line)
        if len(known) and (known[np.minimum(at, len(known) - 1)] == line).all():
            lines[way] = lonlat[order[at]]
    return lines


def _of_ids(file: Path, kind: osmium.osm.osm_entity_bits, ids: Iterable[int]) -> Iterator[Any]:
    """Yield the objects of a kind that have one of the ``ids``."""
    import osmium

    wanted = set(ids)
    if not wanted:
        return
    objects: Any = osmium.FileProcessor(osm_file(file), kind)
    if min(wanted) >= 0:
        objects.with_filter(osmium.filter.IdFilter(wanted))  # takes no ids below zero, which editors give
    yield from (found for found in objects if found.id in wanted)


def polygon_of(lines: Sequence[np.ndarray]) -> Geometry | None:
    """Return the surface that ``lines`` enclose, holes left out; ``None`` where they do not close."""
    import shapely

    lines = [line for line in lines if len(line) > 1]  # a node alone encloses nothing
    if not lines:
        return None
    ends = np.concatenate([line[[0, -1]] for line in lines if not (line[0] == line[-1]).all()] or [np.empty((0, 2))])
    if (np.unique(ends, axis=0, return_counts=True)[1] % 2).any():
        return None
    pieces = shapely.linestrings(np.concatenate(lines), indices=np.repeat(range(len(lines)), [len(x) for x in lines]))
    surface = shapely.build_area(shapely.multilinestrings(pieces))
    return None if surface.is_empty else surface
