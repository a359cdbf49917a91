"""UI-format workflows (what people share) to API prompts (what the server runs), without a browser.

Covers what the pack's example workflows and blueprints use: nodes, links, notes, subgraphs. Not a general
converter: reroutes, muted and bypassed nodes raise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FROM_OUTSIDE = -10  # what a subgraph's links say of its inputs


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


def promoted_values(node: dict) -> dict[str, Any]:
    """The widget values of a subgraph's node by input name: one for each input that has a widget."""
    names = [socket["name"] for socket in node.get("inputs") or [] if "widget" in socket]
    stored = node.get("widgets_values") or []
    assert len(stored) in (0, len(names)), f"{node['title']}: {len(stored)} values for {names}"
    return dict(zip(names, stored, strict=False))


def to_api(workflow: dict, schemas: dict[str, dict]) -> dict[str, dict]:
    """The API prompt of a UI workflow; `schemas` maps a node class to its INPUT_TYPES.

    Nodes in a subgraph are called `5:3`, as ComfyUI's page calls node 3 in the subgraph of node 5.
    """
    prompt: dict[str, dict] = {}
    _add(prompt, "", workflow, subgraphs(workflow), schemas, {})
    return prompt


def subgraphs(workflow: dict) -> dict[str, dict]:
    return {s["id"]: s for s in workflow.get("definitions", {}).get("subgraphs", [])}


def _links(graph: dict) -> dict[int, tuple[int, int]]:
    """{link: (node it comes from, slot)}; the outermost graph stores its links as lists."""
    named = [link if isinstance(link, dict) else _named(link) for link in graph["links"]]
    return {link["id"]: (link["origin_id"], link["origin_slot"]) for link in named}


def _named(link: list) -> dict:
    return dict(
        zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True)
    )


def _add(prompt, prefix: str, graph: dict, known: dict, schemas: dict, given: dict[int, Any]) -> Callable:
    """Add a graph's nodes to the prompt; given: what arrives at its inputs. Returns what a link means."""
    links = _links(graph)
    nodes = {node["id"]: node for node in graph["nodes"] if node["type"] not in NOTES}

    @cache
    def inside(number: int) -> tuple[dict, Callable]:
        """A subgraph and the links in it, its nodes added."""
        node = nodes[number]
        subgraph, values = known[node["type"]], _inputs(node, promoted_values(node), source)
        arriving = {slot: values.get(socket["name"]) for slot, socket in enumerate(subgraph["inputs"])}
        return subgraph, _add(prompt, f"{prefix}{number}:", subgraph, known, schemas, arriving)

    def source(link: int) -> Any:
        number, slot = links[link]
        if number == FROM_OUTSIDE:
            return given.get(slot)
        if nodes[number]["type"] not in known:
            return [f"{prefix}{number}", slot]
        subgraph, inner = inside(number)
        return inner(subgraph["outputs"][slot]["linkIds"][0])

    for number, node in nodes.items():
        assert node.get("mode", 0) == 0, f"{node['type']} is muted or bypassed"
        if node["type"] in known:
            inside(number)
        else:
            values = widget_values(schemas[node["type"]], node.get("widgets_values") or [])
            inputs = _inputs(node, values, source)
            prompt[f"{prefix}{number}"] = {"class_type": node["type"], "inputs": inputs}
    return source


def _inputs(node: dict, values: dict, source: Callable) -> dict[str, Any]:
    """Widget values, and over them what is linked; an input that nothing arrives at is left out."""
    found = dict(values)
    for socket in node.get("inputs") or []:
        if socket.get("link") is not None and (value := source(socket["link"])) is not None:
            found[socket["name"]] = value
    return found


def notes(workflow: dict) -> str:
    """The text of all notes, those inside subgraphs too."""
    graphs = [workflow, *subgraphs(workflow).values()]
    found = [node for graph in graphs for node in graph["nodes"] if node["type"] in NOTES]
    return "\n".join(node["widgets_values"][0] for node in found)
