"""The graph builder as GeoLink's authors publish it: all pairs of a tile, one `relate` each. A baseline, nothing else.

Written from the rules (docs/methods.md, `compat`); `check` shows that it gives the golden graphs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import shapely
from scipy.spatial import Delaunay, QhullError

Edges = list[tuple[int, int, int]]

_TOUCH = ("FT*******", "F**T*****", "F***T****")
_COVER = ("T*****FF*", "*T****FF*", "***T**FF*", "****T*FF*")
_COVER_BY = ("T*F**F***", "*TF**F***", "**FT*F***", "**F*TF***")


def _any(matrix: str, masks: tuple[str, ...]) -> bool:
    return any(
        all(m == "*" or (m == "T" and c != "F") or m == c for m, c in zip(mask, matrix, strict=True)) for mask in masks
    )


def same_type(shapes: list[shapely.Geometry]) -> Edges:
    """Return (source, target, column) of polygons or lines: self, touch, overlap, cover, cover-by, equal."""
    edges: Edges = [(i, i, 0) for i in range(len(shapes))]
    for i in range(len(shapes)):
        for j in range(i + 1, len(shapes)):
            matrix = shapely.relate(shapes[j], shapes[i])
            if _any(matrix, ("FF*FF****",)):
                continue
            if _any(matrix, _TOUCH):
                pair = (1, 1)
            elif _any(matrix, _COVER):
                pair = (4, 3)
            elif _any(matrix, _COVER_BY):
                pair = (3, 4)
            elif _any(matrix, ("T*T***T**",)):
                pair = (2, 2)
            else:
                continue
            edges += [(i, j, pair[0]), (j, i, pair[1])]
    return sorted(edges)


def two_types(first: list[shapely.Geometry], second: list[shapely.Geometry], points: bool) -> Edges:
    """Return (source, target, column): touch, cross, cover for lines and polygons; touch, within for points."""
    edges: Edges = []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            matrix = shapely.relate(a, b)
            if _any(matrix, ("FF*FF****",)):
                continue
            if _any(matrix, _TOUCH):
                edges.append((i, j, 0))
            elif points and _any(matrix, ("T*F**F***",)):
                edges.append((i, j, 1))
            elif not points and _any(matrix, _COVER_BY):
                edges.append((i, j, 2))
            elif not points and _any(matrix, ("T*T******", "T*****T**")):
                edges.append((i, j, 1))
    return edges


def neighbours(points: list[shapely.Geometry]) -> Edges:
    loops = [(i, i, 0) for i in range(len(points))]
    if len(points) < 4:
        return loops
    try:
        simplices = Delaunay(np.array([[p.x, p.y] for p in points])).simplices
    except QhullError:
        return loops
    pairs = {(int(a), int(b)) for s in simplices for a in s for b in s if a != b}
    return [(a, b, 1) for a, b in sorted(pairs)] + loops


def graph(shapes: dict[str, list[shapely.Geometry]]) -> dict[tuple[str, str], Edges]:
    points, lines, polygons = (shapes.get(k, []) for k in ("point", "line", "polygon"))
    edges = {
        ("point", "point"): neighbours(points),
        ("line", "line"): same_type(lines),
        ("polygon", "polygon"): same_type(polygons),
        ("line", "polygon"): two_types(lines, polygons, points=False),
        ("point", "line"): two_types(points, lines, points=True),
        ("point", "polygon"): two_types(points, polygons, points=True),
    }
    for a, b in (("line", "polygon"), ("point", "line"), ("point", "polygon")):
        edges[b, a] = sorted((j, i, c) for i, j, c in edges[a, b])
    return edges


def check(goldens: Path) -> int:
    """Return how many golden graphs this gives edge for edge; raises AssertionError where one differs."""
    files = sorted(goldens.glob("*.json"))
    for file in files:
        record = json.loads(file.read_text())
        shapes = {k: [shapely.from_wkb(bytes.fromhex(w)) for w in v] for k, v in record["wkb_hex"].items()}
        with np.load(file.with_suffix(".npz")) as golden:
            for (a, b), edges in graph(shapes).items():
                index, attr = golden[f"edge_index__{a}__{b}"], golden[f"edge_attr__{a}__{b}"]
                expected = list(zip(*index.tolist(), attr.argmax(1).tolist() if len(attr) else [], strict=True))
                assert edges == expected, f"{file.stem}: {a} to {b}"
    return len(files)
