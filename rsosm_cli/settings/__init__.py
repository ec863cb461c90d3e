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
from rsosm_cli.settings.pretrain import AugmentSettings, ModelSettings, OptimSettings, PretrainSettings, TextSettings
from rsosm_cli.settings.resolve import dump, load_preset, load_yaml, resolve, validate
from rsosm_cli.settings.task import ClassSettings, MapSettings, SplitSettings, TaskSettings

__all__ = [
    "DEFAULT_EXCLUDED_KEYS",
    "NAME_KEYS",
    "AugmentSettings",
    "BuildSettings",
    "ClassSettings",
    "FetchSettings",
    "GraphSettings",
    "GridSettings",
    "MapSettings",
    "ModelSettings",
    "OptimSettings",
    "PerturbSettings",
    "PretrainSettings",
    "RootSettings",
    "Settings",
    "SplitSettings",
    "TagSettings",
    "TaskSettings",
    "TextSettings",
    "dump",
    "load_preset",
    "load_yaml",
    "resolve",
    "validate",
]
