"""Options that several commands share, and the small steps that every command takes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsosm_cli.console import Console, run
from rsosm_cli.presets import preset_names

if TYPE_CHECKING:
    from rsosm_cli.pipeline.result import Result
    from rsosm_cli.settings import TaskSettings

PLACE, SOURCES, SETTINGS, TRAINING, COMPUTE, OUTPUT = (
    "Which city",
    "Input",
    "Settings",
    "Training",
    "Machine",
    "Output",
)


@dataclass(frozen=True)
class State:
    """The global options."""

    root: Path | None
    console: Console


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def _root(ctx: typer.Context) -> Path:
    given = ctx.find_root().params.get("root")
    return Path(given or "rsosm-data")


def complete_city(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return names of cities under the root."""
    from rsosm_cli.errors import RsosmError
    from rsosm_cli.workspace import Workspace

    try:
        names = [city.name for city in Workspace(_root(ctx)).cities()]
    except RsosmError:  # a damaged manifest is no matter for a completion
        return []
    found = [n for n in names if n.casefold().startswith(incomplete.casefold())]
    if "bash" in os.environ.get("_RSOSM_COMPLETE", ""):  # the other shells quote by themselves
        found = [re.sub(r"([^\w./-])", r"\\\1", n) for n in found]
    return found


def complete_task(incomplete: str) -> list[str]:
    return [n for n in preset_names("tasks") if n.startswith(incomplete)]


