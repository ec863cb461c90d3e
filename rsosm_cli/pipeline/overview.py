"""What is under a root: cities and runs, what is done, how large, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsosm_cli.errors import FormatError, RsosmError
from rsosm_cli.pipeline.images import Fault, faults
from rsosm_cli.pipeline.result import Result
from rsosm_cli.places.place import read_place
from rsosm_cli.training.runs import Run, all_runs
from rsosm_cli.workspace import IMAGERY_NOT_YET, CityFiles, Workspace, provenance

_AGAIN = "the same command again goes on"


@dataclass(frozen=True)
class _Runs:
    pretrained: bool
    tasks: tuple[str, ...]  # of finished fine-tuning runs


def overview(root: Path) -> list[Result]:
    """Return one result a city and one a run under ``root``."""
    runs = all_runs(root)
    finished = [facts for _, facts in runs if facts.get("finished")]
    known = _Runs(
        pretrained=any(f.get("kind") == "pretrain" for f in finished),
        tasks=tuple(dict.fromkeys(str(f["task"]) for f in finished if f.get("kind") == "finetune" and f.get("task"))),
    )
    results = [_city(city, known) for city in Workspace(root).cities()]
    return results + [_run(run, facts) for run, facts in runs]


def describe_city(city: CityFiles, root: Path | None) -> Result:
    """Return what is known of a city: its steps, files, sources."""
    manifest = city.manifest.read()
    numbers: dict[str, Any] = {"size_bytes": folder_bytes(city.folder)}
    for name, step in manifest.get("steps", {}).items():
        if name.partition(":")[0] in manifest["steps"] and ":" in name:
            continue  # a part of a step that is listed
        numbers[name] = f"finished {step.get('finished', '')}, took {step.get('seconds', 0):.1f} s"
    paths = {p.name: str(p) for p in sorted(city.folder.iterdir()) if p.is_file() and not p.name.startswith(".")}
    paths |= {f"maps/{p.name}": str(p) for p in sorted(city.maps.glob("*.tif"))}
    notes = [f"The fetch of {city.name} is unfinished; {_AGAIN}."] if _broken(city) else []
    if manifest.get(IMAGERY_NOT_YET):
        kept = f" {city.imagery.name} is the one before it." if city.imagery.exists() else ""
        notes.append(f"The imagery asked for last was broken off.{kept} To go on: {_fetch_again(city)}")
    notes += [fault.note for epoch in (None, *city.epochs()) for fault in _faults(city, epoch)]
    notes += [f"Source: {s}" for s in source_lines(manifest)]
    return Result("info", city.name, "done", paths, numbers, tuple(notes))


def source_lines(manifest: dict[str, Any]) -> list[str]:
    """Return the sources of a manifest as readable lines."""
    keys = ("name", "licence", "attribution")
    return [", ".join(str(source[k]) for k in keys if source.get(k)) for source in provenance(manifest)]


def sources_of(manifest: dict[str, Any], *files: Path) -> list[dict[str, str]]:
    """Return the sources of those steps of a city's manifest that made one of ``files``."""
    names = {path.name for path in files}
    steps = {k: s for k, s in manifest.get("steps", {}).items() if names & s.get("files", {}).keys()}
    # A step may be recorded with its parts: what names the fewest files is closest to them.
    return provenance({"steps": dict(sorted(steps.items(), key=lambda item: len(item[1]["files"])))})


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _city(city: CityFiles, runs: _Runs) -> Result:
    try:
        broken = _broken(city)
    except FormatError as error:
        return _damaged(city.name, "city", city.folder, str(error))
    # Rasters beside a map are named after it: landuse.probability.tif.
    maps = sorted(p.stem for p in city.maps.glob("*.tif") if "." not in p.stem)
    files = {
        "boundary": city.place, "osm": city.osm, "imagery": city.imagery, "tiles": city.tiles,
        "embeddings": city.embeddings,
    }  # fmt: skip
    there = [name for name, path in files.items() if path.exists()]
    useless = any(fault.useless for fault in _faults(city))
    if useless:
        there[there.index("imagery")] = "imagery of which nothing can be used"
    has = ", ".join(there + [f"map {m}" for m in maps])
    numbers = {
        "kind": "city",
        "has": f"unfinished ({has}); {_AGAIN}" if broken else has,
        "size_bytes": folder_bytes(city.folder),
        "next": _fetch_again(city) if broken else _next(city, runs, maps, useless),
    }
    return Result("info", city.name, "done", {"folder": str(city.folder)}, numbers)


