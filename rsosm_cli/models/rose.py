"""Rose (Remote Sensing of Environment 318, 114573, 2025): joint masked reconstruction of an image tile and its OSM
graph.

One homogeneous graph: every object is text, sizes and shape in one vector. The image's hidden patches are
reconstructed with the help of the whole graph, the hidden objects with the help of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData

from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.models import draws
from rsosm_cli.models.contrastive import mean_over_ranks
from rsosm_cli.models.encodings import Encodings, Objects, Patches
from rsosm_cli.models.flat import flatten, segment_rank, segment_softmax, segment_sum
from rsosm_cli.models.fusion import TwoWayBlock
from rsosm_cli.models.geolink import patchify
from rsosm_cli.models.position import embed_grid, embed_points, in_patches
from rsosm_cli.models.readout import Set2Set
from rsosm_cli.models.vit import ImageEncoder, as_map
from rsosm_cli.models.vit_encoder import VitEncoder
from rsosm_cli.settings import RoseSettings

# Area, length, four corners of the oriented envelope, centroid: in tile units, after the text's columns.
GEOMETRY_WIDTH = 12


@dataclass(frozen=True)
class ObjectGraphs:
    """``N`` objects of ``B`` tiles, tile after tile: ``x`` (N, text + 12), ``edge_index`` (2, E), ``batch`` (N,).

    The last two columns of ``x`` are the centroid, in tile units.
    """

    x: Tensor
    edge_index: Tensor
    batch: Tensor
    n_graphs: int
    counts: NDArray[np.int64]  # (B,) objects of each tile, on the host
    order: Tensor | None = None  # (N,) the objects' numbers in the batch they come from, type after type


@dataclass(frozen=True)
class RoseMasks:
    """The visible patches ``keep`` (B, K) and the hidden objects ``nodes`` (M,), indices into the batch's."""

    keep: Tensor
    nodes: Tensor


@dataclass(frozen=True)
class RoseLosses:
    """The losses of a step and their predictions; means over ranks of the losses are those of the whole batch."""

    total: Tensor
    image: Tensor
    node: Tensor
    masks: RoseMasks
    image_prediction: Tensor  # (B, L, p * p * C)
    node_prediction: Tensor  # (M, text + 12)
    normalised: bool
    order: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.image, self.node

    @property
    def patches(self) -> Patches:
        return Patches(self.image_prediction, self.masks.keep, self.normalised)

    @property
    def objects(self) -> Objects:
        index = self.masks.nodes if self.order is None else self.order[self.masks.nodes]
        return Objects(index, self.node_prediction[:, :-GEOMETRY_WIDTH])


class GraphAttention(nn.Module):
    """One GATConv (one head) over a homogeneous graph, with one self loop a node whatever loops the graph has."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, in_width))
        self.att_source = nn.Parameter(torch.empty(width))
        self.att_target = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.att_source[None])
        nn.init.xavier_uniform_(self.att_target[None])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return (N, W) from ``x`` (N, C) and ``edge_index`` (2, E)."""
        n = len(x)
        hidden = F.linear(x, self.weight)
        loops = torch.arange(n, device=x.device)
        source, target = torch.cat((edge_index, loops.expand(2, -1)), 1)
        scores = (hidden @ self.att_source)[source] + (hidden @ self.att_target)[target]
        # Loops of the graph itself count for nothing; a mask, since dropping them would need their number.
        own = edge_index[0] == edge_index[1]
        scores = F.leaky_relu(scores, 0.2).masked_fill(F.pad(own, (0, n)), float("-inf"))
        alpha = segment_softmax(scores, target, n)
        return segment_sum(alpha[:, None] * hidden[source], target, n) + self.bias


