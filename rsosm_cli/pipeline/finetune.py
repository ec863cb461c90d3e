"""``finetune``: labels and tiles to a model of a task, with metrics of ground that training has not seen."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.errors import NoFileError, UsageError
from rsosm_cli.pipeline.finetune_plan import Plan, describe, input_size, starting_point, tile_stores
from rsosm_cli.pipeline.label_origin import warn_of_copies
from rsosm_cli.pipeline.label_stores import check_kind, dated_cities, pair_store, stores_of_folders
from rsosm_cli.pipeline.result import Result, Status
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import Settings, TaskSettings, dump
from rsosm_cli.workspace import Workspace, write_json, write_text

if TYPE_CHECKING:
    from rsosm_cli.models.checkpoint import Description
    from rsosm_cli.tiles.labels import Extent
    from rsosm_cli.training.finetune import Outcome
    from rsosm_cli.training.labelled import Labelled

log = logging.getLogger("rsosm")

_COMPARED = {"report": "report.html", "metrics": "metrics.csv", "config": "config.yaml"}


class _Config(Settings):
    """What a run's config.yaml holds."""

    task: TaskSettings
    seeds: int
    label_share: float
    labels: tuple[str, ...]
    labels_extent: str | None
    stores: tuple[str, ...]
    checkpoint: str | None


