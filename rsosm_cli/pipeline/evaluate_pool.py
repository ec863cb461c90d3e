"""Many cities as one product: their accuracies pooled by stratum, a map class of a region (Stehman 2014)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsosm_cli.errors import FormatError, NoFileError, RsosmError, UsageError
from rsosm_cli.pipeline.evaluate_classes import few_points, put_assessment
from rsosm_cli.pipeline.evaluate_report import assessment_tables
from rsosm_cli.pipeline.result import Result
from rsosm_cli.workspace import Workspace, write_json, write_text


def read_regions(path: Path) -> dict[str, str]:
    """Return city to region from a table with the columns ``city`` and ``region``; rows without either are left out.

    Raises :class:`NoFileError`, :class:`FormatError` or :class:`UsageError`.
    """
    import pandas

    if not path.is_file():
        raise NoFileError(
            f"There is no table of regions {path}.", hint="Give a CSV with the columns city and region.", path=str(path)
        )
    try:
        table = pandas.read_csv(path, dtype=str)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a table of regions: {error}.") from error
    if not {"city", "region"} <= set(table.columns):
        raise UsageError(f"{path} has no columns `city` and `region`.", hint="One row a city.")
    table = table.dropna(subset=["city", "region"])
    return dict(zip(table["city"], table["region"], strict=True))


def pool(
    task: str, results: Sequence[Result], *, root: Path | None, regions: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> Result:  # fmt: skip
    """Return the assessment of all cities together, from the points of each; skipped where none has points.

    Its files are in ``output``, or ``<root>/maps/<task>``.

    A stratum is a map class of a region (``regions``: city to region; default: each city is one). Cities of a region
    count as one map with one sample: right where their points were drawn in proportion to their areas.
    """
    started = time.monotonic()
    folder = output or Workspace.at(root).root / "maps" / task
    held = [(r.subject, _record(Path(r.paths["accuracy"]))) for r in results if "accuracy" in r.paths]
    held = [(city, record) for city, record in held if record.get("unit") == "points" and "mapped_m2" in record]
    notes = []
    if len(held) < len(results):
        notes.append(f"{len(results) - len(held)} of {len(results)} cities have no points to pool and are not in it.")
    if not held:
        note = "Nothing is pooled: cities are pooled by their points, and none of them was assessed by points."
        return Result("evaluate", "all cities", "skipped", notes=(note,), seconds=time.monotonic() - started)
    names: list[str] = held[0][1]["classes"]
    of = [(regions or {}).get(city, city) for city, _ in held]
    groups = list(dict.fromkeys(of))
    if regions is not None and (unnamed := [city for city, _ in held if city not in regions]):
        notes.append(f"Not in the table of regions, so each a region of its own: {', '.join(unnamed)}.")
    counts, areas = np.zeros((len(groups), len(names), len(names)), np.int64), np.zeros((len(groups), len(names)))
    for region, (city, record) in zip(of, held, strict=True):
        if record["classes"] != names:
            raise UsageError(f"The map of {city} has other classes than that of {held[0][0]}.", hint="Pool one task.")
        counts[groups.index(region)] += np.array(record["matrix"], np.int64)
        areas[groups.index(region)] += np.array(record["mapped_m2"])
    from rsosm_cli.products.accuracy import assess_strata

    try:
        found = assess_strata(counts, areas, names, groups)
    except RsosmError as error:
        hint = "Draw points there, or join regions with --regions FILE (columns city, region)."
        return Result("evaluate", "all cities", "failed", error=f"{error.message} {hint}", exit_status=1)
    notes.append(
        f"{int(counts.sum())} points in {int(((counts.sum(axis=2) > 0) & (areas > 0)).sum())} strata: the classes of "
        f"{len(groups)} region{'s' if len(groups) > 1 else ''} of {len(held)} cities."
    )
    if note := few_points(counts.sum(axis=0), names):
        notes.append(note)
    numbers: dict[str, Any] = {"cities": len(held), "regions": len(groups), "points": int(counts.sum())}
    put_assessment(numbers, found)
    paths = {
        "accuracy": folder / "accuracy.json", "report": folder / "accuracy.html",
        "strata": folder / "strata.csv",
    }  # fmt: skip
    write_json(paths["accuracy"], {"numbers": numbers, "notes": notes, "matrix": found.matrix.tolist()})
    rows = ["region,map class,points,right,mapped_m2"]
    for r, region in enumerate(groups):
        for k, name in enumerate(names):
            row = (region, name, int(counts[r, k].sum()), int(counts[r, k, k]), round(areas[r, k]))
            rows.append(",".join(_quoted(v) for v in row))
    write_text(paths["strata"], "\n".join(rows) + "\n")
    _report(paths["report"], task, notes, found)
    return Result(
        "evaluate", "all cities", "done", {k: str(p) for k, p in paths.items()}, numbers, tuple(notes),
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _report(path: Path, task: str, notes: Sequence[str], found: Any) -> None:
    from rsosm_cli.training.report import Report

    page = Report(f"{task}: accuracy of all cities")
    for note in notes:
        page.text(note)
    assessment_tables(page, found, "points")
    page.heading("Error matrix")
    page.text("Points of all cities; classes of the map in rows and of the reference in columns.")
    page.table(
        ("map", *found.classes), [(n, *map(int, row)) for n, row in zip(found.classes, found.matrix, strict=True)]
    )
    page.write(path)


def _record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _quoted(value: Any) -> str:
    text = str(value)
    return f'"{text}"' if "," in text else text
