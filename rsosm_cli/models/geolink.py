"""GeoLink (NeurIPS 2025, arXiv 2509.26016): one model of image tiles and of the OSM objects on them.

``losses`` is the pretraining step (masked patches, masked nodes, contrast of tile and region), ``encode`` gives the
image, OSM and fused encodings. The paper is the default; the settings under ``compat`` are those of the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from rsosm_cli.models import draws
from rsosm_cli.models.contrastive import info_nce, mean_over_ranks
from rsosm_cli.models.encodings import Encodings, Objects, Pairs, Patches
from rsosm_cli.models.flat import N_TYPES, FlatGraph, flatten, segment_rank
from rsosm_cli.models.fusion import TwoWayBlock, object_position, pack
from rsosm_cli.models.osm_encoder import OsmEncoder
from rsosm_cli.models.position import embed_grid
from rsosm_cli.models.readout import RegionReadout, present_types
from rsosm_cli.models.vit import ImageEncoder, as_map
from rsosm_cli.models.vit_encoder import VitEncoder
from rsosm_cli.settings import ModelSettings


@dataclass(frozen=True)
class Masks:
    """What a pretraining step hides: patches other than ``keep`` (B, K), and ``nodes`` (N,) in the flat order of nodes.

    ``fused`` (N,) are the masked nodes that enter the fusion; ``totals`` (B,) their number a graph, on the host.
    """

    keep: Tensor
    nodes: Tensor
    fused: Tensor
    totals: NDArray[np.int64]


@dataclass(frozen=True)
class Losses:
    """The losses of a step, and what reports draw from it. Means over ranks of the losses are those of the whole
    batch.
    """

    total: Tensor
    image: Tensor
    contrastive: Tensor
    node: Tensor
    masks: Masks
    image_prediction: Tensor  # (B, L, p * p * C) normalised pixels of every patch
    image_projection: Tensor  # (B, P)
    osm_projection: Tensor  # (B, P)
    region: Tensor  # (B, osm_width)
    has_objects: Tensor  # (B,)
    node_index: Tensor  # (M,) flat numbers of the predicted nodes, padding among them
    node_valid: Tensor  # (M,)
    node_prediction: Tensor  # (M, text width)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.image, self.contrastive, self.node

    @property
    def patches(self) -> Patches:
        return Patches(self.image_prediction, self.masks.keep, normalised=True)

    @property
    def objects(self) -> Objects:
        return Objects(self.node_index[self.node_valid], self.node_prediction[self.node_valid])


class GeoLink(VitEncoder):
    """The model; ``text_width`` is the width of the nodes' text vectors."""

    METHOD = "geolink"
    LOSSES = ("image", "contrastive", "node")
    MODALITIES = ("image", "osm", "fused")
    MAPS = ("image", "osm", "fused")
    settings: ModelSettings

    def __init__(self, settings: ModelSettings, text_width: int) -> None:
        super().__init__()
        self.settings = s = settings
        self.text_width = text_width
        self.vit = ImageEncoder(
            s.image_encoder, s.image_size, s.in_chans, depth=s.image_depth, gsd_position=s.gsd_position
        )
        self.osm_encoder = OsmEncoder(
            s.osm_encoder, text_width, s.osm_width, edge_dim=s.edge_dim, per_graph=s.osm_norm == "graph"
        )
        self.readout = RegionReadout(s.osm_width, attention=s.type_attention)
        self.patches_in = _linear(self.vit.width, s.fusion_width)
        self.objects_in = nn.ModuleList(_linear(s.osm_width, s.fusion_width) for _ in range(N_TYPES))
        self.fusion = TwoWayBlock(
            s.fusion_width, s.fusion_heads, s.fusion_dropout, placed_values=s.fusion_values == "position"
        )
        self.pretraining = Pretraining(s, self.vit, text_width)

    @property
    def widths(self) -> dict[str, int]:
        return {"image": self.vit.width, "osm": self.settings.osm_width, "fused": self.settings.fusion_width}

    def step(
        self, images: Tensor, graphs: HeteroData, *, seeds: Tensor, gsd_m: Tensor | None, second: Tensor | None
    ) -> Losses:
        return self.losses(images, graphs, seeds=seeds, gsd_m=gsd_m)

    def pairs(self, images: Tensor, graphs: HeteroData, gsd_m: Tensor | None) -> Pairs:
        found = self.encode(images, graphs, gsd_m=gsd_m)
        assert found.image is not None
        assert found.osm is not None
        part = self.pretraining
        has_objects = present_types(flatten(graphs)).any(0)
        return Pairs(part.project_image(found.image), part.project_osm(found.osm), has_objects)

    def map_of_objects(self, query: Tensor, graphs: HeteroData, rows: int, columns: int) -> Tensor:
        graph = flatten(graphs)
        nodes = self.osm_encoder(graph.x, graph)
        patches = query.to(nodes.dtype).expand(graph.n_graphs, rows * columns, -1)
        return as_map(self.fuse(patches, nodes, graph, rows, columns), rows, columns)

    def unused(self, modality: str, *, maps: bool) -> list[nn.Module | nn.Parameter]:
        f = self.fusion
        unused: list[nn.Module | nn.Parameter] = [
            self.pretraining, f.objects_to_patches, f.norm_objects, f.linear, f.norm_out,
        ]  # fmt: skip
        if modality == "image" or (modality == "osm" and not maps):
            unused += [f, self.objects_in, self.patches_in]
        if modality == "image":
            unused.append(self.osm_encoder)
        if modality == "osm":
            unused += [self.vit, self.patches_in]
        if modality != "osm" or maps:
            unused.append(self.readout)
        return unused

    def losses(
        self,
        images: Tensor,
        graphs: HeteroData,
        *,
        seeds: Tensor | None = None,
        masks: Masks | None = None,
        generator: torch.Generator | None = None,
        gsd_m: Tensor | float | None = None,
    ) -> Losses:
        """Return the pretraining losses of ``images`` (B, C, H, W), normalised, and ``graphs``, one a tile.

        Masks are drawn from ``seeds`` (B,) int64, one a sample (see :func:`draws.sample_seeds`), unless given; without
        either, seeds come from ``generator`` or torch's own. ``gsd_m`` is the ground sample distance, a number or (B,).
        """
        s, part = self.settings, self.pretraining
        graph = flatten(graphs)
        if len(images) != graph.n_graphs:
            raise ValueError(f"{len(images)} images and {graph.n_graphs} graphs")
        rows, columns = self.vit.check_size(images.shape[2], images.shape[3])
        if masks is None:
            if seeds is None:
                seeds = draws.fresh_seeds(len(images), images.device, generator)
            masks = self.draw_masks(seeds, graph, rows * columns)
        tokens = self.vit(images, keep=masks.keep, gsd_m=gsd_m)
        prediction = part.decode(tokens.cls, tokens.patches, masks.keep, rows, columns)
        image_loss = part.image_loss(images, prediction, masks.keep)

        nodes = self.osm_encoder(part.hide(graph, masks.nodes), graph)
        region = self.readout(nodes, graph)
        has_objects = present_types(graph).any(0)
        image_projection = part.project_image(tokens.patches.mean(1))
        osm_projection = part.project_osm(region)
        contrastive = info_nce(image_projection, osm_projection, has_objects, s.temperature)

        index, valid, predicted = self._predict_nodes(tokens.patches, nodes, graph, masks, rows, columns)
        target = torch.cat(graph.x)[index] if graph.n_nodes else torch.zeros_like(predicted)
        error = (predicted.float() - target.float()).square().mean(-1)
        node_loss = mean_over_ranks(torch.where(valid, error, 0).sum(), valid.sum())
        total = s.image_weight * image_loss + s.contrastive_weight * contrastive + s.node_weight * node_loss
        return Losses(
            total, image_loss, contrastive, node_loss, masks, prediction, image_projection, osm_projection, region,
            has_objects, index, valid, predicted,
        )  # fmt: skip

    def encode(
        self,
        images: Tensor | None,
        graphs: HeteroData | None,
        *,
        maps: bool = False,
        levels: Sequence[int] = (),
        gsd_m: Tensor | float | None = None,
    ) -> Encodings:
        """Return the encodings of tiles: of the image without ``graphs``, of the objects without ``images``, of both
        with both.

        All objects take part. ``maps`` asks for the maps of patches, ``levels`` for maps of those blocks (0-based).
        """
        if images is None and graphs is None:
            raise ValueError("encode needs images, graphs or both")
        graph = None if graphs is None else flatten(graphs)
        nodes = region = None
        if graph is not None:
            nodes = self.osm_encoder(graph.x, graph)
            region = self.readout(nodes, graph)
        if images is None:
            return Encodings(osm=region)
        rows, columns = self.vit.check_size(images.shape[2], images.shape[3])
        tokens = self.vit(images, levels=levels, gsd_m=gsd_m)
        hybrid = None
        if graph is not None and nodes is not None:
            if len(images) != graph.n_graphs:
                raise ValueError(f"{len(images)} images and {graph.n_graphs} graphs")
            hybrid = self.fuse(self.patches_in(tokens.patches), nodes, graph, rows, columns)
        return Encodings(
            image=tokens.patches.mean(1),
            cls=tokens.cls,
            osm=region,
            fused=None if hybrid is None else hybrid.mean(1),
            image_map=as_map(tokens.patches, rows, columns) if maps else None,
            fused_map=as_map(hybrid, rows, columns) if maps and hybrid is not None else None,
            levels=tuple(as_map(level, rows, columns) for level in tokens.levels),
        )

    def fuse(
        self,
        patches: Tensor,
        nodes: Tensor,
        graph: FlatGraph,
        rows: int,
        columns: int,
        *,
        chosen: Tensor | None = None,
        totals: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Return the hybrid patches (B, L, W) of ``patches`` (B, L, W) and encoded ``nodes`` (N, osm_width).

        ``chosen`` (N,) nodes alone take part, ``totals`` (B,) of them a graph; by default all do.
        """
        objects, position = self._objects(nodes, graph, rows, columns)
        grid = self._patch_position(rows, columns, patches)
        packs = pack(graph, graph.totals if totals is None else totals, chosen)
        parts = []
        for p in packs:
            mine = patches if p.graphs is None else patches[p.graphs]
            parts.append(self.fusion.hybrid_patches(mine, grid, objects[p.index], position[p.index], p.valid)[0])
        if len(packs) == 1:
            return parts[0]
        who = torch.cat([p.graphs for p in packs if p.graphs is not None])
        return torch.cat(parts)[who.argsort()]

    def draw_masks(self, seeds: Tensor, graph: FlatGraph, n_patches: int) -> Masks:
        """Draw what is hidden from ``seeds`` (B,): a function of each sample's seed and of its own tile alone."""
        s = self.settings
        device = seeds.device
        n_keep = max(1, int(n_patches * (1 - s.mask_patches)))
        noise = draws.mix(draws.mix(seeds, 0)[:, None], torch.arange(n_patches, device=device))
        keep = noise.argsort(1)[:, :n_keep].sort(1).values
        number = _number_in_segment(graph)
        keys = draws.mix(draws.mix(draws.mix(seeds, 1)[graph.batch], graph.kind), number)
        share = np.rint(graph.counts * s.mask_nodes).astype(np.int64)
        at_least = min(1, int(np.ceil(s.mask_nodes)))
        hidden = np.minimum(np.maximum(share, at_least), graph.counts)  # (B, 3)
        limit = torch.from_numpy(hidden.T.ravel().copy()).to(device, non_blocking=True)
        rank = segment_rank(keys, graph.segment, N_TYPES * graph.n_graphs)
        nodes = rank < limit[graph.segment]
        totals = hidden.sum(1)
        fused = nodes
        if s.objects_max is not None:
            # Hidden nodes first in an order drawn over all types, then cut.
            order = torch.where(nodes, draws.mix(keys, 2) >> 1, torch.iinfo(torch.int64).max)
            fused = nodes & (segment_rank(order, graph.batch, graph.n_graphs) < s.objects_max)
            totals = np.minimum(totals, s.objects_max)
        return Masks(keep, nodes, fused, totals)

    def _objects(self, nodes: Tensor, graph: FlatGraph, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return the fusion's objects (N, W) and their position (N, W)."""
        parts = nodes.split(list(graph.sizes))
        objects = torch.cat([layer(part) for layer, part in zip(self.objects_in, parts, strict=True)])
        width = self.settings.fusion_width
        if self.settings.fusion_position:
            position = object_position(graph, rows, columns, width).to(objects.dtype)
        else:
            position = torch.zeros_like(objects)
        if not graph.n_nodes:  # a row for padding to point at
            objects = torch.cat((objects, objects.new_zeros(1, width)))
            position = torch.cat((position, position.new_zeros(1, width)))
        return objects, position

    def _patch_position(self, rows: int, columns: int, patches: Tensor) -> Tensor:
        s = self.settings
        if not s.fusion_position:
            return patches.new_zeros(rows * columns, s.fusion_width)
        grid = embed_grid(rows, columns, s.fusion_width, offset=s.patch_centre, device=patches.device)
        return grid.to(patches.dtype)

    def _predict_nodes(
        self, patches: Tensor, nodes: Tensor, graph: FlatGraph, masks: Masks, rows: int, columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fuse the hidden nodes with the visible patches: flat node numbers (M,), which are no padding (M,),
        predictions (M, W).
        """
        patches = self.patches_in(patches)
        grid = self._patch_position(rows, columns, patches)
        seen = grid[masks.keep]  # (B, K, W)
        objects, position = self._objects(nodes, graph, rows, columns)
        found = []
        for p in pack(graph, masks.totals, masks.fused):
            mine, where = (patches, seen) if p.graphs is None else (patches[p.graphs], seen[p.graphs])
            o, o_position = objects[p.index], position[p.index]
            hybrid, o = self.fusion.hybrid_patches(mine, where, o, o_position, p.valid)
            o = self.fusion.hybrid_objects(hybrid, where, o, o_position)
            found.append((p.index.flatten(), p.valid.flatten(), self.pretraining.predict_node(o).flatten(0, 1)))
        index, valid, predicted = (torch.cat(part) for part in zip(*found, strict=True))
        return index, valid, predicted


class Pretraining(nn.Module):
    """The parts that pretraining alone needs: mask tokens, decoder, projections, and the prediction of nodes."""

    def __init__(self, s: ModelSettings, vit: ImageEncoder, text_width: int) -> None:
        super().__init__()
        self.patch = vit.patch
        self.node_token = nn.Parameter(torch.randn(N_TYPES, text_width) * 0.02)
        self.patch_token = nn.Parameter(torch.randn(1, 1, s.decoder_width) * 0.02)
        self.decoder_in = _linear(vit.width, s.decoder_width)
        self.decoder = nn.ModuleList(
            Block(s.decoder_width, s.decoder_heads, 4.0, qkv_bias=True, norm_layer=nn.LayerNorm)
            for _ in range(s.decoder_depth)
        )
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.decoder_norm = nn.LayerNorm(s.decoder_width)
        self.predict_pixels = _linear(s.decoder_width, vit.patch**2 * s.in_chans)
        self.project_image = _linear(vit.width, s.projection_width)
        self.project_osm = _linear(s.osm_width, s.projection_width)
        self.predict_node = _linear(s.fusion_width, text_width)

    def hide(self, graph: FlatGraph, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the nodes' vectors, a tensor a type, with the type's token in place of the ``hidden`` (N,)."""
        parts = hidden.split(list(graph.sizes))
        return tuple(
            torch.where(part[:, None], self.node_token[t], x)
            for t, (part, x) in enumerate(zip(parts, graph.x, strict=True))
        )

    def decode(self, cls: Tensor, patches: Tensor, keep: Tensor, rows: int, columns: int) -> Tensor:
        """Return predicted pixels (B, L, p * p * C) from the visible patches (B, K, D) at ``keep`` (B, K)."""
        x = self.decoder_in(torch.cat((cls[:, None], patches), 1))
        width = x.shape[-1]
        full = self.patch_token.to(x.dtype).expand(len(x), rows * columns, -1)
        full = full.scatter(1, keep[..., None].expand(-1, -1, width), x[:, 1:])
        full = full + embed_grid(rows, columns, width, device=x.device).to(x.dtype)
        x = torch.cat((x[:, :1], full), 1)
        for block in self.decoder:
            x = block(x)
        return self.predict_pixels(self.decoder_norm(x)[:, 1:])

    def image_loss(self, images: Tensor, prediction: Tensor, keep: Tensor) -> Tensor:
        """Return the mean squared error of the hidden patches' pixels, normalised patch by patch (MAE)."""
        target = patchify(images, self.patch)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(-1)  # (B, L)
        hidden = torch.ones_like(error).scatter(1, keep, 0.0)
        return mean_over_ranks((error * hidden).sum(), hidden.sum())


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return the patches (B, L, p * p * C), in rows, of ``images`` (B, C, H, W) as float32; channels vary fastest."""
    b, c, h, w = images.shape
    x = images.float().reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Return images (B, C, H, W) from ``patches`` (B, L, p * p * C), the reverse of :func:`patchify`."""
    x = patches.view(len(patches), rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch, columns * patch)


def _number_in_segment(graph: FlatGraph) -> Tensor:
    """Return (N,) the number of a node within its type and graph; nodes are sorted by both."""
    counts = torch.from_numpy(graph.counts.T.ravel().copy()).to(graph.batch.device, non_blocking=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(graph.n_nodes, device=graph.batch.device) - starts[graph.segment]


def _linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
