"""Where the packaged presets lie and what they are called: light, because shell completion asks for it."""

from __future__ import annotations

from pathlib import Path


def presets_dir(kind: str) -> Path:
    """Return the folder of packaged presets of one kind (`pretrain`, `tasks`)."""
    package = Path(__file__).parent
    installed = package / "configs"
    return (installed if installed.is_dir() else package.parent / "configs") / kind


def preset_names(kind: str) -> list[str]:
    return sorted(p.stem for p in presets_dir(kind).glob("*.yaml"))
