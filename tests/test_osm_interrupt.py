"""Ctrl-C while libosmium reads: it keeps Python waiting, and still it must stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import osmium
import pytest

from rsosm_cli.osm.blocks import read_header
from rsosm_cli.osm.extract import read_extract
from rsosm_cli.osm.reader import Ticker
from rsosm_cli.osm.sink import ElementSink

NODES, COPIES = 16_000, 300


@pytest.fixture(scope="module")
def long_extract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that takes libosmium some seconds, nearly all of it without a tag: the same blocks many times."""
    path = tmp_path_factory.mktemp("long") / "long.osm.pbf"
    node = osmium.osm.mutable.Node(id=0)
    with osmium.SimpleWriter(str(path), overwrite=True) as writer:
        for number in range(1, NODES):
            node.id, node.location = number, (number * 1e-4, number * 1e-4)
            node.tags = {"place": "hamlet"} if number % 4_000 == 0 else {}
            writer.add_node(node)
    head = len(read_header(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:head] + COPIES * whole[head:])
    return path


def test_reading_stops_at_once_and_does_not_decode_the_rest(
    long_extract: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        with ElementSink(tmp_path / "osm.parquet") as sink:
            read_extract(long_extract, sink)
        return time.perf_counter() - start

    def interrupted(_: Ticker, __: object) -> None:
        raise KeyboardInterrupt

    whole = seconds()
    (tmp_path / "osm.parquet").unlink()
    monkeypatch.setattr(Ticker, "node", interrupted)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        seconds()
    assert time.perf_counter() - start < whole / 2  # libosmium's threads are waited for
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_ctrl_c_ends_a_fetch_with_130_and_leaves_no_half_file(
    long_extract: Path, tmp_path: Path, after_s: float
) -> None:
    command = ["fetch", "--city", "X", "--osm", str(long_extract), "--bbox", "0.1", "0.1", "1", "1"]
    # A shell's background jobs, and what they start, ignore the signal: a process with a handler hands on the default.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = subprocess.Popen(
        [sys.executable, "-m", "rsosm_cli", "--root", str(tmp_path), *command], stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("cities/x/.osm-*/*.osm.pbf")):  # libosmium writes
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(after_s)
    os.kill(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Interrupted" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("cities/x/*.parquet"))
    assert not list(tmp_path.glob("cities/x/.*osm*"))
