"""Overpass and the polite client: every misbehaviour ends in success or in one sentence, without endless waits."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from pathlib import Path

import pytest
import requests
import shapely
import urllib3
from map_services import EAST, NORTH, SOUTH, WEST, Reply, Services, count, osm_xml, serving

from rsosm_cli import client as http
from rsosm_cli.client import Client
from rsosm_cli.errors import SourceError
from rsosm_cli.osm.overpass import Answers, download, estimate_mb, query, refuse_large, request_boxes
from rsosm_cli.settings import FetchSettings

PLACE = shapely.box(WEST, SOUTH, EAST, NORTH)


@pytest.fixture
def services() -> Iterator[Services]:
    with serving() as server:
        yield server


class Waits:
    """Stands in for time.sleep."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def client(tmp_path: Path, waits: Waits, **values: object) -> Client:
    return Client("Overpass", cache=tmp_path / "cache", sleep=waits, **values)  # type: ignore[arg-type]


def ask(services: Services, tmp_path: Path, waits: Waits, **values: object) -> bytes:
    files = download(PLACE, services.settings(), client=client(tmp_path, waits, **values))
    assert len(files) == 1
    return files[0].read_bytes()


@pytest.mark.parametrize(
    ("trouble", "waited"),
    [
        ([Reply(status=429, headers={"Retry-After": "7"})], [7.0]),
        ([Reply(status=429), Reply(status=429)], [5.0, 10.0]),
        ([Reply(status=504)], [5.0]),
        ([Reply(status=406)], [5.0]),
        ([Reply(b"<html><body>Busy</body></html>")], [5.0]),
        ([Reply(osm_xml(), cut=300)], [5.0]),
        ([Reply(osm_xml()[:300])], [5.0]),
        ([Reply(osm_xml(remark="runtime error: Query timed out in &quot;query&quot;"))], [5.0]),
        ([Reply(reset=True)], [5.0]),
        ([Reply(b'{"elements": []}', headers={"Content-Type": "application/json"})], [5.0]),
        ([Reply(status=307, headers={"Location": "/api/interpreter"})], []),
        ([Reply(status=503, headers={"Retry-After": "soon"})], [5.0]),
    ],
)
def test_trouble_that_passes_ends_in_success(
    services: Services, tmp_path: Path, trouble: list[Reply], waited: list[float]
) -> None:
    waits = Waits()
    services.trouble = list(trouble)
    assert ask(services, tmp_path, waits) == osm_xml()
    assert waits.seconds == waited
    assert len(services.asked) == len(trouble) + 1


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (Reply(status=429), "status 429"),
        (Reply(status=429, headers={"Retry-After": "86400"}), r"status 429.*, and it asks to wait 24 h, after one try"),
        (Reply(status=504), "status 504"),
        (Reply(b"<html>Wartung</html>"), "an HTML page instead of data"),
        (Reply(osm_xml(), cut=100), "broke"),
        (Reply(reset=True), "the connection broke"),
        (Reply(status=406), "status 406"),
        (Reply(b"%PDF", headers={"Content-Type": "application/pdf"}), "the answer is not OSM data"),
    ],
)
def test_trouble_that_stays_ends_in_one_sentence(
    services: Services, tmp_path: Path, reply: Reply, sentence: str
) -> None:
    waits = Waits()
    services.trouble = [reply] * 20
    with pytest.raises(SourceError, match=sentence) as error:
        ask(services, tmp_path, waits, max_wait_s=60)
    assert "--osm FILE.osm.pbf" in str(error.value)
    assert "\n" not in str(error.value)
    assert sum(waits.seconds) <= 60
    assert not list((tmp_path / "cache").rglob("*.osm*"))  # no half answers


def test_redirects_in_a_circle_end(services: Services, tmp_path: Path) -> None:
    services.trouble = [Reply(status=307, headers={"Location": "/api/interpreter"})] * 100
    with pytest.raises(SourceError, match="it redirects in a circle"):
        ask(services, tmp_path, Waits())


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("target", ["http://[::1", "/\xff\xfe"], ids=["no URL", "no UTF-8"])
def test_a_redirect_to_what_is_no_address_ends(services: Services, tmp_path: Path, target: str, post: bool) -> None:
    services.trouble = [Reply(status=302, headers={"Location": target})] * 10
    with pytest.raises(SourceError, match=r"is not a URL|status 404"):
        client(tmp_path, Waits()).fetch(
            f"{services.address}/api/interpreter", {"data": "x"}, post=post, check=lambda file: ""
        )


