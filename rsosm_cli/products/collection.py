"""The maps of many cities as one product: a virtual raster over all of them, a STAC Collection, a table."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import rasterio
import rasterio.shutil
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.products.raster import RasterForm, bounded, write_mosaic
from rsosm_cli.workspace import atomic, write_json, write_text

# Metres of a degree of latitude: the pixels of a mosaic in degrees are as high as those of the maps.
DEGREE_M = 111_320.0


def write_vrt(path: Path, maps: Sequence[Path]) -> None:
    """Write a virtual raster over class or value rasters of one kind.

    Maps of one zone are laid side by side as they are. Of several zones, each is seen through a warped virtual raster
    (nearest, WGS 84) in a folder beside ``path``: nothing is copied.
    """
    with bounded():
        if len({_zone(file) for file in maps}) > 1:
            parts, projection = _warped(path, maps)
        else:
            projection = Projection(*_zone(maps[0]))
            parts = [(file, _bounds_px(file, projection)) for file in maps]
        write_mosaic(path, parts, projection, _around([box for _, box in parts]), _form_of(maps[0]))


def _zone(file: Path) -> tuple[str, float]:
    with rasterio.open(file) as raster:
        return raster.crs.to_string(), float(raster.transform.a)


def _bounds_px(file: Path, projection: Projection) -> PixelBounds:
    with rasterio.open(file) as raster:
        t, g = raster.transform, projection.gsd_m
        col, row = round(t.c / g), round(-t.f / g)
        return PixelBounds(col, row, col + raster.width, row + raster.height)


def _warped(path: Path, maps: Sequence[Path]) -> tuple[list[tuple[Path, PixelBounds]], Projection]:
    degrees = Projection("EPSG:4326", min(_zone(file)[1] for file in maps) / DEGREE_M)
    folder = path.with_suffix(".zones")
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, file in enumerate(maps):
        with rasterio.open(file) as raster:
            west, south, east, north = rasterio.warp.transform_bounds(raster.crs, degrees.crs, *raster.bounds)
            box = degrees.pixels_around(west, south, east, north)
            target = folder / f"{number:04d}-{file.parent.parent.name}.vrt"
            with (
                WarpedVRT(
                    raster, crs=degrees.crs, transform=degrees.transform_of(box), width=box.width, height=box.height,
                    resampling=Resampling.nearest, nodata=raster.nodata,
                ) as seen,
                atomic(target) as part,
            ):  # fmt: skip
                rasterio.shutil.copy(seen, part, driver="VRT")
        # GDAL names the source from where it stood; a root that moves as a whole keeps its mosaics.
        text = target.read_text(encoding="utf-8")
        relative = Path(os.path.relpath(file, folder)).as_posix()
        for given in (str(file), file.as_posix(), str(file.resolve())):
            text = text.replace(f'relativeToVRT="0">{given}<', f'relativeToVRT="1">{relative}<')
        write_text(target, text)
        parts.append((target, box))
    return parts, degrees


def _around(boxes: Sequence[PixelBounds]) -> PixelBounds:
    edges = np.array([[b.col_min, b.row_min, b.col_max, b.row_max] for b in boxes])
    low, high = edges[:, :2].min(axis=0).tolist(), edges[:, 2:].max(axis=0).tolist()
    return PixelBounds(*low, *high)


def _form_of(file: Path) -> RasterForm:
    with rasterio.open(file) as raster:
        colours: tuple[tuple[int, int, int], ...] = ()
        if raster.dtypes[0] == "uint8" and raster.count == 1:
            table = raster.colormap(1)
            colours = tuple(table[k][:3] for k in range(256) if table[k][3] > 0)
        names = tuple(d or "" for d in raster.descriptions)
        return RasterForm(raster.dtypes[0], raster.nodata, names, colours, unit=raster.units[0] or "")


def write_collection(path: Path, items: Sequence[Path], *, name: str, title: str) -> None:
    """Write a STAC Collection over the Items beside the maps, linked from where ``path`` is."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in items]
    times = [datetime.datetime.fromisoformat(item["properties"]["datetime"].replace("Z", "+00:00")) for item in found]
    boxes = np.array([item["bbox"] for item in found])
    whole = [*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist()]
    licences = sorted({str(item["properties"].get("rsosm:licences", "not stated")) for item in found})
    collection = pystac.Collection(
        id=name, title=title, license="other",
        description=f"{title}: {len(found)} maps made by rsosm. Licences of the sources: {'; '.join(licences)}.",
        extent=pystac.Extent(
            pystac.SpatialExtent([whole, *boxes.tolist()] if len(found) > 1 else [whole]),
            pystac.TemporalExtent([[min(times), max(times)]]),
        ),
    )  # fmt: skip
    data = collection.to_dict(include_self_link=False)
    data["links"] = [link for link in data["links"] if link["rel"] != "root"] + [
        {
            "rel": "item", "href": _relative(file, path), "type": "application/geo+json",
            "title": item["properties"].get("title", item["id"]),
        }
        for file, item in zip(items, found, strict=True)
    ]  # fmt: skip
    write_json(path, data)


def _relative(file: Path, base: Path) -> str:
    relative = Path(os.path.relpath(file, base.parent)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a row a city; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
