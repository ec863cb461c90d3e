"""Names of the heterograph: node types, edge types, relations and their one-hot columns.

GeoLink (NeurIPS 2025), section 3.1 and ``docs/methods.md``. Free of geospatial and torch imports, so that
training can read graphs on a machine that has neither shapely nor GDAL.
"""

from __future__ import annotations

EdgeType = tuple[str, str, str]

NODE_TYPES: tuple[str, ...] = ("point", "line", "polygon")
# The relation's name is the same for all nine pairs; what the relation is stands in the edge's attribute.
EDGE_TYPES: tuple[EdgeType, ...] = tuple((a, "to", b) for a in NODE_TYPES for b in NODE_TYPES)

# Key points of a node, in tile units (0..1, x to the right, y down).
KEY_POINTS: dict[str, int] = {"point": 1, "line": 3, "polygon": 4}

# One-hot columns of an edge (source, target): the relation of the source to the target.
# `cross` is the last column of line-line, so that the released layout is the first six.
RELATIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("point", "point"): ("self", "delaunay"),
    ("point", "line"): ("touch", "within"),
    ("line", "point"): ("touch", "contain"),
    ("point", "polygon"): ("touch", "within"),
    ("polygon", "point"): ("touch", "contain"),
    ("line", "polygon"): ("touch", "cross", "cover-by"),
    ("polygon", "line"): ("touch", "cross", "cover"),
    ("line", "line"): ("self", "touch", "overlap", "cover", "cover-by", "equal", "cross"),
    ("polygon", "polygon"): ("self", "touch", "overlap", "cover", "cover-by", "equal"),
}

EDGE_WIDTHS: dict[tuple[str, str], int] = {pair: len(names) for pair, names in RELATIONS.items()}
