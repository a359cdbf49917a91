"""The bundled tiny models: where they lie and what they are. How they are made stands in `training/recipes`.

Not imported by anything large: full-size models come from ComfyUI's loaders or from a diffusers folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """The folder with fill/, kontext/ and loras/; DIPTYCH_TINY_FOLDER names another (newly trained) one."""
    return Path(os.environ.get("DIPTYCH_TINY_FOLDER") or Path(__file__).parent / "weights")


def card() -> dict[str, Any]:
    """What `card.json` beside the weights says of them; empty without one.

    trained: bool; panel: width in pixels they were trained at; steps: what to sample them with; guidance:
    {"fill": number, ...}; default_loras: {"fill": [file in loras/, ...], ...}, what makes an editor of each.
    """
    path = folder() / "card.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
