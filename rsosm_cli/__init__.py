"""rsosm: from a city's name to its map.

The functions behind the commands are the Python interface: ``from rsosm_cli import fetch, build_graph, pretrain,
finetune, embed, map, evaluate, convert, info, demo, make_town``, with ``Result``, ``resolve`` for settings and
``RsosmError``. Each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rsosm_cli.errors import RsosmError
    from rsosm_cli.pipeline.build_graph import build_graph
    from rsosm_cli.pipeline.cities import each_city
    from rsosm_cli.pipeline.convert import convert
    from rsosm_cli.pipeline.demo import demo
    from rsosm_cli.pipeline.embed import embed
    from rsosm_cli.pipeline.evaluate import evaluate
    from rsosm_cli.pipeline.fetch import fetch
    from rsosm_cli.pipeline.finetune import finetune
    from rsosm_cli.pipeline.info import info
    from rsosm_cli.pipeline.map import map_city as map
    from rsosm_cli.pipeline.pretrain import pretrain
    from rsosm_cli.pipeline.result import Result
    from rsosm_cli.settings import resolve
    from rsosm_cli.town.make import make_town

__all__ = [
    "Result",
    "RsosmError",
    "__version__",
    "build_graph",
    "convert",
    "demo",
    "each_city",
    "embed",
    "evaluate",
    "fetch",
    "finetune",
    "info",
    "make_town",
    "map",
    "pretrain",
    "resolve",
]

# Name: module, and the name there. A module is heavy: it is imported when its name is first used.
_HOMES = {
    "RsosmError": ("errors", "RsosmError"),
    "Result": ("pipeline.result", "Result"),
    "resolve": ("settings", "resolve"),
    "make_town": ("town.make", "make_town"),
    "each_city": ("pipeline.cities", "each_city"),
    "map": ("pipeline.map", "map_city"),
    **{
        name: (f"pipeline.{name}", name)
        for name in (
            "build_graph", "convert", "demo", "embed", "evaluate", "fetch", "finetune", "info", "pretrain",
        )
    },
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _HOMES[name]
    found = getattr(importlib.import_module(f"{__name__}.{module}"), inside)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
