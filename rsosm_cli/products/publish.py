"""From the finished strips of a map to all its files: GeoTIFF, polygons, statistics, pictures, style, STAC Item."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli import __version__
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.products.builtup import ReadElements, count_buildings, read_buildings
from rsosm_cli.products.collection import write_table
from rsosm_cli.products.districts import district_statistics, find_districts, read_areas
from rsosm_cli.products.page import write_page
from rsosm_cli.products.parts import Layer, MapParts
from rsosm_cli.products.polygons import Polygons, polygonise, write_polygons
from rsosm_cli.products.preview import draw_preview, percent
from rsosm_cli.products.qgis import write_class_style, write_value_style
from rsosm_cli.products.raster import RasterForm, write_categories, write_cog, write_mosaic
from rsosm_cli.products.stac import write_item
from rsosm_cli.products.statistics import add_shares, class_statistics, value_statistics
from rsosm_cli.products.view import LegendEntry, Reads, read_view, rgb
from rsosm_cli.settings import TaskSettings
from rsosm_cli.workspace import write_json

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

# Longer side of the preview's map and of the page's, in pixels.
PREVIEW_PX, PAGE_PX = 1800, 2000
SHARE_SCALE = 0.004  # probability and uncertainty are kept in steps of 1/250


def layers_of(task: TaskSettings, cell_px: int, *, probability: bool, uncertainty: bool) -> tuple[Layer, ...]:
    """Return the layers that a map's strips hold, the one that marks a finished strip last."""
    if task.kind == "regression":
        return (Layer("value", float("nan"), cell_px),)
    pixel = 1 if task.dense else cell_px
    extra = [Layer("shares", 255, pixel)] * (task.kind == "distribution")
    extra += [Layer("probability", 255, pixel)] * probability + [Layer("uncertainty", 255, pixel)] * uncertainty
    return (Layer("confidence", 255, cell_px), *extra, Layer("class", 255, pixel))


@dataclass(frozen=True)
class MapFacts:
    """What is known of a map besides its pixels."""

    task: TaskSettings
    city: str
    checkpoint: str
    place: Geometry | None  # WGS 84
    local_place: Geometry | None  # in the CRS of the map
    sources: Sequence[Mapping[str, Any]]
    when: datetime.datetime
    min_area_m2: float
    simplify_px: float
    admin_level: int | None = None  # of the place

    @property
    def title(self) -> str:
        return self.task.title or self.task.name.replace("_", " ").replace("-", " ").capitalize()

    @property
    def attribution(self) -> str:
        said = [_credit(source) for source in self.sources]
        return " · ".join([*dict.fromkeys(said), f"rsosm {__version__}"])

    @property
    def licences(self) -> str:
        named = [str(s.get("licence") or "not stated") for s in self.sources]
        return ", ".join(dict.fromkeys(named)) or "not stated"

    @property
    def may_be_redistributed(self) -> bool:
        return all(s.get("redistribution", True) not in (False, "no") for s in self.sources)

    def tags(self) -> dict[str, str]:
        """Return the GDAL metadata that every raster of the map carries."""
        return {
            "TIFFTAG_IMAGEDESCRIPTION": f"{self.title}: {self.city}",
            "TIFFTAG_COPYRIGHT": self.attribution,
            "TIFFTAG_SOFTWARE": f"rsosm {__version__}",
            "RSOSM_VERSION": __version__,
            "RSOSM_TASK": self.task.name,
            "RSOSM_CITY": self.city,
            "RSOSM_CHECKPOINT": self.checkpoint,
            "RSOSM_LICENCES": self.licences,
            "RSOSM_REDISTRIBUTION": "yes" if self.may_be_redistributed else "no",
            "RSOSM_SOURCES": json.dumps(list(self.sources), ensure_ascii=False, sort_keys=True),
        }


@dataclass(frozen=True)
class Published:
    paths: dict[str, Path]
    statistics: dict[str, Any]
    notes: tuple[str, ...] = ()


