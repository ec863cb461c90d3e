"""``pretrain``: self-supervised pretraining on the tiles of many cities."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import PretrainSettings, dump
from rsosm_cli.workspace import Workspace, file_stamp, fingerprint, slug, write_text

log = logging.getLogger("rsosm")

# Changes when a run of the same settings and tiles would train otherwise; a run of an older one is not resumed.
FORMAT = 1
# How the work is done, not what comes of it: a run may be resumed with others.
_NOT_IN_KEY = {"workers", "checkpoint_minutes"}


def pretrain(
    cities: Sequence[str] = (),
    *,
    root: Path | None = None,
    tiles: Sequence[Path] = (),
    name: str | None = None,
    settings: PretrainSettings | None = None,
    gpus: int | None = None,
    nodes: int = 1,
    device: str = "auto",
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Pretrain on the tiles of ``cities``, of the stores that ``tiles`` name, or of every city under ``root``.

    ``tiles``: files, folders, patterns or text files of paths (:func:`rsosm_cli.tiles.shards.find_stores`). The run is
    ``<root>/runs/<name>``, by default named for the method and the fingerprint of settings and stores, so that the same
    call finds its own run: it is skipped when finished and resumed when not; ``force`` starts over. With
    ``device="cpu"``, ``gpus`` counts CPU processes. Raises :class:`UsageError` and :class:`MissingError`.
    """
    from rsosm_cli.training import devices as where
    from rsosm_cli.training.runs import Run, open_run, require_same

    start = time.monotonic()
    settings = settings or PretrainSettings()
    workspace = Workspace.at(root)
    devices = where.choose(gpus=gpus, nodes=nodes, device=device)
    stores = tuple(_stores(workspace, cities, tiles))
    inputs = [*stores, *(path for path in [Path(settings.text.tag_counts).expanduser()] if path.is_file())]
    key = fingerprint(settings.model_dump(mode="json", exclude=_NOT_IN_KEY), [file_stamp(p) for p in inputs], FORMAT)
    name = slug(name or f"{settings.method}-{key[:8]}")
    run = Run(workspace.run(name))
    found = f"Pretraining on {stores[0]}." if len(stores) == 1 else f"Pretraining on {len(stores)} tile stores."
    if not force and run.manifest.finished("pretrain", key):
        facts = run.manifest.step("pretrain")
        return Result(
            "pretrain", name, "skipped", _paths(run), facts.get("numbers", {}), tuple(facts.get("notes", ())),
            seconds=time.monotonic() - start,
        )  # fmt: skip
    if not force:
        require_same(run, key)
    first = where.process_rank() == 0
    if dry_run or (first and not run.folder.exists()):
        from rsosm_cli.training.pretrain import plan

        # What cannot be trained is said before there is a folder of it.
        numbers, notes, slow = plan(stores, settings, devices)
        if slow and dry_run:
            notes.append(slow)
        elif slow:
            log.warning("%s", slow)
    if dry_run:
        return Result(
            "pretrain", name, "planned", {"run": str(run.folder)}, numbers, (found, *notes, f"On {devices}."),
            seconds=time.monotonic() - start,
        )  # fmt: skip
    if first:
        log.info("%s The run is %s, on %s.", found, name, devices)
        run = open_run(workspace.root, name, kind="pretrain", key=key, force=force)
        write_text(run.config, dump(settings))
        run.manifest.update(kind="pretrain", method=settings.method, task=None, key=key, name=name)
    from rsosm_cli.training.pretrain import Job, train

    job = Job(stores, run.folder, key, settings, devices, offline)
    outcome: dict[str, Any] = where.run(devices, settings.precision, train, job, progress=progress)
    seconds = time.monotonic() - start
    if first:
        run.manifest.record(
            "pretrain", key, files=[p for f in (run.best, run.last) for p in sorted(f.glob("model.*"))],
            seconds=seconds, **outcome,
        )  # fmt: skip
        # Only now: until the run is recorded, it is resumed from here.
        run.manifest.update(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        run.state.unlink(missing_ok=True)
    return Result(
        "pretrain", name, "done", _paths(run), outcome["numbers"], (found, *outcome["notes"]), seconds=seconds
    )


def _stores(workspace: Workspace, cities: Sequence[str], tiles: Sequence[Path]) -> list[Path]:
    """Return the stores to train on, without doubles."""
    from rsosm_cli.tiles.shards import find_stores

    if tiles and cities:
        raise UsageError("Both cities and tile stores were given.", hint="Give --city or --tiles.")
    if tiles:
        return find_stores(tiles)
    if cities:
        return [workspace.tiles_of(city).resolve() for city in cities]
    found = sorted(workspace.root.glob("cities/*/tiles.h5"))
    if not found:
        raise MissingError(
            f"There is no tiles.h5 under {workspace.root}.",
            hint="Run `rsosm fetch` and `rsosm build-graph` for a city first, or name stores with --tiles.",
            root=str(workspace.root),
        )
    return [path.resolve() for path in found]


def _paths(run: Any) -> dict[str, str]:
    """Return what a run holds that a person may want to open."""
    wanted = {
        "run": run.folder, "checkpoint": run.best if run.best.is_dir() else run.last, "metrics": run.metrics,
        "report": run.report,
    }  # fmt: skip
    return {name: str(path) for name, path in wanted.items() if path.exists()}
