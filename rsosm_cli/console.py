"""What a person or a program sees: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import explain, printable
from rsosm_cli.pipeline.result import Result, exit_status
from rsosm_cli.progress import SILENT, Advance, Progress
from rsosm_cli.units import duration, size

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

log = logging.getLogger("rsosm")
INTERRUPTED = 130
_LINE_SECONDS = 10.0  # between two plain lines about the same work
_SURROGATE = re.compile("[\ud800-\udfff]")
_COLOURS = {"done": "green", "skipped": "cyan", "planned": "yellow", "failed": "bold red"}


@dataclass
class Console:
    """How a command was asked to talk."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    _err: RichConsole | None = field(default=None, repr=False)

    @property
    def err(self) -> RichConsole:
        if self._err is None:
            from rich.console import Console as RichConsole

            self._err = RichConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)
        return self._err

    def listen(self) -> None:
        """Send the log of rsosm, and warnings of the libraries below it, to standard error."""
        import warnings

        log.handlers = [_Handler(self)]
        log.propagate = False
        log.setLevel(logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO)
        if not self.verbose:
            # Warnings of libraries are for those who maintain rsosm; its own go through the log.
            warnings.simplefilter("ignore")

    def progress(self) -> Progress:
        """Return the listener that suits standard error: bars on a terminal, plain lines elsewhere, or nothing."""
        if self.quiet:
            return SILENT
        return Bars(self.err) if self.err.is_terminal else Lines()

    def fail(self, error: BaseException) -> None:
        """Say what went wrong, with the traceback where the user asked for it."""
        if self.verbose:
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        self.err.print(f"Error: {explain(error)}", style="bold red")

    def show(self, results: Sequence[Result]) -> None:
        """Print results to standard output: JSON lines, one block for one result, a table for many."""
        if self.json:
            lines = [json.dumps(r.as_dict(), ensure_ascii=False, default=str) for r in results]
            # A lone surrogate is no JSON: a backslash stands for it, which JSON doubles.
            _write("".join(f"{_SURROGATE.sub(_escaped, line)}\n" for line in lines))
            return
        for r in results:
            if r.status == "failed":
                self.err.print(f"Error: {r.subject}: {r.error}", style="bold red")
        from rich.console import Console as RichConsole

        terminal = sys.stdout.isatty()
        # Elsewhere than on a terminal nothing is wrapped or cropped: lines are for grep.
        out = RichConsole(highlight=False, width=None if terminal else 4000, soft_wrap=not terminal)
        with out.capture() as capture:
            if len(results) == 1:
                out.print(_block(results[0]))
            elif results:
                out.print(_table(results))
                for r in results:
                    for note in r.notes:
                        out.print(f"{r.subject}: {note}", markup=False)
                if len({r.command for r in results}) > 1:  # a chain: what it was for
                    out.print("", _block(results[-1]))
        text = capture.get()
        _write(text if terminal else "".join(f"{line.rstrip()}\n" for line in text.splitlines()))


