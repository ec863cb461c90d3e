"""Small OSM documents, written by hand."""

from __future__ import annotations

# A square of 10 x 10 nodes, 0.001 degrees apart: node 100 + 10 * row + column.
GRID = "".join(
    f'<node id="{100 + 10 * row + col}" version="1" lon="{10 + col / 1000:.4f}" lat="{50 + row / 1000:.4f}"/>'
    for row in range(10)
    for col in range(10)
)


def way(number: int, nodes: list[int], **tags: str) -> str:
    refs = "".join(f'<nd ref="{n}"/>' for n in nodes)
    return f'<way id="{number}" version="1">{refs}{_tags(tags)}</way>'


def relation(number: int, members: list[tuple[int, str]], **tags: str) -> str:
    refs = "".join(f'<member type="way" ref="{ref}" role="{role}"/>' for ref, role in members)
    return f'<relation id="{number}" version="1">{refs}{_tags(tags)}</relation>'


def _tags(tags: dict[str, str]) -> str:
    return "".join(f'<tag k="{k.replace("__", ":")}" v="{v}"/>' for k, v in tags.items())


def ring(row: int, col: int, size: int) -> list[int]:
    start = 100 + 10 * row + col
    return [start, start + size, start + 11 * size, start + 10 * size, start]


def document(*parts: str, box: str = "") -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?><osm version="0.6">{box}{GRID}{"".join(parts)}</osm>'


def node(number: int, lon: float, lat: float, **tags: str) -> str:
    return f'<node id="{number}" version="1" lon="{lon}" lat="{lat}">{_tags(tags)}</node>'
