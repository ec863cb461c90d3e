"""``rsosm fetch``."""

from __future__ import annotations

from typing import Annotated

import typer

from rsosm_cli.commands.options import (
    COMPUTE,
    PLACE,
    SOURCES,
    Assign,
    CitiesFile,
    City,
    Config,
    DryRun,
    Force,
    Offline,
    State,
    finish,
    for_cities,
)
from rsosm_cli.pipeline.result import Result


def command(
    ctx: typer.Context,
    city: City = None,
    cities: CitiesFile = None,
    osm: Annotated[
        list[str] | None,
        typer.Option(
            help="An extract (.osm.pbf, .osm.gz, .osm), a vector file, or a word: overpass; geofabrik, the smallest "
            "public extract that covers the city. Can be repeated. Default: overpass for a small place, else "
            "geofabrik.",
            rich_help_panel=SOURCES,
            metavar="FILE",
        ),
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(help="State of OSM on a past day, from Overpass.", rich_help_panel=SOURCES, metavar="YYYY-MM-DD"),
    ] = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Days after which a downloaded extract is replaced, where there is a newer one (default: never), and "
            "an answer of Overpass or Nominatim asked for again (default: 7 and 30).",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    imagery: Annotated[
        list[str] | None,
        typer.Option(
            help="A raster, an XYZ template with {z}/{x}/{y}, an xyzservices name, wmts:ADDRESS#LAYER, tms:ADDRESS or "
            "stac:ADDRESS#COLLECTION; can be repeated. Default: RSOSM_IMAGERY, or `imagery` in config.yaml under the "
            "root.",
            rich_help_panel=SOURCES,
            metavar="SOURCE",
        ),
    ] = None,
    boundary: Annotated[
        str | None,
        typer.Option(
            help="A vector file with the boundary, or extract: the box of the OSM file; or nominatim.",
            rich_help_panel=PLACE,
            metavar="FILE",
        ),
    ] = None,
    bbox: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="West, south, east, north in degrees.", rich_help_panel=PLACE, metavar="W S E N"),
    ] = None,
    osm_id: Annotated[
        str | None,
        typer.Option(help="OSM object of the boundary, as relation/3464.", rich_help_panel=PLACE, metavar="TYPE/ID"),
    ] = None,
    gsd: Annotated[
        float | None, typer.Option(min=0.01, help="Metres a pixel to fetch tile services at.", rich_help_panel=SOURCES)
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            help="Bands to keep: of rasters by number, as 4,3,2 (default: all); of STAC by name, as red,green,blue.",
            rich_help_panel=SOURCES,
            metavar="LIST",
        ),
    ] = None,
    dates: Annotated[
        str | None,
        typer.Option(
            help="Days of the images of a STAC collection, as 2023-05-01/2023-09-30.",
            rich_help_panel=SOURCES,
            metavar="FROM/TO",
        ),
    ] = None,
    nodata: Annotated[
        int | None,
        typer.Option(
            help="Value that stands for missing image, where the rasters do not say so (white: 255).",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    epoch: Annotated[
        str | None,
        typer.Option(
            help="Keep this imagery beside the city's other, under a name: 2019 makes imagery-2019.tif.",
            rich_help_panel=SOURCES,
            metavar="NAME",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cities at a time.", rich_help_panel=COMPUTE)] = 1,
    offline: Offline = False,
    config: Config = None,
    assign: Assign = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Fetch the boundary, the OSM elements and the imagery of a city.

    For a whole city the road is an extract (--osm geofabrik, or --osm FILE.osm.pbf); Overpass serves small areas and
    past states of OSM. Without imagery, vectors alone are fetched.

    \b
    Examples:
      rsosm fetch --city Andorra --osm andorra.osm.pbf
      rsosm fetch --city Banepa --osm nepal.osm.pbf --imagery mosaic.tif
      rsosm fetch --city "My area" --osm nepal.osm.pbf --bbox 85.51 27.62 85.54 27.65
    """  # fmt: skip

    def work(state: State) -> list[Result]:
        from rsosm_cli.imagery.checks import check_dates
        from rsosm_cli.pipeline.fetch import fetch
        from rsosm_cli.settings import FetchSettings, resolve

        parts = None if bands is None else [part.strip() for part in bands.split(",")]
        options = {
            "bands": None if parts is None else [int(p) if p.isdecimal() else p for p in parts],
            "nodata": nodata, "date": date, "max_age_days": max_age, "stac_dates": dates,
        }  # fmt: skip
        settings = resolve(FetchSettings, config=config, options=options, assignments=assign or ())
        check_dates(dates, imagery or ())
        return for_cities(
            state, "fetch", fetch, city, cities,
            workers=workers, osm=osm or (), imagery=imagery or (), boundary=boundary, bbox=bbox, osm_id=osm_id, gsd=gsd,
            epoch=epoch, settings=settings, offline=offline, dry_run=dry_run, force=force,
        )  # fmt: skip

    finish(ctx, work)
