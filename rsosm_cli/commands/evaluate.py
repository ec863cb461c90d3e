"""``rsosm evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    OUTPUT,
    SOURCES,
    Assign,
    Checkpoint,
    CitiesFile,
    City,
    Config,
    DryRun,
    Force,
    State,
    Task,
    finish,
    for_cities,
    task_settings,
)
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    task: Task,
    city: City = None,
    cities: CitiesFile = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(help="Reference polygons, points or raster.", rich_help_panel=SOURCES, metavar="FILE"),
    ] = None,
    labels_extent: Annotated[
        Path | None,
        typer.Option(help="Polygons of the ground that is labelled.", rich_help_panel=SOURCES, metavar="FILE"),
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map", help="A raster or polygons in place of the city's map.", rich_help_panel=SOURCES, metavar="FILE"
        ),
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(
            help="Table with the columns city and region, to pool cities by; default: each is a region.",
            rich_help_panel=SOURCES,
            metavar="FILE",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Draw that many points to interpret, stratified by class.", rich_help_panel=OUTPUT),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the points drawn.", rich_help_panel=OUTPUT)] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; default: beside the map, or of polygons under the root.",
            rich_help_panel=OUTPUT,
            metavar="DIR",
        ),
    ] = None,
    all_ground: Annotated[
        bool,
        typer.Option("--all-ground", help="Measure on the ground of training, too.", rich_help_panel=SOURCES),
    ] = False,
    config: Config = None,
    assign: Assign = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Measure a map against reference data, adjusted for the areas of the classes.

    Overall, user's and producer's accuracy and class areas with 95 % intervals (Olofsson et al. 2014). Without labels,
    a map made elsewhere is summarised, and many cities are assessed by the sample that each has filled in.

    \b
    Examples:
      rsosm evaluate landuse --city Andorra --sample 300
      rsosm evaluate landuse --city Andorra --labels interpreted.gpkg
      rsosm evaluate uv --cities cities.txt --regions regions.csv
      rsosm evaluate uv --map villages.gpkg --city Shenzhen
    """

    def work(state: State) -> list[Result]:
        from rsosm_cli.errors import UsageError
        from rsosm_cli.pipeline.cities import attempt
        from rsosm_cli.pipeline.evaluate import evaluate
        from rsosm_cli.pipeline.evaluate_pool import pool, read_regions

        several = cities is not None or len(city or ()) > 1
        if several and map_file is not None:
            raise UsageError(
                f"{map_file} is one map, and several cities are named.",
                hint="Name the one that it is of, or leave --map out: each city's own map is taken.",
            )
        groups = None if regions is None else read_regions(regions)
        own = config is not None or assign or task.endswith((".yaml", ".yml"))
        which = task_settings(task, config, {}, assign) if own else task
        results = for_cities(
            state, "evaluate", evaluate, city, cities, pathless=map_file is not None, leading=(which,),
            labels=labels or (), map=map_file, checkpoint=checkpoint, labels_extent=labels_extent,
            held_out=not all_ground, sample=sample, seed=seed, output=output, dry_run=dry_run, force=force,
        )  # fmt: skip
        done = [r for r in results if r.status == "done"]
        if several and sample is None and done:
            name = which if isinstance(which, str) else which.name
            results.append(
                attempt(lambda _: pool(name, done, root=state.root, regions=groups, output=output), "all cities",
                "evaluate")
            )  # fmt: skip
        return results

    finish(ctx, work)
