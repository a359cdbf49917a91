"""Saved workflows hold widget values by position: released nodes keep the names and order of their inputs."""

from __future__ import annotations

import json
from pathlib import Path

from comfyui_diptych import NODE_CLASS_MAPPINGS

RELEASED = json.loads(Path(__file__).with_name("released_inputs.json").read_text(encoding="utf-8"))


def test_released_nodes_keep_their_inputs_in_order():
    """A new input may follow at the end of its section, where no saved value is shifted by it."""
    for node, sections in RELEASED.items():
        schema = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
        required, optional = (list(schema.get(section, {})) for section in ("required", "optional"))
        assert required == sections["required"], node
        assert optional[: len(sections["optional"])] == sections["optional"], node