def _broken(city: CityFiles) -> bool:
    """Return whether the fetch of a city, or the last one that changed it, never came to its end."""
    steps = city.manifest.read().get("steps", {})
    parts = {name: step.get("key") for name, step in steps.items() if name.startswith("fetch:")}
    return parts != steps.get("fetch", {}).get("parts", {} if "fetch" not in steps else parts)


def _older(city: CityFiles) -> bool:
    """Return whether the tiles are of other elements or imagery than the city has now."""
    inputs = city.manifest.step("build-graph").get("inputs")
    return inputs is not None and any(inputs.get(name) != stamp for name, stamp in city.sources().items())


def _faults(city: CityFiles, epoch: str | None = None) -> list[Fault]:
    """Return what is wrong with an image of a city; of a city without a readable place that is told elsewhere."""
    try:
        return faults(city, read_place(city.place), epoch) if city.imagery_of(epoch).exists() else []
    except (OSError, RsosmError):
        return []


def _next(city: CityFiles, runs: _Runs, maps: Sequence[str], useless: bool) -> str:
    """Return the command that brings a city one step further, or nothing; ``useless``: its image."""
    name = shlex.quote(city.name)
    if not city.osm.exists() or city.manifest.read().get(IMAGERY_NOT_YET):
        return _fetch_again(city)
    if useless:
        return f"rsosm fetch --city {name} --imagery FILE"
    if not city.tiles.exists() or _older(city):
        return f"rsosm build-graph --city {name}"
    if not city.imagery.exists():
        # Training and most maps want images; the OSM encoder alone does not.
        todo = runs.pretrained and not city.embeddings.exists()
        return f"rsosm embed --city {name}" if todo else f"rsosm fetch --city {name} --imagery FILE"
    if not runs.pretrained and not runs.tasks:
        return "rsosm pretrain"
    if not runs.tasks:
        return f"rsosm finetune TASK --city {name} --labels FILE"
    missing = [task for task in runs.tasks if task not in maps]
    if missing:
        return f"rsosm map {missing[0]} --city {name}"
    return f"rsosm evaluate {maps[0]} --city {name} --sample 300" if maps else ""


def _fetch_again(city: CityFiles) -> str:
    """Return the command that goes on with a fetch, with the imagery that was broken off."""
    return "rsosm fetch " + shlex.join(["--city", city.name, *city.manifest.read().get(IMAGERY_NOT_YET, [])])


def _damaged(name: str, kind: str, folder: Path, error: str) -> Result:
    numbers = {"kind": kind, "has": "a damaged manifest.json", "size_bytes": folder_bytes(folder), "next": ""}
    return Result("info", name, "failed", {"folder": str(folder)}, numbers, error=error, exit_status=1)


def _run(run: Run, facts: dict[str, Any]) -> Result:
    if "damaged" in facts:
        return _damaged(run.name, "run", run.folder, facts["damaged"])
    finished = facts.get("finished")
    kind = " ".join(str(facts[key]) for key in ("kind", "task") if facts.get(key))
    numbers = {
        "kind": f"run, {kind}" if kind else "run",
        "has": f"finished {finished}" if finished else f"unfinished; {_AGAIN}",
        "size_bytes": folder_bytes(run.folder),
        "next": "",
    }
    return Result("info", run.name, "done", {"folder": str(run.folder)}, numbers)
