"""Run folders: what a training leaves behind, and how the newest run that fits is found.

runs/<name>/  config.yaml  manifest.json  metrics.csv  report.html  events.out.tfevents.*
              checkpoints/last/  checkpoints/best/
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.workspace import Manifest, Workspace, write_text

Kind = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Run:
    """A folder under ``<root>/runs``."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.folder / "manifest.json")

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.csv"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last"

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best"

    @property
    def state(self) -> Path:
        """What resuming needs besides the weights; read with ``weights_only=True``."""
        return self.last / "state.pt"


def open_run(root: Path, name: str, *, kind: Kind, key: str, force: bool = False) -> Run:
    """Return the run ``name`` under ``root``, ready to be written to.

    A run of the same key is resumed as it stands; one of another key is never overwritten unless ``force`` is set: it
    raises :class:`UsageError`. ``key`` fingerprints inputs and settings.
    """
    run = Run(Workspace(root).run(name))
    if force and run.folder.exists():
        shutil.rmtree(run.folder)
    require_same(run, key)
    run.folder.mkdir(parents=True, exist_ok=True)
    recover_folder(run.last)
    recover_folder(run.best)
    return run


def require_same(run: Run, key: str) -> None:
    """Raise :class:`UsageError` where ``run`` is there and of another key."""
    facts = run.manifest.read()
    if facts and facts.get("key") != key:
        raise UsageError(
            f"The run {run.name} was made with other settings or inputs.",
            hint="Give another --name, or start it over with --force.",
            run=str(run.folder),
        )


def all_runs(root: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Return every run under ``root`` with its manifest, the newest first; unfinished ones last.

    Of one that cannot be read the manifest is what is wrong: ``{"damaged": sentence}``.
    """
    found: list[tuple[Run, dict[str, Any]]] = []
    for path in (root / "runs").glob("*/manifest.json"):
        try:
            facts = Manifest(path).read()
        except FormatError as error:
            facts = {"damaged": str(error)}
        found.append((Run(path.parent), facts))
    return sorted(found, key=lambda item: (str(item[1].get("finished") or ""), item[0].name), reverse=True)


def newest_run(
    root: Path,
    *,
    kind: Kind,
    task: str | None = None,
    fits: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Run:
    """Return the newest finished run of ``kind`` (and ``task``) whose manifest ``fits``.

    Raises :class:`MissingError`, which says what to run first.
    """
    unfinished = []
    for run, facts in all_runs(root):
        if facts.get("kind") != kind or (task is not None and facts.get("task") != task):
            continue
        if fits is not None and not fits(facts):
            continue
        if facts.get("finished"):
            return run
        unfinished.append(run.name)
    what = "pretraining run" if kind == "pretrain" else "fine-tuning run" + (f" of the task {task}" if task else "")
    command = "rsosm pretrain" if kind == "pretrain" else f"rsosm finetune {task or 'TASK'}"
    if unfinished:
        hint = f"{unfinished[0]} is unfinished: the same `{command}` resumes it. Or give --checkpoint."
    else:
        hint = f"Run `{command}` first, or name a checkpoint with --checkpoint."
    raise MissingError(f"There is no finished {what} under {root}.", hint=hint, kind=kind, task=task)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of ``folder``.

    A folder cannot be exchanged in one step on every system: the new one is complete before the old one goes, and
    :func:`recover_folder` finishes an exchange that was cut short.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building, ready, old = (folder.with_name(f".{folder.name}.{part}") for part in ("part", "new", "old"))
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    yield building
    recover_folder(folder)
    building.rename(ready)
    if folder.exists():
        folder.rename(old)
    ready.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finish or undo an exchange of ``folder`` that was interrupted."""
    ready, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    if ready.exists():
        if folder.exists():
            shutil.rmtree(folder)
        ready.rename(folder)
    elif old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV, whole or not at all; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_events(folder: Path, rows: Sequence[Mapping[str, Any]], step: str = "epoch") -> None:
    """Write ``rows`` as TensorBoard events, in place of those that are there: a resumed run has no doubled points."""
    from torch.utils.tensorboard import SummaryWriter

    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    with SummaryWriter(str(folder)) as writer:
        for row in rows:
            for name, value in row.items():
                if name != step and isinstance(value, int | float):
                    writer.add_scalar(name, value, int(row[step]))