def publish(
    folder: Path, parts: MapParts, facts: MapFacts, *, image: Reads | None, read: ReadElements | None,
    refined: Path | None = None, notes: tuple[str, ...] = (),
) -> Published:  # fmt: skip
    """Write all files of a map into ``folder`` from its finished ``parts``; ``map`` is the last raster to appear.

    ``image`` goes under the pictures; ``read`` gives the OSM elements that the statistics are set against;
    ``refined`` is a class raster that takes the place of the strips'.
    """
    task = facts.task
    paths = {"map": folder / f"{task.name}.tif"}
    names = [c.name for c in task.classes]
    rasters = {layer.name: _mosaic(parts, layer, facts) for layer in parts.layers}
    for layer in parts.layers:
        if layer.name in ("confidence", "class", "value"):
            continue
        paths[layer.name] = folder / f"{task.name}.{layer.name}.tif"
        _copy(parts, layer, facts, rasters[layer.name], paths[layer.name])
    main = parts.layers[-1]
    if refined is not None:
        write_mosaic(
            rasters[main.name], [(refined, parts.area_of(main))], parts.projection_of(main), parts.area_of(main),
            _form(main, facts),
        )  # fmt: skip
    _copy(parts, main, facts, rasters[main.name], paths["map"])
    legend: tuple[LegendEntry, ...] = ()
    buildings = None
    if task.kind != "regression":
        paths["categories"] = write_categories(paths["map"], _form(main, facts))
        found = _polygons(paths["map"], rasters["confidence"], facts, read)
        paths["polygons"] = folder / f"{task.name}.gpkg"
        write_polygons(paths["polygons"], found.polygons, names, task.name)
        numbers = class_statistics(
            paths["map"], names, confidence=rasters["confidence"], read=read, buildings=found.buildings,
            polygons=found.polygons,
        )  # fmt: skip
        if "shares" in paths:
            add_shares(numbers, paths["shares"])
        for row, entry in zip(numbers["classes"], task.classes, strict=True):
            row["colour"] = entry.colour
        buildings = found.buildings
        legend = tuple(
            LegendEntry(c.name, c.colour, row.get("mean_share", row["share"]))
            for c, row in zip(task.classes, numbers["classes"], strict=True)
        )
        rows = _class_rows(numbers)
    else:
        numbers = value_statistics(paths["map"])
        if task.aggregate == "mean":  # rates have no total
            numbers = {k: v for k, v in numbers.items() if k not in ("total", "per_km2")}
        rows = _value_rows(numbers)
    if rows_of := _districts(paths["map"], facts, read, buildings):
        numbers["districts"] = rows_of
        paths["districts"] = folder / f"{task.name}.districts.csv"
        write_table(paths["districts"], rows_of)
    statistics = _statistics(facts, parts, numbers)
    paths["statistics"] = folder / f"{task.name}.stats.json"
    write_json(paths["statistics"], statistics)
    _pictures(folder, paths, facts, legend, image, rows, parts)
    for key, suffix in (("preview", "png"), ("page", "html"), ("style", "qml")):
        paths[key] = folder / f"{task.name}.{suffix}"
    paths["stac"] = folder / f"{task.name}.stac.json"
    _item(paths, facts, legend)
    return Published(paths, statistics, notes)


def _unit(task: TaskSettings, cell: str) -> str:
    """Return the unit of a cell: of an amount it depends on the cell's size."""
    return f"{task.unit} {cell}".strip() if task.aggregate == "sum" else task.unit


def _form(layer: Layer, facts: MapFacts) -> RasterForm:
    task = facts.task
    names = tuple(c.name for c in task.classes)
    if layer.name == "class":
        listed = {f"RSOSM_CLASS_{k}": name for k, name in enumerate(names)}
        return RasterForm(
            "uint8", 255, (facts.title,), tuple(rgb(c.colour) for c in task.classes), names, resampling="MODE",
            tags=facts.tags() | listed,
        )  # fmt: skip
    if layer.name == "value":
        meaning = (
            "Each cell is an amount: the sum of the cells is the total of the place. Cells that the place's border "
            "cuts count with their share inside."
        )
        if task.aggregate == "mean":
            meaning = "Each cell is a rate or density: the place's is the mean of the cells."
        return RasterForm(
            "float32", float("nan"), (facts.title,), unit=_unit(task, "a cell"),
            tags=facts.tags() | {"RSOSM_VALUE": meaning},
        )  # fmt: skip
    bands = names if layer.name in ("probability", "shares") else ("entropy of the class probabilities / ln(classes)",)
    return RasterForm("uint8", 255, bands, scale=SHARE_SCALE, tags=facts.tags())


