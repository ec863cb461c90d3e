"""The command line, called in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

from rsosm_cli.app import run


def call(*args: str) -> tuple[int, str, str]:
    """Return the exit status, standard output and standard error of a call of ``rsosm``."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = run(list(args))
    return status, out.getvalue(), err.getvalue()
