"""Settings of `fetch`, and the user's defaults for a root."""

from __future__ import annotations

import datetime
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rsosm_cli.settings.base import Settings


class FetchSettings(Settings):
    """Settings of `fetch`."""

    overpass_url: str = Field("https://overpass-api.de/api", description="Overpass API.")
    nominatim_url: str = Field("https://nominatim.openstreetmap.org/", description="Nominatim API.")
    overpass_max_km2: float = Field(
        100.0, gt=0, description="Above this area, Overpass is refused in favour of an extract."
    )
    overpass_max_mb: float = Field(
        200.0, gt=0, description="Above this estimate of its answers, Overpass is refused in favour of an extract."
    )
    date: datetime.date | None = Field(
        None, description="Day (YYYY-MM-DD) whose state of OSM is asked of Overpass; default: now."
    )
    extracts_url: str = Field(
        "https://download.geofabrik.de/index-v1.json", description="Index of extracts, in Geofabrik's form."
    )
    max_age_days: float | None = Field(
        None,
        ge=0,
        description="A kept extract that is older is replaced where the server has another; default: never. Kept "
        "answers of Overpass and Nominatim that are older are asked for again, too.",
    )
    overpass_days: float = Field(
        7.0, ge=0, description="Days for which an answer of Overpass on today's state is kept, without max_age_days."
    )
    nominatim_days: float = Field(
        30.0, ge=0, description="Days for which an answer of Nominatim is kept, without max_age_days."
    )
    contact: str = Field("", description="E-mail or URL of the user, sent in the User-Agent to public servers.")
    max_wait_s: float = Field(
        300.0,
        gt=0,
        description="Longest pauses for a busy server, in seconds, all tries together (a try may take a minute).",
    )
    xyz_zoom: int | None = Field(
        None, ge=0, le=24, description="Zoom of a tile service; default: the one that meets the GSD."
    )
    xyz_workers: int = Field(4, ge=1, le=16, description="Tile requests at a time to one server, on this machine.")
    xyz_rate: float = Field(20.0, gt=0, description="Tile requests a second at most, likewise.")
    xyz_placeholders: bool = Field(
        True, description="Take tiles whose very bytes repeat for the service's `no imagery` picture: missing."
    )
    xyz_missing_days: float = Field(
        30.0, ge=0, description="Days after which a tile that the service did not have is asked for again."
    )
    stac_dates: str | None = Field(
        None, description="Days of a STAC collection's images, as 2023-05-01/2023-09-30; default: all."
    )
    stac_clouds: float = Field(20.0, ge=0, le=100, description="Clouds that an image of STAC may have, in percent.")
    stac_mosaic: Literal["least-cloudy", "median"] = Field(
        "least-cloudy", description="What becomes of several images of STAC: the least cloudy on top, or their median."
    )
    stac_items: int = Field(100, ge=1, description="Images of STAC that are looked at; all of them enter a median.")
    bands: tuple[int | str, ...] | None = Field(
        None,
        description="Bands to keep, in this order: of rasters by number, from 1 (default: all); of STAC by name "
        "(default: red, green, blue).",
    )
    nodata: int | None = Field(
        None,
        description="Value that stands for missing image where all bands have it over at least 17 x 17 pixels, "
        "for rasters that have no nodata value (white: 255).",
    )

    @field_validator("date")
    @classmethod
    def _known_to_overpass(cls, value: datetime.date | None) -> datetime.date | None:
        # Overpass has no history before the change of OSM's licence.
        if value is not None and value < datetime.date(2012, 9, 12):
            raise ValueError("Overpass knows the state of OSM since 2012-09-12")
        if value is not None and value > datetime.datetime.now(datetime.UTC).date():
            raise ValueError("it lies in the future")
        return value

    @field_validator("stac_dates")
    @classmethod
    def _days(cls, value: str | None) -> str | None:
        if value is None:
            return value
        parts = value.split("/")
        if len(parts) > 2 or not all(re.fullmatch(r"\d{4}(-\d{2}(-\d{2})?)?", part) for part in parts):
            raise ValueError("days are written as 2023-05-01/2023-09-30")
        for part in parts:
            year, month, day = (*map(int, part.split("-")), 1, 1)[:3]
            try:
                datetime.date(year, month, day)
            except ValueError:
                raise ValueError(f"{part} is no day of the calendar") from None
        if parts[0][: len(parts[-1])] > parts[-1]:
            raise ValueError(f"{parts[0]} comes after {parts[-1]}")
        return value

    @field_validator("overpass_url", "nominatim_url", "extracts_url")
    @classmethod
    def _addresses(cls, value: str) -> str:
        address = urlsplit(value)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ValueError("an address begins with https:// and a host")
        return value

    @field_validator("bands")
    @classmethod
    def _counted(cls, value: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        if value is not None and not value:
            raise ValueError("it names no band")
        if (wrong := [band for band in value or () if isinstance(band, int) and band < 1]) != []:
            raise ValueError(f"{wrong[0]} is no band: they are counted from 1, as in 4,3,2")
        return value


class RootSettings(Settings):
    """The user's defaults for one root: `<root>/config.yaml`."""

    imagery: tuple[str, ...] = Field(
        (),
        description="Imagery of every city: rasters (paths count from the folder of this file), XYZ templates, "
        "service names.",
    )
    contact: str = Field("", description="E-mail or URL of the user, sent in the User-Agent to public servers.")
    gsd: float | None = Field(None, gt=0, description="Metres on the ground a pixel, to fetch imagery at.")

    @field_validator("imagery", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
