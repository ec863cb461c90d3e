"""The table of cities whose relation is known (``configs/cities.yaml``)."""

from __future__ import annotations

from functools import cache

from rsosm_cli.places.extract import normal
from rsosm_cli.presets import presets_dir


@cache
def _table() -> dict[str, str]:
    import yaml

    path = presets_dir("") / "cities.yaml"
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {normal(name): str(entry["osm_id"]) for entry in entries for name in entry["names"]}


def known_id(name: str) -> str | None:
    """Return the relation (``R912940``) that a city's name means, ``None`` where the table does not know it."""
    return _table().get(normal(name))
