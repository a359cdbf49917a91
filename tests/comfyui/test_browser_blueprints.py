"""In a real browser: blueprints found and run by one node, templates that open as apps and run as apps."""

from __future__ import annotations

import json
from pathlib import Path

import comfy_cases
import pytest
from PIL import Image
from test_browser import browser, has_nodes_2, page  # noqa: F401  (fixtures)

APPS = [name for name in comfy_cases.workflow_names() if name.endswith(".app")]
TINY = [name for name in APPS if "FLUX" not in name]
FILL = {"unet_name": "tiny fill (bundled)", "instruction": "make the green square white", "panel_width": 0}
LORA = {"lora": "diptych tiny demo/icedit.safetensors"}


@pytest.fixture
def new(comfyui):
    if not has_nodes_2(comfyui):
        pytest.skip("its page knows no blueprints of packs and no apps")


@pytest.mark.parametrize("renderer", ["canvas", "nodes 2.0"])
def test_an_edit_is_one_node_between_an_image_and_its_file(page, server, new, renderer):  # noqa: F811
    """Found by its name, under the pack's; the green square of the demo image has become white."""
    seen = page(
        do="blueprint",
        word="icedit",
        name="ICEdit - edit by instruction",
        vue=renderer != "canvas",
        values={**FILL, **LORA, "seed": 3},
        source={"type": "DiptychDemoImage", "values": {"example": 14}},
        links={"image": 0},
    )
    assert seen["outcome"] == "success"
    assert "ComfyUI-Diptych" in seen["found"]  # the menu it stands in
    assert seen["widgets"] == ["instruction", "seed", "panel width", "model file", "ICEdit LoRA"]
    image = Image.open(Path(server.base) / "output" / seen["image"]).convert("RGB")
    assert image.size == (64, 64) and min(image.getpixel((14, 14))) > 220


@pytest.mark.parametrize("name", TINY)
def test_a_template_opens_as_an_app_and_runs_as_one(page, new, name):  # noqa: F811
    path = comfy_cases.ROOT / "example_workflows" / f"{name}.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    seen = page(do="app", workflow=str(path), name=name)
    assert seen["outcome"] == "success"
    assert seen["labels"] == [widget for _, widget, _ in graph["extra"]["linearData"]["inputs"]]
    assert seen["width"] > 256  # the result stands in the middle
    assert [problem for problem in seen["problems"] if "Diptych" in problem] == []
