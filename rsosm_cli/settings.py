"""Typed settings of every command, and how presets, a user's YAML and ``--set`` make them.

Unknown keys are refused with the nearest known one named. The schemas are the documentation of the keys: the tables in
``docs/`` are made from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rsosm_cli.errors import UsageError
from rsosm_cli.presets import preset_names, presets_dir

S = TypeVar("S", bound="Settings")

# Keys that say how an element was mapped, or whom it belongs to, not what it is.
DEFAULT_EXCLUDED_KEYS: tuple[str, ...] = (
    "source", "source:*", "created_by", "tiger:*", "attribution", "import", "import_uuid", "note", "note:*",
    "fixme", "FIXME", "comment", "ref:*", "gnis:*", "NHD:*", "KSJ2:*", "CLC:*", "massgis:*", "lacounty:*",
    "chicago:*", "nycdoitt:*", "osak:*", "addr:housenumber", "addr:housename", "addr:interpolation",
    "addr:postcode", "addr:unit", "phone", "contact:*", "fax", "email", "website", "url", "image", "wikidata",
    "wikipedia", "wikipedia:*", "mapillary", "survey:date", "check_date", "check_date:*", "HH_LINK", "*:wikidata",
    "*:wikipedia", "generator:url", "*:url",
)  # fmt: skip
# Names say who, not what; they are also the bulk of a vocabulary. `--set graph.tags.names=true` lets them in.
NAME_KEYS: tuple[str, ...] = (
    "name", "name:*", "*_name", "*_name:*", "*:name", "addr:street", "addr:place", "operator", "brand",
)  # fmt: skip


def _fill_compat(values: Any, **released: Any) -> Any:
    if isinstance(values, Mapping) and values.get("compat") == "released":
        return {**released, **values}
    return values


class Settings(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class GridSettings(Settings):
    tile: int = Field(224, gt=0, description="Side of a tile, in pixels.")
    stride: int = Field(224, gt=0, description="Step from a tile to the next, in pixels.")
    gsd: float = Field(0.6, gt=0, description="Metres on the ground a pixel, at the city's centre.")


class TagSettings(Settings):
    names: bool = Field(False, description="Let names, operators and streets into the vocabulary.")
    exclude: tuple[str, ...] = Field(DEFAULT_EXCLUDED_KEYS, description="Keys left out (shell patterns, `tiger:*`).")


class PerturbSettings(Settings):
    """The papers' robustness experiments, seeded."""

    drop_objects: float = Field(0.0, ge=0, lt=1, description="Share of the objects removed at random.")
    shift_m: float = Field(0.0, ge=0, description="Every object shifted by this many metres, in a random direction.")
    drop_keys: tuple[str, ...] = Field((), description="Tag keys removed (shell patterns); objects left untagged go.")
    seed: int = Field(0, description="Seed of the perturbation.")


class GraphSettings(Settings):
    """What `tiles.h5` depends on besides the city's data."""

    compat: Literal["none", "released"] = Field(
        "none", description="`released` sets `relations` and `key_points` as the published code does."
    )
    relations: Literal["partition", "released"] = Field("partition", description="Rule from DE-9IM to relation.")
    key_points: Literal["seeded", "released"] = Field(
        "seeded", description="`seeded`: midpoint and ends of lines, polygon radii drawn by element id."
    )
    tags: TagSettings = TagSettings()
    perturb: PerturbSettings = PerturbSettings()

    @model_validator(mode="before")
    @classmethod
    def _released(cls, values: Any) -> Any:
        return _fill_compat(values, relations="released", key_points="released")


class BuildSettings(Settings):
    """Settings of `build-graph`."""

    grid: GridSettings = GridSettings()
    graph: GraphSettings = GraphSettings()
    bands: tuple[int, ...] = Field((1, 2, 3), description="Bands of the imagery, counted from 1.")


class FetchSettings(Settings):
    """Settings of `fetch`."""

    overpass_url: str = Field("https://overpass-api.de/api", description="Overpass API.")
    nominatim_url: str = Field("https://nominatim.openstreetmap.org/", description="Nominatim API.")
    overpass_max_km2: float = Field(
        100.0, gt=0, description="Above this area, Overpass is refused in favour of an extract."
    )
    contact: str = Field("", description="E-mail or URL of the user, sent in the User-Agent to public servers.")
    max_wait_s: float = Field(
        300.0, gt=0, description="Longest wait for a busy server, in seconds, all tries together."
    )
    xyz_zoom: int | None = Field(
        None, ge=0, le=24, description="Zoom of a tile service; default: the one that meets the GSD."
    )
    xyz_workers: int = Field(4, ge=1, le=16, description="Tile requests at a time.")
    xyz_rate: float = Field(20.0, gt=0, description="Tile requests a second at most.")
    xyz_placeholders: bool = Field(
        True, description="Take tiles whose very bytes repeat for the service's `no imagery` picture: missing."
    )
    nodata: int | None = Field(
        None,
        description="Value that stands for missing image where all bands have it over at least 17 x 17 pixels, "
        "for rasters that have no nodata value (white: 255).",
    )


