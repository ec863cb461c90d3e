"""Fixed sine-cosine position embeddings, of patches on a grid and of points anywhere between them.

The first half of the channels encodes x, the second y; each half is sines then cosines at ``10000 ** -(i / n)``.
GeoLink (NeurIPS 2025), section 3.2; Scale-MAE (ICCV 2023), equation 2, for the scaling by ground sample distance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def embed_points(points: Tensor, width: int) -> Tensor:
    """Return the embedding (..., ``width``) of ``points`` (..., 2), x then y in patches; ``width`` a multiple of 4."""
    quarter = width // 4
    steps = torch.arange(quarter, device=points.device, dtype=torch.float32)
    angles = points.float()[..., None] * 10000.0 ** (-steps / quarter)  # (..., 2, W / 4)
    return torch.stack((angles.sin(), angles.cos()), -2).flatten(-3)  # x: sin cos, y: sin cos


def in_patches(points: Tensor, rows: int, columns: int) -> Tensor:
    """Return ``points`` (..., 2) of 0..1 in patches of a grid of ``rows`` x ``columns``.

    By numbers of the host, each axis its own: for a tensor made of them the host would wait for the device.
    """
    return torch.stack((points[..., 0] * columns, points[..., 1] * rows), -1)


def embed_grid(
    rows: int,
    columns: int,
    width: int,
    *,
    scale: Tensor | float = 1.0,
    offset: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """Return the embedding (rows * columns, ``width``) of patches in row order, patch i at ``(i + offset) * scale``.

    ``scale`` (B,) gives one grid a sample: (B, rows * columns, ``width``).
    """
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    points = torch.stack((x, y), -1).reshape(-1, 2).float() + offset
    if isinstance(scale, Tensor):
        return embed_points(points * scale.float()[:, None, None], width)
    return embed_points(points * scale, width)
