"""Typed settings of every command, and how presets, a user's YAML and ``--set`` make them.

Unknown keys are refused with the nearest known one named. The schemas are the documentation of the keys: the tables in
``docs/`` are made from them.
"""

from rsosm_cli.settings.base import Settings
from rsosm_cli.settings.fetch import FetchSettings, RootSettings
from rsosm_cli.settings.graph import (
    DEFAULT_EXCLUDED_KEYS,
    NAME_KEYS,
    BuildSettings,
    GraphSettings,
    GridSettings,
    PerturbSettings,
    TagSettings,
)
from rsosm_cli.settings.models import (
    MODELS,
    AnyModel,
    CategorySettings,
    Method,
    MmgrSettings,
    ModelSettings,
    RoseSettings,
    model_of_method,
)
from rsosm_cli.settings.pretrain import AugmentSettings, OptimSettings, PretrainSettings, TextSettings
from rsosm_cli.settings.resolve import dump, load_preset, load_yaml, resolve, validate
from rsosm_cli.settings.task import ClassSettings, MapSettings, SplitSettings, TaskSettings

__all__ = [
    "DEFAULT_EXCLUDED_KEYS",
    "MODELS",
    "NAME_KEYS",
    "AnyModel",
    "AugmentSettings",
    "BuildSettings",
    "CategorySettings",
    "ClassSettings",
    "FetchSettings",
    "GraphSettings",
    "GridSettings",
    "MapSettings",
    "Method",
    "MmgrSettings",
    "ModelSettings",
    "OptimSettings",
    "PerturbSettings",
    "PretrainSettings",
    "RootSettings",
    "RoseSettings",
    "Settings",
    "SplitSettings",
    "TagSettings",
    "TaskSettings",
    "TextSettings",
    "dump",
    "load_preset",
    "load_yaml",
    "model_of_method",
    "resolve",
    "validate",
]
