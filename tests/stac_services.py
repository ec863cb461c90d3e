"""The documents and images of a small STAC API, offered by the server of ``map_services``."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import numpy as np
import rasterio
import shapely
from map_services import Reply, Services
from rasterio.io import MemoryFile
from rasterio.warp import transform_bounds

UTM = "EPSG:32645"
WEST, SOUTH, SIDE, GSD = 352_000, 3_056_000, 320, 10.0  # near Banepa; 3.2 km of 10 m
EAST, NORTH = WEST + SIDE * GSD, SOUTH + SIDE * GSD
BOX = transform_bounds(UTM, "EPSG:4326", WEST, SOUTH, EAST, NORTH)
MIDDLE = transform_bounds(UTM, "EPSG:4326", WEST + 800, SOUTH + 800, EAST - 800, NORTH - 800)
BANDS = {"red": 1000, "green": 2000, "blue": 3000, "nir": 4000}


def cog(value: int, *, half: bool = False, pixels: np.ndarray | None = None) -> bytes:
    """Return a GeoTIFF of one band: ``value``, with ``half`` only in the west and 0 (nodata) elsewhere."""
    pixels = np.full((1, SIDE, SIDE), value, np.uint16) if pixels is None else pixels
    if half:
        pixels[:, :, SIDE // 2 :] = 0
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint16", crs=UTM, nodata=0, tiled=True,
            blockxsize=128, blockysize=128, compress="DEFLATE",
            transform=rasterio.transform.from_bounds(WEST, SOUTH, EAST, NORTH, SIDE, SIDE),
        ) as image:  # fmt: skip
            image.write(pixels)
        return bytes(memory.read())


def offer_stac(server: Services, folder: str = "/images") -> None:
    """Offer an API at ``/stac`` with a collection ``photos`` of three images: a, cloudy; b, of the west; c."""
    root = server.address
    links = [{"rel": "search", "href": f"{root}/stac/search", "type": "application/geo+json", "method": "GET"},
             {"rel": "data", "href": f"{root}/stac/collections"}, {"rel": "self", "href": f"{root}/stac"},
             {"rel": "root", "href": f"{root}/stac"}]  # fmt: skip
    conforms = [f"https://api.stacspec.org/v1.0.0/{part}" for part in ("core", "item-search", "collections")]
    document(server, "/stac", {
        "type": "Catalog", "stac_version": "1.0.0", "id": "test", "description": "t", "conformsTo": conforms,
        "links": links,
    })  # fmt: skip
    collection = {
        "type": "Collection", "stac_version": "1.0.0", "id": "photos", "title": "Test photos", "description": "t",
        "license": "CC-BY-4.0", "providers": [{"name": "A space agency"}], "links": [],
        "extent": {"spatial": {"bbox": [list(BOX)]}, "temporal": {"interval": [["2020-01-01T00:00:00Z", None]]}},
    }  # fmt: skip
    document(server, "/stac/collections/photos", collection)
    first, second = item(server, "a", 30, 0, folder=folder), item(server, "b", 1, 100, half=True, folder=folder)
    offer(server, [first, second, item(server, "c", 5, 200, folder=folder)])


def document(server: Services, path: str, content: dict[str, Any]) -> None:
    server.files[path] = json.dumps(content).encode()


def offer(server: Services, items: list[dict[str, Any]]) -> None:
    document(server, "/stac/search", {"type": "FeatureCollection", "features": items, "links": []})


def item(
    server: Services, name: str, clouds: float, add: int, *, half: bool = False, folder: str = "/images"
) -> dict[str, Any]:
    assets = {}
    for band, value in BANDS.items():
        path = f"{folder}/{name}-{band}.tif"
        server.files[path] = cog(value + add, half=half)
        assets[band] = {
            "href": f"{server.address}{path}", "type": "image/tiff; application=geotiff",
            "roles": ["data"], "eo:bands": [{"name": band, "common_name": band}],
            "raster:bands": [{"nodata": 0, "data_type": "uint16"}],
        }  # fmt: skip
    west, south, east, north = BOX
    east = (west + east) / 2 if half else east
    extensions = ["projection/v1.1.0", "eo/v1.1.0", "raster/v1.1.0"]
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "photos", "links": [], "assets": assets,
        "stac_extensions": [f"https://stac-extensions.github.io/{e}/schema.json" for e in extensions],
        "geometry": json.loads(shapely.to_geojson(shapely.box(west, south, east, north))), "bbox": [*BOX],
        "properties": {
            "datetime": f"2023-06-0{ord(name) - 96}T05:00:00Z", "eo:cloud_cover": clouds, "gsd": GSD,
            "proj:epsg": 32645, "proj:shape": [SIDE, SIDE], "proj:transform": [GSD, 0, WEST, 0, -GSD, NORTH],
        },
    }  # fmt: skip


def offer_pages(
    server: Services, items: list[dict[str, Any]], extensions: tuple[str, ...] = (), page: int = 100
) -> None:
    """Offer a search that answers in pages, in the order of ``items``; with the extensions that it says it has.

    ``query``, ``filter``: as much as a limit of clouds; ``sort``: by one field.
    """
    root = json.loads(server.files["/stac"])
    root["conformsTo"] += [f"https://api.stacspec.org/v1.0.0/item-search#{name}" for name in extensions]
    document(server, "/stac", root)
    del server.files["/stac/search"]
    usual = server.RequestHandlerClass

    def cover(item: dict[str, Any]) -> float:
        return item["properties"].get("eo:cloud_cover", 101)  # what has none is at the end

    def answer(handler: Any, path: str, form: dict[str, str]) -> Reply:
        if path != "/stac/search":
            return usual._usual(handler, path, form)
        found = items
        if "query" in form:
            assert "query" in extensions
            limit = json.loads(form["query"])["eo:cloud_cover"]["lte"]
            found = [i for i in found if cover(i) <= limit]
        if "filter" in form:
            assert "filter" in extensions
            assert form["filter-lang"] == "cql2-text"
            name, comparison, most = form["filter"].split()
            assert (name, comparison) == ("eo:cloud_cover", "<=")
            found = [i for i in found if cover(i) <= float(most)]
        if "sortby" in form:
            assert "sort" in extensions
            assert form["sortby"].strip("+ ") == "properties.eo:cloud_cover"
            found = sorted(found, key=cover)
        start = int(form.get("start", 0))
        links = []
        if start + page < len(found):
            href = f"{server.address}/stac/search?{urlencode({**form, 'start': start + page})}"
            links = [{"rel": "next", "href": href, "method": "GET"}]
        part = {"type": "FeatureCollection", "features": found[start : start + page], "links": links}
        return Reply(json.dumps(part).encode(), headers={"Content-Type": "application/geo+json"})

    server.RequestHandlerClass = type("Searching", (usual,), {"_usual": answer})
