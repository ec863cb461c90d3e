"""Extracts of OSM from a server: the smallest that covers, resumed, verified, shared; whatever the server does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import osmium
import pytest
import shapely
from listening import Listener
from map_services import EAST, NORTH, SOUTH, WEST, Reply, Services, osm_xml, region, serving

from rsosm_cli import client as http
from rsosm_cli.client import Client
from rsosm_cli.errors import DiskError, MissingError, SourceError
from rsosm_cli.osm import download, geofabrik
from rsosm_cli.osm.elements import read_elements
from rsosm_cli.osm.geofabrik import Extract, Region, covering, get_extract
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings

PLACE = shapely.box(WEST, SOUTH, EAST, NORTH)
NAME = "land-latest.osm.pbf"


pytestmark = pytest.mark.usefixtures("own_surroundings")


@pytest.fixture(scope="module")
def pbf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The hand-written town as a PBF file of some hundred kilobytes, so that it can break off in the middle."""
    folder = tmp_path_factory.mktemp("pbf")
    (folder / "town.osm").write_bytes(osm_xml())
    with osmium.SimpleWriter(osmium.io.File(str(folder / NAME), "pbf,pbf_compression=none")) as writer:
        for item in osmium.FileProcessor(str(folder / "town.osm")):
            writer.add(item)
        for number in range(20_000):  # beyond the town
            writer.add_node(
                osmium.osm.mutable.Node(id=10_000 + number, location=(20.0, 50.0), tags={"note": str(number)})
            )
    data = (folder / NAME).read_bytes()
    assert len(data) > 200_000
    return data


@pytest.fixture
def services(pbf: bytes) -> Iterator[Services]:
    with serving() as server:
        url = server.offer(NAME, pbf)
        server.offer_index(
            region("continent", f"{url}-none", (-20, 30, 40, 70)),
            region("land", url, (9, 49, 11, 51), "continent"),
            region("elsewhere", url, (0, 0, 1, 1)),
            {"type": "Feature", "properties": {"id": "planet"}, "geometry": None},
        )
        yield server


def get(
    services: Services, folder: Path, waits: list[float] | None = None, progress: Progress = SILENT, **values: object
) -> Extract:
    settings = services.settings(**values)
    sleep = (lambda s: None) if waits is None else waits.append
    client = Client("The server of extracts", cache=folder / "cache", max_wait_s=settings.max_wait_s, sleep=sleep)
    land = Region("land", "Land", f"http://127.0.0.1:{services.server_port}/{NAME}", 1.0)
    return get_extract(land, folder / "extracts", settings, client=client, progress=progress)


def left(folder: Path) -> list[str]:
    """Return what lies where extracts are kept, locks aside."""
    return sorted(path.name for path in (folder / "extracts").iterdir() if not path.name.startswith("."))


def downloads(services: Services) -> list[str]:
    """Return the ``Range`` of every download of the extract."""
    return [bytes_ for verb, path, bytes_ in services.ranges if verb == "GET" and path == f"/{NAME}"]


def test_the_smallest_that_covers_is_taken() -> None:
    index = [
        region("continent", "c", (-20, 30, 40, 70)),
        region("land", "l", (9, 49, 11, 51), "continent"),
        region("half", "h", (9, 49, 10.01, 51), "land"),  # only meets the place
        {"type": "Feature", "properties": {"id": "no-file", "urls": {}}, "geometry": {"type": "Point"}},
    ]
    assert [r.id for r in covering(index, PLACE)] == ["land", "continent"]
    assert covering(index, shapely.box(100, 0, 101, 1)) == []


def test_a_city_from_the_covering_extract(services: Services, tmp_path: Path, pbf: bytes) -> None:
    settings = services.settings()
    plan = fetch("Testdorf", root=tmp_path, osm=["geofabrik"], settings=settings, dry_run=True)
    assert plan.numbers["osm_download_mb"] == pytest.approx(len(pbf) / 1e6, abs=0.001)
    assert "The extract Land, 369.1 kB, would" in " ".join(plan.notes)
    assert downloads(services) == []
    result = fetch("Testdorf", root=tmp_path, osm=["geofabrik"], settings=settings)
    assert (result.numbers["points"], result.numbers["polygons"]) == (1, 1)
    assert (tmp_path / "extracts/land.osm.pbf").read_bytes() == pbf
    step = (tmp_path / "cities/testdorf/manifest.json").read_text()
    assert '"extract Land"' in step
    # Another city of the same extract asks for nothing but its place.
    fetch("Nebenan", root=tmp_path, osm=["geofabrik"], settings=settings)
    assert downloads(services) == [""]
    assert fetch("Testdorf", root=tmp_path, osm=["geofabrik"], settings=settings).status == "skipped"
    assert fetch("Testdorf", root=tmp_path, settings=settings).status == "skipped"


