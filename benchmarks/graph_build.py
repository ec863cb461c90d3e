"""How fast heterographs are built: ``python benchmarks/graph_build.py DATA_FOLDER [--memory]``.

DATA_FOLDER holds ``osm/*.osm.pbf`` and, beside it, ``goldens/graph``. Prints medians of interleaved rounds of one run:
tiles a second; the ratio to the plain vectorised path (query, clip, pairs, relate and nothing else) of the whole build
and of the same four steps in it; the ratio to the time inside GEOS; the all-pairs baseline as published; growth with
the area; peak memory at 1, 4 and 16 times the area.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import published_graph
import shapely

from rsosm_cli.geometry import WGS84, Grid
from rsosm_cli.graph import builder
from rsosm_cli.graph.builder import build_graphs
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.osm.elements import Elements, read_elements, write_elements
from rsosm_cli.osm.extract import read_extract
from rsosm_cli.osm.sink import ElementSink
from rsosm_cli.places.given import place_of_extract
from rsosm_cli.settings import BuildSettings, GraphSettings
from rsosm_cli.tiles.parts import assemble, write_part

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
    bounds = grid.bounds_m()
    element, tile = shapely.STRtree(elements.geometry).query(shapely.box(*bounds.T), predicate="intersects")[::-1]
    order = np.argsort(tile, kind="stable")
    element, tile = element[order], tile[order]
    pieces = elements.geometry[element]
    cuts = np.r_[0, np.flatnonzero(np.diff(tile)) + 1, len(tile)]
    for first, last in pairwise(cuts.tolist()):
        if last > first:
            pieces[first:last] = shapely.clip_by_rect(pieces[first:last], *bounds[tile[first]])
    there = ~shapely.is_empty(pieces)
    pieces, tile, kind = pieces[there], tile[there], elements.kind[element][there]
    i, j = shapely.STRtree(pieces).query(pieces)
    mine = (tile[i] == tile[j]) & (i < j) & ~((kind[i] == 0) & (kind[j] == 0))
    return len(shapely.relate(pieces[i[mine]], pieces[j[mine]]))


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
    print("Whole build, geometries to store, against the plain path's four steps alone, and against GEOS within it;")
    print(
        "of the build, the same four steps (clip and relate) and the rest (mending, tags, key points, Delaunay, store)."
    )
    print("place            tiles   objects  tiles/s   ours s   plain s   ours/plain   four steps/plain   ours/GEOS")
    for name in PLACES:
        elements, grid = load(data, name, folder)
        times: dict[str, list[float]] = {"ours": [], "plain": [], "steps": [], "share": []}
        for _ in range(rounds):
            times["plain"].append(timed(lambda e=elements, g=grid: plain(e, g)))
            with inside(((builder, "clip"), (builder, "_related"))) as steps:
                times["ours"].append(timed(lambda e=elements, g=grid: ours(e, g, folder)))
            times["steps"].append(steps[0])
            # Both in one pass: the machine is not always equally fast.
            with inside_geos() as spent:
                whole = timed(lambda e=elements, g=grid: ours(e, g, folder))
            times["share"].append(whole / spent[0])
        a, b, c, share = (statistics.median(times[k]) for k in ("ours", "plain", "steps", "share"))
        print(
            f"{name:15s} {len(grid):6d} {len(elements):9d} {len(grid) / a:8.0f} {a:8.2f} {b:9.2f} {a / b:12.2f} "
            f"{c / b:18.2f} {share:11.2f}"
        )


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
    fast = statistics.median(
        timed(lambda: build_graphs(elements, bounds, SETTINGS.graph, vocabulary)) for _ in range(max(rounds, 5))
    )
    slow = timed(lambda: published_graph.graph({"polygon": list(elements.geometry)}))
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
    for factor in (1, 2, 4):
        many, bounds = copies(elements, grid, factor)
        path, target = folder / f"m{factor}.parquet", folder / f"m{factor}.h5"
        write_elements(path, many)
        from rsosm_cli.geometry import reproject

        west, south, east, north = *bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0)
        box = reproject(np.array([shapely.box(west, south, east, north)], object), elements.crs, WGS84)[0].bounds
        code = (
            "import resource, sys; from pathlib import Path; import shapely\n"
            "import rsosm_cli.pipeline.build_graph as b\n"
            f"b._ground = lambda order: shapely.box(*{box!r})\n"
            f"r = b.build_graph(osm=Path({str(path)!r}), output=Path({str(target)!r}))\n"
            "print(r.numbers['tiles'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
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
