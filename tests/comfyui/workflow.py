"""UI-format workflows (what people share) to API prompts (what the server runs), without a browser.

Covers what the pack's example workflows use: nodes, links, notes. Not a general converter: subgraphs and
reroutes, muted and bypassed nodes raise.
"""

from __future__ import annotations

from typing import Any

NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def widget_inputs(schema: dict) -> list[tuple[str, Any, dict]]:
    """(name, type, options) of a node's widgets, in the order in which their values are stored."""
    found = []
    for group in ("required", "optional"):
        for name, definition in schema.get(group, {}).items():
            kind = definition[0]
            options = definition[1] if len(definition) > 1 else {}
            kind = options.get("widgetType", kind)
            if (isinstance(kind, (list, tuple)) or kind in WIDGET_TYPES) and not options.get("forceInput"):
                found.append((name, kind, options))
    return found


def widget_values(schema: dict, stored: list | dict) -> dict[str, Any]:
    """Stored widget values by input name, without the frontend's own (seed control, upload button)."""
    if isinstance(stored, dict):
        return dict(stored)
    remaining, values = list(stored), {}
    for name, kind, options in widget_inputs(schema):
        if not remaining:
            break
        values[name] = remaining.pop(0)
        seed = kind == "INT" and (name in ("seed", "noise_seed") or options.get("control_after_generate"))
        if seed and remaining and remaining[0] in ("fixed", "randomize", "increment", "decrement"):
            remaining.pop(0)
        if options.get("image_upload") and remaining and remaining[0] == "image":
            remaining.pop(0)
    assert not remaining, f"widget values left over: {remaining}"
    return values


def to_api(workflow: dict, schemas: dict[str, dict]) -> dict[str, dict]:
    """The API prompt of a UI workflow; `schemas` maps a node class to its INPUT_TYPES."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node.get("mode", 0) == 0, f"{node['type']} is muted or bypassed"
        inputs = widget_values(schemas[node["type"]], node.get("widgets_values") or [])
        for socket in node.get("inputs") or []:
            if socket.get("link") is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def notes(workflow: dict) -> str:
    """The text of all notes."""
    return "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES)
