"""``finetune``: labels and tiles to a model of a task, with metrics of ground that training has not seen."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.result import Result, Status
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import PretrainSettings, Settings, TaskSettings, dump, resolve
from rsosm_cli.workspace import Workspace, file_stamp, fingerprint, write_json, write_text

if TYPE_CHECKING:
    from rsosm_cli.models.checkpoint import Description
    from rsosm_cli.tiles.labels import Extent
    from rsosm_cli.training.devices import Devices
    from rsosm_cli.training.finetune import Outcome
    from rsosm_cli.training.labelled import Labelled

log = logging.getLogger("rsosm")

# Changes when the same settings and inputs would give another model.
VERSION = 1
MODALITIES = ("image", "osm", "fused")


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

    The encoder comes from ``checkpoint``, by default from the newest pretraining run under ``root``; with
    ``protocol: scratch`` its architecture alone. Without cities and tiles, every city under the root is used that
    labels lie in. ``labels_extent``: a vector file or (west, south, east, north) in degrees; what is labelled ground
    without it says :mod:`rsosm_cli.tiles.labels`. ``seeds`` trainings on one split give mean and spread; the best on
    validation ground is kept. ``compare`` trains the modalities image, osm and fused on one split.

    Raises :class:`UsageError`, :class:`MissingError` or :class:`FormatError`.
    """
    from rsosm_cli.training.devices import choose

    started = time.monotonic()
    if not 0 < label_share <= 1:
        raise UsageError(f"A label share of {label_share:g} is not above 0 and at most 1.")
    space = Workspace.at(root)
    devices = choose(gpus=gpus, nodes=nodes, device=device)
    stores = _stores(space, cities, tiles)
    start = _start(space, task, checkpoint, offline)
    plan = _Plan(space, stores, list(labels), labels_extent, start, seeds, label_share, devices, offline, force, name)
    if not compare:
        result = _one(plan, task, dry_run, progress)
    else:
        result = _compare(plan, task, dry_run, progress)
    return replace(result, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Start:
    """Where the encoder comes from. ``weights``: None from scratch."""

    weights: Path | None
    description: Description | None  # None: to be made from the pretraining preset ``task.scratch``
    note: str
    identity: Any


@dataclass(frozen=True)
class _Plan:
    space: Workspace
    stores: list[tuple[str, Path]]
    labels: list[Path]
    extent: Extent | None
    start: _Start
    seeds: int
    label_share: float
    devices: Devices
    offline: bool
    force: bool
    name: str | None

    def key(self, task: TaskSettings) -> str:
        extent = self.extent
        return fingerprint(
            "finetune", VERSION, task.model_dump(mode="json", exclude={"workers"}),
            [file_stamp(path) for _, path in self.stores], [file_stamp(path) for path in self.labels],
            file_stamp(extent) if isinstance(extent, Path) else extent,
            file_stamp(Path(task.split.file)) if task.split.file else None,
            self.start.identity, self.seeds, self.label_share,
        )  # fmt: skip


def _stores(space: Workspace, cities: Sequence[str], tiles: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return (city, store) pairs: those named, or every one under the root."""
    found = [(city, space.city(city).tiles) for city in cities]
    for city, path in found:
        if not path.exists():
            raise MissingError(
                f"There are no tiles of {city} under {space.root}.", hint=f'Run `rsosm build-graph --city "{city}"`.'
            )
    if tiles:
        from rsosm_cli.tiles.shards import find_stores

        found += [(_city_of(path), path) for path in find_stores(list(tiles))]
    if not found:
        found = [(c.name, c.tiles) for c in space.cities() if c.tiles.exists()]
    if not found:
        raise MissingError(f"There are no tiles under {space.root}.", hint="Run `rsosm build-graph --city NAME` first.")
    return found


def _city_of(path: Path) -> str:
    return path.parent.name if path.name == "tiles.h5" else path.stem


def _start(space: Workspace, task: TaskSettings, checkpoint: Path | None, offline: bool) -> _Start:
    from rsosm_cli.models.checkpoint import find_checkpoint, read_description
    from rsosm_cli.training.runs import newest_run

    note = ""
    if checkpoint is None:
        try:
            run = newest_run(space.root, kind="pretrain")
        except MissingError as error:
            if task.protocol == "scratch":
                return _Start(None, None, f"The model is that of the preset {task.scratch}, untrained.", task.scratch)
            raise MissingError(
                error.message, hint=f"{error.hint} Training without a pretrained encoder is --protocol scratch."
            ) from None
        checkpoint = run.folder
        note = f"The encoder is that of the run {run.name}, the newest pretraining under {space.root}."
    folder = find_checkpoint(checkpoint)
    description = read_description(folder)
    identity = [file_stamp(file) for file in sorted(folder.glob("model.*"))]
    if task.protocol == "scratch":
        return _Start(None, description, f"The model has the architecture of {checkpoint}, untrained.", identity)
    return _Start(folder, description, note or f"The encoder is that of {checkpoint}.", identity)


def _one(plan: _Plan, task: TaskSettings, dry_run: bool, progress: Progress, suffix: str = "") -> Result:
    """Train one task and modality; skip it where its run is finished."""
    from rsosm_cli.training.devices import process_rank
    from rsosm_cli.training.runs import Run, open_run

    key = plan.key(task)
    name = (plan.name or f"{task.name}-{key[:8]}") + suffix
    run = Run(plan.space.run(name))
    facts = run.manifest.read()
    if facts.get("key") == key and facts.get("finished") and not plan.force:
        return Result(
            "finetune", run.name, "skipped", _paths(run, task), facts.get("numbers", {}), tuple(facts["notes"])
        )
    labelled = _labelled(plan, task)
    description, fit = _describe(plan, task, labelled)
    notes = [plan.start.note, *fit, *labelled.notes]
    numbers: dict[str, Any] = labelled.counts() | {"block_m": labelled.split.block_m}
    if dry_run:
        jobs = f"{plan.seeds} training{'s' if plan.seeds > 1 else ''} of {task.optim.epochs} epochs on {plan.devices}"
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
        write_outcomes(run.metrics, outcomes)
        report_finetune(run.report, task, outcomes, best, numbers, notes)
        run.manifest.update(
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), seconds=round(time.monotonic() - seconds, 1),
            numbers=numbers, notes=notes, modality=task.modality, protocol=task.protocol,
            fits="none" if task.protocol == "knn" else "map",
        )  # fmt: skip
    return Result("finetune", run.name, "done", _paths(run, task), numbers, tuple(notes))


def _labelled(plan: _Plan, task: TaskSettings) -> Labelled:
    from rsosm_cli.training.labelled import label_stores

    # The split must not depend on the modality: a comparison has one split, also where some tiles lack an image.
    return label_stores(plan.stores, plan.labels, task, extent=plan.extent)


def _describe(plan: _Plan, task: TaskSettings, labelled: Labelled) -> tuple[Description, list[str]]:
    """Return what the checkpoint will say of itself (inputs, task, ground it was trained on), and notes."""
    from rsosm_cli.training.finetune import fit_inputs

    shards = labelled.shards
    base = plan.start.description or _scratch_description(plan, task, labelled)
    size, gsd_m, notes = fit_inputs(shards, base, task)
    provenance = {
        **base.provenance,
        "encoder": None if plan.start.weights is None else str(plan.start.weights),
        "labels": [path.name for path in plan.labels],
        "stores": shards.provenance,
        "split": {"seed": task.seed, "block_m": labelled.split.block_m, "ground": list(labelled.split.ground)},
    }
    description = base.model_copy(
        update={
            "task": task, "tile": size, "gsd": gsd_m, "bands": shards.bands,
            "graph": shards.graph_settings, "provenance": provenance, "metrics": {},
        }
    )  # fmt: skip
    return description, notes


def _scratch_description(plan: _Plan, task: TaskSettings, labelled: Labelled) -> Description:
    from rsosm_cli.models.checkpoint import Description, TextDescription
    from rsosm_cli.text.encoder import load_text_encoder
    from rsosm_cli.text.weights import read_key_counts
    from rsosm_cli.tiles.shards import key_counts

    settings = resolve(PretrainSettings, kind="pretrain", preset=task.scratch)
    table = settings.text.tag_counts
    shards = labelled.shards
    encoder = load_text_encoder(settings.text.encoder, offline=plan.offline)
    train = labelled.tiles[labelled.split.of("train")]
    bands = len(shards.bands)
    if bands == 3:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in pretraining
    else:
        pixels = shards.images(train[:256]).astype(np.float32) / 255
        mean = tuple(pixels.mean(axis=(0, 2, 3)).tolist())
        std = tuple(pixels.std(axis=(0, 2, 3)).clip(1e-3).tolist())
    return Description(
        model=settings.model.model_copy(update={"in_chans": bands, "image_size": shards.tile_px}),
        text=TextDescription(encoder=settings.text.encoder, width=encoder.width, identity=encoder.identity),
        tag_weight=settings.text.tag_weight,
        key_counts=read_key_counts(Path(table)) if table else key_counts(shards, train),
        graph=shards.graph_settings, tile=shards.tile_px, gsd=shards.gsd_m, bands=shards.bands, mean=mean, std=std,
    )  # fmt: skip


def _train(
    plan: _Plan, task: TaskSettings, labelled: Labelled, description: Description, folder: Path, key: str,
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


def _write_inputs(folder: Path, plan: _Plan, task: TaskSettings, labelled: Labelled) -> None:
    from rsosm_cli.training.splits import ground_features

    config = _Config(
        task=task, seeds=plan.seeds, label_share=plan.label_share, labels=tuple(map(str, plan.labels)),
        labels_extent=None if plan.extent is None else str(plan.extent),
        stores=tuple(str(path) for _, path in plan.stores),
        checkpoint=None if plan.start.weights is None else str(plan.start.weights),
    )  # fmt: skip
    write_text(folder / "config.yaml", dump(config))
    write_json(folder / "split.geojson", ground_features(labelled.split.ground))


def _paths(run: Any, task: TaskSettings) -> dict[str, str]:
    paths = {"run": run.folder, "report": run.report, "metrics": run.metrics, "split": run.folder / "split.geojson"}
    if task.protocol != "knn":
        paths["checkpoint"] = run.best
    return {name: str(path) for name, path in paths.items()}


def _compare(plan: _Plan, task: TaskSettings, dry_run: bool, progress: Progress) -> Result:
    """Train every modality on one split; the task's own comes last, so that it is the newest run."""
    from rsosm_cli.training.devices import process_rank

    order = [m for m in MODALITIES if m != task.modality] + [task.modality]
    results = {}
    for modality in order:
        changed = task.model_copy(update={"modality": modality})
        results[modality] = _one(plan, changed, dry_run, progress, suffix=f"-{modality}" if plan.name else "")
    rows = {m: results[m] for m in MODALITIES}
    shown = ("miou", "mean_f1", "overall_accuracy") if task.kind == "segmentation" else ("r2", "mae", "rmse")
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
        report_comparison(
            folder / "report.html", folder / "metrics.csv", task, {m: r.numbers for m, r in rows.items()}, shown
        )
        paths |= {"report": str(folder / "report.html"), "metrics": str(folder / "metrics.csv")}
    status: Status = (
        "planned" if dry_run else "skipped" if all(r.status == "skipped" for r in results.values()) else "done"
    )
    notes = tuple(dict.fromkeys(n for r in results.values() for n in r.notes))
    return Result("finetune", f"{plan.name or task.name} (compared)", status, paths, numbers, notes)
