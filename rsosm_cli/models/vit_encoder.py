"""What the methods on a Vision Transformer answer alike about their image side."""

from __future__ import annotations

from collections.abc import Sequence

from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.vit import ImageEncoder


class VitEncoder(TileEncoder):
    """A method whose image encoder is the transformer ``vit``: maps of one size, a cell a patch."""

    vit: ImageEncoder

    @property
    def stride(self) -> int:
        return self.vit.patch

    @property
    def image_encoder(self) -> ImageEncoder:
        return self.vit

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        return self.vit.check_size(height, width)

    def default_levels(self) -> tuple[int, ...]:
        return self.vit.default_levels()

    def level_widths(self, levels: Sequence[int]) -> list[int]:
        return [self.vit.width] * len(levels)

    def recompute_blocks(self, on: bool) -> None:
        self.vit.checkpointing = on