class RootSettings(Settings):
    """The user's defaults for one root: `<root>/config.yaml`."""

    imagery: tuple[str, ...] = Field((), description="Imagery of every city: rasters, XYZ templates, service names.")
    contact: str = Field("", description="E-mail or URL of the user, sent in the User-Agent to public servers.")
    gsd: float | None = Field(None, gt=0, description="Metres on the ground a pixel, to fetch imagery at.")

    @field_validator("imagery", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class TextSettings(Settings):
    encoder: str = Field("minilm", description="`minilm`, `clip`, or a folder with a transformers text model.")
    tag_weight: Literal["count", "log"] = Field(
        "count", description="Weight of a tag: occurrences of its key, or their ln."
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
        return _fill_compat(
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


class ClassSettings(Settings):
    name: str = Field(description="Name of the class.")
    colour: str = Field(pattern=r"^#[0-9a-fA-F]{6}$", description="Colour in maps, `#rrggbb`.")
    value: int | str | None = Field(
        None, description="Value of the class in labels; default: its place in the list, from 0, or its name."
    )


class SplitSettings(Settings):
    """Which ground trains, which chooses the epoch, which tests: never the same, and never tiles that overlap."""

    by: Literal["blocks", "city", "file"] = Field(
        "blocks",
        description="`blocks` of ground drawn by the seed; whole cities (`test_cities`); `file`: polygons with an "
        "attribute `split` (train, validation, test).",
    )
    test_cities: tuple[str, ...] = Field((), description="Cities whose labels only test (`by: city`).")
    file: str | None = Field(None, description="Vector file with an attribute `split` (`by: file`).")
    train: float = Field(0.5, gt=0, lt=1, description="Share of the blocks for training.")
    validation: float = Field(0.1, ge=0, lt=1, description="Share of the blocks for choosing the epoch.")
    block_m: float = Field(
        500.0, gt=0, description="Side of the square blocks of ground that go whole to one part, in metres."
    )
    buffer_m: float = Field(
        0.0, ge=0, description="Strip along the borders of the blocks that is used by none, in metres."
    )

    @model_validator(mode="after")
    def _parts(self) -> SplitSettings:
        if self.train + self.validation >= 1:
            raise ValueError("the shares of training and validation leave nothing to test on")
        if self.by == "city" and not self.test_cities:
            raise ValueError("a split by city needs test_cities")
        if self.by == "file" and self.file is None:
            raise ValueError("a split by file needs file")
        return self


class TaskSettings(Settings):
    """A task: what is predicted, from which labels, with which head."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$", description="Short name; maps are `maps/<name>.tif`.")
    title: str = Field("", description="Title in legends and reports.")
    kind: Literal["segmentation", "regression"] = Field("segmentation", description="Kind of prediction.")
    classes: tuple[ClassSettings, ...] = Field((), description="Classes in order (segmentation).")
    attribute: str = Field("class", description="Attribute of vector labels that holds the class or the value.")
    background: str | None = Field(
        None, description="Class of labelled ground that no polygon covers; none: it is ignored."
    )
    ignore: tuple[int, ...] = Field((255,), description="Raster label values that mean `no label`.")
    point_radius_m: float = Field(
        0.0, ge=0, description="Radius of ground that a point label speaks for, in metres; 0: its pixel."
    )
    aggregate: Literal["mean", "sum"] = Field(
        "mean",
        description="How label values combine over a tile (regression): `mean` of a rate or density by area; `sum`: "
        "totals, shared by area; the prediction is the total of a tile.",
    )
    unit: str = Field("", description="Unit of the predicted value (regression).")
    log_target: bool = Field(False, description="Fit ln(1 + value) (regression).")
    loss: Literal["cross_entropy", "focal", "dice_cross_entropy", "mse", "l1"] = Field(
        "cross_entropy", description="Loss."
    )
    class_weights: Literal["none", "balanced"] = Field("none", description="Weights of the classes in the loss.")
    decoder: Literal["upernet", "linear", "mlp"] = Field("upernet", description="Head.")
    decoder_width: int = Field(512, gt=0, description="Channels of the `upernet` head; hidden width of the `mlp` head.")
    modality: Literal["image", "osm", "fused"] = Field("fused", description="What the head sees.")
    protocol: Literal["finetune", "frozen", "linear", "knn", "scratch"] = Field(
        "finetune", description="What is trained."
    )
    neighbours: int = Field(20, gt=0, description="Neighbours of the knn protocol.")
    scratch: str = Field(
        "geolink-tiny", description="Pretraining preset whose model `protocol: scratch` trains where there is no run."
    )
    encoder_lr: float = Field(0.01, ge=0, description="Learning rate of the encoder, as a multiple of the head's.")
    optim: OptimSettings = Field(
        OptimSettings(lr=1e-4, betas=(0.9, 0.999), epochs=30, warmup_epochs=1, batch_size=32),
        description="Optimisation; the learning rate is the head's, as it stands, whatever the batch.",
    )
    split: SplitSettings = SplitSettings()
    precision: Literal["32", "bf16"] = Field("32", description="Arithmetic of the forward pass.")
    workers: int = Field(2, ge=0, description="Processes that load data.")
    seed: int = Field(0, description="Seed of every draw.")

    @model_validator(mode="after")
    def _classes(self) -> TaskSettings:
        names = [c.name for c in self.classes]
        if self.kind == "segmentation" and len(names) < 2:
            raise ValueError("a segmentation task needs at least two classes")
        if self.kind == "regression" and names:
            raise ValueError("a regression task has no classes")
        if len(set(names)) < len(names):
            raise ValueError("class names must differ")
        if self.background is not None and self.background not in names:
            raise ValueError(f"background {self.background!r} is not one of the classes {', '.join(names)}")
        return self


class MapSettings(Settings):
    """Settings of `map`."""

    overlap: float = Field(0.5, ge=0, lt=0.9, description="Share of a window that the next one covers again.")
    batch_size: int = Field(8, gt=0, description="Windows at a time.")
    min_area_m2: float = Field(0.0, ge=0, description="Polygons below this area are left out.")
    simplify_px: float = Field(
        1.0, ge=0, description="Tolerance of the polygons' outlines, in pixels; 0: the pixels' edges."
    )
    probability: bool = Field(False, description="Write the probability of each class, too.")
    uncertainty: bool = Field(False, description="Write the entropy of the class probabilities (0 to 1), too.")
    tta: bool = Field(False, description="Average over the eight turns and mirrorings of every window.")
    precision: Literal["32", "bf16"] = Field("32", description="Arithmetic of the forward pass.")


def resolve(
    schema: type[S],
    *,
    kind: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    options: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> S:
    """Return settings from, later over earlier: preset, the user's YAML, options, ``a.b=value`` assignments.

    A YAML may say ``extends: NAME`` (a packaged preset of ``kind``) or ``extends: other.yaml`` (beside it).
    ``options`` maps dotted keys to values; ``None`` means "not given". Raises :class:`UsageError`.
    """
    merged: dict[str, Any] = {}
    if preset is not None:
        _merge(merged, load_preset(kind or "", preset))
    if config is not None:
        _merge(merged, load_yaml(config, kind))
    for key, value in (options or {}).items():
        if value is not None:
            _merge(merged, _nested(key, value))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"--set {assignment!r} is not of the form key=value.",
                hint="For example: --set optim.epochs=5",
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _merge(merged, _nested(key.strip(), value))
    where = str(config) if config is not None else (f"preset {preset}" if preset else "the settings")
    return validate(schema, merged, where)


def validate(schema: type[S], values: Mapping[str, Any], where: str) -> S:
    """Return ``values`` as ``schema``; an error names the file, the key, the value and the nearest known key."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(schema, error)}") from None


def load_preset(kind: str, name: str) -> dict[str, Any]:
    path = presets_dir(kind) / f"{name}.yaml"
    if not path.is_file():
        known = preset_names(kind)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
        raise UsageError(f"There is no preset {name!r}.", hint=hint, value=name, known=known)
    return load_yaml(path, kind)


def load_yaml(path: Path, kind: str | None = None, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a YAML mapping with its ``extends`` resolved."""
    path = path.resolve()
    if path in _seen:
        raise UsageError(f"{path.name} extends itself.", hint="Remove one `extends` of the circle.")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, not keys and values.")
    base = loaded.pop("extends", None)
    if base is None:
        return loaded
    beside = path.parent / str(base)
    if str(base).endswith((".yaml", ".yml")):
        merged = load_yaml(beside, kind, (*_seen, path))
    else:
        merged = load_preset(kind or "", str(base))
    _merge(merged, loaded)
    return merged


def dump(settings: Settings) -> str:
    """Return settings as YAML, every key spelled out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _explain(schema: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(schema)
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.7) or [
            by_leaf[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_leaf), n=1)
        ]
        nearest = close[0] if close else difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        return f"unknown key {key!r}. Did you mean {nearest!r}?"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{message}."
    given = first.get("input")
    shown = f" = {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    return f"key {key!r}{shown}: {message[0].lower()}{message[1:]}."
