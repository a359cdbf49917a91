"""python scripts/test.py: set up .venv and run the tests. Arguments are those of pytest."""

from __future__ import annotations

import subprocess
import sys

from _venv import ROOT, ensure

if __name__ == "__main__":
    raise SystemExit(subprocess.call([ensure("test"), "-m", "pytest", *sys.argv[1:]], cwd=ROOT))
