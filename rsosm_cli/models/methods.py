"""The three models by the name of their method."""

from __future__ import annotations

from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.models.mmgr import Mmgr
from rsosm_cli.models.rose import Rose
from rsosm_cli.settings import AnyModel, ModelSettings, RoseSettings

METHODS: dict[str, type[TileEncoder]] = {kind.METHOD: kind for kind in (GeoLink, Rose, Mmgr)}


def build_encoder(settings: AnyModel, text_width: int, n_categories: int = 0) -> TileEncoder:
    """Return a new model; ``n_categories`` of points of interest, where the model knows them by number."""
    if isinstance(settings, ModelSettings):
        return GeoLink(settings, text_width)
    if isinstance(settings, RoseSettings):
        return Rose(settings, text_width)
    return Mmgr(settings, text_width, n_categories)
