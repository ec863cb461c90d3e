"""``rsosm embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    COMPUTE,
    OUTPUT,
    SOURCES,
    Checkpoint,
    CitiesFile,
    City,
    Device,
    DeviceOption,
    DryRun,
    Force,
    Offline,
    State,
    finish,
    for_cities,
)
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    city: City = None,
    cities: CitiesFile = None,
    tiles: Annotated[
        Path | None, typer.Option(help="A tiles.h5 in place of a city's.", rich_help_panel=SOURCES, metavar="FILE")
    ] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the encodings.", rich_help_panel=OUTPUT, metavar="FILE")
    ] = None,
    patch_maps: Annotated[
        bool, typer.Option("--patch-maps", help="Write the maps of patches, too (large).", rich_help_panel=OUTPUT)
    ] = False,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Write the pooled vectors as GeoParquet, too.", rich_help_panel=OUTPUT)
    ] = False,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Draw the first three principal components.", rich_help_panel=OUTPUT),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Tiles at a time.", rich_help_panel=COMPUTE)] = 32,
    precision: Annotated[str, typer.Option(help="32 or bf16.", rich_help_panel=COMPUTE)] = "32",
    device: DeviceOption = Device.auto,
    offline: Offline = False,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Encode every tile: image, OSM and fused vectors, written to embeddings.h5.

    \b
    Examples:
      rsosm embed --city Andorra --preview
      rsosm embed --tiles a.h5 --checkpoint runs/geolink-1f0c2a9d --output a_embeddings.h5 --parquet
    """

    def work(state: State) -> list[Result]:
        from rsosm_cli.pipeline.embed import embed

        return for_cities(
            state, "embed", embed, city, cities, pathless=tiles is not None,
            tiles=tiles, checkpoint=checkpoint, output=output, patch_maps=patch_maps, parquet=parquet, preview=preview,
            device=device.value, batch_size=batch_size, precision=precision, offline=offline, dry_run=dry_run,
            force=force,
        )  # fmt: skip

    finish(ctx, work)
