"""``demo``: the whole chain, offline, on a town that is made on the spot."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import BuildSettings, FetchSettings, MapSettings, PretrainSettings, TaskSettings, resolve
from rsosm_cli.town.make import Town, make_town
from rsosm_cli.workspace import Workspace, write_json

log = logging.getLogger("rsosm")

# Raised when the town changes, so that an old one is made again.
_TOWN_VERSION = 1
# Half the default resolution, for speed; and tiles that overlap by half: a small town has few, pretraining wants many.
_GRID = {"grid.tile": 112, "grid.stride": 56, "grid.gsd": 1.2}


def demo(
    *,
    root: Path | None = None,
    seed: int = 0,
    tiles: int = 16,
    device: str = "auto",
    force: bool = False,
    progress: Progress = SILENT,
) -> list[Result]:
    """Make a town of ``tiles`` x ``tiles`` tiles, then fetch, build, pretrain, finetune, embed and map it.

    Calls the very functions of the commands, so what is finished is skipped and what was interrupted goes on. Returns
    one result a step; the last one has the paths of the map, its preview and its statistics.
    """
    from rsosm_cli.pipeline.build_graph import build_graph
    from rsosm_cli.pipeline.embed import embed
    from rsosm_cli.pipeline.fetch import fetch
    from rsosm_cli.pipeline.finetune import finetune
    from rsosm_cli.pipeline.map import map_city
    from rsosm_cli.pipeline.pretrain import pretrain

    base = Workspace.at(root).root
    town = _town(base / "demo", seed, tiles, force, progress)
    build = resolve(BuildSettings, options=_GRID)
    training = resolve(PretrainSettings, kind="pretrain", preset="geolink-tiny", options=_PRETRAINING)
    task = resolve(TaskSettings, kind="tasks", preset="landuse", options=_TASK)
    name = town.name
    fetched = fetch(
        name, root=base, osm=[str(town.osm)], imagery=[str(town.imagery)], settings=FetchSettings(), offline=True,
        force=force, progress=progress,
    )  # fmt: skip
    built = build_graph(name, root=base, settings=build, force=force, progress=progress)
    # The runs' names are the demo's: what is there of other tiles or another encoder is started over.
    trained = pretrain(
        [name], root=base, name="demo-pretrain", settings=training, device=device, offline=True,
        force=force or built.status == "done", progress=progress,
    )  # fmt: skip
    encoder, run = Path(trained.paths["run"]), Workspace.at(root).run("demo-landuse")
    return [
        fetched, built, trained,
        finetune(
            task, cities=[name], labels=[town.labels], checkpoint=encoder, root=base, name=run.name, device=device,
            offline=True, force=force or trained.status == "done", progress=progress,
        ),
        embed(
            name, root=base, checkpoint=encoder, preview=True, device=device, offline=True, force=force,
            progress=progress,
        ),
        map_city(
            "landuse", name, root=base, checkpoint=run, settings=MapSettings(), device=device, offline=True,
            force=force, progress=progress,
        ),
    ]  # fmt: skip


# As long as the few minutes allow. A fifth is held out: in a tenth, too few tiles share no ground to choose among.
_PRETRAINING = {"optim.epochs": 16, "optim.warmup_epochs": 1.0, "holdout": 0.2}
# A short training at a larger rate than that of the preset, and a narrow head. Blocks of three tiles: the overlapping
# tiles that lie across their borders are not used.
_TASK = {
    "optim.epochs": 6, "optim.lr": 1e-3, "encoder_lr": 0.1, "decoder_width": 64, "split.block_m": 403.2,
}  # fmt: skip


def _town(folder: Path, seed: int, tiles: int, force: bool, progress: Progress) -> Town:
    """Make the town, or return the one that is there."""
    made = {"version": _TOWN_VERSION, "seed": seed, "tiles": tiles}
    marker = folder / "town.json"
    if not force and marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == made:
        return Town.at(folder)
    marker.unlink(missing_ok=True)
    log.info("Making a town of %d tiles in %s.", tiles * tiles, folder)
    with progress.task("Making the town", 1, "town") as advance:
        town = make_town(folder, seed=seed, tiles=tiles)
        advance()
    write_json(marker, made)
    return town
