"""What stands beside a map: statistics, preview, page, QGIS style, STAC Item."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pystac
import pytest
import shapely
from PIL import Image

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.osm.elements import Elements
from rsosm_cli.products.builtup import count_buildings, read_buildings
from rsosm_cli.products.page import write_page
from rsosm_cli.products.polygons import polygonise
from rsosm_cli.products.preview import draw_preview, length_text, nice_length, percent
from rsosm_cli.products.qgis import write_class_style, write_value_style
from rsosm_cli.products.raster import write_part
from rsosm_cli.products.stac import write_item
from rsosm_cli.products.statistics import class_statistics, value_statistics
from rsosm_cli.products.view import LegendEntry, MapView, read_view

CRS = "EPSG:32645"
LEGEND = (LegendEntry("other </script>", "#d9d9d9", 0.75), LegendEntry("urban village", "#d7191c", 0.25))


def raster_of(path: Path, values: np.ndarray, gsd: float = 1.0, west: int = 0, north: int = 0) -> Path:
    height, width = values.shape
    nodata = 255 if values.dtype == np.uint8 else np.nan
    write_part(path, values, Projection(CRS, gsd), PixelBounds(west, north, west + width, north + height), nodata)
    return path


def elements_of(*items: tuple[shapely.Geometry, dict[str, str]]) -> Elements:
    n = len(items)
    kind = np.array([2 if g.geom_type == "Polygon" else 0 for g, _ in items], np.uint8)
    geometry = np.array([g for g, _ in items], dtype=object)
    return Elements(CRS, np.ones(n, np.uint8), np.arange(n), kind, [t for _, t in items], geometry)


def reader_of(elements: Elements):
    def read(bounds: tuple[float, float, float, float]) -> Elements:
        here = shapely.intersects(elements.geometry, shapely.box(*bounds))
        return Elements(
            CRS, elements.osm_type[here], elements.osm_id[here], elements.kind[here],
            [t for t, k in zip(elements.tags, here, strict=True) if k], elements.geometry[here],
        )  # fmt: skip

    return read


def view_of(values: np.ndarray, **facts) -> MapView:
    height, width = values.shape
    image = np.full((height, width, 3), 120, np.uint8)
    bounds = (329000.0, 3058000.0, 329000.0 + width, 3058000.0 + height)
    place = shapely.box(*bounds).buffer(-10)
    return MapView("Urban villages", "Banepa & <b>", values, image, bounds, CRS, place=place,
                   attribution="© OpenStreetMap contributors", **facts)  # fmt: skip


def test_statistics_of_classes_buildings_and_built_up_land(tmp_path: Path) -> None:
    classes = np.zeros((100, 100), np.uint8)
    classes[:, 50:75] = 1
    classes[:, 75:] = 255
    sure = np.full((25, 25), 90, np.uint8)
    elements = elements_of(
        (shapely.box(55, -20, 65, -10), {"building": "yes"}),
        (shapely.box(5, -20, 10, -10), {"building": "no"}),
        (shapely.box(40, -60, 60, -40), {"landuse": "residential"}),
        (shapely.box(0, -100, 20, -80), {"landuse": "farmland"}),
        (shapely.box(90, -60, 95, -40), {"building": "house"}),  # on ground that is not mapped
        (shapely.Point(60, -15), {"building": "yes"}),
    )
    elements = replace(elements, geometry=shapely.transform(elements.geometry, lambda xy: xy + np.array([200, 0])))
    file = raster_of(tmp_path / "c.tif", classes, west=200)
    buildings = read_buildings(reader_of(elements), (200, -100, 300, 0))
    assert len(buildings) == 2
    found = polygonise(file, skip={0})
    numbers = class_statistics(
        file, ["other", "village"], confidence=raster_of(tmp_path / "s.tif", sure, 4.0, west=50),
        read=reader_of(elements), buildings=buildings, polygons=found,
    )  # fmt: skip
    other, village = numbers["classes"]
    assert (other["area_m2"], village["area_m2"], numbers["mapped_m2"]) == (5000, 2500, 7500)
    assert village["share"] == pytest.approx(1 / 3, abs=1e-6)
    assert village["mean_confidence"] == pytest.approx(0.9)
    assert (other["built_up_m2"], village["built_up_m2"]) == (200, 300)
    assert village["share_of_built_up"] == pytest.approx(0.6)
    assert (other["buildings"], village["buildings"], village["polygons"]) == (0, 1, 1)
    columns = count_buildings(found, buildings)
    assert columns["buildings"].tolist() == [1]
    assert columns["footprint_share"].tolist() == [0.04]
    assert columns["buildings_per_ha"].tolist() == [4]


def test_buildings_on_the_border_of_two_squares_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsosm_cli.products.builtup.SQUARE_M", 30.0)
    boxes = [(shapely.box(x, y, x + 20, y + 20), {"building": "yes"}) for x in (5, 25, 55) for y in (15, 50)]
    assert len(read_buildings(reader_of(elements_of(*boxes)), (0, 0, 100, 100))) == 6


def test_statistics_of_values(tmp_path: Path) -> None:
    values = np.array([[1, 2], [3, np.nan]], np.float32)
    numbers = value_statistics(raster_of(tmp_path / "v.tif", values, 100.0))
    assert (numbers["total"], numbers["cells"], numbers["per_km2"]) == (6, 3, pytest.approx(200))
    assert "total" not in value_statistics(raster_of(tmp_path / "e.tif", np.full((2, 2), np.nan, np.float32), 9.0))


def test_scale_bars_and_shares_are_round_numbers() -> None:
    assert [nice_length(m) for m in (1, 19.9, 20, 4999, 5000.1)] == [1, 10, 20, 2000, 5000]
    assert [length_text(m) for m in (50, 500, 2000)] == ["50 m", "500 m", "2 km"]
    assert [percent(s) for s in (0, 0.0001, 0.0123, 0.25, 1)] == ["0.0 %", "<0.1 %", "1.2 %", "25 %", "100 %"]


@pytest.mark.parametrize("kind", ["classes", "values", "nothing", "tall"])
def test_preview_is_drawn_and_the_same_every_time(tmp_path: Path, kind: str) -> None:
    values = np.zeros((60, 90), np.uint8)
    values[20:40, 30:60] = 1
    view = {
        "classes": lambda: view_of(values, legend=LEGEND),
        "values": lambda: view_of(np.linspace(0, 9, 5400, dtype=np.float32).reshape(60, 90), unit="people"),
        "nothing": lambda: view_of(np.full((60, 90), np.nan, np.float32)),
        "tall": lambda: view_of(np.zeros((400, 3), np.uint8), legend=LEGEND * 12),
    }[kind]()
    for name in ("a.png", "b.png"):
        draw_preview(tmp_path / name, view)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 400
        if kind == "classes":
            colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
            assert (215, 25, 28) in colours  # the legend shows the class in its own colour


def test_view_shows_the_commonest_class_and_the_image_on_the_same_ground(tmp_path: Path) -> None:
    classes = np.zeros((400, 600), np.uint8)
    classes[:, 300:] = 1
    classes[::7, ::7] = 0
    path = raster_of(tmp_path / "m.tif", classes, 2.0, west=100, north=40)

    class Half:
        def read(self, projection: Projection, box: PixelBounds):
            x = (np.arange(box.col_min, box.col_max) + 0.5) * projection.gsd_m
            image = np.broadcast_to(np.where(x < 800, 10, 200), (3, box.height, box.width)).astype(np.uint8)
            return image, np.ones((box.height, box.width), bool)

    view = read_view(path, Half(), longest_px=150, title="t", city="c", legend=LEGEND)
    assert view.values.shape == (100, 150)
    assert view.bounds_m == (200, -880, 1400, -80)
    edge = np.argmax(view.values[50] == 1)
    assert edge == np.argmax(view.image[50, :, 0] > 100) == 75


def test_page_is_one_file_and_holds_text_safely(tmp_path: Path) -> None:
    values = np.zeros((60, 90), np.uint8)
    values[20:40, 30:60] = 1
    write_page(tmp_path / "m.html", view_of(values, legend=LEGEND), [("Mapped", "1 km²")])
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?https?:|url\(|@import|fetch\(""", text)
    assert "other </script>" not in text
    assert "Banepa &amp; &lt;b&gt;" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless Chromium on this machine")
