"""What is printed where: results to standard output, the rest to standard error; progress; exit statuses."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator

import pytest
from rich.console import Console as RichConsole

from rsosm_cli import console as module
from rsosm_cli.console import Bars, Console, Lines, readable, run
from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.result import Result, exit_status
from rsosm_cli.units import duration, rough, size

DONE = Result(
    "fetch", "Porto [old]", "done", {"osm": "c/osm.parquet"}, {"objects": 1234, "size_bytes": 2e6}, ("A note.",)
)
FAILED = Result("fetch", "Atlantis", "failed", error="There is no city Atlantis.", exit_status=1)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Leave the log of rsosm as it was."""
    log = logging.getLogger("rsosm")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before[0], before[1], before[2]


def test_json_is_one_object_a_result_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Console(json=True), lambda: [DONE, FAILED]) == 3
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["status"] for r in rows] == ["done", "failed"]
    assert rows[0]["numbers"]["objects"] == 1234
    assert rows[1]["error"] == "There is no city Atlantis."
    assert err == ""


def test_one_result_is_a_block_with_brackets_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Console(), lambda: DONE) == 0
    out = capsys.readouterr().out
    for part in ("Porto [old]", "1,234", "2.0 MB", "c/osm.parquet", "A note."):
        assert part in out


def test_many_results_are_a_table_and_failures_also_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Console(), lambda: [DONE, FAILED]) == 3
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert rows[0].split()[:2] == ["subject", "status"]
    assert any("Atlantis" in row and "failed" in row and "no city" in row for row in rows)
    assert "Error: Atlantis: There is no city Atlantis." in err


def test_a_line_of_a_long_path_is_not_broken_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    long = "/very/long/" * 40
    run(Console(), lambda: Result("map", "X", "done", {"map": long}))
    assert any(long in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("error", "status"),
    [(MissingError("No city.", hint="Fetch it."), 1), (UsageError("Bad option."), 2), (KeyError("x"), 1)],
)
def test_an_error_is_a_sentence_with_its_status(
    capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    def work() -> Result:
        raise error

    assert run(Console(), work) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert run(Console(verbose=True), work) == status
    assert "Traceback" in capsys.readouterr().err


def test_how_long_a_failure_took_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Result:
        time.sleep(0.05)
        raise MissingError("No city.")

    run(Console(json=True), work)
    assert 0.05 <= json.loads(capsys.readouterr().out)["seconds"] < 5


def test_an_interruption_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Result:
        raise KeyboardInterrupt

    assert run(Console(), work) == 130
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([0, 0], 0), ([0, 1], 3), ([0, 2], 3), ([1, 1], 1), ([2, 2], 2), ([2], 2), ([1, 2], 1), ([], 0)],
)
def test_exit_statuses_of_many(statuses: list[int], expected: int) -> None:
    results = [Result("fetch", "x", "failed" if s else "done", exit_status=s) for s in statuses]
    assert exit_status(results) == expected


def test_quiet_silences_log_and_progress_but_not_results(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)

    def work() -> Result:
        logging.getLogger("rsosm").info("chatter")
        with console.progress().task("Work", 3) as advance:
            advance()
        return DONE

    run(console, work)
    out, err = capsys.readouterr()
    assert "Porto" in out
    assert err == ""


def test_the_log_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.listen()
    logging.getLogger("rsosm").info("took the run [x]")
    logging.getLogger("rsosm").debug("detail")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "took the run [x]\n")


def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    progress = Console().progress()
    assert isinstance(progress, Lines)
    with progress.task("Building", 4, "tiles") as advance:
        advance(1)
        advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Building: 25 % (1 of 4 tiles)")
    assert "left" in lines[0]
    assert lines[-1].startswith("Building: 4 tiles in ")
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_bars_show_rate_and_leave_the_terminal_usable() -> None:
    stream = io.StringIO()
    bars = Bars(RichConsole(file=stream, force_terminal=True, width=120))
    with bars.task("Outer [1]", 2, "cities") as outer:
        with bars.task("Inner", None, "tiles") as inner:
            inner(7)
        outer(2)
    text = stream.getvalue()
    assert "Outer [1]" in text
    assert "cities/s" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again
    with pytest.raises(KeyboardInterrupt):
        interrupted(bars)
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def interrupted(bars: Bars) -> None:
    with bars.task("Again", 2):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("objects", 12345, "12,345"),
        ("iou", 0.73456, "0.7346"),
        ("size_bytes", 3_200_000, "3.2 MB"),
        ("seconds", 75, "1 min 15 s"),
        ("by_kind", {"point": 1200, "line": 3}, "point 1,200, line 3"),
        ("ok", True, "yes"),
        ("x", None, "-"),
    ],
)
def test_numbers_are_readable(name: str, value: object, shown: str) -> None:
    assert readable(name, value) == shown


def test_sizes_and_times() -> None:
    assert [size(n) for n in (999, 1000, 1.5e12)] == ["999 B", "1.0 kB", "1.5 TB"]
    assert [duration(s) for s in (3, 3700)] == ["3.0 s", "1 h 01 min"]
    assert [rough(s) for s in (7, 300, 7200, 34_449_345)] == ["7 s", "5 min", "2 h", "399 days"]
