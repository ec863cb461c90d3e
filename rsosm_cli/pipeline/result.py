"""What every command returns: the one object behind the table and the ``--json``."""

from __future__ import annotations

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
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