@pytest.mark.parametrize("post", [True, False])
def test_a_redirect_to_a_host_that_is_dead_names_it(services: Services, tmp_path: Path, post: bool) -> None:
    services.trouble = [Reply(status=307, headers={"Location": "http://me:s3cret@127.0.0.1:9/api?key=s3cret"})] * 10
    with pytest.raises(SourceError, match=r"it redirects to http://\*\*\*@127\.0\.0\.1:9, and nobody answers") as error:
        client(tmp_path, Waits()).fetch(f"{services.address}/api", {"data": "x"}, post=post, check=lambda file: "")
    assert f"127.0.0.1:{services.server_port} gave no usable answer" in str(error.value)
    assert "s3cret" not in f"{error.value}{error.value.data}"
    with pytest.raises(SourceError) as error:  # the host that was asked, however it is written
        client(tmp_path, Waits()).fetch("http://LOCALHOST:9/a", {}, post=post, check=lambda file: "")
    assert "redirects" not in str(error.value)


@pytest.mark.parametrize("length", ["abc", "²", "", "-5"])
def test_a_length_that_is_no_number_is_none(services: Services, tmp_path: Path, length: str) -> None:
    services.trouble = [Reply(osm_xml(), headers={"Content-Length": length.encode().decode("latin-1")})]
    assert ask(services, tmp_path, Waits()) == osm_xml()
    assert len(services.asked) == 1


def test_a_refusal_is_not_repeated(services: Services, tmp_path: Path) -> None:
    waits = Waits()
    services.trouble = [Reply(status=400)]
    with pytest.raises(SourceError, match="status 400"):
        ask(services, tmp_path, waits)
    assert len(services.asked) == 1
    assert waits.seconds == []


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    settings = FetchSettings(overpass_url="http://127.0.0.1:9/api")
    said = r"Overpass at 127\.0\.0\.1:9 gave no usable answer: nobody answers at that address"
    with pytest.raises(SourceError, match=said):
        download(PLACE, settings, client=client(tmp_path, Waits(), max_wait_s=20))


def test_nobody_waits_long_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    waits = Waits()
    settings = FetchSettings(overpass_url="http://overpass.invalid/api")
    with pytest.raises(SourceError, match=r"is there a network\?\), after 3 tries and 15 s"):
        download(PLACE, settings, client=client(tmp_path, waits))
    assert waits.seconds == [5.0, 10.0]


@pytest.mark.parametrize(
    ("below", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "the name of its host is not known here"),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (ConnectionResetError(104, "Connection reset by peer"), "the connection broke"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "the network cannot be reached"),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), "its certificate cannot be verified"),
        (TimeoutError("timed out"), "no answer in time"),
    ],
)
def test_network_errors_in_plain_words(below: OSError, words: str) -> None:
    pool = urllib3.HTTPSConnectionPool("host", port=443)
    outer = requests.ConnectionError(urllib3.exceptions.MaxRetryError(pool, "/key=s3cret", below))
    assert words in http.trouble_of(outer)
    assert not re.search("Pool|HTTP|s3cret|Error|host=", http.trouble_of(outer))


def test_a_silent_server_is_told_and_given_up(
    tmp_path: Path, services: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(text: str) -> Reply:
        time.sleep(0.3)
        return Reply(osm_xml())

    services.overpass = slow
    monkeypatch.setattr(http, "_SILENT_S", 0.01)
    with caplog.at_level(logging.INFO, "rsosm"), pytest.raises(SourceError, match="no answer in time, after 3 tries"):
        ask(services, tmp_path, Waits(), timeout_s=(1.0, 0.05))
    assert "waiting for its answer" in caplog.text


def test_retry_after_as_a_date(services: Services, tmp_path: Path) -> None:
    waits = Waits()
    services.trouble = [Reply(status=429, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)})]
    ask(services, tmp_path, waits)
    assert 25 < waits.seconds[0] <= 31


