"""In a real browser: the page opens, an example workflow loads with every node known, runs, shows images.

DIPTYCH_SCREENSHOT=docs/browser.jpg also saves what was seen, DIPTYCH_SCREENSHOTS=FOLDER every template.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import comfy_cases
import pytest
from comfyui_diptych.commands import installed

HERE = Path(__file__).parent
HOW_TO_GET_ONE = (
    "no browser for the test: install chromium (apt-get install chromium) and node, and run "
    "`npm install --no-save playwright-core` in the pack's folder (or name its folder in PLAYWRIGHT_CORE)"
)
# Before the page opens: no tutorial over the canvas, no minimap, titles drawn at any zoom.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "9.9.9",
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}


@pytest.fixture(scope="module")
def browser(request):
    """(node, playwright-core folder, chromium)"""
    folders = [os.environ.get("PLAYWRIGHT_CORE"), comfy_cases.ROOT / "node_modules" / "playwright-core"]
    playwright = next((str(folder) for folder in folders if folder and Path(folder).is_dir()), None)
    chromes = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    chromium = next((found for name in chromes if name and (found := shutil.which(name))), None)
    node = shutil.which("node")
    if not (node and playwright and chromium):
        if request.config.getoption("--require-comfyui"):
            pytest.fail(HOW_TO_GET_ONE, pytrace=False)
        pytest.skip(HOW_TO_GET_ONE)
    return node, playwright, chromium


@pytest.fixture(scope="module")
def page(server, browser):
    """page(do=..., ...) -> what `browser.cjs` reports of a task in the page of a running server."""
    node, playwright, chromium = browser
    for name, value in SETTINGS.items():
        server.post(f"/api/settings/{name}", value)
    always = {"playwright": playwright, "chromium": chromium, "url": server.url}

    def run(**task) -> dict:
        task = {**always, "nodes": comfy_cases.node_ids(), **task}
        command = [node, str(HERE / "browser.cjs"), json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def has_nodes_2(comfyui: Path) -> bool:
    """Whether a ComfyUI's page can draw nodes as elements of the page (its first releases did so badly)."""
    return tuple(map(int, installed.comfyui_version(comfyui).split("."))) >= (0, 33)


def file(name: str) -> str:
    return str(comfy_cases.ROOT / "example_workflows" / f"{name}.json")


@pytest.mark.parametrize("renderer", ["canvas", "nodes 2.0"])
def test_a_workflow_opens_and_runs_in_the_page(page, comfyui, renderer):
    if renderer == "nodes 2.0" and not has_nodes_2(comfyui):
        pytest.skip("its page has no Nodes 2.0")
    name = os.environ.get("DIPTYCH_BROWSER_WORKFLOW", "Edit by instruction - tiny")
    screenshot = os.environ.get("DIPTYCH_SCREENSHOT") if renderer == "canvas" else None
    seen = page(
        do="run",
        workflow=file(name),
        vue=renderer != "canvas",
        screenshot=screenshot and str(Path(screenshot).resolve()),
    )
    assert seen["outcome"] == "success"
    assert not seen["missingDialog"]
    assert [node["type"] for node in seen["seen"] if node["missing"] or node["errors"]] == []
    assert seen["images"] and all(seen["images"])
    assert [problem for problem in seen["problems"] if "Diptych" in problem] == []


def overlap(a: list[float], b: list[float]) -> bool:
    """Whether two boxes [left, top, width, height] share more than a hair."""
    return all(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) > 1 for i in (0, 1))


def inside(a: list[float], b: list[float]) -> bool:
    return all(a[i] >= b[i] - 1 and a[i] + a[i + 2] <= b[i] + b[i + 2] + 1 for i in (0, 1))


def faults(nodes: dict[str, dict], groups: dict[str, list[float]]) -> list[str]:
    """What stands on what in one measured graph."""
    found = []
    boxes = [(f"{number} {node['type']}", node["box"]) for number, node in nodes.items()]
    for index, (name, box) in enumerate(boxes):
        found += [f"{name} covers {other}" for other, its in boxes[index + 1 :] if overlap(box, its)]
        found += [
            f"{name} {[round(v) for v in box]} stands out of {title} {[round(v) for v in its]}"
            for title, its in groups.items()
            if overlap(box, its) and not inside(box, its)
        ]
    titles = list(groups)
    for index, title in enumerate(titles):
        found += [f"{title} covers {t}" for t in titles[index + 1 :] if overlap(groups[title], groups[t])]
    return found


def test_no_node_of_a_template_covers_another_or_stands_out_of_its_group(page, comfyui):
    """Boxes measured in the page after a pretended run, in both renderers."""
    seen = page(
        do="measure",
        workflows={name: file(name) for name in comfy_cases.workflow_names()},
        screenshots=os.environ.get("DIPTYCH_SCREENSHOTS"),
    )
    renderers = ["litegraph", "vue"] if has_nodes_2(comfyui) else ["litegraph"]
    wrong = {
        f"{name}, {renderer}": found
        for name, measured in seen["measured"].items()
        for renderer in renderers
        if (found := faults(**measured[renderer]))
    }
    assert wrong == {}
