"""The maps of many cities gathered: ``cities.csv``, a virtual raster over all maps, one STAC Collection."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsosm_cli.pipeline.result import Result
from rsosm_cli.workspace import Workspace


def gather(task: str, results: Sequence[Result], *, root: Path | None = None, output: Path | None = None) -> Result:
    """Write table, mosaic and collection of the maps in ``results`` into ``output``, or ``<root>/maps/<task>``.

    Cities that failed have a row that says why, and no more.
    """
    from rsosm_cli.products.collection import write_collection, write_table, write_vrt

    started = time.monotonic()
    folder = output or Workspace.at(root).root / "maps" / task
    made = [r for r in results if "map" in r.paths and r.status in ("done", "skipped")]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"table": folder / "cities.csv"}
    statistics = {r.subject: json.loads(Path(r.paths["statistics"]).read_text(encoding="utf-8")) for r in made}
    write_table(paths["table"], [_row(r, statistics.get(r.subject)) for r in results])
    if made:
        paths |= {"mosaic": folder / f"{task}.vrt", "collection": folder / "collection.json"}
        write_vrt(paths["mosaic"], [Path(r.paths["map"]) for r in made])
        title = str(next(iter(statistics.values())).get("title", task))
        write_collection(paths["collection"], [Path(r.paths["stac"]) for r in made], name=task, title=title)
    numbers: dict[str, Any] = {"cities": len(made), "failed": sum(r.status == "failed" for r in results)}
    numbers["mapped_km2"] = round(sum(s["mapped_m2"] for s in statistics.values()) / 1e6, 4)
    classes = [row for s in statistics.values() for row in s.get("classes", ())]
    for name in dict.fromkeys(row["name"] for row in classes):
        numbers[f"{name}_km2"] = round(sum(row["area_m2"] for row in classes if row["name"] == name) / 1e6, 4)
    said = {name: str(path) for name, path in paths.items()}
    return Result("map", "all cities", "done", said, numbers, seconds=time.monotonic() - started)


def _row(result: Result, statistics: dict[str, Any] | None) -> dict[str, Any]:
    """Return area, share and counts of a city's map, or why there is none."""
    row: dict[str, Any] = {"city": result.subject, "status": result.status}
    if statistics is not None:
        row["mapped_km2"] = round(statistics["mapped_m2"] / 1e6, 6)
        for entry in statistics.get("classes", ()):
            name = entry["name"]
            row[f"{name} km2"] = round(entry["area_m2"] / 1e6, 6)
            row[f"{name} share"] = entry["share"]
            for key, column in (
                ("share_of_built_up", "share of built-up land"), ("polygons", "polygons"), ("buildings", "buildings"),
            ):  # fmt: skip
                if key in entry:
                    row[f"{name} {column}"] = entry[key]
        if "built_up" in statistics:
            row["built-up km2"] = round(statistics["built_up"]["area_m2"] / 1e6, 6)
        for key in ("total", "per_km2", "mean", "cells"):
            if key in statistics:
                row[key] = statistics[key]
        row["map"] = result.paths.get("map", "")
    row["error"] = result.error
    return row
