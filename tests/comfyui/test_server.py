"""A real server process: it lists the nodes, serves help and templates, runs a prompt, returns an image."""

from __future__ import annotations

import io
import json
from urllib.parse import quote

import comfy_cases
import pytest
import workflow
from comfyui_diptych.commands import installed
from PIL import Image


def test_object_info_lists_every_node(server):
    info = server.get_json("/object_info")
    for node in comfy_cases.node_ids():
        assert info[node]["category"].startswith("diptych"), node
        assert info[node]["python_module"] == "custom_nodes.ComfyUI-Diptych"


def test_help_pages_and_templates_are_served(server):
    for node in comfy_cases.node_ids():
        assert server.get(f"/extensions/ComfyUI-Diptych/docs/{node}.md").startswith(b"# ")
    templates = server.get_json("/workflow_templates")["ComfyUI-Diptych"]
    assert sorted(templates) == comfy_cases.workflow_names()
    for name in templates:
        thumbnail = server.get(f"/api/workflow_templates/ComfyUI-Diptych/{quote(name)}.jpg")
        assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"


@pytest.mark.parametrize("name", ["Edit by instruction - tiny", "Edit with Kontext - tiny"])
def test_an_example_workflow_posted_as_a_prompt_gives_an_image(server, name):
    info = server.get_json("/object_info")
    schemas = {node: definition["input"] for node, definition in info.items()}
    prompt = workflow.to_api(comfy_cases.workflow(name), schemas)
    for node in prompt.values():
        # The page may have run the same graph before, and a prompt that is cached whole lists no images.
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] += "_posted"
    result = server.run(prompt)
    assert result["status"]["status_str"] == "success", result["status"]["messages"]
    images = [image for output in result["outputs"].values() for image in output.get("images", [])]
    assert images
    for image in images:
        query = "&".join(f"{key}={quote(image[key])}" for key in ("filename", "subfolder", "type"))
        image = Image.open(io.BytesIO(server.get(f"/view?{query}")))
        assert image.height >= 64 and len(image.getcolors(image.width * image.height)) > 1


def test_blueprints_are_listed_under_the_pack(server, comfyui):
    if tuple(map(int, installed.comfyui_version(comfyui).split("."))) < (0, 33):
        pytest.skip("its server or page knows no blueprints of packs")
    listed = server.get_json("/global_subgraphs").items()
    pack = "custom_nodes.ComfyUI-Diptych"
    ours = {entry["name"]: key for key, entry in listed if entry["info"]["node_pack"] == pack}
    files = {path.stem: path for path in (comfy_cases.ROOT / "subgraphs").glob("*.json")}
    assert sorted(ours) == sorted(files) and len(ours) >= 5
    for name, key in ours.items():
        served = server.get_json(f"/global_subgraphs/{key}")["data"]
        assert json.loads(served) == json.loads(files[name].read_text(encoding="utf-8"))