def finetune(
    task: TaskSettings,
    *,
    labels: Sequence[Path],
    cities: Sequence[str] = (),
    tiles: Sequence[Path] = (),
    checkpoint: Path | None = None,
    labels_extent: Extent | None = None,
    epochs: tuple[str, str] | None = None,
    root: Path | None = None,
    name: str | None = None,
    seeds: int = 1,
    label_share: float = 1.0,
    compare: bool = False,
    gpus: int | None = None,
    nodes: int = 1,
    device: str = "auto",
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Train a head for ``task`` on labelled tiles of ``cities`` (or of stores given as ``tiles``) and test it.

    The encoder comes from ``checkpoint``, by default from the newest pretraining run under ``root``; with ``protocol:
    scratch`` its architecture alone. Without cities and tiles, every city under the root is used that labels lie in.
    ``labels_extent``: a vector file or (west, south, east, north) in degrees; what is labelled ground without it says
    :mod:`rsosm_cli.tiles.labels`; folders of labels (chips, classes, image pairs: :mod:`rsosm_cli.tiles.folders`) bring
    their tiles along. ``epochs``: the two dates of a change task, see `map_city`. ``seeds`` trainings on one split give
    mean and spread; the best on validation ground is kept. ``compare`` trains the modalities image, osm and fused on
    one split.

    Raises :class:`UsageError`, :class:`MissingError` or :class:`FormatError`.
    """
    from rsosm_cli.tiles.folders import read_folder, with_classes
    from rsosm_cli.training.devices import choose

    started = time.monotonic()
    if not 0 < label_share <= 1:
        raise UsageError(f"A label share of {label_share:g} is not above 0 and at most 1.")
    space = Workspace.at(root)
    devices = choose(gpus=gpus, nodes=nodes, device=device)
    start = starting_point(space, task, checkpoint, offline)
    if gone := [path for path in labels if not path.exists()]:
        raise NoFileError(f"There are no labels {gone[0]}.", hint="Check the path.", path=str(gone[0]))
    folders = [read_folder(path) for path in labels if path.is_dir()]
    for folder in folders:
        task = with_classes(task, folder)
    check_kind(task, folders)
    if compare and any(folder.layout != "chips" for folder in folders):
        raise UsageError(
            f"{folders[0].path} holds images without OSM objects: there are no modalities to compare.",
            hint="Leave out --compare.",
        )
    if task.kind == "classification" and not task.classes:
        raise UsageError(
            f"The task {task.name} has no classes.", hint="Name them in its YAML, or give a folder of classes."
        )
    start.check(task, compare=compare)
    if task.kind == "change" and epochs is None and not folders and not tiles:
        raise UsageError(
            f"The task {task.name} compares two dates, and none are named.",
            hint="Give --from 2019 --to 2023, or a folder of image pairs as labels.",
        )
    stores: Sequence[tuple[str, Path | None]]
    if epochs is not None:
        if task.kind != "change":
            raise UsageError(f"{task.name} is a {task.kind} task of one date.", hint="Leave out --from and --to.")
        if tiles:
            raise UsageError("--tiles names finished images and --from the dates of others: leave out one of them.")
        named = cities or dated_cities(space, epochs)
        stores = [(city, pair_store(space, city, epochs, progress, dry_run=dry_run)) for city in named]
    elif folders and not cities and not tiles:
        stores = stores_of_folders(space, folders, *input_size(start, task, folders), progress, dry_run=dry_run)
    else:
        stores = tile_stores(space, cities, tiles)
    if missing := [subject for subject, store in stores if store is None]:  # of a dry run only
        note = f"Tiles would be made first, of {', '.join(missing)}: how many have labels is known only then."
        seconds = time.monotonic() - started
        return Result("finetune", name or task.name, "planned", notes=(start.note, note), seconds=seconds)
    made = [(subject, store) for subject, store in stores if store is not None]
    plan = Plan(space, made, list(labels), labels_extent, start, seeds, label_share, devices, offline, force, name)
    if not compare:
        result = _one(plan, task, dry_run, progress)
    else:
        result = _compare(plan, task, dry_run, progress)
    return replace(result, seconds=time.monotonic() - started)


def _one(plan: Plan, task: TaskSettings, dry_run: bool, progress: Progress, suffix: str = "") -> Result:
    """Train one task and modality; skip it where its run is finished."""
    from rsosm_cli.training.devices import process_rank
    from rsosm_cli.training.runs import Run, open_run, require_same

    key = plan.key(task)
    name = (plan.name or f"{task.name}-{key[:8]}") + suffix
    run = Run(plan.space.run(name))
    facts = run.manifest.read()
    if facts.get("key") == key and facts.get("finished") and not plan.force:
        return Result(
            "finetune", run.name, "skipped", _paths(run, task), facts.get("numbers", {}), tuple(facts["notes"])
        )
    if not plan.force:
        require_same(run, key)
    labelled = _labelled(plan, task)
    description, fit = describe(plan, task, labelled)
    notes = [plan.start.note, *fit, *labelled.notes]
    if task.modality != "image":
        notes += warn_of_copies(plan.labels, [path.with_name("osm.parquet") for _, path in plan.stores])
    numbers: dict[str, Any] = labelled.counts() | {"block_m": labelled.split.block_m}
    if dry_run:
        epochs = task.optim.epochs
        jobs = f"{plan.seeds} training{'s' if plan.seeds > 1 else ''} of {epochs} epoch{'s' if epochs > 1 else ''}"
        jobs += f" on {plan.devices}"
        return Result("finetune", run.name, "planned", numbers=numbers, notes=(*notes, f"{jobs} would be run."))
    if process_rank() == 0:
        run = open_run(plan.space.root, name, kind="finetune", key=key, force=plan.force)
        run.manifest.update(kind="finetune", task=task.name, key=key, finished=None)
        _write_inputs(run.folder, plan, task, labelled)
    for note in notes:
        log.info("%s", note)
    seconds = time.monotonic()
    outcomes = _train(plan, task, labelled, description, run.folder, key, progress)
    if process_rank() == 0:
        from rsosm_cli.training.finetune_report import report_finetune, write_outcomes

        best = _keep_best(run.folder, outcomes)
        numbers |= _numbers(task, outcomes, best)
        if plan.seeds > 1:
            notes.append(f"Of {plan.seeds} seeds, seed {best.seed} is kept, the best on validation ground.")
        if task.protocol == "knn":
            notes.append("kNN trains nothing: it measures the encoding, and leaves no model to map with.")
        if best.calibration is not None and best.calibration.warning:
            notes.append(best.calibration.warning)
        write_outcomes(run.metrics, outcomes)
        report_finetune(run.report, task, outcomes, best, numbers, notes)
        run.manifest.update(
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), seconds=round(time.monotonic() - seconds, 1),
            numbers=numbers, notes=notes, modality=task.modality, protocol=task.protocol,
            fits="none" if task.protocol == "knn" else "map",
        )  # fmt: skip
    return Result("finetune", run.name, "done", _paths(run, task), numbers, tuple(notes))


def _labelled(plan: Plan, task: TaskSettings) -> Labelled:
    from rsosm_cli.training.labelled import label_stores

    # The split must not depend on the modality: a comparison has one split, also where some tiles lack an image.
    return label_stores(plan.stores, plan.labels, task, extent=plan.extent)


def _train(
    plan: Plan, task: TaskSettings, labelled: Labelled, description: Description, folder: Path, key: str,
    progress: Progress,
) -> list[Outcome]:  # fmt: skip
    from rsosm_cli.training import devices
    from rsosm_cli.training.finetune import Job, train
    from rsosm_cli.training.protocols import knn
    from rsosm_cli.training.splits import label_share

    if task.protocol == "knn" and plan.start.weights is None:
        raise UsageError("kNN measures a pretrained encoder, and there is none.", hint="Give one with --checkpoint.")
    outcomes = []
    for seed in range(task.seed, task.seed + plan.seeds):
        job = Job(
            stores=tuple(path for _, path in plan.stores), tiles=labelled.tiles, truth=labelled.truth,
            part=labelled.split.part, block=labelled.split.block,
            train_rows=label_share(labelled.split.of("train"), plan.label_share, seed),
            description=description, encoder=plan.start.weights, seed=seed, folder=folder, key=key,
            offline=plan.offline,
        )  # fmt: skip
        one = plan.devices if task.protocol != "knn" else replace(plan.devices, count=1, nodes=1, launcher="none")
        outcomes.append(
            devices.run(one, task.precision, knn if task.protocol == "knn" else train, job, progress=progress)
        )
        if plan.seeds > 1 and task.protocol != "knn" and devices.process_rank() == 0:
            _set_aside(folder, seed)
    return outcomes


def _set_aside(folder: Path, seed: int) -> None:
    best, kept = folder / "checkpoints" / "best", folder / "checkpoints" / f"seed-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    best.rename(kept)


def _keep_best(folder: Path, outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome that is the best on validation ground; its checkpoint becomes ``checkpoints/best``."""
    best = max(outcomes, key=lambda o: o.score if math.isfinite(o.score) else -math.inf)
    kept = folder / "checkpoints" / f"seed-{best.seed}"
    if kept.exists():
        target = folder / "checkpoints" / "best"
        shutil.rmtree(target, ignore_errors=True)
        kept.rename(target)
        for other in outcomes:
            shutil.rmtree(folder / "checkpoints" / f"seed-{other.seed}", ignore_errors=True)
    return best


def _numbers(task: TaskSettings, outcomes: Sequence[Outcome], best: Outcome) -> dict[str, Any]:
    """Return the test metrics: of the seed kept with its interval, and mean and spread over several."""
    numbers: dict[str, Any] = {"best_epoch": best.best_epoch}
    if best.calibration is not None:
        c = best.calibration
        numbers |= {"temperature": c.temperature, "calibration_error": round(c.after, 4)}
        numbers["calibration_error_before"] = round(c.before, 4)
    for metric in best.test:
        if not math.isfinite(metric.value):
            continue
        entry = round(metric.value, 4)
        numbers[metric.name] = entry
        if "/" not in metric.name and math.isfinite(metric.low):
            numbers[f"{metric.name}_low"], numbers[f"{metric.name}_high"] = round(metric.low, 4), round(metric.high, 4)
        if len(outcomes) > 1:
            values = np.array([o.metrics[metric.name] for o in outcomes])
            numbers[f"{metric.name}_mean"] = round(float(values.mean()), 4)
            numbers[f"{metric.name}_std"] = round(float(values.std(ddof=1)), 4)
    return numbers


def _config(plan: Plan, task: TaskSettings) -> _Config:
    return _Config(
        task=task, seeds=plan.seeds, label_share=plan.label_share, labels=tuple(map(str, plan.labels)),
        labels_extent=None if plan.extent is None else str(plan.extent),
        stores=tuple(str(path) for _, path in plan.stores),
        checkpoint=None if plan.start.weights is None else str(plan.start.weights),
    )  # fmt: skip


def _write_inputs(folder: Path, plan: Plan, task: TaskSettings, labelled: Labelled) -> None:
    from rsosm_cli.training.splits import ground_features

    write_text(folder / "config.yaml", dump(_config(plan, task)))
    write_json(folder / "split.geojson", ground_features(labelled.split.ground))


def _paths(run: Any, task: TaskSettings) -> dict[str, str]:
    paths = {"run": run.folder, "report": run.report, "metrics": run.metrics, "split": run.folder / "split.geojson"}
    if task.protocol != "knn":
        paths["checkpoint"] = run.best
    return {name: str(path) for name, path in paths.items()}


def _compare(plan: Plan, task: TaskSettings, dry_run: bool, progress: Progress) -> Result:
    """Train every modality on one split; the task's own comes last, so that it is the newest run."""
    from rsosm_cli.training.devices import process_rank
    from rsosm_cli.training.kinds import main_metrics

    # A change task looks at images; it has no OSM-only model.
    modalities = plan.start.modalities(task)
    order = [m for m in modalities if m != task.modality] + [task.modality]
    results = {}
    for modality in order:
        changed = task.model_copy(update={"modality": modality})
        results[modality] = _one(plan, changed, dry_run, progress, suffix=f"-{modality}" if plan.name else "")
    rows = {m: results[m] for m in modalities}
    shown = main_metrics(task)
    numbers: dict[str, Any] = {}
    for modality, result in rows.items():
        for metric in shown:
            for ending in ("", "_low", "_high", "_mean", "_std"):
                if metric + ending in result.numbers:
                    numbers[f"{modality}_{metric}{ending}"] = result.numbers[metric + ending]
    paths = {f"{m}_{k}": p for m, r in rows.items() for k, p in r.paths.items() if k in ("run", "report")}
    if not dry_run and process_rank() == 0:
        from rsosm_cli.training.finetune_report import report_comparison

        folder = plan.space.run((plan.name or task.name) + "-compare")
        write_text(folder / "config.yaml", dump(_config(plan, task)))
        report_comparison(
            folder / "report.html", folder / "metrics.csv", task, {m: r.numbers for m, r in rows.items()}, shown
        )
        paths |= {name: str(folder / file) for name, file in _COMPARED.items()}
    status: Status = (
        "planned" if dry_run else "skipped" if all(r.status == "skipped" for r in results.values()) else "done"
    )
    notes = tuple(dict.fromkeys(n for r in results.values() for n in r.notes))
    return Result("finetune", f"{plan.name or task.name} (compared)", status, paths, numbers, notes)
