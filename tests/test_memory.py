"""Memory that is given back stays usable."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from rsosm_cli.memory import let_go

MIB = 1 << 20


def resident_of_files() -> int:
    """Return the bytes of files in this process's memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell what is in memory")
def test_pages_of_files_leave_memory_and_come_back(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "ours and more"
    maps = []
    for folder in (ours, other):
        folder.mkdir()
        (folder / "a").write_bytes(bytes(range(256)) * (16 * MIB // 256))
        with (folder / "a").open("r+b") as file:
            maps.append(mmap.mmap(file.fileno(), 0))
    maps[0][5] = 77  # written through the mapping, and not yet in the file
    assert all(sum(pages[::4096]) >= 0 for pages in maps)
    before = resident_of_files()
    let_go(ours)
    assert 15 * MIB < before - resident_of_files() < 24 * MIB  # of this folder alone
    assert maps[0][:7] == bytes([0, 1, 2, 3, 4, 77, 6])
