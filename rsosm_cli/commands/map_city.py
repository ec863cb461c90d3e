"""``rsosm map``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    OUTPUT,
    PLACE,
    SETTINGS,
    SOURCES,
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
    epochs,
    finish,
    for_cities,
)
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    task: Task,
    city: City = None,
    cities: CitiesFile = None,
    checkpoint: Checkpoint = None,
    imagery: Annotated[
        Path | None,
        typer.Option(help="A raster in place of the city's imagery.", rich_help_panel=SOURCES, metavar="FILE"),
    ] = None,
    osm: Annotated[
        Path | None,
        typer.Option(help="Elements (osm.parquet) in place of the city's.", rich_help_panel=SOURCES, metavar="FILE"),
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option(help="A boundary in place of the city's.", rich_help_panel=PLACE, metavar="FILE"),
    ] = None,
    earlier: Epoch = None,
    later: LaterEpoch = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the map.", rich_help_panel=OUTPUT, metavar="DIR")
    ] = None,
    probability: Annotated[
        bool | None,
        typer.Option("--probability", help="Write the probability of each class, too.", rich_help_panel=OUTPUT),
    ] = None,
    uncertainty: Annotated[
        bool | None,
        typer.Option("--uncertainty", help="Write the entropy of the classes, too.", rich_help_panel=OUTPUT),
    ] = None,
    tta: Annotated[
        bool | None,
        typer.Option("--tta", help="Average over eight turns of each window.", rich_help_panel=SETTINGS),
    ] = None,
    min_area: Annotated[
        float | None,
        typer.Option(min=0, help="Smallest polygon in square metres; default: 0.", rich_help_panel=OUTPUT),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(help="sam: sharpen boundaries with a promptable segmenter.", rich_help_panel=SETTINGS),
    ] = None,
    refine_weights: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub repository of its weights; default: facebook/sam-vit-base.",
            rich_help_panel=SETTINGS,
            metavar="PATH",
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(min=0, max=0.89, help="Overlap of the windows; default: 0.5.", rich_help_panel=SETTINGS),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows at a time; default: 8.", rich_help_panel=SETTINGS)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="32 or bf16.", rich_help_panel=SETTINGS)] = None,
    gpus: Gpus = None,
    nodes: Nodes = 1,
    device: DeviceOption = Device.auto,
    offline: Offline = False,
    config: Config = None,
    assign: Assign = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Map a city wall to wall: GeoTIFF, polygons, statistics, preview.

    Needs a finished run of the task, from whatever city; the newest is taken and named.

    \b
    Examples:
      rsosm map landuse --city Andorra
      rsosm map landuse --cities cities.txt --checkpoint runs/landuse-93b1d7aa
      rsosm map change --city Andorra --from 2019 --to 2023
      rsosm map building --imagery mosaic.tif --osm osm.parquet --place area.geojson --output map/
    """

    def work(state: State) -> list[Result]:
        from rsosm_cli.pipeline.map import map_city
        from rsosm_cli.settings import MapSettings, resolve

        options = {
            "overlap": overlap, "batch_size": batch_size, "min_area_m2": min_area, "probability": probability,
            "precision": precision, "uncertainty": uncertainty, "tta": tta,
            "refine": refine, "refine_weights": refine_weights,
        }  # fmt: skip
        settings = resolve(MapSettings, config=config, options=options, assignments=assign or ())
        results = for_cities(
            state, "map", map_city, city, cities, pathless=place is not None or imagery is not None, leading=(task,),
            checkpoint=checkpoint, imagery=imagery, osm=osm, place=place, output=output, settings=settings,
            epochs=epochs(earlier, later), gpus=gpus, nodes=nodes, device=device.value, offline=offline,
            dry_run=dry_run, force=force,
        )  # fmt: skip
        several = cities is not None or len(city or ()) > 1
        if several and not dry_run and output is None and any(r.status != "failed" for r in results):
            from rsosm_cli.pipeline.cities import attempt
            from rsosm_cli.pipeline.map_cities import gather

            made = tuple(results)
            results.append(attempt(lambda _: gather(task, made, root=state.root), "all cities", "map"))
        return results

    finish(ctx, work)
