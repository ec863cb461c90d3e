"""Tiles that a service does not have: absent, refused, empty, clear, white, or its picture that says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from tile_services import PLACE, TILE_PX, ZOOM, Answer, Service, fetch, pixels_of, png, serving_tiles, tile

from rsosm_cli.errors import SourceError
from rsosm_cli.imagery import prepare, tile_client
from rsosm_cli.imagery.tile_set import tiles_over


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.01)
    with serving_tiles() as server:
        yield server


def test_absent_tiles_are_listed_and_marked(service: Service, tmp_path: Path) -> None:
    answers: list[Answer] = [(404, {}, b"no"), (204, {"Content-Length": "0"}, b""), (200, {}, b"")]
    wanted = list(tiles_over(prepare.place_margin(PLACE), ZOOM, TILE_PX).ids())
    gone = dict(zip(wanted[::4], answers * 9, strict=False))
    service.answer = lambda z, x, y, n: gone.get((z, x, y)) or tile(x, y)
    info = fetch(tmp_path, service.template)
    assert sorted(info.missing) == sorted(f"{z}/{x}/{y}" for z, x, y in gone)
    assert info.count == len(wanted) - len(gone)
    with rasterio.open(info.path) as image:
        assert (image.read(4) > 0).sum() == info.count * TILE_PX**2
        assert not image.read((1, 2, 3))[:, image.read(4) == 0].any()


def test_the_no_imagery_picture_is_missing_unless_kept(service: Service, tmp_path: Path) -> None:
    wanted = list(tiles_over(prepare.place_margin(PLACE), ZOOM, TILE_PX).ids())
    sorry = png(np.full((TILE_PX, TILE_PX, 3), 200, np.uint8))
    service.answer = lambda z, x, y, n: (200, {}, sorry) if (z, x, y) in wanted[:5] else tile(x, y)
    info = fetch(tmp_path, service.template)
    assert len(info.missing) == 5
    assert any("very same picture" in note for note in info.notes)
    assert not fetch(tmp_path, service.template, xyz_placeholders=False).missing


def test_a_place_of_placeholders_alone_says_so_and_how_to_keep_them(service: Service, tmp_path: Path) -> None:
    sorry = png(np.full((TILE_PX, TILE_PX, 3), 200, np.uint8))
    service.answer = lambda z, x, y, n: (200, {}, sorry)
    with pytest.raises(
        SourceError, match=r"nothing but one same picture over the place at zoom 17, \d+ times"
    ) as caught:
        fetch(tmp_path, service.template)
    assert "--set xyz_placeholders=false" in caught.value.hint
    assert "--set xyz_zoom=16" in caught.value.hint
    assert not fetch(tmp_path, service.template, xyz_placeholders=False).missing


def test_a_service_without_tiles_is_asked_for_a_lower_zoom_as_long_as_there_is_one(
    service: Service, tmp_path: Path
) -> None:
    service.answer = lambda z, x, y, n: (404, {}, b"")
    with pytest.raises(SourceError, match=r"zoom 14\. Choose a lower zoom \(--set xyz_zoom=13\) or another service"):
        fetch(tmp_path, service.template, xyz_zoom=14)
    with pytest.raises(SourceError, match=r"zooms 12 to 16\. Choose a lower zoom \(--set xyz_zoom=11\)"):
        fetch(tmp_path, service.template, xyz_zoom=None, gsd_m=4.0)
    with pytest.raises(SourceError, match=r"zoom 0\. Choose another service\."):
        fetch(tmp_path, service.template, xyz_zoom=0)


def test_tiles_that_are_all_transparent_are_refused(service: Service, tmp_path: Path) -> None:
    def clear(z: int, x: int, y: int, n: int) -> Answer:  # colours differ, so that no two are one picture
        alpha = np.zeros((TILE_PX, TILE_PX, 1), np.uint8)
        return 200, {}, png(np.concatenate([pixels_of(x, y), alpha], axis=2))

    service.answer = clear
    with pytest.raises(SourceError, match="holds no image of the place"):
        fetch(tmp_path, service.template)
    assert not (tmp_path / "imagery.tif").exists()


def test_tiles_refused_beside_others_are_missing_and_not_remembered(service: Service, tmp_path: Path) -> None:
    wanted = list(tiles_over(prepare.place_margin(PLACE), ZOOM, TILE_PX).ids())
    gone = set(wanted[::3])
    denied: Answer = (403, {}, b"<Error><Code>AccessDenied</Code></Error>")
    service.answer = lambda z, x, y, n: denied if (z, x, y) in gone else tile(x, y)
    info = fetch(tmp_path, service.template)
    assert len(info.missing) == len(gone)
    assert any(f"{len(gone)} of them were refused with status 403" in note for note in info.notes)
    service.asked.clear()
    service.answer = lambda z, x, y, n: tile(x, y)
    assert not fetch(tmp_path, service.template).missing
    assert set(service.asked) >= gone


@pytest.mark.parametrize("many", [1, 10**6], ids=["at once", "in the end"])
def test_a_key_that_ends_half_way_is_no_hole(
    service: Service, tmp_path: Path, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_client, "_REFUSALS", many)
    service.answer = lambda z, x, y, n: tile(x, y) if sum(service.asked.values()) <= 4 else (403, {}, b"")
    with pytest.raises(SourceError, match=r"status 403\. Is the key right"):
        fetch(tmp_path, service.template, xyz_workers=1)
    assert not (tmp_path / "imagery.tif").exists()
    if many == 1:
        assert sum(service.asked.values()) == 6  # four tiles, one that is refused, and one of the four again
    service.answer = lambda z, x, y, n: tile(x, y)
    assert not fetch(tmp_path, service.template).missing


def test_an_empty_answer_is_asked_for_again_and_never_remembered(service: Service, tmp_path: Path) -> None:
    wanted = list(tiles_over(prepare.place_margin(PLACE), ZOOM, TILE_PX).ids())
    empty, absent = set(wanted[::3]), wanted[1]
    service.answer = lambda z, x, y, n: (
        (200, {}, b"") if (z, x, y) in empty else (404, {}, b"") if (z, x, y) == absent else tile(x, y)
    )
    info = fetch(tmp_path, service.template)
    assert len(info.missing) == len(empty) + 1
    assert any(f"{len(empty)} of them came as an empty answer, twice" in note for note in info.notes)
    assert all(service.asked[t] >= 2 for t in empty)
    assert service.asked[absent] == 1
    service.asked.clear()
    service.answer = lambda z, x, y, n: tile(x, y)
    assert len(fetch(tmp_path, service.template).missing) == 1  # 404 is an answer, and believed for a while
    assert set(service.asked) == empty


def test_a_lower_zoom_is_taken_where_the_wanted_one_is_empty(service: Service, tmp_path: Path) -> None:
    service.answer = lambda z, x, y, n: tile(x, y) if z <= 14 else (404, {}, b"")
    info = fetch(tmp_path, service.template, xyz_zoom=None, gsd_m=4.0)
    assert any("zoom 14" in note for note in info.notes)
    assert any("coarser than the 4 m" in note for note in info.notes)


def test_white_tiles_are_missing_on_request(service: Service, tmp_path: Path) -> None:
    white = pixels_of(3, 3)
    white[:, 20:] = 255
    service.answer = lambda z, x, y, n: (200, {}, png(white)) if x % 2 else tile(x, y)
    info = fetch(tmp_path, service.template, nodata=255, xyz_placeholders=False)
    with rasterio.open(info.path) as image:
        alpha = image.read(4)
    assert 0.2 < (alpha == 0).mean() < 0.6


def test_that_a_tile_is_missing_is_believed_for_a_while_only(service: Service, tmp_path: Path) -> None:
    service.answer = lambda z, x, y, n: (404, {}, b"") if (x + y) % 4 == 0 else tile(x, y)
    assert fetch(tmp_path, service.template).missing
    service.answer = lambda z, x, y, n: tile(x, y)
    assert fetch(tmp_path, service.template).missing
    service.asked.clear()
    assert not fetch(tmp_path, service.template, xyz_missing_days=0).missing
    assert all((x + y) % 4 == 0 for _, x, y in service.asked)
