"""Images of one place at two dates, read as one image with the bands of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.geometry import PixelBounds, Projection

if TYPE_CHECKING:
    from rsosm_cli.products.view import Reads


@dataclass(frozen=True)
class ImagePair:
    """The earlier image and the later one; there is image where both have it."""

    before: Reads
    after: Reads

    def read(self, projection: Projection, bounds_px: PixelBounds) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the images (2C, H, W) uint8, the earlier first, and where both have image, (H, W) bool."""
        (a, known_a), (b, known_b) = (r.read(projection, bounds_px) for r in (self.before, self.after))
        return np.concatenate([a, b]), known_a & known_b
