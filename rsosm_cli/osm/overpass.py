"""OSM elements of a small place from Overpass, as OSM XML files that the reader of extracts takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsosm_cli.errors import SourceError
from rsosm_cli.osm.http import Client
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

Box = tuple[float, float, float, float]
_CELL_KM2 = 25.0  # a request answered in seconds even in a dense centre
# Dense centres have about 1.3 MB of XML a square kilometre, countryside a hundredth; cities lie around this.
_MB_PER_KM2 = 0.5
_KM_PER_DEGREE = 111.2


def refuse_large(name: str, area_km2: float, settings: FetchSettings) -> None:
    """Raise :class:`SourceError` where a place is too large to burden the public server with."""
    if area_km2 > settings.overpass_max_km2:
        raise SourceError(
            f"{name} has {area_km2:,.0f} km², more than the {settings.overpass_max_km2:g} km² asked of Overpass "
            f"(about {estimate_mb(area_km2):,.0f} MB).",
            hint="Download the extract that covers it, for instance from https://download.geofabrik.de, and give "
            "--osm FILE.osm.pbf (or --set overpass_max_km2=... for a server of your own).",
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


def query(box: Box) -> str:
    """Return the Overpass QL for all that a box holds: tagged nodes, ways, areas, each with all its nodes.

    Administrative boundaries are left out: those that touch a town reach to countries, and bring all their ways.
    """
    west, south, east, north = (f"{value:.4f}" for value in box)
    where = f"({south},{west},{north},{east})"
    return (
        "[out:xml][timeout:180][maxsize:1073741824];("
        f"node{where}(if:count_tags()>0);"
        f"way{where};"
        f'relation{where}["type"="multipolygon"]["boundary"!="administrative"];'
        f'relation{where}["type"="boundary"]["boundary"!="administrative"];'
        ");(._;>;);out body;"
    )


def download(
    place: Geometry,
    settings: FetchSettings,
    *,
    offline: bool = False,
    fresh: bool = False,
    progress: Progress = SILENT,
    client: Client | None = None,
) -> Sequence[Path]:
    """Return ``.osm`` files with all elements near ``place`` (WGS 84); answers come from the cache where they are.

    Raises :class:`SourceError` when the server does not answer within ``settings.max_wait_s`` of waiting.
    """
    client = client or Client("Overpass", contact=settings.contact, max_wait_s=settings.max_wait_s)
    url = f"{settings.overpass_url.rstrip('/')}/interpreter"
    boxes = request_boxes(place)
    files = []
    with progress.task("Asking Overpass", len(boxes), "requests") as advance:
        for box in boxes:
            data = {"data": query(box)}
            if offline and not client.cached(url, data, ".osm").is_file():
                raise SourceError(
                    "The OSM elements need Overpass, and --offline forbids it.",
                    hint="Give an extract: --osm FILE.osm.pbf",
                )
            fresh_now = fresh and not offline
            files.append(client.fetch(url, data, post=True, check=check_answer, fresh=fresh_now, suffix=".osm"))
            advance(1)
    return files


def check_answer(file: Path) -> str:
    """Return what is wrong with an answer of Overpass, "" where it is whole."""
    with file.open("rb") as stream:
        head = stream.read(2000)
        stream.seek(max(0, file.stat().st_size - 2000))
        tail = stream.read()
    if b"<osm" not in head:
        page = b"<html" in head.lower()
        return "an HTML page instead of data" if page else "the answer is not OSM data"
    if b"<remark>" in tail:
        remark = tail.rpartition(b"<remark>")[2].partition(b"</remark>")[0].decode(errors="replace")
        return " ".join(remark.split())[:200]
    return "" if tail.rstrip().endswith(b"</osm>") else "the answer broke off"
