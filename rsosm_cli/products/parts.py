"""The finished strips of a map that is being made: one file a strip and layer, kept through interruptions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.inference.windows import Strip, WindowPlan
from rsosm_cli.products.raster import write_part


@dataclass(frozen=True)
class Layer:
    """A layer of a map: pixels of ``pixel`` x ``pixel`` lattice pixels, ``nodata`` where nothing is known."""

    name: str
    nodata: float
    pixel: int = 1


@dataclass(frozen=True)
class MapParts:
    """A sink of strips in ``folder``. The last of ``layers`` is written last: where it is, the strip is finished."""

    folder: Path
    plan: WindowPlan
    projection: Projection
    layers: tuple[Layer, ...]

    def has(self, strip: Strip) -> bool:
        return self._file(self.layers[-1], strip).exists()

    def write(self, strip: Strip, layers: dict[str, NDArray[Any]]) -> None:
        for layer in self.layers:
            values = np.ascontiguousarray(layers[layer.name])
            write_part(
                self._file(layer, strip), values, self.projection_of(layer), _coarse(strip.bounds_px, layer.pixel),
                layer.nodata,
            )  # fmt: skip

    def projection_of(self, layer: Layer) -> Projection:
        return Projection(self.projection.crs, self.projection.gsd_m * layer.pixel)

    def area_of(self, layer: Layer) -> PixelBounds:
        return _coarse(self.plan.area, layer.pixel)

    def files(self, layer: Layer) -> list[tuple[Path, PixelBounds]]:
        """Return the files of a layer with their bounds on its own lattice."""
        return [(self._file(layer, s), _coarse(s.bounds_px, layer.pixel)) for s in self.plan.strips()]

    def _file(self, layer: Layer, strip: Strip) -> Path:
        return self.folder / f"{strip.name}.{layer.name}.tif"


def _coarse(box: PixelBounds, pixel: int) -> PixelBounds:
    return PixelBounds(box.col_min // pixel, box.row_min // pixel, box.col_max // pixel, box.row_max // pixel)