def _mosaic(parts: MapParts, layer: Layer, facts: MapFacts) -> Path:
    path = parts.folder / f"{layer.name}.vrt"
    form = _form(layer, facts) if layer.name != "confidence" else RasterForm("uint8", 255, ("confidence, percent",))
    write_mosaic(path, parts.files(layer), parts.projection_of(layer), parts.area_of(layer), form)
    return path


def class_mosaic(parts: MapParts, task: TaskSettings) -> Path:
    """Return a virtual raster over the finished strips' classes."""
    layer = parts.layers[-1]
    path = parts.folder / "coarse.vrt"
    form = RasterForm("uint8", 255, (task.name,))
    write_mosaic(path, parts.files(layer), parts.projection_of(layer), parts.area_of(layer), form)
    return path


def _copy(parts: MapParts, layer: Layer, facts: MapFacts, mosaic: Path, target: Path) -> None:
    write_cog(mosaic, target, _form(layer, facts), parts=[file for file, _ in parts.files(layer)])


@dataclass(frozen=True)
class _Found:
    polygons: Polygons
    buildings: Any


def _polygons(raster: Path, confidence: Path, facts: MapFacts, read: ReadElements | None) -> _Found:
    """Return the polygons of all classes but the background, with the buildings inside of them."""
    import dataclasses

    names = [c.name for c in facts.task.classes]
    skip = {names.index(facts.task.background)} if facts.task.background else set()
    polygons = polygonise(
        raster, skip=skip, confidence=confidence, min_area_m2=facts.min_area_m2, simplify_px=facts.simplify_px
    )
    if read is None:
        return _Found(polygons, None)
    import rasterio

    with rasterio.open(raster) as opened:
        buildings = read_buildings(read, tuple(opened.bounds))
    return _Found(dataclasses.replace(polygons, extra=count_buildings(polygons, buildings)), buildings)


def _districts(raster: Path, facts: MapFacts, read: ReadElements | None, buildings: Any) -> list[dict[str, Any]]:
    """Return the numbers of the place's sub-districts, where its OSM elements have such."""
    if (
        read is None
        or facts.local_place is None
        or (facts.task.aggregate == "mean" and facts.task.kind == "regression")
    ):
        return []
    areas = read_areas(read, facts.local_place.bounds)
    found = None if areas is None else find_districts(areas, facts.local_place, facts.admin_level)
    if found is None:
        return []
    names = [c.name for c in facts.task.classes]
    return district_statistics(raster, names, found, read=read if names else None, buildings=buildings)


def _statistics(facts: MapFacts, parts: MapParts, numbers: dict[str, Any]) -> dict[str, Any]:
    from rsosm_cli.geometry import area_km2

    statistics: dict[str, Any] = {
        "task": facts.task.name,
        "title": facts.title,
        "kind": facts.task.kind,
        "city": facts.city,
        "checkpoint": facts.checkpoint,
        "crs": parts.projection.crs,
        "gsd_m": parts.projection.gsd_m,
        "rsosm": __version__,
        "sources": list(facts.sources),
        **numbers,
    }
    if facts.task.kind == "regression":
        statistics["unit"] = facts.task.unit
    if facts.place is not None:
        statistics["place_km2"] = round(area_km2(facts.place), 4)
    return statistics


