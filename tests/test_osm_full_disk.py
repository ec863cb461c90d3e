"""A full disk while elements are collected: one sentence, whichever file could not be written."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely

from rsosm_cli.errors import DiskError
from rsosm_cli.osm.elements import tags_array
from rsosm_cli.osm.keys import Keys
from rsosm_cli.osm.sink import Batch, ElementSink

FULL = Path("/dev/full")  # every write to it fails as on a full disk


def points(n: int) -> Batch:
    return Batch(
        osm_type=np.zeros(n, np.uint8),
        osm_id=np.arange(1, n + 1),
        kind=np.zeros(n, np.uint8),
        tags=tags_array([{"shop": "yes"}] * n),
        geometry=shapely.points(np.linspace(8, 8.1, n), np.full(n, 50.0)),
    )


@pytest.fixture
def keys_on_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    if not FULL.exists():
        pytest.skip("this system has no /dev/full")
    made = Keys.__init__

    def on_full_disk(self: Keys, folder: Path) -> None:
        made(self, folder)
        self._paths = dict.fromkeys(self._paths, FULL)

    monkeypatch.setattr(Keys, "__init__", on_full_disk)


@pytest.mark.usefixtures("keys_on_full_disk")
@pytest.mark.parametrize("elements", [1, 100_000], ids=["written on leaving", "written at once"])
def test_key_files_on_a_full_disk_are_told(tmp_path: Path, elements: int) -> None:
    with (
        pytest.raises(DiskError, match=r"The disk is full: osm\.parquet was not written"),
        ElementSink(tmp_path / "osm.parquet") as sink,
    ):
        sink.add(points(elements))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("keys_on_full_disk")
def test_what_ended_the_reading_is_told_though_the_disk_is_full(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ElementSink(tmp_path / "osm.parquet") as sink:
            sink.add(points(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_from_the_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_file", fail)
    with pytest.raises(DiskError, match="The disk is full"), ElementSink(tmp_path / "osm.parquet"):
        pass
    assert list(tmp_path.iterdir()) == []
