"""How fast heterographs are built: ``python benchmarks/graph_build.py DATA_FOLDER [--memory]``.

DATA_FOLDER holds ``osm/*.osm.pbf`` and, beside it, ``goldens/graph``. Prints medians of interleaved rounds of one run:
tiles a second; the ratio to the plain vectorised path; the ratio to the time inside GEOS; the all-pairs baseline as
published; growth with the area; peak memory at 1, 4 and 16 times the area.

The plain path is query, clip, pairs and relate in vectorised shapely, over all tiles. Alone those four steps yield a
list of matrices and no file, so they are compared in two ways, both printed: *like for like*, where the plain steps are
put in the place of ours and all else (tags, key points, envelopes, Delaunay, sorted edges, store) is done by the same
code, so that both write a store of the same graphs; and *whole/steps*, our whole build, file and all, against the four
plain steps alone, which is the harder bar. *steps/steps* sets our four against the plain four.
*rest* are the seconds of ours for which the plain steps have no counterpart. Where objects are crowded, most of the
four steps is DE-9IM matrices, which GEOS computes in both: there ours are hardly faster, and the rest makes whole/steps
more than 1. Where they are few, ours is faster with all that it does besides.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import published_graph
import shapely
from numpy.typing import NDArray

from rsosm_cli.geometry import WGS84, Grid
from rsosm_cli.graph import builder, relations
from rsosm_cli.graph.builder import build_graphs
from rsosm_cli.graph.clip import Pieces, of_kind
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.osm.elements import Elements, read_elements
from rsosm_cli.osm.extract import read_extract
from rsosm_cli.osm.sink import ElementSink
from rsosm_cli.places.given import place_of_extract
from rsosm_cli.settings import BuildSettings, GraphSettings
from rsosm_cli.tiles.parts import assemble, write_part
from rsosm_cli.tiles.store import TileStore

Ints = NDArray[np.int64]
Objects = NDArray[np.object_]

PLACES = ("porto", "liechtenstein", "andorra", "helsinki-centre")
# All elements, as the plain path takes them all.
SETTINGS = BuildSettings(graph=GraphSettings(leave_out=()))
clock = time.process_time  # of this process: the machine may be busy with others

# Calls into GEOS that the builder makes.
_GEOS = (
    "relate", "clip_by_rect", "is_valid", "make_valid", "covers", "intersects", "area", "length", "centroid", "bounds",
    "oriented_envelope", "line_interpolate_point", "point_on_surface", "get_parts", "get_rings", "get_coordinates",
    "linestrings", "from_ragged_array", "to_ragged_array", "box", "points", "prepare",
    "destroy_prepared", "get_geometry", "get_num_geometries", "get_num_coordinates", "get_num_interior_rings",
    "get_type_id", "is_empty", "multilinestrings", "multipolygons",
)  # fmt: skip


def load(data: Path, name: str, folder: Path) -> tuple[Elements, Grid]:
    source = data / "osm" / f"{name}.osm.pbf"
    place = place_of_extract(name, [source]).geometry
    path = folder / f"{name}.parquet"
    with ElementSink(path, place) as sink:
        read_extract(source, sink)
    grid = SETTINGS.grid
    tiles = Grid.covering(place, tile_px=grid.tile, stride_px=grid.stride, gsd_m=grid.gsd)
    return read_elements(path, tiles.projection.crs), tiles


def ours(elements: Elements, grid: Grid, folder: Path) -> None:
    """From geometries in memory to the written store."""
    vocabulary = Vocabulary.of(elements, SETTINGS.graph.tags)
    built = build_graphs(elements, grid.bounds_m(), SETTINGS.graph, vocabulary)
    part, n = folder / "part.npz", len(grid)
    write_part(
        part, built.graphs, list(zip(vocabulary.tags, vocabulary.keys, strict=True)), cells=grid.cells,
        bounds_m=grid.bounds_m(), image_share=np.zeros(n, np.float32), numbers={},
    )  # fmt: skip
    assemble(
        folder / "tiles.h5", [part], settings=SETTINGS, crs=elements.crs, gsd_m=SETTINGS.grid.gsd, provenance={},
        has_images=False,
    )  # fmt: skip


def plain(elements: Elements, grid: Grid) -> int:
    """Query, clip, pairs and relate in plain shapely over all tiles; no key points, Delaunay, edges or store."""
    element, tile, pieces = plain_pieces(elements.geometry, grid.bounds_m())
    i, j = plain_pairs(tile, elements.kind[element], pieces)
    return len(shapely.relate(pieces[i], pieces[j]))


def plain_pieces(geometry: Objects, bounds: NDArray[np.float64]) -> tuple[Ints, Ints, Objects]:
    """Return elements, tiles and what ``clip_by_rect`` leaves of the elements in the tiles."""
    element, tile = shapely.STRtree(geometry).query(shapely.box(*bounds.T), predicate="intersects")[::-1]
    order = np.argsort(tile, kind="stable")
    element, tile = element[order], tile[order]
    pieces = geometry[element]
    cuts = np.r_[0, np.flatnonzero(np.diff(tile)) + 1, len(tile)]
    for first, last in pairwise(cuts.tolist()):
        if last > first:
            pieces[first:last] = shapely.clip_by_rect(pieces[first:last], *bounds[tile[first]])
    there = ~shapely.is_empty(pieces)
    return element[there], tile[there], pieces[there]


def plain_pairs(tile: Ints, kind: NDArray[np.uint8], pieces: Objects) -> tuple[Ints, Ints]:
    """Return the pairs of a tile whose boxes meet, two points aside."""
    i, j = shapely.STRtree(pieces).query(pieces)
    mine = (tile[i] == tile[j]) & (i < j) & ~((kind[i] == 0) & (kind[j] == 0))
    return i[mine], j[mine]


def plain_clip(geometry: Objects, kind: NDArray[np.uint8], bounds_m: NDArray[np.float64], own_tile: None) -> Pieces:
    """Stand for :func:`rsosm_cli.graph.clip.clip`."""
    element, tile, pieces = plain_pieces(geometry, bounds_m)
    for k in range(3):
        mine = kind[element] == k
        pieces[mine] = of_kind(pieces[mine], k)
    sound = np.flatnonzero(np.array(pieces != None, dtype=bool))  # noqa: E711 elementwise
    sound = sound[np.lexsort((element[sound], tile[sound]))]
    return Pieces(element[sound], tile[sound], pieces[sound], np.zeros(len(sound), bool))


def plain_related(nodes: Any, settings: GraphSettings) -> tuple[Ints, Ints, NDArray[np.uint8]]:
    """Stand for the builder's search for pairs and their relations."""
    i, j = plain_pairs(nodes.tile, nodes.kind, nodes.geometry)
    matrix = relations.matrices(shapely.relate(nodes.geometry[i], nodes.geometry[j]).tolist())
    found = np.zeros(len(i), np.uint8)
    for a, b in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 2)):
        mine = (nodes.kind[i] == a) & (nodes.kind[j] == b)
        found[mine] = relations.classify(NODE_TYPES[a], NODE_TYPES[b], matrix[mine], settings.relations)
    kept = found != relations.NONE
    return i[kept], j[kept], found[kept]


