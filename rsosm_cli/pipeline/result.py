"""What every command returns: the one object behind the table and the ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["done", "skipped", "planned", "failed"]


@dataclass(frozen=True)
class Result:
    """Outcome of one command for one city (or one run).

    ``paths``: name to file. ``numbers``: name to count or measure, units in the name. ``notes``: what was found, chosen
    or counted out, one sentence each. ``planned`` is what ``--dry-run`` returns.
    """

    command: str
    subject: str
    status: Status
    paths: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    exit_status: int = 0  # of a command that did this alone
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def exit_status(results: Sequence[Result]) -> int:
    """Return the exit status of a command with these results: 3 where some failed and others did not."""
    failed = [r.exit_status or 1 for r in results if r.status == "failed"]
    if not failed:
        return 0
    return (
        failed[0]
        if len(failed) == len(results) and len(set(failed)) == 1
        else (1 if len(failed) == len(results) else 3)
    )
