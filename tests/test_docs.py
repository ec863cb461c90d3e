"""What in the documentation comes from the code is current, and what it links to is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *REPOSITORY.glob("docs/**/*.md")])


def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", REPOSITORY / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_completions_are_those_of_the_code() -> None:
    for path, text in build().made().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run python docs/build.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "#")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve()
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_every_command_line_in_the_documentation_is_understood() -> None:
    """Each ``rsosm ...`` line of the pages names a command and options that exist."""
    from rsosm_cli.app import COMMANDS

    module = build()
    options = {name: module.options_table(m.command) for group in COMMANDS.values() for name, m in group.items()}
    globals_ = {"--root", "--json", "--quiet", "--verbose", "--version", "--help", "--install-completion"}
    lines = [
        line.strip()
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"(    |)(\$ )?rsosm ", line)
    ]
    assert len(lines) > 30
    for line in lines:
        words = line.split(" | ")[0].split(" > ")[0].removeprefix("$ ").split()[1:]
        command = next((w for w in words if w in options), None)
        given = [w.split("=")[0] for w in words if w.startswith("--")]
        if command is None:
            assert set(given) <= globals_, line
            continue
        before = words[: words.index(command)]
        for option in given:
            assert option in globals_ if option in before else f"`{option}`" in options[command], f"{option} in: {line}"


def test_the_store_is_read_with_h5py_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tile_stores import make_store

    from rsosm_cli.tiles.store import TileStore

    make_store(tmp_path / "tiles.h5")
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(compile(code, "formats.md", "exec"), found)
    store = TileStore.open(tmp_path / "tiles.h5")
    nodes = store.graphs([17]).nodes["polygon"]
    edges = store.graphs([17]).edges["polygon", "polygon"]
    assert found["ids"].tolist() == nodes.osm_id.tolist()
    assert len(found["shapes"]) == len(nodes.osm_id) > 0
    assert found["source"].tolist() == edges.index[0].tolist()
    assert found["relation"].tolist() == edges.relation.tolist()
