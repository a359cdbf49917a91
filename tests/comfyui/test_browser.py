"""In a real browser: the page opens, an example workflow loads with every node known, runs, shows pictures.

DIPTYCH_SCREENSHOT=docs/browser.jpg also saves what was seen.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import comfy_cases
import pytest

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


def test_a_workflow_opens_and_runs_in_the_page(server, browser, comfyui):
    node, playwright, chromium = browser
    for name, value in SETTINGS.items():
        server.post(f"/api/settings/{name}", value)
    name = os.environ.get("DIPTYCH_BROWSER_WORKFLOW", "instruction_edit_tiny")
    screenshot = os.environ.get("DIPTYCH_SCREENSHOT")
    task = {
        "playwright": playwright,
        "chromium": chromium,
        "url": server.url,
        "workflow": str(comfy_cases.ROOT / "example_workflows" / f"{name}.json"),
        "screenshot": screenshot and str(Path(screenshot).resolve()),
        "nodes": comfy_cases.node_ids(),
    }
    done = subprocess.run(
        [node, str(HERE / "browser.cjs"), json.dumps(task)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["outcome"] == "success"
    assert not seen["missingDialog"]
    assert [node["type"] for node in seen["seen"] if node["missing"] or node["errors"]] == []
    assert seen["pictures"] and all(seen["pictures"])
    assert [problem for problem in seen["problems"] if "Diptych" in problem] == []