def test_waits_are_announced(services: Services, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    services.trouble = [Reply(status=429, headers={"Retry-After": "7"})]
    with caplog.at_level(logging.INFO, "rsosm"):
        ask(services, tmp_path, Waits())
    assert "next try in 7 s" in caplog.text
    services.trouble = [Reply(status=429, headers={"Retry-After": "7200"})]
    with caplog.at_level(logging.INFO, "rsosm"):
        download(PLACE, services.settings(), fresh=True, client=client(tmp_path, Waits(), max_wait_s=10_000))
    assert "next try in 2 h" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="Windows has other permissions")
def test_an_answer_is_kept_for_nobody_else(services: Services, tmp_path: Path) -> None:
    ask(services, tmp_path, Waits())
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "cache" / "http").iterdir()} == {0}


def test_answers_are_cached_and_the_user_agent_says_whom_to_write_to(services: Services, tmp_path: Path) -> None:
    for _ in range(2):
        ask(services, tmp_path, Waits(), contact="me@example.org\r\nX-Bad: 1")
    assert len(services.asked) == 1
    assert services.agents[0].startswith("rsosm/")
    assert "me@example.org" in services.agents[0]
    assert "\n" not in services.agents[0]
    offline = download(PLACE, services.settings(), offline=True, client=client(tmp_path, Waits()))
    assert offline[0].read_bytes() == osm_xml()
    with pytest.raises(SourceError, match="--offline"):
        download(PLACE.buffer(0.1), services.settings(), offline=True, client=client(tmp_path, Waits()))


def test_answers_are_believed_for_some_days(services: Services, tmp_path: Path) -> None:
    def age(days: float) -> None:
        (kept,) = (tmp_path / "cache/http").glob("*.osm")
        os.utime(kept, (time.time() - days * 86_400,) * 2)

    def ask(**values: object) -> Sequence[Path]:
        return download(PLACE, services.settings(**values), client=client(tmp_path, Waits()))

    ask()
    for days, asked in ((6, 1), (8, 2)):
        age(days)
        files = ask()
        assert len(services.asked) == asked
    assert Answers.of(files).note() == ""
    age(2)
    assert Answers.of(files).note().startswith("The answers of Overpass show OSM as of 20")
    assert set(Answers.of(files).as_dict()) == {"asked"}
    ask(max_age_days=3)
    assert len(services.asked) == 2
    ask(max_age_days=1)
    assert len(services.asked) == len(services.counted) == 3
    # What the server says of the state counts more than when it was asked; of several answers the oldest.
    old = osm_xml().replace(b'"Overpass API">', b'"Overpass API"><meta osm_base="2024-05-06T07:08:09Z"/>')
    (tmp_path / "old.osm").write_bytes(old)
    answers = Answers.of([*files, tmp_path / "old.osm"])
    assert answers.as_dict()["osm_base"] == "2024-05-06T07:08:09Z"
    assert "show OSM as of 2024-05-06T07:08:09Z; --max-age 0 asks again" in answers.note()


def test_a_past_state_is_kept_for_ever_and_so_is_all_offline(services: Services, tmp_path: Path) -> None:
    for values, offline in (({"date": "2019-06-01"}, False), ({}, True)):
        download(PLACE, services.settings(**values), client=client(tmp_path, Waits()))
        asked = len(services.asked)
        for kept in (tmp_path / "cache/http").iterdir():
            os.utime(kept, (0, 0))
        download(PLACE, services.settings(**values), offline=offline, client=client(tmp_path, Waits()))
        assert len(services.asked) == asked


def test_one_request_at_a_time(services: Services, tmp_path: Path) -> None:
    def slow(text: str) -> Reply:
        time.sleep(0.05)
        return Reply(osm_xml())

    services.overpass = slow
    places = [shapely.affinity.translate(PLACE, xoff=i) for i in range(4)]

    def work(place: shapely.Geometry) -> None:
        download(place, services.settings(), client=client(tmp_path, Waits()))

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(services.asked) == 4
    assert services.most_at_once == 1


def test_large_places_are_asked_for_in_pieces() -> None:
    boxes = request_boxes(shapely.box(10, 50, 10.2, 50.1))
    assert len(boxes) == 9
    union = shapely.union_all([shapely.box(*b) for b in boxes])
    assert union.equals(shapely.box(10, 50, 10.2, 50.1))
    # Pieces that the place does not meet are not asked for.
    corner = shapely.Polygon([(10, 50), (10.2, 50), (10, 50.1)])
    assert len(request_boxes(corner)) < 9
    assert "(50.0000,10.0000," in query(boxes[0])


