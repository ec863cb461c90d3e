"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called with the number of units finished since the last call."""

    def __call__(self, units: float = 1, /) -> None: ...


class Progress(Protocol):
    """A listener: the console draws bars or prints lines; a notebook may pass its own."""

    def task(self, label: str, total: float | None, unit: str = "") -> AbstractContextManager[Advance]:
        """Return a context manager that yields an :class:`Advance`."""
        ...


class Silent:
    """The listener that shows nothing: the default of every library function."""

    @contextmanager
    def task(self, label: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        def advance(units: float = 1, /) -> None:
            return None

        yield advance


SILENT = Silent()
