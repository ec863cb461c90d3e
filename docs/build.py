"""Makes what in ``docs/`` and ``completions/`` comes from the code: option tables, setting tables, scripts.

``python docs/build.py`` rewrites the files; a test fails where one is stale.
"""

from __future__ import annotations

import datetime
import inspect
import os
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.models
from pydantic import BaseModel

from rsosm_cli.app import COMMANDS, global_options
from rsosm_cli.commands.help_page import value_word
from rsosm_cli.graph.relations import relation_table
from rsosm_cli.osm.rules import AREA_KEYS
from rsosm_cli.presets import preset_names
from rsosm_cli.settings import (
    MODELS,
    BuildSettings,
    FetchSettings,
    MapSettings,
    PretrainSettings,
    RootSettings,
    TaskSettings,
    load_preset,
)
from rsosm_cli.settings.resolve import groups_of

REPOSITORY = Path(__file__).resolve().parents[1]
START, END = "<!-- made by docs/build.py -->", "<!-- end -->"
SCHEMAS: dict[str, type[BaseModel]] = {
    "config.yaml of a root": RootSettings,
    "fetch": FetchSettings,
    "build-graph": BuildSettings,
    "pretrain": PretrainSettings,
    "finetune (tasks)": TaskSettings,
    "map": MapSettings,
}


def made() -> dict[Path, str]:
    """Return every file that comes from the code, whole or in part, with its text."""
    files = {}
    for modules in COMMANDS.values():
        for name, module in modules.items():
            page = REPOSITORY / "docs" / "commands" / f"{name}.md"
            files[page] = _between(page, options_table(module.command))
    overview = REPOSITORY / "docs" / "commands" / "README.md"
    files[overview] = _between(overview, options_table(global_options))
    formats = REPOSITORY / "docs" / "formats.md"
    files[formats] = _between(formats, _area_table())
    settings = REPOSITORY / "docs" / "settings.md"
    files[settings] = _between(settings, "\n\n".join(_settings()))
    methods = REPOSITORY / "docs" / "methods.md"
    files[methods] = _between(methods, relation_table().rstrip())
    for shell in ("bash", "zsh", "fish"):
        files[REPOSITORY / "completions" / f"rsosm.{shell}"] = _completion(shell)
    return files


def _between(page: Path, text: str) -> str:
    """Return a page with ``text`` in place of what stands between the marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{text}\n\n{END}{after}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def options_table(command: Any) -> str:
    """Return the arguments and options of a command as tables, one a panel of its help."""
    panels: dict[str, list[tuple[str, ...]]] = {}
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        info = next(
            (m for m in getattr(hints[name], "__metadata__", ()) if isinstance(m, typer.models.ParameterInfo)), None
        )
        if info is None:
            continue
        given = info.metavar or ""
        if isinstance(info, typer.models.ArgumentInfo):
            spelled = f"`{given or name.upper()}`"
            given = ""
        else:
            # In `Annotated`, the first name is where the default would be.
            first = [info.default] if isinstance(info.default, str) and info.default.startswith("-") else []
            names = [*first, *(info.param_decls or ())] or [f"--{name.replace('_', '-')}"]
            spelled = ", ".join(f"`{n}`" for n in names)
            given = given or value_word(hints[name])
        default = parameter.default
        if default in (None, False, inspect.Parameter.empty):
            default = ""
        shown = f"`{getattr(default, 'value', default)}`" if default != "" else ""
        panel = info.rich_help_panel if isinstance(info.rich_help_panel, str) else "Options"
        panels.setdefault(panel, []).append((spelled, f"`{given}`" if given else "", info.help or "", shown))
    head = ("Option", "Value", "What it does", "Default")
    return "\n\n".join(f"**{panel}**\n\n{_table(head, rows)}" for panel, rows in panels.items())


def _settings() -> Iterator[str]:
    for title, schema in SCHEMAS.items():
        yield f"## {title}\n\n{_keys_table(_keys(schema))}"
        if schema is PretrainSettings:
            for method in ("rose", "mmgr"):
                keys = _keys(MODELS[method], "model.")
                yield f"### The model of `--method {method}`\n\n{_keys_table(keys)}"
    for kind, title in (("pretrain", "Presets of `pretrain`"), ("tasks", "Packaged tasks")):
        rows = [(f"`{name}`", _first_comment(kind, name), _summary(kind, name)) for name in preset_names(kind)]
        yield f"## {title}\n\n{_table(('Name', 'What it is', 'Says'), rows)}"


def _area_table() -> str:
    rows = []
    for key, values in AREA_KEYS.items():
        every = values[0] == "*"
        named = ", ".join(f"`{value.removeprefix('-')}`" for value in values if value != "*")
        rows.append((f"`{key}`", ("every, but not " + named if named else "every") if every else named))
    return _table(("Key", "Values that make a closed way an area"), rows)


def _keys_table(keys: Iterator[tuple[str, str, str, str]]) -> str:
    rows = [(f"`{key}`", kind, default, text) for key, kind, default, text in keys]
    return _table(("Key", "Type", "Default", "What it is"), rows)


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in schema.model_fields.items():
        if groups := groups_of(field.annotation):
            # Of several, one a method, the first is of the default method.
            yield from _keys(groups[0], f"{prefix}{name}.")
            continue
        if field.is_required():
            yield f"{prefix}{name}", _type_name(field.annotation), "(must be given)", field.description or ""
            continue
        default = repr(field.get_default(call_default_factory=True))
        if len(default) > 60:
            default = f"{default[:50]}..."
        yield f"{prefix}{name}", _type_name(field.annotation), f"`{default}`", field.description or ""


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(a) for a in args)
    if origin is tuple:
        inside = [_type_name(a) for a in args if a is not Ellipsis]
        return f"list of {inside[0]}" if Ellipsis in args else f"({', '.join(inside)})"
    if annotation is type(None):
        return "none"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group"
    names = {int: "whole number", float: "number", str: "text", bool: "yes or no", datetime.date: "day"}
    return names.get(annotation, str(annotation))


def _first_comment(kind: str, name: str) -> str:
    """Return the comment at the head of a preset."""
    from rsosm_cli.presets import presets_dir

    lines = (presets_dir(kind) / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# ").strip())
    return " ".join(head)


def _summary(kind: str, name: str) -> str:
    loaded = load_preset(kind, name)
    if kind == "tasks":
        return ", ".join(c["name"] for c in loaded.get("classes", ())) or str(loaded.get("unit", ""))
    model = loaded.get("model", {})
    return str(model.get("image_encoder", "")) if isinstance(model, dict) else ""


def _completion(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rsosm_cli"], cwd=REPOSITORY, env={**os.environ, "_RSOSM_COMPLETE": f"source_{shell}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def main() -> None:
    for path, text in made().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
