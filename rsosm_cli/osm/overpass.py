"""OSM elements of a small place from Overpass, as OSM XML files that the reader of extracts takes."""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.client import Client
from rsosm_cli.errors import SourceError
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.units import size
from rsosm_cli.workspace import DAY_S, utc

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

Box = tuple[float, float, float, float]
_CELL_KM2 = 25.0  # a request answered in seconds even in a dense centre
# Dense centres have about 1.3 MB of XML a square kilometre, countryside a hundredth; cities lie around this.
_MB_PER_KM2 = 0.5
# Bytes of an answer a tagged node, a way with its nodes, a relation: within a factor of two of five extracts as XML.
_TIMEOUT_S = (10.0, 240.0)  # to connect; between two pieces of an answer: it computes for minutes, silently
_MAX_BYTES = 1 << 30  # of an answer; what is estimated to be more is not asked for
_BYTES_OF = {"nodes": 250, "ways": 1000, "relations": 4000}
_COUNTED_BOXES = 50  # more are counted by the box around all of them: the question would grow too long
HINT = (
    "Take the extract that covers it: --osm geofabrik, or --osm FILE.osm.pbf (or raise {key} with --set for a server "
    "of your own)."
)
_KM_PER_DEGREE = 111.2
_OSM_BASE = re.compile(rb'osm_base="(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)"')
_HISTORY_HINT = (
    "For the past of a larger place, cut a full-history extract to that day (osmium time-filter) and give it: "
    "--osm FILE.osm.pbf"
)


@dataclass(frozen=True)
class Answers:
    """How old answers are, by the oldest. ``asked``: seconds since 1970; ``osm_base``: the state of OSM in them."""

    asked: float
    osm_base: str  # as 2026-11-28T02:24:32Z; "" where they do not say

    @classmethod
    def of(cls, files: Sequence[Path]) -> Answers:
        states = [match[1].decode() for file in files if (match := _OSM_BASE.search(_head(file)))]
        return cls(min(file.stat().st_mtime for file in files), min(states, default=""))

    def as_dict(self) -> dict[str, str]:
        """Return what the manifest records."""
        return {"asked": utc(self.asked), **({"osm_base": self.osm_base} if self.osm_base else {})}

    def note(self) -> str:
        """Return a sentence where the answers are older than a day, else ""."""
        state = self.osm_base or utc(self.asked)
        if datetime.datetime.fromisoformat(state).timestamp() > time.time() - DAY_S:
            return ""
        return f"The answers of Overpass show OSM as of {state}; --max-age 0 asks again."


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(2000)


def refuse_large(name: str, area_km2: float, settings: FetchSettings) -> None:
    """Raise :class:`SourceError` where a place is too large to burden the public server with."""
    if area_km2 > settings.overpass_max_km2:
        raise SourceError(
            f"{name} has {area_km2:,.0f} km², more than the {settings.overpass_max_km2:g} km² asked of Overpass "
            f"(about {size(estimate_mb(area_km2) * 1e6)}).",
            hint=HINT.format(key="overpass_max_km2") if settings.date is None else _HISTORY_HINT,
            area_km2=area_km2,
        )


def estimate_mb(area_km2: float) -> float:
    """Return a guess of the size of the answers, in megabytes."""
    return area_km2 * _MB_PER_KM2


def request_boxes(place: Geometry) -> list[Box]:
    """Return the boxes (west, south, east, north) asked for one after the other: those that meet the place."""
    import shapely

    west, south, east, north = place.bounds
    height = (north - south) * _KM_PER_DEGREE
    width = (east - west) * _KM_PER_DEGREE * math.cos(math.radians((south + north) / 2))
    side = math.sqrt(_CELL_KM2)
    # Rounded outwards to 1e-4 degrees (10 m), so that a boundary moved by a hair finds the cached answers.
    xs = _edges(west, east, max(1, math.ceil(width / side)))
    ys = _edges(south, north, max(1, math.ceil(height / side)))
    boxes = [(x0, y0, x1, y1) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)]
    shapely.prepare(place)
    return [box for box in boxes if place.intersects(shapely.box(*box))]


def _edges(low: float, high: float, parts: int) -> list[float]:
    return list((np.linspace(math.floor(low * 1e4), math.ceil(high * 1e4), parts + 1).round() / 1e4).tolist())


def query(box: Box, date: datetime.date | None = None) -> str:
    """Return the Overpass QL for all that a box holds: tagged nodes, ways, areas, each with all its nodes.

    Administrative boundaries are left out: those that touch a town reach to countries, and bring all their ways.
    ``date``: the state at the beginning of that day (UTC) in place of today's.
    """
    return f"[out:xml][timeout:180][maxsize:1073741824]{_at(date)};({_wanted(box)});(._;>;);out body;"


def count_query(boxes: Sequence[Box], date: datetime.date | None = None) -> str:
    """Return the Overpass QL that counts what ``boxes`` hold, without the nodes of ways."""
    return f"[out:json][timeout:180]{_at(date)};({''.join(map(_wanted, boxes))});out count;"


