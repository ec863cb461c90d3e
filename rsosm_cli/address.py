"""Addresses: as they may be shown and recorded, with passwords, keys and tokens hidden; and told apart by a hash.

What is shown is hidden by the name of a parameter, broadly. A value of another name, a path or a fragment says which
imagery it is (a mosaic, a layer, an id), and is shown as it is, but for values of a query that can only be secrets. A
key within a path is for the environment: ``https://host/{MY_KEY}/{z}/{x}/{y}.png``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from urllib.parse import quote, quote_plus, unquote_plus, urlsplit, urlunsplit

from rsosm_cli.workspace import fingerprint

HIDDEN = "***"
# What kind of service an address is, said before it: wmts:https://...
_PREFIX = re.compile(r"(wmts|tms|stac):(?=https?://)")
_PLACEHOLDERS = re.compile(r"(\{-?[A-Za-z_][A-Za-z0-9_]*\})+")
# An address within an address, as the parameter of a renderer: url=https%3A%2F%2F...
_INNER = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"key|token|secret|signature|sig$|auth(?!or(?!i[sz]))|password|passwd|pwd|credential|subscription|session|jwt|ticket"
    r"|^x-(amz|goog)-|^(api|tk|app_?id|access|code|pass|pw|sas|connect_?id)$",
    re.IGNORECASE,
)
# Names that mean a key and nothing else, without their hyphens: one address with another key is the same imagery. The
# names above are more, as what is hidden wrongly does little harm, but imagery that is taken for another does much.
_KEY_NAME = re.compile(
    r"(api|access|auth|user|subscription|license)?(key|token)|appid|connectid|tk|jwt|sig|signature|secret|password|passwd"
    r"|pwd|auth|x(amz|goog).*",
    re.IGNORECASE,
)
# In a path a token is known by the segment before it: /wmts/token/5f0c.../1.0.0/
_SECRET_SEGMENT = re.compile(r"(?<=/)((?:access|api|auth)?[_-]?(?:token|key)/)([\w-]{16,})(?=/|$)", re.IGNORECASE)
_JWT = re.compile(r"([a-z]{2}\.)?eyJ[\w-]{8,}(\.[\w-]*){0,2}")
_WORD = re.compile(r"[A-Za-z]{1,12}")


def display(source: str) -> str:
    """Return a source as it may be shown and recorded: passwords, keys and tokens in an address hidden."""
    return _without(source, _shown)


def identity(source: str) -> str:
    """Return 16 hex digits that tell a source from others: not by its keys, user and password, but by all else."""
    return fingerprint(_without(source, _told))


def host_of(address: str) -> str:
    """Return host and port of an address, a user's name and password hidden."""
    try:
        netloc = urlsplit(address).netloc
    except ValueError:  # as http://[::1
        return HIDDEN
    host = netloc.rpartition("@")[2]
    return f"{HIDDEN}@{host}" if "@" in netloc else host


def unfilled(text: str, secrets: Mapping[str, str]) -> str:
    """Return a text with the values of ``secrets`` (by name) turned back into ``{NAME}``, encoded ones too."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        for form in dict.fromkeys((value, quote(value, safe=""), quote_plus(value))):
            text = text.replace(form, f"{{{name}}}")
    return text


def _without(source: str, value_of: Callable[[str, str], str]) -> str:
    """Return a source without user, password, and what ``value_of`` hides of the parameters of its query."""
    if "://" not in source:
        return source
    if (prefix := _PREFIX.match(source)) is not None:
        return prefix[0] + _without(source[prefix.end() :], value_of)
    try:
        parts = urlsplit(source)
    except ValueError:  # no address: where in it a password may stand is not known
        return f"{source.partition('://')[0]}://{HIDDEN}"
    path = re.sub(r"(?<=://)[^/@]+@", f"{HIDDEN}@", _SECRET_SEGMENT.sub(rf"\1{HIDDEN}", parts.path))
    fragment = _parameters(parts.fragment, value_of) if "=" in parts.fragment else parts.fragment
    return urlunsplit((parts.scheme, host_of(source), path, _parameters(parts.query, value_of), fragment))


def _parameters(query: str, value_of: Callable[[str, str], str]) -> str:
    """Return a query with its values replaced; one without a name has the name ""."""
    written = []
    for part in re.split(r"([&;])", query):
        name, equals, value = part.partition("=")
        if equals and not (value.strip("=") == "" and _is_random(name)):  # = alone ends base64
            written.append(f"{name}={value_of(unquote_plus(name), value)}")
        else:
            written.append(value_of("", part) if part not in ("", "&", ";") else part)
    return "".join(written)


def _shown(name: str, value: str) -> str:
    """Return the value of a parameter as it may be shown."""
    plain = unquote_plus(value)
    if _PLACEHOLDERS.fullmatch(plain):
        return value
    if not name:  # ?wmts is a word, ?5f0c1e7a a token
        return value if _WORD.fullmatch(plain) else HIDDEN
    if _SECRET_NAME.search(name) or _is_random(plain):
        return HIDDEN
    return _inner(value, plain, display)


def _told(name: str, value: str) -> str:
    """Return the value of a parameter as far as it tells one source from another."""
    plain = unquote_plus(value)
    if _KEY_NAME.fullmatch(re.sub(r"[-_]", "", name)) and not _PLACEHOLDERS.fullmatch(plain):
        return HIDDEN
    return _inner(value, plain, lambda address: _without(address, _told))


def _inner(value: str, plain: str, hide: Callable[[str], str]) -> str:
    """Return a value, secrets of an address in it hidden."""
    if (address := _INNER.search(plain)) is None:
        return value
    hidden = plain[: address.start()] + hide(plain[address.start() :])
    return hidden if HIDDEN in hidden else value


def _is_random(value: str) -> bool:
    """Return whether a value can only be a secret: long, and of letters and digits as chance mixes them.

    Names of layers and mosaics are words and numbers with few changes from one to the other; ids of 24 hexadecimal
    digits (OpenAerialMap's) and UUIDs are ids.
    """
    if _JWT.fullmatch(value):
        return True
    if re.fullmatch(r"[0-9a-fA-F]+", value):
        return len(value) >= 32
    if not re.fullmatch(r"[A-Za-z0-9+/_=-]{24,}", value) or re.fullmatch(r"[0-9a-fA-F-]+", value):
        return False
    signs = value.rstrip("=")
    kinds = "".join("a" if c.islower() else "A" if c.isupper() else "0" if c.isdigit() else "-" for c in signs)
    changes = sum(one != other for one, other in pairwise(kinds))
    if {"a", "A", "0"} <= set(kinds) and changes >= 0.45 * len(kinds):  # of base64 it is six in ten
        return True
    letters = kinds.replace("A", "a")
    return "-" not in letters and sum(one != other for one, other in pairwise(letters)) >= 0.2 * len(letters)
