"""Settings of the three models, and the method that each is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from rsosm_cli.settings.base import Settings, fill_compat

Method = Literal["geolink", "rose", "mmgr"]

# Keys of things that one goes to, the telling one first: an object's category is its tag of the first key it carries.
POINT_KEYS: tuple[str, ...] = (
    "amenity", "shop", "tourism", "office", "healthcare", "leisure", "craft", "historic", "sport", "public_transport",
    "railway", "aeroway",
)  # fmt: skip


class ModelSettings(Settings):
    """GeoLink (`docs/methods.md`)."""

    image_encoder: str = Field("vit_large_patch16_224", description="Any timm ViT.")
    image_size: int = Field(224, gt=0, description="Side of the training crop, in pixels; a multiple of the patch.")
    image_depth: int | None = Field(None, gt=0, description="How many of the named ViT's blocks; none: all.")
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


class RoseSettings(Settings):
    """Rose (`docs/methods.md`)."""

    image_encoder: str = Field("vit_base_patch16_224", description="Any timm ViT.")
    image_size: int = Field(224, gt=0, description="Side of the training crop, in pixels; a multiple of the patch.")
    image_depth: int | None = Field(None, gt=0, description="How many of the named ViT's blocks; none: all.")
    in_chans: int = Field(3, gt=0, description="Image bands.")
    gsd_position: bool = Field(
        False, description="Scale the image's position embedding by the ground sample distance, as Scale-MAE does."
    )
    object_keys: tuple[str, ...] = Field(
        ("amenity", "building", "landuse", "leisure", "natural", "highway"),
        description="Objects with a tag of these keys take part; none: all objects.",
    )
    delaunay: bool = Field(False, description="Neighbours among points are edges, too.")
    osm_width: int = Field(128, gt=0, description="Width of an encoded object.")
    osm_norm: Literal["graph", "batch"] = Field("graph", description="Extent of the norm after the OSM encoder.")
    heads: int = Field(8, gt=0, description="Attention heads of the cross attentions and the decoder.")
    mask_patches: float = Field(0.75, ge=0, lt=1, description="Share of patches masked.")
    mask_nodes: float = Field(0.15, ge=0, lt=1, description="Share of the objects of each tile masked, at least one.")
    normalise_pixels: bool = Field(False, description="Reconstruct pixels normalised patch by patch.")
    image_weight: float = Field(1.0, ge=0, description="Weight of the image reconstruction loss.")
    node_weight: float = Field(1.0, ge=0, description="Weight of the masked-object loss.")


class CategorySettings(Settings):
    """Embeddings of POI categories by co-occurrence walks; only for `points: cooccurrence`."""

    walks: int = Field(5, gt=0, description="Random walks from every point.")
    steps: int = Field(10, gt=1, description="Points of a walk.")
    p: float = Field(0.5, gt=0, description="Return parameter of the walks (node2vec): smaller turns back more often.")
    q: float = Field(0.5, gt=0, description="In-out parameter of the walks (node2vec): smaller goes further away.")
    window: int = Field(5, gt=0, description="Points of a walk that are context of one another lie at most this apart.")
    negatives: int = Field(5, gt=0, description="Negative categories for each pair of the skip-gram.")
    siblings: float = Field(
        0.005, ge=0, description="Weight that pulls categories of one key (`amenity:bar`, `amenity:pub`) together."
    )
    least: int = Field(5, gt=0, description="Categories with fewer points share the vector of their key.")
    updates: int = Field(400, gt=0, description="Updates of the skip-gram, each over all pairs.")


class MmgrSettings(Settings):
    """MMGR (`docs/methods.md`)."""

    image_encoder: str = Field("resnet50", description="Any timm network of stages, such as a ResNet.")
    image_size: int = Field(224, gt=0, description="Side of the training crop, in pixels.")
    in_chans: int = Field(3, gt=0, description="Image bands.")
    points: Literal["cooccurrence", "text"] = Field(
        "cooccurrence",
        description="What a point of interest is to the model: its category's embedding by co-occurrence, or the text "
        "vector of its category.",
    )
    point_keys: tuple[str, ...] = Field(
        POINT_KEYS,
        description="Keys that make a point or an area a point of interest; the first that it has is its category's.",
    )
    point_width: int = Field(64, gt=0, description="Width of a category's embedding (`points: cooccurrence`).")
    width: int = Field(128, gt=0, description="Width of the contrastive projections.")
    temperature: float = Field(0.5, gt=0, description="Temperature of the contrastive losses.")
    views_weight: float = Field(0.5, ge=0, description="Weight of the contrast of two views of an image.")
    points_weight: float = Field(0.5, ge=0, description="Weight of the contrast of image and points.")
    categories: CategorySettings = CategorySettings()


AnyModel = ModelSettings | RoseSettings | MmgrSettings
MODELS: dict[str, type[AnyModel]] = {"geolink": ModelSettings, "rose": RoseSettings, "mmgr": MmgrSettings}


def model_of_method(value: Any, info: ValidationInfo) -> Any:
    """Return ``value`` as the settings of the model of the ``method`` that stands before it."""
    schema = MODELS[info.data.get("method", "geolink")]
    if isinstance(value, Mapping):
        return schema.model_validate(value)
    if not isinstance(value, schema):
        raise ValueError(f"these are not settings of the method {info.data.get('method')}")
    return value