def complete_pretrain(incomplete: str) -> list[str]:
    return [n for n in preset_names("pretrain") if n.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    return [n for n in ("geolink", "rose", "mmgr") if n.startswith(incomplete)]


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return run folders under the root."""
    runs = sorted(str(p.parent) for p in _root(ctx).glob("runs/*/config.yaml"))
    return [r for r in runs if r.startswith(incomplete)]


City = Annotated[
    list[str] | None,
    typer.Option(
        help="Name of a city; can be repeated.", rich_help_panel=PLACE, metavar="NAME", autocompletion=complete_city
    ),
]
CitiesFile = Annotated[
    Path | None,
    typer.Option(help="File with one name a line; - reads standard input.", rich_help_panel=PLACE, metavar="FILE"),
]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML with settings; it may extend a preset.", rich_help_panel=SETTINGS, metavar="FILE"),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any setting, as in --set optim.epochs=5; can be repeated.", rich_help_panel=SETTINGS,
        metavar="KEY=VALUE",
    ),
]  # fmt: skip
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how large it is.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again even where it is finished.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=COMPUTE)]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.", rich_help_panel=COMPUTE)]
Gpus = Annotated[
    int | None,
    typer.Option(
        min=1, help="Devices on this machine; with --device cpu, processes; default: 1.", rich_help_panel=COMPUTE
    ),
]
Nodes = Annotated[int, typer.Option(min=1, help="Machines, under torchrun or SLURM.", rich_help_panel=COMPUTE)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Run folder, checkpoint folder or weights file; default: the newest run that fits.",
        rich_help_panel=SOURCES, metavar="PATH", autocompletion=complete_run,
    ),
]  # fmt: skip
Tiles = Annotated[
    list[Path] | None,
    typer.Option(
        help="A tiles.h5 in place of a city's; can be repeated.", rich_help_panel=SOURCES, metavar="FILE"
    ),
]  # fmt: skip
Task = Annotated[
    str,
    typer.Argument(help="Name of a task: a packaged one, or the user's.", metavar="TASK", autocompletion=complete_task),
]


Epoch = Annotated[
    str | None,
    typer.Option(
        "--from", help="Earlier date of a change task: an epoch that `fetch` kept, or a raster.",
        rich_help_panel=SOURCES, metavar="EPOCH",
    ),
]  # fmt: skip
LaterEpoch = Annotated[
    str | None,
    typer.Option(
        "--to", help="Later date; default: the city's imagery.", rich_help_panel=SOURCES, metavar="EPOCH"
    ),
]  # fmt: skip


def epochs(earlier: str | None, later: str | None) -> tuple[str, str] | None:
    """Return the two dates of a change task; None where none is named."""
    from rsosm_cli.errors import UsageError

    if earlier is None and later is not None:
        raise UsageError(f"--to {later} needs the date to compare with.", hint="Give --from EPOCH, too.")
    return None if earlier is None else (earlier, later or "")


def finish(ctx: typer.Context, work: Callable[[State], Result | Sequence[Result]]) -> None:
    """Do the work of a command, show its results and leave with its status.

    Of the processes that torchrun or srun started, the first alone shows them.
    """
    state: State = ctx.obj

    named = ctx.params.get("city") or ()
    cities: Sequence[str] = [named] if isinstance(named, str) else named

    def shown() -> Result | Sequence[Result]:
        from rsosm_cli.pipeline.cities import require_text
        from rsosm_cli.training.devices import process_rank

        require_text(cities)
        require_text([ctx.params.get("name") or ""], "run")
        results = work(state)
        return results if process_rank() == 0 else ()

    subject = cities[0] if len(cities) == 1 else ""
    raise typer.Exit(run(state.console, shown, ctx.info_name or "rsosm", subject))


def for_cities(
    state: State,
    command: str,
    function: Callable[..., Result],
    cities: Sequence[str] | None,
    file: Path | None,
    *,
    pathless: bool = False,
    leading: tuple[Any, ...] = (),
    workers: int = 1,
    **options: Any,
) -> list[Result]:
    """Call a pipeline function for every city named; with ``pathless``, once without a city where none is named.

    ``leading`` are arguments before the city. ``workers`` above 1 run cities in processes of their own. One ``output``
    for several cities is refused: each would overwrite the other's files.
    """
    from functools import partial

    from rsosm_cli.errors import UsageError
    from rsosm_cli.pipeline.cities import city_names, each_city

    names = city_names(cities or (), file)
    progress = state.console.progress()
    if not names:
        if pathless:
            return [function(*leading, None, root=state.root, progress=progress, **options)]
        raise UsageError("No city is named.", hint="Name one with --city, or several with --cities FILE.")
    if len(names) > 1 and options.get("output") is not None:
        raise UsageError(
            f"--output {options['output']} is the place of one city's results, and {len(names)} cities are named.",
            hint="Leave it out: each city's go into its own folder under the root.",
        )
    spread = len(names) > 1 and workers > 1
    options = options if spread else {**options, "progress": progress}
    work = partial(_call, function, leading, {"root": state.root, **options})
    return each_city(work, names, command, workers=workers if spread else 1, progress=progress)


def _call(function: Callable[..., Result], leading: tuple[Any, ...], options: dict[str, Any], city: str) -> Result:
    return function(*leading, city, **options)


def task_settings(
    task: str, config: Path | None, options: dict[str, Any], assignments: Sequence[str] | None
) -> TaskSettings:
    """Return the settings of a task: a packaged one by name, or the user's YAML (``TASK.yaml`` or ``--config``)."""
    from rsosm_cli.settings import TaskSettings, resolve

    if config is None and task.endswith((".yaml", ".yml")):
        config, task = Path(task), ""
    packaged = task if task in preset_names("tasks") else None
    if packaged is None and config is None:
        from rsosm_cli.settings import load_preset

        load_preset("tasks", task)  # raises, and names the nearest known one
    # A user's YAML that names itself keeps its name; one without takes that of the command line.
    named = {} if packaged or not task else {"name": task}
    if config is not None and packaged is None:
        from rsosm_cli.settings import load_yaml

        named = {} if "name" in load_yaml(config, "tasks") else named
    return resolve(
        TaskSettings,
        kind="tasks",
        preset=packaged,
        config=config,
        options={**named, **options},
        assignments=assignments or (),
    )
