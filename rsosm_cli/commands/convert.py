"""``rsosm convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsosm_cli.commands.options import DryRun, Force, State, finish
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Released GeoLink weights (.pth), or a run of ours.", metavar="FILE")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: beside the file.", metavar="DIR")
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Read released GeoLink weights; write an image encoder that timm loads.

    Says what was read, what was left and why. Files that hold more than plain tensors are refused.

    \b
    Examples:
      rsosm convert geolink_large.pth --output geolink/
      rsosm convert rsosm-data/runs/geolink-1f0c2a9d
    """

    def work(state: State) -> Result:
        from rsosm_cli.pipeline.convert import convert

        return convert(
            file, root=state.root, output=output, dry_run=dry_run, force=force, progress=state.console.progress()
        )

    finish(ctx, work)
