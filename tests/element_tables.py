"""Element tables of what is at hand: of objects, of OSM documents."""

from __future__ import annotations

from pathlib import Path

import shapely

from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.osm.elements import KINDS, OSM_TYPES, Elements, read_elements, tags_array
from rsosm_cli.osm.extract import read_extract
from rsosm_cli.osm.sink import Batch, Counts, ElementSink


def write_elements(path: Path, elements: Elements) -> None:
    """Write ``elements`` (any CRS) as ``osm.parquet``; equal elements give equal bytes."""
    batch = Batch(
        osm_type=elements.osm_type,
        osm_id=elements.osm_id,
        kind=elements.kind,
        tags=tags_array(elements.tags),
        geometry=reproject(elements.geometry, elements.crs, WGS84),
    )
    with ElementSink(path) as sink:
        sink.add(batch)


def read(
    tmp_path: Path, *files: str | Path, place: shapely.Geometry | None = None
) -> tuple[dict[tuple[str, int], tuple[str, dict[str, str], shapely.Geometry]], Counts]:
    """Return (type, id) -> (kind, tags, geometry) of documents or files, and what was counted."""
    target = tmp_path / "osm.parquet"
    with ElementSink(target, place) as sink:
        for number, source in enumerate(files):
            path = source if isinstance(source, Path) else tmp_path / f"{number}.osm"
            if isinstance(source, str):
                path.write_text(source, encoding="utf-8")
            read_extract(path, sink)
    e = read_elements(target)
    rows = zip(e.osm_type, e.osm_id, e.kind, e.tags, e.geometry, strict=True)
    return {(OSM_TYPES[t], int(i)): (KINDS[k], tags, g) for t, i, k, tags, g in rows}, sink.counts
