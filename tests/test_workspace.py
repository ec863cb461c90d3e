"""Names, files and records of a root: nothing escapes it, nothing is left half written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsosm_cli.errors import DiskError, FormatError, MissingError, SourceError, UsageError, explain
from rsosm_cli.workspace import (
    Manifest,
    Workspace,
    atomic,
    file_stamp,
    fingerprint,
    locked,
    provenance,
    require_space,
    slug,
    write_json,
)


@given(st.text(max_size=400))
def test_any_name_is_a_safe_folder(name: str) -> None:
    try:
        folder = slug(name)
    except UsageError:
        assert not name.strip()
        return
    assert folder
    assert Path(folder).name == folder
    assert not folder.startswith(".")
    assert len(folder.encode()) <= 80
    assert folder.split(".")[0] not in {"con", "nul", "aux", "prn", "com1", "lpt9"}
    assert slug(folder) == folder  # a folder's name finds the folder again


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a/b", "a-b"),
        ("../../etc", "etc"),
        ("Zürich", "Zurich"),
        ("🏙", "🌆"),
        ("x" * 300, "x" * 301),
        ("CON", "con2"),
        ("Strasse", "Straße"),
        ("Straße", "Straſſe"),
        ("Haﬀ", "Haff"),
    ],
)
def test_different_names_have_different_folders(first: str, second: str) -> None:
    assert slug(first) != slug(second)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("São Paulo", "são-paulo"), ("深圳市", "深圳市"), ("PORTO ", "porto"), ("Βόλος", "βόλοσ"), ("ΒΌΛΟΣ", "βόλοσ")],
)
def test_plain_names_stay_readable(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_a_city_that_is_not_there_is_told_from_one_misspelled_and_one_unfinished(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    space.city("Porto").manifest.update(name="Porto")
    with pytest.raises(MissingError, match=r'nothing of Oslo under .*\. Run `rsosm fetch --city "Oslo"` first'):
        space.tiles_of("Oslo")
    with pytest.raises(MissingError, match=r"nothing of Portoo under .*There is Porto: is it meant\?"):
        space.place_of("Portoo")
    with pytest.raises(MissingError, match=r"Porto has no boundary yet: .*it goes on where it stopped"):
        space.place_of("Porto")
    with pytest.raises(MissingError, match=r"no tiles of Porto under .*rsosm build-graph"):
        space.tiles_of("Porto")


def test_a_city_that_is_not_there_is_told_whatever_the_records_of_others(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    for name in ("Porto", "Lisboa"):
        space.city(name).manifest.update(name=name)
    space.city("Lisboa").manifest.path.write_text("{")
    with pytest.raises(
        MissingError, match=r"nothing of Portoo under .*There is Porto: is it meant\? If not, run `rsosm"
    ):
        space.require("Portoo")
    space.city("Porto").manifest.path.write_text("{")
    with pytest.raises(MissingError, match=r"There is porto: is it meant\?"):
        space.require("Portoo")


def write_then(path: Path, error: BaseException) -> None:
    """Write half a file, then fail."""
    with atomic(path) as part:
        part.write_text("half")
        raise error


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    with atomic(target) as part:
        part.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(KeyboardInterrupt):
        write_then(target, KeyboardInterrupt())
    assert target.read_text() == "one"
    assert os.listdir(target.parent) == ["b.txt"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"The disk is full: b\.tif was not written"):
        write_then(tmp_path / "b.tif", OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskError, match=r"The map needs 1000000\.0 TB, and .* has \d"):
        require_space(tmp_path / "not" / "yet", 1e18, "The map")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12_000))
    with pytest.raises(DiskError, match=r"The map needs 3\.4 MB, and .* has 12\.0 kB free"):
        require_space(tmp_path, 3_400_000, "The map")
    monkeypatch.undo()
    require_space(tmp_path, 1, "The map")


def test_waiting_for_another_process_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rsosm")
    held = threading.Event()

    def hold() -> None:
        with locked(tmp_path, "town.lock"):
            held.set()
            time.sleep(1.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with locked(tmp_path, "town.lock"):
        pass
    other.join()
    assert f"Waiting for another rsosm, which holds {tmp_path / '.town.lock'}" in caplog.text
    caplog.clear()
    with locked(tmp_path, "town.lock"):
        assert not caplog.text


def test_a_step_is_finished_only_with_its_key_and_its_files(tmp_path: Path) -> None:
    city = Workspace(tmp_path).city("Town")
    city.folder.mkdir(parents=True)
    city.osm.write_bytes(b"12345")
    city.manifest.record("fetch", "k1", files=[city.osm], seconds=1.0, sources=[{"name": "OSM"}])
    assert city.manifest.finished("fetch", "k1")
    assert not city.manifest.finished("fetch", "k2")
    assert not city.manifest.finished("build-graph", "k1")
    city.osm.write_bytes(b"1234")
    assert not city.manifest.finished("fetch", "k1")
    city.osm.unlink()
    assert not city.manifest.finished("fetch", "k1")


def test_records_of_steps_do_not_overwrite_each_other(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.json")
    manifest.update(name="Stadt")
    manifest.record("a", "1", files=[], seconds=0, sources=[{"name": "x"}])
    manifest.record("b", "2", files=[], seconds=0, sources=[{"name": "x"}, {"name": "y"}])
    data = manifest.read()
    assert data["name"] == "Stadt"
    assert set(data["steps"]) == {"a", "b"}
    assert provenance(data) == [{"name": "x"}, {"name": "y"}]


@pytest.mark.parametrize("text", ["{", "[]", "\x00\x01"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="is damaged"):
        Manifest(path).read()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "it is not an object"),
        ('{"name": 5}', "`name` is not text"),
        ('{"name": "\\udcff"}', "`name` is not text"),
        ('{"steps": []}', "`steps` is not an object"),
        ('{"steps": {"fetch:place": 5}}', "`steps.fetch:place` is not an object"),
        ('{"steps": {"fetch:place": {"asked": 7}}}', "`steps.fetch:place.asked` is not an object"),
        ('{"steps": {"fetch:place": {"asked": {"files": [1]}}}}', "`steps.fetch:place.asked.files.0` is not text"),
        ('{"steps": {"fetch:osm": {"elements_asked": []}}}', "`steps.fetch:osm.elements_asked` is not an object"),
        ('{"steps": {"fetch:osm": {"inputs": {}}}}', "`steps.fetch:osm.inputs` is not a list"),
        ('{"steps": {"build-graph": {"inputs": []}}}', "`steps.build-graph.inputs` is not an object"),
        ('{"steps": {"a": {"key": 1}}}', "`steps.a.key` is not text"),
        ('{"steps": {"a": {"files": []}}}', "`steps.a.files` is not an object"),
        ('{"steps": {"a": {"notes": "x"}}}', "`steps.a.notes` is not a list"),
        ('{"steps": {"a": {"sources": ["x"]}}}', "`steps.a.sources.0` is not an object"),
        ('{"steps": {"a": {"numbers": null}}}', "`steps.a.numbers` is not an object"),
        ('{"steps": {"a": {"parts": 1}}}', "`steps.a.parts` is not an object"),
        ('{"steps": {"a": {"seconds": "1"}}}', "`steps.a.seconds` is not a number"),
    ],
)
def test_a_manifest_of_another_shape_is_damaged(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=re.escape(f"{path} is damaged: {said}. Delete it")):
        Manifest(path).read()


def test_facts_that_nothing_reads_again_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('{"name": "Stadt", "more": 1, "steps": {"a": {}, "b": {"more": [], "inputs": 1}}}')
    assert Manifest(path).read()["more"] == 1


def test_cities_are_found_by_their_record(tmp_path: Path) -> None:
    for name in ("B town", "A/town"):
        city = Workspace(tmp_path).city(name)
        city.folder.mkdir(parents=True)
        city.manifest.update(name=name)
    assert sorted(c.name for c in Workspace(tmp_path).cities()) == ["A/town", "B town"]


def test_fingerprints_follow_values_not_order(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    file = tmp_path / "x"
    file.write_text("1")
    before = file_stamp(file)
    file.write_text("12")
    assert file_stamp(file) != before


def test_json_is_written_the_same_way_each_time(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "ü", "a": 1})
    write_json(tmp_path / "b.json", {"a": 1, "b": "ü"})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"a": 1, "b": "ü"}


def test_errors_survive_a_process_pool() -> None:
    for kind in (UsageError, MissingError, SourceError, FormatError, DiskError):
        again = pickle.loads(pickle.dumps(kind("What.", hint="Next.", value=3)))
        assert (type(again), str(again), again.data) == (kind, "What. Next.", {"value": 3})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.h5"), "The disk is full: the file x.h5"),
        (OSError("Can't write data (errno = 28, No space left on device)"), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x.tif"), "Permission to the file x.tif is denied"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "smaller --batch-size"),
        (KeyError("osm"), "fault of rsosm"),
        (MissingError("No city.", hint="Fetch it."), "No city. Fetch it."),
    ],
)
def test_any_error_becomes_a_sentence(error: Exception, said: str) -> None:
    assert said in explain(error)
