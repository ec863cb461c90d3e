"""``rsosm finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    COMPUTE,
    OUTPUT,
    SOURCES,
    TRAINING,
    Assign,
    Checkpoint,
    CitiesFile,
    City,
    Config,
    Device,
    DeviceOption,
    DryRun,
    Epoch,
    Force,
    Gpus,
    LaterEpoch,
    Nodes,
    Offline,
    State,
    Task,
    Tiles,
    finish,
    task_settings,
)
from rsosm_cli.commands.options import (
    epochs as both_epochs,
)
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    task: Task,
    city: City = None,
    cities: CitiesFile = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Polygons, points, a raster, or a folder of chips, classes or pairs; can be repeated.",
            rich_help_panel=SOURCES,
            metavar="FILE",
        ),
    ] = None,
    labels_extent: Annotated[
        Path | None,
        typer.Option(
            help="Polygons of the ground that is labelled; what they leave out is no background.",
            rich_help_panel=SOURCES,
            metavar="FILE",
        ),
    ] = None,
    tiles: Tiles = None,
    earlier: Epoch = None,
    later: LaterEpoch = None,
    checkpoint: Checkpoint = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default: task and settings.", rich_help_panel=OUTPUT)
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="finetune, frozen, linear, knn or scratch; default: finetune.", rich_help_panel=TRAINING),
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="image, osm or fused; default: fused.", rich_help_panel=TRAINING)
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="upernet, linear or mlp; default: upernet.", rich_help_panel=TRAINING)
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train each modality on one split and compare.", rich_help_panel=TRAINING)
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions; mean and spread.", rich_help_panel=TRAINING)] = 1,
    label_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the training labels.", rich_help_panel=TRAINING)
    ] = 1.0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the labels.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Tiles a step, over all devices.", rich_help_panel=TRAINING)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="32 or bf16.", rich_help_panel=TRAINING)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of every draw.", rich_help_panel=TRAINING)] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load data.", rich_help_panel=COMPUTE)
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
    """Train a head for a task on labels, from a pretrained encoder.

    TASK is a packaged task (uv, ufz, landuse, building, pop, gdp, co2, scene, ufd, change) or one of your own, given as
    a YAML file. Labels are split by blocks of ground; metrics are those of ground that training has not seen.

    \b
    Examples:
      rsosm finetune landuse --city Andorra --labels landuse.gpkg
      rsosm finetune landuse --city Andorra --labels landuse.gpkg --compare --seeds 3
      rsosm finetune roofs.yaml --city Andorra --labels roofs.tif --protocol linear
    """

    def work(state: State) -> Result:
        from rsosm_cli.errors import UsageError
        from rsosm_cli.pipeline.cities import city_names
        from rsosm_cli.pipeline.finetune import finetune

        if not labels:
            raise UsageError("No labels are given.", hint="Name a file of polygons or a raster: --labels landuse.gpkg")
        options = {
            "protocol": protocol, "modality": modality, "decoder": decoder, "optim.epochs": epochs,
            "optim.batch_size": batch_size, "precision": precision, "seed": seed, "workers": workers,
        }  # fmt: skip
        return finetune(
            task_settings(task, config, options, assign), cities=city_names(city or (), cities), labels=labels,
            labels_extent=labels_extent, epochs=both_epochs(earlier, later), tiles=tiles or (), checkpoint=checkpoint,
            root=state.root, name=name, seeds=seeds, label_share=label_share, compare=compare, gpus=gpus, nodes=nodes,
            device=device.value, offline=offline, dry_run=dry_run, force=force, progress=state.console.progress(),
        )  # fmt: skip

    finish(ctx, work)
