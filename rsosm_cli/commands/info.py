"""``rsosm info``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import State, complete_city, finish
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="Any file or folder that rsosm wrote; default: the root.", metavar="FILE")
    ] = None,
    city: Annotated[
        str | None, typer.Option(help="Name of a city under the root.", autocompletion=complete_city)
    ] = None,
    epoch: Annotated[str | None, typer.Option(help="Which of the city's images to draw.", metavar="NAME")] = None,
    tile: Annotated[int | None, typer.Option(min=0, help="Number of a tile of a tiles.h5.")] = None,
    preview: Annotated[
        Path | None,
        typer.Option(help="Draw the tile, or the city's OSM outlines over its image, into this PNG.", metavar="FILE"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare a tiles.h5 with its checksums, the images, too.")
    ] = False,
) -> None:
    """Say what a file holds and where it came from; without a file, what is there and what to do next.

    \b
    Examples:
      rsosm info
      rsosm info rsosm-data/cities/andorra/tiles.h5
      rsosm info --city Andorra --preview andorra.png
      rsosm info rsosm-data/cities/andorra/tiles.h5 --tile 17 --preview tile.png
    """

    def work(state: State) -> Result | Sequence[Result]:
        from rsosm_cli.pipeline.info import info

        return info(file, root=state.root, tile=tile, preview=preview, city=city, epoch=epoch, check=check)

    finish(ctx, work)