@contextmanager
def plain_steps() -> Iterator[None]:
    """Put the plain steps in the place of the builder's."""
    kept = builder.clip, builder._related
    builder.clip, builder._related = plain_clip, plain_related  # type: ignore[assignment]
    try:
        yield
    finally:
        builder.clip, builder._related = kept


@contextmanager
def inside(calls: Sequence[tuple[Any, str]]) -> Iterator[list[float]]:
    """Yield a list whose only item grows by the time spent in functions, the outermost of nested ones."""
    spent, depth = [0.0], [0]

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            start = clock()
            try:
                return call(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    spent[0] += clock() - start

        return wrapper

    kept = [(owner, name, getattr(owner, name)) for owner, name in calls]
    for owner, name, call in kept:
        setattr(owner, name, watched(call))
    try:
        yield spent
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)


def inside_geos() -> AbstractContextManager[list[float]]:
    return inside([(shapely, name) for name in _GEOS] + [(shapely.STRtree, "query")])


def timed(call: Callable[[], Any]) -> float:
    start = clock()
    call()
    return clock() - start


def places(data: Path, rounds: int, folder: Path) -> None:
    print("From geometries in memory to the store, seconds; ratios as the head of this script explains them.")
    print("place            tiles  objects tiles/s   ours  plain  four   rest like for whole/ steps/  ours/   edges of")
    print("                                                whole  steps          like  steps  steps   GEOS plain/ours")
    for name in PLACES:
        elements, grid = load(data, name, folder)
        build = partial(ours, elements, grid, folder)
        times: dict[str, list[float]] = {"ours": [], "whole": [], "four": [], "steps": [], "geos": []}
        for _ in range(rounds):
            times["four"].append(timed(lambda e=elements, g=grid: plain(e, g)))
            with plain_steps():
                times["whole"].append(timed(build))
            edges = edges_in(folder)
            with inside(((builder, "clip"), (builder, "_related"))) as steps:
                times["ours"].append(timed(build))
            times["steps"].append(steps[0])
            edges /= edges_in(folder)
            # Both in one pass: the machine is not always equally fast.
            with inside_geos() as spent:
                whole = timed(build)
            times["geos"].append(whole / spent[0])
        us, whole, four, steps_, geos = (statistics.median(values) for values in times.values())
        print(
            f"{name:15s} {len(grid):6d} {len(elements):8d} {len(grid) / us:7.0f} {us:6.2f} {whole:6.2f} {four:6.2f} "
            f"{us - steps_:6.2f} "
            f"{us / whole:8.2f} {us / four:6.2f} {steps_ / four:6.2f} {geos:6.2f} {edges:10.4f}",
            flush=True,
        )


def edges_in(folder: Path) -> float:
    return float(sum(TileStore.open(folder / "tiles.h5").n_edges.values()))


