"""Turns at a server, by files that all processes of a machine share."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from rsosm_cli.gates import Turns, gate_file


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_shared_folder_that_cannot_be_used_is_replaced_by_an_own_one(tmp_path: Path) -> None:
    shared = gate_file("host", "lock")
    assert shared == gate_file("host", "lock")
    assert shared.parent.name == "rsosm-gates"
    shared.unlink()
    shared.parent.rmdir()
    shared.parent.write_text("of another program")
    own = gate_file("host", "lock")
    assert own.is_file()
    assert own.parent.parent == tmp_path
    assert own.parent.stat().st_mode & 0o077 == 0
    assert Turns("host", 10, 1).next_s() == 0


def test_turns_follow_each_other_at_the_rate() -> None:
    one, other = Turns("host", 10, 1), Turns("host", 10, 1)
    waits = [turns.next_s() for turns in (one, other, one)]
    assert waits[0] == 0
    assert waits[1] == pytest.approx(0.1, abs=0.05)
    assert waits[2] == pytest.approx(0.2, abs=0.05)
    assert Turns("another", 10, 1).next_s() == 0
