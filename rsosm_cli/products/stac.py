"""A STAC Item beside the map, so that a catalogue can take it in without opening it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pystac
import rasterio
import shapely

from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.products.raster import bounded
from rsosm_cli.products.view import LegendEntry
from rsosm_cli.workspace import write_json

_TYPES = {
    ".tif": pystac.MediaType.COG,
    ".gpkg": pystac.MediaType.GEOPACKAGE,
    ".png": pystac.MediaType.PNG,
    ".html": pystac.MediaType.HTML,
    ".json": pystac.MediaType.JSON,
    ".csv": "text/csv",
    ".qml": pystac.MediaType.XML,
}
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"


def write_item(
    path: Path, map_file: Path, assets: Mapping[str, tuple[Path, Sequence[str]]], *, name: str, title: str,
    when: datetime.datetime, properties: Mapping[str, Any], legend: Sequence[LegendEntry] = (),
    place: shapely.Geometry | None = None,
) -> None:  # fmt: skip
    """Write the Item of ``map_file``; ``assets``: key to (file beside ``path``, roles).

    ``place`` (WGS 84) is the footprint; without it, the raster's box. ``when`` is when the sources were fetched: a
    composite of imagery has no better date of its own.
    """
    with bounded(), rasterio.open(map_file) as raster:
        box = shapely.box(*raster.bounds)
        crs, shape, transform = raster.crs.to_string(), list(raster.shape), list(raster.transform)[:9]
    footprint = place if place is not None else reproject(_one(box), crs, WGS84)[0]
    item = pystac.Item(
        id=name,
        geometry=shapely.geometry.mapping(shapely.set_precision(footprint, 1e-7)),
        bbox=[round(v, 7) for v in footprint.bounds],
        datetime=when,
        properties={
            "title": title, "proj:code": crs, "proj:shape": shape, "proj:transform": transform, **properties,
        },
        stac_extensions=[PROJECTION],
    )  # fmt: skip
    for key, (file, roles) in assets.items():
        item.add_asset(key, pystac.Asset(f"./{file.name}", media_type=_TYPES.get(file.suffix), roles=list(roles)))
    if legend:
        item.stac_extensions.append(CLASSIFICATION)
        item.assets["map"].extra_fields["classification:classes"] = [
            {"value": k, "name": _identifier(e.name), "title": e.name, "color_hint": e.colour[1:].upper()}
            for k, e in enumerate(legend)
        ]
    data = item.to_dict(include_self_link=False, transform_hrefs=False)
    write_json(path, data)


def _one(geometry: shapely.Geometry) -> Any:
    import numpy as np

    return np.array([geometry], dtype=object)


def _identifier(name: str) -> str:
    """Return a name as the classification extension wants it: ASCII letters, digits, hyphen and underscore."""
    import re

    return re.sub(r"[^0-9A-Za-z_-]+", "_", name).strip("_") or "class"
