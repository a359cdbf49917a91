"""What a node needs beside its class: a help page, a template, a line in the README."""

import json
from pathlib import Path

import comfyui_diptych
import pytest

ROOT = Path(__file__).parents[2]
NODES = comfyui_diptych.NODE_CLASS_MAPPINGS


def inputs(node):
    table = NODES[node].INPUT_TYPES()
    return [name for kind in ("required", "optional") for name in table.get(kind, {})]


@pytest.mark.parametrize("node", sorted(NODES))
def test_a_help_page_explains_every_input(node):
    path = ROOT / "web" / "docs" / f"{node}.md"
    assert path.is_file()
    missing = [name for name in inputs(node) if name not in path.read_text(encoding="utf-8")]
    assert not missing


@pytest.mark.parametrize("node", sorted(NODES))
def test_a_template_shows_it(node):
    templates = [
        json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "example_workflows").glob("*.json")
    ]
    graphs = [g for t in templates for g in (t, *t.get("definitions", {}).get("subgraphs", []))]
    assert any(step["type"] == node for graph in graphs for step in graph["nodes"])


@pytest.mark.parametrize("node", sorted(NODES))
def test_the_readme_names_it(node):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert NODES[node].DISPLAY_NAME.partition(" (")[0] in readme