def test_above_the_limit_of_overpass_the_extract_is_the_default(
    services: Services, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rsosm")
    result = fetch("Testdorf", root=tmp_path, settings=services.settings(overpass_max_km2=1))
    assert result.numbers["points"] == 1
    assert "more than the 1 km² asked of Overpass: the extract" in caplog.text
    assert "Downloading the extract Land, 369.1 kB, from" in caplog.text
    assert not [path for path, _ in services.asked if path.startswith("/api")]


def test_an_old_extract_is_replaced_where_the_server_has_another(
    services: Services, tmp_path: Path, pbf: bytes
) -> None:
    get(services, tmp_path)
    get(services, tmp_path)
    assert downloads(services) == [""]
    get(services, tmp_path, max_age_days=0)  # asked, and unchanged
    assert downloads(services) == [""]
    newer = pbf[:-1] + bytes([pbf[-1] ^ 1])
    services.offer(NAME, newer)
    assert get(services, tmp_path).path.read_bytes() == pbf
    assert get(services, tmp_path, max_age_days=0).path.read_bytes() == newer
    assert downloads(services) == ["", ""]


def test_a_finished_city_follows_a_newer_extract_on_request(services: Services, tmp_path: Path) -> None:
    settings = services.settings()
    fetch("Testdorf", root=tmp_path, osm=["geofabrik"], settings=settings)
    (tmp_path / "town.osm").write_bytes(osm_xml().replace(b"cafe", b"bank"))
    with osmium.SimpleWriter(str(tmp_path / NAME)) as writer:
        for item in osmium.FileProcessor(str(tmp_path / "town.osm")):
            writer.add(item)
    services.offer(NAME, (tmp_path / NAME).read_bytes())
    assert fetch("Testdorf", root=tmp_path, osm=["geofabrik"], settings=settings).status == "skipped"
    old = services.settings(max_age_days=0)
    assert fetch("Testdorf", root=tmp_path, osm=["geofabrik"], settings=old).status == "done"
    elements = read_elements(tmp_path / "cities/testdorf/osm.parquet")
    assert {"amenity": "bank"} in elements.tags
    # Without naming the source again, too; and a city of a file keeps its file, whatever the age.
    assert fetch("Testdorf", root=tmp_path, settings=services.settings(max_age_days=1)).status == "skipped"
    services.asked.clear()
    assert fetch("Testdorf", root=tmp_path, settings=old).status == "done"
    fetch("Eigen", root=tmp_path, osm=[tmp_path / "town.osm"], bbox=(WEST, SOUTH, EAST, NORTH), settings=settings)
    kept = fetch("Eigen", root=tmp_path, settings=old)
    assert kept.status == "skipped"
    assert "--max-age leaves them" in " ".join(kept.notes)
    assert not [path for path, _ in services.asked if path.startswith("/api")]


@pytest.mark.parametrize("length", [100_000, 10])
def test_what_broke_off_is_resumed(services: Services, tmp_path: Path, pbf: bytes, length: int) -> None:
    checksum = services.files[f"/{NAME}.md5"]
    services.trouble = [_headed(services), Reply(checksum), _cut(services, length)]
    assert get(services, tmp_path).path.read_bytes() == pbf
    assert downloads(services) == ["", f"bytes={length}-"]


TROUBLE = [
    (Reply(status=429, headers={"Retry-After": "7"}), [7.0]),
    (Reply(status=429), [5.0]),
    (Reply(status=504), [5.0]),
    (Reply(status=406), [5.0]),
    (Reply(reset=True), [5.0]),
    (Reply(b"<html>busy</html>" * 20, headers={"Content-Type": "text/html"}), [5.0]),
]


@pytest.mark.parametrize(("trouble", "waited"), TROUBLE)
@pytest.mark.parametrize("before", [0, 1, 2], ids=["head", "checksum", "file"])
def test_trouble_that_passes(
    services: Services, tmp_path: Path, pbf: bytes, trouble: Reply, waited: list[float], before: int
) -> None:
    if before == 0 and trouble.body:
        pytest.skip("a HEAD has no body")
    if before == 2 and trouble.body:  # of the announced length, so that nothing but its content gives it away
        trouble = Reply((trouble.body * 10_000)[: len(pbf)], headers=trouble.headers)
    usual = [_headed(services), Reply(services.files[f"/{NAME}.md5"])]
    services.trouble = [*usual[:before], trouble]
    waits: list[float] = []
    assert get(services, tmp_path, waits).path.read_bytes() == pbf
    assert waits == waited
    assert left(tmp_path) == ["land.json", "land.osm.pbf"]


def _headed(services: Services) -> Reply:
    import hashlib

    body = services.files[f"/{NAME}"]
    return Reply(body, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (Reply(status=429, headers={"Retry-After": "86400"}), r"status 429.*, and it asks to wait 24 h, after one try"),
        (Reply(status=504), "status 504.*after 6 tries"),
        (Reply(status=404), "status 404"),
        (Reply(status=302, headers={"Location": f"/{NAME}"}), "redirects in a circle"),
        (Reply(status=302, headers={"Location": "http://[::1"}), "is not a URL"),
        (Reply(status=302, headers={"Location": "/\xff"}), "is not a URL"),
        (Reply(status=302, headers={"Location": "http://127.0.0.1:9/"}), r"it redirects to http://127\.0\.0\.1:9, and"),
        (Reply(reset=True), "the connection broke"),
        (Reply(b"<html>Wartung</html>" * 100, endless=True), "an HTML page instead of an extract"),
    ],
)
def test_trouble_that_stays_is_one_sentence(services: Services, tmp_path: Path, reply: Reply, sentence: str) -> None:
    services.trouble = [_headed(services), Reply(services.files[f"/{NAME}.md5"]), *[reply] * 60]
    with pytest.raises(SourceError, match=sentence) as error:
        get(services, tmp_path, max_wait_s=400)
    assert "\n" not in str(error.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("tag", "kept"), [('"a"', ["land.osm.pbf.part", "land.osm.pbf.part.json"]), ('W/"a"', [])])
