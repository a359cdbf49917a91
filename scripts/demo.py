"""python scripts/demo.py: set up .venv and edit a picture with the bundled tiny model.

Writes the edited picture and before | after side by side. Arguments are those of `diptych edit`.
"""

from __future__ import annotations

import subprocess
import sys

from _venv import ensure

if __name__ == "__main__":
    arguments = sys.argv[1:] or ["--output", "diptych_demo.png"]
    raise SystemExit(subprocess.call([ensure(), "-m", "comfyui_diptych", "edit", *arguments]))
