"""Draws the picture of the README from what ``rsosm demo`` made: the image, the OSM elements, the map.

``python docs/picture.py [ROOT]`` writes ``docs/images/demo.png``, and ``tile.png``: one tile and its graph.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import shapely
from PIL import Image, ImageDraw, ImageFont
from rasterio.enums import Resampling

from rsosm_cli.graph.schema import NODE_TYPES, RELATIONS
from rsosm_cli.osm.elements import KINDS, read_elements
from rsosm_cli.products.tile_preview import draw_tile
from rsosm_cli.settings import TaskSettings, resolve
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.town.make import CRS, NAME
from rsosm_cli.workspace import Workspace

IMAGES = Path(__file__).parent / "images"
PANEL, GAP, HEAD, FOOT = 420, 8, 26, 30  # pixels
BACK, INK = "#ffffff", "#222222"
# Fill of polygons by the first key that they have; the order is that of painting.
FILLS = {"landuse": "#e8e4d4", "leisure": "#cfe6bd", "natural": "#a9cbe6", "amenity": "#e4e4ee", "building": "#8c7b75"}


def main(root: Path) -> None:
    city = Workspace(root).city(NAME)
    with rasterio.open(root / "demo" / "town.tif") as raster:
        bounds = raster.bounds
        photo = raster.read(out_shape=(3, PANEL, PANEL), resampling=Resampling.average)
    panels = {
        "Image": Image.fromarray(photo.transpose(1, 2, 0)),
        "OpenStreetMap": _osm(city.osm, bounds),
        "Map": _map(city.maps / "landuse.tif", bounds),
    }
    sheet = Image.new("RGB", (3 * PANEL + 2 * GAP, HEAD + PANEL + FOOT), BACK)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, (title, panel) in enumerate(panels.items()):
        x = i * (PANEL + GAP)
        pen.text((x + 2, 4), title, INK, font)
        sheet.paste(panel, (x, HEAD))
    x = 2
    for cls in resolve(TaskSettings, kind="tasks", preset="landuse").classes:
        pen.rectangle((x, HEAD + PANEL + 10, x + 14, HEAD + PANEL + 24), cls.colour)
        pen.text((x + 20, HEAD + PANEL + 8), cls.name, INK, font)
        x += 44 + round(pen.textlength(cls.name, font))
    _save(sheet, "demo.png")
    _save(_tile(city.tiles), "tile.png")


def _save(sheet: Image.Image, name: str) -> None:
    """Write a picture with few colours, so that it is small."""
    target = IMAGES / name
    few = sheet.convert("RGB").quantize(224, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    few.save(target, optimize=True)
    print(f"wrote {target}, {target.stat().st_size / 1000:.0f} kB")


def _tile(path: Path) -> Image.Image:
    """Return the drawing of a tile with a fair number of objects of all types, in many relations."""
    store = TileStore.open(path)
    graphs = store.graphs(np.arange(len(store)))
    counts = np.stack([np.diff(graphs.nodes[name].offsets) for name in NODE_TYPES])  # (3, T)
    fair = np.abs(counts.sum(0) - 36.0) + 8 * (counts.min(0) < 4) + 100 * (store.image_share < 1)
    for pair, edges in graphs.edges.items():
        tile = np.repeat(np.arange(len(store)), np.diff(edges.offsets))
        for column in range(len(RELATIONS[pair])):
            fair[np.unique(tile[edges.relation == column])] -= 2
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "tile.png"
        draw_tile(store, int(np.argmin(fair)), picture)
        with Image.open(picture) as drawn:
            return drawn.resize((1100, round(1100 * drawn.height / drawn.width)), Image.Resampling.LANCZOS)


def _osm(path: Path, bounds: rasterio.coords.BoundingBox) -> Image.Image:
    """Return the OSM elements as a plain drawing."""
    scale = 3  # drawn larger and reduced: smooth lines
    elements = read_elements(path, CRS)
    sheet = Image.new("RGB", (scale * PANEL, scale * PANEL), "#f7f5f0")
    pen = ImageDraw.Draw(sheet)
    per_metre = scale * PANEL / (bounds.right - bounds.left)

    def place(geometry: shapely.Geometry) -> list[tuple[float, float]]:
        xy = (shapely.get_coordinates(geometry) - (bounds.left, bounds.top)) * (per_metre, -per_metre)
        return [tuple(p) for p in xy.tolist()]

    kinds = np.array(KINDS)[elements.kind]
    for key, fill in FILLS.items():
        for i in np.flatnonzero(kinds == "polygon"):
            if key in elements.tags[i]:
                colour = "#a9cbe6" if elements.tags[i].get("natural") == "water" else fill
                if elements.tags[i].get("natural") == "wood":
                    colour = "#b7d3a4"
                for part in shapely.get_parts(elements.geometry[i]):
                    pen.polygon(place(part.exterior), colour)
                    for ring in part.interiors:
                        pen.polygon(place(ring), "#f7f5f0")
    widths = {"primary": 9, "secondary": 7, "residential": 4}
    for i in np.flatnonzero(kinds == "line"):
        tags = elements.tags[i]
        if "highway" in tags or "railway" in tags:
            colour = "#d9822b" if tags.get("highway") == "primary" else "#b9b4ab" if "highway" in tags else "#555555"
            for part in shapely.get_parts(elements.geometry[i]):
                pen.line(place(part), colour, widths.get(tags.get("highway", ""), 3))
    for i in np.flatnonzero(kinds == "point"):
        x, y = place(elements.geometry[i])[0]
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), "#4f8f46" if "natural" in elements.tags[i] else "#c2185b")
    return sheet.resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def _map(path: Path, bounds: rasterio.coords.BoundingBox) -> Image.Image:
    """Return a map in its own colours, over the ground of ``bounds``."""
    sheet = Image.new("RGB", (PANEL, PANEL), BACK)
    with rasterio.open(path) as raster:
        per_metre = PANEL / (bounds.right - bounds.left)
        width, height = (round(n * raster.res[0] * per_metre) for n in (raster.width, raster.height))
        values = raster.read(1, out_shape=(height, width), resampling=Resampling.mode)
        colours = np.full((256, 3), 255, np.uint8)
        for value, colour in raster.colormap(1).items():
            colours[value] = colour[:3]
        colours[int(raster.nodata)] = 255
        west, north = raster.bounds.left - bounds.left, bounds.top - raster.bounds.top
    sheet.paste(Image.fromarray(colours[values]), (round(west * per_metre), round(north * per_metre)))
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("rsosm-data"))