def run(
    console: Console, work: Callable[[], Result | Sequence[Result]], command: str = "rsosm", subject: str = ""
) -> int:
    """Do the work of a command, show what it returns, and return the exit status.

    ``command`` and ``subject`` name what failed in the JSON object of an error.
    """
    console.listen()
    started = time.monotonic()
    try:
        outcome = work()
    except KeyboardInterrupt:
        console.err.print("\nInterrupted. The same command goes on from what is finished.", style="bold")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last border: told in one sentence, in full with --verbose
        console.fail(error)
        failed = int(getattr(error, "exit_status", 1))
        if console.json:
            took = time.monotonic() - started
            console.show([Result(command, subject, "failed", error=explain(error), exit_status=failed, seconds=took)])
        return failed
    results = [outcome] if isinstance(outcome, Result) else list(outcome)
    status = exit_status(results)
    try:
        console.show(results)
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python would complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        console.fail(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(printable(found[0]))[1:-1]


def _write(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def readable(name: str, value: Any) -> str:
    """Return a number as people read it; names that end in ``_bytes`` or ``_seconds`` say their unit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and name.endswith("bytes"):
        return size(value)
    if isinstance(value, (int, float)) and name.endswith("seconds"):
        return duration(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {readable(str(k), v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        # Coordinates come in lists: four digits would be too few for them.
        return ", ".join(f"{v:.9g}" if isinstance(v, float) else readable("", v) for v in value)
    return "-" if value is None else str(value)


def _block(result: Result) -> Table:
    """Return one result as lines of name and value."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    style = _COLOURS[result.status]
    took = f"  {duration(result.seconds)}" if result.seconds else ""
    table.add_row(Text(result.subject, "bold"), Text.assemble(result.command, " ", (result.status, style), took))
    for name, value in result.numbers.items():
        table.add_row(f"  {_label(name)}", Text(readable(name, value)))
    for name, path in result.paths.items():
        label = f"{name} file" if name in result.numbers else name  # tiles: how many, and where
        table.add_row(f"  {_label(label)}", Text(path, "cyan"))
    for note in result.notes:
        table.add_row("  note", Text(note))
    return table


def _label(name: str) -> str:
    """Return the name of a number as a label; its unit stands in the value."""
    if name.endswith("_bytes") and name != "size_bytes":
        name = name.removesuffix("_bytes") + "_size"
    return name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _table(results: Sequence[Result]) -> Table:
    """Return many results as a table, a row a city or a step."""
    from rich.table import Table
    from rich.text import Text

    values: dict[str, list[Any]] = {}
    for r in results:
        for name, value in r.numbers.items():
            if not isinstance(value, (dict, list, tuple)):
                values.setdefault(name, []).append(value)
    chain = len({r.command for r in results}) > 1  # steps of one city, which count different things
    listing = all(r.command == "info" for r in results)
    failed = any(r.error for r in results)
    shown = [] if chain else list(values)[:6]  # a terminal has no room for all; --json has
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("step" if chain else "subject", overflow="fold")
    if not listing:
        table.add_column("status", no_wrap=True)
    for name in shown:
        words = any(isinstance(v, str) for v in values[name])
        table.add_column(_label(name), justify="left" if words else "right", overflow="fold")
    if not listing:
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("error" if failed else "files", overflow="fold")
    for r in results:
        cells = [Text(r.command if chain else r.subject)]
        if not listing:
            cells.append(Text(r.status, _COLOURS[r.status]))
        cells += [Text(readable(name, r.numbers[name]) if name in r.numbers else "") for name in shown]
        if not listing:
            cells.append(Text(duration(r.seconds) if r.seconds else ""))
            cells.append(Text(r.error if failed else next(iter(r.paths.values()), "")))
        table.add_row(*cells)
    return table


class _Handler(logging.Handler):
    """Prints records above the progress bars, not through them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.console.err.print(f"Warning: {text}", style="yellow")
        else:
            self.console.err.print(text, style="dim" if record.levelno < logging.INFO else None)
        if record.exc_info and self.console.verbose:
            self.console.err.print(logging.Formatter().formatException(record.exc_info))


class Bars:
    """Bars with rate and time left, on a terminal; several at a time share one display."""

    def __init__(self, console: RichConsole) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        self.display = RichProgress(*columns, console=console, transient=False)
        self.open = 0

    @contextmanager
    def task(self, label: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        if self.open == 0:
            self.display.start()
        self.open += 1
        number = self.display.add_task(label, total=total, rate="")
        clock = _Clock(total, unit)

        def advance(units: float = 1, /) -> None:
            clock.count(units)
            self.display.update(number, advance=units, rate=clock.rate())

        try:
            yield advance
            if total is None:
                self.display.update(number, total=max(clock.done, 1), completed=max(clock.done, 1))
        finally:
            self.open -= 1
            if self.open == 0:
                self.display.stop()
                self.display.remove_task(number)
            elif clock.finished:
                self.display.remove_task(number)


class Lines:
    """A plain line now and then, for logs of batch systems."""

    @contextmanager
    def task(self, label: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        clock = _Clock(total, unit)
        told = clock.start

        def advance(units: float = 1, /) -> None:
            nonlocal told
            clock.count(units)
            now = time.monotonic()
            if now - told >= _LINE_SECONDS:
                told = now
                print(f"{label}: {clock.line()}", file=sys.stderr, flush=True)

        yield advance
        print(f"{label}: {clock.last_line()}", file=sys.stderr, flush=True)


class _Clock:
    """Counts units, and says how fast they go and how long the rest takes."""

    def __init__(self, total: float | None, unit: str) -> None:
        self.total, self.unit = total, unit
        self.done = 0.0
        self.start = time.monotonic()

    def count(self, units: float) -> None:
        self.done += units

    @property
    def finished(self) -> bool:
        return self.total is None or self.done >= self.total

    def per_second(self) -> float:
        return self.done / max(time.monotonic() - self.start, 1e-6)

    def rate(self) -> str:
        return _per(self.per_second(), self.unit)

    def line(self) -> str:
        done = _amount(self.done, self.unit)
        if self.total is None:
            return f"{done}, {self.rate()}"
        left = (self.total - self.done) / max(self.per_second(), 1e-9)
        share = 100 * self.done / self.total if self.total else 100
        if self.unit != "B":
            done = f"{self.done:,.0f}"  # the unit follows once
        return f"{share:.0f} % ({done} of {_amount(self.total, self.unit)}), {self.rate()}, {duration(left)} left"

    def last_line(self) -> str:
        took = time.monotonic() - self.start
        if self.total == 1 and not self.unit:  # one step that has no parts to count
            return duration(took)
        return f"{_amount(self.done, self.unit)} in {duration(took)}, {self.rate()}"


def _amount(count: float, unit: str) -> str:
    return size(count) if unit == "B" else f"{count:,.0f} {_number(unit, count)}".strip()


def _number(unit: str, count: float) -> str:
    """Return a unit as it is said of ``count`` of them; units are plurals."""
    if count != 1:
        return unit
    return unit[:-3] + "y" if unit.endswith("ies") else unit.removesuffix("s")


def _per(rate: float, unit: str) -> str:
    if unit == "B":
        return f"{size(rate)}/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"
