"""python scripts/demo.py: set up .venv and edit an image with the bundled tiny model.

Writes output/demo.png and, before | after, output/demo_side_by_side.png. Arguments are those of `diptych
edit`.
"""

from __future__ import annotations

import subprocess
import sys

from _venv import ROOT, ensure

if __name__ == "__main__":
    python, arguments = ensure(), sys.argv[1:]
    if not arguments:
        (ROOT / "output").mkdir(exist_ok=True)
        arguments = ["--output", str(ROOT / "output" / "demo.png")]
    raise SystemExit(subprocess.call([python, "-m", "comfyui_diptych", "edit", *arguments]))
