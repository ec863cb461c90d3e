"""Time and peak memory of reading OSM files, against pyosmium alone.

    python benchmarks/read_osm.py DATA_FOLDER [--rounds 5] [--copies 20]

For every ``*.osm.pbf`` of the folder: our read (file to ``osm.parquet``: geometries, tags, areas by rule, in spatial
order), against a bare pyosmium area pass (every tagged object and area of the file handed to Python, nothing done) and
against a pass that also asks each for its WKB and tags, as a script without vectorisation would. Medians; a ratio
below 1 is faster than the baseline. Then the largest file, replicated: peak memory of one copy and of many.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import osmium

from rsosm_cli.osm.extract import read_extract
from rsosm_cli.osm.sink import ElementSink

BAR = 1.5  # of the bare pass


def bare_pass(path: Path) -> int:
    tagged = osmium.filter.EmptyTagFilter()
    return sum(1 for _ in osmium.FileProcessor(str(path)).with_locations().with_areas().with_filter(tagged))


def pass_with_objects(path: Path) -> int:
    factory, rows = osmium.geom.WKBFactory(), []
    tagged = osmium.filter.EmptyTagFilter()
    for item in osmium.FileProcessor(str(path)).with_locations().with_areas().with_filter(tagged):
        obj: Any = item
        try:
            if obj.is_node():
                wkb = factory.create_point(obj)
            elif obj.is_way():
                wkb = factory.create_linestring(obj)
            elif obj.is_area():
                wkb = factory.create_multipolygon(obj)
            else:
                continue
        except (RuntimeError, osmium.InvalidLocationError):
            continue
        rows.append((obj.id, wkb, dict(obj.tags)))
    return len(rows)


def our_read(path: Path) -> int:
    with tempfile.TemporaryDirectory() as folder, ElementSink(Path(folder) / "osm.parquet") as sink:
        read_extract(path, sink)
    return sink.counts.total


def median_s(work: Callable[[Path], int], path: Path, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work(path)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def replicate(source: Path, target: Path, copies: int) -> None:
    """Write ``source`` many times into one file, each copy with ids of its own."""
    step = 100_000_000_000  # above every id of OSM
    items: list[Any] = []
    with osmium.SimpleWriter(str(target), overwrite=True) as writer:
        for entity in (osmium.osm.NODE, osmium.osm.WAY, osmium.osm.RELATION):
            for copy in range(copies):
                shift = copy * step
                for item in osmium.FileProcessor(str(source), entity):
                    obj: Any = item
                    if entity == osmium.osm.NODE:
                        writer.add_node(obj.replace(id=obj.id + shift))
                    elif entity == osmium.osm.WAY:
                        writer.add_way(obj.replace(id=obj.id + shift, nodes=[n.ref + shift for n in obj.nodes]))
                    else:
                        items = [(m.type, m.ref + shift, m.role) for m in obj.members]
                        writer.add_relation(obj.replace(id=obj.id + shift, members=items))


def _peak_mb(path: Path, answers: multiprocessing.Queue[tuple[float, int]]) -> None:
    count = our_read(path)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    answers.put((int(status.partition("VmHWM:")[2].split()[0]) / 1024, count))


def peak_mb(path: Path) -> tuple[float, int]:
    """Return the peak memory of a fresh process that reads ``path``, in MB, and the number of elements."""
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[tuple[float, int]] = context.Queue()
    process = context.Process(target=_peak_mb, args=(path, answers))
    process.start()
    answer = answers.get()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=20, help="of the memory test; 0 leaves it out")
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.osm.pbf"), key=lambda p: p.stat().st_size)
    if not files:
        parser.error(f"no .osm.pbf under {options.folder}")
    print(f"{'file':28}{'ours s':>8}{'bare s':>8}{'ratio':>7}{'with objects s':>16}{'ratio':>7}")
    for path in files:
        our_read(path)  # imports and file cache
        ours, bare, full = (median_s(f, path, options.rounds) for f in (our_read, bare_pass, pass_with_objects))
        print(f"{path.name:28}{ours:8.3f}{bare:8.3f}{ours / bare:7.2f}{full:16.3f}{ours / full:7.2f}")
    if options.copies:
        with tempfile.TemporaryDirectory() as folder:
            one, many = Path(folder) / "one.osm.pbf", Path(folder) / "many.osm.pbf"
            replicate(files[-1], one, 1)
            replicate(files[-1], many, options.copies)
            ours, bare = (median_s(f, many, min(3, options.rounds)) for f in (our_read, bare_pass))
            print(f"{files[-1].name} x {options.copies}: ours {ours:.2f} s, bare {bare:.2f} s, ratio {ours / bare:.2f}")
            (small, few), (large, lots) = peak_mb(one), peak_mb(many)
        print(f"peak memory: {small:.0f} MB for {few:,} elements, {large:.0f} MB for {lots:,}, {large / small:.2f} x")


if __name__ == "__main__":
    main()
