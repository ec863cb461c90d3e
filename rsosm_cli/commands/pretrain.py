"""``rsosm pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    COMPUTE,
    OUTPUT,
    SETTINGS,
    TRAINING,
    Assign,
    CitiesFile,
    City,
    Config,
    Device,
    DeviceOption,
    DryRun,
    Force,
    Gpus,
    Nodes,
    Offline,
    State,
    Tiles,
    complete_method,
    complete_pretrain,
    finish,
)
from rsosm_cli.errors import UsageError
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    city: City = None,
    cities: CitiesFile = None,
    tiles: Tiles = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="geolink, rose, mmgr (as published), geolink-small (one GPU), or geolink-tiny, rose-tiny, mmgr-tiny "
            "(two CPU cores).",
            rich_help_panel=SETTINGS,
            autocompletion=complete_pretrain,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="geolink, rose or mmgr, as published; default: the preset's, or geolink.",
            rich_help_panel=SETTINGS,
            autocompletion=complete_method,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: method and settings.", rich_help_panel=OUTPUT)
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the tiles.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Tiles a step, over all devices.", rich_help_panel=TRAINING)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="32 or bf16.", rich_help_panel=TRAINING)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of every draw.", rich_help_panel=TRAINING)] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load data, a device.", rich_help_panel=COMPUTE)
    ] = None,
    gpus: Gpus = None,
    nodes: Nodes = 1,
    device: DeviceOption = Device.auto,
    offline: Offline = False,
    config: Config = None,
    assign: Assign = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Pretrain on imagery and OSM graphs, without labels.

    Trains on the cities given, or on every tiles.h5 under the root. Run again, it goes on where it stopped.

    \b
    Examples:
      rsosm pretrain --preset geolink-small
      rsosm pretrain --city Andorra --city Porto --preset geolink-tiny --epochs 20
      rsosm pretrain --method rose --gpus 4 --precision bf16
    """  # fmt: skip

    def work(state: State) -> Result:
        from rsosm_cli.pipeline.cities import city_names
        from rsosm_cli.pipeline.pretrain import pretrain
        from rsosm_cli.settings import PretrainSettings, load_preset, resolve

        if preset is not None and method is not None:
            of = load_preset("pretrain", preset).get("method", "geolink")
            if of != method:
                raise UsageError(
                    f"The preset {preset} is of the method {of}, and --method says {method}.",
                    hint=f"Give --preset {method} or {method}-tiny, or leave --method out.",
                )
        options = {
            "method": method, "optim.epochs": epochs, "optim.batch_size": batch_size, "precision": precision,
            "seed": seed, "workers": workers,
        }  # fmt: skip
        settings = resolve(
            PretrainSettings, kind="pretrain", preset=preset, config=config, options=options, assignments=assign or ()
        )
        return pretrain(
            city_names(city or (), cities), root=state.root, tiles=tiles or (), name=name, settings=settings, gpus=gpus,
            nodes=nodes, device=device.value, offline=offline, dry_run=dry_run, force=force,
            progress=state.console.progress(),
        )  # fmt: skip

    finish(ctx, work)
