"""``rsosm build-graph``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    COMPUTE,
    OUTPUT,
    SETTINGS,
    SOURCES,
    Assign,
    CitiesFile,
    City,
    Config,
    DryRun,
    Force,
    State,
    finish,
    for_cities,
)
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    city: City = None,
    cities: CitiesFile = None,
    osm: Annotated[
        Path | None,
        typer.Option(help="Elements (osm.parquet) in place of the city's.", rich_help_panel=SOURCES, metavar="FILE"),
    ] = None,
    imagery: Annotated[
        Path | None,
        typer.Option(help="A raster in place of the city's imagery.", rich_help_panel=SOURCES, metavar="FILE"),
    ] = None,
    chips: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images, each with its vector file: a tile each.", rich_help_panel=SOURCES, metavar="DIR"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the store.", rich_help_panel=OUTPUT, metavar="FILE")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Side of a tile in pixels; default: 224.", rich_help_panel=SETTINGS)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Step between tiles in pixels; default: 224.", rich_help_panel=SETTINGS)
    ] = None,
    gsd: Annotated[
        float | None,
        typer.Option(min=0.01, help="Metres on the ground a pixel; default: 0.6.", rich_help_panel=SETTINGS),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(help="Bands of the imagery; default: 1,2,3.", rich_help_panel=SETTINGS, metavar="LIST"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.", rich_help_panel=COMPUTE)] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="A Dask scheduler to work on.", rich_help_panel=COMPUTE, metavar="ADDRESS")
    ] = None,
    config: Config = None,
    assign: Assign = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Tile a city, build a heterograph a tile, and write tiles.h5.

    The store holds all that training needs and can be copied alone to another machine.

    \b
    Examples:
      rsosm build-graph --city Andorra
      rsosm build-graph --city Andorra --stride 112 --workers 8
      rsosm build-graph --city Andorra --bands 4,3,2
      rsosm build-graph --chips my_chips/ --output chips.h5
    """

    def work(state: State) -> list[Result]:
        from rsosm_cli.pipeline.build_graph import build_graph
        from rsosm_cli.settings import BuildSettings, resolve

        options = {"grid.tile": tile, "grid.stride": stride or tile, "grid.gsd": gsd, "bands": bands}
        if config is not None and stride is None:
            options["grid.stride"] = None  # a stride of the user's YAML holds
        settings = resolve(BuildSettings, config=config, options=options, assignments=assign or ())
        return for_cities(
            state, "build-graph", build_graph, city, cities, pathless=chips is not None or output is not None,
            osm=osm, imagery=imagery, chips=chips, output=output, settings=settings, workers=workers,
            scheduler=scheduler, dry_run=dry_run, force=force,
        )  # fmt: skip

    finish(ctx, work)
