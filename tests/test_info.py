"""``info``: what files hold, what a city has, which command comes next."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rasters import noise, write

from rsosm_cli import build_graph, fetch, info, make_town
from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.result import Result
from rsosm_cli.settings import BuildSettings, resolve
from rsosm_cli.workspace import Manifest, Workspace


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the town fetched and built."""
    folder = tmp_path_factory.mktemp("root")
    town = make_town(folder / "demo", tiles=2)
    fetch(town.name, root=folder, osm=[str(town.osm)], imagery=[str(town.imagery)], offline=True)
    settings = resolve(BuildSettings, options={"grid.tile": 112, "grid.stride": 112, "grid.gsd": 1.2})
    build_graph(town.name, root=folder, settings=settings)
    return folder


def one(result: Result | list[Result]) -> Result:
    assert isinstance(result, Result)
    return result


def test_a_city_with_its_outlines_over_its_image(root: Path, tmp_path: Path) -> None:
    result = one(info(city="Rosmere", root=root, preview=tmp_path / "town.png"))
    with Image.open(tmp_path / "town.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 1000
    assert result.numbers["objects"] > 10
    assert result.paths["preview"] == str(tmp_path / "town.png")
    yellow = np.array([0xFF, 0xE1, 0x4D])  # of the buildings' outlines
    assert (np.abs(pixels.astype(int) - yellow).max(axis=2) < 24).sum() > 500
    assert not any("was made" in note for note in result.notes)
    with pytest.raises(MissingError, match="nothing of Atlantis"):
        info(city="Atlantis", root=root)
    with pytest.raises(MissingError, match="no imagery of the epoch 1999"):
        info(city="Rosmere", root=root, preview=tmp_path / "x.png", epoch="1999")


def test_a_picture_in_a_missing_folder_makes_it_and_says_so(root: Path, tmp_path: Path) -> None:
    tiles = Workspace(root).city("Rosmere").tiles
    for number, asked in enumerate(({"city": "Rosmere", "root": root}, {"file": tiles})):
        path = tmp_path / f"new{number}" / "deep" / "town.png"
        result = one(info(**asked, preview=path))  # type: ignore[arg-type]
        assert path.is_file()
        assert f"The folder {path.parent} was not there and was made." in result.notes
        with pytest.raises(UsageError, match="no name of a PNG"):
            info(**asked, preview=path.with_suffix(".jpg"))  # type: ignore[arg-type]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="no name of a PNG"):
        info(city="Rosmere", root=root, preview=tmp_path / "folder.png")


def test_numbers_say_their_statistic_and_unit(root: Path) -> None:
    files = Workspace(root).city("Rosmere")
    assert re.fullmatch(
        r"median [\d,]+, quartiles [\d,]+ and [\d,]+, most [\d,]+", one(info(files.tiles)).numbers["objects_a_tile"]
    )
    assert re.fullmatch(r"finished \S+Z, took [\d.]+ s", one(info(files.folder)).numbers["fetch"])
    assert " m" in one(info(files.tiles, tile=0)).numbers["bounds"]


def test_every_file_of_a_city_is_told(root: Path) -> None:
    city = Workspace(root).city("Rosmere")
    for path in sorted(p for p in city.folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        result = one(info(path))
        assert result.numbers["size_bytes"] == path.stat().st_size
        assert len(result.numbers) > 1, path.name
    assert one(info(city.osm)).numbers["elements"].keys() == {"point", "line", "polygon"}
    assert one(info(city.tiles)).numbers["tiles"] == 4
    assert one(info(city.imagery)).numbers["crs"] == "EPSG:32626"
    assert one(info(city.place)).numbers["name"] == "Rosmere"


def test_a_city_tells_its_steps_and_sources(root: Path) -> None:
    result = one(info(Workspace(root).city("Rosmere").folder))
    assert result.subject == "Rosmere"
    assert {"fetch", "build-graph"} <= result.numbers.keys()
    assert any("OpenStreetMap, ODbL" in note for note in result.notes)


def test_folders_inside_and_comparisons_are_told(root: Path, tmp_path: Path) -> None:
    maps = Workspace(root).city("Rosmere").folder / "maps"
    maps.mkdir(exist_ok=True)
    assert one(info(maps)).subject == "Rosmere"
    rasters = [maps / "uv.tif", maps / "uv.probability.tif"]
    for path in rasters:
        path.touch()
    cities = info(root=root)
    assert isinstance(cities, list)
    assert str(cities[0].numbers["has"]).endswith("tiles, map uv")  # what lies beside a map is none
    for path in rasters:
        path.unlink()
    compared = tmp_path / "runs" / "landuse-compare"
    compared.mkdir(parents=True)
    (compared / "report.html").write_text("<html></html>")
    assert "report.html" in one(info(compared)).paths


def test_the_next_step_follows_what_is_done(root: Path, tmp_path: Path) -> None:
    def following() -> str:
        results = info(root=root)
        assert isinstance(results, list)
        return str(results[0].numbers["next"])

    city = Workspace(root).city("Rosmere")
    assert following() == "rsosm pretrain"
    runs = root / "runs"
    for name, facts, expected in (
        ("p", {"kind": "pretrain"}, "rsosm pretrain"),
        ("p", {"kind": "pretrain", "finished": "2026-01-01T00:00:00Z"}, "rsosm finetune TASK --city Rosmere"),
        ("f", {"kind": "finetune", "task": "uv", "finished": "2026-01-02T00:00:00Z"}, "rsosm map uv --city Rosmere"),
    ):
        Manifest(runs / name / "manifest.json").update(**facts)
        assert following().startswith(expected)
    imagery = city.imagery.rename(tmp_path / "imagery.tif")
    assert following() == "rsosm embed --city Rosmere"
    imagery.rename(city.imagery)
    tiles = city.tiles.rename(tmp_path / "tiles.h5")
    assert following() == "rsosm build-graph --city Rosmere"
    tiles.rename(city.tiles)


@pytest.mark.parametrize("text", ["{", '{"name": "Tiny", "steps": {"fetch:place": 5}}', '{"steps": []}', '{"name": 5}'])
def test_a_damaged_manifest_is_told_beside_the_others(root: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "root"))
    for name in ("cities/broken", "runs/broken"):
        (copy / name).mkdir(parents=True)
        (copy / name / "manifest.json").write_text(text)
    rows = info(root=copy)
    assert isinstance(rows, list)
    assert [r.subject for r in rows if r.status == "failed"] == ["broken", "broken"]
    assert "Rosmere" in {r.subject for r in rows if r.status == "done"}
    assert all("manifest.json is damaged" in r.error for r in rows if r.status == "failed")


def test_a_tile_of_a_city_needs_no_path(root: Path, tmp_path: Path) -> None:
    tiles = Workspace(root).city("Rosmere").tiles
    assert one(info(city="Rosmere", root=root, tile=3)) == one(info(tiles, tile=3))
    with pytest.raises(UsageError, match=r"--city Rosmere and .*tiles.h5 both"):
        info(tiles, city="Rosmere", root=root)


def test_a_tile_is_described_and_drawn(root: Path, tmp_path: Path) -> None:
    tiles = Workspace(root).city("Rosmere").tiles
    picture = tmp_path / "tile.png"
    result = one(info(tiles, tile=1, preview=picture))
    assert result.numbers["tile"] == 1
    assert one(info(picture)).numbers["pixels"]
    with pytest.raises(UsageError, match="no tile 99"):
        info(tiles, tile=99)
    with pytest.raises(UsageError, match="no tiles to draw"):
        info(tiles.with_name("osm.parquet"), tile=1)


@pytest.mark.parametrize(
    ("crs", "west", "north", "px", "expected"),
    [
        ("EPSG:4326", 11.0, 60.0, 1e-5, 0.788),  # 1.114 m northward, 0.558 m eastward: the side of a square as large
        ("EPSG:3857", 1_224_514.4, 8_399_737.9, 1.0, 0.502),  # at 60 degrees north a unit is half a metre
        ("EPSG:32632", 600_000.0, 6_650_000.0, 0.6, 0.6),
        ("EPSG:3031", 0.0, 1_000.0, 1.0, None),  # the South Pole
        (None, 5.0, 5.0, 1.0, None),
    ],
)
def test_a_rasters_pixel_is_told_in_metres_on_the_ground(
    tmp_path: Path, crs: str | None, west: float, north: float, px: float, expected: float | None
) -> None:
    file = write(tmp_path / "a.tif", noise((1, 50, 50)), crs=crs, west=west, north=north, px=px)
    found = one(info(file)).numbers["gsd_m"]
    assert found == (None if expected is None else pytest.approx(expected, abs=0.002))


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "notes.docx"
    other.write_text("x")
    with pytest.raises(UsageError, match="no file that rsosm writes"):
        info(other)
