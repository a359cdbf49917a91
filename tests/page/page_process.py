"""A real `diptych web` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

BOOT_SECONDS, END_SECONDS = 600, 120  # a hang, not slowness: machines differ


class Web(NamedTuple):
    """url: of the page. folder: where the process keeps its temporary files."""

    url: str
    folder: Path
    process: subprocess.Popen


def begin(folder: Path, *options: str) -> Web:
    """`diptych web` with temporary files below `folder`, once it listens."""
    command = [sys.executable, "-m", "comfyui_diptych", "web", *options]
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
