"""Shared fixtures. Tests never reach the network: the real data beside the checkout is used where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Workers whose torch each takes all cores wait for each other, and need several times as long. Torch reads it when it
# is imported, as do the processes that tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden values beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real data is not there")
    return SHARED


@pytest.fixture
def town(tmp_path: Path) -> Path:
    """An OSM file of a small town. Tests with another kind of town have a fixture of their own."""
    from fetch_inputs import write_town

    return write_town(tmp_path / "town.osm")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A raster over it."""
    from fetch_inputs import write_photo

    return write_photo(tmp_path / "photo.tif")


@pytest.fixture
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, and no imagery named by the environment."""
    monkeypatch.delenv("RSOSM_IMAGERY", raising=False)
    monkeypatch.setenv("RSOSM_CACHE", str(tmp_path / "cache"))
