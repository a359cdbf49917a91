"""Other packs' nodes that ours stand in for where those packs are absent: shared workflows open and run.

ICEdit-ComfyUI-official (hayd-zju), its three nodes. A page that knows of replacements offers to swap them; a
posted prompt is changed on its way. Nothing happens while the other pack is installed.
"""

from __future__ import annotations

import sys
from typing import Any

# That pack's own sentence, not the one ICEdit was trained on: a shared workflow gives what it gave.
ICEDIT_OFFICIAL = (
    "A diptych with two side-by-side images of the same scene. "
    "On the right, the scene is the same as on the left but {instruction}"
)


def _same(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"new_id": new, "old_id": old} for new, old in pairs]


def _outputs(count: int) -> list[dict[str, int]]:
    return [{"new_idx": index, "old_idx": index} for index in range(count)]


# The arguments of ComfyUI's `NodeReplace`. old_widget_ids: whose values a workflow stores, in their order.
REPLACEMENTS = (
    {
        "old_node_id": "DiptychCreate",
        "new_node_id": "DiptychLoadImage",
        "old_widget_ids": ["image"],
        "input_mapping": _same(("image", "image"), ("image_input", "image_input")),
        "output_mapping": _outputs(3),
    },
    {
        "old_node_id": "InContextEditInstruction",
        "new_node_id": "DiptychInstruction",
        "old_widget_ids": ["editText"],
        "input_mapping": [
            *_same(("instruction", "editText"), ("clip", "clip")),
            {"new_id": "template", "set_value": ICEDIT_OFFICIAL},
        ],
        "output_mapping": _outputs(1),
    },
    {
        "old_node_id": "ICEFConditioning",
        "new_node_id": "DiptychFluxFillConditioner",
        "old_widget_ids": [],
        "input_mapping": [
            *_same(("positive", "In_context"), ("negative", "negative"), ("vae", "vae")),
            *_same(("image", "diptych"), ("mask", "maskDiptych")),
            {"new_id": "noise_mask", "set_value": True},
        ],
        "output_mapping": _outputs(3),
    },
)


def register() -> None:
    """Tell a running ComfyUI: its page, if that knows of replacements, and its queue. Else nothing."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    server.add_on_prompt_handler(replaced)
    if manager := getattr(server, "node_replace_manager", None):
        from comfy_api.latest import io

        for replacement in REPLACEMENTS:
            manager.register(io.NodeReplace(**replacement))


def replaced(posted: dict[str, Any]) -> dict[str, Any]:
    """A posted prompt with our nodes instead of theirs; outputs keep their places, so links stay true.

    ComfyUI's own queue would do it too, but ends in a KeyError over an optional input that is not given, and
    over two replaced nodes in a row (0.33.0).
    """
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    rows = {row["old_node_id"]: row for row in REPLACEMENTS if row["old_node_id"] not in known}
    for node in posted.get("prompt", {}).values():
        if row := rows.get(node.get("class_type")):
            given = node.get("inputs", {})
            node["class_type"] = row["new_node_id"]
            node["inputs"] = {
                entry["new_id"]: entry["set_value"] if "set_value" in entry else given[entry["old_id"]]
                for entry in row["input_mapping"]
                if "set_value" in entry or entry["old_id"] in given
            }
    return posted
