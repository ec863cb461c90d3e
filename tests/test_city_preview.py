"""The picture of a city: equal panels, legend, credits, windows where something can be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from element_tables import write_elements
from numpy.typing import NDArray
from PIL import Image

from rsosm_cli.errors import MissingError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.osm.elements import Elements
from rsosm_cli.products import city_preview, city_sheet
from rsosm_cli.products.city_layers import KINDS, Cells, survey
from rsosm_cli.products.city_preview import CAPTION_PX, GAP_PX, OVERVIEW_PX, PANEL_PX, draw_city
from rsosm_cli.products.city_sheet import MARGIN_PX, TITLE_PX, sheet

UTM = "EPSG:32645"
WEST, SOUTH, SIDE = 354_000.0, 3_057_000.0, 600.0
YELLOW = (0xFF, 0xE1, 0x4D)
SOURCES = [
    {"name": "OpenStreetMap", "licence": "ODbL-1.0", "attribution": "© OpenStreetMap contributors"},
    {"name": "flight.tif", "licence": "", "attribution": "Survey of Nowhere 2024"},
]


def place() -> shapely.Geometry:
    box = shapely.box(WEST, SOUTH, WEST + SIDE, SOUTH + SIDE)
    return reproject(np.array([box], dtype=object), UTM, WGS84)[0]


def write_osm(path: Path, shapes: list[tuple[shapely.Geometry, dict[str, str]]]) -> Path:
    kinds = {"Point": 0, "LineString": 1, "Polygon": 2}
    geometry = np.array([shape for shape, _ in shapes], dtype=object)
    n = len(shapes)
    write_elements(
        path,
        Elements(
            crs=UTM, osm_type=np.ones(n, np.uint8), osm_id=np.arange(1, n + 1),
            kind=np.array([kinds[shape.geom_type] for shape, _ in shapes], np.uint8), tags=[tags for _, tags in shapes],
            geometry=geometry,
        ),
    )  # fmt: skip
    return path


def roofs() -> list[tuple[float, float, float, float]]:
    """Four houses of 20 m far from each other, in the north east."""
    return [(WEST + x, SOUTH + y, WEST + x + 20, SOUTH + y + 20) for x in (490, 550) for y in (490, 550)]


def town() -> list[tuple[shapely.Geometry, dict[str, str]]]:
    shapes: list[tuple[shapely.Geometry, dict[str, str]]] = [
        (shapely.box(*roof), {"building": "yes"}) for roof in roofs()
    ]
    shapes.append((shapely.LineString([(WEST, SOUTH + 50), (WEST + SIDE, SOUTH + 50)]), {"highway": "primary"}))
    shapes.append((shapely.box(WEST + 20, SOUTH + 100, WEST + 90, SOUTH + 180), {"natural": "water"}))
    shapes.append((shapely.box(WEST - 900, SOUTH - 900, WEST + 900, SOUTH + 900), {"boundary": "administrative"}))
    return shapes


def write_image(
    path: Path, *, shift_m: float = 0.0, bands: int = 3, px: float = 0.5, empty: str = "", dtype: str = "uint8"
) -> Path:
    """White roofs on dark ground, everything ``shift_m`` to the east; ``empty``: the half without image."""
    n = int(SIDE / px)
    pixels = np.full((n, n), 40, dtype)
    for west, south, east, north in roofs():
        rows = slice(int((SOUTH + SIDE - north) / px), int((SOUTH + SIDE - south) / px))
        pixels[rows, int((west - WEST) / px) : int((east - WEST) / px)] = 250
    if empty == "east":
        pixels[:, n // 2 :] = 0
    if empty == "all":
        pixels[:] = 0
    with rasterio.open(
        path, "w", driver="GTiff", width=n, height=n, count=bands, dtype=dtype, crs=UTM, nodata=0 if empty else None,
        transform=Affine(px, 0, WEST + shift_m, 0, -px, SOUTH + SIDE),
    ) as raster:  # fmt: skip
        raster.write(np.repeat(pixels[None], bands, axis=0))
    return path


@pytest.fixture
def osm(tmp_path: Path) -> Path:
    return write_osm(tmp_path / "osm.parquet", town())


def panel(path: Path, column: int, row: int = 0, notes: int = 0) -> NDArray[np.int64]:
    """Return the pixels of a window's panel."""
    x = MARGIN_PX + OVERVIEW_PX + GAP_PX + column * (GAP_PX + PANEL_PX)
    y = TITLE_PX + CAPTION_PX + notes * 24 + row * (PANEL_PX + GAP_PX + CAPTION_PX)
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)[y : y + PANEL_PX, x : x + PANEL_PX]


