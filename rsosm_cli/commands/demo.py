"""``rsosm demo``."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from rsosm_cli.commands.options import Force, State, finish
from rsosm_cli.pipeline.result import Result


def command(ctx: typer.Context, force: Force = False) -> None:
    """Run the whole chain, offline, on a small town that is made on the spot.

    Makes an OSM file, a picture from above and land-use labels of a town that does not exist, then fetches, builds,
    pretrains, finetunes, embeds and maps it with the very functions of the other commands: a few minutes on two cores.

    \b
    Examples:
      rsosm demo
      rsosm --root try demo
    """

    def work(state: State) -> Sequence[Result]:
        from rsosm_cli.pipeline.demo import demo

        return demo(root=state.root, force=force, progress=state.console.progress())

    finish(ctx, work)