def crowded(n: int = 3000) -> Elements:
    """A tile of 134.4 m with ``n`` small polygons that touch, overlap and contain."""
    rng = np.random.default_rng(0)
    side = 134.4
    corner = np.round(rng.uniform(0, side - 4, (n, 2)) * 2) / 2
    size = rng.integers(1, 8, (n, 2)) / 2
    shapes = shapely.box(*corner.T, *(corner + size).T)
    return Elements(
        "EPSG:32629", np.ones(n, np.uint8), np.arange(n), np.full(n, 2, np.uint8), [{"building": "yes"}] * n, shapes
    )


def all_pairs(data: Path, rounds: int, n: int = 3000) -> None:
    goldens = data.parent / "goldens" / "graph"
    if goldens.is_dir():
        print(f"\nall-pairs baseline: gives {published_graph.check(goldens)} golden graphs edge for edge")
    elements, bounds = crowded(n), np.array([[0.0, 0.0, 134.4, 134.4]])
    vocabulary = Vocabulary.of(elements, SETTINGS.graph.tags)

    def several() -> list[float]:
        return [
            timed(lambda: build_graphs(elements, bounds, SETTINGS.graph, vocabulary)) for _ in range(max(rounds, 5))
        ]

    # Before and after the slow one: the machine is not always equally fast.
    before = several()
    slow = timed(lambda: published_graph.graph({"polygon": list(elements.geometry)}))
    fast = statistics.median(before + several())
    print(f"one tile of {n} polygons: all pairs {slow:.2f} s, ours {fast * 1e3:.0f} ms, {slow / fast:.0f} x")


def linear(data: Path, rounds: int, folder: Path) -> None:
    """Copies of Porto side by side: the same density over 1, 4 and 16 times the area."""
    print("\narea   tiles   s a tile x 1000   against 1 x")
    base = 0.0
    for factor in (1, 2, 4):
        elements, bounds = copies(*load(data, "porto", folder), factor)
        vocabulary = Vocabulary.of(elements, SETTINGS.graph.tags)
        each = statistics.median(
            timed(lambda e=elements, b=bounds, v=vocabulary: build_graphs(e, b, SETTINGS.graph, v))
            for _ in range(rounds)
        ) / len(bounds)  # fmt: skip
        base = base or each
        print(f"{factor**2:3d} x {len(bounds):7d} {each * 1e3:17.3f} {each / base:13.2f}")


def copies(elements: Elements, grid: Grid, factor: int) -> tuple[Elements, np.ndarray]:
    bounds = grid.bounds_m()
    cells = grid.cells - grid.cells.min(axis=0)
    step = (cells.max(axis=0) + 1) * grid.stride_px * grid.projection.gsd_m
    # Only what lies in the place: whole elements that reach beyond it would pile up over its copies.
    area = shapely.box(*bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0))
    inside = shapely.covered_by(elements.geometry, area)
    geometry, kind = elements.geometry[inside], elements.kind[inside]
    tags = [t for t, keep in zip(elements.tags, inside.tolist(), strict=True) if keep]
    shapes, tiles = [], []
    for i in range(factor):
        for j in range(factor):
            move = step * [i, -j]
            shapes.append(shapely.transform(geometry, lambda xy, by=move: xy + by))
            tiles.append(bounds + np.tile(move, 2))
    n = len(geometry) * factor**2
    many = Elements(
        elements.crs, np.tile(elements.osm_type[inside], factor**2), np.arange(n), np.tile(kind, factor**2),
        tags * factor**2, np.concatenate(shapes),
    )  # fmt: skip
    return many, np.concatenate(tiles)


def memory(data: Path, folder: Path) -> None:
    """Peak memory of the whole command over copies of Porto."""
    elements, grid = load(data, "porto", folder)
    print("\narea   tiles   peak MB of build-graph")
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from element_tables import write_elements

    for factor in (1, 2, 4):
        many, bounds = copies(elements, grid, factor)
        path, target = folder / f"m{factor}.parquet", folder / f"m{factor}.h5"
        write_elements(path, many)
        from rsosm_cli.geometry import reproject

        west, south, east, north = *bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0)
        box = reproject(np.array([shapely.box(west, south, east, north)], object), elements.crs, WGS84)[0].bounds
        code = (
            "import re; from pathlib import Path; import shapely\n"
            "import rsosm_cli.pipeline.build_graph as b\n"
            f"b._ground = lambda order: shapely.box(*{box!r})\n"
            f"r = b.build_graph(osm=Path({str(path)!r}), output=Path({str(target)!r}))\n"
            # Not `ru_maxrss`, which begins with what this process had when it started the other.
            "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())\n"
            "print(r.numbers['tiles'], int(peak[1]) // 1024)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        print(f"{factor**2:3d} x {int(out[0]):7d} {int(out[1]):8d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="Measure the peak memory, too (minutes).")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places(options.data, options.rounds, folder)
        all_pairs(options.data, options.rounds)
        linear(options.data, options.rounds, folder)
        if options.memory:
            memory(options.data, folder)


if __name__ == "__main__":
    main()