@pytest.mark.parametrize("kind", ["classes", "values"])
def test_page_works_in_a_browser_without_network(tmp_path: Path, kind: str) -> None:
    values = np.zeros((60, 90), np.uint8)
    values[20:40, 30:60] = 1
    view = view_of(values, legend=LEGEND) if kind == "classes" else view_of(values.astype(np.float32), unit="people")
    write_page(tmp_path / "m.html", view, [("Mapped", "1 km²")])
    run = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=4000",
         "--dump-dom", (tmp_path / "m.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'data-ready="yes"' in run.stdout
    assert ("urban village" if kind == "classes" else "people") in run.stdout
    assert "CONSOLE" not in run.stderr
    if kind == "classes":  # and it is drawn: a third of the map's height is the class's colour
        write_page(tmp_path / "bare.html", replace(view, image=None), [("Mapped", "1 km²")])
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--window-size=900,600",
             f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "bare.html").as_uri()],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        seen = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
        assert (seen == (0xD7, 0x19, 0x1C)).all(axis=2).sum() > 10_000


def test_qgis_styles_name_every_class_and_span_the_values(tmp_path: Path) -> None:
    write_class_style(tmp_path / "c.qml", LEGEND)
    entries = ET.parse(tmp_path / "c.qml").getroot().findall(".//paletteEntry")
    assert [(e.get("value"), e.get("label"), e.get("color")) for e in entries] == [
        ("0", "other </script>", "#d9d9d9"), ("1", "urban village", "#d7191c"),
    ]  # fmt: skip
    write_value_style(tmp_path / "v.qml", 0, 80, "people")
    items = ET.parse(tmp_path / "v.qml").getroot().findall(".//item")
    assert (items[0].get("value"), items[-1].get("value"), items[-1].get("label")) == ("0", "80", "80 people")


def test_stac_item_validates_without_network(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    file = raster_of(tmp_path / "uv.tif", np.zeros((100, 50), np.uint8), 10.0, west=32900, north=-305800)
    write_item(
        tmp_path / "uv.stac.json", file, {"map": (file, ["data"]), "preview": (tmp_path / "uv.png", ["thumbnail"])},
        name="banepa-uv", title="Urban villages of Banepa", when=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        properties={"rsosm:checkpoint": "uv-1"}, legend=LEGEND,
    )  # fmt: skip
    data = json.loads((tmp_path / "uv.stac.json").read_text(encoding="utf-8"))
    item = pystac.Item.from_dict(data)
    west, south, east, north = item.bbox
    assert 85.2 < west < east < 85.3
    assert 27.6 < south < north < 27.7
    assert data["assets"]["map"]["href"] == "./uv.tif"
    assert data["assets"]["map"]["classification:classes"][1]["color_hint"] == "D7191C"
    assert data["properties"]["proj:code"] == CRS
    item.stac_extensions.clear()  # their schemas lie on the network; the core's come with pystac
    assert item.validate()
