"""The errors of rsosm: one sentence for the user, the data of the failure for a caller."""

from __future__ import annotations

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
