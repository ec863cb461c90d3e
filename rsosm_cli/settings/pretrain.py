"""Settings of `pretrain`: the text encoder, the model, the optimisation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rsosm_cli.settings.base import Settings, fill_compat


class TextSettings(Settings):
    encoder: str = Field("minilm", description="`minilm`, `clip`, or a folder with a transformers text model.")
    tag_weight: Literal["count", "log"] = Field(
        "count", description="Weight of a tag: occurrences of its key, or their ln."
    )
    tag_counts: str = Field(
        "", description="Table of the keys' occurrences (`key count`, one a line) in place of the training tiles' own."
    )


class ModelSettings(Settings):
    """GeoLink (`docs/methods.md`)."""

    image_encoder: str = Field("vit_large_patch16_224", description="Any timm ViT.")
    image_size: int = Field(224, gt=0, description="Side of the training crop, in pixels; a multiple of the patch.")
    in_chans: int = Field(3, gt=0, description="Image bands.")
    gsd_position: bool = Field(
        False, description="Scale the image's position embedding by the ground sample distance, as Scale-MAE does."
    )
    osm_encoder: Literal["gat", "gcn", "transformer"] = Field("gat", description="Layer over the heterograph.")
    osm_width: int = Field(128, gt=0, description="Width of an encoded object.")
    fusion_width: int = Field(256, gt=0, description="Width of the two-way fusion block.")
    fusion_heads: int = Field(16, gt=0, description="Attention heads of the fusion block.")
    fusion_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout in the fusion block.")
    fusion_position: bool = Field(True, description="Position embeddings in the fusion block.")
    fusion_values: Literal["content", "position"] = Field(
        "content",
        description="What attention in the fusion block hands on: `content` alone, as published, or content with its "
        "`position`, so that patches learn where objects are.",
    )
    decoder_width: int = Field(512, gt=0, description="Width of the reconstruction decoder.")
    decoder_depth: int = Field(2, gt=0, description="Blocks of the reconstruction decoder.")
    decoder_heads: int = Field(16, gt=0, description="Heads of the reconstruction decoder.")
    projection_width: int = Field(64, gt=0, description="Width of the contrastive projections.")
    temperature: float = Field(0.2, gt=0, description="Temperature of the contrastive loss.")
    mask_patches: float = Field(0.75, ge=0, lt=1, description="Share of patches masked.")
    mask_nodes: float = Field(0.2, ge=0, lt=1, description="Share of the nodes of each type and graph masked.")
    image_weight: float = Field(1.0, ge=0, description="Weight of the image reconstruction loss.")
    contrastive_weight: float = Field(0.01, ge=0, description="Weight of the contrastive loss.")
    node_weight: float = Field(0.01, ge=0, description="Weight of the masked-node loss.")
    compat: Literal["none", "released"] = Field(
        "none", description="`released` sets the five keys below as the published code does."
    )
    type_attention: Literal["softmax", "sum"] = Field("softmax", description="Read-out over the node types.")
    edge_dim: bool = Field(True, description="Relation one-hots enter the OSM encoder.")
    osm_norm: Literal["graph", "batch"] = Field("graph", description="Extent of the LayerNorm after the OSM encoder.")
    patch_centre: float = Field(0.5, ge=0, le=0.5, description="Where patch i sits on the position axis: i + this.")
    objects_max: int | None = Field(
        None, gt=0, description="Objects a tile in the fusion while pretraining; none: all."
    )

    @model_validator(mode="before")
    @classmethod
    def _released(cls, values: Any) -> Any:
        return fill_compat(
            values, type_attention="sum", edge_dim=False, osm_norm="batch", patch_centre=0.0, objects_max=10
        )


class OptimSettings(Settings):
    lr: float = Field(1e-4, gt=0, description="Base learning rate, at batch size 256 (scaled linearly).")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    epochs: int = Field(60, gt=0, description="Passes over the data.")
    warmup_epochs: float = Field(5.0, ge=0, description="Linear warm-up, in epochs.")
    batch_size: int = Field(256, gt=0, description="Samples a step, over all devices.")
    accumulate: int = Field(1, gt=0, description="Steps whose gradients are added before an update.")
    clip_norm: float | None = Field(None, gt=0, description="Largest gradient norm; none: no clipping.")


class AugmentSettings(Settings):
    crop_scale: tuple[float, float] = Field(
        (0.2, 1.0), description="Share of the tile's area that a random crop keeps."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Chance of a horizontal flip.")
    colour: float = Field(0.4, ge=0, description="Strength of brightness, contrast and saturation jitter.")


class PretrainSettings(Settings):
    """Settings of `pretrain`."""

    method: Literal["geolink"] = Field("geolink", description="Pretraining method.")
    model: ModelSettings = ModelSettings()
    text: TextSettings = TextSettings()
    optim: OptimSettings = OptimSettings()
    augment: AugmentSettings = AugmentSettings()
    image_weights: str = Field(
        "", description="File of weights of the timm ViT to start the image encoder from; none: drawn anew."
    )
    precision: Literal["32", "bf16"] = Field("32", description="Arithmetic of the forward pass.")
    checkpoint_blocks: bool = Field(
        False, description="Compute the ViT's blocks again in the backward pass: less memory, about a third more time."
    )
    compile: bool = Field(
        False, description="Compile the ViT with `torch.compile`: minutes at the start, faster steps on a GPU."
    )
    workers: int = Field(2, ge=0, description="Processes that load data, a device.")
    holdout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the tiles held out for the retrieval check, as whole blocks of ground.",
    )
    checkpoint_minutes: float = Field(10.0, gt=0, description="Minutes between checkpoints within an epoch.")
    seed: int = Field(0, description="Seed of every draw.")
