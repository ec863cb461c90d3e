"""A picture of one tile: the image with its objects, and the heterograph that was made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import NODE_TYPES, RELATIONS
from rsosm_cli.tiles.describe import check_tile, top_tags
from rsosm_cli.tiles.store import TileStore
from rsosm_cli.workspace import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]

_INK = "#22303c"
_QUIET = "#7b8794"
_PAPER = "#fbfaf7"
_GROUND = "#efece4"
NODE_COLOURS = {"point": "#f08a24", "line": "#0f8b8d", "polygon": "#6f5cc2"}
# From the loose relations to the close ones: neighbours pale, containment cool, contact and crossing warm.
RELATION_COLOURS = {
    "delaunay": "#d9b48f", "touch": "#3d7ea6", "within": "#57a773", "cover": "#2f6f4f", "cross": "#d1495b",
    "overlap": "#e39ec1", "equal": "#22303c",
}  # fmt: skip
_TITLES = {
    "delaunay": "Delaunay neighbours", "touch": "touch", "within": "point within", "cover": "cover", "cross": "cross",
    "overlap": "overlap", "equal": "equal",
}  # fmt: skip
# The two directions of a relation are one line in the picture.
_DRAWN_AS = {"contain": "within", "cover-by": "cover"}
_MARKERS = {"point": "o", "line": "D", "polygon": "s"}
_TAGS = 9
# Share of the tile from which a polygon fills it.
_FILLS = 0.98


@dataclass(frozen=True)
class _Outlines:
    """Shapes in tile units: closed rings of polygons (with holes as further rings), lines, points."""

    polygons: list[list[Floats]]
    lines: list[Floats]
    points: Floats
    exact: bool


def draw_tile(store: TileStore | Path, index: int, path: Path) -> None:
    """Draw tile ``index`` to a PNG at ``path``: image with outlines, graph, legend, commonest tags.

    Outlines come from the ``osm.parquet`` beside the store; without it the objects' envelopes, which the store holds,
    stand for them. Raises :class:`UsageError` where there is no such tile.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if isinstance(store, Path):
        store = TileStore.open(store)
    check_tile(store, index)
    graphs = store.graphs([index])
    outlines = _outlines(store, index, graphs)
    figure = Figure(figsize=(15.6, 7.1), dpi=120, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.46))
    left.set_anchor("W")
    figure.subplots_adjust(left=0.018, right=0.985, top=0.855, bottom=0.035, wspace=0.035)
    _ground(left, store, index, fade=0.0)
    _draw_outlines(left, outlines)
    _scale_bar(left, store, index)
    _ground(middle, store, index, fade=0.82)
    _draw_shadows(middle, outlines)
    shown = _draw_graph(middle, graphs)
    _sidebar(right, store, graphs, shown)
    _titles(figure, left, middle, store, index, graphs, outlines)
    with atomic(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def _ground(axes: Axes, store: TileStore, index: int, fade: float) -> None:
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_facecolor(_GROUND)
    for spine in axes.spines.values():
        spine.set(color="#cfc9bb", linewidth=0.8)
    if store.has_images and store.image_share[index] > 0:
        image = store.images([index])[0]
        bands = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
        pixels = bands.transpose(1, 2, 0).astype(np.float64) / 255.0
        if fade:
            grey = pixels.mean(axis=2, keepdims=True)
            pixels = (1 - fade) * grey + fade * np.array([0.984, 0.980, 0.969])
        # Where there is no image, the paper shows; its edge is not smoothed into the image.
        there = (bands != 0).any(axis=0)
        smooth = "lanczos" if there.all() else "nearest"
        axes.imshow(np.dstack([pixels, there]), extent=(0, 1, 1, 0), interpolation=smooth, zorder=0)


def _outlines(store: TileStore, index: int, graphs: GraphArrays) -> _Outlines:
    elements = store.path.with_name("osm.parquet")
    perturb = store.settings.graph.perturb
    moved = perturb.shift_m > 0
    if elements.is_file() and not moved and not store.names:
        return _exact_outlines(store, index, graphs, elements)
    polygons = [[np.vstack([e, e[:1]]).astype(float)] for e in graphs.nodes["polygon"].envelope]
    lines = [points[[1, 0, 2]].astype(float) for points in graphs.nodes["line"].key_points]
    return _Outlines(polygons, lines, graphs.nodes["point"].key_points[:, 0], exact=False)


def _exact_outlines(store: TileStore, index: int, graphs: GraphArrays, path: Path) -> _Outlines:
    """Return the shapes of the tile's own objects, cut as the builder cuts them."""
    import shapely

    from rsosm_cli.graph.builder import to_tile
    from rsosm_cli.graph.clip import clip, mend
    from rsosm_cli.osm.elements import read_elements

    bounds = store.bounds_m[index : index + 1]
    west, south, east, north = bounds[0].tolist()
    elements = read_elements(path, store.crs, (west, south, east, north))
    numbers = elements.osm_id * 4 + elements.osm_type
    wanted = np.zeros(len(elements), bool)
    for kind, name in enumerate(NODE_TYPES):
        nodes = graphs.nodes[name]
        wanted |= (elements.kind == kind) & np.isin(numbers, nodes.osm_id * 4 + nodes.osm_type)
    geometry, _ = mend(elements.geometry[wanted], elements.kind[wanted])
    there = np.array(geometry != None, dtype=bool)  # noqa: E711 elementwise
    kinds = elements.kind[wanted][there]
    pieces = clip(geometry[there], kinds, bounds)
    kind = kinds[pieces.element]
    local = shapely.transform(
        pieces.geometry, lambda xy: to_tile(xy[:, None, :], np.repeat(bounds, len(xy), axis=0))[:, 0]
    )
    # Large ones first, so that small ones lie on top.
    areas = local[kind == 2]
    areas = areas[np.argsort(-shapely.area(areas), kind="stable")]
    polygons = [
        [shapely.get_coordinates(ring) for ring in shapely.get_rings(part)] for part in shapely.get_parts(areas)
    ]
    lines = [shapely.get_coordinates(part) for part in shapely.get_parts(local[kind == 1])]
    return _Outlines(polygons, lines, shapely.get_coordinates(local[kind == 0]), exact=True)


def _draw_outlines(axes: Axes, outlines: _Outlines) -> None:
    from matplotlib.collections import LineCollection, PathCollection
    from matplotlib.colors import to_rgba
    from matplotlib.path import Path as Shape

    shapes = [Shape.make_compound_path(*[Shape(ring, closed=True) for ring in rings]) for rings in outlines.polygons]
    colour = NODE_COLOURS["polygon"]
    # What fills the tile (a district, a wood) is a tint; else it would drown what lies in it.
    fills = [to_rgba(colour, 0.30 * max(1 - _ring_area(rings[0]), 0.08) ** 1.5) for rings in outlines.polygons]
    axes.add_collection(PathCollection(shapes, facecolors=fills, linewidths=0, zorder=2))
    axes.add_collection(
        PathCollection(shapes, facecolors="none", edgecolors="white", linewidths=2.2, alpha=0.55, zorder=3)
    )
    axes.add_collection(PathCollection(shapes, facecolors="none", edgecolors=colour, linewidths=1.1, zorder=4))
    axes.add_collection(LineCollection(outlines.lines, colors="white", linewidths=3.4, alpha=0.65, zorder=5))
    axes.add_collection(LineCollection(outlines.lines, colors=NODE_COLOURS["line"], linewidths=1.7, zorder=6))
    if len(outlines.points):
        x, y = outlines.points.T
        axes.scatter(x, y, s=30, c=NODE_COLOURS["point"], edgecolors="white", linewidths=0.9, zorder=7)


def _draw_shadows(axes: Axes, outlines: _Outlines) -> None:
    """Draw faint outlines, which tie the nodes of the graph to the objects that they stand for."""
    from matplotlib.collections import LineCollection

    rings = [ring for rings in outlines.polygons for ring in rings if _ring_area(ring) < _FILLS]
    # A crowd of them would compete with the edges.
    alpha = float(np.clip(3 / np.sqrt(max(len(rings) + len(outlines.lines), 1)), 0.12, 0.3))
    for paths, kind, width in ((rings, "polygon", 0.6), (outlines.lines, "line", 1.0)):
        axes.add_collection(LineCollection(paths, colors=NODE_COLOURS[kind], linewidths=width, alpha=alpha, zorder=1))


def _ring_area(ring: Floats) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _draw_graph(axes: Axes, graphs: GraphArrays) -> dict[str, int]:
    """Draw nodes at their centroids and one line a related pair; return the pairs drawn by relation."""
    from matplotlib.collections import LineCollection

    segments: dict[str, list[Floats]] = {name: [] for name in RELATION_COLOURS}
    counts = dict.fromkeys(RELATION_COLOURS, 0)
    hidden = 0
    area = {name: graphs.nodes[name].area for name in NODE_TYPES}
    place = {name: graphs.nodes[name].centroid for name in NODE_TYPES}
    for a_number, a in enumerate(NODE_TYPES):
        for b in NODE_TYPES[a_number:]:
            edges = graphs.edges[a, b]
            once = edges.index[0] < edges.index[1] if a == b else np.ones(len(edges.relation), bool)
            for column, relation in enumerate(RELATIONS[a, b]):
                drawn = _DRAWN_AS.get(relation, relation)
                if drawn in segments:
                    i, j = edges.index[:, once & (edges.relation == column)]
                    # Everything lies within what fills the tile: those edges would hide all others.
                    within = np.maximum(area[a][i], area[b][j]) > _FILLS
                    counts[drawn] += len(i)
                    hidden += int(within.sum())
                    segments[drawn].append(np.stack([place[a][i], place[b][j]], axis=1)[~within])
    joined = {name: np.concatenate(parts) for name, parts in segments.items() if parts}
    total = max(sum(map(len, joined.values())), 1)
    # Few edges are drawn boldly, thousands as a veil.
    width, alpha = float(np.clip(28 / np.sqrt(total), 0.4, 1.5)), float(np.clip(22 / np.sqrt(total), 0.4, 0.85))
    for order, (name, pairs) in enumerate(joined.items()):
        style = (0, (2.5, 1.8)) if name == "delaunay" else "solid"
        axes.add_collection(
            LineCollection(
                list(pairs), colors=RELATION_COLOURS[name], alpha=alpha, linewidths=width, linestyles=style,
                zorder=2 + 0.1 * order,
            )
        )  # fmt: skip
    nodes = sum(len(p) for p in place.values())
    size = float(np.clip(900 / np.sqrt(max(nodes, 1)) / 3, 12, 70))
    for order, name in enumerate(("polygon", "line", "point")):
        x, y = place[name].T
        axes.scatter(
            x, y, s=size, c=NODE_COLOURS[name], marker=_MARKERS[name], edgecolors="white",
            linewidths=0.8, zorder=4 + order,
        )  # fmt: skip
    if hidden:
        filling = int((area["polygon"] > _FILLS).sum())
        what = "a polygon that fills" if filling == 1 else f"{filling} polygons that fill"
        axes.text(
            0.02, 0.985, f"{hidden:,} pairs with {what} the tile are not drawn", fontsize=8.5, color=_INK, va="bottom",
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "alpha": 0.85, "linewidth": 0}, zorder=9,
        )  # fmt: skip
    return {name: count for name, count in counts.items() if count}


