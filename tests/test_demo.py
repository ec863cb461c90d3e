"""The demo: the whole chain on a town made on the spot, and again without doing anything twice."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from rsosm_cli.pipeline import demo as module
from rsosm_cli.pipeline.demo import demo
from rsosm_cli.town.make import NAME

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = ["fetch", "build-graph", "pretrain", "finetune", "embed", "map"]


def test_the_town_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module._town(tmp_path, 0, 2, False, module.SILENT)
    stamp = first.imagery.stat().st_mtime_ns
    assert module._town(tmp_path, 0, 2, False, module.SILENT) == first
    assert first.imagery.stat().st_mtime_ns == stamp
    module._town(tmp_path, 0, 3, False, module.SILENT)
    assert first.imagery.stat().st_mtime_ns != stamp


@pytest.mark.slow
def test_the_chain_makes_a_map_and_skips_what_is_finished(tmp_path: Path) -> None:
    results = demo(root=tmp_path, tiles=4, device="cpu")
    assert [r.command for r in results] == STEPS
    assert [r.status for r in results] == ["done"] * 6
    paths = results[-1].paths
    assert all(Path(p).is_file() for p in paths.values())
    assert {Path(p).suffix for p in paths.values()} >= {".tif", ".gpkg", ".png", ".json"}
    statistics = json.loads(next(Path(p) for p in paths.values() if p.endswith(".stats.json")).read_text())
    assert statistics
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = demo(root=moved, tiles=4, device="cpu")
    assert [r.status for r in again] == ["skipped"] * 6
    (moved / "demo" / "town.tif").touch()  # as a copy of the root is
    again = demo(root=moved, tiles=4, device="cpu")
    assert [r.status for r in again] == ["done"] * 6


def blocks() -> list[str]:
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_of_the_documentation_uses_what_exists() -> None:
    import rsosm_cli

    for name in rsosm_cli.__all__:
        assert getattr(rsosm_cli, name) is not None
    for block in blocks():
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rsosm":
                assert node.attr in rsosm_cli.__all__, node.attr
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rsosm_cli"):
                home = importlib.import_module(node.module)
                assert all(hasattr(home, alias.name) for alias in node.names)


@pytest.mark.slow
def test_the_python_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rsosm_cli.town import make

    monkeypatch.chdir(tmp_path)
    whole = make.make_town
    monkeypatch.setattr("rsosm_cli.make_town", lambda folder: whole(folder, tiles=4))
    code = "\n".join(blocks()).replace('"optim.epochs": 5', '"optim.epochs": 1')
    exec(compile(code, "python.md", "exec"), {})
    assert list(Path("rsosm-data").glob(f"cities/{NAME.casefold()}/maps/landuse.tif"))
