"""The files of an evaluation: JSON, the error matrix as CSV, a report."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from rsosm_cli.pipeline.evaluate_classes import Found, Work
from rsosm_cli.settings import dump
from rsosm_cli.workspace import write_json, write_text

if TYPE_CHECKING:
    from rsosm_cli.products.accuracy import Assessment


def write_evaluation(work: Work, found: Found, title: str) -> dict[str, str]:
    """Write JSON, the error matrix as CSV and a report beside the map; return their paths."""
    from rsosm_cli.training.finetune_report import label
    from rsosm_cli.training.report import Report

    name = f"accuracy{work.suffix}"
    paths = {"accuracy": work.file(f"{name}.json"), "report": work.file(f"{name}.html")}
    page = Report(title)
    for note in work.notes:
        page.text(note)
    if found.assessment is not None:
        assessment_tables(page, found.assessment, found.unit)
    if found.metrics:
        page.heading("Metrics, with 95 % intervals by blocks of ground")
        measured = [(_said(m.name, label), m.value, m.low, m.high) for m in found.metrics]
        page.table(("metric", "value", "low", "high"), measured)
    record: dict[str, Any] = {"map": work.raster.path.name, "numbers": found.numbers, "notes": work.notes}
    if found.matrix is not None:
        names = work.names
        record |= {"classes": names, "unit": found.unit, "matrix": found.matrix.tolist()}
        if found.assessment is not None:
            record["mapped_m2"] = list(found.assessment.mapped_areas)
        page.heading("Error matrix")
        page.text(f"{found.unit.capitalize()}; classes of the map in rows and of the reference in columns.")
        rows = [(name, *map(int, row), int(row.sum())) for name, row in zip(names, found.matrix, strict=True)]
        page.table(("map", *names, "total"), rows)
        paths["matrix"] = work.file(f"{name}.csv")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("map", *names), *(r[:-1] for r in rows)])
        write_text(paths["matrix"], text.getvalue())
    page.write(paths["report"])
    paths["config"] = work.folder / f"config.evaluate{work.suffix}.{work.task.name}.yaml"
    write_text(paths["config"], dump(work.task))
    write_json(paths["accuracy"], record)
    return {key: str(path) for key, path in paths.items()}


def _said(name: str, label: Any) -> str:
    metric, _, of = name.partition("/")
    said = {"iou": "IoU", "f1": "F1"}.get(metric, label(metric))
    return f"{said}, {of}" if of else said


def assessment_tables(page: Any, found: Assessment, unit: str) -> None:
    """Add overall, user's and producer's accuracy and the areas of an assessment to a report."""
    page.heading("Area-adjusted accuracy (Olofsson et al. 2014)")
    page.text(f"Overall accuracy {_pm(found.overall.value, found.overall.margin)} (95 %), from {unit}.")
    rows = []
    for i, name in enumerate(found.classes):
        users, producers, area = found.users[i], found.producers[i], found.areas[i]
        rows.append((
            name, _pm(users.value, users.margin), _pm(producers.value, producers.margin),
            _pm(area.value / 1e4, area.margin / 1e4, ",.1f"), f"{found.mapped_areas[i] / 1e4:,.1f}",
        ))  # fmt: skip
    page.table(("class", "user's accuracy", "producer's accuracy", "area (ha)", "mapped area (ha)"), rows)


def _pm(value: float, margin: float, form: str = ".3f") -> str:
    if value != value:
        return "not known"
    return f"{value:{form}}" + (f" ± {margin:{form}}" if margin == margin else "")
