"""The command line as a user meets it: help, completion, wrong calls, lists of cities, pipes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rsosm_cli.app import run
from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.cities import city_names, each_city
from rsosm_cli.pipeline.result import Result
from rsosm_cli.presets import preset_names
from rsosm_cli.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = (
    "fetch", "build-graph", "pretrain", "finetune", "embed", "map", "evaluate", "convert", "info", "demo",
)  # fmt: skip
# Help and completion answer within a quarter of a second: none of these fits into it.
HEAVY = {
    "torch", "numpy", "h5py", "pandas", "shapely", "geopandas", "rasterio", "yaml", "scipy", "osmium", "PIL",
    "pydantic", "rich.markdown", "pygments",
}  # fmt: skip


def imported(environment: dict[str, str], *args: str) -> tuple[set[str], str]:
    """Return the modules that a call of the executable imports, and its output."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('MODULES', *sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr))\n"
        f"sys.argv = ['rsosm', *{list(args)!r}]\n"
        "from rsosm_cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "MODULES" in done.stderr, done.stderr
    return set(done.stderr.rsplit("MODULES", 1)[1].split()), done.stdout


@pytest.mark.parametrize("args", [["--help"], ["fetch", "--help"], ["finetune", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    modules, out = imported({}, *args)
    assert not modules & HEAVY
    assert out


def complete(shell: str, words: str, root: Path) -> tuple[set[str], list[str]]:
    """Return the modules imported and the words offered at the end of ``words``."""
    bash = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    other = {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {"_RSOSM_COMPLETE": f"complete_{shell}", "RSOSM_ROOT": str(root)}
    modules, out = imported({**environment, **(bash if shell == "bash" else other)})
    return modules, [line.split("\t")[0].strip() for line in out.splitlines() if line.strip()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("Porto", "São Paulo", "北京"):
        city = Workspace(tmp_path).city(name)
        city.folder.mkdir(parents=True)
        city.manifest.update(name=name)
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_commands_tasks_and_cities(shell: str, root: Path) -> None:
    modules, offered = complete(shell, "rsosm ", root)
    assert not modules & HEAVY
    assert all(any(c in line for line in offered) for c in COMMANDS)
    modules, offered = complete(shell, "rsosm finetune ", root)
    assert not modules & HEAVY
    assert all(any(t in line for line in offered) for t in preset_names("tasks"))
    modules, offered = complete(shell, "rsosm embed --city ", root)
    assert not modules & HEAVY
    assert any("北京" in line for line in offered)
    assert any(("São\\ Paulo" if shell == "bash" else "São Paulo") in line for line in offered)


def test_completion_narrows_to_what_is_typed(root: Path) -> None:
    assert complete("bash", "rsosm embed --city Por", root)[1] == ["Porto"]
    assert complete("bash", "rsosm map uf", root)[1] == ["ufd", "ufz"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_files_are_current(shell: str, tmp_path: Path) -> None:
    script = imported({"_RSOSM_COMPLETE": f"source_{shell}"})[1]
    assert (REPOSITORY / "completions" / f"rsosm.{shell}").read_text() == script


def test_completion_works_in_bash_itself(root: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    shim = root / "rsosm"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rsosm_cli "$@"\n')
    shim.chmod(0o755)
    script = (
        f"source {REPOSITORY}/completions/rsosm.bash; COMP_WORDS=(rsosm bu); COMP_CWORD=1; "
        f'_rsosm_completion {shim}; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.split() == ["build-graph"]


def test_every_command_has_help_with_examples_in_panels(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    top = capsys.readouterr().out
    assert all(f" {c} " in top for c in COMMANDS)
    for command in COMMANDS:
        assert run([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"rsosm {command}" in text or "rsosm --root" in text
        assert "Examples:" in text
        assert max(map(len, text.splitlines())) <= 120


def test_help_fits_a_narrow_terminal_without_unicode(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["map", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    assert "--checkpoint  PATH" in text
    assert "[default: auto]" in " ".join(text.split())
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run(["map", "--help"]) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["fetch", "--nonsense"], "No such option"),
        (["fetch", "--json", "--city", "x"], "stands before the command"),
        (["fetch", "--city", "x", "--bbox", "1,2,3"], "See rsosm fetch --help"),
        (["--root"], "requires an argument. See rsosm --help"),
        (["finetune"], "Missing argument 'TASK'"),
        (["fetch"], "No city is named"),
        (["fetch", "--city", "x", "--set", "nonsense=1"], "unknown key 'nonsense'"),
        (["finetune", "landuses", "--labels", "x", "--city", "x"], "Did you mean 'landuse'"),
        (["pretrain", "--preset", "geolink-tinny"], "Did you mean 'geolink-tiny'"),
        (["pretrain", "--preset", "rose-tiny", "--method", "mmgr"], "The preset rose-tiny is of the method rose"),
        (["embed", "--device", "abacus"], "abacus"),
        (["info", "--tile", "-1"], "-1"),
        (["evaluate", "landuse", "--city", "x", "--city", "y", "--output", "o"], "2 cities are named"),
        (["embed", "--city", "x", "--city", "y", "--output", "o.h5"], "2 cities are named"),
        (["build-graph", "--city", "x", "--city", "y", "--output", "o.h5"], "2 cities are named"),
        (["map", "landus", "--city", "x"], "Did you mean landuse"),
        (["map", "landuse", "--city", "x", "--city", "y", "--output", "o"], "2 cities are named"),
        (["evaluate", "landuse", "--city", "x", "--city", "y", "--regions", "no.csv"], "no table of regions no.csv"),
        (["fetch", "--cities", "no-such-file"], "list of cities"),
    ],
)
def test_a_wrong_call_is_status_2_and_one_sentence(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["--root", str(tmp_path), *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in " ".join(err.split())
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "command", "subject"),
    [
        (["fetch", "--nosuch"], "fetch", ""),
        (["nosuch"], "rsosm", ""),
        (["--nosuch", "fetch"], "rsosm", ""),
        ([], "rsosm", ""),
        (["fetch", "--city", "X", "--bbox", "1", "2", "3"], "fetch", "X"),
        (["fetch", "--city=X", "--gsd", "abc"], "fetch", "X"),
        (["fetch", "--city", "X", "--city", "Y", "--workers", "0"], "fetch", ""),
        (["fetch", "--json", "--city", "X"], "fetch", "X"),
        (["finetune"], "finetune", ""),
        (["fetch"], "fetch", ""),
        (["fetch", "--city", "X", "--set", "nonsense=1"], "fetch", "X"),
    ],
)
def test_a_wrong_call_is_a_json_object_too(
    args: list[str], command: str, subject: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for before in (["--json"], ["--root", str(tmp_path), "--json"], ["--json", "--quiet"]):
        assert run([*before, *args]) == 2
        out, err = capsys.readouterr()
        said = json.loads(out)
        assert (said["command"], said["subject"], said["status"], said["exit_status"]) == (
            command, subject, "failed", 2,
        )  # fmt: skip
        assert err == f"Error: {said['error']}\n"


def test_a_name_of_two_lines_is_a_wrong_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--root", str(tmp_path), "fetch", "--city", "a\nb", "--osm", "x.osm.pbf"]) == 2
    said = "Error: The name of the city holds a line break or the like: 'a\\nb'. Leave it out.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("args", [["pretrain"], ["finetune", "landuse", "--labels", "x"]])
def test_a_name_of_a_run_that_is_not_utf_8_is_a_wrong_call(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--root", str(tmp_path), *args, "--name", "a\udcff"]) == 2
    assert capsys.readouterr().err == "Error: The name of the run is not UTF-8 text: a\\xff. Give it in UTF-8.\n"


@pytest.mark.parametrize(
    "args",
    [
        ["fetch"], ["build-graph"], ["info"], ["pretrain"], ["embed"], ["map", "landuse"], ["evaluate", "landuse"],
        ["finetune", "landuse", "--labels", "x"],
    ],
)  # fmt: skip
def test_a_name_that_is_not_utf_8_is_a_wrong_call(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--root", str(tmp_path), "--json", *args, "--city", "\udcff\udcfe"]) == 2
    out, err = capsys.readouterr()
    said = json.loads(out.encode())
    assert said["exit_status"] == 2
    assert said["error"] == r"The name of the city is not UTF-8 text: \xff\xfe. Give it in UTF-8."
    assert said["subject"] == r"\xff\xfe"
    assert err == f"Error: {said['error']}\n"


def test_the_root_may_be_named_as_an_option_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--root", "--json", "fetch", "--nosuch"]) == 2
    assert capsys.readouterr().out == ""


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage:" in "".join(capsys.readouterr())


def test_names_of_cities_from_options_file_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cities.txt"
    file.write_text("\ufeffPorto\n\n# a comment\nSão Paulo  # another\r\n北京\nPorto\n", encoding="utf-8")
    assert city_names(["Andorra", "Porto"], file) == ["Andorra", "Porto", "São Paulo", "北京"]
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text(encoding="utf-8-sig")))
    assert city_names([], Path("-")) == ["Porto", "São Paulo", "北京"]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="is empty"):
        city_names([], tmp_path / "empty.txt")
    for encoding in ("utf-16", "latin-1"):
        file.write_text("Zürich\n", encoding=encoding)
        with pytest.raises(UsageError, match=r"cities\.txt is not text in UTF-8\. Save it so"):
            city_names([], file)


def test_of_several_values_the_wrong_one_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fetch", "--city", "X", "--bbox", "1", "a", "2", "3"]) == 2
    assert "'--bbox'" in (err := capsys.readouterr().err)
    assert "(given: 1 a 2 3)" in err


def work(city: str) -> Result:
    """A step that fails for some cities; at module level, so that it reaches other processes."""
    if city == "lost":
        raise MissingError("There is no city lost.", hint="Look again.")
    if city == "broken":
        raise KeyError("inside")
    if city == "killed":
        os._exit(9)
    return Result("test", city, "done", numbers={"letters": len(city)})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_city_does_not_stop_the_others(workers: int) -> None:
    results = each_city(work, ["a", "lost", "broken", "b"], "test", workers=workers)
    assert [(r.subject, r.status) for r in results] == [
        ("a", "done"), ("lost", "failed"), ("broken", "failed"), ("b", "done"),
    ]  # fmt: skip
    assert results[1].error == "There is no city lost. Look again."
    assert "KeyError" in results[2].error


def test_a_killed_worker_is_told_and_does_not_hang() -> None:
    results = each_city(work, ["killed", "killed too"], "test", workers=2)
    assert results[0].status == "failed"
    assert "--workers" in results[0].error
    assert results[0].seconds > 0


def test_a_lone_city_raises_its_own_error() -> None:
    with pytest.raises(MissingError):
        each_city(work, ["lost"], "test")


def test_a_lone_city_that_fails_is_a_json_object_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--root", str(tmp_path), "--json", "build-graph", "--city", "Atlantis"]) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["command"], said["subject"], said["status"], said["exit_status"]) == (
        "build-graph", "Atlantis", "failed", 1,
    )  # fmt: skip
    assert said["error"] in err
    lost = str(tmp_path / "lost.osm.pbf")
    assert run(["--root", str(tmp_path), "--json", "fetch", "--city", "Atlantis", "--osm", lost]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["status"], said["exit_status"]) == ("failed", 2)
    assert lost in said["error"]


def test_info_of_an_empty_root_and_of_what_is_not_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--root", str(root), "--json", "info"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["subject"] for r in rows} == {"Porto", "São Paulo", "北京"}
    assert any(r["numbers"]["next"] == "rsosm fetch --city 'São Paulo'" for r in rows)
    assert run(["--root", str(tmp_path / "nowhere"), "info"]) == 1
    assert run(["info", str(tmp_path / "nothing.h5")]) == 2  # a file named that does not exist is a wrong call
    assert "no file" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["h5", "parquet", "tif", "gpkg", "safetensors", "json", "geojson", "png"])
def test_info_on_a_damaged_file_is_one_sentence(ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = f"x.{ending}"
    file = tmp_path / name
    file.write_bytes(b"\x89HDF\r\n\x1a\nnot really")
    assert run(["info", str(file)]) == 1
    err = capfd.readouterr().err
    assert name in err
    assert len([line for line in err.splitlines() if line.startswith("Error")]) == 1


def test_a_closed_pipe_is_no_error(root: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # the reader has gone before the first line
    command = [sys.executable, "-m", "rsosm_cli", "--root", str(root), "--json", "info"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_told(root: Path) -> None:
    command = f"'{sys.executable}' -m rsosm_cli --root '{root}' info > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "The disk is full" in done.stderr
    assert "Traceback" not in done.stderr
