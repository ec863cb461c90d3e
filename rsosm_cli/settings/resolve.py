"""How a preset, the user's YAML, options and ``--set`` make the settings of a command."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rsosm_cli.errors import UsageError
from rsosm_cli.presets import preset_names, presets_dir
from rsosm_cli.settings.base import Settings

_LISTED = 25  # keys that an error lists at most

S = TypeVar("S", bound="Settings")


def resolve(
    schema: type[S],
    *,
    kind: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    options: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> S:
    """Return settings from, later over earlier: preset, the user's YAML, options, ``a.b=value`` assignments.

    A YAML may say ``extends: NAME`` (a packaged preset of ``kind``) or ``extends: other.yaml`` (beside it).
    ``options`` maps dotted keys to values; ``None`` means "not given". Raises :class:`UsageError`.
    """
    given: list[tuple[str, dict[str, Any]]] = []  # who says it, and what
    if preset is not None:
        given.append((f"preset {preset}", load_preset(kind or "", preset)))
    if config is not None:
        given.append((str(config), load_yaml(config, kind)))
    for key, value in (options or {}).items():
        if value is not None:
            given.append(("the command line", _nested(key, value)))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"--set {assignment!r} is not of the form key=value.",
                hint="For example: --set optim.epochs=5",
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        given.append((f"--set {assignment}", _nested(key.strip(), value)))
    merged: dict[str, Any] = {}
    for _, values in given:
        _merge(merged, values)
    where = str(config) if config is not None else (f"preset {preset}" if preset else "the settings")
    return validate(schema, merged, where, given)


def validate(
    schema: type[S], values: Mapping[str, Any], where: str, given: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> S:
    """Return ``values`` as ``schema``; an error names the file, the key, the value and the nearest known key.

    ``given``: who said which of the values, later over earlier; what none of them says is blamed on ``where``.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        key = error.errors()[0]["loc"]
        blamed = next((who for who, said in reversed(given) if key and _says(said, key)), where)
        raise UsageError(f"{blamed}: {_explain(schema, error)}") from None


def _says(values: Any, key: Sequence[int | str]) -> bool:
    """Return whether ``values`` hold what an error is about; positions in lists are of the key before them."""
    for part in key:
        if not isinstance(values, Mapping):
            return True
        if part not in values:
            return False
        values = values[part]
    return True


def load_preset(kind: str, name: str) -> dict[str, Any]:
    path = presets_dir(kind) / f"{name}.yaml"
    if not path.is_file():
        known = preset_names(kind)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
        what = "task" if kind == "tasks" else "preset"
        raise UsageError(f"There is no {what} {name!r}.", hint=hint, value=name, known=known)
    return load_yaml(path, kind)


def load_yaml(path: Path, kind: str | None = None, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a YAML mapping with its ``extends`` resolved."""
    path = path.resolve()
    if path in _seen:
        raise UsageError(f"{path.name} extends itself.", hint="Remove one `extends` of the circle.")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path} is not readable YAML{where}: {error.problem or 'it breaks off'}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UsageError(f"{path} is not readable YAML.", hint="It must be text in UTF-8.") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not keys and values.")
    base = loaded.pop("extends", None)
    if base is None:
        return loaded
    beside = path.parent / str(base)
    if str(base).endswith((".yaml", ".yml")):
        merged = load_yaml(beside, kind, (*_seen, path))
    elif kind is None:
        raise UsageError(
            f"{path} extends {str(base)!r}, and this command has no presets.",
            hint="Name another file beside it: `extends: other.yaml`.",
        )
    else:
        merged = load_preset(kind, str(base))
    _merge(merged, loaded)
    return merged


def dump(settings: Settings) -> str:
    """Return settings as YAML, every key spelled out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        for group in groups_of(field.annotation):
            keys += _known_keys(group, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def groups_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the schemas that a key may hold: one group, or one a method."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _nearest(key: str, known: list[str]) -> str:
    """Return a sentence with the known key nearest to a wrong one: of its own group, else of its name in another."""
    group, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    elsewhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    for names, cutoff in ((beside, 0.7), (elsewhere, 0.8), (beside, 0.6)):
        close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
        if close:
            return f"Did you mean {names[close[0]]!r}?"
    if beside and len(beside) < _LISTED:
        return f"{group or 'The top level'} has the keys {', '.join(beside)}."
    close = difflib.get_close_matches(name, list(beside or elsewhere), n=1, cutoff=0.0)
    return f"Did you mean {(beside or elsewhere)[close[0]]!r}?"


def _explain(schema: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}. {_nearest(key, _known_keys(schema))}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{message}."
    given = first.get("input")
    shown = f" = {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    return f"key {key!r}{shown}: {message[0].lower()}{message[1:]}."
