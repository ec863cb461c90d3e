"""How the help of rsosm and of its commands is laid out: usage, text, and a panel for each group of options.

A help text and a completion have to come at once. Typer's own layout imports Rich with a Markdown parser and a syntax
highlighter, and its conversion of options pydantic: four times what these pages need, and twice what a completion does.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_WIDEST = 120  # characters: longer lines are hard to read
_ROUND, _PLAIN = tuple("╭─╮│╰╯"), tuple("+-+|++")


def paragraphs(doc: str | None) -> list[str]:
    """Return a docstring's paragraphs, each on one line; one that begins with a backspace as it is written."""
    parts = inspect.cleandoc(doc or "").split("\n\n")
    return [p.removeprefix("\b\n") if p.startswith("\b") else " ".join(p.split()) for p in parts if p]


class Command(TyperCommand):
    """A command whose help has a panel for each group of options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _keep_words(self, ctx)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


class Group(TyperGroup):
    """A group of commands whose help has a panel for each group of options and of commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _keep_words(self, ctx, asked=not set(args).isdisjoint(ctx.help_option_names))
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = {n: c for n in self.list_commands(ctx) if (c := self.get_command(ctx, n)) is not None}
        _print_help(self, ctx, commands)


def _keep_words(command: Any, ctx: Any, asked: bool = False) -> None:
    """Leave words as they are typed for a completion, or where the help is ``asked`` for: pydantic converts them."""
    if not (ctx.resilient_parsing or asked):
        return

    def unconverted(process: Callable[[Any, Any], Any], always: bool) -> Callable[[Any, Any], Any]:
        return lambda ctx, value: value if always or not value else process(ctx, value)

    for param in command.get_params(ctx):
        param.process_value = unconverted(param.process_value, ctx.resilient_parsing or param.callback is None)


def value_word(hint: Any) -> str:
    """Return a word for the value that an option of this type takes; none for a switch."""
    base = (typing.get_args(hint) or (hint,))[0]
    if isinstance(base, types.UnionType):
        base = next(arg for arg in base.__args__ if arg is not types.NoneType)
    if typing.get_origin(base) is list:
        base = typing.get_args(base)[0]
    if isinstance(base, type) and issubclass(base, Enum):
        return "|".join(base.__members__)
    return {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}.get(base, "")


def _print_help(command: Any, ctx: Any, commands: dict[str, Any] | None = None) -> None:
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = ["", f" {typer.style(command.get_usage(ctx), bold=True)}", ""]
    for paragraph in paragraphs(command.help):
        lines += [f" {line}" for line in _wrapped(paragraph, width - 2)] + [""]
    panels: dict[str, list[tuple[str, ...]]] = {"Arguments": [], "Options": []}  # those of every command come first
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            plain = "Arguments" if param.param_type_name == "argument" else "Options"
            panels.setdefault(_panel(param) or plain, []).append(_row(param, hints.get(param.name)))
    for title, rows in panels.items():
        lines += _boxed(title, rows, [max(map(len, column)) for column in zip(*rows, strict=True)], width)
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, one in (commands or {}).items():
        groups.setdefault(_panel(one) or "Commands", []).append((name, paragraphs(one.help)[0]))
    for title, rows in groups.items():
        lines += _boxed(title, rows, [max(map(len, commands or {})), 0], width)
    typer.echo("\n".join(lines))


def _panel(item: Any) -> str:
    named = getattr(item, "rich_help_panel", None)
    return named if isinstance(named, str) else ""


def _row(param: Any, hint: Any) -> tuple[str, str, str]:
    """Return the names of a parameter, the value that it takes, and what it does."""
    about = [param.help or ""]
    if getattr(param, "show_envvar", False) and param.envvar:
        about.append(f"[env: {param.envvar}]")
    default = getattr(param.default, "value", param.default)
    if default not in (None, False, ()) and not callable(default) and not param.is_eager:
        about.append(f"[default: {default}]")
    if param.required:
        about.append("[required]")
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper(), "", " ".join(about)
    names = sorted(param.opts, key=lambda name: name.startswith("--"))  # the short one first
    return ", ".join(names), param.metavar or value_word(hint), " ".join(about)


def _boxed(title: str, rows: list[tuple[str, ...]], widths: list[int], width: int) -> list[str]:
    """Return the lines of a panel: a frame ``width`` wide around columns, of which the last takes what is left."""
    if not rows:
        return []
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    left, bar, right, side, low_left, low_right = _ROUND if encoding.lower().startswith("utf") else _PLAIN
    head = f"{left}{bar} {title} "
    lines = [head + bar * (width - len(head) - 1) + right]
    *named, _ = widths
    colours = (typer.colors.CYAN, typer.colors.YELLOW)
    for row in rows:
        last = _wrapped(row[-1], max(width - 4 - sum(w + 2 for w in named), 20))
        for number, text in enumerate(last):
            cells = [(cell if number == 0 else "").ljust(w) for cell, w in zip(row, named, strict=False)]
            inside = "  ".join([*cells, text])
            shown = "  ".join([*(typer.style(c, fg=f) for c, f in zip(cells, colours, strict=False)), text])
            lines.append(f"{side} {shown}{' ' * (width - 4 - len(inside))} {side}")
    return [*lines, low_left + bar * (width - 2) + low_right]


def _wrapped(text: str, width: int) -> list[str]:
    """Return text as lines of at most ``width``; further lines of an example are indented below its first."""
    found: list[str] = []
    for line in text.splitlines() or [""]:
        indent = " " * (len(line) - len(line.lstrip()))
        more = indent + "    " if indent else ""
        found += textwrap.wrap(line, width, subsequent_indent=more, break_on_hyphens=False) or [""]
    return found
