"""The command line ``rsosm``: global options, the commands, and how errors of usage are told.

Nothing heavy is imported here or in the modules of the commands: help and completion have to answer at once.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from rsosm_cli import __version__
from rsosm_cli.commands import build_graph, convert, demo, embed, evaluate, fetch, finetune, info, map_city, pretrain
from rsosm_cli.commands.help_page import Command, Group
from rsosm_cli.commands.options import State
from rsosm_cli.console import INTERRUPTED, Console
from rsosm_cli.pipeline.result import Result

COMMANDS = {
    "Data of a city": {"fetch": fetch, "build-graph": build_graph},
    "Learning": {"pretrain": pretrain, "finetune": finetune},
    "Maps": {"embed": embed, "map": map_city, "evaluate": evaluate},
    "Around": {"info": info, "convert": convert, "demo": demo},
}
_MODULES = {name: module for panel in COMMANDS.values() for name, module in panel.items()}
_CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Commands(Group):
    """The commands by name. The options of one are built when it is called: a list of the commands needs none."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _built(command.name), rest


@cache
def _built(name: str) -> Any:
    alone = typer.Typer(add_completion=False, context_settings=_CONTEXT)
    alone.command(name, cls=Command)(_MODULES[name].command)
    return get_command(alone)


_app = typer.Typer(name="rsosm", cls=_Commands, pretty_exceptions_enable=False, context_settings=_CONTEXT)


def _version(asked: bool) -> None:
    if asked:
        print(f"rsosm {__version__}")
        raise typer.Exit


_ABOUT = """From a city's name to its map: OpenStreetMap and imagery, pretraining, wall-to-wall GeoTIFFs.

The chain: fetch, build-graph, pretrain, finetune, embed, map. Each command tells what to run next, skips what is
finished, and goes on where an interruption left it.

\b
Begin with:
  rsosm demo     the whole chain on a made-up town, without a network
  rsosm info     what is there, and what to do next
"""


@_app.callback(help=_ABOUT, no_args_is_help=True)
def global_options(
    ctx: typer.Context,
    root: Annotated[
        Path | None,
        typer.Option(envvar="RSOSM_ROOT", help="Folder of all cities and runs; default: rsosm-data.", metavar="DIR"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a city to standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Detailed log; tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Keep the global options for the command."""
    ctx.obj = State(None if root is None else Path(root), Console(json=json, quiet=quiet, verbose=verbose))


def command_line() -> Any:
    """Return the whole command line: the global options, and the commands with their help."""
    line: Any = get_command(_app)
    for panel, modules in COMMANDS.items():
        for name, module in modules.items():
            line.add_command(Command(name, help=module.command.__doc__, rich_help_panel=panel))
    return line


# The classes behind Typer's errors, wherever the installed version keeps them.
_UsageFault: Any = typer.BadParameter.__mro__[1]
_GLOBAL_OPTIONS = ("--root", "--json", "--quiet", "--verbose", "--version")


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    command = command_line()
    try:
        status = command.main(args=args, prog_name="rsosm", standalone_mode=False)
    except _UsageFault as error:
        return _tell_usage(error, sys.argv[1:] if args is None else args)
    except typer.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a help text has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def _tell_usage(error: Any, args: list[str]) -> int:
    """Print one sentence about a wrong call, and where to look; return 2."""
    context = error.ctx
    if context is not None:
        path = context.command_path
    else:  # the parser does not say which command's option it is
        named = (arg for arg in args if arg in _MODULES)
        path = f"rsosm {next(named, '')}".rstrip()
    message = " ".join(error.format_message().split()).rstrip(".")
    if not message:  # no arguments at all: the help has been asked for
        print(context.get_help() if context is not None else "")
        return 2
    # Typer names the option, and not always the value.
    param = getattr(error, "param", None)
    given = _given(args, getattr(param, "opts", []), getattr(param, "nargs", 1))
    if given and not re.search(rf"(?<!\w){re.escape(given[0])}(?!\w)", message):
        message = f"{message} (given: {given[0]})"
    wrong = getattr(error, "option_name", "")
    if wrong in _GLOBAL_OPTIONS and path != "rsosm":
        hint = f"{wrong} stands before the command: rsosm {wrong} {path.removeprefix('rsosm ')} ..."
    else:
        hint = f"See {path} --help."
    console = Console(json="--json" in _before_command(args))
    console.err.print(f"Error: {message}. {hint}", style="bold red")
    if console.json:
        cities = _given(args, ["--city"])
        name = path.removeprefix("rsosm").strip() or "rsosm"
        subject = cities[0] if len(cities) == 1 else ""
        console.show([Result(name, subject, "failed", error=f"{message}. {hint}", exit_status=2)])
    return 2


def _given(args: list[str], names: list[str], count: int = 1) -> list[str]:
    """Return the values that an option of these names has on the command line, ``count`` words each."""
    apart = [" ".join(args[at + 1 : at + 1 + count]) for at, name in enumerate(args) if name in names]
    return apart + [arg.partition("=")[2] for arg in args if arg.partition("=")[0] in names and "=" in arg]


def _before_command(args: list[str]) -> list[str]:
    """Return the global options as they are typed: where a call is wrong, the parser keeps none of them."""
    at = 0
    while at < len(args) and args[at].startswith("-"):
        at += 2 if args[at] == "--root" else 1
    return [arg for number, arg in enumerate(args[:at]) if number == 0 or args[number - 1] != "--root"]


def main() -> None:
    """Entry point of the executable."""
    if "_RSOSM_COMPLETE" in os.environ:
        # Typer would import Rich, with a Markdown parser, to take markup out of texts that have none.
        sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
    sys.exit(run())