def test_a_part_is_kept_where_the_rest_can_be_asked_for(
    services: Services, tmp_path: Path, pbf: bytes, tag: str, kept: list[str]
) -> None:
    whole = Reply(pbf, headers={"ETag": tag})
    services.trouble = [whole, Reply(services.files[f"/{NAME}.md5"]), *[replace(whole, cut=100_000)] * 6]
    with pytest.raises(SourceError, match="the connection broke") as error:
        get(services, tmp_path, max_wait_s=400)
    assert left(tmp_path) == kept
    assert ("is kept" in str(error.value)) == bool(kept)


def test_an_endless_body_and_a_drip_end(
    services: Services, tmp_path: Path, pbf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = [_headed(services), Reply(services.files[f"/{NAME}.md5"])]
    services.trouble = [*usual, *[Reply(pbf, endless=True)] * 3]
    with pytest.raises(SourceError, match=f"sends more than the {len(pbf)} bytes"):
        get(services, tmp_path)
    monkeypatch.setattr(http, "SLOW_S", 0.1)
    services.trouble = [*usual, Reply(pbf[:1000], drip=0.01, headers={"Content-Length": str(len(pbf))})]
    assert get(services, tmp_path).path.read_bytes() == pbf


def test_what_is_thrown_away_is_taken_back_from_the_progress(services: Services, tmp_path: Path, pbf: bytes) -> None:
    usual = [_headed(services), Reply(services.files[f"/{NAME}.md5"])]
    services.trouble = [*usual, Reply(pbf, endless=True), Reply(pbf, cut=len(pbf) // 2), Reply(pbf)]
    listener = Listener()
    get(services, tmp_path, progress=listener)
    assert [(task.done, task.most) for task in listener.tasks] == [(len(pbf), len(pbf))]


def _unknown(services: Services, *replies: Reply) -> list[Reply]:
    """Return what is answered where the server tells no length: to HEAD, for the checksum, for the file."""
    return [Reply(headers={"Content-Length": ""}), Reply(services.files[f"/{NAME}.md5"]), *replies]


def test_a_file_of_unknown_length_comes_whole(services: Services, tmp_path: Path, pbf: bytes) -> None:
    silent = Reply(pbf, headers={"Content-Length": ""})
    services.trouble = _unknown(services, replace(silent, cut=1000), silent)
    assert get(services, tmp_path).path.read_bytes() == pbf


@pytest.mark.parametrize(
    ("junk", "said"),
    [(False, "no part of an OSM file any more after {size} bytes"), (True, "the answer is not an OSM file")],
)
def test_a_body_without_length_and_end_ends(
    services: Services, tmp_path: Path, pbf: bytes, junk: bool, said: str
) -> None:
    body = bytes(range(256)) * 100 if junk else pbf
    services.trouble = _unknown(services, *[Reply(body, endless=True)] * 6)
    with pytest.raises(SourceError, match=said.format(size=len(pbf))):
        get(services, tmp_path)


def test_a_body_without_length_leaves_room_on_the_disk(
    services: Services, tmp_path: Path, pbf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_LOOK_BYTES", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**8, 10**8))
    services.trouble = _unknown(services, Reply(pbf, headers={"Content-Length": ""}))
    with pytest.raises(DiskError, match=r"The rest of land\.osm\.pbf, of unknown length after .* has 100\.0 MB free"):
        get(services, tmp_path)
    assert get(services, tmp_path / "again").path.read_bytes() == pbf  # where the length is told, it is enough


@pytest.mark.parametrize("reset", [False, True])
def test_a_body_of_another_length_that_breaks_off_at_once(
    services: Services, tmp_path: Path, pbf: bytes, reset: bool
) -> None:
    other = Reply(pbf + b"more", cut=10, reset=reset)
    services.trouble = [_headed(services), Reply(services.files[f"/{NAME}.md5"]), *[other] * 2]
    assert get(services, tmp_path).path.read_bytes() == pbf


def test_a_file_that_is_cut_off_on_its_server_is_not_kept(services: Services, tmp_path: Path, pbf: bytes) -> None:
    services.offer(NAME, pbf[:-10])
    for times in (3, 6):
        with pytest.raises(SourceError, match=f"broke off after {len(pbf) - 10} bytes, within a block, after 3 tries"):
            get(services, tmp_path)
        assert left(tmp_path) == []
        assert downloads(services) == [""] * times


@pytest.mark.parametrize("status", [405, 501])
def test_a_server_that_knows_no_head_is_asked_by_get(
    services: Services, tmp_path: Path, pbf: bytes, status: int
) -> None:
    services.trouble = [Reply(status=status)]
    extract = get(services, tmp_path)
    assert (extract.path.read_bytes(), extract.size) == (pbf, len(pbf))
    assert [verb for verb, path, _ in services.ranges if path == f"/{NAME}"] == ["HEAD", "GET", "GET"]
    services.trouble = [Reply(status=status)] * 2
    with pytest.raises(SourceError, match=f"status {status}"):
        get(services, tmp_path / "again")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told(services: Services, tmp_path: Path) -> None:
    services.trouble = [_headed(services), Reply(services.files[f"/{NAME}.md5"]), _cut(services, 1000)]
    services.trouble += [Reply(status=404)]
    with pytest.raises(SourceError, match="404"):  # so that there is a note of what the part is one of
        get(services, tmp_path)
    (tmp_path / "extracts/land.osm.pbf.part").unlink()
    (tmp_path / "extracts/land.osm.pbf.part").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"The disk is full: land\.osm\.pbf\.part was not written"):
        get(services, tmp_path)
    assert downloads(services) == ["", "bytes=1000-", ""]


def test_other_bytes_than_the_checksum_says(services: Services, tmp_path: Path, pbf: bytes) -> None:
    services.files[f"/{NAME}.md5"] = b"0" * 32 + b"  land\n"
    with pytest.raises(SourceError, match="does not have the checksum"):
        get(services, tmp_path)
    assert left(tmp_path) == []
    assert downloads(services) == ["", ""]


def test_a_file_that_changed_in_between_comes_whole(services: Services, tmp_path: Path, pbf: bytes) -> None:
    services.trouble = [_headed(services), Reply(services.files[f"/{NAME}.md5"]), _cut(services, 100_000)]
    services.trouble += [Reply(status=404)]
    with pytest.raises(SourceError, match="404"):
        get(services, tmp_path)
    newer = pbf[:-1] + bytes([pbf[-1] ^ 1])
    services.offer(NAME, newer)
    assert get(services, tmp_path).path.read_bytes() == newer


def _cut(services: Services, length: int) -> Reply:
    whole = _headed(services)
    return Reply(whole.body, headers=whole.headers, cut=length)


def test_no_secret_in_an_error(services: Services, tmp_path: Path) -> None:
    secret = f"http://me:s3cret@127.0.0.1:{services.server_port}/index-v1.json?api_key=s3cret"
    services.trouble = [Reply(status=403)]
    with pytest.raises(SourceError, match="403") as error:
        fetch(
            "Testdorf", root=tmp_path, osm=["geofabrik"], bbox=PLACE.bounds, settings=FetchSettings(extracts_url=secret)
        )
    assert "s3cret" not in f"{error.value}{error.value.data}"


def test_no_secret_of_an_address_is_shown_or_recorded(
    services: Services, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "rsosm")
    root = tmp_path / "root"
    host = f"http://me:s3cret@127.0.0.1:{services.server_port}"
    services.offer_index(region("land", f"{host}/{NAME}?sig=s3cret", (9, 49, 11, 51)))
    settings = services.settings(extracts_url=f"{host}/index-v1.json?api_key=s3cret")
    with pytest.raises(MissingError, match=r"No extract of .*\*\*\*.* covers Sea") as error:
        fetch("Sea", root=root, osm=["geofabrik"], bbox=(100, 0, 101, 1), settings=settings)
    asked = {"osm": ["geofabrik"], "bbox": PLACE.bounds, "settings": settings}
    plan = fetch("Town", root=root, dry_run=True, **asked)
    done = fetch("Town", root=root, **asked)
    fetch("Other", root=root, **asked)
    assert downloads(services) == [""]  # the address is known again
    texts = [path.read_text() for path in root.rglob("*") if path.suffix in (".json", ".yaml", ".geojson")]
    assert len(texts) > 5
    said = f"{error.value}{error.value.data}{plan}{done}{caplog.text}{''.join(texts)}"
    assert f"127.0.0.1:{services.server_port}/{NAME}?sig=***" in said
    assert "s3cret" not in said


def test_no_extract_covers_the_place_and_offline(services: Services, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"No extract .* covers Sea"):
        fetch("Sea", root=tmp_path, osm=["geofabrik"], bbox=(100, 0, 101, 1), settings=services.settings())
    with pytest.raises(SourceError, match="--offline"):
        fetch("Town", root=tmp_path, osm=["geofabrik"], bbox=PLACE.bounds, settings=services.settings(), offline=True)
    fetch("Town", root=tmp_path, osm=["geofabrik"], bbox=PLACE.bounds, settings=services.settings())
    again = fetch(
        "Other", root=tmp_path, osm=["geofabrik"], bbox=PLACE.bounds, settings=services.settings(), offline=True
    )
    assert again.status == "done"


def _fetch_in_process(root: Path, address: str, answers: multiprocessing.Queue[str]) -> None:
    settings = FetchSettings(extracts_url=address)
    answers.put(fetch("Town", root=root, osm=["geofabrik"], bbox=PLACE.bounds, settings=settings).status)


def test_two_processes_make_one_download(services: Services, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    address = services.settings().extracts_url
    both = [context.Process(target=_fetch_in_process, args=(tmp_path, address, answers)) for _ in range(2)]
    for process in both:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in both) == ["done", "skipped"]
    for process in both:
        process.join()
    assert downloads(services) == [""]


def test_after_kill_9_only_the_rest_is_downloaded(services: Services, tmp_path: Path, pbf: bytes) -> None:
    context = multiprocessing.get_context("spawn")
    whole = _headed(services)
    index = Reply(services.files["/index-v1.json"])
    services.trouble = [
        index, whole, Reply(services.files[f"/{NAME}.md5"]), Reply(pbf, headers=whole.headers, hang_at=100_000),
    ]  # fmt: skip
    answers: multiprocessing.Queue[str] = context.Queue()
    address = services.settings().extracts_url
    process = context.Process(target=_fetch_in_process, args=(tmp_path / "a", address, answers))
    process.start()
    part = tmp_path / "a/extracts/land.osm.pbf.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    services.release.set()
    have = part.stat().st_size
    assert 0 < have <= 100_000
    fetch("Town", root=tmp_path / "a", osm=["geofabrik"], bbox=PLACE.bounds, settings=services.settings())
    assert downloads(services) == ["", f"bytes={have}-"]
    fetch("Town", root=tmp_path / "b", osm=["geofabrik"], bbox=PLACE.bounds, settings=services.settings())
    for name in ("extracts/land.osm.pbf", "cities/town/osm.parquet", "cities/town/place.geojson"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_index_is_asked_for_once_a_month(services: Services, tmp_path: Path) -> None:
    client = Client("Extracts", cache=tmp_path / "cache")
    for _ in range(2):
        geofabrik.find_region("Town", PLACE, services.settings(), client=client)
    assert len([p for _, p, _ in services.ranges if p == "/index-v1.json"]) == 1
    kept = client.cached(services.settings().extracts_url, {}, ".json")
    os.utime(kept, (0, 0))
    geofabrik.find_region("Town", PLACE, services.settings(), client=client)
    assert len([p for _, p, _ in services.ranges if p == "/index-v1.json"]) == 2