def _sidebar(axes: Axes, store: TileStore, graphs: GraphArrays, shown: dict[str, int]) -> None:
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.axis("off")
    y = _heading(axes, 0.012, "Objects")
    for name in ("point", "line", "polygon"):
        count = len(graphs.nodes[name].osm_id)
        axes.scatter([0.045], [y], s=62, c=NODE_COLOURS[name], marker=_MARKERS[name], edgecolors="white", clip_on=False)
        y = _row(axes, y, f"{name}s", count, quiet=count == 0)
    y = _heading(axes, y + 0.03, "Related pairs")
    for name, count in shown.items():
        style = (0, (2.5, 1.8)) if name == "delaunay" else "solid"
        axes.plot([0.01, 0.085], [y, y], color=RELATION_COLOURS[name], linewidth=2.2, linestyle=style)
        y = _row(axes, y, _TITLES[name], count)
    if not shown:
        y = _row(axes, y, "none", None, quiet=True)
    y = _heading(axes, y + 0.03, "Commonest tags")
    tags = top_tags(store, graphs, min(_TAGS, int((0.97 - y) / 0.046)))
    most = max((count for _, count in tags), default=1)
    for tag, count in tags:
        axes.barh(y + 0.014, count / most * 0.99, height=0.006, left=0.005, color="#c9c2b2", zorder=1)
        y = _row(axes, y, tag if len(tag) <= 30 else tag[:29] + "…", count, indent=0.005, small=True)
    if not tags:
        _row(axes, y, "ready node vectors" if store.vector_width else "none", None, indent=0.005, quiet=True)


