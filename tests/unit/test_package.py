"""The package is cheap to import and complete as a ComfyUI pack."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"diffusers", "transformers", "peft", "accelerate", "datasets", "comfy"}


def test_import_loads_no_heavy_library():
    code = "import sys, comfyui_diptych; print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(loaded)
