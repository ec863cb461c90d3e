"""The shape of a ``manifest.json``, checked once where it is read: what reads it later trusts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NUMBER = (int, float)
_MAYBE_TEXT = (str, type(None))
_MAYBE_LIST = (list, type(None))
_WORDS: dict[Any, str] = {
    str: "text", dict: "an object", list: "a list", _NUMBER: "a number", _MAYBE_TEXT: "text or null",
    _MAYBE_LIST: "a list or null",
}  # fmt: skip

# A kind, or by name those of an object's values, or in a list that of every item. Names that are not listed may hold
# anything: records carry facts that nothing reads again.
_ASKED = {
    "boundary": _MAYBE_TEXT, "osm_id": _MAYBE_TEXT, "service": _MAYBE_TEXT, "date": _MAYBE_TEXT, "bbox": _MAYBE_LIST,
    "files": [str],
}  # fmt: skip
_DONE = {"name": str, "numbers": dict, "notes": [str]}
_STEP = _DONE | {
    "key": str, "files": dict, "finished": str, "seconds": _NUMBER, "sources": [dict], "parts": dict, "names": dict,
    "asked": _ASKED, "elements_asked": _ASKED, "extract": {"asked": str}, "overpass": {"asked": str},
    "chosen": _MAYBE_LIST,
}  # fmt: skip


def misfit(manifest: Any) -> str:
    """Return what of a manifest has another shape than rsosm writes; nothing where all of it fits."""
    found = _misfit(manifest, {**_DONE, "steps": dict, "imagery_not_yet": [str]}, "")
    if found:
        return found
    name = manifest.get("name", "")
    if not is_text(name):  # JSON can escape what UTF-8 cannot hold
        return "`name` is not text"
    for step, record in manifest.get("steps", {}).items():
        # Of the tiles the inputs are stamps by name of file, of all that is fetched a list of sources.
        inputs = dict if step == "build-graph" else [str] if step.startswith("fetch:") else object
        if found := _misfit(record, {**_STEP, "inputs": inputs}, f"steps.{step}"):
            return found
    return ""


def is_text(name: str) -> bool:
    """Return whether UTF-8 can hold a name: not where bytes of another encoding stand in it as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _misfit(value: Any, shape: Any, where: str) -> str:
    kind = dict if isinstance(shape, Mapping) else list if isinstance(shape, list) else shape
    if not isinstance(value, kind):
        return f"{f'`{where}`' if where else 'it'} is not {_WORDS[kind]}"
    if isinstance(shape, Mapping):
        inside = ((value[name], part, f"{where}.{name}") for name, part in shape.items() if name in value)
    else:
        items = value if isinstance(shape, list) else ()
        inside = ((item, shape[0], f"{where}.{number}") for number, item in enumerate(items))
    return next(filter(None, (_misfit(one, part, place.lstrip(".")) for one, part, place in inside)), "")