def _pictures(
    folder: Path, paths: Mapping[str, Path], facts: MapFacts, legend: tuple[LegendEntry, ...], image: Reads | None,
    rows: list[tuple[str, str]], parts: MapParts,
) -> None:  # fmt: skip
    name = facts.task.name
    shared: dict[str, Any] = {
        "title": facts.title,
        "city": facts.city,
        "legend": legend,
        "place": facts.local_place,
        "attribution": facts.attribution,
        "unit": "",
        "background": None,
    }
    if facts.task.kind == "distribution":
        shared["note"] = "A cell has the colour of its commonest class. Percentages: mean shares of the cells."
    if facts.task.background is not None:
        shared["background"] = [c.name for c in facts.task.classes].index(facts.task.background)
    if facts.task.kind == "regression":
        side = parts.projection.gsd_m * parts.layers[-1].pixel
        shared["unit"] = _unit(facts.task, f"a cell of {side:.4g} m") or "value"
    draw_preview(folder / f"{name}.png", read_view(paths["map"], image, longest_px=PREVIEW_PX, **shared))
    view = read_view(paths["map"], image, longest_px=PAGE_PX, **shared)
    write_page(folder / f"{name}.html", view, rows)
    if facts.task.kind == "regression":
        write_value_style(folder / f"{name}.qml", *view.value_range, shared["unit"])
    else:
        write_class_style(folder / f"{name}.qml", legend)


def _item(paths: Mapping[str, Path], facts: MapFacts, legend: tuple[LegendEntry, ...]) -> None:
    roles = {
        "map": ["data"],
        "probability": ["data", "probability"],
        "uncertainty": ["data", "uncertainty"],
        "shares": ["data"],
        "polygons": ["data"],
        "statistics": ["metadata"],
        "districts": ["data"],
        "preview": ["thumbnail", "overview"],
        "page": ["overview"],
        "style": ["metadata"],
    }
    from rsosm_cli.workspace import slug

    write_item(
        paths["stac"], paths["map"], {key: (paths[key], role) for key, role in roles.items() if key in paths},
        name=f"{slug(facts.city)}-{facts.task.name}", title=f"{facts.title}: {facts.city}", when=facts.when,
        properties={
            "license": "other", "rsosm:licences": facts.licences, "rsosm:attribution": facts.attribution,
            "rsosm:checkpoint": facts.checkpoint, "rsosm:version": __version__, "rsosm:task": facts.task.name,
        },
        legend=legend, place=facts.place,
    )  # fmt: skip


def _class_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("Mapped", km2(numbers["mapped_m2"]))]
    for row in numbers["classes"]:
        rows.append((row["name"], km2(row["area_m2"])))
    if "built_up" in numbers:
        rows.append(("Built-up land (OSM)", km2(numbers["built_up"]["area_m2"])))
    if "buildings" in numbers:
        rows.append(("Buildings (OSM)", f"{numbers['buildings']:,}"))
    known = [r["mean_confidence"] for r in numbers["classes"] if r.get("mean_confidence") is not None]
    if known:
        weights = [r["area_m2"] for r in numbers["classes"] if r.get("mean_confidence") is not None]
        rows.append(("Mean confidence", percent(float(np.average(known, weights=weights)))))
    return rows


def _value_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("Mapped", km2(numbers["mapped_m2"]))]
    labels = {"total": "Total", "per_km2": "Per km²", "median": "Median cell", "maximum": "Largest cell"}
    for key, label in labels.items():
        if key in numbers:
            rows.append((label, f"{numbers[key]:,.4g}"))
    return rows


def km2(square_metres: float) -> str:
    """Return an area for a table: hectares below a square kilometre."""
    return f"{square_metres / 1e6:,.3g} km²" if square_metres >= 1e6 else f"{square_metres / 1e4:,.3g} ha"


def _credit(source: Mapping[str, Any]) -> str:
    said = str(source.get("attribution") or source.get("name") or "")
    licence = str(source.get("licence") or "")
    return f"{said} ({licence})" if licence and licence not in said else said


def local(place: Geometry, crs: str) -> Geometry:
    """Return a WGS 84 geometry in ``crs``."""
    return reproject(np.array([place], dtype=object), WGS84, crs)[0]
