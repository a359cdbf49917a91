"""The bundled tiny models: where they lie. How they are made stands in `training/recipes`.

Not imported by anything large: full-size models come from ComfyUI's loaders or from a diffusers folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """The folder with fill/, kontext/ and loras/; DIPTYCH_TINY_FOLDER names another (newly trained) one."""
    return Path(os.environ.get("DIPTYCH_TINY_FOLDER") or Path(__file__).parent / "weights")
