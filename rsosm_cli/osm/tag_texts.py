"""All tags of an element in one value: a mapping, pairs, JSON, hstore, ``key=value;key=value`` or ``key:value;...``."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_EQUATED = re.compile(r"[\w:.-]+\s*=")
_HSTORE = re.compile(r'"((?:[^"\\]|\\.)*)"\s*=>\s*"((?:[^"\\]|\\.)*)"')
# The first colon of these belongs to a time or an address, the equals sign to an address: no key ends there.
_NO_KEY = {":": re.compile(r"[^:]*(?:\b\d{1,2}:\d\d\b|\w://)"), "=": re.compile(r"[^=]*://")}


def unpacked(value: Any, sign: str | None = None) -> dict[str, str] | None:
    """Return the tags that a value holds, ``None`` where it says something, but no tags.

    ``sign``: what stands between keys and values in the texts beside it (:func:`sign_of`), where its own may be read
    in two ways.
    """
    if value is None or (isinstance(value, float) and value != value):
        return {}
    if isinstance(value, dict):
        return {str(k): str(v) for k, v in value.items() if v is not None}
    if isinstance(value, str):
        return _of_text(value.strip(), sign)
    items = list(value)
    pairs = {str(p[0]): str(p[1]) for p in items if isinstance(p, tuple | list) and len(p) == 2}
    words = ";".join(part for part in items if isinstance(part, str))
    return pairs | (_of_text(words, sign) or {}) or (None if items else {})


def sign_of(values: Iterable[Any]) -> str | None:
    """Return which sign most texts of a column have after their keys, ``None`` where they do not tell."""
    return _vote([part for value in values if isinstance(value, str) for part in _parts(value)])


def _of_text(text: str, sign: str | None) -> dict[str, str] | None:
    if text.startswith(("{", "[")):
        written = _written(text)
        return None if written is None or isinstance(written, str) else unpacked(written, sign)
    if "=>" in text and (hstore := _HSTORE.findall(text)):
        return {_ESCAPED.sub(r"\1", k): _ESCAPED.sub(r"\1", v) for k, v in hstore}
    parts = _parts(text)
    if not parts:
        return {}
    sign = _sign(parts[0]) or _sign_of_all(parts) or sign or _vote(parts) or "="
    tags: dict[str, str] = {}
    last = None
    for part in parts:
        key, found, rest = (piece.strip() for piece in part.partition(sign))
        if found and key and not _NO_KEY[sign].match(part):
            last, tags[key] = key, rest
        elif last is not None:  # several values of one key, or a semicolon in a text
            tags[last] = f"{tags[last]};{part}" if tags[last] else part
    return {k: v for k, v in tags.items() if v} or None


def _parts(text: str) -> list[str]:
    return [part for part in (part.strip() for part in text.split(";")) if part]


def _sign(part: str) -> str | None:
    """Return the sign after the key; ``None`` for ``a:b=c``, where ``a`` and ``a:b`` may be it, and without any."""
    key, equals, _ = part.partition("=")
    if ":" not in key:
        return "=" if equals else ":" if ":" in part else None
    return None if equals and _EQUATED.match(part) else ":"


def _sign_of_all(parts: Sequence[str]) -> str | None:
    # As OSM's own tools write it, where all is of that form: values may hold equals signs, and keys colons.
    return "=" if all(_EQUATED.match(part) for part in parts) else None


def _vote(parts: Sequence[str]) -> str | None:
    signs = [_sign(part) for part in parts if not _NO_KEY[":"].match(part)]
    equals, colons = signs.count("="), signs.count(":")
    return None if equals == colons else "=" if equals > colons else ":"


def _written(text: str) -> Any:
    """Return what a text is in JSON, or as Python writes it (so GeoPandas does in formats without mappings)."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(text)
    return None
