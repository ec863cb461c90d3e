"""What every group of settings shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def fill_compat(values: Any, **released: Any) -> Any:
    if isinstance(values, Mapping) and values.get("compat") == "released":
        return {**released, **values}
    return values
