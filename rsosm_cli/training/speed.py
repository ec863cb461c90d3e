"""What a CPU can be expected to do, said before days are spent on it."""

from __future__ import annotations

import os

from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.mmgr import Mmgr
from rsosm_cli.models.rose import Rose
from rsosm_cli.models.vit import ImageEncoder
from rsosm_cli.settings import ModelSettings, RoseSettings

# Arithmetic of a training step that a core of today's CPUs gets done in a second (measured: 35 to 50 GFLOP with AVX2).
_CORE = 40e9
# Forward and backward of a ResNet-50 at 224 pixels, for each of its 25.6 million parameters.
_CONVOLUTION = 3 * 8.2e9 / 25.6e6
# Networks above this many parameters are not what one trains on a CPU; the presets for it have a twentieth.
_LARGE = 20e6


def tiles_a_second(model: TileEncoder, cores: int) -> float:
    """Return the rate of training to expect on a CPU, within a factor of two, from the image encoder's arithmetic."""
    s = model.settings
    parameters = sum(p.numel() for p in model.image_encoder.parameters())
    if isinstance(model.image_encoder, ImageEncoder):
        tokens = (s.image_size // model.stride) ** 2
        visible = tokens * (1 - s.mask_patches) if isinstance(s, ModelSettings | RoseSettings) else tokens
        # Rose sees every image twice: in part, and whole.
        seen = visible + (tokens if isinstance(model, Rose) else 0)
        work = 6 * parameters * seen
    else:
        work = _CONVOLUTION * parameters * (s.image_size / 224) ** 2
    return cores * _CORE / (work * (2 if isinstance(model, Mmgr) else 1))


def slow_on_cpu(model: TileEncoder, tiles: int) -> str | None:
    """Return a sentence where a model is too large for a CPU; ``tiles`` are to be seen in all."""
    if sum(p.numel() for p in model.image_encoder.parameters()) < _LARGE:
        return None
    rate = tiles_a_second(model, os.cpu_count() or 1)
    hours = tiles / rate / 3600
    lasts = f"{hours / 24:.0f} days" if hours > 48 else f"{hours:.0f} hours"
    if hours < 2:
        lasts = f"{max(60 * hours, 1):.0f} minutes"
    return (
        f"On this CPU {model.settings.image_encoder} trains at about {rate:.1f} tiles a second, so this run takes "
        f"about {lasts}: `--preset {model.METHOD}-tiny` is made for a CPU."
    )
