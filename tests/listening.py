"""A listener to progress that keeps what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rsosm_cli.progress import Advance


@dataclass
class Task:
    label: str
    total: float | None
    done: float = 0.0
    most: float = 0.0  # the farthest that it was

    def advance(self, units: float = 1, /) -> None:
        self.done += units
        self.most = max(self.most, self.done)


class Listener:
    def __init__(self) -> None:
        self.tasks: list[Task] = []

    @contextmanager
    def task(self, label: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        self.tasks.append(Task(label, total))
        yield self.tasks[-1].advance