def extent(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return left, right, top, bottom of what is true."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], columns[-1], rows[0], rows[-1]])


def is_yellow(pixels: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.abs(pixels - YELLOW).max(axis=2) < 40


def texts(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> list[str]:
    """Return every text of the sheet that ``draw_city`` makes."""
    from matplotlib.text import Text

    made: list[str] = []

    def keep(picture: city_preview.CityPicture) -> Any:
        figure = sheet(picture)
        made.extend(t.get_text() for t in figure.findobj(Text) if t.get_text())
        return figure

    monkeypatch.setattr(city_sheet, "sheet", keep)
    draw_city(*args, **kwargs)
    return made


@pytest.mark.parametrize("shift", [0.0, 6.0])
def test_an_offset_between_osm_and_image_shows(tmp_path: Path, osm: Path, shift: float) -> None:
    image = write_image(tmp_path / "i.tif", shift_m=shift)
    numbers, notes = draw_city("T", place(), osm, image, tmp_path / "t.png")
    assert notes == ()
    assert numbers["window_A"].startswith("160 m wide")
    px_m = 160 / PANEL_PX
    alone, outlined = panel(tmp_path / "t.png", 0), panel(tmp_path / "t.png", 0, 1)
    assert not is_yellow(alone).any()
    bright = alone.min(axis=2) > 240
    bright[-60:, :170] = False  # the scale bar
    found = extent(is_yellow(outlined)) - extent(bright)
    # Lines are drawn around the edge of a roof: half their width outside of it.
    assert found[:2] == pytest.approx([-shift / px_m] * 2, abs=2.0)
    assert found[2:] == pytest.approx([0, 0], abs=2.0)


def test_all_panels_are_squares_with_scale_bar_and_the_sheet_says_what_it_shows(
    tmp_path: Path, osm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = write_image(tmp_path / "i.tif")
    said = texts(monkeypatch, "Towñ", place(), osm, image, tmp_path / "t.png", sources=SOURCES)
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width == 2 * MARGIN_PX + OVERVIEW_PX + GAP_PX + PANEL_PX
    assert "Towñ: OSM outlines over imagery" in said
    assert any(UTM in t and "0.5 m a pixel" in t and "6 OSM objects" in t for t in said)
    assert {"buildings 4", "roads 1", "water 1", "boundary of the place"} <= set(said)
    assert not any(t.startswith("green") for t in said)  # there is none
    assert "© OpenStreetMap contributors (ODbL-1.0) · Survey of Nowhere 2024" in said
    assert "100 m" in said
    windows = sum("alone" in t for t in said)
    assert said.count("20 m") == 2 * windows  # a bar on each panel
    assert sum(t.startswith("The whole place") for t in said) == 1


def test_windows_lie_where_buildings_have_an_image_and_are_the_same_every_time(tmp_path: Path, osm: Path) -> None:
    shapes = [(shapely.box(WEST + 50, SOUTH + 300, WEST + 60, SOUTH + 310), {"building": "yes"}), *town()]
    osm = write_osm(tmp_path / "more.parquet", shapes)
    image = write_image(tmp_path / "i.tif", empty="east")
    first, _ = draw_city("T", place(), osm, image, tmp_path / "1.png")
    again, _ = draw_city("T", place(), osm, image, tmp_path / "2.png")
    assert first == again
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert "window_B" not in first  # the four houses have no image
    west = float(str(first["window_A"]).split("north ")[1].split()[0])
    assert west < place().centroid.x


def test_without_overlap_one_sentence_says_so(tmp_path: Path, osm: Path) -> None:
    houses = write_osm(tmp_path / "east.parquet", town()[:4])
    image = write_image(tmp_path / "i.tif", empty="east")
    numbers, notes = draw_city("T", place(), houses, image, tmp_path / "t.png")
    assert notes == ("OSM objects and imagery do not overlap: nothing shows whether they lie on each other.",)
    assert "window_A" not in numbers
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width == 2 * MARGIN_PX + OVERVIEW_PX  # no empty panels
    far = write_image(tmp_path / "far.tif", shift_m=5000)
    _, notes = draw_city("T", place(), osm, far, tmp_path / "t.png")
    assert notes == ("The imagery does not reach T: nothing shows whether OSM lies where it should.",)
    blank = write_image(tmp_path / "blank.tif", empty="all")
    _, notes = draw_city("T", place(), osm, blank, tmp_path / "t.png")
    assert len(notes) == 1


def test_cities_with_only_one_of_both(tmp_path: Path, osm: Path) -> None:
    numbers, notes = draw_city("T", place(), osm, None, tmp_path / "t.png")
    assert notes == ("There is no imagery of T: the outlines are drawn alone.",)
    assert numbers["objects"] == 6  # the boundary of a district is no object of the ground
    assert is_yellow(panel(tmp_path / "t.png", 0, notes=1)).sum() > 300
    image = write_image(tmp_path / "i.tif")
    for path in (tmp_path / "none.parquet", write_osm(tmp_path / "empty.parquet", [])):
        numbers, notes = draw_city("T", place(), path, image, tmp_path / "t.png")
        assert notes == ("There are no OSM objects of T: the image is drawn alone.",)
        assert numbers["objects"] == 0
    with pytest.raises(MissingError, match="neither OSM elements nor imagery"):
        draw_city("T", place(), tmp_path / "none.parquet", None, tmp_path / "t.png")


@pytest.mark.parametrize(("bands", "px", "dtype"), [(1, 0.5, "uint8"), (4, 10.0, "uint16")])
def test_one_band_and_coarse_imagery(tmp_path: Path, osm: Path, bands: int, px: float, dtype: str) -> None:
    image = write_image(tmp_path / "i.tif", bands=bands, px=px, dtype=dtype)
    numbers, notes = draw_city("T", place(), osm, image, tmp_path / "t.png")
    assert notes == ()
    assert numbers["image_pixel"] == f"{px:g} m"
    assert "window_A" in numbers
    # One window stands above its outlines, two stand beside them.
    shown = panel(tmp_path / "t.png", 1) if "window_B" in numbers else panel(tmp_path / "t.png", 0, 1)
    assert is_yellow(shown).any()


def test_the_overview_of_a_crowded_place_stays_visible(tmp_path: Path) -> None:
    """12,000 houses on 4 km² are left out for the image to be seen, the main road is not; up close they are drawn."""
    step, side = 18.0, 2000.0
    corners = np.arange(0, side - 12, step)
    x, y = (a.ravel() for a in np.meshgrid(corners, corners))
    boxes = shapely.box(WEST + x, SOUTH + y, WEST + x + 12, SOUTH + y + 12)
    shapes: list[tuple[shapely.Geometry, dict[str, str]]] = [(box, {"building": "yes"}) for box in boxes]
    shapes.append((shapely.LineString([(WEST, SOUTH), (WEST + side, SOUTH + side)]), {"highway": "trunk"}))
    path = write_osm(tmp_path / "osm.parquet", shapes)
    frame = (WEST, SOUTH, WEST + side, SOUTH + side)
    cells = Cells.over(frame, 160)
    far = survey(path, UTM, frame, side / 1000, cells, imaged=True)
    assert far.left_out == ("buildings",)
    assert len(far.drawn) == 1
    assert far.built.sum() == far.spread.sum() == far.counts[[k.name for k in KINDS].index("buildings")] == len(boxes)
    close = (WEST, SOUTH, WEST + 400, SOUTH + 400)
    near = survey(path, UTM, close, 0.4, Cells.over(close, 160), imaged=True)
    assert near.left_out == ()
