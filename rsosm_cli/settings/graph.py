"""Settings of `build-graph`: the grid of tiles, and the graphs on it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rsosm_cli.settings.base import Settings, fill_compat

# Keys that say how an element was mapped, or whom it belongs to, not what it is.
DEFAULT_EXCLUDED_KEYS: tuple[str, ...] = (
    "source", "source:*", "created_by", "tiger:*", "attribution", "import", "import_uuid", "note", "note:*",
    "fixme", "FIXME", "comment", "ref:*", "gnis:*", "NHD:*", "KSJ2:*", "CLC:*", "massgis:*", "lacounty:*",
    "chicago:*", "nycdoitt:*", "osak:*", "addr:housenumber", "addr:housename", "addr:interpolation",
    "addr:postcode", "addr:unit", "phone", "contact:*", "fax", "email", "website", "url", "image", "wikidata",
    "wikipedia", "wikipedia:*", "mapillary", "survey:date", "check_date", "check_date:*", "HH_LINK", "*:wikidata",
    "*:wikipedia", "generator:url", "*:url",
)  # fmt: skip
# Names say who, not what; they are also the bulk of a vocabulary. `--set graph.tags.names=true` lets them in.
NAME_KEYS: tuple[str, ...] = (
    "name", "name:*", "*_name", "*_name:*", "*:name", "addr:*", "operator", "brand",
)  # fmt: skip


# Divisions of the map, not things on the ground: a country would be a node of every tile in it. Protected areas, parks
# and military grounds are kept, since the land within them is different.
DEFAULT_LEFT_OUT: tuple[str, ...] = (
    "boundary=administrative", "boundary=historic", "boundary=political", "boundary=postal_code", "boundary=census",
    "boundary=statistical", "boundary=religious_administration", "boundary=local_authority", "boundary=civil_parish",
    "boundary=ceremonial", "boundary=maritime", "boundary=timezone", "boundary=region", "boundary=place",
    "boundary=police", "boundary=judicial", "boundary=vice_county", "boundary=limited_traffic_zone",
    "boundary=low_emission_zone",
)  # fmt: skip


class GridSettings(Settings):
    tile: int = Field(224, gt=0, description="Side of a tile, in pixels.")
    stride: int = Field(224, gt=0, description="Step from a tile to the next, in pixels.")
    gsd: float = Field(0.6, gt=0, description="Metres on the ground a pixel, at the city's centre.")


class TagSettings(Settings):
    names: bool = Field(False, description="Let names, operators and streets into the vocabulary.")
    exclude: tuple[str, ...] = Field(DEFAULT_EXCLUDED_KEYS, description="Keys left out (shell patterns, `tiger:*`).")


class PerturbSettings(Settings):
    """The papers' robustness experiments, seeded."""

    drop_objects: float = Field(0.0, ge=0, lt=1, description="Share of the objects removed at random.")
    shift_m: float = Field(0.0, ge=0, description="Every object shifted by this many metres, in a random direction.")
    drop_keys: tuple[str, ...] = Field((), description="Tag keys removed (shell patterns); objects left untagged go.")
    seed: int = Field(0, description="Seed of the perturbation.")


class GraphSettings(Settings):
    """What `tiles.h5` depends on besides the city's data."""

    compat: Literal["none", "released"] = Field(
        "none", description="`released` sets `relations`, `key_points` and `leave_out` as the published code does."
    )
    relations: Literal["partition", "released"] = Field("partition", description="Rule from DE-9IM to relation.")
    key_points: Literal["seeded", "released"] = Field(
        "seeded", description="`seeded`: midpoint and ends of lines, polygon radii drawn by element id."
    )
    leave_out: tuple[str, ...] = Field(
        DEFAULT_LEFT_OUT,
        description="Objects left out where such a tag (`key=value`, shell patterns) is all that says what they are: "
        "administrative and statistical boundaries.",
    )
    tags: TagSettings = TagSettings()
    perturb: PerturbSettings = PerturbSettings()

    @field_validator("leave_out")
    @classmethod
    def _tags(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not all(pattern.partition("=")):
                raise ValueError(f"{pattern!r} is no `key=value`, such as `boundary=administrative`")
        return patterns

    @model_validator(mode="before")
    @classmethod
    def _released(cls, values: Any) -> Any:
        return fill_compat(values, relations="released", key_points="released", leave_out=())


class BuildSettings(Settings):
    """Settings of `build-graph`."""

    grid: GridSettings = GridSettings()
    graph: GraphSettings = GraphSettings()
    bands: tuple[int, ...] = Field((1, 2, 3), description="Bands of the imagery, counted from 1.")

    @field_validator("bands", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, str) and not part.isdecimal():
                raise ValueError(f"{part!r} is no band: they are numbers counted from 1, as in 4,3,2")
        return parts

    @field_validator("bands")
    @classmethod
    def _counted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("bands are counted from 1, as in 4,3,2")
        return value
