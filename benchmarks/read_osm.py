"""Time and peak memory of reading OSM files, against pyosmium alone.

    python benchmarks/read_osm.py DATA_FOLDER [--rounds 5] [--copies 20]

For every ``*.osm.pbf`` of the folder: our read (file to ``osm.parquet``: geometries, tags, areas by rule, in spatial
order), against a bare pyosmium area pass and against a pass with objects. The bare pass is the least that pyosmium can
be asked for: ``FileProcessor`` with locations and areas, and its filter for tags; every tagged object and every area is
handed to Python, where it is counted and nothing else: no geometry is made and no tag is read. The pass with objects
also asks each for its WKB and its tags, as a script without vectorisation would. Each has a process of its own. Medians
of rounds taken in turn; a ratio below 1 is faster than the baseline. Then the largest file, replicated: peak memory of
one copy and of many, ours and of the bare pass: the process's own, the pages of files mapped into it (libraries, and
what it wrote to disk to have it out of its memory: the system takes these back when it needs them), and both together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
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


def timed_s(work: Callable[[Path], int], path: Path) -> tuple[float, float]:
    """Return the seconds of a work, of the clock and of all cores together."""
    start = time.perf_counter(), time.process_time()
    work(path)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def medians_s(path: Path, rounds: int, *works: Callable[[Path], int]) -> list[tuple[float, float]]:
    """Return the median seconds of each work, of the clock and of all cores together.

    Each has a process of its own, as it has where it is used: what another work leaves in memory is none of its
    business. They are taken in turn, each round from another on, so that what else the machine does meets all of them.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in works]
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in works]
        for pool, work in zip(pools, works, strict=True):
            pool.submit(timed_s, work, path).result()  # imports and file cache
        for turn in range(rounds * len(works)):
            chosen = (turn + turn // len(works)) % len(works)
            seconds[chosen].append(pools[chosen].submit(timed_s, works[chosen], path).result())
    return [tuple(map(statistics.median, zip(*taken, strict=True))) for taken in seconds]


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


def peaks_mb(work: Callable[[Path], int], path: Path) -> dict[str, float]:
    """Return the peak memory of a fresh process that does ``work``, in MB: its own, of files, both together."""
    names = {"RssAnon:": "own", "RssFile:": "pages of files", "VmHWM:": "together"}
    process = multiprocessing.get_context("spawn").Process(target=work, args=(path,))
    process.start()
    peaks = dict.fromkeys(names.values(), 0.0)
    while process.is_alive():
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if (name := names.get(line.partition("\t")[0])) is not None:
                peaks[name] = max(peaks[name], int(line.split()[1]) / 1024)
        time.sleep(0.002)
    process.join()
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=20, help="of the memory test; 0 leaves it out")
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.osm.pbf"), key=lambda p: p.stat().st_size)
    if not files:
        parser.error(f"no .osm.pbf under {options.folder}")
    columns = ("ours s", "bare s", "ratio", "ours cpu s", "bare cpu s", "ratio", "with objects s", "ratio")
    print(f"{'file':26}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    for path in files:
        ours, bare, full = medians_s(path, options.rounds, our_read, bare_pass, pass_with_objects)
        values = (ours[0], bare[0], ours[0] / bare[0], ours[1], bare[1], ours[1] / bare[1], full[0], ours[0] / full[0])
        cells = (f"{value:{len(column) + 3}.2f}" for column, value in zip(columns, values, strict=True))
        print(f"{path.name:26}" + "".join(cells))
    if options.copies:
        with tempfile.TemporaryDirectory() as folder:
            one, many = Path(folder) / "one.osm.pbf", Path(folder) / "many.osm.pbf"
            replicate(files[-1], one, 1)
            replicate(files[-1], many, options.copies)
            ours, bare = medians_s(many, options.rounds, our_read, bare_pass)
            print(
                f"{files[-1].name} x {options.copies}: ours {ours[0]:.2f} s, bare {bare[0]:.2f} s, "
                f"ratio {ours[0] / bare[0]:.2f}; of cpu {ours[1] / bare[1]:.2f}"
            )
            for name, work in (("ours", our_read), ("bare", bare_pass)):
                small, large = peaks_mb(work, one), peaks_mb(work, many)
                cells = [
                    f"{part} {mb:.0f} -> {large[part]:.0f} ({large[part] / mb:.2f} x)" for part, mb in small.items()
                ]
                print(f"peak memory, {name}, MB: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
