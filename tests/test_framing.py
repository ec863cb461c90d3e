"""The blocks of a PBF file, followed through its bytes as they arrive."""

from __future__ import annotations

from pathlib import Path

import osmium
import pytest
from map_services import osm_xml

from rsosm_cli.osm.framing import Framing


def town(folder: Path) -> bytes:
    """Return a PBF file of several blocks: a header, nodes, ways."""
    (folder / "town.osm").write_bytes(osm_xml())
    with osmium.SimpleWriter(str(folder / "town.osm.pbf")) as writer:
        osmium.apply(str(folder / "town.osm"), writer)
    return (folder / "town.osm.pbf").read_bytes()


@pytest.mark.parametrize("step", [1, 7, 65_536, 10**9])
def test_the_blocks_of_a_file_are_followed_in_pieces_of_any_size(tmp_path: Path, step: int) -> None:
    pbf = town(tmp_path)
    framing = Framing()
    assert not any(framing.feed(pbf[at : at + step]) for at in range(0, len(pbf), step))
    assert (framing.size, framing.ended()) == (len(pbf), "")
    part = tmp_path / "part"
    part.write_bytes(pbf[:step])
    resumed = Framing()
    assert not resumed.follow(part)
    assert not resumed.feed(pbf[step:])
    assert resumed.ended() == ""
    assert "any more" in resumed.feed(pbf[:100])
    damaged = Framing()
    damaged.feed(pbf[:-1])
    assert "broke off" in damaged.ended()


@pytest.mark.parametrize("name", ["andorra", "monaco", "porto"])
def test_the_blocks_of_real_extracts_are_followed(shared: Path, name: str) -> None:
    framing = Framing()
    assert not framing.follow(shared / f"data/osm/{name}.osm.pbf")
    assert framing.blocks > 1
    assert not framing.ended()
