"""python scripts/test.py: set up .venv and run the tests, a worker per core. Takes arguments of pytest."""

from __future__ import annotations

import os
import subprocess
import sys

from _venv import ROOT, ensure

# Modules stay together (loadscope), as do what they share: toy models, a launch of two processes. A real
# ComfyUI, where one is found, is booted once and answers its tests in order, as does a page: not by workers.
WORKERS = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadscope"]
WHOLE_SUITE = [[*WORKERS, "tests/unit", "tests/parity", "tests/fuzz"], ["tests/comfyui"], ["tests/page"]]

if __name__ == "__main__":
    # Workers fill the cores: a torch of each that used all of them would be several times slower.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    python = ensure("test")
    runs = [sys.argv[1:]] if sys.argv[1:] else WHOLE_SUITE
    codes = [subprocess.call([python, "-m", "pytest", *run], cwd=ROOT, env=environment) for run in runs]
    raise SystemExit(next((code for code in codes if code), 0))