def _heading(axes: Axes, y: float, text: str) -> float:
    axes.text(0.0, y, text.upper(), color=_QUIET, fontsize=8.5, fontweight="bold", va="center")
    return y + 0.046


def _row(
    axes: Axes,
    y: float,
    text: str,
    count: int | None,
    *,
    indent: float = 0.12,
    quiet: bool = False,
    small: bool = False,
) -> float:
    colour, size = (_QUIET if quiet else _INK), (8.6 if small else 10)
    axes.text(indent, y, text, color=colour, fontsize=size, va="center")
    if count is not None:
        axes.text(1.0, y, f"{count:,}", color=colour, fontsize=size, va="center", ha="right")
    return y + (0.046 if small else 0.043)


def _titles(
    figure: Figure, left: Axes, middle: Axes, store: TileStore, index: int, graphs: GraphArrays, outlines: _Outlines
) -> None:
    city = str(store.provenance.get("city") or store.path.stem)
    name = f" · {store.names[index]}" if store.names else ""
    figure.text(0.018, 0.958, f"{city}{name}, tile {index}", color=_INK, fontsize=17, fontweight="bold", va="center")
    west, south, east, north = store.bounds_m[index].tolist()
    ground = f"{store.crs}   {west:,.1f} to {east:,.1f} east, {south:,.1f} to {north:,.1f} north"
    if abs(west) <= 180 and abs(north) <= 90:
        ground = f"{store.crs}   {west:.5f} to {east:.5f} east, {south:.5f} to {north:.5f} north"
    if not store.crs:
        what = "a ready graph" if store.vector_width else "an image of a folder"
        ground = f"{what}, without a place on the ground"
    figure.text(0.018, 0.917, ground, color=_QUIET, fontsize=9.5, va="center")
    what = "Objects" if not store.has_images else "Image and objects"
    if not outlines.exact:  # a ready graph has key points alone
        what += " (points and lines)" if store.vector_width else " (envelopes)"
    n_nodes = sum(len(graphs.nodes[t].osm_id) for t in NODE_TYPES)
    n_edges = sum(len(e.relation) for e in graphs.edges.values())
    loops = sum(int((e.relation == RELATIONS[p].index("self")).sum()) for p, e in graphs.edges.items() if p[0] == p[1])
    edges = f"{n_edges:,} edges" + (f", {loops:,} of them self loops" if loops else "")
    left.set_title(what, loc="left", color=_INK, fontsize=11, pad=6)
    middle.set_title(f"Heterograph: {n_nodes:,} nodes, {edges}", loc="left", color=_INK, fontsize=11, pad=6)
    sources = "   ".join(str(s.get("attribution", "")) for s in store.provenance.get("sources", []))
    figure.text(0.985, 0.958, sources, color=_QUIET, fontsize=8.5, va="center", ha="right")


def _scale_bar(axes: Axes, store: TileStore, index: int) -> None:
    """Draw a bar of a round length, about a quarter of the tile, where tiles are in metres."""
    west, _, east, _ = store.bounds_m[index].tolist()
    width = east - west
    if store.gsd_m is None or width <= 0:
        return
    power = 10.0 ** np.floor(np.log10(width / 4))
    length = power * max(m for m in (1, 2, 5) if m * power <= width / 4)
    share = length / width
    x, y = 0.035, 0.955
    for colour, thick in (("white", 5.0), (_INK, 2.2)):
        axes.plot([x, x + share], [y, y], color=colour, linewidth=thick, solid_capstyle="butt", zorder=9)
    axes.text(
        x + share / 2, y - 0.017, f"{length:g} m", ha="center", va="bottom", fontsize=8.5, color=_INK, zorder=10,
        bbox={"boxstyle": "round,pad=0.18", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )  # fmt: skip
