"""python scripts/test.py: set up .venv and run the tests, a worker per core. Takes arguments of pytest."""

from __future__ import annotations

import os
import subprocess
import sys

from _venv import ROOT, ensure

# Modules stay together (loadscope), as do what they share: toy models, a launch of two processes, a ComfyUI.
WHOLE_SUITE = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadscope"]

if __name__ == "__main__":
    # Workers fill the cores: a torch of each that used all of them would be several times slower.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [ensure("test"), "-m", "pytest", *(sys.argv[1:] or WHOLE_SUITE)]
    raise SystemExit(subprocess.call(command, cwd=ROOT, env=environment))
