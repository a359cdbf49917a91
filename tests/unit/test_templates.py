"""What the example workflows say of themselves to ComfyUI's page: where nodes come from, where models are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlparse

import comfyui_diptych
import pytest
from comfyui_diptych import missing

ROOT = Path(comfyui_diptych.__file__).parent
TEMPLATES = {path.stem: path for path in (ROOT / "example_workflows").glob("*.json")}
FOLDERS = {
    "UNETLoader": "diffusion_models",
    "DualCLIPLoader": "text_encoders",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "CheckpointLoaderSimple": "checkpoints",
    "ControlNetLoader": "controlnet",
}
OWN = "grpo_lora.safetensors"  # the user's own: nowhere to be downloaded


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_file_name_is_the_title_that_the_page_shows(name):
    """ComfyUI's template page shows a pack's file names as they are; the ending .app makes one an app."""
    title, _, app = name.partition(".app")
    assert re.fullmatch(r"[A-Z][A-Za-z0-9 .,+-]{2,35}", title) and not app, (
        "a title: words, at most 36 characters"
    )
    graph = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))
    assert name.endswith(".app") == bool(graph.get("extra", {}).get("linearMode"))


def nodes(name: str) -> list[dict]:
    found = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))["nodes"]
    return [node for node in found if node["type"] not in ("Note", "MarkdownNote")]


def files(node: dict) -> list[str]:
    """The model files a node asks for."""
    values = [value for value in node.get("widgets_values") or [] if isinstance(value, str)]
    return [v for v in values if v.endswith(".safetensors") and "tiny demo" not in v and v != OWN]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_node_says_which_package_it_needs(name):
    for node in nodes(name):
        ours = node["type"] in comfyui_diptych.NODE_CLASS_MAPPINGS
        version = comfyui_diptych.__version__ if ours else "0.3.64"
        assert node["properties"]["cnr_id"] == (missing.DISTRIBUTION if ours else "comfy-core")
        assert node["properties"]["ver"] == version, f"write {version} into {name}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_can_offer_every_model_file_for_download(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else None
    for node in nodes(name):
        models = {entry["name"]: entry for entry in node["properties"].get("models", [])}
        assert sorted(models) == sorted(files(node))
        for file, entry in models.items():
            assert entry["directory"] == FOLDERS.get(node["type"], "loras")
            url = urlparse(entry["url"])  # the page takes safetensors from these hosts only
            assert (url.scheme, url.netloc) == ("https", "huggingface.co") and url.path.endswith(
                ".safetensors"
            )
            owner, repository, resolve, branch, *_ = url.path.lstrip("/").split("/")
            assert (resolve, branch) == ("resolve", "main")
            note = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))["nodes"][0]["widgets_values"][0]
            assert f"{owner}/{repository}" in note and file in note
            assert readme is None or f"`{file}`" in readme and f"{owner}/{repository}" in readme