def _at(date: datetime.date | None) -> str:
    return "" if date is None else f'[date:"{date.isoformat()}T00:00:00Z"]'


def _wanted(box: Box) -> str:
    west, south, east, north = (f"{value:.4f}" for value in box)
    where = f"({south},{west},{north},{east})"
    return (
        f"node{where}(if:count_tags()>0);"
        f"way{where};"
        f'relation{where}["type"="multipolygon"]["boundary"!="administrative"];'
        f'relation{where}["type"="boundary"]["boundary"!="administrative"];'
    )


def client_of(settings: FetchSettings) -> Client:
    return Client("Overpass", settings.contact, settings.max_wait_s, timeout_s=_TIMEOUT_S, max_bytes=_MAX_BYTES)


def download(
    place: Geometry,
    settings: FetchSettings,
    *,
    offline: bool = False,
    fresh: bool = False,
    progress: Progress = SILENT,
    client: Client | None = None,
) -> Sequence[Path]:
    """Return ``.osm`` files with all elements near ``place`` (WGS 84); answers that are kept are not asked for again.

    First the server is asked how much there is: above ``settings.overpass_max_mb`` nothing is downloaded. Raises
    :class:`SourceError` then, and when the server does not answer within ``settings.max_wait_s`` of waiting.
    """
    client = client or client_of(settings)
    url = f"{settings.overpass_url.rstrip('/')}/interpreter"
    boxes = request_boxes(place)
    forms = [{"data": query(box, settings.date)} for box in boxes]
    # An interrupted run finds what it had; a past state does not change.
    days = settings.overpass_days if settings.max_age_days is None else settings.max_age_days
    age_s = math.inf if offline or settings.date is not None else days * DAY_S
    here = [not fresh and is_kept(client.cached(url, form, ".osm"), age_s) for form in forms]
    if offline and not all(client.cached(url, form, ".osm").is_file() for form in forms):
        raise SourceError(
            "The OSM elements need Overpass, and --offline forbids it.", hint="Give an extract: --osm FILE.osm.pbf"
        )
    if not offline and not all(here):
        _count(client, url, [box for box, there in zip(boxes, here, strict=True) if not there], settings)
    files = []
    with progress.task("Asking Overpass", len(boxes), "requests") as advance:
        for form in forms:
            fresh_now = fresh and not offline
            files.append(
                client.fetch(url, form, post=True, check=check_answer, fresh=fresh_now, suffix=".osm", max_age_s=age_s)
            )
            advance(1)
    return files


def is_kept(answer: Path, age_s: float) -> bool:
    return answer.is_file() and time.time() - answer.stat().st_mtime <= age_s


def _count(client: Client, url: str, boxes: Sequence[Box], settings: FetchSettings) -> None:
    """Ask for the number of objects, say how large the answers will be, and refuse what is too much."""
    if len(boxes) > _COUNTED_BOXES:
        corners = np.array(boxes)
        boxes = [(*corners[:, :2].min(axis=0).tolist(), *corners[:, 2:].max(axis=0).tolist())]
    form = {"data": count_query(boxes, settings.date)}
    answer = client.fetch(url, form, post=True, check=_check_count, fresh=True, suffix=".json")
    counts = _counts(json.loads(answer.read_text(encoding="utf-8")))
    size_bytes = sum(counts[kind] * each for kind, each in _BYTES_OF.items())
    total = sum(counts.values())
    log.info("Overpass has %s objects there, about %s.", f"{total:,}", size(size_bytes))
    if size_bytes > settings.overpass_max_mb * 1e6:
        raise SourceError(
            f"Overpass has {total:,} objects there, about {size(size_bytes)}, more than the "
            f"{settings.overpass_max_mb:g} MB asked of it.",
            hint=HINT.format(key="overpass_max_mb"),
            objects=total,
        )


def _counts(answer: Any) -> dict[str, int]:
    """Return nodes, ways and relations of an answer to ``out count``."""
    tags = answer["elements"][0]["tags"]
    return {kind: int(tags[kind]) for kind in _BYTES_OF}


def _check_count(file: Path) -> str:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
        remark = answer.get("remark")
        if remark:
            return " ".join(str(remark).split())[:200]
        _counts(answer)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "the answer is not a count of objects"
    return ""


def check_answer(file: Path) -> str:
    """Return what is wrong with an answer of Overpass, "" where it is whole."""
    head = _head(file)
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 2000))
        tail = stream.read()
    if b"<osm" not in head:
        page = b"<html" in head.lower()
        return "an HTML page instead of data" if page else "the answer is not OSM data"
    if b"<remark>" in tail:
        remark = tail.rpartition(b"<remark>")[2].partition(b"</remark>")[0].decode(errors="replace")
        return " ".join(remark.split())[:200]
    return "" if tail.rstrip().endswith(b"</osm>") else "the answer broke off"
