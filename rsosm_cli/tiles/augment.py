"""Random crop, turn, flip and colour of a batch of tiles, with the graphs transformed alike (GeoLink, section 4.1).

A crop is a square of whole pixels, so image and graph agree exactly, and lengths scale by one number. Every draw is a
function of (seed, epoch, sample): neither workers nor ranks nor a restart change it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rsosm_cli.graph.arrays import GraphArrays, NodeArrays
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.settings import AugmentSettings
from rsosm_cli.tiles import ragged
from rsosm_cli.tiles.draws import uniform

_DRAWS = 0x617567  # separates these draws from the masks' and the order's
_EDGE = 1e-6  # tile units; key points on the border carry float32 rounding
# Luma of ITU-R BT.601, which colour jitter calls grey.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Views:
    """How each of ``B`` tiles is seen. Pixels of the tile, whole; the crop is square."""

    left: NDArray[np.int64]  # (B,)
    top: NDArray[np.int64]  # (B,)
    side: NDArray[np.int64]  # (B,)
    turn: NDArray[np.int64]  # (B,) quarter turns anticlockwise, before the flip
    flip: NDArray[np.bool_]  # (B,)
    colour: NDArray[np.float32]  # (B, 3) factors of brightness, contrast, saturation
    tile_px: int

    @property
    def origin(self) -> NDArray[np.float32]:  # (B, 2) tile units
        return (np.stack([self.left, self.top], axis=1) / self.tile_px).astype(np.float32)

    @property
    def scale(self) -> NDArray[np.float32]:  # (B,) side of the crop as a share of the tile's
        return (self.side / self.tile_px).astype(np.float32)


def whole_views(n: int, tile_px: int) -> Views:
    """Return views that show ``n`` tiles as they are."""
    zero = np.zeros(n, dtype=np.int64)
    return Views(zero, zero, zero + tile_px, zero, zero > 0, np.ones((n, 3), dtype=np.float32), tile_px)


def draw_views(
    settings: AugmentSettings, tile_px: int, seed: int, epoch: int, samples: NDArray[np.int64], *, number: int = 0
) -> Views:
    """Return the views of ``samples`` (B,) in ``epoch``; ``number`` tells several views of one sample apart."""
    u = uniform(_DRAWS + number, seed, epoch, samples[:, None], np.arange(8))  # (B, 8)
    low, high = settings.crop_scale
    side = np.clip(np.rint(np.sqrt(low + (high - low) * u[:, 0]) * tile_px), 1, tile_px).astype(np.int64)
    room = tile_px - side + 1
    colour = 1 + settings.colour * (2 * u[:, 4:7] - 1)
    return Views(
        left=(u[:, 1] * room).astype(np.int64),
        top=(u[:, 2] * room).astype(np.int64),
        side=side,
        turn=(4 * u[:, 7]).astype(np.int64) * settings.turns,
        flip=u[:, 3] < settings.flip,
        colour=np.maximum(colour, 0).astype(np.float32),
        tile_px=tile_px,
    )


def view_images(images: NDArray[np.uint8], views: Views, size: int) -> Tensor:
    """Return (B, C, size, size) uint8: the crops of (B, C, H, W), resized (bicubic, antialiased), turned, flipped."""
    source = torch.from_numpy(images)
    out = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    # One native call an image: crops differ in size, and the integer kernel is four times as fast as sampling the
    # batch through one grid. Turned and flipped, an image is but another way of reading it: one copy for all three.
    for i, (x, y, s) in enumerate(zip(views.left, views.top, views.side, strict=True)):
        seen = source[i : i + 1, :, y : y + s, x : x + s]
        if s != size:
            seen = functional.interpolate(seen, (size, size), mode="bicubic", antialias=True)
        turned = _turned(seen[0].numpy(), views.turn[i])
        out[i] = turned[..., ::-1] if views.flip[i] else turned
    return torch.from_numpy(out)


def _turned(image: NDArray[np.uint8], turn: int) -> NDArray[np.uint8]:
    """Return a view of (C, H, W) after quarter turns anticlockwise: ``np.rot90``, in a thirtieth of the time."""
    if turn % 2:
        image = image.swapaxes(1, 2)[:, ::-1]
    return image[:, ::-1, ::-1] if turn >= 2 else image


def view_graphs(graphs: GraphArrays, views: Views) -> GraphArrays:
    """Return the graphs as the crops show them, in units of the crop.

    A node stays if any of its key points is inside; points are clamped to the crop, edges are those among the nodes
    that stay, sizes are rescaled (an area to the crop's, a length to its perimeter).
    """
    if (views.side == views.tile_px).all() and not (views.flip.any() or views.turn.any()):
        return graphs
    nodes: dict[str, NodeArrays] = {}
    keep: dict[str, NDArray[np.bool_]] = {}
    for name in NODE_TYPES:
        nodes[name], keep[name] = _view_nodes(graphs.nodes[name], views)
    return ragged.keep_nodes(GraphArrays(nodes, graphs.edges), keep)


def _view_nodes(n: NodeArrays, views: Views) -> tuple[NodeArrays, NDArray[np.bool_]]:
    tile = ragged.owners(n.offsets)
    origin, scale = views.origin[tile][:, None, :], views.scale[tile]
    turn, flip = views.turn[tile], views.flip[tile]
    once, over = turn % 2 == 1, turn >= 2

    def moved(points: NDArray[np.float32]) -> NDArray[np.float32]:  # (N, k, 2)
        points = (points - origin) / scale[:, None, None]
        points[once] = np.stack((points[once, :, 1], 1 - points[once, :, 0]), axis=-1)
        points[over] = 1 - points[over]
        points[flip, :, 0] = 1 - points[flip, :, 0]
        return points.astype(np.float32, copy=False)

    key_points = moved(n.key_points)
    within: NDArray[np.bool_] = np.logical_and(key_points >= -_EDGE, key_points <= 1 + _EDGE)  # (N, k, 2)
    inside: NDArray[np.bool_] = np.any(np.all(within, axis=2), axis=1)
    envelope = moved(n.envelope)
    envelope[flip] = envelope[flip, ::-1]  # a mirrored ring runs the other way round
    changed = flip | (turn > 0)
    envelope[changed] = ordered(envelope[changed])
    seen = replace(
        n,
        key_points=np.clip(key_points, 0, 1),
        centroid=np.clip(moved(n.centroid[:, None, :])[:, 0], 0, 1),
        envelope=np.clip(envelope, 0, 1),
        area=np.minimum(n.area / scale**2, 1).astype(np.float32),
        length=(n.length / scale).astype(np.float32),
    )
    return seen, inside


def ordered(corners: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return clockwise rings (N, 4, 2) from their highest, leftmost corner on, as the builder keeps them."""
    first = np.lexsort((np.round(corners[..., 0], 6), np.round(corners[..., 1], 6)), axis=1)[:, 0]
    turn = (first[:, None] + np.arange(4)) % 4
    return np.take_along_axis(corners, turn[..., None], axis=1)


def normalise(images: Tensor, mean: Tensor, std: Tensor, colour: Tensor | None = None) -> Tensor:
    """Return (B, C, H, W) float32: uint8 images, jittered by ``colour`` (B, 3) factors, to zero mean and unit variance.

    Runs on the device of the images. Brightness, contrast and saturation are one affine map of the bands a sample, in
    that order; saturation is left out unless there are three bands. ``mean`` and ``std`` (C,) are of values 0..1.
    """
    values = images.to(torch.float32)  # (B, C, H, W), 0..255
    low, high = (-mean / std)[:, None, None], ((1 - mean) / std)[:, None, None]  # what 0 and 255 become
    if colour is None:
        return values.mul_((1 / 255 / std)[:, None, None]).add_(low)
    c = values.shape[1]
    luma = values.new_tensor(_LUMA) if c == 3 else values.new_full((c,), 1 / c)
    brightness, contrast, saturation = (f[:, None] for f in colour.unbind(1))  # (B, 1) each
    grey = (values.mean(dim=(2, 3)) / 255 @ luma)[:, None] * brightness  # (B, 1) after the brightness
    mix = torch.eye(c, device=values.device).expand(len(values), c, c)
    if c == 3:
        mix = saturation[:, :, None] * mix + (1 - saturation[:, :, None]) * luma.expand(c, c)
    # All of it, the normalising too, in one product a pixel: passes over the pixels are what costs.
    matrix = (brightness * contrast)[:, :, None] * mix / (255 * std[:, None])
    offset = ((1 - contrast) * grey - mean) / std  # (B, C); grey stays grey under the saturation
    with torch.autocast(values.device.type, enabled=False):
        values = torch.baddbmm(offset[:, :, None], matrix, values.flatten(2)).view_as(values)
    return values.clamp_(low, high)