def test_the_past_of_a_place(services: Services, tmp_path: Path) -> None:
    settings = services.settings(date="2019-06-01")
    download(PLACE, settings, client=client(tmp_path, Waits()))
    assert services.asked[0][1]["data"].startswith("[out:xml]")
    assert '[date:"2019-06-01T00:00:00Z"];' in services.asked[0][1]["data"]
    assert '[date:"2019-06-01T00:00:00Z"];' in services.counted[0]
    download(PLACE, services.settings(), client=client(tmp_path, Waits()))
    assert len(services.asked) == 2  # another question than that for today
    for date in ("2012-01-01", "2999-01-01", "yesterday"):
        with pytest.raises(ValueError, match="date"):
            FetchSettings(date=date)


def test_how_much_there_is_is_asked_first(services: Services, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rsosm")
    services.count = Reply(count(nodes=10_000, ways=22_000, relations=160))
    with pytest.raises(SourceError, match=r"32,160 objects there, about 25\.1 MB, more than the 20 MB.*geofabrik"):
        download(PLACE, services.settings(overpass_max_mb=20), client=client(tmp_path, Waits()))
    assert services.asked == []
    download(PLACE, services.settings(), client=client(tmp_path, Waits()))
    assert "32,160 objects there, about 25.1 MB" in caplog.text
    services.count = Reply(status=400)
    download(PLACE, services.settings(), client=client(tmp_path, Waits()))  # all is here: nobody is asked
    with pytest.raises(SourceError, match="status 400"):
        download(PLACE, services.settings(), fresh=True, client=client(tmp_path, Waits()))
    services.count = Reply(b'{"elements": [], "remark": "runtime error: out of memory"}')
    with pytest.raises(SourceError, match="out of memory"):
        download(PLACE, services.settings(), fresh=True, client=client(tmp_path, Waits()))


def test_an_endless_answer_and_a_drip_end(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_MAX_BYTES", 1 << 20)
    services.trouble = [Reply(osm_xml(), endless=True)]
    assert ask(services, tmp_path, Waits()) == osm_xml()
    monkeypatch.setattr(http, "_ANSWER_S", 0.1)
    services.trouble = [Reply(osm_xml(), drip=0.01)]
    waits = Waits()
    files = download(PLACE, services.settings(), fresh=True, client=client(tmp_path, waits, timeout_s=(1.0, 0.1)))
    assert files[0].read_bytes() == osm_xml()
    assert waits.seconds == [5.0]


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (Reply(status=302, headers={"Location": "/api/interpreter?data=x"}), "redirects in a circle"),
        (Reply(b"{}", headers={"Content-Type": "application/json"}), "not OSM data"),
        (Reply(status=403), "status 403"),
        (Reply(reset=True), "the connection broke"),
    ],
)
def test_a_key_in_the_address_is_never_told(
    services: Services, tmp_path: Path, reply: Reply, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "rsosm")
    services.overpass = lambda text: reply
    settings = services.settings(overpass_url=f"http://me:s3cret@127.0.0.1:{services.server_port}/api")
    with pytest.raises(SourceError, match=sentence) as error:
        download(PLACE, settings, client=client(tmp_path, Waits(), max_wait_s=60))
    assert "s3cret" not in f"{error.value}{error.value.data}{caplog.text}"
    broken = FetchSettings(overpass_url="http://me:s3cret@no-such-host.invalid/api?key=s3cret")
    with pytest.raises(SourceError, match="gave no usable answer") as error:
        download(PLACE, broken, client=client(tmp_path, Waits(), max_wait_s=1))
    assert "s3cret" not in f"{error.value}{error.value.data}{caplog.text}"


def test_above_the_limit_the_extract_route_is_named() -> None:
    settings = FetchSettings(overpass_max_km2=100)
    refuse_large("Town", 99, settings)
    with pytest.raises(SourceError, match=r"16,000 km².*geofabrik"):
        refuse_large("Shenzhen", 16_000, settings)
    assert estimate_mb(100) == pytest.approx(50)
