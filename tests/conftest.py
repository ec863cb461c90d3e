"""Shared fixtures. Tests never reach the network: the real data beside the checkout is used where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden values beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with real data is not there")
    return SHARED
