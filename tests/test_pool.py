"""Workers of a process pool when Ctrl-C reaches all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
from rsosm_cli.pipeline.pool import run_jobs

time.sleep(0.5)  # a worker is long in starting

def wait(folder):
    if folder.name == "long":
        folder.mkdir()
        time.sleep(60)
    return folder.name

if __name__ == "__main__":
    try:
        for name in run_jobs(wait, [Path(sys.argv[1]) / n for n in ("short", "long")], workers=2):
            print(name, flush=True)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a group of processes")
def test_ctrl_c_ends_busy_workers_and_idle_ones_in_silence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, "-c", "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
         "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')", str(script), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "short\n"  # its worker has nothing to do
    until = time.monotonic() + 30
    while not (tmp_path / "long").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert out == "interrupted\n"
    assert err == ""
    assert time.monotonic() - began < 20
