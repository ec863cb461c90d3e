"""A boundary from Nominatim: which of its answers, how long they are believed, when it is asked beside an extract."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shapely
from map_services import SQUARE, Reply, Services, place, serving

from rsosm_cli import client
from rsosm_cli.client import Client
from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.places import nominatim
from rsosm_cli.places.find import find_place
from rsosm_cli.places.place import Place
from rsosm_cli.settings import FetchSettings


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    def make(name: str, **values: object) -> Client:
        return Client(name, cache=tmp_path / "cache", sleep=lambda s: None, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(nominatim, "Client", make)
    with serving() as server:
        yield server


def test_the_first_surface_is_taken_and_said(services: Services) -> None:
    point = place("Punkt", geojson={"type": "Point", "coordinates": [10, 50]})
    services.places = [point, place("Klein Testdorf")]
    found = find_place("Testdorf", settings=services.settings(contact="me@example.org"))
    assert (found.osm_id, found.admin_level, found.country) == ("R42", 8, "DE")
    assert found.geometry.equals(shapely.box(*shapely.Polygon(SQUARE[0]).bounds))
    assert found.notes[0] == "Testdorf is Klein Testdorf, Testland (R42, admin_level 8, DE, 1.7 km²) of Nominatim."
    assert found.notes[1] == "1 more of Nominatim's answers are called so; --osm-id chooses."
    assert len(found.notes) == 2
    assert "me@example.org" in services.agents[0]
    assert services.asked[0][1]["q"] == "Testdorf"


def test_points_and_tiny_polygons_are_not_taken(services: Services) -> None:
    tiny = {"type": "Polygon", "coordinates": [[[10, 50], [10.0001, 50], [10.0001, 50.0001], [10, 50]]]}
    services.places = [place(geojson={"type": "Point", "coordinates": [10, 50]}), place(geojson=tiny)]
    with pytest.raises(MissingError, match=r"only without a boundary: .*\(a point\); .* m²\)"):
        find_place("Testdorf", settings=services.settings())


def test_a_city_of_the_table_is_its_relation(services: Services) -> None:
    answer = place("Beijing", osm_id=912940) | {"namedetails": {"name": "北京市", "name:en": "Beijing"}}
    services.places = [answer]
    assert find_place("北京市", settings=services.settings()).osm_id == "R912940"
    assert services.asked[0][1]["osm_ids"] == "R912940"
    # A relation that bears another name by now is not taken: the name is searched.
    services.places = [answer | {"namedetails": {"name": "Somewhere"}, "osm_id": 7}]
    other = services.settings(nominatim_url=f"{services.address}/nominatim/b")
    assert find_place("Beijing", settings=other).osm_id == "R7"
    paths = ["/nominatim/lookup", "/nominatim/b/lookup", "/nominatim/b/search"]
    assert [path for path, _ in services.asked] == paths


def test_answers_are_believed_for_some_days(services: Services, tmp_path: Path) -> None:
    def ask(**values: object) -> Place:
        return find_place("Testdorf", settings=services.settings(**values))

    ask()
    (kept,) = (tmp_path / "cache/http").iterdir()
    for days, asked in ((29, 1), (31, 2)):
        os.utime(kept, (time.time() - days * 86_400,) * 2)
        found = ask()
        assert len(services.asked) == asked
    assert found.asked == pytest.approx(time.time(), abs=60)
    assert "asked for it" not in " ".join(found.notes)
    os.utime(kept, (time.time() - 2 * 86_400,) * 2)
    assert "Nominatim was asked for it at 20" in ask().notes[-1]
    ask(max_age_days=3)
    assert len(services.asked) == 2
    ask(max_age_days=1)
    assert len(services.asked) == 3


def test_nothing_found(services: Services) -> None:
    services.places = []
    with pytest.raises(MissingError, match="no place called 'Nirgends'"):
        find_place("Nirgends", settings=services.settings())


def test_by_id_where_the_extract_cuts_it(services: Services, shared: Path) -> None:
    file = shared / "data/osm/monaco.osm.pbf"
    services.places = [place("Monaco", osm_id=1124039)]
    found = find_place("Monaco", files=[file], osm_id="relation/1124039", settings=services.settings())
    assert found.source == "Nominatim"
    assert "cut by monaco.osm.pbf" in found.notes[0]
    assert services.asked[0] == ("/nominatim/lookup", services.asked[0][1])
    assert services.asked[0][1]["osm_ids"] == "R1124039"
    with pytest.raises(MissingError, match="is cut by"):
        find_place("Monaco", files=[file], osm_id="R1124039", settings=services.settings(), offline=True)


def test_by_id_where_the_extract_lacks_it(services: Services, shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = shared / "data/osm/monaco.osm.pbf"
    known = {"files": [file], "settings": services.settings()}
    with pytest.raises(MissingError, match=r"^relation/1 is not in monaco\.osm\.pbf\. Give --boundary FILE"):
        find_place("Monaco", osm_id="relation/1", **known, offline=True)  # type: ignore[arg-type]
    with pytest.raises(MissingError, match="relation/-1 is not in"):  # no server has it
        find_place("Monaco", osm_id="relation/-1", **known)  # type: ignore[arg-type]
    assert not services.asked
    with caplog.at_level(logging.INFO, "rsosm"):
        found = find_place("Monaco", osm_id="relation/1", **known)  # type: ignore[arg-type]
    why = "relation/1 is not in monaco.osm.pbf. Nominatim is asked for it."
    assert why in caplog.text
    assert found.notes[0] == "relation/1 is not in monaco.osm.pbf. Its boundary is taken from Nominatim."
    services.places = []
    with pytest.raises(MissingError, match=r"^relation/2 is not in monaco.* Nominatim does not know R2\.") as error:
        find_place("Monaco", osm_id="relation/2", **known)  # type: ignore[arg-type]
    assert "--boundary extract" in error.value.hint
    assert "--osm FILE" not in error.value.hint  # it is given


def test_answers_without_a_place_are_not_believed(services: Services) -> None:
    services.places = []
    for _ in range(2):
        with pytest.raises(MissingError, match="no place called"):
            find_place("Testdorf", settings=services.settings())
    assert len(services.asked) == 2
    services.places = [place()]
    assert find_place("Testdorf", settings=services.settings()).osm_id == "R42"
    find_place("Testdorf", settings=services.settings())
    assert len(services.asked) == 3
    services.places = [place(osm_id=43)]
    assert find_place("Testdorf", settings=services.settings(), fresh=True).osm_id == "R43"


def test_a_drip_ends(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.1 - client._TIMEOUT_S[1])
    monkeypatch.setattr(client, "_TRIES", 2)
    whole = json.dumps(services.places).encode()
    services.trouble = [Reply(whole, drip=0.01), Reply(whole, drip=0.01)]
    with pytest.raises(SourceError, match=r"Nominatim at 127.*the answer was not whole in time, after 2 tries"):
        find_place("Testdorf", settings=services.settings())
    services.trouble = [Reply(whole, drip=0.01)]
    assert find_place("Testdorf", settings=services.settings()).osm_id == "R42"


def test_offline_and_wrong_ids() -> None:
    with pytest.raises(SourceError, match="--offline"):
        find_place("Testdorf", settings=FetchSettings(), offline=True)
    with pytest.raises(UsageError, match="--osm-id 'N5'"):
        find_place("Testdorf", osm_id="N5", settings=FetchSettings())