class Rose(VitEncoder):
    """The model. ``text_width`` is the width of the objects' text vectors."""

    METHOD = "rose"
    LOSSES = ("image", "node")
    MODALITIES = ("image", "osm", "fused")
    # Of the objects there is one vector a tile: a map from them alone would be flat.
    MAPS = ("image", "fused")
    settings: RoseSettings

    def __init__(self, settings: RoseSettings, text_width: int) -> None:
        super().__init__()
        self.settings = s = settings
        self.text_width = text_width
        self.vit = ImageEncoder(
            s.image_encoder, s.image_size, s.in_chans, depth=s.image_depth, gsd_position=s.gsd_position
        )
        osm_width, heads = s.osm_width, s.heads
        width = self.vit.width
        node_width = text_width + GEOMETRY_WIDTH
        self.osm_encoder = GraphAttention(node_width, osm_width)
        self.norm_weight = nn.Parameter(torch.ones(osm_width))
        self.norm_bias = nn.Parameter(torch.zeros(osm_width))
        self.readout = Set2Set(osm_width, n_sets=1)
        self.node_token = nn.Parameter(torch.randn(node_width) * 0.02)
        self.patch_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.patches_in = nn.Linear(width, width)
        self.region_in = nn.Linear(2 * osm_width, width)
        self.objects_in = nn.Linear(osm_width, width)
        # Inside the cross attentions the width is halved.
        self.image_fusion = TwoWayBlock(width, heads, 0.0, inner=width // 2)
        self.node_fusion = TwoWayBlock(width, heads, 0.0, inner=width // 2)
        self.decoder = Block(width, heads, 4.0, qkv_bias=True, norm_layer=nn.LayerNorm)
        self.decoder_norm = nn.LayerNorm(width)
        self.predict_pixels = nn.Linear(width, self.vit.patch**2 * s.in_chans)
        self.node_norm = nn.LayerNorm(width)
        self.predict_node = nn.Linear(width, node_width)
        linear = (self.patches_in, self.region_in, self.objects_in, self.predict_pixels, self.predict_node)
        for module in (self.decoder, *linear):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)

    @property
    def widths(self) -> dict[str, int]:
        return {"image": self.vit.width, "osm": 2 * self.settings.osm_width, "fused": self.vit.width}

    def unused(self, modality: str, *, maps: bool) -> list[nn.Module | nn.Parameter]:
        pretraining = (
            self.node_token, self.patch_token, self.objects_in, self.node_fusion, self.decoder, self.decoder_norm,
            self.predict_pixels, self.node_norm, self.predict_node,
        )  # fmt: skip
        unused: list[nn.Module | nn.Parameter] = [*pretraining]
        if modality == "image":
            unused += [self.osm_encoder, self.norm_weight, self.norm_bias, self.readout]
        if modality == "osm":
            unused.append(self.vit)
        if modality != "fused":
            unused += [self.patches_in, self.region_in, self.image_fusion]
        return unused

    def step(
        self, images: Tensor, graphs: HeteroData, *, seeds: Tensor, gsd_m: Tensor | None, second: Tensor | None
    ) -> RoseLosses:
        return self.losses(images, self.objects_of(graphs), seeds=seeds, gsd_m=gsd_m)

    def objects_of(self, graphs: HeteroData) -> ObjectGraphs:
        """Return the heterographs as homogeneous ones: text vector, sizes and shape of every object in one, edges of
        all types together, tile after tile.
        """
        flat = flatten(graphs)
        stores = [graphs[name] for name in NODE_TYPES]
        shape = torch.cat(
            [torch.cat((s.area[:, None], s.length[:, None], s.envelope.flatten(1), s.centroid), 1) for s in stores]
        )
        order = flat.batch.argsort(stable=True)
        place = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
        edges = torch.stack((flat.source, flat.target))
        if not self.settings.delaunay:
            # The first of the nine edge types, source-major: its number is known on the host.
            edges = edges[:, len(flat.attr[0]) :]
        return ObjectGraphs(
            torch.cat((torch.cat(flat.x), shape), 1)[order], place[edges], flat.batch[order], flat.n_graphs,
            flat.totals, order,
        )  # fmt: skip

    def losses(
        self,
        images: Tensor,
        graphs: ObjectGraphs,
        *,
        seeds: Tensor | None = None,
        masks: RoseMasks | None = None,
        gsd_m: Tensor | float | None = None,
    ) -> RoseLosses:
        """Return both losses of ``images`` (B, C, H, W), normalised; masks are drawn from ``seeds`` (B,) unless
        given.
        """
        s = self.settings
        rows, columns = self.vit.check_size(images.shape[2], images.shape[3])
        if masks is None:
            seeds = draws.fresh_seeds(len(images), images.device) if seeds is None else seeds
            masks = self.draw_masks(seeds, graphs, rows * columns)
        # The image's hidden patches, with all objects.
        region = self.read(self.encode_objects(graphs.x, graphs, rows, columns), graphs)
        visible = self.vit(images, keep=masks.keep, gsd_m=gsd_m)
        prediction = self._decode(visible.cls, visible.patches, masks.keep, region, rows, columns)
        target = patchify(images, self.vit.patch)
        if s.normalise_pixels:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(-1)
        hidden = torch.ones_like(error).scatter(1, masks.keep, 0.0)
        image_loss = mean_over_ranks((error * hidden).sum(), hidden.sum())
        # The hidden objects, with all patches.
        is_hidden = torch.zeros(len(graphs.x), dtype=torch.bool, device=images.device).index_fill(0, masks.nodes, True)
        x = torch.where(is_hidden[:, None], self.node_token, graphs.x)
        nodes = self.encode_objects(x, graphs, rows, columns)
        seen = self.vit(images, gsd_m=gsd_m)
        tokens = self.patches_in(torch.cat((seen.cls[:, None], seen.patches), 1))
        predicted = self._predict_nodes(tokens, nodes, graphs, masks.nodes, rows, columns)
        node_error = (predicted.float() - graphs.x[masks.nodes]).square().mean(-1)
        node_loss = mean_over_ranks(node_error.sum(), node_error.new_full((), len(masks.nodes)))
        total = s.image_weight * image_loss + s.node_weight * node_loss
        return RoseLosses(total, image_loss, node_loss, masks, prediction, predicted, s.normalise_pixels, graphs.order)

    @torch.no_grad()
    def draw_masks(self, seeds: Tensor, graphs: ObjectGraphs, n_patches: int) -> RoseMasks:
        """Draw what is hidden from ``seeds`` (B,): a share of each tile's patches and objects, at least one object."""
        device, s = seeds.device, self.settings
        n_keep = max(1, int(n_patches * (1 - s.mask_patches)))
        noise = draws.mix(draws.mix(seeds, 0)[:, None], torch.arange(n_patches, device=device))
        keep = noise.argsort(1)[:, :n_keep].sort(1).values
        share = np.rint(graphs.counts * s.mask_nodes).astype(np.int64)
        hidden = np.minimum(np.maximum(share, min(1, int(np.ceil(s.mask_nodes)))), graphs.counts)  # (B,)
        counts, limit = (torch.from_numpy(n).to(device, non_blocking=True) for n in (graphs.counts, hidden))
        number = torch.arange(len(graphs.batch), device=device) - (counts.cumsum(0) - counts)[graphs.batch]
        rank = segment_rank(draws.mix(draws.mix(seeds, 1)[graphs.batch], number), graphs.batch, graphs.n_graphs)
        # The hidden ones first, in their order; how many they are is known on the host.
        first = (rank >= limit[graphs.batch]).to(torch.int8).argsort(stable=True)
        return RoseMasks(keep, first[: int(hidden.sum())])

    def encode_objects(self, x: Tensor, graphs: ObjectGraphs, rows: int, columns: int) -> Tensor:
        """Return (N, W): positions added to ``x`` (N, C), graph attention, norm."""
        position = embed_points(self._centroids(graphs, rows, columns), x.shape[1])
        out = self.osm_encoder(x + position, graphs.edge_index)
        segment = graphs.batch if self.settings.osm_norm == "graph" else torch.zeros_like(graphs.batch)
        n_segments = graphs.n_graphs if self.settings.osm_norm == "graph" else 1
        size = segment_sum(torch.ones_like(out[:, 0]), segment, n_segments).clamp(min=1) * out.shape[1]
        out = out - (segment_sum(out.sum(1), segment, n_segments) / size)[segment, None]
        variance = segment_sum(out.square().sum(1), segment, n_segments) / size
        out = out / (variance.clamp(min=1e-12).sqrt() + 1e-5)[segment, None]
        return out * self.norm_weight + self.norm_bias

    def read(self, nodes: Tensor, graphs: ObjectGraphs) -> Tensor:
        """Return the vectors of the tiles (B, 2 W) from encoded objects (N, W)."""
        return self.readout(nodes, graphs.batch, graphs.n_graphs)[0]

    def encode(
        self,
        images: Tensor | None,
        graphs: HeteroData | ObjectGraphs | None,
        *,
        maps: bool = False,
        levels: Sequence[int] = (),
        gsd_m: Tensor | float | None = None,
    ) -> Encodings:
        """Return image, OSM and fused encodings of what is given; nothing is hidden."""
        if images is None and graphs is None:
            raise ValueError("encode needs images, graphs or both")
        objects = self.objects_of(graphs) if isinstance(graphs, HeteroData) else graphs
        side = self.settings.image_size
        rows, columns = self.vit.check_size(*((side, side) if images is None else images.shape[2:]))
        region = None
        if objects is not None:
            region = self.read(self.encode_objects(objects.x, objects, rows, columns), objects)
        if images is None:
            return Encodings(osm=region)
        tokens = self.vit(images, levels=levels, gsd_m=gsd_m)
        fused = None
        if region is not None:
            inside = self.patches_in(torch.cat((tokens.cls[:, None], tokens.patches), 1))
            fused = self._fuse(inside, region, rows, columns)
        # The published heads read the cls tokens, not means of patches.
        return Encodings(
            image=tokens.cls,
            cls=tokens.cls,
            osm=region,
            fused=None if fused is None else fused[:, 0],
            image_map=as_map(tokens.patches, rows, columns) if maps else None,
            fused_map=as_map(fused[:, 1:], rows, columns) if maps and fused is not None else None,
            levels=tuple(as_map(level, rows, columns) for level in tokens.levels),
        )

    def _centroids(self, graphs: ObjectGraphs, rows: int, columns: int) -> Tensor:
        return in_patches(graphs.x[:, -2:], rows, columns)

    def _grid(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Position of the cls token (zero) and of the patches, (1 + L, D)."""
        return F.pad(embed_grid(rows, columns, self.vit.width, device=device), (0, 0, 1, 0))

    def _fuse(self, tokens: Tensor, region: Tensor, rows: int, columns: int) -> Tensor:
        """Return tokens (B, 1 + L, D) of the image that know the region (B, 2 W)."""
        query = self.region_in(region)[:, None]
        grid = self._grid(rows, columns, tokens.device)
        hybrid, tokens = self.image_fusion.hybrid_patches(query, query, tokens, grid)
        return self.image_fusion.hybrid_objects(hybrid, query, tokens, grid)

    def _decode(self, cls: Tensor, patches: Tensor, keep: Tensor, region: Tensor, rows: int, columns: int) -> Tensor:
        x = self.patches_in(torch.cat((cls[:, None], patches), 1))
        full = self.patch_token.to(x.dtype).expand(len(x), rows * columns, -1)
        full = full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = self._fuse(torch.cat((x[:, :1], full), 1), region, rows, columns)
        x = self.decoder(x + self._grid(rows, columns, x.device))
        return self.predict_pixels(self.decoder_norm(x))[:, 1:]

    def _predict_nodes(
        self, tokens: Tensor, nodes: Tensor, graphs: ObjectGraphs, hidden: Tensor, rows: int, columns: int
    ) -> Tensor:
        """Return predicted vectors (M, C) of the ``hidden`` (M,) objects, each with the tokens of its own tile."""
        position = embed_points(self._centroids(graphs, rows, columns)[hidden], self.vit.width)[:, None]
        objects = self.objects_in(nodes[hidden])[:, None]
        grid = self._grid(rows, columns, tokens.device)
        hybrid, objects = self.node_fusion.hybrid_patches(tokens[graphs.batch[hidden]], grid, objects, position)
        objects = self.node_fusion.hybrid_objects(hybrid, grid, objects, position)
        return self.predict_node(self.node_norm(objects[:, 0]))
