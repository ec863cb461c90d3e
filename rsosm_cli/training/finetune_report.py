"""What a fine-tuning leaves to read: metrics.csv and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.label_files import IGNORE
from rsosm_cli.training.finetune import Outcome
from rsosm_cli.training.report import Report
from rsosm_cli.training.runs import write_metrics

_NO_LABEL = (255, 255, 255)
SHOWN_PX = 112  # side at which small tiles are shown


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write one row a seed, epoch, part and metric; the test has one row a metric, with its 95 % interval."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        for epoch in outcome.history:
            for name, value in epoch.items():
                if name == "epoch":
                    continue
                part, _, metric = name.partition("_")
                part, metric = (part, metric) if part in ("train", "validation") else ("train", name)
                rows.append(_row(outcome.seed, int(epoch["epoch"]), part, metric, value))
        for m in outcome.test:
            rows.append(
                _row(outcome.seed, outcome.best_epoch, "test", m.name, m.value) | {"low": m.low, "high": m.high}
            )
    write_metrics(path, rows)


def _row(seed: int, epoch: int, part: str, metric: str, value: float) -> dict[str, Any]:
    return {"seed": seed, "epoch": epoch, "part": part, "metric": metric, "value": value}


def report_finetune(
    path: Path, task: TaskSettings, outcomes: Sequence[Outcome], best: Outcome, numbers: Mapping[str, Any],
    notes: Sequence[str],
) -> None:  # fmt: skip
    """Write the report of a run: test metrics, curves, confusion matrix, worst tiles."""
    page = Report(f"{task.title or task.name}: {task.protocol}, {task.modality}")
    for note in notes:
        page.text(note)
    page.heading("Test ground")
    page.text(
        "Ground that neither trained nor chose the epoch. Intervals (95 %) resample whole blocks of ground, since "
        "neighbouring pixels err together."
    )
    if task.categorical:
        _class_table(page, task, best)
    elif task.kind == "distribution":
        found = best.metrics
        page.table(("class", "mean error of its share"), [(c.name, found[f"mae/{c.name}"]) for c in task.classes])
    main = [m for m in best.test if "/" not in m.name]
    page.table(("metric", "value", "low", "high"), [(label(m.name), m.value, m.low, m.high) for m in main])
    if best.calibration is not None and best.calibration.found:
        c = best.calibration
        page.text(
            f"Calibration: logits are divided by {c.temperature:.3g}, fitted on validation ground. On test ground the "
            f"gap between confidence and accuracy is {c.after:.1%}; without, {c.before:.1%}."
        )
    if len(outcomes) > 1:
        page.heading("Seeds")
        page.table(
            ("seed", "best epoch", *(label(m.name) for m in main)),
            [(o.seed, o.best_epoch, *(o.metrics[m.name] for m in main)) for o in outcomes],
        )
    if best.history:
        _curves(page, outcomes)
    if best.matrices is not None:
        _matrix(page, task, best.matrices.sum(axis=0))
    if best.worst:
        _worst(page, task, best.worst)
    page.heading("Numbers")
    page.facts({label(k): v for k, v in numbers.items() if "/" not in k})
    page.write(path)


_LABELS = {
    "miou": "mean IoU", "mean_f1": "mean F1", "overall_accuracy": "overall accuracy", "r2": "r²", "mae": "mean error",
    "rmse": "root mean square error", "l1": "L1 of the shares", "kl": "KL divergence", "cosine": "cosine of the shares",
    "loss": "loss", "block_m": "side of a block, m", "best_epoch": "epoch kept", "temperature": "temperature",
    "tiles_train": "tiles, training", "tiles_validation": "tiles, validation", "tiles_test": "tiles, test",
    "calibration_error": "calibration error", "calibration_error_before": "calibration error at temperature 1",
}  # fmt: skip
_ENDINGS = {
    "_low": "lower end of 95 %",
    "_high": "upper end of 95 %",
    "_mean": "mean of the seeds",
    "_std": "spread of the seeds",
}


def label(name: str) -> str:
    """Return the name of a metric as people say it; ``validation_`` and ``train_`` in front stay words in front."""
    if name in _LABELS:
        return _LABELS[name]
    for ending, said in _ENDINGS.items():
        if name.endswith(ending):
            return f"{label(name.removesuffix(ending))}, {said}"
    part, _, rest = name.partition("_")
    if part in ("train", "validation") and rest:
        return f"{'training' if part == 'train' else part} {label(rest)}"
    return name.replace("_", " ")


def _class_table(page: Report, task: TaskSettings, best: Outcome) -> None:
    found = {m.name: m for m in best.test}
    rows = []
    for c in task.classes:
        iou, f1 = found[f"iou/{c.name}"], found[f"f1/{c.name}"]
        rows.append((
            c.name, iou.value, f"{iou.low:.3f} to {iou.high:.3f}", f1.value, f"{f1.low:.3f} to {f1.high:.3f}",
            found[f"precision/{c.name}"].value, found[f"recall/{c.name}"].value,
        ))  # fmt: skip
    page.table(("class", "IoU", "95 %", "F1", "95 %", "precision", "recall"), rows)


def _curves(page: Report, outcomes: Sequence[Outcome]) -> None:
    page.heading("Training")

    def series(*names: str) -> dict[str, list[tuple[float, float]]]:
        many = len(outcomes) > 1
        return {
            (f"{label(name)}, seed {o.seed}" if many else label(name)): [
                (h["epoch"], h[name]) for h in o.history if name in h
            ]
            for name in names
            for o in outcomes
        }

    page.curves(series("train_loss", "validation_loss"), x="epoch", y="loss")
    names = [n for n in outcomes[0].history[0] if n.startswith("validation_") and n != "validation_loss"]
    for group in (("miou", "mean_f1", "overall_accuracy"), ("r2",), ("mae", "rmse"), ("l1", "kl"), ("cosine",)):
        chosen = [f"validation_{n}" for n in group if f"validation_{n}" in names]
        if chosen:
            page.curves(series(*chosen), x="epoch", y="validation ground")


def _matrix(page: Report, task: TaskSettings, matrix: NDArray[np.int64]) -> None:
    page.heading("Confusion matrix")
    unit = "Pixels" if task.dense else "Tiles"
    page.text(f"{unit} of test ground, in percent of the labelled class (rows); columns are predictions.")
    names = [c.name for c in task.classes]
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = [
        (name, *(f"{v:.1f}" for v in row), int(total))
        for name, row, total in zip(names, share, matrix.sum(axis=1), strict=True)
    ]
    page.table(("labelled", *names, unit.lower()), rows)


def _worst(page: Report, task: TaskSettings, tiles: Sequence[Mapping[str, Any]]) -> None:
    page.heading("Worst tiles")
    if not task.dense:
        page.text("Of the test ground: the image, what the labels say, and what is predicted.")
        for tile in tiles:
            said = f"labels: {_said(task, tile['truth'])}; predicted: {_said(task, tile['prediction'])}"
            page.image(_picture(tile), f"tile {tile['row']}: {said}", _scale(tile))
        return
    shown = "the earlier image, the later one, " if task.images == 2 else "image, "
    page.text(f"Of the test ground, by the share of labelled pixels that are right: {shown}labels, prediction.")
    page.legend([*((c.name, c.colour) for c in task.classes), ("no label", "#ffffff")])
    for tile in tiles:
        page.image(_triptych(task, tile), f"tile {tile['row']}: {1 - tile['error']:.0%} right", _scale(tile))


def _scale(tile: Mapping[str, Any]) -> int:
    """Return how many times as large a small tile is shown, so that it can be seen."""
    return max(1, SHOWN_PX // int(np.shape(tile["image"])[-1]))


def _said(task: TaskSettings, answer: Any) -> str:
    """Return the answer of a tile in words: a class, a value, or the three largest shares."""
    if task.kind == "classification":
        return task.classes[int(answer)].name
    if task.kind == "regression":
        return f"{float(np.ravel(answer)[0]):.4g} {task.unit}".strip()
    largest = np.argsort(-np.asarray(answer), kind="stable")[:3]
    return ", ".join(f"{task.classes[i].name} {answer[i]:.0%}" for i in largest if answer[i] >= 0.005)


def _picture(tile: Mapping[str, Any]) -> NDArray[np.uint8]:
    image = np.asarray(tile["image"])  # (C, H, W)
    return np.moveaxis(image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0), 0, -1)


def _triptych(task: TaskSettings, tile: Mapping[str, Any]) -> NDArray[np.uint8]:
    rows, columns = np.shape(tile["truth"])
    gap = np.full((rows, 4, 3), 255, np.uint8)
    parts = []
    for image in np.split(np.asarray(tile["image"]), task.images):
        rgb = _picture({"image": image})
        # Labels keep the tile's own size where the image was resized to what the encoder knows.
        down = np.arange(rows) * rgb.shape[0] // rows
        across = np.arange(columns) * rgb.shape[1] // columns
        parts += [rgb[down[:, None], across], gap]
    return np.concatenate([*parts, paint(task, tile["truth"]), gap, paint(task, tile["prediction"])], axis=1)


def paint(task: TaskSettings, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return class codes (H, W) in the colours of the task, (H, W, 3); no label is white."""
    table = np.full((256, 3), _NO_LABEL, np.uint8)
    for i, c in enumerate(task.classes):
        table[i] = [int(c.colour[j : j + 2], 16) for j in (1, 3, 5)]
    assert len(task.classes) <= IGNORE
    return table[codes]


def report_comparison(
    page_path: Path,
    table_path: Path,
    task: TaskSettings,
    numbers: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
) -> None:
    """Write the comparison of modalities on one split: one row each."""
    rows, plain = [], []
    for modality, found in numbers.items():
        cells: list[Any] = [modality]
        for metric in metrics:
            value = found.get(f"{metric}_mean", found.get(metric, float("nan")))
            low, high, spread = (found.get(f"{metric}_{e}") for e in ("low", "high", "std"))
            cells += [value, f"± {spread}" if spread is not None else f"{low} to {high}"]
            plain.append(
                {"modality": modality, "metric": metric, "value": value, "low": low, "high": high, "std": spread}
            )
        rows.append(cells)
    page = Report(f"{task.title or task.name}: modalities compared")
    page.text(
        "One split, the same seeds. Values of test ground with 95 % intervals by blocks, or the spread of the seeds."
    )
    page.table(
        (
            "modality",
            *(h for m in metrics for h in (label(m), "")),
        ),
        rows,
    )
    page.write(page_path)
    write_metrics(table_path, plain)
