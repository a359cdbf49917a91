"""A real `diptych web` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

# `diptych web`, each step of a model at least so long: a quick machine is done before a browser can look.
PACED = """
import sys, time
from comfyui_diptych import cli
from comfyui_diptych.page.jobs import Job
def paced(self, count=1, pause=float(sys.argv[1]), step=Job.step):
    time.sleep(pause)
    step(self, count)
Job.step = paced
sys.exit(cli.main(sys.argv[2:]))
"""
BOOT_SECONDS, END_SECONDS = 600, 120  # a hang, not slowness: machines differ


class Web(NamedTuple):
    """url: of the page. folder: where the process keeps its temporary files."""

    url: str
    folder: Path
    process: subprocess.Popen


def begin(folder: Path, *options: str, pause: float = 0.0) -> Web:
    """`diptych web` with temporary files below `folder`, once it listens. pause: least seconds of a step."""
    program = ["-c", PACED, str(pause)] if pause else ["-m", "comfyui_diptych"]
    command = [sys.executable, *program, "web", *options]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
    )
    hang = threading.Timer(BOOT_SECONDS, process.kill)
    hang.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("the page is at "):
            hang.cancel()
            # What else it says must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return Web(line.split()[4], folder, process)
    hang.cancel()
    pytest.fail("diptych web ended: " + "".join(said)[-2000:])


def end(web: Web) -> int:
    """Ends it as a system does (where Ctrl-C may be ignored); returns the exit code."""
    web.process.terminate()
    try:
        return web.process.wait(END_SECONDS)
    finally:
        web.process.kill()
