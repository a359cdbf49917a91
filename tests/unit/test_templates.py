"""What the example workflows say of themselves to ComfyUI's page: where nodes come from, where models are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlparse

import comfyui_diptych
import pytest
from comfyui_diptych import missing
from PIL import Image

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
    assert name.endswith(".app") == bool(graph(name).get("extra", {}).get("linearMode"))


def graph(name: str) -> dict:
    return json.loads(TEMPLATES[name].read_text(encoding="utf-8"))


def nodes(name: str) -> list[dict]:
    """Every node, those inside subgraphs too."""
    workflow = graph(name)
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    found = [node for part in (workflow, *subgraphs) for node in part["nodes"]]
    passed = ("Note", "MarkdownNote", *(part["id"] for part in subgraphs))
    return [node for node in found if node["type"] not in passed]


def files(node: dict) -> list[str]:
    """The model files a node asks for."""
    values = [value for value in node.get("widgets_values") or [] if isinstance(value, str)]
    return [v for v in values if v.endswith(".safetensors") and "tiny demo" not in v and v != OWN]


def note(name: str) -> str:
    """The text of the note that stands first in a template."""
    first = graph(name)["nodes"][0]
    assert first["type"] == "MarkdownNote"
    return first["widgets_values"][0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thumbnail_is_square_and_leaves_the_corner_of_the_badge(name):
    """The page lays a badge over 121 x 32 of a thumbnail's 256 px (ComfyUI 0.33, frontend 1.49)."""
    path = TEMPLATES[name].with_suffix(".jpg")
    assert path.stat().st_size <= 60_000
    with Image.open(path) as thumbnail:
        assert thumbnail.format == "JPEG" and thumbnail.width == thumbnail.height
        side = thumbnail.width
        corner = thumbnail.convert("L").crop((0, 0, side * 121 // 256, side * 32 // 256))
    darkest, lightest = corner.getextrema()
    assert lightest - darkest < 24, "something stands under the page's badge: begin 1/8 below the top"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_note_says_that_it_runs_at_once_or_whose_the_thumbnail_is(name):
    if any(files(node) for node in nodes(name)):
        assert "The thumbnail is the bundled tiny model's" in note(name)
    else:
        assert "**no file is needed**" in note(name)


def test_no_two_templates_show_the_same_edit():
    shown: dict[tuple, str] = {}
    for name in TEMPLATES:
        texts = [n["widgets_values"][0] for n in nodes(name) if n["type"] == "CLIPTextEncode"]
        for node in nodes(name):
            if node["type"] == "DiptychDemoImage":
                example, operation, *_ = node["widgets_values"]
                edit = (example, operation, *filter(None, texts))
                assert edit not in shown, f"{name} shows the edit of {shown[edit]}"
                shown[edit] = name


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
            if node["type"] == "DiptychEditModelLoader":
                assert entry["directory"] in ("diffusion_models", "text_encoders", "vae")
            else:
                assert entry["directory"] == FOLDERS.get(node["type"], "loras")
            url = urlparse(entry["url"])  # the page takes safetensors from these hosts only
            assert (url.scheme, url.netloc) == ("https", "huggingface.co") and url.path.endswith(
                ".safetensors"
            )
            owner, repository, resolve, branch, *_ = url.path.lstrip("/").split("/")
            assert (resolve, branch) == ("resolve", "main")
            assert f"[{owner}/{repository}](https://huggingface.co/{owner}/{repository})" in note(name)
            assert f"`{file}`" in note(name)
            assert readme is None or f"`{file}`" in readme and f"{owner}/{repository}" in readme
