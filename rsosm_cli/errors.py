"""The errors of rsosm: one sentence for the user, the data of the failure for a caller."""

from __future__ import annotations

import errno
import re
from typing import Any


class RsosmError(Exception):
    """Anything that a user can put right; shown as one sentence, without a traceback.

    ``message`` names the thing and the value, ``hint`` the next step; ``data`` carries the same for a program.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "", **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword arguments are lost by the default pickling, and errors cross process pools.
        return _rebuild, (type(self), self.message, self.hint, self.data)


def _rebuild(kind: type[RsosmError], message: str, hint: str, data: dict[str, Any]) -> RsosmError:
    return kind(message, hint=hint, **data)


class UsageError(RsosmError, ValueError):
    """A wrong option, setting or configuration file."""

    exit_status = 2


class MissingError(RsosmError, LookupError):
    """A city, file, run or object that is not there."""


class NoFileError(MissingError):
    """A file named by the user that does not exist: a wrong call, as any other wrong option."""

    exit_status = 2


class SourceError(RsosmError, OSError):
    """A service or a user's source file that does not deliver what is needed."""

    def __str__(self) -> str:
        return RsosmError.__str__(self)


class FormatError(RsosmError, ValueError):
    """A damaged file, or one of a format or version that this rsosm does not read."""


class DiskError(RsosmError, OSError):
    """Not enough room, or a path that cannot be written."""

    def __str__(self) -> str:
        return RsosmError.__str__(self)


def explain(error: BaseException) -> str:
    """Return one sentence (or two) about any error: what happened, and what to do next."""
    if isinstance(error, RsosmError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        what = text or type(error).__name__
        return f"There is not enough memory ({what}). Try a smaller --batch-size or fewer --workers."
    if isinstance(error, OSError):
        # h5py and GDAL pass the number on in their text only.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text.lower()
        name = f" {error.filename}" if error.filename else ""
        if full:
            return f"The disk is full: the file{name} was not written. Free some space and run the command again."
        if isinstance(error, PermissionError):
            return f"Permission to the file{name} is denied. Change its mode or choose another place."
        if error.strerror and name:
            return f"The file{name} cannot be used: {error.strerror.lower()}. Check its path and its folder's mode."
    return (
        f"Unexpected {type(error).__name__}: {text or 'no message'}. This is a fault of rsosm: run the command "
        "again with `rsosm --verbose` and report what it says."
    )


def printable(text: str) -> str:
    """Return text that UTF-8 can hold: bytes that were none on the command line are shown escaped, as ``\\xff``."""
    return re.sub("[\ud800-\udfff]", lambda m: ascii(m[0])[1:-1].replace("\\udc", "\\x"), text)
