"""Addresses as they may be shown and recorded: passwords, keys and tokens hidden."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit, urlunsplit

HIDDEN = "***"
# What kind of service an address is, said before it: wmts:https://...
_PREFIX = re.compile(r"(wmts|tms|stac):(?=https?://)")
_PLACEHOLDER = re.compile(r"\{(-?[A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_NAME = re.compile(
    r"key|token|secret|signature|sig$|auth|password|passwd|credential|subscription|^api$|^tk$", re.IGNORECASE
)
# A run of 24 letters and digits mixed is a key, not a word, wherever it stands in an address.
_SECRET_VALUE = re.compile(r"(?=[\w.-]*\d)(?=[\w.-]*[A-Za-z])[\w.-]{24,}")


def display(source: str) -> str:
    """Return a source as it may be shown and recorded: passwords, keys and tokens in an address hidden."""
    if "://" not in source:
        return source
    if (prefix := _PREFIX.match(source)) is not None:
        return prefix[0] + display(source[prefix.end() :])
    parts = urlsplit(source)
    path = _SECRET_VALUE.sub(HIDDEN, parts.path)
    query = "&".join(
        f"{name}={value}" if _PLACEHOLDER.search(value) else f"{name}={_hidden(name, value)}"
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
    )
    return urlunsplit((parts.scheme, host_of(source), path, query, _SECRET_VALUE.sub(HIDDEN, parts.fragment)))


def host_of(address: str) -> str:
    """Return host and port of an address, a user's name and password hidden."""
    netloc = urlsplit(address).netloc
    host = netloc.rpartition("@")[2]
    return f"{HIDDEN}@{host}" if "@" in netloc else host


def _hidden(name: str, value: str) -> str:
    if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
        return HIDDEN
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):  # an address within an address
        try:
            shown = display(value)
        except ValueError:  # no address after all
            return value
        return shown if HIDDEN in shown else value
    return value
